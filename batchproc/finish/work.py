"""What all products have in common: the images they are made of, tasks that write files, and steps of such tasks.

A step is a list of tasks each of which writes one file, whole or not at all, in a folder that carries the digest of the
inputs in its name. What is there under its final name is done: a killed step goes on with the files that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.display import show
from batchproc.distribute.executors import Executor, WorkerDiedError, sliding
from batchproc.distribute.memory import keep_freed_memory
from batchproc.distribute.threads import limit_threads
from batchproc.distribute.transient import is_transient
from batchproc.io.atomic import our_disk, remove, remove_leftovers, replacing
from batchproc.io.index import Index, Place, iter_markers, read_index, results_digest
from batchproc.io.run_folder import RunFolder

__all__ = [
    "GROUP_ROWS",
    "Contents",
    "Group",
    "Images",
    "Job",
    "Product",
    "Workshop",
    "counted",
    "digest",
    "groups_of",
    "missing",
]

#: About the rows of a group: 200 MB of memory while they are split.
GROUP_ROWS = 250_000

_TRIES = 3  # of a task: a node may be lost or a file server away; a task that needs too much fails again
_BACKOFF_S = 5.0
_ROW_GROUP = 10_000
_DIGESTS = ["rows_digest", "stamps_digest"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Product:
    """What became of a product, or will.

    Attributes
    ----------
    name : {"hats", "stamps", "focal-planes"}
    path : Path
    state : {"made", "current", "empty", "to make"}
        Made now; made before, from what the run holds now; nothing to make it from; not made, or from something else.
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
class Images:
    """Whole images that follow each other in the run, and where their rows are counted from.

    Attributes
    ----------
    begin : int
        Place of the first among all finished images that have candidates.
    places : list of Place
    offsets : ndarray (n + 1,) int64
        ``stamp_index`` of the first row of each, and that after the last row of all.
    rows_digests, stamps_digests : list of str
        What the done-marker of each says of its contents.
    """

    begin: int
    places: list[Place]
    offsets: NDArray[np.int64]
    rows_digests: list[str]
    stamps_digests: list[str]


@dataclass(frozen=True)
class Group:
    """Whole images that one task reads: the rows ``[first, last)`` of the run; and the files that tasks make of it."""

    number: int
    first: int
    last: int

    @property
    def histogram(self) -> str:
        """Its rows on the sky, counted."""
        return f"histogram-{self.number:06d}.npz"

    @property
    def split(self) -> str:
        """Its rows, by partition."""
        return f"split-{self.number:06d}.arrow"

    @property
    def counts(self) -> str:
        """The candidates of each image, counted."""
        return f"counts-{self.number:06d}.npz"


@dataclass(frozen=True)
class Job:
    """What all tasks of a product share: a few paths, however large the run is.

    Attributes
    ----------
    run, work : str
        The run folder, and the product's own folder in it.
    inputs : str
        Digest of what the product is made from.
    threads : int
        For every library of a worker.
    here : bool
        The tasks run in the driver's process, which keeps its settings.
    """

    run: str
    work: str
    inputs: str
    threads: int = 1
    here: bool = False

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(Path(self.run))

    def path(self, name: str) -> Path:
        """A file of the product's work."""
        return Path(self.work) / name

    def images(self, first: int, last: int) -> Images:
        """The images that have any of the rows ``[first, last)`` of the run, as they were written down for tasks."""
        path = self.path("images.parquet")
        offsets = _offsets(path)
        begin = int(np.searchsorted(offsets, first, side="right")) - 1
        end = int(np.searchsorted(offsets, last, side="left"))
        with pq.ParquetFile(path) as file:
            groups = list(range(begin // _ROW_GROUP, -(-end // _ROW_GROUP)))
            table = file.read_row_groups(groups, use_threads=False).slice(begin % _ROW_GROUP, end - begin)
        n = np.diff(offsets[begin : end + 1]).tolist()
        names = ("image_id", "pack", "row", "chunk", *_DIGESTS)
        ids, packs, rows, chunks, rows_digests, stamps_digests = (table[name].to_pylist() for name in names)
        places = [Place(*values) for values in zip(ids, n, packs, rows, chunks, strict=True)]
        return Images(begin, places, offsets[begin : end + 1], rows_digests, stamps_digests)

    def prepare(self) -> None:
        """Once in the life of a worker: its threads and its memory."""
        if not self.here:
            _prepare(self.threads)


@lru_cache(maxsize=1)
def _offsets(path: Path) -> NDArray[np.int64]:
    table = pq.read_table(path, columns=["first"], use_threads=False)
    return np.append(table["first"].to_numpy(), int(table.schema.metadata[b"rows"]))


@lru_cache(maxsize=1)
def _prepare(threads: int) -> None:
    limit_threads(threads)
    keep_freed_memory()
    pa.set_cpu_count(threads)


@dataclass(frozen=True)
class Contents:
    """A run as it is now: its finished images, where they lie, and a digest of their results, wherever they lie."""

    folder: RunFolder
    index: Index
    digest: str

    @classmethod
    def of(cls, folder: RunFolder) -> Contents:
        """Read the done-markers of a run."""
        return cls(folder, read_index(folder), results_digest(folder))


@dataclass(frozen=True)
class Workshop:
    """What the makers of products share: the run, and who does the tasks."""

    contents: Contents
    executor: Executor
    threads: int
    quiet: bool

    def job(self, product: str, inputs: str) -> Job:
        """The job of a product's tasks, with a folder for what is not finished; other unfinished work on it goes."""
        folder = self.contents.folder
        work = folder.path / "finishing" / f"{product}-{inputs}"
        self.clear(product, but=work)
        work.mkdir(parents=True, exist_ok=True)
        job = Job(str(folder.path.resolve()), str(work.resolve()), inputs, self.threads, self.executor.here)
        self._write_images(job.path("images.parquet"))
        return job

    def clear(self, product: str, but: Path | None = None) -> None:
        """Remove what is left of the work on a product."""
        everything = self.contents.folder.path / "finishing"
        for path in everything.glob(f"{product}-*"):
            if path != but:
                remove(path)
        remove_leftovers(everything)
        with suppress(OSError):  # not there, or another product's work is in it
            everything.rmdir()

    def step(self, function: Callable[[Job, Any], Any], job: Job, items: Sequence[Any], what: str) -> None:
        """Do the tasks of a step, and show how far they are.

        An error of a task ends it, and what is done stays. A disk that is full or broken is a `StorageError`.
        """
        tasks = _carry_out(self.executor, partial(_prepared, function, job), items)
        for _ in show(tasks, len(items), what, quiet=self.quiet):
            pass

    def _write_images(self, path: Path) -> None:
        """Write down what the product is made of and where it lies now: a task reads what it needs of it."""
        digests = pa.concat_tables(iter_markers(self.contents.folder, ["image_id", *_DIGESTS]))
        index = self.contents.index
        table = pa.table(
            {
                "image_id": pa.array(index.image_ids, pa.string()),
                "first": index.offsets[:-1],
                "pack": pa.array([index.packs[i] if i >= 0 else "" for i in index.pack.tolist()], pa.string()),
                "row": index.row,
                "chunk": index.chunk,
            }
        )
        rows = pc.index_in(table["image_id"], digests["image_id"].combine_chunks())
        for name in _DIGESTS:
            table = table.append_column(name, digests[name].take(rows))
        with replacing(path) as temporary:
            metadata = {"rows": str(len(index))}
            pq.write_table(
                table.replace_schema_metadata(metadata), temporary, compression="zstd", row_group_size=_ROW_GROUP
            )


def groups_of(index: Index, rows: int = GROUP_ROWS) -> list[Group]:
    """All images in groups with about so many rows each."""
    cuts = [0]
    for end in index.offsets[1:].tolist():
        if end - cuts[-1] >= rows:
            cuts.append(end)
    if cuts[-1] < len(index):
        cuts.append(len(index))
    return [Group(number, *span) for number, span in enumerate(pairwise(cuts))]


def missing(job: Job, items: Sequence[Item], name: Callable[[Item], str]) -> list[Item]:
    """The tasks of a step whose file is not there."""
    return [item for item in items if not job.path(name(item)).is_file()]


def counted(product: Product) -> Product:
    """The same with the files and bytes of its folder."""
    files = [path for path in product.path.rglob("*") if path.is_file()]
    return replace(product, files=len(files), bytes=sum(path.stat().st_size for path in files))


def digest(*parts: str) -> str:
    """A short name for exactly these texts."""
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def _prepared(function: Callable[[Job, Item], Any], job: Job, item: Item) -> Any:
    job.prepare()
    with our_disk(job.folder.path):
        return function(job, item)


def _carry_out(executor: Executor, function: Callable[[Item], Any], items: Sequence[Item]) -> Iterator[Item]:
    """Yields each item when its task is done.

    One whose worker died, or whose error may heal by itself, is tried again when the others are done.
    """
    left = list(items)
    for attempt in range(1, _TRIES + 1):
        again = []
        for item, outcome in sliding(executor, function, left):
            error = outcome.error
            if error is None:
                yield item
            elif attempt < _TRIES and (isinstance(error, WorkerDiedError) or is_transient(error)):
                again.append(item)
            else:
                raise error
        left = again
        if left:
            time.sleep(_BACKOFF_S * attempt)
