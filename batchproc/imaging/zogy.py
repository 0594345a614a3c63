"""ZOGY: the proper image subtraction of Zackay, Ofek & Gal-Yam (2016, ApJ 830, 27; doi:10.3847/0004-637X/830/1/27).

The algebra of one frame, cyclic at its borders. Tiles, masks and what real images need besides are in `subtract`.
Equation numbers (E13 …) are the paper's.

The model: ``new = F_n T (x) P_n + noise`` and ``ref = F_r T (x) P_r + noise``. With F_n = 1 and F_r = 1 / flux_ratio,
fluxes come out in the units of new.

How it is computed: each image in units of its own noise, so that single precision is enough; with
``a = F_n / sigma_n`` and ``b = F_r / sigma_r`` scaled to ``a² + b² = 1`` everything is of order one::

    den = b² |P_r|² + a² |P_n|²
    D^  = (b P_r N^ − a P_n R^) / sqrt(den)                                          E13
    S^  = S_N^ − S_R^ = conj(a P_n) b² |P_r|² / den N^ − conj(b P_r) a² |P_n|² / den R^   E12

and S, S_N, S_R over sqrt(F_S), the width of S on blank sky. Correlated noise of power Q(k) is whitened beforehand
(N^ / sqrt(Q), P_n / sqrt(Q)), which leaves these formulas as they are. A frame takes eight transforms for its images
and variances, and four for its PSFs; one pass over the spectra makes all products, and one over the pixels the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray

from batchproc.errors import SubtractError
from batchproc.imaging.fft import Fft, get_fft
from batchproc.imaging.noise import noise_power
from batchproc.records import Difference, Kernels, MaskBit

__all__ = [
    "MOST_VARIANCE",
    "STENCIL",
    "Filters",
    "Frame",
    "Planes",
    "fill_masked",
    "filter_frame",
    "interpolate_over",
    "make_filters",
    "score_frame",
    "zogy",
]

#: Reach of the central difference of eighth order that makes the gradients of S, in pixels.
STENCIL = 4

#: Where sqrt(den) falls below this, D has nothing to say of sources: it only has to stay white, and compact.
FLOOR = 1e-6

#: V(S) / F_S is never below this: a convolution by Fourier can come out at zero or below by rounding.
LEAST_VARIANCE = 1e-3

#: Variance of a pixel over sigma² counts up to this: single precision spreads some 1e-7 of the largest over the frame.
MOST_VARIANCE = 1e5

#: Pixels between the beginnings of planes, modulo a power of two: 321 cache lines of 64 bytes.
_GAP = 5136

_FAST = {"contract", "arcp", "reassoc", "nsz"}  # not "nnan": NaN must stay NaN


@dataclass(frozen=True)
class Filters:
    """Everything ZOGY needs of a pair of PSFs, noises and flux scales, as spectra of one frame shape.

    Attributes
    ----------
    fft : Fft
    a, b : float
        F_n / sigma_n and F_r / sigma_r, scaled to ``a² + b² = 1``.
    f_s : float
        F_S in the units that this scaling makes.
    psf_new, psf_ref : ndarray (ny, nx // 2 + 1) complex64
        P_n and P_r (whitened).
    k2_new, k2_ref : ndarray, likewise
        Spectra of k² (squared in pixel space) over F_S, which propagate variance to S (E26, E27).
    white_new, white_ref : ndarray (ny, nx // 2 + 1) float32, or (1, 1)
        1 / sqrt(Q), what whitens each image; of one element where its noise is white already.
    kernels : Kernels
    """

    fft: Fft
    a: float
    b: float
    f_s: float
    psf_new: NDArray[np.complex64]
    psf_ref: NDArray[np.complex64]
    k2_new: NDArray[np.complex64]
    k2_ref: NDArray[np.complex64]
    white_new: NDArray[np.float32]
    white_ref: NDArray[np.float32]
    kernels: Kernels


class Frame(NamedTuple):
    """One frame, all ``(ny, nx)`` float32: what goes in, in units of each image's sigma, and what comes back.

    In: new, ref, and their variances over sigma². Back, in the same memory: D, S_N, S_R and V(S), in units of
    sqrt(F_S) and F_S.
    """

    new: NDArray[np.float32]
    ref: NDArray[np.float32]
    variance_new: NDArray[np.float32]
    variance_ref: NDArray[np.float32]


class Planes(NamedTuple):
    """What a frame hands on, all ``(ny, nx)`` float32.

    Attributes
    ----------
    difference : D (E13).
    score : S / sqrt(F_S) (E12).
    variance : (V(S_N) + V(S_R)) / F_S (E26, E27).
    total : the same with the variances of registration (E30–E33) and flux ratio added.
    score_ref : S_R / sqrt(F_S), the static part of S: what a flux-ratio or PSF error multiplies.
    gradient2 : (|∇S_N|² + |∇S_R|²) / F_S: what a registration error multiplies.
    """

    difference: NDArray[np.float32]
    score: NDArray[np.float32]
    variance: NDArray[np.float32]
    total: NDArray[np.float32]
    score_ref: NDArray[np.float32]
    gradient2: NDArray[np.float32]

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Planes:
        """Planes of this shape, whatever they hold."""
        n = shape[0] * shape[1]
        # Large arrays begin on pages: of equal sizes that are powers of two, the same pixel of all six would compete
        # for one place in the cache. So each begins some odd number of cache lines later.
        gaps = [k * _GAP for k in range(len(cls._fields))]
        return cls(*(np.empty(n + gap, np.float32)[gap:].reshape(shape) for gap in gaps))

    def cut(self, area: tuple[slice, slice]) -> Planes:
        """Views of a part of every plane."""
        return Planes(*(plane[area] for plane in self))


def make_filters(
    shape: tuple[int, int],
    psf_new: NDArray,
    psf_ref: NDArray,
    *,
    sigma_new: float,
    sigma_ref: float,
    flux_ratio: float = 1.0,
    noise_new: NDArray | None = None,
    noise_ref: NDArray | None = None,
) -> Filters:
    """Filters for frames of this shape. Their spectra live in scratch memory: good until the next call.

    Parameters
    ----------
    shape : (int, int)
        Frame (ny, nx) in pixels.
    psf_new, psf_ref : ndarray (h, w)
        Odd-sized PSF stamps, centred, of unit sum.
    sigma_new, sigma_ref : float
        Sky rms of single pixels in the units of new and of ref; one number a frame: sigma belongs to k-space here.
    flux_ratio : float
        F_new / F_ref.
    noise_new, noise_ref : ndarray (n, n), optional
        Autocorrelation of the noise: odd-sized, 1 at its centre. Default: white.

    Raises
    ------
    SubtractError
        When a PSF does not fit the frame, or a number is not positive and finite.
    """
    for name, value in (("sigma_new", sigma_new), ("sigma_ref", sigma_ref), ("flux_ratio", flux_ratio)):
        _require_number(name, value)
    for name, psf in (("psf_new", psf_new), ("psf_ref", psf_ref)):
        _require_psf(name, psf, shape)
    a, b = 1 / sigma_new, 1 / (flux_ratio * sigma_ref)
    scale = math.hypot(a, b)
    a, b = a / scale, b / scale
    small = _small_kernels(shape, psf_new, psf_ref, a, b, noise_new, noise_ref)

    fft = get_fft(shape)
    psf_new_hat = _spectrum(fft, psf_new, "psf_new")
    psf_ref_hat = _spectrum(fft, psf_ref, "psf_ref")
    white_new, white_ref = (_whitening(fft, noise) for noise in (noise_new, noise_ref))
    if noise_new is not None:
        psf_new_hat *= white_new
    if noise_ref is not None:
        psf_ref_hat *= white_ref
    kernels = Kernels(
        x0=0,
        x1=shape[1],
        y0=0,
        y1=shape[0],
        psf=small.psf,
        delta_new=small.delta_new,
        delta_ref=small.delta_ref,
        f_d=small.f_d * scale,
        f_s=small.f_s * scale**2,
        sigma_new=float(sigma_new),
        sigma_ref=float(sigma_ref),
    )
    return Filters(
        fft=fft,
        a=a,
        b=b,
        f_s=small.f_s,
        psf_new=psf_new_hat,
        psf_ref=psf_ref_hat,
        k2_new=_spectrum(fft, small.k2_new, "k2_new"),
        k2_ref=_spectrum(fft, small.k2_ref, "k2_ref"),
        white_new=white_new,
        white_ref=white_ref,
        kernels=kernels,
    )


def filter_frame(filters: Filters, frame: Frame) -> Frame:
    """All convolutions of one frame, in place: see `Frame`. The arrays are aligned ones (`Fft.real`)."""
    fft = filters.fft
    spectra = [fft.forward(image, fft.half(name)) for name, image in zip(Frame._fields, frame, strict=True)]
    _multiply(
        filters.psf_new,
        filters.psf_ref,
        filters.k2_new,
        filters.k2_ref,
        filters.white_new,
        filters.white_ref,
        *spectra,
        np.float32(filters.a),
        np.float32(filters.b),
        np.float32(1 / (fft.shape[0] * fft.shape[1])),
        np.float32(1 / math.sqrt(filters.f_s)),
    )
    return Frame(*(fft.backward(spectrum, image) for spectrum, image in zip(spectra, frame, strict=True)))


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _multiply(  # type: ignore[no-untyped-def]  # numba
    psf_new, psf_ref, k2_new, k2_ref, white_new, white_ref, new, ref, variance_new, variance_ref, a, b, unit, per_root
):
    """All products between the transforms, in one pass over the half spectra.

    `new`, `ref`, `variance_new`, `variance_ref` hold N^, R^, V_N^, V_R^ and take D^, S_N^, S_R^, V(S)^.
    `unit` is what FFTW leaves to be normalised; `per_root` is 1 / sqrt(F_S).
    """
    one = np.float32(1)
    floor = np.float32(FLOOR)
    per_floor2 = one / (floor * floor)
    nothing = np.float32(1e-30)
    whiten_new, whiten_ref = white_new.size > 1, white_ref.size > 1
    for i in range(new.shape[0]):
        for j in range(new.shape[1]):
            n, r = new[i, j], ref[i, j]
            if whiten_new:
                n *= white_new[i, j]
            if whiten_ref:
                r *= white_ref[i, j]
            p, q = psf_new[i, j], psf_ref[i, j]
            p_re, p_im, q_re, q_im = a * p.real, a * p.imag, b * q.real, b * q.imag
            n_re, n_im, r_re, r_im = n.real, n.imag, r.real, r.imag
            pp, qq = p_re * p_re + p_im * p_im, q_re * q_re + q_im * q_im
            den = pp + qq
            # Below that 1 / den overflows in single precision, and S, of the size of P, has nothing there.
            scale = per_root * unit / den if den > nothing else np.float32(0)
            s_n, s_r = qq * scale, pp * scale
            ref[i, j] = complex(s_n * (p_re * n_re + p_im * n_im), s_n * (p_re * n_im - p_im * n_re))
            variance_new[i, j], variance_ref[i, j] = (
                complex(s_r * (q_re * r_re + q_im * r_im), s_r * (q_re * r_im - q_im * r_re)),
                unit * (k2_new[i, j] * variance_new[i, j] + k2_ref[i, j] * variance_ref[i, j]),
            )
            # Where both PSFs have no power, their phases are rounding: take 0, so that D's filter stays compact.
            t = den * per_floor2
            floored = floor / (one + t * t)
            p_re, q_re = p_re + a * floored, q_re + b * floored
            root = unit / np.sqrt(p_re * p_re + p_im * p_im + q_re * q_re + q_im * q_im)
            new[i, j] = complex(
                root * (q_re * n_re - q_im * n_im - p_re * r_re + p_im * r_im),
                root * (q_re * n_im + q_im * n_re - p_re * r_im - p_im * r_re),
            )


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def score_frame(  # type: ignore[no-untyped-def]  # numba
    frame, y0, x0, sigma2_x, sigma2_y, sigma2_beta, out
):
    """Scores and their variances from a filtered frame: one pass over its pixels.

    Parameters
    ----------
    frame : Frame
        From `filter_frame`.
    y0, x0 : int
        The first pixel of the frame that is wanted, at least `STENCIL` from its border.
    sigma2_x, sigma2_y : float32
        Variance of the registration in x and y, pixels².
    sigma2_beta : float32
        Relative variance of the flux ratio.
    out : Planes
        Written: as many pixels as they have.
    """
    # One small loop for each quantity: with more arrays than that in a loop, nothing would be vectorised.
    d, s_n, s_r, v = frame
    ny, nx = out.difference.shape
    columns = slice(x0, x0 + nx)
    g_x, g_y = np.empty(nx, np.float32), np.empty(nx, np.float32)
    least = np.float32(LEAST_VARIANCE)
    for i in range(ny):
        y = y0 + i
        g_x[:], g_y[:] = 0, 0
        _add_slopes2(s_n, y, x0, g_x, g_y)
        _add_slopes2(s_r, y, x0, g_x, g_y)
        out.difference[i] = d[y, columns]
        out.score_ref[i] = s_r[y, columns]
        moving, static, noise = s_n[y, columns], s_r[y, columns], v[y, columns]
        score, variance, total, gradient2 = out.score[i], out.variance[i], out.total[i], out.gradient2[i]
        for j in range(nx):
            score[j] = moving[j] - static[j]
        for j in range(nx):
            variance[j] = max(noise[j], least)
        for j in range(nx):
            total[j] = variance[j] + sigma2_x * g_x[j] + sigma2_y * g_y[j] + sigma2_beta * static[j] * static[j]
        for j in range(nx):
            gradient2[j] = g_x[j] + g_y[j]


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy", forceinline=True)
def _add_slopes2(s, y, x0, g_x, g_y):  # type: ignore[no-untyped-def]  # numba
    """Add the squares of ds/dx and ds/dy along a part of row y."""
    c1, c2, c3, c4 = np.float32(4 / 5), np.float32(-1 / 5), np.float32(4 / 105), np.float32(-1 / 280)
    n = g_x.size
    r = s[y, x0 - 4 : x0 + n + 4]
    for j in range(n):
        x = (
            c1 * (r[j + 5] - r[j + 3])
            + c2 * (r[j + 6] - r[j + 2])
            + c3 * (r[j + 7] - r[j + 1])
            + c4 * (r[j + 8] - r[j])
        )
        g_x[j] += x * x
    columns = slice(x0, x0 + n)
    a1, a2, a3, a4 = s[y + 1, columns], s[y + 2, columns], s[y + 3, columns], s[y + 4, columns]
    b1, b2, b3, b4 = s[y - 1, columns], s[y - 2, columns], s[y - 3, columns], s[y - 4, columns]
    for j in range(n):
        x = c1 * (a1[j] - b1[j]) + c2 * (a2[j] - b2[j]) + c3 * (a3[j] - b3[j]) + c4 * (a4[j] - b4[j])
        g_y[j] += x * x


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
    noise_new: ArrayLike | None = None,
    noise_ref: ArrayLike | None = None,
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
        Total variance of each pixel, sky and sources, electrons²; counts up to `MOST_VARIANCE` ``sigma²``. Default:
        ``sigma²``, no source noise.
    registration_sigma : (float, float)
        Rms registration error in x and y, pixels.
    flux_ratio_error : float
        Relative error of the flux ratio.
    mask : array_like (ny, nx) of bool, optional
        True where bad in either image. Such pixels are replaced alike in both images before the transforms, and D, S
        and S_corr are 0 there and their flux is NaN.
    noise_new, noise_ref : array_like (n, n), optional
        Autocorrelation of each image's noise on blank sky: odd-sized, 1 at its centre (`batchproc.imaging.noise`
        measures it). Default: white.

    Returns
    -------
    Difference
        ``difference`` (D, E13), ``score`` (S, E12), ``score_corr`` (S_corr, E25), ``flux`` and ``flux_err`` (E41, E43)
        in the units of new, ``psf`` (P_D, E14); images float32. D is white everywhere, also where both PSFs have lost
        their power; it follows E13 where (b² |P_r|² + a² |P_n|²)^½ > 1e-4 (a² + b² = 1: see the module). Gradients
        of S are central differences of eighth order, which do not displace S_corr's peak: V_ast of a source is right
        to 2 % at a FWHM of 2 pixels, 12 % low at 1.5. Single precision keeps S_corr right to a thousandth of a sigma
        while neither image is a hundred times noisier than the other.

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

    filters = make_filters(
        new.shape,
        psf_new,
        psf_ref,
        sigma_new=sigma_new,
        sigma_ref=sigma_ref,
        flux_ratio=flux_ratio,
        noise_new=None if noise_new is None else np.asarray(noise_new, dtype=np.float64),
        noise_ref=None if noise_ref is None else np.asarray(noise_ref, dtype=np.float64),
    )
    frame = Frame(*(filters.fft.real(name) for name in Frame._fields))
    frame.new[:], frame.ref[:] = new / sigma_new, ref / sigma_ref
    frame.variance_new[:] = np.minimum(plane_new / sigma_new**2, MOST_VARIANCE)
    frame.variance_ref[:] = np.minimum(plane_ref / sigma_ref**2, MOST_VARIANCE)
    filtered = Frame(*(np.pad(image, STENCIL, mode="wrap") for image in filter_frame(filters, frame)))
    planes = Planes.empty(new.shape)
    sigma2 = (np.float32(sigma**2) for sigma in (*registration_sigma, flux_ratio_error))
    score_frame(filtered, STENCIL, STENCIL, *sigma2, planes)
    root = np.float32(math.sqrt(filters.kernels.f_s))
    return Difference(
        difference=np.where(bad, np.float32(0), planes.difference),
        score_corr=np.where(bad, np.float32(0), planes.score / np.sqrt(planes.total)),
        flux=np.where(bad, np.float32(np.nan), planes.score / root),  # E41
        flux_err=np.where(bad, np.float32(np.nan), np.sqrt(planes.variance) / root),  # E43
        mask=np.where(bad, np.uint8(MaskBit.BAD), np.uint8(0)),
        kernels=(filters.kernels,),
    )


def fill_masked(
    new: NDArray, ref: NDArray, bad_new: NDArray[np.bool_], bad_ref: NDArray[np.bool_], flux_ratio: float
) -> tuple[NDArray, NDArray]:
    """Replace bad pixels alike in both images, so that they leave nothing in the difference.

    A pixel bad in one image takes the scaled value of the other; one bad in both takes, in both, a mean of the good
    pixels of new around it (`interpolate_over`). Returns new arrays.
    """
    new, ref = new.copy(), ref.copy()
    only_new, only_ref = bad_new & ~bad_ref, bad_ref & ~bad_new
    new[only_new] = ref[only_new] * flux_ratio
    ref[only_ref] = new[only_ref] / flux_ratio
    rows, columns = np.nonzero(bad_new & bad_ref)
    new[rows, columns] = interpolate_over(new, bad_new, rows, columns)
    ref[rows, columns] = new[rows, columns] / flux_ratio
    return new, ref


@numba.njit(cache=True, nogil=True)
def interpolate_over(data, bad, rows, columns):  # type: ignore[no-untyped-def]  # numba
    """Gaussian-weighted mean of the good neighbours of each given pixel; 0 where nothing good is within 32 pixels.

    The Gaussian widens (sigma 1, 2, 4, 8 pixels) until good pixels have a hundredth of its weight.

    Parameters
    ----------
    data : ndarray (ny, nx)
    bad : ndarray (ny, nx) of bool or uint8
        0 where good.
    rows, columns : ndarray (n,) int
        Rows of one column in ascending order.

    Returns
    -------
    ndarray (n,) float64
    """
    ny, nx = data.shape
    out = np.zeros(rows.size)
    sigmas = (1, 2, 4, 8)
    profile = np.zeros(33)
    # Bad pixels of one column share the sums along rows: what is bad in large areas takes no longer for it.
    order = np.argsort(columns, kind="mergesort")
    total, weight = np.empty(ny), np.empty(ny)
    left = order
    for sigma in sigmas:
        reach = 4 * sigma
        for k in range(reach + 1):
            profile[k] = np.exp(-0.5 * (k / sigma) ** 2)
        n_left, column, summed_to = 0, -1, 0
        for n in left:
            y0, y1 = max(rows[n] - reach, 0), min(rows[n] + reach + 1, ny)
            if columns[n] != column:
                column, summed_to = columns[n], y0
            x0, x1 = max(column - reach, 0), min(column + reach + 1, nx)
            for y in range(max(summed_to, y0), y1):
                weight[y] = total[y] = 0.0
                for x in range(x0, x1):
                    if bad[y, x] == 0:
                        weight[y] += profile[abs(x - column)]
                        total[y] += profile[abs(x - column)] * data[y, x]
            summed_to = max(summed_to, y1)
            all_weight = all_total = 0.0
            for y in range(y0, y1):
                all_weight += profile[abs(y - rows[n])] * weight[y]
                all_total += profile[abs(y - rows[n])] * total[y]
            if all_weight > 0.02 * np.pi * sigma**2:
                out[n] = all_total / all_weight
            else:
                left[n_left] = n
                n_left += 1
        left = left[:n_left]
    return out


@dataclass(frozen=True)
class _Small:
    """Kernels in pixel space, of a frame just large enough, in double precision; see `Kernels`.

    ``k2_new, k2_ref``: k² over F_S, the whole frame.
    """

    psf: NDArray[np.float64]
    delta_new: NDArray[np.float64]
    delta_ref: NDArray[np.float64]
    k2_new: NDArray[np.float64]
    k2_ref: NDArray[np.float64]
    f_d: float
    f_s: float


def _small_kernels(
    shape: tuple[int, int],
    psf_new: NDArray,
    psf_ref: NDArray,
    a: float,
    b: float,
    noise_new: NDArray | None,
    noise_ref: NDArray | None,
) -> _Small:
    """The kernels are compact: their shapes need no transform of a whole frame."""
    reach = psf_new.shape[0] + psf_ref.shape[0]
    length = scipy.fft.next_fast_len(max(2 * reach, 64), real=True)
    frame = min(length, shape[0]), min(length, shape[1])
    p, q = a * scipy.fft.rfft2(_corner(psf_new, frame)), b * scipy.fft.rfft2(_corner(psf_ref, frame))
    if noise_new is not None:
        p /= np.sqrt(noise_power(noise_new, frame))
    if noise_ref is not None:
        q /= np.sqrt(noise_power(noise_ref, frame))
    pp, qq = np.abs(p) ** 2, np.abs(q) ** 2
    den = pp + qq
    den[den == 0] = 1.0  # both PSFs vanish, and all numerators with them
    floored = FLOOR / (1 + (den / FLOOR**2) ** 2)
    p_d, q_d = p + a * floored, q + b * floored
    root = np.sqrt(np.abs(p_d) ** 2 + np.abs(q_d) ** 2)

    def back(spectrum: NDArray) -> NDArray[np.float64]:
        return scipy.fft.irfft2(spectrum, s=frame)

    f_s = float(back(pp * qq / den)[0, 0])  # E42: Parseval's 1/N_pix, here as the value at the origin
    size = min(reach - 1, (min(frame) - 1) // 2 * 2 + 1)
    p_d_stamp = _stamp(back(p * q / np.sqrt(den)), size)  # E14
    k2 = (back(np.conj(p) * qq / den) ** 2 / f_s, back(np.conj(q) * pp / den) ** 2 / f_s)  # E28, E29
    return _Small(
        psf=p_d_stamp / p_d_stamp.sum(),
        delta_new=_unit_norm(_stamp(back(q_d / root), size)),  # E129
        delta_ref=_unit_norm(_stamp(back(p_d / root), size)),  # E133
        k2_new=_cut(k2[0], frame),
        k2_ref=_cut(k2[1], frame),
        f_d=float((np.abs(p * q) / np.sqrt(den))[0, 0]),  # E15: P_D has unit sum
        f_s=f_s,
    )


def _require_number(name: str, value: float) -> None:
    if np.ndim(value) or not (np.isfinite(value) and value > 0):
        raise SubtractError(f"{name} = {value}: one positive, finite number is expected")


def _require_psf(name: str, psf: NDArray, shape: tuple[int, int]) -> None:
    if psf.ndim != 2 or psf.shape[0] % 2 == 0 or psf.shape[1] % 2 == 0:
        raise SubtractError(f"{name} has shape {psf.shape}: a PSF stamp has two odd sides, so that it has a centre")
    if psf.shape[0] > shape[0] or psf.shape[1] > shape[1]:
        raise SubtractError(f"{name} ({psf.shape}) is larger than the image ({shape}); crop it")
    if not np.isfinite(psf).all() or abs(psf.sum() - 1) > 1e-3:
        raise SubtractError(f"{name} sums to {psf.sum():.6g}: a PSF is finite and of unit sum; divide by its sum")


def _variance_plane(plane: ArrayLike | None, sigma: float, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    if plane is None:
        return np.full(shape, float(sigma) ** 2)
    array = np.asarray(plane, dtype=np.float64)
    if array.shape != shape:
        raise SubtractError(f"{name} has shape {array.shape}, the images {shape}")
    return array


def _spectrum(fft: Fft, stamp: NDArray, name: str) -> NDArray[np.complex64]:
    """Spectrum of a stamp on an empty frame, its centre on pixel [0, 0], in the scratch array of that name."""
    frame = fft.real("stamp")
    frame[:] = 0
    _place(stamp, frame)
    return fft.forward(frame, fft.half(name))


def _whitening(fft: Fft, noise: NDArray | None) -> NDArray[np.float32]:
    """1 / sqrt(Q), one element where the noise is white."""
    if noise is None:
        return np.ones((1, 1), np.float32)
    return (1 / np.sqrt(noise_power(noise, fft.shape))).astype(np.float32)


def _corner(stamp: NDArray, shape: tuple[int, int]) -> NDArray[np.float64]:
    """The stamp on an empty frame, its centre on pixel [0, 0]."""
    frame = np.zeros(shape)
    _place(stamp, frame)
    return frame


def _place(stamp: NDArray, frame: NDArray) -> None:
    (h, w), (cy, cx) = stamp.shape, (stamp.shape[0] // 2, stamp.shape[1] // 2)
    ny, nx = frame.shape
    frame[: h - cy, : w - cx] = stamp[cy:, cx:]
    if cy:
        frame[ny - cy :, : w - cx] = stamp[:cy, cx:]
    if cx:
        frame[: h - cy, nx - cx :] = stamp[cy:, :cx]
    if cy and cx:
        frame[ny - cy :, nx - cx :] = stamp[:cy, :cx]


def _stamp(frame: NDArray, size: int) -> NDArray[np.float64]:
    """The inverse of `_corner`: an odd square cut around pixel [0, 0]."""
    return _cut(frame, (size, size))


def _cut(frame: NDArray, shape: tuple[int, int]) -> NDArray[np.float64]:
    h, w = shape
    return np.roll(frame, (h // 2, w // 2), axis=(0, 1))[:h, :w].copy()


def _unit_norm(stamp: NDArray) -> NDArray[np.float64]:
    return stamp / np.sqrt(np.sum(stamp**2))
