"""One call that makes what a finished run is handed on as: a sky-partitioned catalogue, dense stamps, focal planes.

Each product carries the digest of what it was made from. One that is there, whole, and of these inputs is left as it
is; any other is made anew, from where a killed call stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from batchproc.display import show
from batchproc.distribute.clusters import Where, open_executor
from batchproc.distribute.executors import Executor
from batchproc.finish import hats, hats_format
from batchproc.finish.rows import freeze_scores, survey_scores
from batchproc.finish.sky import require_healpix
from batchproc.finish.stamps import write_shard
from batchproc.finish.work import Job, carry_out, digest, groups_of, work_folder
from batchproc.io.atomic import remove
from batchproc.io.dense import Dense
from batchproc.io.progress import Index, read_index
from batchproc.io.run_folder import RunFolder

__all__ = ["PRODUCTS", "Product", "finish"]

PRODUCTS = ("hats", "stamps", "focal-planes")
Item = TypeVar("Item")

_FORM = "1"  # of what is written: another one makes older products count as outdated


@dataclass(frozen=True)
class Product:
    """What became of a product.

    Attributes
    ----------
    name : str
        One of `PRODUCTS`.
    path : Path
    state : {"made", "current", "empty"}
        Made now; made before, from what the run holds now; nothing to make it from.
    rows, files, bytes : int
        That it has.
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
        job = Job(str(self.folder.path.resolve()), str(work.resolve()), self.threads, self.executor.here)
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


def _make_hats(work: _Work) -> Product:
    target = work.folder.path / "hats"
    scores = survey_scores(work.folder, work.index)
    inputs = digest(_FORM, str(hats.ROWS), done_digest(work.index), *map(str, scores))
    said = hats_format.read_properties(target)
    current = said.get("batchproc_inputs") == inputs and not hats_format.damaged_partitions(target)
    if not current:
        groups = [hats.Group(i, *span) for i, span in enumerate(groups_of(work.index, hats.ROWS))]
        if not groups:
            return Product("hats", target, "empty", note="no candidates")
        job = work.job("hats", inputs)
        freeze_scores(job, scores)
        work.step(hats.histogram, job, missing(job, groups, lambda g: g.histogram), "groups counted")
        pieces, nowhere = hats.plan_partitions(job, groups, hats.ROWS)
        if not pieces:
            return Product("hats", target, "empty", note=_without_position(nowhere))
        work.step(hats.split, job, missing(job, groups, lambda g: g.split), "groups split")
        work.step(hats.merge, job, missing(job, pieces, lambda p: p.path), "partitions")
        about = {"batchproc_inputs": inputs, "batchproc_rows_without_position": str(nowhere)}
        work.step(hats.publish, job, [about], "catalogues")
        remove(Path(job.work))
        said = hats_format.read_properties(target)
    nowhere = int(said["batchproc_rows_without_position"])
    return _counted(
        Product("hats", target, "current" if current else "made", int(said["hats_nrows"])), _without_position(nowhere)
    )


def _make_stamps(work: _Work) -> Product:
    target = work.folder.path / "stamps.zarr"
    size = work.folder.config().cutouts.size
    dense = Dense(target, len(work.index), size, digest(_FORM, str(size), done_digest(work.index)))
    if dense.n == 0:
        return Product("stamps", target, "empty", note="no candidates")
    wanting = [i for i in range(dense.n_shards) if not dense.is_whole(i)]
    current = dense.is_published() and not wanting
    if not current:
        dense.begin()
        wanting = [i for i in range(dense.n_shards) if not dense.is_whole(i)]
        job = work.job("stamps", dense.inputs)
        work.step(partial(_write_shard, dense), job, wanting, "shards")
        dense.publish()
        remove(Path(job.work))
    return _counted(Product("stamps", target, "current" if current else "made", dense.n))


def _write_shard(dense: Dense, job: Job, number: int) -> None:
    write_shard(job, dense, number)


def missing(job: Job, items: Sequence[Item], name: Callable[[Item], str]) -> list[Item]:
    """The tasks of a step whose file is not there."""
    return [item for item in items if not job.path(name(item)).is_file()]


def done_digest(index: Index) -> str:
    """Tells which images are done, and how many rows each has."""
    return digest(*index.image_ids, *map(str, index.offsets.tolist()))


def _without_position(n: int) -> str:
    return f"{n} candidates without a position on the sky are in the catalogue alone" if n else ""


def _counted(product: Product, note: str = "") -> Product:
    files = [path for path in product.path.rglob("*") if path.is_file()]
    return replace(product, files=len(files), bytes=sum(path.stat().st_size for path in files), note=note)


_MAKERS = {"hats": _make_hats, "stamps": _make_stamps}
