"""``batchproc demo|run|status|retry|report|classify``: a run, from its beginning to its report; alerts beside it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchproc.cli.common import (
    complain,
    device_option,
    example,
    manifest_argument,
    max_bugs_option,
    models_option,
    out_option,
    report_option,
    run_folder,
    set_up,
    spread_option,
    where_to_run,
)
from batchproc.cli.texts import tell_plan, tell_run, tell_status, tell_submitted, tell_unscored
from batchproc.config import Config

if TYPE_CHECKING:
    from batchproc.distribute.clusters import Where


#: Seconds from look to look of ``status --watch``.
WATCH_S = 10.0


@click.command(epilog=example("batchproc demo --out demo"))
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder of the demo.")
@where_to_run
def demo(out: Path, where: Where, quiet: bool) -> int:
    """Simulate a small night with known transients, find them, and say how many were found."""
    set_up(Config(), where)
    from batchproc.demo import run_demo

    result = run_demo(out, cluster=where, quiet=quiet)
    click.echo(tell_run(result.summary))
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
        planned = job.plan(manifest, out, config=settings, spread=spread, extend=extend, redo=redo)
        click.echo(tell_plan(planned, where))
        planned.fit(where).check()
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
    click.echo(tell_run(summary))
    if pilot is not None:
        click.echo(tell_plan(job.plan(manifest, out, config=settings, spread=spread), where))
    return summary.exit_code


@click.command(epilog=example("batchproc status RUN", "batchproc status RUN --watch", "batchproc status RUN --json"))
@run_folder
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--watch", is_flag=True, help="Again every ten seconds, until nobody is at work.")
def status(run: Path, as_json: bool, watch: bool) -> int:
    """How far a run has come, at work or finished.

    Reads the run folder alone, and writes nothing: it works on any machine that sees the folder.
    """
    from batchproc.io.run_folder import RunFolder
    from batchproc.io.status import read_status, read_submitted

    folder = RunFolder(run)
    while not folder.record.is_file() and (submitted := read_submitted(folder)):
        click.echo(json.dumps({"submitted": asdict(submitted)}) if as_json else tell_submitted(str(run), submitted))
        if not watch:
            return 0
        time.sleep(WATCH_S)
    folder = RunFolder.existing(run)
    while True:
        start = time.monotonic()
        found = read_status(folder)
        text = json.dumps(asdict(found), indent=None if watch else 2) if as_json else tell_status(found)
        if watch and not as_json and sys.stdout.isatty():
            click.clear()
        click.echo(text)
        if not watch or found.driver is None or not found.driver.running:
            return 0
        time.sleep(max(WATCH_S, 5 * (time.monotonic() - start)))  # a large run takes seconds to read


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
    click.echo(tell_run(summary))
    return summary.exit_code


@click.command(epilog=example("batchproc report RUN", "batchproc report RUN --truth truth.parquet"))
@run_folder
@click.option("--truth", type=click.Path(path_type=Path), help="Known transients (CSV or Parquet), to be compared.")
def report(run: Path, truth: Path | None) -> int:
    """Write report.html of a run."""
    from batchproc.report import write_report

    click.echo(write_report(run, truth))
    return 0


@click.command(
    epilog=example(
        "batchproc classify RUN --model realbogus",
        "batchproc classify RUN --model realbogus --model braai-d6_m7 --workers 4",
    )
)
@run_folder
@models_option
@device_option("What runs the models; if it cannot be had, that is an error.  [default: that of the run]", default=None)
@click.option("--dry-run", is_flag=True, help="Say what there is to score and score nothing.")
@where_to_run
def classify(run: Path, models: tuple[str, ...], device: str | None, dry_run: bool, where: Where, quiet: bool) -> int:
    """Score the candidates of a run with one or several models, in one pass over their stamps.

    Nothing that is finished is rewritten: what only some of the models lack is scored by those, and the same command
    again goes on where it was interrupted. The scores are columns score_MODEL of the catalogue (score_MODEL_CLASS of a
    model of several classes).

    Exit code 0: all scored; 1: a model failed, the others have scored; 2: nothing was started; 3: a fault.
    """
    set_up(None, where)
    from batchproc import job

    if dry_run:
        click.echo(tell_unscored(job.unscored(run, models, device=device)))
        return 0
    done = job.classify(run, models, device=device, cluster=where, quiet=quiet)
    n, all_of_them = done.candidates, "these models have" if len(models) > 1 else "this model has"
    if n or not done.problems:
        click.echo(f"{n} candidates scored" if n else f"nothing to score: {all_of_them} scored all candidates")
    for problem in done.problems:
        complain(problem)
    return done.exit_code


@click.command(
    "classify-alerts",
    epilog=example("batchproc classify-alerts night.tar.gz --model realbogus --model braai-d6_m7 --out scores.parquet"),
)
@click.argument("alerts", type=click.Path(path_type=Path))
@models_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The table: a .parquet file.")
@device_option("What runs the models; if it cannot be had, that is an error.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that a model may use.")
@where_to_run
def classify_alerts(
    alerts: Path, models: tuple[str, ...], out: Path, device: str, threads: int, where: Where, quiet: bool
) -> int:
    """Score alert packets of ZTF or Rubin with one or several models, in one pass, into one table.

    ALERTS is an .avro file, a .tar, .tar.gz or .tgz of such files, or a folder with any of these in it (needs the extra
    'alerts'). The table has a row for each alert: candid, object, measurements, a column score_MODEL for each model
    (NaN: not scored), and what is wrong with a packet. It has its name once it is complete; until then its parts lie
    beside it, and the same command again goes on from them.

    Exit code 0: all scored; 1: some could not be; 2: nothing was started; 3: a fault.
    """
    set_up(None, where)
    from batchproc.packets import score_packets

    scored = score_packets(alerts, models, out, device=device, threads=threads, cluster=where, quiet=quiet)
    click.echo(f"{scored.text()}\n{out}")
    return scored.exit_code
