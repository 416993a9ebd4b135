"""What ships, as a model that `mteb` runs: `mteb.evaluate(MtebEncoder("bundles/mine:int8"), tasks)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.served import bundle_of, open_served
from evaluation.vectors import encode_distinct
from mirror_runtime.bundle import read_manifest
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.prompts import choose_prompt, read_prompts

EXTRA = "mteb"


class MtebEncoder:
    """The encoder protocol of mteb 2, over a bundle in any precision, an endpoint or a Triton server.

    A bundle's prompts for queries and documents are put before the texts that mteb marks as such; those of a server are
    unknown, and none is put. As a context manager it closes what it opened.

    Args:
        model_name: see `open_served`.
        revision: kept in mteb's results; by default a bundle's fingerprint.
        device: ignored, as are further options: an artifact runs where it was proven.

    Raises:
        InputError: `model_name` is neither a bundle nor an address.
    """

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **_: Any) -> None:
        self._around = ExitStack()
        opened = open_served(model_name, self._around)
        if opened is None:
            raise InputError(f"{model_name} is neither a bundle nor an address: export it with export/to_onnx.py")
        self._encode, self._spec = opened
        self._prompts: Mapping[str, str] = {}
        if bundle := bundle_of(model_name):
            folder = Path(bundle[0])
            self._prompts = read_prompts(folder)
            revision = revision or read_manifest(folder).fingerprint
        self._name, self._revision = model_name, revision

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, **_: Any) -> NDArray[np.float32]:
        """Encode the texts of batches, each with a list of `text`: float32 [n, dim]; see `encode_distinct`."""
        kind = getattr(prompt_type, "value", prompt_type)
        prompt = choose_prompt(self._prompts, self._spec.template if self._spec else None, input_type=kind)
        texts = [prompt + text for batch in inputs for text in batch["text"]]
        vectors = encode_distinct(self._encode, texts, self._name)
        return np.stack([vectors[text] for text in texts])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosines of every two vectors, a tensor."""
        return require("mteb.similarity_functions", EXTRA).cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosines of the vectors in the same places, a tensor."""
        return require("mteb.similarity_functions", EXTRA).pairwise_cos_sim(embeddings1, embeddings2)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes beside its results."""
        models = require("mteb.models.model_meta", EXTRA)
        spec = {"embed_dim": self._spec.dim, "max_tokens": self._spec.max_tokens} if self._spec else {}
        name = f"mirror-runtime/{Path(self._name).name}"
        cosine = models.ScoringFunction.COSINE
        known = {"name": name, "revision": self._revision, "similarity_fn_name": cosine, **spec}
        return models.ModelMeta.create_empty(overwrites=known)

    def __enter__(self) -> MtebEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._around.__exit__(kind, error, trace)
