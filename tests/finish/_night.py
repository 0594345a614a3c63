"""A run without images whose candidates have places on the sky: fields here and there, one at its pole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from batchproc.errors import AlignError
from batchproc.io.catalogue import write_scores
from batchproc.io.freeze import freeze
from batchproc.io.progress import ReceiptLog
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import store_image
from batchproc.records import ManifestEntry, Receipt
from tests import _runs

EXPOSURES, CCDS = 6, 4
_RA, _DEC = (0.0, 10.0, 150.0, 359.95, 200.0, 10.0), (0.0, -30.0, 60.0, 45.0, 89.97, -30.0)


def entries(exposures: int = EXPOSURES) -> list[ManifestEntry]:
    """`CCDS` images an exposure."""
    return [
        ManifestEntry(
            f"e{e}-c{c}", f"/n/e{e}.fits[{c}]", ("/n/ref.fits",), exposure_id=f"e{e}", ccd=str(c), mjd=60000.0 + e
        )
        for e in range(exposures)
        for c in range(CCDS)
    ]


def n_candidates(entry: ManifestEntry) -> int:
    """Some dozens; none at all on the last CCD."""
    return 0 if int(entry.ccd) == CCDS - 1 else 20 + 15 * int(entry.ccd)


def result(entry: ManifestEntry, n: int, size: int = _runs.SIZE) -> _runs.Result:
    """Candidates around the exposure's place; the first has none."""
    exposure = int(entry.exposure_id[1:])
    found = _runs.result(entry.image_id, n, size)
    rng = np.random.default_rng([exposure, int(entry.ccd)])
    columns = found.catalogue
    dec = np.clip(_DEC[exposure % 6] + rng.normal(0, 0.2, n), -90, 90)
    columns["ra"] = (_RA[exposure % 6] + rng.normal(0, 0.2, n) / np.cos(np.deg2rad(dec))) % 360
    columns["dec"] = dec
    columns["ra"][:1] = columns["dec"][:1] = np.nan
    columns["scorr"] = rng.normal(0, 6, n).astype(np.float32)
    columns["flags"] = rng.integers(0, 2, n).astype(np.int32)
    quality = {
        "fwhm_new": 2.5 + 0.1 * exposure,
        "f_s": 4e-4,
        "gain": 2.0,
        "zero_point": 25.0,
        "renormalisation": 1.1,
        "sky_new": 150.0 + int(entry.ccd),
        "sigma_new": 9.0,
        "flux_ratio": 1.25,
        "pixel_scale": 0.4,
        "filter": "r",
    }
    return replace(found, receipt=replace(found.receipt, quality=quality))


def store(folder: RunFolder, some: Iterable[ManifestEntry], size: int = _runs.SIZE, n: Callable = n_candidates) -> None:
    """What the tasks of these images leave."""
    digest = folder.config().image_digest
    for entry in some:
        made = result(entry, n(entry), size)
        store_image(folder, entry, made.catalogue, made.stamps, made.receipt, digest)


def score(folder: RunFolder, some: Iterable[ManifestEntry], name: str) -> None:
    """What scoring these images together leaves."""
    some = list(some)
    images = np.concatenate([np.full(n_candidates(e), e.image_id, object) for e in some])
    candidates = np.concatenate([result(e, n_candidates(e)).catalogue["candidate_id"] for e in some])
    folder.scores_of("stub").mkdir(parents=True, exist_ok=True)
    scores = (np.arange(len(candidates)) / len(candidates)).astype(np.float32)
    write_scores(folder.scores_of("stub") / f"{name}.parquet", images, candidates, scores, _runs.Model("stub"))


def begin(path: Path, exposures: int = EXPOSURES) -> RunFolder:
    """A run of which nothing is done."""
    folder = RunFolder(path)
    freeze(folder, entries(exposures), _runs.CONFIG, lambda: "")
    return folder


def make(path: Path) -> RunFolder:
    """A run at its end: one image failed, all but an exposure are scored, some twice, and none in order."""
    folder = begin(path)
    everything = entries()
    store(folder, everything[:-1])
    with ReceiptLog(folder) as log:
        error = AlignError("found 2 matches, needs 8")
        log.add(Receipt(everything[-1].image_id, "failed", stage="align", error="AlignError", message=str(error)))
    score(folder, [*everything[12:20], *everything[:4]], "b")
    score(folder, everything[4:16], "a")
    return folder
