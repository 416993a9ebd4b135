"""What ships, run by mteb; its figures and BM25's beside ours, where `pip install -r tests/yardsticks.txt` was done."""

import json
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.mteb_adapter import MtebEncoder
from evaluation.retrieval import bm25, evaluate_retrieval, read_retrieval
from evaluation.sets import read_sets
from evaluation.similarity import Group, evaluate
from evaluation.statistics import Bootstrap
from mirror_runtime import Encoder
from mirror_runtime.bundle import read_manifest
from mirror_runtime.errors import InputError, MissingExtra

BOOTSTRAP = Bootstrap(resamples=100)
ANIMALS = ("cat", "dog", "man", "river", "mat", "guitar")
TEXTS = [f"the {a} is on a {b} no" for a in ANIMALS for b in ANIMALS]


class PromptType(str, Enum):
    QUERY, DOCUMENT = "query", "document"


@pytest.fixture(scope="module")
def model(tiny_bundle) -> Iterator[MtebEncoder]:
    with MtebEncoder(f"{tiny_bundle}:fp32") as model:
        yield model


def needs(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -r tests/yardsticks.txt")


def test_batches_become_vectors_in_their_order_with_the_prompt_of_their_kind(tiny_bundle, model, monkeypatch):
    monkeypatch.setattr("evaluation.mteb_adapter.read_prompts", lambda _: {"query": "a man: "})
    batches = [{"text": TEXTS[:3]}, {"text": [TEXTS[1], "the river"], "id": ["1", "2"]}]
    texts = [text for batch in batches for text in batch["text"]]
    options = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 8}
    with Encoder.load(tiny_bundle, precision="fp32") as encoder, MtebEncoder(str(tiny_bundle)) as prompted:
        np.testing.assert_allclose(model.encode(batches, **options), encoder.encode(texts), atol=1e-6)
        asked = prompted.encode(batches, prompt_type=PromptType.QUERY, **options)
        np.testing.assert_allclose(asked, encoder.encode([f"a man: {text}" for text in texts]), atol=1e-6)
        documents = prompted.encode(batches, prompt_type=PromptType.DOCUMENT)
        np.testing.assert_allclose(documents, encoder.encode(texts), atol=1e-6)


def test_what_is_not_served_is_one_clear_error(tmp_path, model, monkeypatch):
    with pytest.raises(InputError, match="is neither a bundle nor an address"):
        MtebEncoder(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    with pytest.raises(MissingExtra, match="mteb"):
        _ = model.mteb_model_meta


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Scored pairs, and a collection in which every query has one relevant document."""
    pairs = [(i * 7 % 6, text, TEXTS[(i * 5 + 3) % 36]) for i, text in enumerate(TEXTS)]
    rows = "".join(f"{score}\t{one}\t{other}\n" for score, one, other in pairs)
    (tmp_path / "s.tsv").write_text(f"score\tsentence1\tsentence2\n{rows}")
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", TEXTS), ("queries", [" ".join(text.split()[1:4]) for text in TEXTS])):
        lines = (json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    judged = "".join(f"q{i}\tc{i}\t1\n" for i in range(len(TEXTS)))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return tmp_path / "s.tsv", folder


@pytest.mark.slow  # imports mteb
@pytest.mark.filterwarnings("default")  # not our warnings
def test_mteb_has_our_figures(model, tiny_bundle, files, monkeypatch):
    needs("mteb")
    import mteb

    datasets, mocks = import_module("datasets"), import_module("mteb.mocks.mock_tasks")
    dataset, sts, retrieval = datasets.Dataset.from_dict, mocks.MockSTSTask, mocks.MockRetrievalTask
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (one,), collection = read_sets(str(files[0])), read_retrieval(str(files[1]))

    class Pairs(sts):  # type: ignore[misc, valid-type]
        min_score, max_score = 0, 5

        def load_data(self, *_: Any, **__: Any) -> None:
            columns = {"sentence1": list(one.first), "sentence2": list(one.second), "score": list(one.scores)}
            self.dataset = datasets.DatasetDict({"test": dataset(columns)})
            self.data_loaded = True

    class Collection(retrieval):  # type: ignore[misc, valid-type]
        def load_data(self, *_: Any, **__: Any) -> None:
            sides = {
                side: dataset({"id": [str(i) for i in range(len(texts))], "text": list(texts)})
                for side, texts in (("corpus", collection.documents), ("queries", collection.queries))
            }
            judged = {
                str(i): {str(row): grade for row, grade in rows.items()} for i, rows in enumerate(collection.relevant)
            }
            split = {**sides, "relevant_docs": judged, "top_ranked": None}
            self.dataset = {"default": {"test": split, "val": split}}
            self.data_loaded = True

    found = mteb.evaluate(model, [Pairs(), Collection()], cache=None, co2_tracker=False)
    similar, search = (result.scores["test"][0] for result in found.task_results)
    assert found.model_revision == read_manifest(tiny_bundle).fingerprint
    with Encoder.load(tiny_bundle, precision="fp32") as encoder:
        report = evaluate(encoder.encode, {Group.STS: [one]}, spec=encoder.spec, bootstrap=BOOTSTRAP)
        ndcg, mrr, recall = evaluate_retrieval(collection, encoder.encode, BOOTSTRAP)
    assert 100 * similar["cosine_spearman"] == pytest.approx(report.results[0].spearman.value, abs=0.05)
    assert 100 * search["ndcg_at_10"] == pytest.approx(ndcg.figure.value, abs=0.05)
    assert 100 * search["mrr_at_10"] == pytest.approx(mrr.figure.value, abs=0.05)
    assert 100 * search["recall_at_100"] == pytest.approx(recall.figure.value, abs=0.05)


@pytest.mark.slow  # imports bm25s
@pytest.mark.filterwarnings("default")
def test_our_bm25_is_that_of_bm25s(files):
    needs("bm25s")
    import bm25s

    one = read_retrieval(str(files[1]))
    peer = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    peer.index([text.lower().split() for text in one.documents], show_progress=False)
    expected = [peer.get_scores(query.lower().split()) for query in one.queries]
    np.testing.assert_allclose(bm25(one), expected, rtol=1e-5)
