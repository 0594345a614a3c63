"""Measuring the PSF of an image from its stars.

In turn, until they agree: each star's flux, position and sky from the model; the model from the stars. The model's
pixel values are the least-squares solution over all pixels of all stars at their sub-pixel places (the idea of
Anderson & King 2000, PASP 112, 1360, solved as one linear problem). What noise left in it is then shrunk, scale by
scale.

Stars are chosen in `stars`; the model itself, and PSFs from files, are in `psf_model`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from batchproc.config import PsfConfig
from batchproc.errors import PsfError
from batchproc.imaging.moments import measure_moments
from batchproc.imaging.polynomial import Frame, n_terms
from batchproc.imaging.psf_model import (
    MAX_SIZE,
    EllipticalProfile,
    PsfModel,
    centring_offset,
    edge_taper,
    ellipticity,
    half_maximum_width,
)
from batchproc.imaging.psf_stamps import SKY_ERROR, Misfit, StarStamps, cut_stars, fit_stars, recentred, solve_planes
from batchproc.imaging.shrink import shrink
from batchproc.imaging.stars import Stars, find_stars, log_shape

__all__ = ["PsfModel", "Stars", "find_stars", "fit_psf"]

#: Rounds of stars from the model, model from the stars.
_ROUNDS = 4
#: Stars that tell the exponent of the smooth profile.
_FOR_EXPONENT = 40
#: Stars that tell how far the wings reach.
_FOR_WINGS = 30
#: A star of this S/N, or the brightest one of the image where that is fainter, loses at most a source of this S/N to
#: the end of the stamp.
_WINGS_OF_SNR, _CUT_OFF = 2000.0, 0.6

#: Wings begin so many FWHM from the star; a star with so many times the usual light about it does not tell of them.
_WING_FWHM, _TOO_MUCH = 2.0, 3.0
#: A misfit of the core below this part of the peak is no reason to leave a star out.
_MISFIT = 0.02


@dataclass(frozen=True)
class _Draft:
    """A model under construction: `PsfModel` without its finish."""

    frame: Frame
    profile: EllipticalProfile
    planes: NDArray[np.float64]
    degree: int

    def basis(self, stars: StarStamps) -> NDArray[np.float64]:
        """Values (n, n_terms) of the polynomial terms at the stars."""
        return self.frame.terms(stars.x, stars.y, self.degree)

    def recentred(self, raw: StarStamps, stars: StarStamps) -> StarStamps:
        """The stars' pixels moved to the middle of their stamps."""
        return recentred(raw, stars, self.profile.matrix(self.frame, stars.x, stars.y), self.profile.beta)

    def fit(self, stars: StarStamps, n_iter: int) -> tuple[StarStamps, Misfit]:
        """The stars as this model sees them, and what it leaves of them."""
        return fit_stars(stars, self.basis(stars), self.planes, n_iter=n_iter)


def fit_psf(
    data: NDArray[np.floating],
    variance: NDArray[np.floating] | None,
    mask: NDArray[np.integer] | None,
    *,
    rms: NDArray[np.floating],
    saturation: float = float("inf"),
    config: PsfConfig | None = None,
    stars: Stars | None = None,
) -> PsfModel:
    """The PSF of an image, varying across it where there are stars enough to say so.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image in electrons.
    variance : ndarray (ny, nx) or None
        Total variance of a pixel in electrons², sources included. It tells how many electrons² a source adds per
        electron; ``None``: one, as for a single exposure.
    mask : ndarray (ny, nx) or None
        Non-zero is bad.
    rms : ndarray (ny, nx)
        Sky noise of a pixel in electrons.
    saturation : float
        Level above the sky, in electrons, at which pixels saturate.
    config : PsfConfig
    stars : Stars, optional
        What `find_stars` found in this image, where that is known already.

    Returns
    -------
    PsfModel
        Its `quality`: ``n_stars`` used; ``n_found``, candidates that were fit to use; ``n_detected``, sources of any
        kind; ``degree`` of the polynomial in (x, y); ``chi2``, median reduced chi-square of the stars' cores (1 % of
        the model counted as noise); ``residual``, rms of star minus model in the core over the peak, noise taken off,
        median of the stars for which it can be told; ``ellipticity``, 1 − b/a at the centre.

    Raises
    ------
    PsfError
        Fewer usable stars than ``config.min_stars``.
    """
    config = config or PsfConfig()
    found = stars if stars is not None else find_stars(data, rms, mask, saturation=saturation, config=config)
    _enough(len(found), found, config)
    frame = Frame.of_image(data.shape)
    varying = len(found) >= config.min_stars_varying
    profile = _profile(found, frame, config.max_degree if varying else 0)
    raw = cut_stars(data, rms, mask, found, _stamp_size(data, rms, mask, found, config))
    raw = replace(raw, photons=_photons_per_electron(raw, variance, rms))
    draft = _fit_profile(profile, frame, raw)
    # Many stars average what lies about them, and say themselves what their wings are.
    raw = raw if varying else _told_from_neighbours(draft, raw)
    draft, fitted = _solve(draft, raw, config, varying)
    return _finish(draft, fitted, found)


def _solve(draft: _Draft, raw: StarStamps, config: PsfConfig, varying: bool) -> tuple[_Draft, StarStamps]:
    """Model from the stars, stars from the model, in turn."""
    fitted, _ = draft.fit(draft.recentred(raw, raw), 3)
    keep = _without_outliers(fitted, config)
    raw, fitted = raw.take(keep), fitted.take(keep)
    fitted, misfit = draft.fit(draft.recentred(raw, fitted), 2)
    for turn in range(_ROUNDS):
        keep = _without_outliers(fitted, config)
        fitted, misfit = fitted.take(keep), misfit.take(keep)
        if turn == 1 and varying and config.max_degree > 0:
            draft = _with_degree(draft, _best_degree(draft, fitted, misfit, config))
        draft = _update_model(draft, fitted, misfit)
        fitted, misfit = draft.fit(fitted, 2)
    return draft, fitted


def _enough(n: int, found: Stars, config: PsfConfig) -> None:
    if n < config.min_stars:
        raise PsfError(
            f"{n} usable stars for the PSF, at least {config.min_stars} needed ({found.n_detected} sources detected; "
            f"usable means S/N above {config.snr_min:g}, unsaturated, isolated, point-like); give a PSF file, check "
            "the mask and the saturation level, or lower psf.snr_min or psf.min_stars",
            found=n,
            needed=config.min_stars,
            n_detected=found.n_detected,
        )


def _stamp_size(
    data: NDArray[np.floating],
    rms: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    found: Stars,
    config: PsfConfig,
) -> int:
    """Odd side in pixels: of the FWHM, long enough for elongated stars, and out to where wings no longer matter."""
    table = found.table
    mean, radius = (table["xx"] + table["yy"]) / 2, np.hypot((table["xx"] - table["yy"]) / 2, table["xy"])
    major = 2.3548 * float(np.percentile(np.sqrt(mean + radius), 90))
    fwhm = float(np.median(table["fwhm"]))
    size = _odd(config.size_fwhm * max(fwhm, 0.75 * major), 15)
    if size >= MAX_SIZE:
        return size
    bright = table[np.argsort(-table["snr"], kind="stable")[:_FOR_WINGS]]
    stars = cut_stars(data, rms, mask, replace(found, table=bright), MAX_SIZE)
    # What the end of a stamp cuts off a star appears in the difference with the S/N of a source of this part of the
    # star: its light in a pixel times the pixels that a PSF weighs (4 π σ²).
    brightest = float(np.max(stars.flux / stars.rms)) / np.sqrt(4 * np.pi) / (fwhm / 2.3548)
    allowed = _CUT_OFF / min(max(brightest, 1.0), _WINGS_OF_SNR) / (4 * np.pi * (fwhm / 2.3548) ** 2)
    axis = np.arange(MAX_SIZE) - MAX_SIZE // 2
    distance = np.hypot(axis[:, None], axis[None, :])
    flux = stars.flux[:, None]
    while size < MAX_SIZE:
        # The taper begins at 0.88 of the half side.
        ring = np.abs(distance - 0.46 * size) < max(1.0, 0.4 * fwhm)
        good = stars.good[:, ring]
        pixels = np.maximum(good.sum(axis=1, keepdims=True), 1.0)
        light = np.sum(stars.data[:, ring] * good, axis=1, keepdims=True) / pixels
        away = np.abs(light / flux - np.median(light / flux))
        weight = pixels * (away <= 5 * np.median(away))
        if np.sum(weight * flux * light) <= allowed * np.sum(weight * flux**2):
            break
        size = _odd(1.15 * size, size + 2)
    return size


def _odd(length: float, least: int) -> int:
    return int(np.clip(2 * round(length / 2) + 1, least, MAX_SIZE))


def _photons_per_electron(stars: StarStamps, variance: NDArray[np.floating] | None, rms: NDArray[np.floating]) -> float:
    """Variance that a source adds, per electron: 1 for Poisson counts, less in a mean of exposures."""
    if variance is None:
        return 1.0
    added = stars.cut(variance) - stars.cut(rms) ** 2
    bright = (stars.good > 0) & (stars.data > 3 * stars.rms[:, None, None])
    return max(0.0, float(np.median(added[bright] / stars.data[bright]))) if bright.any() else 1.0


def _profile(found: Stars, frame: Frame, max_degree: int) -> EllipticalProfile:
    """Shape of the stars as a polynomial in (x, y), of the degree that predicts left-out stars best."""
    table = found.table
    shape = log_shape(table)
    weight = 1 / np.hypot(0.02, 2.5 / table["snr"])[:, None]
    best, best_error = np.zeros((1, 3)), np.inf
    best_degree = 0
    for degree in range(max_degree + 1):
        if len(table) < 4 * n_terms(degree) and degree > 0:
            break
        basis = frame.terms(table["x"], table["y"], degree) * weight
        q, r = np.linalg.qr(basis)
        fit = q.T @ (shape * weight)
        # Leave-one-out residual: the plain one over 1 − leverage.
        left_out = (shape * weight - q @ fit) / np.maximum(1 - np.sum(q**2, axis=1), 1e-3)[:, None]
        error = float(np.mean(np.minimum(np.sum(left_out**2, axis=1), 50.0)))
        if error < 0.98 * best_error:
            best, best_error, best_degree = np.linalg.solve(r, fit), error, degree
    return EllipticalProfile(best, best_degree, 3.0)


def _fit_profile(profile: EllipticalProfile, frame: Frame, stars: StarStamps) -> _Draft:
    """Exponent and width of the Moffat profile that fit the brighter stars best; their moments gave the shape."""
    bright = stars.take(np.argsort(-stars.snr, kind="stable")[:_FOR_EXPONENT])

    def draft_for(log_beta: float, stretch: float) -> _Draft:
        beta = 1.0 + float(np.exp(log_beta))
        coefficients = profile.coefficients.copy()
        coefficients[0, 0] += stretch - np.log(_moment_of_moffat(round(beta, 3)))
        scaled = EllipticalProfile(coefficients, profile.degree, beta)
        return _Draft(frame, scaled, np.zeros((1, stars.size, stars.size)), 0)

    def misfit(log_beta: float, stretch: float = 0.0) -> float:
        draft = draft_for(log_beta, stretch)
        chi2 = draft.fit(draft.recentred(bright, bright), 2)[0].chi2
        return float(np.mean(np.minimum(chi2, 10 * np.median(chi2))))

    best = optimize.minimize_scalar(
        misfit, bounds=(np.log(0.4), np.log(20.0)), method="bounded", options={"xatol": 0.1}
    )
    # Moments know the width through their weight; the stars themselves have the last word (a parabola's vertex).
    step = 0.04
    low, middle, high = misfit(best.x, -step), float(best.fun), misfit(best.x, step)
    bend = low + high - 2 * middle
    stretch = float(np.clip(0.5 * (low - high) / bend, -1.5, 1.5)) * step if bend > 0 else 0.0
    return draft_for(float(best.x), stretch)


@functools.lru_cache(maxsize=256)
def _moment_of_moffat(beta: float) -> float:
    """Adaptive second moment of a round Moffat profile over its α²."""
    alpha, half = 6.0, 60
    axis = np.arange(-half, half + 1) / alpha
    stamp = (1 + axis[:, None] ** 2 + axis[None, :] ** 2) ** -beta
    width = 2 * alpha * np.sqrt(2 ** (1 / beta) - 1)
    found = measure_moments(stamp, np.array([half]), np.array([half]), fwhm=float(width))[0]
    return float(found["xx"] / alpha**2)


def _told_from_neighbours(draft: _Draft, raw: StarStamps) -> StarStamps:
    """The stars with what light about them that is not theirs may amount to; without wings where it is too much.

    Galaxies too faint to be found, and the outskirts of others, lie about stars of any flux alike. About the fainter
    half of the stars all light that the smooth profile leaves is of that kind; of the others it is what is more than
    stars of their flux have.
    """
    fitted, misfit = draft.fit(draft.recentred(raw, raw), 2)
    axis = np.arange(raw.size) - raw.size // 2
    distance = np.hypot(axis[:, None], axis[None, :])
    width = float(np.median(raw.fwhm))
    weight = misfit.weight * (distance > _WING_FWHM * width)
    pixels = np.maximum(weight.sum(axis=(1, 2)), 1e-30)
    about = (np.sum(weight * misfit.residual, axis=(1, 2)) / pixels + fitted.sky) / raw.rms
    faint = np.argsort(fitted.flux / raw.rms, kind="stable")[: max(5, len(raw) // 2)]
    usual = max(SKY_ERROR, 1.4826 * float(np.median(np.abs(about[faint]))))
    light = np.maximum(fitted.flux, 0.0) / raw.rms
    order = np.argsort(about / np.maximum(light, 1.0), kind="stable")
    part = np.cumsum(light[order] ** 2)
    middle = order[np.searchsorted(part, 0.5 * part[-1])]
    halo = max(0.0, float(about[middle] / max(light[middle], 1.0)))
    spoilt = about - halo * light > _TOO_MUCH * usual
    if np.count_nonzero(~spoilt) < 3:
        return replace(raw, glow=usual)
    good = np.where(spoilt[:, None, None] & (distance > _WING_FWHM * width), np.float32(0), raw.good)
    return replace(raw, good=good, glow=usual)


def _without_outliers(stars: StarStamps, config: PsfConfig) -> NDArray[np.intp]:
    """Rows without stars that fit much worse than the others, that moved away, or that vanished."""
    score = np.log(np.maximum(stars.chi2, 1e-6))
    middle = np.median(score)
    limit = middle + max(4 * 1.4826 * float(np.median(np.abs(score - middle))), 0.4)
    # A bright star shows what a model of low degree cannot follow: no reason to lose what it tells of the wings.
    misfit = np.sqrt(np.maximum(stars.residual**2 - stars.noise_fraction**2, 0.0))
    good = ((score < limit) | (misfit < _MISFIT)) & (stars.flux > 0)
    good &= np.hypot(stars.dx - stars.dx0, stars.dy - stars.dy0) < 1.0
    if np.count_nonzero(good) < config.min_stars:
        # Too few to be choosy: the best of them.
        good = np.zeros(len(score), dtype=bool)
        good[np.argsort(score, kind="stable")[: config.min_stars]] = True
    return np.flatnonzero(good)


def _update_model(draft: _Draft, stars: StarStamps, misfit: Misfit, n_iter: int = 5) -> _Draft:
    """Pixel planes from what the draft leaves of the stars."""
    # Orthonormal over the stars: then the planes hardly know of each other, and converge in a few steps.
    q, r = np.linalg.qr(draft.basis(stars))
    correction, noise, common = solve_planes(stars, misfit, q, n_iter=n_iter)
    planes = shrink(np.tensordot(r, draft.planes, axes=1) + correction, noise, common)
    return replace(draft, planes=np.tensordot(np.linalg.inv(r), planes * edge_taper(stars.size), axes=1))


def _with_degree(draft: _Draft, degree: int) -> _Draft:
    """The same model with room for more terms (or fewer)."""
    planes = np.zeros((n_terms(degree), *draft.planes.shape[1:]))
    old, new = _exponents(draft.degree), _exponents(degree)
    for k, exponents in enumerate(old):
        if exponents in new:
            planes[new.index(exponents)] = draft.planes[k]
    return replace(draft, planes=planes, degree=degree)


def _exponents(degree: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(degree + 1) for i in range(degree + 1 - j)]


def _best_degree(draft: _Draft, stars: StarStamps, misfit: Misfit, config: PsfConfig) -> int:
    """The lowest degree beyond which stars that were left out are not predicted significantly better."""
    n = len(stars)
    halves = np.arange(0, n, 2), np.arange(1, n, 2)
    parts = [(stars.take(half), misfit.take(half)) for half in halves]
    best, best_score = 0, np.zeros(0)
    for degree in range(config.max_degree + 1):
        if degree > 0 and n < 10 * n_terms(degree):
            break
        score = np.empty(n)
        for train, (test, _), rows in zip(parts, parts[::-1], halves[::-1], strict=True):
            trained = _update_model(_with_degree(draft, degree), *train, n_iter=4)
            score[rows] = trained.fit(test, 1)[0].chi2
        if degree == 0:
            best_score = score
            continue
        gain = np.log(best_score) - np.log(score)
        gain = np.clip(gain, *np.percentile(gain, [5, 95]))
        if gain.mean() > 2 * gain.std() / np.sqrt(n):
            best, best_score = degree, score
    return best


def _finish(draft: _Draft, stars: StarStamps, found: Stars) -> PsfModel:
    bare = PsfModel(draft.planes, draft.degree, 1.0, frame=draft.frame, profile=draft.profile)
    offset, offset_degree = centring_offset(bare)
    model = replace(bare, offset=offset, offset_degree=offset_degree, n_stars=len(stars))
    stamp = model.at(draft.frame.x0, draft.frame.y0)
    quality = {
        "n_stars": len(stars),
        "n_found": len(found),
        "n_detected": found.n_detected,
        "degree": max(draft.degree, draft.profile.degree),
        "chi2": float(np.median(stars.chi2)),
        "residual": _residual(stars),
        "ellipticity": ellipticity(stamp),
    }
    return replace(model, fwhm=half_maximum_width(stamp), quality=quality)


def _residual(stars: StarStamps) -> float:
    """Median over stars of the rms of (star − model) over the peak, noise taken off; the noisy half is left out."""
    told = stars.noise_fraction <= np.median(stars.noise_fraction)
    return float(np.sqrt(max(0.0, np.median(stars.residual[told] ** 2 - stars.noise_fraction[told] ** 2))))
