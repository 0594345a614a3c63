"""Reading images: every kind of FITS, every plane, and every way for a file to be broken."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchproc.errors import RawFrameError, ReadError
from batchproc.io import fitsfile
from batchproc.io.fitsfile import open_fits, split_hdu
from batchproc.io.images import image_hdus, inspect_image, read_image, read_new, read_refs
from batchproc.io.planes import decode_mask, decode_variance
from batchproc.io.profiles import MaskRule
from batchproc.records import ManifestEntry, MaskBit
from tests.io.fitsfiles import CARDS, SHAPE, WCS_CARDS, header, sky, write, write_mef

# ---- what can be read


@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz", "a.fits.fz"])
def test_any_container_gives_the_same_image(tmp_path: Path, name: str) -> None:
    """Plain, gzipped and Rice-compressed files of whole numbers give the same electrons: native float32."""
    data = sky().astype(np.int16)
    image = read_image(write(tmp_path / name, data))
    assert image.data.dtype == np.dtype(np.float32)
    assert image.data.dtype.isnative
    np.testing.assert_array_equal(image.data, data.astype(np.float32) * 2)
    assert not image.mask.any()
    assert (image.gain, image.read_noise, image.zero_point) == (2.0, 5.0, 25.0)
    assert image.saturation == 120000.0
    assert image.meta["mjd"] == pytest.approx(60000.0005)
    assert image.meta["filter"] == "r"
    assert image.wcs is not None
    assert image.meta["pixel_scale"] == pytest.approx(1.0)
    assert image.meta["assumed"] == ()


def test_compressed_floats_come_back_within_their_quantisation(tmp_path: Path) -> None:
    """Rice on floating point is lossy by a fraction of the noise; NaN stays NaN."""
    data = sky() + 0.25
    data[3, 4] = np.nan
    image = read_image(write(tmp_path / "a.fits.fz", data))
    good = image.mask == 0
    assert image.mask[3, 4] == MaskBit.NO_DATA
    assert good.sum() == good.size - 1
    np.testing.assert_allclose(image.data[good] / 2, data[good], atol=1.0)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.uint8, np.float32, np.float64])
def test_any_pixel_type_gives_the_same_image(tmp_path: Path, dtype: type) -> None:
    """Unsigned 16-bit (BZERO 32768), integers and doubles, all big-endian on disk, are the same numbers."""
    image = read_image(write(tmp_path / "a.fits", sky().astype(dtype)))
    np.testing.assert_array_equal(image.data, sky() * 2)


def test_scaled_integers_and_blank(tmp_path: Path) -> None:
    """BSCALE and BZERO are applied, BLANK is NO_DATA and holds something finite."""
    stored = sky().astype(np.int16)
    stored[5, 6] = -999
    hdu = fits.PrimaryHDU(stored, header())
    hdu.header["BLANK"] = -999
    hdu.header["BSCALE"], hdu.header["BZERO"] = 0.5, 10.0
    hdu.writeto(tmp_path / "a.fits")
    image = read_image(tmp_path / "a.fits")
    assert image.mask[5, 6] == MaskBit.NO_DATA
    assert np.isfinite(image.data).all()
    good = image.mask == 0
    np.testing.assert_allclose(image.data[good], ((stored * 0.5 + 10) * 2)[good])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4e38])
def test_what_is_no_number_is_no_data(tmp_path: Path, value: float) -> None:
    """NaN, infinities and the largest float are "nothing here" and become the median, which harms nobody."""
    data = sky()
    data[2:4, 7] = value
    image = read_image(write(tmp_path / "a.fits", data))
    assert (image.mask[2:4, 7] == MaskBit.NO_DATA).all()
    assert np.count_nonzero(image.mask) == 2
    np.testing.assert_allclose(image.data[2:4, 7], 200, atol=5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint16])
@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz"])
def test_areas_of_exact_zeros_are_no_data(tmp_path: Path, dtype: type, name: str) -> None:
    """What a resampling program filled is found whole, at the edge or inside; the level of the sky does not see it."""
    data = sky().astype(dtype)
    rows, columns = np.indices(SHAPE)
    blank = columns < 9 + rows // 4  # a slanted edge
    blank[30, :30] = True  # narrower than the square, but connected
    blank[15:24, 35:44] = True
    data[blank] = 0
    data[5, 40] = data[28, 36:48] = 0  # isolated zeros
    image = read_image(write(tmp_path / name, data))
    np.testing.assert_array_equal(image.mask == MaskBit.NO_DATA, blank)
    assert not image.mask[~blank].any()
    assert image.data[blank].min() == image.data[blank].max() == pytest.approx(200, abs=4)
    assert image.data[5, 40] == 0
    assert image.meta["notes"] == (f"{blank.sum()} pixels in areas of exact zeros were taken for pixels without data",)


def test_smaller_groups_of_zeros_are_values(tmp_path: Path) -> None:
    """No square of 9 pixels a side: a pixel like others, however many of them."""
    data = sky()
    data[3:11, 3:40] = 0
    image = read_image(write(tmp_path / "a.fits", data))
    assert not image.mask.any()
    assert image.meta["notes"] == ()
    np.testing.assert_array_equal(image.data, data * 2)
    data[24:34, 5:15] = 0
    image = read_image(write(tmp_path / "b.fits", data))
    assert image.meta["notes"] == ("100 pixels in areas of exact zeros were taken for pixels without data",)


def test_a_degenerate_third_axis_is_no_cube(tmp_path: Path) -> None:
    """NAXIS3 = 1 is an image; NAXIS3 = 2 is not."""
    image = read_image(write(tmp_path / "a.fits", sky()[None]))
    assert image.shape == SHAPE
    with pytest.raises(ReadError, match=r"3 axes of lengths \(50, 40, 2\).*expected a 2-D image"):
        read_image(write(tmp_path / "b.fits", np.stack([sky(), sky()])))


def test_inputs_are_not_modified(tmp_path: Path) -> None:
    """Reading leaves the file as it was."""
    path = write(tmp_path / "a.fits")
    before = path.read_bytes()
    read_image(path)
    assert path.read_bytes() == before


# ---- which HDU


def test_an_hdu_by_number_or_name(tmp_path: Path) -> None:
    """path[2], path[N2], path[n2] and path[N2,1] are the same; the primary header's cards hold for all."""
    path = write_mef(tmp_path / "a.fits", [("N1", sky(1), {}), ("N2", sky(2), {"GAIN": 3.0})], CARDS)
    for spec in ("[2]", "[N2]", "[n2]", "[N2,1]"):
        image = read_image(f"{path}{spec}")
        assert image.gain == 3.0
        assert image.read_noise == 5.0
        np.testing.assert_array_equal(image.data, sky(2) * 3)
    assert image_hdus(path) == [f"{path}[N1]", f"{path}[N2]"]
    assert image_hdus(f"{path}[1]") == [f"{path}[1]"]


def test_several_images_want_a_name(tmp_path: Path) -> None:
    """Two CCDs in one file are two rows of a manifest, and the error says what to write."""
    path = write_mef(tmp_path / "a.fits", [("N1", sky(1), {}), ("N2", sky(2), {})], CARDS)
    with pytest.raises(ReadError, match=r"2 images in HDUs 1 \(N1\), 2 \(N2\).*a\.fits\[N1\]"):
        read_image(path)
    with pytest.raises(ReadError, match=r"HDUs 0 \(PRIMARY\), 1 \(N1\), 2 \(N2\); expected one called N7"):
        read_image(f"{path}[N7]")
    with pytest.raises(ReadError, match="expected an HDU 9"):
        read_image(f"{path}[9]")
    with pytest.raises(ReadError, match="no pixels"):
        read_image(f"{path}[0]")


def test_the_science_image_among_its_planes(tmp_path: Path) -> None:
    """Without a name, SCI is taken, and planes are no candidates."""
    hdus = [("MASK", np.zeros(SHAPE, np.uint8), {}), ("OTHER", sky(3), {}), ("SCI", sky(), WCS_CARDS)]
    image = read_image(write_mef(tmp_path / "a.fits", hdus, CARDS))
    np.testing.assert_array_equal(image.data, sky() * 2)
    assert image.meta["hdu"] == "3 (SCI)"
    assert image_hdus(tmp_path / "a.fits") == [str(tmp_path / "a.fits")]


@given(
    stem=st.text("ab.+_-", min_size=1, max_size=8), hdu=st.one_of(st.integers(0, 99), st.sampled_from(["SCI", "N4"]))
)
@settings(max_examples=30, deadline=None)
def test_split_hdu_takes_apart_what_was_joined(stem: str, hdu: int | str) -> None:
    """path[hdu] comes apart again; a bare path stays whole."""
    assert split_hdu(f"/x/{stem}.fits[{hdu}]") == (Path(f"/x/{stem}.fits"), hdu)
    assert split_hdu(f"/x/{stem}.fits") == (Path(f"/x/{stem}.fits"), None)


def test_a_file_with_brackets_in_its_name(tmp_path: Path) -> None:
    """A file that is really called so is found."""
    path = write(tmp_path / "a[1].fits")
    path = path.rename(tmp_path / "b.fits[1]")
    assert read_image(path).shape == SHAPE


# ---- planes


def test_a_mask_marks_bad_pixels(tmp_path: Path) -> None:
    """Without bits in the profile every non-zero pixel is bad, from a file of its own or from beside the image."""
    mask = np.zeros(SHAPE, np.int32)
    mask[1, 2], mask[3, 4] = 1, 512
    fits.PrimaryHDU(mask).writeto(tmp_path / "m.fits")
    write(tmp_path / "a.fits")
    separate = read_image(tmp_path / "a.fits", mask=str(tmp_path / "m.fits"))
    beside = read_image(write_mef(tmp_path / "b.fits", [("SCI", sky(), {}), ("MASK", mask, {})], CARDS))
    for image in (separate, beside):
        assert sorted(zip(*np.nonzero(image.mask), strict=True)) == [(1, 2), (3, 4)]
        assert set(image.mask[image.mask > 0]) == {MaskBit.BAD}


@given(
    plane=st.lists(st.integers(0, 2**15 - 1), min_size=6, max_size=6),
    bad=st.sets(st.integers(0, 14), max_size=4),
    saturated=st.sets(st.integers(0, 14), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_mask_bits_mean_what_the_rule_says(plane: list[int], bad: set[int], saturated: set[int]) -> None:
    """A pixel is bad, or saturated, exactly if it has one of the bits named so; all other bits are harmless."""
    rule = MaskRule(kind="bits", bad=sorted(bad), saturated=sorted(saturated))
    out = decode_mask(np.array(plane, np.int16).reshape(2, 3), rule, {}).ravel()
    for value, bits in zip(plane, out, strict=True):
        assert bool(bits & MaskBit.BAD) == any(value >> bit & 1 for bit in bad)
        assert bool(bits & MaskBit.SATURATED) == any(value >> bit & 1 for bit in saturated)


def test_mask_values_are_codes_not_bits() -> None:
    """With kind = "values" 3 is a code of its own, not 1 and 2 together; unlisted codes are harmless."""
    plane = np.array([[0, 1, 2, 3, 5, 7]])
    rule = MaskRule(kind="values", bad=[1], saturated=[3], no_data=[2], cosmic_ray=[5])
    expected = [0, MaskBit.BAD, MaskBit.NO_DATA, MaskBit.SATURATED, MaskBit.COSMIC_RAY, 0]
    assert decode_mask(plane, rule, {}).ravel().tolist() == expected


def test_a_mask_that_names_its_bits(tmp_path: Path) -> None:
    """Rubin-like masks carry MP_ keywords; DETECTED is no defect."""
    mask = np.zeros(SHAPE, np.int32)
    mask[0, 0], mask[1, 1], mask[2, 2] = 1 << 1, 1 << 5, 1 << 8
    cards = {"MP_SAT": 1, "HIERARCH MP_DETECTED": 5, "HIERARCH MP_NO_DATA": 8}
    variance = np.full(SHAPE, 25.0, np.float32)
    hdus = [("IMAGE", sky(), {}), ("MASK", mask, cards), ("VARIANCE", variance, {})]
    image = read_image(write_mef(tmp_path / "a.fits", hdus, CARDS))
    assert (image.mask[0, 0], image.mask[1, 1], image.mask[2, 2]) == (MaskBit.SATURATED, 0, MaskBit.NO_DATA)
    np.testing.assert_allclose(image.variance, 100.0)
    assert image.meta["variance_has_sources"] is True


def test_floating_point_masks_are_masks(tmp_path: Path) -> None:
    """Some programs write masks as floats; NaN is bad."""
    mask = np.zeros(SHAPE, np.float32)
    mask[0, 1], mask[0, 2] = 1, np.nan
    fits.PrimaryHDU(mask).writeto(tmp_path / "m.fits")
    image = read_image(write(tmp_path / "a.fits"), mask=str(tmp_path / "m.fits"))
    assert np.flatnonzero(image.mask).tolist() == [1, 2]


@pytest.mark.parametrize(("name", "value"), [("VAR", 25.0), ("WEIGHT", 1 / 25.0), ("ERR", 5.0)])
def test_variance_weight_and_rms_are_one_thing(tmp_path: Path, name: str, value: float) -> None:
    """Each becomes the variance in electrons² (gain² times that of the file); zero is bad in all three."""
    plane = np.full(SHAPE, value, np.float32)
    plane[4, 4], plane[5, 5] = 0, np.nan
    image = read_image(write_mef(tmp_path / "a.fits", [("SCI", sky(), {}), (name, plane, {})], CARDS))
    np.testing.assert_allclose(image.variance, 100.0, rtol=1e-6)
    assert image.variance.dtype == np.float32
    assert np.argwhere(image.mask == MaskBit.BAD).tolist() == [[4, 4], [5, 5]]


def test_variance_of_a_plane_without_a_good_pixel() -> None:
    """Nothing good is all bad, not a crash."""
    variance, bad = decode_variance(np.zeros((2, 2)), "weight", 1.0)
    assert bad.all()
    assert np.isfinite(variance).all()


def test_planes_of_several_ccds_go_with_their_images(tmp_path: Path) -> None:
    """In SCI,1 DQ,1 SCI,2 DQ,2 each image has its own mask; in a separate file the HDU of the same name."""
    masks = [np.zeros(SHAPE, np.uint8) for _ in range(2)]
    masks[0][0, 0] = masks[1][1, 1] = 1
    hdus = [fits.PrimaryHDU(header=header())]
    for version in (1, 2):
        hdus += [
            fits.ImageHDU(sky(version), name="SCI", ver=version),
            fits.ImageHDU(masks[version - 1], name="DQ", ver=version),
        ]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits")
    assert np.argwhere(read_image(f"{tmp_path}/a.fits[SCI,1]").mask).tolist() == [[0, 0]]
    assert np.argwhere(read_image(f"{tmp_path}/a.fits[SCI,2]").mask).tolist() == [[1, 1]]
    write_mef(tmp_path / "ooi.fits", [("N1", sky(1), {}), ("N2", sky(2), {})], CARDS)
    write_mef(tmp_path / "ood.fits", [("N2", masks[1], {}), ("N1", masks[0], {})], {})
    image = read_image(f"{tmp_path}/ooi.fits[N1]", mask=f"{tmp_path}/ood.fits")
    assert np.argwhere(image.mask).tolist() == [[0, 0]]


def test_a_psf_stamp(tmp_path: Path) -> None:
    """An image of odd size becomes a PSF of unit sum; nonsense is an error of the file."""
    pytest.importorskip("batchproc.imaging.psf")
    y, x = np.mgrid[-7:8, -7:8]
    fits.PrimaryHDU(np.exp(-(x**2 + y**2) / 8) * 5).writeto(tmp_path / "p.fits")
    image = read_image(write(tmp_path / "a.fits"), psf=str(tmp_path / "p.fits"))
    stamp = image.psf.at(10, 10)
    assert stamp.sum() == pytest.approx(1)
    assert np.unravel_index(stamp.argmax(), stamp.shape) == (stamp.shape[0] // 2,) * 2
    fits.PrimaryHDU(np.zeros((15, 15))).writeto(tmp_path / "zero.fits")
    with pytest.raises(ReadError, match=r"zero\.fits"):
        read_image(tmp_path / "a.fits", psf=str(tmp_path / "zero.fits"))


def test_a_psfex_model(tmp_path: Path) -> None:
    """A PSFEx file is read with its polynomial: the PSF may differ from place to place."""
    pytest.importorskip("batchproc.imaging.psf")
    y, x = np.mgrid[-7:8, -7:8]
    basis = np.zeros((3, 15, 15), np.float32)
    basis[0] = np.exp(-(x**2 + y**2) / 8)
    column = fits.Column("PSF_MASK", format="675E", dim="(15,15,3)", array=basis[None])
    table = fits.BinTableHDU.from_columns([column], name="PSF_DATA")
    cards = {
        "POLNAXIS": 2, "POLNGRP": 1, "POLGRP1": 1, "POLGRP2": 1, "POLNAME1": "X_IMAGE", "POLNAME2": "Y_IMAGE",
        "POLZERO1": 25.0, "POLZERO2": 20.0, "POLSCAL1": 50.0, "POLSCAL2": 40.0, "POLDEG1": 1, "PSF_SAMP": 1.0,
        "PSF_FWHM": 4.7, "PSFNAXIS": 3, "PSFAXIS1": 15, "PSFAXIS2": 15, "PSFAXIS3": 3, "LOADED": 50, "ACCEPTED": 40,
    }  # fmt: skip
    table.header.update(cards)
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(tmp_path / "a.psf")
    image = read_image(write(tmp_path / "a.fits"), psf=str(tmp_path / "a.psf"))
    stamp = image.psf.at(10, 10)
    assert stamp.sum() == pytest.approx(1)
    assert image.psf.fwhm == pytest.approx(2.355 * 2, rel=0.1)


# ---- numbers of header and manifest


def entry(new: Path, *refs: Path, **columns: object) -> ManifestEntry:
    return ManifestEntry("a", str(new), tuple(map(str, refs)) or (str(new),), **columns)


def test_the_manifest_goes_before_the_header(tmp_path: Path) -> None:
    """Columns of the manifest win for new; a reference keeps what its own header says."""
    new = write(tmp_path / "new.fits")
    ref = write(tmp_path / "ref.fits", GAIN=10.0)
    bare = write(tmp_path / "bare.fits", GAIN=None, RDNOISE=None, SATURATE=None)
    row = entry(
        new, ref, bare, gain=4.0, read_noise=7.0, saturation=200.0, filter="i", mjd=55555.5, exposure_id="e1",
        ccd="c1", survey="mine",
    )  # fmt: skip
    image = read_new(row)
    assert (image.gain, image.read_noise, image.saturation) == (4.0, 7.0, 800.0)
    np.testing.assert_array_equal(image.data, sky() * 4)
    assert {key: image.meta[key] for key in ("filter", "mjd", "exposure_id", "ccd", "survey")} == {
        "filter": "i", "mjd": 55555.5, "exposure_id": "e1", "ccd": "c1", "survey": "mine",
    }  # fmt: skip
    first, second = read_refs(row)
    assert (first.gain, first.read_noise, first.saturation) == (10.0, 5.0, 600000.0)
    assert (second.gain, second.read_noise, second.saturation) == (4.0, 7.0, 800.0)
    assert len(second.meta["assumed"]) == 3
    assert first.meta["filter"] == "r"


def test_planes_of_several_references_are_kept_apart(tmp_path: Path) -> None:
    """The n-th mask belongs to the n-th reference; an empty one is none."""
    refs = [write(tmp_path / f"r{number}.fits") for number in range(2)]
    mask = np.ones(SHAPE, np.uint8)
    fits.PrimaryHDU(mask).writeto(tmp_path / "m.fits")
    first, second = read_refs(entry(refs[0], *refs, ref_mask=("", str(tmp_path / "m.fits"))))
    assert not first.mask.any()
    assert second.mask.all()


@pytest.mark.parametrize("gain", [None, 0.0, -1.0])
def test_a_gain_is_never_assumed_in_silence(tmp_path: Path, gain: float | None) -> None:
    """Without a usable gain it is 1, and the image says so."""
    image = read_image(write(tmp_path / "a.fits", GAIN=gain))
    assert image.gain == 1.0
    assert any("gain = 1" in sentence for sentence in image.meta["assumed"])


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("ADU", 2.0), ("electron", 1.0), ("e-/s", 86.4), ("Counts / s", 172.8), (None, 2.0), ("DN", 2.0)],
)
def test_any_common_unit_becomes_electrons(tmp_path: Path, unit: str | None, factor: float) -> None:
    """Rates are multiplied by the exposure time, ADU by the gain; Exposure.gain is electrons per file unit."""
    image = read_image(write(tmp_path / "a.fits", BUNIT=unit))
    assert image.gain == pytest.approx(factor)
    np.testing.assert_allclose(image.data, sky() * factor, rtol=1e-6)
    assert image.saturation == pytest.approx(60000 * factor)
    assert image.zero_point == 25.0


def test_an_unknown_unit_wants_a_gain(tmp_path: Path) -> None:
    """nJy are no electrons: an error that says what to do; with a gain or a variance plane it goes on."""
    path = write(tmp_path / "a.fits", BUNIT="nJy")
    with pytest.raises(ReadError, match=r"pixels in 'nJy'.*column gain") as caught:
        read_image(path)
    assert caught.value.metadata["found"] == "pixels in 'nJy'"
    assert read_new(entry(path, gain=3.0)).gain == 3.0
    fits.PrimaryHDU(np.full(SHAPE, 25.0)).writeto(tmp_path / "v.fits")
    image = read_image(path, variance=str(tmp_path / "v.fits"))
    assert image.gain == 1.0
    np.testing.assert_allclose(image.variance, 25.0)
    with pytest.raises(ReadError, match="no exposure time"):
        read_image(write(tmp_path / "b.fits", BUNIT="e/s", EXPTIME=None))


def test_pixels_at_the_saturation_level_are_saturated(tmp_path: Path) -> None:
    """At and above, not below; without a level nothing is."""
    data = sky()
    data[0, :3] = [59999, 60000, 70000]
    assert np.flatnonzero(read_image(write(tmp_path / "a.fits", data)).mask & MaskBit.SATURATED).tolist() == [1, 2]
    image = read_image(write(tmp_path / "b.fits", data, SATURATE=None))
    assert not image.mask.any()
    assert image.saturation == np.inf


def test_each_amplifier_has_its_own_saturation(tmp_path: Path) -> None:
    """Where the sections tile the image; else the lowest level holds for all. Gains are averaged."""
    data = sky()
    data[0, 0] = data[0, -1] = 45000
    amplifiers = {"GAIN": None, "SATURATE": None, "GAINA": 3.0, "GAINB": 5.0, "SATURATA": 50000, "SATURATB": 40000}
    tiled = read_image(write(tmp_path / "a.fits", data, DATASECA="[1:25,1:40]", DATASECB="[26:50,1:40]", **amplifiers))
    assert np.argwhere(tiled.mask).tolist() == [[0, 49]]
    assert (tiled.gain, tiled.saturation) == (4.0, 160000.0)
    untiled = read_image(write(tmp_path / "b.fits", data, **amplifiers))
    assert np.argwhere(untiled.mask).tolist() == [[0, 0], [0, 49]]


# ---- WCS


@pytest.mark.parametrize(
    ("cards", "note"),
    [
        ({"CTYPE1": None, "CTYPE2": None}, "no CTYPE1"),
        ({"CTYPE1": "LINEAR", "CTYPE2": "LINEAR"}, "not celestial"),
        ({"CD1_1": 0.0, "CD2_2": 0.0}, "no WCS"),
        ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, "no WCS"),
        ({"CD1_2": -1 / 3600, "CD2_1": 1 / 3600}, "times the area"),
        ({"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "A_2_0": 0.3, "B_ORDER": 2}, "area"),
        ({"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 0.01}, "times the area"),
    ],
)
def test_a_wcs_that_is_none(tmp_path: Path, cards: dict[str, object], note: str) -> None:
    """No WCS, or one that cannot be, is None with a reason; the image is read all the same."""
    image = read_image(write(tmp_path / "a.fits", **cards))
    assert image.wcs is None
    assert note in image.meta["notes"][0]


@pytest.mark.parametrize(
    ("cards", "note"),
    [
        ({"RADESYS": "NOWHERE"}, "frame 'NOWHERE' is not known"),
        ({"EQUINOX": 1e300}, "equinox 1e+300 is not a year"),
        ({"EQUINOX": "J2000"}, "equinox 'J2000' is not a year"),
    ],
)
def test_a_frame_that_nobody_knows_is_the_default(tmp_path: Path, cards: dict[str, object], note: str) -> None:
    """The positions are those of a header without the card, and a note tells."""
    image, plain = read_image(write(tmp_path / "a.fits", **cards)), read_image(write(tmp_path / "b.fits"))
    assert note in image.meta["notes"][0]
    there = plain.wcs.pixel_to_world(3, 4)
    assert image.wcs.pixel_to_world(3, 4).separation(there).arcsec < 1e-6


def test_strong_distortion_is_no_error(tmp_path: Path) -> None:
    """A pixel at the edge may have half or twice the area of one in the middle."""
    cards = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2}
    image = read_image(write(tmp_path / "a.fits", **cards, A_2_0=0.008, B_0_2=0.005))
    assert image.wcs is not None
    assert image.meta["notes"] == ()


def test_distortion_mixups_are_put_right(tmp_path: Path) -> None:
    """SIP without -SIP is applied, SIP beside TPV left out, PC beside CD left out: each said in a note."""
    sip = {"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-4, "B_0_2": 0.0}
    with_sip = read_image(write(tmp_path / "a.fits", **sip))
    assert with_sip.wcs.sip is not None
    assert "SIP" in with_sip.meta["notes"][0]
    tpv = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.0, "PV2_1": 1.0}
    with_tpv = read_image(write(tmp_path / "b.fits", **sip, **tpv))
    assert with_tpv.wcs.sip is None
    plain = read_image(write(tmp_path / "c.fits"))
    both = read_image(write(tmp_path / "d.fits", PC1_1=-2 / 3600, PC1_2=0.0, PC2_1=0.0, PC2_2=2 / 3600))
    assert "CD used" in both.meta["notes"][0]
    for image in (with_tpv, both):
        np.testing.assert_allclose(
            image.wcs.all_pix2world(0, 0, 0), plain.wcs.all_pix2world(0, 0, 0), rtol=0, atol=1e-9
        )


# ---- what cannot be read


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "a.fits"
    if kind == "missing":
        return path
    write(path)
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "not FITS":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) - 2880 * 2])
    elif kind == "truncated header":
        path.write_bytes(content[:1500])
    elif kind == "one byte short of its pixels":
        path.write_bytes(content[: content.index(b"END" + b" " * 77) // 2880 * 2880 + 2880 + 40 * 50 * 4 - 1])
    elif kind == "absurd":
        head = content.replace(b"NAXIS1  =                   50", b"NAXIS1  =           1000000000")
        path.write_bytes(head.replace(b"NAXIS2  =                   40", b"NAXIS2  =           1000000000"))
    elif kind == "large, but not there":
        path.write_bytes(content.replace(b"NAXIS1  =                   50", b"NAXIS1  =                50000"))
    elif kind == "too large for one task":
        head = content.replace(b"NAXIS1  =                   50", b"NAXIS1  =                50000")
        path.write_bytes(head.replace(b"NAXIS2  =                   40", b"NAXIS2  =                50000"))
    elif kind == "no image":
        path.unlink()
        table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=[1.0])])
        fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)
    elif kind == "one-dimensional":
        path.unlink()
        fits.PrimaryHDU(np.arange(10.0)).writeto(path)
    elif kind == "all NaN":
        path.unlink()
        write(path, np.full(SHAPE, np.nan, np.float32))
    elif kind == "all zero":
        path.unlink()
        write(path, np.zeros(SHAPE, np.float32))
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "an endless device":
        path.unlink()
        path.symlink_to("/dev/zero")
    elif kind == "a link to itself":
        path.unlink()
        path.symlink_to(path)
    elif kind == "no name":
        return tmp_path / "a\0.fits"
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file; expected a FITS file. Correct the path"),
        ("empty", r"empty \(0 bytes\)"),
        ("not FITS", "begins with b'<html>404"),
        ("truncated", "truncated: .* bytes; expected at least"),
        ("truncated header", "header that cannot be used"),
        ("one byte short of its pixels", "truncated"),
        ("absurd", "it claims 1000000000 x 1000000000 pixels"),
        ("large, but not there", "truncated"),
        ("too large for one task", "NAXIS of 50000 x 50000; expected at most"),
        ("no image", "expected a 2-D image in one of them"),
        ("one-dimensional", "1 axes of lengths"),
        ("all NaN", "no finite pixel"),
        ("all zero", "0 in every pixel"),
        ("a folder", "a folder"),
        ("a pipe", "a pipe, a socket or a device"),
        ("an endless device", "a pipe, a socket or a device"),
        ("a link to itself", "cannot be opened"),
        ("no name", "a name that no file can have"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, kind: str, words: str) -> None:
    """Every error names the file, what was found, what was expected and what to do, and travels between processes."""
    path = broken(tmp_path, kind)
    with pytest.raises(ReadError, match=words) as caught:
        read_image(path)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(path) in str(error)
    assert error.stage == "read"
    assert error.metadata["path"] == str(path)
    assert error.metadata["found"]
    assert error.metadata["expected"]


def test_the_last_block_may_lack_its_padding(tmp_path: Path) -> None:
    """Some writers leave the padding off; nothing is lost."""
    path = write(tmp_path / "a.fits")
    content = path.read_bytes()
    start = content.index(b"END" + b" " * 77) // 2880 * 2880 + 2880
    path.write_bytes(content[: start + 40 * 50 * 4])
    np.testing.assert_array_equal(read_image(path).data, sky() * 2)


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.95])
def test_a_cut_compressed_file(tmp_path: Path, cut: float) -> None:
    """Wherever a .fz or .gz ends too early, it is a ReadError."""
    noisy = np.random.default_rng(0).normal(0, 1000, (200, 200)).astype(np.float32)
    for name in ("a.fits.fz", "a.fits.gz"):
        path = write(tmp_path / name, noisy)
        content = path.read_bytes()
        path.write_bytes(content[: int(cut * len(content))])
        with pytest.raises(ReadError, match=name):
            read_image(path)


def test_corrupt_compressed_files(tmp_path: Path) -> None:
    """A flipped byte in a gzip breaks its checksum; rubble in a .fz does not decompress."""
    path = write(tmp_path / "a.fits.gz")
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    content[3000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ReadError, match="corrupt or cut gzip"):
        read_image(path)
    path = write(tmp_path / "a.fits.fz")
    content = bytearray(path.read_bytes())
    heap = len(content) - 2880
    content[heap : heap + 1500] = b"\xff" * 1500
    path.write_bytes(content)
    # Rice has no checksum: this may decode to something of the right shape, or to a ReadError, but to nothing else.
    with contextlib.suppress(ReadError):
        assert read_image(path).shape == SHAPE


def test_a_file_cut_within_its_mask_is_not_an_image_without_a_mask(tmp_path: Path) -> None:
    """Wherever it is cut; and where bytes are lost so that the next extension is not found. Rubble is none."""
    path = write_mef(tmp_path / "a.fits", [("SCI", sky(), WCS_CARDS), ("MASK", np.ones(SHAPE, np.uint8), {})], CARDS)
    content = path.read_bytes()
    mask = content.rindex(b"XTENSION")
    for damaged in (content[: mask + 100], content[: mask + 3000], content[: mask - 80] + content[mask:]):
        path.write_bytes(damaged)
        with pytest.raises(ReadError, match=r"a\.fits"):
            read_image(path)
    path.write_bytes(content + b"left behind by some program" * 99)
    assert (read_image(path).mask == MaskBit.BAD).all()


def test_a_compressed_image_has_the_tiles_that_it_claims(tmp_path: Path) -> None:
    """No fewer: memory would be taken for pixels that are not there. And no more: a part would pass for the whole."""
    path = write(tmp_path / "a.fits.fz")
    content = path.read_bytes()
    for claimed in (10, 20_000_000):
        path.write_bytes(content.replace(f"ZNAXIS2 = {40:20d}".encode(), f"ZNAXIS2 = {claimed:20d}".encode()))
        tracemalloc.start()
        with pytest.raises(ReadError, match=rf"40 compressed tiles; expected {claimed}, as its header claims"):
            read_image(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e7
        with pytest.raises(ReadError):  # a plan of memory that believed it would refuse the whole campaign
            inspect_image(path)


def test_a_gzip_is_unpacked_no_further_than_its_headers_claim(tmp_path: Path) -> None:
    """Megabytes that unpack to gigabytes of nothing take neither memory nor minutes; a little rubble is no harm."""
    path = write(tmp_path / "a.fits.gz")
    good, zeros = path.read_bytes(), gzip.compress(bytes(2**24))
    path.write_bytes(good + gzip.compress(bytes(2**23)))
    np.testing.assert_array_equal(read_image(path).data, sky() * 2)
    path.write_bytes(good + zeros * 200)  # 3 GB
    tracemalloc.start()
    with pytest.raises(ReadError, match="goes on for more than 16 MB behind the last HDU"):
        read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e8


def test_extensions_of_a_gzip_are_all_there(tmp_path: Path) -> None:
    """What is unpacked HDU by HDU is the file, byte for byte: tables with heaps, empty HDUs, trailing blocks."""
    table = fits.BinTableHDU.from_columns([fits.Column("a", "PE()", array=[np.arange(5.0), np.arange(900.0)])])
    empty, image = fits.ImageHDU(name="NONE"), fits.ImageHDU(sky(), header(), name="SCI")
    path = tmp_path / "a.fits"
    fits.HDUList([fits.PrimaryHDU(), empty, table, image, fits.CompImageHDU(sky().astype(np.int32))]).writeto(path)
    for content in (path.read_bytes(), path.read_bytes() + bytes(2880)):
        path.write_bytes(gzip.compress(content))
        with open_fits(path) as file:
            assert file._stream.getvalue() == content
            assert [hdu.kind for hdu in file] == ["image", "image", "table", "image", "image"]


@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz", "a.fits.fz"])
def test_a_failing_disk_is_told_from_a_broken_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk fails, what it said is the cause of the error, though astropy swallows it: another attempt
    may succeed."""
    noisy = np.random.default_rng(0).normal(0, 1000, (200, 200)).astype(np.int32)
    path = write(tmp_path / name, noisy)
    length = path.stat().st_size
    readinto = fitsfile._Disk.readinto
    for at in (0, 3000, length // 2, length - 10):

        def failing(self, buffer, at=at):
            if self._file.tell() + len(buffer) > at:
                raise OSError(errno.EIO, "Input/output error")
            return readinto(self, buffer)

        monkeypatch.setattr(fitsfile._Disk, "readinto", failing)
        with pytest.raises((ReadError, OSError)) as caught:
            read_image(path)
        failure = caught.value if isinstance(caught.value, OSError) else caught.value.__cause__
        assert isinstance(failure, OSError)
        assert failure.errno == errno.EIO


@pytest.mark.parametrize("kind", ["mask", "variance"])
def test_a_plane_of_another_shape(tmp_path: Path, kind: str) -> None:
    """Both shapes are in the message, and whose they are."""
    fits.PrimaryHDU(np.ones((30, 50))).writeto(tmp_path / "p.fits")
    with pytest.raises(ReadError, match=rf"p\.fits.*a {kind} plane of 50 x 30 pixels; expected 50 x 40 pixels"):
        read_image(write(tmp_path / "a.fits"), **{kind: str(tmp_path / "p.fits")})


@pytest.mark.parametrize(
    "cards",
    [
        {"IMGTYPE": "bias"},
        {"OBSTYPE": "dome flat"},
        {"IMAGETYP": "Dark Frame"},
        {"PROCTYPE": "raw"},
        {"BIASSEC": "[1:8,1:40]"},
        {"BIASSEC": "[1:8,1:40]", "TRIMSEC": "[9:50,1:40]"},
    ],
)
def test_raw_and_calibration_frames_are_refused(tmp_path: Path, cards: dict[str, str]) -> None:
    """With the keyword that betrays them."""
    path = write(tmp_path / "a.fits", **cards)
    with pytest.raises(RawFrameError, match=rf"{next(iter(cards))} = .*calibrated"):
        read_image(path)
    with pytest.raises(RawFrameError):
        inspect_image(path)


@pytest.mark.parametrize(
    "cards",
    [
        {"IMGTYPE": "object"},
        {"IMAGETYP": "Light Frame"},
        {"OBSTYPE": "science", "PROCTYPE": "InstCal"},
        {"BIASSEC": "[1:8,1:40]", "FLATCOR": "T"},
        {"BIASSEC": "[51:58,1:40]", "TRIMSEC": "[1:50,1:40]"},
        {"BIASSEC": "[1:8,1:40]", "TRIMSEC": "[9:58,1:40]"},
        {"BIASSEC1": "[1:8,1:40]", "TRIMSEC1": "[9:33,1:40]", "TRIMSEC2": "[34:58,1:40]"},
    ],
)
def test_calibrated_images_may_keep_old_keywords(tmp_path: Path, cards: dict[str, str]) -> None:
    """Overscan that was cut off, or a step of the calibration on record, is no reason to refuse."""
    assert read_image(write(tmp_path / "a.fits", **cards)).shape == SHAPE


def test_a_raw_exposure_of_many_ccds_is_refused_as_raw(tmp_path: Path) -> None:
    """Rather than asking for the name of an HDU that would be refused next."""
    path = write_mef(tmp_path / "a.fits", [("N1", sky(), {}), ("N2", sky(), {})], {"PROCTYPE": "raw"})
    with pytest.raises(RawFrameError):
        read_image(path)


@given(
    kind=st.sampled_from(["a.fits", "a.fits.fz", "a.fits.gz"]),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    keep=st.floats(0.5, 1),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_gives_an_image_or_a_read_error(
    tmp_path: Path, kind: str, damage: list[tuple[float, int]], keep: float
) -> None:
    """Flipped bytes and cut ends never look like a bug of ours."""
    path = tmp_path / kind
    if not path.is_file():
        write(path)
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[int(place * len(content))] = value
    (tmp_path / "damaged").mkdir(exist_ok=True)
    (tmp_path / "damaged" / kind).write_bytes(content[: int(keep * len(content))] if keep < 0.9 else content)
    with contextlib.suppress(ReadError):
        assert np.isfinite(read_image(tmp_path / "damaged" / kind).data).all()


# ---- real images


def real(name: str) -> Path:
    folder = os.environ.get("BATCHPROC_TEST_DATA", "")
    path = Path(folder) / "images" / name
    if not folder or not path.is_file():
        pytest.skip(f"no {name}: BATCHPROC_TEST_DATA points to {folder or 'nothing'}")
    return path


@pytest.mark.realdata
def test_real_goto() -> None:
    """GOTO: no gain in the header, and CD beside PC."""
    image = read_image(real("goto/epoch1.fits"))
    assert image.shape == (1850, 1850)
    assert (image.gain, image.read_noise, image.saturation) == (1.0, 5.0, 50000.0)
    assert len(image.meta["assumed"]) == 3
    assert image.zero_point == pytest.approx(27.15, abs=0.01)
    assert image.meta["pixel_scale"] == pytest.approx(1.238, abs=0.003)
    assert (image.meta["profile"], image.meta["filter"], image.meta["ccd"]) == ("goto", "L", "UT2")
    assert image.meta["mjd"] == pytest.approx(58249.9684, abs=1e-4)
    assert (image.mask == MaskBit.SATURATED).sum() == (image.data >= 50000).sum() > 0


@pytest.mark.realdata
def test_real_decam_coadd() -> None:
    """DECam coadd: counts per second whose GAIN needs no exposure time; the mask is in a file of its own."""
    image = read_image(real("decam_coadd/coadd.fits.fz"), mask=str(real("decam_coadd/mask.fits.fz")))
    assert image.shape == (4006, 4106)
    assert image.gain == pytest.approx(52.369, abs=1e-3)
    assert image.saturation / image.gain == pytest.approx(30296.255)
    assert image.zero_point == 30.0
    assert (image.mask == MaskBit.BAD).sum() == 11191
    assert (image.meta["profile"], image.meta["filter"]) == ("decam", "g")
    assert image.meta["pixel_scale"] == pytest.approx(0.263, abs=1e-4)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "gain"), [("DEC-OBS04a", 3.98405), ("DEC-OBS18c", 4.1505)])
def test_real_decam_epochs(name: str, gain: float) -> None:
    """DECam stamps: two amplifiers, TPV, the sky subtracted and taken off the saturation level too."""
    image = read_image(real(f"decam_epochs/{name}.mini.fits"))
    assert image.gain == pytest.approx(gain, abs=1e-4)
    assert image.read_noise == pytest.approx(11.837, abs=1e-3)
    assert 28000 < image.saturation / image.gain < 40000
    assert image.meta["pixel_scale"] == pytest.approx(0.263, abs=2e-3)
    # The Poisson noise of the sky that was there, to some 15 %: the gain is electrons per ADU indeed.
    header_sky = {"DEC-OBS04a": 4124.167, "DEC-OBS18c": 9600.578}[name] * gain
    noise = 1.4826 * np.median(np.abs(image.data - np.median(image.data)))
    assert noise == pytest.approx(np.sqrt(header_sky + image.read_noise**2), rel=0.15)


@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz", "a.fits.fz"])
def test_a_section_is_that_part_of_the_image(tmp_path: Path, name: str) -> None:
    """Pixels, mask and sky positions; a section without data is one, where a whole image would be refused."""
    data = sky(shape=(130, 160))
    data[3, 4], data[:, 100:] = 60000, 0
    area = np.s_[2:60, 1:50]
    path = write(tmp_path / name, data.astype(np.int32))
    whole, part = read_image(path), read_image(path, section=area)
    np.testing.assert_array_equal(part.data, whole.data[area])
    np.testing.assert_array_equal(part.mask, whole.mask[area])
    assert part.mask[1, 3] == MaskBit.SATURATED
    there = whole.wcs.pixel_to_world_values(1, 2)
    np.testing.assert_allclose(part.wcs.pixel_to_world_values(0, 0), there, rtol=0, atol=1e-9)
    empty = read_image(path, section=np.s_[0:130, 101:160])
    assert (empty.mask == MaskBit.NO_DATA).all()
    assert not empty.data.any()


def test_saturation_of_an_amplifier_holds_in_a_section(tmp_path: Path) -> None:
    """Levels that the profile gives for areas of the detector go with the pixels, not with the section's corner."""
    from batchproc.io import images

    calls = []
    path = write(tmp_path / "a.fits")

    def halves(info, *_, **__):
        calls.append(1)
        return images.replace(info.calibration, saturation_sections=[((0, 25, 0, 40), 0.0), ((25, 50, 0, 40), 1e9)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_override", halves)
        whole, part = read_image(path), read_image(path, section=np.s_[10:30, 20:40])
    assert len(calls) == 2
    np.testing.assert_array_equal(part.mask, whole.mask[10:30, 20:40])
    assert 0 < np.count_nonzero(part.mask) < part.mask.size
