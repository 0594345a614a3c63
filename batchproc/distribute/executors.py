"""Where work runs, as a small protocol: submit a call, wait for some to finish.

`SerialExecutor` runs each call here, when it is waited for; `DaskExecutor` hands it to a Dask cluster. Everything above
(`sliding`, campaigns) is the same for both. A fake for tests has the same members.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from batchproc.errors import ClusterError

__all__ = ["DaskExecutor", "Executor", "Outcome", "SerialExecutor", "WorkerDiedError", "sliding"]

Item = TypeVar("Item")

_POLL_S = 0.1
_LOOK_S = 2.0  # how old the number of workers may be


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
        """How many calls run at the same time, at least 1; on a queue it changes while jobs come and go."""
        ...

    @property
    def worker_memory(self) -> int | None:
        """Bytes that the smallest worker may use; None where nobody knows."""
        ...

    @property
    def here(self) -> bool:
        """Whether calls run in this process, whose settings are not ours to change."""
        ...

    @property
    def absent_for(self) -> float:
        """Seconds for which there has been no worker at all; 0 where there are some."""
        ...

    def offers(self, resource: str) -> bool:
        """Whether a worker has that resource (``GPU``), or may come that has it."""
        ...

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        resources: Mapping[str, float] | None = None,
        priority: int = 0,
    ) -> Hashable:
        """Accept a call; returns a ticket for it.

        Parameters
        ----------
        function, *arguments
        resources : mapping, optional
            What the worker must have: ``{"GPU": 1}``.
        priority : int
            Calls of a higher one go first.
        """
        ...

    def wait(self, timeout: float | None = None) -> list[tuple[Hashable, Outcome]]:
        """Wait until something has finished; each ticket comes back once, and nothing of it is kept.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which the answer is empty.

        Raises
        ------
        ClusterError
            Nothing will ever finish: the scheduler is gone, or all workers are, and none will come.
        """
        ...

    def cancel(self) -> None:
        """Forget whatever has been submitted and has not come back."""
        ...


class SerialExecutor:
    """One call after the other, in this process."""

    workers = 1
    here = True
    worker_memory = None
    absent_for = 0.0

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], Callable[[], Any]] = {}
        self._submitted = 0

    def offers(self, resource: str) -> bool:
        """Whatever this machine has: the model's session will say."""
        return True

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        resources: Mapping[str, float] | None = None,
        priority: int = 0,
    ) -> Hashable:
        """Queue a call."""
        self._submitted += 1
        ticket = (-priority, self._submitted)
        self._waiting[ticket] = partial(function, *arguments)
        return ticket

    def wait(self, timeout: float | None = None) -> list[tuple[Hashable, Outcome]]:
        """Run the oldest call of the highest priority."""
        if not self._waiting:
            time.sleep(timeout or 0.0)
            return []
        ticket = min(self._waiting)
        call = self._waiting.pop(ticket)
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
    patience : float, optional
        Seconds without any worker after which there is no hope; by default one may always come (a queue).
    resources : iterable of str
        What workers have that may come later.
    """

    here = False

    def __init__(self, client: Any, *, patience: float | None = None, resources: Iterable[str] = ()) -> None:
        from distributed import as_completed

        self.client = client
        self._patience, self._resources = patience, frozenset(resources)
        self._finished = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._waiting: dict[str, Any] = {}
        self._threads, self._looked, self._seen = 0, -math.inf, time.monotonic()

    @property
    def workers(self) -> int:
        """Threads of the workers that are there now, at least 1."""
        self._look(max_age=_LOOK_S)
        return max(1, self._threads)

    @property
    def worker_memory(self) -> int | None:
        """The smallest limit of the workers that are there now; None where there are none, or one has no limit."""
        limits = [worker["memory_limit"] for worker in self._all_workers()]
        return min(limits) if limits and all(limits) else None

    @property
    def absent_for(self) -> float:
        """Seconds since a worker was last seen; 0 while there are some."""
        self._look(max_age=_LOOK_S)
        return 0.0 if self._threads else time.monotonic() - self._seen

    def offers(self, resource: str) -> bool:
        """Whether a worker has that resource, or may come that has it."""
        return resource in self._resources or any(resource in w.get("resources", ()) for w in self._all_workers())

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        resources: Mapping[str, float] | None = None,
        priority: int = 0,
    ) -> Hashable:
        """Send a call to the scheduler."""
        from distributed.protocol.pickle import dumps

        plain = function.func if isinstance(function, partial) else function
        key = f"{plain.__name__}-{uuid.uuid4().hex}"  # the dashboard groups by what stands before the dash
        needs = dict(resources) if resources else None
        # As bytes, since the scheduler would unpickle a function, and import all that it needs.
        call = dumps((function, arguments))
        future = self.client.submit(_call, call, key=key, pure=False, resources=needs, priority=priority)
        self._waiting[key] = future
        self._finished.add(future)
        return key

    def wait(self, timeout: float | None = None) -> list[tuple[Hashable, Outcome]]:
        """Take the calls that have finished."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self._finished.has_ready():
            if time.monotonic() >= end:
                return []
            if self._patience is not None and self.absent_for > self._patience:
                raise ClusterError(
                    f"no worker has been there for {self._patience:.0f} s and none comes back: every one that begins "
                    "ends at once; look for its reason in what was printed above, then run again to go on"
                )
            with self._finished.thread_condition:
                self._finished.thread_condition.wait(min(_POLL_S, max(0.0, end - time.monotonic())))
        results = []
        for future, result in self._finished.next_batch(block=False):
            self._waiting.pop(future.key, None)
            results.append((future.key, self._outcome(future, result)))
            future.release()
        return results

    def cancel(self) -> None:
        """Take back what has not begun, and forget what has."""
        self._finished.clear()
        if self._waiting and self.client.status == "running":
            self.client.cancel(list(self._waiting.values()))
        self._waiting.clear()

    def _look(self, max_age: float) -> None:
        now = time.monotonic()
        if now - self._looked < max_age:
            return
        try:
            self._threads = sum(self.client.nthreads().values())
        except (OSError, RuntimeError, ValueError) as error:
            raise _gone(error) from error
        self._looked = now
        if self._threads:
            self._seen = now

    def _all_workers(self) -> list[dict[str, Any]]:
        try:
            information = self.client.scheduler_info(n_workers=-1)
        except TypeError:  # Dask before 2025 always tells of all
            information = self.client.scheduler_info()
        return list(information["workers"].values())

    @staticmethod
    def _outcome(future: Any, result: Any) -> Outcome:
        from distributed import KilledWorker

        if future.status == "finished":
            return Outcome(result)
        if future.status in ("cancelled", "lost"):  # nobody but the scheduler's end cancels what we wait for
            raise _gone(result)
        error = result[1] if isinstance(result, tuple) else result
        if isinstance(error, KilledWorker):
            error = WorkerDiedError("the worker process died while it worked on this")
        return Outcome(error=error)


def _call(pickled: bytes) -> Any:
    from distributed.protocol.pickle import loads

    function, arguments = loads(pickled)
    return function(*arguments)


def _gone(error: object) -> ClusterError:
    return ClusterError(f"the Dask scheduler is gone ({error}); what was done is kept: run again to go on")


def _wait(executor: Executor, idle: tuple[Callable[[], None], float] | None) -> list[tuple[Hashable, Outcome]]:
    if idle is None:
        return executor.wait()
    look, every = idle
    while not (finished := executor.wait(every)):
        look()
    return finished


def sliding(
    executor: Executor,
    function: Callable[[Item], Any],
    items: Iterable[Item],
    window: int | None = None,
    *,
    resources: Mapping[str, float] | None = None,
    idle: tuple[Callable[[], None], float] | None = None,
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
    resources : mapping, optional
        What a worker must have for it.
    idle : (callable, float), optional
        What is called while nothing finishes, every so many seconds.
    """
    remaining = iter(items)
    waiting: dict[Hashable, Item] = {}

    def fill() -> None:
        for item in islice(remaining, max(0, (window or 2 * executor.workers + 2) - len(waiting))):
            waiting[executor.submit(function, item, resources=resources)] = item

    try:
        fill()
        while waiting:
            for ticket, outcome in _wait(executor, idle):
                item = waiting.pop(ticket)
                fill()
                yield item, outcome
    finally:
        executor.cancel()
