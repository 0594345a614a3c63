"""Stars of two images: found, matched, and compared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.imaging.patterns import match_patterns
from batchproc.imaging.registration import Registration, measure_registration, register
from batchproc.imaging.starlist import Stars, detect_stars, match_stars
from tests.imaging._stars import expose, render, scatter_stars

SHAPE = (1000, 1200)


def matched(n, seed, *, sigma=0.05, extra=(0.0, 0.0), move=None, outliers=0, box=(0, 1200, 0, 1000)):
    """n matched stars: moved, with centroid noise, scatter beyond it, and a few that belong to something else."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform([box[0], box[2]], [box[1], box[3]], (n, 2))
    noise = sigma * rng.uniform(0.3, 2.0, n)
    there = xy + rng.normal(size=(n, 2)) * np.hypot(noise[:, None], extra)
    if move is not None:
        there += np.column_stack(move(*xy.T))
    there[:outliers] += rng.uniform(-3, 3, (outliers, 2))
    return xy, there, noise


def distortion(degree, size):
    """A displacement of the given degree and of rms length `size` over the image."""
    rng = np.random.default_rng(degree)
    coefficients = np.array(
        [[rng.normal() if i + j == degree else 0.0 for i in range(4) for j in range(4 - i)] for _ in range(2)]
    )
    r = Registration(coefficients, 3, SHAPE, 0.0, 0.0, 0)
    return Registration(coefficients * size / r.size, 3, SHAPE, 0.0, 0.0, 0)


class TestMeasure:
    @pytest.mark.parametrize("degree", [0, 1, 2, 3])
    def test_a_distortion_is_recovered_with_its_degree(self, degree):
        """Of 300 stars, 15 of them outliers: the degree, and the displacement to a fraction of a star's noise."""
        truth = distortion(degree, 0.3)
        r = measure_registration(*matched(300, degree, move=truth, outliers=15), SHAPE)
        assert r.degree == degree
        x, y = np.meshgrid(np.linspace(0, 1199, 20), np.linspace(0, 999, 20))
        error = np.array(r(x, y)) - truth(x, y)
        assert np.sqrt(np.mean(error**2)) < 0.015
        assert r.n_matches >= 280

    @pytest.mark.parametrize("n", [8, 30, 300])
    def test_aligned_images_are_left_alone(self, n):
        """No correction where there is none to make, in nearly all draws."""
        called = [measure_registration(*matched(n, seed), SHAPE).significant for seed in range(40)]
        assert np.mean(called) <= 0.08

    @pytest.mark.parametrize("extra", [(0.0, 0.0), (0.05, 0.02), (0.2, 0.1)])
    def test_scatter_is_told_apart_from_centroid_noise(self, extra):
        """rms is what the stars scatter by beyond the noise of their centroids, x and y by themselves."""
        found = [measure_registration(*matched(200, s, sigma=0.05, extra=extra), SHAPE) for s in range(20)]
        rms = np.mean([(r.rms_x, r.rms_y) for r in found], axis=0)
        assert rms == pytest.approx(extra, rel=0.12, abs=0.018)

    def test_the_error_of_a_correction_counts(self):
        """Eight noisy stars cannot align better than to their noise over the root of eight."""
        r = measure_registration(*matched(8, 1, sigma=0.2, move=lambda x, y: (0 * x + 2, 0 * y)), SHAPE)
        assert r.degree == 0
        assert r.rms_x > 0.03

    def test_stars_in_one_corner_do_not_bend_the_others(self):
        """Where most of the image has no stars, no polynomial is extrapolated into it."""
        r = measure_registration(*matched(200, 3, sigma=0.3, box=(0, 150, 0, 150)), SHAPE)
        assert r.degree <= 0

    def test_few_stars_allow_a_shift_at_most(self):
        """With three stars: a shift; with two: nothing."""
        xy, there, noise = matched(3, 4, sigma=0.02, move=lambda x, y: (0 * x + 1.0, 0 * y - 0.5))
        r = measure_registration(xy, there, noise, SHAPE)
        assert r.degree == 0
        assert np.allclose(r(500, 500), (1, -0.5), atol=0.05)
        assert measure_registration(xy[:2], there[:2], noise[:2], SHAPE).degree == -1

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(-3, 3))
    def test_swapping_the_images_turns_the_sign(self, seed, dx, dy):
        """New against ref is minus ref against new."""
        xy, there, noise = matched(40, seed, move=lambda x, y: (0 * x + dx, 0 * y + dy), sigma=0.02)
        one = measure_registration(xy, there, noise, SHAPE, max_degree=0)
        other = measure_registration(there, xy, noise, SHAPE, max_degree=0)
        assert np.allclose(one(0, 0), -np.array(other(0, 0)), atol=1e-6)


class TestMatch:
    def test_only_mutual_nearest_neighbours(self):
        """Two stars of new near one of ref: the nearer has it."""
        i, j = match_stars(np.array([[0.0, 0], [1, 0], [50, 50]]), np.array([[0.2, 0], [80, 80]]), 4.0)
        assert i.tolist() == [0]
        assert j.tolist() == [0]

    def test_empty_lists(self):
        """No stars, no matches."""
        assert match_stars(np.empty((0, 2)), np.zeros((3, 2)), 4.0)[0].size == 0

    def test_matching_follows_the_displacement(self):
        """Stars that a distortion of 10 px in the corners puts out of reach are found from the middle outwards."""
        x, y, flux = scatter_stars(150, SHAPE, 3, apart=25)
        u, v = (x - 600) / 600, (y - 500) / 500
        stars = _as_stars(x, y, flux)
        moved = _as_stars(x + 5 * u - 3 * v, y + 4 * v + 5 * u * v, flux)
        r = register(stars, moved, SHAPE, 4.0)
        assert r.n_matches > 145


class TestDetect:
    def test_centroids_scatter_by_their_sigma(self):
        """Positions against truth in units of the stated noise: unit scatter, no bias."""
        pulls, off = [], []
        for seed in range(3):
            x, y, flux = scatter_stars(120, (800, 800), seed, margin=20, apart=30, faintest=1500)
            image = expose(render((800, 800), x, y, flux, 3.2), seed)
            stars = detect_stars(image.data)
            i, j = match_stars(stars.xy, np.column_stack([x, y]), 1.5)
            d = stars.xy[i] - np.column_stack([x, y])[j]
            pulls.append(d / stars.sigma[i][:, None])
            off.append(d[:20])
        pulls = np.concatenate(pulls)
        width = np.diff(np.percentile(pulls, [15.87, 84.13]))[0] / 2
        assert 0.85 < width < 1.2
        assert np.abs(np.mean(np.concatenate(off), axis=0)).max() < 0.005

    def test_only_good_stars(self):
        """Saturated, masked, blended and single-pixel sources are left out."""
        image = render((300, 300), [50, 100, 150, 200, 206, 250], [50, 100, 150, 200, 203, 250], 2e4, 3.0)
        image += np.random.default_rng(0).normal(size=image.shape) * 5
        image[98:103, 98:103] = 60000
        image[30, 250] = 20000
        mask = np.zeros(image.shape, bool)
        mask[151, 150] = True
        stars = detect_stars(image.astype(np.float32), mask, 50000.0)
        assert sorted(stars.x.round().tolist()) == [50, 250]

    @pytest.mark.parametrize("fwhm", [1.7, 3.0, 9.0])
    def test_each_star_once_whatever_its_width(self, fwhm):
        """Sharp or wide, on a sloping sky: every bright star, at its place and with its width and flux; the peaks that
        noise makes on wide stars are no neighbours."""
        shape = (700, 700)
        x, y, flux = scatter_stars(60, shape, 2, margin=60, apart=50, faintest=2e4)
        image = expose(render(shape, x, y, flux, fwhm) + np.linspace(0, 300, 700), 3)
        stars = detect_stars(image.data)
        i, j = match_stars(stars.xy, np.column_stack([x, y]), 1.0)
        assert len(j) >= 58
        assert len(stars) <= 60
        assert np.median(stars.fwhm) == pytest.approx(np.hypot(fwhm, 0.68), rel=0.05)
        assert np.median(stars.flux[i] / flux[j]) == pytest.approx(1, abs=0.03)

    def test_crowds_give_the_stars_that_stand_alone(self):
        """Several stars to each patch of 20 x 20 pixels: what is found is where bright stars are."""
        shape = (600, 600)
        x, y, flux = scatter_stars(5000, shape, 4, faintest=500)
        stars = detect_stars(expose(render(shape, x, y, flux, 3.0), 5).data)
        assert len(stars) >= 30
        bright = flux > 2000
        i, _ = match_stars(stars.xy, np.column_stack([x, y])[bright], 0.7)
        assert len(i) >= 0.9 * len(stars)

    def test_nothing_to_find(self):
        """An empty image has no stars, and that is no error here."""
        assert len(detect_stars(np.zeros((100, 100), np.float32))) == 0


class TestPatterns:
    @pytest.mark.parametrize("parity", [1, -1])
    @pytest.mark.parametrize("scale", [0.5, 1.0, 2.1])
    def test_rotated_scaled_mirrored_lists_match(self, parity, scale):
        """Two lists with three quarters of their stars in common, whatever similarity lies between them."""
        rng = np.random.default_rng(7)
        xy = rng.uniform(0, 1000, (60, 2))
        a = 2.1
        linear = scale * np.array([[parity * np.cos(a), -np.sin(a)], [parity * np.sin(a), np.cos(a)]])
        there = xy @ linear.T + (300, -50) + rng.normal(0, 0.1, xy.shape)
        order = np.sort(rng.permutation(60)[:50])
        found = match_patterns(xy[5:], there[order], 8)
        assert found is not None
        assert np.allclose(found[:, :2], linear, atol=2e-3)

    def test_same_lists_same_matrix(self):
        """The search for triangles is random; what comes out is not."""
        rng = np.random.default_rng(8)
        xy = rng.uniform(0, 1000, (50, 2))
        there = xy[5:45] + np.array([100, 20]) + rng.normal(0, 0.2, (40, 2))
        found = {match_patterns(xy, there, 8).tobytes() for _ in range(4)}
        assert len(found) == 1

    def test_different_fields_do_not_match(self):
        """Chance agreements are not taken for a match."""
        rng = np.random.default_rng(9)
        assert match_patterns(rng.uniform(0, 1000, (25, 2)), rng.uniform(0, 1000, (25, 2)), 8) is None

    def test_too_few_stars(self):
        """Two stars make no triangle."""
        assert match_patterns(np.zeros((2, 2)), np.zeros((30, 2)), 8) is None


def _as_stars(x, y, flux):
    return Stars(x, y, np.full(x.size, 0.01), flux, np.full(x.size, 3.0))


class TestField:
    WIDE = (2048, 2048)

    @staticmethod
    def move(x, y, wave=0.2, length=700):
        """A cubic of some 1 px in the corners, and waves of 0.2 px."""
        u, v = (x - 1024) / 1024, (y - 1024) / 1024
        dx = 1.2 * u**3 - 0.8 * u * v**2 + 0.3 * v + wave * np.sin(2 * np.pi * (0.8 * x + 0.6 * y) / length)
        dy = -0.9 * v**3 + 0.7 * u**2 * v + wave * np.cos(2 * np.pi * (0.9 * y - 0.45 * x) / length)
        return dx, dy

    def measured(self, n, seed, *, fields=True, **kwargs):
        """Registration of n stars (centroids good to 0.005 to 0.1 px, scatter 0.02 px, a few wrong), and its error at
        places of its own."""
        rng = np.random.default_rng(seed)
        xy = rng.uniform(0, 2047, (n, 2))
        sigma = 10 ** rng.uniform(-2.3, -1, n)
        there = xy + np.column_stack(self.move(*xy.T, **kwargs))
        there += rng.normal(size=(n, 2)) * np.hypot(sigma, 0.02)[:, None]
        there[: n // 30] += rng.uniform(-3, 3, (n // 30, 2))
        r = measure_registration(xy, there, sigma, self.WIDE, field=fields)
        x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(10, 2037, 40), np.linspace(10, 2037, 40)))
        error = np.array(r(x, y)) - self.move(x, y, **kwargs)
        return r, float(np.sqrt(np.mean(error**2)))

    @pytest.mark.parametrize(("n", "bound"), [(200, 0.1), (400, 0.03), (800, 0.02)])
    def test_waves_that_no_polynomial_follows(self, n, bound):
        """A cubic leaves 0.14 px rms of them at independent places; the field a third to a tenth of that, the less the
        more stars there are."""
        for seed in range(3):
            cubic = self.measured(n, seed, fields=False)
            field = self.measured(n, seed)
            assert cubic[1] > 0.13
            assert field[1] < bound

    @pytest.mark.parametrize("n", [80, 100, 130, 160])
    @pytest.mark.parametrize("length", [400, 700, 1200])
    def test_few_stars_are_never_overfitted(self, n, length):
        """Where stars are too few for the waves, the field is left out, or better than the polynomial all the same."""
        for seed in range(4):
            cubic = self.measured(n, seed, fields=False, length=length)
            field = self.measured(n, seed, length=length)
            assert field[1] < 1.02 * cubic[1]

    @pytest.mark.parametrize("n", [100, 400])
    def test_a_cubic_alone_calls_for_no_field(self, n):
        """What a polynomial describes is left to it."""
        called = [self.measured(n, seed, wave=0.0)[0].spline is not None for seed in range(8)]
        assert sum(called) <= 1

    def test_the_error_that_is_left_is_told(self):
        """No less than the error at places of its own, and not several times more."""
        for seed in range(3):
            r, error = self.measured(400, seed)
            assert 0.8 * error < np.hypot(r.rms_x, r.rms_y) / np.sqrt(2) < 4 * np.hypot(error, 0.02)

    def test_where_there_are_no_stars_the_field_does_not_run_away(self):
        """Stars in the left half only: in the other half the correction stays of the size of the distortion."""
        rng = np.random.default_rng(1)
        xy = rng.uniform([0, 0], [1100, 2047], (600, 2))
        there = xy + np.column_stack(self.move(*xy.T)) + rng.normal(0, 0.03, (600, 2))
        near = np.stack(np.meshgrid(np.linspace(0, 1100, 12), np.linspace(0, 2047, 12)), -1).reshape(-1, 2)
        r = measure_registration(xy, there, np.full(600, 0.03), self.WIDE, where=near)
        inside = np.array(r(*near.T)) - self.move(*near.T)
        assert np.sqrt(np.mean(inside**2)) < 0.04
        assert r.spline is not None
        assert np.abs(r.spline).max() < 3
