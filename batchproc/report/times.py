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

__all__ = ["Course", "read_course"]

_TROUBLE = ("image_retried", "image_lost", "image_overdue")


@dataclass(frozen=True)
class Course:
    """What happened when; times in seconds since the first event.

    Attributes
    ----------
    begun : str
        When that was, UTC.
    done : ndarray (n,)
        When each image was finished.
    failed : dict
        By "step: type of error": when images failed so.
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


def read_course(events: Iterable[Mapping[str, Any]]) -> Course | None:
    """The `Course` that events tell; None where no driver wrote any. Keeps eight bytes an image."""
    first, begun = None, ""
    done = array("d")
    failed: dict[str, array[float]] = {}
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
        if kind == "image_done":
            done.append(now)
        elif kind in ("image_failed", "image_bug"):
            cause = f"{event.get('stage', '?')}: {event.get('error', '?')}"
            failed.setdefault(cause, array("d")).append(now)
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
        done=np.sort(np.array(done)),
        failed={cause: np.sort(np.array(times)) for cause, times in failed.items()},
        workers=np.array(workers).reshape(-1, 2),
        drivers=np.array(drivers),
        trouble=dict(trouble),
    )
