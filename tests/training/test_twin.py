"""A static twin: fitted by least squares, in the teacher's own space and named after it, and refused for another."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from encoders.card import read_card
from encoders.reference import Reference
from encoders.source import resolve
from export.to_onnx import main as export
from mirror_runtime.bundle import ENCODER_FILE, MANIFEST_FILE, read_encoder, read_manifest, write_json
from tests.support.tiny_encoders import write_tiny_encoder
from tests.support.tuning import ANIMALS
from training.hardware import choose_hardware
from training.recipe import Device, TunePrecision
from training.teacher import load_teacher, teacher_vectors
from training.twin import main
from training.twin_table import RARE, fit_table, share_matrix, weighted_prior


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    nouns, verbs = ("cat", "dog", "man", "river", "house", "song", "door", "hand"), ("is", "was", "will be", "may be")
    lines = [
        f"the {a} {v} near a {b}" for a in nouns for b in nouns for v in (*verbs, "runs", "falls", "grows", "ends")
    ]
    path.write_text("\n".join([*lines, *ANIMALS]))
    return path


def test_the_table_is_the_solution_of_the_least_squares_and_absent_tokens_keep_their_prior() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (30, 12)).astype(np.float32)
    counts[:, 5] = 0
    shares = csr_matrix(counts / counts.sum(axis=1, keepdims=True))
    vectors, alone = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(12, 4)).astype(np.float32)
    prior = weighted_prior(alone, shares, vectors)
    weights = (prior / (alone - alone.mean(axis=0)))[:, 0]
    frequency = (counts / counts.sum(axis=1, keepdims=True)).sum(axis=0) / 42 + 1 / 42
    np.testing.assert_allclose(weights / weights[5], (RARE + frequency[5]) / (RARE + frequency), rtol=1e-4)
    dense, done = shares.toarray(), []
    table = fit_table(shares, vectors, prior, 0.1, lambda at, total: done.append((at, total)))
    expected = np.linalg.solve(dense.T @ dense + 0.1 * np.eye(12), dense.T @ vectors + 0.1 * prior)
    np.testing.assert_allclose(table, expected, atol=5e-3)
    np.testing.assert_array_equal(table[5], prior[5])
    assert [at for at, _ in done] == list(range(1, len(done) + 1))


def test_shares_are_those_of_the_text_up_to_its_limit(tiny_bundle: Path) -> None:
    backend = load_teacher(str(tiny_bundle))[0].tokenizer.backend_tokenizer
    shares = share_matrix(backend, ["the the house", "", "the house is warm"], 2, backend.get_vocab_size())
    the = backend.token_to_id("the")
    assert [shares[i, the] for i in range(3)] == [1, 0, 0.5]
    np.testing.assert_allclose(np.asarray(shares.sum(axis=1)).ravel(), [1, 0, 1])


def test_a_twin_lies_in_its_teachers_space_and_names_it_from_bundle_or_folder_alike(
    tiny_bundle: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "folder", ignore=shutil.ignore_patterns(MANIFEST_FILE))
    space = read_manifest(tiny_bundle).fingerprint
    assert load_teacher(str(folder))[1] == space, "the folder's fingerprint is the one that its bundle has"
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    options = [str(tiny_bundle), "--corpus", str(corpus)]
    assert main([*options, "--output", str(tmp_path / "a")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([str(folder), *options[1:], "--output", str(tmp_path / "b"), "--dimensions", "16"]) == 0
    assert read_card(tmp_path / "b").terms == {"license": "mit"}
    teacher, texts = Reference.load(resolve(str(folder))), corpus.read_text().splitlines()
    for name, cosine in (("a", 0.9), ("b", 0.85)):
        spec = read_encoder(tmp_path / name)
        assert (spec.twin_of, spec.family, spec.dim) == (space, "static", teacher.spec.dim)
        twin = Reference.load(resolve(str(tmp_path / name))).encode(texts)
        assert (twin * teacher.encode(texts)).sum(axis=1).mean() > cosine
    assert (report["twin_of"], report["texts"], report["dimensions"]) == (space, len(texts), 32)
    assert json.loads((tmp_path / "a" / "twin.json").read_text()) == report
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert main([*options, "--output", str(tmp_path / "a"), "--overwrite"]) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == first


def test_a_twin_has_the_lengths_and_the_license_of_a_teacher_that_does_not_normalise(
    tiny_bundle: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "folder", ignore=shutil.ignore_patterns(MANIFEST_FILE))
    write_json(dataclasses.replace(read_encoder(folder), normalize=False), folder / ENCODER_FILE)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nbody")
    texts, output = corpus.read_text().splitlines(), tmp_path / "twin"
    own = Reference.load(resolve(str(folder))).encode(texts)
    assert abs(np.linalg.norm(own, axis=1) - 1).min() > 0.2, "the teacher's lengths differ from 1"
    hardware = choose_hardware(Device.AUTO, TunePrecision.AUTO)
    teacher_vectors(str(folder), list(dict.fromkeys(texts)), hardware, lambda *_: None)  # kept, as tune.py learns them
    assert main([str(folder), "--corpus", str(corpus), "--output", str(output)]) == 0
    twin = Reference.load(resolve(str(output)))
    assert not twin.spec.normalize
    vectors = twin.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1).mean(), np.linalg.norm(own, axis=1).mean(), rtol=0.1)
    assert np.linalg.norm(vectors - own, axis=1).mean() < 0.5 * np.linalg.norm(own, axis=1).mean()
    assert read_card(output).terms == {"license": "mit", "language": "en"}


def test_the_output_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["./absent", "--corpus", "absent.txt", "--output", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("", ["--sample", "400"], "400 distinct texts are too few for a table of tokens: pass 500 or more"),
        ("http://127.0.0.1:1/v1", [], "is a server, which has no tokenizer to read"),
        ("./absent", ["--corpus", "absent.txt"], "the teacher ./absent must be an encoder that records its pooling"),
        ("RERANKER", [], "reranker is a cross-encoder, which has no vectors"),
        ("", ["--dimensions", "32"], "--dimensions is 32: the teacher's vectors have 32; choose fewer"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    tiny_bundle: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher, options, message
) -> None:
    output = tmp_path / "out"
    if teacher == "RERANKER":
        teacher = str(tmp_path / "reranker")
        write_tiny_encoder("bert", Path(teacher), labels=1)
    assert main([teacher or str(tiny_bundle), "--corpus", str(corpus), "--output", str(output), *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.trace
def test_a_twins_bundle_and_its_card_name_the_teacher(tiny_bundle: Path, corpus: Path, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    assert main([str(tiny_bundle), "--corpus", str(corpus), "--output", str(run)]) == 0
    assert export([str(run), "--output", str(bundle)]) == 0
    space = read_manifest(tiny_bundle).fingerprint
    assert read_manifest(bundle).encoder.twin_of == space
    assert f"the static twin of the encoder `{space}`" in (bundle / "README.md").read_text()
