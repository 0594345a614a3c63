"""Which sources may shape the PSF, and what their centre is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.config import PsfConfig
from batchproc.imaging.moments import fwhm_of, measure_moments
from batchproc.imaging.stars import find_stars, log_shape

from ._starfield import add, gaussian, moffat, stamp, star_field, varying


def names_of(stars, field, radius=1.5):
    """Rows of `field` that were taken for stars; -1 for what is no star of the field."""
    distance = np.hypot(stars.x[:, None] - field.x, stars.y[:, None] - field.y)
    return np.where(distance.min(axis=1) < radius, distance.argmin(axis=1), -1)


@given(
    xx=st.floats(1.2, 9.0),
    yy=st.floats(1.2, 9.0),
    tilt=st.floats(-0.7, 0.7),
    dx=st.floats(-0.5, 0.5),
    dy=st.floats(-0.5, 0.5),
)
@settings(max_examples=30, deadline=None)
def test_moments_of_a_gaussian_are_its_own(xx, yy, tilt, dx, dy):
    """Centre to 0.001 pixel, covariance and flux to 1 %, wherever it sits between pixels."""
    xy = tilt * np.sqrt(xx * yy)
    y, x = np.mgrid[-25:26, -25:26].astype(float)
    x, y = x - dx, y - dy
    det = xx * yy - xy**2
    image = 500 / (2 * np.pi * np.sqrt(det)) * np.exp(-0.5 * (yy * x**2 + xx * y**2 - 2 * xy * x * y) / det)
    if (xx + yy) / 2 - np.hypot((xx - yy) / 2, xy) < 0.9:
        return  # narrower than pixels can sample
    found = measure_moments(image, [25.0], [25.0], fwhm=4.0)[0]
    assert found["ok"]
    assert np.hypot(found["x"] - 25 - dx, found["y"] - 25 - dy) < 1e-3
    np.testing.assert_allclose([found["xx"], found["yy"]], [xx, yy], rtol=0.01)
    assert found["xy"] == pytest.approx(xy, abs=0.01 * np.sqrt(xx * yy))
    assert found["flux"] == pytest.approx(500, rel=0.01)
    assert fwhm_of(measure_moments(image, [25.0], [25.0]))[0] == pytest.approx(2.3548 * det**0.25, rel=0.01)


def test_moments_of_nothing_are_not_ok():
    """An empty or a negative image, and a place without a source."""
    assert not measure_moments(np.zeros((31, 31)), [15.0], [15.0])["ok"][0]
    assert not measure_moments(np.full((31, 31), -1.0), [15.0], [15.0])["ok"][0]


def test_logarithm_of_the_shape_inverts():
    """A round shape of variance 4 has (ln 4, 0, 0); stretching moves only the second number."""
    table = np.zeros(2, dtype=[("xx", "f8"), ("yy", "f8"), ("xy", "f8")])
    table["xx"], table["yy"] = [4.0, 8.0], [4.0, 2.0]
    np.testing.assert_allclose(log_shape(table), [[np.log(4), 0, 0], [np.log(4), np.log(2), 0]], atol=1e-9)


@pytest.fixture(scope="module")
def zoo():
    """40 stars, and everything that is not a star: galaxies, particle hits, pairs, saturated stars, hot pixels."""
    n, psf = 700, moffat(3.5)
    light = np.zeros((n, n))
    rng = np.random.default_rng(5)
    galaxies = rng.uniform(30, n - 30, (25, 2))
    for x, y in galaxies:
        add(light, moffat(rng.uniform(4.6, 8), 2.5, rng.uniform(1, 2), rng.uniform(0, 3)), x, y, rng.uniform(2e4, 1e5))
    pairs = rng.uniform(30, n - 30, (12, 2))
    for x, y in pairs:
        add(light, psf, x, y, 5e4)
        angle = rng.uniform(0, 6.28)
        add(light, psf, x + 3.0 * np.cos(angle), y + 3.0 * np.sin(angle), 2e4)
    saturated = rng.uniform(30, n - 30, (6, 2))
    for x, y in saturated:
        add(light, psf, x, y, 3e6)
    field = star_field(psf, n=n, n_stars=40, flux=(2e4, 2e5), separation=30, extra=light, seed=11)
    hits = rng.integers(20, n - 20, (60, 2))
    for x, y in hits:
        field.data[y, x : x + rng.integers(1, 5)] += rng.uniform(1e3, 2e4)
    field.data = np.minimum(field.data, 50000)
    others = np.concatenate([galaxies, saturated, hits.astype(float)])
    return field, others, pairs


def test_only_stars_are_taken(zoo):
    """Of galaxies, saturated stars and particle hits none; of pairs none; of the clean stars most."""
    field, _, pairs = zoo
    stars = find_stars(field.flat, field.rms_map, None, saturation=50000 - field.sky)
    names = names_of(stars, field)
    for x, y in pairs:
        assert np.hypot(stars.x - x, stars.y - y).min() > 1.5
    assert np.count_nonzero(names < 0) == 0
    assert len(stars) >= 18  # the crowd spoils the others
    assert np.all(np.diff(stars.table["snr"]) <= 0)
    assert stars.n_detected > 100


def test_saturation_that_nobody_told_is_seen_in_the_shape(zoo):
    """Without a saturation level the flat-topped stars still are not like the others."""
    field, *_ = zoo
    stars = find_stars(field.flat, field.rms_map, None)
    assert stars.table["peak"].max() < 49000


def test_elongated_stars_are_stars():
    """b/a = 0.5 everywhere: as many stars as if they were round; there is no roundness cut."""
    counts = []
    for stretch in (1.0, 2.0):
        field = star_field(moffat(4.0, 3.0, stretch, 0.7), n=512, n_stars=60)
        counts.append(len(find_stars(field.flat, field.rms_map, None)))
    assert counts[1] >= 0.9 * counts[0] >= 40


def test_a_shape_that_changes_across_the_image_is_followed():
    """Width ±25 % and a turning elongation: stars are kept in every quarter of the image."""
    field = star_field(varying(800, amplitude=0.25), n=800, n_stars=150)
    stars = find_stars(field.flat, field.rms_map, None)
    assert len(stars) > 120
    for right in (False, True):
        for top in (False, True):
            assert np.count_nonzero(((stars.x > 400) == right) & ((stars.y > 400) == top)) >= 20


def test_masked_and_edge_stars_are_left_out():
    """A bad pixel in the core, or a core cut by the edge, disqualifies; one in the outskirts does not."""
    field = star_field(moffat(3.5), n=400, n_stars=40, separation=30)
    mask = np.zeros(field.data.shape, dtype=np.uint8)
    core, outskirts = 0, 1
    mask[round(field.y[core]), round(field.x[core])] = 1
    mask[round(field.y[outskirts]) + 9, round(field.x[outskirts])] = 1
    names = names_of(find_stars(field.flat, field.rms_map, mask), field)
    assert core not in names
    assert outskirts in names
    stars = find_stars(field.flat[20:, 35:], field.rms_map[20:, 35:], None)
    assert (stars.x > 4).all()
    assert (stars.y > 4).all()


def test_the_best_stars_of_each_region_come_first():
    """Limited to 50, the selection still reaches into all corners."""
    field = star_field(moffat(3.5), n=800, n_stars=200)
    stars = find_stars(field.flat, field.rms_map, None, config=PsfConfig(max_stars=50))
    assert len(stars) == 50
    corners = [(stars.x < 250) & (stars.y < 250), (stars.x > 550) & (stars.y < 250)]
    corners += [(stars.x < 250) & (stars.y > 550), (stars.x > 550) & (stars.y > 550)]
    assert all(np.count_nonzero(c) >= 2 for c in corners)


def test_faint_stars_are_left_out():
    """Nothing below snr_min."""
    field = star_field(gaussian(3.0), n=400, n_stars=60, flux=(300, 3e4))
    stars = find_stars(field.flat, field.rms_map, None, config=PsfConfig(snr_min=40.0))
    assert stars.table["snr"].min() >= 40


@pytest.mark.parametrize("image", [np.zeros((200, 200)), np.random.default_rng(0).normal(0, 20, (200, 200))])
def test_an_image_without_stars_gives_none(image):
    """Empty or pure noise: an empty table, no error."""
    stars = find_stars(image.astype(np.float32), np.full(image.shape, 20, dtype=np.float32), None)
    assert len(stars) == 0
    assert stars.x.shape == (0,)


def test_same_input_same_stars():
    field = star_field(moffat(3.5), n=300, n_stars=20)
    first = find_stars(field.flat, field.rms_map, None).table
    np.testing.assert_array_equal(first, find_stars(field.flat, field.rms_map, None).table)


def test_centres_do_not_depend_on_the_fraction_of_a_pixel():
    """The centre of a lopsided source is moved exactly as the source is (0.005 pixel)."""
    from ._starfield import lopsided

    centres = []
    for dx, dy in ((0.0, 0.0), (0.5, 0.0), (0.25, -0.4)):
        found = measure_moments(stamp(lopsided, 41, dx=dx, dy=dy), [20.0], [20.0], fwhm=4.0)[0]
        centres.append([found["x"] - dx, found["y"] - dy])
    np.testing.assert_allclose(centres, np.broadcast_to(centres[0], (3, 2)), atol=0.005)
