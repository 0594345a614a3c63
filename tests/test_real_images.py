"""The main job on real images: DECam pairs by a manifest and `run`, DECam epochs, the GOTO pair."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, gaussian_filter

from batchproc import open_catalogue, open_stamps, run
from batchproc.config import Config
from batchproc.flow import process_image
from batchproc.records import ManifestEntry
from tests._real import decam_pairs, images
from tests.benchmarks.promises import match

pytestmark = pytest.mark.realdata


def test_a_manifest_of_real_decam_pairs(tmp_path):
    """Pairs made of the real coadd, blurred, shifted, turned and noisier: what was injected is found, with its flux."""
    manifest, truth = decam_pairs(tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "RUN"
    summary = run(manifest, out, config=Config.from_dict({"classify": {"model": ""}}), cluster="serial")
    assert summary.exit_code == 0
    catalogue, stamps = open_catalogue(out), open_stamps(out)
    ratios, n_found, n_false = [], 0, 0
    for image_id, injected in ((i, truth[truth["image_id"] == i]) for i in np.unique(truth["image_id"])):
        rows = catalogue[catalogue["image_id"] == image_id]
        index, spurious = match(rows["x"], rows["y"], injected["x"], injected["y"])
        n_found += int((index >= 0).sum())
        n_false += int((spurious & (rows["flags"].to_numpy() == 0)).sum())
        ratios.append(rows["flux"].to_numpy()[index[index >= 0]] / injected["flux"][index >= 0])
        brightest = rows.iloc[index[np.argmax(injected["flux"] * (index >= 0))]]
        difference = stamps[int(brightest["stamp_index"])][2]
        assert np.unravel_index(np.nanargmax(difference), difference.shape) == pytest.approx((31, 31), abs=1)
    assert n_found >= 0.95 * len(truth)
    # Blurring real pixels leaves their noise correlated and real galaxies mottled: a handful a field, not a flood.
    assert n_false <= 10 * 3
    assert np.median(np.concatenate(ratios)) == pytest.approx(1, abs=0.05)
    for path, content in before.items():
        assert path.read_bytes() == content, f"{path} was modified"


def test_decam_epochs():
    """256-pixel stamps with about five stars: a constant PSF, a word on its quality, and no flood of detections."""
    folder = images() / "decam_epochs"
    entry = ManifestEntry(
        image_id="epoch", new=str(folder / "DEC-OBS18a.mini.fits"), ref=(str(folder / "DEC-OBS04a.mini.fits"),)
    )
    result = process_image(entry)
    assert result.receipt.quality["psf_degree_new"] == 0
    assert result.receipt.quality["n_psf_stars_new"] < 20
    assert len(result.catalogue["x"]) < 20


def width_of_what_is_not_shared(result):
    """rms of the difference of two smoothed blank skies, over what it would be were they independent."""
    pair = [gaussian_filter(image, 1.5) for image in (result.new, result.ref * result.receipt.quality["flux_ratio"])]
    bright = result.difference.mask != 0
    for image in pair:
        middle = np.median(image)
        bright |= np.abs(image - middle) > 3 * 1.4826 * np.median(np.abs(image - middle))
    blank = ~binary_dilation(bright, iterations=3)
    covariance = np.cov(pair[0][blank], pair[1][blank])
    return np.sqrt(1 - 2 * covariance[0, 1] / np.trace(covariance))


def test_goto_pair():
    """Two real epochs: stars of b/a 0.55 give the PSF."""
    folder = images() / "goto"
    entry = ManifestEntry(image_id="goto", new=str(folder / "epoch2.fits"), ref=(str(folder / "epoch1.fits"),))
    result = process_image(entry)
    quality = result.receipt.quality
    assert quality["n_psf_stars_new"] > 100
    assert quality["registration_rms_y"] < 0.1
    # The two share exposures: what is common to their noise subtracts, and S_corr is narrower by just that (the noise
    # that interpolation correlates is known, and counted).
    assert quality["renormalisation"] == pytest.approx(width_of_what_is_not_shared(result), abs=0.05)
    assert (result.catalogue["flags"] == 0).sum() < 100
