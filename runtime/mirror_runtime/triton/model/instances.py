"""Several instances of a model on one machine: each is a process, and each takes its own share of the cores."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from mirror_runtime.errors import InputError


def share(cores: Sequence[int], number: int, count: int) -> list[int]:
    """Give one instance's cores: neighbours, so that threads of an instance share caches.

    Args:
        cores: those of the machine that may be used, ascending.
        number: the instance's, from 0.
        count: of instances.

    Raises:
        InputError: there are fewer cores than instances.
    """
    if len(cores) < count:
        raise InputError(f"{count} instances on {len(cores)} cores would take each other's time: have {len(cores)}")
    return list(cores[len(cores) * number // count : len(cores) * (number + 1) // count])


def take_share(instance: str, count: int) -> None:
    """Bind this process to its share. Engines then make as many threads as that allows.

    Args:
        instance: Triton's name for this instance, such as `embed_0_1`: its group and its number.
        count: of instances; 1 leaves the process as it is.

    Raises:
        InputError: there are fewer cores than instances.
    """
    if count == 1:
        return
    found = re.search(r"_(\d+)$", instance)
    number = int(found[1]) if found else 0
    os.sched_setaffinity(0, share(sorted(os.sched_getaffinity(0)), number, count))
