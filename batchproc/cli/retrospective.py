"""``batchproc evaluate retrospective``: where would it have ranked, had nobody known of it?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from batchproc.cli.common import INTERRUPTED, complain, example
from batchproc.cli.training import (
    cell_option,
    group_option,
    kind_option,
    labels_option,
    most_option,
    rule_option,
    seed_option,
    settings_of,
    threads_option,
    what_to_read,
)

_PATH = click.Path(path_type=Path)


@click.command(
    "retrospective",
    epilog=example(
        "batchproc evaluate retrospective RUN --truth truth.csv --leave-out kind --kind forest --out search",
        "batchproc evaluate retrospective alerts/ --labels types.csv --leave-out label=SN --out search",
        "batchproc evaluate retrospective alerts/ --labels vetted.csv --leave-out group=ZTF18abukavn --out search",
    ),
)
@click.argument("sources", nargs=-1, required=True, type=_PATH, metavar="SOURCE...")
@click.option("--out", required=True, type=_PATH, help="Folder of the results: made if missing.")
@click.option(
    "--leave-out",
    multiple=True,
    required=True,
    metavar="COLUMN[=VALUE]",
    help="Learn from none of these, such as label=SN, or group=ZTF18abukavn (an object of packets); of a COLUMN, each "
    "value in turn; may be repeated.",
)
@labels_option
@click.option("--truth", type=_PATH, help="Of a run: its known transients.  [default: RUN/truth.parquet]")
@rule_option
@most_option
@kind_option
@click.option("--feature", "features", multiple=True, metavar="COLUMN", help="As of `batchproc train`.")
@group_option
@cell_option
@click.option("--epochs", type=click.IntRange(1), metavar="N", help="Of each training.  [default: 40]")
@click.option(
    "--completeness",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Of the ordinary real ones, the fraction that the threshold keeps.",
)
@click.option("--resamples", type=click.IntRange(2), default=1000, show_default=True, help="Of the bootstrap.")
@seed_option
@threads_option
@click.option("--settings", type=_PATH, help="All settings of the training, as OUT/config.toml of `batchproc train`.")
@click.option("--no-control", is_flag=True, help="Do not train once more with nothing left out.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def retrospective(
    sources: tuple[Path, ...],
    out: Path,
    leave_out: tuple[str, ...],
    completeness: float,
    resamples: int,
    settings: Path | None,
    no_control: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> int:
    """Leave a known event, or a whole kind, out of training, and say where it would have ranked.

    A SOURCE is a run, alert packets or a stored set of examples, as of `batchproc train`, and is divided into parts as
    there. A classifier is trained on what is left, and scores the test part and all that was left out, with what else
    lies at the same places. Another one, trained with nothing left out, says what it would be had others of its kind
    been known. Needs the extra 'train' for networks, 'forest' for forests.
    """
    chosen = settings_of(settings, given)
    os.environ.setdefault("OMP_NUM_THREADS", str(chosen.threads))
    from batchproc.judging.measures import Plan
    from batchproc.judging.searches import write_searches
    from batchproc.training.gather import gather, stamp_size
    from batchproc.training.retrospective import retrospective

    there, reading = what_to_read(sources, out, stamp_size(chosen), chosen.seed, quiet, given)
    examples = gather(there, reading)
    plan = Plan(completeness=completeness, resamples=resamples, seed=chosen.seed)
    found = []
    try:
        for search in retrospective(examples, out, chosen, leave_out, plan, control=not no_control, quiet=quiet):
            found.append(search)
    except KeyboardInterrupt:
        complain(f"interrupted after {len(found)} searches")
        if not found:
            return INTERRUPTED
    result = write_searches(found, out, plan, reading.notes)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.text())
    return 0
