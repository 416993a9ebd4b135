"""Documents: how files are split into titles and texts, and the views of one document."""

import gzip
import json
import random
from pathlib import Path

import pytest

from mirror_runtime.errors import InputError
from training.augment import Document
from training.corpus import CorpusRequest, read_corpus
from training.documents import VIEWS, Documents, View, as_document, draw_views, split_sentences
from training.own import read_own

DOCUMENT = Document("A title", "The cat sat on the mat. A man is playing the guitar! Who was by the river today? So.")
SENTENCES = ["The cat sat on the mat.", "A man is playing the guitar!", "Who was by the river today? So."]

MARKDOWN = """Words before any heading are here.
They have a second sentence as well.

# First *heading* #
A text under it,
on two lines.
```
# not a heading
```

    # not one either
## Empty
## Second
too short
## Third
A text of four words.
"""


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("", "猫坐在垫子上。狗在河边跑！", ("猫坐在垫子上。", "狗在河边跑！")),
        ("猫", "狗在河边跑", ("猫", "狗在河边跑")),
        ("猫", "狗", ("", "")),
        ("a", "one two three four", ("a", "one two three four")),
        ("", "One sentence here. And another one here.", ("One sentence here.", "And another one here.")),
        ("a", "too short a", ("", "")),
        ("", "Only one sentence is here", ("", "")),
        ("a", "", ("", "")),
        ("", "", ("", "")),
    ],
)
def test_a_document_has_two_parts_or_is_empty(title: str, text: str, expected: tuple[str, str]) -> None:
    assert as_document(title, text) == expected


def test_short_sentences_join_the_one_before() -> None:
    assert split_sentences(DOCUMENT.text) == SENTENCES


def documents(path: Path, content: str | bytes) -> list[tuple[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [one for one in Documents(str(path)) if all(one)]


def test_each_format_has_its_documents(tmp_path: Path) -> None:
    sections = [
        ("Words before any heading are here.", "They have a second sentence as well."),
        ("First *heading*", "A text under it, on two lines. # not one either"),
        ("Third", "A text of four words."),
    ]
    assert documents(tmp_path / "x.md", MARKDOWN) == sections
    blocks = "One sentence here.\nAnd another\none here.\n\n\nOne alone\n \nTwo is a first. Then a last one is.\n"
    expected = [("One sentence here.", "And another one here."), ("Two is a first.", "Then a last one is.")]
    assert documents(tmp_path / "x.txt.gz", gzip.compress(blocks.encode())) == expected
    rows = [
        {"title": "t", "text": "a text of five words"},
        {"title": None, "text": blocks[:42]},
        {"title": "t", "text": ""},
    ]
    lines = "\n".join(map(json.dumps, rows))
    assert documents(tmp_path / "x.jsonl", lines) == [
        ("t", "a text of five words"),
        (expected[0][0], "And another\none here."),
    ]
    assert list(Documents(str(tmp_path / "x.jsonl"), columns=("text",))) == [
        ("", ""),
        (expected[0][0], "And another\none here."),
        ("", ""),
    ]
    table = tmp_path / "x.tsv"
    assert documents(table, "title\ttext\nt\ta text of five words\n") == [("t", "a text of five words")]
    table.unlink()
    (tmp_path / "inner" / "folder.md").mkdir(parents=True)
    (tmp_path / "inner" / ".hidden").mkdir()
    (tmp_path / "inner" / ".hidden" / "a.md").write_text("# Hidden\nthere is a text")
    (tmp_path / "inner" / "a.md").write_text("# In a folder\nthere is a text")
    assert set(Documents(str(tmp_path))) == {("", ""), *sections, *expected, ("In a folder", "there is a text")}
    assert read_own([str(tmp_path / "inner")]) == [("In a folder", "there is a text")]
    assert list(Documents(str(tmp_path / "inner" / "*.md"))) == [("In a folder", "there is a text")]
    zipped = tmp_path / "inner" / "a.md.gz"
    zipped.write_bytes(gzip.compress(MARKDOWN.encode()))
    assert [one for one in Documents(str(zipped)) if all(one)] == sections
    assert read_own([str(zipped)])[0] == sections[0]


def test_what_is_not_a_document_is_counted_and_nothing_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text(f"{MARKDOWN}\n## Third\nA text of four words.")
    corpus = read_corpus(CorpusRequest(files=(str(path),), documents=True))
    assert [type(one) for one in corpus.examples] == [Document] * 3
    assert (corpus.counts["empty"], corpus.counts["duplicates"]) == (1, 1)
    assert (corpus.unit, corpus.has_documents, corpus.has_pairs) == ("document", True, False)
    (tmp_path / "empty").mkdir()
    path.write_text("# A heading\n")
    for file, pairs, message in (
        (path, False, "has no document with a title and a text"),
        (tmp_path / "empty", False, "no .md, .rst, .txt, file is there"),
        (path, True, "pass one of them"),
    ):
        with pytest.raises(InputError, match=message):
            read_corpus(CorpusRequest(files=(str(file),), documents=True, pairs=pairs))


@pytest.mark.parametrize("view", View)
def test_views_are_parts_of_the_document_and_the_seed_draws_them(view: View) -> None:
    drawn, again = ([draw_views(DOCUMENT, (view,), random.Random(seed)) for seed in range(30)] for _ in range(2))
    assert drawn == again
    whole = set(f"{DOCUMENT.title} {DOCUMENT.text}".split())
    assert all(set(part.split()) <= whole and len(part.split()) >= 2 for pair in drawn for part in pair)
    assert len(set(drawn)) == 1 if view in (View.TITLE, View.SAME) else len(set(drawn)) > 2


def test_each_view_is_what_it_says() -> None:
    rng = random.Random(1)
    assert VIEWS[View.TITLE](DOCUMENT, rng) == tuple(DOCUMENT)
    for _ in range(20):
        sentence, rest = VIEWS[View.CLOZE](DOCUMENT, rng)
        kept = [DOCUMENT.title, *(one for one in SENTENCES if one != sentence)]
        assert sentence in SENTENCES
        assert rest in (" ".join(kept), f"{DOCUMENT.title} {DOCUMENT.text}")
        first, second = VIEWS[View.NEIGHBOUR](DOCUMENT, rng)
        assert f"{first} {second}" in f"{DOCUMENT.title} {DOCUMENT.text}"
        assert second in SENTENCES
        for text in VIEWS[View.CROPS](DOCUMENT, rng):
            assert text in DOCUMENT.text
            assert 4 <= len(text.split()) <= 0.6 * 21 + 1
    short, long = zip(*(VIEWS[View.SPANS](DOCUMENT, rng) for _ in range(200)), strict=True)
    assert sum(map(len, short)) * 1.5 < sum(map(len, long))


def test_a_run_of_a_text_without_spaces_is_a_part_of_it() -> None:
    document = Document("猫", "猫坐在垫子上。狗在河边跑！人在弹吉他。")
    for first, second in (VIEWS[View.CROPS](document, random.Random(seed)) for seed in range(20)):
        assert {first, second} <= {document.text[i:j] for i in range(20) for j in range(i, 20)}
        assert 4 <= len(first) <= 0.6 * len(document.text) + 2
    with pytest.raises(InputError, match="--column names 3 columns: with --documents name title and text, or the text"):
        Documents("x.jsonl", columns=("a", "b", "c"))


def test_of_several_views_one_is_drawn() -> None:
    rng = random.Random(2)
    drawn = {draw_views(DOCUMENT, (View.TITLE, View.NEIGHBOUR), rng) for _ in range(50)}
    assert tuple(DOCUMENT) in drawn
    assert (SENTENCES[0], SENTENCES[1]) in drawn
