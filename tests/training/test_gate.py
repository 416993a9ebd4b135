"""The gate: which texts are held out, what it measures, and how a run ends when tuning made the encoder worse."""

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from evaluation.held_out import text_hash
from evaluation.statistics import Bootstrap, Estimate, Verdict
from mirror_runtime.errors import InputError
from tests.support.word_encoder import encode_words
from training import run, trainer
from training.augment import Document, Scored, texts_of
from training.corpus import CorpusRequest, read_corpus
from training.gate import MIN_TEXTS, Gate, Outcome, split_corpus
from training.hardware import choose_hardware
from training.own import FEWEST, MOST, hold_out, read_own
from training.recipe import Device, TunePrecision
from training.tune import main

pytestmark = pytest.mark.tunes

HARDWARE = choose_hardware(Device.CPU, TunePrecision.FP32)
RARE = ["cat", "dog", "man", "river", "mat", "guitar", "sat", "playing"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Lines of common words, and of rare ones that each occur in at most 30 of them."""
    rare = [f"{a} {b} {c}" for a in RARE for b in RARE for c in RARE][:MIN_TEXTS]
    return [f"the {words} is on a no" for words in rare]


@pytest.fixture(autouse=True)
def _small_vocabulary(monkeypatch):
    monkeypatch.setattr("evaluation.probes.COMMON_WORDS", 5)
    monkeypatch.setattr("evaluation.probes.RARE", (2, 300))


@pytest.fixture
def corpus(lines: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def encoder(encode):
    return SimpleNamespace(encode_unnormalized=encode)


def weigh(texts):
    """Encode with rare words nine times as heavy."""
    return encode_words(texts) + 9 * encode_words([" ".join(w for w in text.split() if w in RARE) for text in texts])


def test_the_same_texts_are_held_out_in_any_order_and_with_titles(lines):
    records = [(line,) for line in lines]
    held, rest = hold_out(records)
    assert (len(held), len(rest)) == (FEWEST, MIN_TEXTS - FEWEST)
    assert sorted([*held, *rest]) == sorted(records)
    shuffled = random.Random(1).sample(records, len(records))
    assert sorted(hold_out(shuffled)[0]) == sorted(held)
    assert {text for _, text in hold_out([(f"t{i}", line) for i, line in enumerate(lines)])[0]} == {h for (h,) in held}
    many, more = hold_out([(f"text number {i}",) for i in range(20_000)])
    assert (len(many), len(more)) == (MOST, 20_000 - MOST)


def test_a_corpus_is_split_and_a_small_one_refused(corpus, lines):
    whole = read_corpus(CorpusRequest(files=(str(corpus),)))
    rest, (held,) = split_corpus(whole)
    assert set(rest.examples).isdisjoint(one[0] for one in held)
    assert len(rest.examples) + len(held) == MIN_TEXTS
    assert rest.sha256 != whole.sha256
    small = dataclasses.replace(whole, examples=whole.examples[:-1])
    with pytest.raises(InputError, match=f"{MIN_TEXTS - 1} distinct texts are too few.*--probe none"):
        split_corpus(small)
    pairs = dataclasses.replace(whole, examples=tuple((f"q {line}", line) for line in lines))
    rest, (held,) = split_corpus(pairs)
    assert (len(rest.examples[0]), len(held[0])) == (2, 2)
    labels = dataclasses.replace(whole, examples=tuple((line, f"label {i % 3}") for i, line in enumerate(lines)))
    with pytest.raises(InputError, match="3 distinct texts are too few"):
        split_corpus(labels)


def test_halves_share_no_text_and_do_not_depend_on_order(corpus, lines):
    whole = read_corpus(CorpusRequest(files=(str(corpus),)))
    documents = [Document(f"{title} {line}", line) for i in range(3) for title in "ab" for line in lines[i::3]]
    documents += [Document(f"c {line} too", f"{line} too") for line in lines]
    corpora = [dataclasses.replace(whole, examples=tuple(one)) for one in (documents, documents[::-1])]
    halves, again = ([set(half) for half in split_corpus(one, 2)[1]] for one in corpora)
    texts = [{texts_of(document)[1] for document in half} for half in halves]
    assert halves == again
    assert texts[0].isdisjoint(texts[1])
    assert [len(one) for one in texts] == [FEWEST, FEWEST]


def test_a_runs_hashes_say_what_it_held_out(lines):
    records = [(line,) for line in lines]
    named = records[:60]
    held, rest = hold_out(records, [text_hash(line) for (line,) in named])
    assert (held, rest) == (named, records[60:])
    assert hold_out(records, ["of another corpus"]) == hold_out(records)


def test_spearman_is_of_pairs_that_share_no_text():
    pairs = [Scored(f"{'cat ' * (1 + i % 3)}{i}", f"cat dog {i}", float(i % 3)) for i in range(60)]
    shared = [Scored("cat", f"man {i}", 1.0) for i in range(40)]
    gates = [Gate(list(held), [], HARDWARE) for held in (pairs, [*shared, *pairs], [*pairs, *shared][::-1])]
    outcomes = []
    for gate in gates:
        gate.before(encoder(encode_words))
        outcomes.append(gate.after(encoder(encode_words)))
    assert [one.items for one in outcomes] == [60, 61, 61]
    assert outcomes[1].before == outcomes[2].before
    left, right = (encode_words(list(side)) for side in zip(*map(texts_of, pairs), strict=True))
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    expected = spearmanr(cosines.round(6), [pair.score for pair in pairs]).statistic
    assert outcomes[0].before.value == pytest.approx(100 * expected, abs=0.5)
    assert outcomes[0].before.low <= outcomes[0].before.value <= outcomes[0].before.high
    with pytest.raises(
        InputError, match=r"of 40 held-out pairs only 1 share no text, and 50 are needed: .*--probe none"
    ):
        Gate(list(shared), [], HARDWARE)


def test_no_pair_that_is_tuned_on_has_a_held_out_text_in_either_place(lines):
    turned = [(text, f"{text} too") for text in lines]
    pairs = [pair for line in lines for pair in ((f"q {line}", line), (f"r {line}", line))]
    held, rest = hold_out([*pairs, *turned])
    texts = {text for _, text in held}
    assert len(texts) == FEWEST
    assert texts.isdisjoint(text for pair in rest for text in pair)
    assert len(rest) > len(pairs)


def test_own_files_give_the_texts_that_a_run_holds_out_of_them(lines, tmp_path):
    one, two = tmp_path / "one.tsv", tmp_path / "two.tsv"
    pairs = [f"q {line}\t{line}" for line in lines]
    one.write_text("\n".join(pairs[:300]))
    two.write_text("\n".join(["", pairs[0], *pairs[300:]]))
    corpus = read_corpus(CorpusRequest(files=(str(one), str(two)), pairs=True))
    assert hold_out(read_own([str(one), str(two)]))[0] == split_corpus(corpus)[1][0]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(weigh, weigh, Verdict.UNCLEAR), (weigh, encode_words, Verdict.WORSE), (encode_words, weigh, Verdict.BETTER)],
)
def test_harm_is_worse_and_no_change_is_neither(lines, before, after, verdict):
    held, rest = hold_out([(line,) for line in lines])
    gate = Gate(held, rest, HARDWARE)
    gate.before(encoder(before))
    outcome = gate.after(encoder(after))
    assert outcome.verdict is verdict
    assert (outcome.texts, outcome.to_json()["verdict"]) == (FEWEST, verdict.value)
    assert outcome.gain.value == pytest.approx(outcome.after.value - outcome.before.value)
    assert outcome.gain.low <= outcome.gain.value <= outcome.gain.high
    assert f"{verdict.value}: of {outcome.items} texts that tuning never saw" in str(outcome)


def test_documents_and_lines_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"title": "a", "text": "b"}\n{"title": "", "text": "c"}\n{"title": "a", "text": "b"}\n')
    assert read_own([str(path)]) == [("a", "b"), ("c",)]
    path.write_text('{"text1": "a", "text2": "b"}\n')
    assert read_own([str(path)]) == [("a", "b")]
    path.write_text('{"text": "b"}\n\n')
    assert read_own([str(path)]) == [("b",)]
    path.with_suffix(".txt").write_text("b\n\nc\nb\n")
    assert read_own([str(path.with_suffix(".txt"))]) == [("b",), ("c",)]
    path.with_suffix(".txt").write_text("a\tb\nc\n")
    assert read_own([str(path.with_suffix(".txt"))]) == [("a\tb",), ("c",)]


@pytest.mark.parametrize(("more", "status"), [((), 3), (("--accept-worse",), 0)])
def test_a_worse_encoder_is_written_with_its_verdict_and_status_3(
    tiny_bert, corpus, tmp_path, capsys, monkeypatch, more, status
):
    shares = iter([np.ones(80), np.arange(80) % 2])
    measured = lambda *_: [Bootstrap().mean("probe", "own", "content, accuracy", next(shares))]  # noqa: E731
    monkeypatch.setattr("training.gate.evaluate_probes", measured)
    options = ["--base", str(tiny_bert), "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    assert main([*options, "--pooling", "mean", "--batch-size", "100", *more]) == status
    captured = capsys.readouterr()
    gate = json.loads(captured.out)["gate"]
    assert (gate["verdict"], gate["held_out"]) == ("worse", FEWEST)
    assert (gate["before"], gate["after"], gate["gain"]) == (100, 50, -50)
    assert captured.err.count("texts that tuning never saw") == 1
    assert ("Keep the base, or pass --accept-worse" in captured.err) == (status == 3)
    report = json.loads((tmp_path / "run" / "train.json").read_text())
    assert report["result"]["gate"] == gate
    assert report["corpus"]["texts"] == MIN_TEXTS - FEWEST
    assert report["held_out"] == sorted(text_hash(text) for (text,) in hold_out(read_own([str(corpus)]))[0])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "## Did tuning help?\n\nworse: of 80 texts that tuning never saw" in card


def test_single_words_are_refused(lines):
    with pytest.raises(InputError, match=r"fewer than 50 of 100 held-out texts have 4 words .*--probe none"):
        Gate([(f"word{i}",) for i in range(100)], [(line,) for line in lines], HARDWARE)


def test_only_texts_that_are_not_held_out_are_tuned_on(tiny_bert, corpus, lines, tmp_path, monkeypatch):
    seen = []
    train = trainer.train
    monkeypatch.setattr(run, "train", lambda reference, data, *rest: (seen.extend(data), train(reference, data, *rest)))
    options = [
        "--base",
        str(tiny_bert),
        "--corpus",
        str(corpus),
        "--output",
        str(tmp_path / "run"),
        "--pooling",
        "mean",
    ]
    assert main([*options, "--batch-size", "200", "--lr", "1e-9"]) == 0
    assert set(seen) == {text for (text,) in hold_out([(line,) for line in lines])[1]}


def test_an_interval_that_holds_a_gain_or_a_loss_of_a_point_is_no_verdict():
    value = Estimate(value=1.0, low=0.5, high=1.5)
    gains = {(-3.0, -1.1): Verdict.WORSE, (-3.0, -1.0): Verdict.UNCLEAR, (0.1, 2.0): Verdict.BETTER}
    for (low, high), verdict in gains.items():
        gain = Estimate(value=(low + high) / 2, low=low, high=high)
        outcome = Outcome(texts=9, items=9, before=value, after=value, gain=gain, seconds=0.1)
        assert outcome.verdict is verdict
