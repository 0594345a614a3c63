"""A worker on a queue leaves before its job is killed: it takes no new task, ends the one it has, and goes.

Dask's own ``--lifetime`` does not wait for a running task, and begins anew with each process, while a walltime is the
job's. This module is preloaded by the workers (``dask worker --preload``); the job's script says when to leave in
``BATCHPROC_LEAVE_AT``, in seconds since 1970.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

__all__ = ["dask_setup", "leave"]

_POLL_S = 0.2


async def dask_setup(worker: Any) -> None:
    """Called by Dask when a worker starts."""
    moment = os.environ.get("BATCHPROC_LEAVE_AT")
    if moment:
        worker.loop.call_later(max(0.0, float(moment) - time.time()), leave, worker)


async def leave(worker: Any) -> None:
    """Take nothing new, wait for what is under way, and close; the scheduler gives the rest to others."""
    from distributed.core import Status

    worker.status = Status.paused
    while worker.state.executing_count or worker.state.long_running:
        await asyncio.sleep(_POLL_S)
    await worker.close_gracefully(reason="the walltime is near")
