"""Retrieval in the layout of BEIR: documents, queries and judgements; ranked by an encoder, or by BM25."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.sets import read_rows
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import DECIMALS, ROWS, Encode, unit_vectors
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.tokenizer import validate_text

CUT, DEEP = 10, 100
"""Ranks that nDCG and MRR, and recall, look at."""

K1, B = 1.2, 0.75
"""BM25's parameters as in Lucene."""

Scores = NDArray[np.floating[Any]]
"""[queries, documents], higher is nearer."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A collection with judged queries."""

    name: str  # the folder's name
    documents: tuple[str, ...]  # title and text
    queries: tuple[str, ...]  # those with a relevant document
    relevant: tuple[Mapping[int, int], ...]  # of each query: rows of documents and their grades, 1 or higher
    own: tuple[int | None, ...]  # of each query: the row of the document that it is itself


def read_retrieval(path: str, split: str = "test") -> Retrieval:
    """Read a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`; only judged queries count.

    Raises:
        InputError: a file is missing, empty or malformed, or a judgement names an id that does not exist.
    """
    folder = Path(path)
    corpus, queries = (_records(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    rows = {name: i for i, name in enumerate(corpus)}
    judged: dict[str, dict[int, int]] = {}
    qrels = folder / "qrels" / f"{split}.tsv"
    for row, (number, fields) in enumerate(read_rows(qrels)):
        where = f"{qrels}, line {number}"
        graded = len(fields) == 3 and re.fullmatch("-?[0-9]+", fields[2].strip())
        if row == 0:
            if graded:
                raise InputError(f"{where}: a judgement in place of the header query-id<TAB>corpus-id<TAB>score")
            continue
        if not graded:
            raise InputError(f"{where}: expected query id, document id and a whole number, with TABs between")
        query, document, grade = fields[0], fields[1], int(fields[2])
        for name, known, what in ((query, queries, "query"), (document, rows, "document")):
            if name not in known:
                raise InputError(f"{where}: the {what} {name!r} is not in {folder.name}'s {what} file")
        if grade > 0:
            judged.setdefault(query, {})[rows[document]] = grade
    if not judged:
        raise InputError(f"{qrels} judges no document as relevant: it must have query id, document id and score lines")
    return Retrieval(
        name=folder.resolve().name,
        documents=tuple(corpus.values()),
        queries=tuple(queries[name] for name in judged),
        relevant=tuple(judged.values()),
        own=tuple(rows[name] if corpus.get(name, "").endswith(queries[name]) else None for name in judged),
    )


def evaluate_retrieval(one: Retrieval, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Rank all documents of each query by cosine: nDCG@10 (linear gain, as BEIR), MRR@10 and recall@100."""
    queries, documents = unit_vectors(encode, one.queries, one.documents)
    parts = [(queries[i : i + ROWS] @ documents.T).round(DECIMALS) for i in range(0, len(queries), ROWS)]
    return score(one, np.concatenate(parts), bootstrap)


def score(one: Retrieval, scores: Scores, bootstrap: Bootstrap) -> list[Result]:
    """Measure a ranking; documents with equal scores keep their order in the collection.

    A query that is itself a document of the collection (ArguAna) does not find itself: as in BEIR, the document with
    its id is left out, but only if that document's text ends with the query's; elsewhere equal ids mean nothing.
    """
    discounts = 1 / np.log2(np.arange(2, CUT + 2))
    items = np.empty((len(one.queries), 3))
    for i, (row, relevant, own) in enumerate(zip(scores, one.relevant, one.own, strict=True)):
        ranking = [int(k) for k in np.argsort(-row, kind="stable")[: DEEP + 1] if k != own]
        found = np.array([relevant.get(k, 0) for k in ranking[:DEEP]])
        ideal = np.sort(list(relevant.values()))[::-1][:CUT]
        top = found[:CUT]
        first = np.flatnonzero(top)
        items[i] = (
            (top * discounts[: len(top)]).sum() / (ideal * discounts[: len(ideal)]).sum(),
            1 / (first[0] + 1) if len(first) else 0,
            (found > 0).sum() / len(relevant),
        )
    names = (f"nDCG@{CUT}", f"MRR@{CUT}", f"recall@{DEEP}")
    return [bootstrap.mean("retrieval", one.name, name, items[:, i]) for i, name in enumerate(names)]


def bm25(one: Retrieval) -> Scores:
    """Score every document for every query by BM25: the lexical yardstick."""
    return WordScores(one.documents, one.queries).scores(np.arange(len(one.queries)), np.arange(len(one.documents)))


class WordScores:
    """BM25 of queries and documents, over lower-cased words, without stemming."""

    def __init__(self, documents: Sequence[str], queries: Sequence[str]) -> None:
        counter = require("sklearn.feature_extraction.text", "train").CountVectorizer(token_pattern=r"(?u)\b\w+\b")
        self._documents = _weighted(counter.fit_transform(documents).astype(np.float64).tocsr())
        self._queries = counter.transform(queries).astype(np.float64).tocsr()

    def scores(self, queries: NDArray[np.int64], documents: NDArray[np.int64] | slice) -> Scores:
        """Score the documents of some rows for the queries of some rows: float64 [queries, documents]."""
        found: Scores = (self._queries[queries] @ self._documents[documents].T).toarray()
        return found


def _weighted(counts: Any) -> Any:
    """Weigh the words of documents, a sparse matrix of counts: BM25 is the sum of the weights of a query's words."""
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    documents = np.diff(counts.tocsc().indptr)
    idf = np.log(1 + (len(lengths) - documents + 0.5) / (documents + 0.5))
    norms = np.repeat(K1 * (1 - B + B * lengths / lengths.mean()), np.diff(counts.indptr))
    counts.data = counts.data / (counts.data + norms) * idf[counts.indices]
    return counts


def _records(path: Path) -> dict[str, str]:
    """Return the texts of a file's lines by id; a title comes before the text."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            name, title, text = str(value["_id"]), value.get("title") or "", value["text"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: expected a JSON object with _id and text") from error
        if problem := validate_text(0, title) or validate_text(0, text):
            raise InputError(f"{path}, line {number}: the text {problem.reason}")
        if name in found:
            raise InputError(f"{path}, line {number}: a second text with _id {name!r}: ids must differ")
        found[name] = f"{title} {text}".strip()
    if not any(re.search(r"\w", text) for text in found.values()):
        raise InputError(f"{path} has no words: it must have a JSON object with _id and text in each line")
    return found
