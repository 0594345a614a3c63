"""Many stamps over an executor: cut into chunks of whole images, each scored by one task."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from batchproc.distribute.executors import Executor, WorkerDiedError, sliding
from batchproc.distribute.tasks import Chunk, Job, classify_chunk
from batchproc.distribute.transient import is_transient
from batchproc.errors import UsageError
from batchproc.io.atomic import our_disk
from batchproc.io.run_folder import RunFolder

if TYPE_CHECKING:
    from batchproc.io.index import Place

__all__ = ["classify_chunks", "needed_resources", "plan_chunks"]

_CANDIDATES = 4096  # a chunk: some seconds of a small network
_IMAGES, _MANY = 100, 2000  # images that a chunk has at least, in runs of so many: each chunk leaves a file

_TRIALS = 6  # of a chunk
_BACKOFF_S = 10.0  # before the second one where an error may heal, twice as long before each more

#: Settings' word for a device → the Dask resource that workers offer which have it.
_RESOURCES = {"gpu": "GPU", "edgetpu": "EDGETPU"}


def plan_chunks(folder: RunFolder, model: Any, size: int = _CANDIDATES) -> Iterator[Chunk]:
    """Cut what the model has not scored yet into chunks of whole images, of about `size` candidates or more."""
    from batchproc.io.catalogue import scored_images
    from batchproc.io.index import read_index

    index = read_index(folder)
    scored = scored_images(folder, model)
    images = _IMAGES if len(index.image_ids) >= _MANY else 1
    chunk: list[Place] = []
    n = 0
    for i, image_id in enumerate(index.image_ids):
        if image_id not in scored:
            chunk.append(index.place(i))
            n += chunk[-1].n
            if n >= size and len(chunk) >= images:
                yield Chunk(tuple(chunk))
                chunk, n = [], 0
    if chunk:
        yield Chunk(tuple(chunk))


def classify_chunks(
    folder: RunFolder, chunks: Sequence[Chunk], executor: Executor, *, model: Any, threads: int = 1, device: str = "cpu"
) -> Iterator[Chunk]:
    """Score chunks and yield each when it is on the disk; an error of the model ends it.

    A chunk whose worker died, or that an error stopped which may heal, is tried again with the others that were.

    Raises
    ------
    UsageError
        No worker has the device, and none will come that has it.
    """
    resources = needed_resources(device, executor)
    with our_disk(folder.path):
        folder.scores_of(model.name).mkdir(parents=True, exist_ok=True)
    work = partial(classify_chunk, Job.of(folder, threads, executor), model)
    for trial in range(_TRIALS):
        again: list[Chunk] = []
        rest = False
        for chunk, outcome in sliding(executor, work, chunks, resources=resources):
            if outcome.error is None:
                yield chunk
            elif trial < _TRIALS - 1 and (isinstance(outcome.error, WorkerDiedError) or is_transient(outcome.error)):
                again.append(chunk)
                rest |= not isinstance(outcome.error, WorkerDiedError)
            else:
                raise outcome.error
        if rest:
            time.sleep(_BACKOFF_S * 2**trial)
        chunks = again


def needed_resources(device: str, executor: Executor) -> Mapping[str, float] | None:
    """What a worker must have to score on a device; None where every worker will do.

    Raises
    ------
    UsageError
        No worker has it, and none will come that has it.
    """
    resource = _RESOURCES.get(device)
    if resource is None or executor.here:
        return None
    if not executor.offers(resource):
        raise UsageError(
            f"classify.device = {device!r}, but no worker offers the resource {resource}: start workers with "
            f"`dask worker --resources {resource}=1`, or name it in the site's profile (resources.{resource} = 1)"
        )
    return {resource: 1.0}
