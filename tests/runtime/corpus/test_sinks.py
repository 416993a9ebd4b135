"""Every sink is searched by its own library: a text's own vector finds the text's id."""

import datetime
import decimal
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mirror_runtime import Encoder
from mirror_runtime.cli.main import main
from mirror_runtime.corpus import encode_file as module
from mirror_runtime.corpus.corpus import BadTexts, open_corpus
from mirror_runtime.corpus.encode_file import EncodeProgress, encode_file
from mirror_runtime.errors import InputError

TEXTS = [f'tab\t{i}, \\ line\n and "quote" {"word " * (i % 7)}ä' for i in range(40)]
BAD = 17


def encode(bundle: Path, source: Path, output: Path, *options: str) -> int:
    return main(["encode", str(bundle), str(source), "-o", str(output), "--engine", "fake", *options])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    lines = [
        {"text": text if i != BAD else None, "id": 100 + i, "meta": {"title": f"t\t{i}"}}
        for i, text in enumerate(TEXTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def written(request, bundle, rows, tmp_path):
    """Write the output that the test's parameter names, without the bad row; return it and the vector of row 23."""

    def write(name: str, keep: str) -> tuple[Path, np.ndarray]:
        output = tmp_path / name
        assert encode(bundle, rows, output, "--bad-texts", "skip", "--keep", keep) == 0
        with Encoder.load(bundle, engine="fake") as encoder:
            return output, encoder.encode([TEXTS[23]])

    return write


def needs(module_name: str, extra: str) -> None:
    if find_spec(module_name) is None:
        pytest.skip(f"{module_name} is not installed: the extra {extra}")


def test_parquet_holds_ids_columns_and_their_types(bundle, written, tmp_path):
    output, vector = written("out.parquet", "id,meta.title,text")
    table = parquet.read_table(output)
    assert table.schema.names == ["id", "meta.title", "text", "embedding", "tokens", "truncated"]
    assert table.schema.types[:3] == [pa.int64(), pa.string(), pa.string()]
    assert table["id"].to_pylist() == [100 + i for i in range(40) if i != BAD]
    best = int(np.argmax(np.array(table["embedding"].to_pylist()) @ vector[0]))
    assert (table["id"][best].as_py(), table["text"][best].as_py()) == (123, TEXTS[23])
    small = pa.table({"text": ["a", "b"], "day": pa.array([1, None], pa.date32()), "n": pa.array([1, 2], pa.uint8())})
    parquet.write_table(small, tmp_path / "typed.parquet")
    assert (
        main(
            [
                "encode",
                str(bundle),
                str(tmp_path / "typed.parquet"),
                "-o",
                str(output),
                "--engine",
                "fake",
                "--keep",
                "day,n",
            ]
        )
        == 0
    )
    assert parquet.read_table(output).select(["day", "n"]).equals(small.select(["day", "n"]))


@pytest.mark.parametrize(
    ("ids", "strings"),
    [
        ([None, None, 1, 2, "a", {"b": 1}, 2.5, 3], [None, None, "1", "2", "a", '{"b": 1}', "2.5", "3.0"]),
        ([1, 2**60, 1.5], ["1", str(2**60), "1.5"]),  # no float is this integer
        ([2**70, 1], [str(2**70), "1"]),
    ],
)
def test_columns_without_one_type_become_strings(bundle, tmp_path, monkeypatch, ids, strings):
    monkeypatch.setattr(module, "WINDOW", 2)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "x", "id": one}) + "\n" for one in ids))
    output = tmp_path / "out.parquet"
    assert (
        main(["encode", str(bundle), str(tmp_path / "in.jsonl"), "-o", str(output), "--engine", "fake", "--keep", "id"])
        == 0
    )
    assert parquet.read_table(output)["id"].to_pylist() == strings


def test_a_faiss_index_has_the_ids(written):
    needs("faiss", "faiss")
    import faiss

    output, vector = written("out.faiss", "id")
    _, found = faiss.read_index(str(output)).search(vector, 1)
    assert found.tolist() == [[123]]


def write_rows(path: Path, ids: list[object]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": ["x"] * len(ids), "id": ids}), path)
    elif path.suffix == ".csv":
        path.write_text("text,id\n" + "".join(f"x,{one}\n" for one in ids))
    else:
        path.write_text("".join(json.dumps({"text": "x", "id": one}) + "\n" for one in ids))
    return path


@pytest.mark.parametrize(
    ("output", "name", "ids", "expected"),
    [
        ("out.faiss", "in.csv", [7, -10, 2**60], [7, -10, 2**60]),
        ("out.faiss", "in.jsonl", [7, 8, 2**53 + 1, None], "line 4: the id None is not an integer"),
        ("out.faiss", "in.jsonl", ["7", None], "line 2: the id None is not an integer"),
        ("out.faiss", "in.csv", [7, 8, 9, "a"], "line 5: the id 'a' is not an integer"),
        ("out.faiss", "in.csv", [7, "007"], "line 3: the id '007' is not an integer"),
        ("out.faiss", "in.parquet", pa.array([1, 2**64 - 1], pa.uint64()), "row 2: the id 18446744073709551615 is not"),
        ("out.qdrant", "in.csv", [7, 10], [7, 10]),
        ("out.qdrant", "in.csv", [7, 10, "a", "b"], [0, 1, 2, 3]),
        ("out.qdrant", "in.jsonl", [7, None], "line 2: the id None is not an integer"),
    ],
)
def test_ids_are_integers_or_their_digits_or_a_row_is_named(
    bundle, tmp_path, capsys, monkeypatch, output, name, ids, expected
):
    needs("faiss", "faiss")
    import faiss

    monkeypatch.setattr(module, "WINDOW", 2)
    path = tmp_path / output
    status = encode(bundle, write_rows(tmp_path / name, ids), path, "--keep", "id")
    if isinstance(expected, str):
        assert (status, path.exists()) == (2, False)
        assert expected in capsys.readouterr().err
    elif output == "out.faiss":
        index: Any = faiss.read_index(str(path))
        assert faiss.vector_to_array(index.id_map).tolist() == expected
    else:
        points = [point for line in path.read_text().splitlines() for point in json.loads(line)["points"]]
        assert [point["id"] for point in points] == expected


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")]
)


@pytest.mark.parametrize(
    ("name", "ids"),
    [("in.jsonl", ["a", "\ud800", "c"]), ("in.jsonl", ["a", {"b": ["\udfff"]}, "c"]), ("in.parquet", NOT_UTF8)],
)
def test_a_kept_value_that_no_file_can_hold_is_its_rows_fault(bundle, tmp_path, capsys, name, ids):
    source, output = write_rows(tmp_path / name, ids), tmp_path / "out.sql"
    for policy in ("stop", "zero"):
        assert encode(bundle, source, tmp_path / f"{policy}.sql", "--keep", "id", "--bad-texts", policy) == 2
        error = capsys.readouterr().err
        assert "2: column 'id' is not UTF-8, or has a lone surrogate. Fix it, or leave such rows out" in error
    assert encode(bundle, source, output, "--keep", "id", "--bad-texts", "skip") == 0
    rows = output.read_text().partition("FROM stdin;\n")[2].splitlines()
    assert [row.partition("\t")[0] for row in rows] == ["a", "c", "\\.", "COMMIT;"]


@pytest.mark.parametrize(
    ("ids", "sql", "json_value"),
    [
        (pa.array([datetime.date(2026, 1, 2)]), "2026-01-02", "2026-01-02"),
        (pa.array([decimal.Decimal("1.50")]), "1.50", "1.50"),
        (pa.array([b"a\xff"]), "61ff", "61ff"),
        (pa.array([float("nan")]), "nan", None),
        (pa.array([{"a": [float("inf"), 1.5]}]), '{"a": [Infinity, 1.5]}', {"a": [None, 1.5]}),
        (pa.array([True]), "true", True),
    ],
)
def test_other_types_are_written_as_their_plain_text(bundle, tmp_path, ids, sql, json_value):
    source = write_rows(tmp_path / "in.parquet", ids)
    for output in ("out.sql", "out.qdrant"):
        assert encode(bundle, source, tmp_path / output, "--keep", "id") == 0
    row = (tmp_path / "out.sql").read_text().partition("FROM stdin;\n")[2]
    assert row.partition("\t")[0] == sql
    assert json.loads((tmp_path / "out.qdrant").read_text())["points"][0]["payload"] == {"id": json_value}


def test_a_lancedb_table_has_the_columns(written):
    needs("lancedb", "lancedb")
    import lancedb

    output, vector = written("out.lance", "id,text")
    (found,) = lancedb.connect(str(output.parent)).open_table("out").search(vector[0]).metric("dot").limit(1).to_list()
    assert (found["id"], found["text"]) == (123, TEXTS[23])


def test_qdrant_takes_the_requests(written):
    needs("qdrant_client", "qdrant")
    from qdrant_client import QdrantClient, models

    output, vector = written("out.qdrant", "id,text")
    client = QdrantClient(":memory:")
    client.create_collection("texts", models.VectorParams(size=8, distance=models.Distance.DOT))
    for line in output.read_text(encoding="utf-8").splitlines():
        points = models.PointsList.model_validate_json(line).points  # the body of PUT /collections/NAME/points
        client.upsert("texts", points)
    (found,) = client.query_points("texts", vector[0].tolist(), limit=1).points
    assert (found.id, found.payload) == (123, {"id": 123, "text": TEXTS[23]})


def test_sql_has_the_columns_types_and_escapes_of_copy(written):
    output, vector = written("out.sql", "id,meta.title,text")
    sql = output.read_text(encoding="utf-8")
    assert 'CREATE TABLE embeddings ("id" bigint, "meta.title" text, "text" text, embedding vector(8));' in sql
    rows = sql.partition("COPY embeddings FROM stdin;\n")[2].partition("\\.\n")[0].splitlines()
    assert len(rows) == 39
    assert json.loads(rows[22].split("\t")[-1]) == pytest.approx(vector[0].tolist())
    unescaped = (
        rows[22].split("\t")[2].replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")
    )
    assert unescaped == TEXTS[23]


def test_a_run_with_kept_columns_that_stopped_resumes_to_the_same_bytes(bundle, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 7)
    output = tmp_path / "out.parquet"

    def stop(progress: EncodeProgress) -> None:
        if progress.texts >= 21:
            raise KeyboardInterrupt

    with Encoder.load(bundle, engine="fake") as encoder:

        def run(output: Path, *keep: str, bad_texts: BadTexts = BadTexts.SKIP, **more: Any) -> None:
            encode_file(
                encoder, open_corpus([rows], keep=keep), output, bad_texts=bad_texts, long_texts="error", **more
            )

        run(tmp_path / "whole.parquet", "id", "text")
        with pytest.raises(KeyboardInterrupt):
            run(output, "id", "text", on_progress=stop)
        kept = tmp_path / "out.parquet.partial" / "kept"
        kept.write_bytes(kept.read_bytes()[:-3])  # the last window is torn
        for keep, bad_texts in ((("id",), BadTexts.SKIP), (("id", "text"), BadTexts.STOP)):
            with pytest.raises(InputError, match="other settings"):
                run(output, *keep, bad_texts=bad_texts)
        begun: list[int] = []
        run(output, "id", "text", on_progress=lambda now: begun.append(now.texts))
    assert begun[0] == 14
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.npy", ["--keep", "id"], ".npy holds vectors only, and --keep names id"),
        ("out.parquet", ["--bad-texts", "skip"], "name the rows' id with --keep"),
        ("out.parquet", ["--keep", "tokens"], "--keep tokens: the output has a column of this name"),
        ("out.parquet", ["--keep", "id,id"], "--keep id: the output has a column of this name"),
        ("out.faiss", ["--keep", "id,text", "--bad-texts", "skip"], "holds vectors and 1 id, and --keep names"),
        ("out.qdrant", ["--keep", "nothing"], None),
        ("out.lance", ["--keep", "vector"], "--keep vector: the output has a column of this name"),
        ("out.sql", ["--keep", "ctid"], "--keep ctid: the output has a column of this name"),
        ("out.qdrant", ["--keep", "tokens"], None),
    ],
)
def test_what_an_output_cannot_hold_is_refused(bundle, rows, tmp_path, capsys, output, options, message):
    status = main(
        [
            "encode",
            str(bundle),
            str(rows),
            "-o",
            str(tmp_path / output),
            "--engine",
            "fake",
            "--bad-texts",
            "zero",
            *options,
        ]
    )
    assert status == (0 if message is None else 2)
    assert message is None or message in capsys.readouterr().err
