"""The verb that makes what a finished run is handed on as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchproc.cli.common import example, run_folder, set_up, where_to_run
from batchproc.display import duration, size

if TYPE_CHECKING:
    from batchproc.distribute.clusters import Where
    from batchproc.finish import Product


@click.command(
    epilog=example("batchproc finish RUN --dry-run", "batchproc finish RUN", "batchproc finish RUN --only focal-planes")
)
@run_folder
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["hats", "stamps", "focal-planes"]),
    help="This product alone; may be given again for another.  [default: all]",
)
@click.option("--dry-run", is_flag=True, help="Say what there is to do and make nothing.")
@where_to_run
def finish(run: Path, only: tuple[str, ...], dry_run: bool, where: Where, quiet: bool) -> int:
    """Make what a run is handed on as: a catalogue cut by the sky, dense stamps, a summary of the focal planes.

    RUN/hats is for LSDB, has the scores, and needs the extra 'hats'; RUN/stamps.zarr has all stamps in the order of
    stamp_index; RUN/focal_planes.parquet has a row for each CCD of each exposure. The workers do the work. Killed at
    any moment, the same command goes on. A product that is there and what the run holds now is left alone; after new
    images or scores it is made anew, all of it.
    """
    set_up(None, where)
    from batchproc.finish import PRODUCTS, plan
    from batchproc.finish import finish as make

    wanted = only or PRODUCTS
    if dry_run:
        for product in plan(run, only=wanted):
            click.echo(_tell_plan(product))
        return 0
    for product in make(run, only=wanted, where=where, quiet=quiet):
        click.echo(_tell(product))
    return 0


def _tell(product: Product) -> str:
    if product.state == "empty":
        return f"{product.path}: not made, {product.note}"
    done = "is current" if product.state == "current" else f"made in {duration(product.seconds)}"
    note = f"; {product.note}" if product.note else ""
    return f"{product.path} {done}: {product.rows} rows, {size(product.bytes)} in {product.files} files{note}"


def _tell_plan(product: Product) -> str:
    if product.state == "empty":
        return f"{product.path}: nothing to make it from, {product.note}"
    if product.state == "current":
        return f"{product.path}: current"
    about = f", about {size(product.bytes)} in {product.files} files"
    return f"{product.path}: to be made from {product.rows} rows{about}"
