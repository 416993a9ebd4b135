"""Reading raw text, pairs and columns; leaving out duplicates and evaluation texts; sampling."""

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from encoders.reference import load_tokenizer
from encoders.source import resolve
from mirror_runtime.bundle import Pooling, sha256_file
from mirror_runtime.errors import InputError, MissingExtra
from training.corpus import Corpus, CorpusRequest, Overlap, measure_lengths, normalise, read_corpus


def read(*files: object, **options: object) -> Corpus:
    return read_corpus(CorpusRequest(files=tuple(map(str, files)), **options))  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_are_stripped_and_duplicates_dropped_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "\ufeff second \r\n\n one\u2028first\nsecond\n  \none\u2028first\nlast")
    corpus = read(path)
    assert corpus.examples == corpus.texts == ("second", "one\u2028first", "last")  # U+2028 ends no line
    assert corpus.counts == {"lines": 7, "empty": 2, "duplicates": 2, "excluded": 0}
    assert corpus.files[0].sha256 == sha256_file(path)
    assert corpus.sha256 == hashlib.sha256("second\none\u2028first\nlast\n".encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\t\n", "is empty"),
        (b"only one line\n", "one distinct line"),
        (b"same\nsame\n same\n", "one distinct line"),
        (b"a\nb\nc\n", "one character only"),
        (b"one\n\x7fELF\x00\x01 junk\n", "line 2 holds NUL bytes"),
        ("one\ntwo\nd\xe9j\xe0\n".encode("latin-1"), "line 3: not UTF-8"),
        ("one\ntwo\n".encode("utf-16"), "not"),
    ],
)
def test_unusable_text_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "text.txt", content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "text.txt" in str(caught.value)


def test_files_are_concatenated_and_those_that_cannot_be_read_are_clear_errors(tmp_path: Path) -> None:
    one = write(tmp_path / "one.txt", "a cat\na dog\n")
    two = write(tmp_path / "two.txt.gz", gzip.compress(b"a dog\na man\n"))
    corpus = read(one, two)
    assert corpus.texts == ("a cat", "a dog", "a man")
    found = [(file.name, file.lines, file.duplicates) for file in corpus.files]
    assert found == [("one.txt", 2, 0), ("two.txt.gz", 2, 1)]
    assert corpus.files[1].sha256 == sha256_file(two)
    write(two, gzip.compress(b"a dog\na man\n" * 1000)[:-20])
    with pytest.raises(InputError, match=r"two.txt.gz cannot be read"):
        read(two)
    for name in ("absent.txt", "absent.parquet", "absent.txt.gz"):
        with pytest.raises(InputError, match=r"cannot be read: .*No such file"):
            read(tmp_path / name)
    for dash in (tmp_path / "-", "-"):
        with pytest.raises(InputError, match=r"cannot be read|is read more than once"):
            read(dash)
    write(two, gzip.compress(b"a man\n"))
    assert [file.name for file in read(tmp_path).files] == ["one.txt", "two.txt.gz"]


def test_json_lines_are_objects_or_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", '{"text": "a cat", "n": 1}\n\n"a dog"\n{"text": null}\n{"text": " a man "}\n')
    corpus = read(path)
    assert (corpus.texts, corpus.counts["empty"]) == (("a cat", "a dog", "a man"), 1)
    assert read(write(path, '{"q": "x y"}\n{"q": "z w"}\n'), columns=("q",)).texts == ("x y", "z w")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("text.jsonl", "{'text': 1}", "line 2: not JSON"),
        ("text.jsonl", "[1]", "line 2: column 'text' holds a list, expected text"),
        ("text.jsonl", '{"body": "x"}', "line 2: no column 'text', only 'body'. Name the right one with --column"),
        ("text.jsonl", '{"text": 7}', "line 2: column 'text' holds a int, expected text"),
        ("text.jsonl", '{"text": "\\ud800"}', "line 2: column 'text' contains a lone surrogate at character 0"),
        ("pairs.tsv", "no tab here", "line 2: a pair is two texts .* this line has 0 TABs"),
        ("pairs.tsv", "a\tb\tc", "this line has 2 TABs"),
        ("pairs.tsv", "a\t", "this line has 1 TABs"),
        ("pairs.tsv", "\tb", "this line has 1 TABs"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    first = '{"text": "fine"}' if name == "text.jsonl" else "fine\talso fine"
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / name, f"{first}\n{line}\n"), pairs=name == "pairs.tsv")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", 'id,text\n1,"a cat, and\na dog"\n\n2, a man \n3,""\n', ("a cat, and\na dog", "a man")),
        ("a.CSV.gz", gzip.compress(b"text\none\ntwo\n", mtime=0), ("one", "two")),
        ("a.tsv", "text\tn\na, b\t1\nc\t2\n", ("a, b", "c")),
        ("a.json", '[{"text": "a cat"}, "a dog"]', ("a cat", "a dog")),
        ("a.ndjson", '{"text": "a cat"}\n"a dog"\n', ("a cat", "a dog")),
        ("a.csv", "text\nshort\n" + "long " * 40_000 + "\n", ("short", ("long " * 40_000).strip())),
    ],
    ids=["csv", "gzip", "tsv", "json", "ndjson", "long"],
)
def test_tables_and_json_lines_are_read_as_what_they_are(
    tmp_path: Path, name: str, content: str, texts: object
) -> None:
    assert read(write(tmp_path / name, content)).texts == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "body,n\nx,1\n", "line 1: no column 'text', only 'body', 'n'. Name the right one with --column"),
        ("a.csv", "", "line 1: no column 'text', only none"),
        ("a.csv", "text,n\na cat, a dog,1\n", "line 2: 3 fields under a header of 2: quote a text"),
        ("a.json", "[", "row 1: not JSON"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path / name, content))


def test_parquet_has_columns(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    parquet.write_table(pa.table({"body": ["a cat", None, "a dog", "a cat"], "n": [1, 2, 3, 4]}), path)
    corpus = read(path, columns=("body",))
    assert corpus.texts == ("a cat", "a dog")
    assert corpus.counts == {"lines": 4, "empty": 1, "duplicates": 1, "excluded": 0}
    with pytest.raises(InputError, match="no column 'text', only 'body', 'n'"):
        read(path)
    with pytest.raises(InputError, match="row 1: column 'n' holds a int"):
        read(path, columns=("n",))
    with pytest.raises(InputError, match="is not a Parquet file"):
        read(write(path, b"junk"))


def test_pairs_come_from_tabs_and_from_two_columns(tmp_path: Path) -> None:
    expected = (("a cat", "one cat"), ("a dog", "one dog"))
    lines = write(tmp_path / "pairs.tsv", "a cat\t one cat\n\na dog\tone dog\na cat\tone cat\n")
    corpus = read(lines, pairs=True)
    assert (corpus.examples, corpus.has_pairs) == (expected, True)
    assert (corpus.counts["empty"], corpus.counts["duplicates"]) == (1, 1)
    assert corpus.texts == ("a cat", "one cat", "a dog", "one dog")
    rows = write(tmp_path / "p.jsonl", "".join(json.dumps({"q": a, "a": b}) + "\n" for a, b in expected))
    assert read(rows, pairs=True, columns=("q", "a")).examples == expected
    with pytest.raises(InputError, match=r"--column names 1 columns.*those of text1, text2"):
        read(rows, pairs=True, columns=("q",))


def test_a_sample_is_even_keeps_order_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "".join(f"line {i:04}\n" for i in range(1000)))
    one, again, other = (read(path, sample=100, seed=seed) for seed in (1, 1, 2))
    assert one.examples == again.examples != other.examples
    assert list(one.texts) == sorted(set(one.texts))
    assert (len(one.examples), one.sampled_from) == (100, 1000)
    drawn = [sum(int(t[5:]) < 500 for t in read(path, sample=100, seed=seed).texts) for seed in range(20)]
    assert 45 < sum(drawn) / 20 < 55
    assert (len(read(path, sample=2000).texts), read(path, sample=2000).sampled_from) == (1000, None)
    with pytest.raises(InputError, match="--sample is 1"):
        read(path, sample=1)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("A man is playing a guitar.", "a man is playing a guitar"),
        ("  A MAN  is\tplaying, a “guitar”! ", "a man is playing a guitar"),
        ("Straße", "strasse"),
        ("don't", "dont"),
        ("हिन्दी।", "हिन्दी"),
        ("?!", "?!"),
    ],
)
def test_texts_are_compared_without_case_punctuation_and_spacing(text: str, form: str) -> None:
    assert normalise(text) == form


def test_evaluation_texts_are_left_out_and_reported_and_pairs_for_either_text(tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", "A cat sat.\na  CAT sat\nA dog sat\nA man sat\nA river\n")
    sts = write(tmp_path / "sts.tsv", "score\tsentence1\tsentence2\n1\ta cat, sat\tunseen\n2\tunseen\tx\n3\ta\tb\n")
    lines = write(tmp_path / "lines.txt", "a river!\na lake\n")
    corpus = read(text, exclude=(str(sts), str(lines)))
    assert (corpus.texts, corpus.counts["excluded"]) == (("A dog sat", "A man sat"), 3)
    overlaps = (Overlap(file="sts.tsv", texts=5, found=1), Overlap(file="lines.txt", texts=2, found=1))
    assert corpus.overlaps == overlaps
    assert corpus.overlaps[1].share == 0.5
    assert corpus.overlap_with([("x", ["a MAN sat", "nothing"])]) == (Overlap(file="x", texts=2, found=1),)
    with pytest.raises(InputError, match="4 of 5 distinct lines are in --exclude files"):
        read(text, exclude=(str(sts), str(write(lines, "a river\na man sat\n"))))
    pairs = write(tmp_path / "p.tsv", "a cat\tx\ny\ta cat\nkeep\tthis\nand\tthat\n")
    corpus = read(pairs, pairs=True, exclude=(str(write(tmp_path / "e.txt", "A cat\n")),))
    assert corpus.examples == (("keep", "this"), ("and", "that"))
    text = write(
        tmp_path / "d.md",
        "# One\nThe dog is by a mat. A cat sat on a mat!\n# Two\nA man is here.\n# Three\nA dog is here.",
    )
    corpus = read(text, documents=True, exclude=(str(write(tmp_path / "e.txt", "a cat sat on a mat\n")),))
    assert [one[0] for one in corpus.examples] == ["Two", "Three"]
    assert read(text, documents=True).overlap_with([("x", ["a cat sat on a MAT"])])[0].found == 1


def test_the_published_overlap_is_reproduced(shared: Path) -> None:
    """Measured independently for reference/papers.md, section 1.7, on the same 10,000 sentences."""
    sts = shared / "data" / "sts"
    corpus = read(
        shared / "data" / "mirror_corpus" / "sentences_10k.txt",
        exclude=tuple(str(sts / f"{name}.tsv") for name in ("stsb-test", "sts2013", "sts2014")),
    )
    counts = corpus.counts
    assert len(corpus.texts) + counts["excluded"] == counts["lines"] - counts["empty"] - counts["duplicates"]
    assert [round(100 * overlap.share, 1) for overlap in corpus.overlaps] == [8.7, 39.0, 46.2]


def test_lengths_are_counted_in_tokens(tmp_path: Path, tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(tiny_bert), pooling=Pooling.MEAN))
    texts = [" ".join(["cat"] * n) for n in range(1, 101)]
    tokenizer(["the cat"], truncation=True, max_length=5)  # truncation set by an earlier call must not matter
    lengths = measure_lengths(read(write(tmp_path / "t.txt", "\n".join(texts))), tokenizer, 50)
    assert (lengths.texts, lengths.p50, lengths.p95, lengths.max, lengths.over) == (100, 52, 97, 102, 0.52)


def test_a_data_set_is_read_by_name_and_a_missing_one_is_a_clear_error(tmp_path, monkeypatch):
    """A local folder stands for a hub name: the library reads both alike."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "a cat"}\n{"text": "a dog"}\n')
    write(folder / "test.jsonl", '{"text": "a man"}\n{"text": "a river"}\n')
    corpus = read(f"hf:{folder}")
    assert corpus.texts == ("a cat", "a dog")
    assert corpus.files[0].sha256 == corpus.sha256
    assert read(f"hf:{folder}:test").texts == ("a man", "a river")
    with pytest.raises(InputError, match="no column 'body', only 'text'"):
        read(f"hf:{folder}", columns=("body",))
    with pytest.raises(InputError, match=r"split absent\) cannot be read: check the name and the network"):
        read(f"hf:{folder}:absent")
    with pytest.raises(InputError, match="cannot be read: check the name and the network"):
        read(f"hf:{tmp_path}/absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"datasets is not installed: pip install .*\[train\]'"):
        read(f"hf:{folder}")
