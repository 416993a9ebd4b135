"""The Python-backend model `embed`: TEXT bytes [1] in, EMBEDDING, TOKENS and TRUNCATED out.

Imported inside Triton's stub process alone, where `triton_python_backend_utils` exists. What can be tested without
Triton lives in `batching`.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import BundleError, MirrorError
from mirror_runtime.triton.batching import Answer, Failure, FailureKind, answer


class TritonPythonModel:
    """The class that Triton's Python backend looks for by name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle that `config.pbtxt` names.

        Args:
            args: Triton's: the configuration as JSON, the model's folder and version.

        Raises:
            TritonModelException: the bundle cannot be loaded as asked; Triton prints the message and does not start.
        """
        # One instance: tokenising and inference take turns, so tokenising may use every core. Only this process is
        # concerned; an operator's own choice stands.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        version = Path(args["model_repository"]) / args["model_version"]
        try:
            self.encoder = Encoder.load(
                version / parameters["bundle"],
                engine=parameters["engine"],
                precision=parameters["precision"],
                streams=None if parameters["streams"] == "auto" else int(parameters["streams"]),
                long_texts=parameters["long_texts"],
            )
            if self.encoder.fingerprint != parameters["fingerprint"]:
                raise BundleError(
                    f"config.pbtxt promises vectors of {parameters['fingerprint']} and the bundle gives "
                    f"{self.encoder.fingerprint}: write the repository again with export/to_triton.py"
                )
            # Triton's own warm-up sends single texts; here every shape is known, and ready shall mean warm.
            self.encoder.warm_up()
        except MirrorError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        engine = self.encoder.engine
        pb_utils.Logger.log_info(
            f"embed: {engine.name.value} {engine.precision.value}, {engine.streams} streams, "
            f"dim {self.encoder.spec.dim}, {self.encoder.manifest.fingerprint}"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request of a batch, in order.

        Nothing is ever raised from here: Triton would fail the whole batch and show clients this file's path.
        """
        try:
            outcomes = answer(
                self.encoder, [pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy() for request in requests]
            )
        except Exception:
            # The edge of the process: whatever happened, each waiter gets an answer and the log gets the reason.
            pb_utils.Logger.log_error(f"embed: a batch of {len(requests)} requests failed\n{traceback.format_exc()}")
            failure = Failure(kind=FailureKind.INTERNAL, message="encoding failed; the server's log says why")
            outcomes = [failure] * len(requests)
        return [_response(outcome) for outcome in outcomes]

    def finalize(self) -> None:
        """Release the engine."""
        self.encoder.close()


def _response(outcome: Answer | Failure) -> Any:
    if isinstance(outcome, Failure):
        code = getattr(pb_utils.TritonError, outcome.kind.value)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(outcome.message, code))
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("EMBEDDING", outcome.vectors),
            pb_utils.Tensor("TOKENS", outcome.tokens),
            pb_utils.Tensor("TRUNCATED", outcome.truncated),
        ]
    )
