"""``batchproc train``: a classifier of one's own, from runs, alert packets, stored sets and injections."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchproc.cli.common import INTERRUPTED, complain, example
from batchproc.errors import UsageError

if TYPE_CHECKING:
    from batchproc.training.gather import Sources
    from batchproc.training.settings import TrainSettings
    from batchproc.training.sources import Reading

_PATH = click.Path(path_type=Path)
#: Options that are settings, where they are given: they go before those of --settings.
_SETTINGS = {
    **{name: name for name in ("base", "kind", "network", "name", "group", "epochs", "seed", "threads", "freeze")},
    **{"cell": "cell_arcmin", "features": "features", "holdout": "holdout"},
}


# --- Options of every verb that trains -------------------------------------------------------------------------------

labels_option = click.option(
    "--labels",
    type=_PATH,
    help="Table (CSV, Parquet): candidate_id, candid or objectId, and label (a class) or real (0, 1).",
)
rule_option = click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="'CLASS: CONDITION'",
    help="Label by columns, such as 'real: drb > 0.9'; may be repeated.",
)
most_option = click.option(
    "--most", type=click.IntRange(0), default=0, metavar="N", help="Of each class and source at most N.  [default: all]"
)
kind_option = click.option(
    "--kind", type=click.Choice(["network", "forest"]), help="What is fitted.  [default: network]"
)
group_option = click.option(
    "--group", metavar="COLUMN", help="What is never divided: sky, none, or a column.  [default: sky]"
)
cell_option = click.option("--cell", type=float, metavar="ARCMIN", help="Cells of the sky for that.  [default: 1]")
seed_option = click.option("--seed", type=click.IntRange(0), help="Of everything random.  [default: 0]")
threads_option = click.option("--threads", type=click.IntRange(1), help="Of the computation.  [default: 1]")


@click.command(
    "train",
    epilog=example(
        "batchproc train RUN --truth truth.parquet --out trained",
        "batchproc train RUN --labels vetted.csv --from realbogus --name mine --out trained",
        "batchproc train --inject night.csv --inject other.csv --holdout survey=GOTO --out trained --dry-run",
        "batchproc train alerts/ --rule 'real: drb > 0.9' --rule 'bogus: drb < 0.5' --out trained",
    ),
)
@click.argument("sources", nargs=-1, type=_PATH, metavar="[SOURCE]...")
@click.option("--out", required=True, type=_PATH, help="Folder of the results: made if missing.")
@labels_option
@click.option("--truth", type=_PATH, help="Known transients, of runs and of --inject.  [default: RUN/truth.parquet]")
@rule_option
@click.option(
    "--inject", "manifests", multiple=True, type=_PATH, metavar="MANIFEST", help="Plant transients in its images."
)
@click.option("--config", type=_PATH, help="Pipeline settings for --inject.  [default: a search from 3.75 sigma]")
@click.option("--cache", type=_PATH, help="Where injections are kept.  [default: injected, beside OUT]")
@most_option
@click.option("--from", "base", metavar="MODEL", help="Continue from this model; few labels will do.")
@click.option("--freeze", is_flag=True, default=None, help="Of that model, fit the last layer only.")
@kind_option
@click.option("--network", metavar="NAME", help="Which network: realbogus, two-scales, vgg6.  [default: realbogus]")
@click.option("--feature", "features", multiple=True, metavar="COLUMN", help="Taken besides the stamp; repeatable.")
@click.option("--name", help="Of the model, on its card.  [default: trained]")
@click.option(
    "--holdout",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Measure on all of these, and only on these, such as survey=GOTO; may be repeated.",
)
@group_option
@cell_option
@click.option("--epochs", type=click.IntRange(1), metavar="N", help="Passes over the examples.  [default: 40]")
@seed_option
@threads_option
@click.option("--settings", type=_PATH, help="All settings, as a former OUT/config.toml has them.")
@click.option("--overwrite", is_flag=True, help="Train anew where OUT has a model already.")
@click.option("--dry-run", is_flag=True, help="Count the examples, show the parts, and train nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def train(
    sources: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    settings: Path | None,
    **given: Any,
) -> int:
    """Train a classifier on labelled candidates, and measure it on what it has not seen.

    A SOURCE is a run, alert packets (.avro, a folder or tarball of them), or a stored set of examples (.npz). Nothing
    at one place of the sky is both learnt from and measured on. OUT/model is then added with `batchproc models add`.
    Networks need the extra 'train', forests 'forest'.
    """
    chosen = settings_of(settings, given)
    os.environ.setdefault("OMP_NUM_THREADS", str(chosen.threads))
    from batchproc.training.gather import describe, gather, stamp_size
    from batchproc.training.train import check_room, train_model

    check_room(out, overwrite or dry_run)
    size = stamp_size(chosen)
    there, reading = what_to_read(sources, out, size, chosen.seed, quiet, given)
    if dry_run:
        click.echo(describe(there, reading, chosen, size))
        return 0
    examples = gather(there, reading)
    for note in reading.notes:
        complain(f"note: {note}")
    try:
        found = train_model(examples, out, chosen, overwrite=overwrite, quiet=quiet)
    except KeyboardInterrupt:
        complain("interrupted before the first epoch was over: no model was written")
        return INTERRUPTED
    click.echo(found.text())
    if found.interrupted:
        complain("interrupted: the model is of the best epoch until then; --overwrite trains anew")
    return INTERRUPTED if found.interrupted else 0


def settings_of(path: Path | None, given: dict[str, Any]) -> TrainSettings:
    """Settings of a file, or the defaults, with those given as options in their place."""
    from batchproc.training.settings import TrainSettings

    settings = TrainSettings() if path is None else TrainSettings.from_toml(path)
    return replace(settings, **{key: given[o] for o, key in _SETTINGS.items() if given.get(o) not in (None, ())})


def what_to_read(
    sources: tuple[Path, ...], out: Path, size: int, seed: int, quiet: bool, given: dict[str, Any]
) -> tuple[Sources, Reading]:
    """Where the examples come from and how they are labelled, of the options that were given."""
    from batchproc.config import Config
    from batchproc.label_tables import read_labels
    from batchproc.training.gather import Sources, known_places
    from batchproc.training.injections import Injections
    from batchproc.training.labels import parse_rules
    from batchproc.training.sources import Reading

    if given["truth"] is not None and (given["labels"] is not None or given["rules"]):
        raise UsageError("--truth, and --labels or --rule: labels come from one of them")
    how = Injections(cache=given.get("cache") or out.parent / "injected")
    if given.get("config") is not None:
        how = replace(how, config=Config.from_toml(given["config"]))
    cutouts = replace(how.config.cutouts, size=max(how.config.cutouts.size, size))
    how = replace(how, config=replace(how.config, cutouts=cutouts), seed=seed)
    how = replace(how, known=known_places(sources, given["truth"]))
    reading = Reading(
        size=size,
        labels=None if given["labels"] is None else read_labels(given["labels"]),
        rules=parse_rules(given["rules"]),
        truth=given["truth"],
        most=given["most"],
        seed=seed,
        quiet=quiet,
    )
    return Sources(sources, given.get("manifests", ()), how), reading
