import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mirror_runtime.corpus.files import CorpusFile
from mirror_runtime.errors import InputError


def texts(source: CorpusFile, skip: int = 0) -> list[object]:
    return [row.text for row in source.rows(skip)]


def test_text_lines_are_kept_as_they_are(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes("one\r\n\n  two \u2028still two\nthree".encode())
    source = CorpusFile(path=path)
    assert texts(source) == ["one", "", "  two \u2028still two", "three"]
    assert texts(source, skip=2) == ["  two \u2028still two", "three"]
    assert [row.position for row in source.rows()][-1] == source.size == path.stat().st_size


def test_json_lines_hold_strings_or_objects(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "a"}\n"b"\n{"body": null, "other": 1}\n')
    assert texts(CorpusFile(path=path, column="body")) == ["a", "b", None]


def test_parquet_columns_are_streamed(tmp_path):
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.table({"body": ["a", None, "c"], "n": [1, 2, 3]}), path)
    source = CorpusFile(path=path, column="body")
    assert texts(source) == ["a", None, "c"]
    assert texts(source, skip=1) == [None, "c"]
    assert source.size == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        ("in.jsonl", b'"fine"\n{"text": \n', "line 2: not JSON"),
        ("in.jsonl", json.dumps({"body": "a"}).encode(), "no field 'text', only 'body'"),
        ("in.parquet", b"PAR1 no", "is not a Parquet file"),
        ("in.csv", b"a", r"must end in \.txt, \.jsonl, \.parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts(CorpusFile(path=path))


def test_a_missing_column_or_file_is_named(tmp_path):
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(InputError, match="no column 'text'; it has body"):
        texts(CorpusFile(path=path))
    with pytest.raises(InputError, match="does not exist"):
        CorpusFile(path=tmp_path / "absent.txt")
