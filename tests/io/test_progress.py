"""What a rerun trusts: markers, and the log of the driver; both survive a kill at any moment."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from batchproc.errors import UsageError
from batchproc.io import atomic
from batchproc.io.markers import Marker, write_marker
from batchproc.io.progress import (
    ReceiptLog,
    finished_images,
    forget_failures,
    gather,
    iter_failures,
    iter_receipts,
)
from batchproc.io.status import read_status
from batchproc.records import Receipt
from tests import _runs

DONE = Receipt("a", "done", 3, {"read": 0.25}, 1.5, 200.0, {"fwhm_new": np.float32(2.5), "shape": [4, 5]})
FAILED = Receipt("b", "failed", stage="align", error="AlignError", message="2 of 8", metadata={"found": 2})
BUG = Receipt("c", "bug", stage="subtract", error="KeyError", message="'x'", traceback="Traceback …")


@pytest.fixture
def folder(tmp_path):
    return _runs.begin(tmp_path / "run", "a", "b", "c", "d")


def mark_done(folder, receipt):
    """As if its files were there."""
    write_marker(folder.marker(receipt.image_id), Marker(receipt, _runs.CONFIG.image_digest))


def log(folder, *receipts):
    with ReceiptLog(folder) as log:
        for receipt in receipts:
            if receipt.status == "done":
                mark_done(folder, receipt)
            log.add(receipt)


def test_receipts_come_back(folder):
    """Seconds, numbers and tracebacks survive the way to the disk, gathered or not."""
    log(folder, DONE, FAILED, BUG)
    before = list(iter_receipts(folder))
    gather(folder)
    assert list(iter_receipts(folder.path)) == before == [DONE, FAILED, BUG]


def test_failures_are_a_table(folder):
    """failures.parquet has a row a failure: image, stage, type, message, file, numbers; receipts.parquet has all."""
    log(folder, DONE, FAILED, BUG)
    gather(folder)
    failures = pd.read_parquet(folder.failures)
    assert failures["image_id"].tolist() == ["b", "c"]
    assert failures["path"].tolist() == ["/nights/b.fits", "/nights/c.fits"]
    assert failures["message"][0] == "2 of 8"
    assert json.loads(failures["metadata"][0]) == {"found": 2}
    assert pd.read_parquet(folder.receipts)["status"].tolist() == ["done", "failed", "bug"]


def test_tables_are_there_from_the_beginning(folder):
    """A run without any failure has an empty failures.parquet with all its columns."""
    gather(folder)
    assert "message" in pd.read_parquet(folder.failures)
    assert len(pd.read_parquet(folder.receipts)) == 0


def test_the_newest_word_on_an_image_counts(folder):
    """A failure that a retry repairs leaves the table of failures; one that stays keeps its newest message."""
    log(folder, FAILED, BUG)
    gather(folder)
    log(folder, replace(DONE, image_id="b"), replace(BUG, message="again"))
    gather(folder)
    assert finished_images(folder) == {"b": "done", "c": "bug"}
    assert pd.read_parquet(folder.failures)["message"].tolist() == ["again"]


def test_a_marker_that_the_log_missed_is_found(folder):
    """The driver was killed between a task's marker and its own log: the receipt is in the marker."""
    log(folder, FAILED)
    mark_done(folder, DONE)
    mark_done(folder, replace(DONE, image_id="b"))
    assert finished_images(folder) == {"a": "done", "b": "done"}
    gather(folder)
    assert [receipt.quality["fwhm_new"] for receipt in iter_receipts(folder)] == [2.5, 2.5]


def test_without_its_marker_nothing_is_done(folder):
    """Removing a marker is how one asks for an image again, whatever the log says."""
    log(folder, DONE, FAILED)
    folder.marker("a").unlink()
    assert finished_images(folder) == {"b": "failed"}


def test_status_counts(folder):
    """Done, failed, bugs and missing add up to the manifest; errors are grouped."""
    log(folder, DONE, FAILED, BUG)
    status = read_status(folder)
    assert (status.total, status.done, status.failed, status.bugs, status.missing) == (4, 1, 1, 1, 1)
    assert status.n_candidates == 3
    assert status.errors == {"align: AlignError": 1, "subtract: KeyError": 1}


def test_a_torn_line_of_the_log_is_passed_over(folder):
    """A driver that is killed while it writes costs one image another attempt, and no other its failure."""
    log(folder, FAILED, replace(FAILED, image_id="d"))
    path = folder.log / "failures.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    log(folder, BUG)
    assert finished_images(folder) == {"b": "failed", "c": "bug"}
    gather(folder)
    assert finished_images(folder) == {"b": "failed", "c": "bug"}


def test_the_log_holds_no_more_than_what_counts(folder):
    """However often images fail, what begins a driver is one line for each that is not done."""
    for i in range(5):
        log(folder, replace(FAILED, message=str(i)), replace(FAILED, image_id="a"))
    log(folder, DONE)
    gather(folder)
    assert len((folder.log / "failures.jsonl").read_text().splitlines()) == 1
    assert [receipt.message for receipt in iter_receipts(folder) if receipt.status != "done"] == ["4"]


def test_failures_are_seen_while_the_driver_works(folder):
    """Nobody has to wait for the end to learn what fails."""
    with ReceiptLog(folder) as log:
        log.add(FAILED)
        assert list(iter_failures(folder)) == [FAILED]


def test_what_is_forgotten_has_not_failed(folder):
    """An image whose failure is forgotten is tried again; others keep theirs."""
    log(folder, FAILED, BUG)
    forget_failures(folder, ["b"])
    assert finished_images(folder) == {"c": "bug"}


def test_strange_names_are_told_apart():
    """Ids that differ have names that differ, whatever characters they are made of."""
    ids = ["a", "a/b", "a%2Fb", ".", "..", ".tmp-x", "ä", "x" * 300, "x" * 301, "~~"]
    names = [atomic.part_name(image_id) for image_id in ids]
    assert len(set(names)) == len(ids)
    assert all(not name.startswith(".") and "/" not in name and len(name.encode()) < 200 for name in names)


def test_one_driver_at_a_time(folder):
    """A second driver is refused, told who works there; leftovers of killed tasks are gone."""
    (folder.catalogue / ".tmp-123-a.parquet").touch()
    (folder.stamps / ".tmp-123-a.zarr").mkdir()
    with (
        folder.locked(),
        pytest.raises(UsageError, match=r"another batchproc works on this run \(process"),
        folder.locked(),
    ):
        pass
    assert not list(folder.catalogue.iterdir()) + list(folder.stamps.iterdir())
    with folder.locked():
        pass
