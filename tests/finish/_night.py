"""A run without images whose candidates have places on the sky: fields here and there, one at its pole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from batchproc.config import Config
from batchproc.job import Steps, classify, run
from batchproc.records import ManifestEntry
from tests import _runs

SETTINGS = Config.from_dict({"cutouts": {"size": _runs.SIZE}, "classify": {"model": ""}})
EXPOSURES, CCDS = 6, 4
_RA, _DEC = (0.0, 10.0, 150.0, 359.95, 200.0, 10.0), (0.0, -30.0, 60.0, 45.0, 89.97, -30.0)


def entries(exposures: int = EXPOSURES) -> list[ManifestEntry]:
    """`CCDS` images an exposure."""
    return [
        ManifestEntry(
            f"e{e}-c{c}",
            f"/nights/e{e}.fits[{c}]",
            ("/nights/ref.fits",),
            exposure_id=f"e{e}",
            ccd=str(c),
            mjd=60000 + e,
        )
        for e in range(exposures)
        for c in range(CCDS)
    ]


def process(entry: ManifestEntry, config: Config) -> _runs.Result:
    """Some dozens of candidates around the exposure's place, the first without one; none at all on the last CCD."""
    exposure, ccd = int(entry.exposure_id[1:]), int(entry.ccd)
    n = 0 if ccd == CCDS - 1 else 20 + 15 * ccd
    result = _runs.result(entry.image_id, n)
    rng = np.random.default_rng([exposure, ccd])
    columns = result.catalogue
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
        "sky_new": 150.0 + ccd,
        "sigma_new": 9.0,
        "flux_ratio": 1.25,
        "pixel_scale": 0.4,
        "filter": "r",
    }
    return replace(result, receipt=replace(result.receipt, quality=quality))


def make(path: Path, exposures: int = EXPOSURES, scored: bool = True, process=process) -> Path:
    """A finished run, scored by one model."""
    steps = Steps(process=process, model=_runs.load_model, wisdom=_runs.no_wisdom, report=_runs.report)
    run(entries(exposures), path, config=SETTINGS, cluster="serial", quiet=True, steps=steps)
    if scored:
        classify(path, "stub", cluster="serial", quiet=True, steps=steps)
    return path
