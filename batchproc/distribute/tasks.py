"""What runs on a worker: images. In: a path and ids. Out: files, and short receipts.

A task owns the files that carry the ids of its images. It writes them whole or not at all, the done-marker last, so
that it may be killed at any moment, or run twice.

The driver knows these functions by name only: what they need of the numerics they import when they run.
"""

from __future__ import annotations

import resource
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchproc.config import Config
from batchproc.distribute.alone import run_alone
from batchproc.distribute.attempts import Mishap, Trial
from batchproc.distribute.executors import Executor, WorkerDiedError
from batchproc.distribute.memory import keep_freed_memory, process_limit, return_freed_memory
from batchproc.distribute.threads import limit_threads
from batchproc.distribute.transient import is_transient
from batchproc.distribute.watchdog import time_limit, time_limit_here
from batchproc.errors import CrashError, ExposureError, MemoryLimitError, StorageError, TimeLimitError
from batchproc.io.atomic import our_disk, part_name
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry, Receipt

if TYPE_CHECKING:
    from batchproc.io.packs import Packed, RollUp

__all__ = [
    "Answer",
    "Job",
    "overdue_note",
    "pack_images",
    "prepare",
    "process_image",
    "process_trial",
    "under_way_file",
]

#: `batchproc.flow.process_image`, or a stand-in with its face; the keyword ``map_tiles`` comes where tiles are spread.
Process = Callable[..., Any]

_preparing = threading.Lock()
_images = count()  # that this process has begun


@dataclass(frozen=True)
class Job:
    """What all tasks of a run share; a few bytes.

    Attributes
    ----------
    run : str
        The run folder.
    identity : str
        `RunFolder.identity`: tells this run from one that had the folder before it.
    threads : int
        For every library of the process.
    here : bool
        The tasks run in the driver's process, which may be a user's own: they change nothing that outlasts them.
    spread : {"images", "tiles"}
        Whether a task works on its image alone, or hands its tiles to all workers.
    time_limit : float
        Seconds an image; 0: none.
    campaign : str
        Tells one campaign of a run from another.
    """

    run: str
    identity: str
    threads: int = 1
    here: bool = False
    spread: str = "images"
    time_limit: float = 0.0
    campaign: str = ""

    @classmethod
    def of(cls, folder: RunFolder, threads: int, executor: Executor, **others: Any) -> Job:
        """The job of a run that has been begun."""
        return cls(str(folder.path.resolve()), folder.identity(), threads, executor.here, **others)

    def words(self, trial: Trial) -> str:
        """What a note of a trial begins with."""
        return f"{self.campaign} {trial.number}"


@dataclass(frozen=True)
class Answer:
    """What the driver is told of a trial.

    Attributes
    ----------
    receipts : tuple of Receipt
        One an image, without what stands in the markers (``quality``). A status that is a `Mishap` is not final.
    seconds : float
        Wall-clock, of all of it.
    """

    receipts: tuple[Receipt, ...]
    seconds: float


def process_trial(job: Job, process: Process, trial: Trial) -> Answer:
    """Process the images of a trial one after the other.

    Raises
    ------
    StorageError
        The run folder cannot be written.
    WorkerDiedError
        Another worker died under a tile of an image.
    """
    start = time.perf_counter()
    work = _process_alone if trial.alone else _process_here
    receipts = tuple(_short(work(job, process, entry, trial)) for entry in trial.entries)
    return Answer(receipts, time.perf_counter() - start)


def process_image(job: Job, process: Process, entry: ManifestEntry) -> Receipt:
    """Process one image and store what comes out; an image that is done already is not done again.

    Returns
    -------
    Receipt
        ``done`` when everything is on the disk; ``failed`` for an `ExposureError`; a `Mishap` for what may heal, and
        for memory that could not be had; ``bug`` for anything else, with its traceback.

    Raises
    ------
    StorageError
        The run folder cannot be written.
    WorkerDiedError
        Another worker died under a tile of the image.
    """
    from batchproc.io.markers import input_digest
    from batchproc.io.staging import staged
    from batchproc.io.store import store_image, stored_receipt

    folder, config = prepare(job)
    before = stored_receipt(folder, entry, config.image_digest)
    if before is not None:
        return before
    first = next(_images) == 0
    cpu = time.process_time()
    try:
        inputs = input_digest(entry)
        with staged(entry) as local:
            if job.spread == "tiles":
                from batchproc.distribute.tiles import TileMap

                map_tiles = TileMap(partial(prepare, job))
                result = process(local, config, map_tiles=map_tiles)
                cpu -= map_tiles.cpu_elsewhere
            else:
                result = process(local, config)
        receipt = replace(result.receipt, **_use(cpu))
        if first:
            receipt = replace(receipt, metadata={**receipt.metadata, "first_of_process": True})
        if folder.identity() != job.identity:
            raise StorageError(
                f"{folder.path}: the run was changed while {entry.image_id} was worked on; it is dropped"
            )
        found = result.catalogue, result.stamps, receipt
        return store_image(folder, entry, *found, config.image_digest, inputs=inputs, models=_models(job))
    except (WorkerDiedError, StorageError):  # no matter of this image: the campaign knows what to do
        raise
    except ExposureError as error:
        status = Mishap.TRANSIENT if is_transient(error) else "failed"
        return _failed(entry, status, error, cpu, stage=error.stage, metadata=error.metadata)
    except Exception as error:
        details = {"stage": _stage(error), "traceback": traceback.format_exc()}
        if isinstance(error, MemoryError):
            limit = MemoryLimitError(f"{entry.new}: more memory than there is: {error}")
            return _failed(entry, Mishap.OVERRAN, limit, cpu, **details)
        return _failed(entry, Mishap.TRANSIENT if is_transient(error) else "bug", error, cpu, **details)


def pack_images(job: Job, number: int, plan: RollUp) -> Packed:
    """Roll images up into a pack; raises `StorageError` where the disk does not take it."""
    from batchproc.io.packs import roll_up

    return roll_up(RunFolder(Path(job.run)), number, plan.image_ids, plan.packs)


def overdue_note(folder: RunFolder, image_id: str) -> Path:
    """What a worker writes that ends itself for an image that takes too long: where it was."""
    return folder.log / "overdue" / f"{part_name(image_id)}.txt"


def under_way_file(folder: RunFolder) -> Path:
    """Which image a driver works on that works by itself."""
    return folder.log / "under_way"


def _process_here(job: Job, process: Process, entry: ManifestEntry, trial: Trial) -> Receipt:
    """In this process, which ends where the image takes too long; the driver's own goes on."""
    folder = RunFolder(Path(job.run))
    limit: AbstractContextManager[None]
    if job.here:
        with our_disk(folder.path):
            under_way_file(folder).write_text(entry.image_id)
        limit = time_limit_here(job.time_limit)
    else:
        limit = time_limit(job.time_limit, overdue_note(folder, entry.image_id), job.words(trial))
    try:
        with limit:
            return process_image(job, process, entry)
    except TimeLimitError as error:  # between the image and its receipt
        return _failed(entry, "failed", error, time.process_time(), stage=error.stage, metadata=error.metadata)


def _process_alone(job: Job, process: Process, entry: ManifestEntry, trial: Trial) -> Receipt:
    """In a process of its own, while this one does nothing else."""
    return_freed_memory()
    inner = replace(job, here=False, spread="images", time_limit=0.0)
    cpu = time.process_time()
    try:
        receipt: Receipt = run_alone(
            process_image,
            *(inner, process, entry),
            time_limit=job.time_limit,
            memory_limit=process_limit(),
            threads=job.threads,
            imports=("batchproc.flow", "batchproc.io.store"),
        )
        return receipt
    except (TimeLimitError, MemoryLimitError) as error:
        return _ended(entry, Mishap.OVERRAN, error, cpu)
    except CrashError as error:
        return _ended(entry, Mishap.CRASHED, error, cpu)


def _ended(entry: ManifestEntry, mishap: Mishap, error: ExposureError, cpu: float) -> Receipt:
    metadata = dict(error.metadata)
    words = metadata.pop("last_words", "")
    error = type(error)(f"{entry.new}: {error}")
    return _failed(entry, mishap, error, cpu, stage=error.stage, metadata=metadata, traceback=words)


def prepare(job: Job) -> tuple[RunFolder, Config]:
    """Once in the life of a process and a run: its settings, FFTW's frozen plans, threads, memory."""
    with _preparing:  # a thread must not plan while another one takes the wisdom over
        return _prepare_once(replace(job, campaign=""))


@lru_cache(maxsize=1)  # FFTW has one wisdom a process: a run that comes back after another needs its own again
def _prepare_once(job: Job) -> tuple[RunFolder, Config]:
    from batchproc.imaging.fft import import_wisdom

    folder = RunFolder(Path(job.run))
    wisdom = folder.wisdom_file.read_text()
    if wisdom:
        with suppress(ValueError):  # a processor of another kind than the driver's: FFTW's estimates are right as well
            import_wisdom(wisdom)
    if not job.here:
        limit_threads(job.threads)
        keep_freed_memory()
    return folder, replace(folder.config(), threads=job.threads)


@lru_cache(maxsize=1)
def _models(job: Job) -> Mapping[str, str]:
    """Name → hash of the models that the run scores with."""
    return RunFolder(Path(job.run)).models()


def _short(receipt: Receipt) -> Receipt:
    """Without what its marker says at length."""
    return receipt if receipt.status != "done" else replace(receipt, quality={}, metadata={})


def _failed(entry: ManifestEntry, status: str, error: Exception, cpu: float, **details: Any) -> Receipt:
    details |= {"status": status, "error": type(error).__name__, "message": str(error)}
    return Receipt(image_id=entry.image_id, **details, **_use(cpu))


def _use(cpu_at_start: float) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_seconds": time.process_time() - cpu_at_start, "peak_memory_mb": peak}


def _stage(error: Exception) -> str:
    """The module in which a bug came to light."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [Path(frame.filename).stem for frame in frames if "batchproc" in Path(frame.filename).parts]
    return ours[-1] if ours else "process"
