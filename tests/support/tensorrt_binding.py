"""A stand-in for TensorRT that is checked against the real Python bindings, on a machine without a GPU.

The wheel `tensorrt-cu13-bindings` holds NVIDIA's Python module without the libraries behind it. Three empty shared
libraries make it importable: nothing in it runs, but its classes, members and signatures can be read. The stand-in is
built from them. It raises AttributeError for members that they lack and TypeError for arguments that they reject.
"""

import enum
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.stopwatch import shared_work

VERSIONS = ("10.16.1.11", "11.4.0.106")
"""Installed by `make test`: the newest release of each major version that the project supports."""

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    *(f"create{name}_INTERNAL" for name in ("InferBuilder", "InferRefitter", "InferRuntime")),
    *(f"create{name}_INTERNAL" for name in ("NvOnnxParser", "NvOnnxParserRefitter")),
    *("getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
"""Symbols that the extension module of the binding imports (`nm -D --undefined-only`)."""

DUMP = Path(__file__).with_name("dump_tensorrt.py")


@cache
def binding(version: str) -> Mapping[str, Any]:
    """Read the real binding in a separate process; skip the test where it is not installed."""
    wheel = Path(sys.prefix) / f"tensorrt-{version}"
    compiler = shutil.which("cc")
    if not (wheel / "tensorrt_bindings").is_dir():
        pytest.skip(f"{wheel} is absent: `make test` installs the TensorRT binding there (Linux, Python wheels only)")
    if compiler is None:
        pytest.skip("building the stand-in libraries needs a C compiler (cc)")
    major = version.split(".")[0]
    source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    with shared_work(), TemporaryDirectory() as stubs:
        for library in LIBRARIES:
            target = f"lib{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{target}", "-o", f"{stubs}/{target}"]
            subprocess.run(command, input=source, text=True, check=True)
        environment = {**os.environ, "PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": stubs}
        dump = [sys.executable, str(DUMP)]
        done = subprocess.run(dump, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    spec: Mapping[str, Any] = json.loads(done.stdout)
    assert spec["version"] == version
    return spec


def parameters(member: str, doc: str) -> list[list[tuple[str, str, bool]]]:
    """Parse a pybind11 docstring into the name, type and optionality of each parameter, by overload."""
    overloads = []
    for text in re.findall(rf"^(?:\d+\. )?{re.escape(member)}\((.*)\) ->", doc, re.MULTILINE):
        found = []
        for part in _split(text):
            name, _, rest = part.partition(":")
            kind, has_default, _ = rest.partition("=")
            found.append((name.strip().lstrip("*"), kind.strip(), bool(has_default) or name.startswith("*")))
        overloads.append(found[1:] if found and found[0][0] in ("self", "arg0") else found)
    return overloads


def returned(doc: str) -> str:
    """Return the last name of the return type in a docstring."""
    found = re.search(r"-> ([^\n]*)", doc)
    name = re.split(r"[.:]", found.group(1).strip().split("[")[0])[-1] if found else "None"
    return {"IParserError": "ParserError"}.get(name, name)  # the one class whose C++ name is in the docstrings


def _split(text: str) -> list[str]:
    """Split parameters at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += character in "([<{"
        depth -= character in ")]>}"
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


class StandIn:
    """An object with exactly the members of one class of the binding. It records every call."""

    def __init__(self, module: "FakeTensorRT", kind: str) -> None:
        self.__dict__.update(_module=module, _kind=kind, _values={})

    def __getattr__(self, name: str) -> Any:
        module, kind = self.__dict__["_module"], self.__dict__["_kind"]
        member = module.spec["classes"][kind]["members"].get(name)
        if member is None:
            raise AttributeError(f"TensorRT {module.__version__} has no {kind}.{name}")
        if member["kind"] == "constant":
            return member["value"]
        if member["kind"] == "property":
            if name in self._values:
                return self._values[name]
            return module.answer(f"{kind}.{name}", member["doc"], (), {})
        return lambda *args, **kwargs: module.call(f"{kind}.{name}", name, member["doc"], args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        module, kind = self._module, self._kind
        member = module.spec["classes"][kind]["members"].get(name)
        if member is None or member["kind"] != "property" or not member["writable"]:
            raise AttributeError(f"TensorRT {module.__version__} has no writable {kind}.{name}")
        module.calls.append((f"{kind}.{name}=", (value,)))
        self._values[name] = value

    def __index__(self) -> int:
        return id(self)


class FakeTensorRT:
    """The module `tensorrt` of one version, with return values set by the test.

    `answers` holds return values, or functions that compute them, by "Class.member"; `calls` holds every call and
    assignment in order: "Class.member" and its arguments.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.__version__ = spec["version"]
        self.answers: dict[str, Any] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.enums: dict[str, Any] = {name: enum.IntEnum(name, members) for name, members in spec["enums"].items()}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("enums", {}):
            return self.enums[name]
        if name in self.spec["classes"]:
            return _Constructor(self, name)
        if name == "nptype":  # plain Python in the binding's __init__.py
            return self.answers[name]
        raise AttributeError(f"TensorRT {self.__version__} has no {name}")

    def call(self, path: str, name: str, doc: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        overloads = parameters(name, doc)
        assert overloads, f"{path} has no signature to check: {doc[:200]}"
        if not any(self._binds(overload, args, kwargs) for overload in overloads):
            raise TypeError(f"TensorRT {self.__version__}: {path} accepts {overloads}, not {args} {dict(kwargs)}")
        self.calls.append((path, args))
        return self.answer(path, doc, args, kwargs)

    def answer(self, path: str, doc: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if path in self.answers:
            answer = self.answers[path]
            return answer(*args, **kwargs) if callable(answer) else answer
        kind = returned(doc)
        if kind in self.spec["classes"]:
            return StandIn(self, kind)
        assert kind in ("bool", "int", "None", "str"), f"{path} returns {kind}: the test must set an answer"
        return {"bool": True, "int": 0, "None": None, "str": ""}[kind]

    def names(self) -> list[str]:
        """Return the calls without their arguments."""
        return [name for name, _ in self.calls]

    def _binds(self, overload: list[tuple[str, str, bool]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        names = [name for name, _, _ in overload]
        if len(args) > len(overload) or any(name not in names[len(args) :] for name in kwargs):
            return False
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        if any(name not in values and not optional for name, _, optional in overload):
            return False
        return all(self._fits(kind, values[name]) for name, kind, _ in overload if name in values)

    def _fits(self, kind: str, value: Any) -> bool:
        expected = kind.split(".")[-1]
        if isinstance(value, StandIn):
            return expected in self.spec["classes"][value._kind]["bases"] or expected in ("SupportsInt", "object")
        if expected in self.enums:
            return isinstance(value, self.enums[expected])
        if expected == "Dims":
            return isinstance(value, tuple)
        if expected in self.spec["classes"]:
            return False
        if isinstance(value, bool) and expected in ("int", "SupportsInt"):
            return False
        kinds = {"str": str, "SupportsInt": int, "int": int, "bool": bool, "Buffer": (bytes, bytearray, memoryview)}
        return isinstance(value, kinds.get(expected, object))  # type: ignore[arg-type]


class _Constructor:
    """A class of the binding, as an attribute of the module."""

    def __init__(self, module: "FakeTensorRT", kind: str) -> None:
        self._module, self._kind = module, kind

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        doc = self._module.spec["classes"][self._kind]["members"]["__init__"]["doc"]
        self._module.call(f"{self._kind}()", "__init__", doc, args, kwargs)
        return StandIn(self._module, self._kind)

    def __getattr__(self, name: str) -> Any:
        nested = self._module.enums.get(f"{self._kind}.Severity")
        if nested is not None and name in nested.__members__:
            return nested[name]
        if name in self._module.spec["classes"][self._kind]["members"]:
            return name
        raise AttributeError(f"TensorRT {self._module.__version__} has no {self._kind}.{name}")
