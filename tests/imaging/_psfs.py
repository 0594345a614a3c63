"""Plain PSFs for tests."""

import numpy as np


def gaussian(fwhm, size=31, dx=0.0, dy=0.0):
    """Gaussian stamp of unit sum, off its centre by (dx, dy)."""
    sigma = fwhm / 2.3548200450309493
    r = np.arange(size) - size // 2
    psf = np.exp(-((r[:, None] - dy) ** 2 + (r[None, :] - dx) ** 2) / (2 * sigma**2))
    return psf / psf.sum()


def moffat(fwhm, size=31, beta=3.0, dx=0.0, dy=0.0):
    """Moffat stamp of unit sum: a core with the wings of real seeing."""
    alpha = fwhm / (2 * np.sqrt(2 ** (1 / beta) - 1))
    r = np.arange(size) - size // 2
    psf = (1 + ((r[:, None] - dy) ** 2 + (r[None, :] - dx) ** 2) / alpha**2) ** -beta
    return psf / psf.sum()


def measured(fwhm, size=31, seed=0):
    """A PSF as it is measured: a lopsided Moffat with one per cent of its peak as noise in every pixel."""
    rng = np.random.default_rng(seed)
    psf = 0.8 * moffat(fwhm, size) + 0.2 * moffat(1.3 * fwhm, size, dx=0.3, dy=-0.2)
    psf += rng.normal(0, 0.01 * psf.max(), psf.shape) * (psf > 0.01 * psf.max())
    return psf / psf.sum()


class ConstantPsf:
    """The simplest PsfLike."""

    def __init__(self, psf, fwhm):
        self.psf, self.fwhm, self.size = psf, fwhm, psf.shape[0]

    def at(self, x, y):
        return self.psf
