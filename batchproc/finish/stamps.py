"""The stamps of a run in one dense Zarr array: a task for each shard, which nobody else writes.

A task reads the stamps of the images that have rows in its shard, some at a time, writes the shard, and reads it back.
The form of the array is in `batchproc.io.dense`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import DamagedRunError
from batchproc.finish.work import Contents, Images, Job, Product, Workshop, counted, digest
from batchproc.io.dense import Dense
from batchproc.io.index import Place
from batchproc.io.markers import chunks_digest
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import open_shard
from batchproc.io.stamps import CHUNK_ROWS, read_stamps

__all__ = ["make_stamps", "survey_stamps"]

_BLOCK = 8 * CHUNK_ROWS  # stamps read at a time: 12 MB of 63 pixels
_FORM = "1"  # of what is written: with another one older arrays are made anew
_COMPRESSION = 3.4


def survey_stamps(contents: Contents) -> Product:
    """What there is of the array, and what there will be; reads the index of each shard."""
    dense = _dense(contents)
    if dense.n == 0:
        return Product("stamps", dense.store, "empty", note="no candidates")
    if dense.is_published() and not _unwritten(dense):
        return counted(Product("stamps", dense.store, "current", dense.n))
    size = int(dense.n * 12 * dense.size**2 / _COMPRESSION)
    return Product("stamps", dense.store, "to make", dense.n, dense.n_shards + 2, size)


def make_stamps(shop: Workshop) -> Product:
    """Make the array, or of an array from the same images the shards that are missing or torn."""
    found = survey_stamps(shop.contents)
    if found.state != "to make":
        return found
    dense = _dense(shop.contents)
    dense.begin()
    job = shop.job("stamps", dense.inputs)
    shop.step(partial(_write_shard, dense), job, _unwritten(dense), "shards")
    dense.publish()
    return replace(survey_stamps(shop.contents), state="made")


def _dense(contents: Contents) -> Dense:
    size = contents.folder.config().cutouts.size
    return Dense(contents.folder.path / "stamps.zarr", len(contents.index), size, digest(_FORM, contents.digest))


def _unwritten(dense: Dense) -> list[int]:
    return [number for number in range(dense.n_shards) if not dense.is_whole(number)]


def _write_shard(dense: Dense, job: Job, number: int) -> None:
    """Write one shard, and make sure that what can be read from it is what was read from the images.

    Raises
    ------
    DamagedRunError
        The stamps of an image are not what its done-marker says.
    RuntimeError
        The shard reads back otherwise.
    """
    first, last = dense.span(number)
    put, got = _Sum(), _Sum()
    dense.write_shard(number, put(stamps_between(job.folder, job.images(first, last), first, last)))
    for _ in got(dense.read_shard(number)):
        pass
    if put.value != got.value:
        dense.shard(number).unlink()
        raise RuntimeError(f"{dense.shard(number)}: reads back otherwise than it was written; it is removed")


def stamps_between(folder: RunFolder, images: Images, first: int, last: int) -> Iterator[NDArray[np.float32]]:
    """The stamps ``[first, last)`` of a run in blocks, from the images that have them."""
    for place, begin, expected in zip(images.places, images.offsets.tolist(), images.stamps_digests, strict=False):
        if begin >= first:  # an image that began in the shard before was checked there
            _check(folder, place, expected)
        for start in range(max(begin, first), min(begin + place.n, last), _BLOCK):
            stop = min(start + _BLOCK, begin + place.n, last)
            shift = place.chunk * CHUNK_ROWS - begin
            yield read_stamps(place.stamps(folder), slice(start + shift, stop + shift))


def _check(folder: RunFolder, place: Place, expected: str) -> None:
    chunks = range(place.chunk, place.chunk - (-place.n // CHUNK_ROWS))
    if chunks_digest(open_shard(place.stamps(folder)).some(chunks)) != expected:
        raise DamagedRunError(
            f"{place.stamps(folder)}: the stamps of {place.image_id} are not those that were written; "
            f"`batchproc verify {folder.path} --repair` finds what is altered, `batchproc run` does it again"
        )


class _Sum:
    """The crc32 of the values that pass through, in order."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        for block in blocks:
            self.value = zlib.crc32(np.ascontiguousarray(block).data, self.value)
            yield block
