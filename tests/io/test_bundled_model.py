"""The model that is shipped: its card is true to its files, and it tells a star from what is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from batchproc.io.cards import read_card
from batchproc.io.model_checks import check_model
from batchproc.io.models import find_model, list_models, load_model
from batchproc.learning.evaluate import auc_roc

#: On every CPU; the last one of all has a batch of 1 besides.
VARIANTS = ("float", "int8", "int8-tflite")
EVERY = (*VARIANTS, "edgetpu")


def specimens(n=60, fwhm=3.0, snr=20.0, seed=0):
    """Stamps in noise with a PSF of that S/N at the centre of new and of the difference, and the same without it."""
    random = np.random.default_rng(seed)
    empty = random.normal(size=(n, 3, 63, 63)).astype(np.float32)
    empty[:, 1] *= 0.5
    empty[:, 2] = empty[:, 0] - empty[:, 1]
    y, x = np.mgrid[:63, :63] - 31
    offset = random.uniform(-0.5, 0.5, (n, 2, 1, 1))
    psf = np.exp(-((x - offset[:, 0]) ** 2 + (y - offset[:, 1]) ** 2) / (2 * (fwhm / 2.355) ** 2))
    psf *= snr * np.hypot(1.0, 0.5) / np.sqrt((psf**2).sum(axis=(1, 2), keepdims=True))
    with_star = empty.copy()
    with_star[:, 0] += psf
    with_star[:, 2] += psf
    return with_star, empty


def test_it_is_there_in_all_versions_and_small():
    """Found by name, from the package; what every install runs is below a megabyte, all of it below one and a half."""
    folder = find_model("realbogus")
    assert list_models()["realbogus"] == folder
    assert set(read_card(folder).files) == set(EVERY)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(size for name, size in sizes.items() if not name.endswith(".tflite")) < 1e6
    assert sum(sizes.values()) < 1.5e6


def test_its_files_are_those_on_its_card():
    """Hashes, provider, probabilities, blanks not scored, int8 close to float; one is for the Edge TPU."""
    lines = check_model("realbogus")
    assert sum("is the file on the card, runs on" in line for line in lines) == len(EVERY)
    assert sum("differs from float" in line for line in lines) == len(EVERY) - 1
    assert any(
        line.startswith("edgetpu: ") and "not compiled yet" in line for line in check_model("realbogus", "edgetpu")
    )


def test_its_card_says_how_good_it_is_and_for_which_mixture():
    """Images it has not seen, with numbers, intervals and prevalence, for each version; and what it is meant for."""
    card = read_card(find_model("realbogus"))
    assert card.licence == "BSD-3-Clause"
    assert set(card.meant_for) >= {"fwhm_pix", "pixel_scale_arcsec", "sigma_at_least"}
    assert "goto" not in json.dumps(card.training).lower()
    for variant in VARIANTS:
        rows = [row for row in card.metrics if row["variant"] == variant]
        assert {row["on"].split()[0] for row in rows} >= {"simulated", "DECam", "GOTO"}
        for row in rows:
            assert row["prevalence"] == 0.5
            low, high = row["auc_pr_interval"]
            assert low <= row["auc_pr"] <= high
            assert min(row["n_real"], row["n_bogus"]) > 0
    assert set(card.quantisation) == set(card.files) - {"float"}
    for table in card.quantisation.values():
        assert {"largest_difference", "mean_difference", "lost", "gained"} <= set(table)
    assert set(card.speed) >= set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stars_are_real_and_what_is_no_star_is_not(variant):
    """A PSF at 20 sigma scores high; noise, a hot pixel, a trail and a dipole score low."""
    model = load_model("realbogus", variant=variant)
    star, empty = specimens()
    assert np.median(model.predict(star)) > 0.9
    hot, trail, dipole = empty.copy(), empty.copy(), empty.copy()
    hot[:, [0, 2], 31, 31] += 40
    trail[:, [0, 2], 30:33, :] += 6
    bright = 30 * (star - empty)[:, 0]
    dipole[:, 0] += bright
    dipole[:, 1] += np.roll(bright, 1, axis=2)
    dipole[:, 2] = dipole[:, 0] - dipole[:, 1]
    for bogus in (empty, hot, trail, dipole):
        assert np.median(model.predict(bogus)) < 0.5


@pytest.mark.parametrize("fwhm", [2.0, 3.0, 4.5, 6.0])
def test_it_works_in_any_seeing_it_is_meant_for(fwhm):
    """Stars from empty stamps, over the range on its card."""
    star, empty = specimens(fwhm=fwhm, seed=1)
    model = load_model("realbogus")
    scores = np.concatenate([model.predict(star), model.predict(empty)])
    assert auc_roc(np.arange(len(scores)) < len(star), scores) > 0.98


def test_units_and_sky_do_not_matter():
    """Other units and a sky left in change no score by much."""
    star, _ = specimens()
    model = load_model("realbogus", variant="float")
    np.testing.assert_allclose(model.predict(star * 37 + 1000), model.predict(star), atol=0.01)


def test_what_has_vanished_is_as_real_as_what_appeared():
    """New and reference exchanged, the difference negated."""
    star, _ = specimens(snr=30)
    vanished = star[:, [1, 0, 2]]
    vanished[:, 2] *= -1
    assert np.median(load_model("realbogus").predict(vanished)) > 0.9


@pytest.mark.realdata
def test_alerts_of_a_survey_that_it_never_saw():
    """Real ZTF stamps: nearly all with a high drb of the survey's own classifier score as real."""
    path = Path(os.environ.get("BATCHPROC_TEST_DATA", "")) / "alerts/ztf_triplets.npz"
    if not path.is_file():
        pytest.skip("BATCHPROC_TEST_DATA has no alerts/ztf_triplets.npz")
    with np.load(path) as stored:
        stamps, drb, meta = stored["triplets"], stored["drb"], stored["meta"]
    stamps = stamps.transpose(0, 3, 1, 2).copy()
    stamps[[json.loads(str(m))["isdiffpos"] in ("f", "0") for m in meta], 2] *= -1  # ZTF turns those round
    scores = load_model("realbogus").predict(stamps)
    assert np.isfinite(scores).mean() > 0.95
    assert np.nanmean(scores[drb > 0.9] > 0.5) > 0.8
