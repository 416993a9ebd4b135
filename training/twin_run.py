"""Make a static twin: the teacher's vectors, the fit, a measure of it on held-out texts, and the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from encoders.pooling import make_dense
from encoders.static import StaticConfig, StaticModel, load_static_tokenizer
from encoders.write import write_layout
from mirror_runtime.bundle import ENCODER_FILE, Activation, Dense, EncoderSpec, Pooling
from mirror_runtime.errors import InputError
from mirror_runtime.folders import whole_folder
from mirror_runtime.host import peak_memory_bytes
from mirror_runtime.vectors import unit_rows
from training.corpus import CorpusRequest, read_corpus
from training.gate import MIN_TEXTS
from training.hardware import choose_hardware
from training.own import hold_out
from training.recipe import Device, TunePrecision
from training.teacher import load_teacher, teacher_vectors
from training.twin_table import agreement, fit_table, principal_axes, share_matrix, weighted_prior

REPORT_FILE = "twin.json"

CARD = """
# {base}, as a static table

The static twin of `{base}`: a table of token vectors, whose mean is a text's vector. Its vectors lie in the vector
space of that encoder, `{space}`, and can search and be searched by that encoder's. The table was fitted to that
encoder's vectors of {texts:,} texts by ridge regression. {found}

`encoder.json` holds the settings that decide a vector; `twin.json` records the fit.
"""


def make_twin(
    teacher: str,
    request: CorpusRequest,
    output: Path,
    *,
    dimensions: int | None,
    ridge: float,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Fit a static twin of an encoder and write its run folder, whole or not at all.

    Args:
        teacher: see `teacher_vectors`; a server is refused.
        request: the corpus. A first fit without 5 % of it (100 to 400 texts) is measured on them.
        output: the run folder.
        dimensions: numbers a token in the table; None for as many as the teacher's vectors have.
        ridge: the weight of the prior.
        overwrite: replace an existing run folder.
        on_progress: called with a stage, and how much of it is done.

    Returns:
        The report that the folder's `twin.json` holds.

    Raises:
        MirrorError: teacher, corpus or output cannot be used; nothing was written.
    """
    began = time.perf_counter()
    corpus = read_corpus(request)
    texts = list(dict.fromkeys(corpus.texts))
    if len(texts) < MIN_TEXTS:
        raise InputError(f"{len(texts):,} distinct texts are too few for a table of tokens: pass {MIN_TEXTS} or more")
    with whole_folder(output, overwrite=overwrite, marker=ENCODER_FILE) as folder:
        reference, space, about = load_teacher(teacher)
        spec, hardware = reference.spec, choose_hardware(Device.AUTO, TunePrecision.AUTO)
        if dimensions is not None and dimensions >= spec.dim:
            raise InputError(f"--dimensions is {dimensions}: the teacher's vectors have {spec.dim}; choose fewer")
        tokenizer = load_static_tokenizer(Tokenizer.from_str(reference.tokenizer.backend_tokenizer.to_str()))
        backend = tokenizer.backend_tokenizer
        own = partial(teacher_vectors, teacher, hardware=hardware)
        alone = _token_vectors(tokenizer, lambda names: own(names, on_progress=partial(on_progress, "tokens")))
        known = own(texts, on_progress=partial(on_progress, "texts")).numpy()

        chosen = {text for (text,) in hold_out([(text,) for text in texts])[0]}
        held = np.array([text in chosen for text in texts])
        shares = share_matrix(backend, texts, spec.max_tokens, len(alone))

        def fit(rows: Any, vectors: NDArray[np.float32], stage: str) -> tuple[NDArray[np.float32], Any]:
            prior = weighted_prior(alone, rows, vectors)
            table = fit_table(rows, vectors, prior, ridge, partial(on_progress, stage))
            return table, None if dimensions is None else principal_axes(rows, table, dimensions)

        table, axes = fit(shares[~held], known[~held], "fit without the held-out texts")
        vectors = shares[held] @ table
        vectors = vectors if axes is None else vectors @ axes @ axes.T
        cosine, overlap = agreement(unit_rows(vectors), known[held], known[~held])
        found = (
            f"Fitted without {held.sum()} of these texts, its vectors of them have a mean cosine of {cosine:.3f} to "
            f"that encoder's, and find {overlap:.1%} of the ten nearest other texts that its vectors find."
        )
        table, axes = fit(shares, known, "fit")
        card = CARD.format(base=spec.base_model, space=space, texts=len(texts), found=found)
        _write(folder, tokenizer, spec, space, table, axes, card, about.terms)
        report = {
            "output": str(output),
            "teacher": teacher,
            "twin_of": space,
            "corpus": corpus.sha256,
            "texts": len(texts),
            "tokens": len(table),
            "dimensions": dimensions or spec.dim,
            "ridge": ridge,
            "held_out": int(held.sum()),
            "cosine": round(cosine, 4),
            "top10_overlap": round(overlap, 4),
            "found": found,
            "peak_memory_mb": round(peak_memory_bytes() / 1e6),
            "seconds": round(time.perf_counter() - began, 1),
        }
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _token_vectors(
    tokenizer: PreTrainedTokenizerFast, encode: Callable[[Sequence[str]], torch.Tensor]
) -> NDArray[np.float32]:
    """Return the teacher's vector of each token's text, [tokens, dim]."""
    decode = tokenizer.backend_tokenizer.decode
    names = [decode([token], skip_special_tokens=False) for token in range(len(tokenizer))]
    row = {name: i for i, name in enumerate(dict.fromkeys(names))}
    vectors: NDArray[np.float32] = encode(list(row)).numpy()[[row[name] for name in names]]
    return vectors


def _write(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    teacher: EncoderSpec,
    space: str,
    table: NDArray[np.float32],
    axes: NDArray[np.float32] | None,
    card: str,
    terms: Mapping[str, Any],
) -> None:
    """Write the run folder of a table, whole or as its product with `axes` and the dense layer that undoes it."""
    dense: tuple[Dense, ...] = ()
    if axes is not None:
        width = axes.shape[1]
        dense = (Dense(in_features=width, out_features=teacher.dim, bias=False, activation=Activation.IDENTITY),)
        table = table @ axes
    sizes: dict[str, Any] = {"hidden_size": table.shape[1], "vocab_size": len(table)}
    sizes |= {"num_hidden_layers": 0, "num_attention_heads": 1}
    spec = EncoderSpec(
        base_model=teacher.base_model,
        revision=teacher.revision,
        family=StaticConfig.model_type,
        pooling=Pooling.MEAN,
        normalize=True,
        max_tokens=teacher.max_tokens,
        dim=teacher.dim,
        dense=dense,
        twin_of=space,
    )
    write_layout(
        folder,
        model=StaticModel(StaticConfig(**sizes), torch.from_numpy(table)),
        tokenizer=tokenizer,
        spec=spec,
        dense=[make_dense(one, torch.from_numpy(axes), None) for one in dense],
        card=card,
        terms=terms,
    )
