"""What vectors are worth: figures equal the evaluation command's, baselines and intervals mean what they say."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from scipy.stats import spearmanr

from benchmarks.evalsets import read_evaluation_sets
from benchmarks.quality import Judge, run_quality
from benchmarks.ranks import resample_spearman, spearman
from benchmarks.session import Plan, Results, loaded, select_points
from benchmarks.workload import bundle_tokenizer, load_workload
from evaluation.statistics import resample_spearman as training_resamples
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Precision, read_manifest
from mirror_runtime.errors import EngineError, InputError


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.tsv"
    rows = [f"x\t{i % 6}\tthe cat no. {i} sat\tthe dog no. {i % 5} on the mat\n" for i in range(40)]
    file.write_text("subset\tscore\tsentence1\tsentence2\n" + "".join(rows), encoding="utf-8")
    return file


@pytest.fixture
def sets(pairs):
    return read_evaluation_sets([pairs], [])


def vectors_of(judge, seed=0, dim=16):
    return np.random.default_rng(seed).standard_normal((len(judge.texts), dim), np.float32)


def test_ranks_agree_with_scipy_ties_included():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 9, 200).astype(float), random.integers(0, 5, 200).astype(float)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_resamples_are_those_of_the_evaluation_command():
    random = np.random.default_rng(1)
    x, y = random.standard_normal(300), random.integers(0, 5, 300).astype(float)
    ours = resample_spearman(x, y, seed=(3, 1), resamples=50)
    np.testing.assert_allclose(ours, training_resamples(x, y, 50, np.random.default_rng([3, 1])), atol=1e-12)


def test_sets_are_read_in_the_layouts_of_the_evaluation_command(pairs, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("gem\tjewel\t3.94\nmidday\tnoon\t3.9\ncord\tsmile\t0.02\n", encoding="utf-8")
    sentences, lexical = read_evaluation_sets([pairs], [words])
    assert (sentences.group, sentences.name, len(sentences.scores)) == ("sts", "pairs", 40)
    assert (lexical.group, lexical.first, lexical.scores) == ("words", ("gem", "midday", "cord"), (3.94, 3.9, 0.02))
    assert len(lexical.sha256) == 64


def test_sets_that_cannot_be_used_are_named(pairs, tmp_path):
    with pytest.raises(InputError, match="needs --sts or --words"):
        read_evaluation_sets([], [])
    with pytest.raises(InputError, match=r"absent\.tsv cannot be read"):
        read_evaluation_sets([tmp_path / "absent.tsv"], [])
    with pytest.raises(InputError, match="one name"):
        read_evaluation_sets([pairs, pairs], [])


def test_the_baseline_is_compared_over_the_same_pairs(sets):
    judge = Judge(sets, seed=0)
    base = vectors_of(judge)
    judge.take_baseline("fp32", base)
    near = judge.result("near", base + 0.01 * vectors_of(judge, 1), ours=True)
    same = judge.result("fp32", base, ours=True)
    assert (same.mean_delta, same.scores[0].delta, same.top10_overlap) == (None, None, 1.0)
    delta = near.mean_delta
    assert delta is not None
    assert delta.value == pytest.approx(near.mean.value - same.mean.value)
    # Paired: the difference is known far better than either side.
    assert delta.high - delta.low < (near.mean.high - near.mean.low) / 4
    assert delta.low <= delta.value <= delta.high
    far = judge.result("far", vectors_of(judge, 2), ours=True)
    assert far.top10_overlap is not None
    assert near.top10_overlap is not None
    assert far.top10_overlap < 0.5 < near.top10_overlap


def test_the_overlap_counts_shared_neighbours_and_never_the_text_itself(sets):
    judge = Judge(sets, seed=0)
    base = vectors_of(judge)
    judge.take_baseline("fp32", base)
    assert judge._neighbours is not None
    judge._neighbours[:, 0] = -1  # one of ten neighbours of each text is nobody's
    assert judge.result("fp32 again", base, ours=True).top10_overlap == pytest.approx(0.9)
    assert not any(row in nearest for row, nearest in enumerate(judge._nearest(base)))


def test_vectors_that_say_nothing_are_refused(sets):
    judge = Judge(sets, seed=0)
    with pytest.raises(EngineError, match="not finite"):
        judge.result("x", np.full((len(judge.texts), 4), np.nan, np.float32), ours=True)
    with pytest.raises(EngineError, match="tell no texts apart"):
        judge.result("x", np.ones((len(judge.texts), 4), np.float32), ours=True)


@pytest.fixture
def plan(make_bundle, make_artifact, tmp_path, sets) -> Plan:
    bundle = make_bundle(
        artifacts=(make_artifact(EngineName.FAKE, Precision.FP32), make_artifact(EngineName.TENSORRT, Precision.FP16))
    )
    manifest = read_manifest(bundle)
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\n", encoding="utf-8")
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
    return Plan(
        bundle=bundle, manifest=manifest, points=select_points(manifest, [EngineName.FAKE], ()),
        workload=load_workload(texts, tokenizer, quick=False, seed=0), suites=(), peers=(), sets=sets, training=None,
        quick=True, rounds=2, seed=0, flop_per_token=None,
    )  # fmt: skip


def test_the_suite_judges_what_is_loaded(plan):
    results, judge = Results(), Judge(plan.sets, seed=0)
    with Progress(TextColumn(""), console=Console(file=io.StringIO())) as progress, loaded(plan, results) as runners:
        run_quality(plan, runners, judge, results, progress)
    assert results.quality["fake fp32"].baseline == "fake fp32"
    assert results.quality_sets[0].scores == plan.sets[0].scores
    assert not results.failures
    assert results.has("quality")


def test_a_bundle_without_fp32_is_judged_without_deltas(plan):
    only = tuple(artifact for artifact in plan.manifest.artifacts if artifact.precision is not Precision.FP32)
    bare = dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, artifacts=only))
    results, judge = Results(), Judge(plan.sets, seed=0)
    with Progress(TextColumn(""), console=Console(file=io.StringIO())) as progress, loaded(plan, results) as runners:
        run_quality(bare, runners, judge, results, progress)
    assert results.quality["fake fp32"].mean_delta is None
    assert [failure.reason for failure in results.failures] == ["the bundle has no fp32 artifact to compare with"]
