"""Broken FITS files: each is processed, or becomes a row with its reason; none crashes, hangs, or takes memory.

Forty of them go through `process_image` in the usual tests. All of them, through a campaign of two workers::

    pytest -m chaos tests/chaos/test_fuzz.py
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from batchproc.config import Config
from batchproc.errors import ExposureError
from batchproc.flow import ImageResult, process_image
from batchproc.io.fitsfile import split_hdu
from batchproc.io.index import read_index
from batchproc.io.progress import iter_failures
from batchproc.io.run_folder import RunFolder
from batchproc.io.verify import check_run
from batchproc.job import run
from batchproc.records import ManifestEntry
from tests.chaos._fuzz import N_CASES, Case, good_pair, write_cases
from tests.chaos._watch import memory_peak_mb

#: An image of this size takes a fifth of a second and some megabytes.
SECONDS, MEGABYTES = 30.0, 300.0


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """What takes longer is a hang."""

    def over(*_: object) -> None:
        pytest.fail(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_reason(case: Case, message: str, metadata: dict) -> None:
    """A failure names a file; one of reading names the broken file and has what was found and what was expected."""
    files = {str(split_hdu(path)[0]) for path in (case.entry.new, *case.entry.ref)}
    assert any(file in message for file in files), (case, message)
    assert len(message) > len(max(files)) + 20
    json.dumps(metadata)
    if metadata.get("step", "read") == "read":
        assert str(split_hdu(case.path)[0]) in message, (case, message)
        assert metadata["path"] in message
        assert str(metadata["found"]) in message
        assert str(metadata["expected"]) in message


def check_result(case: Case, result: ImageResult) -> None:
    """What is done is whole: a row and a stamp for each candidate, and finite numbers."""
    n = len(result.stamps)
    assert {len(column) for column in result.catalogue.values()} == {n}, case
    for name in ("x", "y", "scorr", "flux", "flux_err"):
        assert np.isfinite(result.catalogue[name]).all(), (case, name)


def test_the_good_pair_is_good(tmp_path: Path) -> None:
    """Without it, everything would fail for want of stars and no failure would mean anything."""
    new, ref = good_pair(tmp_path)
    result = process_image(ManifestEntry("good", new, (ref,)))
    assert 3 <= len(result.stamps) <= 20
    assert result.receipt.quality["n_matches"] > 12


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers that cannot be make NumPy talk
@pytest.mark.parametrize("first", range(10))
def test_broken_files_are_done_or_say_why(tmp_path: Path, first: int) -> None:
    """Forty files, in this process; nothing else comes out of them than a result or an `ExposureError`."""
    ends: Counter[str] = Counter()
    for case in write_cases(tmp_path, range(first, N_CASES, 200)):
        with memory_peak_mb() as peak, at_most(SECONDS):
            try:
                check_result(case, process_image(case.entry))
                ends["done"] += 1
            except ExposureError as error:
                check_reason(case, str(error), error.metadata)
                ends["failed"] += 1
        assert peak() < MEGABYTES, case
    assert ends.total() == 4


@pytest.mark.chaos
def test_a_campaign_of_broken_files(tmp_path: Path) -> None:
    """All of them, as new and as reference, on two workers: no bug, no worker lost, nobody else's fault, and the good
    pair among them is done. The folder is whole, and says why each failure failed."""
    cases = write_cases(tmp_path / "images")
    assert N_CASES >= 300
    new, ref = good_pair(tmp_path / "images")
    good = [ManifestEntry(f"good_{number}", new, (ref,)) for number in range(20)]
    entries = good[:10] + [case.entry for case in cases] + good[10:]
    config = Config.from_dict({"time_limit": SECONDS})
    start = time.monotonic()
    summary = run(entries, tmp_path / "run", config=config, workers=2, max_bugs=10**6, report=False, quiet=True)
    seconds = time.monotonic() - start
    folder = RunFolder(tmp_path / "run")
    failures = {receipt.image_id: receipt for receipt in iter_failures(folder)}
    bugs = {name: receipt.traceback for name, receipt in failures.items() if receipt.status == "bug"}
    assert not bugs, bugs
    assert summary.exit_code == 1
    assert (summary.status.done + summary.status.failed, summary.status.missing) == (len(entries), 0)
    by_id = {case.entry.image_id: case for case in cases}
    assert set(failures) <= set(by_id)
    for image_id, receipt in failures.items():
        check_reason(by_id[image_id], receipt.message, dict(receipt.metadata))
        assert receipt.error in ("ReadError", "AlignError", "PsfError", "SubtractError"), receipt
    events = Counter(json.loads(line)["event"] for line in (folder.log / "events.jsonl").read_text().splitlines())
    assert not {"image_lost", "image_overdue", "image_bug", "image_retried"} & set(events), events
    assert max(receipt.peak_memory_mb for receipt in failures.values()) < 1000
    assert not [problem for checked in check_run(folder) for problem in checked.problems]
    assert 0.2 * len(entries) < summary.status.done < 0.6 * len(entries)
    print(
        f"{len(entries)} images in {seconds:.0f} s: {dict(Counter(r.error for r in failures.values()))}, "
        f"{summary.status.done} done; {len(read_index(folder))} candidates; peak of a worker "
        f"{max(receipt.peak_memory_mb for receipt in failures.values()):.0f} MB"
    )
