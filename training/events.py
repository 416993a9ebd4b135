"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirror_runtime.extras import require
from training.checkpoint import Step

FLUSH_SECONDS = 5
"""So that a run can be watched; the library's own default is two minutes."""


class Events:
    """An open event file.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def step(self, step: Step) -> None:
        """Note loss, tokens and speed of a step."""
        self._writer.add_scalar("loss", step.loss, step.step)
        self._writer.add_scalar("tokens", step.tokens, step.step)
        self._writer.add_scalar("seconds", step.seconds, step.step)

    def figure(self, name: str, value: float, step: int) -> None:
        """Note one figure at a step."""
        self._writer.add_scalar(name, value, step)


@contextmanager
def open_events(folder: Path) -> Iterator[Events]:
    """Give a new event file in a folder, complete when the block ends.

    Raises:
        MissingExtra: tensorboard is not installed.
    """
    require("tensorboard", "train")  # torch's own message would not say what to install
    writer = require("torch.utils.tensorboard", "train").SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
    try:
        yield Events(writer)
    finally:
        writer.close()
