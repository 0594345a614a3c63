"""One evaluation = one call: plan it, run it anywhere, and leave numbers, tables and a picture in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.completeness.campaign import Campaign, simulated_sample, simulated_tasks
from batchproc.completeness.drawing import draw
from batchproc.completeness.real import real_sample, real_tasks
from batchproc.completeness.sample import Sample
from batchproc.completeness.verdicts import Summary, finite, summarise
from batchproc.display import duration, say, show
from batchproc.distribute.clusters import Where, expected_workers, open_executor
from batchproc.distribute.executors import WorkerDiedError, sliding
from batchproc.distribute.plan import image_pixels
from batchproc.errors import ExposureError, UsageError
from batchproc.io.atomic import write_bytes, write_text
from batchproc.records import ManifestEntry

__all__ = ["Evaluation", "Plan", "evaluate", "plan"]

#: CPU-seconds of a megapixel: simulation, flow and Gaussian field; in addition where PSFs are measured; of real images,
#: on which the flow runs twice.
_SECONDS_PER_MPIX = 1.5
_SECONDS_PER_MPIX_PSF = 1.0
_SECONDS_PER_MPIX_REAL = 4.0


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do."""

    images: int
    mpix: float
    sources: int
    cpu_seconds: float
    threads: int = 1

    def text(self, workers: int) -> str:
        """For people."""
        workers = max(1, min(workers, self.images))
        return (
            f"{self.images} pairs, {self.mpix:.3g} Mpix, {self.sources} sources to inject; "
            f"about {duration(self.cpu_seconds / workers)} on {workers} workers"
        )


@dataclass(frozen=True)
class Evaluation:
    """What came of one.

    Attributes
    ----------
    summary : Summary
    failures : tuple of str
        Images that the flow could not process, with its words.
    files : tuple of Path
    """

    summary: Summary
    failures: tuple[str, ...]
    files: tuple[Path, ...]

    def text(self) -> str:
        """The verdicts as a table, and where the rest is."""
        words = {True: "ok", False: "MISSED", None: "no verdict"}
        verdicts = [(v.promise, v.goal, v.measured, words[v.ok]) for v in self.summary.verdicts]
        places = [
            (place, *(f"{v[key]:.4g}" for key in ("n", "expected", "found", "unflagged", "pull_mean", "pull_width")))
            for place, v in self.summary.places.items()
        ]
        alarms = [(place, *map(str, v.values())) for place, v in self.summary.alarm_places.items()]
        lines = [
            *_columns([("promise", "goal", "measured", ""), *verdicts]),
            "",
            *_columns([("sources", "n", "expected", "found", "unflagged", "pull mean", "pull width"), *places]),
            "",
            *_columns([("false alarms above the threshold", "positive", "negative", "flagged"), *alarms]),
            "",
        ]
        facts = self.summary.facts
        lines.append(
            f"{facts['images']} images, {facts['mpix_searched']:.3g} of {facts['mpix']:.3g} Mpix searched, "
            f"{facts['sources_used']} of {facts['sources']} sources away from masked pixels and within the S/N range; "
            f"the flow took {facts['cpu_seconds_per_mpix']:.2f} CPU-s a Mpix"
        )
        lines += [f"failed: {failure}" for failure in self.failures]
        return "\n".join([*lines, f"in {self.files[0].parent}: {', '.join(path.name for path in self.files)}"])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def plan(campaign: Campaign, entries: Sequence[ManifestEntry] | None = None) -> Plan:
    """How much an evaluation computes; nothing is begun.

    Parameters
    ----------
    campaign : Campaign
    entries : sequence of ManifestEntry, optional
        Real images to take instead of simulated ones; their headers are read.
    """
    threads = campaign.config.threads
    if entries is None:
        mpix = campaign.images * campaign.size**2 / 1e6
        seconds = _SECONDS_PER_MPIX + (_SECONDS_PER_MPIX_PSF if campaign.psf == "measured" else 0.0)
        return Plan(campaign.images, mpix, campaign.images * campaign.per_image, seconds * mpix, threads)
    images = min(campaign.images, len(entries))
    mpix = images * image_pixels(entries) / 1e6
    return Plan(images, mpix, images * campaign.per_image, _SECONDS_PER_MPIX_REAL * mpix, threads)


def evaluate(
    campaign: Campaign,
    out: str | Path,
    *,
    entries: Sequence[ManifestEntry] | None = None,
    cluster: str | Where = "local",
    workers: int | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Measure completeness and false alarms, and hold them against theory.

    Parameters
    ----------
    campaign : Campaign
    out : path
        A folder, made where it is missing: ``completeness.json`` (verdicts and every number behind them),
        ``completeness.png``, ``sources.parquet`` (a row an injected source), ``false_alarms.parquet`` (a row a
        detection that is nothing, of the images and of the Gaussian fields).
    entries : sequence of ManifestEntry, optional
        Real images to inject into instead of simulated ones.
    cluster, workers, quiet
        As for `batchproc.run`. The results are the same wherever it runs.

    Raises
    ------
    UsageError
        Another word for the cluster; or no image could be processed.
    OSError
        The folder cannot be made; before anything is computed.
    """
    where = Where.of(cluster, workers)
    where.check()
    planned = plan(campaign, entries)
    say(planned.text(expected_workers(where, planned.threads)), quiet=quiet)
    Path(out).mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    samples: dict[int, Sample] = {}
    failures: dict[int, str] = {}
    function: Callable[[Any], Sample] = simulated_sample if entries is None else real_sample
    tasks: Iterable[Any] = simulated_tasks(campaign) if entries is None else real_tasks(entries, campaign)
    with open_executor(where, campaign.config.threads, planned.images) as executor:
        outcomes = sliding(executor, function, tasks)
        for task, outcome in show(outcomes, planned.images, "images", quiet=quiet):
            if isinstance(outcome.error, ExposureError):
                failures[task.index] = f"{outcome.error.stage}: {outcome.error}"
            elif isinstance(outcome.error, WorkerDiedError):
                failures[task.index] = f"image {task.index + 1}: {outcome.error} (fewer workers have more memory each)"
            elif outcome.error is not None:
                raise outcome.error
            else:
                samples[task.index] = outcome.value
    words = tuple(failures[i] for i in sorted(failures))
    if not samples:
        raise UsageError(f"none of {planned.images} images could be processed: {'; '.join(words[:3])}")
    in_order = [samples[i] for i in sorted(samples)]
    summary = summarise(in_order, threshold=campaign.threshold, snr=campaign.snr, lowest=campaign.lowest)
    return Evaluation(summary, words, _write(Path(out), summary, in_order))


def _write(out: Path, summary: Summary, samples: Sequence[Sample]) -> tuple[Path, ...]:
    names = ("completeness.json", "completeness.png", "sources.parquet", "false_alarms.parquet")
    files = tuple(out / name for name in names)
    images = [{"name": s.name, "mpix": s.mpix, **s.facts} for s in samples]
    document = {**summary.to_dict(), "images": finite(images)}
    write_text(files[0], json.dumps(document, indent=1) + "\n")
    write_bytes(files[1], draw(summary, samples))
    _table([(s.name, s.sources, {}) for s in samples]).to_parquet(files[2], index=False)
    alarms = [(s.name, s.alarms, {"gaussian": False}) for s in samples]
    _table([*alarms, *((s.name, s.gaussian, {"gaussian": True}) for s in samples)]).to_parquet(files[3], index=False)
    return files


def _table(parts: Iterable[tuple[str, NDArray[np.void], dict[str, Any]]]) -> pd.DataFrame:
    """Structured arrays below one another, each with its image's name."""
    frames = []
    for name, rows, more in parts:
        frame = pd.DataFrame({column: rows[column] for column in rows.dtype.names or ()})
        frames.append(frame.assign(image=name, **more))
    return pd.concat(frames, ignore_index=True)
