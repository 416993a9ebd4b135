"""A teacher's vectors: computed once, fitted to the student's width, and learnt."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime.bundle import Pooling, sha256_file
from mirror_runtime.errors import InputError
from tests.support.tuning import ANIMALS, FP32, TARGETS, TEACHER, load, tune
from training.recipe import Objective, TuneConfig
from training.teacher import fit_width, teacher_vectors
from training.tune import main

pytestmark = pytest.mark.tunes

CONFIG = dataclasses.replace(TEACHER, batch_size=8, max_tokens=48, epochs=12, lr=2e-3)


@pytest.fixture
def taught(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run, whose teacher is a run folder, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(ANIMALS))
    options = ["--base", str(tiny_bert), "--pooling", "mean", "--corpus", str(corpus), "--probe", "none"]
    options += ["--batch-size", "8", "--device", "cpu", "--precision", "fp32", "--max-tokens", "48"]
    assert main([*options, "--lr", "1e-3", "--output", str(tmp_path / "teacher")]) == 0
    return [*options, "--teacher", str(tmp_path / "teacher")]


def test_vectors_are_cut_along_principal_axes_or_filled_with_zeros() -> None:
    flat = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)))
    wide = flat @ torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(2)))[0].T
    for width in (3, 5, 8, 10):
        fitted = fit_width(wide, width)
        assert fitted.shape == (20, width)
        torch.testing.assert_close(fitted @ fitted.T, flat @ flat.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [32, 48])
def test_a_student_learns_the_teachers_cosines_with_and_without_a_dense_layer(tiny_bert: Path, width: int) -> None:
    turned = torch.linalg.qr(torch.randn(width, 32, generator=torch.Generator().manual_seed(1)))[0]
    targets = torch.from_numpy(load(tiny_bert, Pooling.CLS).encode_unnormalized(ANIMALS)) @ turned.T
    student, steps = tune(tiny_bert, ANIMALS, CONFIG, targets=targets)
    losses = [step.loss for step in steps]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    found = torch.from_numpy(student.encode_unnormalized(ANIMALS))
    assert torch.nn.functional.cosine_similarity(found, targets).mean() > 0.8
    assert [layer.out_features for layer in student.spec.dense] == ([] if width == 32 else [48])


def test_a_run_encodes_its_corpus_once_and_again_if_its_file_is_damaged(taught, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("training.teacher.KEPT_TEXTS", 20)
    assert main([*taught, "--output", str(tmp_path / "a")]) == 0
    kept, _ = (tmp_path / "cache" / "mirror-runtime" / "teachers").iterdir()
    report = json.loads((tmp_path / "a" / "train.json").read_text())
    assert (report["teacher"], report["settings"]["objective"]) == (str(tmp_path / "teacher"), "teacher")
    name, done = str(tmp_path / "teacher"), []
    expected = Reference.load(resolve(name)).encode(ANIMALS)
    for damaged in (False, True):
        if damaged:
            kept.write_bytes(b"damaged")
        found = teacher_vectors(name, ANIMALS, FP32, lambda encoded, total: done.append(encoded))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert bool(done) is damaged


def test_a_teacher_is_loaded_and_hashed_once(tiny_bert: Path, taught, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("training.teacher.KEPT_TEXTS", 5)
    counted: list[Path] = []
    monkeypatch.setattr("encoders.source.sha256_file", lambda path: (counted.append(path), sha256_file(path))[1])
    name = str(tmp_path / "teacher")
    monkeypatch.setattr("training.teacher.Reference.load", Mock(side_effect=Reference.load))
    whole = teacher_vectors(name, ANIMALS, FP32, lambda *_: None)
    assert Reference.load.call_count == 1  # type: ignore[attr-defined]
    assert len(counted) == len(set(counted))
    assert torch.equal(teacher_vectors(name, ANIMALS, FP32, lambda *_: None), whole)
    assert Reference.load.call_count == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("projection", ["pca", "dense"])
def test_a_base_with_truncate_dim_learns_what_it_returns(tiny_bert: Path, taught, tmp_path, projection) -> None:
    base = tmp_path / "teacher"
    spec = json.loads((base / "encoder.json").read_text())
    (base / "encoder.json").write_text(json.dumps({**spec, "dim": 16}))
    options = [option for option in taught if option not in ("--pooling", "mean")]
    options[1] = str(base)
    options[options.index("--teacher") + 1] = f"{tmp_path}/wide"
    shutil.copytree(base, tmp_path / "wide")
    (tmp_path / "wide" / "encoder.json").write_text(json.dumps(spec))
    output = str(tmp_path / "cut")
    assert main([*options, "--projection", projection, "--output", output]) == 0
    width = 16 if projection == "pca" else 32
    assert Reference.load(resolve(output)).encode(ANIMALS[:3]).shape == (3, width)


def test_a_dense_layer_is_read_by_sentence_transformers(taught, tmp_path, monkeypatch) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr("training.run.teacher_vectors", lambda *_: TARGETS)
    output = str(tmp_path / "b")
    assert main([*taught, "--projection", "dense", "--output", output]) == 0
    ours = Reference.load(resolve(output)).encode(ANIMALS[:3])
    assert ours.shape == (3, 48)
    theirs = SentenceTransformer(output, device="cpu").encode(ANIMALS[:3])
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--objective mirror", "--objective mirror has no teacher: drop --teacher"),
        ("--teacher ./absent", "the teacher ./absent must be an encoder that records its pooling"),
        ("--pairs", "line 1: a pair is two texts"),
        ("--scored-pairs --pairs", "--pairs, --scored-pairs, --triplets and --entailment exclude each other"),
    ],
)
def test_what_does_not_go_together_is_one_clear_error(taught, tmp_path, capsys, options, message):
    assert main([*taught, *options.split(), "--output", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_objective_needs_a_teacher_and_single_texts(tiny_bert, taught, tmp_path, capsys) -> None:
    bare = [option for option in taught if option not in ("--teacher", str(tmp_path / "teacher"))]
    assert main([*bare, "--objective", "teacher", "--output", str(tmp_path / "x")]) == 2
    assert "name it with --teacher" in capsys.readouterr().err
    with pytest.raises(InputError, match="--objective teacher learns from single texts"):
        tune(tiny_bert, [("a", "b")] * 8, CONFIG, targets=TARGETS)
    with pytest.raises(InputError, match="--objective cosent learns from scored pairs"):
        tune(tiny_bert, ANIMALS, TuneConfig(batch_size=8, max_tokens=48, objective=Objective.COSENT))
