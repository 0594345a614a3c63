"""Sources injected into real images: seen through the images' own stars, on blank sky, on galaxies and near stars."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.completeness.campaign import Campaign
from batchproc.completeness.sample import (
    TRUTH,
    Sample,
    distance_to_bad,
    distance_to_points,
    forced_flux,
    image_facts,
    look_at_nothing,
    look_at_sources,
)
from batchproc.distribute.plan import evenly
from batchproc.flow import ImageResult, subtract_exposures
from batchproc.imaging.align import align
from batchproc.imaging.background import measure_background
from batchproc.imaging.cutouts import windows
from batchproc.imaging.render import shifted_stamp
from batchproc.imaging.simulate import choose_positions, inject
from batchproc.imaging.sources import Sources, find_sources
from batchproc.imaging.stars import find_stars
from batchproc.imaging.theory import source_noise
from batchproc.io.images import read_new, read_refs
from batchproc.records import Exposure, ManifestEntry

__all__ = ["RealTask", "StarStack", "real_sample", "real_tasks"]

_BRIGHT = 100.0  # S/N of the stars that are injected, and of those near which sources are put
_NEIGHBOURS = 7
_FIELDS = 4  # Gaussian fields to compare an image with


@dataclass(frozen=True)
class RealTask:
    """One image of a manifest."""

    index: int
    entry: ManifestEntry
    campaign: Campaign


def real_tasks(entries: Sequence[ManifestEntry], campaign: Campaign) -> Iterator[RealTask]:
    """At most as many images as the campaign wants, evenly from the manifest."""
    return (RealTask(i, entry, campaign) for i, entry in enumerate(evenly(list(entries), campaign.images)))


def real_sample(task: RealTask) -> Sample:
    """Run the flow on an image as it is, for false alarms, and again with sources in it, for completeness.

    The expected S/N of a source is its flux over the error that the first run gives its place (E43), its own photons
    added; what the models of stars add to the variance of S_corr is not counted: that is a departure to be measured.
    """
    campaign, entry = task.campaign, task.entry
    rng = np.random.default_rng([campaign.seed, task.index])
    config = campaign.flow_config
    start = time.process_time()
    new = read_new(entry)
    aligned = align(new, read_refs(entry), config.align)
    first = subtract_exposures(new, aligned, config, image_id=entry.image_id)
    seconds = time.process_time() - start

    stars = StarStack.of(new, first, campaign)
    truth = _choose(first, stars, campaign, rng)
    image = inject(new.data, stars, truth["x"], truth["y"], truth["flux"], rng=rng)
    variance = new.variance
    if variance is not None:
        light = inject(np.zeros_like(new.data), stars, truth["x"], truth["y"], truth["flux"], rng=None)
        variance = variance + np.maximum(light, 0)
    second = subtract_exposures(
        replace(new, data=image, variance=variance), aligned, config, image_id=f"{entry.image_id}+"
    )
    nowhere = np.zeros(0)
    alarms, mpix, gaussian = look_at_nothing(first, nowhere, nowhere, lowest=campaign.lowest, rng=rng, fields=_FIELDS)
    ny, nx = new.shape
    return Sample(
        name=entry.image_id,
        sources=look_at_sources(second, truth, threshold=campaign.threshold, rng=rng, gain=new.gain),
        alarms=alarms,
        mpix=mpix,
        gaussian=gaussian,
        gaussian_mpix=_FIELDS * nx * ny / 1e6,
        facts={"sky": "the images", "seconds": seconds, **image_facts(first, _blank(first))},
    )


@dataclass(frozen=True)
class StarStack:
    """The PSF as the nearest bright stars show it: medians of their own pixels, no model.

    Call it with a place for the stamp there.

    Attributes
    ----------
    x, y : ndarray (n,)
    stamps : ndarray (n, size, size) float64
        Stars moved to the middle of their stamps, without sky, of unit sum.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    stamps: NDArray[np.float64]

    @classmethod
    def of(cls, exposure: Exposure, result: ImageResult, campaign: Campaign) -> StarStack:
        """Bright isolated stars of an image.

        Raises
        ------
        PsfError
            Where there are none.
        """
        config = campaign.config
        sky = measure_background(exposure.data, exposure.mask != 0, config.background)
        found = find_stars(
            result.new,
            sky.rms,
            exposure.mask,
            saturation=exposure.saturation - sky.global_level,
            config=config.psf,
        )
        fwhm = float(result.receipt.quality["fwhm_new"])
        bright = found.table["snr"] > min(_BRIGHT, float(np.median(found.table["snr"])))
        x, y = found.x[bright], found.y[bright]
        half = int(np.ceil(4 * fwhm))
        column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
        cut = windows(result.new, column, row, half + 2, np.nan).astype(np.float64)
        whole = np.isfinite(cut).all(axis=(1, 2))
        radius = np.hypot(*np.mgrid[-half : half + 1, -half : half + 1])
        stamps = []
        for pixels, dx, dy in zip(cut[whole], (x - column)[whole], (y - row)[whole], strict=True):
            stamp = shifted_stamp(pixels, -dx, -dy)[2:-2, 2:-2]
            stamp = stamp - np.median(stamp[radius > 3.2 * fwhm])
            stamps.append(stamp / stamp[radius <= 2 * fwhm].sum())
        return cls(x[whole], y[whole], np.array(stamps))

    def __call__(self, x: float, y: float) -> NDArray[np.float64]:
        """Median of the nearest stars, of unit sum, falling to zero at the rim."""
        distance = np.hypot(self.x - x, self.y - y)
        stamp = np.median(self.stamps[np.argsort(distance, kind="stable")[:_NEIGHBOURS]], axis=0)
        half = stamp.shape[0] // 2
        radius = np.hypot(*np.mgrid[-half : half + 1, -half : half + 1])
        stamp = stamp * np.clip((half - radius) / (0.2 * half), 0, 1)
        return stamp / stamp.sum()


def _choose(result: ImageResult, stars: StarStack, campaign: Campaign, rng: np.random.Generator) -> NDArray[np.void]:
    """Places and fluxes: a third on blank sky, a third on galaxies, a third near bright stars, as far as there are."""
    quality = result.receipt.quality
    difference = result.difference
    fwhm = max(quality["fwhm_new"], quality["fwhm_ref"])
    sources = _sources(result)
    extended = (sources.fwhm > 1.3 * quality["fwhm_ref"]) & (
        sources.flux * quality["flux_ratio"] * _root_f_s(result) > 20
    )
    galaxies = np.column_stack([sources.x, sources.y])[extended]
    bright = np.column_stack([stars.x, stars.y])
    bad = distance_to_bad(difference) < 2 * fwhm
    crowded = bad | (distance_to_points(bad.shape, sources.x, sources.y) < 4 * fwhm)
    third = campaign.per_image // 3
    plans = [
        ("on a galaxy", galaxies, 0.7 * fwhm, third, bad),
        ("near a star", bright, 1.5 * fwhm, third, bad),
        ("blank sky", None, 0.0, campaign.per_image - 2 * third, crowded),
    ]
    parts: list[NDArray[np.void]] = []
    for place, near, radius, n, mask in plans:
        n = n if near is None else min(n, len(near) // 3)
        taken = np.concatenate([np.column_stack([p["x"], p["y"]]) for p in parts]) if parts else None
        x, y = _positions(mask, n, rng, fwhm, taken, near, radius)
        rows = np.zeros(len(x), TRUTH)
        rows["x"], rows["y"], rows["place"] = x, y, place
        parts.append(rows)
    truth = np.concatenate(parts)
    kernels = difference.kernels_at(bad.shape[1] / 2, bad.shape[0] / 2)
    truth["snr"] = np.exp(rng.uniform(np.log(campaign.snr[0]), np.log(campaign.snr[1]), len(truth)))
    _, error = forced_flux(difference, truth["x"], truth["y"])
    # The flux that has this S/N, its own photons counted: T² = s² (σ² + T n).
    own = truth["snr"] ** 2 * source_noise(kernels.psf)
    truth["flux"] = 0.5 * (own + np.sqrt(own**2 + (2 * truth["snr"] * error) ** 2))
    return truth[np.isfinite(truth["flux"])]


def _positions(
    mask: NDArray[np.bool_],
    n: int,
    rng: np.random.Generator,
    fwhm: float,
    taken: NDArray | None,
    near: NDArray | None,
    radius: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As many places as there is room for, at most `n`; those near something are all near something."""
    for wanted in (n, n // 2, n // 4):
        if wanted == 0:
            break
        try:
            x, y = choose_positions(
                mask.shape,  # type: ignore[arg-type]
                wanted,
                rng,
                margin=6 * fwhm,
                min_separation=6 * fwhm,
                mask=mask,
                avoid=taken,
                near=near,
                near_fraction=1.0,
                near_radius=radius,
            )
        except ValueError:
            continue
        if near is None:
            return x, y
        close = cKDTree(near).query(np.column_stack([x, y]))[0] < 3 * radius  # where no room was left, anywhere
        return x[close], y[close]
    return np.zeros(0), np.zeros(0)


def _sources(result: ImageResult) -> Sources:
    """What the reference shows."""
    sky = measure_background(result.ref, result.difference.mask != 0)
    return find_sources(result.ref, sky.rms, result.difference.mask)


def _root_f_s(result: ImageResult) -> float:
    return float(np.sqrt(result.receipt.quality["f_s"]))


def _blank(result: ImageResult) -> NDArray[np.bool_]:
    """Pixels farther than 4 FWHM from every source of the reference and every unflagged detection."""
    quality = result.receipt.quality
    reach = 4 * max(quality["fwhm_new"], quality["fwhm_ref"])
    sources = _sources(result)
    catalogue = result.catalogue
    strong = np.abs(catalogue["scorr"]) > 5
    x = np.concatenate([sources.x, catalogue["x"][strong]])
    y = np.concatenate([sources.y, catalogue["y"][strong]])
    shape = result.difference.mask.shape
    return (distance_to_points(shape, x, y) > reach) & (distance_to_bad(result.difference) > reach)
