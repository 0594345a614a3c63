"""The PSF that stars give is the PSF they were made with."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from batchproc.config import PsfConfig
from batchproc.errors import PsfError
from batchproc.imaging.background import measure_background
from batchproc.imaging.moments import measure_moments
from batchproc.imaging.psf import PsfModel, fit_psf
from batchproc.imaging.psf_model import half_maximum_width
from batchproc.imaging.shift import shift_stamp, taps, transform
from batchproc.imaging.shrink import shrink
from batchproc.records import PsfLike

from ._starfield import elliptical, gaussian, lopsided, moffat, stamp, star_field, varying


def centre_of(pixels):
    half = pixels.shape[0] // 2
    found = measure_moments(pixels, [float(half)], [float(half)], fwhm=half_maximum_width(pixels))[0]
    assert found["ok"]
    return found["x"] - half, found["y"] - half


def truth(psf, size, x=0.0, y=0.0):
    """The true stamp with its centre, as moments define it, on the middle pixel; unit sum."""
    dx, dy = centre_of(stamp(psf, size, x, y))
    pixels = stamp(psf, size, x, y, -dx, -dy)
    return pixels / pixels.sum()


def errors(model, psf, x, y):
    """Largest error, and rms error over the core, in units of the peak."""
    true = truth(psf, model.size, x, y)
    error = (model.at(x, y) - true) / true.max()
    return np.abs(error).max(), np.sqrt(np.mean(error[true > 0.1 * true.max()] ** 2))


def measured(field, **settings):
    return fit_psf(field.flat, None, None, rms=field.rms_map, config=PsfConfig(**settings))


CASES = {
    "gaussian": (gaussian(3.0), 0.006),
    "moffat": (moffat(3.5), 0.005),
    "heavy wings": (moffat(4.5, 2.5), 0.006),
    "elongated": (moffat(4.0, 3.0, 1.8, 0.6), 0.008),
    "lopsided": (lambda u, v, x, y: lopsided(u, v, x, y), 0.01),
}


@pytest.mark.parametrize("name", CASES)
def test_the_psf_is_recovered(name):
    """80 stars: within a per cent of the peak everywhere and half that over the core, FWHM within 1 %, centred to
    0.01 pixel, of unit sum, hardly negative."""
    psf, tolerance = CASES[name]
    model = measured(star_field(psf, seed=3))
    assert isinstance(model, PsfLike)
    assert model.size % 2 == 1
    largest, rms = errors(model, psf, 256, 256)
    assert largest < 1.5 * tolerance
    assert rms < 0.5 * tolerance
    pixels = model.at(256, 256)
    assert pixels.shape == (model.size, model.size)
    assert pixels.dtype == np.float64
    assert pixels.sum() == pytest.approx(1, abs=1e-12)
    assert pixels.min() > -2e-3 * pixels.max()
    assert model.fwhm == pytest.approx(half_maximum_width(truth(psf, model.size)), rel=0.01)
    assert np.hypot(*centre_of(pixels)) < 0.01
    assert model.n_stars == model.quality["n_stars"] > 50
    assert 0.7 < model.quality["chi2"] < 1.3
    assert model.quality["residual"] < 0.01


def test_a_varying_psf_is_recovered_in_the_corners():
    """Width ±20 % and elongation change across the field: 1.5 % of the peak in every corner, no worse than that in the
    centre; a constant PSF would be wrong by a fifth."""
    n = 700
    psf = varying(n, amplitude=0.2)
    field = star_field(psf, n=n, n_stars=160, seed=4)
    model = measured(field)
    assert model.quality["degree"] >= 1
    for x, y in ((350, 350), (40, 40), (660, 40), (40, 660), (660, 660)):
        largest, rms = errors(model, psf, x, y)
        assert largest < 0.02
        assert rms < 0.006
        assert np.hypot(*centre_of(model.at(x, y))) < 0.01
    constant = measured(field, max_degree=0)
    assert constant.quality["degree"] == 0
    assert errors(constant, psf, 660, 660)[0] > 0.1
    outside = model.at(-1e4, 5e4)
    np.testing.assert_array_equal(outside, model.at(-0.5, n + 0.5))


def test_an_even_field_asks_for_no_variation():
    """A constant PSF stays within 0.5 % of itself from corner to corner, whatever degree was allowed."""
    model = measured(star_field(moffat(3.5), n=600, n_stars=120, seed=6))
    middle = model.at(300, 300)
    for x, y in ((10, 10), (590, 10), (590, 590)):
        assert np.abs(model.at(x, y) - middle).max() < 0.006 * middle.max()


def test_a_dozen_stars_give_a_constant_psf():
    """12 stars: constant, within 2 % of the peak, its wings smooth."""
    psf = moffat(3.5)
    model = measured(star_field(psf, n=400, n_stars=12, flux=(2e4, 2e5), seed=7))
    assert model.quality["degree"] == 0
    np.testing.assert_array_equal(model.at(0, 0), model.at(399, 399))
    largest, rms = errors(model, psf, 200, 200)
    assert largest < 0.02
    assert rms < 0.008
    wings = model.at(0, 0)[:4, model.size // 2]
    assert np.abs(wings).max() < 1e-3 * model.at(0, 0).max()


def wobbling(fwhm):
    """Widths that no constant PSF follows: ±1.5 % in one and a half waves across 600 pixels."""

    def psf(u, v, x, y):
        return elliptical(u, v, fwhm * (1 + 0.015 * np.sin(x / 64) * np.cos(y / 64)), 3.0, 1.0, 0.0)

    return psf


def galaxies_about(field, fwhm, n=600, n_galaxies=300):
    """Light of exponential galaxies, two thirds of them within 6 FWHM of a star and too faint to be found."""
    rng = np.random.default_rng(21)
    light = np.zeros((n, n))
    v, u = np.mgrid[-30:31, -30:31].astype(float)
    for k in range(n_galaxies):
        place, flux = rng.uniform(31, n - 32, 2), np.exp(rng.uniform(*np.log([300.0, 3e4])))
        if k % 3:
            angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(2.0, 6.0) * 3.4
            star = k % len(field.x)
            place = field.x[star] + away * np.cos(angle), field.y[star] + away * np.sin(angle)
            flux = rng.uniform(300, 1200)
        column, row = np.clip(np.rint(place).astype(int), 30, n - 31)
        radius = np.hypot(u - (place[0] - column), v - (place[1] - row))
        galaxy = np.exp(-radius / np.hypot(rng.uniform(1.5, 3.0), fwhm / 3))
        light[row - 30 : row + 31, column - 30 : column + 31] += flux * galaxy / galaxy.sum()
    return light


def test_neighbours_light_is_no_wing():
    """18 stars among 300 galaxies, most of them unseen and beside stars: light within 3 FWHM right to 1 %, and fluxes
    in epochs of different seeing in proportion to 1 %, though no star is so bright that its wings stand out."""
    bias = []
    for fwhm in (3.4, 4.2):
        psf, stars = wobbling(fwhm), {"n": 600, "n_stars": 18, "flux": (1e4, 4e5), "separation": 60, "margin": 40}
        field = star_field(psf, seed=5, **stars)
        field = star_field(psf, seed=5, extra=galaxies_about(field, fwhm), **stars)
        sky = measure_background(field.data, None)
        model = fit_psf((field.data - sky.level).astype(np.float32), None, None, rms=sky.rms)
        assert 12 <= model.n_stars <= 20
        pixels, true = model.at(300, 300), stamp(moffat(fwhm), 161)
        half = model.size // 2
        axis = np.arange(-80, 81)
        inner = np.hypot(axis[:, None], axis[None, :]) < 3 * fwhm
        middle = np.s_[80 - half : 81 + half, 80 - half : 81 + half]
        assert pixels[inner[middle]].sum() == pytest.approx(true[inner].sum(), abs=0.01)
        bias.append(np.sum(pixels * true[middle]) / np.sum(pixels**2))  # of a PSF flux, noise being the sky's
    assert bias[1] / bias[0] == pytest.approx(1, abs=0.01)


def test_too_few_stars_say_how_many():
    """Three stars: an error with found and needed, in words and as numbers; min_stars = 3 takes them."""
    field = star_field(moffat(3.5), n=300, n_stars=3, flux=(5e4, 1e5))
    with pytest.raises(PsfError, match=r"3 usable stars .* at least 5 needed .*psf\.min_stars") as caught:
        measured(field)
    assert caught.value.metadata["found"] == 3
    assert caught.value.metadata["needed"] == 5
    assert caught.value.stage == "psf"
    assert pickle.loads(pickle.dumps(caught.value)).metadata == caught.value.metadata
    assert measured(field, min_stars=3).n_stars == 3


def test_particle_hits_and_neighbours_inside_stamps_do_no_harm():
    """Hits all over the stars' outskirts, faint neighbours, dead columns with their mask: still a per cent."""
    psf = moffat(3.5)
    rng = np.random.default_rng(8)
    light = np.zeros((512, 512))
    from ._starfield import add

    for x, y, flux in zip(rng.uniform(5, 505, 150), rng.uniform(5, 505, 150), rng.uniform(200, 1500, 150), strict=True):
        add(light, psf, x, y, flux)
    field = star_field(psf, seed=9, extra=light, separation=25)
    for y, x in rng.integers(2, 509, (120, 2)):
        field.data[y, x : x + 2] += rng.uniform(500, 5000)
    mask = np.zeros(field.data.shape, dtype=np.uint8)
    mask[:, 100::150] = 1
    field.data[:, 100::150] = 1e6
    model = fit_psf(field.flat, None, mask, rms=field.rms_map)
    largest, rms = errors(model, psf, 256, 256)
    assert largest < 0.015
    assert rms < 0.006


def test_photon_noise_is_taken_from_the_variance():
    """A mean of four exposures has a quarter of the photon noise; told so, the fit finds chi-square 1."""
    psf = moffat(3.5)
    fields = [star_field(psf, seed=10, n=400, n_stars=50) for _ in range(1)]
    rng = np.random.default_rng(1)
    light, sky = fields[0].light, fields[0].sky
    data = np.mean([rng.poisson(light + sky) for _ in range(4)], axis=0) - sky
    variance = (light + sky) / 4
    rms = np.full(light.shape, np.sqrt(sky) / 2, dtype=np.float32)
    model = fit_psf(data.astype(np.float32), variance, None, rms=rms)
    assert 0.75 < model.quality["chi2"] < 1.25


def test_inputs_are_untouched_and_results_repeat():
    """Same bytes again, read-only inputs included; the model survives pickling."""
    field = star_field(moffat(3.5), n=300, n_stars=20)
    data, rms = field.flat, field.rms_map
    data.flags.writeable = rms.flags.writeable = False
    first = fit_psf(data, None, None, rms=rms)
    again = pickle.loads(pickle.dumps(fit_psf(data, None, None, rms=rms)))
    np.testing.assert_array_equal(first.at(10, 20), again.at(10, 20))
    assert first.quality == again.quality


# --- PSFs that are given ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(31, 31), (32, 32), (24, 41), (5, 5), (120, 121)])
def test_a_given_stamp_becomes_odd_centred_and_normalised(shape):
    """Odd or even, square or not, any scale: an odd square of unit sum, centred."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    fwhm = 2.5 if min(shape) < 10 else 4.0
    pixels = 300 * elliptical(x - (shape[1] - 1) / 2, y - (shape[0] - 1) / 2, fwhm, 3.0, 1.1, 0.4)
    model = PsfModel.from_array(pixels)
    assert model.size % 2 == 1
    assert 15 <= model.size <= 81
    out = model.at(123.4, 5.6)
    assert out.sum() == pytest.approx(1)
    assert np.hypot(*centre_of(out)) < 0.01
    if min(shape) > 10:
        assert model.fwhm == pytest.approx(fwhm, rel=0.02)
    assert (model.n_stars, model.degree) == (0, 0)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.ones(31), "two dimensions"),
        (np.ones((3, 3)), "5 pixels or more"),
        (np.full((21, 21), np.nan), "not finite"),
        (np.zeros((21, 21)), "positive"),
        (-np.ones((21, 21)), "positive"),
        (np.ones((21, 21)), "peak near its middle"),
        (np.eye(1, 441).reshape(21, 21), "peak near its middle"),
    ],
)
def test_a_stamp_that_is_no_psf_is_refused(pixels, reason):
    """Wrong shape, not finite, no light, flat, or all light in a corner: an error that says which."""
    with pytest.raises(PsfError, match=reason):
        PsfModel.from_array(pixels)


def psfex_file(path, samp, n=41, degree=2):
    """A .psf file as PSFEx writes it: the width grows along x, model pixels are `samp` image pixels."""
    half = n // 2
    v, u = np.mgrid[-half : half + 1, -half : half + 1] * samp
    zero, scale = (1001.0, 801.0), (1800.0, 1500.0)  # PSFEx counts pixels from 1
    planes = np.zeros(((degree + 1) * (degree + 2) // 2, n, n))
    sigma = 1.6
    base = np.exp(-(u**2 + v**2) / 2 / sigma**2)
    planes[0] = base
    planes[1] = 0.2 * base * ((u**2 + v**2) / sigma**2)  # the term x: width
    planes[degree + 1] = 0.1 * base * u * v / sigma**2  # the term y: tilt
    table = fits.BinTableHDU.from_columns(
        [fits.Column("PSF_MASK", f"{planes.size}E", dim=f"({n},{n},{len(planes)})", array=planes[None])],
        name="PSF_DATA",
    )
    keys = {
        "POLNAXIS": 2, "POLGRP1": 1, "POLNAME1": "X_IMAGE", "POLZERO1": zero[0], "POLSCAL1": scale[0], "POLGRP2": 1,
        "POLNAME2": "Y_IMAGE", "POLZERO2": zero[1], "POLSCAL2": scale[1], "POLNGRP": 1, "POLDEG1": degree,
        "PSF_FWHM": 2.355 * sigma / samp, "PSF_SAMP": samp, "PSFNAXIS": 3, "PSFAXIS1": n, "PSFAXIS2": n,
        "PSFAXIS3": len(planes),
    }  # fmt: skip
    table.header.update(keys)
    table.writeto(path)

    def pixels(x, y, size):
        """What the file says of the PSF at a 0-based pixel."""
        half = size // 2
        v, u = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
        a, b = (x + 1 - zero[0]) / scale[0], (y + 1 - zero[1]) / scale[1]
        base = np.exp(-(u**2 + v**2) / 2 / sigma**2)
        out = base * (1 + 0.2 * a * (u**2 + v**2) / sigma**2 + 0.1 * b * u * v / sigma**2)
        return out / out.sum()

    return pixels


@pytest.mark.parametrize("samp", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("degree", [1, 2])
def test_a_psfex_file_means_what_psfex_meant(tmp_path, samp, degree):
    """Terms in PSFEx's order, 1-based pixels, model pixels of PSF_SAMP image pixels: every place as written."""
    expected = psfex_file(tmp_path / "a.psf", samp, degree=degree)
    with fits.open(tmp_path / "a.psf") as hdus:
        model = PsfModel.from_psfex(hdus[1].header, hdus[1].data)
    assert model.degree == degree
    assert model.size % 2 == 1
    for x, y in ((1000, 800), (200, 150), (1800, 1400)):
        want = expected(x, y, model.size)
        np.testing.assert_allclose(model.at(x, y), want, atol=2e-3 * want.max())
        assert np.hypot(*centre_of(model.at(x, y))) < 0.01


def test_a_psfex_file_of_another_kind_is_refused(tmp_path):
    """Dependence on magnitude, a plane too few, no PSF_MASK: errors that say what to do."""
    psfex_file(tmp_path / "a.psf", 0.7)
    with fits.open(tmp_path / "a.psf") as hdus:
        header, data = hdus[1].header, hdus[1].data["PSF_MASK"][0]
        magnitude = header.copy()
        magnitude["POLNAME2"] = "MAG_AUTO"
        with pytest.raises(PsfError, match="PSFVAR_KEYS X_IMAGE,Y_IMAGE"):
            PsfModel.from_psfex(magnitude, data)
        with pytest.raises(PsfError, match="5 planes, expected 6"):
            PsfModel.from_psfex(header, data[:5])
    table = fits.BinTableHDU.from_columns([fits.Column("FLUX", "E", array=[1.0])])
    with pytest.raises(PsfError, match="PSF_MASK"):
        PsfModel.from_psfex(table.header, table.data)


# --- The arithmetic underneath ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fwhm", "tolerance"), [(2.5, 0.0025), (3.0, 0.001), (5.0, 0.0005)])
def test_shifting_a_stamp_is_shifting_the_star(fwhm, tolerance):
    """Any fraction of a pixel, and whole pixels, within the stated part of the peak; the sum stays."""
    psf = moffat(fwhm)
    for dx, dy in ((0.5, 0.5), (0.3, -0.2), (1.7, -2.5)):
        v, u = np.mgrid[-25:26, -25:26].astype(float)
        still, moved = psf(u, v, 0, 0), psf(u - dx, v - dy, 0, 0)
        error = shift_stamp(still, dx, dy) - moved
        assert np.abs(error[8:-8, 8:-8]).max() < tolerance * still.max()
        assert shift_stamp(still, dx, dy).sum() == pytest.approx(still.sum(), rel=0.01)


def test_the_transpose_of_a_shift_is_its_transpose():
    """<a, T b> = <Tᵀ a, b> exactly: what the least-squares solution rests on."""
    a, b = np.random.default_rng(1).normal(size=(2, 31, 31))
    tx, ty = taps(0.3), taps(-0.4)
    forward, back, work = (np.empty((31, 31)) for _ in range(3))
    transform(b, tx, ty, forward, work)
    transform(a, tx[::-1].copy(), ty[::-1].copy(), back, work)
    assert np.sum(a * forward) == pytest.approx(np.sum(back * b), rel=1e-12)


def test_shrinking_takes_noise_and_leaves_signal():
    """Pure noise nearly vanishes; a core of 50 sigma stays within its noise; a broad 1-sigma glow survives."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[-20:21, -20:21]
    r2 = x**2 + y**2
    noise = rng.normal(size=(41, 41))
    one = np.ones((41, 41))
    assert shrink(noise, one).std() < 0.1
    core = 50 * np.exp(-r2 / 2 / 1.5**2)
    kept = shrink(core + noise, one) - core
    assert np.abs(kept[r2 < 4]).max() < 4
    assert kept[r2 > 100].std() < 0.2
    glow = np.exp(-r2 / 2 / 7**2)
    kept = shrink(glow + noise, one)
    assert np.sum(kept * glow) / np.sum(glow**2) == pytest.approx(1, abs=0.3)


# --- Real images ------------------------------------------------------------------------------------------------------


def real(name):
    root = os.environ.get("BATCHPROC_TEST_DATA", "")
    path = Path(root) / "images" / name
    if not root or not path.exists():
        pytest.skip(f"needs images/{name} in BATCHPROC_TEST_DATA")
    return fits.getdata(path).astype(np.float32), fits.getheader(path)


@pytest.mark.realdata
@pytest.mark.parametrize("epoch", ["epoch1", "epoch2"])
def test_goto(epoch):
    """More than 100 stars, b/a near 0.5, widths that change by a third across the field, residuals below 2.5 % of the
    peak (the images are medians of three exposures, whose stars are noisier than photons)."""
    data, _ = real(f"goto/{epoch}.fits")
    sky = measure_background(data, None)
    model = fit_psf(data - sky.level, None, None, rms=sky.rms, saturation=50000 - sky.global_level)
    assert model.n_stars > 100
    assert 3.5 < model.fwhm < 4.3
    assert model.quality["degree"] == 2
    assert 0.4 < model.quality["ellipticity"] < 0.7
    assert model.quality["residual"] < 0.025
    left, right = (half_maximum_width(model.at(x, 925)) for x in (50, 1800))
    assert right / left > 1.3


@pytest.mark.realdata
def test_decam_epochs():
    """Five or six stars: a constant PSF all the same, chi-square near 1."""
    root = os.environ.get("BATCHPROC_TEST_DATA", "")
    paths = sorted((Path(root) / "images/decam_epochs").glob("*.fits")) if root else []
    if not paths:
        pytest.skip("needs images/decam_epochs in BATCHPROC_TEST_DATA")
    for path in paths[::4]:
        header = fits.getheader(path)
        data = (fits.getdata(path) * header["GAIN"]).astype(np.float32)
        sky = measure_background(data, None)
        model = fit_psf(data - sky.level, None, None, rms=sky.rms, saturation=header["SATURATE"] * header["GAIN"])
        assert 5 <= model.n_stars <= 15
        assert model.quality["degree"] == 0
        assert model.fwhm == pytest.approx(header["FWHM"], rel=0.12)
        assert 0.6 < model.quality["chi2"] < 1.5
        assert model.quality["residual"] < 0.02


@pytest.mark.realdata
def test_decam_coadd():
    """A quarter of a deep coadd, full of galaxies: stars are told from them, residuals within 1 % of the peak."""
    data, _ = real("decam_coadd/coadd.fits.fz")
    mask, _ = real("decam_coadd/mask.fits.fz")
    data, mask = 52.37 * data[:2000, :2000], mask[:2000, :2000].astype(np.uint8)
    sky = measure_background(data, mask)
    model = fit_psf(data - sky.level, None, mask, rms=sky.rms, saturation=30296 * 52.37)
    assert model.n_stars > 80
    assert model.quality["residual"] < 0.012
    assert model.quality["ellipticity"] < 0.1
