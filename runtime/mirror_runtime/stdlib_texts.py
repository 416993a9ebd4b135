"""Real text that every Python installation has: thousands of docstrings of the standard library, in a fixed order.

Parity proofs, benchmark workloads and the demo need ragged natural text on machines without access to a data set.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "pydoc_data"}
)
# C modules behind a public module: their docstrings count as the public module's.
_PUBLIC = {
    "posix": "os",
    "_io": "io",
    "_functools": "functools",
    "_operator": "operator",
    "_collections": "collections",
}
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n\s*\n")
_SIGNATURE = re.compile(r"^\w[\w.]*\(.*?\)\s*(->\s*\S+)?\s*(--|:)?\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Documented:
    """A module, class or function of the standard library."""

    name: str  # dotted, such as "shutil.rmtree"
    text: str  # the whole docstring, without indentation

    @property
    def summary(self) -> str:
        """Return the first sentence on one line, without a leading signature; empty if there is none."""
        return self._parts[0]

    @property
    def body(self) -> str:
        """Return what follows the first sentence, on one line; empty if nothing does."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, str]:
        text = _SIGNATURE.sub("", self.text, count=1).strip()
        end = _SENTENCE_END.search(text + "\n\n")
        cut = end.start() + 1 if end else len(text)
        return " ".join(text[:cut].split()), " ".join(text[cut:].split())


@cache
def standard_library() -> tuple[Documented, ...]:
    """Collect the docstrings of this Python's standard library, which takes a few seconds at the first call.

    Public objects come by file and position, then those of built-in C modules. The same Python has the same ones.
    """
    root = Path(sysconfig.get_path("stdlib"))
    # Python's garbage collector would scan the whole process some hundred times while trees are parsed. With PyTorch
    # imported, that takes more than half of the time. The trees have no cycles, so nothing accumulates.
    enabled = gc.isenabled()
    gc.disable()
    try:
        found = [item for path in sorted(_files(root)) for item in _of_file(path, root)]
    finally:
        if enabled:
            gc.enable()
    for module in sorted(sys.builtin_module_names):
        found.extend(_of_builtin(module))
    return tuple(found)


def _files(root: Path) -> Iterator[Path]:
    """List Python files. Skipped folders are not entered: they may hold thousands of installed files."""
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - _SKIPPED
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _of_file(path: Path, root: Path) -> Iterator[Documented]:
    parts = path.relative_to(root).with_suffix("").parts
    if _SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library has files that are broken on purpose
        return
    yield from _of_node(tree, ".".join(part for part in parts if part != "__init__"))


def _of_node(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Documented]:
    text = ast.get_docstring(node)
    if text:
        yield Documented(name=name, text=text)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield from _of_node(child, f"{name}.{child.name}")


def _of_builtin(module: str) -> Iterator[Documented]:
    public = _PUBLIC.get(module, module)
    if public.startswith("_"):
        return
    members = vars(import_module(module))
    for name in sorted(members):
        if not name.startswith("_") and callable(members[name]) and (text := inspect.getdoc(members[name])):
            yield Documented(name=f"{public}.{name}", text=text)
