"""How many threads are worth having: as many as there are processors for this process.

More than those that it has wait for each other awake, and take the time from those that compute.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")
QUOTAS = (
    ("cpu.max",),
    ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ("cpu,cpuacct/cpu.cfs_quota_us", "cpu,cpuacct/cpu.cfs_period_us"),
)
"""A container's own, as Linux's control groups tell it, of version 2 in one file and of version 1 in two:
microseconds of processors' time in each period, which is the second number; ``max`` or -1 without a quota."""


def take_processors(count: int | None) -> None:
    """From now on, this thread computes with so many; None: with the `usable_processors`."""
    torch.set_num_threads(count or usable_processors())
    torch.get_num_threads()  # Until asked for it once, a thread takes over what another one sets for itself.


def usable_processors(groups: Path = CONTROL_GROUPS) -> int:
    """What PyTorch would take, but no more than this process may run on, nor than its quota keeps busy."""
    counts = [torch.get_num_threads()]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    for names in QUOTAS:
        try:
            time, period = map(int, " ".join((groups / name).read_text() for name in names).split())
            if time >= 0:
                counts.append(math.ceil(time / period))
        except (OSError, ValueError, ZeroDivisionError):
            pass  # There is none.
    return max(1, min(counts))
