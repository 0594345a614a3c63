"""ZOGY on a real image: by tiles with local PSFs, with masks, and with the errors of the models counted as noise.

`zogy` holds the algebra of one frame. Here a frame becomes a tile with a border (so that the cyclic transforms leak
nothing into the part that is kept), each with the PSFs at its centre and its own scalar sigmas; bad pixels are treated
alike in both images; and S_corr is brought to unit width where it is not.

Everything that tiles hand back is scaled by sqrt(F_S) of its tile, so that it is continuous where tiles meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from batchproc.errors import SubtractError
from batchproc.imaging.zogy import apply_filters, fill_masked, make_filters
from batchproc.records import Difference, MaskBit, PsfLike

__all__ = ["SIDES", "ResidualModel", "Subtraction", "Tile", "blank_sky_width", "plan_tiles", "subtract"]

#: Sides of Fourier frames in pixels.
SIDES = (256, 512, 1024, 2048)

#: S_corr's histogram in receipts: counts on these edges.
HISTOGRAM_EDGES = np.arange(-8.0, 8.01, 0.25)


@dataclass(frozen=True)
class Tile:
    """Where one Fourier frame lies: it covers ``[fy : fy + side, fx : fx + side]`` and owns ``[y0:y1, x0:x1]``."""

    fy: int
    fx: int
    side: int
    y0: int
    y1: int
    x0: int
    x1: int


@dataclass(frozen=True)
class ResidualModel:
    """How badly static stars subtract, as variances of S relative to what ZOGY sees of the star itself.

    ``V_extra = amplitude² S_R² + shift² |∇S|²``, in units of S²; both measured on bright stars of the image.

    Attributes
    ----------
    amplitude : float
        Relative misfit of PSF and flux ratio.
    shift : float
        Rms misregistration in pixels, beyond what was handed in.
    n_stars : int
        Stars it was measured on; 0: not measured, both numbers are 0.
    """

    amplitude: float = 0.0
    shift: float = 0.0
    n_stars: int = 0


@dataclass(frozen=True)
class Subtraction:
    """A `Difference` and how it was made.

    Attributes
    ----------
    difference : Difference
    renormalisation : float
        Width of S_corr on blank sky before it was divided by it.
    residuals : ResidualModel
    histogram : ndarray (64,) int
        Counts of S_corr on blank sky, renormalised, on `HISTOGRAM_EDGES`.
    n_tiles : int
    """

    difference: Difference
    renormalisation: float
    residuals: ResidualModel
    histogram: NDArray[np.int64]
    n_tiles: int


def plan_tiles(shape: tuple[int, int], border: int, largest: int = 1024) -> tuple[Tile, ...]:
    """Cover an image with square frames of one size.

    The size is the one of 256, 512, 1024, 2048 (up to `largest`) that transforms the fewest pixels, borders included;
    few sizes mean few plans and little wisdom.

    Raises
    ------
    SubtractError
        When the border leaves less than a quarter of the largest tile's side.
    """
    sizes = [side for side in SIDES if side <= largest and side - 2 * border >= side // 4]
    if not sizes:
        raise SubtractError(
            f"a PSF stamp that needs a border of {border} pixels leaves {largest - 2 * border} of a tile of {largest}; "
            "use a larger subtract.tile or a smaller psf.size_fwhm",
            border=border,
            tile=largest,
        )

    def cost(side: int) -> float:
        frames = math.prod(-(-length // (side - 2 * border)) for length in shape)
        return frames * side**2 * math.log2(side)

    side = min(sizes, key=cost)
    core = side - 2 * border
    tiles = [
        Tile(y0 - border, x0 - border, side, y0, y1, x0, x1)
        for y0, y1 in _split(shape[0], core)
        for x0, x1 in _split(shape[1], core)
    ]
    return tuple(tiles)


def _split(length: int, core: int) -> Iterator[tuple[int, int]]:
    n = -(-length // core)
    edges = np.linspace(0, length, n + 1).round().astype(int)
    return zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def subtract(
    new: NDArray,
    ref: NDArray,
    psf_new: PsfLike,
    psf_ref: PsfLike,
    *,
    rms_new: NDArray,
    rms_ref: NDArray,
    flux_ratio: float,
    variance_new: NDArray | None = None,
    variance_ref: NDArray | None = None,
    mask_new: NDArray[np.uint8] | None = None,
    mask_ref: NDArray[np.uint8] | None = None,
    registration_sigma: tuple[float, float] = (0.0, 0.0),
    flux_ratio_error: float = 0.0,
    tile: int = 1024,
    renormalise: bool = True,
    star_residuals: bool = True,
) -> Subtraction:
    """Subtract ref from new on a common grid.

    Parameters
    ----------
    new, ref : ndarray (ny, nx)
        Background-subtracted, electrons. Not modified.
    psf_new, psf_ref : PsfLike
    rms_new, rms_ref : ndarray (ny, nx)
        Sky rms maps, electrons; each tile uses their medians in its filters.
    flux_ratio : float
        F_new / F_ref.
    variance_new, variance_ref : ndarray (ny, nx), optional
        Total variance, electrons²; default ``rms²``.
    mask_new, mask_ref : ndarray (ny, nx) uint8, optional
        Bits of `MaskBit`.
    registration_sigma, flux_ratio_error
        As in `zogy`.
    tile : int
        Largest side of a Fourier frame.
    renormalise : bool
        Divide S_corr by its measured width on blank sky.
    star_residuals : bool
        Measure a `ResidualModel` on bright stars and count it as variance.

    Raises
    ------
    SubtractError
        When no good pixel is left, or inputs do not fit together.
    """
    shape = new.shape
    if ref.shape != shape:
        raise SubtractError(f"new has shape {shape} and ref {ref.shape}: align ref first")
    no_mask = np.zeros(shape, np.uint8)
    mask_new = no_mask if mask_new is None else mask_new
    mask_ref = no_mask if mask_ref is None else mask_ref
    mask = mask_new | mask_ref
    if not (mask == 0).any():
        raise SubtractError(
            "no pixel is good in both new and ref: check the masks, and that the reference covers the image",
            n_bad_new=int(np.count_nonzero(mask_new)),
            n_bad_ref=int(np.count_nonzero(mask_ref)),
        )
    planes = _prepare(new, ref, mask_new, mask_ref, rms_new, rms_ref, variance_new, variance_ref, flux_ratio)

    border = (psf_new.size + psf_ref.size) // 2 + 1
    tiles = plan_tiles(shape, border, tile)
    out = {
        name: np.zeros(shape, np.float32)
        for name in ("difference", "score", "variance", "score_ref", "gradient2", "root_f_s")
    }
    sigma_x, sigma_y = registration_sigma
    astrometric = sigma_x > 0 or sigma_y > 0
    extra = np.zeros(shape, np.float32)
    kernels = []
    for t in tiles:
        centre = (t.x0 + t.x1 - 1) / 2, (t.y0 + t.y1 - 1) / 2
        own = np.s_[t.y0 : t.y1, t.x0 : t.x1]
        sigma_new, sigma_ref = _median_rms(rms_new, mask, own), _median_rms(rms_ref, mask, own)
        filters = make_filters(
            (t.side, t.side),
            psf_new.at(*centre),
            psf_ref.at(*centre),
            sigma_new=sigma_new,
            sigma_ref=sigma_ref,
            flux_ratio=flux_ratio,
        )
        fill = (0.0, 0.0, sigma_new**2, sigma_ref**2)
        scores = apply_filters(filters, *(_frame(p, t, v) for p, v in zip(planes, fill, strict=True)))
        inner = np.s_[t.y0 - t.fy : t.y1 - t.fy, t.x0 - t.fx : t.x1 - t.fx]
        f_s = filters.kernels.f_s
        out["difference"][own] = scores.difference[inner]
        out["score"][own] = scores.score[inner] / np.sqrt(f_s)
        out["variance"][own] = scores.variance[inner] / f_s
        out["score_ref"][own] = scores.score_ref[inner] / np.sqrt(f_s)
        out["gradient2"][own] = (scores.gradient2_x[inner] + scores.gradient2_y[inner]) / f_s
        out["root_f_s"][own] = np.sqrt(f_s)
        if astrometric:
            extra[own] += (sigma_x**2 * scores.gradient2_x[inner] + sigma_y**2 * scores.gradient2_y[inner]) / f_s
        kernels.append(replace(filters.kernels, x0=t.x0, x1=t.x1, y0=t.y0, y1=t.y1))

    extra += flux_ratio_error**2 * out["score_ref"] ** 2
    good = mask == 0
    residuals = ResidualModel()
    if star_residuals:
        residuals = measure_residuals(
            out["score"], out["variance"] + extra, out["score_ref"], out["gradient2"], good, round(psf_new.fwhm)
        )
        extra += residuals.amplitude**2 * out["score_ref"] ** 2 + residuals.shift**2 * out["gradient2"]
    score_corr = out["score"] / np.sqrt(out["variance"] + extra)
    score_corr[~good] = 0.0

    blank = good & (np.abs(out["score_ref"]) < 3.0) & (out["variance"] < 1.5)
    width = blank_sky_width(score_corr[blank]) if blank.any() else 1.0
    if renormalise:
        score_corr /= np.float32(width)
    flux = out["score"] / out["root_f_s"]
    flux_err = np.sqrt(out["variance"]) / out["root_f_s"]
    if renormalise:
        # What is too wide on blank sky is the noise, so the errors of fluxes share the factor.
        flux_err *= np.float32(width)
    outside = (mask & MaskBit.NO_DATA) != 0
    for image in (out["difference"], out["score"]):
        image[outside] = 0.0
    flux[outside], flux_err[outside] = np.nan, np.nan
    return Subtraction(
        difference=Difference(
            difference=out["difference"],
            score=out["score"] * out["root_f_s"],
            score_corr=score_corr,
            flux=flux,
            flux_err=flux_err,
            mask=mask,
            kernels=tuple(kernels),
        ),
        renormalisation=float(width),
        residuals=residuals,
        histogram=np.histogram(score_corr[blank], HISTOGRAM_EDGES)[0],
        n_tiles=len(tiles),
    )


def blank_sky_width(values: NDArray) -> float:
    """Robust standard deviation: half the distance between the 16th and the 84th percentile, in Gaussian units."""
    if values.size < 100:
        return 1.0
    low, high = np.percentile(values, [15.865525, 84.134475])
    width = float(high - low) / 2
    return width if width > 0 else 1.0


def measure_residuals(
    score: NDArray, variance: NDArray, score_ref: NDArray, gradient2: NDArray, good: NDArray[np.bool_], radius: int
) -> ResidualModel:
    """Fit ``S² = V + amplitude² S_R² + shift² |∇S|²`` on stars bright enough to show it.

    Each star gives one number: the excess of S² over V summed over its core, against the same sums of S_R² and |∇S|².
    Both coefficients are medians over stars (first the gradient's share is bounded by the steepest pixels, then the
    amplitude takes what is left at the peak), so that a few variable stars or transients do not drive them.
    """
    footprint = max(3, 2 * radius + 1)
    peak = (score_ref == maximum_filter(score_ref, footprint)) & good & (score_ref > 50)
    ys, xs = np.nonzero(peak)
    inside = (ys >= radius) & (xs >= radius) & (ys < score.shape[0] - radius) & (xs < score.shape[1] - radius)
    ys, xs = ys[inside], xs[inside]
    if ys.size < 5:
        return ResidualModel()
    order = np.argsort(-score_ref[ys, xs], kind="stable")[:500]
    offsets = np.arange(-radius, radius + 1)
    rows = ys[order][:, None, None] + offsets[None, :, None]
    columns = xs[order][:, None, None] + offsets[None, None, :]
    usable = good[rows, columns].all(axis=(1, 2))
    rows, columns = rows[usable], columns[usable]
    if len(rows) < 5:
        return ResidualModel()
    excess = (score[rows, columns].astype(np.float64) ** 2 - variance[rows, columns]).reshape(len(rows), -1)
    level2 = score_ref[rows, columns].astype(np.float64).reshape(len(rows), -1) ** 2
    slope2 = gradient2[rows, columns].astype(np.float64).reshape(len(rows), -1)
    # Two normal equations a star; weights 1 / level^4 would favour the wings, so stars are scaled by their own peak.
    scale = level2.max(axis=1, keepdims=True)
    excess, level2, slope2 = excess / scale, level2 / scale, slope2 / scale
    ll, ss, ls = (level2**2).sum(1), (slope2**2).sum(1), (level2 * slope2).sum(1)
    el, es = (excess * level2).sum(1), (excess * slope2).sum(1)
    determinant = np.maximum(ll * ss - ls**2, 1e-30)
    amplitude2 = max(float(np.median((el * ss - es * ls) / determinant)), 0.0)
    shift2 = max(float(np.median((es * ll - el * ls) / determinant)), 0.0)
    # The median of a one-degree chi-square is 0.455 of its mean: bring the medians to variances.
    return ResidualModel(
        amplitude=float(np.sqrt(amplitude2 / 0.455)), shift=float(np.sqrt(shift2 / 0.455)), n_stars=len(rows)
    )


def _prepare(
    new: NDArray,
    ref: NDArray,
    mask_new: NDArray[np.uint8],
    mask_ref: NDArray[np.uint8],
    rms_new: NDArray,
    rms_ref: NDArray,
    variance_new: NDArray | None,
    variance_ref: NDArray | None,
    flux_ratio: float,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """new, ref and their variances with bad pixels replaced alike, and nothing that is not finite."""
    bad_new, bad_ref = mask_new != 0, mask_ref != 0
    variance_new = np.square(rms_new) if variance_new is None else variance_new.copy()
    variance_ref = np.square(rms_ref) if variance_ref is None else variance_ref.copy()
    bad = bad_new | bad_ref
    if not bad.any():
        return new, ref, variance_new, variance_ref
    nothing = ((mask_new | mask_ref) & MaskBit.NO_DATA) != 0
    new, ref = fill_masked(
        np.where(bad_new, 0, new), np.where(bad_ref, 0, ref), bad_new & ~nothing, bad_ref & ~nothing, flux_ratio
    )
    new[nothing] = 0.0
    ref[nothing] = 0.0
    # A replaced pixel is known no better than by its own height: that keeps the surroundings of saturated stars quiet.
    variance_new[bad] = np.square(rms_new[bad]) + np.square(new[bad])
    variance_ref[bad] = np.square(rms_ref[bad]) + np.square(ref[bad])
    return new, ref, variance_new, variance_ref


def _median_rms(rms: NDArray, mask: NDArray[np.uint8], own: tuple[slice, slice]) -> float:
    values = rms[own][mask[own] == 0]
    values = values if values.size else rms[own].ravel()
    return float(np.median(values))


def _frame(plane: NDArray, t: Tile, fill: float) -> NDArray[np.float64]:
    """The tile's frame of a plane, `fill` outside the image."""
    frame = np.full((t.side, t.side), fill)
    y0, x0 = max(t.fy, 0), max(t.fx, 0)
    y1, x1 = min(t.fy + t.side, plane.shape[0]), min(t.fx + t.side, plane.shape[1])
    frame[y0 - t.fy : y1 - t.fy, x0 - t.fx : x1 - t.fx] = plane[y0:y1, x0:x1]
    return frame
