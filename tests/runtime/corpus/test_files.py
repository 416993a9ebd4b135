import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mirror_runtime.corpus.files import CorpusFile
from mirror_runtime.errors import InputError


def write(path: Path, content: pa.Table | bytes | str | None) -> Path:
    if isinstance(content, pa.Table):
        parquet.write_table(content, path, row_group_size=4)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(source: CorpusFile, skip: int = 0) -> list[object]:
    return [row.text for row in source.rows(skip)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.txt", "one\r\n\n  two \u2028still two\nthree", ["one", "", "  two \u2028still two", "three"]),
        ("in.jsonl", '{"body": "a"}\n"b"\n{"body": null, "other": 1}\n', ["a", "b", None]),
        ("in.parquet", pa.table({"body": ["a", None, "c"], "n": [1, 2, 3]}), ["a", None, "c"]),
    ],
)
def test_texts_are_read_unchanged_and_positions_reach_the_size(tmp_path, name, content, expected):
    source = CorpusFile(path=write(tmp_path / name, content), column="body")
    assert texts(source) == expected
    assert texts(source, skip=1) == expected[1:]
    assert [row.position for row in source.rows()][-1] == source.size


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_shards_cover_every_row_once_and_in_order(tmp_path, kind):
    expected = [f"text {i}" for i in range(25)]
    lines = "".join((json.dumps({"text": t}) if kind == "jsonl" else t) + "\n" for t in expected)
    content = pa.table({"text": expected}) if kind == "parquet" else lines
    source = CorpusFile(path=write(tmp_path / f"in.{kind}", content))
    shards = list(source.shards(10))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert [text for shard in shards for text in source.texts(shard)] == expected
    assert [shard.first for shard in shards] == [sum(s.rows for s in shards[:i]) for i in range(len(shards))]
    assert sum(map(source.shard_size, shards)) == source.size
    assert next(iter(source.shards(10**9))).rows == 25


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        *(
            ("in.jsonl", f'"fine"\n{line}\n', r"in\.jsonl, line 2: not JSON")
            for line in ("9" * 5000, "[" * 100_000, '{"text": "a"', '{"text": ', "nothing")
        ),
        ("in.jsonl", json.dumps({"body": "a"}).encode(), "no field 'text', only 'body'"),
        ("in.parquet", b"PAR1 no", "is not a Parquet file"),
        ("in.parquet", pa.table({"body": ["a"]}), "no column 'text'; it has body"),
        ("in.csv", b"a", r"must end in \.txt, \.jsonl, \.parquet"),
        ("absent.txt", None, "does not exist"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_an_error_names_the_file_and_the_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        texts(CorpusFile(path=write(tmp_path / name, content)))


def test_values_that_python_cannot_hold_are_bad_rows_and_a_torn_file_is_named(tmp_path):
    path = tmp_path / "in.parquet"
    strings = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": strings}), path)
    first, second = (row.text for row in CorpusFile(path=path).rows())
    assert first == "a"
    assert isinstance(second, UnicodeDecodeError)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(30) + whole[34:])
    with pytest.raises(InputError, match=r"in\.parquet (cannot be read|is not a Parquet file)"):
        list(CorpusFile(path=path).rows())
