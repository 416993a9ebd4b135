"""The folders of static encoders, read without torch: `--help` of the exports does not wait for it."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from encoders.sentence_transformers import WEIGHTS_FILE, RecordedEncoder, read_json
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import BundleError

MODEL2VEC = "model2vec"
"""The family, as its config.json names it."""

TABLES = ("embedding.weight", "embeddings")
"""Names of the table: sentence-transformers' and model2vec's."""

MODEL2VEC_TOKENS = 512
"""model2vec's limit where its config.json states none."""


def is_model2vec(folder: Path) -> bool:
    """Return whether model2vec wrote a folder."""
    path = folder / "config.json"
    return path.is_file() and read_json(path, dict).get("model_type") == MODEL2VEC


def read_model2vec(folder: Path) -> RecordedEncoder:
    """Read what a model2vec folder records.

    Raises:
        BundleError: its limit is not a number of tokens.
    """
    config = read_json(folder / "config.json", dict)
    limit = config.get("max_length", MODEL2VEC_TOKENS)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise BundleError(f"{folder}/config.json has max_length {limit!r}: it must be a number of tokens")
    return RecordedEncoder(
        folder=folder,
        pooling=Pooling.MEAN,
        dense=(),
        dense_folders=(),
        normalize=bool(config.get("normalize", False)),
        max_tokens=limit,
        dim=None,
        template=None,
        takes_prompt=True,
        family=MODEL2VEC,
    )


def table_width(folder: Path) -> int:
    """Return the components of a token's vector.

    Raises:
        BundleError: the file holds no table.
    """
    with safe_open(folder / WEIGHTS_FILE, "np") as weights:
        names = list(weights.keys())
        shape: list[int] = next((weights.get_slice(name).get_shape() for name in TABLES if name in names), [])
    if len(shape) != 2:
        raise BundleError(
            f"{folder / WEIGHTS_FILE} holds {', '.join(names)} and no table of token vectors ({' or '.join(TABLES)})"
        )
    return shape[1]
