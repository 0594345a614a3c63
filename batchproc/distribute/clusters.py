"""Which executor a user's word means: ``serial``, ``local``, or the address of a Dask scheduler.

A local cluster is one process a core with one thread each. Its ports are bound to the loopback interface: nobody on
another machine reaches them, but other users of this machine could.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchproc.distribute.executors import DaskExecutor, Executor, SerialExecutor
from batchproc.distribute.threads import limit_threads, thread_environment
from batchproc.errors import UsageError

__all__ = ["check_cluster", "dashboard", "local_workers", "open_executor"]

_DASK = {
    # The campaign itself gives a task a second chance, alone; and one task to a worker keeps blame from neighbours.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-saturation": 1.0,
    # Tasks hold no Dask data, so there is nothing to spill, and pausing would only wait for memory that Python keeps.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
}


def check_cluster(cluster: str) -> None:
    """Raise `UsageError` where `open_executor` does not know the word; connects to nothing."""
    if cluster not in ("serial", "local") and "://" not in cluster:
        raise UsageError(
            f"cluster {cluster!r}: expected local, serial, or the address of a scheduler (tcp://host:port)"
        )


@contextmanager
def open_executor(
    cluster: str = "local",
    workers: int | None = None,
    threads: int = 1,
    tasks: int = 10**9,
    large: int | None = None,
) -> Iterator[Executor]:
    """An executor for the time of a ``with`` block.

    Parameters
    ----------
    cluster : str
        ``"serial"``: here, one after the other. ``"local"``: a Dask cluster on this machine. ``"tcp://host:port"`` or
        ``"tls://host:port"``: a running Dask scheduler whose workers see the same files.
    workers : int, optional
        Processes of a local cluster; by default as many as there are cores for `threads` each.
    threads : int
        Threads that libraries may use in each process.
    tasks : int
        A local cluster has no more processes than this.
    large : int, optional
        Where no more than so many processes of a local cluster will hold much at a time, the memory is theirs; by
        default it is shared out equally.

    Raises
    ------
    UsageError
        Another word, or a scheduler that does not answer.
    """
    check_cluster(cluster)
    if cluster == "serial":
        with limit_threads(threads):  # of the caller's process, which gets its own back
            yield SerialExecutor()
    elif cluster == "local":
        with _local_client(workers, threads, tasks, large) as client:
            yield DaskExecutor(client)
    else:
        with _remote_client(cluster) as client:
            yield DaskExecutor(client)


def dashboard(executor: Executor) -> str | None:
    """Address of the executor's live page; None where it has none."""
    return getattr(getattr(executor, "client", None), "dashboard_link", None)


def local_workers(workers: int | None, threads: int) -> int:
    """Processes of a local cluster that has tasks enough: by default as many as there are cores for `threads` each."""
    from dask.system import CPU_COUNT

    return max(1, workers or CPU_COUNT // threads)


@contextmanager
def _local_client(workers: int | None, threads: int, tasks: int, large: int | None) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    workers = max(1, min(local_workers(workers, threads), tasks))
    environment = dask.config.get("distributed.nanny.pre-spawn-environ", {}) | thread_environment(threads)
    settings = _DASK | {"distributed.nanny.pre-spawn-environ": environment}
    with dask.config.set(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is already in use", category=UserWarning)
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=int(0.9 * MEMORY_LIMIT / min(workers, large or workers)),
                host="127.0.0.1",
                dashboard_address="127.0.0.1:8787",
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client


@contextmanager
def _remote_client(address: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address} ({error}); is it running?") from error
    with client:
        yield client
