"""The time limit of one image, held by the process that works on it.

A worker cannot stop a thread that computes, only end itself: it leaves a note of what the image was doing, and exits.
The campaign reads the note and knows that this image is to blame, and for what. A library that hangs and keeps
Python's lock (GIL) lets no thread write a note; then a backstop in C ends the process a little later, and the campaign
learns the reason when it tries the image alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchproc.errors import TimeLimitError

__all__ = ["read_note", "time_limit", "time_limit_here"]

#: How much longer a process may live that cannot even write a note: a part of its limit, and so long at most.
_GRACE, _GRACE_S = 0.1, 20.0
_EXIT_CODE = 70


@contextmanager
def time_limit(seconds: float, note: Path, words: str) -> Iterator[None]:
    """End this process when the block takes longer.

    Parameters
    ----------
    seconds : float
        0: no limit.
    note : path
        File that is written then: `words`, and below them where every thread was.
    words : str
        A line that tells this note from an older one: see `read_note`.
    """
    if not seconds:
        yield
        return
    timer = threading.Timer(seconds, _leave, (note, words))
    timer.daemon = True
    timer.start()
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds + min(_GRACE * seconds, _GRACE_S), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def time_limit_here(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitError` in the block when it takes longer, as soon as Python has its turn again.

    For work in the driver's own process, which must go on. There is no limit in another thread than the main one, or
    where signals of a clock are unknown.

    Parameters
    ----------
    seconds : float
        0: no limit.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (seconds and main and hasattr(signal, "setitimer")):
        yield
        return

    def over(*_: Any) -> None:
        raise TimeLimitError(f"took longer than time_limit = {seconds:g} s", limit_s=seconds)

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_note(note: Path, words: str) -> bool:
    """Whether the note is there and begins with these words."""
    with suppress(OSError), note.open() as file:
        return file.readline().rstrip("\n") == words
    return False


def _leave(note: Path, words: str) -> None:
    try:
        note.parent.mkdir(exist_ok=True)
        with note.open("w") as file:
            print(words, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.flush()
            os.fsync(file.fileno())
    finally:
        os._exit(_EXIT_CODE)
