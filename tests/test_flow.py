"""The story end to end, on one image: what is planted comes back with its place, flux and time; failures say why."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from batchproc import simulate
from batchproc.config import Config
from batchproc.errors import AlignError, ReadError, SubtractError
from batchproc.flow import _require_sane_noise, candidate_id, process_image, zero_points
from batchproc.imaging.saturation import grow_saturated, saturated_stars
from batchproc.records import CATALOGUE, ManifestEntry, MaskBit
from tests.benchmarks.promises import match

GAIN = 1.7


def header(shape):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [shape[1] / 2, shape[0] / 2]
    wcs.wcs.cdelt = [-1 / 3600, 1 / 3600]
    cards = wcs.to_header()
    cards.update({"GAIN": GAIN, "RDNOISE": 5.0, "SATURATE": 6e4 / GAIN, "MJD-OBS": 60000.25, "EXPTIME": 0.0})
    cards.update({"FILTER": "r", "MAGZERO": 27.5})
    return cards


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A simulated pair as two FITS files in ADU, and the pair itself."""
    folder = tmp_path_factory.mktemp("pair")
    pair = simulate.simulate_pair((640, 700), seed=11, n_transients=25, transient_snr=(12.0, 100.0), near_galaxies=0.2)
    new, ref = pair.exposures()
    for name, exposure in (("new", new), ("ref", ref)):
        fits.writeto(folder / f"{name}.fits", (exposure.data / GAIN).astype(np.float32), header(exposure.shape))
    return folder, pair


@pytest.fixture(scope="module")
def entry(files):
    folder, _ = files
    return ManifestEntry(image_id="a1", new=str(folder / "new.fits"), ref=(str(folder / "ref.fits"),))


@pytest.fixture(scope="module")
def result(entry):
    return process_image(entry)


def test_catalogue_has_every_column_with_its_type(result):
    """One array a column of CATALOGUE, of its dtype, and one stamp a row."""
    assert list(result.catalogue) == [column.name for column in CATALOGUE]
    n = len(result.catalogue["x"])
    assert n > 0
    for column in CATALOGUE:
        values = result.catalogue[column.name]
        assert len(values) == n
        assert values.dtype == (object if column.dtype == "str" else np.dtype(column.dtype)), column.name
    assert result.stamps.shape == (n, 3, 63, 63)
    assert result.receipt.n_candidates == n
    assert len(set(result.catalogue["candidate_id"])) == n


def test_transients_are_recovered_with_flux_place_and_magnitude(files, result):
    """Planted transients come back; fluxes are in the units of the file, and magnitudes follow from its zero point."""
    _, pair = files
    catalogue, truth = result.catalogue, pair.truth
    index, _ = match(catalogue["x"], catalogue["y"], truth["x"], truth["y"])
    clear = truth["snr_local"] > 10
    assert (index[clear] >= 0).mean() > 0.95
    found = index[clear & (index >= 0)]
    flux = truth["flux"][clear & (index >= 0)] / GAIN
    assert np.median(catalogue["flux"][found] / flux) == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(
        catalogue["mag"][found], 27.5 - 2.5 * np.log10(np.abs(catalogue["flux"][found])), rtol=1e-5
    )
    expected = WCS(header(pair.new.shape)).pixel_to_world(catalogue["x"], catalogue["y"])
    np.testing.assert_allclose(catalogue["ra"], expected.ra.deg, atol=1e-9)
    assert (catalogue["mjd"] == 60000.25).all()
    assert set(catalogue["filter"]) == {"r"}


def test_stamps_show_the_transient_in_file_units(files, result):
    """The middle of a bright new source's stamps: light in new, none in ref, and the difference between them."""
    _, pair = files
    truth = pair.truth[(pair.truth["kind"] == "new") & (pair.truth["snr_local"] > 20)]
    index, _ = match(result.catalogue["x"], result.catalogue["y"], truth["x"], truth["y"])
    assert (index >= 0).any()
    for i, flux in zip(index[index >= 0], truth["flux"][index >= 0] / GAIN, strict=True):
        new, ref, _ = np.nan_to_num(result.stamps[i])
        light = (new - ref)[24:39, 24:39].sum()
        assert light == pytest.approx(flux, rel=0.35)


def test_receipt_tells_how_it_went(result):
    """Seconds of every step, the quality of every fit, and the histogram of S_corr."""
    receipt = result.receipt
    assert receipt.status == "done"
    steps = ["read", "align", "background", "psf", "photometry", "subtract", "detect", "cutouts"]
    assert list(receipt.seconds) == steps
    quality = receipt.quality
    assert quality["flux_ratio"] == pytest.approx(1.3, rel=0.01)
    assert quality["n_psf_stars_new"] >= 5
    assert quality["fwhm_new"] == pytest.approx(3.4, rel=0.05)
    assert 0.9 < quality["renormalisation"] < 1.1
    assert sum(quality["scorr_hist"]) > 0.5 * 640 * 700


def test_same_input_gives_the_same_bytes(entry, result):
    """A second run of the same image repeats every value and every id."""
    again = process_image(entry)
    for name, values in result.catalogue.items():
        np.testing.assert_array_equal(values, again.catalogue[name], err_msg=name)
    assert again.stamps.tobytes() == result.stamps.tobytes()


def test_a_missing_file_is_a_read_error(entry):
    """The message names the file."""
    with pytest.raises(ReadError, match=r"nowhere\.fits"):
        process_image(replace(entry, new="/nowhere.fits"))


def test_an_image_without_stars_is_a_clear_error(tmp_path, entry, files):
    """Noise alone cannot be aligned: an ExposureError, not a crash."""
    _, pair = files
    path = tmp_path / "empty.fits"
    noise = np.random.default_rng(0).normal(400, 20, pair.new.shape).astype(np.float32)
    fits.writeto(path, noise, header(pair.new.shape))
    with pytest.raises(AlignError) as failure:
        process_image(replace(entry, new=str(path)))
    assert failure.value.metadata["found"] < failure.value.metadata["needed"]


def test_a_failure_after_new_was_read_tells_whose_it_was(entry):
    """Exposure, filter and time, of the manifest or the header; nothing that is not known."""
    with pytest.raises(ReadError) as failure:
        process_image(replace(entry, ref=("/nowhere.fits",), exposure_id="e7"))
    known = failure.value.metadata
    assert (known["exposure_id"], known["filter"], known["mjd"]) == ("e7", "r", 60000.25)
    assert "ccd" not in known


@pytest.mark.parametrize("changes", [{"detect": {"threshold": 15.0}}, {"cutouts": {"size": 31}}])
def test_settings_do_what_they_say(entry, result, changes):
    """A higher threshold keeps fewer candidates; another stamp size gives other stamps."""
    other = process_image(entry, Config.from_dict(changes))
    if "detect" in changes:
        assert np.abs(other.catalogue["scorr"]).min() >= 15
        assert len(other.catalogue["x"]) < len(result.catalogue["x"])
    else:
        assert other.stamps.shape[2:] == (31, 31)


def test_noise_that_is_nothing_like_the_sky_is_a_failure():
    """An image whose noise is far from what was measured as sky is refused with the number, not called done."""
    with pytest.raises(SubtractError, match="blank sky is 7") as failure:
        _require_sane_noise(7.0, simulate.simulate_pair((64, 64)).exposures()[0])
    assert failure.value.metadata["renormalisation"] == 7.0


@pytest.mark.parametrize("fault", ["wrong", "absent"])
def test_sky_positions_come_from_the_reference_where_the_wcs_of_new_is_of_no_use(tmp_path, entry, result, fault):
    """A WCS that is 25 pixels off, or none at all: star patterns place the image, and RA and Dec are right."""
    data, cards = fits.getdata(entry.new, header=True)
    if fault == "wrong":
        cards["CRPIX1"] += 25
    else:
        for key in [key for key in cards if key.startswith(("CTYPE", "CRVAL", "CRPIX", "CDELT", "PC", "CUNIT"))]:
            del cards[key]
    path = tmp_path / "new.fits"
    fits.writeto(path, data, cards)
    mended = process_image(replace(entry, new=str(path)))
    index, _ = match(mended.catalogue["x"], mended.catalogue["y"], result.catalogue["x"], result.catalogue["y"])
    assert (index >= 0).mean() > 0.9
    for name in ("ra", "dec"):
        off = (mended.catalogue[name][index] - result.catalogue[name])[index >= 0]
        assert np.abs(off).max() * 3600 < 0.5


def test_candidate_ids_tell_sign_and_place():
    """Two candidates of one image differ in their id, however near; a position off the image still has one."""
    assert candidate_id("img", 10.04, 20.0, 5.0) == "img_p00010.0_00020.0"
    assert candidate_id("img", 10.04, 20.0, -5.0) != candidate_id("img", 10.04, 20.0, 5.0)
    assert candidate_id("img", -0.4, 20.0, 5.0) == "img_p00000.0_00020.0"


def test_stamps_take_the_zero_point_of_the_tile_that_each_pixel_lies_in():
    """Stamps across seams and over the edge of the image: F_D of every pixel is that of its own tile, 1 outside."""
    edges = {"x": (0, 30, 70), "y": (0, 50, 64)}
    kernels, plane = [], np.ones((64 + 20, 70 + 20), np.float32)
    for n, (i, j) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        x0, x1, y0, y1 = edges["x"][i], edges["x"][i + 1], edges["y"][j], edges["y"][j + 1]
        kernels.append(SimpleNamespace(x0=x0, x1=x1, y0=y0, y1=y1, f_d=2.0 + n))
        plane[10 + y0 : 10 + y1, 10 + x0 : 10 + x1] = 2.0 + n
    x, y = np.array([5.0, 30.2, 69.0, 29.5]), np.array([5.0, 49.6, 63.0, 20.0])
    found = zero_points(SimpleNamespace(kernels=kernels), x, y, 9)
    for stamp, i, j in zip(found, np.rint(x).astype(int), np.rint(y).astype(int), strict=True):
        np.testing.assert_array_equal(stamp, plane[j + 6 : j + 15, i + 6 : i + 15])


def test_saturated_areas_grow_and_are_listed():
    """Saturation is widened by half a FWHM; each blob becomes a bright star with a radius that grows with it."""
    mask = np.zeros((60, 60), np.uint8)
    mask[20:24, 20:24] = MaskBit.SATURATED
    mask[50, 50] = MaskBit.BAD
    grown = grow_saturated(mask, 4.0)
    assert (grown[18, 20:24] == MaskBit.SATURATED).all()
    assert grown[50, 50] == MaskBit.BAD
    assert grown[50, 51] == 0
    stars = saturated_stars(mask, 4.0)
    assert len(stars) == 1
    assert (stars.x[0], stars.y[0]) == (21.5, 21.5)
    assert stars.radius[0] > 8
    assert len(saturated_stars(np.zeros((9, 9), np.uint8), 4.0)) == 0
