"""Many images, and many stamps, over an executor: what to submit, and what to make of what comes back.

The work itself is in `batchproc.distribute.tasks`; what is done is known from the run folder alone.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from batchproc.distribute.executors import Executor, Outcome, WorkerDiedError, sliding
from batchproc.distribute.plan import images_at_once
from batchproc.distribute.tasks import Chunk, Job, Process, classify_chunk, process_image
from batchproc.io.catalogue import scored_images
from batchproc.io.progress import ReceiptLog, read_index
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry, Receipt

__all__ = ["classify_chunks", "plan_chunks", "process_images"]

CHUNK_CANDIDATES = 4096  # some seconds of a small network; 200 MB of stamps


def process_images(
    folder: RunFolder,
    entries: Iterable[ManifestEntry],
    executor: Executor,
    *,
    process: Process,
    threads: int = 1,
    max_bugs: int = 5,
    spread: str = "images",
) -> Iterator[Receipt]:
    """Process images, log each receipt, and yield it.

    An image under which its worker died is tried once more at the end, alone, so that a neighbour's crash is not taken
    for its own; if its worker dies again it is a failure.

    Parameters
    ----------
    folder : RunFolder
        Frozen and locked.
    entries : iterable of ManifestEntry
        Those to process.
    executor : Executor
    process : callable
        `batchproc.flow.process_image`, or a stand-in.
    threads : int
        For every library of a worker process.
    max_bugs : int
        After more bugs than this the campaign stops: the iterator ends.
    spread : {"images", "tiles"}
        What the workers share out among themselves. With tiles, images that outnumber the workers are done one by one.
    """
    work = partial(process_image, Job.of(folder, threads, executor, spread), process)
    at_once = None
    if spread == "tiles":
        entries = list(entries)
        at_once = images_at_once(len(entries), executor.workers)
    bugs = 0
    lost: list[ManifestEntry] = []
    with ReceiptLog(folder) as log:

        def run(images: Iterable[ManifestEntry], window: int | None, last: bool) -> Generator[Receipt, None, None]:
            for entry, outcome in sliding(executor, work, images, window):
                if isinstance(outcome.error, WorkerDiedError) and not last:
                    lost.append(entry)
                    continue
                receipt = _receipt(entry, outcome)
                log.add(receipt)
                yield receipt

        for images, window, last in ((entries, at_once, False), (lost, 1, True)):
            with closing(run(images, window, last)) as receipts:
                for receipt in receipts:
                    yield receipt
                    bugs += receipt.status == "bug"
                    if bugs > max_bugs:
                        return


def plan_chunks(folder: RunFolder, model: Any, size: int = CHUNK_CANDIDATES) -> Iterator[Chunk]:
    """Cut what the model has not scored yet into chunks of whole images, of about `size` candidates."""
    index = read_index(folder)
    scored = scored_images(folder, model)
    images: list[str] = []
    total = 0
    for image_id, n in zip(index.image_ids, (index.offsets[1:] - index.offsets[:-1]).tolist(), strict=True):
        if image_id in scored:
            continue
        if images and total + n > size:
            yield Chunk(tuple(images), total)
            images, total = [], 0
        images.append(image_id)
        total += n
    if images:
        yield Chunk(tuple(images), total)


def classify_chunks(
    folder: RunFolder, chunks: Sequence[Chunk], executor: Executor, *, model: Any, threads: int = 1
) -> Iterator[Chunk]:
    """Score chunks and yield each when it is on the disk; an error of the model ends it."""
    folder.scores_of(model.name).mkdir(parents=True, exist_ok=True)
    work = partial(classify_chunk, Job.of(folder, threads, executor), model)
    for chunk, outcome in sliding(executor, work, chunks):
        if outcome.error is not None:
            raise outcome.error
        yield chunk


def _receipt(entry: ManifestEntry, outcome: Outcome) -> Receipt:
    if outcome.error is None:
        receipt: Receipt = outcome.value
        return receipt
    if isinstance(outcome.error, WorkerDiedError):
        message = (
            f"{entry.new}: {outcome.error}, again when it was alone; most likely it needs more memory than a worker "
            "has: `batchproc retry RUN --workers N` with fewer workers gives each of them more"
        )
        return Receipt(entry.image_id, "failed", stage="process", error="WorkerDiedError", message=message)
    return Receipt(
        entry.image_id,
        "bug",
        stage="submit",
        error=type(outcome.error).__name__,
        message=str(outcome.error),
        traceback="".join(traceback.format_exception(outcome.error)),
    )
