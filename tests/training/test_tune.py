"""`python training/tune.py` as a user runs it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime.bundle import Pooling, read_encoder
from tests.support.paths import ROOT
from training.recipe import RECIPES, Recipe, TuneConfig
from training.tune import _default, main

SCRIPT = ROOT / "training" / "tune.py"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    lines = [f"the cat no. {i} is playing the guitar by a river" for i in range(20)]
    path.write_text("\n".join([*lines, lines[0], ""]), encoding="utf-8")
    return path


def arguments(base: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    files = ["--base", str(base), "--corpus", str(corpus), "--output", str(output)]
    return [*files, "--batch-size", "8", "--probe", "none", *more]


def report(run: Path) -> Any:
    return json.loads((run / "train.json").read_text(encoding="utf-8"))


@pytest.mark.process
def test_a_run_by_path_writes_a_folder_and_ends_in_one_json_line(tiny_bert: Path, corpus: Path, tmp_path: Path) -> None:
    options = arguments(tiny_bert, corpus, Path("runs/x"), "--pooling", "mean", "--seed", "7")
    done = subprocess.run([sys.executable, SCRIPT, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert (line["output"], line["steps"], line["texts"], line["duplicates"]) == ("runs/x", 2, 20, 1)
    assert "20 distinct lines (1 duplicates and 0 empty lines left out), 2 steps on" in done.stderr.replace("\n", " ")
    run = tmp_path / "runs" / "x"
    spec = read_encoder(run)
    assert (spec.base_model, spec.pooling, spec.normalize, spec.max_tokens) == ("tiny-bert", Pooling.MEAN, True, 64)
    assert report(run)["settings"]["seed"] == 7
    assert report(run)["corpus"]["lines"] == 21
    assert report(run)["result"]["loss"] == line["loss"]
    assert set(report(run)["versions"]) >= {"python", "torch", "transformers"}
    metrics = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [metric["step"] for metric in metrics] == [1, 2]
    assert metrics[-1]["loss"] == line["loss"]
    assert [path.name for path in run.parent.iterdir()] == ["x"]
    vectors = Reference.load(resolve(str(run))).encode(["the cat", "a river"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_run_can_be_tuned_again_and_keeps_its_pooling(tiny_bert: Path, corpus: Path, tmp_path: Path) -> None:
    assert main(arguments(tiny_bert, corpus, tmp_path / "a", "--pooling", "mean_padded", "--max-tokens", "40")) == 0
    assert main(arguments(tmp_path / "a", corpus, tmp_path / "b", "--max-tokens", "20", "--recipe", "word")) == 0
    spec = read_encoder(tmp_path / "b")
    assert (spec.pooling, spec.pad_to, spec.max_tokens) == (Pooling.MEAN_PADDED, 40, 40)
    settings = report(tmp_path / "b")["settings"]
    assert (settings["temperature"], settings["epochs"], settings["max_tokens"]) == (0.2, 2, 20)


def test_an_output_in_use_is_refused_and_replaced_on_demand(tiny_bert, corpus, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "precious").write_text("x")
    options = arguments(tiny_bert, corpus, output, "--pooling", "cls")
    assert main(options) == 2
    assert "is not empty: " in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["precious"]
    assert main([*options, "--overwrite"]) == 2
    assert "holds something else" in capsys.readouterr().err
    (output / "encoder.json").write_text("of an earlier run")
    assert main([*options, "--overwrite"]) == 0
    assert not (output / "precious").exists()
    assert read_encoder(output).pooling is Pooling.CLS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "does not record its pooling: add --pooling"),
        ("--pooling mean --batch-size 21", "20 distinct lines, fewer than one batch of 21"),
        ("--pooling mean --lr 1e30", "Lower --lr"),
        ("--pooling mean --temperature 0", "--temperature is 0.0: it must be a positive number"),
        ("--pooling mean --max-tokens 65", "--max-tokens is 65, but"),
        ("--pooling mean_padded --max-tokens 65", "--max-tokens is 65, but"),
        ("--pooling mean --base ./absent", "'./absent' does not exist"),
        ("--pooling mean --corpus absent.txt", "absent.txt cannot be read"),
        ("--pooling mean --revision v1", "--revision v1 is for hub names"),
        ("--pooling mean --pairs", "line 1: a pair is two texts with one TAB between them"),
        ("--pooling mean --column body", "--column is for files with columns and data sets"),
        ("--pooling mean --exclude absent.tsv", "evaluation set absent.tsv cannot be read"),
        ("--pooling mean --sts absent.tsv", "evaluation set absent.tsv cannot be read"),
        ("--pooling mean --checkpoint-every 0", "--checkpoint-every is 0: it must be at least 1"),
        ("--pooling mean --sample 7", "fewer than one batch of 8"),
        ("--pooling mean --views same", "--views would change nothing: it needs --documents"),
        ("--pooling mean --projection dense", "--projection would change nothing: it needs --teacher"),
        ("--pooling mean --drift 1", "--drift would change nothing: it needs --objective self-guided"),
        ("--pooling mean --pairs --repetition 0.3", "--repetition would change nothing: it needs --objective mirror"),
        ("--pooling cls --recipe self-guided --mask-length 3", "--mask-length would change nothing"),
        ("--pooling mean --checkpoint-every 1 --teacher http://127.0.0.1:1/v1", "cannot resume with the teacher http"),
        ("--pooling middle", "mean_padded"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing_behind(tiny_bert, corpus, tmp_path, capsys, options, message):
    assert main(arguments(tiny_bert, corpus, tmp_path / "run", *options.split())) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    if options != "--pooling middle":  # typer draws a box around an unknown value
        (captured_error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert message in captured_error
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_every_setting_is_an_option_whose_help_has_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    # narrow terminals truncate long names
    missing = [f.name for f in dataclasses.fields(TuneConfig) if f"--{f.name.replace('_', '-')}"[:12] not in shown]
    assert missing == []
    assert _default("temperature").startswith(f"({RECIPES[Recipe.SENTENCE].temperature:g}; ")
    assert f"word {RECIPES[Recipe.WORD].temperature:g}" in _default("temperature")
    assert _default("mask_length").startswith("(5; phrase 2; word 0")
    assert _default("micro_batch_tokens") == "(none)"
    assert _default("reference_masking").startswith("(no")


def test_options_reach_the_run_and_self_guided_implies_its_recipe(tiny_bert, corpus, tmp_path, monkeypatch):
    options = "--pooling mean --lr 1e-4 --drophead 0.2 --reference-masking --micro-batch-tokens 128 --schedule linear"
    options += " --clip 1 --seed 5 --tensorboard"
    assert main(arguments(tiny_bert, corpus, tmp_path / "run", *options.split())) == 0
    expected: dict[str, Any] = {"lr": 1e-4, "drophead": 0.2, "reference_masking": True, "micro_batch_tokens": 128}
    expected |= {"schedule": "linear", "clip": 1.0, "seed": 5}
    assert report(tmp_path / "run")["settings"].items() >= expected.items()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    monkeypatch.setattr("training.self_guided.HEAD_WIDTH", 32)
    guided = ["--pooling", "cls", "--objective", "self-guided", "--max-tokens", "64"]
    assert main(arguments(tiny_bert, corpus, tmp_path / "guided", *guided)) == 0
    settings, recipe = report(tmp_path / "guided")["settings"], RECIPES[Recipe.SELF_GUIDED]
    assert (settings["temperature"], settings["lr"], settings["batch_size"]) == (recipe.temperature, recipe.lr, 8)


def test_a_sample_without_evaluation_texts_is_evaluated_before_and_after(tiny_bert, corpus, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"a dog no. {i} sat on the mat"}) + "\n" for i in range(20)))
    sts = tmp_path / "sts.tsv"
    first = "The CAT no. 3 is playing the guitar by a river!"
    sts.write_text(f"score\tsentence1\tsentence2\n1\t{first}\ta dog\n5\ta cat\tcat\n3\tmat\ta\n2\ta\tb\n")
    words = tmp_path / "words.txt"
    words.write_text("cat\tdog\t7\nmat\triver\t1\nman\tguitar\t2\n")
    options = arguments(tiny_bert, corpus, tmp_path / "run", "--pooling", "mean", "--sample", "24")
    options[options.index("--corpus") + 1 : options.index("--output")] = [str(corpus), str(more)]
    assert main([*options, "--exclude", str(sts), "--sts", str(sts), "--words", str(words), str(words)]) == 0
    captured = capsys.readouterr()
    shown = " ".join(captured.err.split())
    assert "39 distinct lines (1 duplicates, 0 empty lines and 1 with evaluation texts left out), 24 of th" in shown
    assert "left out: 1 of 7 texts of sts.tsv (14.3%)" in shown
    assert "in the corpus: 0 of 7 texts of sts (0.0%)" in shown
    line = json.loads(captured.out)
    assert {"sts_before", "sts_after", "words_before", "words_after"} <= set(line)
    assert line["texts"] == 24
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert [result["name"] for result in evaluation["after"]["sets"]] == ["sts", "words", "words"]
