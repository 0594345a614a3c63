"""The catalogue cut by the sky: a HATS catalogue, which LSDB opens, in steps that workers do.

::

    histogram   a group of images → how many rows each cell of the sky has
    split       a group of images → its rows, scores joined, one record batch for each partition
    merge       a partition       → the batches of all groups, sorted: dataset/Norder=K/Dir=D/Npix=N.parquet
    publish                       → the metadata; then the folder gets its name

The partitions are the largest HEALPix cells of at most so many rows. A task holds one group or one partition, the
driver the histogram and names. The form of what is written is in `batchproc.finish.hats_format`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchproc.finish import hats_format
from batchproc.finish.rows import freeze_scores, frozen_scores, read_scored_rows, scored_schema, survey_scores
from batchproc.finish.sky import HISTOGRAM_ORDER, INDEX_ORDER, Cell, cell_of, partition, spatial_index
from batchproc.finish.work import Contents, Group, Job, Product, Workshop, counted, digest, groups_of, missing
from batchproc.io.atomic import rename, replacing, write_text
from batchproc.io.catalogue import read_rows

__all__ = ["ROWS", "make_hats", "survey_hats"]

#: The most rows of a partition.
ROWS = 500_000

_FORM = "1"  # of what is written: with another one older catalogues are made anew
_ROW_BYTES = 230  # about, of what is written
_TO_HISTOGRAM = 2 * (INDEX_ORDER - HISTOGRAM_ORDER)


def survey_hats(contents: Contents) -> Product:
    """What there is of the catalogue, and what there will be; reads no rows."""
    return _survey(contents, _inputs(contents))


def make_hats(shop: Workshop) -> Product:
    """Make the catalogue, unless it is there and what the run holds now."""
    contents = shop.contents
    inputs = _inputs(contents)
    found = _survey(contents, inputs)
    if found.state != "to make":
        return found
    job = shop.job("hats", inputs)
    freeze_scores(job, survey_scores(contents))
    groups = groups_of(contents.index)
    shop.step(histogram, job, missing(job, groups, lambda group: group.histogram), "groups counted")
    pieces, nowhere = plan_partitions(job, groups, ROWS)
    if pieces:
        shop.step(split, job, missing(job, groups, lambda group: group.split), "groups split")
        shop.step(merge, job, missing(job, pieces, lambda piece: piece.path), "partitions")
        about = {"batchproc_inputs": inputs, "batchproc_rows_without_position": str(nowhere)}
        shop.step(publish, job, [about], "catalogues")
        found = replace(_survey(contents, inputs), state="made")
    else:
        found = Product("hats", found.path, "empty", note=_without_position(nowhere))
    return found


def _inputs(contents: Contents) -> str:
    return digest(_FORM, str(ROWS), contents.digest, *map(str, survey_scores(contents)))


def _survey(contents: Contents, inputs: str) -> Product:
    target, n = contents.folder.path / "hats", len(contents.index)
    said = hats_format.read_properties(target)
    if said.get("batchproc_inputs") == inputs and hats_format.is_whole(target):
        note = _without_position(int(said["batchproc_rows_without_position"]))
        return counted(Product("hats", target, "current", int(said["hats_nrows"]), note=note))
    if n == 0:
        return Product("hats", target, "empty", note="no candidates")
    return Product("hats", target, "to make", n, 2 * math.ceil(n / ROWS) + 5, _ROW_BYTES * n)


def _without_position(n: int) -> str:
    return f"{n} candidates without a position on the sky are in the catalogue alone" if n else ""


@dataclass(frozen=True)
class Piece:
    """One partition: its number in the order of the sky, and the groups that have rows of it."""

    number: int
    cell: Cell
    rows: int
    groups: tuple[Group, ...]

    @property
    def path(self) -> str:
        """Its file, before the catalogue gets its name."""
        return str(hats_format.partition_path(Path("new"), self.cell))


def histogram(job: Job, group: Group) -> None:
    """Count the rows of a group in each cell of order `HISTOGRAM_ORDER`, and those without a position."""
    rows = read_rows(job.folder, job.images(group.first, group.last).places, ["ra", "dec"])
    index = spatial_index(rows["ra"].to_numpy(), rows["dec"].to_numpy())
    pixels, counts = np.unique(index[index >= 0] >> _TO_HISTOGRAM, return_counts=True)
    with replacing(job.path(group.histogram)) as temporary, temporary.open("wb") as file:
        np.savez(file, pixels=pixels, counts=counts, nowhere=np.count_nonzero(index < 0))


def plan_partitions(job: Job, groups: Sequence[Group], rows: int) -> tuple[list[Piece], int]:
    """The partitions that the histograms ask for, written down for the workers; and how many rows have no position."""
    total = np.zeros(12 * 4**HISTOGRAM_ORDER, np.uint32)  # 50 MB, however large the run is
    nowhere = 0
    for _, pixels, counts, lost in _histograms(job, groups):
        total[pixels] += counts.astype(np.uint32)
        nowhere += lost
    occupied = np.flatnonzero(total)
    cells = partition(occupied, total[occupied].astype(np.int64), rows)
    names = list(cells)
    members: list[list[Group]] = [[] for _ in names]
    for group, pixels, _, _ in _histograms(job, groups):
        for number in np.unique(cell_of(pixels << _TO_HISTOGRAM, names)):
            members[number].append(group)
    write_text(job.path("partitions.json"), json.dumps([[cell.order, cell.pixel, n] for cell, n in cells.items()]))
    pieces = [Piece(i, cell, cells[cell], tuple(members[i])) for i, cell in enumerate(names)]
    return pieces, nowhere


@lru_cache(maxsize=1)
def _partitions(path: Path) -> dict[Cell, int]:
    return {Cell(order, pixel): n for order, pixel, n in json.loads(path.read_text())}


def _histograms(job: Job, groups: Sequence[Group]) -> Iterator[tuple[Group, NDArray, NDArray, int]]:
    for group in groups:
        with np.load(job.path(group.histogram)) as counted:
            yield group, counted["pixels"], counted["counts"], int(counted["nowhere"])


def split(job: Job, group: Group) -> None:
    """Read the rows of a group once, and write them as one Arrow record batch for each partition.

    Record batches are found by their number alone, however many there are; the numbers of their partitions are in the
    schema's metadata. (A row group of Parquet costs kilobytes in a footer that every reader takes in whole.)
    """
    rows = read_scored_rows(job, job.images(group.first, group.last))
    index = spatial_index(rows["ra"].to_numpy(), rows["dec"].to_numpy())
    rows = rows.add_column(0, hats_format.INDEX_FIELD, pa.array(index))
    owner = np.where(index < 0, -1, cell_of(index, list(_partitions(job.path("partitions.json")))))
    order = np.argsort(owner, kind="stable")  # stable: within a partition rows stay in the order of the run
    order = order[np.count_nonzero(index < 0) :]
    numbers, starts = np.unique(owner[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    schema = rows.schema.with_metadata({"partitions": numbers.astype(np.int32).tobytes()})
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with (
        replacing(job.path(group.split)) as temporary,
        pa.ipc.new_file(str(temporary), schema, options=options) as file,
    ):
        for start, end in zip(starts, ends, strict=True):
            here = rows.take(order[start:end]).combine_chunks().replace_schema_metadata(schema.metadata)
            file.write_batch(here.to_batches()[0])


def merge(job: Job, piece: Piece) -> None:
    """Bring the rows of a partition together, sorted by the spatial index.

    Rows of one index keep the order of the run, so what is written does not depend on how it was grouped.
    """
    batches = []
    for group in piece.groups:
        with pa.memory_map(str(job.path(group.split))) as source:
            file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(use_threads=False))
            there = np.frombuffer(file.schema.metadata[b"partitions"], np.int32)
            batches.append(file.get_batch(int(np.searchsorted(there, piece.number))))
    rows = pa.Table.from_batches(batches).replace_schema_metadata(None)
    if len(rows) != piece.rows:
        raise RuntimeError(f"{piece.cell}: {len(rows)} rows came, {piece.rows} were counted")
    order = np.argsort(rows[hats_format.INDEX_COLUMN].to_numpy(), kind="stable")
    hats_format.write_partition(job.path("new"), piece.cell, rows, order)


def publish(job: Job, about: dict[str, str]) -> None:
    """Write the catalogue's metadata, and give the folder its name in place of an older one.

    Done twice, where the worker died that had done it, it is done once.

    Raises
    ------
    RuntimeError
        A partition does not have the rows that were counted.
    """
    new, target = job.path("new"), job.folder.path / "hats"
    if not new.exists() and hats_format.read_properties(target).get("batchproc_inputs") == job.inputs:
        return
    schema = pa.schema([hats_format.INDEX_FIELD, *scored_schema(frozen_scores(job))])
    name = job.folder.path.resolve().name
    hats_format.write_metadata(new, _partitions(job.path("partitions.json")), schema, name, about)
    rename(new, target)
