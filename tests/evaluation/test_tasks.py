"""Phrases, labels, robustness and probes, measured on an encoder of words and on one that tells nothing apart."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import v_measure_score

from evaluation.bias import evaluate_association, read_association_test
from evaluation.evalrank import evaluate_rank
from evaluation.labels import evaluate_clusters, evaluate_labels, read_labelled, v_measure
from evaluation.perturb import PERTURBATIONS
from evaluation.phrases import Choices, evaluate_choices, read_choices
from evaluation.probes import DECOYS, MIN_ITEMS, Probe, build_probes, evaluate_probes
from evaluation.robustness import evaluate_robustness
from evaluation.sets import read_sets
from evaluation.statistics import Bootstrap, gains
from evaluation.vectors import encode_distinct, ranks
from mirror_runtime.errors import BundleError, InputError
from tests.support.word_encoder import encode_equal, encode_words

BOOTSTRAP = Bootstrap(resamples=200)
WORDS = [f"w{i}" for i in range(400)]


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def lines(count: int = 80) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=10)) for _ in range(count)]


def values(results):
    return {result.metric: round(result.figure.value, 3) for result in results}


def test_choices_among_phrases(tmp_path):
    turney = read_choices(
        write(
            tmp_path / "turney.tsv",
            "bigram\tanswer\tdistractors (5)",
            "red car\tcar red\tcat|dog|red",
            "a b\tx\ta|b|a c",
        )
    )
    assert turney is not None
    assert values(evaluate_choices(turney, encode_words, BOOTSTRAP)) == {"accuracy": 50, "accuracy, own words too": 50}
    assert set(values(evaluate_choices(turney, encode_equal, BOOTSTRAP)).values()) == {0}
    own = Choices(name="x", questions=("red car",), answers=("red thing",), candidates=(("red", "dog"),))
    assert values(evaluate_choices(own, encode_words, BOOTSTRAP)) == {"accuracy": 100, "accuracy, own words too": 0}
    rows = [f"name {i}\tother {i}" for i in range(20)]
    names = read_choices(write(tmp_path / "names.tsv", "name\tsynonym", *rows, "name 3\t3 name"))
    assert names is not None
    assert values(evaluate_choices(names, encode_words, BOOTSTRAP)) == {"acc@1": 100, "acc@5": 100}
    assert values(evaluate_choices(names, encode_equal, BOOTSTRAP)) == {"acc@1": 0, "acc@5": 0}
    scored = write(tmp_path / "bird.tsv", "score\tphrase1\tphrase2", "0.1\ta\tb", "0.5\ta\tc", "0.9\ta\ta b")
    assert read_choices(scored) is None
    assert read_sets(scored)[0].first == ("a", "a", "a")


def test_labels_are_predicted_and_clustered(tmp_path):
    texts = [(label, f"{label}ish {WORDS[i]}") for i in range(30) for label in ("good", "bad")]
    rows = ["label\ttext", *(f"{label}\t{text}" for label, text in texts)]
    folds = read_labelled(write(tmp_path / "film.tsv", *rows))
    parts = [read_labelled(write(tmp_path / f"film-{part}.tsv", *rows)) for part in ("test", "train")][1]
    assert (parts.name, parts.tested, len(parts.texts), folds.tested) == ("film", 60, 120, 0)
    for one, samples in ((folds, 60), (parts, 60)):
        (result,) = evaluate_labels(one, encode_words, BOOTSTRAP)
        assert (result.figure.value, result.samples) == (100, samples)
    (equal,) = evaluate_labels(folds, encode_equal, BOOTSTRAP)
    assert equal.figure.value == pytest.approx(50)
    (found,) = evaluate_clusters(folds, encode_words, BOOTSTRAP)
    assert found.figure.value > 50
    assert found.figure.low <= found.figure.value <= found.figure.high


def test_clusters_are_resampled_by_the_texts_that_any_encoder_draws(tmp_path):
    found = [i % 3 == 0 for i in range(60)]
    rows = [f"{'ab'[i % 2]}\t{'xy'[found[i]]} no {i}" for i in range(60)]
    one = read_labelled(write(tmp_path / "x.tsv", "label\ttext", *rows))

    def encode(texts):
        return np.array([[text[0] == "x", text[0] == "y"] for text in texts], np.float32)

    (result,) = evaluate_clusters(one, encode, BOOTSTRAP)
    counts = BOOTSTRAP.rng().multinomial(60, np.full(60, 1 / 60), size=BOOTSTRAP.resamples)
    expected = [100 * v_measure_score(*(np.repeat(side, count) for side in (one.labels, found))) for count in counts]
    np.testing.assert_allclose(result.resampled, expected, atol=1e-9)


def test_v_measure_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(3, size=(2, 50))
    table = np.zeros((3, 3))
    np.add.at(table, (labels, clusters), 1)
    assert v_measure(table[None])[0] == pytest.approx(v_measure_score(labels, clusters))
    assert v_measure(np.array([[[5.0, 0], [0, 5]], [[5, 5], [0, 0]]])).tolist() == pytest.approx([1, 0])


def test_an_encoder_of_words_is_robust_to_order_and_not_to_typos(tmp_path):
    rows = [f"{5 * k / 39}\t{text}\t{' '.join(text.split()[: 1 + k // 4])}" for k, text in enumerate(lines(40))]
    (one,) = read_sets(write(tmp_path / "s.tsv", "score\tsentence1\tsentence2", *rows))
    results = evaluate_robustness(one, lambda texts: encode_words([t.replace("w", "word") for t in texts]), BOOTSTRAP)
    found = {(result.set, result.metric): result.figure.value for result in results}
    assert len(found) == 2 * len(PERTURBATIONS)
    for same in ("word order", "white space"):
        assert found[f"s, {same}", "cosine"] == pytest.approx(100, abs=1e-3)
        assert found[f"s, {same}", "Spearman lost"] == 0


def test_a_paraphrase_is_looked_for_among_all_other_texts(tmp_path):
    rows = [f"5\t{a}\t{b}" for a, b in (("red cat", "cat red"), ("dog", "dog a"), ("a b", "dog c"), ("same", "same"))]
    (one,) = read_sets(write(tmp_path / "s.tsv", "score\tsentence1\tsentence2", *rows, "1\tmat\triver"))
    angles = {"red cat": 1, "cat red": 1, "dog": 40, "dog a": 60, "a b": 150, "dog c": 75, "same": 200, "mat": 10}

    def encode(texts):
        return np.array([[np.cos(t), np.sin(t)] for t in np.radians([angles.get(x, 300) for x in texts])], np.float32)

    # Ranks: red cat 1 and 1; dog looks for dog a: 1, dog a for dog: 2 (dog c is nearer); a b for dog c: 2 (same is
    # nearer), dog c for a b: 6 (dog a, dog, mat, red cat, cat red are nearer).
    found = values(evaluate_rank(one, encode, BOOTSTRAP))
    assert found["hits@1"] == pytest.approx(100 * 3 / 6, abs=1e-3)
    assert found["hits@3"] == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert found["MRR"] == pytest.approx(100 * (1 + 1 + 1 + 1 / 2 + 1 / 2 + 1 / 6) / 6, abs=1e-3)
    assert values(evaluate_rank(one, encode_equal, BOOTSTRAP))["MRR"] == pytest.approx(100 / 4.5, abs=1e-3)
    (same,) = read_sets(write(tmp_path / "t.tsv", "score\tsentence1\tsentence2", "5\ta\ta", "1\ta\tb", "1\ta\tc"))
    with pytest.raises(InputError, match="t has no two texts scored 80% of its highest score"):
        evaluate_rank(same, encode, BOOTSTRAP)


BIAS = [
    "list\ttext",
    *(
        f"{name}\t{text}"
        for name, texts in zip(
            ("target1", "target2", "attribute1", "attribute2"), ("ab", "cd", "xy", "uv"), strict=True
        )
        for text in texts
    ),
]


def test_an_effect_size_is_that_by_hand(tmp_path):
    one = read_association_test(write(tmp_path / "weat.tsv", *BIAS))
    angles = {"a": 0, "b": 60, "c": 30, "d": 90, "x": 0, "y": 0, "u": 90, "v": 90}

    def encode(texts):
        return np.array([[np.cos(t), np.sin(t)] for t in np.radians([angles[x] for x in texts])], np.float32)

    effect, p_value = evaluate_association(one, encode, BOOTSTRAP)
    # Associations cos - sin: a 1, b 0.5 - 0.8660, c 0.8660 - 0.5, d -1. Means 0.3170 and -0.3170; deviation 0.8695.
    assert effect.figure.value == pytest.approx(100 * 0.633975 / 0.869472, abs=1e-3)
    # Of the six splits' sums of target1, 0.6340 is reached by {a, b} itself and {a, c}: 1.3660.
    assert p_value.figure.value == pytest.approx(100 * 2 / 6)
    assert effect.figure.low < effect.figure.value < effect.figure.high
    swapped = read_association_test(
        write(tmp_path / "w.tsv", *(line.translate(str.maketrans("12", "21")) for line in BIAS))
    )
    assert evaluate_association(swapped, encode, BOOTSTRAP)[0].figure.value == pytest.approx(effect.figure.value)
    with pytest.raises(InputError, match="every target of weat has one association"):
        evaluate_association(one, encode_equal, BOOTSTRAP)


def test_drawn_splits_give_the_p_value_of_all_splits(tmp_path, monkeypatch):
    rows = [f"{name}\t{name} {WORDS[i]}" for name in ("target1", "target2") for i in range(6)]
    rows += [f"attribute{k}\tattribute{k} target{k} no {i}" for k in (1, 2) for i in range(3)]
    one = read_association_test(write(tmp_path / "seat.tsv", "list\ttext", *rows))
    exact = evaluate_association(one, encode_words, BOOTSTRAP)[1].figure.value
    monkeypatch.setattr("evaluation.bias.MAX_PARTITIONS", 900)  # of 924
    assert exact == pytest.approx(100 / 924)
    assert evaluate_association(one, encode_words, BOOTSTRAP)[1].figure.value == pytest.approx(exact, abs=0.3)


def test_ranks_count_nearer_documents_and_ties_share_their_mean():
    documents = np.eye(3, dtype=np.float32)
    queries = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 0]], np.float32)
    assert ranks(queries, documents, np.array([0, 1, 2])).tolist() == [1, 2, 2]


def test_probes_find_texts_by_parts_and_a_collapsed_encoder_does_not():
    records = [(line,) for line in lines()]
    made = {probe.name: probe for probe in build_probes(records, records)}
    assert sorted(made) == ["content", "crop", "halves", "typos"]
    assert [len(probe.questions) for probe in made.values() if not probe.decoys] == [80] * 3
    text = lines()[3].split()
    assert (made["halves"].questions[3], made["halves"].answers[3]) == (" ".join(text[:5]), " ".join(text[5:]))
    assert set(made["crop"].questions[3].split()) < set(text)
    found, equal = (
        {result.metric: result for result in evaluate_probes(list(made.values()), encode, BOOTSTRAP)}
        for encode in (encode_words, encode_equal)
    )
    assert found["crop, MRR"].figure.value > 95
    assert equal["crop, MRR"].figure.value == pytest.approx(100 / 40.5)
    (change,) = gains([equal["crop, MRR"]], [found["crop, MRR"]])
    assert change.low > 85
    with pytest.raises(ValueError, match="different sets"):
        gains([equal["crop, MRR"]], [found["halves, MRR"]])


def test_content_is_nearer_to_an_encoder_that_weighs_rare_words(monkeypatch):
    monkeypatch.setattr("evaluation.probes.COMMON_WORDS", 6)
    records = [(f"a b c d {line}",) for line in lines()]
    content = build_probes(records, records)[0]
    question, answer, decoy = (side[0].split() for side in (content.questions, content.answers, content.decoys))
    assert set("abcd").isdisjoint(answer)
    assert set(answer) < set(question)
    assert [a == b for a, b in zip(question, decoy, strict=True)].count(False) == 1
    assert len({*content.decoys[:DECOYS], content.questions[0]}) == DECOYS + 1

    def weigh(texts):
        rare = [" ".join(word for word in text.split() if len(word) > 1) for text in texts]
        return encode_words(texts) + 9 * encode_words(rare)

    good, equal = (evaluate_probes([content], encode, BOOTSTRAP)[0].figure.value for encode in (weigh, encode_equal))
    assert good > 90
    assert equal == 0
    first = Probe(name="content", questions=("q",), answers=("a",), decoys=("a", "d", "q"))
    vectors = {"q": [1, 0], "a": [0.8, 0.6], "d": [0, 1]}
    (third,) = evaluate_probes(
        [first], lambda texts: np.array([vectors[text] for text in texts], np.float32), BOOTSTRAP
    )
    assert third.figure.value == pytest.approx(100 / 3)


def test_words_of_one_count_are_ordered_alike_in_every_process(monkeypatch):
    """The order of a set of words differs from process to process, and twenty words tie for ten places."""
    monkeypatch.setattr("evaluation.probes.COMMON_WORDS", 10)
    words = [f"word{i}" for i in range(20)]
    records = [(" ".join([*words, f"x{i}", f"y{i // 2}"]),) for i in range(MIN_ITEMS)]
    content = build_probes(records, records)[0]
    assert content.answers[0].split() == [*words[10:], "x0", "y0"]


def test_documents_have_a_probe_of_their_own_and_too_few_texts_none():
    titled = [(f"title {i}", line) for i, line in enumerate(lines())]
    assert {probe.name for probe in build_probes(titled, titled)} == {"content", "parts", "crop", "halves", "typos"}
    for records in ([("word",)] * 100, [("same", "one answer of words")] * 100):
        with pytest.raises(InputError, match=f"100 texts are too few to measure on: {MIN_ITEMS} are needed"):
            build_probes(records, records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.tsv", ["label\ttext", *["pos\ta"] * 20, "neg\tb"], "has 1 texts of 'neg': 10-fold validation needs 10"),
        ("head.tsv", ["text\tlabel", "a\tb"], "line 1: expected the header label<TAB>text"),
        ("blank.tsv", ["label\ttext", "a\t"], "line 2: expected label<TAB>text, neither empty"),
        ("none.tsv", ["label\ttext"], "none.tsv is empty: it must have a header line"),
        ("space.tsv", ["label text", "pos\ta good film"], "line 2: 4 fields where the header has 2: put one TAB"),
        ("comma.csv", ["label,text", "pos,good, very"], "line 2: 3 fields where .* or quote texts that hold"),
        ("turney.tsv", ["bigram\tanswer\twrong", "a b\tc"], "line 2: 2 fields where the header has 3"),
        ("turney.tsv", ["bigram\tanswer", "a b\tc"], "line 1: expected 3 columns"),
        ("turney.tsv", ["bigram\tanswer\twrong", "a b\tc\tb|a"], "line 2: every distractor is a word of 'a b' itself"),
        ("names.tsv", ["name\tsynonym", "a\tb\tc"], "line 2: 3 fields where the header has 2"),
        ("names.tsv", ["name\tsynonym", "a\t "], "line 2: expected 2 columns"),
        ("bias.tsv", ["word\tlist", "a\tb"], "line 1: expected the header list<TAB>text"),
        ("bias.tsv", ["list\ttext", "target3\ta"], "line 2: expected one of target1, target2, attribute1"),
        ("bias.tsv", BIAS[:-1], "has 2 of target1, 2 of target2, 2 of attribute1, 1 of attribute2: two or more"),
        ("bias.tsv", [*BIAS, "target1\tz"], "has 3 of target1, 2 of target2.*as many of target1 as of target2"),
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path, name, content, message):
    path = write(tmp_path / name, *content)
    readers = {"turney.tsv": read_choices, "names.tsv": read_choices, "bias.tsv": read_association_test}
    with pytest.raises(InputError, match=message):
        readers.get(name, read_labelled)(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found, calls: found[:, : 48 - calls], "vectors of 47 components first and of 46 after 256 texts"),
        (lambda found, calls: found[1:], r"an array of shape \(255, 48\) for 256 texts"),
        (lambda found, calls: found * np.nan, "vectors that are not finite"),
    ],
)
def test_vectors_that_change_or_break_are_one_clear_error(spoil, message):
    calls: list[int] = []

    def encode(texts):
        calls.append(1)
        return spoil(encode_words(texts), len(calls))

    with pytest.raises(BundleError, match=message):
        encode_distinct(encode, [f"text {i}" for i in range(300)])
