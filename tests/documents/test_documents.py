"""The documents name what exists, and print what works."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LIFE = ROOT / "docs/concepts/life-of-a-text.md"
PATH = re.compile(r"`([\w./-]+/[\w./-]*)(?::([\w.]+))?`")
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def defined(file: Path) -> set[str]:
    """Every function, class and `Class.method` that a file defines, and the names it assigns or imports at its top."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, functions)}
    return names


@pytest.mark.parametrize(("path", "name"), sorted(set(PATH.findall(LIFE.read_text(encoding="utf-8")))))
def test_the_life_of_a_text_names_files_and_functions_that_exist(path: str, name: str) -> None:
    assert (ROOT / path).exists(), f"{LIFE.name} names {path}, which does not exist"
    if name:
        assert name in defined(ROOT / path), f"{LIFE.name} names {name}, which {path} does not define"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_scripts_named_in_commands_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

    for script in re.findall(r"python ((?:training|export|benchmarks|examples|demo)/\w+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


def test_there_are_at_most_ten_decisions_and_each_is_listed() -> None:
    pages = sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert len(pages) <= 10
    for listing in (ROOT / "docs/decisions/index.md", ROOT / "mkdocs.yml"):
        assert all(page in listing.read_text(encoding="utf-8") for page in pages)
