"""JSON to frozen dataclasses and back, strictly: a missing key, an unknown key or a value of a wrong type is an error.

Nothing has a default in a file, so that a file of another version is refused instead of half understood. The exception
are fields that are marked `ADDED`: a file has them only where they say something.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from mirror_runtime.errors import BundleError

T = TypeVar("T")

ADDED: Mapping[str, bool] = types.MappingProxyType({"added": True})
"""Metadata of a field that is left out of a file where it has its default, so that older files stay valid."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def to_json(value: Any) -> Any:
    """Convert dataclasses, enums, tuples and mappings to what `json.dumps` takes."""
    if dataclasses.is_dataclass(value):
        stated = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        unsaid = {f.name for f in _added(type(value)) if stated[f.name] == f.default}
        return {name: to_json(item) for name, item in stated.items() if name not in unsaid}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Any, where: str) -> T:
    """Build a dataclass from parsed JSON, strictly; `where` names the file in messages."""
    return typing.cast(T, _value(kind, data, where))


def read_json(kind: type[T], path: Path, absent: str) -> T:
    """Read a dataclass from a JSON file, strictly; `absent` begins the message where there is no file."""
    return from_json(kind, read_object(path, absent), str(path))


def read_object(path: Path, absent: str) -> dict[str, Any]:
    """Parse a JSON file that holds an object, see `read_json`."""
    try:
        data = load_json(path)
    except BundleError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise BundleError(f"{absent}: {path} does not exist") from error
        raise
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds {type(data).__name__} where a JSON object is expected")
    return data


def short(value: object) -> str:
    """Return the `repr` of a file's value for a message: not as long and as deep as a file may make it."""
    return _repr.repr(value)


def load_json(path: Path) -> Any:
    """Parse a JSON file, whatever it holds.

    Raises:
        BundleError: it cannot be read, or is not JSON, see `parse_json`.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} cannot be read: {error.reason} at byte {error.start}, expected UTF-8") from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_json(text: str) -> Any:
    """Parse JSON. Whatever is wrong with it is a ValueError: also NaN, infinity, and nesting without end."""
    try:
        return json.loads(text, parse_constant=_number, parse_float=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(value: Any, path: Path) -> None:
    """Write a dataclass as indented JSON with a final newline."""
    path.write_text(json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def _value(kind: Any, data: Any, where: str) -> Any:
    """Convert `data` to the annotated type `kind`; `where` names the place for messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind), data, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        known = [member.value for member in kind]
        if data not in known:
            raise BundleError(f"{where} is {short(data)}; known are {', '.join(map(str, known))}")
        return kind(data)
    if origin is tuple and isinstance(data, list):
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(data, dict):
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if origin in (types.UnionType, typing.Union):
        plain = next((arg for arg in args if _is_plain(data, arg)), None)
        if plain is not None:
            return _plain(plain, data, where)
        objects = [arg for arg in args if dataclasses.is_dataclass(arg)]
        if len(objects) == 1:
            return _object(typing.cast(type, objects[0]), data, where)
    elif _is_plain(data, kind):
        return _plain(kind, data, where)
    raise BundleError(f"{where} is {short(data)}; expected {getattr(kind, '__name__', kind)}")


def _plain(kind: Any, data: Any, where: str) -> Any:
    try:
        return float(data) if kind is float else data
    except OverflowError:
        raise BundleError(f"{where} is {short(data)}, too large a number") from None


def _object(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise BundleError(f"{where} is {short(data)}; expected an object")
    hints = typing.get_type_hints(kind)
    optional = {f.name for f in _added(kind)}
    differ = {"missing": hints.keys() - data.keys() - optional, "unknown": data.keys() - hints.keys()}
    if any(differ.values()):
        named = "; ".join(f"{what} {', '.join(sorted(keys))[:200]}" for what, keys in differ.items() if keys)
        raise BundleError(f"{where}: {named}")
    values = {name: _value(hint, data[name], f"{where}: {name}") for name, hint in hints.items() if name in data}
    try:
        return kind(**values)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from error


def _added(kind: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if f.metadata.get("added")]


def _is_plain(data: Any, kind: Any) -> bool:
    if kind is type(None):
        return data is None
    if isinstance(data, bool):
        return kind is bool
    if kind is float:
        return isinstance(data, (int, float))
    return kind in (str, int) and isinstance(data, kind)
