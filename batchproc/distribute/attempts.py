"""Who has been tried how often, and what follows: the bookkeeping of a campaign, without executor, disk or clock.

An image is at one place at a time: not drawn yet, waiting for its next trial, under way, or ended. What goes wrong with
a trial and is not the image's own last word is a `Mishap`:

========== ================================================== ==================================================
mishap     what happened                                      what follows
========== ================================================== ==================================================
TRANSIENT  an error that may heal                             again, later and later; the fourth is its end
LOST       its worker died, of whatever                       again by itself; the second time alone
CRASHED    it was tried alone and its process died            again alone; the third is its end
OVERRAN    it took more time or memory than it may            alone; the second is its end
========== ================================================== ==================================================

Alone means in a process of its own on a worker that does nothing else (`batchproc.distribute.alone`), so that a crash
is nobody else's. A worker that is lost together with an image that was tried alone (a node that went down) is LOST as
well: only the tenth such loss is its end, since an image might take whole nodes along.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from batchproc.records import ManifestEntry

__all__ = ["Attempts", "Counts", "Mishap", "Trial"]

#: Mishaps of each kind at which an image is given up.
_TRANSIENT, _LOST_ALONE, _CRASHED, _OVERRAN = 4, 10, 3, 2
#: Losses in the stream after which an image is tried alone.
_LOST = 2
#: Seconds until the next trial after the first error that may heal; four times as many after each further one.
_BACKOFF_S, _BACKOFF_FACTOR = 10.0, 4.0


class Mishap(StrEnum):
    """Why a trial was not the end of an image; the status of a receipt that is not final."""

    TRANSIENT = "transient"
    LOST = "lost"
    CRASHED = "crashed"
    OVERRAN = "overran"


@dataclass(frozen=True)
class Counts:
    """Mishaps of one image so far."""

    transient: int = 0
    lost: int = 0
    lost_alone: int = 0
    crashed: int = 0
    overran: int = 0

    @property
    def alone(self) -> bool:
        """Whether the next trial is one alone."""
        return self.lost >= _LOST or self.overran > 0 or self.crashed > 0

    def after(self, mishap: Mishap, alone: bool) -> Counts:
        """With one more mishap."""
        name = "lost_alone" if mishap is Mishap.LOST and alone else mishap.value
        return replace(self, **{name: getattr(self, name) + 1})

    def given_up(self, alone: bool) -> bool:
        """Whether the last mishap, of a trial that was one alone or not, is the end of the image."""
        return (
            self.transient >= _TRANSIENT
            or self.lost_alone >= _LOST_ALONE
            or self.crashed >= _CRASHED
            or (alone and self.overran >= _OVERRAN)
        )


@dataclass(frozen=True)
class Trial:
    """Images that a worker is given together.

    Attributes
    ----------
    entries : tuple of ManifestEntry
    number : int
        Of the trial, in this campaign.
    alone : bool
        One image, in a process of its own.
    """

    entries: tuple[ManifestEntry, ...]
    number: int
    alone: bool = False


class Attempts:
    """The state of a campaign's images.

    Parameters
    ----------
    entries : iterable of ManifestEntry
        To be tried, drawn as they are needed; each once.
    before : mapping, optional
        Image id → `Counts` of earlier campaigns on the run (`record`).
    """

    def __init__(self, entries: Iterable[ManifestEntry], before: Mapping[str, Counts] | None = None) -> None:
        self._fresh: Iterator[ManifestEntry] = iter(entries)
        self._counts = dict(before or {})
        self._next: deque[ManifestEntry] = deque()  # drawn or given back; each goes by itself
        self._later: list[tuple[float, int, ManifestEntry]] = []
        self._alone: deque[ManifestEntry] = deque()
        self._under_way: dict[str, Trial] = {}
        self._drawn_all = False
        self._number = 0

    @property
    def under_way(self) -> int:
        """Images that somebody works on."""
        return len(self._under_way)

    @property
    def finished(self) -> bool:
        """Whether every image has ended."""
        return self._drawn_all and not (self._next or self._later or self._alone or self._under_way)

    def take(self, now: float, size: int = 1, *, alone: bool = True) -> Trial | None:
        """The next trial, which is under way from now on; None while there is nothing to try.

        Parameters
        ----------
        now : float
            Seconds on any clock that is the caller's throughout.
        size : int
            Most images of a trial; those that have been tried before go by themselves.
        alone : bool
            Whether it may be one alone.
        """
        while self._later and self._later[0][0] <= now:
            self._queue(heapq.heappop(self._later)[2])
        if alone and self._alone:
            return self._begin((self._alone.popleft(),), alone=True)
        if self._next:
            return self._begin((self._next.popleft(),))
        fresh: list[ManifestEntry] = []
        while len(fresh) < size and not self._drawn_all:
            entry = next(self._fresh, None)
            if entry is None:
                self._drawn_all = True
            elif entry.image_id in self._counts:
                self._queue(entry)
            else:
                fresh.append(entry)
        if fresh:
            return self._begin(tuple(fresh))
        if self._next or (alone and self._alone):  # drawn just now
            return self.take(now, size, alone=alone)
        return None

    def wait_s(self, now: float) -> float | None:
        """Seconds until an image is due that waits for its error to heal; None where none does."""
        return max(0.0, self._later[0][0] - now) if self._later else None

    def end(self, image_id: str) -> None:
        """An image that was under way has ended: done, failed, or a bug."""
        del self._under_way[image_id]
        self._counts.pop(image_id, None)

    def again(self, entry: ManifestEntry) -> None:
        """An image that had ended is to be done once more."""
        self._queue(entry)

    def mishap(self, entry: ManifestEntry, mishap: Mishap, now: float) -> bool:
        """Something went wrong with an image that was under way; returns whether that is its end.

        Where it is not, the image will come again (`take`). A worker that was lost with several images says nothing of
        any one of them: they come again, each by itself.
        """
        trial = self._under_way.pop(entry.image_id)
        counts = self._counts.get(entry.image_id, Counts())
        if not (mishap is Mishap.LOST and len(trial.entries) > 1):
            counts = counts.after(mishap, trial.alone)
        if counts.given_up(trial.alone):
            self._counts.pop(entry.image_id, None)
            return True
        self._counts[entry.image_id] = counts
        if mishap is Mishap.TRANSIENT:
            due = now + _BACKOFF_S * _BACKOFF_FACTOR ** (counts.transient - 1)
            heapq.heappush(self._later, (due, self._number, entry))
            self._number += 1
        else:
            self._queue(entry)
        return False

    def record(self) -> dict[str, dict[str, int]]:
        """What a later campaign must know, as JSON takes it: image id → counts of those that are not at their end.

        Errors that heal are no matter of a later day.
        """
        kept = ((image_id, replace(counts, transient=0)) for image_id, counts in self._counts.items())
        return {image_id: asdict(counts) for image_id, counts in kept if counts != Counts()}

    @staticmethod
    def recorded(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Counts]:
        """The opposite of `record`."""
        return {image_id: Counts(**counts) for image_id, counts in record.items()}

    def _queue(self, entry: ManifestEntry) -> None:
        alone = self._counts.get(entry.image_id, Counts()).alone
        (self._alone if alone else self._next).append(entry)

    def _begin(self, entries: tuple[ManifestEntry, ...], alone: bool = False) -> Trial:
        self._number += 1
        trial = Trial(entries, self._number, alone)
        self._under_way.update((entry.image_id, trial) for entry in entries)
        return trial
