"""Small scenes with planted sources, subtracted by the plain ZOGY: what detection is tested on."""

from dataclasses import dataclass, replace

import numpy as np

from batchproc.records import Difference
from tests.imaging._psfs import gaussian
from tests.imaging._zogy_reference import reference_difference, reference_zogy

SIZE = 41  # of the PSF stamps


@dataclass(frozen=True)
class Scene:
    """Blank sky in both images: PSF widths, noises, and flux scale (new over ref)."""

    fwhm_new: float = 3.4
    fwhm_ref: float = 2.6
    sigma_new: float = 20.0
    sigma_ref: float = 9.0
    flux_ratio: float = 1.3
    stretch: float = 1.0  # major over minor axis of both PSFs, along x

    def psf(self, which, dx=0.0, dy=0.0):
        fwhm = {"new": self.fwhm_new, "ref": self.fwhm_ref}[which]
        if self.stretch == 1:
            return gaussian(fwhm, SIZE, dx, dy)
        r, sigma = np.arange(SIZE) - SIZE // 2, fwhm / 2.3548200450309493
        psf = np.exp(-((r[:, None] - dy) ** 2 * self.stretch + (r[None, :] - dx) ** 2 / self.stretch) / (2 * sigma**2))
        return psf / psf.sum()

    def root_f_s(self):
        """S/N of a source of unit flux on blank sky."""
        return np.sqrt(self.zogy(np.zeros((128, 128)), np.zeros((128, 128))).F_S)

    def zogy(self, new, ref, **more):
        return reference_zogy(
            new,
            ref,
            self.psf("new"),
            self.psf("ref"),
            sigma_n=self.sigma_new,
            sigma_r=self.sigma_ref,
            F_r=1 / self.flux_ratio,
            **more,
        )

    def subtract(self, new, ref, *, seed=None, photon_noise=True, **more) -> Difference:
        """The difference of two noiseless images, with noise of its own when there is a seed."""
        variance = [self.sigma_new**2, self.sigma_ref**2]
        if photon_noise:
            variance = [variance[0] + np.maximum(new, 0), variance[1] + np.maximum(ref, 0)]
        if seed is not None:
            rng = np.random.default_rng(seed)
            new = new + rng.normal(size=new.shape) * np.sqrt(variance[0])
            ref = ref + rng.normal(size=ref.shape) * np.sqrt(variance[1])
        result = self.zogy(new, ref, V_n=variance[0], V_r=variance[1], **more)
        return reference_difference(result, sigma_n=self.sigma_new, sigma_r=self.sigma_ref, psf_size=2 * SIZE - 1)


def plant(image, scene, which, x, y, flux):
    """Add point sources (fluxes in the units of new) to an image, in place."""
    half = SIZE // 2
    scale = 1.0 if which == "new" else 1 / scene.flux_ratio
    for x0, y0, f in zip(x, y, np.broadcast_to(flux, np.shape(x)), strict=True):
        i, j = round(x0), round(y0)
        rows = np.arange(max(j - half, 0), min(j + half + 1, image.shape[0]))
        columns = np.arange(max(i - half, 0), min(i + half + 1, image.shape[1]))
        stamp = scene.psf(which, x0 - i, y0 - j)
        image[np.ix_(rows, columns)] += f * scale * stamp[np.ix_(rows - j + half, columns - i + half)]


def grid(shape, step=44, seed=0):
    """Positions on a jittered grid away from the borders."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(step, shape[1] - step + 1, step), np.arange(step, shape[0] - step + 1, step))
    return x.ravel() + rng.uniform(-0.5, 0.5, x.size), y.ravel() + rng.uniform(-0.5, 0.5, y.size)


def match(candidates, x, y, radius=2.5):
    """Row of the nearest candidate of each position, and whether it is within the radius."""
    distance = np.hypot(candidates["x"][None] - np.asarray(x)[:, None], candidates["y"][None] - np.asarray(y)[:, None])
    if distance.shape[1] == 0:
        return np.zeros(len(x), int), np.zeros(len(x), bool)
    return distance.argmin(axis=1), distance.min(axis=1) < radius


def join(left: Difference, right: Difference, seam: int) -> Difference:
    """Two subtractions of the same images, the first left of the seam and the second right of it: two tiles."""
    nx = left.difference.shape[1]

    def side_by_side(a, b):
        return np.hstack([a[:, :seam], b[:, seam:]])

    names = ("difference", "score_corr", "flux", "flux_err", "mask")
    return replace(
        left,
        **{name: side_by_side(getattr(left, name), getattr(right, name)) for name in names},
        kernels=(replace(left.kernels[0], x1=seam), replace(right.kernels[0], x0=seam, x1=nx)),
    )
