"""The tiles of one image on many workers: a `map` for the numerics, in the order of its input.

One image a task is the quickest way through many images, since nothing but a receipt crosses the wire. One large image
is back sooner when its tiles are worked on everywhere. The task that has the image does the tiles of its own machine in
threads, one for each worker there (they are idle, and a subtraction is too quick to be worth a copy of its pixels), and
sends frames to the workers of other machines. The function and its inputs are the same wherever it runs, so the bytes
are too.

Frames go from worker to worker; the scheduler knows them by name only, and no more of them are under way than it takes
to keep everybody busy.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar
from urllib.parse import urlsplit

from batchproc.distribute.executors import WorkerDiedError

__all__ = ["TileMap", "tiles_under_way"]

Input = TypeVar("Input")
Output = TypeVar("Output")

#: Stands for the threads of this process among the addresses of workers.
_HERE = ""


def tiles_under_way(workers: int) -> int:
    """How many tiles of an image are handed out at a time: one is worked on and one waits at each worker."""
    return 2 * workers


class TileMap:
    """`map` over the workers of a Dask cluster.

    Within a task it uses the cluster that the task runs on, and while it waits it lends the task's place on its own
    worker to the tiles.

    Parameters
    ----------
    prepare : callable, optional
        Called without arguments in the process of a tile before each (settings, FFTW's plans), so it should remember
        what it has done.
    client : distributed.Client, optional
        The cluster, for a caller that is not a task on it: all tiles go there.

    Attributes
    ----------
    cpu_elsewhere : float
        CPU seconds that other processes than the caller's have spent on the tiles so far.
    """

    def __init__(self, prepare: Callable[[], Any] | None = None, client: Any = None) -> None:
        self._prepare, self._client = prepare, client
        self.cpu_elsewhere = 0.0

    def __call__(self, function: Callable[[Input], Output], inputs: Iterable[Input]) -> Iterator[Output]:
        """Equivalent to ``map(function, inputs)``; inputs are drawn as workers become free.

        Raises
        ------
        WorkerDiedError
            A worker died under a tile. What the function raises is raised as it is.
        """
        from distributed import get_worker, worker_client

        with ExitStack() as stack:
            client = self._client or stack.enter_context(worker_client())
            threads = client.nthreads()
            if self._client is None:
                threads = _with_own_machine_here(threads, get_worker().address)
            pool = stack.enter_context(ThreadPoolExecutor(threads[_HERE])) if _HERE in threads else None
            waiting: deque[tuple[Any, str]] = deque()  # each tile, and where it was sent

            def load(where: str) -> float:
                return sum(there == where and not tile.done() for tile, there in waiting) / threads[where]

            def submit(item: Input) -> tuple[Any, str]:
                where = min(threads, key=load)
                if pool is not None and where == _HERE:
                    return pool.submit(_work, self._prepare, function, item), where
                return self._send(client, where, function, item), where

            try:
                for item in inputs:
                    waiting.append(submit(item))
                    if len(waiting) >= tiles_under_way(sum(threads.values())):
                        yield self._take(waiting.popleft()[0])
                while waiting:
                    yield self._take(waiting.popleft()[0])
            finally:
                for tile, _ in waiting:
                    tile.cancel()

    def _send(self, client: Any, worker: str, function: Callable[[Any], Any], item: Any) -> Any:
        # Into this worker's own memory, from where the chosen one fetches it; only a name goes to the scheduler. Left
        # to itself the scheduler would send every tile to where the frames are.
        (frame,) = client.scatter([item], hash=False)
        return client.submit(
            _work,
            self._prepare,
            function,
            frame,
            pure=False,
            workers=[worker],
            allow_other_workers=True,
            priority=1,  # before whole images: the task that waits for a tile holds one already
        )

    def _take(self, tile: Any) -> Any:
        from distributed import KilledWorker

        try:
            value, process, cpu_seconds = tile.result()
        except KilledWorker:
            raise WorkerDiedError("a worker process died while it worked on a tile of this image") from None
        if process != os.getpid():
            self.cpu_elsewhere += cpu_seconds
        return value


def _with_own_machine_here(threads: dict[str, int], address: str) -> dict[str, int]:
    """Threads of each worker, those on the machine of `address` joined into one entry: here."""
    host = urlsplit(address).hostname
    away = {worker: n for worker, n in threads.items() if urlsplit(worker).hostname != host}
    return {_HERE: sum(threads.values()) - sum(away.values()), **away}


def _work(prepare: Callable[[], Any] | None, function: Callable[[Any], Any], item: Any) -> tuple[Any, int, float]:
    """One tile: what comes out, in which process, and the CPU seconds it took."""
    if prepare is not None:
        prepare()
    start = time.thread_time()
    return function(item), os.getpid(), time.thread_time() - start
