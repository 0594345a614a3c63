"""Many images over an executor: what to submit, and what to make of what comes back.

The work itself is in `batchproc.distribute.tasks`, who is tried when in `batchproc.distribute.attempts`; what is done
is known from the run folder alone.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace

from batchproc.distribute.attempts import Attempts, Counts, Mishap, Trial
from batchproc.distribute.executors import Executor, Outcome, WorkerDiedError
from batchproc.distribute.order import Pace, longest_first
from batchproc.distribute.packing import Packing
from batchproc.distribute.plan import images_at_once
from batchproc.distribute.tasks import Answer, Job, Process, overdue_note, process_trial, under_way_file
from batchproc.distribute.transient import is_transient
from batchproc.distribute.watchdog import read_note
from batchproc.errors import ReadError, StorageError
from batchproc.io.atomic import our_disk, write_text
from batchproc.io.events import NullEvents
from batchproc.io.progress import ReceiptLog
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import stored_receipt
from batchproc.records import ManifestEntry, Receipt

__all__ = ["process_images"]

_LOOK_S = 2.0  # how often the driver looks around while nothing finishes
_ABSENT_S, _AGAIN_S = 60.0, 600.0  # without workers: when it is said, and said again
_SAVE_S = 5.0
_FINAL = ("done", "failed", "bug")
_REDONE = 2  # times that an image is done again whose files turn out damaged

_NOBODY = NullEvents()

_EVENTS = {
    Mishap.TRANSIENT: "image_retried",
    Mishap.LOST: "image_lost",
    Mishap.CRASHED: "image_lost",
    Mishap.OVERRAN: "image_overdue",
}


_TOLD = 3  # mishaps
_AT_LAST = {
    Mishap.TRANSIENT: " (each time it was tried, over some minutes; `batchproc retry RUN` when that is mended)",
    Mishap.LOST: (
        ", and so it went each time it was tried alone: it may take whole machines along; look at what the jobs "
        "printed (RUN/log), then `batchproc retry RUN`"
    ),
    Mishap.CRASHED: "",
    Mishap.OVERRAN: "",
}


def process_images(
    folder: RunFolder,
    entries: Sequence[ManifestEntry],
    executor: Executor,
    *,
    process: Process,
    threads: int = 1,
    time_limit: float = 0.0,
    max_bugs: int = 5,
    spread: str = "images",
    events: NullEvents = _NOBODY,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Receipt]:
    """Process images, and yield the last word on each: done, failed, or a bug.

    Errors that may heal, and workers that die, are no last words: `batchproc.distribute.attempts` says what follows.

    Parameters
    ----------
    folder : RunFolder
        Frozen and locked.
    entries : sequence of ManifestEntry
        Those to process.
    executor : Executor
    process : callable
        `batchproc.flow.process_image`, or a stand-in.
    threads : int
        For every library of a worker process.
    time_limit : float
        Seconds an image; 0: none.
    max_bugs : int
        After more bugs than this the campaign stops: the iterator ends.
    spread : {"images", "tiles"}
        What the workers share out among themselves. With tiles, images that outnumber the workers are done one by one.
    events : EventLog, optional
    tell : callable, optional
        Takes a line for the person who waits.

    Raises
    ------
    StorageError
        The run folder cannot be written.
    ClusterError
        No workers any more, and none will come.
    """
    with our_disk(folder.path), ReceiptLog(folder) as log, closing(_Deaths(folder)) as deaths:
        job = Job.of(folder, threads, executor, spread=spread, time_limit=time_limit, campaign=uuid.uuid4().hex[:8])
        attempts = Attempts(longest_first(entries), deaths.before())
        deaths.save(attempts, now=True)
        campaign = _Campaign(folder, job, executor, process, attempts, len(entries), events, tell)
        bugs = 0
        try:
            for receipt in campaign.last_words():
                if receipt.status != "done":
                    log.add(receipt)
                deaths.save(attempts)
                yield receipt
                bugs += receipt.status == "bug"
                if bugs > max_bugs:
                    return
        finally:
            executor.cancel()
            deaths.save(attempts, now=True)


class _Campaign:
    """Submits trials and makes something of their outcomes."""

    def __init__(
        self,
        folder: RunFolder,
        job: Job,
        executor: Executor,
        process: Process,
        attempts: Attempts,
        images: int,
        events: NullEvents,
        tell: Callable[[str], None],
    ) -> None:
        self.folder, self.job, self.executor, self.process = folder, job, executor, process
        self.attempts, self.left = attempts, images
        self.events, self.tell = events, tell
        self.digest = folder.config().image_digest
        self.window = images_at_once(images, executor.workers) if job.spread == "tiles" else None
        self.pace = Pace()
        self.under_way: dict[Hashable, Trial] = {}
        self.packing = Packing(folder, job, executor, events, tell)
        self.redone: Counter[str] = Counter()
        self.workers, self.mishaps = 0, 0
        self.told_absent = -math.inf

    def last_words(self) -> Iterator[Receipt]:
        """Until every image has ended, and is rolled up."""
        self.packing.submit_full()
        while True:
            self.submit()
            self.packing.submit_due(time.monotonic())
            if self.attempts.finished:
                if self.packing.idle:
                    self.packing.submit_rest()
                if self.packing.idle:
                    return
            ended: list[Receipt] = []
            for ticket, outcome in self.executor.wait(self.patience()):
                if ticket in self.packing:
                    ended += self.redo(self.packing.receive(ticket, outcome, time.monotonic()))
                else:
                    ended += self.receive(ticket, outcome)
            if ended:
                self.submit()  # before somebody draws them
            self.look_around()
            yield from ended

    def submit(self) -> None:
        """Keep every worker busy, and a few trials more waiting."""
        workers = self.executor.workers
        window = self.window or 2 * workers + 2
        alone = sum(trial.alone for trial in self.under_way.values())
        while len(self.under_way) < window:
            size = (
                1
                if self.window or self.executor.here
                else self.pace.images(self.left - self.attempts.under_way, workers)
            )
            trial = self.attempts.take(time.monotonic(), size, alone=2 * alone < max(2, workers))
            if trial is None:
                return
            alone += trial.alone
            self.under_way[self.executor.submit(process_trial, self.job, self.process, trial)] = trial

    def receive(self, ticket: Hashable, outcome: Outcome) -> Iterator[Receipt]:
        """What the end of a trial says of its images; yields last words only."""
        trial = self.under_way.pop(ticket)
        if outcome.error is None:
            answer: Answer = outcome.value
            if not trial.alone:
                self.pace.add(len(answer.receipts), answer.seconds)
            receipts: Sequence[Receipt] = answer.receipts
        elif isinstance(outcome.error, StorageError):
            raise outcome.error
        else:
            receipts = [self.without_answer(entry, trial, outcome.error) for entry in trial.entries]
        for entry, receipt in zip(trial.entries, receipts, strict=True):
            last = self.settle(entry, receipt)
            if last is not None:
                yield last

    def without_answer(self, entry: ManifestEntry, trial: Trial, error: BaseException) -> Receipt:
        """What can be said of an image whose trial brought no answer: its files know whether it is done."""
        done = stored_receipt(self.folder, entry, self.digest)
        if done is not None:
            return done
        if is_transient(error) or isinstance(error, OSError):  # the latter: a connection of Dask's own
            status: str = Mishap.TRANSIENT
        elif not isinstance(error, WorkerDiedError):
            text = "".join(traceback.format_exception(error))
            return _receipt(entry, "bug", type(error).__name__, str(error), text)
        elif read_note(overdue_note(self.folder, entry.image_id), self.job.words(trial)):
            status = Mishap.OVERRAN
        else:
            status = Mishap.LOST
        return _receipt(entry, status, "CrashError", f"{entry.new}: {error}")

    def settle(self, entry: ManifestEntry, receipt: Receipt) -> Receipt | None:
        """Book what became of an image; the receipt where it is the last word on it."""
        if _missed_a_file_that_is_here(receipt):
            message = f"{receipt.message} It is there for the driver: the worker's node may lack that file system."
            receipt = replace(receipt, status=Mishap.TRANSIENT, message=message)
        if receipt.status in _FINAL:
            self.attempts.end(entry.image_id)
        else:
            mishap = Mishap(receipt.status)
            reason = receipt.message or mishap.value
            self.events.write(_EVENTS[mishap], image_id=entry.image_id, reason=reason)
            self.tell_mishap(reason)
            if not self.attempts.mishap(entry, mishap, time.monotonic()):
                return None
            receipt = replace(receipt, status="failed", message=f"{receipt.message}{_AT_LAST[mishap]}")
        self.left -= 1
        self.note(receipt)
        if receipt.status == "done":
            self.packing.add(entry)
            if entry.image_id in self.redone:  # it has been told before
                return None
        return receipt

    def tell_mishap(self, reason: str) -> None:
        """The first few; where there are many, the log has them."""
        self.mishaps += 1
        if self.mishaps <= _TOLD:
            more = "" if self.mishaps < _TOLD else "; of more like it, log/events.jsonl tells"
            self.tell(f"tried again: {reason}{more}")

    def redo(self, entries: Iterable[ManifestEntry]) -> Iterator[Receipt]:
        """Do images again that turned out damaged, but not for ever; yields the last word on those that always do."""
        for entry in entries:
            self.redone[entry.image_id] += 1
            if self.redone[entry.image_id] > _REDONE:
                why = f"{entry.new}: its results were found damaged each time: look after disk and memory of the nodes"
                receipt = _receipt(entry, "failed", "StorageError", f"{why}, then `batchproc retry RUN`")
                self.note(receipt)
                yield receipt
                continue
            self.left += 1
            self.attempts.again(entry)

    def note(self, receipt: Receipt) -> None:
        """An event a finished image."""
        if receipt.status == "done":
            self.events.write(
                "image_done",
                image_id=receipt.image_id,
                seconds=sum(receipt.seconds.values()),
                cpu_seconds=receipt.cpu_seconds,
                n_candidates=receipt.n_candidates,
                memory_mb=receipt.peak_memory_mb,
            )
        else:
            self.events.write(
                "image_failed",
                image_id=receipt.image_id,
                kind=receipt.status,
                stage=receipt.stage,
                error=receipt.error,
            )

    def patience(self) -> float:
        """Seconds until there may be something to do though nothing has finished."""
        due = self.attempts.wait_s(time.monotonic())
        return _LOOK_S if due is None else min(due, _LOOK_S)

    def look_around(self) -> None:
        """Tell how things are: the number of workers, and whether there are none at all."""
        absent = self.executor.absent_for
        workers = 0 if absent else self.executor.workers
        if workers != self.workers:
            self.events.write("workers", workers=workers)
            self.workers = workers
        phase = "waiting for workers" if absent else "images"
        self.events.beat(phase=phase, in_flight=self.attempts.under_way, workers=workers)
        now = time.monotonic()
        if absent > _ABSENT_S and now - self.told_absent > _AGAIN_S:
            self.told_absent = now
            self.tell("no worker is there; waiting for one to come (jobs may still be in the queue)")


def _missed_a_file_that_is_here(receipt: Receipt) -> bool:
    """Whether an image failed for a file that this process sees: one sick node would fail all images it is given."""
    found, path = receipt.metadata.get("found"), receipt.metadata.get("path")
    return receipt.status == "failed" and found == ReadError.NO_FILE and bool(path) and os.path.exists(str(path))


class _Deaths:
    """What earlier drivers of the run knew of images that end their processes: ``log/deaths.json``.

    A driver that works by itself is such a process: while it does, ``log/under_way`` names the image, and where that is
    found later, its driver died with it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.file, self.under_way = folder.log / "deaths.json", under_way_file(folder)
        self.saved: Mapping[str, object] = {}
        self.when = -math.inf

    def before(self) -> dict[str, Counts]:
        """Counts of earlier drivers."""
        counts: dict[str, Counts] = {}
        with suppress(OSError, ValueError, TypeError):  # nobody wrote it, or not all of it
            counts = Attempts.recorded(json.loads(self.file.read_text()))
            self.saved = {image_id: {} for image_id in counts}
        with suppress(OSError):
            image_id = self.under_way.read_text()
            counts[image_id] = counts.get(image_id, Counts()).after(Mishap.LOST, alone=False)
        return counts

    def save(self, attempts: Attempts, *, now: bool = False) -> None:
        """Write what has changed, not too often."""
        if not now and time.monotonic() - self.when < _SAVE_S:
            return
        self.when = time.monotonic()
        record = attempts.record()
        if record != self.saved:
            with suppress(OSError):  # a full disk stops the campaign where results are written
                write_text(self.file, json.dumps(record))
            self.saved = record

    def close(self) -> None:
        """Nobody died: the driver ends of its own will."""
        with suppress(OSError):
            self.under_way.unlink(missing_ok=True)


def _receipt(entry: ManifestEntry, status: str, error: str, message: str, text: str = "") -> Receipt:
    return Receipt(entry.image_id, status, stage="submit", error=error, message=message, traceback=text)
