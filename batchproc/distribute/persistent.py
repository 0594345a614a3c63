"""Calls over an executor that are tried again: where a worker died under one, or its error may heal by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from batchproc.distribute.executors import Executor, Outcome, WorkerDiedError, sliding
from batchproc.distribute.transient import is_transient

__all__ = ["persistent"]

Item = TypeVar("Item")

_TRIALS = 6  # of an item
_BACKOFF_S = 10.0  # before the second one where an error may heal, twice as long before each more


def persistent(
    executor: Executor,
    function: Callable[[Item], object],
    items: Iterable[Item],
    *,
    resources: Mapping[str, float] | None = None,
    smaller: Callable[[Item], Iterable[Item]] = lambda item: (item,),
    left: Callable[[Item], Item | None] = lambda item: item,
    idle: tuple[Callable[[], None], float] | None = None,
) -> Iterator[tuple[Item, Outcome]]:
    """Map a function over items as `sliding` does, and yield the last word on each.

    What is tried again is tried when all others have been tried.

    Parameters
    ----------
    executor : Executor
    function : callable
        Of one item; run twice on one, it does the same.
    items : iterable
    resources : mapping, optional
        What a worker must have for it.
    smaller : callable, optional
        What an item is tried again as whose worker died under it: several items that are it together, so that the one
        to blame is found.
    left : callable, optional
        What of an item is still wanted when its turn comes, the first time or again; of None nothing more is heard.
    idle : (callable, float), optional
        What is called while nothing finishes, every so many seconds.

    Yields
    ------
    item, Outcome
    """
    for trial in range(_TRIALS):
        again: list[Item] = []
        rest = False
        wanted = (item for item in map(left, items) if item is not None)
        for item, outcome in sliding(executor, function, wanted, resources=resources, idle=idle):
            last = trial == _TRIALS - 1
            if isinstance(outcome.error, WorkerDiedError) and not last:
                again += smaller(item)
            elif outcome.error is not None and is_transient(outcome.error) and not last:
                again.append(item)
                rest = True
            else:
                yield item, outcome
        if not again:
            return
        if rest:
            time.sleep(_BACKOFF_S * 2**trial)
        items = again
