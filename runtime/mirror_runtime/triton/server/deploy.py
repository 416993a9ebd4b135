"""Replace the model in a repository, and the one that its server serves, by a bundle.

The new version is proven through a server before clients see it: the server loads it beside the serving model under
another name and encodes its canaries. Then it loads it as the next version of `embed`, and only then unloads the old
version. Each request is answered by the model that accepted it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mirror_runtime.bundle import Canary, EngineName, Layout, Manifest, check_files, read_canaries, read_manifest
from mirror_runtime.canaries import CanaryVerdict, compare_canaries
from mirror_runtime.client.client import Client
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import BundleError, InputError, ParityError, ServerError
from mirror_runtime.folders import os_error_message
from mirror_runtime.selection import AUTO, EXACT, choose
from mirror_runtime.serving_process import stop_signals_handled
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.triton.repository.render import link_or_copy, write_model
from mirror_runtime.triton.server.control import Access, ModelControl
from mirror_runtime.triton.server.deploy_lock import CANDIDATE_NAME, REPLACED, deploying, find_server
from mirror_runtime.triton.server.processes import runners
from mirror_runtime.triton.server.server import STARTUP_S, Server
from mirror_runtime.vectors import components
from mirror_runtime.verify import check_fingerprint

_CONFIG_FILE = "config.pbtxt"
_FAKE_FLOOR = 0.99999
_OLD_MODEL_ENDS_S = 30.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """The result of a deployment."""

    version: int  # of the model `embed`; replies carry it too
    fingerprint: str
    previous: str | None  # fingerprint of the model before; None if there was none
    switched: bool  # whether a running server serves the new model now. Otherwise the next start will
    min_cosine: float  # smallest cosine between the canaries' vectors from the server and the stored ones
    seconds: float


def deploy(
    bundle: Path,
    repository: Path,
    options: ServingOptions | None = None,
    *,
    link: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> DeployReport:
    """Replace the model of a repository by a bundle; keep the version before, and remove older ones.

    If `mirror serve` runs on the repository, its clients see the old model or the new one, never an error. For a while
    both are in memory. Whatever fails, the old model continues to serve and the repository stays unchanged. If this
    process is killed, the server serves one of both, and the next deployment clears the rest. Without `options`, those
    of the present version stay, except `dimensions`.

    Raises:
        BundleError: `bundle` is not a bundle, is corrupted, or has no canaries to prove it with.
        EngineError: it has no artifact that runs here with the options.
        InputError: the repository cannot be written, or another process deploys into it.
        ParityError: the server's vectors differ from the bundle's.
        ServerError: the server cannot load it.
    """
    began = time.monotonic()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    check_fingerprint(manifest)
    canaries = read_canaries(bundle)
    if not canaries:
        raise BundleError(f"{bundle} has no canaries to prove it with: export the encoder again")
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{repository} cannot be written: {error.strerror}") from error
    model = repository.resolve() / MODEL_NAME
    with deploying(repository) as scratch:
        access = find_server(repository)
        options = options or present_options(model)
        if options.backend is not Backend.PYTHON:
            raise InputError(
                f"{model} runs in Triton's {options.backend.value} backend, and mirror deploy supports the Python "
                "backend only: write a repository with export/to_triton.py instead"
            )
        choose(manifest, options.engine, options.precision)
        proof = _Proof(
            manifest=manifest,
            canaries=canaries,
            floor=_floor(manifest, options),
            batch_size=min(32, options.max_batch_size),
        )
        before, version = _versions(model)
        on_progress(f"writing version {version} ({manifest.fingerprint})")
        fresh = _write(bundle, manifest, scratch, model, options, version, link=link)
        staged = fresh / str(version) / "bundle"
        on_progress("proving it through a server" if access is None else "proving it beside the model that serves")
        cosine, kept = _try_out(staged, scratch, model.parent, options, access, proof)
        with _uninterrupted(), _published(fresh, model, scratch) as undo:
            if access is not None:
                on_progress("switching")
                _switch(access, replace(proof, canaries=kept), undo)
    return DeployReport(
        version=version,
        fingerprint=manifest.fingerprint,
        previous=before,
        switched=access is not None,
        min_cosine=cosine,
        seconds=time.monotonic() - began,
    )


def present_options(model: Path) -> ServingOptions:
    """Read the serving options of a model folder; return the defaults if it does not exist.

    Without `dimensions`: the next bundle need not be trained for those of the present one.
    """
    path = model / _CONFIG_FILE
    if not path.exists():
        return ServingOptions()
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        parameters = {name: value.string_value for name, value in config.parameters.items()}
        return replace(ServingOptions.of_parameters(parameters, config.max_batch_size), dimensions=())
    except (text_format.ParseError, KeyError, ValueError, OSError) as error:
        raise InputError(f"this project did not write {path} ({error}): deploy into another repository") from error


@dataclass(frozen=True, kw_only=True)
class _Proof:
    """The vectors that a served model must return."""

    manifest: Manifest
    canaries: Sequence[Canary]
    floor: float
    batch_size: int

    def check(self, address: str, model: str) -> tuple[float, list[Canary]]:
        """Compare a served model's canaries with the stored ones; return the worst cosine and those not truncated."""
        with Client(address, model=model, timeout_s=STARTUP_S) as client:
            query = self.canaries[0].text if self.manifest.encoder.scores_pairs else None
            served = client.encode_detailed([canary.text for canary in self.canaries], self.batch_size, query=query)
        if served.errors:
            raise ParityError(f"the server rejects a canary: {served.errors[min(served.errors)]}")
        if served.fingerprint != self.manifest.fingerprint:
            raise ParityError(f"the server answers as {served.fingerprint}, not as {self.manifest.fingerprint}")
        found = compare_canaries(components(served.vectors, self.manifest.encoder), self.canaries, self.floor)
        if found.verdict is not CanaryVerdict.AGREES or found.min_cosine is None:
            raise ParityError(f"the server's vectors differ from those in the bundle: {found.problem}")
        return found.min_cosine, [self.canaries[i] for i in np.flatnonzero(~served.truncated)]


def _floor(manifest: Manifest, options: ServingOptions) -> float:
    """Return the smallest floor of the artifacts that the options allow."""
    floors = [
        artifact.parity.floor
        for artifact in manifest.artifacts
        if artifact.layout is Layout.PACKED
        and options.engine in (AUTO, artifact.engine.value)
        and (
            options.precision == artifact.precision.value or (options.precision == AUTO and artifact.precision in EXACT)
        )
    ]
    return min(floors) if options.engine != EngineName.FAKE.value and floors else _FAKE_FLOOR


def _versions(model: Path) -> tuple[str | None, int]:
    """Return the fingerprint of the version that a model folder serves, and the number of the next version."""
    numbers = [int(entry.name) for entry in model.glob("*") if entry.is_dir() and entry.name.isdecimal()]
    if not numbers:
        return None, 1
    return read_manifest(model / str(max(numbers)) / "bundle").fingerprint, max(numbers) + 1


def _write(
    bundle: Path, manifest: Manifest, scratch: Path, model: Path, options: ServingOptions, version: int, *, link: bool
) -> Path:
    """Write the model's folder, with the new version and the one before, into the scratch folder."""
    fresh = scratch / MODEL_NAME
    try:
        fresh.mkdir()
        write_model(manifest, fresh, options)
        if version > 1:
            (fresh / "1").rename(fresh / str(version))
            old = str(version - 1)
            shutil.copytree(model / old, fresh / old, copy_function=link_or_copy)
        shutil.copytree(bundle, fresh / str(version) / "bundle", copy_function=link_or_copy if link else shutil.copy2)
    except OSError as error:
        raise InputError(f"{scratch} cannot be written: {os_error_message(error)}") from error
    return fresh


def _try_out(
    staged: Path, scratch: Path, repository: Path, options: ServingOptions, access: Access | None, proof: _Proof
) -> tuple[float, list[Canary]]:
    """Prove the new version under a name of its own, on the running server or on one started for it."""
    name = MODEL_NAME if access is None else CANDIDATE_NAME
    trial = scratch / "trial"
    folder = trial / name
    folder.mkdir(parents=True)
    # One canary is longer than the encoder takes; its stored vector is that of the truncated text.
    write_model(proof.manifest, folder, replace(options, long_texts=LongTexts.TRUNCATE), bundle=str(staged))
    if access is None:
        with Server(trial) as server:
            return proof.check(server.access.address, name)
    config = folder / _CONFIG_FILE
    text = config.read_text(encoding="utf-8").replace(f'name: "{MODEL_NAME}"', f'name: "{name}"', 1)
    config.write_text(text, encoding="utf-8")
    place = repository / CANDIDATE_NAME
    with ModelControl(access) as control:
        # A killed deployment may have asked for what the server still does: loading, or ending the replaced model.
        _wait(lambda: not control.busy() and len(runners(access.pid, MODEL_NAME)) <= options.instances)
        if runners(access.pid, name):
            control.unload(name)
            _wait(lambda: not runners(access.pid, name))
        try:
            os.rename(folder, place)
            control.load(name, STARTUP_S)
            return proof.check(access.address, name)
        finally:
            with contextlib.suppress(ServerError):
                control.unload(name)
            shutil.rmtree(place, ignore_errors=True)
            _wait(lambda: not runners(access.pid, name))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore signals to stop: a switch takes a moment, and files must not move while the server loads them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with stop_signals_handled(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _published(fresh: Path, model: Path, scratch: Path) -> Iterator[Callable[[], None]]:
    """Move a model folder into its place; yield a function that undoes it, which also runs if the block fails."""
    replaced, rejected = scratch / REPLACED, scratch / "rejected"

    def undo() -> None:
        if model.exists() and not fresh.exists():
            os.rename(model, rejected)
        if replaced.exists():
            os.rename(replaced, model)

    try:
        if model.exists():
            os.rename(model, replaced)
        os.rename(fresh, model)
        yield undo
    except BaseException:
        if not rejected.exists():
            undo()
        raise


def _switch(access: Access, proof: _Proof, undo: Callable[[], None]) -> None:
    """Load the repository's model into the server, and prove it under the name that clients use."""
    with ModelControl(access) as control:
        _load(control, access.pid)
        try:
            proof.check(access.address, MODEL_NAME)
        except BaseException:
            undo()
            _load(control, access.pid)
            raise


def _load(control: ModelControl, server: int) -> None:
    """Reload the model, and wait for the end of the replaced processes, while the watchdog still tolerates it."""
    before = set(runners(server, MODEL_NAME))
    try:
        control.load(MODEL_NAME, STARTUP_S)
    except ServerError:  # the old model continues to serve
        _wait(lambda: before.issuperset(runners(server, MODEL_NAME)))
        raise
    _wait(lambda: before.isdisjoint(runners(server, MODEL_NAME)))


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _OLD_MODEL_ENDS_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
