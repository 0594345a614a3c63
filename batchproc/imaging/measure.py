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
from numpy.typing import NDArray
from scipy.ndimage import spline_filter

from batchproc.imaging.cutouts import windows

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
        dx, dy = (grid.ravel() for grid in np.meshgrid(*[np.arange(steps) / steps] * 2))
        fine = self.shifted(dx, dy, reach)  # every sub-pixel phase of P_D
        return float(2.0 * np.sqrt(np.count_nonzero(fine > level) / np.pi) / steps)

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
        spline, (taps_x, _), (taps_y, _) = self._patch(dx, dy, half)
        return _along_y(_along_x(spline, taps_x), taps_y)

    def with_slopes(
        self, dx: NDArray, dy: NDArray, half: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """`shifted`, and its derivatives with respect to dx and dy."""
        spline, (taps_x, slope_x), (taps_y, slope_y) = self._patch(dx, dy, half)
        rows = _along_x(spline, taps_x)
        # A pixel is two steps of the grid.
        return (
            _along_y(rows, taps_y),
            2.0 * _along_y(_along_x(spline, slope_x), taps_y),
            2.0 * _along_y(rows, slope_y),
        )

    def _patch(self, dx: NDArray, dy: NDArray, half: int) -> tuple[NDArray, tuple[NDArray, ...], tuple[NDArray, ...]]:
        """Coefficients that the window needs, and the splines' weights along x and y."""
        size = self.psf.shape[0]
        whole_x, whole_y = np.floor(2 * dx).astype(np.int64), np.floor(2 * dy).astype(np.int64)
        spline = windows(self._coefficients, size - whole_x, size - whole_y, 2 * half + 2)
        return spline, _taps(2 * dx - whole_x), _taps(2 * dy - whole_y)


def _taps(t: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cubic B-splines at 2 − t, 1 − t, −t, −1 − t (0 ≤ t < 1), and their derivatives with respect to t: (n, 4)."""
    s = 1.0 - t
    value = (t * t * t, 4 + s * s * (3 * s - 6), 4 + t * t * (3 * t - 6), s * s * s)
    slope = (3 * t * t, -s * (9 * s - 12), t * (9 * t - 12), -3 * s * s)
    return np.stack(value, axis=1) / 6.0, np.stack(slope, axis=1) / 6.0


def _along_x(spline: NDArray, taps: NDArray) -> NDArray[np.float64]:
    """Four neighbours weighted, at every second step of the grid: whole pixels."""
    stop = spline.shape[2] - 4
    return sum(taps[:, None, None, k] * spline[:, :, k : k + stop : 2] for k in range(4))  # type: ignore[return-value]


def _along_y(rows: NDArray, taps: NDArray) -> NDArray[np.float64]:
    stop = rows.shape[1] - 4
    return sum(taps[:, None, None, k] * rows[:, k : k + stop : 2] for k in range(4))  # type: ignore[return-value]


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
    n, half = len(data), source.half
    assert data.shape[1:] == (2 * half + 1, 2 * half + 1)
    offsets = np.arange(-half, half + 1)
    disc = np.hypot(offsets[:, None], offsets[None, :]) <= 1.5 * source.fwhm
    weight = np.where(disc, weight, 0.0).astype(np.float64)
    data = data.astype(np.float64)
    bound = max(1.0, 0.6 * source.fwhm)
    n_pixels = np.count_nonzero(weight, axis=(1, 2))

    position = np.zeros((n, 2))
    moving = np.arange(n)
    for _ in range(n_iterations):
        normal, gradient, _ = _normal_equations(data[moving], weight[moving], source, position[moving])
        step = np.clip(np.linalg.solve(normal, gradient[..., None])[:, 1:, 0], -0.5, 0.5)
        position[moving] = np.clip(position[moving] + step, -bound, bound)
        moving = moving[np.abs(step).max(axis=1, initial=0.0) > 1e-4]
        if moving.size == 0:
            break
    enough = n_pixels >= 6
    converged = enough & (np.abs(position).max(axis=1, initial=0.0) < bound)
    position[~converged] = 0.0

    normal, _, amplitude = _normal_equations(data, weight, source, position)
    converged &= amplitude > 0
    covariance = np.linalg.inv(normal)
    error = np.sqrt(0.5 * (covariance[:, 1, 1] + covariance[:, 2, 2]))
    model = amplitude[:, None, None] * source.shifted(position[:, 0], position[:, 1], half)
    chi2 = np.sum(weight * (data - model) ** 2, axis=(1, 2)) / np.maximum(n_pixels - 3, 1)
    return Fit(
        dx=position[:, 0],
        dy=position[:, 1],
        error=np.where(enough & (amplitude > 0), error, np.nan),
        amplitude=amplitude,
        chi2=np.where(enough, chi2, np.nan),
        n_pixels=n_pixels,
        converged=converged,
    )


def _normal_equations(
    data: NDArray, weight: NDArray, source: PointSource, position: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Normal matrix (n, 3, 3) and gradient (n, 3) for (amplitude, dx, dy) at the best amplitude (n,) for a position."""
    value, d_dx, d_dy = source.with_slopes(position[:, 0], position[:, 1], source.half)
    power = np.einsum("nij,nij,nij->n", weight, value, value)
    amplitude = np.einsum("nij,nij,nij->n", weight, value, data) / np.maximum(power, 1e-30)
    scale = amplitude[:, None, None]
    n, n_pixels = len(data), data.shape[1] * data.shape[2]
    jacobian = np.stack([value, scale * d_dx, scale * d_dy], axis=1).reshape(n, 3, n_pixels)
    weighted = jacobian * weight.reshape(n, 1, n_pixels)
    normal = weighted @ jacobian.transpose(0, 2, 1)
    # A tiny ridge keeps windows without weight, or without signal, solvable; they do not move.
    normal += 1e-12 * np.eye(3) * (1.0 + np.trace(normal, axis1=1, axis2=2)[:, None, None])
    residual = (data - scale * value).reshape(n, n_pixels, 1)
    return normal, (weighted @ residual)[..., 0], amplitude


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
