"""The demo's corpus, which is the docstrings of the standard library, and questions about it."""

from __future__ import annotations

from mirror_runtime.stdlib_texts import standard_library

QUESTIONS = (
    "delete a folder and everything in it",
    "which day of the week was it?",
    "make a random password that nobody can guess",
    "wait until another thread has finished",
    "how much room is left on the disk?",
    "find out what two texts have in common",
)
"""None of them uses the words of the docstring that answers it."""

_SHORTEST = 20  # characters; "Return self." and the like answer no question


def functions() -> dict[str, str]:
    """Return the first function of the standard library for each first sentence of a docstring."""
    found: dict[str, str] = {}
    for item in standard_library():
        if len(item.summary) >= _SHORTEST:
            found.setdefault(item.summary, item.name)
    return found
