"""In which order images go out, and how many together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from batchproc.records import ManifestEntry

__all__ = ["Pace", "longest_first"]

_LOOK_AHEAD = 500
_DIFFER = 1.2  # a ratio of sizes below it makes no difference worth an order
_THREADS = 8  # each waits for a file server

_SHORT_S = 2.0  # an image that takes longer has a task to itself
_TASK_S = 5.0  # of work in a task of several
_MOST = 200  # images a task


def longest_first(entries: Iterable[ManifestEntry], look_ahead: int = _LOOK_AHEAD) -> Iterator[ManifestEntry]:
    """The images, the largest first among the next few hundred; as they come where they are of about one size.

    A large image that begins last keeps one worker busy while all others are done.
    """
    remaining = iter(entries)
    with ThreadPoolExecutor(_THREADS) as pool:
        while block := list(islice(remaining, look_ahead)):
            specs = list({spec for entry in block for spec in (entry.new, *entry.ref)})
            size = dict(zip(specs, pool.map(_size, specs), strict=True))
            sizes = [sum(size[spec] for spec in (entry.new, *entry.ref)) for entry in block]
            if max(sizes) > _DIFFER * min(sizes):
                order = sorted(range(len(block)), key=lambda i: -sizes[i])
                block = [block[i] for i in order]
            yield from block


class Pace:
    """How many images make a task: one where an image takes seconds, several where it takes less.

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
        if self._seconds is None or self._seconds >= _SHORT_S:
            return 1
        wanted = int(_TASK_S / max(self._seconds, _TASK_S / _MOST))
        return max(1, min(wanted, -(-left // (2 * workers))))


def _size(spec: str) -> int:
    """Bytes of the file of ``path`` or ``path[hdu]``."""
    for path in (spec, spec.rpartition("[")[0]):
        try:
            return os.stat(path).st_size
        except (OSError, ValueError):  # its own task will say what is wrong
            continue
    return 0
