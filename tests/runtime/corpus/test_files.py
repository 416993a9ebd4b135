import gzip
import io
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mirror_runtime.corpus.corpus import open_corpus
from mirror_runtime.corpus.files import CorpusFile, Format, _json_values
from mirror_runtime.errors import InputError


def write(path: Path, content: pa.Table | bytes | str | None) -> Path:
    if isinstance(content, pa.Table):
        parquet.write_table(content, path, row_group_size=4)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(text: str) -> bytes:
    return pa.Codec("zstd").compress(text.encode()).to_pybytes()


META = pa.table({"meta": [{"body": "a", "n": 1}, None, {"body": "c", "n": 3}], "id": pa.array([1, 2, 3], pa.int16())})
LINES = '\ufeff{"meta": {"body": "a"}, "id": 1}\n"b"\n\n{"meta": null, "n": 3}\n\n'


@pytest.mark.parametrize(
    ("name", "content", "column", "keep", "expected"),
    [
        ("in.txt", "one\r\n\n  two \u2028still two\nthree", "", (), ["one", "", "  two \u2028still two", "three"]),
        ("in.log", "one\ntwo", "", (), ["one", "two"]),
        ("in.TXT.gz", gzip.compress(b"one\n", mtime=0) + gzip.compress(b"two\n", mtime=0), "", (), ["one", "two"]),
        ("in.txt.zst", zstd("one\ntwo\n"), "", (), ["one", "two"]),
        ("in.txt.gz", b"", "", (), []),
        ("in.JSONL", '{"body": "a"}\n"b"\n{"body": null, "other": 1}\n', "body", (), ["a", "b", None]),
        ("in.ndjson", LINES, "meta.body", ("id",), [("a", 1), ("b", None), (None, None)]),
        ("in.json", '\ufeff [ {"a.b": "x"},\n{"a": {"b": "y"}} , "z"] \n', "a.b", (), ["x", "y", "z"]),
        ("in.json", '{"text": "a"}\n{"text": 12}', "text", (), ["a", 12]),
        ("in.json", " \n", "text", (), []),
        ("in.csv", 'id,text\r\n1,"a, ""b""\r\nc"\r\n\r\n2,\r\n', "text", ("id",), [('a, "b"\r\nc', "1"), ("", "2")]),
        ("in.csv.zst", zstd("text\none\n"), "text", (), ["one"]),
        ("in.tsv", "text\tn\na, b\t1\n", "text", (), ["a, b"]),
        ("in.tsv", 'text\n"one\ntwo" "\nthree\n', "text", (), ['"one', 'two" "', "three"]),
        ("in.csv", 'text\na "b" c"\n', "text", (), ['a "b" c"']),
        ("in.parquet", META, "meta.body", ("id",), [("a", 1), (None, 2), ("c", 3)]),
    ],
)
def test_every_format_is_read_unchanged_and_positions_reach_the_size(tmp_path, name, content, column, keep, expected):
    source = CorpusFile(path=write(tmp_path / name, content), columns=(column,), keep=keep)
    rows = list(source.rows())
    values = [tuple(v.as_py() if isinstance(v, pa.Scalar) else v for v in row.values) for row in rows]
    assert values == [one if isinstance(one, tuple) else (one,) for one in expected]
    assert not rows or rows[-1].position <= source.size
    assert name.endswith(("json", "ndjson")) or not rows or rows[-1].position == source.size


@pytest.mark.parametrize("size", range(1, 40))
def test_json_is_cut_between_any_two_characters(size):
    text = '[{"text": "a\\u00e9, ]"}, -12.5e3 ,"\\"[", null, 123, [1, {"b": []}], true]'
    assert list(_json_values(text[at : at + size] for at in range(0, len(text), size))) == json.loads(text)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_shards_cover_every_row_once_and_in_order_and_know_their_lines(tmp_path, kind):
    expected = [f"text {i}" for i in range(25)]
    for number, texts in enumerate((expected[:18], expected[18:])):
        lines = [
            json.dumps({"text": t}) + "\n" * (1 + i % 2) if kind == "jsonl" else t + "\n" for i, t in enumerate(texts)
        ]
        write(tmp_path / f"{number}.{kind}", pa.table({"text": texts}) if kind == "parquet" else "".join(lines))
    corpus = open_corpus([tmp_path])
    shards = list(corpus.shards(10))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    rows = [list(corpus.rows(shard)) for shard in shards]
    assert [row.values[0] for row in chain(*rows)] == expected
    assert [len(part) for part in rows] == [shard.rows for shard in shards]
    assert [row[:3] for row in chain(*rows)] == [row[:3] for row in corpus.rows()]  # the same numbers
    assert abs(sum(shard.size for shard in shards) - corpus.size) <= len(shards)
    assert next(iter(corpus.shards(10**9))).rows == 18


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        ("in.txt", "one\n".encode("utf-16"), "NUL bytes"),
        ("in.txt.gz", gzip.compress(b"a dog\na man\n" * 1000, mtime=0)[:-20], "cannot be read"),
        ("in.txt.zst", zstd("a dog\na man\n" * 1000)[:-5], "cannot be read"),
        ("in.txt.gz", gzip.compress(b"a dog\n", mtime=0)[:-6] + b"\1\2\3\4\5\6", "cannot be read"),
        *(
            ("in.jsonl", f'"fine"\n{line}\n', r"in\.jsonl, line 2: not JSON")
            for line in ("9" * 5000, "[" * 100_000, '{"text": "a"', '{"text": ', "nothing")
        ),
        *(
            ("in.json", f'["fine", {rest}', r"in\.json, row 2: not JSON")
            for rest in ("9" * 5000 + "]", "[" * 100_000, '{"text": "a"', "", "nothing]", '"a] [')
        ),
        ("in.json", '["a"] "b"', "text after the array"),
        ("in.json", b'["a", "\xff"]', "not UTF-8"),
        ("in.jsonl", json.dumps({"body": "a"}).encode(), "line 1: no column 'text', only 'body'. Name .* --column"),
        ("in.csv", "body\na\n", "no column 'text', only 'body'"),
        ("in.csv", "text,n\na cat, a dog,1\n", "line 2: 3 fields under a header of 2: quote a text"),
        ("in.csv", 'text\nfine\n"one\ntwo\n"three"\n', "the row after line 2 cannot be read"),
        ("in.csv", 'text\nfine\n"one\ntwo\n', "the row after line 2 cannot be read .*double the quote"),
        ("in.csv.gz", gzip.compress(b'te"xt,"text\n1,2\n', mtime=0), "the row after line 0 cannot be read"),
        ("in.parquet", b"PAR1 no", "is not a Parquet file"),
        ("in.parquet", pa.table({"body": ["a"]}), "no column 'text', only 'body'"),
        ("absent.txt", None, "cannot be read: No such file"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_an_error_names_the_file_and_the_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        list(CorpusFile(path=write(tmp_path / name, content)).rows())


@pytest.mark.parametrize(("name", "keep"), [("in.csv", "n"), ("in.parquet", "meta.n"), ("in.txt", "id")])
def test_a_column_to_keep_that_is_not_there_is_named(tmp_path, name, keep):
    write(tmp_path / name, pa.table({"text": ["a"], "meta": ["b"]}) if name == "in.parquet" else "text\na\n")
    with pytest.raises(InputError, match=f"no column '{keep}'"):
        list(CorpusFile(path=tmp_path / name, keep=(keep,)).rows())


def test_folders_patterns_and_standard_input(tmp_path, monkeypatch):
    for name in ("b.csv", "a.csv.gz", "sub/c.jsonl", "_SUCCESS", ".hidden.csv", "o.npy.partial/vectors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(
            tmp_path / name,
            gzip.compress(b"text\na\n", mtime=0) if name == "a.csv.gz" else "text\nb\n" if name == "b.csv" else '"c"\n',
        )

    def texts(*names: Any, **options: Any) -> list[object]:
        return [row.values[0] for row in open_corpus(names, **options).rows()]

    assert texts(tmp_path) == ["a", "b", "c"]
    assert texts(f"{tmp_path}/*.csv", f"{tmp_path}/**/*.jsonl") == ["b", "c"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(zstd("text\nx\n")))))
    assert texts("-", declared=Format.CSV) == ["x"]
    (tmp_path / "README.md").touch()
    with pytest.raises(InputError, match=r"README.md is not a corpus file .* name the files with a pattern"):
        open_corpus([tmp_path])
    for name in ("*.tsv", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="no file is there"):
            open_corpus([tmp_path / name])


def test_values_that_python_cannot_hold_are_bad_rows_and_a_torn_file_is_named(tmp_path):
    path = tmp_path / "in.parquet"
    strings = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": strings}), path)
    first, second = (row.values[0] for row in CorpusFile(path=path).rows())
    assert first == "a"
    assert isinstance(second, UnicodeDecodeError)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(30) + whole[34:])
    with pytest.raises(InputError, match=r"in\.parquet (cannot be read|is not a Parquet file)"):
        list(CorpusFile(path=path).rows())
