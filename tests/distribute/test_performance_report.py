"""Dask's own account of a run, on request."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchproc.distribute.clusters import Where, _performance_report, open_executor
from batchproc.distribute.executors import DaskExecutor
from batchproc.errors import UsageError


def test_the_report_is_written_at_the_end(tmp_path: Path) -> None:
    """An HTML file with what the workers did."""
    report = tmp_path / "dask.html"
    with open_executor(Where("local", 1, performance_report=report)) as executor:
        executor.submit(divmod, 7, 2)
        ((_, outcome),) = executor.wait()
        assert outcome.value == (3, 1)
        assert not report.exists()
    assert "divmod" in report.read_text()


def test_a_report_that_cannot_be_written_stops_no_run(tmp_path: Path, dask_executor: DaskExecutor) -> None:
    """The work is done: what is missing is said, and no more."""

    def report() -> None:
        with _performance_report(tmp_path):
            dask_executor.submit(divmod, 7, 2)
            dask_executor.wait()

    with pytest.warns(UserWarning, match="Dask's performance report was not written"):
        report()


def test_a_serial_run_has_none() -> None:
    """It is refused before anything starts."""
    with pytest.raises(UsageError, match="a serial run has none"):
        Where("serial", performance_report="x.html").check()
