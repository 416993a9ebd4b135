"""Make a static twin: the teacher's vectors, the fit, a measure of it on held-out texts, and the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

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
        request: the corpus. 5 % of it (100 to 400 texts) is held out, and measures the twin.
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
        reference, space = load_teacher(teacher)
        spec, hardware = reference.spec, choose_hardware(Device.AUTO, TunePrecision.AUTO)
        if dimensions is not None and dimensions >= spec.dim:
            raise InputError(f"--dimensions is {dimensions}: the teacher's vectors have {spec.dim}; choose fewer")
        tokenizer = load_static_tokenizer(Tokenizer.from_str(reference.tokenizer.backend_tokenizer.to_str()))
        backend = tokenizer.backend_tokenizer
        names = [backend.decode([token], skip_special_tokens=False) for token in range(len(tokenizer))]
        distinct = list(dict.fromkeys(names))
        own = teacher_vectors(teacher, distinct, hardware, partial(on_progress, "the teacher's tokens")).numpy()
        row = {name: i for i, name in enumerate(distinct)}
        alone = own[[row[name] for name in names]]
        known = teacher_vectors(teacher, texts, hardware, partial(on_progress, "the teacher's texts")).numpy()

        chosen = {text for (text,) in hold_out([(text,) for text in texts])[0]}
        held = np.array([text in chosen for text in texts])
        shares = share_matrix(backend, texts, spec.max_tokens, len(alone))
        seen, targets = shares[~held], known[~held]
        prior = weighted_prior(alone, seen, targets)
        table = fit_table(seen, targets, prior, ridge, partial(on_progress, "fit"))
        axes = np.eye(spec.dim, dtype=np.float32)
        dense: tuple[Dense, ...] = ()
        if dimensions is not None:
            axes = principal_axes(seen, table, dimensions)
            dense = (Dense(in_features=dimensions, out_features=spec.dim, bias=False, activation=Activation.IDENTITY),)
        table = table @ axes
        cosine, overlap = agreement(unit_rows(shares[held] @ table @ axes.T), known[held], targets)
        found = (
            f"On {held.sum()} held-out texts, the mean cosine to the teacher's vectors is {cosine:.3f}, and they find "
            f"{overlap:.1%} of the ten nearest texts that the teacher's find."
        )
        sizes: dict[str, Any] = {"hidden_size": table.shape[1], "vocab_size": len(table)}
        sizes |= {"num_hidden_layers": 0, "num_attention_heads": 1}
        write_layout(
            folder,
            model=StaticModel(StaticConfig(**sizes), torch.from_numpy(table)),
            tokenizer=tokenizer,
            spec=EncoderSpec(
                base_model=spec.base_model,
                revision=spec.revision,
                family=StaticConfig.model_type,
                pooling=Pooling.MEAN,
                normalize=True,
                max_tokens=spec.max_tokens,
                dim=spec.dim,
                dense=dense,
                twin_of=space,
            ),
            dense=[make_dense(one, torch.from_numpy(axes), None) for one in dense],
            card=CARD.format(base=spec.base_model, space=space, texts=len(texts), found=found),
        )
        report = {
            "output": str(output),
            "teacher": teacher,
            "twin_of": space,
            "corpus": corpus.sha256,
            "texts": len(texts),
            "tokens": len(table),
            "dimensions": table.shape[1],
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
