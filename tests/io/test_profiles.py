"""Instrument profiles: data, found by name, path or header, checked like any configuration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import ConfigError
from batchproc.io.headers import amplifier_sections, calibrate, measured_time, number, raw_reason, text
from batchproc.io.images import inspect_image, read_image, read_new, read_refs
from batchproc.io.planes import decode_mask, mask_rule
from batchproc.io.profiles import Lookup, Times, list_profiles, load_profile
from batchproc.records import ManifestEntry, MaskBit
from tests.io.fitsfiles import SHAPE, write

ZTF = {
    "INSTRUME": "ZTF/MOSAIC", "GAIN": 6.2, "READNOI": 10.2, "SATURATE": 55000.0, "MAGZP": 26.2, "EXPTIME": 30.0,
    "OBSMJD": 58500.25, "FILTER": "ZTF_r", "CCDID": 4, "QID": 3, "EXPID": 81234,
}  # fmt: skip


@pytest.mark.parametrize("name", ["generic", "ztf", "decam", "goto"])
def test_bundled_profiles_load(name: str) -> None:
    """Each bundled file is valid, called as it says, and says what it is."""
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert profile is load_profile(profile)


@pytest.mark.parametrize(
    ("cards", "name"),
    [
        ({"INSTRUME": "ZTF/MOSAIC"}, "ztf"),
        ({"FILTER": "ZTF_g"}, "ztf"),
        ({"INSTRUME": "DECam"}, "decam"),
        ({"FILTER": "g DECam SDSS c0001 4720.0 1520.0"}, "decam"),
        ({"FPA": "DECAM_BKP4"}, "decam"),
        ({"TELESCOP": "GOTO-N"}, "goto"),
        ({"INSTRUME": "WFC3"}, "generic"),
        ({}, "generic"),
    ],
)
def test_headers_are_recognised(cards: dict[str, str], name: str) -> None:
    """By what is typical of each survey; anything else is generic."""
    assert load_profile(cards).name == name


def test_ztf() -> None:
    """ZTF: mid-exposure from the start, filter without prefix, CCD and quadrant, zero point of the whole exposure."""
    profile = load_profile(ZTF)
    result = calibrate(ZTF, profile, SHAPE)
    assert (result.electrons_per_unit, result.read_noise, result.saturation) == (6.2, 10.2, 55000.0)
    assert result.zero_point == 26.2
    assert measured_time(ZTF, profile.time, 30.0) == pytest.approx(58500.25 + 15 / 86400, abs=1e-9)
    assert [text(ZTF, getattr(profile, key)) for key in ("filter", "ccd", "exposure_id", "survey")] == [
        "r", "4_3", "81234", "ztf",
    ]  # fmt: skip
    bits = np.array([[1 << 1, 1 << 11, 1 << 12, 1 << 8, 1 << 10, 1 << 7, 1 << 0, 1 << 9]], np.int32)
    mask = decode_mask(bits, mask_rule(profile.mask, ZTF), ZTF).ravel().tolist()
    assert mask == [0, 0, 0, MaskBit.SATURATED, MaskBit.NO_DATA, MaskBit.COSMIC_RAY, MaskBit.BAD, MaskBit.BAD]


@pytest.mark.parametrize(
    ("cards", "values", "expected"),
    [
        ({"PLVER": "V4.8.2a"}, [1, 3, 5, 7], [MaskBit.BAD, MaskBit.SATURATED, MaskBit.COSMIC_RAY, 0]),
        ({"PLVER": "DES V3.5.0"}, [2, 7], [MaskBit.NO_DATA, 0]),
        ({"PLVER": "V3.2.1"}, [1, 2, 16, 128], [MaskBit.BAD, MaskBit.SATURATED, MaskBit.COSMIC_RAY, 0]),
        ({"PIPELINE": "finalcut"}, [1, 2, 32, 64], [MaskBit.BAD, MaskBit.SATURATED, 0, MaskBit.SATURATED]),
        ({}, [1, 2], [MaskBit.BAD, MaskBit.BAD]),
    ],
)
def test_decam_masks_changed_their_meaning(cards: dict[str, str], values: list[int], expected: list[int]) -> None:
    """Codes since version 3.5 of the Community Pipeline, bits before, other bits of DESDM; what varies stays in."""
    rule = mask_rule(load_profile("decam").mask, cards)
    assert decode_mask(np.array([values]), rule, cards).ravel().tolist() == expected


def test_decam_rates_and_amplifiers() -> None:
    """GAIN of a SWarp coadd in counts/s is per unit; the sky that was subtracted lowers the saturation level."""
    profile = load_profile("decam")
    coadd = {"BUNIT": "COUNTS/S", "GAIN": 52.4, "EXPTIME": 1170.0, "SATURATE": 30296.0}
    assert calibrate(coadd, profile, SHAPE).electrons_per_unit == 52.4
    assert calibrate(coadd, load_profile("generic"), SHAPE).electrons_per_unit == pytest.approx(52.4 * 1170)
    epoch = {"GAINA": 4.0, "GAINB": 4.2, "SATURATA": 46000.0, "SATURATB": 39000.0, "SKYDIP": 9000.0, "RDNOISEA": 6.0}
    result = calibrate(epoch, profile, SHAPE)
    assert (result.electrons_per_unit, result.saturation, result.read_noise) == (pytest.approx(4.1), 30000.0, 6.0)


def test_profile_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the user's folder is found by name and by header, says only what differs, and goes before ours."""
    monkeypatch.setenv("BATCHPROC_INSTRUMENTS", str(tmp_path))
    (tmp_path / "mycam.toml").write_text(
        'description = "mine"\n[match]\nDETECTOR = "^MYCAM$"\n[gain]\nkeys = ["CONAD"]\ndefault = 1.7\n'
        '[[mask]]\nkind = "bits"\nbad = [3]\n'
    )
    (tmp_path / "goto.toml").write_text('[match]\nTELESCOP = "GOTO"\n[gain]\ndefault = 0.9\n')
    assert load_profile("mycam") == load_profile(tmp_path / "mycam.toml")
    assert load_profile({"DETECTOR": "mycam"}).name == "mycam"
    assert load_profile({"TELESCOP": "GOTO-2"}).gain.default == 0.9
    assert {"mycam", "goto", "ztf", "decam", "generic"} <= set(list_profiles())
    image = read_image(write(tmp_path / "a.fits", DETECTOR="MYCAM"))
    assert image.gain == 1.7
    assert image.read_noise == 5.0
    assert image.meta["profile"] == "mycam"
    (tmp_path / "mycam.toml").write_text("[gain]\ndefault = 2.25\n")
    assert load_profile("mycam").gain.default == 2.25


def test_the_survey_column_names_a_profile(tmp_path: Path) -> None:
    """It holds for new; for a reference only where its header is not another survey's."""
    new = write(tmp_path / "new.fits")
    decam = write(tmp_path / "decam.fits", FPA="DECAM_BKP4")
    entry = ManifestEntry("a", str(new), (str(new), str(decam)), survey="ztf")
    assert read_new(entry).meta["profile"] == "ztf"
    assert [ref.meta["profile"] for ref in read_refs(entry)] == ["ztf", "decam"]
    other = ManifestEntry("a", str(new), (str(new),), survey="a survey without a profile")
    assert read_new(other).meta["profile"] == "generic"
    assert read_new(other).meta["survey"] == "a survey without a profile"
    assert read_new(entry, profile="goto").meta["profile"] == "goto"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[gian]\nkeys = []", r"unknown key gian; did you mean gain\?"),
        ('[gain]\nkey = ["GAIN"]', r"unknown key gain.key; did you mean gain.keys\?"),
        ('[gain]\nkeys = "GAIN"', "expected list, found str"),
        ("[gain]\nkeys = [1]", "expected keywords"),
        ("gain = 2.0", "gain: expected a table, found float"),
        ('[match]\nX = "("', r"match.X = '\('.*not a regular expression"),
        ('[unit.electrons]\n"x" = "gian"', "must be"),
        ('[[mask]]\nkind = "bit"', "mask.kind = 'bit'"),
        ('[variance]\nmeaning = "rms"', "variance.meaning = 'rms'"),
        ('[companions]\nmask = ["a"]', "expected a pair"),
        ('name = "good"', "name = 'good': must be that of the file, 'bad'"),
        ("[gain", "not valid TOML"),
    ],
)
def test_a_wrong_profile_says_where(tmp_path: Path, content: str, words: str) -> None:
    """An unknown key, a wrong type or value is an error with the file and the key."""
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_no_such_profile() -> None:
    """The error names what is close, or all there are."""
    with pytest.raises(ConfigError, match=r"did you mean decam\?"):
        load_profile("decan")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile("/nowhere/x.toml")


@pytest.mark.parametrize(
    ("cards", "mjd"),
    [
        ({"MJD-OBS": 60000.0}, 60000.0005),
        ({"MJD-MID": 60000.0, "MJD-OBS": 1.0}, 60000.0),
        ({"JD": 2460000.5}, 60000.0005),
        ({"DATE-OBS": "2023-02-25T00:00:00.000"}, 60000.0005),
        ({"DATE-OBS": "2023-02-25T00:00:00Z"}, 60000.0005),
        ({"DATE-OBS": "2023-02-25", "UT": "12:00:00"}, 60000.5005),
        ({"DATE-OBS": "2023-02-25T12:00:00", "UT": "12:00:00"}, 60000.5005),
        ({"DATE-OBS": "2023-02-25"}, math.nan),
        ({"MJD-OBS": 0.0, "DATE-OBS": "2023-02-25T00:00:00"}, 60000.0005),
        ({"MJD-OBS": "yesterday"}, math.nan),
        ({}, math.nan),
    ],
)
def test_times_in_any_dress(cards: dict[str, object], mjd: float) -> None:
    """MJD, JD, ISO date, date and time apart: mid-exposure in MJD; a bare date is none."""
    found = measured_time(cards, load_profile("generic").time, 86.4)
    assert found == pytest.approx(mjd, abs=1e-8, nan_ok=True)


def test_start_without_an_exposure_time() -> None:
    """The start is the best that there is."""
    assert measured_time({"MJD-OBS": 60000.0}, Times(start=["MJD-OBS"]), math.nan) == 60000.0


@given(values=st.lists(st.one_of(st.floats(0.1, 10), st.just(0.0), st.just(-1.0), st.none()), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_numbers_come_from_the_first_key_that_has_one(values: list[float | None]) -> None:
    """Zero, negative and absent values are passed over."""
    cards = {f"K{number}": value for number, value in enumerate(values) if value is not None}
    usable = [value for value in values if value is not None and value > 0]
    found = number(cards, Lookup(keys=[f"K{n}" for n in range(len(values))]), lambda value: value > 0)
    assert found == (usable[0] if usable else pytest.approx(math.nan, nan_ok=True))
    together = number(cards, Lookup(keys=[[f"K{n}" for n in range(len(values))]]), lambda value: value > 0, max)
    assert together == (max(usable) if usable else pytest.approx(math.nan, nan_ok=True))


@given(cut=st.integers(1, 49), ltv=st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_amplifier_sections_that_tile(cut: int, ltv: int) -> None:
    """Wherever the detector's pixels have gone (LTV), sections that tile the image are found; gaps are not accepted."""
    keys = ["DATASECA", "DATASECB"]
    cards = {
        "DATASECA": f"[{101}:{100 + cut},{101}:{140}]",
        "DATASECB": f"[{101 + cut}:{150},{101}:{140}]",
        "LTV1": -100.0,
        "LTV2": -100.0,
    }
    assert amplifier_sections(cards, keys, SHAPE) == [(0, cut, 0, 40), (cut, 50, 0, 40)]
    moved = amplifier_sections(cards | {"LTV1": -100.0 + ltv}, keys, SHAPE)
    assert bool(moved) == (ltv == 0)


def test_raw_reasons_name_their_keyword() -> None:
    """The reason can be looked up in the header; a calibration on record clears the overscan, but not a bias frame."""
    profile = load_profile("generic")
    overscan = {"BIASSEC": "[1:8,1:40]"}
    assert "BIASSEC" in (raw_reason(overscan, profile, SHAPE) or "")
    assert raw_reason(overscan | {"FLATCOR": "flat.fits"}, profile, SHAPE) is None
    assert "BIASSEC" in (raw_reason(overscan | {"FLATCOR": False}, profile, SHAPE) or "")
    assert "IMGTYPE" in (raw_reason({"IMGTYPE": "BIAS", "FLATCOR": "T"}, profile, SHAPE) or "")


def test_zero_point_of_one_second(tmp_path: Path) -> None:
    """A zero point per second becomes that of the whole exposure."""
    path = tmp_path / "p.toml"
    path.write_text('[zero_point]\nkeys = ["ZP1"]\nper_second = true\n')
    info = inspect_image(write(tmp_path / "a.fits", ZP1=22.0, EXPTIME=100.0), profile=path)
    assert info.calibration.zero_point == pytest.approx(27.0)
