"""Fluxes, flux ratios, and the noise that sources bring."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.imaging.centres import fit_positions, match_centres
from batchproc.imaging.photometry import aperture_flux, measure_flux_ratio, psf_flux
from batchproc.imaging.polynomial import Frame, Polynomial, n_terms
from batchproc.imaging.psf import PsfModel, fit_psf
from batchproc.imaging.variance import source_variance

from ._starfield import lopsided, moffat, stamp, star_field

PSF = moffat(3.5)


@pytest.fixture(scope="module")
def field():
    return star_field(PSF, n=700, n_stars=150, flux=(1.5e3, 2e5), separation=35, seed=2)


@pytest.fixture(scope="module")
def model():
    return PsfModel.from_array(stamp(PSF, 61))


def total_variance(field):
    return field.light + field.rms**2


def test_psf_fluxes_are_true_and_so_are_their_errors(field, model):
    """True to 0.3 % on average at all brightnesses; (measured − true) / error has mean 0 and width 1; chi-square 1."""
    flux, error, chi2, ok = psf_flux(field.flat, total_variance(field), None, field.x, field.y, model)
    assert ok.all()
    pull = (flux - field.flux) / error
    assert abs(pull.mean()) < 4 / np.sqrt(len(pull))
    assert pull.std() == pytest.approx(1, abs=0.2)
    weight = (field.flux / error) ** 2
    assert np.average(flux / field.flux, weights=weight) == pytest.approx(1, abs=0.003)
    assert np.median(chi2) == pytest.approx(1, abs=0.1)


def test_psf_fluxes_with_a_measured_psf(field):
    """The same with the PSF measured from the image, within 0.5 % after what lies outside its stamp."""
    psf = fit_psf(field.flat, None, None, rms=field.rms_map)
    variance = source_variance(field.flat, field.rms_map**2, psf)
    flux, error, _, ok = psf_flux(field.flat, variance, None, field.x, field.y, psf)
    inside = stamp(PSF, psf.size).sum()
    ratio = flux[ok] / field.flux[ok] / inside
    assert np.average(ratio, weights=(field.flux[ok] / error[ok]) ** 2) == pytest.approx(1, abs=0.005)
    assert ((flux[ok] - field.flux[ok]) / error[ok]).std() < 1.4


def test_masked_pixels_take_no_part(field, model):
    """A masked hot pixel beside the core changes a flux within its error; a masked core is not measured."""
    mask = np.zeros(field.data.shape, dtype=np.uint8)
    data = field.flat
    column, row = round(field.x[0]), round(field.y[0])
    data[row + 2, column + 2] = 1e7
    mask[row + 2, column + 2] = 2
    x, y = round(field.x[1]), round(field.y[1])
    mask[y - 1 : y + 2, x - 1 : x + 2] = 1
    flux, error, _, ok = psf_flux(data, total_variance(field), mask, field.x[:3], field.y[:3], model)
    assert ok.tolist() == [True, False, True]
    assert abs(flux[0] - field.flux[0]) < 4 * error[0]
    assert np.isnan([flux[1], error[1]]).all()


def test_places_outside_are_not_measured(field, model):
    """Outside the image, or half over its edge: not ok; just inside: some stars are."""
    flux, _, _, ok = psf_flux(field.flat, total_variance(field), None, [-5.0, 0.0, 3.0], [300.0, 300.0, 300.0], model)
    assert ok.tolist() == [False, False, True]
    assert np.isnan(flux[:2]).all()


def test_aperture_fluxes_are_sums(field):
    """A circle of 12 pixels holds what the PSF has in it."""
    flux, error, ok = aperture_flux(field.flat, total_variance(field), None, field.x, field.y, 12.0)
    v, u = np.mgrid[-30:31, -30:31]
    inside = stamp(PSF, 61)[np.hypot(u, v) < 12].sum()
    good = ok & (field.flux > 2e4)
    assert np.median(flux[good] / field.flux[good]) == pytest.approx(inside, abs=0.01)
    pull = (flux - inside * field.flux)[ok] / error[ok]
    assert pull.std() < 1.6


@given(snr=st.floats(6, 200), beta=st.floats(0.05, 20), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_flux_ratio_is_unbiased(snr, beta, seed):
    """Faint or bright stars, any ratio, a tenth of them variable: within 5 of its errors of the truth."""
    rng = np.random.default_rng(seed)
    true = snr * rng.uniform(1, 10, 80)
    new, ref = beta * true + beta * rng.normal(0, 1, 80), true + rng.normal(0, 1, 80)
    new[:8] *= rng.uniform(0.2, 4, 8)
    one = np.ones(80)
    ratio = measure_flux_ratio(new, beta * one, ref, one)
    assert abs(ratio.value - beta) < 5 * ratio.error
    assert ratio.error < 3 * beta * np.sqrt(2 / 80) / snr / 5
    assert ratio.n_stars > 60


def test_the_flux_ratio_of_faint_stars_has_no_bias():
    """S/N 5 to 50, 200 trials: the mean is right within 0.2 %, and the errors describe the spread."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(200):
        true = 5 * 10 ** rng.uniform(0, 1, 60)
        new, ref = 0.7 * true + rng.normal(0, 1, 60), true + rng.normal(0, 1, 60)
        found.append(measure_flux_ratio(new, np.ones(60), ref, np.ones(60)))
    values = np.array([f.value for f in found])
    assert values.mean() == pytest.approx(0.7, rel=0.002)
    assert np.std((values - 0.7) / [f.error for f in found]) == pytest.approx(1, abs=0.15)


def test_scatter_between_stars_is_measured():
    """5 % of real scatter is reported as such, and enlarges the error; none is reported as (nearly) none."""
    rng = np.random.default_rng(4)
    true = rng.uniform(1e3, 1e4, 200)
    for scatter, tolerance in ((0.05, 0.015), (0.0, 0.002)):
        new = 2 * true * (1 + scatter * rng.normal(size=200)) + 2 * rng.normal(size=200)
        ratio = measure_flux_ratio(new, np.full(200, 2.0), true + rng.normal(size=200), np.ones(200))
        assert ratio.scatter == pytest.approx(scatter, abs=tolerance)
        assert abs(ratio.value - 2) < 4 * ratio.error


def test_a_ratio_that_varies_across_the_image_is_followed():
    """A gradient of ±3 % is found to 0.5 %, and the scatter is about it; without one none is claimed."""
    rng = np.random.default_rng(5)
    x, y = rng.uniform(0, 1000, (2, 150))
    true = rng.uniform(300, 1e4, 150)
    noise = np.ones(150)
    for slope in (0.03, 0.0):
        factor = 1 + slope * (2 * x / 1000 - 1)
        new = 1.5 * true * factor + rng.normal(size=150)
        ratio = measure_flux_ratio(new, noise, true + rng.normal(size=150), noise, x=x, y=y, shape=(1000, 1000))
        assert ratio.value == pytest.approx(1.5, rel=0.003)
        assert ratio.scatter < 0.01
        image = ratio.image((1000, 1000))
        assert image.dtype == np.float32
        np.testing.assert_allclose(ratio.value * image[::100, [0, 500, 999]], 1.5 * (1 + slope * np.array([-1, 0, 1]))
                                   * np.ones((10, 1)), rtol=0.006)  # fmt: skip


def test_the_image_of_a_ratio_is_its_polynomial():
    """Drawn by matrices or asked pixel by pixel, of any degree, at edges and beyond: the same."""
    rng = np.random.default_rng(8)
    for degree in (0, 1, 2, 3):
        frame = replace(Frame.of_image((60, 90)), limit=0.9)
        polynomial = Polynomial(frame, degree, rng.normal(0, 0.1, n_terms(degree)))
        y, x = np.mgrid[:60, :90].astype(float)
        expected = polynomial(x.ravel(), y.ravel()).reshape(60, 90)
        np.testing.assert_allclose(polynomial.image((60, 90)), expected, atol=1e-6)


def test_single_precision_images_give_the_same_fluxes(field, model):
    """float32 planes, a boolean or an integer mask, big-endian or transposed: equal to float64 within rounding."""
    mask = np.zeros(field.data.shape, dtype=np.int32)
    mask[::50] = 1024
    data, variance = field.flat.astype(np.float64), total_variance(field)
    data[::70, ::70] = np.nan
    flux, error, chi2, ok = psf_flux(data, variance, mask, field.x, field.y, model)
    for other, noise, bad in (
        (data.astype(np.float32), variance.astype(np.float32), mask != 0),
        (data.astype(">f4"), np.asfortranarray(variance), mask.astype(np.uint16)),
    ):
        again = psf_flux(other, noise, bad, field.x, field.y, model)
        np.testing.assert_array_equal(again[3], ok)
        for a, b in zip(again[:3], (flux, error, chi2), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("stars", [np.zeros((4, 0)), np.full((4, 5), np.nan), -np.ones((4, 5)), np.ones((4, 3))])
def test_no_usable_stars_give_no_ratio(stars):
    """None at all, not finite, negative, or no brighter than their errors: NaN and zero stars, no crash."""
    ratio = measure_flux_ratio(*stars)
    assert ratio.n_stars == 0
    assert np.isnan(ratio.value)


def test_blank_sky_has_the_variance_of_the_sky(model):
    """Pure noise, sky of 4 or of 400 electrons: the variance is the sky's, exactly, in all but 0.2 % of the pixels, and
    never less."""
    rng = np.random.default_rng(6)
    for sky in (4.0, 400.0):
        noise = rng.poisson(sky, (600, 600)).astype(np.float32) - np.float32(sky)
        variance = source_variance(noise, sky, model)
        assert variance.dtype == np.float32
        assert np.mean(variance != np.float32(sky)) < 0.002
        assert (variance >= np.float32(sky)).all()
        assert variance.mean() == pytest.approx(sky, rel=1e-3)


def test_stars_bring_their_photons(field, model):
    """Summed as S_corr sums it (through P²), the variance at stars is right within 3 %, at bright ones within 1.5 %."""
    variance = source_variance(field.flat, field.rms_map**2, model)
    true = total_variance(field)
    weight = stamp(PSF, 15) ** 2
    column, row = np.rint(field.x).astype(int), np.rint(field.y).astype(int)

    def through(image):
        return np.array(
            [np.sum(weight * image[j - 7 : j + 8, i - 7 : i + 8]) for i, j in zip(column, row, strict=True)]
        )

    ratio = through(variance) / through(true)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.03
    assert np.median(ratio[field.flux > 5e4]) == pytest.approx(1, abs=0.015)


def test_gain_and_missing_pixels_of_the_source_model(field, model):
    """In units of 4 electrons a unit brings a quarter; NaN counts as sky; the input is left alone."""
    data = field.flat / 4
    data[5, 5] = np.nan
    before = data.copy()
    scaled = source_variance(data, field.rms_map**2 / 16, model, gain=4.0)
    plain = source_variance(field.flat, field.rms_map**2, model)
    np.testing.assert_allclose(16 * np.delete(scaled, slice(15), 0), np.delete(plain, slice(15), 0), rtol=1e-3)
    assert np.isfinite(scaled).all()
    np.testing.assert_array_equal(data, before)


# --- Centres ----------------------------------------------------------------------------------------------------------


def test_positions_are_true_within_their_errors(field, model):
    """Pulls of x and y have mean 0 and width 1; bright stars are placed to 0.01 pixel."""
    x, y, error, ok = fit_positions(field.flat, total_variance(field), None, field.x + 0.3, field.y - 0.2, model)
    pull = np.stack([x - field.x, y - field.y], axis=-1)[ok] / error[ok]
    assert ok.mean() > 0.95
    assert np.abs(pull.mean(axis=0)).max() < 0.35
    assert pull.std() == pytest.approx(1, abs=0.15)
    bright = ok & (field.flux > 1e5)
    assert np.hypot(x - field.x, y - field.y)[bright].max() < 0.02


def test_a_displaced_and_lopsided_reference_is_met_where_it_is():
    """The reference's stars are lopsided and drift by 0.1 pixel across the image: after the move, positions through
    both PSFs agree to 0.01 pixel everywhere."""
    n = 600
    new = star_field(moffat(3.2), n=n, n_stars=100, flux=(2e4, 2e5), separation=25, seed=12)
    ref = star_field(lopsided, n=n, n_stars=0, seed=12)
    light = np.zeros((n, n))
    from ._starfield import add

    for x, y, flux in zip(new.x, new.y, new.flux, strict=True):
        add(light, lopsided, x + 0.05 + 0.1 * (x / n - 0.5), y - 0.03, flux)
    rng = np.random.default_rng(1)
    image = (rng.poisson(light + ref.sky) - ref.sky).astype(np.float32)
    psf_new = fit_psf(new.flat, None, None, rms=new.rms_map)
    psf_ref = fit_psf(image, None, None, rms=new.rms_map)
    variance = light + new.rms**2
    noise = {"variance_new": new.light + new.rms**2, "variance_ref": variance}
    match = match_centres(new.flat, image, psf_new, psf_ref, new.x, new.y, **noise)
    assert match.n_stars > 80
    assert max(match.rms_x, match.rms_y) < 0.02
    x, y, _, ok = fit_positions(image, variance, None, new.x, new.y, match.psf)
    xn, yn, _, ok_new = fit_positions(new.flat, noise["variance_new"], None, new.x, new.y, psf_new)
    both = ok & ok_new
    for side in (new.x < n / 3, new.x > 2 * n / 3):
        assert abs(np.median((x - xn)[both & side])) < 0.01
        assert abs(np.median((y - yn)[both & side])) < 0.01
    assert match.psf.at(300, 300).sum() == pytest.approx(1)
    assert match.psf.size == psf_ref.size
    assert match.psf.fwhm == psf_ref.fwhm


def test_without_common_stars_nothing_is_moved(field, model):
    """Four stars are too few: the PSF stays, and the count says so."""
    variance = total_variance(field)
    match = match_centres(
        field.flat, field.flat, model, model, field.x[:4], field.y[:4], variance_new=variance, variance_ref=variance
    )
    assert (match.n_stars, match.shift_x, match.rms_x) == (0, 0.0, 0.0)
    np.testing.assert_allclose(match.psf.at(9, 9), model.at(9, 9), atol=1e-12)
