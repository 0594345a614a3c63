"""Planned campaigns whose images nobody looks at: manifests of names, and work that makes up a few candidates."""

from __future__ import annotations

from pathlib import Path

from batchproc.config import Config
from batchproc.io.manifest import write_manifest
from batchproc.records import ManifestEntry
from tests._runs import Result, result

SIZE = 15
CONFIG = Config.from_dict({"cutouts": {"size": SIZE}, "classify": {"model": ""}})

_QUADRANTS = 64  # of an exposure
_FIELDS = 500


def write_plan(path: Path, images: int) -> Path:
    """The manifest of so many quadrants of a survey, in its archive's folders; none of the files exists."""
    write_manifest([_entry(i) for i in range(images)], path)
    return path


def _entry(i: int) -> ManifestEntry:
    exposure, quadrant = divmod(i, _QUADRANTS)
    ccd, q = divmod(quadrant, 4)
    field = f"{exposure % _FIELDS + 1:06d}"
    name = f"ztf_{20260000000000 + exposure}_{field}_zr_c{ccd + 1:02d}_o_q{q + 1}"
    science = f"/archive/sci/{exposure // 600:04d}/{exposure:06d}/{name}"
    reference = f"/archive/ref/{field[:3]}/field{field}/zr/ccd{ccd + 1:02d}/q{q + 1}/ztf_{field}_zr_refimg.fits"
    return ManifestEntry(
        image_id=name,
        new=f"{science}_sciimg.fits",
        ref=(reference,),
        new_mask=f"{science}_mskimg.fits",
        survey="ztf",
        filter="zr",
        mjd=61000.0 + exposure / 600,
        exposure_id=str(20260000000000 + exposure),
        ccd=f"{ccd + 1}.{q + 1}",
    )


def no_wisdom(config: Config) -> str:
    """No transform will be made."""
    return ""


def no_report(folder: Path) -> Path:
    """Nobody reads it."""
    return folder / "report.html"


def few_candidates(entry: ManifestEntry, config: Config) -> Result:
    """Stands in for the pixels: 20 candidates in every tenth image, since what storing takes is not on trial."""
    return result(entry.image_id, 0 if sum(entry.image_id.encode()) % 10 else 20, SIZE)
