"""Every significant change is one row, in its place, with its light; nothing else is, and what is doubtful says so."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, label, maximum_filter

from batchproc.config import DetectConfig
from batchproc.errors import SubtractError
from batchproc.imaging.detect import BrightStars, Sources, detect, find_peaks
from batchproc.records import CATALOGUE, Flag, MaskBit
from tests.imaging._planted import Scene, grid, join, match, plant

SHAPE = (384, 400)
BY_FLOW = {
    *("candidate_id", "image_id", "ra", "dec", "mag", "mag_err", "ref_mag", "mjd", "filter", "survey", "exposure_id"),
    *("ccd", "fwhm_new", "fwhm_ref", "zero_point", "stamp_index"),
}


def planted(scene, snr, *, shape=SHAPE, which="new", seed=1, step=40, **more):
    """A difference with sources of these expected S/N, and their places and fluxes."""
    images = {"new": np.zeros(shape), "ref": np.zeros(shape)}
    x, y = grid(shape, step=step, seed=seed or 0)
    flux = np.resize(np.asarray(snr, dtype=float), x.size) / scene.root_f_s()
    plant(images[which], scene, which, x, y, flux)
    return scene.subtract(images["new"], images["ref"], seed=seed, **more), x, y, flux


@pytest.mark.parametrize("scene", [Scene(), Scene(2.5, 3.1, 12.0, 12.0, 1.0)])
@pytest.mark.parametrize("which", ["new", "ref"])
def test_sources_come_back_with_place_and_flux(scene, which):
    """S/N 8 to 100, risen or vanished: ≥ 99 % found, once each; places unbiased within 0.02 pixel and scattered by less
    than 1.25 of the bound; median flux within 1 %; errors true."""
    candidates, x, y, flux, snr = [], [], [], [], np.array([8.0, 10.0, 14.0, 20.0, 40.0, 100.0])
    error, ratio, pull, bound, n_found, n_extra = [], [], [], [], [], []
    for seed in range(3):
        difference, x, y, flux = planted(scene, snr, shape=(600, 600), which=which, seed=seed)
        candidates = detect(difference)
        rows, found = match(candidates, x, y)
        rows = rows[found]
        sign = 1 if which == "new" else -1
        assert (np.sign(candidates["flux"][rows]) == sign).all()
        assert (np.sign(candidates["scorr"][rows]) == sign).all()
        n_found.append(found.mean())
        n_extra.append(len(candidates) - found.sum())
        error.append(np.concatenate([candidates["x"][rows] - x[found], candidates["y"][rows] - y[found]]))
        ratio.append(sign * candidates["flux"][rows] / flux[found])
        pull.append((sign * candidates["flux"][rows] - flux[found]) / candidates["flux_err"][rows])
        bound.append(np.tile(candidates["xy_err"][rows], 2))
    error, bound, ratio, pull = (np.concatenate(a) for a in (error, bound, ratio, pull))
    assert np.mean(n_found) >= 0.99
    assert sum(n_extra) <= 4  # about 0.6 per Mpix at 5 sigma
    assert abs(np.mean(error / bound)) * np.median(bound) < 0.02
    assert np.std(error / bound) < 1.15
    assert abs(np.median(ratio) - 1) < 0.01
    assert 0.9 < np.std(pull) < 1.1


def test_errors_of_positions_are_those_of_the_paper():
    """On blank-sky noise xy_err is √2 σ_PSF / (S/N), with the width of D's PSF."""
    scene = Scene(3.0, 3.0)
    difference, x, y, _ = planted(scene, 20.0, photon_noise=False)
    candidates = detect(difference)
    rows, found = match(candidates, x, y)
    assert found.all()
    expected = np.sqrt(2) * 3.0 / 2.3548 / np.abs(candidates["scorr"][rows])
    assert np.median(candidates["xy_err"][rows] / expected) == pytest.approx(1, abs=0.05)
    assert np.median(np.abs(np.hypot(candidates["x"][rows] - x, candidates["y"][rows] - y)) / expected) < 1.3


def test_a_noiseless_source_is_exact():
    """Flux to 0.1 %, aperture flux to 0.5 %, place to 0.01 pixel, no flag."""
    scene = Scene()
    difference, x, y, flux = planted(scene, 300.0, seed=None)
    candidates = detect(difference)
    rows, found = match(candidates, x, y)
    assert found.all()
    assert len(candidates) == len(x)
    np.testing.assert_allclose(candidates["flux"][rows], flux, rtol=1e-3)
    np.testing.assert_allclose(candidates["aper_flux"][rows], flux, rtol=5e-3)
    assert np.hypot(candidates["x"][rows] - x, candidates["y"][rows] - y).max() < 0.01
    assert (candidates["flags"] == 0).all()


def test_errors_of_aperture_fluxes_are_true():
    difference, x, y, flux = planted(Scene(), 40.0)
    candidates = detect(difference)
    rows, _ = match(candidates, x, y)
    assert np.std((candidates["aper_flux"][rows] - flux) / candidates["aper_flux_err"][rows]) == pytest.approx(
        1, abs=0.25
    )


def test_columns_are_those_of_the_catalogue():
    """Every column that pixels can give, with the catalogue's type, in its order; inputs unchanged."""
    difference, _, _, _ = planted(Scene(), 15.0)
    before = {name: getattr(difference, name).copy() for name in ("difference", "score_corr", "flux", "flux_err")}
    candidates = detect(difference)
    expected = [c for c in CATALOGUE if c.name not in BY_FLOW]
    assert list(candidates.columns) == [c.name for c in expected]
    for column in expected:
        assert candidates[column.name].dtype == np.dtype(column.dtype)
        assert len(candidates[column.name]) == len(candidates)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(difference, name), array)


def test_nothing_is_found_where_nothing_is():
    """No candidates: the same columns, empty."""
    scene = Scene()
    difference = scene.subtract(np.zeros((128, 128)), np.zeros((128, 128)))
    empty = detect(difference)
    assert len(empty) == 0
    full = detect(planted(scene, 20.0)[0])
    assert {k: v.dtype for k, v in empty.columns.items()} == {k: v.dtype for k, v in full.columns.items()}


def test_the_same_input_gives_the_same_rows_in_the_order_of_the_image():
    difference, _, _, _ = planted(Scene(), [6.0, 9.0, 30.0])
    first, again = detect(difference), detect(difference)
    for name, values in first.columns.items():
        np.testing.assert_array_equal(values, again[name])
    assert (np.diff(np.rint(first["y"])) >= -2).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([2.5, 3.0, 4.0]))
def test_every_island_has_its_peak_and_every_peak_is_an_extremum(seed, threshold):
    """Against the plain definition: each island above the threshold, of either sign, gives its highest pixel."""
    rng = np.random.default_rng(seed)
    image = gaussian_filter(rng.normal(size=(90, 70)), 2.0)
    image = (image / image.std()).astype(np.float32)
    x, y, _ = find_peaks(image, DetectConfig(threshold=threshold))
    found = np.zeros(image.shape, bool)
    found[y, x] = True
    assert found.sum() == len(x)  # none twice
    for sign in (1, -1):
        height = sign * image
        islands, n = label(height > threshold, structure=np.ones((3, 3)))
        for k in range(1, n + 1):
            own = np.where(islands == k, height, 0)
            assert found[np.unravel_index(own.argmax(), own.shape)]
    height = np.abs(image)
    assert ((height == maximum_filter(height, 3)) & (height > threshold))[found].all()


@pytest.mark.parametrize("ratio", [1, 3, 10])
def test_neighbours_are_two_rows(ratio):
    """Sources three FWHM apart, the second up to ten times brighter: both found, both in place."""
    scene = Scene()
    new = np.zeros(SHAPE)
    x, y = grid(SHAPE, step=60)
    faint = 15 / scene.root_f_s()
    plant(new, scene, "new", x, y, faint)
    plant(new, scene, "new", x + 3 * scene.fwhm_new, y, ratio * faint)
    candidates = detect(scene.subtract(new, np.zeros(SHAPE), seed=3))
    assert len(candidates) == 2 * len(x)
    rows, found = match(candidates, np.concatenate([x, x + 3 * scene.fwhm_new]), np.concatenate([y, y]), radius=1.0)
    assert found.all()
    assert len(np.unique(rows)) == len(rows)


def test_seams_lose_nothing_and_double_nothing():
    """Sources on and beside the seam of two tiles with different PSFs: one row each, with the flux it has elsewhere."""
    left, right = Scene(3.2, 2.6), Scene(3.4, 2.8, 21.0, 9.5)
    seam = 200
    y = np.arange(30.0, 370.0, 20.0)
    x = seam - 0.5 + np.linspace(-3.5, 3.5, len(y))
    new = np.zeros(SHAPE)
    for scene, side in ((left, x < seam - 0.5), (right, x >= seam - 0.5)):
        plant(new, scene, "new", x[side], y[side], 40 / left.root_f_s())
    difference = join(left.subtract(new, np.zeros(SHAPE), seed=2), right.subtract(new, np.zeros(SHAPE), seed=2), seam)
    candidates = detect(difference)
    rows, found = match(candidates, x, y)
    assert found.all()
    assert len(candidates) == len(x)
    flux = 40 / left.root_f_s()
    assert np.abs(np.median(candidates["flux"][rows]) / flux - 1) < 0.03
    assert np.abs(candidates["flux"][rows] - flux).max() < 5 * candidates["flux_err"].max()
    assert np.abs(np.mean(candidates["x"][rows] - x)) < 0.05
    tile = (np.rint(candidates["x"]) >= seam).astype(int)
    np.testing.assert_array_equal(candidates.f_d, np.array([k.f_d for k in difference.kernels])[tile])


def test_two_peaks_of_one_source_are_one_row():
    """Peaks less than half a FWHM apart after the fit, of one sign: the more significant stays."""
    scene = Scene(8.0, 8.0)
    new = np.zeros((128, 128))
    plant(new, scene, "new", [64.0], [64.0], [300 / scene.root_f_s()])
    difference = scene.subtract(new, np.zeros_like(new))
    dented = difference.score_corr.copy()
    dented[62:67, 64] *= 0.9  # a furrow through the peak
    candidates = detect(replace(difference, score_corr=dented))
    assert len(candidates) == 1
    assert np.hypot(candidates["x"][0] - 64, candidates["y"][0] - 64) < 0.05


def test_masked_pixels_and_nan_are_no_obstacle():
    """Sources beside or below them are flagged, not lost; NaN in D, S or flux_err does not spread."""
    scene = Scene()
    difference, x, y, _ = planted(scene, 40.0)
    mask = difference.mask.copy()
    i, j = np.rint(x).astype(int), np.rint(y).astype(int)
    mask[j[0] - 1 : j[0] + 2, i[0] - 1 : i[0] + 2] = MaskBit.BAD  # on a source
    mask[j[1], i[1] + 2] = MaskBit.BAD  # under the core of another
    mask[j[2], i[2] + 4] = MaskBit.BAD  # outside the core of the next
    bad = mask != 0
    spoilt = replace(
        difference,
        mask=mask,
        difference=np.where(bad, np.nan, difference.difference),
        flux=np.where(bad, np.nan, difference.flux),
        score_corr=np.where(bad, np.nan, difference.score_corr),
        flux_err=np.where(bad, np.nan, difference.flux_err),
    )
    candidates = detect(spoilt)
    rows, found = match(candidates, x, y)
    assert found[1:].all()
    for name in ("x", "y", "flux", "flux_err", "aper_flux", "fwhm", "chi2", "dipole", "delta_new"):
        assert np.isfinite(candidates[name][rows[1:]]).all(), name
    np.testing.assert_allclose(candidates["mask_distance"][rows[1:3]], [2, 4], atol=0.8)
    masked = candidates["flags"] & Flag.MASKED != 0
    assert masked[rows[1]]
    assert not masked[rows[2:]].any()
    beneath = np.hypot(candidates["x"] - x[0], candidates["y"] - y[0]) < 5
    assert beneath.any()
    assert masked[beneath].all()


def test_edges_are_flagged_narrowly():
    """Within 1.5 FWHM of the image's edge or of the coverage's: EDGE; a hole of a few NaN pixels is no edge."""
    scene = Scene()
    shape = (200, 300)
    x = np.array([3.0, 150.0, 293.0, 150.0, 226.0, 150.0])
    y = np.array([100.0, 3.0, 100.0, 196.0, 60.0, 100.0])
    new = np.zeros(shape)
    plant(new, scene, "new", x, y, 50 / scene.root_f_s())
    difference = scene.subtract(new, np.zeros(shape), seed=1)
    mask = np.zeros(shape, np.uint8)
    mask[:80, 230:] = MaskBit.NO_DATA  # a corner that the reference does not cover
    mask[100, 153] = MaskBit.NO_DATA  # one NaN
    difference = replace(difference, mask=mask, score_corr=np.where(mask, 0, difference.score_corr))
    candidates = detect(difference)
    rows, found = match(candidates, x, y)
    assert found.all()
    edge = candidates["flags"][rows] & Flag.EDGE != 0
    assert edge.tolist() == [True, True, False, True, True, False]
    np.testing.assert_allclose(candidates["edge_distance"][rows], [3.5, 3.5, 6.5, 3.5, 4.0, 82.7], atol=0.3)


def test_saturated_and_bright_stars_are_flagged():
    scene = Scene()
    difference, x, y, _ = planted(scene, 40.0)
    mask = difference.mask.copy()
    mask[round(y[0]), round(x[0]) + 6] = MaskBit.SATURATED
    bright = BrightStars(x[1:3] + 5.0, y[1:3], np.array([6.0, 4.0]))
    candidates = detect(replace(difference, mask=mask), bright=bright)
    rows, _ = match(candidates, x, y)
    flags = candidates["flags"][rows]
    assert (flags[:4] & Flag.SATURATED != 0).tolist() == [True, False, False, False]
    assert (flags[:4] & Flag.BRIGHT_STAR != 0).tolist() == [False, True, False, False]
    assert candidates["bright_distance"][rows[1]] == pytest.approx(5, abs=0.3)
    assert np.isinf(detect(difference)["bright_distance"]).all()


def test_nearest_reference_source_is_named():
    difference, x, y, _ = planted(Scene(), 40.0)
    sources = Sources(x[:5] + 3.0, y[:5] + 4.0, np.arange(5.0), np.full(5, 2.5))
    candidates = detect(difference, sources=sources)
    rows, _ = match(candidates, x[:5], y[:5])
    np.testing.assert_allclose(candidates["ref_distance"][rows], 5, atol=0.3)
    np.testing.assert_array_equal(candidates["ref_flux"][rows], np.arange(5.0))
    alone = detect(difference)
    assert np.isinf(alone["ref_distance"]).all()
    assert np.isnan(alone["ref_flux"]).all()


def test_too_many_candidates_are_a_failed_subtraction():
    """Both numbers, and what they mean; before and after the sources are told apart."""
    difference, x, _, _ = planted(Scene(), 40.0)
    with pytest.raises(SubtractError, match=f"{len(x)} sources above 5 sigma, allowed are 10 .*has failed") as caught:
        detect(difference, config=DetectConfig(max_candidates=10))
    assert caught.value.metadata["found"] == len(x)
    assert caught.value.metadata["allowed"] == 10
    assert caught.value.stage == "detect"
    flooded = replace(difference, score_corr=difference.score_corr + 20)
    with pytest.raises(SubtractError, match="of 153600 pixels above 5 sigma"):
        detect(flooded)


def test_registration_noise_does_not_move_positions():
    """With the astrometric term S_corr's peak wanders; places and fluxes come from D and S, and do not."""
    scene = Scene()
    images = np.zeros(SHAPE), np.zeros(SHAPE)
    x, y = grid(SHAPE)
    plant(images[0], scene, "new", x, y, 60 / scene.root_f_s())
    plain, shaky = (scene.subtract(*images, seed=4, sig_x=s, sig_y=s) for s in (0.0, 0.2))
    rows, found = match(detect(plain), x, y)
    rows_shaky, found_shaky = match(detect(shaky), x, y)
    assert found.all()
    assert found_shaky.all()
    for name, tolerance in (("x", 0.01), ("y", 0.01), ("flux", 0.02 * 60 / scene.root_f_s())):
        np.testing.assert_allclose(detect(shaky)[name][rows_shaky], detect(plain)[name][rows], atol=tolerance)
