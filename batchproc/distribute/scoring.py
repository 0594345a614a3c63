"""Many stamps over an executor: chunks of whole images, each read once and scored by all models that lack it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from batchproc.distribute.alone import run_alone
from batchproc.distribute.chunks import Chunk, Failure, classify_chunk, open_models
from batchproc.distribute.executors import Executor, WorkerDiedError
from batchproc.distribute.persistent import persistent
from batchproc.distribute.tasks import Job
from batchproc.errors import CrashError, MemoryLimitError, ModelError, TimeLimitError, UsageError
from batchproc.io.atomic import our_disk
from batchproc.io.run_folder import RunFolder

if TYPE_CHECKING:
    from batchproc.io.index import Place

__all__ = [
    "check_here",
    "check_workers",
    "classify_chunks",
    "images_of_a_chunk",
    "needed_resources",
    "plan_chunks",
    "resources_of",
]

_CANDIDATES = 4096  # a chunk: some seconds of a small network
_IMAGES, _MANY = 100, 2000  # images that a chunk has at least for each model, in runs of so many: each leaves files
_MOST = 250_000  # candidates, with which a chunk is large enough whatever its files: their scores are in memory

_CHECK_S = 120.0  # that a device gets to show that it is there: CUDA's first kernels are compiled meanwhile

#: Settings' word for a device → the Dask resource that workers offer which have it.
_RESOURCES = {"gpu": "GPU", "edgetpu": "EDGETPU"}


def plan_chunks(folder: RunFolder, models: Sequence[Any], size: int = _CANDIDATES) -> Iterator[Chunk]:
    """Cut what models have not scored yet into chunks of whole images, of about `size` candidates or more.

    Images that the same models lack come together, in the manifest's order. The more models a run has, the larger the
    chunks of a long one, so that its files of scores stay as few.
    """
    from batchproc.io.catalogue import scored_by, scored_images
    from batchproc.io.index import read_index

    index = read_index(folder)
    scored = {model.name: scored_images(folder, model) for model in models}
    least = images_of_a_chunk(
        len(index.image_ids), len({*scored_by(folder), *(folder.scores_of(name).name for name in scored)})
    )
    waiting: dict[tuple[str, ...], list[Place]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for i, image_id in enumerate(index.image_ids):
        lacking = tuple(name for name, images in scored.items() if image_id not in images)
        if not lacking:
            continue
        some = waiting.setdefault(lacking, [])
        some.append(index.place(i))
        counts[lacking] += some[-1].n
        if counts[lacking] >= _MOST or (counts[lacking] >= size and len(some) >= least):
            yield Chunk(tuple(waiting.pop(lacking)), lacking)
            del counts[lacking]
    for lacking, some in waiting.items():
        yield Chunk(tuple(some), lacking)


def images_of_a_chunk(images: int, models: int) -> int:
    """Images that a chunk has at least in a run of so many, scored by so many models."""
    return _IMAGES * max(1, min(models, images // _MANY)) if images >= _MANY else 1


def classify_chunks(
    folder: RunFolder,
    chunks: Iterable[Chunk],
    executor: Executor,
    *,
    models: Sequence[Any],
    threads: int = 1,
    device: str = "cpu",
    failed: dict[str, Failure] | None = None,
) -> Iterator[Chunk]:
    """Score chunks, and yield each when it is on the disk with the models that have scored it.

    A chunk whose worker died, or that an error stopped which may heal, is tried again with the others that were; where
    the worker died, each model by itself. A model that fails on one chunk is asked for no more.

    Parameters
    ----------
    folder : RunFolder
    chunks : iterable of Chunk
    executor : Executor
    models : sequence of Model
    threads : int
        For every library of a worker.
    device : {"cpu", "gpu", "edgetpu"}
    failed : dict, optional
        Takes the models that failed; by default the first failure is raised.

    Raises
    ------
    UsageError
        No worker has the device, and none will come that has it.
    """
    resources = needed_resources(device, executor)
    with our_disk(folder.path):
        for model in models:
            folder.scores_of(model.name).mkdir(parents=True, exist_ok=True)
    work = partial(classify_chunk, Job.of(folder, threads, executor), tuple(models))
    lost = {} if failed is None else failed

    def left(chunk: Chunk) -> Chunk | None:
        names = tuple(name for name in chunk.models if name not in lost)
        return replace(chunk, models=names) if names else None

    for chunk, outcome in persistent(executor, work, chunks, resources=resources, smaller=_by_model, left=left):
        failures = outcome.value or {}
        if isinstance(outcome.error, WorkerDiedError) and len(chunk.models) == 1:
            failures = {chunk.models[0]: Failure(outcome.error, str(outcome.error))}
        elif outcome.error is not None:
            raise outcome.error
        if failures and failed is None:
            raise next(iter(failures.values())).error
        for name, failure in failures.items():
            lost.setdefault(name, failure)
        done = tuple(name for name in chunk.models if name not in failures)
        if done:
            yield replace(chunk, models=done)


def _by_model(chunk: Chunk) -> Iterator[Chunk]:
    return (replace(chunk, models=(name,)) for name in chunk.models)


def needed_resources(device: str, executor: Executor) -> Mapping[str, float] | None:
    """What a worker must have to score on a device; None where every worker will do.

    Raises
    ------
    UsageError
        No worker has it, and none will come that has it.
    """
    resources = resources_of(device)
    if resources is None or executor.here:
        return None
    for name in resources:
        if not executor.offers(name):
            raise UsageError(
                f"device = {device!r}, but no worker offers the resource {name}: start workers with "
                f"`dask worker --resources {name}=1`, or name it in the site's profile (resources.{name} = 1)"
            )
    return resources


def resources_of(device: str) -> Mapping[str, float] | None:
    """What a worker offers that has a device; None for the CPU, which all have."""
    return {_RESOURCES[device]: 1.0} if device in _RESOURCES else None


def check_here(models: Sequence[Any]) -> None:
    """Have models opened on their device on this machine, in a process of its own, which gives the device back.

    Raises
    ------
    ModelError
        One of them cannot be had there.
    """
    try:
        run_alone(open_models, tuple(models), time_limit=_CHECK_S)
    except (CrashError, TimeLimitError, MemoryLimitError) as error:
        names = ", ".join(model.name for model in models)
        raise ModelError(f"the process that was to open {names} on its device: {error}") from error


def check_workers(models: Sequence[Any], device: str, executor: Executor) -> bool:
    """Have a worker that offers a device open models on it, before anything else is done there.

    Returns
    -------
    bool
        Whether one did; False where none is there yet.

    Raises
    ------
    UsageError
        None offers it, and none will come that does.
    ModelError
        One of the models cannot be had there.
    """
    resources = needed_resources(device, executor)
    if resources is None:
        return True
    executor.submit(open_models, tuple(models), resources=resources, priority=1)
    end = time.monotonic() + _CHECK_S
    while time.monotonic() < end:
        for _, outcome in executor.wait(1.0):
            if isinstance(outcome.error, WorkerDiedError):
                raise ModelError(f"a worker died while it opened models on device = {device!r}") from outcome.error
            if outcome.error is not None:
                raise outcome.error
            return True
    executor.cancel()
    return False
