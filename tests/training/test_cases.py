"""What is learnt from is labelled rightly, and what is tested on was not learnt from. No torch needed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from batchproc.config import Config
from batchproc.imaging.render import ParametricPsf, add_sources
from batchproc.imaging.simulate import simulate_pair
from batchproc.records import Exposure, Flag
from batchproc.training.cases import COADD_SPLIT, Case, draw_scene
from batchproc.training.defects import clip_bright, spoil
from batchproc.training.examples import BOGUS, REAL
from batchproc.training.harvest import harvest, label
from batchproc.training.planting import PLANTED, own_psf, plant


def same_grid(x, y):
    return x, y


@pytest.fixture(scope="module")
def exposures():
    """A clean pair of one field, with more stars to measure it by than there will be planted variables."""
    return simulate_pair((288, 288), seed=5, n_transients=0, n_stars=1000).exposures()


@pytest.fixture(scope="module")
def planted(exposures):
    """The pair with transients and defects."""
    return plant(*exposures, same_grid, np.random.default_rng(1), n=14, defects=True)


def test_planted_transients_are_where_the_truth_says(exposures, planted):
    """New light in new, vanished light in the reference, clear of each other, of edges and of bad pixels."""
    new, ref, truth = planted
    assert 8 <= len(truth) <= 14
    assert set(truth["kind"]) == {"new", "variable", "vanished"}
    places = np.column_stack([truth["x"], truth["y"]])
    assert pdist(places).min() >= 24
    assert places.min() >= 24 - 0.5
    assert places.max() < 288 - 24 + 0.5
    rows, columns = np.rint(places[:, ::-1]).astype(int).T
    assert not exposures[0].mask[rows, columns].any()
    gained = (new.data - exposures[0].data)[rows, columns]
    lost = (ref.data - exposures[1].data)[rows, columns]
    vanished = truth["kind"] == "vanished"
    assert (truth["flux"][vanished] < 0).all()
    assert (lost[vanished] > 0).all()
    assert (np.sign(gained[~vanished]) == np.sign(truth["flux"][~vanished])).mean() > 0.9  # a hit may lie there
    np.testing.assert_array_equal(new.mask, exposures[0].mask)


def test_planting_repeats(exposures, planted):
    """The same seed, the same bytes; the images that came in are left alone."""
    before = exposures[0].data.copy()
    again = plant(*exposures, same_grid, np.random.default_rng(1), n=14, defects=True)
    np.testing.assert_array_equal(again[0].data, planted[0].data)
    np.testing.assert_array_equal(again[1].data, planted[1].data)
    np.testing.assert_array_equal(again[2], planted[2])
    np.testing.assert_array_equal(exposures[0].data, before)


def test_defects_add_charge_and_mask_nothing(exposures):
    """Hits and hot pixels only ever add, in few pixels."""
    new = exposures[0]
    found = spoil(new, 20.0, 3.0, np.random.default_rng(3), hits=10, hot=10)  # this seed draws no trail
    added = found.data - new.data
    assert added.min() >= 0
    assert 20 <= (added > 0).sum() < 500
    assert added.max() > 6 * 20
    np.testing.assert_array_equal(found.mask, new.mask)


def test_clipped_stars_lose_their_cores_and_no_mask_tells(exposures):
    """Only pixels above the level change, they lose light, and what is planted keeps clear of them."""
    _, ref = exposures
    found, altered = clip_bright(ref, np.random.default_rng(2))
    assert 5 < altered.sum() < 0.05 * altered.size
    np.testing.assert_array_equal(found.data[~altered], ref.data[~altered])
    assert found.data[altered].max() < 0.7 * ref.data[altered].max()
    np.testing.assert_array_equal(found.mask, ref.mask)


def test_what_is_planted_carelessly_keeps_clear_of_clipped_stars(exposures):
    """No transient lies on pixels that were cut, whatever the seed cuts."""
    new, ref = exposures
    for seed in range(3):
        careless = plant(new, ref, same_grid, np.random.default_rng(seed), n=10, careless=True)
        plain = plant(new, ref, same_grid, np.random.default_rng(seed), n=0, careless=True)
        assert careless[0].psf.fwhm != careless[1].psf.fwhm
        x, y = (np.rint(careless[2][name]).astype(int) for name in ("x", "y"))
        cut = (plain[0].data < new.data - 1) | (plain[1].data < ref.data - 1)
        assert not cut[y, x].any()


def test_what_is_planted_looks_like_the_stars_around_it():
    """Where the PSF changes across the field, so does ours; it is as wide as the stars are, within some per cent."""
    psf = ParametricPsf(3.0, variation=0.25, shape=(512, 512))
    random = np.random.default_rng(0)
    x, y = (grid.ravel() + random.uniform(-3, 3, 256) for grid in np.meshgrid(*[np.arange(20.0, 500, 30)] * 2))
    data = add_sources(np.zeros((512, 512)), x, y, np.full(256, 3e4), psf) + random.normal(0, 10, (512, 512))
    exposure = Exposure(
        data=data.astype(np.float32),
        variance=None,
        mask=np.zeros(data.shape, np.uint8),
        gain=1.0,
        read_noise=10.0,
        saturation=np.inf,
    )
    ours = own_psf(exposure.data, np.full(data.shape, 10.0, np.float32), exposure, random)
    for place in ((256.0, 256.0), (50.0, 50.0), (470.0, 250.0)):
        expected = 3.0 * (1 + 0.25 * np.sum(((2 * np.array(place) + 1) / 512 - 1) ** 2) / 2)
        assert ours.here(*place).fwhm == pytest.approx(expected, rel=0.08)
    assert ours.here(50.0, 50.0).fwhm > 1.1 * ours.here(256.0, 256.0).fwhm


def test_expected_significance_counts_the_light_underneath(exposures):
    """Of two transients of one flux, that on a bright source is worth less."""
    _, _, truth = plant(*exposures, same_grid, np.random.default_rng(4), n=40)
    varies = truth["kind"] == "variable"
    per_flux = truth["snr"] / np.abs(truth["flux"])
    assert np.median(per_flux[varies]) < 0.9 * per_flux[~varies].max()
    assert truth["snr"].min() >= 6


def test_the_pipeline_finds_most_and_labels_them(planted):
    """A case through the pipeline: nearly all planted are found and called real, defects bogus, nothing in between."""
    new, ref, truth = planted
    config = Config.from_dict({"detect": {"threshold": 3.75}, "cutouts": {"size": 39}})
    found = harvest(Case("case", "group", new, (ref,), truth), config)
    real, table = found.label == REAL, found.table
    assert real.sum() >= 0.8 * len(truth)
    assert (found.label[~real] == BOGUS).all()
    assert (~real).sum() > 5
    assert found.stamps.shape[1:] == (3, 39, 39)
    assert np.isfinite(table["planted_snr"][real]).all()
    assert np.isnan(table["planted_snr"][~real]).all()
    assert set(table["kind"][~real]) == {""}
    assert set(table["group"]) == {"group"}
    assert {region.split("/")[0] for region in table["region"]} == {"group"}


def catalogue(*rows):
    """Columns x, y, scorr, flags."""
    x, y, scorr, flags = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return {"x": x, "y": y, "scorr": scorr, "flags": flags.astype(np.int32)}


def truth_of(*rows):
    out = np.zeros(len(rows), PLANTED)
    for k, (x, y, flux) in enumerate(rows):
        out[k]["x"], out[k]["y"], out[k]["flux"] = x, y, flux
    return out


def test_labels():
    """The nearest of the right sign is real; what lies around it is neither; the rest is bogus."""
    truth = truth_of((50, 50, 100.0), (90, 50, -100.0))
    found = catalogue(
        (50.2, 50.1, 9, 0),  # it
        (51.0, 50.0, 7, 0),  # the same again, further away
        (50.0, 54.0, -5, 0),  # its side lobe
        (90.1, 50.0, -9, 0),  # the vanished one
        (90.3, 50.0, 6, 0),  # the wrong sign
        (10.0, 10.0, 8, 0),  # an artefact
    )
    real, match = label(found, truth, fwhm=3.0)
    assert real.tolist() == [1, -1, -1, 1, -1, 0]
    assert match.tolist() == [0, -1, -1, 1, -1, -1]


def test_damaged_and_doubtful_ones_are_left_out():
    """Masked pixels at the core say nothing; nor does a place where something real may have changed."""
    truth = truth_of((50, 50, 100.0))
    found = catalogue((50, 50, 9, int(Flag.MASKED)), (20, 20, 9, 0), (80, 80, 9, int(Flag.MASKED)))
    real, _ = label(found, truth, fwhm=3.0, doubtful=np.array([[20.5, 20.0]]))
    assert real.tolist() == [-1, -1, 0]


@pytest.mark.parametrize("empty", ["catalogue", "truth"])
def test_labels_of_nothing(empty):
    """No candidates, or nothing planted."""
    found = catalogue() if empty == "catalogue" else catalogue((5, 5, 9, 0))
    truth = truth_of() if empty == "truth" else truth_of((5, 5, 1.0))
    real, _ = label(found, truth, fwhm=3.0)
    assert real.tolist() == ([] if empty == "catalogue" else [0])


def test_no_region_is_both_learnt_from_and_tested_on():
    """The 16 regions of the coadd, each in one part."""
    regions = [region for part in COADD_SPLIT.values() for region in part]
    assert len(regions) == len(set(regions)) == 16


def test_scenes_repeat_and_differ():
    """A seed is a night."""
    scenes = [draw_scene(np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert scenes[0] == scenes[1] != scenes[2]
