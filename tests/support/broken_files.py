"""Broken files: a seeded mutator of file contents, and bounds within which their readers must end."""

from __future__ import annotations

import json
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5, 3 << 30
"""What a reader may take: a sound file of these tests takes milliseconds, and a megabyte."""

_MARK = "a value of the mutator"

_VALUES = (
    *("null", "true", "false", "0", "-1", "7", "2.5", '""', '"abc"', '"../../x"', "[]", "{}", "[null]", '{"a": 1}'),
    *("NaN", "-Infinity", "1e999", "1e308", "-0.0", "1" + "0" * 30, "9" * 400, "9" * 4000, "9" * 5000),
    *(r'"\ud800"', r'"\u0000"', '"' + "x" * 10_000 + '"', r'"a\nb"'),
    *("[" * depth + "]" * depth for depth in (50, 800, 900, 960, 100_000)),
    '{"a":' * 900 + "1" + "}" * 900,
)
"""JSON texts to put in the place of a value."""

_BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\n",
    b"\r\n",
    b"\t",
    b'"',
    b"{",
    b"]",
    b"," * 50,
    b"NaN",
)
"""Bytes to insert."""


def broken(content: bytes, draw: random.Random) -> bytes:
    """Return a file's content with a fault or two: in the values of its JSON where it has some, or in its bytes."""
    for _ in range(draw.choice((1, 1, 1, 2))):
        content = (_broken_json(content, draw) if draw.random() < 0.6 else None) or _broken_bytes(content, draw)
    return content


def _broken_bytes(content: bytes, draw: random.Random) -> bytes:
    size = len(content)
    # Headers and footers matter more than what lies between.
    at = draw.choice((draw.randint(0, size), draw.randint(0, min(size, 64)), size - draw.randint(0, min(size, 64))))
    to = min(size, at + draw.choice((1, 8, 100, size)))
    kind = draw.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[to:]
    if kind == 2:
        return content[:to] + content[at:]
    if kind == 3:
        return content[:at] + bytes(to - at) + content[to:]
    if kind == 4:
        return content[:at] + draw.choice(_BYTES) + content[at:]
    if kind == 5:
        return b"\xef\xbb\xbf" + content
    if at == size:
        return content + bytes([draw.randrange(256)])
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def _broken_json(content: bytes, draw: random.Random) -> bytes | None:
    """Change a value of the JSON, or of one of the lines if these are JSON; None if there is none."""
    for begin, end in ((0, len(content)), _line(content, draw)):
        try:
            value = json.loads(content[begin:end])
        except (ValueError, RecursionError):
            continue
        return content[:begin] + _changed(value, draw).encode("utf-8", "surrogatepass") + content[end:]
    return None


def _line(content: bytes, draw: random.Random) -> tuple[int, int]:
    begin = content.rfind(b"\n", 0, draw.randint(0, len(content))) + 1
    end = content.find(b"\n", begin)
    return begin, len(content) if end < 0 else end


def _changed(value: Any, draw: random.Random) -> str:
    """Return the JSON text of a value, of which one part is replaced, removed, repeated, or has another name."""
    raw = draw.choice(_VALUES)
    parents = [node for node in _nodes(value) if node]
    if not parents:
        return raw
    parent = draw.choice(parents)
    kind = draw.randrange(6)
    key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    if kind == 0:
        del parent[key]
    elif isinstance(parent, dict) and kind == 1:
        parent[draw.choice(("", "typo", key + "s", key.upper()))] = parent.pop(key)
    elif isinstance(parent, dict) and kind == 2:
        parent[_MARK] = json.dumps(parent[key])  # its own name a second time, with another value
        return json.dumps(value).replace(
            json.dumps(_MARK) + ": " + json.dumps(parent[_MARK]), f"{json.dumps(key)}: {raw}"
        )
    elif isinstance(parent, list) and kind == 1:
        parent.insert(key, parent[draw.randrange(len(parent))])
    elif isinstance(parent, list) and kind == 2:
        parent.append(parent.pop(key))
    else:
        parent[key] = _MARK
    return json.dumps(value).replace(json.dumps(_MARK), raw)


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _nodes(part)


class TookTooLong(BaseException):
    """A reader ran into the time limit. Not an Exception: no reader may take it for one of its own."""


@contextmanager
def bounded() -> Iterator[None]:
    """Stop the block after `SECONDS`, and let it take at most `BYTES` more address space."""

    def stop(*_: object) -> None:
        raise TookTooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
