"""The report of a run: one self-contained HTML page, made from the run folder alone.

`facts` gathers what is to be said, `figures` and `stamps` draw, ``templates/report.html`` is the page.
"""

from __future__ import annotations

from pathlib import Path

from batchproc.io.atomic import write_text
from batchproc.io.run_folder import RunFolder

__all__ = ["write_report"]


def write_report(run_folder: str | Path, truth: str | Path | None = None) -> Path:
    """Write ``report.html`` into a run folder.

    It needs nothing else to be looked at: no network, no other file. Its size does not grow with the run beyond a few
    megabytes.

    Parameters
    ----------
    run_folder : path
        A run, finished or at work.
    truth : path, optional
        Parquet table of known transients (``image_id, x, y, flux``; ``snr`` or ``snr_local``; ``masked`` where no
        detection can be expected), as `batchproc.io.night.simulate_night` writes it. By default ``truth.parquet`` of
        the run folder, where there is one.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    UsageError
        No run folder, or no such truth.
    """
    from batchproc.report.facts import gather_facts
    from batchproc.report.page import render

    folder = RunFolder.existing(run_folder)
    path = folder.path / "report.html"
    write_text(path, render(gather_facts(folder, truth)))
    return path
