"""ZOGY: the proper image subtraction of Zackay, Ofek & Gal-Yam (2016, ApJ 830, 27; doi:10.3847/0004-637X/830/1/27).

The algebra of one frame: whole arrays in, whole arrays out, cyclic at its borders. Tiles, masks and what real images
need besides are in `subtract`. Equation numbers (E13 …) are the paper's.

The model: ``new = F_n T (x) P_n + noise`` and ``ref = F_r T (x) P_r + noise``. With F_n = 1 and F_r = 1 / flux_ratio,
fluxes come out in the units of new.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from batchproc.errors import SubtractError
from batchproc.imaging.fft import Fft, get_fft
from batchproc.records import Difference, Kernels, MaskBit

__all__ = [
    "Filters",
    "Scores",
    "apply_filters",
    "corrected_score",
    "fill_masked",
    "interpolate_over",
    "make_filters",
    "zogy",
]


@dataclass(frozen=True)
class Filters:
    """Everything ZOGY needs of a pair of PSFs, noises and flux scales, as spectra of one frame shape.

    Attributes
    ----------
    d_new, d_ref : ndarray (ny, nx // 2 + 1) complex128
        ``D^ = d_new N^ − d_ref R^`` (E13).
    k_new, k_ref : ndarray, likewise
        ``S^ = k_new N^ − k_ref R^`` (E12, E28, E29).
    k2_new, k2_ref : ndarray, likewise
        Spectra of k² (squared in pixel space), which propagate variance to S (E26, E27).
    kernels : Kernels
    """

    fft: Fft
    d_new: NDArray[np.complex128]
    d_ref: NDArray[np.complex128]
    k_new: NDArray[np.complex128]
    k_ref: NDArray[np.complex128]
    k2_new: NDArray[np.complex128]
    k2_ref: NDArray[np.complex128]
    kernels: Kernels


def make_filters(
    shape: tuple[int, int],
    psf_new: NDArray,
    psf_ref: NDArray,
    *,
    sigma_new: float,
    sigma_ref: float,
    flux_ratio: float = 1.0,
) -> Filters:
    """Filters for frames of this shape.

    Parameters
    ----------
    shape : (int, int)
        Frame (ny, nx) in pixels.
    psf_new, psf_ref : ndarray (h, w)
        Odd-sized PSF stamps, centred, of unit sum.
    sigma_new, sigma_ref : float
        Sky rms in the units of new and of ref; one number a frame: sigma belongs to k-space here.
    flux_ratio : float
        F_new / F_ref.

    Raises
    ------
    SubtractError
        When a PSF does not fit the frame, or a number is not positive and finite.
    """
    for name, value in (("sigma_new", sigma_new), ("sigma_ref", sigma_ref), ("flux_ratio", flux_ratio)):
        _require_number(name, value)
    fft = get_fft(shape)
    p_new = fft.rfft2(_corner(psf_new, shape, "psf_new"))
    p_ref = fft.rfft2(_corner(psf_ref, shape, "psf_ref"))
    f_new, f_ref = 1.0, 1.0 / flux_ratio

    power_new = np.abs(p_new) ** 2
    power_ref = np.abs(p_ref) ** 2
    den = (sigma_new * f_ref) ** 2 * power_ref + (sigma_ref * f_new) ** 2 * power_new
    # Where both PSFs have no power at all the numerators vanish too.
    den[den == 0] = 1.0
    root = np.sqrt(den)

    f_d = f_ref * f_new / np.hypot(sigma_new * f_ref, sigma_ref * f_new)  # E15
    p_d = f_ref * f_new * p_ref * p_new / (f_d * root)  # E14
    k_new = f_new * f_ref**2 * np.conj(p_new) * power_ref / den  # E28
    k_ref = f_ref * f_new**2 * np.conj(p_ref) * power_new / den  # E29
    # E42: Parseval's 1/N_pix, here as the value at the origin of an inverse transform.
    f_s = float(fft.irfft2(f_new**2 * power_new * f_ref**2 * power_ref / den)[0, 0])

    norm = np.hypot(sigma_new * f_ref, sigma_ref * f_new)
    size = min(psf_new.shape[0] + psf_ref.shape[0] - 1, (min(shape) - 1) // 2 * 2 + 1)
    psf = _stamp(fft.irfft2(p_d), size)
    kernels = Kernels(
        x0=0,
        x1=shape[1],
        y0=0,
        y1=shape[0],
        psf=psf / psf.sum(),
        delta_new=_unit_norm(_stamp(fft.irfft2(p_ref * norm / root), size)),  # E129
        delta_ref=_unit_norm(_stamp(fft.irfft2(p_new * norm / root), size)),  # E133
        f_d=float(f_d),
        f_s=f_s,
        sigma_new=float(sigma_new),
        sigma_ref=float(sigma_ref),
    )
    return Filters(
        fft=fft,
        d_new=f_ref * p_ref / root,
        d_ref=f_new * p_new / root,
        k_new=k_new,
        k_ref=k_ref,
        k2_new=fft.rfft2(fft.irfft2(k_new) ** 2),
        k2_ref=fft.rfft2(fft.irfft2(k_ref) ** 2),
        kernels=kernels,
    )


@dataclass(frozen=True)
class Scores:
    """What comes out of one frame, before S is divided by its noise. All ``(ny, nx)`` float64.

    Attributes
    ----------
    difference : ndarray
        D.
    score : ndarray
        S.
    variance : ndarray
        V(S_N) + V(S_R) (E26, E27).
    score_ref : ndarray
        S_R, the part of S that is the (static) reference: what a flux-ratio or PSF error multiplies.
    gradient2_x, gradient2_y : ndarray
        (dS_N/dx)² + (dS_R/dx)², likewise y: what a registration error multiplies (E30–E33).
    """

    difference: NDArray[np.float64]
    score: NDArray[np.float64]
    variance: NDArray[np.float64]
    score_ref: NDArray[np.float64]
    gradient2_x: NDArray[np.float64]
    gradient2_y: NDArray[np.float64]


def apply_filters(filters: Filters, new: NDArray, ref: NDArray, variance_new: NDArray, variance_ref: NDArray) -> Scores:
    """D, S and the ingredients of S's variance for one frame (arrays of the filters' shape)."""
    fft = filters.fft
    new_hat, ref_hat = fft.rfft2(new), fft.rfft2(ref)
    s_new, s_ref = filters.k_new * new_hat, filters.k_ref * ref_hat
    variance = fft.irfft2(filters.k2_new * fft.rfft2(variance_new) + filters.k2_ref * fft.rfft2(variance_ref))
    # A convolution by FFT can fall to zero or below by rounding, and S_corr would explode.
    np.maximum(variance, 1e-3 * filters.kernels.f_s, out=variance)
    i_ky, i_kx = _derivatives(fft.shape)
    return Scores(
        difference=fft.irfft2(filters.d_new * new_hat - filters.d_ref * ref_hat),
        score=fft.irfft2(s_new - s_ref),
        variance=variance,
        score_ref=fft.irfft2(s_ref),
        # The exact derivative: a backward difference would displace S_corr's peak by half a pixel.
        gradient2_x=fft.irfft2(i_kx * s_new) ** 2 + fft.irfft2(i_kx * s_ref) ** 2,
        gradient2_y=fft.irfft2(i_ky * s_new) ** 2 + fft.irfft2(i_ky * s_ref) ** 2,
    )


def corrected_score(
    scores: Scores, registration_sigma: tuple[float, float] = (0.0, 0.0), flux_ratio_error: float = 0.0
) -> NDArray[np.float64]:
    """S_corr (E25): S over the square root of all its variances.

    Parameters
    ----------
    scores : Scores
    registration_sigma : (float, float)
        Rms registration error (x, y) in pixels, new relative to ref.
    flux_ratio_error : float
        Relative error of the flux ratio, σ_β / β. It multiplies all of S_R at once, so its variance is
        (σ_β / β)² S_R².
    """
    sigma_x, sigma_y = registration_sigma
    variance = (
        scores.variance
        + sigma_x**2 * scores.gradient2_x
        + sigma_y**2 * scores.gradient2_y
        + flux_ratio_error**2 * scores.score_ref**2
    )
    return scores.score / np.sqrt(variance)


def zogy(
    new: ArrayLike,
    ref: ArrayLike,
    psf_new: ArrayLike,
    psf_ref: ArrayLike,
    *,
    sigma_new: float,
    sigma_ref: float,
    flux_ratio: float = 1.0,
    variance_new: ArrayLike | None = None,
    variance_ref: ArrayLike | None = None,
    registration_sigma: tuple[float, float] = (0.0, 0.0),
    flux_ratio_error: float = 0.0,
    mask: ArrayLike | None = None,
) -> Difference:
    """Subtract ``ref`` from ``new`` by proper image subtraction.

    The frame is treated as cyclic: what lies within a PSF of one border leaks to the opposite one.

    Parameters
    ----------
    new, ref : array_like (ny, nx)
        On the same pixel grid, background-subtracted, in electrons. Not modified.
    psf_new, psf_ref : array_like (h, w)
        PSF stamps: odd-sized, centred, of unit sum.
    sigma_new, sigma_ref : float
        Sky rms (sky and read noise, no source noise), electrons.
    flux_ratio : float
        F_new / F_ref: counts of a star in new over those in ref.
    variance_new, variance_ref : array_like (ny, nx), optional
        Total variance of each pixel, sky and sources, electrons². Default: ``sigma²``, no source noise.
    registration_sigma : (float, float)
        Rms registration error in x and y, pixels.
    flux_ratio_error : float
        Relative error of the flux ratio.
    mask : array_like (ny, nx) of bool, optional
        True where bad in either image. Such pixels are replaced alike in both images before the transforms, and D, S
        and S_corr are 0 there and their flux is NaN.

    Returns
    -------
    Difference
        ``difference`` (D, E13), ``score`` (S, E12), ``score_corr`` (S_corr, E25), ``flux`` and ``flux_err`` (E41, E43)
        in the units of new, ``psf`` (P_D, E14).

    Raises
    ------
    SubtractError
        When shapes differ, unmasked pixels are not finite, a variance is not positive, no pixel is good, or a PSF or a
        number is unusable.

    Examples
    --------
    >>> from batchproc import simulate, zogy
    >>> pair = simulate.simulate_pair(shape=(256, 256), seed=1, n_transients=1, transient_snr=(30, 31))
    >>> d = zogy(
    ...     pair.new,
    ...     pair.ref,
    ...     pair.psf_new.at(128, 128),
    ...     pair.psf_ref.at(128, 128),
    ...     sigma_new=pair.sigma_new,
    ...     sigma_ref=pair.sigma_ref,
    ...     flux_ratio=pair.flux_ratio,
    ...     mask=pair.mask,
    ... )
    >>> bool(d.score_corr.max() > 20)
    True
    """
    new, ref = np.asarray(new, dtype=np.float64), np.asarray(ref, dtype=np.float64)
    psf_new, psf_ref = np.asarray(psf_new, dtype=np.float64), np.asarray(psf_ref, dtype=np.float64)
    if new.ndim != 2 or new.shape != ref.shape:
        raise SubtractError(
            f"new has shape {new.shape} and ref {ref.shape}: both must be the same two-dimensional grid; "
            "resample ref onto new first (batchproc.align)",
        )
    bad = np.zeros(new.shape, bool) if mask is None else np.asarray(mask, dtype=bool)
    for name, value in (("sigma_new", sigma_new), ("sigma_ref", sigma_ref)):
        _require_number(name, value)
    plane_new = _variance_plane(variance_new, sigma_new, new.shape, "variance_new")
    plane_ref = _variance_plane(variance_ref, sigma_ref, new.shape, "variance_ref")
    for name, array in (("new", new), ("ref", ref), ("variance_new", plane_new), ("variance_ref", plane_ref)):
        if bad.shape != array.shape:
            raise SubtractError(f"mask has shape {bad.shape} and {name} {array.shape}")
        if n_bad := int(np.count_nonzero(~np.isfinite(array) & ~bad)):
            raise SubtractError(f"{name} holds {n_bad} pixels that are not finite and not masked", found=n_bad)
        if name.startswith("variance") and (n_bad := int(np.count_nonzero((array <= 0) & ~bad))):
            raise SubtractError(f"{name} is not positive in {n_bad} pixels that are not masked", found=n_bad)
    if bad.all():
        raise SubtractError("the mask leaves no good pixel")
    if np.shape(registration_sigma) != (2,):
        raise SubtractError(
            f"registration_sigma = {registration_sigma!r}: a pair is expected, rms in x and in y (pixels)"
        )
    if bad.any():
        new, ref = fill_masked(new, ref, bad, bad, flux_ratio)
        plane_new, plane_ref = np.where(bad, sigma_new**2, plane_new), np.where(bad, sigma_ref**2, plane_ref)

    filters = make_filters(new.shape, psf_new, psf_ref, sigma_new=sigma_new, sigma_ref=sigma_ref, flux_ratio=flux_ratio)
    scores = apply_filters(filters, new, ref, plane_new, plane_ref)
    f_s = filters.kernels.f_s
    score_corr = corrected_score(scores, registration_sigma, flux_ratio_error)
    return Difference(
        difference=np.where(bad, 0.0, scores.difference),
        score=np.where(bad, 0.0, scores.score),
        score_corr=np.where(bad, 0.0, score_corr),
        flux=np.where(bad, np.nan, scores.score / f_s),  # E41
        flux_err=np.where(bad, np.nan, np.sqrt(scores.variance) / f_s),  # E43
        mask=np.where(bad, np.uint8(MaskBit.BAD), np.uint8(0)),
        kernels=(filters.kernels,),
    )


def fill_masked(
    new: NDArray, ref: NDArray, bad_new: NDArray[np.bool_], bad_ref: NDArray[np.bool_], flux_ratio: float
) -> tuple[NDArray, NDArray]:
    """Replace bad pixels alike in both images, so that they leave nothing in the difference.

    A pixel bad in one image takes the scaled value of the other; one bad in both takes, in both, a mean of the good
    pixels of new around it, weighted by a Gaussian that widens until it finds some. Returns new arrays.
    """
    new, ref = new.copy(), ref.copy()
    only_new, only_ref, both = bad_new & ~bad_ref, bad_ref & ~bad_new, bad_new & bad_ref
    new[only_new] = ref[only_new] * flux_ratio
    ref[only_ref] = new[only_ref] / flux_ratio
    if both.any():
        new[both] = interpolate_over(new, both)[both]
        ref[both] = new[both] / flux_ratio
    return new, ref


def interpolate_over(data: NDArray, bad: NDArray[np.bool_]) -> NDArray:
    """Gaussian-weighted mean of the good neighbours at each bad pixel; 0 where nothing good is within 32 pixels."""
    good = (~bad).astype(np.float64)
    filled = np.where(bad, 0.0, data)
    out, missing = filled.copy(), bad.copy()
    for sigma in (1.0, 2.0, 4.0, 8.0):
        weight = gaussian_filter(good, sigma, mode="constant")
        value = gaussian_filter(filled, sigma, mode="constant")
        usable = missing & (weight > 1e-2)
        out[usable] = value[usable] / weight[usable]
        missing &= ~usable
        if not missing.any():
            break
    return out


def _require_number(name: str, value: float) -> None:
    if np.ndim(value) or not (np.isfinite(value) and value > 0):
        raise SubtractError(f"{name} = {value}: one positive, finite number is expected")


def _variance_plane(plane: ArrayLike | None, sigma: float, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    if plane is None:
        return np.full(shape, float(sigma) ** 2)
    array = np.asarray(plane, dtype=np.float64)
    if array.shape != shape:
        raise SubtractError(f"{name} has shape {array.shape}, the images {shape}")
    return array


def _corner(psf: NDArray, shape: tuple[int, int], name: str) -> NDArray[np.float64]:
    """The stamp on an empty frame, its centre on pixel [0, 0]."""
    if psf.ndim != 2 or psf.shape[0] % 2 == 0 or psf.shape[1] % 2 == 0:
        raise SubtractError(f"{name} has shape {psf.shape}: a PSF stamp has two odd sides, so that it has a centre")
    if psf.shape[0] > shape[0] or psf.shape[1] > shape[1]:
        raise SubtractError(f"{name} ({psf.shape}) is larger than the image ({shape}); crop it")
    if not np.isfinite(psf).all() or abs(psf.sum() - 1) > 1e-3:
        raise SubtractError(f"{name} sums to {psf.sum():.6g}: a PSF is finite and of unit sum; divide by its sum")
    frame = np.zeros(shape)
    frame[: psf.shape[0], : psf.shape[1]] = psf
    return np.roll(frame, (-(psf.shape[0] // 2), -(psf.shape[1] // 2)), axis=(0, 1))


def _stamp(frame: NDArray, size: int) -> NDArray[np.float64]:
    """The inverse of `_corner`: an odd square cut around pixel [0, 0]."""
    half = size // 2
    return np.roll(frame, (half, half), axis=(0, 1))[:size, :size].copy()


def _unit_norm(stamp: NDArray) -> NDArray[np.float64]:
    return stamp / np.sqrt(np.sum(stamp**2))


def _derivatives(shape: tuple[int, int]) -> tuple[NDArray, NDArray]:
    """Multipliers d/dy and d/dx of a spectrum; zero at the Nyquist frequency, whose derivative is not real."""
    ky = np.fft.fftfreq(shape[0])
    kx = np.fft.rfftfreq(shape[1])
    ky[np.abs(ky) == 0.5] = 0.0
    kx[kx == 0.5] = 0.0
    return 2j * np.pi * ky[:, None], 2j * np.pi * kx[None, :]
