"""Retrieval in BEIR's layout: its figures by hand, and errors that name the file and line."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.retrieval import bm25, evaluate_retrieval, read_retrieval, score
from evaluation.statistics import Bootstrap
from mirror_runtime.errors import InputError
from tests.support.word_encoder import encode_equal, encode_words

DOCUMENTS = {
    "d1": "the cat sat on a mat",
    "d2": "dogs run by the river",
    "d3": "a guitar and a cat",
    "d4": "rain rain rain",
}
QUERIES = {"q1": "cat", "q2": "river dogs", "q3": "never judged"}
BOOTSTRAP = Bootstrap(resamples=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qrels").mkdir()
    corpus = [{"_id": key, "title": text.split()[0], "text": text.split(" ", 1)[1]} for key, text in DOCUMENTS.items()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in corpus))
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": k, "text": t}) + "\n" for k, t in QUERIES.items())
    )
    rows = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td3\t1", "q1\td4\t0", "q2\td2\t1"]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_figures_of_a_known_ranking_are_those_by_hand(folder: Path) -> None:
    one = read_retrieval(str(folder))
    assert one.documents[0] == "the cat sat on a mat"
    assert one.queries == ("cat", "river dogs")
    ranking = np.array([[3.0, 9, 8, 7], [1, 1, 1, 1]])  # d2 d3 d4 d1; then in the order of the collection
    ndcg, mrr, recall = score(one, ranking, BOOTSTRAP)
    first = (1 / np.log2(3) + 2 / np.log2(5)) / (2 + 1 / np.log2(3))
    assert ndcg.figure.value == pytest.approx(100 * (first + 1 / np.log2(3)) / 2)
    assert (mrr.figure.value, recall.figure.value) == (50, 100)
    assert (ndcg.task, ndcg.set, ndcg.metric, ndcg.samples) == ("retrieval", folder.name, "nDCG@10", 2)


def test_shared_words_are_found_by_an_encoder_of_words_and_by_bm25(folder: Path) -> None:
    one = read_retrieval(str(folder))
    found, equal = (
        evaluate_retrieval(one, encode, BOOTSTRAP)[0].figure.value for encode in (encode_words, encode_equal)
    )
    assert found == pytest.approx(100) != equal
    scores = bm25(one)
    assert scores[0].argmax() == 2  # "a guitar and a cat" is shorter than the other
    idf = np.log(1 + (4 - 2 + 0.5) / (2 + 0.5))  # of two documents of four
    assert scores[0, 2] == pytest.approx(idf / (1 + 1.2 * (0.25 + 0.75 * 5 / np.mean([6, 5, 5, 3]))))
    assert scores[1, [0, 2, 3]].tolist() == [0, 0, 0]


def test_a_query_that_is_a_document_does_not_find_itself(folder: Path) -> None:
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "q1", "title": "a", "text": "cat"}\n{"_id": "q2", "text": "of the same id"}\n')
    one = read_retrieval(str(folder))
    assert one.own == (4, None)
    ranking = np.array([[3.0, 1, 2, 1, 9, 1], [1, 3, 1, 1, 1, 9]])  # each query's namesake first
    assert score(one, ranking, BOOTSTRAP)[1].figure.value == (100 + 50) / 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", "", "test.tsv is empty: it must have a header line"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0\n", "judges no document as relevant"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\thigh\n", "line 2: expected query id, document id"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t--1\n", "line 2: expected query id, document id"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t²\n", "line 2: expected query id, document id"),
        ("qrels/test.tsv", "q1\td1\t1\nq2\td2\t1\n", "line 1: a judgement in place of the header query-id"),
        ("corpus.jsonl", "\n", "corpus.jsonl has no words"),
        ("corpus.jsonl", '{"_id": 1, "text": "😀 !"}\n', "corpus.jsonl has no words"),
        ("corpus.jsonl", '{"_id": 1, "text": null}\n', "line 1: the text is NoneType, not str"),
        ("corpus.jsonl", '{"_id": 1, "text": "\\ud800"}\n', "line 1: the text contains a lone surrogate"),
        ("corpus.jsonl", '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n', "line 2: a second text with _id '1'"),
        ("corpus.jsonl", '{"_id": 1}\n', "corpus.jsonl, line 1: expected a JSON object with _id and text"),
        ("queries.jsonl", "[1]\n", "queries.jsonl, line 1: expected a JSON object"),
        ("queries.jsonl", None, "queries.jsonl cannot be read: No such file"),
    ],
)
def test_a_malformed_collection_is_one_clear_error(folder, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        read_retrieval(str(folder))
