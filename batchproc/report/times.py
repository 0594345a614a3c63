"""What happened when in a campaign, read from the log of events of its drivers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.io.events import FINISHED

__all__ = ["Course", "read_course"]

_TROUBLE = ("image_retried", "image_lost", "image_overdue")


@dataclass(frozen=True)
class Course:
    """What happened when; times in seconds since the first event.

    Attributes
    ----------
    begun : str
        When that was, UTC.
    done : ndarray (n, 2)
        When the number of images that are done changed, and by how much: 1 with most, less where results were taken
        back, more where a killed driver could not tell of its last ones.
    failed : dict
        By "step: type of error": the same of the images that have failed so, and have not been mended.
    workers : ndarray (m, 2)
        From when on there were how many.
    drivers : ndarray (k, 2)
        When each driver began, and was last heard of.
    trouble : dict
        How often images were tried again, by event.
    """

    begun: str
    done: NDArray[np.float64]
    failed: Mapping[str, NDArray[np.float64]]
    workers: NDArray[np.float64]
    drivers: NDArray[np.float64]
    trouble: Mapping[str, int]

    @property
    def at_work(self) -> float:
        """Seconds in which there was a driver."""
        return float((self.drivers[:, 1] - self.drivers[:, 0]).sum())


class _Tally:
    """How many images are done and failed, each once; what the disk held when a driver began goes before its log."""

    def __init__(self) -> None:
        self.done = array("d")
        self.failed: dict[str, array[float]] = {}
        self._n = 0
        self._causes: dict[str, str] = {}  # of the images that have failed
        self._standing: set[str] = set()  # of these, what is taken for failed on the disk where this driver began
        self._ended: set[int] = set()  # with this driver; hashes, for there may be millions

    def begin(self, now: float, event: Mapping[str, Any]) -> None:
        """A driver begins: so many images had ended that are not its own to do."""
        self._ended.clear()
        self._standing.clear()
        before = event.get("before")
        if event.get("command") == "retry" or not isinstance(before, int):  # it tells of nothing but what it tries
            return
        if before < len(self._causes):
            for image_id in list(self._causes):
                self._mend(now, image_id)
        self._standing.update(self._causes)
        self._count(now, before - len(self._causes) - self._n)

    def end(self, now: float, image_id: str, cause: str | None) -> None:
        """An image is done, or failed; one whose result was found damaged ends again."""
        known = hash(image_id) in self._ended
        if image_id in self._standing:  # it was not: its failure was taken back, and another image is done
            self._standing.remove(image_id)
            self._count(now, 1)
        if cause is None:
            self._mend(now, image_id)
            if not known:
                self._ended.add(hash(image_id))
                self._count(now, 1)
        elif self._causes.get(image_id) != cause:
            self._mend(now, image_id)
            self._causes[image_id] = cause
            self.failed.setdefault(cause, array("d")).extend((now, 1))
        if cause is not None and known:
            self._ended.remove(hash(image_id))
            self._count(now, -1)

    def _mend(self, now: float, image_id: str) -> None:
        if cause := self._causes.pop(image_id, None):
            self.failed[cause].extend((now, -1))

    def _count(self, now: float, change: int) -> None:
        if change:
            self._n += change
            self.done.extend((now, change))


def _changes(pairs: array[float]) -> NDArray[np.float64]:
    changes = np.array(pairs).reshape(-1, 2)
    return changes[np.argsort(changes[:, 0], kind="stable")]


def read_course(events: Iterable[Mapping[str, Any]]) -> Course | None:
    """The `Course` that events tell; None where no driver wrote any. Keeps some hundred bytes an image."""
    first, begun = None, ""
    tally = _Tally()
    workers: list[tuple[float, float]] = []
    drivers: list[list[float]] = []
    trouble: Counter[str] = Counter()
    for event in events:
        try:
            now = datetime.fromisoformat(event["time"]).timestamp()
        except (TypeError, ValueError):
            continue
        if first is None:
            first, begun = now, str(event["time"])
        now -= first
        kind = event["event"]
        if kind == "run_begun" or not drivers:
            workers += [(drivers[-1][1], 0.0)] if drivers else []  # a killed one could not say that they left
            drivers.append([now, now])
        drivers[-1][1] = max(drivers[-1][1], now)
        if kind == "run_begun":
            tally.begin(now, event)
        elif kind in FINISHED:
            cause = None if kind == "image_done" else f"{event.get('stage', '?')}: {event.get('error', '?')}"
            tally.end(now, str(event.get("image_id")), cause)
        elif kind in _TROUBLE:
            trouble[kind] += 1
        if kind in ("run_begun", "run_ended"):
            workers.append((now, 0.0))
        elif kind == "workers":
            workers.append((now, float(event.get("workers", 0))))
    if first is None:
        return None
    return Course(
        begun=begun,
        done=_changes(tally.done),
        failed={cause: _changes(changes) for cause, changes in tally.failed.items()},
        workers=np.array(workers).reshape(-1, 2),
        drivers=np.array(drivers),
        trouble=dict(trouble),
    )
