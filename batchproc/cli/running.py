"""``batchproc demo|run|status|retry|report|classify``: a run, from its beginning to its report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchproc.cli.common import (
    example,
    manifest_argument,
    max_bugs_option,
    out_option,
    report_option,
    run_folder,
    set_up,
    spread_option,
    where_to_run,
)
from batchproc.config import Config
from batchproc.display import duration, size

if TYPE_CHECKING:
    from batchproc.distribute.clusters import Where
    from batchproc.distribute.plan import Plan
    from batchproc.io.progress import Status
    from batchproc.job import RunSummary


@click.command(epilog=example("batchproc demo --out demo"))
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder of the demo.")
@where_to_run
def demo(out: Path, where: Where, quiet: bool) -> int:
    """Simulate a small night with known transients, find them, and say how many were found."""
    set_up(Config(), where)
    from batchproc.demo import run_demo

    result = run_demo(out, cluster=where, quiet=quiet)
    click.echo(_tell_run(result.summary))
    click.echo(result.text())
    return result.summary.exit_code


@click.command(
    epilog=example(
        "batchproc run night.csv --out RUN --dry-run",
        "batchproc run night.csv --out RUN --config settings.toml --workers 4",
    )
)
@manifest_argument
@out_option
@click.option("--config", type=click.Path(path_type=Path), help="Settings; keys left out have their defaults.")
@click.option("--dry-run", is_flag=True, help="Say what there is to do and compute nothing.")
@click.option("--pilot", type=click.IntRange(1), metavar="N", help="Do N images, and say what the rest will take.")
@click.option("--extend", is_flag=True, help="Accept a manifest with more images than the run was begun with.")
@click.option(
    "--redo",
    is_flag=True,
    help="Accept any other manifest and settings: images that this concerns are done again, and the results of images "
    "that are not in the manifest any more are deleted. --dry-run says beforehand how many.",
)
@max_bugs_option
@report_option
@spread_option
@where_to_run
def run(
    manifest: Path,
    out: Path,
    config: Path | None,
    dry_run: bool,
    pilot: int | None,
    extend: bool,
    redo: bool,
    max_bugs: int,
    no_report: bool,
    spread: str | None,
    where: Where,
    quiet: bool,
) -> int:
    """Process the images of a manifest; again on the same folder, what is missing of them.

    A run is what it was begun with: another manifest or other settings are refused with the difference, unless --extend
    or --redo says that they are meant. Images that failed before are left to `batchproc retry`.

    Exit code 0: all done, or with --pilot what was asked for; 1: some images failed; 2: nothing was started; 3: a bug.
    """
    settings = None if config is None else Config.from_toml(config)  # read once: it may be a pipe
    set_up(settings, where)
    from batchproc import job

    if dry_run:
        click.echo(_tell_plan(job.plan(manifest, out, config=settings, spread=spread, extend=extend, redo=redo), where))
        return 0
    summary = job.run(
        manifest,
        out,
        config=settings,
        cluster=where,
        spread=spread,
        pilot=pilot,
        extend=extend,
        redo=redo,
        report=not no_report,
        max_bugs=max_bugs,
        quiet=quiet,
    )
    click.echo(_tell_run(summary))
    if pilot is not None:
        click.echo(_tell_plan(job.plan(manifest, out, config=settings, spread=spread), where))
    return summary.exit_code


@click.command(epilog=example("batchproc status RUN --json"))
@run_folder
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(run: Path, as_json: bool) -> int:
    """How far a run has come, at work or finished."""
    from batchproc.io.progress import read_status
    from batchproc.io.run_folder import RunFolder

    found = read_status(RunFolder.existing(run))
    click.echo(json.dumps(asdict(found), indent=2) if as_json else _tell_status(found))
    return 0


@click.command(epilog=example("batchproc retry RUN --workers 1"))
@run_folder
@max_bugs_option
@report_option
@spread_option
@where_to_run
def retry(run: Path, max_bugs: int, no_report: bool, spread: str | None, where: Where, quiet: bool) -> int:
    """Try the images of a run again that failed.

    Images that were never tried are left to `batchproc run`. Exit code 0: the run is all done; 1: images still fail or
    are missing; 2: nothing was started; 3: a bug.
    """
    set_up(None, where)
    from batchproc import job

    summary = job.retry(
        run,
        cluster=where,
        spread=spread,
        report=not no_report,
        max_bugs=max_bugs,
        quiet=quiet,
    )
    click.echo(_tell_run(summary))
    return summary.exit_code


@click.command(epilog=example("batchproc report RUN", "batchproc report RUN --truth truth.parquet"))
@run_folder
@click.option("--truth", type=click.Path(path_type=Path), help="Known transients (CSV or Parquet), to be compared.")
def report(run: Path, truth: Path | None) -> int:
    """Write report.html of a run."""
    from batchproc.report import write_report

    click.echo(write_report(run, truth))
    return 0


@click.command(epilog=example("batchproc classify RUN --model realbogus"))
@run_folder
@click.option("--model", required=True, help="A bundled or added model (`batchproc models list`), or a folder.")
@where_to_run
def classify(run: Path, model: str, where: Where, quiet: bool) -> int:
    """Score the candidates of a run with another model; nothing that is finished is rewritten."""
    set_up(None, where)
    from batchproc import job

    n = job.classify(run, model, cluster=where, quiet=quiet)
    click.echo(f"{n} candidates scored" if n else "nothing to score: this model has scored all candidates")
    return 0


def _tell_run(summary: RunSummary) -> str:
    lines = [_tell_status(summary.status), f"in {duration(summary.seconds)}"]
    if summary.stopped:
        lines.append("stopped: too many bugs; their tracebacks are in failures.parquet")
    if summary.left:
        run = summary.status.run
        lines.append(
            f"{summary.left} images were not tried: `batchproc run {run}/manifest.parquet --out {run}` does them"
        )
    if summary.problem:
        lines.append(summary.problem.rstrip())
    if summary.report is not None:
        lines.append(f"report: {summary.report}")
    return "\n".join(lines)


def _tell_status(status: Status) -> str:
    line = f"{status.done} of {status.total} images done"
    for n, what in ((status.failed, "failed"), (status.bugs, "stopped by a bug"), (status.missing, "missing")):
        line += f", {n} {what}" if n else ""
    lines = [line, f"{status.n_candidates} candidates" + "".join(f", scored by {name}" for name in status.scores)]
    lines += [f"  {n} × {kind}" for kind, n in status.errors.items()]
    if status.errors:
        lines.append(f"see {status.run}/failures.parquet; `batchproc retry {status.run}` tries them again")
    return "\n".join(lines)


def _tell_plan(plan: Plan, where: Where) -> str:
    from batchproc.distribute.clusters import expected_workers

    workers = expected_workers(where, plan.threads)
    lines = [
        f"{plan.images} images: {plan.done} done, {plan.failed} failed before, {plan.missing} to do",
        f"to read: {size(plan.bytes_in)}; to write: about {size(plan.bytes_out)} in {plan.files_out} files",
    ]
    if plan.missing_files:
        lines.append(f"{plan.missing_files} files are not there: see `batchproc manifest check`")
    if plan.missing and plan.spread(workers) == "tiles":
        lines.append(
            f"the tiles of each image ({plan.pixels / 1e6:.0f} Mpix) are spread over {workers} workers, "
            f"with {size(plan.tile_bytes(workers))} of them under way"
        )
    elif plan.missing:
        lines.append(f"one image a task, {min(workers, plan.missing)} at a time")
    if plan.measured:
        lines.append(
            f"measured on {plan.measured} images: {duration(plan.seconds_per_image)} and up to "
            f"{size(plan.peak_memory_mb * 2**20)} of memory each; {duration(plan.seconds(workers))} for what is left "
            f"on {workers} workers"
        )
    else:
        lines.append("time is not known before some images are done: `--pilot N` measures N of them")
    return "\n".join(lines)
