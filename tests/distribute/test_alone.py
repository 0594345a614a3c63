"""A call in a process of its own: its answer, or precisely what became of it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from batchproc.distribute import persistent, scoring
from batchproc.distribute.alone import run_alone
from batchproc.distribute.chunks import Chunk
from batchproc.distribute.executors import SerialExecutor, WorkerDiedError
from batchproc.distribute.scoring import needed_resources
from batchproc.distribute.signals import TERMINATED, leaving_in_order
from batchproc.distribute.transient import is_transient
from batchproc.distribute.watchdog import read_note, time_limit_here
from batchproc.errors import CrashError, MemoryLimitError, ReadError, StorageError, TimeLimitError, UsageError
from tests import _runs


def add(a, b):
    print("what libraries print is no answer")
    return a + b


def threads():
    return os.environ["OMP_NUM_THREADS"]


def refuse():
    raise ReadError("no file", path="a.fits")


def crash():
    ctypes.string_at(0)


def leave():
    os._exit(9)


def eat():
    hoard = []
    while True:
        hoard.append(bytearray(20_000_000))


def hang_with_gil():
    ctypes.PyDLL(None).sleep(60)


def test_its_answer_and_its_errors_come_back():
    """Whatever it prints; with its threads; errors whole."""
    assert run_alone(add, 1, 2) == 3
    assert run_alone(threads, threads=3) == "3"
    with pytest.raises(ReadError, match="no file") as caught:
        run_alone(refuse)
    assert caught.value.metadata == {"path": "a.fits"}


@pytest.mark.parametrize(("function", "how"), [(crash, "SIGSEGV"), (leave, "exit code 9")])
def test_a_crash_is_told_by_its_signal(function, how):
    """The signal or the exit code; where faulthandler could say where it was, that too."""
    with pytest.raises(CrashError, match=how) as caught:
        run_alone(function)
    assert ("in crash" in caught.value.metadata["last_words"]) == (function is crash)


def test_too_much_memory_is_told_with_both_numbers():
    """It is stopped before the machine is in trouble."""
    with pytest.raises(MemoryLimitError, match=r"0\.30 GB that a worker has") as caught:
        run_alone(eat, memory_limit=300_000_000)
    assert caught.value.metadata["used_bytes"] > 300_000_000 == caught.value.metadata["limit_bytes"]


def test_a_hang_that_holds_the_lock_of_python_is_ended():
    """And it says where it was."""
    with pytest.raises(TimeLimitError, match="time_limit = 2 s") as caught:
        run_alone(hang_with_gil, time_limit=2.0)
    assert "in hang_with_gil" in caught.value.metadata["last_words"]


def test_a_limit_in_the_drivers_process_ends_with_its_block():
    """The error is raised in time; afterwards there is no limit any more, and none where it is 0."""
    with pytest.raises(TimeLimitError), time_limit_here(0.05):
        time.sleep(10)
    with time_limit_here(0.05):
        pass
    with time_limit_here(0.0):
        time.sleep(0.1)


_LIMITED = """
import ctypes, sys, time
from pathlib import Path
from batchproc.distribute.watchdog import time_limit
note = Path(sys.argv[1])
for _ in range(3):
    with time_limit(0.5, note, "one"):
        pass
with time_limit(1.0, note, "two"):
    ctypes.PyDLL(None).sleep(60) if sys.argv[2] == "held" else time.sleep(60)
"""


@pytest.mark.parametrize("lock", ["released", "held"])
def test_a_worker_that_takes_too_long_ends_itself(tmp_path, lock):
    """With a note where it can write one, and by the backstop where Python's lock is held."""
    note = tmp_path / "log" / "note.txt"
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(note), lock], capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert time.monotonic() - start < 30
    assert read_note(note, "two") == (lock == "released")
    assert not read_note(note, "one")
    assert "line 10" in (note.read_text() if lock == "released" else ended.stderr)


@pytest.mark.parametrize(
    ("error", "heals"),
    [
        (OSError(errno.EIO, "input/output error"), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(errno.ENOENT, "no such file"), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_errors_that_heal_are_known_by_their_number(error, heals):
    """Their own, or that of what caused them; never those of our own disk."""
    assert is_transient(error) is heals
    caused = ReadError("cannot be read")
    caused.__cause__ = error
    assert is_transient(caused) is heals
    stored = StorageError("the run folder")
    stored.__cause__ = error
    assert not is_transient(stored)


def test_a_device_is_a_resource_of_the_workers():
    """Scoring goes to workers that offer it, and is refused where none ever will."""
    cluster = SimpleNamespace(here=False, offers=lambda name: name == "GPU")
    assert needed_resources("cpu", cluster) is None
    assert needed_resources("gpu", cluster) == {"GPU": 1.0}
    with pytest.raises(UsageError, match="EDGETPU=1"):
        needed_resources("edgetpu", cluster)
    assert needed_resources("gpu", SerialExecutor()) is None


def test_scoring_waits_for_a_file_server_to_come_back(tmp_path, monkeypatch):
    """Later and later; a chunk whose worker died is tried again at once."""
    errors = iter([WorkerDiedError("died"), *[OSError(errno.ESTALE, "stale file handle")] * 2])
    rests = []

    def classify(job, models, chunk):
        for error in errors:
            raise error

    monkeypatch.setattr(scoring, "classify_chunk", classify)
    monkeypatch.setattr(persistent, "time", SimpleNamespace(sleep=rests.append))
    folder, models = _runs.begin(tmp_path / "run", "a"), [SimpleNamespace(name="stub")]
    chunks = [Chunk((), ("stub",))]
    assert list(scoring.classify_chunks(folder, chunks, SerialExecutor(), models=models)) == chunks
    assert rests == [20.0, 40.0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGHUP, 129)])
def test_a_driver_that_is_asked_to_end_leaves_in_order(number, code):
    """The signal unwinds the block with the code that says so; what was set before is set again."""
    outside = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
    unwound = []

    def work():
        with leaving_in_order():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:
                unwound.append(True)

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == code
    assert TERMINATED == 143
    assert unwound
    assert signal.signal(number, outside) is signal.SIG_DFL


def test_who_ignores_the_end_of_a_terminal_goes_on_ignoring_it():
    """As with ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with leaving_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
