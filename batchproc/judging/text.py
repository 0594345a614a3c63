"""Numbers with their intervals, and tables, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from batchproc.learning.evaluate import Interval

__all__ = ["not_shown", "say", "table"]


def say(value: Interval | None, digits: int = 4) -> str:
    """``value [low, high]``; a dash for none."""
    if value is None or np.isnan(value.value):
        return "–"
    one, low, high = (_number(v, digits) for v in (value.value, value.low, value.high))
    return one if np.isnan(value.low) else f"{one} [{low}, {high}]"


def not_shown(hidden: Mapping[str, int], key: str) -> Iterator[str]:
    """For each column of which parts are not in a table, how many these are."""
    for column, number in hidden.items():
        yield f"{column}: {number} more, none with a lower {key}; all are in metrics.json"


def _number(value: float, digits: int) -> str:
    """With so many digits behind the point, or as many that count where that would leave none."""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10.0 ** (1 - digits) else f"{value:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, each as wide as it must be."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]
