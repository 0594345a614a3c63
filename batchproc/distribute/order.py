"""In which order images go out, and how many together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from batchproc.records import ManifestEntry

__all__ = ["Pace", "images_a_task", "longest_first"]

_LOOK_AHEAD = 500
_DIFFER = 1.2  # a ratio of sizes below it makes no difference worth an order
_THREADS = 8  # each waits for a file server

_TASK_S = 5.0  # of work in a task of several, where workers are few
_TASKS_A_SECOND = 50.0  # that a driver is to have for all its workers: each costs it some milliseconds
_LONGEST_S = 60.0  # what goes with a worker that is lost, and what a worker that leaves has to end, must not be more
_MOST = 200  # images a task


def longest_first(entries: Iterable[ManifestEntry], look_ahead: int = _LOOK_AHEAD) -> Iterator[ManifestEntry]:
    """The images, the largest first among the next few hundred; as they come where they are of about one size.

    A large image that begins last keeps one worker busy while all others are done.
    """
    remaining = iter(entries)
    while block := list(islice(remaining, look_ahead)):
        specs = list({spec for entry in block for spec in (entry.new, *entry.ref)})
        # No pool is open while this waits: whoever stops half way leaves it to the garbage collector, which may come in
        # the middle of the start of a thread, when to wait for threads to end is to wait for ever.
        with ThreadPoolExecutor(_THREADS) as pool:
            size = dict(zip(specs, pool.map(_size, specs), strict=True))
        sizes = [sum(size[spec] for spec in (entry.new, *entry.ref)) for entry in block]
        if max(sizes) > _DIFFER * min(sizes):
            order = sorted(range(len(block)), key=lambda i: -sizes[i])
            block = [block[i] for i in order]
        yield from block


class Pace:
    """How many images make a task: one where an image takes seconds and the workers are few, else several.

    Measured as answers come in, the newer ones counting more.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None

    def add(self, images: int, seconds: float) -> None:
        """So many images took so long."""
        each = seconds / images
        self._seconds = each if self._seconds is None else self._seconds + (each - self._seconds) / 4

    def images(self, left: int, workers: int) -> int:
        """Images of the next task, where so many are left: never so many that some worker would have none."""
        if self._seconds is None:
            return 1
        return max(1, min(images_a_task(self._seconds, workers), -(-left // (2 * workers))))


def images_a_task(seconds: float, workers: int) -> int:
    """How many images of so many seconds make a task for one of so many workers.

    A few seconds of work; more where there are so many workers that their driver would have too many tasks a second.
    """
    seconds = max(seconds, 1e-6)
    wanted = max(int(_TASK_S / seconds), math.ceil(workers / (_TASKS_A_SECOND * seconds)))
    return max(1, min(wanted, int(_LONGEST_S / seconds), _MOST))


def _size(spec: str) -> int:
    """Bytes of the file of ``path`` or ``path[hdu]``."""
    for path in (spec, spec.rpartition("[")[0]):
        try:
            return os.stat(path).st_size
        except (OSError, ValueError):  # its own task will say what is wrong
            continue
    return 0
