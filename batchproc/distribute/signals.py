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

    Nothing is begun any more, workers are let go, and what is done is on the disk. In another thread than the main one
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is on its way
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
