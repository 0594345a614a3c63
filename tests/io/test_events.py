"""The driver's log of events and its heartbeat: what watchers may rely on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from batchproc.io import events as module
from batchproc.io.events import EventLog, NullEvents, events_file, heartbeat_file, read_events, read_heartbeat
from batchproc.io.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.log.mkdir()
    return folder


def test_events_come_back_in_order_with_their_fields(folder: RunFolder) -> None:
    """What one driver after another has written is read in that order, each line a JSON object with its time."""
    for n in (1, 2):
        with EventLog(folder) as log:
            log.write("run_begun", to_do=n)
            log.write("image_done", image_id="a b", path=Path("/x"))
    found = list(read_events(folder))
    assert [e["event"] for e in found] == ["run_begun", "image_done"] * 2
    assert [e.get("to_do") for e in found] == [1, None, 2, None]
    assert found[1]["path"] == "/x"
    assert found[1]["image_id"] == "a b"
    assert found[0]["time"].endswith("+00:00")
    assert [e["time"] for e in found] == sorted(e["time"] for e in found)


@pytest.mark.parametrize("torn", [b'{"time":"2026', b"\x00\x00\x00", b"\xff\xfe", b"[1,2]", b'{"other":1}'])
def test_a_torn_line_costs_itself_only(folder: RunFolder, torn: bytes) -> None:
    """Readers pass over what a kill tore, and the next driver begins a line of its own."""
    with EventLog(folder) as log:
        log.write("before")
    with events_file(folder).open("ab") as file:
        file.write(torn)
    assert [e["event"] for e in read_events(folder)] == ["before"]
    with EventLog(folder) as log:
        log.write("after")
    assert [e["event"] for e in read_events(folder)] == ["before", "after"]


def test_the_end_of_a_long_log_is_read_alone(folder: RunFolder) -> None:
    """Only whole lines of the asked-for bytes are read."""
    with EventLog(folder) as log:
        for i in range(5000):
            log.write("image_done", i=i)
    tail = [e["i"] for e in read_events(folder, last_bytes=10_000)]
    assert tail == list(range(tail[0], 5000))
    assert 100 < len(tail) < 250


def test_lines_reach_the_disk_within_a_moment(folder: RunFolder) -> None:
    """Within a ``with`` block nobody has to call again for the last line to be seen."""
    with EventLog(folder) as log:
        log.write("image_done")
        deadline = time.monotonic() + 10
        while not list(read_events(folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [e["event"] for e in read_events(folder)] == ["image_done"]


def test_the_heart_beats_while_the_driver_waits(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat is renewed without a call; its fields stay; at the end it says that the driver has left."""
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "_FLUSH_S", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with EventLog(folder) as log:
        log.beat(in_flight=4, workers=2)
        log.beat(in_flight=3)
        seen = set()
        deadline = time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(read_heartbeat(folder)["time"])
            time.sleep(0.02)
        assert len(seen) == 3
        heart = read_heartbeat(folder)
    assert (heart["alive"], heart["in_flight"], heart["workers"]) == (True, 3, 2)
    assert (heart["pid"], heart["batch_job"]) == (os.getpid(), "Slurm 77")
    assert not read_heartbeat(folder)["alive"]
    time.sleep(0.2)
    assert not read_heartbeat(folder)["alive"]
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_beat_between_two_is_free(folder: RunFolder) -> None:
    """The file is replaced every ten seconds at most, however often the engine calls."""
    log = EventLog(folder)
    log.beat(done=1)
    log.beat(done=2)
    assert read_heartbeat(folder)["done"] == 1
    log.close()
    assert read_heartbeat(folder)["done"] == 2


def test_the_heartbeat_knows_how_far_its_driver_is(folder: RunFolder) -> None:
    """Images that ended are counted from the events, whoever writes them; what there was to do is kept."""
    with EventLog(folder) as log:
        log.write("run_begun", to_do=7, command="retry", images=100)
        for event in ("image_done", "image_failed", "image_retried", "image_bug", "workers"):
            log.write(event)
    heart = read_heartbeat(folder)
    assert (heart["to_do"], heart["finished"], heart["command"]) == (7, 3, "retry")


def test_a_killed_driver_leaves_what_it_wrote(folder: RunFolder) -> None:
    """After a SIGKILL the log is readable, and the heartbeat does not claim that the driver left in order."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom batchproc.io.events import EventLog\n"
        "from batchproc.io.run_folder import RunFolder\n"
        "with EventLog(RunFolder(Path(sys.argv[1]))) as log:\n"
        "    for i in range(10**9):\n        log.write('image_done', i=i)\n        log.beat(done=i)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder.path)]) as driver:
        deadline = time.monotonic() + 30
        while not (events_file(folder).exists() and events_file(folder).stat().st_size > 10**5):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    numbers = [e["i"] for e in read_events(folder)]
    assert numbers == list(range(len(numbers)))
    assert numbers
    assert read_heartbeat(folder)["alive"]


def test_a_disk_that_takes_no_more_stops_nobody(folder: RunFolder) -> None:
    """The log is a comfort: where it cannot be written the driver goes on."""
    events_file(folder).mkdir()
    heartbeat_file(folder).mkdir()
    with EventLog(folder) as log:
        log.write("image_done")
        log.beat(done=1)
    assert read_heartbeat(folder) == {}


def test_nothing_is_read_where_nothing_was_written(folder: RunFolder) -> None:
    """A run without a log has no events, and no heart."""
    assert list(read_events(folder)) == []
    assert read_heartbeat(folder) == {}
    heartbeat_file(folder).write_text('{"time"')
    assert read_heartbeat(folder) == {}


def test_null_events_take_what_an_event_log_takes(folder: RunFolder) -> None:
    """The two have one face."""
    with NullEvents() as log:
        log.write("image_done", image_id="a")
        log.beat(done=1)
    assert json.dumps(list(read_events(folder))) == "[]"
    assert {name for name in dir(EventLog) if name[0] != "_"} == {name for name in dir(NullEvents) if name[0] != "_"}
