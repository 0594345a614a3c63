"""One call that makes what a finished run is handed on as: a sky-partitioned catalogue, dense stamps, focal planes.

Each product carries the digest of what it was made from. One that is there, whole, and of these inputs is left as it
is; any other is made anew, from where a killed call stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from batchproc.distribute.clusters import Where, open_executor
from batchproc.distribute.signals import leaving_in_order
from batchproc.finish.focal import make_focal_planes, survey_focal_planes
from batchproc.finish.hats import make_hats, survey_hats
from batchproc.finish.sky import require_healpix
from batchproc.finish.stamps import make_stamps, survey_stamps
from batchproc.finish.work import Contents, Product, Workshop
from batchproc.io.run_folder import RunFolder

__all__ = ["PRODUCTS", "finish", "plan"]

_SURVEYS = {"hats": survey_hats, "stamps": survey_stamps, "focal-planes": survey_focal_planes}
_MAKERS = {"hats": make_hats, "stamps": make_stamps, "focal-planes": make_focal_planes}
#: Names of what can be made.
PRODUCTS = tuple(_MAKERS)


def finish(
    out: str | Path, *, only: Sequence[str] = PRODUCTS, where: Where | None = None, quiet: bool = False
) -> list[Product]:
    """Make the products of a run from what is done of it.

    Parameters
    ----------
    out : path
        A run folder that no other driver works on.
    only : sequence of {"hats", "stamps", "focal-planes"}
        By default all.
    where : Where, optional
        Where the tasks run; by default on this machine.
    quiet : bool
        Print nothing.

    Returns
    -------
    list of Product

    Raises
    ------
    UsageError
        No run folder, or one that another driver works on; no HEALPix arithmetic for ``hats``.
    DamagedRunError
        Results are missing or altered.
    """
    folder = RunFolder.existing(out)
    if "hats" in only:
        require_healpix()
    threads = folder.config().threads
    products = []
    with leaving_in_order(), folder.locked(), open_executor(where or Where(), threads) as executor:
        shop = Workshop(Contents.of(folder), executor, threads, quiet)
        for name in (name for name in PRODUCTS if name in only):
            start = time.monotonic()
            product = _MAKERS[name](shop)
            products.append(replace(product, seconds=time.monotonic() - start))
            shop.clear(name)
    return products


def plan(out: str | Path, *, only: Sequence[str] = PRODUCTS) -> list[Product]:
    """What `finish` would do, and about how large the products will be; makes and writes nothing."""
    contents = Contents.of(RunFolder.existing(out))
    return [_SURVEYS[name](contents) for name in PRODUCTS if name in only]
