"""Stamps on disk: one Zarr (v3) store an image, and one view over those of a whole run.

``RUN/stamps/IMAGE.zarr`` is an array ``(n, 3, size, size)`` float32 in the order of the rows of
``RUN/catalogue/IMAGE.parquet``: new, ref, difference, in the file units of new, NaN where there is no data. It is one
shard (two files an image, however many stamps), cut into inner chunks of 32 rows, each compressed by Blosc (zstd,
level 1, bit-shuffled): any Zarr reader opens it. Images without candidates have no store. A store is written by the one
task that owns the image, so no two processes ever share a shard. The stores of rolled-up images are joined into one a
pack (`batchproc.io.packs`), where each image begins at a chunk of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from batchproc.io.atomic import remove, replacing
from batchproc.io.index import CHUNK_ROWS, Index, Place, parts_of, read_index, read_moving
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import Shard, open_shard

__all__ = ["CHUNK_ROWS", "Stamps", "create_store", "open_stamps", "read_stamps", "read_stamps_of", "write_stamps"]

_PLANES = ("new", "ref", "difference")
_COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=4)


def write_stamps(path: Path, stamps: NDArray[np.float32]) -> None:
    """Write the stamps ``(n, 3, h, w)`` of one image, whole or not at all; for n = 0 there is no store."""
    if len(stamps) == 0:
        remove(path)
        return
    stamps = np.ascontiguousarray(stamps, np.float32)
    with replacing(path) as temporary:
        create_store(temporary, stamps.shape)[:] = stamps


def create_store(path: Path, shape: tuple[int, ...]) -> zarr.Array:
    """Describe a store of one shard, of which nothing is written yet."""
    rows = -(-shape[0] // CHUNK_ROWS) * CHUNK_ROWS
    return zarr.create_array(
        store=str(path),
        shape=shape,
        dtype=np.float32,
        chunks=(CHUNK_ROWS, *shape[1:]),
        shards=(rows, *shape[1:]),
        compressors=_COMPRESSOR,
        fill_value=np.nan,
        chunk_key_encoding={"name": "default", "separator": "."},  # no folders in the folder
        dimension_names=("candidate", "plane", "y", "x"),
        attributes={"planes": list(_PLANES), "unit": "file unit of new"},
    )


def read_stamps(path: Path, rows: Any = slice(None)) -> NDArray[np.float32]:
    """Stamps of one store: all, a slice, or an array of row numbers in any order.

    Equivalent to ``zarr.open_array(path, mode="r").oindex[rows]``, but a store that goes away meanwhile is an error and
    not NaN.

    Raises
    ------
    FileNotFoundError
        The store is not there (any more).
    ValueError
        It is altered.
    """
    shard = open_shard(path)
    if [codec["name"] for codec in shard.kind["codecs"]] != ["bytes", "blosc"]:
        raise ValueError(f"{path}: stamps in another encoding than ours: {shard.kind['codecs']}")
    wanted = np.arange(shard.n_rows)[rows]
    numbers, which = np.unique(wanted // shard.rows_per_chunk, return_inverse=True)
    stamps = np.empty((len(wanted), *shard.kind["chunk"][1:]), np.float32)
    for i, chunk in enumerate(shard.some(numbers.tolist())):
        here = np.flatnonzero(which == i)
        stamps[here] = np.nan if chunk is None else _decode(shard, chunk)[wanted[here] % shard.rows_per_chunk]
    return stamps


def read_stamps_of(
    folder: RunFolder, places: Sequence[Place], parts: Sequence[slice] | None = None
) -> NDArray[np.float32]:
    """All stamps ``(n, 3, h, w)`` of some images, one after the other, wherever they lie and move to.

    With `parts`, only these of each of the places, all of which have some; each begins at a multiple of `CHUNK_ROWS`.

    Raises
    ------
    DamagedRunError
        They are not there though they should be.
    """
    some = [place for place in places if place.n]
    return read_moving(folder, some, lambda found: _read_all(folder, parts_of(found, parts)))


class Stamps:
    """All stamps of a run as one read-only sequence; made by `open_stamps`.

    ``stamps[i]`` is ``(3, h, w)``; a slice, an array of indices or of booleans gives ``(n, 3, h, w)``. The index is the
    column ``stamp_index`` of `open_catalogue`. Nothing is read before it is asked for, and then chunks of 32 rows.
    """

    def __init__(self, folder: RunFolder, index: Index, size: int) -> None:
        self._folder, self._index = folder, index
        self.shape = (len(index), len(_PLANES), size, size)
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        if isinstance(rows, (int, np.integer)):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"stamp {rows} of {len(self)}")
            return self[np.array([rows % len(self)])][0]
        wanted = np.arange(len(self))[np.asarray(rows) if not isinstance(rows, slice) else rows]
        stamps = np.empty((len(wanted), *self.shape[1:]), np.float32)
        images = np.searchsorted(self._index.offsets, wanted, side="right") - 1
        local = wanted - self._index.offsets[images]

        def read(places: Sequence[Place]) -> None:
            row = np.array([place.chunk * CHUNK_ROWS for place in places])[which] + local
            stores: dict[Path, int] = {}
            numbers = [stores.setdefault(place.stamps(self._folder), len(stores)) for place in places]
            store = np.array(numbers, np.int64)[which]
            ends = np.cumsum(np.bincount(store, minlength=len(stores)))
            for path, here in zip(stores, np.split(np.argsort(store, kind="stable"), ends[:-1]), strict=False):
                stamps[here] = read_stamps(path, row[here])  # each store is opened once, whatever the order

        some, which = np.unique(images, return_inverse=True)
        read_moving(self._folder, self._index.places(some.tolist()), read)
        return stamps

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"<Stamps of {self._folder.path}: {self.shape}>"

    def of(self, image_id: str) -> NDArray[np.float32]:
        """All stamps ``(n, 3, h, w)`` of one image."""
        if image_id not in self._index.image_ids:
            return np.empty((0, *self.shape[1:]), np.float32)
        return read_stamps_of(self._folder, [self._index.place(self._index.image_ids.index(image_id))])


def open_stamps(run: str | Path) -> Stamps:
    """The stamps of a run.

    Parameters
    ----------
    run : path
        A run folder; one at work is seen as it is at this moment.

    Returns
    -------
    Stamps
        ``open_stamps(run)[i]`` is ``(3, h, w)`` float32: new, ref, difference, background-subtracted, in the file units
        of new (ref scaled to new), NaN where there is no data. ``i`` is ``stamp_index`` of `open_catalogue(run)`.

    Raises
    ------
    UsageError
        When `run` is no run folder.
    """
    folder = RunFolder.existing(run)
    return Stamps(folder, read_index(folder), folder.config().cutouts.size)


def _read_all(folder: RunFolder, places: Sequence[Place]) -> NDArray[np.float32]:
    parts = []
    for place in places:
        first = place.chunk * CHUNK_ROWS
        parts.append(read_stamps(place.stamps(folder), slice(first, first + place.n)))
    if not parts:
        size = folder.config().cutouts.size
        return np.empty((0, len(_PLANES), size, size), np.float32)
    return np.concatenate(parts)


def _decode(shard: Shard, chunk: bytes) -> NDArray[np.float32]:
    shape = shard.kind["chunk"]
    try:
        return np.frombuffer(blosc.decompress(chunk), "<f4").reshape(shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{shard.path}: a chunk of it is altered ({error})") from error
