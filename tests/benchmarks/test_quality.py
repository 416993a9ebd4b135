"""What vectors are worth: baselines and intervals mean what they state."""

import dataclasses

import numpy as np
import pytest

from benchmarks.agreement import METRIC, Reference, record_agreement
from benchmarks.plan import Suite
from benchmarks.recorder import Recorder
from benchmarks.suites import quality
from benchmarks.suites.quality import MEAN, Judge, read_evaluation_sets, run_quality
from mirror_runtime.bundle import Precision
from mirror_runtime.errors import EngineError, InputError

SPEARMAN, DIFFERENCE = "Spearman x 100", "Spearman x 100, difference to fp32"


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.tsv"
    rows = [f"x\t{i % 6}\tthe cat no. {i} sat\tthe dog no. {i % 5} on the mat\n" for i in range(40)]
    file.write_text("subset\tscore\tsentence1\tsentence2\n" + "".join(rows), encoding="utf-8")
    return file


@pytest.fixture
def plan(plan, pairs):
    return dataclasses.replace(plan, sets=read_evaluation_sets([pairs], []))


def found(recorder, party, metric, name=MEAN):
    (one,) = (
        one
        for one in recorder.measurements
        if (one.party, one.metric, one.conditions.get("set", name)) == (party, metric, name)
    )
    return one


@pytest.fixture
def judged(plan, monkeypatch):
    """Return a judge whose fp32 vectors are random, these vectors, and the record."""
    recorder = Recorder()
    texts = tuple(dict.fromkeys(text for one in plan.sets for text in one.texts))
    base = np.random.default_rng(0).standard_normal((len(texts), 16), np.float32)
    monkeypatch.setattr(quality, "fp32_reference", lambda *_: Reference(party="fp32", vectors=base))
    return Judge(plan, recorder), base, recorder


def test_sets_of_sentences_and_words_are_read_in_order(pairs, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("gem\tjewel\t3.94\nmidday\tnoon\t3.9\ncord\tsmile\t0.02\n", encoding="utf-8")
    sentences, lexical = read_evaluation_sets([pairs], [words])
    assert (sentences.name, len(sentences.scores)) == ("pairs", 40)
    assert (lexical.first, lexical.scores.tolist()) == (("gem", "midday", "cord"), [3.94, 3.9, 0.02])


def test_a_quick_run_takes_the_same_sample_and_names_its_size(pairs, monkeypatch):
    monkeypatch.setattr(quality, "QUICK_PAIRS", 10)
    one, same = (read_evaluation_sets([pairs], [], quick=True)[0] for _ in range(2))
    whole = read_evaluation_sets([pairs], [])[0]
    assert (one.name, one.first, len(one.scores)) == ("pairs, 10 pairs", same.first, 10)
    assert {(a, b, s) for a, b, s in zip(one.first, one.second, one.scores, strict=True)} <= {
        (a, b, s) for a, b, s in zip(whole.first, whole.second, whole.scores, strict=True)
    }


def test_sets_that_cannot_be_used_are_named(pairs, tmp_path):
    with pytest.raises(InputError, match="needs --sts or --words"):
        read_evaluation_sets([], [])
    with pytest.raises(InputError, match=r"absent\.tsv"):
        read_evaluation_sets([tmp_path / "absent.tsv"], [])
    with pytest.raises(InputError, match="one name"):
        read_evaluation_sets([pairs, pairs], [])


def test_differences_to_fp32_are_paired(judged):
    judge, base, recorder = judged
    random = np.random.default_rng(1)
    judge.judge("near", base + 0.01 * random.standard_normal(base.shape, np.float32), keep_cosines=True)
    judge.judge("fp32", base, keep_cosines=False)
    judge.judge("far", random.standard_normal(base.shape, np.float32), keep_cosines=False)
    mean, difference = found(recorder, "near", SPEARMAN), found(recorder, "near", DIFFERENCE)
    assert difference.median == pytest.approx(mean.median - found(recorder, "fp32", SPEARMAN).median)
    # Paired: the difference is known far better than either side.
    width = difference.figure("high") - difference.figure("low")
    assert width < (mean.figure("high") - mean.figure("low")) / 4
    assert difference.figure("low") <= difference.median <= difference.figure("high")
    overlaps = [found(recorder, party, "top-10 overlap with fp32").median for party in ("far", "near", "fp32")]
    assert overlaps[0] < 0.5 < overlaps[1] < overlaps[2] == 1.0
    assert not [one for one in recorder.measurements if (one.party, one.metric) == ("fp32", DIFFERENCE)]
    cosines = [one for one in recorder.measurements if one.metric == "cosine of pairs"]
    assert [(one.party, len(one.samples)) for one in cosines] == [("near", 40)]
    (people,) = (one for one in recorder.measurements if one.party == "people")
    assert people.conditions == cosines[0].conditions


def test_the_overlap_counts_shared_neighbours_and_never_the_text_itself(judged):
    judge, base, recorder = judged
    assert not any(row in nearest for row, nearest in enumerate(judge._nearest(base)))
    assert judge._neighbours is not None
    judge._neighbours[:, 0] = -1  # one of ten neighbours of each text does not exist
    judge.judge("fp32 again", base, keep_cosines=False)
    assert found(recorder, "fp32 again", "top-10 overlap with fp32").median == pytest.approx(0.9)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (1.0, "distinguish no texts")])
def test_meaningless_vectors_are_refused(judged, value, message):
    judge, base, _ = judged
    with pytest.raises(EngineError, match=message):
        judge.judge("x", np.full(base.shape, value, np.float32), keep_cosines=False)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_the_suite_judges_every_variant_beside_the_bundles_fp32_where_it_has_one(plan, progress, precision):
    artifacts = tuple(dataclasses.replace(one, precision=precision) for one in plan.manifest.artifacts)
    plan = dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, artifacts=artifacts))
    recorder = Recorder()
    run_quality(plan, recorder, progress)
    without = ["the bundle has no fp32 artifact to compare with"] if precision is Precision.INT8 else []
    assert [failure.reason for failure in recorder.failures] == without
    assert (plan.scratch / "fp32_sets.npz").is_file() is (precision is Precision.FP32)
    assert found(recorder, "fake fp32", "cosine of pairs", "pairs").total == 40
    assert found(recorder, "fake fp32", SPEARMAN).total == 1
    assert DIFFERENCE not in {one.metric for one in recorder.measurements}


def test_agreement_is_the_worst_texts():
    recorder, reference = Recorder(), Reference(party="fp32", vectors=np.eye(3, dtype=np.float32))
    vectors = np.array([[2, 0, 0], [0, 1, 1], [0, 0, 1]], np.float32)
    record_agreement(recorder, Suite.THROUGHPUT, "p", vectors, reference)
    (one,) = recorder.measurements
    assert one.metric == METRIC
    assert one.median == pytest.approx(2**-0.5)
    record_agreement(recorder, Suite.THROUGHPUT, "q", vectors, None)
    assert len(recorder.measurements) == 1
