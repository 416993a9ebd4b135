"""The state of a run in one file, from which a killed run resumes exactly.

A safetensors file holds the tensors, and its header the rest as JSON: one file, so it is whole or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mirror_runtime.errors import InputError
from mirror_runtime.folders import replace_file

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one step."""

    step: int  # 1-based
    loss: float  # before the step's update
    tokens: int  # of all views and processes, without padding
    seconds: float  # since the start of the first step, without the work of a killed run after its last checkpoint


@dataclass(frozen=True, kw_only=True)
class State:
    """A run between two steps."""

    tensors: Mapping[str, torch.Tensor]  # of model, optimiser and random generators, by name
    steps: tuple[Step, ...]  # finished so far


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run's state file and how often to write it. If a run has several hosts, all must see the file."""

    path: Path  # the file; its folder must exist. Remove it when the run folder is complete.
    every: int  # steps from one write to the next

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"--checkpoint-every is {self.every}: it must be at least 1")

    def save(self, state: State, identity: Mapping[str, Any]) -> None:
        """Write the state, replacing an earlier one; `identity` is everything that determines the run, as JSON values.

        Raises:
            InputError: the file cannot be written; an earlier one stays.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "identity": dict(identity),
            "steps": [dataclasses.asdict(step) for step in state.steps],
        }
        text = json.dumps(header)
        metadata = {"mirror": text, "checksum": str(_checksum(text, state.tensors))}
        with replace_file(self.path) as beside:
            save_file(dict(state.tensors), beside, metadata=metadata)

    def load(self, identity: Mapping[str, Any]) -> State | None:
        """Read the state; None if the file does not exist.

        Raises:
            InputError: the file cannot be read, or is from a run with another `identity`.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                text, whole = metadata["mirror"], metadata.get("checksum")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{self.path} cannot be read as a checkpoint ({error}): remove it") from error
        if whole is None:
            raise InputError(f"{self.path} is from another version of this program: remove it to start afresh")
        if whole != str(_checksum(text, tensors)):
            raise InputError(f"{self.path} is damaged: remove it to start afresh")
        header = json.loads(text)
        if header["format_version"] != FORMAT_VERSION:
            raise InputError(f"{self.path} is from another version of this program: remove it to start afresh")
        then, now = header["identity"], json.loads(json.dumps(dict(identity)))
        other = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if other:
            differences = "; ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in other)
            raise InputError(
                f"{self.path} is the checkpoint of another run ({differences}): finish that run first, "
                "or remove the file to start afresh"
            )
        return State(tensors=tensors, steps=tuple(Step(**step) for step in header["steps"]))


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the CRC-32 of a header and of the tensors, their names and types."""
    total = crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        total = crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def fingerprint(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of a list of parts and their lengths, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
