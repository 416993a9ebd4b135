"""Pairs of a query and a text: their tokens, their rows, their scores in process, and an error for each bad one."""

import asyncio

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from mirror_runtime import AsyncEncoder, BundleError, Encoder, InputError, Reranker, TextError
from mirror_runtime.pairs import PairTokenizer, longest_first
from mirror_runtime.tokenizer import LongTexts

QUERY = "how do I delete a folder"
TEXTS = ["remove a directory", "", "a cat sat on the mat", "delete a folder " * 40, "😀 río", "x"]


@pytest.fixture
def reranker(reranker_bundle):
    with Reranker.load(reranker_bundle, engine="fake") as reranker:
        yield reranker


@pytest.mark.parametrize("limit", [16, 17, 64])
def test_pairs_have_the_tokens_types_and_cut_of_transformers(minilm, limit):
    peer = AutoTokenizer.from_pretrained(minilm)
    pairs = [(a, b) for a in TEXTS for b in (QUERY, *TEXTS)]
    found = PairTokenizer(minilm / "tokenizer.json", limit, LongTexts.TRUNCATE)(pairs)
    assert found.first_lengths is not None
    starts = np.cumsum(found.lengths) - found.lengths
    for (query, text), piece, tokens, cut in zip(pairs, found.part_piece, found.tokens, found.truncated, strict=True):
        expected = peer([query], [text], truncation=True, max_length=limit)  # one "" beside a text would be left out
        assert found.ids[starts[piece] :][: found.lengths[piece]].tolist() == expected["input_ids"][0]
        assert found.first_lengths[piece] == expected["token_type_ids"][0].count(0)
        assert tokens == len(peer([query], [text])["input_ids"][0])
        assert cut == (tokens > limit)


def test_long_pairs_are_cut_as_the_library_cuts_them(minilm):
    library = Library.from_file(str(minilm / "tokenizer.json"))
    library.no_padding()
    for room in (2, 3, 7, 8):
        library.enable_truncation(room, strategy="longest_first")
        for first in range(1, 14):
            for second in range(1, 14):
                types = library.encode("a " * first, "a " * second, add_special_tokens=False).type_ids
                assert longest_first(first, second, room) == (types.count(0), types.count(1)), (first, second, room)


def test_scores_do_not_depend_on_the_row_and_swapping_a_pair_changes_them(reranker):
    together = reranker.scores(QUERY, TEXTS, raw=True)
    alone = np.concatenate([reranker.scores(QUERY, [text], raw=True) for text in TEXTS])
    assert np.array_equal(together, alone)
    assert reranker.encoder.stats.executions < 2 * len(TEXTS)
    many = [(QUERY, f"text {i} " * (i % 9)) for i in range(300)]
    packed = reranker.encoder.encode(many)[:, 0]
    assert np.array_equal(
        packed[::37], np.concatenate([reranker.scores(*p, raw=True) for p in ((q, [t]) for q, t in many[::37])])
    )
    assert reranker.scores("a", ["b"], raw=True) != reranker.scores("b", ["a"], raw=True)


def test_ranks_are_those_of_the_raw_scores(reranker):
    raw = reranker.scores(QUERY, TEXTS, raw=True)
    best = reranker.rank(QUERY, iter(TEXTS), top_n=3)
    assert [one.index for one in best] == np.argsort(-raw, kind="stable")[:3].tolist()
    at = best[0].index
    assert best[0].score == pytest.approx(1 / (1 + np.exp(-float(raw[at]))))
    assert reranker.rank(QUERY, TEXTS, raw=True)[0].score == raw[at]
    assert reranker.rank(QUERY, []) == []
    for count in (0, 1.5, "3"):
        with pytest.raises(InputError, match=f"top_n is {count}: it must be a whole number"):
            reranker.rank(QUERY, TEXTS, top_n=count)
    with pytest.raises(InputError, match="pass a list"):
        reranker.scores(QUERY, "text")


def test_a_bad_pair_harms_no_other_and_a_long_one_is_told_no_cure_that_there_is_not(reranker, caplog):
    assert reranker.encoder.encode_detailed([(QUERY, "long " * 90)]).truncated.all()
    assert "1 of 1 texts are longer than 64 tokens and were truncated" in caplog.text
    items: list[object] = [(QUERY, "a"), "text", (QUERY, 3), ("\ud800", "a"), (QUERY, "b", "c"), (QUERY, "b")]
    result = reranker.encoder.encode_detailed(items)
    assert {at: error.reason[:22] for at, error in result.errors.items()} == {
        1: "is str, not a pair: a ",
        2: "is int, not str: decod",
        3: "contains a lone surrog",
        4: "is tuple, not a pair: ",
    }
    assert np.array_equal(result.vectors[[0, 5], 0], reranker.scores(QUERY, ["a", "b"], raw=True))
    assert "chunk" not in caplog.text
    with pytest.raises(TextError, match="text 1: is NoneType"):
        reranker.scores(QUERY, ["a", None])

    async def shared() -> None:
        async with AsyncEncoder(reranker.encoder) as encoder:
            found = await asyncio.gather(*(encoder.encode_detailed(items) for _ in range(2)))
        assert found[0].errors.keys() == result.errors.keys()
        assert np.array_equal(found[1].vectors, result.vectors)

    asyncio.run(shared())


def test_policies_and_kinds_that_cannot_be_are_named(reranker_bundle, gateway_bundle):
    with Reranker.load(reranker_bundle, engine="fake", long_texts="error") as strict:
        result = strict.encoder.encode_detailed([(QUERY, text) for text in TEXTS])
    assert list(result.errors) == [3]
    assert "tokens with its query, more than the reranker's 64" in str(result.errors[3])
    with pytest.raises(InputError, match="no vectors of chunks"):
        Reranker.load(reranker_bundle, engine="fake", long_texts="chunk")
    with pytest.raises(BundleError, match="is an encoder"):
        Reranker.load(gateway_bundle, engine="fake")
    with Encoder.load(gateway_bundle, engine="fake") as encoder, pytest.raises(TextError, match="is tuple, not str"):
        encoder.encode([("a", "b")])
