"""What a person sees while a run is at work: a bar on a terminal, a line now and then elsewhere; on standard error."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TypeVar

__all__ = ["Pace", "bar", "duration", "pace", "say", "show", "size"]

Item = TypeVar("Item")

_FIRST_LINE_S, _LAST_LINE_S = 10.0, 600.0  # from line to line: at first, and after hours
_LINES_PER_LIFE = 30  # while a run is young a line comes after a thirtieth of its age


def say(text: str, *, quiet: bool = False) -> None:
    """A line for the person who waits."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


class Pace:
    """How many units a second are finished *now*: over the last ten minutes, longer where little was finished in them.

    A campaign of weeks is slower and faster in turn, as workers come and go; its beginning says nothing of its end.

    Parameters
    ----------
    window : float
        Seconds.
    start : float, optional
        On the clock of `add`; default: now.
    """

    _FEWEST = 10  # finishing times that a rate is made of, where there are so many

    def __init__(self, window: float = 600.0, start: float | None = None) -> None:
        self._window = window
        self._start = time.monotonic() if start is None else start
        self._recent: deque[list[float]] = deque()  # time of the first of a second, units; a few hundred at most
        self._units = 0.0
        self._warm = False

    def add(self, units: float, now: float | None = None) -> None:
        """Note that so many units have been finished."""
        now = time.monotonic() if now is None else now
        if self._recent and now - self._recent[-1][0] < self._window / 600:
            self._recent[-1][1] += units
        else:
            self._recent.append([now, units])
        self._units += units
        # The first to finish had to wait for processes to begin and code to be compiled: soon they are not asked.
        while len(self._recent) > self._FEWEST and (self._recent[0][0] < now - self._window or not self._warm):
            self._start, gone = self._recent.popleft()
            self._units -= gone
            self._warm = True

    def rate(self, now: float | None = None) -> float:
        """Units a second; 0 where nothing has been finished."""
        now = time.monotonic() if now is None else now
        return self._units / max(now - self._start, 1e-9)


def show(
    items: Iterable[Item],
    total: int,
    what: str,
    *,
    count: Callable[[Item], int] = lambda item: 1,
    note: Callable[[], str] = lambda: "",
    before: int = 0,
    quiet: bool = False,
) -> Iterator[Item]:
    """Pass items through and show how far they are, how fast they come, and when the last one will.

    Parameters
    ----------
    items : iterable
    total : int
        Units in all items, and before them.
    what : str
        Name of a unit, in the plural.
    count : callable
        Units in an item.
    note : callable
        A few words more, asked for with each item.
    before : int
        Units that were finished earlier, by whom ever: they count as done, and not as fast.
    quiet : bool
        Show nothing.
    """
    if quiet or total <= before:
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, total, what, count, note, before)
    else:
        yield from _lines(items, total, what, count, note, before)


def pace(rate: float) -> str:
    """'12 a second', '3.5 a minute', '2 an hour', for units a second."""
    if rate >= 1:
        return f"{rate:.3g} a second"
    return f"{rate * 60:.3g} a minute" if rate * 60 >= 1 else f"{rate * 3600:.3g} an hour"


def bar(fraction: float, width: int = 40) -> str:
    """'[#######...]'."""
    full = min(width, max(0, int(fraction * width)))
    return f"[{'#' * full}{'.' * (width - full)}]"


def duration(seconds: float) -> str:
    """'12 s', '3 min 20 s', '2 h 5 min', '4 d 3 h'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    for big, small, unit, rest in ((60, 1, "min", "s"), (3600, 60, "h", "min")):
        if whole < 60 * big if unit == "min" else whole < 48 * big:
            return f"{whole // big} {unit} {whole % big // small} {rest}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(n_bytes: float) -> str:
    """'1.2 GB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} PB"


def _left(done: int, total: int, rate: float) -> str:
    return f"{duration((total - done) / rate)} left" if rate > 0 else ""


def _bar(
    items: Iterable[Item],
    total: int,
    what: str,
    count: Callable[[Item], int],
    note: Callable[[], str],
    before: int,
) -> Iterator[Item]:
    from tqdm import tqdm

    how = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"
    recent, done = Pace(), before
    with tqdm(total=total, initial=before, unit=what, file=sys.stderr, dynamic_ncols=True, bar_format=how) as on_screen:
        for item in items:
            recent.add(count(item))
            done += count(item)
            rate = recent.rate()
            parts = (pace(rate), _left(done, total, rate), note())
            on_screen.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
            on_screen.update(count(item))
            yield item


def _lines(
    items: Iterable[Item],
    total: int,
    what: str,
    count: Callable[[Item], int],
    note: Callable[[], str],
    before: int,
) -> Iterator[Item]:
    start = told = time.monotonic()
    recent, done = Pace(start=start), before
    for item in items:
        done += count(item)
        now = time.monotonic()
        recent.add(count(item), now)
        if now - told >= min(max(_FIRST_LINE_S, (now - start) / _LINES_PER_LIFE), _LAST_LINE_S) or done >= total:
            rate = recent.rate(now)
            left = f", {_left(done, total, rate)}" if done < total else f" in {duration(now - start)}"
            more = note()
            when = f"{datetime.now():%m-%d %H:%M} " if now - start > 3600 else ""
            say(f"{when}{done}/{total} {what}, {pace(rate)}{left}{f' ({more})' if more else ''}")
            told = now
        yield item
