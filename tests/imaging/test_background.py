"""Sky and noise: right on blank sky, untouched by sources, gradients, masks and odd sizes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from batchproc.config import BackgroundConfig
from batchproc.imaging.background import measure_background

from ._starfield import moffat, star_field

SIGMA = 10.0


def blank(shape, seed=1, level=100.0):
    return (level + np.random.default_rng(seed).normal(0, SIGMA, shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(512, 512), (513, 700), (256, 256)])
def test_blank_sky_has_its_level_and_its_noise(shape):
    """Level within a few hundredths of the noise, noise within 1.5 %, for any size; SEP's own noise is 1.5 % low."""
    sky = measure_background(blank(shape), None)
    assert sky.level.dtype == sky.rms.dtype == np.float32
    assert sky.level.shape == sky.rms.shape == shape
    assert np.abs(sky.level - 100).max() < 0.2 * SIGMA
    assert abs(sky.level.mean() - 100) < 0.03 * SIGMA
    assert abs(sky.rms.mean() / SIGMA - 1) < 0.015
    assert sky.global_level == pytest.approx(100, abs=0.03 * SIGMA)
    assert sky.global_rms == pytest.approx(SIGMA, rel=0.015)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((60, 60), np.s_[:, :]),
        ((60, 900), np.s_[:, :]),
        ((900, 60), np.s_[:, :]),
        ((600, 600), np.s_[:, -40:]),
        ((600, 600), np.s_[150:200, :]),
        ((600, 600), np.s_[:60, -60:]),
    ],
)
def test_cells_in_one_line_make_up_no_slope_across(shape, kept):
    """A sky ten thousand sigma high, of a tiny image or seen through a strip: as well known as that of a large one."""
    mask = np.ones(shape, np.uint8)
    mask[kept] = 0
    sky = measure_background(blank(shape, level=1e5), mask)
    assert np.abs(sky.level[kept] - 1e5).max() < 0.2 * SIGMA
    assert np.abs(sky.rms[kept] / SIGMA - 1).max() < 0.06


def test_a_steep_gradient_is_followed_and_does_not_widen_the_noise():
    """2 sigma a pixel: a mesh cell spans 130 sigma, and the noise still comes out right."""
    y, x = np.mgrid[:512, :600]
    slope = 20.0 * x - 5.0 * y
    sky = measure_background(blank(x.shape) + slope, None)
    assert abs(np.median(sky.rms) / SIGMA - 1) < 0.02
    assert np.std(sky.level - slope - 100) < 0.3 * SIGMA


def test_stars_do_not_raise_the_sky():
    """Crowded with stars up to 10⁵ sigma, the level moves by hundredths of the noise, the noise by 2 %."""
    field = star_field(moffat(3.5), n=512, n_stars=300, flux=(300, 1e6), separation=0.0)
    sky = measure_background(field.data, None)
    assert abs(np.median(sky.level) - field.sky) < 0.1 * field.rms
    assert abs(sky.global_rms / field.rms - 1) < 0.03


def test_a_galaxy_larger_than_the_mesh_is_not_sky():
    """An exponential disc 300 pixels across, peak 100 sigma: at its centre the level stays within 0.3 sigma."""
    y, x = np.mgrid[:768, :768]
    galaxy = 1000 * np.exp(-np.hypot(x - 380, y - 400) / 25)
    sky = measure_background(blank(x.shape) + galaxy, None)
    assert abs(sky.level[400, 380] - 100) < 0.3 * SIGMA
    assert abs(np.median(sky.level) - 100) < 0.1 * SIGMA


def test_nebulosity_is_sky_and_the_stars_in_it_are_not():
    """Light of ±3 sigma that changes over two cells of the mesh, with 300 stars in it: followed to a third of a
    sigma (a fifth away from the edges), without bias, and the noise stays within 3 %."""
    rng = np.random.default_rng(7)
    nebula = ndimage.gaussian_filter(rng.normal(size=(768, 768)), 90, mode="wrap")
    nebula *= 3 * SIGMA / nebula.std()
    field = star_field(moffat(3.5), n=768, n_stars=300, flux=(300, 1e5), separation=0.0)
    sky = measure_background(field.data + nebula, None)
    off = (sky.level - field.sky - nebula) / field.rms
    assert abs(np.median(off)) < 0.05
    assert off[64:-64, 64:-64].std() < 0.2
    assert off.std() < 0.35
    assert abs(sky.global_rms / field.rms - 1) < 0.03


def test_most_of_the_image_may_be_masked():
    """With 70 % of the pixels masked at random, and with two thirds of the rows gone, the rest speaks."""
    image = blank((512, 512))
    rng = np.random.default_rng(2)
    scattered = rng.random(image.shape) < 0.7
    rows = np.zeros(image.shape, dtype=bool)
    rows[:340] = True
    for mask in (scattered, rows):
        filled = np.where(mask, 1e6, image)
        sky = measure_background(filled, mask.astype(np.uint8))
        assert sky.global_level == pytest.approx(100, abs=0.1 * SIGMA)
        assert sky.global_rms == pytest.approx(SIGMA, rel=0.03)


def test_what_masked_pixels_hold_is_of_no_account():
    """NaN, zero or a million under the mask: the same sky, bit for bit; NaN without a mask is masked."""
    image = blank((256, 256))
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[50:90, 60:200] = 4
    results = [measure_background(np.where(mask, value, image), mask) for value in (0.0, 1e6, np.nan)]
    results.append(measure_background(np.where(mask, np.nan, image), None))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].level, other.level)
        np.testing.assert_array_equal(results[0].rms, other.rms)


def test_nothing_to_measure_is_no_crash():
    """All masked: level 0, noise 1. A constant image: its value, and noise that is not zero."""
    sky = measure_background(blank((128, 128)), np.ones((128, 128), dtype=np.uint8))
    assert (sky.level == 0).all()
    assert (sky.rms == 1).all()
    constant = measure_background(np.full((128, 128), 7.0), None)
    assert constant.global_level == pytest.approx(7.0)
    assert (constant.rms > 0).all()


@given(ny=st.integers(16, 200), nx=st.integers(16, 200), mesh=st.integers(8, 128))
@settings(max_examples=15, deadline=None)
def test_any_shape_and_mesh(ny, nx, mesh):
    """Finite, positive noise near the truth for any shape, however badly the mesh divides it."""
    sky = measure_background(blank((ny, nx), seed=ny * 1000 + nx), None, BackgroundConfig(mesh_size=mesh))
    assert np.isfinite(sky.level).all()
    assert (sky.rms > 0).all()
    assert sky.global_rms == pytest.approx(SIGMA, rel=0.3)


def test_input_is_left_alone_and_big_endian_is_fine():
    image = blank((128, 128)).astype(">f8")
    before = image.copy()
    native = measure_background(image.astype(np.float32), None)
    np.testing.assert_array_equal(measure_background(image, None).level, native.level)
    np.testing.assert_array_equal(image, before)


@pytest.mark.realdata
def test_noise_of_a_real_image_is_what_its_blank_pixels_show():
    """GOTO: between the sources, (data − level) / rms has unit width within 2 %."""
    path = Path(os.environ.get("BATCHPROC_TEST_DATA", "")) / "images/goto/epoch1.fits"
    if not os.environ.get("BATCHPROC_TEST_DATA") or not path.exists():
        pytest.skip("needs images/goto in BATCHPROC_TEST_DATA")
    from astropy.io import fits

    data = fits.getdata(path).astype(np.float32)
    sky = measure_background(data, None)
    z = (data - sky.level) / sky.rms
    assert 1.4826 * np.median(np.abs(z[z < 2])) == pytest.approx(1, abs=0.06)
