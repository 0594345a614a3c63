"""What a driver does when a queue, or a person, asks it to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["TERMINATED", "leaving_in_order"]

#: Exit code of a driver that was asked to end (SIGTERM), as a shell says it: the same command again goes on.
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Let SIGTERM unwind the block, as `SystemExit` with the code `TERMINATED`, instead of ending the process in it.

    Nothing is begun any more, workers are let go, and what is done is on the disk. So it is with SIGHUP, of a terminal
    that is closed, unless it is ignored (``nohup``). In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] != signal.SIG_DFL:
        del before[signal.SIGHUP]

    def leave(number: int, frame: Any) -> None:
        for mine in before:
            signal.signal(mine, signal.SIG_IGN)  # it is on its way
        raise SystemExit(128 + number)

    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
