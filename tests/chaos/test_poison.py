"""Images that take their worker with them: each is quarantined with its cause, and nobody else is blamed.

::

    pytest -m chaos tests/chaos/test_poison.py -s
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from batchproc.config import Config
from batchproc.distribute import clusters
from batchproc.io.catalogue import open_catalogue
from batchproc.io.progress import iter_failures
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps
from batchproc.io.verify import check_run
from batchproc.job import Steps, retry, run
from batchproc.records import Receipt
from tests import _runs
from tests.chaos._campaign import events_of
from tests.chaos._poison import poison

pytestmark = pytest.mark.chaos

#: Seconds: on a busy machine a process that is to try an image alone needs several to begin.
TIME_LIMIT = 20.0
CONFIG = Config.from_dict({"cutouts": {"size": _runs.SIZE}, "classify": {"model": ""}, "time_limit": TIME_LIMIT})
STEPS = Steps(process=poison, wisdom=_runs.no_wisdom)
#: Bytes that a worker has; one that has imported everything holds less than half of it.
MEMORY = 800_000_000

CAUSES = {
    "segfault": ("CrashError", "SIGSEGV"),
    "gone": ("CrashError", "exit code 1"),
    "eats": ("MemoryLimitError", "GB"),
    "hangs": ("TimeLimitError", "time_limit = 20 s"),
    "mute": ("TimeLimitError", "time_limit = 20 s"),
}


@pytest.fixture
def small_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are soon full, so that the machine is not."""
    monkeypatch.setattr(clusters, "_local_memory", lambda processes, large: MEMORY)


def require_blamed(receipt: Receipt, poison: str) -> None:
    """A failure with the name, the reason and the place."""
    error, word = CAUSES[poison]
    assert (receipt.status, receipt.error) == ("failed", error), receipt
    assert f"/nights/{poison}.fits" in receipt.message
    assert word in receipt.message
    if error != "MemoryLimitError" and poison != "gone":  # these say where they were
        assert "_poison.py" in receipt.traceback, receipt.traceback


def require_neighbours(folder: Path, names: list[str]) -> None:
    """All of them are done, with their own candidates."""
    catalogue = open_catalogue(folder)
    assert sorted(catalogue["image_id"].unique()) == sorted(names)
    for name, rows in catalogue.groupby("image_id"):
        np.testing.assert_array_equal(
            np.sort(open_stamps(folder)[rows["stamp_index"].to_numpy()][:, 0, 0, 1]), np.arange(5), err_msg=name
        )
    assert not [str(problem) for checked in check_run(RunFolder(folder)) for problem in checked.problems]


@pytest.mark.usefixtures("small_workers")
def test_poison_among_forty(tmp_path: Path) -> None:
    """A segmentation fault, an exit, all memory, a hang, and one that holds Python's lock: five failures with their
    causes, and forty neighbours done."""
    names = [f"image{number:02d}" for number in range(40)]
    places = dict(zip((3, 9, 17, 26, 33), CAUSES, strict=True))
    mixed = [name for number, image in enumerate(names) for name in filter(None, (places.get(number), image))]
    start = time.monotonic()
    summary = run(_runs.entries(*mixed), tmp_path, config=CONFIG, workers=2, steps=STEPS, report=False, quiet=True)
    failures = {receipt.image_id: receipt for receipt in iter_failures(RunFolder(tmp_path))}
    print(f"{time.monotonic() - start:.0f} s;", *(f"\n{name}: {r.message}" for name, r in failures.items()))
    assert summary.exit_code == 1
    assert sorted(failures) == sorted(CAUSES)
    for name, receipt in failures.items():
        require_blamed(receipt, name)
    require_neighbours(tmp_path, names)
    # Nobody was taken for the culprit on the way: whom a neighbour's death hit came again, and was done.
    assert len(events_of(tmp_path, "image_lost")) < 40


@pytest.mark.usefixtures("small_workers")
@pytest.mark.parametrize("name", CAUSES)
def test_poison_by_itself(tmp_path: Path, name: str) -> None:
    """Alone in its run it comes to the same end; once the cause is gone, `retry` does it."""
    summary = run(_runs.entries(name), tmp_path, config=CONFIG, workers=1, steps=STEPS, report=False, quiet=True)
    assert summary.exit_code == 1
    (receipt,) = iter_failures(RunFolder(tmp_path))
    require_blamed(receipt, name)
    healed = Steps(process=_runs.repaired, wisdom=_runs.no_wisdom)
    assert retry(tmp_path, workers=1, steps=healed, report=False, quiet=True).exit_code == 0
