"""What a long run leaves on the disk, and how long it takes to look at it, to open it, and to go on with it."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks._fresh import run_fresh
from tests.benchmarks._watch import MB


@dataclass(frozen=True)
class Left:
    """Inodes and bytes of a run folder by what they are for."""

    inodes: Counter[str]
    size: Counter[str]

    @property
    def files(self) -> int:
        """Files and folders: what a quota counts."""
        return self.inodes.total()


def count(run: Path) -> Left:
    """Walk through a run folder; links are not followed."""
    inodes: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for where, folders, files in os.walk(run):
        inside = Path(where).relative_to(run).parts
        for name in [*folders, *files]:
            kind = inside[0] if inside else name if name in folders else "the run's own"
            inodes[kind] += 1
            if name in files:
                size[kind] += os.lstat(os.path.join(where, name)).st_size
    return Left(inodes, size)


def times(run: Path) -> dict[str, dict[str, float]]:
    """Seconds, CPU seconds and MB of each way to look at a run, each in a process of its own."""
    ways = ("status", "catalogue", "one_image", "stamps", "index")
    return {way: run_fresh(f"tests.benchmarks._left_behind:{way}", run=str(run)) for way in ways}


def status(run: str) -> dict[str, float]:
    """``batchproc status``."""
    from batchproc.io.run_folder import RunFolder
    from batchproc.io.status import read_status

    return _measured(lambda: read_status(RunFolder(Path(run))))


def index(run: str) -> dict[str, float]:
    """Where every image's results are."""
    from batchproc.io.index import read_index
    from batchproc.io.run_folder import RunFolder

    return _measured(lambda: read_index(RunFolder(Path(run))))


def catalogue(run: str) -> dict[str, float]:
    """Five columns of all rows."""
    from batchproc import open_catalogue

    return _measured(lambda: open_catalogue(run, columns=["candidate_id", "ra", "dec", "scorr", "stamp_index"]))


def one_image(run: str) -> dict[str, float]:
    """The rows above a threshold."""
    from batchproc import open_catalogue

    return _measured(lambda: open_catalogue(run, columns=["ra", "dec"], filters=[("scorr", ">=", 4)]))


def stamps(run: str) -> dict[str, float]:
    """To open the stamps, and to read a hundred of them anywhere."""
    from batchproc import open_stamps

    def work() -> None:
        opened = open_stamps(run)
        opened[np.sort(np.random.default_rng(0).integers(0, len(opened), 100))]

    return _measured(work)


def resume(run: str, manifest: str) -> dict[str, float]:
    """A driver that goes on: seconds until its cluster is asked for, and until the first image goes out."""
    from batchproc import job
    from batchproc.distribute import campaign
    from tests.benchmarks import _planned

    marks: dict[str, float] = {}
    start, cpu = time.perf_counter(), time.process_time()

    def mark(where: Any, name: str, as_what: str) -> None:
        original = getattr(where, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            marks.setdefault(as_what, time.perf_counter() - start)
            marks.setdefault(f"{as_what}_cpu", time.process_time() - cpu)
            return original(*arguments, **options)

        setattr(where, name, marked)

    mark(job, "open_executor", "ready")
    mark(campaign._Campaign, "submit", "submitted")
    job.run(
        manifest,
        run,
        workers=1,
        report=False,
        quiet=True,
        steps=job.Steps(process=_planned.few_candidates, wisdom=_planned.no_wisdom),
    )
    return {**marks, "all": time.perf_counter() - start}


def _measured(work: Any) -> dict[str, float]:
    from tests.benchmarks._fresh import Peak

    peak = Peak()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "MB": peak.total_mb() * 2**20 / MB,
    }
