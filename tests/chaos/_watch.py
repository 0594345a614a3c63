"""Looking at processes from outside: their memory, their children, whether they are busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["memory_peak_mb", "resident_mb"]


def resident_mb(key: str = "VmRSS", pid: int | str = "self") -> float:
    """Resident memory now, or (``VmHWM``) at its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


@contextmanager
def memory_peak_mb() -> Iterator[Callable[[], float]]:
    """Hands out a call that tells by how much this process grew within the block, at its peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("no /proc/self/clear_refs: the peak of a block cannot be told here")
    before = resident_mb()
    found: list[float] = []
    yield lambda: found[0]
    found.append(resident_mb("VmHWM") - before)
