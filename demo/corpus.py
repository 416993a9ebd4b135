"""The demo's corpus: what the standard library says about its own functions, and questions to ask of it."""

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
"""In plain words: none of them uses the words of the docstring that answers it."""

_SHORTEST = 20  # characters: "Return self." and its like answer nothing


def functions() -> dict[str, str]:
    """Map first sentences of the library's docstrings to what they describe; where several share one, to the first."""
    found: dict[str, str] = {}
    for item in standard_library():
        if len(item.summary) >= _SHORTEST:
            found.setdefault(item.summary, item.name)
    return found
