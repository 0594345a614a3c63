"""What the statistics of Gaussian noise promise: which sources are found, how many of nothing, and how well measured.

D is white with unit variance on blank sky and shows a source through P_D, so S is the source seen through P_D twice
plus Gaussian noise whose autocorrelation is that of P_D (E16 of Zackay, Ofek & Gal-Yam 2016, ApJ 830, 27;
doi:10.3847/0004-637X/830/1/27). Everything here follows from P_D alone. Probabilities and rates are Monte Carlo over
that noise, so that the pixel grid, the position of a source within its pixel, and the detector's freedom to choose the
highest pixel around are all in them; the tail of the normal distribution for one pixel has none of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import fftconvolve

from batchproc.imaging.render import shifted_stamp
from batchproc.records import Difference, Kernels

__all__ = ["Detectability", "autocorrelation", "gaussian_difference", "position_bound", "source_noise"]

_PHASES = 8  # sub-pixel positions along x and along y


def autocorrelation(psf: NDArray, dx: float = 0.0, dy: float = 0.0) -> NDArray[np.float64]:
    """S on blank sky, in sigma: its mean around a source of unit S/N, and the autocorrelation of its noise.

    Parameters
    ----------
    psf : ndarray (size, size)
        P_D: odd-sized, centred.
    dx, dy : float
        Position of the source relative to the middle pixel, pixels; 0 for the autocorrelation.

    Returns
    -------
    ndarray (2 size − 1, 2 size − 1) float64
        ``ρ(u) = Σ P_D(x) P_D(x + u − d) / Σ P_D²``; 1 in the middle for d = 0.
    """
    moved = shifted_stamp(psf, dx, dy)
    return np.asarray(fftconvolve(moved, psf[::-1, ::-1]) / np.sum(np.square(psf)))


@dataclass(frozen=True)
class Detectability:
    """Highest S around sources of any S/N, in many realisations of the noise.

    Attributes
    ----------
    noise : ndarray (n, m) float64
        S in sigma without a source, on the m pixels within the radius of one position, n realisations.
    signal : ndarray (n, m) float64
        Mean S there of a source of unit S/N, whose position within its pixel differs from row to row.
    """

    noise: NDArray[np.float64]
    signal: NDArray[np.float64]

    @classmethod
    def of(cls, psf: NDArray, *, radius: float, n: int = 4096, rng: int | np.random.Generator = 0) -> Detectability:
        """Draw the realisations.

        Parameters
        ----------
        psf : ndarray (size, size)
            P_D.
        radius : float
            A detection counts as the source when its peak lies within so many pixels.
        n : int
            Realisations; positions within the pixel are an even grid of 8 × 8.
        rng : int or Generator
        """
        rng = np.random.default_rng(rng)
        half = int(np.ceil(radius + 0.5))
        if 2 * half >= psf.shape[0]:
            psf = np.pad(psf, half)
        dy, dx = np.mgrid[-half : half + 1, -half : half + 1]
        dy, dx = dy.ravel(), dx.ravel()
        middle = psf.shape[0] - 1
        rho = autocorrelation(psf)
        covariance = rho[middle + dy[:, None] - dy[None, :], middle + dx[:, None] - dx[None, :]]
        values, vectors = np.linalg.eigh(covariance)
        noise = rng.standard_normal((n, len(dx))) @ (vectors * np.sqrt(np.maximum(values, 0))).T

        steps = (np.arange(_PHASES) + 0.5) / _PHASES - 0.5
        phases = [(px, py) for py in steps for px in steps]
        means, outside = [], []
        for px, py in phases:
            response = autocorrelation(psf, px, py)
            means.append(response[middle + dy, middle + dx])
            outside.append(np.hypot(dx - px, dy - py) > radius)
        which = np.arange(n) % len(phases)
        noise[np.array(outside)[which]] = -np.inf
        return cls(noise, np.array(means)[which])

    def probability(self, snr: ArrayLike, threshold: float) -> NDArray[np.float64]:
        """Probability that a source of this S/N (on its own local noise) is found above a threshold in sigma.

        Parameters
        ----------
        snr : array_like (k,)
            T / σ_α at the source's place, σ_α the error of its flux with all the noise that is there (E43).
        threshold : float

        Returns
        -------
        ndarray (k,) float64
        """
        snr = np.atleast_1d(np.asarray(snr, dtype=np.float64))
        if snr.size == 0:
            return np.zeros(0)
        # The probability is smooth in S/N: a grid of 0.1 serves any number of sources.
        grid = np.arange(max(0.0, np.floor(10 * snr.min()) / 10), snr.max() + 0.2, 0.1)
        grid = grid[grid < threshold + 6] if grid[0] < threshold + 5 else grid[:1]
        curve = [np.mean((self.noise + s * self.signal).max(axis=1) > threshold) for s in grid]
        return np.interp(snr, grid, curve)


def position_bound(psf: NDArray) -> tuple[float, float]:
    """Smallest possible errors of x and y, times the S/N: the Cramér–Rao bound for P_D in white noise.

    The Fisher matrix of flux and position separates for a source of S/N s: ``σ_x = √(Σ P_D² / Σ (∂P_D/∂x)²) / s``
    (times the correlation of x and y for a PSF whose axes are not those of the grid). The flux's own bound is
    ``σ_T = 1 / √F_S`` (E42), which is 1 in units of the S/N.

    Parameters
    ----------
    psf : ndarray (size, size)
        P_D.

    Returns
    -------
    x, y : float
        Pixels, for S/N 1.
    """
    wide = np.pad(np.asarray(psf, dtype=np.float64), 8)
    spectrum = np.fft.fft2(wide)
    frequency = 2j * np.pi * np.fft.fftfreq(wide.shape[0])
    slope_x = np.fft.ifft2(spectrum * frequency[None, :]).real
    slope_y = np.fft.ifft2(spectrum * frequency[:, None]).real
    power = np.sum(wide**2)
    fisher = np.array(
        [[np.sum(slope_x**2), np.sum(slope_x * slope_y)], [np.sum(slope_x * slope_y), np.sum(slope_y**2)]]
    )
    covariance = np.linalg.inv(fisher / power)
    return float(np.sqrt(covariance[0, 0])), float(np.sqrt(covariance[1, 1]))


def source_noise(psf: NDArray) -> float:
    """Variance of the flux that a source's own photons add, per electron of it: ``Σ P³ / (Σ P²)²``.

    That of a PSF-weighted flux in one image of this PSF; for two images of different PSFs it holds for the one that
    dominates the noise.
    """
    return float(np.sum(np.asarray(psf, dtype=np.float64) ** 3) / np.sum(np.square(psf)) ** 2)


def gaussian_difference(kernels: Kernels, shape: tuple[int, int], rng: int | np.random.Generator) -> Difference:
    """The difference of two images of nothing: D white, S its matched filter, nothing masked.

    What a detector finds here it finds in noise; its rate is the one to compare false alarms with.

    Parameters
    ----------
    kernels : Kernels
        Of the tile that is to be imitated.
    shape : (ny, nx)
    rng : int or Generator

    Returns
    -------
    Difference
        float32, of one tile, cyclic at its borders.
    """
    rng = np.random.default_rng(rng)
    ny, nx = shape
    noise = rng.standard_normal(shape, dtype=np.float32)
    psf = kernels.psf
    height, width = (min(n, (limit - 1) // 2 * 2 + 1) for n, limit in zip(psf.shape, shape, strict=True))
    y0, x0 = (psf.shape[0] - height) // 2, (psf.shape[1] - width) // 2
    frame = np.zeros(shape)
    frame[:height, :width] = psf[y0 : y0 + height, x0 : x0 + width]
    frame = np.roll(frame, (-(height // 2), -(width // 2)), axis=(0, 1))
    p_d = np.fft.rfft2(frame)
    score = np.fft.irfft2(np.conj(p_d) * np.fft.rfft2(noise), s=shape) / np.sqrt(np.sum(frame**2))
    root_f_s = np.sqrt(kernels.f_s)
    score_corr = score.astype(np.float32)
    return Difference(
        difference=noise,
        score_corr=score_corr,
        flux=score_corr / np.float32(root_f_s),
        flux_err=np.full(shape, 1 / root_f_s, np.float32),
        mask=np.zeros(shape, np.uint8),
        kernels=(Kernels(**{**kernels.__dict__, "x0": 0, "x1": nx, "y0": 0, "y1": ny}),),
    )
