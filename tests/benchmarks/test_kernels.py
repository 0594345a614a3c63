"""The inner loops by themselves: ``pytest -m bench tests/benchmarks`` (needs pytest-benchmark, of the extra ``bench``).

Every kernel also runs once, small, in the usual tests, so that it does not rot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from batchproc.imaging.background import measure_background
from batchproc.imaging.photometry import psf_flux
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.psf import fit_psf
from batchproc.imaging.resample import resample
from batchproc.imaging.simulate import simulate_pair
from batchproc.imaging.subtract import subtract
from batchproc.imaging.zogy import make_filters

Kernel = Callable[[int], Callable[[], Any]]


def _pair(side: int) -> Any:
    return simulate_pair((side, side), seed=2, n_transients=3, fwhm_new=3.0, fwhm_ref=2.5, saturation=np.inf)


def filters(side: int) -> Callable[[], Any]:
    """The spectra of one tile's PSFs."""
    pair = _pair(64)
    stamps = pair.psf_new.at(0, 0), pair.psf_ref.at(0, 0)
    return lambda: make_filters((side, side), *stamps, sigma_new=20.0, sigma_ref=10.0, flux_ratio=1.3)


def subtraction(side: int) -> Callable[[], Any]:
    """All tiles of an image, and nothing measured on it."""
    pair = _pair(side)
    rms = {"rms_new": np.full_like(pair.new, pair.sigma_new), "rms_ref": np.full_like(pair.new, pair.sigma_ref)}
    given = {"variance_new": pair.variance_new, "variance_ref": pair.variance_ref, "flux_ratio": 1.3, **rms}
    images = pair.new, pair.ref, pair.psf_new, pair.psf_ref
    return lambda: subtract(*images, **given, star_residuals=False, renormalise=False)


def resampling(side: int) -> Callable[[], Any]:
    """Lanczos 3 through a small rotation, with a mask."""
    pair = _pair(side)
    pixel_map = PixelMap.from_affine([[1.0, 2e-3, 1.3], [-2e-3, 1.0, -2.4]], pair.new.shape)
    return lambda: resample(pair.ref, pixel_map, pair.new.shape, mask=pair.mask_ref)


def background(side: int) -> Callable[[], Any]:
    """Sky level and noise."""
    pair = _pair(side)
    image = pair.new + pair.sky_new
    return lambda: measure_background(image, pair.mask_new != 0)


def star_fluxes(side: int) -> Callable[[], Any]:
    """PSF fluxes of the image's stars."""
    pair = _pair(side)
    stars = pair.stars["x"], pair.stars["y"]
    return lambda: psf_flux(pair.new, pair.variance_new, pair.mask_new, *stars, pair.psf_new)


def psf(side: int) -> Callable[[], Any]:
    """The PSF from the image's stars."""
    pair = _pair(side)
    rms = np.full_like(pair.new, pair.sigma_new)
    return lambda: fit_psf(pair.new, None, pair.mask_new, rms=rms)


KERNELS: dict[str, tuple[Kernel, int]] = {
    "filters": (filters, 512),
    "subtraction": (subtraction, 1024),
    "resampling": (resampling, 1024),
    "background": (background, 1024),
    "star fluxes": (star_fluxes, 1024),
    "psf": (psf, 1024),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_runs(name):
    """What is to be measured works, on a small image."""
    kernel, _ = KERNELS[name]
    assert kernel(256)() is not None


@pytest.mark.bench
@pytest.mark.parametrize("name", KERNELS)
def test_speed(name, request):
    """CPU seconds of one call, after a first that compiles and plans."""
    pytest.importorskip("pytest_benchmark")
    request.node.add_marker(pytest.mark.benchmark(timer=time.process_time))
    kernel, side = KERNELS[name]
    request.getfixturevalue("benchmark").pedantic(kernel(side), rounds=5, warmup_rounds=1)
