"""The inner chunks of a Zarr shard as they lie on the disk: encoded bytes, read and written without decoding.

A shard of the codec ``sharding_indexed`` is its chunks, anywhere and in any order, and an index at the end: for each
chunk its offset and its length (little-endian uint64, both 2⁶⁴ − 1 where all of it is fill value), then the crc32c of
the index. Chunks that are copied from one shard to another keep their bytes, whatever the compressor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

__all__ = ["Shard", "open_shard", "write_chunks", "write_shard"]

SHARD = "c.0.0.0.0"  # the only shard of a store of four dimensions, as we write them
_EMPTY = 2**64 - 1
_CRC_BYTES = 4


@dataclass(frozen=True)
class Shard:
    """The only shard of a store, opened by `open_shard`.

    Attributes
    ----------
    path : Path
        The file.
    n_rows, rows_per_chunk : int
        Of the array, along its first axis: the only one along which it has more than one chunk.
    kind : mapping
        What its description says of a chunk: shape, codecs, type of the values.
    """

    path: Path
    n_rows: int
    rows_per_chunk: int
    kind: dict[str, Any]

    @property
    def n_chunks(self) -> int:
        """Inner chunks, those without data among them."""
        return -(-self.n_rows // self.rows_per_chunk)

    def chunks(self, first: int = 0, stop: int | None = None) -> Iterator[bytes | None]:
        """The encoded chunks from `first` up to `stop`, one in memory at a time; None for one without data.

        Raises
        ------
        ValueError
            The file is cut short or its index is altered.
        """
        yield from self.some(range(self.n_chunks)[first:stop])

    def some(self, numbers: Sequence[int]) -> Iterator[bytes | None]:
        """The encoded chunks with these numbers; as `chunks`."""
        with self.path.open("rb") as file:
            for offset, length in self._read_index(file)[list(numbers)].tolist():
                if offset == length == _EMPTY:
                    yield None
                    continue
                file.seek(offset)
                chunk = file.read(length)
                if len(chunk) != length:
                    raise ValueError(f"{self.path}: cut short, {len(chunk)} of the {length} bytes of a chunk are there")
                yield chunk

    def lengths(self) -> list[int | None]:
        """Bytes of each chunk, None for one without data; raises as `chunks` does."""
        with self.path.open("rb") as file:
            index = self._read_index(file).tolist()
        return [None if offset == length == _EMPTY else length for offset, length in index]

    def _read_index(self, file: Any) -> np.ndarray:
        size = 16 * self.n_chunks
        end = file.seek(0, 2)
        if end < size + _CRC_BYTES:
            raise ValueError(f"{self.path}: {end} bytes, too short for the index of {self.n_chunks} chunks")
        file.seek(end - size - _CRC_BYTES)
        index, crc = file.read(size), file.read(_CRC_BYTES)
        if google_crc32c.value(index) != int.from_bytes(crc, "little"):
            raise ValueError(f"{self.path}: the index of its chunks is altered (crc32c)")
        return np.frombuffer(index, "<u8").reshape(-1, 2)


def open_shard(store: Path) -> Shard:
    """The shard of a store that `batchproc.io.stamps` wrote.

    Raises
    ------
    FileNotFoundError
        There is no such store (any more).
    ValueError
        It is described otherwise than we do.
    """
    path = store / "zarr.json"
    try:
        said = json.loads(path.read_text())
        (sharding,) = said["codecs"]
        inside = sharding["configuration"]
        rows, *rest = inside["chunk_shape"]
        n_rows, *shape = said["shape"]
        if sharding["name"] != "sharding_indexed" or inside.get("index_location", "end") != "end" or rest != shape:
            raise ValueError("another layout")
        kind = {"chunk": [rows, *rest], "codecs": inside["codecs"], "type": said["data_type"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no description of a store of stamps ({type(error).__name__}: {error})") from error
    separator = said.get("chunk_key_encoding", {}).get("configuration", {}).get("separator", "/")
    return Shard(store / SHARD.replace(".", separator), n_rows, rows, kind)


def write_shard(store: Path, chunks: Iterable[bytes | None]) -> None:
    """Write encoded chunks, one in memory at a time, into the shard of a store that has its ``zarr.json``."""
    write_chunks(store / SHARD, chunks)


def write_chunks(path: Path, chunks: Iterable[bytes | None]) -> None:
    """Write encoded chunks, one in memory at a time, and their index to a new file."""
    index: list[int] = []
    offset = 0
    with path.open("xb") as file:
        for chunk in chunks:
            if chunk is None:
                index += [_EMPTY, _EMPTY]
                continue
            file.write(chunk)
            index += [offset, len(chunk)]
            offset += len(chunk)
        encoded = np.array(index, "<u8").tobytes()
        file.write(encoded)
        file.write(google_crc32c.value(encoded).to_bytes(_CRC_BYTES, "little"))
