"""Subtraction by tiles: seams, borders, masks, and the models' errors counted as noise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import SubtractError
from batchproc.imaging.subtract import plan_tiles, subtract
from batchproc.imaging.zogy import zogy
from batchproc.records import MaskBit
from tests.imaging._psfs import ConstantPsf, gaussian

PSF_NEW, PSF_REF = ConstantPsf(gaussian(3.4, 27), 3.4), ConstantPsf(gaussian(2.6, 27), 2.6)


def blank_sky_width(values):
    """Robust standard deviation: half the distance between the 16th and the 84th percentile of a Gaussian."""
    low, high = np.percentile(values, [15.865525, 84.134475])
    return (high - low) / 2


def flat(shape, value):
    return np.full(shape, value, np.float32)


def run(new, ref, **changes):
    arguments = {"rms_new": flat(new.shape, 20), "rms_ref": flat(new.shape, 9), "flux_ratio": 1 / 1.3, "tile": 256}
    return subtract(new, ref, PSF_NEW, PSF_REF, **arguments | changes)


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(1)
    return rng.normal(0, 20, (500, 430)).astype(np.float32), rng.normal(0, 9, (500, 430)).astype(np.float32)


@given(ny=st.integers(20, 3000), nx=st.integers(20, 3000), border=st.integers(5, 60))
@settings(max_examples=50, deadline=None)
def test_tiles_cover_every_pixel_once_with_a_full_border(ny, nx, border):
    """Tiles own each pixel exactly once, and a frame reaches the border's width beyond what it owns."""
    tiles = plan_tiles((ny, nx), border)
    assert sum((t.y1 - t.y0) * (t.x1 - t.x0) for t in tiles) == ny * nx
    assert len({(t.y0, t.x0) for t in tiles}) == len(tiles)
    for t in tiles:
        assert t.fy == t.y0 - border
        assert t.fx == t.x0 - border
        assert t.fy + t.side >= t.y1 + border
        assert t.fx + t.side >= t.x1 + border


def test_tiled_equals_whole_frame_away_from_the_borders(noise):
    """The same numbers come out of many small tiles and of one frame."""
    new, ref = noise
    tiled = run(new, ref, renormalise=False, star_residuals=False)
    assert tiled.n_tiles > 4
    whole = zogy(new, ref, PSF_NEW.psf, PSF_REF.psf, sigma_new=20, sigma_ref=9, flux_ratio=1 / 1.3)
    inner = np.s_[40:-40, 40:-40]
    for name in ("score_corr", "flux", "flux_err"):
        expected = getattr(whole, name)[inner]
        np.testing.assert_allclose(
            getattr(tiled.difference, name)[inner], expected, atol=2e-3 * expected.std() + 1e-5, rtol=2e-3
        )
    # D's filter is not compact (it divides by |P|): a seam may show at the level of its tails.
    difference = (tiled.difference.difference - whole.difference)[inner]
    assert difference.std() < 0.02


def test_seams_do_not_show_in_the_noise(noise):
    """S_corr has the same width on the seams of tiles as elsewhere."""
    result = run(*noise)
    columns = {k.x0 for k in result.difference.kernels} - {0}
    on_seam = np.concatenate([result.difference.score_corr[:, c - 1 : c + 1].ravel() for c in sorted(columns)])
    assert on_seam.std() == pytest.approx(1, abs=0.08)


def test_a_source_on_a_seam_has_its_flux_and_significance(noise):
    """A source planted where four tiles meet is recovered like any other."""
    new = np.zeros_like(noise[0])
    first = run(new, np.zeros_like(new))
    y = sorted({k.y0 for k in first.difference.kernels})[1]
    x = sorted({k.x0 for k in first.difference.kernels})[1]
    new[y - 13 : y + 14, x - 13 : x + 14] = 3000 * PSF_NEW.psf
    d = run(new, np.zeros_like(new)).difference
    np.testing.assert_allclose(d.flux[y - 1 : y + 1, x - 1 : x + 1].max(), 3000, rtol=1e-3)
    patch = d.flux[y - 3 : y + 4, x - 3 : x + 4]
    np.testing.assert_allclose(patch, patch[::-1, ::-1], rtol=2e-3, atol=3)


def test_renormalisation_is_measured_and_applied(noise):
    """A noise 25 % larger than claimed is found, reported and divided out, in S_corr and in the flux errors."""
    new, ref = noise
    result = run(new * 1.25, ref * 1.25)
    assert result.renormalisation == pytest.approx(1.25, abs=0.02)
    assert blank_sky_width(result.difference.score_corr.ravel()) == pytest.approx(1, abs=0.01)
    plain = run(new, ref, renormalise=False)
    np.testing.assert_allclose(result.difference.flux_err, 1.25 * plain.difference.flux_err, rtol=0.02)


def test_sources_do_not_widen_the_noise(noise):
    """With 300 sources of S/N 8 a Mpix, the width of S_corr on blank sky is that without them."""
    new, ref = noise[0].copy(), noise[1]
    alone = run(new, ref)
    flux = 8 / np.sqrt(alone.difference.kernels[0].f_s)
    rng = np.random.default_rng(3)
    for x, y in rng.integers(20, 410, (65, 2)):
        new[y - 13 : y + 14, x - 13 : x + 14] += flux * PSF_NEW.psf
    assert run(new, ref).renormalisation == pytest.approx(alone.renormalisation, rel=0.01)


def test_a_bad_region_in_one_image_leaves_no_scar(noise):
    """Pixels that are bad in one image only, however wild, do not make detections around them."""
    new, ref = noise[0].copy(), noise[1].copy()
    mask_new, mask_ref = np.zeros((2, *new.shape), np.uint8)
    mask_new[100:130, 200:202] = MaskBit.BAD
    mask_ref[300:310, 100:110] = MaskBit.SATURATED
    new[mask_new > 0] = 1e6
    ref[mask_ref > 0] = np.nan
    result = run(new, ref, mask_new=mask_new, mask_ref=mask_ref)
    assert np.abs(result.difference.score_corr).max() < 5.5
    assert (result.difference.mask[100:130, 200:202] == MaskBit.BAD).all()
    assert (result.difference.score_corr[300:310, 100:110] == 0).all()


def test_no_data_is_outside(noise):
    """Where an image has no data there is no flux and no score, and the edge makes no detections."""
    new, ref = noise[0].copy(), noise[1].copy()
    mask_ref = np.zeros(new.shape, np.uint8)
    mask_ref[:, :90] = MaskBit.NO_DATA
    ref[:, :90] = 0
    result = run(new + 0.0, ref, mask_ref=mask_ref)
    assert np.isnan(result.difference.flux[:, :90]).all()
    assert np.abs(result.difference.score_corr[:, 90:]).max() < 5.5


def test_a_psf_error_is_counted_as_noise_on_stars_and_only_there():
    """With a PSF 5 % too wide, stars leave detections; measured residuals remove them and keep a transient beside."""
    rng = np.random.default_rng(2)
    shape = (480, 480)
    new, ref = np.zeros((2, *shape))
    spots = [(y, x) for y in range(40, 460, 60) for x in range(40, 460, 60)]
    for y, x in spots:
        flux = rng.uniform(3e4, 3e5)
        new[y - 13 : y + 14, x - 13 : x + 14] += flux * gaussian(3.4 * 1.05, 27)
        ref[y - 13 : y + 14, x - 13 : x + 14] += 1.3 * flux * PSF_REF.psf
    new[70 - 13 : 70 + 14, 70 - 13 : 70 + 14] += 4000 * gaussian(3.57, 27)
    variance_new, variance_ref = 400 + new, 81 + ref
    new, ref = rng.normal(new, np.sqrt(variance_new)), rng.normal(ref, np.sqrt(variance_ref))
    planes = {"variance_new": variance_new, "variance_ref": variance_ref}
    naive = run(new, ref, star_residuals=False, **planes).difference
    counted = run(new, ref, **planes)
    at_stars = [np.abs(naive.score_corr[y - 4 : y + 5, x - 4 : x + 5]).max() for y, x in spots]
    assert np.median(at_stars) > 5
    quiet = [np.abs(counted.difference.score_corr[y - 4 : y + 5, x - 4 : x + 5]).max() for y, x in spots]
    assert np.mean(np.array(quiet) > 5) < 0.05
    assert counted.residuals.n_stars > 30
    assert counted.difference.score_corr[70, 70] > 0.95 * naive.score_corr[70, 70]


def test_nothing_left_is_an_error(noise):
    """No pixel good in both images: an error that counts."""
    mask = np.full(noise[0].shape, MaskBit.BAD, np.uint8)
    with pytest.raises(SubtractError, match="no pixel is good"):
        run(*noise, mask_new=mask)


def test_a_psf_too_large_for_the_tile_is_an_error():
    """A border that leaves nothing of a tile is refused with what to change."""
    with pytest.raises(SubtractError, match=r"subtract\.tile"):
        plan_tiles((1000, 1000), 120, 256)


@pytest.mark.parametrize("plane", ["new", "variance_ref"])
def test_numbers_that_are_none_are_an_error_not_a_silence(noise, plane):
    """An unmasked NaN would take a whole tile with it: it is refused, and the pixels are counted."""
    given = {"new": noise[0].copy(), "ref": noise[1], "variance_ref": flat(noise[0].shape, 81)}
    given[plane][100, 100] = np.nan
    with pytest.raises(SubtractError, match="not finite in"):
        run(**given)


@pytest.mark.parametrize("cause", ["saturated in new", "variance"])
def test_what_is_known_badly_blinds_no_other_place(noise, cause):
    """Stars of 3000 sigma that are replaced, or pixels of next to no weight: single precision is shared by a whole
    frame, and yet a hundred pixels away scores and errors are what they were."""
    new, ref = noise[0].copy(), noise[1].copy()
    clean = run(new, ref, renormalise=False, star_residuals=False).difference
    variance, mask = flat(new.shape, 400), np.zeros(new.shape, np.uint8)
    y, x = np.mgrid[: new.shape[0], : new.shape[1]]
    stars = np.hypot(y % 100 - 50, x % 100 - 50) < 6
    stars[:, 210:] = False
    if cause == "variance":
        variance[stars] = 1e12
    else:
        new[stars], ref[stars], mask[stars] = 6e4, 7.8e4, MaskBit.SATURATED
    dirty = run(
        new, ref, variance_new=variance, mask_new=mask, renormalise=False, star_residuals=False, tile=1024
    ).difference
    far = np.s_[:, 300:]
    np.testing.assert_allclose(dirty.flux_err[far], clean.flux_err[far], rtol=0.02)
    np.testing.assert_allclose(dirty.score_corr[far], clean.score_corr[far], atol=0.06)
