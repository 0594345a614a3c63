"""One conformance suite for every executor, and the sliding window above them."""

from __future__ import annotations

import os
from functools import partial

import numba
import pytest
import zarr
from numcodecs import blosc

from batchproc.distribute.clusters import Where, open_executor
from batchproc.distribute.executors import Outcome, SerialExecutor, WorkerDiedError, sliding
from batchproc.distribute.threads import limit_threads, thread_environment
from batchproc.errors import ReadError, UsageError


def double(x):
    return 2 * x


def fail(x):
    raise ReadError(f"item {x}", found=x)


def die(x):
    os._exit(9)


def environment(name):
    return os.environ.get(name)


class Backwards:
    """A fake: finishes what it has in the opposite order, and remembers how much that was."""

    workers = 2
    here = True
    worker_memory = None
    absent_for = 0.0

    def __init__(self):
        self.waiting = []
        self.most = 0
        self.cancelled = 0

    def offers(self, resource):
        return False

    def submit(self, function, *arguments, resources=None, priority=0):
        self.waiting.append((object(), partial(function, *arguments)))
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1][0]

    def wait(self, timeout=None):
        ticket, call = self.waiting.pop()
        try:
            return [(ticket, Outcome(call()))]
        except Exception as error:
            return [(ticket, Outcome(error=error))]

    def cancel(self):
        self.cancelled += len(self.waiting)
        self.waiting.clear()


@pytest.fixture(params=["serial", "backwards", "dask"])
def executor(request):
    if request.param == "serial":
        return SerialExecutor()
    return Backwards() if request.param == "backwards" else request.getfixturevalue("dask_executor")


def test_every_item_comes_back_once_with_its_value(executor):
    """Whatever the order of completion, items and outcomes belong together."""
    results = [(item, outcome.value) for item, outcome in sliding(executor, double, range(50))]
    assert sorted(results) == [(i, 2 * i) for i in range(50)]


def test_an_error_is_an_outcome(executor):
    """An error of a call comes back whole, numbers and all, and the other calls go on."""
    outcomes = dict(sliding(executor, fail, range(3)))
    assert sorted(outcomes) == [0, 1, 2]
    assert isinstance(outcomes[2].error, ReadError)
    assert outcomes[2].error.metadata == {"found": 2}


def test_no_items_no_calls(executor):
    """An empty campaign ends at once."""
    assert list(sliding(executor, double, [])) == []


def test_items_are_drawn_as_they_are_needed(executor):
    """Never more under way than the window, however many items there are; leaving the loop cancels the rest."""
    drawn = []

    def items():
        for i in range(10**6):
            drawn.append(i)
            yield i

    results = sliding(executor, double, items(), window=5)
    for _ in range(10):
        next(results)
    results.close()
    assert len(drawn) <= 16
    if isinstance(executor, Backwards):
        assert executor.most == 5
        assert executor.cancelled == 5
    assert next(iter(sliding(executor, double, [1])))[1].value == 2


def test_a_deadly_call_takes_nobody_along(dask_executor):
    """A call that kills its worker comes back as such; the workers come back, and the other calls succeed."""
    calls = [(die, 0), *((double, i) for i in range(8))]
    outcomes = [outcome for _, outcome in sliding(dask_executor, apply, calls, window=3)]
    assert sum(isinstance(outcome.error, WorkerDiedError) for outcome in outcomes) >= 1
    again = [outcome.value for _, outcome in sliding(dask_executor, double, range(4), window=1)]
    assert again == [0, 2, 4, 6]


def apply(call):
    function, argument = call
    return function(argument)


def test_workers_are_told_their_number_of_threads(dask_executor):
    """The libraries' variables are set in a worker before anything is imported there."""
    names = list(thread_environment(1))
    values = {name: outcome.value for name, outcome in sliding(dask_executor, environment, names)}
    assert values == thread_environment(1)


def test_limiting_threads_reaches_what_is_imported():
    """Numba, Blosc and Zarr of this process do as they are told, and afterwards as before."""

    before = thread_counts()
    with limit_threads(1):
        assert thread_counts() == (1, 1, 1)
    assert thread_counts() == before


def test_a_serial_run_leaves_its_caller_as_it_was():
    """Threads are held to the number while it works, and given back."""
    before = thread_counts()
    with open_executor(Where("serial"), threads=1) as executor:
        assert [outcome.value for _, outcome in sliding(executor, call, [thread_counts])] == [(1, 1, 1)]
    assert thread_counts() == before


def thread_counts():
    return numba.get_num_threads(), blosc_threads(), zarr.config.get("threading.max_workers")


def blosc_threads():
    n = blosc.set_nthreads(1)
    blosc.set_nthreads(n)
    return n


def call(function):
    return function()


@pytest.mark.parametrize("word", ["nonsense", ""])
def test_an_unknown_cluster_is_refused(word):
    """The message lists what there is."""
    with pytest.raises(UsageError, match="expected local, serial"), open_executor(Where(word)):
        pass
