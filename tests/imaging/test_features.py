"""Each feature tells one thing about a detection, and keeps quiet about a lone point source."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_opening, distance_transform_edt

from batchproc.config import DetectConfig
from batchproc.imaging.detect import detect
from batchproc.imaging.features import dipole, distance_to_pixels, on_streak, score_response, without_holes
from batchproc.records import Flag
from tests.imaging._planted import Scene, grid, match, plant
from tests.imaging._psfs import gaussian

few = settings(max_examples=40, deadline=None)
SHAPE = (384, 384)

SCENES = [Scene(), Scene(2.6, 3.4), Scene(2.5, 2.2), Scene(3.0, 3.0, 10.0, 10.0, 1.0)]


def flagged(candidates, rows, flag):
    return (candidates["flags"][rows] & flag) != 0


@few
@given(
    bad=arrays(bool, st.tuples(st.integers(3, 25), st.integers(3, 25)), elements=st.sampled_from([True, False, False])),
    seed=st.integers(0, 99),
)
def test_distance_equals_the_distance_transform(bad, seed):
    """At whole positions; at others, the distance to the nearest bad pixel's centre."""
    y, x = np.mgrid[: bad.shape[0], : bad.shape[1]]
    found = distance_to_pixels(bad, x.ravel(), y.ravel()).reshape(bad.shape)
    if not bad.any():
        assert np.isinf(found).all()
        return
    np.testing.assert_allclose(found, distance_transform_edt(~bad))
    rng = np.random.default_rng(seed)
    px, py = rng.uniform(-0.4, bad.shape[1] - 0.6, 5), rng.uniform(-0.4, bad.shape[0] - 0.6, 5)
    expected = np.hypot(px[:, None] - x[bad], py[:, None] - y[bad]).min(axis=1)
    expected[bad[np.rint(py).astype(int), np.rint(px).astype(int)]] = 0
    np.testing.assert_allclose(distance_to_pixels(bad, px, py), expected)


@few
@given(
    corners=st.lists(st.tuples(*[st.integers(0, 40)] * 4), max_size=4),
    holes=st.lists(st.tuples(*[st.integers(0, 39)] * 2), max_size=4),
)
def test_holes_are_no_edges(corners, holes):
    """Equal to the plain opening, with no data outside the image."""
    no_data = np.zeros((40, 40), bool)
    for x0, x1, y0, y1 in corners:
        no_data[y0:y1, x0:x1] = True
    for x, y in holes:
        no_data[y, x] = True
    padded = np.pad(no_data, 20, constant_values=True)
    expected = binary_opening(padded, np.ones((9, 9)))[20:-20, 20:-20]
    np.testing.assert_array_equal(without_holes(no_data), expected if no_data.any() else no_data)


def test_a_lone_source_is_no_dipole_whatever_its_ring():
    """P_D's own negative ring does not count, nor does the noise."""
    psf = 1.4 * gaussian(3.0, 41) - 0.4 * gaussian(6.0, 41)
    response = score_response(psf, 9)
    assert response[9, 9] == pytest.approx(1)
    assert response.min() < -0.02
    assert dipole(100 * response[None], np.ones(1), response, 6.0)[0] == 0
    noisy = 8 * response + np.random.default_rng(0).normal(size=(500, 19, 19)) * 0.5
    assert np.mean(dipole(noisy, np.ones(500), response, 6.0) > 0.2) < 0.01


@few
@given(strength=st.floats(0.4, 1.0), distance=st.integers(3, 5))
def test_dipole_is_the_ratio_of_the_lobes(strength, distance):
    """Two lobes of opposite sign, apart by more than their width."""
    response = score_response(gaussian(1.6, 21), 9)
    score = 200 * (response - strength * np.roll(response, distance, axis=1))
    assert dipole(score[None], np.ones(1), response, 6.0)[0] == pytest.approx(strength, abs=0.12)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("which", ["new", "ref"])
def test_point_sources_are_not_taken_for_particle_hits(scene, which):
    """Fewer than 1 % of sources of S/N 7, new or vanished, carry any flag at all."""
    x, y = grid((512, 512), step=32)
    images = {"new": np.zeros((512, 512)), "ref": np.zeros((512, 512))}
    plant(images[which], scene, which, x, y, np.resize([7.0, 12.0, 40.0], x.size) / scene.root_f_s())
    candidates = detect(scene.subtract(images["new"], images["ref"], seed=1))
    rows, found = match(candidates, x, y)
    assert found.mean() > 0.95
    assert np.mean(candidates["flags"][rows[found]] != 0) < 0.01


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("which", ["new", "ref"])
def test_hot_pixels_are_told_from_sources(scene, which):
    """A single hot pixel of S/N 12 and more is flagged as what it is: more than 95 % in the image that is not the
    sharper one by far, and at 30 sigma all of them. One in ref is a negative detection."""
    x, y = (np.rint(p).astype(int) for p in grid(SHAPE, step=32))
    images = {"new": np.zeros(SHAPE), "ref": np.zeros(SHAPE)}
    empty = scene.zogy(*images.values())
    kernel = empty.k_n if which == "new" else empty.k_r
    snr = np.resize([12.0, 30.0], x.size)
    images[which][y, x] = snr * np.sqrt(empty.F_S) / kernel.max()
    candidates = detect(scene.subtract(images["new"], images["ref"], seed=2, photon_noise=False))
    rows, found = match(candidates, x, y)
    assert found.all()
    assert (np.sign(candidates["scorr"][rows]) == (1 if which == "new" else -1)).all()
    flag, ratio = {"new": (Flag.COSMIC_RAY, "delta_new"), "ref": (Flag.HOT_PIXEL_REF, "delta_ref")}[which]
    caught = flagged(candidates, rows, flag)
    assert caught[snr == 12].mean() > 0.95
    assert caught[snr == 30].all()
    assert np.median(candidates[ratio][rows]) > 1.05


@pytest.mark.parametrize("offset", [0.4, 1.0, 2.5])
def test_a_misplaced_star_is_a_dipole(offset):
    """Both of its lobes are flagged."""
    scene = Scene()
    x, y = grid(SHAPE, step=48)
    new, ref = np.zeros(SHAPE), np.zeros(SHAPE)
    plant(new, scene, "new", x + offset, y, 4e4)
    plant(ref, scene, "ref", x, y, 4e4)
    candidates = detect(scene.subtract(new, ref, seed=3))
    for sign in (1, -1):
        rows = np.flatnonzero(np.sign(candidates["scorr"]) == sign)
        assert len(rows) >= len(x)
        assert flagged(candidates, rows, Flag.DIPOLE).mean() > 0.98


def trail(shape, angle, width, level):
    y, x = np.mgrid[: shape[0], : shape[1]]
    t = np.radians(angle)
    distance = (x - shape[1] / 2) * np.sin(t) - (y - shape[0] / 2) * np.cos(t)
    return level * np.exp(-0.5 * (distance / width) ** 2), np.abs(distance)


@pytest.mark.parametrize(("width", "level"), [(1.45, 35.0), (1.45, 100.0), (1.45, 1000.0), (3.4, 25.0), (3.4, 300.0)])
@pytest.mark.parametrize("stretch", [1.0, 1.8])
def test_detections_on_a_trail_are_flagged_and_sources_are_not(width, level, stretch):
    """A satellite's trail, sharp or out of focus, faint or bright; round and elongated PSFs."""
    scene = Scene(stretch=stretch)
    new, distance = trail((512, 512), 23, width, level)
    x, y = grid((512, 512), step=64)
    away = distance[np.rint(y).astype(int), np.rint(x).astype(int)] > 25
    x, y = x[away], y[away]
    plant(new, scene, "new", x, y, np.resize([2000.0, 5000.0, 1e5], x.size))
    candidates = detect(scene.subtract(new, np.zeros_like(new), seed=4))
    rows, found = match(candidates, x, y)
    assert found.all()
    assert not flagged(candidates, rows, Flag.STREAK).any()
    ix, iy = (np.clip(np.rint(candidates[k]).astype(int), 0, 511) for k in ("x", "y"))
    on_trail = np.flatnonzero(distance[iy, ix] < 3)
    assert len(on_trail) > 0
    assert flagged(candidates, on_trail, Flag.STREAK).mean() > 0.9


def test_streaks_without_detections():
    assert len(on_streak(np.zeros((5, 5)), np.zeros(0, int), np.zeros(0, int), 3.0, 1.0)) == 0


def test_shape_follows_the_source():
    """A point source has the FWHM and the elongation of P_D; a galaxy is wider, and no good fit when bright."""
    scene = Scene(stretch=1.5)
    new = np.zeros(SHAPE)
    x, y = grid(SHAPE, step=48)
    plant(new, scene, "new", x[::2], y[::2], 4e4)
    wide = Scene(2.2 * scene.fwhm_new, stretch=1.0)
    plant(new, wide, "new", x[1::2], y[1::2], 1e5)
    candidates = detect(scene.subtract(new, np.zeros(SHAPE), seed=5), config=DetectConfig())
    rows, _ = match(candidates, x, y)
    points, galaxies = rows[::2], rows[1::2]
    assert np.median(candidates["elongation"][points]) == pytest.approx(1.5, rel=0.06)
    assert np.abs(np.median(candidates["theta"][points])) < 3
    assert (candidates["fwhm"][galaxies] > 1.4 * np.median(candidates["fwhm"][points])).all()
    assert np.median(candidates["chi2"][points]) < 1.3
    assert not flagged(candidates, points, Flag.BAD_FIT).any()
    assert flagged(candidates, galaxies, Flag.BAD_FIT).all()
