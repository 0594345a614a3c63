"""One driver at a time: a file lock, and the heartbeat of whoever works where a lock says nothing.

A lock (``flock``) falls with its process, also when that is killed. Some file systems of clusters have none, and some
only one a machine: there a driver on another machine is known by its heartbeat, ``log/heartbeat.json``, which is
replaced every few seconds while it lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from batchproc.errors import UsageError
from batchproc.io.atomic import our_disk

__all__ = ["one_driver"]

_OLD_S = 60.0  # a heartbeat of this age is of one that died
_WATCH_S = 30.0  # some heartbeats long: who has not been heard of meanwhile has died
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def one_driver(run: Path, heartbeat: Path) -> Iterator[None]:
    """Have a run folder to oneself for the time of a ``with`` block.

    A driver on another machine that was killed within the last minute may still be alive for all we know: its
    heartbeat is watched for half a minute.

    Parameters
    ----------
    run : Path
        Exists.
    heartbeat : Path
        Of the driver that has the folder, where one has it.

    Raises
    ------
    UsageError
        Another driver has it; the message tells who.
    StorageError
        The disk does not take even that.
    """
    with our_disk(run):
        file = (run / ".lock").open("ab+", buffering=0)  # nothing is left to be written when it is closed
    with file:
        holds = _lock(file)
        if holds is False:
            file.seek(0)
            raise _refusal(run, file.read().decode(errors="replace").strip(), heartbeat)
        heart = _read(heartbeat)
        if heart.get("alive") and _lives(heart, heartbeat, locks=bool(holds)):
            who = f"process {heart.get('pid')} on {heart.get('host')} since {heart.get('since')}"
            raise _refusal(run, who, heartbeat)
        with suppress(OSError):  # a full disk: what is told here is a courtesy
            file.truncate(0)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield


def _lock(file: IO[bytes]) -> bool | None:
    """Whether the lock is ours; None on a file system that has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _lives(heart: dict[str, Any], heartbeat: Path, *, locks: bool) -> bool:
    """Whether the driver of a heartbeat is at work."""
    if heart.get("host") == socket.gethostname():
        return not locks and heart.get("pid") != os.getpid() and _is_process(heart.get("pid"))
    seen = _beat(heartbeat)
    if time.time() - seen > _OLD_S:
        return False
    end = time.monotonic() + _WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, _WATCH_S / 10))
        if _beat(heartbeat) != seen:
            return bool(_read(heartbeat).get("alive"))
    return False


def _is_process(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _beat(heartbeat: Path) -> float:
    """When it was last replaced; by the clock of the file server."""
    try:
        return heartbeat.stat().st_mtime
    except OSError:
        return 0.0


def _read(heartbeat: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        heart = json.loads(heartbeat.read_text())
        if isinstance(heart, dict):
            return heart
    return {}


def _refusal(run: Path, who: str, heartbeat: Path) -> UsageError:
    beat = _beat(heartbeat)
    heard = f", last heard of {max(0.0, time.time() - beat):.0f} s ago" if beat else ""
    return UsageError(
        f"{run}: another batchproc works on this run ({who}{heard}); wait for it, stop it, or choose another --out"
    )
