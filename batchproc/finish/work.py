"""What all products have in common: the images they are made of, tasks that write files, and steps of such tasks.

A step is a list of tasks each of which writes one file, whole or not at all, in a folder that carries the digest of the
inputs in its name. What is there under its final name is done: a killed step goes on with the files that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.distribute.executors import Executor, WorkerDiedError, sliding
from batchproc.distribute.memory import keep_freed_memory
from batchproc.distribute.threads import limit_threads
from batchproc.io.atomic import remove, replacing
from batchproc.io.progress import Index
from batchproc.io.run_folder import RunFolder

__all__ = ["GROUP_ROWS", "Group", "Images", "Job", "carry_out", "digest", "groups_of", "work_folder"]

#: About the rows of a group: 200 MB in memory, with all columns.
GROUP_ROWS = 500_000

Item = TypeVar("Item")

_TRIES = 3  # of a task whose worker dies: a node may be lost, a task that needs too much dies again


@dataclass(frozen=True)
class Images:
    """Whole images that follow each other in the run, and where their rows are counted from.

    Attributes
    ----------
    image_ids : tuple of str
    offsets : ndarray (n + 1,) int64
        ``stamp_index`` of the first row of each, and that after the last row of all.
    """

    image_ids: tuple[str, ...]
    offsets: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        """Rows of all of them."""
        return int(self.offsets[-1] - self.offsets[0])

    def place(self, some: Images) -> int:
        """Where in these images some of them begin."""
        return int(np.searchsorted(self.offsets, some.offsets[0], side="left"))

    def overlapping(self, first: int, last: int) -> Images:
        """Those that have any of the rows ``[first, last)`` of the run."""
        begin = int(np.searchsorted(self.offsets, first, side="right")) - 1
        end = int(np.searchsorted(self.offsets, last, side="left"))
        return Images(self.image_ids[begin:end], self.offsets[begin : end + 1])


@dataclass(frozen=True)
class Job:
    """What all tasks of a product share: a few paths, however large the run is.

    Attributes
    ----------
    run, work : str
        The run folder, and the product's own folder in it (`work_folder`).
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

    def freeze(self, index: Index) -> None:
        """Write down which images the product is made of: workers read from it what a task needs."""
        if not self.path("images.parquet").is_file():
            table = pa.table({"image_id": pa.array(index.image_ids, pa.string()), "first": index.offsets[:-1]})
            table = table.replace_schema_metadata({"rows": str(len(index))})
            with replacing(self.path("images.parquet")) as temporary:
                pq.write_table(table, temporary, compression="zstd", row_group_size=10_000)

    def images(self) -> Images:
        """All images, as they were frozen."""
        self.prepare()
        return _images(self.path("images.parquet"))

    def prepare(self) -> None:
        """Once in the life of a worker: its threads and its memory."""
        if not self.here:
            _prepare(self.threads)


@lru_cache(maxsize=1)
def _images(path: Path) -> Images:
    table = pq.read_table(path, use_threads=False)
    offsets = np.append(table["first"].to_numpy(), int(table.schema.metadata[b"rows"]))
    return Images(tuple(table["image_id"].to_pylist()), offsets)


@lru_cache(maxsize=1)
def _prepare(threads: int) -> None:
    limit_threads(threads)
    keep_freed_memory()
    pa.set_cpu_count(threads)


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


def work_folder(folder: RunFolder, product: str, inputs: str) -> Path:
    """Where the unfinished work on a product lies; what was begun from other inputs is removed."""
    path = folder.path / "finishing" / f"{product}-{inputs}"
    for other in path.parent.glob(f"{product}-*"):
        if other != path:
            remove(other)
    path.mkdir(parents=True, exist_ok=True)
    return path


def groups_of(index: Index, rows: int) -> list[Group]:
    """All images in groups with about so many rows each."""
    cuts = [0]
    for end in index.offsets[1:].tolist():
        if end - cuts[-1] >= rows:
            cuts.append(end)
    if cuts[-1] < len(index):
        cuts.append(len(index))
    return [Group(number, *span) for number, span in enumerate(pairwise(cuts))]


def carry_out(
    executor: Executor, function: Callable[[Job, Item], Any], job: Job, items: Sequence[Item]
) -> Iterator[tuple[Item, Any]]:
    """Do a step: yields (item, result) as the tasks finish. An error of a task ends it, with what is done kept.

    A task whose worker died is tried again, `_TRIES` times in all.
    """
    left = list(items)
    for attempt in range(1, _TRIES + 1):
        lost = []
        for item, outcome in sliding(executor, partial(function, job), left):
            if isinstance(outcome.error, WorkerDiedError) and attempt < _TRIES:
                lost.append(item)
            elif outcome.error is not None:
                raise outcome.error
            else:
                yield item, outcome.value
        left = lost


def digest(*parts: str) -> str:
    """A short name for exactly these texts."""
    return sha256("\0".join(parts).encode()).hexdigest()[:16]
