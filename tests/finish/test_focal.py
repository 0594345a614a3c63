from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from batchproc import open_catalogue, simulate
from batchproc.distribute.clusters import Where
from batchproc.finish import finish, work
from batchproc.finish.focal import FOCAL_PLANES, limiting_magnitude
from batchproc.flow import process_image
from batchproc.io.freeze import freeze
from batchproc.io.packs import roll_up
from batchproc.io.progress import ReceiptLog
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import store_image
from batchproc.records import ManifestEntry, Receipt
from batchproc.report import write_report
from tests import _runs
from tests.finish import _night


def table_of(folder):
    (product,) = finish(folder.path, only=["focal-planes"], where=Where("serial"), quiet=True)
    return product.state, pd.read_parquet(folder.path / "focal_planes.parquet")


def test_a_row_for_each_image_in_the_order_of_the_manifest(night):
    """Exposure, CCD and time of each, its columns with their types, done or not."""
    state, table = table_of(night)
    assert state == "made"
    assert table.columns.tolist() == [column.name for column in FOCAL_PLANES]
    assert table["image_id"].tolist() == [entry.image_id for entry in _night.entries()]
    assert (table["exposure_id"] + "-c" + table["ccd"] == table["image_id"]).all()
    assert (table["mjd"] == [entry.mjd for entry in _night.entries()]).all()
    schema = pq.read_schema(night.path / "focal_planes.parquet")
    for column in FOCAL_PLANES:
        assert schema.field(column.name).metadata[b"meaning"].decode() == column.meaning
        kinds = {"str": "string", "float64": "double", "float32": "float"}
        assert str(schema.field(column.name).type) == kinds.get(column.dtype, column.dtype)


def test_counts_are_those_of_the_catalogue(night, monkeypatch):
    """Candidates, unflagged, brightened and faded ones of each image, whatever the groups; none is 0."""
    monkeypatch.setattr(work.groups_of, "__defaults__", (150,))
    _, table = table_of(night)
    catalogue = open_catalogue(night.path)
    expected = pd.DataFrame(
        {
            "n_candidates": catalogue.groupby("image_id").size(),
            "n_unflagged": (catalogue["flags"] == 0).groupby(catalogue["image_id"]).sum(),
            "n_positive": (catalogue["scorr"] > 0).groupby(catalogue["image_id"]).sum(),
            "n_negative": (catalogue["scorr"] < 0).groupby(catalogue["image_id"]).sum(),
        }
    )
    expected = expected.reindex(table["image_id"]).fillna(0).astype(np.int64).reset_index(drop=True)
    pd.testing.assert_frame_equal(table[expected.columns], expected)
    assert (table["n_candidates"] == 0).sum() == _night.EXPOSURES


def test_a_failed_image_is_there_with_its_cause_and_a_missing_one_too(tmp_path):
    """What was not done has a row that says so, and no numbers that look measured."""
    folder = _night.begin(tmp_path / "run")
    _night.store(folder, _night.entries()[:2])
    with ReceiptLog(folder) as log:
        log.add(Receipt("e0-c2", "failed", stage="align", error="AlignError", message="found 2 matches, needs 8"))
    _, table = table_of(folder)
    assert table["status"].tolist() == ["done", "done", "failed", *["missing"] * 21]
    assert table["cause"][2] == "align: AlignError: found 2 matches, needs 8"
    assert (table["cause"].drop(index=2) == "").all()
    assert table.loc[2:, ["fwhm_new", "depth", "seeing", "sky"]].isna().all(axis=None)
    assert table.loc[:1, ["fwhm_new", "depth", "seeing", "sky"]].notna().all(axis=None)


def test_it_is_made_anew_when_something_else_is_known(night):
    """Nothing new: left alone, also after a roll-up. An image that fails in another way, images that were added and not
    tried, a torn table: made anew."""
    table_of(night)
    roll_up(night, 3, [entry.image_id for entry in _night.entries()])
    assert table_of(night)[0] == "current"
    with ReceiptLog(night) as log:
        log.add(Receipt("e5-c3", "failed", stage="read", error="ReadError", message="no such file"))
    state, table = table_of(night)
    assert state == "made"
    assert table["cause"].iloc[-1] == "read: ReadError: no such file"
    more = _night.entries(_night.EXPOSURES + 1)
    freeze(night, more, _runs.CONFIG, lambda: "", extend=True)
    state, table = table_of(night)
    assert (state, len(table)) == ("made", len(more))
    for damage in (b"torn", b""):
        (night.path / "focal_planes.parquet").write_bytes(damage)
        assert table_of(night)[0] == "made"


GAIN, ZERO_POINT = 1.7, 27.5


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A simulated pair in ADU, with a WCS of 0.4 arcsec a pixel, and what comes out of it."""
    folder = tmp_path_factory.mktemp("pair")
    pair = simulate.simulate_pair((640, 700), seed=11, n_transients=25, transient_snr=(12.0, 100.0))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150.0, 2.0], [320.0, 350.0]
    wcs.wcs.cdelt = [-0.4 / 3600, 0.4 / 3600]
    cards = wcs.to_header()
    cards.update({"GAIN": GAIN, "RDNOISE": 5.0, "MJD-OBS": 60000.25, "EXPTIME": 0.0, "MAGZERO": ZERO_POINT})
    for name, exposure in zip(("new", "ref"), pair.exposures(), strict=True):
        fits.writeto(folder / f"{name}.fits", (exposure.data / GAIN).astype(np.float32), cards)
    return pair, process_image(ManifestEntry("a1", str(folder / "new.fits"), (str(folder / "ref.fits"),)))


def test_depth_is_that_of_the_flux_errors_on_blank_sky_and_of_what_was_injected(measured):
    """Five times the flux error on blank sky, and five times the noise by which the injected fluxes were chosen."""
    pair, result = measured
    quality = result.receipt.quality
    depth = limiting_magnitude({**quality, "noise_factor": quality["renormalisation"]})
    difference = result.difference
    blank = (difference.mask == 0) & (np.abs(difference.score_corr) < 3)
    assert depth == pytest.approx(magnitude(5 * np.median(difference.flux_err[blank]) / GAIN), abs=0.01)
    injected = np.median(np.abs(pair.truth["flux"] / pair.truth["snr"])) / GAIN
    assert depth == pytest.approx(magnitude(5 * injected), abs=0.02)


def test_errors_in_the_catalogue_are_those_of_the_depth_and_the_photons_of_the_source(measured):
    """No flux error is below that of blank sky, and of faint sources it is hardly above."""
    _, result = measured
    quality = result.receipt.quality
    floor = (
        10 ** (-0.4 * (limiting_magnitude({**quality, "noise_factor": quality["renormalisation"]}) - ZERO_POINT)) / 5
    )
    faint = (result.catalogue["flags"] == 0) & (np.abs(result.catalogue["scorr"]) < 15)
    assert faint.sum() >= 3
    ratio = result.catalogue["flux_err"][faint] / floor
    assert ratio.min() > 0.98
    assert np.median(ratio) < 1.25


def magnitude(flux):
    return ZERO_POINT - 2.5 * np.log10(flux)


def test_the_receipt_tells_what_the_focal_plane_needs(measured):
    """Gain, scale of the pixels and time."""
    quality = measured[1].receipt.quality
    assert quality["gain"] == GAIN
    assert quality["pixel_scale"] == pytest.approx(0.4)
    assert quality["mjd"] == 60000.25


@pytest.mark.parametrize("unknown", ["gain", "f_s", "zero_point", "noise_factor"])
def test_without_what_it_follows_from_there_is_no_depth(unknown):
    """NaN or absent: not a number, and no error."""
    known = {"gain": 2.0, "f_s": 4e-4, "zero_point": 25.0, "noise_factor": 1.1}
    assert np.isfinite(limiting_magnitude(known))
    assert np.isnan(limiting_magnitude(known | {unknown: np.nan}))
    assert np.isnan(limiting_magnitude({k: v for k, v in known.items() if k != unknown}))


def test_the_report_shows_the_focal_planes_once_they_are_made(night):
    """A picture with a row a CCD and a cross for the failed image; without the table, or half of it, there is none."""
    assert 'id="focal"' not in write_report(night.path).read_text()
    (night.path / "focal_planes.parquet").write_bytes(b"PAR1 and no more")
    assert 'id="focal"' not in write_report(night.path).read_text()
    table_of(night)
    section = section_of(night)
    assert "6 exposures of up to 4 CCDs; 23 of 24 images" in section
    assert section.count("<image") >= 3
    for title in ("candidates", "seeing (arcsec)", "5 σ depth (mag)"):
        assert title in section


def test_failed_images_are_drawn_where_their_headers_put_them_and_all_are_counted(tmp_path):
    """Of a manifest without exposures: by the numbers of a failure; who has none is counted all the same."""
    folder, bare = RunFolder(tmp_path / "run"), [replace(e, exposure_id=None, ccd=None) for e in _night.entries(2)]
    freeze(folder, bare, _runs.CONFIG, lambda: "")
    for entry, known in zip(bare[:6], _night.entries(2), strict=False):
        found = _night.result(known, 5)
        quality = {**found.receipt.quality, "exposure_id": known.exposure_id, "ccd": known.ccd}
        receipt = replace(found.receipt, quality=quality)
        store_image(folder, entry, found.catalogue, found.stamps, receipt, _runs.CONFIG.image_digest)
    failed = Receipt("e1-c2", "failed", stage="align", error="AlignError", message="found 2 matches, needs 8")
    with ReceiptLog(folder) as log:
        log.add(failed)
        log.add(replace(failed, image_id="e1-c3", stage="read", error="ReadError"))
    table_of(folder)
    crosses = section_of(folder).count("<use")
    assert "6 of 8 images were done" in section_of(folder)
    assert "Not in the picture: 2 of no known exposure" in section_of(folder)
    with ReceiptLog(folder) as log:
        log.add(replace(failed, metadata={"exposure_id": "e1", "ccd": "2", "mjd": 60001.0}))
    state, table = table_of(folder)
    assert state == "made"
    assert table.loc[6, ["exposure_id", "ccd", "mjd"]].tolist() == ["e1", "2", 60001.0]
    assert "6 of 8 images were done" in section_of(folder)
    assert "Not in the picture: 1 of no known exposure" in section_of(folder)
    assert section_of(folder).count("<use") > crosses


def section_of(folder):
    page = write_report(folder.path).read_text()
    start = page.index('id="focal"')
    return " ".join(page[start : page.index("</section>", start)].split())
