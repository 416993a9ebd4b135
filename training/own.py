"""A user's own texts: read, and split into those held out from tuning and the rest. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path

from encoders.sentence_transformers import read_json
from evaluation.held_out import first_by_hash, text_hash
from evaluation.probes import MIN_ITEMS, Probe, Record, build_probes
from mirror_runtime.corpus.files import suffix_of
from mirror_runtime.errors import InputError
from training.documents import COLUMNS as DOCUMENT
from training.documents import Documents, as_document
from training.formats import Records, file_names
from training.job import REPORT_FILE

SHARE = 0.05
FEWEST, MOST = 2 * MIN_ITEMS, 400
"""Share of the distinct texts that is held out, and its limits: more would cost time and tell little more."""


def own_probes(paths: Sequence[str], encoders: Sequence[str]) -> list[Probe]:
    """Make the probes of a user's texts: of those that the encoders' runs held out, where their folders say which.

    Raises:
        InputError: a file cannot be read, or the texts allow no probe.
    """
    records = read_own(paths)
    return build_probes(hold_out(records, held_out_hashes(encoders))[0], records)


def held_out_hashes(encoders: Sequence[str]) -> set[str]:
    """Return the hashes of the texts that all encoders' runs held out, of those whose folders say which."""
    reports = [read_json(path, dict) for name in encoders if (path := Path(name).expanduser() / REPORT_FILE).is_file()]
    # The report of a static twin has their number alone.
    found = [set(hashes) for report in reports if isinstance(hashes := report.get("held_out"), list) and hashes]
    return set.intersection(*found) if found else set()


def hold_out(records: Sequence[Record], hashes: Collection[str] = ()) -> tuple[list[Record], list[Record]]:
    """Split records into those held out and the rest, each in its order.

    The held-out ones have the smallest hashes of their (last) text: the same texts give the same split in any order
    and with any seed, with titles or without. Pairs that hold such a text in the other place are in neither part.
    If any text has one of the `hashes`, those of a run, these texts are held out in their place.
    """
    chosen = {record[-1] for record in records if hashes and text_hash(record[-1]) in hashes} or set(choose(records))
    held = [record for record in records if record[-1] in chosen]
    return held, [record for record in records if chosen.isdisjoint(record)]


def choose(records: Sequence[Record], halves: int = 1) -> dict[str, int]:
    """Return the texts to hold out, each with its half."""
    texts = {record[-1] for record in records}
    count = halves * min(MOST, max(FEWEST, round(SHARE * len(texts))))
    return {text: rank % halves for rank, text in enumerate(first_by_hash(texts, count))}


def read_own(paths: Sequence[str]) -> list[Record]:
    """Read a user's distinct texts, all files as one corpus: lines, or two texts a record, the first of which may lack.

    Two texts are those of lines with one TAB each, or the fields title and text, or text1 and text2, in a format with
    columns, or a document of a Markdown file or a folder.

    Raises:
        InputError: a file cannot be read.
    """
    records = (record for name in paths for path in _names(name) for record in _read_file(path))
    return list(dict.fromkeys(tuple(filter(None, record)) for record in records if record[-1]))


def _names(name: str) -> list[str]:
    with contextlib.suppress(InputError):  # it has no Markdown
        if Path(name).is_dir() and file_names(name, (".md",)):
            return [name]
    return file_names(name)


def _read_file(path: str) -> list[Record]:
    if Path(path).is_dir() or suffix_of(Path(path)) == ".md":
        return list(Documents(path))
    lines = Records(path)
    for columns in (DOCUMENT, ()) if lines.has_columns else ((),):
        with contextlib.suppress(InputError):  # it has another layout
            found = list(Records(path, pairs=True, columns=columns))
            if columns == DOCUMENT:
                return [document if all(document := as_document(*one)) else one for one in found]
            return found
    return list(lines)
