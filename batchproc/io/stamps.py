"""Stamps on disk: one Zarr (v3) store an image, and one view over those of a whole run.

``RUN/stamps/IMAGE.zarr`` is an array ``(n, 3, size, size)`` float32 in the order of the rows of
``RUN/catalogue/IMAGE.parquet``: new, ref, difference, in the file units of new, NaN where there is no data. It is one
shard (two files an image, however many stamps), cut into inner chunks of 32 rows, each compressed by Blosc (zstd,
level 1, bit-shuffled): any Zarr reader opens it. Images without candidates have no store. A store is written by the one
task that owns the image, so no two processes ever share a shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from batchproc.io.atomic import remove, replacing
from batchproc.io.progress import Index, read_index
from batchproc.io.run_folder import RunFolder

__all__ = ["CHUNK_ROWS", "Stamps", "open_stamps", "read_stamps", "write_stamps"]

CHUNK_ROWS = 32
_PLANES = ("new", "ref", "difference")


def write_stamps(path: Path, stamps: NDArray[np.float32]) -> None:
    """Write the stamps ``(n, 3, h, w)`` of one image, whole or not at all; for n = 0 there is no store."""
    if len(stamps) == 0:
        remove(path)
        return
    stamps = np.ascontiguousarray(stamps, np.float32)
    rows = -(-len(stamps) // CHUNK_ROWS) * CHUNK_ROWS
    with replacing(path) as temporary:
        array = zarr.create_array(
            store=str(temporary),
            shape=stamps.shape,
            dtype=stamps.dtype,
            chunks=(CHUNK_ROWS, *stamps.shape[1:]),
            shards=(rows, *stamps.shape[1:]),
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=stamps.itemsize),
            fill_value=np.nan,
            chunk_key_encoding={"name": "default", "separator": "."},  # no folders in the folder
            dimension_names=("candidate", "plane", "y", "x"),
            attributes={"planes": list(_PLANES), "unit": "file unit of new"},
        )
        array[:] = stamps


def read_stamps(path: Path, rows: Any = slice(None)) -> NDArray[np.float32]:
    """Stamps of one image: all, a slice, or an array of row numbers in any order."""
    array = zarr.open_array(store=str(path), mode="r")
    if isinstance(rows, slice):
        return np.asarray(array[rows])
    return np.asarray(array.oindex[np.asarray(rows)])


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
            image, row = self._locate(np.array([rows % len(self)]))
            return read_stamps(self._part(image[0]), slice(row[0], row[0] + 1))[0]
        wanted = np.arange(len(self))[np.asarray(rows) if not isinstance(rows, slice) else rows]
        stamps = np.empty((len(wanted), *self.shape[1:]), np.float32)
        images, local = self._locate(wanted)
        for image in np.unique(images):  # each store is opened once, whatever the order asked for
            here = np.flatnonzero(images == image)
            unique, back = np.unique(local[here], return_inverse=True)
            whole = len(unique) == unique[-1] - unique[0] + 1
            stored = read_stamps(self._part(image), slice(unique[0], unique[-1] + 1) if whole else unique)
            stamps[here] = stored[back]
        return stamps

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"<Stamps of {self._folder.path}: {self.shape}>"

    def of(self, image_id: str) -> NDArray[np.float32]:
        """All stamps ``(n, 3, h, w)`` of one image."""
        if image_id not in self._index.image_ids:
            return np.empty((0, *self.shape[1:]), np.float32)
        return read_stamps(self._folder.stamps_part(image_id))

    def _locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        images = np.searchsorted(self._index.offsets, rows, side="right") - 1
        return images, rows - self._index.offsets[images]

    def _part(self, image: int) -> Path:
        return self._folder.stamps_part(self._index.image_ids[image])


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
