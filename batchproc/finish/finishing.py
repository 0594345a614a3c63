"""One call that makes what a finished run is handed on as: a sky-partitioned catalogue, dense stamps, focal planes.

Each product carries the digest of what it was made from. One that is there, whole, and of these inputs is left as it
is; any other is made anew, from where a killed call stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from batchproc.display import show
from batchproc.distribute.clusters import Where, open_executor
from batchproc.distribute.executors import Executor
from batchproc.finish import focal, hats, hats_format
from batchproc.finish.rows import Scores, freeze_scores, survey_scores
from batchproc.finish.sky import require_healpix
from batchproc.finish.stamps import write_shard
from batchproc.finish.work import GROUP_ROWS, Job, carry_out, digest, groups_of, work_folder
from batchproc.io.atomic import remove
from batchproc.io.dense import Dense
from batchproc.io.progress import Index, iter_receipts, read_index
from batchproc.io.run_folder import RunFolder

__all__ = ["PRODUCTS", "Product", "finish", "plan"]

PRODUCTS = ("hats", "stamps", "focal-planes")
Item = TypeVar("Item")

_ROW_BYTES, _PLANE_BYTES, _COMPRESSION = 230, 60, 3.4  # about, of what is written
_FORM = "1"  # of what is written: another one makes older products count as outdated


@dataclass(frozen=True)
class Product:
    """What became of a product.

    Attributes
    ----------
    name : str
        One of `PRODUCTS`.
    path : Path
    state : {"made", "current", "empty", "to make"}
        Made now; made before, from what the run holds now; nothing to make it from; not made, or from less.
    rows, files, bytes : int
        That it has, or about will have.
    seconds : float
        That this call took for it.
    note : str
        What one should know of it.
    """

    name: str
    path: Path
    state: str
    rows: int = 0
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class _Work:
    """What the makers of products have in common."""

    folder: RunFolder
    index: Index
    executor: Executor
    threads: int
    quiet: bool

    def job(self, product: str, inputs: str) -> Job:
        """The job of a product's tasks, with a folder for what is not finished."""
        work = work_folder(self.folder, product, inputs)
        job = Job(str(self.folder.path.resolve()), str(work.resolve()), inputs, self.threads, self.executor.here)
        job.freeze(self.index)
        return job

    def step(self, function: Callable[[Job, Any], Any], job: Job, items: Sequence[Any], what: str) -> None:
        """Do the tasks of a step, and show how far they are."""
        for _ in show(carry_out(self.executor, function, job, items), len(items), what, quiet=self.quiet):
            pass


def finish(
    out: str | Path, *, only: Sequence[str] = PRODUCTS, where: Where | None = None, quiet: bool = False
) -> list[Product]:
    """Make the products of a run from what is done of it.

    Parameters
    ----------
    out : path
        A run folder that no other driver works on.
    only : sequence of {"hats", "stamps", "focal-planes"}
        By default all.
    where : Where, optional
        Where the tasks run; by default on this machine.
    quiet : bool
        Print nothing.

    Returns
    -------
    list of Product

    Raises
    ------
    UsageError
        No run folder, or one that another driver works on; no HEALPix arithmetic for ``hats``.
    """
    folder = RunFolder.existing(out)
    if "hats" in only:
        require_healpix()
    settings = folder.config()
    with folder.locked():
        index = read_index(folder)
        with open_executor(where or Where(), settings.threads) as executor:
            work = _Work(folder, index, executor, settings.threads, quiet)
            products = []
            for name in (name for name in PRODUCTS if name in only):
                start = time.monotonic()
                product = _MAKERS[name](work)
                products.append(replace(product, seconds=time.monotonic() - start))
        if not any((folder.path / "finishing").glob("*")):
            remove(folder.path / "finishing")
    return products


def plan(out: str | Path, *, only: Sequence[str] = PRODUCTS) -> list[Product]:
    """What `finish` would do: products with state ``"to make"``, and about how large they will be; writes nothing."""
    folder = RunFolder.existing(out)
    index = read_index(folder)
    return [_SURVEYS[name](folder, index) for name in PRODUCTS if name in only]


def _survey_hats(folder: RunFolder, index: Index) -> Product:
    target = folder.path / "hats"
    inputs = _hats_inputs(index, survey_scores(folder, index))
    said = hats_format.read_properties(target)
    if said.get("batchproc_inputs") == inputs and not hats_format.damaged_partitions(target):
        nowhere = int(said["batchproc_rows_without_position"])
        return _counted(Product("hats", target, "current", int(said["hats_nrows"]), note=_without_position(nowhere)))
    if not len(index):
        return Product("hats", target, "empty", note="no candidates")
    files = 2 * math.ceil(len(index) / hats.ROWS) + 5
    return Product("hats", target, "to make", len(index), files, int(_ROW_BYTES * len(index)))


def _hats_inputs(index: Index, scores: Sequence[Scores]) -> str:
    return digest(_FORM, str(hats.ROWS), done_digest(index), *map(str, scores))


def _make_hats(work: _Work) -> Product:
    found = _survey_hats(work.folder, work.index)
    if found.state != "to make":
        return found
    scores = survey_scores(work.folder, work.index)
    inputs = _hats_inputs(work.index, scores)
    job = work.job("hats", inputs)
    freeze_scores(job, scores)
    groups = groups_of(work.index, GROUP_ROWS)
    work.step(hats.histogram, job, missing(job, groups, lambda g: g.histogram), "groups counted")
    pieces, nowhere = hats.plan_partitions(job, groups, hats.ROWS)
    if not pieces:
        remove(Path(job.work))
        return Product("hats", found.path, "empty", note=_without_position(nowhere))
    work.step(hats.split, job, missing(job, groups, lambda g: g.split), "groups split")
    work.step(hats.merge, job, missing(job, pieces, lambda p: p.path), "partitions")
    about = {"batchproc_inputs": inputs, "batchproc_rows_without_position": str(nowhere)}
    work.step(hats.publish, job, [about], "catalogues")
    remove(Path(job.work))
    return replace(_survey_hats(work.folder, work.index), state="made")


def _dense(folder: RunFolder, index: Index) -> Dense:
    size = folder.config().cutouts.size
    return Dense(folder.path / "stamps.zarr", len(index), size, digest(_FORM, str(size), done_digest(index)))


def _survey_stamps(folder: RunFolder, index: Index) -> Product:
    dense = _dense(folder, index)
    if dense.n == 0:
        return Product("stamps", dense.store, "empty", note="no candidates")
    if dense.is_published() and not _unwritten(dense):
        return _counted(Product("stamps", dense.store, "current", dense.n))
    bytes_of = 12 * dense.size**2 / _COMPRESSION
    return Product("stamps", dense.store, "to make", dense.n, dense.n_shards + 2, int(bytes_of * dense.n))


def _make_stamps(work: _Work) -> Product:
    found = _survey_stamps(work.folder, work.index)
    if found.state != "to make":
        return found
    dense = _dense(work.folder, work.index)
    dense.begin()
    job = work.job("stamps", dense.inputs)
    work.step(partial(_write_shard, dense), job, _unwritten(dense), "shards")
    dense.publish()
    remove(Path(job.work))
    return replace(_survey_stamps(work.folder, work.index), state="made")


def _unwritten(dense: Dense) -> list[int]:
    return [number for number in range(dense.n_shards) if not dense.is_whole(number)]


def _write_shard(dense: Dense, job: Job, number: int) -> None:
    write_shard(job, dense, number)


def _survey_focal_planes(folder: RunFolder, index: Index) -> Product:
    target = folder.path / "focal_planes.parquet"
    rows = pq.read_metadata(folder.manifest).num_rows
    if target.is_file():
        said = pq.read_schema(target).metadata or {}
        if said.get(b"batchproc_inputs", b"").decode() == _focal_inputs(folder, index):
            return replace(Product("focal-planes", target, "current", rows), files=1, bytes=target.stat().st_size)
    return Product("focal-planes", target, "to make", rows, 1, _PLANE_BYTES * rows)


def _focal_inputs(folder: RunFolder, index: Index) -> str:
    tried = (f"{r.image_id} {r.status} {r.n_candidates} {r.error} {r.message}" for r in iter_receipts(folder))
    return digest(_FORM, done_digest(index), *sorted(tried))


def _make_focal_planes(work: _Work) -> Product:
    found = _survey_focal_planes(work.folder, work.index)
    if found.state != "to make":
        return found
    job = work.job("focal-planes", _focal_inputs(work.folder, work.index))
    groups = groups_of(work.index, GROUP_ROWS)
    work.step(focal.count, job, missing(job, groups, lambda g: g.counts), "groups counted")
    work.step(focal.write_table, job, [groups], "tables")
    remove(Path(job.work))
    return replace(_survey_focal_planes(work.folder, work.index), state="made")


def missing(job: Job, items: Sequence[Item], name: Callable[[Item], str]) -> list[Item]:
    """The tasks of a step whose file is not there."""
    return [item for item in items if not job.path(name(item)).is_file()]


def done_digest(index: Index) -> str:
    """Tells which images are done, and how many rows each has."""
    return digest(*index.image_ids, *map(str, index.offsets.tolist()))


def _without_position(n: int) -> str:
    return f"{n} candidates without a position on the sky are in the catalogue alone" if n else ""


def _counted(product: Product) -> Product:
    files = [path for path in product.path.rglob("*") if path.is_file()]
    return replace(product, files=len(files), bytes=sum(path.stat().st_size for path in files))


_SURVEYS = {"hats": _survey_hats, "stamps": _survey_stamps, "focal-planes": _survey_focal_planes}
_MAKERS = {"hats": _make_hats, "stamps": _make_stamps, "focal-planes": _make_focal_planes}
