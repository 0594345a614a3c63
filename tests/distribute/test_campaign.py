"""The campaign over a fake cluster: whatever dies, heals, hangs or is lost, every image ends once and rightly."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchproc.distribute import campaign
from batchproc.distribute.attempts import Mishap
from batchproc.distribute.campaign import process_images
from batchproc.distribute.executors import Outcome, SerialExecutor, WorkerDiedError
from batchproc.distribute.order import Pace, images_a_task, longest_first
from batchproc.distribute.tasks import Answer, overdue_note, process_trial
from batchproc.errors import ClusterError, StorageError
from batchproc.io.packs import RollUp, roll_up
from batchproc.io.progress import finished_images
from batchproc.records import ManifestEntry, Receipt
from tests import _runs

#: What may become of one image in one trial.
FATES = ("done", "done", "done", "failed", "transient", "dies", "dies after it is done", "hangs", "result lost")


class Cluster:
    """Workers that do as they are told: the members of an executor, a clock, and a disk that is a set of names.

    Parameters
    ----------
    choose : callable
        Of a sequence: one of them. It decides which call ends next and what becomes of each image.
    """

    here = False
    worker_memory = None
    absent_for = 0.0

    def __init__(self, choose, workers=3, fates=FATES, folder=None, deadly=()):
        self.choose, self.workers, self.fates, self.folder, self.deadly = choose, workers, fates, folder, deadly
        self.now = 0.0
        self.waiting = {}
        self.disk = set()
        self.trials = Counter()
        self.most = 0

    def offers(self, resource):
        return False

    def submit(self, function, job, process, trial, resources=None, priority=0):
        assert function is process_trial
        busy = {entry.image_id for _, other in self.waiting.values() for entry in other.entries}
        assert not busy & {entry.image_id for entry in trial.entries}, "an image is at two places"
        ticket = object()
        self.waiting[ticket] = job, trial
        self.most = max(self.most, len(self.waiting))
        return ticket

    def wait(self, timeout=None):
        if not self.waiting:
            assert timeout is not None, "waits for ever"
            self.now += timeout
            return []
        self.now += 1.0
        ticket = self.choose(list(self.waiting))
        job, trial = self.waiting.pop(ticket)
        return [(ticket, self.outcome(job, trial))]

    def outcome(self, job, trial):
        receipts = []
        for entry in trial.entries:
            name = entry.image_id
            self.trials[name] += 1
            fate = "dies" if name in self.deadly else self.choose(self.fates)
            if name in self.disk:
                fate = "done"
            if fate in ("done", "dies after it is done", "result lost"):
                self.disk.add(name)
            if fate == "dies" and trial.alone:
                receipts.append(Receipt(name, Mishap.CRASHED, error="CrashError", message="SIGSEGV"))
            elif fate == "hangs" and trial.alone:
                receipts.append(Receipt(name, Mishap.OVERRAN, error="TimeLimitError", message="too long"))
            elif fate == "hangs":
                note = overdue_note(self.folder, name)
                note.parent.mkdir(exist_ok=True)
                note.write_text(job.words(trial) + "\nstack\n")
                return Outcome(error=WorkerDiedError("died"))
            elif fate.startswith("dies"):
                return Outcome(error=WorkerDiedError("died"))
            elif fate == "result lost":
                return Outcome(error=OSError("a connection broke"))
            else:
                receipts.append(Receipt(name, fate, error="" if fate == "done" else "ReadError"))
        return Outcome(Answer(tuple(receipts), 0.1))

    def cancel(self):
        self.waiting.clear()

    def stored_receipt(self, folder, entry, digest):
        return Receipt(entry.image_id, "done") if entry.image_id in self.disk else None


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run folder; its images are named as they come."""
    return _runs.begin(tmp_path_factory.mktemp("campaign") / "run", "a")


def go(cluster, folder, monkeypatch, entries, **options):
    """Every last word, under the fake's clock and disk."""
    cluster.folder = folder
    (folder.log / "deaths.json").unlink(missing_ok=True)
    monkeypatch.setattr(campaign, "stored_receipt", cluster.stored_receipt)
    monkeypatch.setattr("batchproc.distribute.packing.plan_roll_ups", lambda folder: [])
    monkeypatch.setattr(campaign, "time", SimpleNamespace(monotonic=lambda: cluster.now))
    return list(process_images(folder, entries, cluster, process=None, **options))


@given(st.integers(1, 30), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_image_ends_once_whatever_happens(begun, n, random):
    """Deaths, lost results, errors that heal and hangs in any order: one right last word each, a bounded window."""
    cluster = Cluster(random.choice, workers=random.randint(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        words = go(cluster, begun, patch, _runs.entries(*(f"n{i}" for i in range(n))))
    assert sorted(word.image_id for word in words) == sorted(f"n{i}" for i in range(n))
    assert {word.status for word in words} <= {"done", "failed"}
    assert {word.image_id for word in words if word.status == "done"} == cluster.disk
    assert cluster.most <= 2 * cluster.workers + 2
    assert max(cluster.trials.values()) <= 20


@pytest.mark.parametrize("random", map(Random, range(5)))
def test_one_poisonous_image_takes_nobody_along(begun, random):
    """Of images that come in batches with one that kills its worker each time, all are done but that one."""
    cluster = Cluster(random.choice, fates=("done",), deadly={"n7"})
    with pytest.MonkeyPatch.context() as patch:
        words = go(cluster, begun, patch, _runs.entries(*(f"n{i}" for i in range(60))))
    failed = [word for word in words if word.status == "failed"]
    assert [(word.image_id, word.error) for word in failed] == [("n7", "CrashError")]
    assert len(cluster.disk) == 59


@pytest.mark.parametrize("random", map(Random, range(10)))
def test_workers_that_die_at_random_blame_nobody(begun, random):
    """A worker in six dies under its images, tried alone or not: every image is done."""

    class Unlucky(Cluster):
        def outcome(self, job, trial):
            return Outcome(error=WorkerDiedError("died")) if random.random() < 1 / 6 else super().outcome(job, trial)

    cluster = Unlucky(random.choice, fates=("done",))
    with pytest.MonkeyPatch.context() as patch:
        words = go(cluster, begun, patch, _runs.entries(*(f"n{i}" for i in range(60))))
    assert {word.status for word in words} == {"done"}
    assert len(words) == 60


@pytest.mark.parametrize(("there", "trials", "status"), [(True, 3, "done"), (False, 1, "failed"), (True, 9, "failed")])
def test_a_node_that_lacks_a_file_system_fails_nobody_at_once(begun, monkeypatch, tmp_path, there, trials, status):
    """A file that the driver sees and the worker does not is tried again, elsewhere and later; one that nobody sees is
    the image's fault, and so is one that no worker ever sees."""
    path = tmp_path / "new.fits"
    if there:
        path.touch()

    class Sick(Cluster):
        def outcome(self, job, trial):
            if self.trials["n1"] + 1 >= trials and there:
                return super().outcome(job, trial)
            self.trials["n1"] += 1
            metadata = {"found": "no such file", "path": str(path)}
            receipt = Receipt("n1", "failed", error="ReadError", message="no such file.", metadata=metadata)
            return Outcome(Answer((receipt,), 0.1))

    cluster = Sick(lambda items: items[0], fates=("done",))
    (word,) = go(cluster, begun, monkeypatch, _runs.entries("n1"))
    assert word.status == status
    assert cluster.trials["n1"] == min(trials, 4)
    assert ("file system" in word.message) == (there and status == "failed")


def test_a_full_disk_stops_the_campaign_and_blames_nobody(begun, monkeypatch):
    """The error of the disk is the campaign's; no image has a last word for it."""

    class Full(Cluster):
        def outcome(self, job, trial):
            return Outcome(error=StorageError("RUN: no space left on device"))

    with pytest.raises(StorageError, match="no space left"):
        go(Full(lambda items: items[0]), begun, monkeypatch, _runs.entries("n1", "n2"))


def test_an_error_of_the_machinery_is_a_bug_of_its_images(begun, monkeypatch):
    """What escapes from a task is recorded with its traceback."""

    class Broken(Cluster):
        def outcome(self, job, trial):
            return Outcome(error=ZeroDivisionError("nobody thought of this"))

    (word,) = go(Broken(lambda items: items[0]), begun, monkeypatch, _runs.entries("n1"))
    assert (word.status, word.error) == ("bug", "ZeroDivisionError")
    assert "nobody thought of this" in word.traceback


def test_too_many_bugs_end_it(begun, monkeypatch):
    """One more than the limit, and nothing is submitted any more."""

    class Broken(Cluster):
        def outcome(self, job, trial):
            return Outcome(error=ZeroDivisionError("nobody thought of this"))

    entries = _runs.entries(*(f"n{i}" for i in range(50)))
    assert len(go(Broken(lambda items: items[0]), begun, monkeypatch, entries, max_bugs=3)) == 4


def test_a_wait_without_workers_is_told_now_and_then(begun, monkeypatch):
    """After a minute without workers, and then every ten minutes, until some come."""

    class Late(Cluster):
        @property
        def absent_for(self):
            return self.now + 1 if self.now < 1900 else 0.0

        def wait(self, timeout=None):
            if self.absent_for or not self.waiting:
                self.now += timeout
                return []
            return super().wait(timeout)

    told = []
    cluster = Late(lambda items: items[0], fates=("done",))
    words = go(cluster, begun, monkeypatch, _runs.entries("n1"), tell=told.append)
    assert [word.status for word in words] == ["done"]
    assert len(told) == 4
    assert "no worker" in told[0]


def test_a_cluster_that_is_gone_ends_it(begun, monkeypatch):
    """What the executor says of a scheduler that is gone is the campaign's error; deaths so far are kept."""

    class Gone(Cluster):
        def wait(self, timeout=None):
            if self.trials:
                raise ClusterError("the scheduler is gone")
            return super().wait(timeout)

    with pytest.raises(ClusterError):
        go(Gone(lambda items: items[0], fates=("dies",)), begun, monkeypatch, _runs.entries("n1"))
    assert json.loads((begun.log / "deaths.json").read_text())["n1"]["lost"] == 1


def flaky(entry, config):
    """A file server that does not answer the first two times."""
    tries = Path(entry.new)
    n = len(tries.read_text()) if tries.is_file() else 0
    tries.write_text("x" * (n + 1))
    if n < 2:
        raise OSError(errno.ESTALE, "stale file handle", entry.new)
    return _runs.result(entry.image_id, 2)


def hanging(entry, config):
    time.sleep(60 if entry.image_id == "hangs" else 0)
    return _runs.result(entry.image_id, 1)


def test_errors_that_heal_are_tried_again(tmp_path, monkeypatch):
    """An error of the file server is no failure before the fourth time; the image is done when it answers."""
    monkeypatch.setattr("batchproc.distribute.attempts._BACKOFF_S", 0.01)
    folder = _runs.begin(tmp_path / "run", "a")
    entry = ManifestEntry("a", str(tmp_path / "a"), ())
    (word,) = process_images(folder, [entry], SerialExecutor(), process=flaky)
    assert (word.status, word.n_candidates) == ("done", 2)
    assert len(Path(entry.new).read_text()) == 3


def test_a_serial_run_has_a_time_limit_too(tmp_path):
    """An image that takes too long is a failure; the driver goes on with the next one."""
    folder = _runs.begin(tmp_path / "run", "hangs", "n1")
    entries = _runs.entries("hangs", "n1")
    words = {w.image_id: w for w in process_images(folder, entries, SerialExecutor(), process=hanging, time_limit=0.3)}
    assert (words["hangs"].status, words["hangs"].error) == ("failed", "TimeLimitError")
    assert words["n1"].status == "done"


def test_an_image_that_kills_the_driver_is_tried_alone(tmp_path):
    """A serial driver died twice under an image: the next one has it done in a process of its own."""
    folder = _runs.begin(tmp_path / "run", "deadly", "n1")
    for _ in range(2):
        pid = os.fork()
        if not pid:  # _runs.process ends the process for "deadly"
            list(process_images(folder, _runs.entries("deadly"), SerialExecutor(), process=_runs.process))
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    entries = _runs.entries("n1", "deadly")
    words = {w.image_id: w for w in process_images(folder, entries, SerialExecutor(), process=_runs.process)}
    assert (words["deadly"].status, words["deadly"].error) == ("failed", "CrashError")
    assert "exit code 9" in words["deadly"].message
    assert words["n1"].status == "done"


def test_what_a_done_image_reports_is_short(tmp_path):
    """A few hundred bytes cross the wire for an image, however much its marker says."""
    import pickle

    from batchproc.distribute.attempts import Trial
    from batchproc.distribute.tasks import Job, process_trial

    folder = _runs.begin(tmp_path / "run", "n1")
    job = Job.of(folder, 1, SerialExecutor())
    answer = process_trial(job, _runs.process, Trial(tuple(_runs.entries("n1")), 1))
    assert len(pickle.dumps(answer)) < 800


def test_a_task_that_outlives_its_run_stores_nothing(tmp_path):
    """Its driver is dead, and another one has begun anew with other settings: what was made with the old is dropped."""
    from batchproc.distribute.tasks import Job, process_image
    from batchproc.io.freeze import freeze

    folder = _runs.begin(tmp_path / "run", "n1")
    job = Job.of(folder, 1, SerialExecutor())
    other = replace(_runs.CONFIG, detect=replace(_runs.CONFIG.detect, threshold=7.0))

    def slow(entry, config):
        freeze(folder, _runs.entries("n1"), other, _runs.no_wisdom, redo=True)
        return _runs.process(entry, config)

    with pytest.raises(StorageError, match="the run was changed while n1"):
        process_image(job, slow, *_runs.entries("n1"))
    assert not folder.marker("n1").exists()


def test_large_images_go_first(tmp_path):
    """Among the next few hundred, by the bytes of their files; the others keep their order."""
    entries = []
    for name, size in (("a", 10), ("b", 500), ("c", 20), ("d", 900)):
        (tmp_path / name).write_bytes(bytes(size))
        entries.append(ManifestEntry(name, f"{tmp_path / name}[SCI]", ()))
    assert [e.image_id for e in longest_first(entries)] == ["d", "b", "c", "a"]
    assert [e.image_id for e in longest_first(entries, look_ahead=2)] == ["b", "a", "d", "c"]
    assert [e.image_id for e in longest_first(_runs.entries("x", "z", "y"))] == ["x", "z", "y"]


def test_short_images_go_together():
    """About five seconds of work to a task, never more than leaves work for every worker."""
    pace = Pace()
    assert pace.images(10**6, 2) == 1
    pace.add(1, 0.1)
    assert pace.images(10**6, 2) == 50
    assert pace.images(40, 4) == 5
    assert pace.images(1, 4) == 1
    slow = Pace()
    slow.add(1, 3.0)
    assert slow.images(10**6, 2) == 1
    quick = Pace()
    quick.add(1, 1e-6)
    assert quick.images(10**6, 2) == 200


@given(st.floats(1e-6, 1e4), st.integers(1, 10**5))
def test_a_task_is_long_enough_and_not_too_long(seconds, workers):
    """A minute at most, if an image is not longer; two hundred images at most; never fewer for more workers."""
    images = images_a_task(seconds, workers)
    assert images == 1 or images * seconds <= 60 * (1 + 1e-9)
    assert 1 <= images <= 200
    assert images_a_task(seconds, workers + 50) >= images


@given(st.floats(0.5, 30), st.integers(1, 3000))
def test_a_driver_has_few_tasks_a_second_however_many_workers(seconds, workers):
    """Fifty at most, as long as a minute of work is enough for that and a whole number of images fits into it."""
    images = images_a_task(seconds, workers)
    assert workers / (images * seconds) <= 50 * (1 + 1e-9) or (images + 1) * seconds > 60
    assert images == 1 or images * seconds <= 5 or workers > 50 * seconds * (images - 1)


def test_finished_images_are_rolled_up_on_the_way(tmp_path, monkeypatch):
    """Full packs while it works, the rest at the end; a damaged image is done again, and told once."""
    monkeypatch.setattr("batchproc.distribute.packing.PACK_IMAGES", 10)
    folder = _runs.begin(tmp_path / "run", *(f"n{i}" for i in range(45)))
    damaged = iter([True])

    def damaging(*arguments):
        if next(damaged, False):
            folder.catalogue_part("n5").write_bytes(b"ruin")
        return roll_up(*arguments)

    monkeypatch.setattr("batchproc.io.packs.roll_up", damaging)
    told = []
    words = list(process_images(folder, folder.entries(), SerialExecutor(), process=_runs.process, tell=told.append))
    assert sorted(word.image_id for word in words) == sorted(f"n{i}" for i in range(45))
    assert "damaged" in told[0]
    assert finished_images(folder) == {f"n{i}": "done" for i in range(45)}
    assert len(list(folder.done.iterdir())) <= 9  # four full packs, and a few that are too few for one


def test_a_roll_up_whose_worker_dies_is_tried_again(begun, monkeypatch):
    """Nothing is lost with it; after several deaths in a row it is an error."""

    class Deadly(Cluster):
        def submit(self, function, *arguments, resources=None, priority=0):
            self.waiting[arguments] = arguments
            return arguments

        def wait(self, timeout=None):
            ticket = next(iter(self.waiting))
            del self.waiting[ticket]
            self.most += 1
            return [(ticket, Outcome(error=WorkerDiedError("died")))]

    cluster = Deadly(lambda items: items[0])
    monkeypatch.setattr("batchproc.distribute.packing.plan_roll_ups", lambda folder: [RollUp(("a",))])
    with pytest.raises(ClusterError, match="tried 6 times: died; nothing is lost"):
        list(process_images(begun, [], cluster, process=None))
    assert cluster.most == 6


def test_a_file_server_that_is_away_for_a_minute_stops_no_roll_up(tmp_path, monkeypatch):
    """It is tried again later and later, while images go on."""
    monkeypatch.setattr("batchproc.distribute.packing.PACK_IMAGES", 2)
    folder = _runs.begin(tmp_path / "run", "a1", "b1", "c1", "d1")
    now, trials = [0.0], []

    class Later(SerialExecutor):
        def wait(self, timeout=None):
            now[0] += 1.0 if self._waiting else timeout
            return super().wait(0.0)

    def away(*arguments):
        trials.append(now[0])
        if now[0] < 60:
            raise OSError(errno.ESTALE, "stale file handle")
        return roll_up(*arguments)

    monkeypatch.setattr("batchproc.io.packs.roll_up", away)
    monkeypatch.setattr(campaign, "time", SimpleNamespace(monotonic=lambda: now[0]))
    words = list(process_images(folder, folder.entries(), Later(), process=_runs.process))
    assert [word.status for word in words] == ["done"] * 4
    assert len(list(folder.done.iterdir())) <= 2
    assert 8 <= len(trials) <= 10


def test_an_image_that_is_always_found_damaged_is_given_up(tmp_path, monkeypatch):
    """A disk that loses what it is given keeps nobody busy for ever."""
    monkeypatch.setattr("batchproc.distribute.packing.PACK_IMAGES", 2)
    folder = _runs.begin(tmp_path / "run", "a1", "b1")

    def damaging(folder, number, image_ids, packs=()):
        for image_id in image_ids:
            folder.catalogue_part(image_id).write_bytes(b"ruin")
        return roll_up(folder, number, image_ids, packs)

    monkeypatch.setattr("batchproc.io.packs.roll_up", damaging)
    words = list(process_images(folder, folder.entries(), SerialExecutor(), process=_runs.process))
    assert [word.status for word in words] == ["done"] * 2 + ["failed"] * 2
    assert finished_images(folder) == {"a1": "failed", "b1": "failed"}


def test_whoever_stops_half_way_leaves_no_threads_to_be_waited_for():
    """The rest of the images may be forgotten at any moment, also by a garbage collection that starts a thread."""
    before = set(threading.enumerate())
    images = longest_first(_runs.entries(*(f"a{k}" for k in range(20))), look_ahead=5)
    for _ in range(7):
        next(images)
    assert set(threading.enumerate()) == before
    assert len(list(images)) == 13
