"""The stamps of a run in one dense Zarr array: a task for each shard, which nobody else writes.

A task reads the stamps of the images that have rows in its shard, some at a time, writes the shard, and reads it back.
The form of the array is in `batchproc.io.dense`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from batchproc.finish.work import Images, Job
from batchproc.io.dense import Dense
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import read_stamps

__all__ = ["stamps_between", "write_shard"]

_BLOCK = 256  # stamps read at a time: 12 MB of 63 pixels


def write_shard(job: Job, dense: Dense, number: int) -> None:
    """Write one shard, and make sure that what can be read from it is what was read from the images.

    Raises
    ------
    RuntimeError
        It is not.
    """
    first, last = dense.span(number)
    images = job.images().overlapping(first, last)
    put = _Sum()
    dense.write_shard(number, put(stamps_between(job.folder, images, first, last)))
    got = _Sum()
    for _ in got(dense.read_shard(number)):
        pass
    if put.value != got.value:
        dense.shard(number).unlink()
        raise RuntimeError(f"{dense.shard(number)}: reads back otherwise than it was written; it is removed")


def stamps_between(folder: RunFolder, images: Images, first: int, last: int) -> Iterator[NDArray[np.float32]]:
    """The stamps ``[first, last)`` of a run in blocks, from the images that have them."""
    for image_id, begin, end in zip(images.image_ids, images.offsets[:-1], images.offsets[1:], strict=True):
        for start in range(max(begin, first), min(end, last), _BLOCK):
            stop = min(start + _BLOCK, end, last)
            yield read_stamps(folder.stamps_part(image_id), slice(start - begin, stop - begin))


class _Sum:
    """The crc32c of the values that pass through, in order."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        for block in blocks:
            self.value = google_crc32c.extend(self.value, np.ascontiguousarray(block).tobytes())
            yield block
