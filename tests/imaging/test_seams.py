"""What tiles and masks must not do: lose or double a source, reach farther than they say, change with the tiling."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from scipy.spatial import cKDTree

from batchproc.config import DetectConfig
from batchproc.imaging.detect import detect
from batchproc.imaging.subtract import plan_tiles, subtract, tile_border
from batchproc.records import MaskBit
from tests.imaging._psfs import ConstantPsf, gaussian, moffat

SHAPE = (700, 640)
PSF_NEW, PSF_REF = ConstantPsf(moffat(3.2, 27), 3.2), ConstantPsf(gaussian(2.6, 27), 2.6)
BORDER = tile_border(PSF_NEW, PSF_REF)


def run(new, ref, **changes):
    flat = [np.full(new.shape, value, np.float32) for value in (20, 9)]
    return subtract(
        new, ref, PSF_NEW, PSF_REF, rms_new=flat[0], rms_ref=flat[1], flux_ratio=0.8, **{"tile": 256} | changes
    )


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(5)
    return rng.normal(0, 20, SHAPE).astype(np.float32), rng.normal(0, 9, SHAPE).astype(np.float32)


def plant(image, x, y, flux):
    cx, cy = round(x), round(y)
    image[cy - 13 : cy + 14, cx - 13 : cx + 14] += flux * moffat(3.2, 27, dx=x - cx, dy=y - cy)


def on_seams():
    """Positions on every seam and corner of tiles, at changing sub-pixel phases, of both signs in turn."""
    tiles = plan_tiles(SHAPE, BORDER, 256)
    xs, ys = sorted({t.x0 for t in tiles} - {0}), sorted({t.y0 for t in tiles} - {0})
    assert xs
    assert ys
    corners = [(x, y) for x in xs for y in ys]
    along_x = [(x, y + d) for x in xs for y in ys for d in (-80, -40, 40, 80) if 20 < y + d < SHAPE[0] - 20]
    along_y = [(x + d, y) for x in xs for y in ys for d in (-80, -40, 40, 80) if 20 < x + d < SHAPE[1] - 20]
    places = np.unique(np.array(corners + along_x + along_y, float), axis=0)
    return places - 0.5 + np.random.default_rng(6).uniform(-1, 1, places.shape)


def test_no_source_on_a_seam_is_lost_or_doubled(noise):
    """Sources at S/N 12 on seams and corners of tiles, positive and negative: each is one detection, with its flux."""
    new, ref = noise[0].copy(), noise[1]
    root_f_s = np.sqrt(run(*noise).difference.kernels[0].f_s)
    places = on_seams()
    signs = np.where(np.arange(len(places)) % 2, -1, 1)
    for (x, y), sign in zip(places, signs, strict=True):
        plant(new, x, y, sign * 12 / root_f_s)
    found = detect(run(new, ref).difference, config=DetectConfig()).columns
    distance, index = cKDTree(np.c_[found["x"], found["y"]]).query(places)
    assert (distance < 1).all()
    assert len(found["x"]) == len(places)
    pulls = (found["flux"][index] - signs * 12 / root_f_s) / found["flux_err"][index]
    assert abs(pulls.mean()) < 3 / np.sqrt(len(places))
    assert np.abs(pulls).max() < 4


@pytest.mark.parametrize("bit", [MaskBit.BAD, MaskBit.SATURATED, MaskBit.NO_DATA])
@pytest.mark.parametrize("which", ["new", "ref", "both"])
def test_what_is_masked_reaches_no_farther_than_the_filters(noise, bit, which):
    """NaN, infinities and saturation under a mask change nothing beyond the border of a tile, in any image."""
    bad = np.zeros(SHAPE, bool)
    bad[200:230, 300:303] = bad[400:404, 100:190] = bad[500, 500] = True
    masks = {
        f"mask_{name}": np.where(bad, np.uint8(bit), np.uint8(0)) for name in ("new", "ref") if which in (name, "both")
    }
    new, ref = noise[0].copy(), noise[1].copy()
    for name, image in (("new", new), ("ref", ref)):
        if f"mask_{name}" in masks:
            image[bad] = np.nan
            image[500, 500] = np.inf
    plain = {"renormalise": False, "star_residuals": False}
    dirty, clean = run(new, ref, **masks, **plain).difference, run(*noise, **plain).difference
    for name in ("difference", "score_corr"):
        assert np.isfinite(getattr(dirty, name)).all()
    far = ~binary_dilation(bad, np.ones((2 * BORDER + 1, 2 * BORDER + 1), bool))
    assert np.abs(dirty.score_corr - clean.score_corr)[far].max() < 2e-3
    near = ~far & ~bad
    assert np.abs(dirty.score_corr[near]).max() < 5.5


def test_the_tiling_does_not_decide_what_is_found(noise):
    """Small tiles and one large frame give the same S_corr, flux and error away from the image's border."""
    new = noise[0].copy()
    for x, y in on_seams():
        plant(new, x, y, 2000)
    plain = {"renormalise": False, "star_residuals": False}
    small, large = (run(new, noise[1], tile=tile, **plain) for tile in (256, 1024))
    assert small.n_tiles > large.n_tiles
    inner = np.s_[BORDER:-BORDER, BORDER:-BORDER]
    np.testing.assert_allclose(small.difference.score_corr[inner], large.difference.score_corr[inner], atol=2e-3)
    for name in ("flux", "flux_err"):
        a, b = (getattr(s.difference, name)[inner] for s in (small, large))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.median(small.difference.flux_err))


def test_a_source_at_the_images_edge_is_found_where_its_core_is_inside(noise):
    """Sources a few pixels inside the edges and corners of the image are detected, not wrapped to the other side."""
    new = np.pad(noise[0], 20)
    places = [(4, 300), (635, 300), (300, 4), (300, 695), (5, 5), (634, 694)]
    for x, y in places:
        plant(new, x + 20, y + 20, 4000)
    found = detect(run(new[20:-20, 20:-20].copy(), noise[1]).difference, config=DetectConfig()).columns
    distance, _ = cKDTree(np.c_[found["x"], found["y"]]).query(places)
    assert (distance < 1).all()
    assert len(found["x"]) == len(places)
