"""What a campaign costs beside the work on its images: CPU an image, and the memory of who drives it.

The images are planned and never looked at; everything else is a run. A driver with its scheduler (one process, as on a
queue) and its workers are processes of their own. CPU time is that of the processes, by the kernel's account, without
what the tasks measured of themselves (the stub, and storing what it makes up).
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchproc.distribute import packing
from batchproc.distribute.tasks import pack_images, process_trial
from tests.benchmarks._watch import Memory, run_watched


@dataclass(frozen=True)
class Overhead:
    """What was measured of a campaign.

    Attributes
    ----------
    images, tasks : int
        Images that were done, and calls in which they went to the workers.
    seconds : float
        Of the campaign, from the call to its return.
    driver_ms, worker_ms, task_ms, pack_ms : float
        CPU milliseconds an image: of the driver with its scheduler; of the workers without the tasks; of the tasks, and
        of the roll-ups.
    start_cpu : float
        CPU seconds of the driver before its first image: imports, the manifest, freezing the run.
    driver, worker : Memory
        Of the driver with its scheduler, and of the largest worker.
    """

    images: int
    tasks: int
    seconds: float
    driver_ms: float
    worker_ms: float
    task_ms: float
    pack_ms: float
    start_cpu: float
    driver: Memory
    worker: Memory

    @property
    def overhead_ms(self) -> float:
        """CPU milliseconds an image that are not the task's."""
        return self.driver_ms + self.worker_ms


def measure(
    images: int, out: Path, *, stored: bool = True, batched: bool = True, workers: int = 2, planned: int | None = None
) -> Overhead:
    """Run a planned campaign.

    Parameters
    ----------
    images : int
    out : Path
        An empty folder, on a disk that is quick or in memory.
    stored : bool
        The few made-up candidates of each image go to the disk, with markers, and are packed.
    batched : bool
        As usual; else each image is a task.
    workers : int
        Processes.
    planned : int, optional
        Images of the manifest; those beyond `images` stay missing.
    """
    from tests.benchmarks._planned import write_plan

    manifest = write_plan(out / "manifest.parquet", planned or images)
    said, memory = run_watched(
        "tests.benchmarks._overhead:drive",
        manifest=str(manifest),
        out=str(out / "run"),
        pilot=images,
        stored=stored,
        batched=batched,
        workers=workers,
    )
    return Overhead(
        images=images,
        tasks=said["tasks"],
        seconds=said["seconds"],
        driver_ms=1e3 * said["driver_cpu"] / images,
        worker_ms=1e3 * (said["workers_cpu"] - said["tasks_cpu"] - said["packs_cpu"]) / images,
        task_ms=1e3 * said["tasks_cpu"] / images,
        pack_ms=1e3 * said["packs_cpu"] / images,
        start_cpu=said["start_cpu"],
        driver=memory["driver"],
        worker=memory["worker"],
    )


def drive(manifest: str, out: str, *, pilot: int, stored: bool, batched: bool, workers: int) -> dict[str, Any]:
    """The driver's process."""
    from batchproc import job
    from batchproc.distribute import campaign, order
    from tests.benchmarks import _planned

    if not batched:
        order._MOST = 1
    process = _planned.few_candidates
    if not stored:
        from tests.benchmarks._nowhere import nothing_left as process
    counted = _Counted(campaign)
    start = time.perf_counter()
    job.run(
        manifest,
        out,
        config=_planned.CONFIG,
        workers=workers,
        pilot=pilot,
        report=False,
        quiet=True,
        steps=job.Steps(process=process, wisdom=_planned.no_wisdom),
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - start,
        "tasks": counted.tasks,
        "start_cpu": counted.before_first,
        "driver_cpu": time.process_time(),
        "workers_cpu": children.ru_utime + children.ru_stime,
        "tasks_cpu": counted.of_tasks,
        "packs_cpu": counted.of_packs,
    }


class _Counted:
    """What the workers did for the driver, counted as it comes back: calls, and the CPU seconds in them."""

    def __init__(self, campaign: Any) -> None:
        self.tasks, self.of_tasks, self.of_packs, self.before_first = 0, 0.0, 0.0, 0.0
        receive, packed = campaign._Campaign.receive, packing.Packing.receive

        def counting(this: Any, ticket: Any, outcome: Any) -> Any:
            self.before_first = self.before_first or time.process_time()
            self.tasks += 1
            self.of_tasks += outcome.value.cpu_seconds
            return receive(this, ticket, replace(outcome, value=outcome.value.value))

        def counting_packs(this: Any, ticket: Any, outcome: Any, *more: Any) -> Any:
            self.of_packs += outcome.value.cpu_seconds
            return packed(this, ticket, replace(outcome, value=outcome.value.value), *more)

        campaign._Campaign.receive, packing.Packing.receive = counting, counting_packs
        campaign.process_trial, packing.pack_images = process_counted, pack_counted


@dataclass(frozen=True)
class _Counting:
    """What a call returned, and the CPU seconds of its process."""

    value: Any
    cpu_seconds: float


def process_counted(*arguments: Any) -> _Counting:
    """`process_trial` in a worker."""
    start = time.process_time()
    return _Counting(process_trial(*arguments), time.process_time() - start)


def pack_counted(*arguments: Any) -> _Counting:
    """`pack_images` in a worker."""
    start = time.process_time()
    return _Counting(pack_images(*arguments), time.process_time() - start)
