"""One run = one call: check, freeze, process what is missing, score, report.

This is what stands behind the command line, and what a script calls.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchproc.config import Config
from batchproc.display import say, show
from batchproc.distribute.campaign import classify_chunks, plan_chunks, process_images
from batchproc.distribute.clusters import Where, dashboard, local_workers, open_executor
from batchproc.distribute.executors import Executor, WorkerDiedError
from batchproc.distribute.plan import Plan, choose_spread, evenly, image_pixels, images_at_once, plan_run
from batchproc.distribute.tasks import Chunk
from batchproc.errors import ModelError
from batchproc.flow import process_image
from batchproc.imaging.fft import frozen_wisdom
from batchproc.io.freeze import check, complete_change, drop_strange, freeze
from batchproc.io.manifest import read_manifest
from batchproc.io.models import load_model
from batchproc.io.progress import Status, finished_images, gather, read_status
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry
from batchproc.report import write_report

__all__ = ["RunSummary", "Steps", "classify", "plan", "retry", "run"]


def _wisdom(config: Config) -> str:
    """FFTW's plans, kept with the run so that a later version of the package repeats its bytes."""
    return frozen_wisdom()


@dataclass(frozen=True)
class Steps:
    """The work behind a run; tests put stand-ins in its place (functions of a module: worker processes import them)."""

    process: Callable[[ManifestEntry, Config], Any] = process_image
    model: Callable[[str, int], Any] = load_model
    wisdom: Callable[[Config], str] = _wisdom
    report: Callable[[Path], Path] = write_report


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes
    ----------
    status : Status
        Of the run folder: images done, failed, missing; candidates.
    processed, scored : int
        Images tried, and candidates scored, by this call.
    seconds : float
        That it took.
    stopped : bool
        Too many bugs: images are missing that were not tried.
    report : Path or None
    problem : str
        What went wrong after the images, in scoring and in the report; empty when nothing did.
    pilot : bool
        Only some of the missing images were asked for.
    """

    status: Status
    processed: int
    scored: int
    seconds: float
    stopped: bool
    report: Path | None
    problem: str = ""
    pilot: bool = False

    @property
    def left(self) -> int:
        """Images that have not been tried though they were asked for."""
        return 0 if self.pilot else self.status.missing

    @property
    def exit_code(self) -> int:
        """0 all done that was asked for; 1 finished, some images failed or were never tried; 3 a bug."""
        if self.stopped or self.problem or self.status.bugs:
            return 3
        return 1 if self.status.failed or self.left else 0


def run(
    manifest: str | Path | Sequence[ManifestEntry],
    out: str | Path,
    *,
    config: Config | str | Path | None = None,
    cluster: str | Where = "local",
    workers: int | None = None,
    spread: str | None = None,
    pilot: int | None = None,
    extend: bool = False,
    redo: bool = False,
    report: bool = True,
    max_bugs: int = 5,
    quiet: bool = False,
    steps: Steps = Steps(),
) -> RunSummary:
    """Find what changed in every image of a manifest; again on the same folder, do what is missing.

    Parameters
    ----------
    manifest : path or sequence of ManifestEntry
    out : path
        The run folder; made, or continued. Images that failed before are left to `retry`.
    config : Config or path of a TOML file, optional
        By default that of the run that is continued, or the defaults.
    cluster : str or Where
        ``"local"`` (a process a core), ``"serial"`` (here), the address of a Dask scheduler, or the name or path of a
        site profile (jobs of a batch system); `Where` says more than that. The results are the same. Scripts that use
        ``"local"`` need the usual ``if __name__ == "__main__":``, since its processes import the script.
    workers : int, optional
        Worker processes.
    spread : {"auto", "images", "tiles"}, optional
        What the workers share out; by default ``spread`` of the configuration.
    pilot : int, optional
        Only so many of the missing images, spread over the manifest, to measure them. The exit code is then that of
        what was asked for: 0 though images are missing.
    extend : bool
        Accept a manifest with more images than the run was begun with.
    redo : bool
        Make the run what is asked for now, whatever it was begun with: images whose row or settings changed are done
        again, the results of images that are no longer in the manifest are deleted.
    report : bool
        Write ``report.html`` at the end.
    max_bugs : int
        Stop after more than this many images failed by a bug.
    quiet : bool
        Print nothing.
    steps : Steps, optional
        Stand-ins for the work, for tests.

    Returns
    -------
    RunSummary

    Raises
    ------
    ConfigError, ManifestError, ModelError, RunMismatchError, UsageError
        Before anything is computed.
    """
    folder = RunFolder(Path(out))
    entries, settings = _entries(manifest), _spread(_settings(config, folder), spread)
    job = _Job(folder, settings, steps, _where(cluster, workers), report, max_bugs, quiet)
    with folder.locked():
        changes = freeze(
            folder, entries, settings, lambda: steps.wisdom(settings), model=job.model, extend=extend, redo=redo
        )
        if changes:
            say(f"changed: {changes.consequences()}", quiet=quiet)
        job.take_stock()
        tried = finished_images(folder)
        todo = [entry for entry in entries if entry.image_id not in tried]
        if tried:
            say(f"{len(tried)} of {len(entries)} images were tried before; {len(todo)} are missing", quiet=quiet)
        summary = job.carry_out(todo if pilot is None else evenly(todo, pilot))
        return replace(summary, pilot=pilot is not None)


def retry(
    out: str | Path,
    *,
    cluster: str | Where = "local",
    workers: int | None = None,
    spread: str | None = None,
    report: bool = True,
    max_bugs: int = 5,
    quiet: bool = False,
    steps: Steps = Steps(),
) -> RunSummary:
    """Try the images again that failed; arguments as for `run`, which is what does those that were never tried."""
    folder = RunFolder.existing(out)
    folder.check_version()
    job = _Job(folder, _spread(folder.config(), spread), steps, _where(cluster, workers), report, max_bugs, quiet)
    with folder.locked():
        job.take_stock()
        failed = {image_id for image_id, status in finished_images(folder).items() if status != "done"}
        todo = [entry for entry in folder.entries() if entry.image_id in failed]
        say(f"{len(todo)} images failed before and are tried again", quiet=quiet)
        return job.carry_out(todo)


def classify(
    out: str | Path,
    model: str,
    *,
    cluster: str | Where = "local",
    workers: int | None = None,
    quiet: bool = False,
    steps: Steps = Steps(),
) -> int:
    """Score a run with a model; returns the number of candidates that were scored now.

    What the model has scored before is left as it is. The scores are the column ``score_<model>`` of `open_catalogue`.

    Parameters
    ----------
    out : path
        A run folder.
    model : str
        A bundled or added model, or the path of one.
    cluster, workers, quiet, steps
        As for `run`.
    """
    folder = RunFolder.existing(out)
    settings = folder.config()
    settings = replace(settings, classify=replace(settings.classify, model=model))
    job = _Job(folder, settings, steps, _where(cluster, workers), report=False, max_bugs=0, quiet=quiet)
    with folder.locked():
        job.take_stock()
        chunks = job.unscored()
        if chunks:
            with open_executor(Where(cluster, workers), settings.threads, len(chunks), folder=folder.log) as executor:
                job.score(chunks, executor)
    return sum(chunk.n_candidates for chunk in chunks)


def plan(
    manifest: str | Path | Sequence[ManifestEntry],
    out: str | Path,
    *,
    config: Config | str | Path | None = None,
    spread: str | None = None,
    extend: bool = False,
    redo: bool = False,
) -> Plan:
    """What `run` would do; computes and writes nothing."""
    folder = RunFolder(Path(out))
    entries, settings = _entries(manifest), _spread(_settings(config, folder), spread)
    if folder.record.is_file():
        check(folder, entries, settings, extend=extend, redo=redo)
    return plan_run(folder, entries, settings)


class _Job:
    """What the calls above have in common: the work on one run folder, once it is known what to do.

    The model is loaded at once, so that a wrong name is known before the first image; so is a wrong word for the
    cluster.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: Config,
        steps: Steps,
        where: Where,
        report: bool,
        max_bugs: int,
        quiet: bool,
    ) -> None:
        where.check()
        self.folder, self.settings, self.steps = folder, settings, steps
        self.where = where
        self.report, self.max_bugs, self.quiet = report, max_bugs, quiet
        name = settings.classify.model
        self.model = steps.model(name, settings.threads) if name else None

    def take_stock(self) -> None:
        """Bring the log up to what the markers say, without those of images that were done with other settings."""
        complete_change(self.folder)
        n = drop_strange(self.folder)
        if n:
            say(f"{n} images were done with other settings: they count as missing", quiet=self.quiet)
        gather(self.folder)

    def carry_out(self, todo: Sequence[ManifestEntry]) -> RunSummary:
        """Process images, score what is not scored, gather the log, report."""
        start = time.monotonic()
        receipts: Counter[str] = Counter()
        scored, path = 0, None
        problems: list[str] = []
        chunks = self.unscored()
        try:
            if todo or chunks:
                pixels = image_pixels(todo)
                with self.executor(todo, chunks, pixels) as executor:
                    if dashboard(executor):
                        say(f"watch it at {dashboard(executor)}", quiet=self.quiet)
                    spread = self.spread(todo, executor.workers, pixels)
                    receipts = self.process(todo, executor, spread)
                    if receipts["bug"] <= self.max_bugs:
                        try:
                            scored = self.score(self.unscored(), executor)
                        except Exception as error:  # the images are done; what follows goes on without scores
                            problems.append(_tell_scoring(error))
        finally:
            gather(self.folder)
        if self.report:
            try:
                path = self.steps.report(self.folder.path)
            except Exception:
                problems.append(traceback.format_exc())
        return RunSummary(
            status=read_status(self.folder),
            processed=len(todo),
            scored=scored,
            seconds=time.monotonic() - start,
            stopped=receipts["bug"] > self.max_bugs,
            report=path,
            problem="\n".join(problems),
        )

    def spread(self, todo: Sequence[ManifestEntry], workers: int, pixels: int) -> str:
        """What the workers share out: images or tiles."""
        return choose_spread(self.settings.spread, len(todo), workers, pixels)

    def executor(
        self, todo: Sequence[ManifestEntry], chunks: Sequence[Chunk], pixels: int
    ) -> AbstractContextManager[Executor]:
        """Where it runs, with no more processes than have work, and memory where the images are."""
        threads = self.settings.threads
        workers = local_workers(self.where.workers, threads)
        if self.spread(todo, workers, pixels) == "tiles":
            large = images_at_once(len(todo), workers)
            return open_executor(self.where, threads, large=large, folder=self.folder.log)
        return open_executor(self.where, threads, max(len(todo), len(chunks)), folder=self.folder.log)

    def process(self, todo: Sequence[ManifestEntry], executor: Executor, spread: str) -> Counter[str]:
        """Process images; returns how many ended how."""
        ended: Counter[str] = Counter()
        if spread == "tiles":
            say(f"the tiles of each image are spread over {executor.workers} workers", quiet=self.quiet)
        receipts = process_images(
            self.folder,
            todo,
            executor,
            process=self.steps.process,
            threads=self.settings.threads,
            max_bugs=self.max_bugs,
            spread=spread,
        )

        def failed() -> str:
            n = ended["failed"] + ended["bug"]
            return f"{n} failed" if n else ""

        for receipt in show(receipts, len(todo), "images", note=failed, quiet=self.quiet):
            ended[receipt.status] += 1
        return ended

    def unscored(self) -> list[Chunk]:
        """What the model has not scored yet."""
        return [] if self.model is None else list(plan_chunks(self.folder, self.model))

    def score(self, chunks: Sequence[Chunk], executor: Executor) -> int:
        """Score chunks; returns the number of candidates in them."""
        if not chunks:
            return 0
        total = sum(chunk.n_candidates for chunk in chunks)
        finished = classify_chunks(self.folder, chunks, executor, model=self.model, threads=self.settings.threads)
        for _ in show(finished, total, "candidates scored", count=lambda c: c.n_candidates, quiet=self.quiet):
            pass
        return total


def _tell_scoring(error: Exception) -> str:
    """In a line where it was foreseen, with its traceback otherwise."""
    foreseen = isinstance(error, (ModelError, WorkerDiedError))
    return f"scoring: {error if foreseen else ''.join(traceback.format_exception(error))}"


def _where(cluster: str | Where, workers: int | None) -> Where:
    where = Where(cluster) if isinstance(cluster, str) else cluster
    return where if workers is None else replace(where, workers=workers)


def _entries(manifest: str | Path | Sequence[ManifestEntry]) -> list[ManifestEntry]:
    return read_manifest(manifest) if isinstance(manifest, (str, Path)) else list(manifest)


def _spread(settings: Config, spread: str | None) -> Config:
    return settings if spread is None else replace(settings, spread=spread)


def _settings(config: Config | str | Path | None, folder: RunFolder) -> Config:
    if isinstance(config, Config):
        return config
    if config is not None:
        return Config.from_toml(config)
    return folder.config() if folder.record.is_file() else Config()
