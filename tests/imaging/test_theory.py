"""Detection probabilities, bounds and Gaussian fields, against closed forms and against brute force."""

import numpy as np
import pytest
from scipy.stats import norm

from batchproc.imaging.render import add_sources, gaussian_psf, moffat_psf
from batchproc.imaging.theory import Detectability, autocorrelation, gaussian_difference, position_bound, source_noise
from batchproc.records import Kernels

FWHM = 3.0
SIGMA = FWHM / 2.3548200450309493


def kernels(psf):
    return Kernels(
        0, 1, 0, 1, psf=psf, delta_new=psf, delta_ref=psf, f_d=0.05, f_s=0.002, sigma_new=20.0, sigma_ref=9.0
    )


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.4, -0.3)])
def test_a_gaussian_psf_is_seen_twice(shift):
    """S around a source is a Gaussian of √2 times the width, centred where the source is."""
    rho = autocorrelation(gaussian_psf(FWHM), *shift)
    half = rho.shape[0] // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    expected = np.exp(-((x - shift[0]) ** 2 + (y - shift[1]) ** 2) / (4 * SIGMA**2))
    np.testing.assert_allclose(rho, expected, atol=1e-4)


@pytest.mark.parametrize("psf", [gaussian_psf(FWHM), moffat_psf(2.2, axis_ratio=0.6)], ids=["gaussian", "moffat"])
def test_probabilities_are_those_of_whole_images(psf):
    """Sources of known S/N in images of white D: the fraction whose S exceeds the threshold is the predicted one."""
    rng = np.random.default_rng(1)
    side, step, threshold, radius = 640, 32, 5.0, 3.0
    norm_psf = np.sqrt(np.sum(psf**2))
    grid = np.arange(step // 2, side, step)
    model = Detectability.of(psf, radius=radius, n=8192)
    frame = np.zeros((side, side))
    half = psf.shape[0] // 2
    frame[: psf.shape[0], : psf.shape[1]] = psf
    p_hat = np.fft.rfft2(np.roll(frame, (-half, -half), axis=(0, 1)))
    for snr in (4.0, 5.0, 6.5):
        found = n = 0
        for _ in range(3):
            x, y = (c.ravel() + rng.uniform(-0.5, 0.5, c.size) for c in np.meshgrid(grid, grid))
            d = add_sources(rng.standard_normal((side, side)), x, y, np.full(x.size, snr / norm_psf), psf)
            s = np.fft.irfft2(np.fft.rfft2(d) * np.conj(p_hat), s=d.shape) / norm_psf
            for a, b in zip(x, y, strict=True):
                rows, columns = np.ogrid[int(b) - 5 : int(b) + 7, int(a) - 5 : int(a) + 7]
                near = np.hypot(columns - a, rows - b) <= radius
                found += bool((s[rows, columns][near] > threshold).any())
                n += 1
        p = model.probability([snr], threshold)[0]
        assert found / n == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) * (1 / n + 1 / 8192)))


def test_the_highest_pixel_around_is_found_more_often_than_one_pixel():
    """At the threshold more than half of the sources are found, and always more than the best placed pixel alone."""
    model = Detectability.of(gaussian_psf(FWHM), radius=3.0, n=8192)
    snr = np.arange(3.0, 9.0, 0.5)
    probability = model.probability(snr, 5.0)
    assert (np.diff(probability) > 0).all()
    worst_phase = autocorrelation(gaussian_psf(FWHM), 0.5, 0.5).max()
    assert (probability > norm.cdf(worst_phase * snr - 5.0)).all()
    assert model.probability([5.0], 5.0)[0] > 0.5
    assert model.probability([30.0, 5.0], 5.0)[0] == 1.0
    assert model.probability([], 5.0).shape == (0,)


def test_position_bound_of_gaussians():
    """√2 σ along each axis over the S/N; of tilted axes the correlation of x and y makes it larger."""
    assert position_bound(gaussian_psf(FWHM)) == pytest.approx([np.sqrt(2) * SIGMA] * 2, rel=1e-4)
    x, y = position_bound(gaussian_psf(4.0, axis_ratio=0.5, theta=0.0))
    assert (x / y) == pytest.approx(2.0, rel=0.01)
    tilted = position_bound(gaussian_psf(4.0, axis_ratio=0.5, theta=45.0))
    assert tilted == pytest.approx([np.sqrt((x**2 + y**2) / 2)] * 2, rel=0.01)


def test_own_photons_of_a_gaussian():
    """Σ P³ / (Σ P²)² of a Gaussian is 4/3."""
    assert source_noise(gaussian_psf(FWHM)) == pytest.approx(4 / 3, rel=1e-4)


@pytest.mark.parametrize("shape", [(512, 511), (21, 400)])
def test_gaussian_fields_are_what_blank_sky_should_be(shape):
    """D white, S_corr of unit width with P_D's autocorrelation, fluxes that agree with it; the same for a seed."""
    psf = gaussian_psf(FWHM)
    d = gaussian_difference(kernels(psf), shape, 3)
    n_independent = d.difference.size / (8 * np.pi * SIGMA**2)
    s = d.score_corr.astype(np.float64)
    assert d.difference.std() == pytest.approx(1, abs=4 / np.sqrt(2 * d.difference.size))
    assert s.std() == pytest.approx(1, abs=4 / np.sqrt(n_independent))
    lag = np.mean(s * np.roll(s, 1, axis=1))
    assert lag == pytest.approx(np.exp(-1 / (4 * SIGMA**2)), abs=6 / np.sqrt(n_independent))
    np.testing.assert_allclose(d.flux / d.flux_err, d.score_corr, rtol=1e-5)
    assert (d.kernels[0].x1, d.kernels[0].y1) == shape[::-1]
    np.testing.assert_array_equal(d.score_corr, gaussian_difference(kernels(psf), shape, 3).score_corr)
