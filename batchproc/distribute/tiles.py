"""The tiles of one image on many workers: a `map` for the numerics, in the order of its input.

One image a task is the quickest way through many images, since nothing but a receipt crosses the wire. One large image
is back sooner when its tiles are worked on everywhere: the task that has the image hands each frame to a worker, and
puts together what comes back. The function and its inputs are the same either way, so the bytes are too.

Frames go from worker to worker; the scheduler knows them by name only, and no more of them are under way than it takes
to keep the workers busy.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

from batchproc.distribute.executors import WorkerDiedError

__all__ = ["TileMap", "tiles_under_way"]

Input = TypeVar("Input")
Output = TypeVar("Output")


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
        The cluster, for a caller that is not a task on it.

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
        from distributed import worker_client

        with nullcontext(self._client) if self._client else worker_client() as client:
            threads = client.nthreads()
            window = tiles_under_way(sum(threads.values()))
            waiting: deque[tuple[Any, str]] = deque()  # each tile, and where it was sent

            def load(worker: str) -> float:
                return sum(where == worker and not tile.done() for tile, where in waiting) / threads[worker]

            try:
                for item in inputs:
                    where = min(threads, key=load)
                    waiting.append((self._submit(client, where, function, item), where))
                    if len(waiting) >= window:
                        yield self._take(waiting.popleft()[0])
                while waiting:
                    yield self._take(waiting.popleft()[0])
            finally:
                if waiting:
                    client.cancel([tile for tile, _ in waiting])

    def _submit(self, client: Any, worker: str, function: Callable[[Any], Any], item: Any) -> Any:
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

    def _take(self, future: Any) -> Any:
        from distributed import KilledWorker

        try:
            value, process, cpu_seconds = future.result()
        except KilledWorker:
            raise WorkerDiedError("a worker process died while it worked on a tile of this image") from None
        future.release()
        if process != os.getpid():
            self.cpu_elsewhere += cpu_seconds
        return value


def _work(prepare: Callable[[], Any] | None, function: Callable[[Any], Any], item: Any) -> tuple[Any, int, float]:
    """One tile: what comes out, in which process, and the CPU seconds it took."""
    if prepare is not None:
        prepare()
    start = time.thread_time()
    return function(item), os.getpid(), time.thread_time() - start
