"""Share the cores of a machine among the instances of a model, each of which is a process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from mirror_runtime.errors import InputError


def core_share(cores: Sequence[int], number: int, count: int) -> list[int]:
    """Return one instance's cores (`number` counts from 0): neighbours, so that its threads share caches."""
    if len(cores) < count:
        raise InputError(f"{count} instances on {len(cores)} cores would slow each other down: use {len(cores)}")
    return list(cores[len(cores) * number // count : len(cores) * (number + 1) // count])


def bind_to_share(instance: str, count: int) -> None:
    """Bind this process to its share of the cores. Engines then start as many threads as it has cores.

    `instance` is Triton's name for this instance, such as `embed_0_1`: its group and its number.
    """
    if count == 1:
        return
    found = re.search(r"_(\d+)$", instance)
    number = int(found[1]) if found else 0
    os.sched_setaffinity(0, core_share(sorted(os.sched_getaffinity(0)), number, count))
