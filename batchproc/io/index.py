"""Where the results of each finished image lie: in files of its own, or in a pack with those of others.

A finished image has a marker: a file ``done/IMAGE.json``, or a row of ``done/packed@NUMBER-TAIL.parquet``, with the
place of its rows and stamps in the pack (`batchproc.io.packs`). Images move from the one to the other while a run is at
work, always so that the new marker is there before the old one goes. Whoever reads lists files of their own first and
packs after them, and so sees every finished image; where he sees two markers of one image, the newer counts. What is
listed may be gone when it is opened: then it has moved, and is looked for again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.errors import DamagedRunError
from batchproc.io.atomic import part_name
from batchproc.io.markers import MARKER_SCHEMA, marker_row, read_marker
from batchproc.io.run_folder import RunFolder

__all__ = [
    "CHUNK_ROWS",
    "PACK",
    "PACK_SCHEMA",
    "Done",
    "Index",
    "Place",
    "find_places",
    "is_gone",
    "iter_done",
    "iter_markers",
    "loose_names",
    "pack_names",
    "parts_of",
    "read_index",
    "read_moving",
    "results_digest",
]

T = TypeVar("T")

#: Stamps in an inner chunk of a store: each image begins with one of its own.
CHUNK_ROWS = 32
#: Names of packs begin with it; no image's name does (`part_name` writes "@" in another way).
PACK = "packed@"
_ATTEMPTS = 50  # of a reader whom roll-ups overtake
_PATIENCE, _WAIT_S = 5, 0.2  # of a reader whose listing may be old: how often, and for how long
_KEYS = ["image_id", "time"]  # by which the newest marker of an image is known
_SMALL = {*_KEYS, "status", "n_candidates", "cpu_seconds", "peak_memory_mb", "pack", "row", "chunk"}
_AT_ONCE = 1000  # markers of single images in memory at a time

_PLACE = [
    pa.field("row", pa.int64(), metadata={"meaning": "its first row in the pack's catalogue"}),
    pa.field("chunk", pa.int64(), metadata={"meaning": "its first chunk in the pack's stamps"}),
]
#: The marker of a pack: a row an image.
PACK_SCHEMA = pa.schema([*MARKER_SCHEMA, *_PLACE])


@dataclass(frozen=True)
class Place:
    """Where the results of one image lie.

    Attributes
    ----------
    image_id : str
    n : int
        Candidates: rows of the catalogue, and stamps.
    pack : str
        Name of the pack; empty where the image has files of its own.
    row, chunk : int
        First row in the pack's catalogue, first chunk in its stamps.
    """

    image_id: str
    n: int
    pack: str = ""
    row: int = 0
    chunk: int = 0

    def catalogue(self, folder: RunFolder) -> Path:
        """The file with its rows."""
        return folder.pack_catalogue(self.pack) if self.pack else folder.catalogue_part(self.image_id)

    def stamps(self, folder: RunFolder) -> Path:
        """The store with its stamps; for n = 0 there is none."""
        return folder.pack_stamps(self.pack) if self.pack else folder.stamps_part(self.image_id)


def parts_of(places: Sequence[Place], parts: Sequence[slice] | None) -> Sequence[Place]:
    """Where some of the candidates of each image lie: those of a slice that begins at a multiple of `CHUNK_ROWS`.

    With None all of them.
    """
    if parts is None:
        return places
    return [
        replace(
            place,
            n=min(part.stop, place.n) - part.start,
            row=place.row + part.start,
            chunk=place.chunk + part.start // CHUNK_ROWS,
        )
        for place, part in zip(places, parts, strict=True)
    ]


@dataclass(frozen=True)
class Index:
    """Where the candidates of each finished image lie, and where they begin in the whole run.

    Attributes
    ----------
    image_ids : tuple of str
        Finished images with candidates, in the manifest's order.
    offsets : ndarray (n_images + 1,) int64
        ``stamp_index`` of the first candidate of each, and the total at the end.
    packs : tuple of str
        Names of the packs in which some of them are.
    pack : ndarray (n_images,) int64
        Number in `packs`; −1 for an image with files of its own.
    row, chunk : ndarray (n_images,) int64
        As in `Place`.
    """

    image_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    packs: tuple[str, ...]
    pack: NDArray[np.int64]
    row: NDArray[np.int64]
    chunk: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def places(self, images: Iterable[int] | None = None) -> list[Place]:
        """Of all images, or of those with these numbers in `image_ids`."""
        numbers = range(len(self.image_ids)) if images is None else images
        return [self.place(i) for i in numbers]

    def place(self, i: int) -> Place:
        """Of the image with this number in `image_ids`."""
        n = int(self.offsets[i + 1] - self.offsets[i])
        pack = self.packs[self.pack[i]] if self.pack[i] >= 0 else ""
        return Place(self.image_ids[i], n, pack, int(self.row[i]), int(self.chunk[i]))


class Done(NamedTuple):
    """By what a finished image was done: fields of its `batchproc.io.markers.Marker`; `version` is batchproc's."""

    image_id: str
    config_digest: str
    entry_digest: str
    version: str


def read_index(folder: RunFolder) -> Index:
    """The `Index` of a run, as it is at this moment; opens a file a pack, and one an image that is not in one."""
    found = pa.concat_tables(iter_markers(folder, ["image_id", "n_candidates", "pack", "row", "chunk"]))
    order, ids = _in_order(folder, found)
    n = found["n_candidates"].to_numpy()[order]
    order, ids, n = order[n > 0], [ids[i] for i in np.flatnonzero(n)], n[n > 0]
    pack = found["pack"].combine_chunks().dictionary_encode()
    names = pack.dictionary.to_pylist()
    packs = tuple(sorted(filter(None, names)))
    numbers = np.array([packs.index(name) if name else -1 for name in names], np.int64)
    return Index(
        image_ids=tuple(ids),
        offsets=np.concatenate([[0], np.cumsum(n)]).astype(np.int64),
        packs=packs,
        pack=numbers[pack.indices.to_numpy()[order]] if names else np.empty(0, np.int64),
        row=found["row"].to_numpy()[order],
        chunk=found["chunk"].to_numpy()[order],
    )


def iter_done(folder: RunFolder) -> Iterator[Done]:
    """By what each finished image was done, in no particular order."""
    for table in iter_markers(folder, Done._fields):
        yield from map(Done, *(table[name].to_pylist() for name in Done._fields))


def find_places(folder: RunFolder, image_ids: Sequence[str]) -> list[Place]:
    """Where images lie at this moment, in this order.

    Raises
    ------
    DamagedRunError
        One of them is not done (any more).
    """
    wanted = set(image_ids)
    found: dict[str, Place] = {}
    for table in iter_markers(folder, ["image_id", "n_candidates", "pack", "row", "chunk"]):
        chosen = table.filter(pa.array([image_id in wanted for image_id in table["image_id"].to_pylist()], pa.bool_()))
        for row in chosen.to_pylist():
            found[row["image_id"]] = Place(row["image_id"], row["n_candidates"], row["pack"], row["row"], row["chunk"])
    for image_id in image_ids:
        if image_id not in found:
            raise DamagedRunError(
                f"{folder.path}: the image {image_id} is not done any more; open the run again, and do what is missing "
                "with `batchproc run`"
            )
    return [found[image_id] for image_id in image_ids]


def read_moving(folder: RunFolder, places: Sequence[Place], read: Callable[[Sequence[Place]], T]) -> T:
    """What `read` makes of the files of these images, which roll-ups may move while it reads.

    Raises
    ------
    DamagedRunError
        Files are missing of images whose markers say that they are there, or they are altered.
    """
    for _ in range(_ATTEMPTS):
        try:
            return read(places)
        except (ValueError, OSError) as error:
            if is_gone(error):
                found = find_places(folder, [place.image_id for place in places])
                if found == list(places):
                    raise _missing(folder, error) from error
                places = found
                continue
            if isinstance(error, OSError) and error.errno is not None:  # the disk, not what is on it
                raise
            what = _cut_short(folder, places) or folder.path
            raise DamagedRunError(
                f"{what}: altered or cut short ({error}); `batchproc verify {folder.path} --repair` tells which images "
                "are to be done again"
            ) from error
    raise DamagedRunError(f"{folder.path}: files move faster than they can be read; try again")


def _cut_short(folder: RunFolder, places: Sequence[Place]) -> Path | None:
    """The first catalogue that has lost its end, of which Arrow says what is wrong and not where."""
    for path in dict.fromkeys(place.catalogue(folder) for place in places):
        try:
            pq.read_metadata(path)
        except (ValueError, OSError):
            return path
    return None


def results_digest(folder: RunFolder) -> str:
    """Of the contents of all that is finished, in the manifest's order: the same wherever they lie."""
    found = pa.concat_tables(iter_markers(folder, ["image_id", "rows_digest", "stamps_digest"]))
    digest = sha256()
    texts = [found[name].to_pylist() for name in found.column_names]
    for i in _in_order(folder, found)[0].tolist():
        digest.update(" ".join(column[i] for column in texts).encode())
    return digest.hexdigest()[:32]


def iter_markers(folder: RunFolder, columns: Sequence[str], packs: Collection[str] | None = None) -> Iterator[pa.Table]:
    """Markers of finished images, each image exactly once, also while roll-ups are at work.

    Parameters
    ----------
    folder : RunFolder
    columns : sequence of str
        Of `PACK_SCHEMA`, and ``pack``: the name of the pack, empty for an image with files of its own.
    packs : collection of str, optional
        Only what lies in these packs; by default everything.

    Yields
    ------
    pyarrow.Table
        A pack's at a time.

    Raises
    ------
    DamagedRunError
        The marker of a pack cannot be read. A single image's that cannot be read counts for nothing.
    """
    given: list[pa.ChunkedArray] = []
    for attempt in range(_ATTEMPTS):
        try:
            wanted = [*dict.fromkeys([*columns, "image_id", "pack"])]
            for table in _newest_markers(folder, wanted, given, patient=attempt < _PATIENCE):
                given.append(table["image_id"])
                if packs is not None:
                    table = table.filter(pa.array([name in packs for name in table["pack"].to_pylist()], pa.bool_()))
                yield table.select(list(columns))
            return
        except OSError as error:  # a pack has gone into a newer one, which the next listing has
            if not is_gone(error):
                raise
    raise DamagedRunError(f"{folder.path}: packs move faster than they can be read; try again")


def is_gone(error: Exception) -> bool:
    """Whether it is that a file is not there (any more), also as network file systems put it."""
    return isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno == errno.ESTALE)


def loose_names(folder: RunFolder) -> list[str]:
    """Names (`part_name`) of the images that have files of their own."""
    names = _listed(folder.done)
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and name[0] != ".")


def pack_names(folder: RunFolder) -> list[str]:
    """Names of the packs, in the order of their numbers."""
    before = None
    while True:  # a folder may change while it is listed: what two listings agree on was there between them
        names = sorted(name for name in _listed(folder.done) if name.startswith(PACK) and name.endswith(".parquet"))
        if names == before:
            return [name.removesuffix(".parquet") for name in names]
        before = names


def _newest_markers(
    folder: RunFolder, columns: Sequence[str], given: Sequence[pa.ChunkedArray], patient: bool
) -> Iterator[pa.Table]:
    everything = [*dict.fromkeys([*columns, *_KEYS])]
    loose, gone = _read_loose(folder, everything)  # before the packs are listed
    names = pack_names(folder)
    at_once = _SMALL.issuperset(columns)  # a few numbers an image: no pack is opened twice for them
    with ThreadPoolExecutor(8) as pool:  # each read waits for a file server
        packs = list(pool.map(lambda name: _read_pack(folder, name, everything if at_once else _KEYS), names))
    keys = [table.select(_KEYS) for table in (loose, *packs)]
    if gone and patient:
        seen = {part_name(image_id) for table in keys for image_id in table["image_id"].to_pylist()}
        if not gone <= seen:  # on network file systems a listing may be old: the pack that they went into is there
            time.sleep(_WAIT_S)
            raise FileNotFoundError(errno.ENOENT, "gone since it was listed", str(folder.done))
    keep = _newest(keys, given)
    yield loose.filter(pa.array(keep[0])).select(list(columns))
    for name, table, chosen in zip(names, packs, keep[1:], strict=True):
        if chosen.any():
            table = table.select(list(columns)) if at_once else _read_pack(folder, name, columns)
            yield table if chosen.all() else table.filter(pa.array(chosen))


def _newest(keys: Sequence[pa.Table], given: Sequence[pa.ChunkedArray]) -> list[NDArray[np.bool_]]:
    """Which rows of the tables count: the newest of each image (the last of equals) that has not been given yet."""
    joined = pa.concat_tables(keys)
    ids = joined["image_id"].to_pylist()
    keep = np.ones(len(ids), bool)
    if len(set(ids)) < len(ids):
        newest = {ids[i]: i for i in np.argsort(joined["time"].to_numpy(), kind="stable").tolist()}
        keep[:] = False
        keep[list(newest.values())] = True
    if given:
        before = {image_id for some in given for image_id in some.to_pylist()}
        keep &= np.array([image_id not in before for image_id in ids], bool)
    return np.split(keep, np.cumsum([len(table) for table in keys])[:-1])


def _read_loose(folder: RunFolder, columns: Sequence[str]) -> tuple[pa.Table, set[str]]:
    """Markers of images with files of their own, and the names of those that are gone since they were listed."""
    schema = pa.schema([_field(name) for name in columns])
    gone: set[str] = set()

    def read(name: str) -> dict[str, Any] | None:
        try:
            return marker_row(read_marker(folder.done / f"{name}.json")[0]) | {"pack": "", "row": 0, "chunk": 0}
        except ValueError:  # it is no marker
            return None
        except OSError as error:
            if not is_gone(error):
                raise
            gone.add(name)
            return None

    names = loose_names(folder)
    tables = [schema.empty_table()]
    with ThreadPoolExecutor(8) as pool:  # each read waits for a file server
        for some in (names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)):
            rows = [{column: row[column] for column in columns} for row in pool.map(read, some) if row is not None]
            tables.append(pa.Table.from_pylist(rows, schema))
    return pa.concat_tables(tables), gone


def _read_pack(folder: RunFolder, name: str, columns: Sequence[str]) -> pa.Table:
    path = folder.pack_marker(name)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read([column for column in columns if column != "pack"])
    except (pa.ArrowException, OSError) as error:
        if is_gone(error):
            raise
        raise DamagedRunError(
            f"{path}: the marker of a pack cannot be read ({error}); `batchproc verify {folder.path} --repair` tells "
            "which images are to be done again"
        ) from error
    if "pack" in columns:
        table = table.append_column(_field("pack"), pa.array([name] * len(table), pa.string()))
    return table.select(list(columns)).replace_schema_metadata()


def _field(name: str) -> pa.Field:
    return pa.field("pack", pa.string()) if name == "pack" else PACK_SCHEMA.field(name)


def _in_order(folder: RunFolder, found: pa.Table) -> tuple[NDArray[np.int64], list[str]]:
    """The rows of a table in the manifest's order, and their images; without those that are not in the manifest."""
    rows = {image_id: i for i, image_id in enumerate(found["image_id"].to_pylist())}
    ids = [image_id for image_id in folder.image_ids() if image_id in rows]
    return np.array([rows[image_id] for image_id in ids], np.int64), ids


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _missing(folder: RunFolder, error: Exception) -> DamagedRunError:
    path = getattr(error, "filename", None) or error
    return DamagedRunError(
        f"{path}: missing, though its marker says that it is there; `batchproc verify {folder.path} --repair` finds "
        "all that is missing or altered, and `batchproc run` does it again"
    )
