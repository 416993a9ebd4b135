"""The house's rules for every Python file: plain English, and sizes that fit a reader's head."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOMS = ("encoders", "training", "evaluation", "export", "runtime", "benchmarks", "demo", "docs", "examples", "tests")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
FILE_LINES = 500
FUNCTION_LINES = 100

OPENINGS = re.compile(r"(?:gives?|says?|tells?|see that|let)\b(?!')", re.IGNORECASE)
"""Openings that a docstring or message never has: it starts with a verb of the field, in the imperative."""

QUOTED_OPENINGS = re.compile(r"""["'}](?:\s|\\n)*""" + OPENINGS.pattern, re.IGNORECASE)
"""Such openings in a file's source, before it is parsed: parsing all takes seconds."""

PHRASES = re.compile(r"(?<![Tt]here )\bis (?:no (?!longer\b|more\b|less\b|\w+er than\b)[a-z]|none of\b)")
"""Phrases to write as "is not a" and "must be one of"."""

OPTIONS = re.compile(r"typer\.(?:Option|Argument)|Annotated\[")
"""A function whose signature lists the options of a command may be longer: its body may not."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the docstrings of modules, classes, functions and attributes, with their lines."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the string literals, with their lines. A formatted string counts by its literal parts."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def bad_openings() -> list[str]:
    found = []
    for path in (path for path in FILES if QUOTED_OPENINGS.search(path.read_text(encoding="utf-8"))):
        # The texts that tests and the demo encode are literals too, and may begin as they like.
        strings = docstrings(path) if path.is_relative_to(ROOT / "tests") else literals(path)
        found += [f"{place(path, line)}: {text.strip()[:80]}" for line, text in strings if OPENINGS.match(text.strip())]
    return found


def bad_phrases() -> list[str]:
    found = []
    for path in FILES:
        if not PHRASES.search(path.read_text(encoding="utf-8")):
            continue
        for line, text in (*literals(path), *comments(path)):
            if match := PHRASES.search(text):
                found.append(f"{place(path, line)}: …{text[max(0, match.start() - 30) : match.end() + 40]!r}…")
    return found


def long_files() -> list[str]:
    counts = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in FILES)
    return [f"{path.relative_to(ROOT)}: {count} lines" for path, count in counts if count > FILE_LINES]


def long_functions() -> list[str]:
    found = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in functions(path) if len(lines) > FUNCTION_LINES else ():
            assert node.end_lineno is not None
            signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
            start = node.body[0].lineno if OPTIONS.search(signature) else node.lineno
            if node.end_lineno - start + 1 > FUNCTION_LINES:
                found.append(f"{place(path, node.lineno)} {node.name}: {node.end_lineno - start + 1} lines")
    return found


@pytest.mark.parametrize("check", [bad_openings, bad_phrases, long_files, long_functions])
def test_every_python_file_keeps_the_rules(check):
    found = check()
    assert not found, "\n".join(found)
