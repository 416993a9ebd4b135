"""Labelled files: scored pairs, hard negatives and entailment, and what is wrong with a row."""

import json
from pathlib import Path

import pytest

from mirror_runtime.errors import InputError
from training.augment import Scored
from training.corpus import Corpus, CorpusRequest, read_corpus
from training.labels import Labels

SICK = "score\tlabel\tsentence1\tsentence2\n"


def read(path: Path, content: str, labels: Labels, *columns: str) -> Corpus:
    path.write_text(content, encoding="utf-8")
    return read_corpus(CorpusRequest(files=(str(path),), labels=labels, columns=columns))


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "labels", "columns", "expected"),
    [
        (
            "a.tsv",
            f'{SICK}4.5\tX\t" a cat\tone\n\n1\tX\ta\tb "dog"\n',  # quotes mean nothing in published files
            Labels.SCORES,
            (),
            (Scored('" a cat', "one", 4.5), Scored("a", 'b "dog"', 1.0)),
        ),
        (
            "a.jsonl",
            lines({"n": 2, "a": "cat", "b": "one"}, {"n": "0.5", "a": "a", "b": "b"}),
            Labels.SCORES,
            ("n", "a", "b"),
            (Scored("cat", "one", 2.0), Scored("a", "b", 0.5)),
        ),
        (
            "a.jsonl",
            lines({"q": "cat", "y": "one", "n": ["dog", "man"]}, {"q": "a", "y": "b", "n": "mat"}),
            Labels.TRIPLETS,
            ("q", "y", "n"),
            (("cat", "one", "dog", "man"), ("a", "b", "mat")),
        ),
        (
            "a.csv",
            "anchor,positive,n1,n2\ncat,one,dog,man\na,b,,mat\n",
            Labels.TRIPLETS,
            ("anchor", "positive", "n1", "n2"),
            (("cat", "one", "dog", "man"), ("a", "b", "mat")),
        ),
        (
            "a.tsv",
            f"{SICK}1\tENTAILMENT\tcat\tone\n2\tNEUTRAL\tcat\ttwo\n1\tcontradiction\tcat\tnone\n1\t0\tx\ty\n1\t2\tz\tw\n",
            Labels.ENTAILMENT,
            (),
            (("cat", "one", "none"), ("x", "y")),
        ),
    ],
)
def test_labels_are_read(tmp_path, name, content, labels, columns, expected):
    corpus = read(tmp_path / name, content, labels, *columns)
    assert corpus.examples == expected
    assert corpus.has_scores is (labels is Labels.SCORES)
    assert all(isinstance(text, str) for text in corpus.texts)


def test_entailment_is_joined_over_files_and_rows_without_a_label_are_counted(tmp_path):
    rows = (["0\tcat\tone", "-\tcat\tx", "-1\ta\tb"], ["2\tcat\tnone", "entailment\ta\tb"])
    for name, lines in zip("ab", rows, strict=True):
        (tmp_path / f"{name}.tsv").write_text("label\tsentence1\tsentence2\n" + "\n".join(lines))
    for names in ("ab", "ba"):
        files = tuple(str(tmp_path / f"{name}.tsv") for name in names)
        corpus = read_corpus(CorpusRequest(files=files, labels=Labels.ENTAILMENT))
        assert set(corpus.examples) == {("cat", "one", "none"), ("a", "b")}
        assert corpus.counts["empty"] == 2


@pytest.mark.parametrize(
    ("name", "content", "labels", "message"),
    [
        ("a.txt", "4\ta\tb\n", Labels.SCORES, ".jsonl or .parquet: score, sentence1, sentence2"),
        ("a.tsv", "s\ta\tb\n", Labels.SCORES, "no column 'score', only 's', 'a', 'b'. Name the right"),
        ("a.tsv", f"{SICK}high\tX\ta\tb\n", Labels.SCORES, "row 1: the score must be a number, and is 'high'"),
        ("a.tsv", f"{SICK}nan\tX\ta\tb\n", Labels.SCORES, "row 1: the score must be a number, and is 'nan'"),
        ("a.tsv", f"{SICK}1\tX\ta\t\n", Labels.SCORES, "row 1: one text of the example is empty"),
        ("a.tsv", f"{SICK}1\tMAYBE\ta\tb\n", Labels.ENTAILMENT, "row 1: the label 'MAYBE' is unknown"),
        ("a.tsv", f"{SICK}1\tNEUTRAL\ta\t\n", Labels.ENTAILMENT, "row 1: one text of the pair is empty"),
        ("a.tsv", f"{SICK}1\tNEUTRAL\ta\tb\n", Labels.ENTAILMENT, "is empty"),
        ("a.tsv", "anchor\tpositive\tnegative\na\tb\t\n", Labels.TRIPLETS, "row 1: no negative: use --pairs"),
        ("a.jsonl", '{"score": [1], "sentence1": "a", "sentence2": "b"}\n', Labels.SCORES, "holds a list"),
    ],
)
def test_a_wrong_row_is_one_clear_error(tmp_path, name, content, labels, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path / name, content, labels)
    assert message in str(caught.value)
