"""The comparison of reports: a planted regression is seen, noise alone is not."""

import dataclasses
from functools import partial

import numpy as np
import pytest

from benchmarks.compare import Verdict, _times, compare, main, read_side, warnings
from benchmarks.report.record import Better, Measurement
from evaluation.statistics import spearman
from mirror_runtime.errors import InputError


@pytest.fixture
def noisy(report):
    """Make a report whose times are drawn anew around the same medians, times `slower`."""

    def make(seed: int, slower: float = 1.0, cosine: float = 0.9998, reference: float | None = None):
        random = np.random.default_rng(seed)
        drift = 1 + 0.02 * random.standard_normal()

        def draw(one: Measurement) -> Measurement:
            if one.metric == "worst cosine of export":
                return dataclasses.replace(one, samples=(cosine,))
            if one.suite not in ("throughput", "latency", "startup") or one.better is Better.NEITHER:
                return one
            times = slower * drift * (1 + 0.04 * np.abs(random.standard_normal(100 if one.suite == "latency" else 5)))
            samples = 200 / times if one.better is Better.HIGHER else 1.5 * times
            beside = () if reference is None or one.suite == "startup" else (reference,) * 5
            return dataclasses.replace(one, samples=tuple(map(float, samples)), reference=beside)

        return dataclasses.replace(report, measurements=tuple(map(draw, report.measurements)))

    return make


def verdicts(base, head, kind=""):
    """Return the verdicts on the metrics with a word in their names, for a report or several on each side."""
    sides = [side if isinstance(side, list) else [side] for side in (base, head)]
    return {change.verdict for change in compare(*sides, threshold=0.07) if kind in change.metric}


def test_runs_that_are_apart_or_alone_need_a_larger_change(noisy):
    steady, unsteady = [noisy(i) for i in range(5)], [noisy(i, slower=s) for i, s in enumerate((1, 1.3, 1, 1.3, 1.1))]
    slower = [noisy(10 + i, slower=1.15) for i in range(5)]
    disturbed = [*steady, noisy(5), noisy(6, slower=2.0)]
    for base, head, verdict in (
        (steady, slower, Verdict.WORSE),
        (slower, steady, Verdict.BETTER),
        (unsteady, [noisy(i, slower=1.2) for i in range(5)], Verdict.NOISY),
        (disturbed, slower, Verdict.WORSE),
        (steady[0], slower[0], Verdict.NOISY),
        (steady[0], noisy(9, slower=1.6), Verdict.WORSE),
    ):
        assert verdicts(base, head, "throughput, openvino bf16, texts per second") == {verdict}


def test_the_same_speed_again_raises_no_alarm(noisy):
    for seed in range(0, 60, 6):
        found = verdicts([noisy(seed + i) for i in range(3)], [noisy(seed + 3 + i) for i in range(3)])
        assert found <= {Verdict.SAME, Verdict.NOISY}, f"seed {seed}"
    # Without a reference in every run times are compared directly.
    base = [noisy(0), *(noisy(i, reference=1.0) for i in (1, 2))]
    assert verdicts(base, [noisy(10 + i, reference=1.3) for i in range(3)]) <= {Verdict.SAME, Verdict.NOISY}


@pytest.mark.parametrize(
    ("slower", "machine", "verdict"),
    [
        (1.3, 1.3, Verdict.SAME),  # the machine was slower
        (1.15, 1.0, Verdict.WORSE),
        (1.0, 0.8, Verdict.WORSE),  # a faster machine hides slower code
        (1.0, 1.25, Verdict.BETTER),
    ],
)
def test_times_are_compared_in_units_of_the_reference(noisy, slower, machine, verdict):
    base = [noisy(i, reference=1.0) for i in range(3)]
    head = [noisy(10 + i, slower=slower, reference=machine) for i in range(3)]
    for kind in ("throughput", "latency"):
        assert verdicts(base, head, kind) == {verdict}
    changes = compare(base, head, threshold=0.07)
    (shown,) = (change for change in changes if change.metric == "throughput, openvino bf16, texts per second")
    assert (shown.base or 0) / (shown.head or 1) == pytest.approx(slower, rel=0.05)  # absolute rates, as measured


@pytest.mark.parametrize(
    ("better", "scaled", "times"),
    [
        (Better.LOWER, True, [1.0, 2.0, 2.0, 4.0]),
        (Better.LOWER, False, [1.0, 2.0, 4.0, 8.0]),
        (Better.HIGHER, True, [1.0, 0.5, 0.125, 0.0625]),
    ],
)
def test_each_round_has_its_own_reference_and_rates_are_times(better, scaled, times):
    one = Measurement(
        suite="s", party="p", metric="m", unit="ms", samples=(1.0, 2.0, 4.0, 8.0), better=better, reference=(1.0, 2.0)
    )  # fmt: skip
    assert _times(one, scaled=scaled) == times


@pytest.fixture
def sampled(noisy, change):
    """Return a report with other samples of some metrics."""

    def make(**samples):
        report = noisy(0)
        for metric, values in samples.items():
            take = partial(dataclasses.replace, samples=tuple(map(float, values)))
            report = change(report, metric.replace("_", " "), take)
        return report

    return make


def test_a_loss_of_quality_is_caught_over_the_same_pairs(sampled):
    random = np.random.default_rng(0)
    truth = np.arange(400.0)
    shared = truth + 150 * random.standard_normal(400)  # both sides err on the same pairs
    good, bad = shared, shared + 100 * random.standard_normal(400)
    assert 100 * (spearman(good, truth) - spearman(bad, truth)) > 2
    base, head = (sampled(score=truth, cosine_of_pairs=side) for side in (good, bad))
    assert verdicts(base, head, "quality") == {Verdict.WORSE}
    assert verdicts(head, base, "quality") == {Verdict.BETTER}
    assert verdicts(base, base, "quality") == {Verdict.SAME}
    # Three points between two independent small samples are noise, and are reported as noise.
    few = [sampled(score=truth[:12], cosine_of_pairs=side[:12]) for side in (good, bad)]
    assert verdicts(few[0], few[1], "quality") <= {Verdict.NOISY, Verdict.SAME}


@pytest.mark.parametrize("metric", ["texts per second", "cosine of pairs", "worst cosine of export"])
def test_a_metric_that_is_gone_is_a_loss(noisy, change, metric):
    base, gone = noisy(0), change(noisy(1), metric, lambda one: None)
    assert verdicts(base, gone, metric) == {Verdict.LOST}
    assert verdicts(gone, base, metric) == {Verdict.NEW}


def test_what_is_judged_and_against_what(noisy, sampled, change):
    base = noisy(0)
    assert verdicts(base, noisy(0, cosine=0.93), "worst cosine") == {Verdict.WORSE}
    assert verdicts(base, noisy(0, cosine=0.93), "throughput") == {Verdict.SAME}
    assert verdicts(base, sampled(peak_memory=[9e9])) == {Verdict.SAME}  # a fact
    changes = compare([base], [base], threshold=0.07)
    assert not [change for change in changes if "peers" in change.metric or "st torch" in change.metric]
    once, slower, twice = (sampled(time_per_text=times) for times in ([1.0], [2.0], [2.0, 2.0]))
    assert verdicts(once, slower, "latency") == {Verdict.NOISY}  # one sample shows no scatter
    assert verdicts(sampled(time_per_text=[1.0, 1.0]), twice, "latency") == {Verdict.WORSE}

    def halve(one: Measurement) -> Measurement:
        gateway = one.conditions.get("server") == "gateway"
        return dataclasses.replace(one, samples=tuple(sample / (1 + gateway) for sample in one.samples))

    slow_gateway = change(base, "texts per second", halve)
    assert verdicts(base, slow_gateway, "triton, closed, 8 callers, 1 texts per request, texts") == {Verdict.SAME}
    assert verdicts(base, slow_gateway, "gateway, closed, 8 callers, 1 texts per request, texts") == {Verdict.WORSE}


def test_the_command_ends_with_the_verdict_as_its_status(noisy, save, tmp_path, capsys):
    for i in range(2):
        save(noisy(i), tmp_path / "base" / str(i))
        save(noisy(5 + i, slower=1.3), tmp_path / "head" / str(i))
    text = tmp_path / "comparison.md"
    assert main([str(tmp_path / "base"), str(tmp_path / "head"), "--output", str(text)]) == 1
    assert "got worse" in text.read_text()
    assert '"worse"' in capsys.readouterr().out
    assert main([str(tmp_path / "base"), str(tmp_path / "base")]) == 0


def test_other_conditions_are_named_and_a_partial_report_or_none_is_refused(report, save, tmp_path):
    facts = report.facts
    host = dataclasses.replace(facts.host, cores_usable=64)
    other = dataclasses.replace(report, facts=dataclasses.replace(facts, host=host, partial=True))
    assert [note.split(" differ")[0] for note in warnings([report], [other])] == ["The machines"]
    assert warnings([report], [report]) == []
    with pytest.raises(InputError, match=r"has a report\.json"):
        read_side(tmp_path)
    save(other, tmp_path / "out")
    with pytest.raises(InputError, match="partial"):
        read_side(tmp_path / "out")
