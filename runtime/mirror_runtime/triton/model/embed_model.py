"""The Python-backend model `embed`: TEXT bytes [1] in, EMBEDDING, TOKENS, TRUNCATED and FINGERPRINT out.

Imported only inside Triton's stub process, where `triton_python_backend_utils` exists. `scheduler` and the modules that
it uses hold everything that does not depend on Triton.

`execute` computes small batches only. Beyond those it accepts or rejects requests, and workers reply later: while the
engine works, the next requests are read, tokenised and packed, and requests over the limit are rejected immediately
instead of waiting in Triton's own queue.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mirror_runtime.bundle import read_manifest
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import BundleError, InputError, MirrorError
from mirror_runtime.pairs import tokenizer_of
from mirror_runtime.plan import Decision
from mirror_runtime.triton.model.backend_model import find_artifact, packed_shape_set
from mirror_runtime.triton.model.batching import EmbedRequest, EmbedResult, Failure, FailureKind
from mirror_runtime.triton.model.bls_engine import BlsEngine
from mirror_runtime.triton.model.draining import DrainWatch
from mirror_runtime.triton.model.instances import bind_to_share
from mirror_runtime.triton.model.log import TritonHandler
from mirror_runtime.triton.model.metrics import MetricsReporter
from mirror_runtime.triton.model.request_options import parse_options
from mirror_runtime.triton.model.scheduler import Job, Outcome, Scheduler, TokenBudget
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.twins import Speed

_log = logging.getLogger(__name__)


class TritonPythonModel:
    """The class that Triton's Python backend looks up by name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle that `config.pbtxt` names. If it raises, Triton prints the message and does not start."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        try:
            options = ServingOptions.of_parameters(parameters, int(config["max_batch_size"]))
        except (InputError, KeyError, ValueError) as error:
            raise pb_utils.TritonModelException(
                f"config.pbtxt was written by another version of this project ({error}): write the repository again"
            ) from None
        # Tokenising may use every core of this process, unless the operator has set the variable.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        _log_to_triton()
        try:
            bind_to_share(args["model_instance_name"], options.instances)
            bundle = Path(args["model_repository"]) / args["model_version"] / parameters["bundle"]
            self.encoder = _load(bundle, options, args["model_version"])
            if self.encoder.fingerprint != parameters["fingerprint"]:
                raise BundleError(
                    f"config.pbtxt promises vectors of {parameters['fingerprint']} and the bundle has "
                    f"{self.encoder.fingerprint}: write the repository again with export/to_triton.py"
                )
            if options.backend is Backend.PYTHON:
                # Triton's own warm-up sends single texts only. Here every shape is known, so that ready means warm.
                # A second model warms itself up, and cannot be reached before the server is ready.
                for one in self._encoders():
                    one.warm_up()
        except MirrorError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._trained = options.dimensions
        # Server 2.51 has no response parameters; the output FINGERPRINT works with every version.
        self._takes_parameters = "parameters" in (pb_utils.InferenceResponse.__init__.__doc__ or "")
        limit = max(1, options.max_tokens_in_flight // options.instances)
        self._schedulers = {  # a twin has limits of its own, like a second model
            speed: Scheduler(one, TokenBudget(limit), options.long_texts)
            for speed, one in zip(Speed, self._encoders(), strict=False)
        }
        self._drain_watch = DrainWatch(self._drain)
        names = {"model": "model_name", "version": "model_version", "instance": "model_instance_name"}
        self._reporter = MetricsReporter(pb_utils, {label: args[name] for label, name in names.items()}, self._snapshot)
        for one in self._encoders():
            pb_utils.Logger.log_info(
                f"embed: {one.engine.name.value} {one.engine.precision.value}, {one.engine.streams} streams, "
                f"dim {one.spec.dim}, {one.fingerprint}"
            )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer, accept or reject requests: a response for each, or None if a worker will answer it.

        Never raises: Triton would fail the whole batch and show clients the path of this file.
        """
        read = [self._read(request) for request in requests]
        submitted = {
            speed: iter(scheduler.submit(jobs))
            for speed, scheduler in self._schedulers.items()
            if (jobs := [job for job, _ in read if isinstance(job, Job) and job.request.options.speed is speed])
        }
        outcomes = [next(submitted[job.request.options.speed]) if isinstance(job, Job) else job for job, _ in read]
        return [
            None if outcome is None else respond(outcome) for (_, respond), outcome in zip(read, outcomes, strict=True)
        ]

    def finalize(self) -> None:
        """Answer the accepted requests, and release the engine."""
        self._drain_watch.close()
        for scheduler in self._schedulers.values():
            scheduler.close()
        self._reporter.close()
        self.encoder.close()

    def _encoders(self) -> tuple[Encoder, ...]:
        """Return the encoder, and its static twin if it has one."""
        return (self.encoder, *([self.encoder.at(Speed.FAST)] if self.encoder.has_twin else []))

    def _drain(self) -> None:
        for scheduler in reversed(self._schedulers.values()):  # the twin's is empty first
            scheduler.drain()

    def _read(self, request: Any) -> tuple[Job | Failure, Callable[[Outcome], Any]]:
        """Read a request; return also what builds its response."""
        try:
            texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            parameters, fast = request.parameters(), Speed.FAST in self._schedulers
            options = parse_options(parameters, self.encoder.spec, self._trained, fast=fast)
            sender = request.get_response_sender()
            names = frozenset(request.requested_output_names())
            respond = partial(self._response, names=names, space=self._schedulers[options.speed].encoder.fingerprint)

            def reply(outcome: Outcome) -> None:
                sender.send(respond(outcome), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

            job = Job(
                request=EmbedRequest(texts=texts, options=options),
                reply=reply,
                is_cancelled=sender.is_cancelled,
                timeout_s=request.timeout() / 1e6 or None,
            )
        except InputError as error:
            return Failure(kind=FailureKind.INVALID_ARG, message=str(error)), self._response
        except Exception:
            return _failure("the request could not be read"), self._response
        return job, respond

    def _response(self, outcome: Outcome, names: frozenset[str] = frozenset(), space: str = "") -> Any:
        """Build the response; a result that cannot be written becomes a failure, so that every caller gets a reply."""
        if isinstance(outcome, EmbedResult):
            try:
                return self._success(outcome, names, space)
            except Exception:
                outcome = _failure("the reply could not be written")
        code = getattr(pb_utils.TritonError, outcome.kind.value)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(outcome.message, code))

    def _success(self, outcome: EmbedResult, names: frozenset[str], space: str) -> Any:
        tensors = [
            pb_utils.Tensor("EMBEDDING", np.ascontiguousarray(outcome.vectors)),
            pb_utils.Tensor("TOKENS", outcome.tokens),
            pb_utils.Tensor("TRUNCATED", outcome.truncated),
        ]
        if "FINGERPRINT" in names:
            fingerprints = np.full(outcome.tokens.shape, space.encode(), np.object_)
            tensors.append(pb_utils.Tensor("FINGERPRINT", fingerprints))
        if self._takes_parameters:
            return pb_utils.InferenceResponse(tensors, parameters={"fingerprint": space})
        return pb_utils.InferenceResponse(tensors)

    def _snapshot(self) -> Counter[str]:
        found = Counter[str]()
        for one in self._schedulers.values():
            stats = one.encoder.stats
            work = {"tokens": stats.tokens, "slots": stats.slots, "batches": stats.executions}
            found.update({**one.counts, **work, "in_flight": one.budget.in_flight})
        return found


def _failure(message: str) -> Failure:
    """Log the exception that is being handled, and build a failure that does not quote it."""
    _log.exception(message)
    return Failure(kind=FailureKind.INTERNAL, message=f"{message}; the server's log says why")


def _log_to_triton() -> None:
    package = logging.getLogger("mirror_runtime")
    package.handlers = [TritonHandler(pb_utils)]
    # It warns of truncated texts in each batch; here each response reports them.
    logging.getLogger("mirror_runtime.encoder").setLevel(logging.ERROR)


def _load(bundle: Path, options: ServingOptions, version: str) -> Encoder:
    if options.backend is not Backend.PYTHON:
        return _load_with_backend(bundle, options, version)
    if options.setting is not None and not options.invariant:  # which has rows of its own
        return Encoder.of_setting(bundle, options.setting)
    return Encoder.load(
        bundle,
        engine=options.engine,
        precision=options.precision,
        streams=options.streams,
        invariant=options.invariant,
    )


def _load_with_backend(bundle: Path, options: ServingOptions, version: str) -> Encoder:
    """Load the tokenizer and packing; the rows go to the model `encoder`."""
    manifest = read_manifest(bundle)
    artifact = find_artifact(manifest, options)
    engine = BlsEngine(pb_utils, artifact, options.streams or 1, int(version))
    shape_set = packed_shape_set(manifest, options)
    decision = Decision(
        engine=artifact.engine,
        precision=artifact.precision,
        artifact=artifact,
        streams=engine.streams,
        row_tokens=shape_set.lengths[0],
        batch_tokens=shape_set.budget,
    )
    tokenizer = tokenizer_of(bundle, manifest.encoder, options.long_texts)
    return Encoder(manifest, decision, engine, tokenizer, shape_set)
