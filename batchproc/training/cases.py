"""Pairs of images with known transients in them, to learn from and to be tested on.

Three sources: simulated nights, written and read as files; regions of a real deep coadd, from which science images are
made; and real pairs of exposures. Into each, transients are planted with a PSF of our own, which the pipeline is not
told: alone, on galaxies, on stars (which then vary), and into the reference (they have vanished since).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import sep
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from scipy.spatial import cKDTree

from batchproc.imaging.background import measure_background
from batchproc.imaging.render import ParametricPsf
from batchproc.imaging.simulate import Scene, expected_snr, inject, make_epoch, transform_wcs
from batchproc.imaging.sources import Sources, find_sources
from batchproc.imaging.stars import find_stars
from batchproc.io.images import read_image, read_new, read_refs
from batchproc.io.manifest import read_manifest
from batchproc.io.night import simulate_night
from batchproc.records import Exposure, MaskBit
from batchproc.training.defects import spoil

__all__ = ["COADD_SPLIT", "Case", "coadd_cases", "coadd_region", "draw_scene", "pair_cases", "simulated_cases"]

#: ``flux`` in electrons of new, negative where light was lost; ``snr``: expected S/N in the difference.
PLANTED = np.dtype([*((n, np.float64) for n in ("x", "y", "flux", "snr")), ("kind", "U8")])

#: Part of the data → columns and rows of the coadd's 4 × 4 regions. What is tested on is on no image learnt from.
COADD_SPLIT: dict[str, tuple[tuple[int, int], ...]] = {
    "train": tuple((i, j) for i in range(3) for j in range(4) if (i, j) not in ((2, 0), (2, 3))),
    "valid": ((2, 0), (2, 3)),
    "test": tuple((3, j) for j in range(4)),
}

CARELESS = 0.5  # of the cases that are learnt from and tested on
ToRef = Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]


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
    """The conditions of a night: seeing, depth, crowding, defects, from good to bad."""

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    fwhm = log_uniform(1.6, 5.5)
    return Scene(
        fwhm_new=fwhm,
        fwhm_ref=max(1.5, fwhm * rng.uniform(0.7, 1.1)),
        beta=rng.choice([2.5, 3.0, 3.5, 4.5]),
        axis_ratio=rng.uniform(0.6, 1.0),
        theta=rng.uniform(0, 180),
        psf_variation=rng.uniform(0, 0.12),
        sky_new=log_uniform(100, 3000),
        sky_ref=log_uniform(100, 3000),
        sky_slope=rng.uniform(-0.2, 0.2),
        read_noise=rng.uniform(3, 12),
        depth=int(rng.choice([1, 4, 10, 30])),
        flux_ratio=rng.uniform(0.6, 1.5),
        n_stars=int(log_uniform(300, 2500)),
        n_galaxies=int(log_uniform(30, 250)),
        transient_snr=(6.0, 150.0),
        near_galaxies=0.5,
        registration_jitter=log_uniform(0.01, 0.2),
        cosmic_rays=int(rng.uniform(5, 40)),
        hot_pixels=int(rng.uniform(2, 20)),
        bad_columns=int(rng.integers(0, 3)),
    )


def simulated_cases(seed: int, *, n_images: int = 2, size: int = 768) -> Iterator[Case]:
    """The images of one simulated night, through files, as surveys deliver them."""
    rng = np.random.default_rng([seed, 1])
    with TemporaryDirectory() as folder:
        manifest = simulate_night(
            folder, n_images=n_images, size=size, seed=seed, n_transients=20, scene=draw_scene(rng)
        )
        table = pd.read_parquet(Path(folder) / "truth.parquet")
        for entry in read_manifest(manifest):
            new, ref = read_new(entry), read_refs(entry)[0]
            rows = table[table["image_id"] == entry.image_id]
            known = np.zeros(len(rows), PLANTED)
            for name in ("x", "y", "snr", "kind"):
                known[name] = rows[name]
            known["flux"] = rows["flux"] * new.gain
            careless = bool(rng.uniform() < CARELESS)
            new, ref, planted = plant(
                new, ref, _by_wcs(new, ref), rng, n=30, taken=known, defects=True, wrong_psf=careless
            )
            truth = np.concatenate([known, planted])
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
        new, ref, truth = plant(new, ref, to_ref, rng, n=90, defects=True, wrong_psf=careless)
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


# --- Planting ---------------------------------------------------------------------------------------------------------


def plant(
    new: Exposure,
    ref: Exposure,
    to_ref: ToRef,
    rng: np.random.Generator,
    *,
    n: int,
    taken: NDArray | None = None,
    separation: float = 24.0,
    defects: bool = False,
    wrong_psf: bool = False,
) -> tuple[Exposure, Exposure, NDArray]:
    """Both images with `n` transients or fewer, clear of those in `taken` and of bad pixels, and the truth (`PLANTED`).

    Of those that find room, some 40 % are alone, 20 % lie on extended sources, 40 % are stars that vary. One in five of
    the first two has vanished since the reference was taken. With `defects`, particle hits, hot pixels and trails
    besides (`spoil`); with `wrong_psf`, both images carry a PSF that is too narrow or too wide.
    """
    places, psfs, sigmas = [], [], []
    for exposure in (new, ref):
        sky = measure_background(exposure.data, exposure.mask != 0)
        data = exposure.data - sky.level
        psfs.append(own_psf(data, sky.rms, exposure, rng))
        sigmas.append(sky.global_rms)
        places.append(find_sources(data, sky.rms, exposure.mask))
    scale = _flux_ratio(places, to_ref)
    unit = expected_snr(
        1.0, psf_new=psfs[0], psf_ref=psfs[1], sigma_new=sigmas[0], sigma_ref=sigmas[1], flux_ratio=scale
    )
    truth = _draw(new, places[0], psfs[0].fwhm, 1 / float(unit[0]), rng, n)
    clear = _clear(truth, new, psfs[0].fwhm, separation, taken)
    truth = truth[clear[:n]]

    lost = truth["kind"] == "vanished"
    x_ref, y_ref = to_ref(truth["x"], truth["y"])
    in_new, in_ref = truth[~lost], truth[lost]
    data = inject(new.data, psfs[0], in_new["x"], in_new["y"], in_new["flux"], rng=rng)
    data_ref = inject(ref.data, psfs[1], x_ref[lost], y_ref[lost], -in_ref["flux"] / scale, rng=rng)
    new, ref = replace(new, data=data.astype(np.float32)), replace(ref, data=data_ref.astype(np.float32))
    if defects:
        megapixels = new.data.size / 1e6
        new = spoil(new, sigmas[0], psfs[0].fwhm, rng, hits=round(50 * megapixels), hot=round(15 * megapixels))
        ref = spoil(ref, sigmas[1], psfs[1].fwhm, rng, hits=round(5 * megapixels), hot=round(15 * megapixels))
    if wrong_psf:
        off = [replace(psf, fwhm=psf.fwhm * rng.choice([0.93, 0.97, 1.03, 1.07])) for psf in psfs]
        new, ref = replace(new, psf=off[0]), replace(ref, psf=off[1])
    return new, ref, truth


def own_psf(data: NDArray, rms: NDArray, exposure: Exposure, rng: np.random.Generator) -> ParametricPsf:
    """A Moffat profile with the size and elongation of the image's stars, a few per cent off."""
    table = find_stars(data, rms, exposure.mask, saturation=exposure.saturation).table
    xx, yy, xy = (float(np.median(table[name])) for name in ("xx", "yy", "xy"))
    trace, split = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    # Moments are those within a window: they round the shape a little.
    ratio = np.sqrt(max(trace - split, 0.1 * trace) / (trace + split))
    return ParametricPsf(
        float(np.median(table["fwhm"]) * rng.uniform(0.97, 1.03)),
        beta=float(rng.uniform(2.8, 4.5)),
        axis_ratio=float(np.clip(ratio * rng.uniform(0.96, 1.04), 0.3, 1.0)),
        theta=float(np.degrees(np.arctan2(2 * xy, xx - yy)) / 2),
    )


def _draw(new: Exposure, sources: Sources, fwhm: float, noise: float, rng: np.random.Generator, n: int) -> NDArray:
    """Places, kinds and fluxes, more than will find room; `noise` is that of a flux on blank sky."""
    truth = np.zeros(6 * n, PLANTED)
    share = rng.uniform(size=len(truth))
    ny, nx = new.shape
    truth["x"], truth["y"] = rng.uniform(0, nx - 1, len(truth)), rng.uniform(0, ny - 1, len(truth))
    truth["kind"] = "new"
    truth["snr"] = np.exp(rng.uniform(np.log(6), np.log(150), len(truth)))
    truth["flux"] = truth["snr"] * noise

    extended = np.flatnonzero(sources.fwhm > 1.3 * fwhm)
    hosts = np.flatnonzero((sources.fwhm < 1.2 * fwhm) & (sources.flux > 8 * noise))
    on_galaxy = (share > 0.4) & (share < 0.6) if len(extended) else np.zeros(len(truth), bool)
    chosen = rng.choice(extended, on_galaxy.sum()) if len(extended) else extended
    spread = rng.normal(0, 0.4, (2, on_galaxy.sum())) * sources.fwhm[chosen]
    truth["x"][on_galaxy], truth["y"][on_galaxy] = sources.x[chosen] + spread[0], sources.y[chosen] + spread[1]

    lost = (share < 0.12) | ((share > 0.4) & (share < 0.44))
    truth["kind"][lost] = "vanished"
    truth["flux"][lost] *= -1

    varies = (share > 0.6) if len(hosts) else np.zeros(len(truth), bool)
    host = rng.choice(hosts, varies.sum()) if len(hosts) else hosts
    change = sources.flux[host] * np.exp(rng.uniform(np.log(0.05), 0, len(host)))
    local = np.sqrt(noise**2 + 2 * sources.flux[host])
    truth["x"][varies], truth["y"][varies] = sources.x[host], sources.y[host]
    fades = (rng.uniform(size=len(host)) < 0.4) & (change < 0.8 * sources.flux[host])
    truth["flux"][varies] = np.where(fades, -change, change)
    truth["snr"][varies] = change / local
    truth["kind"][varies] = "variable"
    return truth[truth["snr"] > 6]


def _clear(truth: NDArray, new: Exposure, fwhm: float, separation: float, taken: NDArray | None) -> NDArray[np.intp]:
    """Rows that keep their distance from edges, bad pixels and each other, in the order drawn."""
    ny, nx = new.shape
    chosen: list[int] = []
    others = [] if taken is None else [(row["x"], row["y"]) for row in taken]
    reach = int(np.ceil(fwhm))
    for k, row in enumerate(truth):
        x, y = round(row["x"]), round(row["y"])
        if not (separation <= x < nx - separation and separation <= y < ny - separation):
            continue
        if new.mask[y - reach : y + reach + 1, x - reach : x + reach + 1].any():
            continue
        if others and np.min(np.hypot(*(np.array(others) - (row["x"], row["y"])).T)) < separation:
            continue
        others.append((row["x"], row["y"]))
        chosen.append(k)
    return np.array(chosen, dtype=np.intp)


def _flux_ratio(places: list[Sources], to_ref: ToRef) -> float:
    """F_new / F_ref, roughly: the median over sources that both images have."""
    new, ref = places
    distance, row = ref.nearest(*to_ref(new.x, new.y))
    same = (distance < 2.0) & (new.flux > np.median(new.flux))
    ratio = new.flux[same] / ref.flux[row[same]]
    return float(np.median(ratio[ratio > 0])) if (ratio > 0).any() else 1.0
