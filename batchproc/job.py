"""One run = one call: check, freeze, process what is missing, score, report.

This is what stands behind the command line, and what a script calls.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from batchproc.config import Config
from batchproc.display import say, show
from batchproc.distribute.campaign import process_images
from batchproc.distribute.chunks import Chunk, Failure
from batchproc.distribute.clusters import Where, expected_workers, open_executor, watching
from batchproc.distribute.executors import Executor, WorkerDiedError
from batchproc.distribute.plan import Plan, choose_spread, evenly, images_at_once, largest_need, plan_run
from batchproc.distribute.prediction import fit, tile_bytes
from batchproc.distribute.scoring import check_here, check_workers, classify_chunks, plan_chunks, resources_of
from batchproc.distribute.signals import leaving_in_order
from batchproc.distribute.tiles import tiles_under_way
from batchproc.errors import ClusterError, ConfigError, ModelError, StorageError, UsageError
from batchproc.io.atomic import our_disk
from batchproc.io.events import EventLog, NullEvents
from batchproc.io.freeze import check, complete_change, drop_strange, freeze
from batchproc.io.index import read_index
from batchproc.io.manifest import read_manifest
from batchproc.io.packs import plan_roll_ups, tidy
from batchproc.io.progress import finished_images, gather
from batchproc.io.run_folder import RunFolder
from batchproc.io.status import Status, read_status
from batchproc.records import ManifestEntry, Receipt

__all__ = ["Classified", "RunSummary", "Steps", "Unscored", "classify", "plan", "retry", "run", "unscored"]


# The driver needs none of the numerics: where they are called, they are imported.


def _process(entry: ManifestEntry, config: Config, **options: Any) -> Any:
    from batchproc.flow import process_image

    return process_image(entry, config, **options)


def _model(name: str, threads: int, device: str = "cpu") -> Any:
    from batchproc.io.models import load_model

    return load_model(name, threads, device=device)


def _wisdom(config: Config) -> str:
    """FFTW's plans, kept with the run so that a later version of the package repeats its bytes."""
    from batchproc.imaging.fft import frozen_wisdom

    return frozen_wisdom()


def _report(folder: Path) -> Path:
    from batchproc.report import write_report

    return write_report(folder)


@dataclass(frozen=True)
class Steps:
    """The work behind a run; tests put stand-ins in its place (functions of a module: worker processes import them)."""

    process: Callable[..., Any] = _process
    model: Callable[..., Any] = _model
    wisdom: Callable[[Config], str] = _wisdom
    report: Callable[[Path], Path] = _report


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
        What stopped the run (a full disk, no workers), or went wrong after the images, in scoring and in the report;
        empty when nothing did.
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
        """0 all done that was asked for; 1 finished, some images failed or were never tried; 3 a bug or a fault."""
        if self.stopped or self.problem or self.status.bugs:
            return 3
        return 1 if self.status.failed or self.left else 0


@dataclass(frozen=True)
class Classified:
    """How a pass of models over a run ended.

    Attributes
    ----------
    candidates : int
        That were scored now, by one model or more.
    problems : tuple of str
        Models that failed, and why; the scores of the others are there.
    """

    candidates: int
    problems: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 all scored that was asked for; 1 a model failed."""
        return int(bool(self.problems))


@dataclass(frozen=True)
class Unscored:
    """What a pass of models over a run has to do.

    Attributes
    ----------
    candidates : int
        Of all finished images.
    lacking : dict
        Model → candidates that it has not scored.
    """

    candidates: int
    lacking: dict[str, int]


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
    job = _Job(folder, settings, steps, Where.of(cluster, workers), report, max_bugs, quiet)
    job.check_device()
    with folder.locked():
        changes = freeze(
            folder, entries, settings, lambda: steps.wisdom(settings), models=job.models, extend=extend, redo=redo
        )
        if changes:
            say(f"changed: {changes.consequences()}", quiet=quiet)
        job.take_stock()
        tried = finished_images(folder)
        todo = [entry for entry in entries if entry.image_id not in tried]
        if tried:
            say(f"{len(tried)} of {len(entries)} images were tried before; {len(todo)} are missing", quiet=quiet)
        summary = job.carry_out("run", todo if pilot is None else evenly(todo, pilot), len(entries) - len(todo))
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
    job = _Job(folder, _spread(folder.config(), spread), steps, Where.of(cluster, workers), report, max_bugs, quiet)
    job.check_device()
    with folder.locked():
        job.take_stock()
        failed = {image_id for image_id, status in finished_images(folder).items() if status != "done"}
        entries = folder.entries()
        todo = [entry for entry in entries if entry.image_id in failed]
        say(f"{len(todo)} images failed before and are tried again", quiet=quiet)
        return job.carry_out("retry", todo)


def classify(
    out: str | Path,
    models: str | Sequence[str],
    *,
    device: str | None = None,
    cluster: str | Where = "local",
    workers: int | None = None,
    quiet: bool = False,
    steps: Steps = Steps(),
) -> Classified:
    """Score a run with one or several models, in one pass over the stamps.

    What a model has scored before is left as it is, and what only some of the models lack is scored by those. The
    scores are the columns ``score_<model>`` of `open_catalogue` (``score_<model>_<class>`` of several classes).

    Parameters
    ----------
    out : path
        A run folder.
    models : str or sequence of str
        Bundled or added models, or the paths of some; each once.
    device : {"cpu", "gpu", "edgetpu"}, optional
        What runs them; by default what the run's settings say.
    cluster, workers, quiet, steps
        As for `run`.

    Raises
    ------
    ModelError, UsageError
        A model that cannot be had as asked, before anything is scored; or one that fails, where it is the only one.
    """
    folder = RunFolder.existing(out)
    job = _Job(
        folder,
        _scoring(folder.config(), models, device),
        steps,
        Where.of(cluster, workers),
        report=False,
        max_bugs=0,
        quiet=quiet,
    )
    job.check_device()
    with folder.locked():
        job.take_stock()
        chunks = job.unscored()
        scored = 0
        if chunks:
            with EventLog(folder) as job.events, leaving_in_order(), job.place((), chunks) as executor:
                job.check_device(executor)
                scored = job.score(chunks, executor)
    if job.failed and len(job.failed) == len(job.models):
        raise next(iter(job.failed.values())).error
    return Classified(scored, tuple(job.problems))


def unscored(
    out: str | Path, models: str | Sequence[str], *, device: str | None = None, steps: Steps = Steps()
) -> Unscored:
    """What `classify` would do; scores and writes nothing. Arguments as there."""
    folder = RunFolder.existing(out)
    settings = _scoring(folder.config(), models, device)
    job = _Job(folder, settings, steps, Where("serial"), report=False, max_bugs=0, quiet=True)
    lacking = Counter[str]()
    for chunk in job.unscored():
        lacking.update(dict.fromkeys(chunk.models, chunk.n_candidates))
    candidates = len(read_index(folder))
    return Unscored(candidates, {model.name: lacking[model.name] for model in job.models})


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
    if not folder.record.is_file():
        return plan_run(folder, entries, settings)
    changes = check(folder, entries, settings, extend=extend, redo=redo)
    told = (changes.consequences(),) if changes else ()
    return plan_run(folder, entries, settings, again=changes.again, changes=told)


class _Job:
    """What the calls above have in common: the work on one run folder, once it is known what to do.

    Models are loaded at once, so that a wrong name is known before the first image; so is a wrong word for the cluster.
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
        self.folder, self.settings, self.steps, self.where = folder, settings, steps, where
        self.report, self.max_bugs, self.quiet = report, max_bugs, quiet
        scoring = settings.classify
        self.models = [steps.model(name, settings.threads, scoring.device) for name in scoring.models]
        twice = [name for name, n in Counter(model.name for model in self.models).items() if n > 1]
        if twice:
            raise UsageError(f"two models of the name {', '.join(twice)}: their scores would be one; name each once")
        self.events, self.pixels = NullEvents(), 0
        self.ended: Counter[str] = Counter()
        self.problems: list[str] = []
        self.failed: dict[str, Failure] = {}

    def check_device(self, executor: Executor | None = None) -> None:
        """Have the models opened where they shall run, if that is no CPU: here, or by a worker of an executor.

        Raises
        ------
        ModelError, UsageError
            They cannot be had there.
        """
        device = self.settings.classify.device
        if device == "cpu" or not self.models:
            return
        if self.where.cluster in ("serial", "local"):  # the workers are on this machine
            if executor is None:
                check_here(self.models)
        elif executor is not None and not check_workers(self.models, device, executor):
            say(f"no worker with device = {device!r} is here yet: that it can be used is not known", quiet=self.quiet)

    def take_stock(self) -> None:
        """Bring the log up to what the markers say, without those of images that were done with other settings."""
        complete_change(self.folder)
        tidy(self.folder)
        n = drop_strange(self.folder)
        if n:
            say(f"{n} images were done with other settings: they count as missing", quiet=self.quiet)
        gather(self.folder)

    def carry_out(self, command: str, todo: Sequence[ManifestEntry], before: int = 0) -> RunSummary:
        """Process images, score what is not scored, gather the log, report.

        Parameters
        ----------
        command : str
            The user's word for it.
        todo : sequence of ManifestEntry
        before : int
            Images that ended earlier, to be counted with them.
        """
        start = time.monotonic()
        scored, path, fault = 0, None, False
        chunks = self.unscored()
        place = self.place(todo, chunks)
        with EventLog(self.folder) as self.events, leaving_in_order():
            self.events.write("run_begun", before=before, to_do=len(todo), command=command, cluster=self.where.cluster)
            self.events.beat(to_do=len(todo), done=0, failed=0)
            reason = "interrupted"
            try:
                if todo or chunks or plan_roll_ups(self.folder):
                    with place as executor:
                        scored = self.compute(todo, before, executor)
                reason = "stopped" if self.stopped else "finished"
            except (StorageError, ClusterError) as error:
                self.problems.append(f"stopped: {error}")
                self.events.write("stopped", reason=str(error))
                reason, fault = "stopped", True
            finally:
                self.gather()
                failed = self.ended["failed"] + self.ended["bug"]
                self.events.write("run_ended", reason=reason, done=self.ended["done"], failed=failed)
            if self.report and not fault:
                path = self.write_report()
        return RunSummary(
            status=read_status(self.folder),
            processed=len(todo),
            scored=scored,
            seconds=time.monotonic() - start,
            stopped=self.stopped,
            report=path,
            problem="\n".join(self.problems),
        )

    @property
    def stopped(self) -> bool:
        """Whether there were too many bugs to go on."""
        return self.ended["bug"] > self.max_bugs

    def place(self, todo: Sequence[ManifestEntry], chunks: Sequence[Chunk]) -> AbstractContextManager[Executor]:
        """Where it will run, with no more processes than have work, and memory where the images are.

        Raises
        ------
        UsageError
            A worker has less memory than an image needs.
        """
        threads, tasks = self.settings.threads, max(1, len(todo), len(chunks))
        need = largest_need(todo)
        self.pixels = need.pixels
        large = None
        workers = expected_workers(self.where, threads)
        if self.spread(todo, workers) == "tiles":
            large = images_at_once(len(todo), workers)
            if self.where.cluster == "local":  # nobody pays for jobs that have no image
                tasks = workers
        tiles = tile_bytes(self.settings.subtract.tile, tiles_under_way(workers)) if large else 0
        fit(need, self.where, images=tasks, threads=threads, large=large, tiles=tiles).check()
        offered = resources_of(self.settings.classify.device) if self.models else None
        return open_executor(self.where, threads, tasks, large, folder=self.folder.log, resources=offered)

    def spread(self, todo: Sequence[ManifestEntry], workers: int) -> str:
        """What the workers share out: images or tiles."""
        return choose_spread(self.settings.spread, len(todo), workers, self.pixels)

    def compute(self, todo: Sequence[ManifestEntry], before: int, executor: Executor) -> int:
        """Process and score; returns the number of candidates scored."""
        how = watching(self.where, executor)
        if how:
            say(how, quiet=self.quiet)
            self.events.beat(dashboard=how.removeprefix("watch it at "))
        self.check_device(executor)
        self.process(todo, before, executor)
        if self.stopped:
            return 0
        try:
            return self.score(self.unscored(), executor)
        except (StorageError, ClusterError):
            raise
        except Exception as error:  # the images are done; what follows goes on without scores
            self.problems.append(_tell_scoring("", Failure(error, "".join(traceback.format_exception(error)))))
            return 0

    def process(self, todo: Sequence[ManifestEntry], before: int, executor: Executor) -> None:
        """Process images, and count how they ended."""
        spread = self.spread(todo, executor.workers)
        if spread == "tiles":
            say(f"the tiles of each image are spread over {executor.workers} workers", quiet=self.quiet)
        receipts = process_images(
            self.folder,
            todo,
            executor,
            process=self.steps.process,
            threads=self.settings.threads,
            time_limit=self.settings.time_limit,
            max_bugs=self.max_bugs,
            spread=spread,
            events=self.events,
            tell=partial(say, quiet=self.quiet),
        )

        def counted() -> Iterator[Receipt]:
            for receipt in receipts:
                self.ended[receipt.status] += 1
                self.events.beat(done=self.ended["done"], failed=self.ended["failed"] + self.ended["bug"])
                yield receipt

        def failed() -> str:
            n = self.ended["failed"] + self.ended["bug"]
            return f"{n} failed" if n else ""

        for _ in show(counted(), before + len(todo), "images", note=failed, before=before, quiet=self.quiet):
            pass

    def gather(self) -> None:
        """Gather the log, where the disk takes it; the next driver does it first of all."""
        try:
            gather(self.folder)
        except (StorageError, OSError) as error:
            self.problems.append(f"receipts and failures were not gathered: {error}")

    def write_report(self) -> Path | None:
        """The report; where that fails, the run's own result is told all the same."""
        self.events.beat(phase="report", in_flight=0)
        try:
            with our_disk(self.folder.path):
                return self.steps.report(self.folder.path)
        except StorageError as error:
            self.problems.append(f"no report: {error}")
            return None
        except Exception:
            self.problems.append(traceback.format_exc())
            return None

    def unscored(self) -> list[Chunk]:
        """What the models have not scored yet."""
        return list(plan_chunks(self.folder, self.models)) if self.models else []

    def score(self, chunks: Sequence[Chunk], executor: Executor) -> int:
        """Score chunks; returns the number of candidates that got scores. Models that fail are problems."""
        if not chunks:
            return 0
        total = sum(chunk.n_candidates for chunk in chunks)
        self.events.beat(phase="scoring", in_flight=0)
        finished = classify_chunks(
            self.folder,
            chunks,
            executor,
            models=self.models,
            threads=self.settings.threads,
            device=self.settings.classify.device,
            failed=self.failed,
        )
        scored: dict[str, int] = {}
        for chunk in show(finished, total, "candidates scored", count=lambda c: c.n_candidates, quiet=self.quiet):
            self.events.write("scored", candidates=chunk.n_candidates)
            scored[chunk.name] = chunk.n_candidates  # by one model at a time, where a worker died
        self.problems += [_tell_scoring(name, failure) for name, failure in self.failed.items()]
        return sum(scored.values())


def _tell_scoring(model: str, failure: Failure) -> str:
    """In a line where it was foreseen, with its traceback otherwise."""
    foreseen = isinstance(failure.error, (ModelError, UsageError, WorkerDiedError))
    return f"scoring{f' by {model}' if model else ''}: {failure.error if foreseen else failure.traceback}"


def _scoring(settings: Config, models: str | Sequence[str], device: str | None) -> Config:
    """The settings of a run, with other models."""
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise UsageError("no model to score with; `batchproc models list` says which there are")
    if len(set(names)) < len(names):
        raise UsageError(f"{', '.join(names)}: name each model once")
    scoring = replace(settings.classify, model=names[0], more_models=tuple(names[1:]))
    return replace(settings, classify=replace(scoring, device=device or scoring.device))


def _entries(manifest: str | Path | Sequence[ManifestEntry]) -> list[ManifestEntry]:
    return read_manifest(manifest) if isinstance(manifest, (str, Path)) else list(manifest)


def _spread(settings: Config, spread: str | None) -> Config:
    return settings if spread is None else replace(settings, spread=spread)


def _settings(config: Config | str | Path | None, folder: RunFolder) -> Config:
    if isinstance(config, Config):
        return config
    if config is not None:
        return Config.from_toml(config)
    if folder.record.is_file():
        with suppress(ConfigError):  # lost or damaged: what the run has recorded tells whether these were its settings
            return folder.config()
    return Config()
