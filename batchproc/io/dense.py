"""All stamps of a run as one dense Zarr array, ``RUN/stamps.zarr``: its form, its shards, and whether it is whole.

An array ``(n, 3, h, w)`` float32 whose row is ``stamp_index``. It is cut into shards of some thousand rows, each a file
``c.K.0.0.0`` with inner chunks of 32 rows: compressed like the stamps of an image, and each followed by its crc32c, so
that any Zarr reader notices an altered one. A shard is written by one task, whole or not at all. ``zarr.json`` comes
last: without it there is no array. It carries a digest of what the array was made from.

A reader of Zarr takes a shard that is not there for one of NaN. `open_dense` looks first whether all are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from batchproc.io.atomic import remove_leftovers, replacing, write_bytes
from batchproc.io.shards import Shard, write_chunks
from batchproc.io.stamps import CHUNK_ROWS

__all__ = ["Dense", "open_dense"]

_SHARD_BYTES = 200e6  # at most, before compression; a third of it on the disk
_CRC_BYTES = 4


@dataclass(frozen=True)
class Dense:
    """The form of the dense array of a run.

    Attributes
    ----------
    store : Path
        ``RUN/stamps.zarr``.
    n : int
        Stamps.
    size : int
        Side of a stamp, pixels.
    inputs : str
        Digest of what it is made from.
    """

    store: Path
    n: int
    size: int
    inputs: str = ""

    @property
    def rows(self) -> int:
        """Rows of a shard: whole chunks, at most 200 MB before compression. More would be fewer files, and as good."""
        return max(1, int(_SHARD_BYTES / (12 * self.size**2 * CHUNK_ROWS))) * CHUNK_ROWS

    @property
    def n_shards(self) -> int:
        """Shards of the array."""
        return -(-self.n // self.rows)

    def span(self, number: int) -> tuple[int, int]:
        """The rows ``[first, last)`` of the array that a shard has."""
        return number * self.rows, min((number + 1) * self.rows, self.n)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.store / f"c.{number}.0.0.0"

    def write_shard(self, number: int, blocks: Iterable[NDArray[np.float32]]) -> None:
        """Write a shard, whole or not at all, from blocks ``(k, 3, h, w)`` of its rows; holds one chunk at a time."""
        with replacing(self.shard(number)) as temporary:
            write_chunks(temporary, self._encoded(number, blocks))

    def read_shard(self, number: int) -> Iterator[NDArray[np.float32]]:
        """The chunks of a shard, ``(32, 3, h, w)`` or what there is of the last one.

        Raises
        ------
        OSError, ValueError
            It is not there, cut short, or altered.
        """
        first, last = self.span(number)
        for i, chunk in enumerate(self._stored(number).chunks(0, -(-(last - first) // CHUNK_ROWS))):
            if chunk is None or google_crc32c.value(chunk[:-_CRC_BYTES]) != int.from_bytes(
                chunk[-_CRC_BYTES:], "little"
            ):
                raise ValueError(f"{self.shard(number)}: chunk {i} is altered (crc32c)")
            rows = np.frombuffer(Blosc().decode(chunk[:-_CRC_BYTES]), np.float32)
            yield rows.reshape(CHUNK_ROWS, 3, self.size, self.size)[: last - first - i * CHUNK_ROWS]

    def is_whole(self, number: int) -> bool:
        """Whether a shard is there and its chunks fill it to the last byte; reads its index alone."""
        first, last = self.span(number)
        stored = self._stored(number)
        try:
            there = stored.lengths()
            size = self.shard(number).stat().st_size
        except (OSError, ValueError):
            return False
        full = -(-(last - first) // CHUNK_ROWS)
        return (
            all(n is not None for n in there[:full])
            and all(n is None for n in there[full:])
            and sum(n or 0 for n in there) + 16 * len(there) + _CRC_BYTES == size
        )

    def begin(self) -> None:
        """Make room for the shards; what is there of an array made from something else is removed."""
        note = self.store / ".inputs"
        if not note.is_file() or note.read_text() != self.inputs:
            (self.store / "zarr.json").unlink(missing_ok=True)  # first: from now on this is no array
            for path in self.store.glob("c.*"):
                path.unlink()
            self.store.mkdir(exist_ok=True)
            write_bytes(note, self.inputs.encode())
        remove_leftovers(self.store)

    def publish(self) -> None:
        """Write ``zarr.json``: all shards are there."""
        written: dict[str, Any] = {}
        zarr.create_array(
            store=MemoryStore(written),
            shape=(self.n, 3, self.size, self.size),
            dtype=np.float32,
            chunks=(CHUNK_ROWS, 3, self.size, self.size),
            shards=(self.rows, 3, self.size, self.size),
            compressors=(BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=4), Crc32cCodec()),
            fill_value=np.nan,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("candidate", "plane", "y", "x"),
            attributes={
                "planes": ["new", "ref", "difference"],
                "unit": "file unit of new",
                "row": "stamp_index of the catalogue",
                "batchproc_inputs": self.inputs,
            },
        )
        write_bytes(self.store / "zarr.json", written["zarr.json"].to_bytes())

    def is_published(self) -> bool:
        """Whether there is an array of this form, made from these inputs; says nothing of its shards."""
        try:
            said = json.loads((self.store / "zarr.json").read_text())
            return bool(
                said["shape"] == [self.n, 3, self.size, self.size]
                and said["attributes"]["batchproc_inputs"] == self.inputs
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _stored(self, number: int) -> Shard:
        return Shard(self.shard(number), self.rows, CHUNK_ROWS, {})

    def _encoded(self, number: int, blocks: Iterable[NDArray[np.float32]]) -> Iterator[bytes | None]:
        """Encoded chunks of rows that come in blocks of any length; None for those beyond the array's end."""
        first, last = self.span(number)
        chunk = np.full((CHUNK_ROWS, 3, self.size, self.size), np.nan, np.float32)
        filled = total = 0
        for block in blocks:
            while len(block):
                taken = min(CHUNK_ROWS - filled, len(block))
                chunk[filled : filled + taken] = block[:taken]
                block, filled, total = block[taken:], filled + taken, total + taken
                if filled == CHUNK_ROWS:
                    yield _encode(chunk)
                    filled = 0
        if total != last - first:
            raise ValueError(f"{self.shard(number)}: {total} stamps came, it has {last - first}")
        if filled:
            chunk[filled:] = np.nan
            yield _encode(chunk)
        yield from [None] * (self.rows // CHUNK_ROWS - -(-total // CHUNK_ROWS))


def open_dense(store: Path, n: int, size: int, inputs: str) -> zarr.Array | None:
    """The dense array of a run, where it is complete and made from these inputs; else None."""
    dense = Dense(store, n, size, inputs)
    if not dense.is_published() or not all(dense.is_whole(i) for i in range(dense.n_shards)):
        return None
    return zarr.open_array(store=str(store), mode="r")


def _encode(chunk: NDArray[np.float32]) -> bytes:
    data = bytes(Blosc(cname="zstd", clevel=1, shuffle=Blosc.BITSHUFFLE).encode(chunk))
    return data + google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")
