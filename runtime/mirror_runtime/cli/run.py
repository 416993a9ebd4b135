"""How every command of the project runs: one-line errors, exit statuses, list options, and printed results."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console

from mirror_runtime.errors import MirrorError
from mirror_runtime.folders import os_error_message

APPEARANCE: Mapping[str, Any] = MappingProxyType(
    {
        "pretty_exceptions_enable": False,
        "rich_markup_mode": "markdown",  # joins the lines of a paragraph; other modes keep the source's line ends
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
)
"""Arguments of every typer application of the project."""


def run_command(
    app: typer.Typer,
    argv: Sequence[str] | None,
    name: str,
    *,
    lists: Mapping[str, Collection[str] | None] | None = None,
) -> int:
    """Run a typer application and return its exit status.

    `lists` names options that take several values at once (`--precision fp32 bf16`), each with its possible values;
    None for any value, such as a file name.

    Returns:
        0 on success, the status that the command chose, 2 on a mistake of the caller's (the message goes to standard
        error, without a traceback), 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=repeat_list_options(arguments, lists or {}), prog_name=name)
    except SystemExit as done:  # typer ends this way, also after --help and usage errors
        return done.code if isinstance(done.code, int) else 0
    except MirrorError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {os_error_message(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def repeat_list_options(argv: Sequence[str], lists: Mapping[str, Collection[str] | None]) -> list[str]:
    """Repeat a list option before each of its values, which is the form that typer parses.

    A value that is not possible for the option ends the list, so that an argument after the list stays an argument.
    Where any value is possible, the next option ends it. Possible values are compared without case.
    """
    result: list[str] = []
    option = ""
    for argument in argv:
        if argument.startswith("-"):
            option = argument if argument in lists else ""
        elif option and result[-1] != option:
            possible = lists[option]
            if possible is None or argument.lower() in map(str.lower, possible):
                result.append(option)
            else:
                option = ""
        result.append(argument)
    return result


@contextmanager
def truncations_counted_elsewhere() -> Iterator[None]:
    """Silence the encoder's warning about truncated texts, for commands that report their number themselves."""
    log = logging.getLogger("mirror_runtime.encoder")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def application(function: typer.models.CommandFunctionType) -> typer.Typer:
    """Build an application of one command, with plain tracebacks."""
    app = typer.Typer(add_completion=False, **APPEARANCE)
    app.command()(function)
    return app


def print_json(value: object) -> None:
    """Print a command's result as the last line of standard output."""
    sys.stdout.write(json.dumps(value) + "\n")


def timestamped_lines(console: Console) -> Callable[[str], None]:
    """Return a callback that prints progress lines, each with the time of day in front."""
    return lambda line: console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)
