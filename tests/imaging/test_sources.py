"""Sources of the reference are found where they are, with their light; bright stars cover what they spoil."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.imaging.sources import BrightStars, Sources, bright_stars, find_sources
from tests.imaging._planted import Scene, grid, plant

few = settings(max_examples=30, deadline=None)
places = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), max_size=6)


def columns(points, *more):
    x, y = (np.array([p[k] for p in points], dtype=float) for k in (0, 1))
    return x, y, *more


def test_stars_and_their_light_are_found():
    """Place to a tenth of a pixel, total flux within 5 %, width within 10 %; nothing under the mask."""
    scene = Scene()
    image = np.zeros((300, 320))
    x, y = grid(image.shape, step=50)
    plant(image, scene, "new", x, y, 3e4)
    image += np.random.default_rng(0).normal(0, 20, image.shape)
    mask = np.zeros(image.shape, np.uint8)
    i, j = round(x[0]), round(y[0])
    mask[j - 8 : j + 9, i - 8 : i + 9] = 1
    sources = find_sources(image, np.full(image.shape, 20.0), mask)
    distance, row = sources.nearest(x, y)
    assert distance[0] > 10
    assert (distance[1:] < 0.1).all()
    assert np.abs(np.median(sources.flux[row[1:]]) / 3e4 - 1) < 0.05
    assert np.abs(np.median(sources.fwhm[row[1:]]) / 3.4 - 1) < 0.1
    assert len(sources) < len(x) + 3


def test_an_empty_sky_has_no_sources():
    sources = find_sources(np.zeros((64, 64)), np.ones((64, 64)), np.zeros((64, 64), bool))
    assert len(sources) == 0
    distance, row = sources.nearest([3.0], [4.0])
    assert np.isinf(distance).all()
    assert (row == -1).all()


@few
@given(stars=places, at=places, radius=st.floats(0, 30))
def test_nearest_and_cover_mean_what_they_say(stars, at, radius):
    x, y = columns(at)
    star_x, star_y = columns(stars)
    radii = np.linspace(0, radius, len(stars))
    bright = BrightStars(star_x, star_y, radii)
    sources = Sources(star_x, star_y, np.ones(len(stars)), np.ones(len(stars)))
    distance = np.hypot(x[:, None] - star_x, y[:, None] - star_y)
    nearest = distance.min(axis=1, initial=np.inf)
    np.testing.assert_allclose(bright.nearest(x, y), nearest)
    np.testing.assert_allclose(sources.nearest(x, y)[0], nearest)
    surely = (distance < radii * (1 - 1e-9) - 1e-9).any(axis=1)
    perhaps = (distance < radii * (1 + 1e-9) + 1e-9).any(axis=1)
    covered = bright.cover(x, y)
    assert (covered >= surely).all()
    assert (covered <= perhaps).all()


def test_bright_is_what_the_misfit_of_the_psf_makes_visible():
    """Twenty sigma of misfit; nothing where the PSF is exact; a galaxy counts with what one PSF holds of it."""
    n = 4
    flux = np.array([1e3, 2e5, 1e6, 1e6])
    sources = Sources(np.arange(n) * 50.0, np.zeros(n), flux, np.array([3.0, 3.0, 3.0, 90.0]))
    bright = bright_stars(sources, snr_of_flux=0.02, misfit=0.01, fwhm=3.0)
    np.testing.assert_array_equal(bright.x, [50.0, 100.0])
    np.testing.assert_array_equal(bright.radius, [15.0, 15.0])
    assert len(bright_stars(sources, snr_of_flux=0.02, misfit=0.0, fwhm=3.0)) == 0
    both = bright + BrightStars(np.array([7.0]), np.array([0.0]), np.array([2.0]))
    assert both.cover([8.0, 20.0, 36.0], [0.0, 0.0, 0.0]).tolist() == [True, False, True]
