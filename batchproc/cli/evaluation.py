"""``batchproc evaluate``: how good the results are, held against what theory promises and against known truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchproc.cli.common import INTERRUPTED, InOrder, complain, example, set_up, where_to_run
from batchproc.cli.retrospective import retrospective
from batchproc.config import Config

if TYPE_CHECKING:
    from batchproc.distribute.clusters import Where


@click.group(
    cls=InOrder,
    epilog=example(
        "batchproc evaluate completeness --images 10 --out evaluation",
        "batchproc evaluate classifier RUN --truth truth.parquet --out evaluation",
    ),
)
def evaluate() -> None:
    """How good the results are, held against what theory promises and against known truth."""


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
    epilog=example(
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
@where_to_run
def evaluate_completeness(
    out: Path,
    manifest: Path | None,
    config: Path | None,
    check: bool,
    as_json: bool,
    dry_run: bool,
    where: Where,
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
    set_up(settings, where)
    from batchproc.completeness.campaign import Campaign
    from batchproc.completeness.evaluate import evaluate, plan
    from batchproc.distribute.clusters import expected_workers
    from batchproc.io.manifest import read_manifest

    entries = None if manifest is None else read_manifest(manifest)
    threshold = settings.detect.threshold if threshold is None else threshold
    campaign = Campaign(config=settings, threshold=threshold, **options)
    if dry_run:
        click.echo(plan(campaign, entries).text(expected_workers(where, campaign.config.threads)))
        return 0
    try:
        found = evaluate(campaign, out, entries=entries, cluster=where, quiet=quiet)
    except KeyboardInterrupt:
        complain("interrupted; nothing was written: the same command begins anew")
        return INTERRUPTED
    click.echo(json.dumps(found.summary.to_dict(), indent=2) if as_json else found.text())
    return int(check and not (found.summary.ok and not found.failures))


@evaluate.command(
    "classifier",
    epilog=example(
        "batchproc evaluate classifier RUN --truth truth.parquet --out evaluation",
        "batchproc evaluate classifier scores.csv --by ccd --by seeing --completeness 0.99 --out evaluation",
    ),
)
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the results: made if missing.")
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    help="Of a run: its known transients (CSV or Parquet).  [default: RUN/truth.parquet]",
)
@click.option(
    "--score",
    "chosen",
    multiple=True,
    metavar="COLUMN",
    help="Evaluate this score (with several classes: this model); may be repeated.  [default: all of them]",
)
@click.option(
    "--group",
    metavar="COLUMN",
    help="Candidates that share their faults are drawn together; none: singly.  "
    "[default: group, region, image_id or image]",
)
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help="Break down by it; may be repeated; none: by nothing.  "
    "[default: ccd, filter, fwhm_new, fwhm, seeing, mag, mjd]",
)
@click.option(
    "--completeness",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Of the scored real ones, the fraction that the threshold keeps.",
)
@click.option(
    "--label",
    metavar="COLUMN",
    help="Classes, of candidates or of a run's known transients.  [default: label or class, where there is no real]",
)
@click.option("--no-cost", is_flag=True, help="Of a run: do not measure speed and memory of its models.")
@click.option("--bins", type=click.IntRange(2), default=4, show_default=True, help="Quantiles of a column of numbers.")
@click.option("--resamples", type=click.IntRange(2), default=1000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def evaluate_classifier(
    scores: Path,
    out: Path,
    truth: Path | None,
    chosen: tuple[str, ...],
    group: str | None,
    by: tuple[str, ...],
    completeness: float,
    label: str | None,
    no_cost: bool,
    bins: int,
    resamples: int,
    seed: int,
    as_json: bool,
) -> int:
    """How well scores tell real from bogus, for mixtures of 1:1, 1:100 and 1:10^4, with intervals; or classes apart.

    SCORES is a table (CSV or Parquet) with a column real (0 or 1), one or more columns score or score_NAME (empty: not
    scored) and, if you like, group, ccd, filter, seeing, mag, mjd; or a run folder with its known transients.

    With several classes: a column label or class in place of real, and a column score_CLASS or score_NAME_CLASS for
    each; of a run, --label names the column of the known transients. Speed and memory of the models of a run are
    measured on its stamps.

    Exit code 0, however good they are; 2 when the input cannot be evaluated.
    """
    from batchproc.judging.judge import evaluate_scores
    from batchproc.judging.measures import Plan

    columns = None if not by else () if by == ("none",) else by
    plan = Plan(completeness=completeness, resamples=resamples, parts=bins, seed=seed)
    found = evaluate_scores(
        scores, out, plan, truth=truth, label=label, scores=chosen, group=group, by=columns, with_cost=not no_cost
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())
    return 0


evaluate.add_command(retrospective)
