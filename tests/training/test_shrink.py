"""Smaller encoders: chosen layers, and a vocabulary cut to a corpus."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.card import read_card
from encoders.reference import Reference
from encoders.source import resolve
from export.proof.proof_texts import parity_texts
from mirror_runtime.bundle import Pooling, read_encoder
from tests.support.tiny_encoders import write_tiny_encoder, write_tiny_static
from training.shrink import main, spread

CORPUS = [
    text for text in parity_texts(short=60, medium=2, long=1) if text.strip() and "\n" not in text and "\0" not in text
]
OTHER = [text for text in parity_texts(short=300, medium=8, long=2) if text not in CORPUS]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    return str(tmp_path / "corpus.txt")


@pytest.fixture
def shrink(tmp_path: Path, capsys: Any) -> Callable[..., tuple[Reference, dict[str, Any]]]:
    """Shrink an encoder and load the result; return it with the report."""

    def run(encoder: object, *options: str) -> tuple[Reference, dict[str, Any]]:
        output = tmp_path / "small"
        assert main([str(encoder), "--output", str(output), "--overwrite", *options]) == 0, capsys.readouterr().err
        return Reference.load(resolve(str(output))), json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def assert_cut(whole: Reference, small: Reference) -> None:
    """The corpus has the same tokens and vectors, every other text the same characters, and no new unknown token."""
    np.testing.assert_allclose(small.encode_unnormalized(CORPUS), whole.encode_unnormalized(CORPUS), atol=1e-5)
    before, after = (one.tokenizer.backend_tokenizer for one in (whole, small))
    for one in (before, after):
        one.no_truncation()
        one.no_padding()
    unknown = whole.tokenizer.unk_token or "[UNK]"
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(1, 12))) for _ in range(300)]
    changed = 0
    for text in [*OTHER, " ".join(words), "", "<s> </s> [MASK] [PAD] <pad>"]:
        old, new = before.encode(text), after.encode(text)
        assert new.tokens.count(unknown) == old.tokens.count(unknown)
        assert before.decode(old.ids) == after.decode(new.ids)
        changed += old.tokens != new.tokens
    assert changed > 0
    assert after.get_vocab_size() < before.get_vocab_size()
    assert set(after.get_vocab()) < set(before.get_vocab())


@pytest.mark.parametrize("family", ["bert", "mpnet", "xlm-roberta", "distilbert", "electra"])
def test_a_cut_vocabulary_changes_no_text_of_the_corpus_and_every_other_still_tokenises(
    tiny_encoder: Callable[[str], Path], shrink: Any, corpus: str, family: str
) -> None:
    folder = tiny_encoder(family)
    small, report = shrink(folder, "--pooling", "mean", "--vocabulary", corpus)
    whole = Reference.load(resolve(str(folder), pooling=Pooling.MEAN))
    assert_cut(whole, small)
    table = small.model.get_input_embeddings().weight
    assert report["tokens"] == len(table) == small.tokenizer.backend_tokenizer.get_vocab_size()
    assert report["parameters_before"] - report["parameters"] == (report["tokens_before"] - len(table)) * table.shape[1]
    for name in ("pad_token", "unk_token", "mask_token"):
        assert getattr(small.tokenizer, name) == getattr(whole.tokenizer, name)
    assert small.model.config.pad_token_id == small.tokenizer.pad_token_id


@pytest.mark.parametrize("family", ["static", "model2vec"])
def test_the_table_of_a_static_encoder_is_cut_too(shrink: Any, corpus: str, tmp_path: Path, family: str) -> None:
    write_tiny_static(family, tmp_path / "static")
    small, _ = shrink(tmp_path / "static", "--vocabulary", corpus)
    assert_cut(Reference.load(resolve(str(tmp_path / "static"))), small)


def test_a_character_without_a_token_of_its_own_keeps_what_holds_it(tmp_path: Path, shrink: Any) -> None:
    folder = tmp_path / "bert"
    write_tiny_encoder("bert", folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    word = next(token for token in vocabulary if len(token) > 4 and token.isalpha())
    state["model"]["vocab"] = {("ωmega" if token == word else token): number for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "one.txt").write_text("the end of all of it\nand so on")
    small, _ = shrink(folder, "--pooling", "mean", "--vocabulary", str(tmp_path / "one.txt"))
    assert small.tokenizer.tokenize("ωmega") == ["ωmega"]


@pytest.mark.parametrize(("options", "kept"), [(["--layers", "0", "3"], [0, 3]), (["--depth", "3"], [0, 2, 3])])
def test_layers_are_those_that_were_chosen(tmp_path: Path, shrink: Any, options: list[str], kept: list[int]) -> None:
    write_tiny_encoder("bert", tmp_path / "bert", layers=4)
    (tmp_path / "bert" / "README.md").write_text("---\nlicense: mit\n---\nbody")
    small, report = shrink(tmp_path / "bert", "--pooling", "mean", *options)
    whole = Reference.load(resolve(str(tmp_path / "bert"), pooling=Pooling.MEAN))
    assert report["layers"] == kept
    models: list[Any] = [small.model, whole.model]
    found_layers, layers = (model.encoder.layer for model in models)
    for found, number in zip(found_layers, kept, strict=True):
        for name, value in found.state_dict().items():
            assert (value == layers[number].state_dict()[name]).all()
    assert "taught" in (tmp_path / "small" / "README.md").read_text()
    assert read_card(tmp_path / "small").terms == {"license": "mit"}
    assert read_encoder(tmp_path / "small").trained_depths == ()


def test_an_encoder_that_is_not_read_as_it_was_written_is_refused(tiny_encoder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("training.shrink.TOLERANCE", 0.0)
    options = ["--pooling", "mean", "--layers", "1", "--output", str(tmp_path / "small")]
    assert main([str(tiny_encoder("bert")), *options]) == 2
    assert "keep layer 0" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_the_output_and_a_reranker_are_refused_before_any_work(tmp_path: Path, capsys: Any) -> None:
    write_tiny_encoder("bert", tmp_path / "reranker", labels=1)
    options = ["--depth", "1", "--output", str(tmp_path / "small")]
    assert main([str(tmp_path / "reranker"), *options]) == 2
    assert "reranker is a cross-encoder, which has no vectors" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    assert main(["./absent", *options]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_layers_spread_from_the_first_to_the_last() -> None:
    assert [spread(depth, 6) for depth in (1, 2, 3, 5, 6)] == [
        [0],
        [0, 5],
        [0, 2, 5],
        [0, 1, 2, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    assert spread(6, 12) == [0, 2, 4, 7, 9, 11]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", [], "nothing to leave out: pass --layers, --depth or --vocabulary"),
        ("bert", ["--layers", "0", "--depth", "1"], "--layers and --depth exclude each other"),
        ("bert", ["--depth", "3"], "--depth 3: the encoder has 2 layers"),
        ("bert", ["--layers", "0", "2"], "bert has layers 0 to 1"),
        ("bert", ["--vocabulary", "missing.txt"], "missing.txt"),
        ("roberta", ["--vocabulary", "CORPUS"], "has a BPE tokenizer, whose tokens build each other"),
        ("t5", ["--layers", "1"], "relative_attention_bias"),
    ],
)
def test_what_cannot_be_left_out_is_one_clear_error(
    tiny_encoder: Any, corpus: str, tmp_path: Path, capsys: Any, family: str, options: list[str], message: str
) -> None:
    options = [corpus if option == "CORPUS" else option for option in options]
    arguments = [str(tiny_encoder(family)), "--pooling", "mean", "--output", str(tmp_path / "small"), *options]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "small").exists()
