"""Detection: one row for each significant extremum of S_corr, of either sign, measured on D.

    S_corr → peaks → position, flux, shape (`measure`) → nature and surroundings (`features`) → flags

Electrons throughout; `batchproc.flow` turns them into the units of the file and adds what needs a header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.config import DetectConfig
from batchproc.errors import SubtractError
from batchproc.imaging.cutouts import windows
from batchproc.imaging.features import (
    broad_test,
    dipole,
    distance_to_pixels,
    on_streak,
    score_response,
    shift_test,
    without_holes,
)
from batchproc.imaging.measure import PointSource, aperture_sum, fit_position, moments
from batchproc.imaging.particles import MARGIN, delta_test, track_test
from batchproc.imaging.peaks import find_basins, pixels_above
from batchproc.imaging.sources import BrightStars, Sources, bright_stars, find_sources
from batchproc.imaging.trails import find_trails, on_trails, table
from batchproc.records import CATALOGUE, Difference, Flag, Kernels, MaskBit

__all__ = ["BrightStars", "Candidates", "Sources", "bright_stars", "detect", "find_peaks", "find_sources"]

#: Rows measured at once: bounds the memory.
_CHUNK = 2000


@dataclass(frozen=True)
class Candidates:
    """Detections, one row each, in the order of their peaks (row by row of the image).

    Attributes
    ----------
    columns : mapping of str to ndarray (n,)
        The columns of `batchproc.records.CATALOGUE` that need nothing but pixels: x, y, xy_err, scorr, flux, flux_err,
        aper_flux, aper_flux_err, fwhm, elongation, theta, chi2, dipole, delta_new, delta_ref, edge_distance,
        mask_distance, bright_distance, ref_flux, ref_distance, ref_fwhm, sigma_new, sigma_ref, flags. Fluxes and sigmas
        are in electrons of new, except ref_flux and sigma_ref: electrons of ref as it was handed in.
    f_d : ndarray (n,)
        F_D of the tile that each lies in: D / F_D is in electrons of new.
    trails : tuple of dict
        Satellites and other straight lines, each one object (`batchproc.imaging.trails.table`). Candidates on them
        carry `Flag.STREAK`.
    """

    columns: Mapping[str, NDArray]
    f_d: NDArray[np.float64]
    trails: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.f_d)

    def __getitem__(self, name: str) -> NDArray:
        return self.columns[name]


def detect(
    difference: Difference,
    *,
    config: DetectConfig | None = None,
    sources: Sources | None = None,
    bright: BrightStars | None = None,
) -> Candidates:
    """Find and measure what changed.

    Parameters
    ----------
    difference : Difference
        Not modified.
    config : DetectConfig, optional
    sources : Sources, optional
        Of the reference, on the grid of new (`find_sources`): hosts and nearest neighbours.
    bright : BrightStars, optional
        Stars whose residuals are to be flagged (`bright_stars`, and saturated ones).

    Returns
    -------
    Candidates

    Raises
    ------
    SubtractError
        When more than ``config.max_candidates`` are found: then the subtraction has failed.
    """
    config = config or DetectConfig()
    x, y, prominence = find_peaks(difference.score_corr, config)
    fwhm = PointSource(difference.psf).fwhm
    # A trail too faint to be elongated at any one detection shows in the line-up of weak peaks.
    trails = find_trails(difference.score_corr, fwhm) if len(x) else []
    # A bright trail is one object, not a row for each bump on it; what stands out of it is.
    sign = np.sign(difference.score_corr[y, x])
    stands_out = ~on_trails(trails, x, y, fwhm, sign) | (prominence > config.threshold)
    x, y = x[stands_out], y[stands_out]
    columns, psf_fwhm, f_d = _measure(difference, x, y, _nearest(sources, x, y))
    keep = _without_doubles(columns, 0.5 * psf_fwhm)
    x, y, psf_fwhm, f_d = x[keep], y[keep], psf_fwhm[keep], f_d[keep]
    columns = {name: values[keep] for name, values in columns.items()}
    columns |= _surroundings(columns["x"], columns["y"], difference.mask, sources, bright)
    streak = on_streak(difference.score_corr, x, y, psf_fwhm, columns["psf_elongation"])
    streak |= on_trails(trails, x, y, fwhm, np.sign(columns["scorr"]))
    columns["flags"] = _flags(columns, psf_fwhm, streak, difference.mask, bright)
    dtypes = {column.name: column.dtype for column in CATALOGUE}
    columns = {name: columns[name].astype(dtypes[name]) for name in dtypes if name in columns}
    return Candidates(columns, f_d, tuple(table(trails, difference, fwhm)))


def find_peaks(
    score_corr: NDArray, config: DetectConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pixels of the significant extrema of S_corr, both signs, in the order of the image.

    A second peak of the same island above the threshold counts where it rises by a sigma above the saddle between them:
    noise hardly makes such a dip between two places that share its correlation, and a blend that shows less of one is
    no two sources.

    Parameters
    ----------
    score_corr : ndarray (ny, nx)
        In sigma; what is not finite counts as 0.
    config : DetectConfig

    Returns
    -------
    x, y : ndarray (n,) of int
    prominence : ndarray (n,)
        Height of each above the saddle to a higher one, sigma; inf for the highest of its island.

    Raises
    ------
    SubtractError
        When there are more than ``config.max_candidates``.
    """
    ny, nx = score_corr.shape
    pixels = pixels_above(score_corr, config.threshold)
    if len(pixels) > max(10_000, 0.2 * np.count_nonzero(score_corr)):
        raise _too_many(f"{len(pixels)} of {score_corr.size} pixels", len(pixels), config)
    basins = find_basins(pixels, score_corr.ravel()[pixels], (ny, nx), prominence=1.0)
    if len(basins.peak) > config.max_candidates:
        raise _too_many(f"{len(basins.peak)} sources", len(basins.peak), config)
    order = np.argsort(basins.peak)
    y, x = np.divmod(basins.peak[order], nx)
    return x, y, basins.prominence[order]


def _too_many(found: str, number: int, config: DetectConfig) -> SubtractError:
    return SubtractError(
        f"{found} above {config.threshold:g} sigma, allowed are {config.max_candidates} sources: the subtraction has "
        "failed (alignment, PSF or background), this is no sky full of transients. Look at the difference image; "
        "if it is good, raise detect.max_candidates or detect.threshold",
        found=number,
        allowed=config.max_candidates,
        threshold=config.threshold,
        stage="detect",
    )


def _nearest(sources: Sources | None, x: NDArray, y: NDArray) -> NDArray[np.float64]:
    """Where the nearest source of the reference is, relative to each position: (n, 2), pixels; inf without one."""
    if sources is None or len(sources) == 0:
        return np.full((len(x), 2), np.inf)
    _, row = sources.nearest(x, y)
    return np.column_stack([sources.x[row] - x, sources.y[row] - y])


def _white_width(difference: Difference) -> float:
    """Width of D on blank sky over that of S, which a matched filter made of it: 1 where the noise of D is white."""
    values = []
    for k in difference.kernels:
        part = np.s_[k.y0 : k.y1 : 7, k.x0 : k.x1 : 7]
        blank = (
            (difference.mask[part] == 0) & (np.abs(difference.score_corr[part]) < 3) & (difference.flux_err[part] > 0)
        )
        values.append(difference.difference[part][blank] / (difference.flux_err[part][blank] * np.sqrt(k.f_s)))
    sample = np.concatenate(values)
    if sample.size < 100:
        return 1.0
    width = float(np.diff(np.percentile(sample, [15.865525, 84.134475]))[0] / 2)
    return min(max(width, 0.5), 2.0)  # beyond that it is no noise


def _measure(
    difference: Difference, x: NDArray[np.int64], y: NDArray[np.int64], star: NDArray[np.float64]
) -> tuple[dict[str, NDArray], NDArray[np.float64], NDArray[np.float64]]:
    """Columns that a detection's own pixels give, with P_D's FWHM and F_D at each."""
    n = len(x)
    columns: dict[str, NDArray] = {}
    psf_fwhm, f_d = np.zeros(n), np.zeros(n)
    for kernels, rows in _by_tile(difference, x, y):
        source = PointSource(kernels.psf)
        psf_fwhm[rows], f_d[rows] = source.fwhm, kernels.f_d
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            for name, values in _measure_in_tile(difference, kernels, source, x[part], y[part], star[part]).items():
                columns.setdefault(name, np.zeros(n))[part] = values
    if n == 0:  # the same columns, empty
        kernels = difference.kernels[0]
        columns = _measure_in_tile(difference, kernels, PointSource(kernels.psf), x, y, star)
    else:
        columns["chi2"] /= _white_width(difference) ** 2
    return columns, psf_fwhm, f_d


def _by_tile(
    difference: Difference, x: NDArray[np.int64], y: NDArray[np.int64]
) -> Iterator[tuple[Kernels, NDArray[np.int64]]]:
    """Each tile with the rows of the detections that it owns."""
    for k in difference.kernels:
        rows = np.flatnonzero((x >= k.x0) & (x < k.x1) & (y >= k.y0) & (y < k.y1))
        if len(rows):
            yield k, rows


def _measure_in_tile(
    difference: Difference,
    kernels: Kernels,
    source: PointSource,
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    star: NDArray[np.float64],
) -> dict[str, NDArray]:
    """The same for detections of one tile."""
    n = len(x)
    scorr = np.asarray(difference.score_corr[y, x], dtype=np.float64)
    sign = np.sign(scorr)
    signed = sign[:, None, None]
    root_f_s = np.sqrt(kernels.f_s)

    wide_half = max(source.half, int(np.ceil(3 * source.fwhm)), 2 * MARGIN)  # all that there is of a source
    wide = signed * np.nan_to_num(windows(difference.difference, x, y, wide_half).astype(np.float64))
    half = source.half
    rim = wide_half - half
    data = wide[:, rim : rim + 2 * half + 1, rim : rim + 2 * half + 1]

    # Position. V(S) / F_S is 1 on blank sky and tells how much noisier D is on a source.
    variance = np.square(windows(difference.flux_err, x, y, half, np.nan).astype(np.float64)) * kernels.f_s
    good = np.isfinite(variance) & (variance > 0) & (windows(difference.mask, x, y, half, 1) == 0)
    fit = fit_position(data, np.divide(1.0, variance, out=np.zeros_like(variance), where=good), source)
    noise = np.sqrt(np.where(good[:, half, half], variance[:, half, half], 1.0))  # at the peak, over that of blank sky

    # Flux: S at the fitted place (E16) is what alpha (E41) would be between the pixels. That place is where noise and
    # source together are highest, which lifts the flux by 1 / (S/N)² (Portillo et al. 2020, AJ 159, 165;
    # doi:10.3847/1538-3881/ab76ba).
    at_fit = kernels.f_d / root_f_s * np.einsum("nij,nij->n", wide, source.shifted(fit.dx, fit.dy, wide_half))
    # At the edge of an image the fit may land where S is nothing: then the flux is that of the peak's own pixel.
    score = signed * np.nan_to_num(windows(difference.flux, x, y, half).astype(np.float64)) * root_f_s  # E41
    at_fit = np.where(at_fit > 2 * noise, at_fit, score[:, half, half])
    unbiased = at_fit * (1.0 - np.minimum(noise / np.maximum(at_fit, noise), 0.5) ** 2)

    height = np.maximum(at_fit, score[:, half, half])
    hits = {
        which: delta_test(wide, height, noise, kernel, source.psf)
        for which, kernel in (("new", kernels.delta_new), ("ref", kernels.delta_ref))
    }
    near = np.hypot(*star.T) < 1.5 * source.fwhm
    shifted = np.zeros(n, bool)
    _, *slopes = source.with_slopes(star[near, 0], star[near, 1], wide_half)
    shifted[near] = shift_test(wide[near], height[near], *slopes)
    fwhm, elongation, theta = moments(data, fit.dx, fit.dy, source.fwhm)
    aperture, aperture_err = aperture_sum(data, np.where(good, variance, 0.0), good, fit.dx, fit.dy, source)
    return {
        "x": x + fit.dx,
        "y": y + fit.dy,
        "xy_err": fit.error,
        "scorr": scorr,
        "flux": sign * unbiased / root_f_s,
        "flux_err": noise / root_f_s,  # E43
        "aper_flux": sign * aperture / kernels.f_d,
        "aper_flux_err": aperture_err / kernels.f_d,
        "fwhm": fwhm,
        "elongation": elongation,
        "theta": theta,
        "chi2": fit.chi2,
        "dipole": dipole(score, noise, score_response(source.psf, half), 1.5 * source.fwhm),
        "delta_new": hits["new"][0],
        "delta_ref": hits["ref"][0],
        "sigma_new": np.full(n, kernels.sigma_new),
        "sigma_ref": np.full(n, kernels.sigma_ref),
        "psf_elongation": np.full(n, source.elongation),
        "n_pixels": fit.n_pixels,
        "hit_new": hits["new"][1] | track_test(wide, height, noise, kernels.delta_new),
        "hit_ref": hits["ref"][1] | track_test(wide, height, noise, kernels.delta_ref),
        "broad": broad_test(wide, height, noise, source.psf, source.fwhm),
        "shifted": shifted,
    }


def _without_doubles(columns: Mapping[str, NDArray], reach: NDArray) -> NDArray[np.int64]:
    """Rows to keep, in order: of two of one sign closer than `reach` (peaks of one source) the more significant."""
    if len(reach) == 0:
        return np.arange(0)
    tree = cKDTree(np.column_stack([columns["x"], columns["y"]]))
    pairs = tree.query_pairs(float(reach.max()), output_type="ndarray")
    x, y, scorr = (columns[name][pairs] for name in ("x", "y", "scorr"))  # (n_pairs, 2)
    close = np.hypot(x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]) < reach[pairs].min(axis=1)
    double = close & (scorr[:, 0] * scorr[:, 1] > 0)
    weaker = np.where(np.abs(scorr[:, 0]) < np.abs(scorr[:, 1]), pairs[:, 0], pairs[:, 1])[double]
    return np.setdiff1d(np.arange(len(reach)), weaker)


def _surroundings(
    x: NDArray, y: NDArray, mask: NDArray[np.uint8], sources: Sources | None, bright: BrightStars | None
) -> dict[str, NDArray]:
    """Columns that tell what is near."""
    ny, nx = mask.shape
    border = np.minimum.reduce([x + 0.5, y + 0.5, nx - 0.5 - x, ny - 0.5 - y])
    uncovered = without_holes((mask & MaskBit.NO_DATA) != 0)
    columns = {
        "edge_distance": np.maximum(np.minimum(border, distance_to_pixels(uncovered, x, y)), 0.0),
        "mask_distance": distance_to_pixels(mask != 0, x, y),
        "bright_distance": np.full(len(x), np.inf) if bright is None else bright.nearest(x, y),
        "ref_flux": np.full(len(x), np.nan),
        "ref_distance": np.full(len(x), np.inf),
        "ref_fwhm": np.full(len(x), np.nan),
    }
    if sources is not None and len(sources):
        columns["ref_distance"], row = sources.nearest(x, y)
        columns["ref_flux"], columns["ref_fwhm"] = sources.flux[row], sources.fwhm[row]
    return columns


def _flags(
    columns: Mapping[str, NDArray],
    psf_fwhm: NDArray,
    streak: NDArray[np.bool_],
    mask: NDArray[np.uint8],
    bright: BrightStars | None,
) -> NDArray[np.int32]:
    """Bits of `Flag`.

    ============  ======================================================================================================
    EDGE          within 1.5 FWHM (of P_D, as below) of the edge of the image or of the area with data
    MASKED        a masked pixel within half a FWHM and half a pixel: under the core
    SATURATED     a saturated pixel within 2 FWHM
    BRIGHT_STAR   within the radius of a star of `bright`
    DIPOLE        ``dipole`` above 0.5; or the nearest star of the reference, moved a little, explains it better than a
                  source does (`shift_test`)
    COSMIC_RAY    ``delta_new`` above 1, a point source excluded by 3 sigma (`delta_test`), or a track (`track_test`);
                  and the detection is positive, or negative and new's (dead) pixel fits it where ref's does not
    HOT_PIXEL_REF ``delta_ref`` above 1, a point source excluded by 3 sigma, or a track; and the detection is negative,
                  or positive and ref's (dead) pixel fits it where new's does not
    STREAK        `on_streak`, or on one of the trails of `find_trails`
    BAD_FIT       chi-square of the ν degrees of freedom above ``ν + 6 √(2 ν) + (0.1 S/N)²``: the noise, and a PSF that
                  is wrong by a tenth (in the root mean square under the fit) must not make it; or a patch much wider
                  than the PSF (`broad_test`)
    ============  ======================================================================================================
    """
    x, y, scorr = columns["x"], columns["y"], columns["scorr"]
    saturated = distance_to_pixels((mask & MaskBit.SATURATED) != 0, x, y)
    hit_new, hit_ref = columns["hit_new"] > 0, columns["hit_ref"] > 0
    freedom = np.maximum(columns["n_pixels"] - 3.0, 1.0)
    allowed = freedom + 6 * np.sqrt(2 * freedom) + (0.1 * scorr) ** 2
    rules = {
        Flag.EDGE: columns["edge_distance"] < 1.5 * psf_fwhm,
        Flag.MASKED: columns["mask_distance"] <= 0.5 * psf_fwhm + 0.5,
        Flag.SATURATED: saturated <= 2 * psf_fwhm,
        Flag.BRIGHT_STAR: np.zeros(len(x), bool) if bright is None else bright.cover(x, y),
        Flag.DIPOLE: (columns["dipole"] > 0.5) | (columns["shifted"] > 0),
        Flag.COSMIC_RAY: hit_new & ((scorr > 0) | ~hit_ref),
        Flag.HOT_PIXEL_REF: hit_ref & ((scorr < 0) | ~hit_new),
        Flag.STREAK: streak,
        Flag.BAD_FIT: ~(columns["chi2"] * freedom <= allowed) | (columns["broad"] > 0),  # NaN is no good fit
    }
    return sum((np.where(hit, np.int32(bit), np.int32(0)) for bit, hit in rules.items()), np.zeros(len(x), np.int32))
