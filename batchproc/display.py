"""What a person sees while a run is at work: a bar on a terminal, a line now and then elsewhere; on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["duration", "say", "show", "size"]

Item = TypeVar("Item")

_EVERY_S = 10.0


def say(text: str, *, quiet: bool = False) -> None:
    """A line for the person who waits."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def show(
    items: Iterable[Item],
    total: int,
    what: str,
    *,
    count: Callable[[Item], int] = lambda item: 1,
    note: Callable[[], str] = lambda: "",
    quiet: bool = False,
) -> Iterator[Item]:
    """Pass items through and show how far they are, how fast they come, and when the last one will.

    Parameters
    ----------
    items : iterable
    total : int
        Units in all items.
    what : str
        Name of a unit, in the plural.
    count : callable
        Units in an item.
    note : callable
        A few words more, asked for with each item.
    quiet : bool
        Show nothing.
    """
    if quiet or total == 0:
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, total, what, count, note)
    else:
        yield from _lines(items, total, what, count, note)


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


def _bar(
    items: Iterable[Item], total: int, what: str, count: Callable[[Item], int], note: Callable[[], str]
) -> Iterator[Item]:
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {what}", file=sys.stderr, smoothing=0.1, dynamic_ncols=True) as bar:
        for item in items:
            bar.set_postfix_str(note(), refresh=False)
            bar.update(count(item))
            yield item


def _lines(
    items: Iterable[Item], total: int, what: str, count: Callable[[Item], int], note: Callable[[], str]
) -> Iterator[Item]:
    start = told = time.monotonic()
    done = 0
    for item in items:
        done += count(item)
        now = time.monotonic()
        if now - told >= _EVERY_S or done >= total:
            rate = done / max(now - start, 1e-9)
            left = f", {duration((total - done) / rate)} left" if done < total else f" in {duration(now - start)}"
            more = note()
            say(f"{done}/{total} {what}, {rate:.3g} a second{left}{f' ({more})' if more else ''}")
            told = now
        yield item
