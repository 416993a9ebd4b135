"""How every command of the project runs: errors as one line, lists after an option, exit statuses."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import typer

from mirror_runtime.errors import MirrorError


def run_command(
    app: typer.Typer,
    argv: Sequence[str] | None,
    name: str,
    *,
    lists: Mapping[str, Collection[str] | None] | None = None,
) -> int:
    """Run a typer application to its exit status.

    Args:
        app: the application.
        argv: arguments without the program's name; None takes the process's.
        name: the program's name in messages.
        lists: options that take several values at once (`--precision fp32 bf16`), each with the values it knows;
            None knows every value, such as file names.

    Returns:
        0 on success, the status that the command chose, 2 on a mistake of the caller's (the message goes to standard
        error, without a traceback), 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=spread(arguments, lists or {}), prog_name=name)
    except SystemExit as done:  # how typer returns, --help and usage errors included
        return done.code if isinstance(done.code, int) else 0
    except MirrorError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def spread(argv: Sequence[str], lists: Mapping[str, Collection[str] | None]) -> list[str]:
    """Repeat a list option before each of its values, which is the form that typer knows.

    A value that the list does not know ends it, so that an argument after the list stays an argument. A list of None
    knows every value (file names): the next option ends it. Upper and lower case are the option's own affair.
    """
    result: list[str] = []
    option = ""
    for argument in argv:
        if argument.startswith("-"):
            option = argument if argument in lists else ""
        elif option and result[-1] != option:
            known = lists[option]
            if known is None or argument.lower() in map(str.lower, known):
                result.append(option)
            else:
                option = ""
        result.append(argument)
    return result


@contextmanager
def truncations_counted_elsewhere() -> Iterator[None]:
    """Silence the encoder's warning about truncated texts in each window, for commands that report them themselves."""
    log = logging.getLogger("mirror_runtime.encoder")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def application(function: typer.models.CommandFunctionType) -> typer.Typer:
    """Make an application of one command, with tracebacks left plain."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app
