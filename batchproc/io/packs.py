"""Packs: the results of hundreds of images in five files instead of five an image, made while a run is at work.

Quotas of shared file systems count files. So finished images are rolled up, by a task of the run, `PACK_IMAGES` at a
time, into ::

    catalogue/packed@000001-5f3a91c2.parquet      their rows, image after image
    stamps/packed@000001-5f3a91c2.zarr            their stamps, each image from a chunk of its own on
    done/packed@000001-5f3a91c2.parquet           the pack's marker: a row an image, written last

Stamps are copied as they are encoded, and every image is held against the digests of its marker on the way: one that
is altered is not taken along but counts as missing again. The number orders packs; the tail of the name is drawn by
lot, so that no two processes ever write the same pack, whoever else thinks that it is his.

What may be killed at any moment goes in this order: the new pack's files, its marker, then the old markers, then the
old files. Until it is through there are two copies of an image, both right, of which readers take one
(`batchproc.io.index`); what is left over when it is killed, `tidy` removes for the next driver.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchproc.io.atomic import TEMPORARY, our_disk, part_name, remove, replacing
from batchproc.io.catalogue import PARQUET, SCHEMA, forget_scores, read_place
from batchproc.io.index import PACK, PACK_SCHEMA, Place, is_gone, iter_markers, loose_names, pack_names
from batchproc.io.markers import chunks_digest, file_digest, marker_row, read_marker, row_marker, rows_digest
from batchproc.io.progress import forget_failures
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import open_shard, write_shard
from batchproc.io.stamps import CHUNK_ROWS, create_store

__all__ = [
    "PACK_IMAGES",
    "Packed",
    "RollUp",
    "forget",
    "loose_images",
    "next_pack_number",
    "pack_files",
    "plan_roll_ups",
    "roll_up",
    "small_packs",
    "tidy",
]

PACK_IMAGES = 500
_ROW_GROUP = 65_536  # rows of a pack's catalogue in memory at a time, and in one row group
_ORPHANED_S = 900.0  # files without a marker that are older belong to nobody who is still at work


@dataclass(frozen=True)
class RollUp:
    """What goes into one pack: images with files of their own, and whole packs that are small."""

    image_ids: tuple[str, ...]
    packs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packed:
    """What became of a roll-up.

    Attributes
    ----------
    pack : str
        The name of the new pack; empty where there was nothing (any more) to be put into one.
    n_images, n_bytes : int
        In it.
    bad : mapping
        Images that were found torn or altered → what is wrong. They are not done any more.
    """

    pack: str
    n_images: int
    n_bytes: int
    bad: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """An image that is to be copied: its marker as a row of `MARKER_SCHEMA`, and where it lies."""

    row: Mapping[str, Any]
    place: Place


def roll_up(folder: RunFolder, number: int, image_ids: Sequence[str], packs: Sequence[str] = ()) -> Packed:
    """Put images into a pack; no other task may have one of them in its hands.

    Parameters
    ----------
    folder : RunFolder
    number : int
        Of the pack: from `next_pack_number` on, each used once.
    image_ids : sequence of str
        Those that have files of their own; what has none (any more) is passed over.
    packs : sequence of str
        Names of packs that are taken into the new one and go.

    Raises
    ------
    StorageError
        The disk does not take it. Nothing is lost.
    """
    with our_disk(folder.path):
        bad: dict[str, str] = {}
        newest: dict[str, _Source] = {}
        for source in [*_sources_in(folder, packs), *_loose_sources(folder, image_ids, bad)]:
            other = newest.setdefault(source.place.image_id, source)
            if source.row["time"] > other.row["time"]:
                newest[source.place.image_id] = source
        name, done = _write_pack(folder, number, list(newest.values()), bad)
        _remove_loose(folder, [image_id for image_id in image_ids if image_id in done], bad)
        for old in packs:
            _remove_pack(folder, old)
        size = sum(path.stat().st_size for path in pack_files(folder, name)) if name else 0
        return Packed(name, len(done), size, bad)


def forget(folder: RunFolder, image_ids: Iterable[str]) -> None:
    """Images that are not done any more, and have not failed either: whatever is known of them goes.

    Packs are written again without them. Only a driver does this, who has the folder to himself and no task at work;
    when it is killed, it is to be called again.
    """
    ids = set(image_ids)
    if not ids:
        return
    with our_disk(folder.path):
        forget_scores(folder, ids)
        forget_failures(folder, ids)
        for image_id in ids:
            folder.marker(image_id).unlink(missing_ok=True)
        # Also with an older copy in them, which would come to light when the newer one goes.
        concerned = {pack for pack in pack_names(folder) if not ids.isdisjoint(_images_in(folder, pack))}
        numbers = count(next_pack_number(folder))
        for pack, sources in groupby(_sources_in(folder, concerned), lambda source: source.place.pack):
            _write_pack(folder, next(numbers), [source for source in sources if source.place.image_id not in ids], {})
            _remove_pack(folder, pack)
        for pack in concerned:  # where one is left, there are newer copies of all in it
            _remove_pack(folder, pack)
        for image_id in ids:
            _remove_files(folder, image_id)


def loose_images(folder: RunFolder) -> list[str]:
    """Finished images that have files of their own, in the manifest's order."""
    names = set(loose_names(folder))
    return [image_id for image_id in folder.image_ids() if part_name(image_id) in names] if names else []


def small_packs(folder: RunFolder) -> list[tuple[str, int]]:
    """Packs that are less than half full, and the number of images in each."""
    sizes = [(name, pq.read_metadata(folder.pack_marker(name)).num_rows) for name in pack_names(folder)]
    return [(name, n) for name, n in sizes if n < PACK_IMAGES // 2]


def plan_roll_ups(folder: RunFolder, least: int = 20) -> list[RollUp]:
    """What is to be rolled up now: all images with files of their own, where there are so many, and small packs.

    What drivers leave behind that are interrupted again and again comes together in this way.
    """
    loose = loose_images(folder)
    blocks = [tuple(loose[i : i + PACK_IMAGES]) for i in range(0, len(loose), PACK_IMAGES)]
    rest = blocks.pop() if blocks and len(blocks[-1]) < PACK_IMAGES else ()
    plans = [RollUp(block) for block in blocks]
    images, total = rest, len(rest)
    packs: list[str] = []
    for name, n in [*small_packs(folder), ("", PACK_IMAGES)]:
        if total + n > PACK_IMAGES:
            if len(images) >= least or len(packs) > 1:
                plans.append(RollUp(images, tuple(packs)))
            images, packs, total = (), [], 0
        packs.append(name)
        total += n
    return plans


def next_pack_number(folder: RunFolder) -> int:
    """A number greater than that of any pack, finished or not."""
    names = [name for where in (folder.done, folder.catalogue, folder.stamps) for name in _listed(where)]
    return 1 + max((int(name[len(PACK) :].split("-")[0]) for name in names if name.startswith(PACK)), default=0)


def pack_files(folder: RunFolder, pack: str) -> list[Path]:
    """The files of a pack, its marker last."""
    stamps = folder.pack_stamps(pack)
    files = sorted(path for path in stamps.iterdir()) if stamps.is_dir() else []
    return [folder.pack_catalogue(pack), *files, folder.pack_marker(pack)]


def tidy(folder: RunFolder) -> None:
    """Remove what killed tasks have left: second copies, and files that belong to no finished image.

    Only a driver does this, who has the folder to himself. Workers of one that was killed may still be at work, so what
    is young stays, as long as it may get its marker.
    """
    loose, packs = set(loose_names(folder)), set(pack_names(folder))
    used: set[str] = set()
    packed: set[str] = set()
    for table in iter_markers(folder, ["image_id", "pack"]):
        pack = table["pack"][0].as_py() if len(table) else ""
        if pack:
            used.add(pack)
            packed.update(map(part_name, table["image_id"].to_pylist()))
    for name in loose & packed:
        (folder.done / f"{name}.json").unlink(missing_ok=True)
    for name in packs - used:
        _remove_pack(folder, name)
    begun = _clock(folder) - _ORPHANED_S
    known = (loose | packs) - (loose & packed) - (packs - used)
    for path in [*folder.catalogue.glob("[!.]*.parquet"), *folder.stamps.glob("[!.]*.zarr")]:
        if path.stem not in known and (path.stem in packed or _is_older(path, begun)):
            marker = folder.done / (f"{path.stem}.parquet" if path.name.startswith(PACK) else f"{path.stem}.json")
            if not marker.exists():  # its task may have finished since
                remove(path)


def _loose_sources(folder: RunFolder, image_ids: Iterable[str], bad: dict[str, str]) -> Iterator[_Source]:
    for image_id in image_ids:
        try:
            marker, digest = read_marker(folder.marker(image_id))
            if marker.digest != digest or marker.image_id != image_id:
                raise ValueError(f"{folder.marker(image_id)}: altered")
        except FileNotFoundError:  # rolled up by another task, which was thought to be lost
            continue
        except ValueError as error:
            bad[image_id] = str(error)
            continue
        yield _Source(marker_row(marker), Place(image_id, marker.n_rows))


def _sources_in(folder: RunFolder, packs: Collection[str]) -> Iterator[_Source]:
    """The images of some packs, without those of which there is a newer copy elsewhere."""
    if not packs:
        return
    for table in iter_markers(folder, [*PACK_SCHEMA.names, "pack"], packs):
        for row in table.to_pylist():
            place = Place(row["image_id"], row["n_candidates"], row["pack"], row["row"], row["chunk"])
            yield _Source(row, place)


def _images_in(folder: RunFolder, pack: str) -> list[str]:
    with pq.ParquetFile(folder.pack_marker(pack), page_checksum_verification=True) as file:
        ids: list[str] = file.read(["image_id"])["image_id"].to_pylist()
    return ids


def _write_pack(
    folder: RunFolder, number: int, sources: Sequence[_Source], bad: dict[str, str]
) -> tuple[str, set[str]]:
    """Copy images into a new pack; returns its name and what is in it. What is altered, it adds to `bad` instead."""
    name = f"{PACK}{number:06d}-{uuid.uuid4().hex[:8]}"
    part, store = folder.pack_catalogue(name), folder.pack_stamps(name)
    marker = folder.pack_marker(name)
    rows: list[dict[str, Any]] = []
    with (
        replacing(part) as part_file,
        replacing(store) as store_folder,
        pq.ParquetWriter(part_file, SCHEMA, **PARQUET) as writer,
    ):
        store_folder.mkdir()
        copying = _Copying(folder, writer, rows, bad)
        write_shard(store_folder, copying.chunks(sources))
        if copying.n_chunks:
            create_store(store_folder, (copying.n_chunks * CHUNK_ROWS, *copying.shape))
        else:
            remove(store_folder)
        if not rows:
            writer.close()
            remove(part_file)
    if not rows:
        return "", set()
    files = dict(zip(("catalogue", "stamps", "zarr.json"), pack_files(folder, name)[:-1], strict=False))
    about = {kind: file_digest(path) for kind, path in files.items()}
    with replacing(marker) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, PACK_SCHEMA.with_metadata(about)), temporary, **PARQUET)
    missing = [path for path in files.values() if not path.is_file()]
    if missing:  # another driver took us for dead
        marker.unlink()
        raise OSError(errno.ESTALE, "removed while the pack was written: another driver has the run", str(missing[0]))
    return name, {row["image_id"] for row in rows}


class _Copying:
    """Copies images one by one: rows to a writer, chunks to whoever asks for the next, places to a list."""

    def __init__(self, folder: RunFolder, writer: pq.ParquetWriter, rows: list[dict[str, Any]], bad: dict[str, str]):
        self._folder, self._writer, self._rows, self._bad = folder, writer, rows, bad
        self._waiting: list[pa.Table] = []
        self._n_rows = 0
        self._shapes: Counter[tuple[int, ...]] = Counter()
        self.n_chunks = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a stamp: (3, h, w), by what most stores say.

        All images of a run are stored alike, and their digests tell whether chunks are what was written; where the
        description of one is altered, that is no matter of the others.
        """
        return self._shapes.most_common(1)[0][0]

    def chunks(self, sources: Iterable[_Source]) -> Iterator[bytes | None]:
        """The encoded chunks of all images that are as their markers say."""
        for source in sources:
            try:
                rows, chunks = self._read(source)
            except (ValueError, OSError) as error:
                image_id = source.place.image_id
                if is_gone(error):
                    pack = source.place.pack
                    if (self._folder.pack_marker(pack) if pack else self._folder.marker(image_id)).exists():
                        self._bad[image_id] = f"{getattr(error, 'filename', None) or error}: missing"
                    continue  # else it has been rolled up by another task
                if isinstance(error, OSError) and error.errno is not None:  # the disk, not what is on it
                    raise
                self._bad[image_id] = str(error)
                continue
            self._rows.append({**source.row, "row": self._n_rows, "chunk": self.n_chunks})
            self._n_rows += len(rows)
            self.n_chunks += len(chunks)
            self._waiting.append(rows)
            if sum(map(len, self._waiting)) >= _ROW_GROUP:
                self._flush()
            yield from chunks
        self._flush()

    def _read(self, source: _Source) -> tuple[pa.Table, list[bytes | None]]:
        """What an image consists of, held against its marker."""
        place, row = source.place, source.row
        marker, digest = row_marker(row)
        if marker.digest != digest:
            raise ValueError(f"the marker of {place.image_id} is altered")
        rows = read_place(self._folder, place)
        if rows_digest(rows) != row["rows_digest"]:
            raise ValueError(f"{place.catalogue(self._folder)}: rows of {place.image_id} are altered")
        chunks: list[bytes | None] = []
        if place.n:
            shard = open_shard(place.stamps(self._folder))
            chunks = list(shard.chunks(place.chunk, place.chunk - (-place.n // CHUNK_ROWS)))
        if chunks_digest(chunks) != row["stamps_digest"]:
            raise ValueError(f"{place.stamps(self._folder)}: stamps of {place.image_id} are altered")
        if place.n:
            self._shapes[tuple(shard.kind["chunk"][1:])] += 1
        return rows, chunks

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks(), row_group_size=_ROW_GROUP)
            self._waiting = []


def _remove_loose(folder: RunFolder, done: Sequence[str], bad: Collection[str]) -> None:
    """Files of images that are in a pack now; and the markers of those that are altered."""
    for image_id in [*done, *bad]:
        folder.marker(image_id).unlink(missing_ok=True)
    for image_id in done:
        _remove_files(folder, image_id)


def _remove_files(folder: RunFolder, image_id: str) -> None:
    remove(folder.catalogue_part(image_id))
    remove(folder.stamps_part(image_id))


def _remove_pack(folder: RunFolder, pack: str) -> None:
    (folder.pack_marker(pack)).unlink(missing_ok=True)
    remove(folder.pack_catalogue(pack))
    remove(folder.pack_stamps(pack))


def _clock(folder: RunFolder) -> float:
    """What time it is for the file system that the run lies on, s."""
    path = folder.path / f"{TEMPORARY}{uuid.uuid4().hex}-clock"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _is_older(path: Path, when: float) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime < when
    return False


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
