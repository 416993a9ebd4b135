"""A corpus: one or more files as one stream of rows, and shards of it."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path

from mirror_runtime.corpus.files import STDIN, SUFFIXES, CorpusFile, Format, Part, Row, suffix_of
from mirror_runtime.errors import EngineError, InputError, NotFiniteError, TextError


class BadTexts(str, Enum):
    """What happens to a row that cannot be encoded."""

    STOP = "stop"
    """The run ends there."""
    ZERO = "zero"
    """It gets a vector of zeros, and is counted."""
    SKIP = "skip"
    """It is left out, and counted. Only for outputs that hold the rows' ids."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A section of a corpus that can be read without the rows before it."""

    number: int
    file: int  # its position in the corpus
    first: int  # see `Part`
    begin: int
    end: int
    rows: int  # number of rows
    size: int  # its part of `Corpus.size`


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files in their order, all of which hold the same columns. The first column is the text."""

    files: tuple[CorpusFile, ...]
    folders: tuple[Path, ...] = ()  # those that were named as a whole

    def check_output(self, output: Path) -> None:
        """Check that an output does not lie in a folder of the input, whose files a later run would read.

        Raises:
            InputError: it does.
        """
        for folder in self.folders:
            if output.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{output} lies in the input folder {folder}: choose another output")

    @property
    def keep(self) -> tuple[str, ...]:
        """The columns that go with the vectors."""
        return self.files[0].keep

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def rows(self, shard: Shard | None = None) -> Iterator[Row]:
        """Stream the rows, or those of a shard. Positions count from the start of the corpus, or of its file."""
        if shard is not None:
            yield from self.files[shard.file].rows(Part(shard.first, shard.begin, shard.end))
            return
        before = 0
        for file in self.files:
            for row in file.rows():
                yield row._replace(position=before + row.position) if before else row
            before += file.size

    def shards(self, rows: int) -> Iterator[Shard]:
        """Cut the corpus into shards of so many rows; a Parquet file into whole row groups of at least as many.

        Raises:
            InputError: a file's format cannot be read in parts.
        """
        number = 0
        for at, file in enumerate(self.files):
            first = lines = count = begin = end = 0
            bytes_per_unit = file.size / max(1, sum(one[2] for one in file.units()))
            for unit in chain(file.units(), [None]):
                if unit is not None:
                    count, lines, end = count + unit[0], lines + unit[1], end + unit[2]
                if count and (unit is None or count >= rows):
                    size = round((end - begin) * bytes_per_unit)
                    yield Shard(number=number, file=at, first=first, begin=begin, end=end, rows=count, size=size)
                    number, first, count, begin = number + 1, lines, 0, end

    def identity(self) -> dict[str, object]:
        """Return what tells this corpus from another, without reading it."""
        return {
            "input": [str(file.path if file.path == STDIN else file.path.resolve()) for file in self.files],
            "input_bytes": [file.size for file in self.files],
            "input_mtime_ns": [0 if file.path == STDIN else file.path.stat().st_mtime_ns for file in self.files],
            "columns": [*self.files[0].columns, *self.keep],
        }


def open_corpus(
    names: Sequence[str | Path], column: str = "text", *, keep: Sequence[str] = (), declared: Format | None = None
) -> Corpus:
    """Open files, folders, patterns such as `parts/*.csv`, or "-" for standard input.

    Args:
        names: what to read, in this order.
        column: the column or field of the text.
        keep: further columns.
        declared: the format of all files; None goes by their names.

    Raises:
        InputError: one does not exist, or holds no file that can be read.
    """
    options = {"columns": (column,), "keep": tuple(keep), "declared": declared}
    files = tuple(CorpusFile(path=path, **options) for path in find_files(names))  # type: ignore[arg-type]
    return Corpus(files=files, folders=tuple(path for path in map(Path, names) if path.is_dir()))


def find_files(names: Sequence[str | Path], only: Sequence[str] = ()) -> list[Path]:
    """Return the files that paths, folders and patterns name, each folder's and pattern's in the order of their names.

    Of a folder, those whose names begin with a dot or an underscore, unfinished `.partial` ones, and those with other
    endings than `only`, if it has any (see `suffix_of`), are left out.

    Raises:
        InputError: see `open_corpus`.
    """
    return [path for name in names for path in _find(Path(name), only)]


def _find(path: Path, only: Sequence[str]) -> list[Path]:
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        found = [file for file in found if not only or suffix_of(file) in only]
        if foreign := [file for file in found if suffix_of(file) not in (only or SUFFIXES)]:
            raise InputError(
                f"{foreign[0]} is not a corpus file ({', '.join(SUFFIXES)}; all but the last with .gz or .zst): name "
                f"the files with a pattern, such as '{path}/*.csv'"
            )
    elif path == STDIN or path.is_file() or not glob.has_magic(str(path)):
        found = [path]
        if path != STDIN and not path.exists():
            raise InputError(f"{path} cannot be read: No such file or directory")
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not found:
        raise InputError(f"{path}: no {', '.join([*only, 'file'])} is there")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) or part.endswith(".partial") for part in path.parts)


def check_errors(rows: Sequence[Row], errors: Mapping[int, TextError], bad_texts: BadTexts) -> None:
    """Raise for the first of a window's errors.

    An `InputError` where bad texts stop the run, and always an `EngineError` where the engine is to blame.
    """
    for at, error in sorted(errors.items()):
        where = rows[at].where
        if isinstance(error, NotFiniteError):
            raise EngineError(f"{where} {error.reason}")
        if bad_texts is BadTexts.STOP:
            raise InputError(
                f"{where}: {error.reason}. Fix it, or write zero vectors for such rows with --bad-texts zero, or leave "
                "them out with --bad-texts skip"
            )
