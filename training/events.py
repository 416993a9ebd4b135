"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirror_runtime.extras import require
from training.checkpoint import Step

FLUSH_SECONDS = 5
"""Short enough to watch a run; the library's default is two minutes."""


class Events:
    """An open event file.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def step(self, step: Step) -> None:
        """Record loss, tokens and seconds of a step."""
        for name in ("loss", "tokens", "seconds"):
            self.value(name, getattr(step, name), step.step)

    def value(self, name: str, value: float, step: int) -> None:
        """Record one value at a step."""
        self._writer.add_scalar(name, value, step)


@contextmanager
def open_events(folder: Path) -> Iterator[Events]:
    """Open a new event file in a folder, and complete it when the block ends.

    Raises:
        MissingExtra: tensorboard is not installed.
    """
    require("tensorboard", "train")  # torch's own message does not name the extra to install
    writer = require("torch.utils.tensorboard", "train").SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
    try:
        yield Events(writer)
    finally:
        writer.close()
