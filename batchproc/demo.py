"""A small night with known truth, from nothing to a report: what ``batchproc demo`` does."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from batchproc.display import say
from batchproc.distribute.clusters import Where
from batchproc.io.night import simulate_night
from batchproc.io.progress import iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.job import RunSummary, run
from batchproc.report import write_report
from batchproc.report.facts import REAL, Truth, gather_facts

__all__ = ["DemoResult", "run_demo"]

_SURE = 8.0  # S/N from which a transient must not be missed


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    summary : RunSummary
    truth : Truth
        The injected transients, and what became of each.
    seconds : dict
        Mean seconds an image of each step.
    """

    summary: RunSummary
    truth: Truth
    seconds: dict[str, float]

    def text(self) -> str:
        """For people."""
        table = self.truth.table
        sure = table[table["snr"] >= _SURE]
        lines = [
            f"{sure['found'].sum()} of {len(sure)} injected transients with an expected S/N of {_SURE:g} or more were "
            f"found; {table['found'].sum()} of all {len(table)}",
            f"{self.truth.n_false} other detections, {self.truth.n_false_clean} of them unflagged",
        ]
        if self.summary.status.scores:
            others = self.truth.n_false_real
            told = f"{others} other detection{'s' * (others != 1)}"
            lines.append(f"scored {REAL:g} or more: {table['real'].sum()} transients, {told}")
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        return "\n".join([*lines, f"seconds an image: {steps}"])


def run_demo(
    out: str | Path,
    *,
    n_images: int = 8,
    size: int = 1024,
    seed: int = 0,
    cluster: str | Where = "local",
    workers: int | None = None,
    quiet: bool = False,
) -> DemoResult:
    """Simulate a night in ``out/night``, process it with `out` as the run folder, and compare with the truth.

    Parameters
    ----------
    out : path
    n_images, size, seed : int
        Of the night; see `batchproc.io.night.simulate_night`.
    cluster, workers, quiet
        As for `batchproc.run`.
    """
    folder = RunFolder(Path(out))
    night = folder.path / "night"
    manifest = night / "manifest.csv"
    if not folder.record.is_file():
        say(f"simulating {n_images} images of {size} × {size} pixels", quiet=quiet)
        manifest = simulate_night(night, n_images=n_images, size=size, seed=seed)
    summary = run(manifest, folder.path, cluster=cluster, workers=workers, report=False, quiet=quiet)
    shutil.copyfile(night / "truth.parquet", folder.path / "truth.parquet")
    summary = replace(summary, report=write_report(folder.path))
    truth = gather_facts(folder).truth
    assert truth is not None
    return DemoResult(summary, truth, _seconds(folder))


def _seconds(folder: RunFolder) -> dict[str, float]:
    total: Counter[str] = Counter()
    n = 0
    for receipt in iter_receipts(folder):
        if receipt.status == "done":
            total.update(receipt.seconds)
            n += 1
    return {step: seconds / n for step, seconds in total.items()}
