"""Trails: found with their ends, whatever their direction; noise and point sources make none."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from batchproc.imaging.trails import find_trails, on_trails

FWHM = 4.0


def noise(shape, seed):
    """A score of unit width with the correlation of a matched filter."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), FWHM / 2.355)
    return field / field.std()


def draw(score, start, end, height):
    n = int(np.hypot(*np.subtract(end, start)) * 4)
    line = np.zeros(score.shape)
    x, y = np.linspace(start, end, n).round().astype(int).T
    line[y, x] = 1
    line = gaussian_filter(line, FWHM / 2.355)
    return score + height * line / line.max()


@pytest.mark.parametrize(
    ("start", "end"),
    [((50, 80), (900, 700)), ((300, 20), (310, 1000)), ((10, 500), (1010, 505)), ((600, 100), (480, 260))],
)
def test_a_faint_trail_is_found_with_its_ends(start, end):
    """A trail of 4 sigma, too faint for its parts to be elongated, is one object with the right ends."""
    score = draw(noise((1024, 1024), 1), start, end, 4.0)
    trails = find_trails(score, FWHM)
    assert len(trails) == 1
    found = sorted([(trails[0].x0, trails[0].y0), (trails[0].x1, trails[0].y1)])
    np.testing.assert_allclose(found, sorted([start, end]), atol=8 * FWHM)
    middle = np.add(start, end) / 2
    assert on_trails(trails, [middle[0]], [middle[1]], FWHM)[0]


@pytest.mark.parametrize("seed", range(4))
def test_noise_and_stars_make_no_trail(seed):
    """Blank sky, and a field of many point sources, have none."""
    score = noise((1024, 1024), seed)
    assert find_trails(score, FWHM) == []
    stars = np.zeros(score.shape)
    rng = np.random.default_rng(100 + seed)
    stars[rng.integers(0, 1024, 200), rng.integers(0, 1024, 200)] = 1
    stars = gaussian_filter(stars, FWHM / 2.355)
    assert find_trails(score + 30 * stars / stars.max(), FWHM) == []


def test_dashes_on_one_line_are_all_kept():
    """A trail interrupted by what was averaged away leaves all its dashes flagged, and the gap between not."""
    score = draw(draw(noise((1024, 1024), 3), (100, 100), (400, 400), 5.0), (600, 600), (700, 700), 5.0)
    trails = find_trails(score, FWHM)
    assert on_trails(trails, [250, 650], [250, 650], FWHM).all()
    assert not on_trails(trails, [500, 250], [500, 300], FWHM).any()


def test_an_empty_image_has_none():
    """No peaks at all: no trail."""
    assert find_trails(np.zeros((64, 64)), FWHM) == []
