"""Plain PSFs for tests."""

import numpy as np


def gaussian(fwhm, size=31, dx=0.0, dy=0.0):
    """Gaussian stamp of unit sum, off its centre by (dx, dy)."""
    sigma = fwhm / 2.3548200450309493
    r = np.arange(size) - size // 2
    psf = np.exp(-((r[:, None] - dy) ** 2 + (r[None, :] - dx) ** 2) / (2 * sigma**2))
    return psf / psf.sum()


class ConstantPsf:
    """The simplest PsfLike."""

    def __init__(self, psf, fwhm):
        self.psf, self.fwhm, self.size = psf, fwhm, psf.shape[0]

    def at(self, x, y):
        return self.psf
