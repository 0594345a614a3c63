"""Where work runs, as a small protocol: submit a call, wait for some to finish.

`SerialExecutor` runs each call here, when it is waited for; `DaskExecutor` hands it to a Dask cluster. Everything above
(`sliding`, campaigns) is the same for both. A fake for tests has the same members.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

__all__ = ["DaskExecutor", "Executor", "Outcome", "SerialExecutor", "WorkerDiedError", "sliding"]

Item = TypeVar("Item")


class WorkerDiedError(Exception):
    """The process that worked on a call died under it: out of memory, or a crash in a library."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with a value, or with an error."""

    value: Any = None
    error: BaseException | None = None


class Executor(Protocol):
    """Runs calls somewhere."""

    @property
    def workers(self) -> int:
        """How many calls run at the same time."""
        ...

    @property
    def here(self) -> bool:
        """Whether calls run in this process, whose settings are not ours to change."""
        ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        """Accept a call; returns a ticket for it."""
        ...

    def wait(self) -> list[tuple[Hashable, Outcome]]:
        """Wait until something has finished; each ticket comes back once, and nothing of it is kept."""
        ...

    def cancel(self) -> None:
        """Forget whatever has been submitted and has not come back."""
        ...


class SerialExecutor:
    """One call after the other, in this process."""

    workers = 1
    here = True

    def __init__(self) -> None:
        self._waiting: deque[tuple[Hashable, Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        """Queue a call."""
        ticket = object()
        self._waiting.append((ticket, partial(function, *arguments)))
        return ticket

    def wait(self) -> list[tuple[Hashable, Outcome]]:
        """Run the oldest call."""
        ticket, call = self._waiting.popleft()
        try:
            return [(ticket, Outcome(call()))]
        except Exception as error:
            return [(ticket, Outcome(error=error))]

    def cancel(self) -> None:
        """Empty the queue."""
        self._waiting.clear()


class DaskExecutor:
    """Calls on the workers of a Dask cluster.

    A future is released as soon as its result is here: the scheduler keeps nothing of what is finished.

    Parameters
    ----------
    client : distributed.Client
    """

    here = False

    def __init__(self, client: Any) -> None:
        from distributed import as_completed

        self.client = client
        self._finished = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._waiting: dict[str, Any] = {}

    @property
    def workers(self) -> int:
        """Threads of the workers that are there now, at least 1."""
        threads = self.client.nthreads()
        return max(1, sum(threads.values()))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Hashable:
        """Send a call to the scheduler."""
        plain = function.func if isinstance(function, partial) else function
        key = f"{plain.__name__}-{uuid.uuid4().hex}"  # the dashboard groups by what stands before the dash
        future = self.client.submit(function, *arguments, key=key, pure=False)
        self._waiting[key] = future
        self._finished.add(future)
        return key

    def wait(self) -> list[tuple[Hashable, Outcome]]:
        """Take the calls that have finished, at least one."""
        results = []
        for future, result in self._finished.next_batch(block=True):
            results.append((future.key, self._outcome(future, result)))
            self._waiting.pop(future.key, None)
            future.release()
        return results

    def cancel(self) -> None:
        """Take back what has not begun, and forget what has."""
        self._finished.clear()
        if self._waiting:
            self.client.cancel(list(self._waiting.values()))
        self._waiting.clear()

    @staticmethod
    def _outcome(future: Any, result: Any) -> Outcome:
        from distributed import KilledWorker

        if future.status == "finished":
            return Outcome(result)
        error = result[1] if isinstance(result, tuple) else result
        if isinstance(error, KilledWorker):
            error = WorkerDiedError("the worker process died while it worked on this")
        return Outcome(error=error)


def sliding(
    executor: Executor, function: Callable[[Item], Any], items: Iterable[Item], window: int | None = None
) -> Iterator[tuple[Item, Outcome]]:
    """Map a function over items, with a bounded number of calls under way: yields (item, outcome) as they finish.

    The items are drawn one by one, so neither this process nor the scheduler holds more than the window, however many
    there are. What is under way when the loop is left is cancelled.

    Parameters
    ----------
    executor : Executor
    function : callable
        Of one item. Its errors are outcomes.
    items : iterable
    window : int, optional
        By default two for each worker, so that none waits for the driver.
    """
    window = window or 2 * executor.workers + 2
    remaining = iter(items)
    waiting: dict[Hashable, Item] = {}
    try:
        for item in islice(remaining, window):
            waiting[executor.submit(function, item)] = item
        while waiting:
            for ticket, outcome in executor.wait():
                item = waiting.pop(ticket)
                for following in islice(remaining, 1):
                    waiting[executor.submit(function, following)] = following
                yield item, outcome
    finally:
        executor.cancel()
