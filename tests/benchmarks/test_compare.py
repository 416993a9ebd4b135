"""The comparison of reports: a planted regression is seen, noise alone is not."""

import dataclasses

import numpy as np
import pytest

from benchmarks.changes import Verdict
from benchmarks.compare import compare, main, read_side, warnings
from benchmarks.ranks import spearman
from benchmarks.serving_results import GATEWAY
from benchmarks.timed import Timed
from mirror_runtime.errors import InputError


@pytest.fixture
def noisy(report):
    """Make a report whose times are drawn anew around the same medians, times `slower`."""

    def make(seed: int, slower: float = 1.0, min_cosine: float | None = None):
        random = np.random.default_rng(seed)
        drift = 1 + 0.02 * random.standard_normal()

        def draw(median: float, count: int) -> tuple[float, ...]:
            return tuple(median * slower * drift * (1 + 0.04 * np.abs(random.standard_normal(count))))

        def point(old):
            parity = old.parity if min_cosine is None else dataclasses.replace(old.parity, min_cosine=min_cosine)
            return dataclasses.replace(old, parity=parity)

        return dataclasses.replace(
            report,
            throughput=tuple(
                dataclasses.replace(r, point=point(r.point), samples_s=draw(1.0, 5)) for r in report.throughput
            ),
            latency=tuple(
                dataclasses.replace(r, point=point(r.point), samples_ms=draw(1.5, 100)) for r in report.latency
            ),
            startup=tuple(dataclasses.replace(r, samples_s=draw(0.6, 5)) for r in report.startup),
        )

    return make


def verdicts(changes, kind):
    return {change.verdict for change in changes if change.metric.startswith(kind)}


def test_fifteen_percent_slower_is_caught_and_named(noisy):
    base, head = [noisy(i) for i in range(3)], [noisy(10 + i, slower=1.15) for i in range(3)]
    changes = compare(base, head, threshold=0.07)
    assert verdicts(changes, "throughput") == {Verdict.WORSE}
    assert verdicts(changes, "latency") == {Verdict.WORSE}
    assert verdicts(compare(head, base, threshold=0.07), "throughput") == {Verdict.BETTER}


def test_runs_that_are_apart_or_alone_need_a_larger_change(noisy):
    steady, unsteady = [noisy(i) for i in range(5)], [noisy(i, slower=s) for i, s in enumerate((1, 1.3, 1, 1.3, 1.1))]
    slower = [noisy(10 + i, slower=1.15) for i in range(5)]
    assert verdicts(compare(steady, slower, threshold=0.07), "throughput") == {Verdict.WORSE}
    assert verdicts(compare(unsteady, [noisy(i, slower=1.2) for i in range(5)], threshold=0.07), "throughput") == {
        Verdict.NOISY
    }
    disturbed = [*steady, noisy(5), noisy(6, slower=2.0)]
    assert verdicts(compare(disturbed, slower, threshold=0.07), "throughput") == {Verdict.WORSE}
    assert verdicts(compare(steady[:1], slower[:1], threshold=0.07), "throughput") == {Verdict.NOISY}
    assert verdicts(compare(steady[:1], [noisy(9, slower=1.6)], threshold=0.07), "throughput") == {Verdict.WORSE}


def test_the_same_speed_again_raises_no_alarm(noisy):
    for seed in range(0, 60, 6):
        base, head = [noisy(seed + i) for i in range(3)], [noisy(seed + 3 + i) for i in range(3)]
        found = {change.verdict for change in compare(base, head, threshold=0.07)}
        assert found <= {Verdict.SAME, Verdict.NOISY}, f"seed {seed}"


def beside(report, yardstick: float):
    """Give a report whose yardsticks took so long, in seconds and in milliseconds."""
    return dataclasses.replace(
        report,
        throughput=tuple(
            dataclasses.replace(r, yardstick_s=(yardstick,) * len(r.samples_s)) for r in report.throughput
        ),
        latency=tuple(dataclasses.replace(r, yardstick_ms=(yardstick,) * 5) for r in report.latency),
    )


@pytest.mark.parametrize(
    ("slower", "machine", "verdict"),
    [
        (1.3, 1.3, Verdict.SAME),  # the machine was slower
        (1.15, 1.0, Verdict.WORSE),
        (1.0, 0.8, Verdict.WORSE),  # a faster machine hides slower code
        (1.0, 1.25, Verdict.BETTER),
    ],
)
@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_times_are_held_against_each_other_in_yardsticks(noisy, kind, slower, machine, verdict):
    base = [beside(noisy(i), 1.0) for i in range(3)]
    head = [beside(noisy(10 + i, slower=slower), machine) for i in range(3)]
    assert verdicts(compare(base, head, threshold=0.07), kind) == {verdict}
    shown = next(change for change in compare(base, head, threshold=0.07) if change.metric.startswith("throughput"))
    assert shown.base is not None
    assert shown.head is not None
    assert shown.head / shown.base == pytest.approx(slower, rel=0.05)  # absolute times, as measured


def test_without_a_yardstick_in_every_run_times_are_compared_as_they_are(noisy):
    base = [noisy(0), *(beside(noisy(i), 1.0) for i in (1, 2))]
    head = [beside(noisy(10 + i), 1.3) for i in range(3)]
    found = {change.verdict for change in compare(base, head, threshold=0.07)}
    assert found <= {Verdict.SAME, Verdict.NOISY}


def test_each_round_has_its_own_yardstick():
    one = Timed("x", "ms", [1.0, 2.0, 6.0, 8.0], [1.0, 2.0])
    assert one.in_yardsticks == [1.0, 2.0, 3.0, 4.0]


def test_vectors_farther_from_the_reference_are_worse(noisy):
    changes = compare([noisy(0)], [noisy(0, min_cosine=0.93)], threshold=0.07)
    assert verdicts(changes, "worst cosine") == {Verdict.WORSE}
    assert verdicts(changes, "throughput") == {Verdict.SAME}


def with_cosines(report, cosines, spearman):
    """Give a report whose own artifact has these cosines on many pairs."""
    count = len(cosines)
    ours = report.quality[0]
    figure = dataclasses.replace(ours.mean, value=spearman)
    score = dataclasses.replace(ours.scores[0], cosines=tuple(cosines), spearman=figure)
    sets = (dataclasses.replace(report.quality_sets[0], scores=tuple(float(i) for i in range(count))),)
    return dataclasses.replace(report, quality_sets=sets, quality=(dataclasses.replace(ours, scores=(score,)),))


def test_a_loss_of_quality_is_caught_over_the_same_pairs(noisy):
    random = np.random.default_rng(0)
    truth = np.arange(400.0)
    shared = truth + 150 * random.standard_normal(400)  # both sides err on the same pairs
    good, bad = shared, shared + 100 * random.standard_normal(400)
    scores = [100 * spearman(side, truth) for side in (good, bad)]
    base, head = (with_cosines(noisy(0), side, score) for side, score in zip((good, bad), scores, strict=True))
    assert scores[0] - scores[1] > 2
    assert verdicts(compare([base], [head], threshold=0.07), "quality") == {Verdict.WORSE}
    assert verdicts(compare([head], [base], threshold=0.07), "quality") == {Verdict.BETTER}
    assert verdicts(compare([base], [base], threshold=0.07), "quality") == {Verdict.SAME}
    # Three points between two independent small samples are noise, and are called that.
    few = [with_cosines(noisy(0), side[:12], score) for side, score in zip((good, bad), scores, strict=True)]
    assert verdicts(compare(few[:1], few[1:], threshold=0.07), "quality") <= {Verdict.NOISY, Verdict.SAME}


def test_a_metric_that_is_gone_is_a_loss(noisy):
    gone = dataclasses.replace(noisy(1), throughput=())
    assert verdicts(compare([noisy(0)], [gone], threshold=0.07), "throughput") == {Verdict.LOST}
    mute = dataclasses.replace(noisy(1), quality=())
    assert verdicts(compare([noisy(0)], [mute], threshold=0.07), "quality") == {Verdict.LOST}


def test_other_conditions_are_named(noisy):
    base = noisy(0)
    other = dataclasses.replace(base, host=dataclasses.replace(base.host, cores_usable=64))
    assert [note.split(" differ")[0] for note in warnings([base], [other])] == ["The machines"]
    assert warnings([base], [base]) == []


def test_the_command_says_it_with_its_status(noisy, save, tmp_path, capsys):
    for i in range(2):
        save(noisy(i), tmp_path / "base" / str(i))
        save(noisy(5 + i, slower=1.3), tmp_path / "head" / str(i))
    text = tmp_path / "comparison.md"
    assert main([str(tmp_path / "base"), str(tmp_path / "head"), "--output", str(text)]) == 1
    assert "got worse" in text.read_text()
    assert '"worse"' in capsys.readouterr().out
    assert main([str(tmp_path / "base"), str(tmp_path / "base")]) == 0


def test_a_partial_report_or_none_is_refused(report, save, tmp_path):
    with pytest.raises(InputError, match="nor do its folders"):
        read_side(tmp_path)
    save(dataclasses.replace(report, partial=True), tmp_path / "out")
    with pytest.raises(InputError, match="partial"):
        read_side(tmp_path / "out")


def test_the_gateway_is_compared_with_the_gateway(report):
    slow = dataclasses.replace(report.serving[0].closed[0], rounds_texts_per_s=(145.0, 150.0, 155.0))
    gateway = dataclasses.replace(report.serving[0], protocol=GATEWAY)
    slower = dataclasses.replace(gateway, closed=(slow,))
    base = dataclasses.replace(report, serving=(*report.serving, gateway))
    head = dataclasses.replace(report, serving=(*report.serving, slower))
    found = {change.metric: change.verdict for change in compare([base], [head], threshold=0.07)}
    assert found["serving, openvino bf16, 8 x 1"] is Verdict.SAME
    assert found["serving, openvino bf16, http, gateway, 8 x 1"] is Verdict.WORSE
