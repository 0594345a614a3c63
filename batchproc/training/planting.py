"""Transients put into images, and things that go wrong in images; what was put where is the truth to learn from.

The PSF of what is planted is our own, made from the moments of neighbouring stars: the pipeline is not told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.spatial import cKDTree

from batchproc.errors import ExposureError
from batchproc.imaging.background import measure_background
from batchproc.imaging.moments import fwhm_of, measure_moments
from batchproc.imaging.render import ParametricPsf
from batchproc.imaging.simulate import expected_snr
from batchproc.imaging.sources import Sources, find_sources
from batchproc.imaging.stars import find_stars
from batchproc.records import Exposure
from batchproc.training.defects import clip_bright, spoil

__all__ = ["PLANTED", "LocalPsf", "ToRef", "own_psf", "plant"]


#: ``flux`` in electrons of new, negative where light was lost; ``snr``: expected S/N in the difference, with
#: the noise of the light that it lies on.
PLANTED = np.dtype([*((n, np.float64) for n in ("x", "y", "flux", "snr")), ("kind", "U8")])

ToRef = Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]

FAINTEST = 6.0  # S/N of what is planted
EXTENDED = 1.6  # a galaxy has that many times the light of a star with the same middle
#: Of a star's light: what varies less is lost among what stars leave behind; and where they leave more.
LEAST_CHANGE, LEAST_CARELESS = 0.1, 0.4
_NEIGHBOURS = 12  # stars that tell the PSF of a place, where there are three times as many


def plant(
    new: Exposure,
    ref: Exposure,
    to_ref: ToRef,
    rng: np.random.Generator,
    *,
    n: int,
    separation: float = 24.0,
    defects: bool = False,
    careless: bool = False,
) -> tuple[Exposure, Exposure, NDArray]:
    """Both images with `n` transients or fewer, clear of each other and of bad pixels, and the truth (`PLANTED`).

    Of those that find room, some 40 % are alone, 20 % lie on extended sources, 40 % are stars that vary. One in five of
    the first two has vanished since the reference was taken. With `defects`, particle hits, hot pixels and trails
    besides (`spoil`). With `careless`, both images carry a PSF that is too narrow or too wide, and the bright stars of
    some have lost their cores without a mask that tells (`clip_bright`); none of these varies.
    """
    clipped = [np.zeros(exposure.shape, bool) for exposure in (new, ref)]
    if careless:
        (new, clipped[0]), (ref, clipped[1]) = (
            clip_bright(exposure, rng) if rng.uniform() < share else (exposure, lost)
            for exposure, lost, share in ((new, clipped[0], 0.15), (ref, clipped[1], 0.5))
        )
    lights: list[NDArray] = []
    places, psfs, sigmas, variances = [], [], [], []
    for exposure in (new, ref):
        sky = measure_background(exposure.data, exposure.mask != 0)
        data = exposure.data - sky.level
        lights.append(data)
        psfs.append(own_psf(data, sky.rms, exposure, rng))
        sigmas.append(sky.global_rms)
        places.append(find_sources(data, sky.rms, exposure.mask))
        variances.append(sky.global_rms**2 + np.maximum(uniform_filter(data, 3), 0))
    scale = _flux_ratio(places, to_ref)
    blank: dict[str, Any] = {
        "psf_new": psfs[0].typical,
        "psf_ref": psfs[1].typical,
        "sigma_new": sigmas[0],
        "sigma_ref": sigmas[1],
    }
    on_sky = 1 / float(expected_snr(1.0, **blank, flux_ratio=scale)[0])
    least = LEAST_CARELESS if careless else LEAST_CHANGE
    truth = _draw(lights[0], on_sky, places[0], psfs[0], rng, 6 * n, least)
    usable = (new.mask == 0) & ~clipped[0], (ref.mask == 0) & ~clipped[1]
    truth = truth[_clear(truth, usable, to_ref, psfs[0].fwhm, separation)[: 2 * n]]
    x_ref, y_ref = to_ref(truth["x"], truth["y"])
    noise = 1 / expected_snr(
        1.0,
        truth["x"],
        truth["y"],
        xy_ref=(x_ref, y_ref),
        psf_new=psfs[0],
        psf_ref=psfs[1],
        sigma_new=sigmas[0],
        sigma_ref=sigmas[1],
        variance_new=variances[0],
        variance_ref=variances[1],
        flux_ratio=scale,
    )
    varies = truth["kind"] == "variable"
    truth["flux"] *= np.where(varies, 1.0, noise)  # those that do not vary were drawn by their S/N
    truth["snr"] = np.abs(truth["flux"]) / noise
    truth = truth[(truth["snr"] >= FAINTEST) & _leaves_light(truth, lights[0], sigmas[0], psfs[0])][:n]

    lost = truth["kind"] == "vanished"
    x_ref, y_ref = to_ref(truth["x"], truth["y"])
    gained = truth[~lost]
    new = _with_sources(new, psfs[0], gained["x"], gained["y"], gained["flux"], rng)
    ref = _with_sources(ref, psfs[1], x_ref[lost], y_ref[lost], -truth["flux"][lost] / scale, rng)
    if defects:
        megapixels = new.data.size / 1e6
        new = spoil(new, sigmas[0], psfs[0].fwhm, rng, hits=round(50 * megapixels), hot=round(15 * megapixels))
        ref = spoil(ref, sigmas[1], psfs[1].fwhm, rng, hits=round(5 * megapixels), hot=round(15 * megapixels))
    if careless:
        off = [replace(psf.typical, fwhm=psf.fwhm * np.exp(rng.normal(0, 0.06))) for psf in psfs]
        new, ref = replace(new, psf=off[0]), replace(ref, psf=off[1])
    return new, ref, truth


def _leaves_light(truth: NDArray, light: NDArray, sigma: float, psf: LocalPsf) -> NDArray[np.bool_]:
    """False for stars that lose more than they have, because part of what shines in their middle is a neighbour's."""
    smooth = uniform_filter(light, 3)
    row, column = np.rint(truth["y"]).astype(int), np.rint(truth["x"]).astype(int)
    half = psf.size // 2
    core = np.s_[half - 1 : half + 2, half - 1 : half + 2]
    lost = [flux * psf.at(x, y)[core].mean() for x, y, flux in zip(truth["x"], truth["y"], truth["flux"], strict=True)]
    return np.asarray((truth["kind"] != "variable") | (smooth[row, column] + lost > -sigma))


def _with_sources(
    exposure: Exposure, psf: LocalPsf, x: NDArray, y: NDArray, flux: NDArray, rng: np.random.Generator
) -> Exposure:
    """The exposure with more light, and the photon noise that light brings; light taken away leaves the noise."""
    light = np.zeros(exposure.shape)
    for source in zip(x, y, flux, strict=True):
        column, row, electrons = (np.array([value]) for value in source)
        psf.here(float(column[0]), float(row[0])).paint(light, column, row, electrons, 0.01)
    light = np.minimum(light, 0) + rng.poisson(np.maximum(light, 0))
    return replace(exposure, data=(exposure.data + light).astype(np.float32))


# --- The PSF ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalPsf:
    """A Moffat profile at each place with the size and elongation of the stars around it; a `PsfLike`.

    Attributes
    ----------
    typical : ParametricPsf
        That of the whole image.
    stars : ndarray (n, 2)
        Places (x, y) of stars.
    shapes : ndarray (n, 3)
        Their FWHM in pixels, and the two components of their ellipticity.
    off : (float, float)
        Factors by which FWHM and axis ratio of what is planted differ from those of the stars.
    """

    typical: ParametricPsf
    stars: NDArray[np.float64]
    shapes: NDArray[np.float64]
    off: tuple[float, float]

    @property
    def fwhm(self) -> float:
        """Of the whole image, pixels."""
        return self.typical.fwhm

    @property
    def size(self) -> int:
        """Side of the stamps, pixels."""
        return self.typical.size

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """Stamp ``(size, size)`` at pixel (x, y): centred, unit sum."""
        return self.here(x, y).at(x, y)

    def here(self, x: float, y: float) -> ParametricPsf:
        """The profile at pixel (x, y)."""
        if len(self.stars) < 3 * _NEIGHBOURS:
            return self.typical
        near = self._tree.query((x, y), _NEIGHBOURS)[1]
        return _profile(self.shapes[near], self.off, self.typical.beta)

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.stars)


def own_psf(data: NDArray, rms: NDArray, exposure: Exposure, rng: np.random.Generator) -> LocalPsf:
    """Moffat profiles of the size and elongation of the image's stars, a few per cent off; no fit to any star.

    Raises `ExposureError` where there is none.
    """
    table = find_stars(data, rms, exposure.mask, saturation=exposure.saturation).table
    if not len(table):
        raise ExposureError(f"{exposure.meta.get('path')}: no star from which to tell how wide what is planted must be")
    trace = (table["xx"] + table["yy"]) / 2
    shapes = np.column_stack(
        [table["fwhm"], (table["xx"] - table["yy"]) / 2 / trace, table["xy"] / trace],
    )
    beta = float(rng.uniform(2.8, 4.5))
    # A FWHM from moments is that of the Gaussian which has them; a Moffat profile that has them is narrower.
    off = float(rng.uniform(0.97, 1.03)) / _moment_width(beta), float(rng.uniform(0.96, 1.04))
    typical = _profile(shapes, off, beta)
    return LocalPsf(typical, np.column_stack([table["x"], table["y"]]), shapes, off)


def _moment_width(beta: float, fwhm: float = 4.0) -> float:
    """FWHM from moments of a Moffat profile, over its own."""
    stamp = ParametricPsf(fwhm, beta=beta, size=81).at(0, 0)
    middle = np.array([40.0])
    return float(fwhm_of(measure_moments(stamp.astype(np.float32), middle, middle, fwhm=fwhm))[0]) / fwhm


def _profile(shapes: NDArray[np.float64], off: tuple[float, float], beta: float | None) -> ParametricPsf:
    """That of the median star; `shapes` are rows of FWHM and the two components of the ellipticity."""
    fwhm, e1, e2 = np.median(shapes, axis=0)
    e = min(float(np.hypot(e1, e2)), 0.9)
    # Moments are those within a window: they round the shape a little.
    return ParametricPsf(
        float(fwhm) * off[0],
        beta=beta,
        axis_ratio=float(np.clip(np.sqrt((1 - e) / (1 + e)) * off[1], 0.3, 1.0)),
        theta=float(np.degrees(np.arctan2(e2, e1)) / 2),
    )


# --- Where, what and how bright ---------------------------------------------------------------------------------------


def _draw(
    light: NDArray,
    noise: float,
    sources: Sources,
    psf: LocalPsf,
    rng: np.random.Generator,
    n: int,
    least: float,
) -> NDArray:
    """Places and kinds of `n`, more than will find room; ``flux`` is their S/N yet, but for those that vary.

    `noise` is that of a flux on blank sky; stars vary that are bright enough for half of their light to be seen, by
    the fraction `least` of it or more.
    """
    truth = np.zeros(n, PLANTED)
    share = rng.uniform(size=n)
    ny, nx = light.shape
    truth["x"], truth["y"] = rng.uniform(0, nx - 1, n), rng.uniform(0, ny - 1, n)
    truth["kind"] = "new"
    truth["flux"] = np.exp(rng.uniform(np.log(FAINTEST), np.log(150), n))

    # By the pixel in their middle: what a total flux has of neighbours, or of a galaxy, is not a star's to lose.
    row, column = (
        np.clip(np.rint(place).astype(int), 0, side - 1) for place, side in ((sources.y, ny), (sources.x, nx))
    )
    flux = light[row, column] / [psf.at(x, y).max() for x, y in zip(sources.x, sources.y, strict=True)]
    extended = np.flatnonzero(sources.flux > EXTENDED * np.maximum(flux, 0))
    hosts = np.flatnonzero((sources.flux < EXTENDED * flux) & (flux > 2 * FAINTEST * noise))
    on_galaxy = (share > 0.4) & (share < 0.6) if len(extended) else np.zeros(n, bool)
    chosen = rng.choice(extended, on_galaxy.sum()) if len(extended) else extended
    spread = rng.normal(0, 0.4, (2, on_galaxy.sum())) * sources.fwhm[chosen]
    truth["x"][on_galaxy], truth["y"][on_galaxy] = sources.x[chosen] + spread[0], sources.y[chosen] + spread[1]

    lost = (share < 0.12) | ((share > 0.4) & (share < 0.44))
    truth["kind"][lost] = "vanished"
    truth["flux"][lost] *= -1

    varies = (share > 0.6) if len(hosts) else np.zeros(n, bool)
    bright = np.maximum(flux[hosts], 0) ** 0.3  # most are faint: bright ones, too, shall be seen to vary
    host = rng.choice(hosts, varies.sum(), p=bright / bright.sum()) if len(hosts) else hosts
    change = flux[host] * np.exp(rng.uniform(np.log(least), np.log(2), len(host)))
    truth["x"][varies], truth["y"][varies] = sources.x[host], sources.y[host]
    fades = (rng.uniform(size=len(host)) < 0.7) & (change < 0.9 * flux[host])
    truth["flux"][varies] = np.where(fades, -change, change)
    truth["kind"][varies] = "variable"
    return truth


def _clear(
    truth: NDArray,
    usable: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    to_ref: ToRef,
    fwhm: float,
    separation: float,
) -> NDArray[np.intp]:
    """Rows that keep their distance from edges, unusable pixels and each other, in the order drawn."""
    ny, nx = usable[0].shape
    chosen: list[int] = []
    others: list[tuple[float, float]] = []
    reach = int(np.ceil(fwhm))
    places = truth["x"], truth["y"], *to_ref(truth["x"], truth["y"])
    for k, (x, y, x_ref, y_ref) in enumerate(np.column_stack(places)):
        if not (separation <= round(x) < nx - separation and separation <= round(y) < ny - separation):
            continue
        if not (_all_around(usable[0], x, y, reach) and _all_around(usable[1], x_ref, y_ref, reach)):
            continue
        if others and np.min(np.hypot(*(np.array(others) - (x, y)).T)) < separation:
            continue
        others.append((x, y))
        chosen.append(k)
    return np.array(chosen, dtype=np.intp)


def _all_around(plane: NDArray[np.bool_], x: float, y: float, reach: int) -> bool:
    """Whether all pixels within `reach` of (x, y) are true; those beyond the edge count as such."""
    column, row = round(x), round(y)
    return bool(plane[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1].all())


def _flux_ratio(places: list[Sources], to_ref: ToRef) -> float:
    """F_new / F_ref, roughly: the median over sources that both images have."""
    new, ref = places
    distance, row = ref.nearest(*to_ref(new.x, new.y))
    same = (distance < 2.0) & (new.flux > np.median(new.flux))
    ratio = new.flux[same] / ref.flux[row[same]]
    return float(np.median(ratio[ratio > 0])) if (ratio > 0).any() else 1.0
