"""Measuring point sources on D: position, flux, shape.

D is white with unit variance on blank sky, so a least-squares fit of its PSF P_D is the maximum-likelihood estimate.
On bright sources the noise is larger; its local variance weighs the fit. All functions take *windows*, cut around the
whole pixel nearest to the source, and treat thousands of them at once. What the numbers say about a detection is left
to `features`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import spline_filter

__all__ = ["GAUSSIAN_FWHM", "Fit", "PointSource", "aperture_sum", "fit_position", "moments"]

GAUSSIAN_FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  #: FWHM of a Gaussian of unit sigma


@dataclass(frozen=True)
class PointSource:
    """The PSF of D in one tile, ready to be shifted by fractions of a pixel.

    Parameters
    ----------
    psf : ndarray (size, size) float64
        P_D: odd-sized, centred.
    """

    psf: NDArray[np.float64]

    @cached_property
    def fwhm(self) -> float:
        """Diameter of the circle with the area in which P_D exceeds half its central value, pixels."""
        middle, steps = self.psf.shape[0] // 2, 16
        level = 0.5 * self.psf[middle, middle]
        reach = 2 + int(np.sqrt(np.count_nonzero(self.psf > level)))
        return float(2.0 * np.sqrt(_count_above(self._coefficients, level, reach, steps) / np.pi) / steps)

    @property
    def half(self) -> int:
        """Half the side of a window to measure in: 1.5 FWHM around a position within the central pixel."""
        return max(3, 1 + int(np.ceil(1.5 * self.fwhm)))

    @cached_property
    def elongation(self) -> float:
        """Major over minor axis of P_D, measured as `moments` measures a source."""
        half = self.half
        window = self.shifted(np.zeros(1), np.zeros(1), half)
        return float(moments(window, np.zeros(1), np.zeros(1), self.fwhm)[1][0])

    @cached_property
    def _coefficients(self) -> NDArray[np.float64]:
        """Cubic-spline coefficients of P_D on a grid of half pixels, centre at [size, size].

        Zero-padding the transform is the exact interpolation of a sampled P_D; on the finer grid splines follow it to a
        few 1e-4 of the peak even for a FWHM of 2 pixels.
        """
        size = self.psf.shape[0]
        spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(self.psf)))
        padded = np.fft.ifftshift(np.pad(spectrum, ((size + 1) // 2, size // 2)))
        fine = np.fft.fftshift(np.fft.ifft2(padded).real * 4)
        return np.asarray(spline_filter(fine, order=3, mode="grid-wrap"))

    def shifted(self, dx: NDArray, dy: NDArray, half: int) -> NDArray[np.float64]:
        """P_D centred at (dx, dy) of a window.

        Parameters
        ----------
        dx, dy : ndarray (n,)
            Offset from the window's central pixel, pixels.
        half : int
            The window's side is ``2 half + 1``.

        Returns
        -------
        ndarray (n, 2 half + 1, 2 half + 1) float64
        """
        return _shifted(self._coefficients, *_positions(dx, dy), half, False)[0]

    def with_slopes(
        self, dx: NDArray, dy: NDArray, half: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """`shifted`, and its derivatives with respect to dx and dy."""
        value, d_dx, d_dy = _shifted(self._coefficients, *_positions(dx, dy), half, True)
        return value, d_dx, d_dy


def _positions(dx: NDArray, dy: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.ascontiguousarray(dx, dtype=np.float64), np.ascontiguousarray(dy, dtype=np.float64)


@njit(cache=True)
def _taps(t):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Cubic B-splines at 2 − t, 1 − t, −t, −1 − t (0 ≤ t < 1), and their derivatives with respect to t."""
    s = 1.0 - t
    value = (t * t * t / 6, (4 + s * s * (3 * s - 6)) / 6, (4 + t * t * (3 * t - 6)) / 6, s * s * s / 6)
    slope = (t * t / 2, -s * (9 * s - 12) / 6, t * (9 * t - 12) / 6, -s * s / 2)
    return value, slope


@njit(cache=True)
def _place(spline, dx, dy, half, slopes, scratch, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """P_D at (dx, dy) of a window into ``out[0]``; its derivatives into ``out[1]`` and ``out[2]`` where asked for.

    Pixel u of the window is at ``c + 2 u − t`` of the grid: along either axis the same four weights serve all pixels.
    """
    middle = spline.shape[0] // 2
    whole_x, whole_y = int(np.floor(2 * dx)), int(np.floor(2 * dy))
    (x0, x1, x2, x3), (u0, u1, u2, u3) = _taps(2 * dx - whole_x)
    (y0, y1, y2, y3), (v0, v1, v2, v3) = _taps(2 * dy - whole_y)
    first_x, first_y = middle - whole_x - 2 * half - 2, middle - whole_y - 2 * half - 2
    side = 2 * half + 1
    n = spline.shape[0]
    for j in range(side):
        for i in range(2 * side + 2):
            column, row = first_x + i, first_y + 2 * j
            scratch[0, i] = scratch[1, i] = 0.0
            if column < 0 or column >= n:
                continue
            a = spline[row, column] if 0 <= row < n else 0.0
            b = spline[row + 1, column] if 0 <= row + 1 < n else 0.0
            c = spline[row + 2, column] if 0 <= row + 2 < n else 0.0
            d = spline[row + 3, column] if 0 <= row + 3 < n else 0.0
            scratch[0, i] = y0 * a + y1 * b + y2 * c + y3 * d
            if slopes:
                scratch[1, i] = v0 * a + v1 * b + v2 * c + v3 * d
        line, steep = scratch[0], scratch[1]
        for i in range(side):
            k = 2 * i
            out[0, j, i] = x0 * line[k] + x1 * line[k + 1] + x2 * line[k + 2] + x3 * line[k + 3]
            if slopes:  # a pixel is two steps of the grid
                out[1, j, i] = 2 * (u0 * line[k] + u1 * line[k + 1] + u2 * line[k + 2] + u3 * line[k + 3])
                out[2, j, i] = 2 * (x0 * steep[k] + x1 * steep[k + 1] + x2 * steep[k + 2] + x3 * steep[k + 3])


@njit(cache=True)
def _shifted(spline, dx, dy, half, slopes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    side = 2 * half + 1
    out = np.empty((3 if slopes else 1, dx.size, side, side))
    scratch = np.empty((2, 2 * side + 2))
    for k in range(dx.size):
        _place(spline, dx[k], dy[k], half, slopes, scratch, out[:, k])
    return out


@njit(cache=True)
def _count_above(spline, level, reach, steps):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Points of a grid of 1 / steps pixels at which P_D exceeds a level."""
    side = 2 * reach + 1
    out = np.empty((1, side, side))
    scratch = np.empty((2, 2 * side + 2))
    count = 0
    for j in range(steps):
        for i in range(steps):
            _place(spline, i / steps, j / steps, reach, False, scratch, out)
            count += np.sum(out[0] > level)
    return count


@dataclass(frozen=True)
class Fit:
    """Result of `fit_position`, one element a window.

    Attributes
    ----------
    dx, dy : ndarray (n,)
        Position relative to the window's central pixel; 0 where the fit ran away from it.
    error : ndarray (n,)
        1-sigma error of either coordinate from the Fisher matrix, pixels; NaN without a source or with too few pixels.
    amplitude : ndarray (n,)
        Counts in D: P_D's multiple.
    chi2 : ndarray (n,)
        Reduced chi-square; NaN where there are too few pixels.
    n_pixels : ndarray (n,) int
        Pixels that took part.
    converged : ndarray (n,) bool
    """

    dx: NDArray[np.float64]
    dy: NDArray[np.float64]
    error: NDArray[np.float64]
    amplitude: NDArray[np.float64]
    chi2: NDArray[np.float64]
    n_pixels: NDArray[np.int64]
    converged: NDArray[np.bool_]


def fit_position(data: NDArray, weight: NDArray, source: PointSource, *, n_iterations: int = 12) -> Fit:
    """Fit ``data = amplitude · P_D(x − dx, y − dy)`` by weighted least squares (Gauss–Newton).

    Parameters
    ----------
    data : ndarray (n, s, s)
        Windows of D, of side ``2 source.half + 1``, finite.
    weight : ndarray (n, s, s)
        Inverse variance of each pixel; 0 leaves it out.
    source : PointSource
    n_iterations : int
        At most so many steps; a fit that moves by less than 1e-4 pixel rests, most do after five.

    Notes
    -----
    Only pixels within 1.5 FWHM of the centre take part, and the position must stay within 0.6 FWHM (and may always move
    a pixel): further off it would be another source. Where it does not stay, or fewer than 6 pixels are left, the
    position is the central pixel. There, and where the amplitude is not positive, `converged` is False.
    """
    half = source.half
    assert data.shape[1:] == (2 * half + 1, 2 * half + 1)
    offsets = np.arange(-half, half + 1)
    disc = np.hypot(offsets[:, None], offsets[None, :]) <= 1.5 * source.fwhm
    weight = np.where(disc, weight, 0.0).astype(np.float64)
    bound = max(1.0, 0.6 * source.fwhm)
    n_pixels = np.count_nonzero(weight, axis=(1, 2))
    dx, dy, amplitude, error, chi2, inside = _fit(
        source._coefficients, np.ascontiguousarray(data, dtype=np.float64), weight, half, bound, n_iterations
    )
    enough = n_pixels >= 6
    return Fit(
        dx=np.where(enough, dx, 0.0),
        dy=np.where(enough, dy, 0.0),
        error=np.where(enough & (amplitude > 0), error, np.nan),
        amplitude=amplitude,
        chi2=np.where(enough, chi2 / np.maximum(n_pixels - 3, 1), np.nan),
        n_pixels=n_pixels,
        converged=enough & inside & (amplitude > 0),
    )


@njit(cache=True)
def _fit(spline, data, weight, half, bound, n_iterations):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    n, side = data.shape[0], 2 * half + 1
    dx, dy, amplitude, error, chi2 = np.zeros((5, n))
    inside = np.zeros(n, np.bool_)
    model, scratch = np.empty((3, side, side)), np.empty((2, 2 * side + 2))
    for k in range(n):
        x = y = 0.0
        for _ in range(n_iterations):
            _place(spline, x, y, half, True, scratch, model)
            _, xx, yy, xy, gx, gy, _ = _equations(data[k], weight[k], model)
            determinant = xx * yy - xy * xy
            step_x = min(max((yy * gx - xy * gy) / determinant, -0.5), 0.5)
            step_y = min(max((xx * gy - xy * gx) / determinant, -0.5), 0.5)
            x, y = min(max(x + step_x, -bound), bound), min(max(y + step_y, -bound), bound)
            if max(abs(step_x), abs(step_y)) <= 1e-4:
                break
        inside[k] = max(abs(x), abs(y)) < bound
        if not inside[k]:
            x = y = 0.0
        _place(spline, x, y, half, True, scratch, model)
        amplitude[k], xx, yy, xy, _, _, chi2[k] = _equations(data[k], weight[k], model)
        error[k] = np.sqrt(0.5 * (xx + yy) / (xx * yy - xy * xy))
        dx[k], dy[k] = x, y
    return dx, dy, amplitude, error, chi2, inside


@njit(cache=True)
def _equations(data, weight, model):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Normal equations for (dx, dy) with the amplitude projected out, at the best amplitude; and chi-square."""
    side = data.shape[0]
    vv = vd = vx = vy = xx = yy = xy = xd = yd = dd = 0.0
    for j in range(side):
        for i in range(side):
            w = weight[j, i]
            if w == 0:
                continue
            d, v, p, q = data[j, i], model[0, j, i], model[1, j, i], model[2, j, i]
            vv += w * v * v
            vd += w * v * d
            vx += w * v * p
            vy += w * v * q
            xx += w * p * p
            yy += w * q * q
            xy += w * p * q
            xd += w * p * d
            yd += w * q * d
            dd += w * d * d
    vv = max(vv, 1e-30)
    a = vd / vv
    # A tiny ridge keeps windows without weight, or without signal, solvable; they do not move.
    ridge = 1e-12 * (1.0 + vv + a * a * (xx + yy))
    return (
        a,
        a * a * (xx - vx * vx / vv) + ridge,
        a * a * (yy - vy * vy / vv) + ridge,
        a * a * (xy - vx * vy / vv),
        a * (xd - a * vx),
        a * (yd - a * vy),
        max(dd - a * vd, 0.0),
    )


def aperture_sum(
    data: NDArray, variance: NDArray, good: NDArray[np.bool_], dx: NDArray, dy: NDArray, source: PointSource
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum within 1.5 FWHM, corrected for what P_D has outside of it (and on bad pixels).

    Parameters
    ----------
    data, variance, good : ndarray (n, s, s)
        Windows of D, of side ``2 source.half + 1``; the variance of each pixel; and which pixels count.
    dx, dy : ndarray (n,)
        Centres relative to the central pixel, pixels.
    source : PointSource

    Returns
    -------
    total, error : ndarray (n,)
        Counts in D; NaN where less than a third of P_D is on good pixels of the aperture.
    """
    offsets = np.arange(-source.half, source.half + 1.0)
    distance = np.hypot((offsets - dx[:, None])[:, None, :], (offsets - dy[:, None])[:, :, None])
    inside = np.where(
        good, np.clip(1.5 * source.fwhm + 0.5 - distance, 0.0, 1.0), 0.0
    )  # pixels on the rim count partly
    fraction = np.sum(inside * source.shifted(dx, dy, source.half), axis=(1, 2))
    fraction = np.where(fraction > 1 / 3, fraction, np.nan)
    return np.sum(inside * data, axis=(1, 2)) / fraction, np.sqrt(np.sum(inside**2 * variance, axis=(1, 2))) / fraction


def moments(
    data: NDArray, dx: NDArray, dy: NDArray, fwhm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Size and shape from second moments under a round Gaussian weight of the PSF's FWHM.

    The weight keeps the noise of the wings out; its own narrowing is undone, exactly so for a Gaussian source:
    ``1 / λ_source = 1 / λ_measured − 1 / λ_weight`` along both axes. Each λ stays between 0.3² and (1.5 FWHM)² pix².

    Parameters
    ----------
    data : ndarray (n, s, s)
        Windows of D, times the sign of the detection, finite.
    dx, dy : ndarray (n,)
        Centre relative to the central pixel, pixels.
    fwhm : float
        FWHM of the weight, pixels.

    Returns
    -------
    fwhm, elongation, theta : ndarray (n,)
        Geometric mean of both axes in pixels, major over minor, degrees from x towards y in (−90, 90].
    """
    half = data.shape[1] // 2
    offsets = np.arange(-half, half + 1.0)
    x = (offsets - np.asarray(dx)[:, None])[:, None, :]
    y = (offsets - np.asarray(dy)[:, None])[:, :, None]
    variance = (fwhm / GAUSSIAN_FWHM) ** 2
    weighted = data * np.exp(-0.5 * (x**2 + y**2) / variance)
    total = weighted.sum(axis=(1, 2))
    total = np.where(total > 0, total, np.inf)
    xx, yy, xy = ((weighted * m).sum(axis=(1, 2)) / total for m in (x**2, y**2, x * y))
    middle, spread = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    smallest, largest = 0.3**2, (1.5 * fwhm) ** 2

    def without_weight(eigenvalue: NDArray) -> NDArray[np.float64]:
        measured = np.clip(eigenvalue, *(limit * variance / (limit + variance) for limit in (smallest, largest)))
        return np.asarray(measured * variance / (variance - measured))

    major, minor = without_weight(middle + spread), without_weight(middle - spread)
    theta = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))
    return GAUSSIAN_FWHM * (major * minor) ** 0.25, np.sqrt(major / minor), theta
