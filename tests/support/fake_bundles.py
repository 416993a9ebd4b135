"""Bundles without graphs, for the fake engine, and a certificate for artifacts that nothing proves."""

import shutil
from pathlib import Path

from mirror_runtime.bundle import (
    CANARIES_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Artifact,
    Canaries,
    EncoderSpec,
    Manifest,
    Parity,
    Pooling,
    sha256_file,
    write_json,
)

PARITY = Parity(
    reference="tests",
    texts=1,
    texts_sha256="0" * 64,
    min_cosine=1.0,
    mean_cosine=1.0,
    max_abs_diff=0.0,
    floor=0.99999,
    neighbour_cosine=1.0,
    spearman=1.0,
    top10_overlap=1.0,
)


def write_fake_bundle(
    tokenizer: Path, folder: Path, max_tokens: int, dim: int, artifacts: tuple[Artifact, ...]
) -> Path:
    """Write a bundle without graphs, for the fake engine: a manifest and a tokenizer."""
    folder.mkdir()
    shutil.copy(tokenizer / TOKENIZER_FILE, folder)
    write_json(Canaries(canaries=()), folder / CANARIES_FILE)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by="tests",
        encoder=EncoderSpec(
            base_model="fake",
            revision=None,
            family="bert",
            pooling=Pooling.MEAN,
            normalize=True,
            max_tokens=max_tokens,
            dim=dim,
            pad_to=None,
        ),
        fingerprint="0123456789abcdef",
        files={file: sha256_file(folder / file) for file in (TOKENIZER_FILE, CANARIES_FILE)},
        artifacts=artifacts,
    )
    write_json(manifest, folder / MANIFEST_FILE)
    return folder


def busy_texts() -> list[bytes]:
    """256 different texts of 62 tokens each: equal ones would be computed once."""
    letters = "abcdefghijklmnop"
    return [f"{a} {b} {'busy ' * 58}".encode() for a in letters for b in letters]
