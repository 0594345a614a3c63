"""Images that crash, hang or eat memory on a real local cluster, and workers killed at random.

``pytest -m chaos tests/distribute/test_poison.py``, a minute or two.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import Counter

import numpy as np
import pandas as pd
import psutil
import pytest

from batchproc import open_catalogue
from batchproc.distribute.campaign import process_images
from batchproc.distribute.clusters import Where, open_executor
from batchproc.io.events import EventLog, read_events
from tests import _runs

pytestmark = pytest.mark.chaos

LIMIT_S = 20.0  # a process of its own has imports to do first, on a busy machine as well


def poison(entry, config):
    """What the name says; a little work otherwise."""
    name = entry.image_id
    if name == "segfault":
        ctypes.string_at(0)
    if name == "memory":
        hoard = []
        while True:
            hoard.append(np.ones(5_000_000))
            time.sleep(0.01)
    if name == "hangs":
        time.sleep(600)
    if name == "hangs_with_gil":
        ctypes.PyDLL(None).sleep(600)
    time.sleep(0.05)
    return _runs.result(name, 3)


def slow(entry, config):
    time.sleep(0.4)
    return _runs.result(entry.image_id, 3)


def test_poison_is_quarantined_with_its_cause_and_neighbours_are_done(tmp_path, monkeypatch):
    """A segfault, memory without end, a hang with and without Python's lock: each a failure that says so."""
    monkeypatch.setattr("batchproc.distribute.clusters._local_memory", lambda *arguments: 700_000_000)
    neighbours = [f"n{i}" for i in range(40)]
    names = [*neighbours[:10], "segfault", "memory", "hangs", "hangs_with_gil", *neighbours[10:]]
    folder = _runs.begin(tmp_path / "run", *names)
    with open_executor(Where("local", 2)) as executor, EventLog(folder) as events:
        words = {
            word.image_id: word
            for word in process_images(
                folder, folder.entries(), executor, process=poison, time_limit=LIMIT_S, events=events
            )
        }
    assert Counter(word.status for word in words.values()) == {"done": 40, "failed": 4}
    assert words["segfault"].error == "CrashError"
    assert "SIGSEGV" in words["segfault"].message
    assert "string_at" in words["segfault"].traceback
    assert words["memory"].error == "MemoryLimitError"
    assert words["memory"].metadata["used_bytes"] > 0.9 * 700e6
    for name in ("hangs", "hangs_with_gil"):
        assert words[name].error == "TimeLimitError"
        assert "poison" in words[name].traceback
    assert "sleep" in (folder.log / "overdue" / "hangs.txt").read_text()
    trials = Counter(event["image_id"] for event in read_events(folder) if event["event"] == "image_lost")
    assert max((n for name, n in trials.items() if name.startswith("n")), default=0) <= 2


def test_workers_killed_at_random_cost_nothing(tmp_path):
    """SIGKILL of a random worker about every three task times: all images are done, once, with the same rows."""
    names = [f"n{i}" for i in range(60)]
    folder = _runs.begin(tmp_path / "run", *names)
    other = _runs.begin(tmp_path / "other", *names)
    with open_executor(Where("local", 2)) as executor:
        over = threading.Event()
        killed = []

        def kill():
            luck = random.Random(1)
            while not over.wait(luck.expovariate(1 / 1.2)):
                workers = [child for child in psutil.Process().children() if "spawn_main" in str(child.cmdline())]
                if workers:
                    killed.append(luck.choice(workers))
                    killed[-1].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        words = list(process_images(folder, folder.entries(), executor, process=slow))
        over.set()
        killer.join()
        undisturbed = list(process_images(other, other.entries(), executor, process=slow))
    assert len(killed) >= 5
    assert sorted(word.image_id for word in words) == sorted(names) == sorted(word.image_id for word in undisturbed)
    assert {word.status for word in words} == {"done"}
    pd.testing.assert_frame_equal(open_catalogue(folder.path), open_catalogue(other.path))
