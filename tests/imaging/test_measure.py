"""A point source on white noise is measured as well as the noise allows, wherever in its pixel it lies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.imaging.measure import GAUSSIAN_FWHM, PointSource, aperture_sum, fit_position, moments
from tests.imaging._psfs import gaussian

few = settings(max_examples=40, deadline=None)
offset = st.floats(-0.7, 0.7)


def exact(fwhm, half, dx, dy):
    """Gaussian profiles sampled at the pixels' centres."""
    sigma = fwhm / GAUSSIAN_FWHM
    r = np.arange(-half, half + 1)
    gx, gy = (np.exp(-((r - np.asarray(d)[:, None]) ** 2) / (2 * sigma**2)) for d in (dx, dy))
    return gy[:, :, None] * gx[:, None, :] / (2 * np.pi * sigma**2)


@few
@given(fwhm=st.floats(2.2, 7.0), dx=st.floats(-3, 3), dy=st.floats(-3, 3))
def test_shifted_psf_is_the_psf_of_a_shifted_source(fwhm, dx, dy):
    """To half a per cent of the peak at a FWHM of 2.2 pixels, much better above; its slopes are its derivatives."""
    source = PointSource(gaussian(fwhm, 41))
    half = source.half
    value, d_dx, d_dy = source.with_slopes(np.array([dx]), np.array([dy]), half)
    truth = exact(fwhm, half, [dx], [dy])
    assert np.abs(value - truth).max() < 5e-3 * truth.max()
    np.testing.assert_array_equal(value, source.shifted(np.array([dx]), np.array([dy]), half))
    step = 1e-5
    for slope, sx, sy in ((d_dx, step, 0.0), (d_dy, 0.0, step)):
        above, below = (source.shifted(np.array([dx + s * sx]), np.array([dy + s * sy]), half) for s in (1, -1))
        np.testing.assert_allclose(slope, (above - below) / (2 * step), atol=1e-6)


@few
@given(fwhm=st.floats(2.0, 8.0))
def test_fwhm_is_the_width_at_half_maximum(fwhm):
    assert abs(PointSource(gaussian(fwhm, 41)).fwhm / fwhm - 1) < 0.03


@few
@given(fwhm=st.floats(2.2, 7.0), dx=offset, dy=offset)
def test_a_noiseless_source_is_fitted_exactly(fwhm, dx, dy):
    """Position and amplitude come back to a few thousandths, and nothing of chi-square remains."""
    source = PointSource(gaussian(fwhm, 41))
    data = 50.0 * exact(fwhm, source.half, [dx], [dy])
    fit = fit_position(data, np.ones_like(data), source)
    assert fit.converged.all()
    assert abs(fit.dx[0] - dx) < 3e-3
    assert abs(fit.dy[0] - dy) < 3e-3
    assert abs(fit.amplitude[0] / 50 - 1) < 5e-3
    assert fit.chi2[0] < 1e-3


@pytest.mark.parametrize("snr", [8, 20, 60])
def test_positions_reach_the_bound_of_the_noise(snr):
    """On white noise: no bias, a scatter within 8 % of √2 σ_PSF / (S/N), and errors that say so."""
    fwhm, n = 3.0, 1500
    source = PointSource(gaussian(fwhm, 41))
    rng = np.random.default_rng(5)
    dx, dy = rng.uniform(-0.5, 0.5, (2, n))
    data = snr / np.sqrt(np.sum(source.psf**2)) * exact(fwhm, source.half, dx, dy)
    data += rng.normal(size=data.shape)
    fit = fit_position(data, np.ones_like(data), source)
    bound = np.sqrt(2) * fwhm / GAUSSIAN_FWHM / snr
    error = np.concatenate([fit.dx - dx, fit.dy - dy])
    assert abs(error.mean()) < 4 * bound / np.sqrt(2 * n)
    assert error.std() < 1.08 * bound
    assert abs(np.median(fit.error) / bound - 1) < 0.05
    assert abs(fit.chi2.mean() - 1) < 0.01
    assert fit.converged.all()


def test_left_out_pixels_do_not_matter():
    """Garbage where the weight is 0 changes nothing."""
    source = PointSource(gaussian(3.0, 41))
    data = 60.0 * exact(3.0, source.half, [0.3], [-0.2])
    weight = np.ones_like(data)
    weight[0, 5, 7] = weight[0, 2, :] = 0
    spoilt = np.where(weight > 0, data, 1e6)
    fit = fit_position(spoilt, weight, source)
    assert np.hypot(fit.dx[0] - 0.3, fit.dy[0] + 0.2) < 3e-3


def test_a_fit_without_pixels_stays_where_it_was():
    """Too few pixels, or a position that runs away: the central pixel, not converged, no invented error."""
    source = PointSource(gaussian(3.0, 41))
    half = source.half
    data = np.zeros((3, 2 * half + 1, 2 * half + 1))
    weight = np.ones_like(data)
    weight[0] = 0
    data[1] = 100 * exact(3.0, half, [4.0], [0.0])[0]  # another source, at the rim
    fit = fit_position(data, weight, source)  # the third is empty
    assert not fit.converged.any()
    assert (fit.dx == 0).all()
    assert (fit.dy == 0).all()
    assert np.isnan(fit.error[[0, 2]]).all()
    assert np.isnan(fit.chi2[0])
    assert fit.n_pixels[0] == 0


@few
@given(
    major=st.floats(1.0, 3.0),
    ratio=st.floats(0.4, 1.0),
    angle=st.floats(-89.0, 89.0),
    dx=offset,
    dy=offset,
)
def test_moments_know_a_gaussian_of_any_shape(major, ratio, angle, dx, dy):
    """Size, elongation and angle, although the weight is round and of another width."""
    minor = max(major * ratio, 0.8)
    half, t = 14, np.radians(angle)
    r = np.arange(-half, half + 1)
    x, y = r[None, :] - dx, r[:, None] - dy
    along, across = x * np.cos(t) + y * np.sin(t), -x * np.sin(t) + y * np.cos(t)
    data = np.exp(-(along**2) / (2 * major**2) - across**2 / (2 * minor**2))[None]
    fwhm, elongation, theta = moments(data, np.array([dx]), np.array([dy]), 4.0)
    assert abs(fwhm[0] / (GAUSSIAN_FWHM * np.sqrt(major * minor)) - 1) < 0.02
    assert abs(elongation[0] * minor / major - 1) < 0.05
    if major / minor > 1.1:
        assert abs((theta[0] - angle + 90) % 180 - 90) < 3


def test_moments_of_nothing_are_finite():
    """Noise, holes and emptiness give numbers within the stated limits, never NaN."""
    data = np.stack([np.zeros((15, 15)), -np.ones((15, 15)), np.random.default_rng(0).normal(size=(15, 15))])
    fwhm, elongation, theta = moments(data, np.zeros(3), np.zeros(3), 3.0)
    assert np.isfinite([fwhm, elongation, theta]).all()
    assert (fwhm >= 0.3 * GAUSSIAN_FWHM * 0.999).all()
    assert (fwhm <= 1.5 * 3 * GAUSSIAN_FWHM * 1.001).all()


@few
@given(fwhm=st.floats(2.2, 6.0), dx=offset, dy=offset, seed=st.integers(0, 100))
def test_aperture_is_corrected_for_what_it_misses(fwhm, dx, dy, seed):
    """The whole source comes back from 1.5 FWHM, also with a tenth of the pixels missing; its error is of the rest.

    Where the brightest pixels are among the missing ones it is half as large again, for the rest is scaled up by more.
    """
    source = PointSource(gaussian(fwhm, 41))
    data = 70.0 * exact(fwhm, source.half, [dx], [dy])
    good = np.random.default_rng(seed).uniform(size=data.shape) > 0.1
    total, error = aperture_sum(
        np.where(good, data, 1e6), np.ones_like(data), good, np.array([dx]), np.array([dy]), source
    )
    assert abs(total[0] / 70 - 1) < 0.01
    y, x = np.mgrid[-source.half : source.half + 1, -source.half : source.half + 1]
    fine = (np.arange(5) - 2) / 5
    inside = np.mean([[np.hypot(x + a - dx, y + b - dy) <= 1.5 * fwhm for a in fine] for b in fine], axis=(0, 1))
    weight = inside * good[0]
    expected = np.sqrt((weight**2).sum()) / (weight * data[0] / 70).sum()
    assert error[0] == pytest.approx(expected, rel=0.05)


def test_an_aperture_without_pixels_says_so():
    source = PointSource(gaussian(3.0, 41))
    empty = np.zeros((1, 2 * source.half + 1, 2 * source.half + 1))
    total, error = aperture_sum(empty, empty, empty > 0, np.zeros(1), np.zeros(1), source)
    assert np.isnan(total[0])
    assert np.isnan(error[0])
