"""Put a bundle in the place of the model that a repository holds, and of the one that its server serves.

The new version is proven through a server before anybody sees it: its canaries are sent to a model of its own, beside
the one that serves. Then the server loads it as the next version of `embed`, which it does before it lets the old one
go; requests under way are answered by the model that accepted them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
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
from mirror_runtime.selection import AUTO, EXACT, choose
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.triton.repository.render import link_or_copy, write_model
from mirror_runtime.triton.server.control import Access, ModelControl
from mirror_runtime.triton.server.deploy_lock import deploying, serving
from mirror_runtime.triton.server.processes import runners
from mirror_runtime.triton.server.server import CANDIDATE_NAME, STARTUP_S, Server
from mirror_runtime.vectors import components
from mirror_runtime.verify import check_fingerprint

_CONFIG_FILE = "config.pbtxt"
_FAKE_FLOOR = 0.99999
_OLD_MODEL_ENDS_S = 30.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What a deployment did.

    Attributes:
        version: of the model `embed`, which replies carry as well.
        fingerprint: of the new model.
        previous: of the one before; None where there was none.
        switched: whether a running server serves the new model now. Else the next start will.
        min_cosine: of the canaries' vectors, as the server gave them, to the stored ones; the worst.
        seconds: that it took.
    """

    version: int
    fingerprint: str
    previous: str | None
    switched: bool
    min_cosine: float
    seconds: float


def deploy(
    bundle: Path,
    repository: Path,
    options: ServingOptions | None = None,
    *,
    link: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Deployment:
    """Replace the model of a repository by a bundle; the version before is kept, older ones are removed.

    Where `mirror serve` runs on the repository, its clients see the old model or the new one, never an error. Both are
    in memory for a while. Whatever fails, the old model serves on and the repository stays as it was.

    Args:
        bundle: what to serve from now on.
        repository: the model repository; made where absent.
        options: how to serve it; None keeps what the present version has.
        link: share the bundle's files by hard links where the file system allows it.
        say: called with a line for people at each step.

    Raises:
        BundleError: `bundle` is none, is corrupted, or has no canaries that could prove it.
        EngineError: it has nothing that runs here as asked.
        InputError: the repository cannot be written, or another process deploys into it.
        ParityError: the vectors that the server gives are not those of the bundle.
        ServerError: the server does not load it.
    """
    began = time.monotonic()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    check_fingerprint(manifest)
    canaries = read_canaries(bundle)
    if not canaries:
        raise BundleError(f"{bundle} has no canaries, so nothing can prove it here: export the encoder again")
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{repository} cannot be written: {error.strerror}") from error
    model = repository.resolve() / MODEL_NAME
    with deploying(repository), _scratch(model.parent) as scratch:
        access = serving(repository)
        options = options or present_options(model)
        if options.backend is not Backend.PYTHON:
            raise InputError(
                f"{model} runs in Triton's {options.backend.value} backend: mirror deploy replaces those of the Python "
                "backend alone; write a repository with export/to_triton.py instead"
            )
        choose(manifest, options.engine, options.precision)
        proof = _Proof(
            manifest=manifest,
            canaries=canaries,
            floor=_floor(manifest, options),
            batch_size=min(32, options.max_batch_size),
        )
        before, version = _versions(model)
        say(f"writing version {version} ({manifest.fingerprint})")
        fresh = _write(bundle, manifest, scratch, model, options, version, link=link)
        staged = fresh / str(version) / "bundle"
        say("proving it through a server" if access is None else "proving it beside the model that serves")
        cosine, kept = _try_out(manifest, staged, scratch, model.parent, options, access, proof)
        with _published(fresh, model, scratch) as take_back:
            if access is not None:
                say("switching")
                _switch(access, replace(proof, canaries=kept), take_back)
    return Deployment(
        version=version,
        fingerprint=manifest.fingerprint,
        previous=before,
        switched=access is not None,
        min_cosine=cosine,
        seconds=time.monotonic() - began,
    )


def present_options(model: Path) -> ServingOptions:
    """Read how a model folder serves its bundle; the defaults where there is none.

    Raises:
        InputError: its configuration is none that we wrote.
    """
    path = model / _CONFIG_FILE
    if not path.exists():
        return ServingOptions()
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        said = {name: value.string_value for name, value in config.parameters.items()}
        return ServingOptions.of_parameters(said, config.max_batch_size)
    except (text_format.ParseError, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} is no configuration that this project wrote ({error}): deploy elsewhere") from error


@dataclass(frozen=True, kw_only=True)
class _Proof:
    """What the vectors of a served model have to be."""

    manifest: Manifest
    canaries: Sequence[Canary]
    floor: float
    batch_size: int

    def check(self, address: str, model: str) -> tuple[float, list[Canary]]:
        """Send the canaries to a served model.

        Returns:
            The worst cosine, and the canaries that were not cut off.

        Raises:
            ParityError: other vectors come back, or none.
            ServerError: the server failed.
        """
        with Client(address, model=model, timeout_s=STARTUP_S) as client:
            served = client.encode_detailed([canary.text for canary in self.canaries], self.batch_size)
        if served.errors:
            raise ParityError(f"the server refuses a canary: {served.errors[min(served.errors)]}")
        if served.fingerprint != self.manifest.fingerprint:
            raise ParityError(f"the server answers as {served.fingerprint}, not as {self.manifest.fingerprint}")
        found = compare_canaries(components(served.vectors, self.manifest.encoder), self.canaries, self.floor)
        if found.verdict is not CanaryVerdict.AGREES or found.min_cosine is None:
            raise ParityError(f"the server's vectors are not those that the bundle stores: {found.problem}")
        return found.min_cosine, [self.canaries[i] for i in np.flatnonzero(~served.truncated)]


def _floor(manifest: Manifest, options: ServingOptions) -> float:
    """Give the cosine that the least exact artifact which may be chosen is held to."""
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
    """Give the fingerprint of the version that a model folder serves, and the number of the next one."""
    numbers = [int(entry.name) for entry in model.glob("*") if entry.is_dir() and entry.name.isdecimal()]
    if not numbers:
        return None, 1
    return read_manifest(model / str(max(numbers)) / "bundle").fingerprint, max(numbers) + 1


@contextlib.contextmanager
def _scratch(repository: Path) -> Iterator[Path]:
    """Give a folder beside the repository: within it, a server that loads everything would take it for a model."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{repository.name}.deploy-", dir=repository.parent))
    except OSError as error:
        raise InputError(f"{repository.parent} cannot be written: {error.strerror}") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(
    bundle: Path,
    manifest: Manifest,
    scratch: Path,
    model: Path,
    options: ServingOptions,
    version: int,
    *,
    link: bool,
) -> Path:
    """Write the model's folder with the new version and the one before, all but in its place."""
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
        raise InputError(f"{scratch} cannot be written: {error}") from error
    return fresh


def _try_out(
    manifest: Manifest,
    staged: Path,
    scratch: Path,
    repository: Path,
    options: ServingOptions,
    access: Access | None,
    proof: _Proof,
) -> tuple[float, list[Canary]]:
    """Prove the new version by a model of its own: on the running server, or on one that is started for it."""
    name = MODEL_NAME if access is None else CANDIDATE_NAME
    trial = scratch / "trial"
    folder = trial / name
    folder.mkdir(parents=True)
    # A canary is too long on purpose, and its stored vector is that of the cut text.
    write_model(manifest, folder, replace(options, long_texts=LongTexts.TRUNCATE), bundle=str(staged))
    if access is None:
        with Server(trial) as server:
            return proof.check(server.access.address, name)
    config = folder / _CONFIG_FILE
    text = config.read_text(encoding="utf-8").replace(f'name: "{MODEL_NAME}"', f'name: "{name}"', 1)
    config.write_text(text, encoding="utf-8")
    place = repository / CANDIDATE_NAME
    shutil.rmtree(place, ignore_errors=True)  # what a killed deployment left
    with ModelControl(access) as control:
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
def _published(fresh: Path, model: Path, scratch: Path) -> Iterator[Callable[[], None]]:
    """Put a model folder into its place; gives what takes it back, which happens by itself when the block fails."""
    aside, refused = scratch / "replaced", scratch / "refused"

    def take_back() -> None:
        if model.exists() and not fresh.exists():
            os.rename(model, refused)
        if aside.exists():
            os.rename(aside, model)

    try:
        if model.exists():
            os.rename(model, aside)
        os.rename(fresh, model)
        yield take_back
    except BaseException:
        if not refused.exists():
            take_back()
        raise


def _switch(access: Access, proof: _Proof, take_back: Callable[[], None]) -> None:
    """Let the server load what lies in the repository now, and prove it under the name that clients use."""
    with ModelControl(access) as control:
        _load(control, access.pid)
        try:
            proof.check(access.address, MODEL_NAME)
        except BaseException:
            take_back()
            _load(control, access.pid)
            raise


def _load(control: ModelControl, server: int) -> None:
    """Load the model again, and wait until the processes of the one that loses are gone: the watchdog may see that."""
    before = set(runners(server, MODEL_NAME))
    try:
        control.load(MODEL_NAME, STARTUP_S)
    except ServerError:  # the old model serves on
        _wait(lambda: before.issuperset(runners(server, MODEL_NAME)))
        raise
    _wait(lambda: before.isdisjoint(runners(server, MODEL_NAME)))


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _OLD_MODEL_ENDS_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
