"""How each CCD of each exposure went, in one table: ``RUN/focal_planes.parquet``, a row an image of the manifest.

The counts come from the catalogue, group by group of images; the rest from manifest and receipts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchproc.finish.work import Contents, Group, Job, Product, Workshop, digest, groups_of, missing
from batchproc.io.atomic import replacing
from batchproc.io.catalogue import read_rows
from batchproc.io.progress import iter_receipts
from batchproc.records import Column, Receipt

__all__ = ["FOCAL_PLANES", "limiting_magnitude", "make_focal_planes", "survey_focal_planes"]

#: Columns of ``focal_planes.parquet``, in order.
FOCAL_PLANES: tuple[Column, ...] = (
    Column("exposure_id", "str", "", "exposure, of the manifest or the header; empty where neither tells"),
    Column("ccd", "str", "", "CCD or quadrant of the exposure"),
    Column("image_id", "str", "", "image_id of the manifest"),
    Column("mjd", "float64", "d", "time of new"),
    Column("filter", "str", "", "filter of new"),
    Column("status", "str", "", "done, failed (foreseen), bug, or missing (not tried)"),
    Column("cause", "str", "", "of a failure: step, type of error and message; empty when done"),
    Column("n_candidates", "int64", "", "rows in the catalogue"),
    Column("n_unflagged", "int64", "", "of these without a flag"),
    Column("n_positive", "int64", "", "of these brightened"),
    Column("n_negative", "int64", "", "of these faded"),
    Column("fwhm_new", "float32", "pix", "FWHM of the PSF of new"),
    Column("fwhm_ref", "float32", "pix", "FWHM of the PSF of ref, as it is on the disk"),
    Column("seeing", "float32", "arcsec", "fwhm_new on the sky; NaN without a WCS"),
    Column("depth", "float32", "mag", "magnitude of a change of 5 sigma on blank sky; NaN without a zero point"),
    Column("zero_point", "float32", "mag", "magnitude of one file unit in new; NaN where unknown"),
    Column("sky", "float32", "file unit", "sky level of new"),
    Column("sigma_new", "float32", "file unit", "sky rms of new"),
    Column("flux_ratio", "float32", "", "F_new / F_ref"),
    Column("renormalisation", "float32", "", "width of S_corr on blank sky before it was made 1"),
    Column("masked_fraction", "float32", "", "share of the pixels that a mask covers"),
    Column("seconds", "float32", "s", "wall-clock time of the task"),
    Column("cpu_seconds", "float32", "s", "its CPU time"),
)
_MEASURED = ("fwhm_new", "fwhm_ref", "zero_point", "sigma_new", "flux_ratio", "renormalisation", "masked_fraction")
_FORM = "1"  # of what is written: with another one older tables are made anew
_ROW_BYTES = 60  # about, of what is written
_COUNTS = ("n_unflagged", "n_positive", "n_negative")

SCHEMA = pa.schema(
    [
        pa.field(
            column.name,
            pa.string() if column.dtype == "str" else pa.from_numpy_dtype(np.dtype(column.dtype)),
            metadata={"unit": column.unit, "meaning": column.meaning},
        )
        for column in FOCAL_PLANES
    ]
)


def survey_focal_planes(contents: Contents) -> Product:
    """What there is of the table, and what there will be."""
    target = contents.folder.path / "focal_planes.parquet"
    rows = pq.read_metadata(contents.folder.manifest).num_rows
    if _said_inputs(target) == _inputs(contents):
        return Product("focal-planes", target, "current", rows, 1, target.stat().st_size)
    return Product("focal-planes", target, "to make", rows, 1, _ROW_BYTES * rows)


def make_focal_planes(shop: Workshop) -> Product:
    """Make the table, unless it is there and what the run knows now."""
    found = survey_focal_planes(shop.contents)
    if found.state != "to make":
        return found
    job = shop.job("focal-planes", _inputs(shop.contents))
    groups = groups_of(shop.contents.index)
    shop.step(count, job, missing(job, groups, lambda group: group.counts), "groups counted")
    shop.step(write_table, job, [groups], "tables")
    return replace(survey_focal_planes(shop.contents), state="made")


def _inputs(contents: Contents) -> str:
    """Of the manifest, whose exposures and images not tried are in the table, of what was done, and of failures."""
    tried = (
        f"{r.image_id} {r.status} {r.error} {r.message} {r.metadata.get('exposure_id')}"
        for r in iter_receipts(contents.folder)
    )
    manifest = str(contents.folder.read_record()["manifest_digest"])
    return digest(_FORM, manifest, contents.digest, *sorted(tried))


def _said_inputs(table: Path) -> str:
    """What a table says that it was made from; empty where there is none, or none that can be read."""
    try:
        metadata = pq.read_schema(table).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return ""
    return str(metadata.get(b"batchproc_inputs", b"").decode())


def limiting_magnitude(quality: Mapping[str, Any], *, snr: float = 5.0) -> float:
    """Magnitude of a change that has this S/N on blank sky, at the middle of the image.

    On blank sky the flux of the matched filter has the error ``σ_α = r / √F_S`` (Zackay et al. 2016, ApJ 830, 27, E42
    and E43; doi:10.3847/0004-637X/830/1/27) in electrons of new, where F_S is also the variance of the score S and r is
    the measured width of S_corr, by which its noise is larger than expected. With gain g and zero point ZP::

        depth = ZP − 2.5 log10(snr · r / (√F_S · g))

    Parameters
    ----------
    quality : mapping
        Of a receipt: ``f_s`` (electrons⁻²), ``gain`` (electrons a file unit), ``zero_point`` (mag), and
        ``noise_factor``, the r in force (1 where the run does not renormalise).

    Returns
    -------
    float
        NaN where one of them is not known.
    """
    f_s, gain, zero_point = (float(quality.get(name) or math.nan) for name in ("f_s", "gain", "zero_point"))
    width = float(quality.get("noise_factor") or math.nan)
    if not (f_s > 0 and gain > 0 and width > 0):
        return math.nan
    return zero_point - 2.5 * math.log10(snr * width / (math.sqrt(f_s) * gain))


def count(job: Job, group: Group) -> None:
    """Count the candidates of each image of a group: unflagged, brightened, faded."""
    images = job.images(group.first, group.last)
    rows = read_rows(job.folder, images.places, ["scorr", "flags"])
    starts = (images.offsets[:-1] - images.offsets[0]).astype(np.intp)
    scorr, flags = rows["scorr"].to_numpy(), rows["flags"].to_numpy()
    counts = {
        name: np.add.reduceat(kept.astype(np.int64), starts)
        for name, kept in zip(_COUNTS, (flags == 0, scorr > 0, scorr < 0), strict=True)
    }
    with replacing(job.path(group.counts)) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **counts)


def write_table(job: Job, groups: Sequence[Group]) -> int:
    """Write the table from the counts of all groups, the manifest and the receipts; returns the number of rows."""
    entries = job.folder.entries()
    places = {entry.image_id: place for place, entry in enumerate(entries)}
    renormalised = job.folder.config().subtract.renormalise
    columns: dict[str, Any] = {c.name: _empty(c, len(entries)) for c in FOCAL_PLANES}
    for place, entry in enumerate(entries):
        given = (("image_id", entry.image_id), ("exposure_id", entry.exposure_id), ("ccd", entry.ccd))
        for name, value in (*given, ("filter", entry.filter), ("mjd", entry.mjd), ("status", "missing")):
            if value is not None:
                columns[name][place] = value
    for receipt in iter_receipts(job.folder):
        if receipt.image_id in places:
            for name, value in _row(receipt, renormalised).items():
                columns[name][places[receipt.image_id]] = value
    for group in groups:
        rows = [places[place.image_id] for place in job.images(group.first, group.last).places]
        with np.load(job.path(group.counts)) as counted:
            for name in _COUNTS:
                columns[name][rows] = counted[name]
    schema = SCHEMA.with_metadata({"batchproc_inputs": job.inputs})
    table = pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()}, schema)
    with replacing(job.folder.path / "focal_planes.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=100_000)
    return len(table)


def _empty(column: Column, n: int) -> Any:
    """A column without values: empty text, no candidates, NaN."""
    if column.dtype == "str":
        return [""] * n
    return np.zeros(n, np.int64) if column.dtype == "int64" else np.full(n, np.nan)


def _row(receipt: Receipt, renormalised: bool) -> dict[str, Any]:
    """What a receipt tells of its image."""
    quality = receipt.quality
    known = {**receipt.metadata, **quality}  # a failure has in the former whose it was, where new was read
    row = {name: known[name] for name in ("exposure_id", "ccd", "filter", "mjd") if known.get(name)}
    row |= {name: quality[name] for name in _MEASURED if quality.get(name)}
    seconds = sum(receipt.seconds.values()) if receipt.seconds else math.nan
    row |= {"status": receipt.status, "seconds": seconds, "cpu_seconds": receipt.cpu_seconds}
    if receipt.status != "done":
        return row | {"cause": f"{receipt.stage}: {receipt.error}: {receipt.message}"}
    noise_factor = quality.get("renormalisation") if renormalised else 1.0
    return row | {
        "n_candidates": receipt.n_candidates,
        "sky": quality.get("sky_new", math.nan),
        "seeing": quality.get("fwhm_new", math.nan) * (quality.get("pixel_scale") or math.nan),
        "depth": limiting_magnitude({**quality, "noise_factor": noise_factor}),
    }
