"""The command line. A verb parses, calls one function, prints.

Exit codes: 0 all done; 1 finished, some images failed (they are listed) or are missing; 2 usage or bad configuration;
3 a bug or a fault. Results go to standard output, progress and errors to standard error. Everything heavy is imported
inside the verbs, so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import batchproc
from batchproc.config import Config
from batchproc.display import duration, size
from batchproc.errors import BatchprocError, ManifestError

if TYPE_CHECKING:
    from batchproc.distribute.plan import Plan
    from batchproc.io.progress import Status
    from batchproc.job import RunSummary

__all__ = ["cli", "main"]

_INTERRUPTED = 130  # as a shell says it: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code; foreseen errors are a line on standard error, not a traceback."""
    try:
        code = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False) or 0
    except click.Abort:
        _complain("interrupted; the same command again goes on from here")
        code = _INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = 2
    except BatchprocError as error:
        _complain(str(error))
        code = 2
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            _complain(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
        code = 3
    except Exception:
        traceback.print_exc()
        _complain("this is a bug in batchproc; please report it with the lines above")
        code = 3
    sys.exit(code)


def _complain(message: str) -> None:
    click.echo(f"batchproc: {message}", err=True)


def _example(*lines: str) -> str:
    """An epilog that click leaves as it is."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


class _InOrder(click.Group):
    """Verbs in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _ManyReferences(click.Command):
    """``--reference A B C``, as a shell's pattern gives it, means all three, up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spelt_out: list[str] = []
        greedy = False
        for word in args:
            if word.startswith("-"):
                greedy = word == "--reference"
            elif greedy and spelt_out[-1] != "--reference":
                spelt_out.append("--reference")
            spelt_out.append(word)
        return super().parse_args(ctx, spelt_out)


_manifest = click.argument("manifest", type=click.Path(path_type=Path))
_run_folder = click.argument("run", type=click.Path(path_type=Path))
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: made, or continued.")


def _where_to_run(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every verb that computes."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
        click.option("--workers", type=click.IntRange(1), help="Processes of a local cluster.  [default: one a core]"),
        click.option(
            "--cluster",
            default="local",
            show_default=True,
            metavar="local|serial|tcp://HOST:PORT",
            help="Where to run; the results are the same.",
        ),
    ):
        verb = option(verb)
    return verb


_spread = click.option(
    "--spread",
    type=click.Choice(["auto", "images", "tiles"]),
    help="What the workers share out: images, or the tiles of each.  [default: as configured, auto]",
)
_report = click.option("--no-report", is_flag=True, help="Do not write report.html.")
_max_bugs = click.option(
    "--max-bugs",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Stop after more than so many images failed by a bug.",
)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_example(
        "batchproc demo",
        "batchproc manifest build night/*.fits --reference refs/*.fits -o night.csv",
        "batchproc run night.csv --out RUN",
    ),
)
@click.version_option(batchproc.__version__, prog_name="batchproc")
def cli() -> None:
    """Find what changed in the sky: image subtraction, detection and classification of whole surveys."""


@cli.command(epilog=_example("batchproc demo --out demo"))
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder of the demo.")
@_where_to_run
def demo(out: Path, cluster: str, workers: int | None, quiet: bool) -> int:
    """Simulate a small night with known transients, find them, and say how many were found."""
    _set_up(Config(), cluster)
    from batchproc.demo import run_demo

    result = run_demo(out, cluster=cluster, workers=workers, quiet=quiet)
    click.echo(_tell_run(result.summary))
    click.echo(result.text())
    return result.summary.exit_code


@cli.group(cls=_InOrder, epilog=_example("batchproc manifest check night.csv"))
def manifest() -> None:
    """Tables of images and their references."""


@manifest.command(
    "build",
    cls=_ManyReferences,
    epilog=_example("batchproc manifest build night/*.fits --reference refs/*.fits -o night.parquet"),
)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reference", "references", multiple=True, required=True, type=click.Path(), help="One or several files."
)
@click.option("--instrument", help="Name of an instrument profile.  [default: recognised from each header]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="CSV, ECSV or Parquet file.")
def manifest_build(images: tuple[Path, ...], references: tuple[str, ...], instrument: str | None, output: Path) -> int:
    """Give each image the references that cover it, and write the manifest."""
    from batchproc.io.manifest import build_manifest, write_manifest

    table = build_manifest(images, references, instrument=instrument)
    write_manifest(table, output)
    for note in table.attrs["notes"]:
        click.echo(note, err=True)
    click.echo(f"{output}: {len(table)} images")
    return 0


@manifest.command("check", epilog=_example("batchproc manifest check night.csv"))
@_manifest
@click.option("--no-headers", is_flag=True, help="Look at the table and the presence of files only.")
def manifest_check(manifest: Path, no_headers: bool) -> int:
    """Say what will go wrong with a manifest, before anything is computed.

    Exit code 0: nothing; 1: some images will fail; 2: the table cannot be used.
    """
    from batchproc.io.manifest import check_manifest, read_manifest

    problems = check_manifest(manifest, read_headers=not no_headers)
    for problem in problems:
        click.echo(f"{problem.level}: {problem}")
    try:
        click.echo(f"{len(read_manifest(manifest))} images")
    except ManifestError:
        return 2
    return int(any(problem.level == "error" for problem in problems))


@cli.command(
    epilog=_example(
        "batchproc run night.csv --out RUN --dry-run",
        "batchproc run night.csv --out RUN --config settings.toml --workers 4",
    )
)
@_manifest
@_out
@click.option("--config", type=click.Path(path_type=Path), help="Settings; keys left out have their defaults.")
@click.option("--dry-run", is_flag=True, help="Say what there is to do and compute nothing.")
@click.option("--pilot", type=click.IntRange(1), metavar="N", help="Do N images, and say what the rest will take.")
@_max_bugs
@_report
@_spread
@_where_to_run
def run(
    manifest: Path,
    out: Path,
    config: Path | None,
    dry_run: bool,
    pilot: int | None,
    max_bugs: int,
    no_report: bool,
    spread: str | None,
    cluster: str,
    workers: int | None,
    quiet: bool,
) -> int:
    """Process the images of a manifest; again on the same folder, what is missing of them.

    Images that failed before are left to `batchproc retry`. Exit code 0: all done, or with --pilot what was asked for;
    1: some images failed; 2: nothing was started; 3: a bug.
    """
    settings = None if config is None else Config.from_toml(config)  # read once: it may be a pipe
    _set_up(settings, cluster)
    from batchproc import job

    if dry_run:
        click.echo(_tell_plan(job.plan(manifest, out, config=settings, spread=spread), cluster, workers))
        return 0
    summary = job.run(
        manifest,
        out,
        config=settings,
        cluster=cluster,
        workers=workers,
        spread=spread,
        pilot=pilot,
        report=not no_report,
        max_bugs=max_bugs,
        quiet=quiet,
    )
    click.echo(_tell_run(summary))
    if pilot is not None:
        click.echo(_tell_plan(job.plan(manifest, out, config=settings, spread=spread), cluster, workers))
    return summary.exit_code


@cli.command(epilog=_example("batchproc status RUN --json"))
@_run_folder
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(run: Path, as_json: bool) -> int:
    """How far a run has come, at work or finished."""
    from batchproc.io.progress import read_status
    from batchproc.io.run_folder import RunFolder

    found = read_status(RunFolder.existing(run))
    click.echo(json.dumps(asdict(found), indent=2) if as_json else _tell_status(found))
    return 0


@cli.command(epilog=_example("batchproc retry RUN --workers 1"))
@_run_folder
@_max_bugs
@_report
@_spread
@_where_to_run
def retry(
    run: Path, max_bugs: int, no_report: bool, spread: str | None, cluster: str, workers: int | None, quiet: bool
) -> int:
    """Try the images of a run again that failed.

    Images that were never tried are left to `batchproc run`. Exit code 0: the run is all done; 1: images still fail or
    are missing; 2: nothing was started; 3: a bug.
    """
    _set_up(None, cluster)
    from batchproc import job

    summary = job.retry(
        run,
        cluster=cluster,
        workers=workers,
        spread=spread,
        report=not no_report,
        max_bugs=max_bugs,
        quiet=quiet,
    )
    click.echo(_tell_run(summary))
    return summary.exit_code


@cli.command(epilog=_example("batchproc report RUN", "batchproc report RUN --truth truth.parquet"))
@_run_folder
@click.option("--truth", type=click.Path(path_type=Path), help="Known transients (CSV or Parquet), to be compared.")
def report(run: Path, truth: Path | None) -> int:
    """Write report.html of a run."""
    from batchproc.report import write_report

    click.echo(write_report(run, truth))
    return 0


@cli.command(epilog=_example("batchproc classify RUN --model realbogus"))
@_run_folder
@click.option("--model", required=True, help="A bundled or added model (`batchproc models list`), or a folder.")
@_where_to_run
def classify(run: Path, model: str, cluster: str, workers: int | None, quiet: bool) -> int:
    """Score the candidates of a run with another model; nothing that is finished is rewritten."""
    _set_up(None, cluster)
    from batchproc import job

    n = job.classify(run, model, cluster=cluster, workers=workers, quiet=quiet)
    click.echo(f"{n} candidates scored" if n else "nothing to score: this model has scored all candidates")
    return 0


@cli.group(cls=_InOrder, epilog=_example("batchproc models list"))
def models() -> None:
    """Models that score candidates."""


@models.command("list", epilog=_example("batchproc models list"))
def models_list() -> int:
    """The bundled models, and those that were added."""
    from batchproc.io.models import list_models, read_card

    for name, folder in list_models().items():
        card = read_card(folder)
        click.echo(f"{name}  {card.version}  ({', '.join(card.files)})  {card.description}")
    return 0


@models.command("show", epilog=_example("batchproc models show realbogus"))
@click.argument("model")
def models_show(model: str) -> int:
    """The card of a model: what it wants to see, what it was trained on, how good it is."""
    from batchproc.io.models import show_model

    click.echo(show_model(model))
    return 0


@models.command("add", epilog=_example("batchproc models add my_model/ --name mine"))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="What it shall be called.  [default: the name on its card]")
def models_add(path: Path, name: str | None) -> int:
    """Check a model (a folder with card.toml and ONNX files) and copy it to where runs find it by name."""
    from batchproc.io.models import add_model

    click.echo(add_model(path, name))
    return 0


@models.command("quantise", epilog=_example("batchproc models quantise mine --stamps RUN"))
@click.argument("model")
@click.option(
    "--stamps", "run", required=True, type=click.Path(path_type=Path), help="A run whose stamps it is fitted to."
)
@click.option("--most", type=click.IntRange(1), default=2000, show_default=True, help="Use at most so many stamps.")
def models_quantise(model: str, run: Path, most: int) -> int:
    """Add an int8 version to a model, and say how far it agrees with the exact one."""
    from batchproc.distribute.plan import evenly
    from batchproc.io.quantise import quantise_model
    from batchproc.io.stamps import open_stamps

    stamps = open_stamps(run)
    found = quantise_model(model, stamps[evenly(range(len(stamps)), most)])
    click.echo(
        f"int8 against float on {found.n_stamps} stamps: largest difference {found.largest_difference:.3f}, "
        f"mean {found.mean_difference:.4f}; {found.lost} lost and {found.gained} gained at the threshold"
    )
    return 0


@models.command("check", epilog=_example("batchproc models check realbogus"))
@click.argument("model")
def models_check(model: str) -> int:
    """Verify that a model's files are those on its card and that each version of it runs."""
    from batchproc.io.models import check_model

    for line in check_model(model):
        click.echo(line)
    return 0


@cli.group(cls=_InOrder, epilog=_example("batchproc evaluate completeness --images 10 --out evaluation"))
def evaluate() -> None:
    """How good the results are, held against what theory promises."""


def _range(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in value.split(":"))
    except ValueError:
        raise click.BadParameter(f"{value!r}: two numbers as in 3:15") from None
    return low, high


def _levels(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: numbers as in 25,400,10000") from None


def _refuse_with_manifest(*names: str) -> None:
    """Options of simulated pairs that were given together with real images would do nothing."""
    context = click.get_current_context()
    given = [p.opts[0] for p in context.command.params if p.name in names and _was_given(context, p.name)]
    if given:
        raise click.UsageError(f"{', '.join(given)}: of simulated pairs, and --manifest has real ones")


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


@evaluate.command(
    "completeness",
    epilog=_example(
        "batchproc evaluate completeness --images 50 --out evaluation",
        "batchproc evaluate completeness --psf measured --resampled --sky 100,2000 --out evaluation --dry-run",
        "batchproc evaluate completeness --manifest night.csv --images 10 --out evaluation",
    ),
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the results: made if missing.")
@click.option(
    "--manifest", type=click.Path(path_type=Path), help="Inject into its real images.  [default: simulated pairs]"
)
@click.option("--config", type=click.Path(path_type=Path), help="Settings; keys left out have their defaults.")
@click.option("--images", type=click.IntRange(1), default=50, show_default=True, help="Pairs to simulate or to take.")
@click.option("--size", type=click.IntRange(256), default=1024, show_default=True, help="Side of simulated ones.")
@click.option(
    "--snr", default="3:15", show_default=True, callback=_range, metavar="LOW:HIGH", help="S/N of what is injected."
)
@click.option("--per-image", type=click.IntRange(1), default=30, show_default=True, help="Sources put into each pair.")
@click.option("--seeing", default="2:5", show_default=True, callback=_range, metavar="LOW:HIGH", help="FWHM in pixels.")
@click.option("--threshold", type=float, help="Found is what exceeds it, in sigma.  [default: that of the settings]")
@click.option(
    "--sky",
    "skies",
    default="25,100,400,2000,10000",
    show_default=True,
    callback=_levels,
    metavar="LEVELS",
    help="Sky levels, electrons a pixel.",
)
@click.option(
    "--psf",
    type=click.Choice(["known", "measured"]),
    default="known",
    show_default=True,
    help="Whether the PSFs are given, or measured from the stars.",
)
@click.option("--resampled", is_flag=True, help="References on a grid of their own, turned and shifted.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")
@click.option("--check", is_flag=True, help="Exit with code 1 when a promise is missed or an image failed.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--dry-run", is_flag=True, help="Say what there is to do and compute nothing.")
@_where_to_run
def evaluate_completeness(
    out: Path,
    manifest: Path | None,
    config: Path | None,
    check: bool,
    as_json: bool,
    dry_run: bool,
    cluster: str,
    workers: int | None,
    quiet: bool,
    threshold: float | None,
    **options: Any,
) -> int:
    """Inject sources, and compare what is found, what is falsely found and what is measured with theory.

    Exit code 0, whatever the verdicts say; with --check, 1 when a promise is missed or an image failed.
    """
    if manifest is not None:
        _refuse_with_manifest("size", "seeing", "skies", "psf", "resampled")
    settings = Config() if config is None else Config.from_toml(config)
    _set_up(settings, cluster)
    from batchproc.completeness.campaign import Campaign
    from batchproc.completeness.evaluate import evaluate, plan
    from batchproc.io.manifest import read_manifest

    entries = None if manifest is None else read_manifest(manifest)
    threshold = settings.detect.threshold if threshold is None else threshold
    campaign = Campaign(config=settings, threshold=threshold, **options)
    if dry_run:
        click.echo(plan(campaign, entries).text(1 if cluster == "serial" else workers))
        return 0
    try:
        found = evaluate(campaign, out, entries=entries, cluster=cluster, workers=workers, quiet=quiet)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written: the same command begins anew")
        return _INTERRUPTED
    click.echo(json.dumps(found.summary.to_dict(), indent=2) if as_json else found.text())
    return int(check and not (found.summary.ok and not found.failures))


def _set_up(config: Config | None, cluster: str) -> None:
    """Hold NumPy's and other libraries' threads to the configured number; before they are imported.

    A serial run works in this process, which is ours: then it keeps its memory as a worker does.
    """
    from batchproc.distribute.memory import keep_freed_memory
    from batchproc.distribute.threads import thread_environment

    os.environ.update(thread_environment((config or Config()).threads))
    if cluster == "serial":
        keep_freed_memory()


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


def _tell_plan(plan: Plan, cluster: str, workers: int | None) -> str:
    from batchproc.distribute.clusters import local_workers

    workers = 1 if cluster == "serial" else local_workers(workers, plan.threads)
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


if __name__ == "__main__":
    main()
