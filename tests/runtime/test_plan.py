"""A plan is followed where it holds, and nowhere else."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import BundleError, Encoder, EngineError, InputError, ParityError
from mirror_runtime import plan as plans
from mirror_runtime.bundle import Canaries, EngineName, Precision, read_canaries, write_json
from mirror_runtime.cache import cache_folder
from mirror_runtime.cli.doctor import diagnose
from mirror_runtime.cli.main import main
from mirror_runtime.cli.plan import pareto
from mirror_runtime.planner import Budget, Planner
from tests.support.fake_bundles import host_plan
from tests.support.fake_gpu import FakeDriver, install_driver

ORT = plans.Setting(engine=EngineName.ONNXRUNTIME, precision=Precision.FP32, streams=1)
OV = plans.Setting(engine=EngineName.OPENVINO, precision=Precision.FP32, streams=2, row_tokens=32, batch_tokens=512)
TINY = Budget(texts=40, singles=2, rounds=1, survivors=1)


def measured(setting: plans.Setting, speed: float, cosine: float, accepted: bool = True) -> plans.Trial:
    figures = {"texts_per_s": speed, "p50_ms": 1000 / speed, "min_cosine": cosine, "certified_cosine": cosine}
    return plans.Trial(setting=setting, accepted=accepted, **figures)


@pytest.fixture
def plan(tiny_bundle: Path) -> plans.HostPlan:
    fingerprint = json.loads((tiny_bundle / "manifest.json").read_text())["fingerprint"]
    trials = (measured(OV, 100.0, 1.0), measured(ORT, 50.0, 1.0))
    here = {"fingerprint": fingerprint, "host": plans.this_host(), "versions": plans.installed_versions()}
    return host_plan(chosen=OV, measured=trials, **here)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_auto_follows_the_plan_of_this_host_and_says_so(tiny_bundle, plan, cache):
    with Encoder.load(tiny_bundle, cache_dir=cache) as encoder:
        assert encoder.decision.source is plans.DecisionSource.RULE
        ruled = encoder.encode(["the cat", "a dog"])
    plans.write_plan(plan, plans.plan_path(cache, plan.fingerprint))
    with Encoder.load(tiny_bundle, cache_dir=cache) as encoder:
        assert encoder.decision.source is plans.DecisionSource.PLAN
        assert (encoder.engine.name, encoder.engine.streams) == (EngineName.OPENVINO, 2)
        assert encoder.rows == "32, 64 tokens (many of a kind: 48), batches of 512"
        np.testing.assert_allclose(encoder.encode(["the cat", "a dog"]), ruled, atol=1e-5)
    with Encoder.load(tiny_bundle, cache_dir=cache, streams=1) as encoder:
        assert encoder.engine.streams == 1, "what the caller names goes before the plan"
    with Encoder.load(tiny_bundle, engine="onnxruntime", cache_dir=cache) as encoder:
        assert encoder.engine.name is EngineName.ONNXRUNTIME
        assert encoder.decision.source is plans.DecisionSource.PLAN
    with Encoder.load(tiny_bundle, engine="openvino", precision="fp32", cache_dir=cache) as encoder:
        assert encoder.decision.source is plans.DecisionSource.ASKED
        assert encoder.rows == "64 tokens (many of a kind: 48), batches of 1024"
    for nothing in ({"plan": None, "cache_dir": cache}, {"cache_dir": None}):
        with Encoder.load(tiny_bundle, **nothing) as encoder:
            assert encoder.decision.source is plans.DecisionSource.RULE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "0" * 16}, "it is for the bundle 0000000000000000"),
        ({"host": plans.HostIdentity(cpu="Z80", features="", cores=1, gpu="H9")}, "measured on 1 cores of Z80 with H9"),
        ({"versions": {"openvino": "1.0"}}, "openvino 1.0 (now"),
    ],
)
def test_a_stale_plan_is_left_aside_and_the_log_says_why(tiny_bundle, plan, cache, caplog, change, reason):
    path = plans.plan_path(cache, plan.fingerprint)
    plans.write_plan(dataclasses.replace(plan, **change), path)
    with caplog.at_level(logging.WARNING), Encoder.load(tiny_bundle, cache_dir=cache) as encoder:
        assert encoder.decision.source is plans.DecisionSource.RULE
    assert reason in caplog.text
    with pytest.raises(InputError, match="is not valid here"):
        Encoder.load(tiny_bundle, plan=path)


def test_a_plan_for_a_gpu_that_this_process_may_not_use_is_left_aside(tiny_bundle, plan, cache, caplog, monkeypatch):
    install_driver(monkeypatch, FakeDriver(100))  # as with CUDA_VISIBLE_DEVICES=
    on_gpu = plans.Setting(engine=EngineName.ONNXRUNTIME_CUDA, precision=Precision.FP16, streams=1)
    plans.write_plan(dataclasses.replace(plan, chosen=on_gpu), plans.plan_path(cache, plan.fingerprint))
    with caplog.at_level(logging.WARNING):
        assert plans.find_plan("auto", cache, plan.fingerprint) is None
    assert "it runs on a GPU, and the driver shows this process no GPU" in caplog.text
    install_driver(monkeypatch, FakeDriver())
    assert plans.find_plan("auto", cache, plan.fingerprint) is not None


def test_a_torn_plan_is_left_aside_and_an_unknown_format_refused(tiny_bundle, plan, cache, caplog):
    path = plans.plan_path(cache, plan.fingerprint)
    plans.write_plan(plan, path)
    assert plans.read_plan(path) == plan
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING), Encoder.load(tiny_bundle, cache_dir=cache) as encoder:
        assert encoder.decision.source is plans.DecisionSource.RULE
    assert "is not JSON" in caplog.text
    path.write_text(whole.replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(InputError, match="plan format 9"):
        plans.read_plan(path)
    path.write_text(whole.replace('"floor"', '"flour"'))
    with pytest.raises(InputError, match="flour"):
        plans.read_plan(path)


def test_planning_tries_every_artifact_streams_and_shapes_and_keeps_the_floor(tiny_bundle, cache):
    steps: list[tuple[str, int, int]] = []
    texts = [f"the cat sat on mat {i} " + "dog " * (i % 9) for i in range(80)]
    planner = Planner(tiny_bundle, texts, budget=TINY, cache_dir=cache, on_progress=lambda *step: steps.append(step))
    plan = planner.plan()
    settings = [m.setting for m in plan.measured]
    engines = (EngineName.ONNXRUNTIME, EngineName.OPENVINO)
    assert {(s.engine, s.precision) for s in settings} == {(engine, Precision.FP32) for engine in engines}
    assert len({s.row_tokens for s in settings}) == 3
    assert len({s.batch_tokens for s in settings}) == 3
    assert all(m.min_cosine > 0.9999 and m.accepted for m in plan.measured)
    assert plan.chosen in settings
    assert plan.measured[0].texts_per_s == max(m.texts_per_s for m in plan.measured)
    assert {name for name, _, _ in steps} >= {"artifacts", "row lengths", "batch sizes"}
    assert steps[-1][1] == steps[-1][2]


def test_nothing_above_the_floor_and_nothing_to_check_against_are_errors(tiny_bundle, make_bundle, cache, monkeypatch):
    texts = ["the cat", "a dog"] * 10
    with pytest.raises(InputError, match=r"floor is 1\.5"):
        Planner(tiny_bundle, texts, floor=1.5)
    with pytest.raises(InputError, match="no texts"):
        Planner(tiny_bundle, [])
    with pytest.raises(BundleError, match="no canaries"):
        Planner(make_bundle(), texts)
    monkeypatch.setattr("mirror_runtime.planner.installed", lambda name: False)
    with pytest.raises(EngineError, match="onnxruntime fp32: is not installed"):
        Planner(tiny_bundle, texts, budget=TINY, cache_dir=cache).plan()
    monkeypatch.undo()
    drifted = shutil.copytree(tiny_bundle, cache / "drifted")
    turned = tuple(dataclasses.replace(c, vector=tuple(-x for x in c.vector)) for c in read_canaries(drifted))
    write_json(Canaries(canaries=turned), drifted / "canaries.json")
    with pytest.raises(ParityError, match=r"no artifact reaches the floor 0\.999"):
        Planner(drifted, texts, budget=TINY, cache_dir=cache).plan()


def test_only_a_clear_and_accepted_rival_replaces_the_best_and_the_pareto_front_is_unbeaten(tiny_bundle, plan):
    planner = Planner(tiny_bundle, ["the cat"])
    rivals = {n: dataclasses.replace(OV, streams=n) for n in (1, 2, 3, 4)}
    speeds = {1: 100.0, 2: 101.0, 3: 900.0, 4: 110.0}
    planner._measured = {rival: measured(rival, speeds[n], 1.0, accepted=n != 3) for n, rival in rivals.items()}
    planner._choose([rivals[1]])
    planner._choose([rivals[1], rivals[2], rivals[3]])
    assert planner._best == rivals[1], "1 % is noise, and what is below the floor does not count"
    planner._choose([rivals[1], rivals[4]])
    assert planner._best == rivals[4]
    fast, exact, neither = measured(OV, 100.0, 0.98), measured(ORT, 50.0, 1.0), measured(ORT, 40.0, 0.99)
    plan = dataclasses.replace(plan, measured=(neither, exact, fast))
    assert pareto(plan) == [fast, exact]


def test_the_command_writes_the_plan_where_auto_finds_it_and_draws(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("mirror_runtime.cli.plan.QUICK", TINY)
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"the cat sat on mat {i}\n" for i in range(60)))
    picture = tmp_path / "plan.png"
    arguments = ["plan", str(tiny_bundle), "--quick", "--texts", str(texts), "--plot", str(picture)]
    assert main([*arguments, "--for", "latency"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert "chosen" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cache_folder("auto") == tmp_path / "home" / "mirror-runtime"
    assert Path(result["plan"]).parent == tmp_path / "home" / "mirror-runtime" / "plans"
    corpus = tmp_path / "in.txt"
    corpus.write_text("the cat\na dog\n")
    assert main(["encode", str(tiny_bundle), str(corpus), "-o", str(tmp_path / "out.npy"), "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["chosen_by"] == "plan"
    assert "chosen by plan" in err
    assert "% full" in err
    assert main(["plan", str(tiny_bundle), "--quick", "--texts", str(texts), "--floor", "7"]) == 2
    assert "floor is 7" in capsys.readouterr().err


def test_the_doctor_tells_what_the_cache_holds_and_which_plans_are_not_followed(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mirror-runtime"
    assert diagnose().machine["cache"] == f"{folder}, empty"
    plans.write_plan(plan, folder / "plans" / "good.json")
    moved = dataclasses.replace(plan, host=dataclasses.replace(plan.host, cores=99))
    plans.write_plan(moved, folder / "plans" / "moved.json")
    (folder / "plans" / "torn.json").write_text("{")
    facts = diagnose().machine
    assert facts["cache"].endswith(" MB")
    assert facts["plan good"] == "openvino fp32 for throughput"
    assert "not followed: it was measured on 99 cores" in facts["plan moved"]
    assert facts["plan torn"] == "cannot be read: run mirror plan again"
