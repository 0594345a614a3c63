"""One driver at a time, whatever the file system knows of locks."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from batchproc.errors import UsageError
from batchproc.io import lock
from batchproc.io.lock import one_driver


@pytest.fixture
def heartbeat(tmp_path: Path) -> Path:
    return tmp_path / "heartbeat.json"


def beat(path: Path, host: str, pid: int = 1, alive: bool = True) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"host": host, "pid": pid, "alive": alive, "since": "2026-01-01T00:00:00"}))
    os.replace(temporary, path)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


def test_a_second_driver_is_told_of_the_first(tmp_path: Path, heartbeat: Path) -> None:
    """Who it is, where, since when, and when it was last heard of."""
    beat(heartbeat, socket.gethostname(), os.getpid())
    who = rf"process {os.getpid()} on {socket.gethostname()} since 20.*, last heard of \d+ s ago"
    with one_driver(tmp_path, heartbeat), pytest.raises(UsageError, match=who), one_driver(tmp_path, heartbeat):
        pass
    with one_driver(tmp_path, heartbeat):
        pass


def test_a_lock_falls_with_its_process(tmp_path: Path, heartbeat: Path) -> None:
    """A driver that was killed is in nobody's way."""
    script = (
        "import os, sys, time; from pathlib import Path; from batchproc.io.lock import one_driver\n"
        f"with one_driver(Path({str(tmp_path)!r}), Path({str(heartbeat)!r})):\n"
        "    print('mine', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(UsageError, match=f"process {process.pid} on"), one_driver(tmp_path, heartbeat):
            pass
        process.kill()
        process.wait()
    beat(heartbeat, socket.gethostname(), process.pid)
    with one_driver(tmp_path, heartbeat):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_of_this_machine_is_looked_for(tmp_path: Path, heartbeat: Path) -> None:
    """Alive: refused; dead, or gone of its own will: free."""
    beat(heartbeat, socket.gethostname(), os.getppid())
    with pytest.raises(UsageError, match=f"process {os.getppid()}"), one_driver(tmp_path, heartbeat):
        pass
    beat(heartbeat, socket.gethostname(), os.getppid(), alive=False)
    with one_driver(tmp_path, heartbeat):
        pass
    beat(heartbeat, socket.gethostname(), 2**22 + 1)
    with one_driver(tmp_path, heartbeat):
        pass


@pytest.mark.parametrize("locks", [True, False])
def test_a_heart_that_beats_elsewhere_refuses(
    tmp_path: Path, heartbeat: Path, locks: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Also where a lock is one machine's alone; a heart that stopped does not, and an old one is not waited for."""
    if not locks:
        request.getfixturevalue("no_locks")
    monkeypatch.setattr(lock, "_WATCH_S", 0.5)
    beat(heartbeat, "elsewhere")
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            beat(heartbeat, "elsewhere")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UsageError, match="process 1 on elsewhere since 2026"), one_driver(tmp_path, heartbeat):
            pass
    finally:
        stop.set()
        thread.join()
    with one_driver(tmp_path, heartbeat):  # watched, and silent
        pass
    monkeypatch.setattr(lock, "_WATCH_S", 60.0)
    os.utime(heartbeat, (time.time() - 100,) * 2)
    with one_driver(tmp_path, heartbeat):
        pass


def test_a_torn_heartbeat_is_none(tmp_path: Path, heartbeat: Path) -> None:
    """Whatever is in the file, it keeps nobody from working."""
    for text in ("", "{", "[1]", '{"alive": true}'):
        heartbeat.write_text(text)
        os.utime(heartbeat, (time.time() - 100,) * 2)
        with one_driver(tmp_path, heartbeat):
            pass
