"""What a subtraction costs by the size of the image, and the memory that it takes above its inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from batchproc.distribute.memory import keep_freed_memory
from tests.benchmarks._fresh import Peak, cpu_and_wall, rfft2_seconds
from tests.benchmarks._pairs import Pair, load_pair
from tests.benchmarks.contenders import FLOOR_TRANSFORMS, subtract_full


def measure(path: str, side: int, *, repeat: int = 3) -> dict[str, Any]:
    """Fewest CPU seconds of several subtractions of ``side``² pixels, MB above the inputs; call it in a fresh process.

    Parameters
    ----------
    path : str
        A pair that is laid side by side until it fills the image: the same sky at every size.
    side : int
        A multiple of the pair's.
    repeat : int
        Warm calls, after one that does not count.
    """
    work, _ = subtract_full(laid_out(load_pair(path), side), hard=False)
    keep_freed_memory()  # as every worker of a run does
    peak = Peak()
    work()
    cpu = min(cpu_and_wall(work)[1] for _ in range(repeat))
    memory = peak.above_start_mb()
    mpix = side**2 / 1e6
    floor = FLOOR_TRANSFORMS * rfft2_seconds() / (2048**2 / 1e6)
    return {
        "side": side,
        "Mpix": mpix,
        "CPU": cpu,
        "CPU per Mpix": cpu / mpix,
        "floors": cpu / mpix / floor,
        "MB": memory,
    }


def laid_out(pair: Pair, side: int) -> Pair:
    """The pair's images side by side until they fill ``side``² pixels; the transients stay those of the first."""
    times = side // pair.new.shape[0]
    images = ("new", "ref", "variance_new", "variance_ref", "mask_new", "mask_ref")
    return replace(pair, **{name: np.tile(getattr(pair, name), (times, times)) for name in images})
