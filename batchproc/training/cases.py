"""Pairs of images with known transients in them, to learn from and to be tested on.

Three sources: simulated nights, written and read as files; regions of a real deep coadd, from which science images are
made; and real pairs of exposures. Into each, transients are planted with a PSF of our own, which the pipeline is not
told: alone, on galaxies, on stars (which then vary), and into the reference (they have vanished since).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sep
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from scipy.spatial import cKDTree

from batchproc.errors import ExposureError
from batchproc.imaging.background import measure_background
from batchproc.imaging.simulate import Scene, make_epoch, transform_wcs
from batchproc.imaging.stars import find_stars
from batchproc.io.images import read_image, read_new, read_refs
from batchproc.io.manifest import read_manifest
from batchproc.io.night import simulate_night
from batchproc.records import Exposure, MaskBit
from batchproc.training.planting import ToRef, plant

__all__ = [
    "COADD_SPLIT",
    "Case",
    "coadd_cases",
    "coadd_region",
    "draw_scene",
    "draw_survey_scene",
    "pair_cases",
    "simulated_cases",
]

#: Light of the brightest star in a reference's exposure, electrons: it saturates some 50 pixels.
_BRIGHTEST = 5e6
#: Part of the data → columns and rows of the coadd's 4 × 4 regions. What is tested on is on no image learnt from.
COADD_SPLIT: dict[str, tuple[tuple[int, int], ...]] = {
    "train": tuple((i, j) for i in range(3) for j in range(4) if (i, j) not in ((2, 0), (2, 3))),
    "valid": ((2, 0), (2, 3)),
    "test": tuple((3, j) for j in range(4)),
}

CARELESS = 0.5  # of the cases that are learnt from and tested on


@dataclass(frozen=True)
class Case:
    """A pair of images and what changed between them.

    Attributes
    ----------
    name : str
    group : str
        The night or the region: what shares pixels shares this, and is never divided between training and test.
    new : Exposure
    refs : tuple of Exposure
    truth : structured ndarray (n,)
        `PLANTED`.
    doubtful : ndarray (k, 2)
        Places (x, y) where something real may have changed that nobody planted.
    careless : bool
        Subtract it with PSFs that are some per cent off (those of the exposures), without the terms for source noise
        and star residuals and without refined registration: many stars leave residuals then, as in other pipelines.
    """

    name: str
    group: str
    new: Exposure
    refs: tuple[Exposure, ...]
    truth: NDArray
    doubtful: NDArray = field(default_factory=lambda: np.zeros((0, 2)))
    careless: bool = False


# --- Simulated nights -------------------------------------------------------------------------------------------------


def draw_scene(rng: np.random.Generator) -> Scene:
    """The conditions of a night: seeing, depth, crowding, defects, from good to bad.

    Three nights in ten are those of a small, wide telescope in the Milky Way: few pixels a star, many stars, and a
    reference much deeper than new.
    """
    log_uniform = partial(_log_uniform, rng)
    wide = rng.uniform() < 0.3
    fwhm = log_uniform(1.5, 2.6) if wide else log_uniform(1.6, 5.5)
    # Long stars in one image are the guiding's doing, in both the optics'.
    axis_ratio = rng.choice([rng.uniform(0.85, 1.0), rng.uniform(0.35, 1.0)])
    alike = rng.uniform() < 0.7
    ratio = log_uniform(0.1, 0.6) if wide else log_uniform(0.2, 1.5)
    return Scene(
        fwhm_new=fwhm,
        fwhm_ref=max(1.5, fwhm * rng.uniform(0.7, 1.1)),
        beta=rng.choice([2.5, 3.0, 3.5, 4.5]),
        axis_ratio=axis_ratio,
        axis_ratio_ref=min(1.0, axis_ratio * rng.uniform(0.9, 1.15)) if alike else 1.0,
        theta=rng.uniform(0, 180),
        psf_variation=rng.choice([rng.uniform(0, 0.2), rng.uniform(0.2, 0.9)], p=[0.7, 0.3]),
        sky_new=log_uniform(100, 3000),
        sky_ref=log_uniform(100, 3000),
        sky_slope=rng.uniform(-0.2, 0.2),
        read_noise=rng.uniform(3, 12),
        depth=int(rng.choice([10, 30] if wide else [1, 4, 10, 30])),
        flux_ratio=ratio,
        n_stars=int(log_uniform(2500, 12000) if wide else log_uniform(300, 5000)),
        star_flux=(500.0, _BRIGHTEST * min(1.0, ratio)),
        n_galaxies=int(log_uniform(30, 250)),
        registration_jitter=log_uniform(0.01, 0.2),
        cosmic_rays=int(rng.uniform(5, 40)),
        hot_pixels=int(rng.uniform(2, 20)),
        bad_columns=int(rng.integers(0, 3)),
    )


def draw_survey_scene(rng: np.random.Generator) -> Scene:
    """A night of a survey with a pixel of an arcsecond and stacked references: clear or, two in five, through clouds.

    These take two to five magnitudes of the light of new: of most of what the reference shows nothing is left.
    """
    log_uniform = partial(_log_uniform, rng)
    scene = draw_scene(rng)
    fwhm, ratio = log_uniform(1.5, 3.2), log_uniform(0.1, 1.2)
    through_clouds = log_uniform(0.01, 0.16) if rng.uniform() < 0.4 else 1.0
    return replace(
        scene,
        fwhm_new=fwhm,
        fwhm_ref=max(1.5, fwhm * rng.uniform(0.7, 1.1)),
        axis_ratio=rng.uniform(0.85, 1.0),
        axis_ratio_ref=rng.uniform(0.9, 1.0),
        sky_new=log_uniform(100, 1500),
        sky_ref=log_uniform(100, 1500),
        depth=int(rng.choice([15, 30])),
        flux_ratio=ratio * through_clouds,
        n_stars=int(log_uniform(300, 8000)),
        star_flux=(log_uniform(50, 2000) * through_clouds, _BRIGHTEST * min(1.0, ratio) * through_clouds),
    )


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def simulated_cases(
    seed: int,
    *,
    n_images: int = 2,
    size: int = 768,
    draw: Callable[[np.random.Generator], Scene] = draw_scene,
) -> Iterator[Case]:
    """The images of one simulated night, through files, as surveys deliver them; but for those without a star."""
    rng = np.random.default_rng([seed, 1])
    with TemporaryDirectory() as folder:
        manifest = simulate_night(folder, n_images=n_images, size=size, seed=seed, n_transients=0, scene=draw(rng))
        for entry in read_manifest(manifest):
            new, ref = read_new(entry), read_refs(entry)[0]
            careless = bool(rng.uniform() < CARELESS)
            try:
                new, ref, truth = plant(new, ref, _by_wcs(new, ref), rng, n=60, defects=True, careless=careless)
            except ExposureError:
                continue
            yield Case(f"night{seed}-{entry.image_id}", f"night{seed}", new, (ref,), truth, careless=careless)


# --- Real images ------------------------------------------------------------------------------------------------------


def coadd_region(coadd: Exposure, column: int, row: int, gap: int = 24) -> Exposure:
    """One of the coadd's 4 × 4 regions; `gap` pixels along every border belong to none."""
    (ny, nx) = coadd.shape
    x0, x1 = nx * column // 4 + gap, nx * (column + 1) // 4 - gap
    y0, y1 = ny * row // 4 + gap, ny * (row + 1) // 4 - gap
    window = np.s_[y0:y1, x0:x1]
    variance = None if coadd.variance is None else coadd.variance[window]
    return replace(
        coadd,
        data=coadd.data[window].copy(),
        mask=coadd.mask[window].copy(),
        variance=variance,
        wcs=None if coadd.wcs is None else coadd.wcs[window],
    )


def coadd_cases(coadd: Exposure, part: str, seed: int) -> Iterator[Case]:
    """For each region in a part of `COADD_SPLIT` a science image: blurred, moved, noisier, with transients planted."""
    for column, row in COADD_SPLIT[part]:
        rng = np.random.default_rng([seed, column, row])
        ref = coadd_region(coadd, column, row)
        sky = measure_background(ref.data, ref.mask != 0)
        stars = find_stars(ref.data - sky.level, sky.rms, ref.mask, saturation=ref.saturation)
        fwhm = float(np.median(stars.table["fwhm"]))
        sigma = sky.global_rms * rng.uniform(1.3, 5.0)  # of the noise to add
        read_noise = 5.0
        epoch = make_epoch(
            np.where(ref.mask & MaskBit.NO_DATA, np.nan, ref.data - sky.level),
            fwhm_ref=fwhm,
            fwhm_new=fwhm * rng.uniform(1.02, 1.6),
            sky=max(sigma**2 - read_noise**2, 10.0),
            read_noise=read_noise,
            flux_ratio=rng.uniform(0.7, 1.3),
            shift=tuple(rng.uniform(-8, 8, 2)),
            rotation=rng.uniform(-0.4, 0.4),
            mask=ref.mask,
            saturation=ref.saturation * 1.2,
            rng=rng,
        )
        matrix = epoch.matrix
        new = Exposure(
            data=epoch.data,
            variance=None,
            mask=epoch.mask,
            gain=1.0,
            read_noise=read_noise,
            saturation=ref.saturation * 1.2,
            wcs=transform_wcs(ref.wcs, matrix),
            meta={**ref.meta, "path": f"epoch of region {column}, {row}"},
        )

        def to_ref(x: NDArray, y: NDArray, matrix: NDArray = matrix) -> tuple[NDArray, NDArray]:
            xr, yr = matrix[:, :2] @ np.stack([x, y]) + matrix[:, 2:]
            return xr, yr

        careless = bool(rng.uniform() < CARELESS)
        new, ref, truth = plant(new, ref, to_ref, rng, n=90, defects=True, careless=careless)
        name = f"coadd{column}{row}"
        yield Case(f"{name}-{seed}", name, new, (ref,), truth, careless=careless)


def pair_cases(new: str | Path, ref: str | Path, seed: int, n: int = 120) -> Iterator[Case]:
    """A real pair with transients planted; what differs between the two by itself is doubtful."""
    rng = np.random.default_rng(seed)
    image, reference = read_image(new), read_image(ref)
    doubtful = unpaired_sources(image, reference, _by_wcs(image, reference))
    image, reference, truth = plant(image, reference, _by_wcs(image, reference), rng, n=n)
    yield Case(f"{Path(new).stem}-{seed}", Path(new).stem, image, (reference,), truth, doubtful)


def unpaired_sources(new: Exposure, ref: Exposure, to_ref: ToRef) -> NDArray[np.float64]:
    """Places (x, y) on new of sources that one image has and the other lacks or has fainter, by aperture photometry.

    No subtraction and no PSF is involved. Of a source (five pixels above 1.5 sigma after smoothing) the other image
    has less than 80 % of the light in an aperture of 3 pixels' radius, and the loss is significant at 4 sigma.
    """
    flats = [_without_large_scales(exposure) for exposure in (new, ref)]
    listed = [sep.extract(flat, 1.5, err=noise, minarea=5) for flat, noise in flats]
    x, y = listed[0]["x"], listed[0]["y"]
    gained = np.column_stack([x, y])[_lost(flats, x, y, *to_ref(x, y))]
    # The other way round, places on new come from the map's offset at the nearest point of a grid.
    ny, nx = new.shape
    grid = np.stack(np.meshgrid(np.arange(0, nx, 8.0), np.arange(0, ny, 8.0)), axis=-1).reshape(-1, 2)
    grid_ref = np.column_stack(to_ref(grid[:, 0], grid[:, 1]))
    x, y = listed[1]["x"], listed[1]["y"]
    nearest = cKDTree(grid_ref).query(np.column_stack([x, y]))[1]
    back = np.column_stack([x, y]) - (grid_ref - grid)[nearest]
    return np.concatenate([gained, back[_lost(flats[::-1], x, y, back[:, 0], back[:, 1])]])


def _without_large_scales(exposure: Exposure) -> tuple[NDArray[np.float32], float]:
    """The image without sky and galaxies (a median over 15 pixels, taken of every third), and its noise."""
    data = np.ascontiguousarray(exposure.data, dtype=np.float32)
    coarse = median_filter(data[::3, ::3], 5)
    ny, nx = data.shape
    flat = data - coarse[np.ix_(np.arange(ny) // 3, np.arange(nx) // 3)]
    return flat, 1.4826 * float(np.median(np.abs(flat - np.median(flat))))


def _lost(
    flats: list[tuple[NDArray[np.float32], float]], x: NDArray, y: NDArray, x_other: NDArray, y_other: NDArray
) -> NDArray[np.bool_]:
    light, _, _ = sep.sum_circle(flats[0][0], x, y, 3.0)
    other, _, _ = sep.sum_circle(flats[1][0], x_other, y_other, 3.0)
    noise = np.sqrt(9 * np.pi) * np.hypot(flats[0][1], flats[1][1])
    return np.asarray((other < 0.8 * light) & (light - other > 4 * noise))


def _by_wcs(new: Exposure, ref: Exposure) -> ToRef:
    def to_ref(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        xr, yr = ref.wcs.all_world2pix(*new.wcs.all_pix2world(x, y, 0), 0, quiet=True)
        return xr, yr

    return to_ref
