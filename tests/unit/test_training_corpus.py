"""Reading raw text."""

from pathlib import Path

import pytest

from mirror_runtime.errors import InputError
from training.corpus import read_corpus


def test_lines_are_stripped_and_repeats_dropped_in_order(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff second \r\n\n first\nsecond\n  \nfirst\nlast".encode())
    corpus = read_corpus(path)
    assert corpus.texts == ("second", "first", "last")
    assert (corpus.lines, corpus.empty, corpus.duplicates) == (7, 2, 2)
    assert len(corpus.sha256) == 64


def test_a_line_separator_inside_a_line_does_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\u2028still one\ntwo\n", encoding="utf-8")
    assert read_corpus(path).texts == ("one\u2028still one", "two")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\t\n", "is empty"),
        (b"only one line\n", "one distinct line"),
        (b"same\nsame\n same\n", "one distinct line"),
        (b"a\nb\nc\n", "one character only"),
        (b"\x7fELF\x00\x01 junk\n", "NUL bytes"),
        ("one\ntwo\nd\xe9j\xe0\n".encode("latin-1"), "not UTF-8 in line 3"),
        ("one\ntwo\n".encode("utf-16"), "not"),
    ],
)
def test_unusable_text_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_corpus(path)
    assert "text.txt" in str(caught.value)


def test_an_absent_file_and_a_folder_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_corpus(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_corpus(tmp_path)
