"""The Python-backend model `embed`: TEXT bytes [1] in, EMBEDDING, TOKENS, TRUNCATED and FINGERPRINT out.

Imported inside Triton's stub process alone, where `triton_python_backend_utils` exists. What can be tested without
Triton lives in `queueing` and what that uses.

`execute` computes no more than a little: beyond that it takes requests or refuses them, and workers answer later. While
the engine works, the next requests are thus read, tokenised and packed, and what is too much learns it at once instead
of waiting in Triton's own queue.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mirror_runtime.bundle import read_manifest
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import BundleError, InputError, MirrorError
from mirror_runtime.plan import Decision
from mirror_runtime.tokenizer import Tokenizer
from mirror_runtime.triton.model.backend_model import find_artifact, packed_ladder
from mirror_runtime.triton.model.batching import EmbedRequest, EmbedResult, Failure, FailureKind
from mirror_runtime.triton.model.bls_engine import RemoteEngine
from mirror_runtime.triton.model.instances import take_share
from mirror_runtime.triton.model.metrics import Reading, Reporter
from mirror_runtime.triton.model.request_options import read_wishes
from mirror_runtime.triton.model.scheduler import Job, Outcome, Scheduler
from mirror_runtime.triton.model.token_budget import TokenBudget
from mirror_runtime.triton.repository.options import Backend, ServingOptions


class TritonPythonModel:
    """The class that Triton's Python backend looks for by name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle that `config.pbtxt` names.

        Args:
            args: Triton's: the configuration as JSON, the model's folder and version, the instance's name.

        Raises:
            TritonModelException: the bundle cannot be loaded as asked; Triton prints the message and does not start.
        """
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        try:
            options = ServingOptions.of_parameters(parameters, int(config["max_batch_size"]))
        except (InputError, KeyError, ValueError) as error:
            raise pb_utils.TritonModelException(
                f"config.pbtxt is of another version of this project ({error}): write the repository again"
            ) from None
        # Tokenising may use every core that this process has; an operator's own choice stands.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        _log_to_triton()
        try:
            take_share(args["model_instance_name"], options.instances)
            bundle = Path(args["model_repository"]) / args["model_version"] / parameters["bundle"]
            self.encoder = _load(bundle, options, args["model_version"])
            if self.encoder.fingerprint != parameters["fingerprint"]:
                raise BundleError(
                    f"config.pbtxt promises vectors of {parameters['fingerprint']} and the bundle gives "
                    f"{self.encoder.fingerprint}: write the repository again with export/to_triton.py"
                )
            if options.backend is Backend.PYTHON:
                # Triton's own warm-up sends single texts; here every shape is known, and ready shall mean warm. Another
                # model warms itself, and cannot be reached before the server is ready.
                self.encoder.warm_up()
        except MirrorError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._fingerprint = self.encoder.fingerprint
        # Server 2.51 has no response parameters: the output FINGERPRINT says it everywhere.
        self._takes_parameters = "parameters" in (pb_utils.InferenceResponse.__init__.__doc__ or "")
        self._gate = TokenBudget(max(1, options.max_tokens_in_flight // options.instances))
        engine = self.encoder.engine
        self._desk = Scheduler(
            self.encoder,
            self._gate,
            long_texts=options.long_texts,
            batch_tokens=self.encoder.decision.batch_tokens * engine.streams,
            workers=engine.streams + 1,
        )
        names = {"model": "model_name", "version": "model_version", "instance": "model_instance_name"}
        self._reporter = Reporter(pb_utils, {label: args[name] for label, name in names.items()}, self._reading)
        pb_utils.Logger.log_info(
            f"embed: {engine.name.value} {engine.precision.value}, {engine.streams} streams, "
            f"dim {self.encoder.spec.dim}, {self._fingerprint}"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer, take or refuse requests.

        Nothing is ever raised from here: Triton would fail the whole batch and show clients this file's path.

        Returns:
            For each request a response where it was answered or refused, None where a worker will answer it.
        """
        read = [self._read(request) for request in requests]
        offered = iter(self._desk.offer([job for job, _ in read if isinstance(job, Job)]))
        outcomes = [next(offered) if isinstance(job, Job) else job for job, _ in read]
        return [
            None if outcome is None else self._response(outcome, names)
            for (_, names), outcome in zip(read, outcomes, strict=True)
        ]

    def finalize(self) -> None:
        """Answer what was taken, and release the engine."""
        self._desk.close()
        self._reporter.close()
        self.encoder.close()

    def _read(self, request: Any) -> tuple[Job | Failure, frozenset[str]]:
        """Read a request, and the names of the outputs that it wants."""
        try:
            texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            wishes = read_wishes(request.parameters(), self.encoder.spec)
            sender = request.get_response_sender()
            names = frozenset(request.requested_output_names())

            def reply(outcome: Outcome) -> None:
                sender.send(self._response(outcome, names), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

            job = Job(
                question=EmbedRequest(texts=texts, wishes=wishes),
                reply=reply,
                is_cancelled=sender.is_cancelled,
                timeout_s=request.timeout() / 1e6 or None,
            )
        except InputError as error:
            return Failure(kind=FailureKind.INVALID_ARG, message=str(error)), frozenset()
        except Exception:
            return _failure("the request could not be read"), frozenset()
        return job, names

    def _response(self, outcome: Outcome, names: frozenset[str]) -> Any:
        """Write an outcome; an answer that cannot be written becomes a failure, so that nobody waits for ever."""
        if isinstance(outcome, EmbedResult):
            try:
                return self._written(outcome, names)
            except Exception:
                outcome = _failure("the answer could not be written")
        code = getattr(pb_utils.TritonError, outcome.kind.value)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(outcome.message, code))

    def _written(self, outcome: EmbedResult, names: frozenset[str]) -> Any:
        tensors = [
            pb_utils.Tensor("EMBEDDING", np.ascontiguousarray(outcome.vectors)),
            pb_utils.Tensor("TOKENS", outcome.tokens),
            pb_utils.Tensor("TRUNCATED", outcome.truncated),
        ]
        if "FINGERPRINT" in names:
            named = np.full(outcome.tokens.shape, self._fingerprint.encode(), np.object_)
            tensors.append(pb_utils.Tensor("FINGERPRINT", named))
        if self._takes_parameters:
            return pb_utils.InferenceResponse(tensors, parameters={"fingerprint": self._fingerprint})
        return pb_utils.InferenceResponse(tensors)

    def _reading(self) -> Reading:
        stats = self.encoder.stats
        return Reading(
            requests=self._desk.counts,
            tokens=stats.tokens,
            slots=stats.slots,
            batches=stats.executions,
            in_flight=self._gate.in_flight,
        )


def _failure(what: str) -> Failure:
    """Tell the log why something failed, at the edge of the process, and the waiter that it did."""
    pb_utils.Logger.log_error(f"embed: {what}\n{traceback.format_exc()}")
    return Failure(kind=FailureKind.INTERNAL, message=f"{what}; the server's log says why")


class _TritonHandler(logging.Handler):
    """Writes what our modules log into Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = pb_utils.Logger.log_error if record.levelno >= logging.ERROR else pb_utils.Logger.log_warn
        log(f"embed: {self.format(record)}")


def _log_to_triton() -> None:
    ours = logging.getLogger("mirror_runtime")
    ours.handlers = [_TritonHandler(logging.WARNING)]
    # It warns of truncated texts, batch by batch; here each response says so itself.
    logging.getLogger("mirror_runtime.encoder").setLevel(logging.ERROR)


def _load(bundle: Path, options: ServingOptions, version: str) -> Encoder:
    if options.backend is not Backend.PYTHON:
        return _load_remote(bundle, options, version)
    if options.setting is not None:
        return Encoder.of_setting(bundle, options.setting)
    return Encoder.load(bundle, engine=options.engine, precision=options.precision, streams=options.streams)


def _load_remote(bundle: Path, options: ServingOptions, version: str) -> Encoder:
    """Load what turns texts into packed rows; the rows go to the model `encoder`."""
    manifest = read_manifest(bundle)
    artifact = find_artifact(manifest, options)
    engine = RemoteEngine(pb_utils, artifact, options.streams or 1, int(version))
    ladder = packed_ladder(manifest, options)
    decision = Decision(
        engine=artifact.engine,
        precision=artifact.precision,
        artifact=artifact,
        streams=engine.streams,
        row_tokens=ladder.lengths[0],
        batch_tokens=ladder.budget,
    )
    tokenizer = Tokenizer.of(bundle, manifest.encoder, options.long_texts)
    return Encoder(manifest, decision, engine, tokenizer, ladder)
