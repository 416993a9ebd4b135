"""`python training/evaluate.py` as a user runs it."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.held_out import text_hash
from tests.support.endpoints import endpoint, vectors
from tests.support.paths import ROOT
from tests.support.word_encoder import encode_words
from training.evaluate import main
from training.own import own_probes

SCRIPT = ROOT / "training" / "evaluate.py"
TEXTS = ["the cat", "a dog", "cat dog", "a man", "the river", "playing a guitar", "mat", "on the mat"]


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    path = tmp_path / "some-sts.tsv"
    rows = [f"{(i * 7) % 6}\t{TEXTS[i % 8]}\t{TEXTS[(i * 3 + 1) % 8]}" for i in range(30)]
    path.write_text("score\tsentence1\tsentence2\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "some-words.txt"
    path.write_text("".join(f"{a}\t{b}\t{n}\n" for a, b, n in zip("abcdefgh", "bdfhaceg", range(8), strict=True)))
    return path


def test_own_texts_are_those_that_the_run_held_out(tmp_path):
    texts = [f"a text of some words no. {i}" for i in range(300)]
    own = tmp_path / "text.txt"
    own.write_text("\n".join(texts))
    for name, held_out in (("one", texts[:80]), ("two", texts[20:100])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps({"held_out": [*map(text_hash, held_out)]}))

    def asked(*encoders: str) -> set[str]:
        made = own_probes([str(own)], [str(tmp_path / encoder) for encoder in encoders])
        (crops,) = (probe for probe in made if probe.name == "crop")
        return set(crops.answers)

    assert asked("one", "absent") == set(texts[:80])
    assert asked("one", "two") == set(texts[20:80])
    assert len(asked("absent")) == 100


def test_two_encoders_end_in_one_json_line(tiny_bert, sts, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    second = shutil.copytree(tiny_bert, tmp_path / "second")
    options = [
        "--sts",
        sts,
        "--words",
        words,
        words,
        "--pooling",
        "cls",
        "--output",
        "r/report.json",
        "--plot",
        "r/plot.png",
    ]
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # the script replaces the first
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, (tiny_bert, second, *options))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    written, shown = capsys.readouterr()
    report = json.loads(written)
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == report
    assert (tmp_path / "r" / "plot.png").read_bytes().startswith(b"\x89PNG")
    first, other = report["encoders"]
    assert (first["encoder"], first["pooling"]) == (str(tiny_bert), "cls")
    assert first["aggregation"].startswith("all: ")
    found = [(s["name"], s["group"], s["pairs"]) for s in first["sets"]]
    assert found == [("some-sts", "sts", 30), *[("some-words", "words", 8)] * 2]
    assert first["sets"] == other["sets"]
    assert first["sets"][0]["spearman_low"] < first["sets"][0]["spearman"] < first["sets"][0]["spearman_high"]
    assert first["means"]["words"]["mean"] == pytest.approx(first["sets"][1]["spearman"])
    (change,) = report["differences"]
    assert (change["encoder"], change["over"]) == (str(second), str(tiny_bert))
    assert change["means"]["sts"] == {"mean": 0, "mean_low": 0, "mean_high": 0}
    for part in (
        "some-sts",
        "mean of 1 sts",
        "mean of 2 words",
        "second (cls)",
        "Geometry of the vectors of second (cls)",
    ):
        assert part in shown


@pytest.mark.process
def test_the_script_runs_by_path_from_any_folder(tmp_path):
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, SCRIPT, "--help"], cwd=tmp_path, env=environment, capture_output=True, check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate on: pass --sts, --words"),
        (["--sts", "absent.tsv"], "evaluation set absent.tsv cannot be read"),
        (["--sts", "{sts}"], "does not record its pooling"),
        (["--sts", "{sts}", "--pooling", "mean", "--output", "/dev/null/x"], "/dev/null/x cannot be written"),
        (["--sts", "{sts}", "--pooling", "mean", "--max-tokens", "65"], "has 64 positions"),
        (["--sts", "{sts}", "--plot", "figures.html"], "--plot is figures.html: its name must end in .png"),
        (["http://127.0.0.1:1/v1", "--sts", "{sts}", "--max-tokens", "9"], "--max-tokens cannot change the limit of"),
    ],
)
def test_bad_input_is_one_clear_error(tiny_bert, sts, capsys, options, message):
    assert main([str(tiny_bert), *(option.format(sts=sts) for option in options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_help_shows_the_separators_of_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # not read as markup, which would drop <TAB>
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("label<TAB>text") == 2
    assert "bigram<TAB>answer<TAB>distractors" in shown


@pytest.mark.parametrize("option", ["--pooling", "--revision"])
def test_no_option_is_ignored_where_every_encoder_is_served(tiny_bundle, sts, capsys, option):
    for name in (str(tiny_bundle), f"{tiny_bundle}:fp32", "triton://127.0.0.1:1"):
        assert main([name, "--sts", str(sts), option, "mean"]) == 2
        assert f"{option} is for folders and hub names, and {name} has its own" in capsys.readouterr().err


def test_a_report_is_printed_before_files_that_fail(tiny_bert, sts, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    plot = tmp_path / "plot.png"
    assert main([str(tiny_bert), "--sts", str(sts), "--pooling", "mean", "--plot", str(plot)]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["encoders"][0]["pooling"] == "mean"
    assert f"error: {plot}: No space left on device" in captured.err
    assert not list(tmp_path.glob("*plot*"))


def collection(folder: Path, qrels: str = "q0\td0\t1\n") -> str:
    """Write a collection in BEIR's layout."""
    (folder / "qrels").mkdir(parents=True)
    for kind in ("corpus", "queries"):
        rows = [json.dumps({"_id": f"{kind[0].replace('c', 'd')}{i}", "text": text}) for i, text in enumerate(TEXTS)]
        (folder / f"{kind}.jsonl").write_text("\n".join(rows))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    return str(folder)


def labelled(path: Path, labels: str = "ab") -> str:
    path.write_text("label\ttext\n" + "".join(f"{label}\t{label} text {i}\n" for i in range(12) for label in labels))
    return str(path)


def test_every_task_is_in_table_json_and_plot(sts, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.evaluate._load", lambda *_: (encode_words, None))
    drawn: list[str] = []

    def save(figure, path, **_):
        drawn.extend(label.get_text() for label in figure.axes[0].get_yticklabels())
        drawn.extend(text.get_text() for text in figure.legends[0].get_texts())
        Path(path).write_bytes(b"png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "names.tsv").write_text("name\tsynonym\n" + "".join(f"{text}\t{text} too\n" for text in TEXTS))
    lists = [
        f"{name}\t{text}\n" for name in ("target1", "target2", "attribute1", "attribute2") for text in (name, "the cat")
    ]
    (tmp_path / "weat.tsv").write_text("list\ttext\n" + "".join(lists))
    (tmp_path / "own.txt").write_text("".join(f"one of the texts with number {i}\n" for i in range(120)))
    options = {
        "--sts": sts, "--words": words, "--phrases": tmp_path / "names.tsv",
        "--retrieval": collection(tmp_path / "beir"),
        "--classify": labelled(tmp_path / "film.tsv"), "--cluster": tmp_path / "film.tsv",
        "--bias": tmp_path / "weat.tsv", "--own": tmp_path / "own.txt", "--plot": tmp_path / "plot.png",
    }  # fmt: skip
    arguments = [str(one) for pair in options.items() for one in pair]
    assert main(["before", "after", *arguments, "--robust", "--rank", "--resamples", "100"]) == 0
    written, shown = capsys.readouterr()
    report = json.loads(written)
    tasks = report["encoders"][0]["tasks"]
    assert {task["task"] for task in tasks} == {
        *("phrases", "retrieval", "classification", "clustering", "bias", "evalrank", "robustness", "probe")
    }
    names = ["some-sts, Spearman", "some-words, Spearman", *(f"{task['set']}, {task['metric']}" for task in tasks)]
    assert drawn == [*names, "BM25", "before", "after"]
    assert all(name in shown for name in names)
    assert [task["metric"] for task in report["differences"][0]["tasks"]] == [task["metric"] for task in tasks]
    assert {one["metric"] for one in report["bm25"]} == {"nDCG@10", "MRR@10", "recall@100"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda path: ["--retrieval", collection(path / "beir", "")], "test.tsv is empty: it must have a header line"),
        (lambda path: ["--retrieval", collection(path / "beir", "q0\td9\t1\n")], "the document 'd9' is not in beir's"),
        (lambda path: ["--retrieval", collection(path / "beir", "q9\td0\t1\n")], "the query 'q9' is not in beir's"),
        (lambda path: ["--classify", labelled(path / "x.tsv", "a")], "has the label 'a' only: a classifier needs two"),
        (lambda path: ["--cluster", labelled(path / "x.tsv", "a")], "has the label 'a' only: a classifier needs two"),
        (lambda path: ["--own", labelled(path / "x.tsv")], "texts are too few to measure on: 50 are needed"),
        (lambda path: ["--own", str(path / "absent.txt")], "absent.txt"),
        (
            lambda path: ["--retrieval", collection(path / "beir")],
            "of 8 components first and of 7 after 1 texts: it must",
        ),
    ],
    ids=["empty qrels", "no document", "no query", "one label", "one cluster", "small corpus", "absent", "dimensions"],
)
def test_what_cannot_be_measured_on_is_one_clear_error(tmp_path, monkeypatch, capsys, options, message):
    """The last endpoint answers other dimensions after the first request: it is replaced half way."""
    monkeypatch.setattr("evaluation.vectors.TEXTS_A_CALL", 1)
    asked: list[str] = []

    def answer(path, body):
        asked.append(path)
        return vectors(8 if len(asked) == 1 else 7, len(body["input"]))

    with endpoint(answer) as url:
        assert main([f"{url}#some", *options(tmp_path)]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert (captured.out, "Traceback" in captured.err) == ("", False)
