"""What runs on a worker: one image, or one chunk of stamps. In: a path and an id. Out: files, and a short receipt.

A task owns the files that carry its id. It writes them whole or not at all, the done-marker last, so that it may be
killed at any moment, or run twice.
"""

from __future__ import annotations

import resource
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from batchproc.config import Config
from batchproc.distribute.executors import Executor, WorkerDiedError
from batchproc.distribute.memory import keep_freed_memory
from batchproc.distribute.threads import limit_threads
from batchproc.distribute.tiles import TileMap
from batchproc.errors import ExposureError
from batchproc.imaging.fft import import_wisdom
from batchproc.io.catalogue import read_part, write_scores
from batchproc.io.markers import input_digest
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import read_stamps
from batchproc.io.store import store_image
from batchproc.records import ManifestEntry, Receipt

__all__ = ["Chunk", "Job", "classify_chunk", "process_image"]

#: `batchproc.flow.process_image`, or a stand-in with its face; the keyword ``map_tiles`` comes where tiles are spread.
Process = Callable[..., Any]

_preparing = threading.Lock()


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
    """

    run: str
    identity: str
    threads: int = 1
    here: bool = False
    spread: str = "images"

    @classmethod
    def of(cls, folder: RunFolder, threads: int, executor: Executor, spread: str = "images") -> Job:
        """The job of a run that has been begun."""
        return cls(str(folder.path.resolve()), folder.identity(), threads, executor.here, spread)


@dataclass(frozen=True)
class Chunk:
    """Whole images whose candidates are scored by one task."""

    image_ids: tuple[str, ...]
    n_candidates: int


def process_image(job: Job, process: Process, entry: ManifestEntry) -> Receipt:
    """Process one image and store what comes out; never raises for what the image does.

    Returns
    -------
    Receipt
        ``done`` when everything is on the disk; ``failed`` for an `ExposureError`; ``bug`` for anything else, with its
        traceback.

    Raises
    ------
    WorkerDiedError
        Another worker died under a tile of the image.
    """
    folder, config = _prepare(job)
    cpu = time.process_time()
    inputs = input_digest(entry)
    map_tiles = TileMap(partial(_prepare, job)) if job.spread == "tiles" else None
    try:
        result = process(entry, config) if map_tiles is None else process(entry, config, map_tiles=map_tiles)
        if map_tiles is not None:
            cpu -= map_tiles.cpu_elsewhere
        receipt = replace(result.receipt, **_use(cpu))
        return store_image(folder, entry, result.catalogue, result.stamps, receipt, config.image_digest, inputs=inputs)
    except WorkerDiedError:  # the campaign knows what to do
        raise
    except ExposureError as error:
        return _failed(entry, "failed", error, cpu, stage=error.stage, metadata=error.metadata)
    except Exception as error:
        return _failed(entry, "bug", error, cpu, stage=_stage(error), traceback=traceback.format_exc())


def classify_chunk(job: Job, model: Any, chunk: Chunk) -> int:
    """Score the candidates of a chunk of images with a model; returns how many got a score."""
    folder, config = _prepare(job)
    names = list(model.card.input.features)
    parts = [read_part(folder.catalogue_part(i), ["candidate_id", *names]) for i in chunk.image_ids]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("candidate_id", *names)}
    stamps = np.concatenate([read_stamps(folder.stamps_part(image_id)) for image_id in chunk.image_ids])
    features = np.column_stack([columns[name] for name in names]) if names else None
    scores = np.asarray(model.predict(stamps, features, batch=config.classify.batch), np.float32)
    name = sha256("\n".join(chunk.image_ids).encode()).hexdigest()[:32]
    write_scores(
        folder.scores_of(model.name) / f"{name}.parquet", chunk.image_ids, columns["candidate_id"], scores, model
    )
    return int(np.isfinite(scores.reshape(len(scores), -1)).all(axis=1).sum())


def _prepare(job: Job) -> tuple[RunFolder, Config]:
    """Once in the life of a process and a run: its settings, FFTW's frozen plans, threads, memory."""
    with _preparing:  # a thread must not plan while another one takes the wisdom over
        return _prepare_once(job)


@lru_cache(maxsize=1)  # FFTW has one wisdom a process: a run that comes back after another needs its own again
def _prepare_once(job: Job) -> tuple[RunFolder, Config]:
    folder = RunFolder(Path(job.run))
    wisdom = folder.wisdom_file.read_text()
    if wisdom:
        with suppress(ValueError):  # a processor of another kind than the driver's: FFTW's estimates are right as well
            import_wisdom(wisdom)
    if not job.here:
        limit_threads(job.threads)
        keep_freed_memory()
    return folder, replace(folder.config(), threads=job.threads)


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
