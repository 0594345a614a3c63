"""What the headers of an image say, its pixels not read: which HDU it is, its instrument, calibration and place.

A driver that plans a run imports this, and none of what pixels need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchproc.errors import RawFrameError, ReadError
from batchproc.io.fitsfile import FitsFile, Hdu, open_fits, split_hdu
from batchproc.io.headers import Calibration, calibrate, measured_time, raw_reason, text
from batchproc.io.profiles import Profile, load_profile
from batchproc.io.wcs import celestial_wcs

__all__ = ["ImageInfo", "ProfileSource", "image_hdus", "inspect_image", "inspect_open", "unknown_unit"]

#: The name of a profile, the path of one, or one; None: the one that recognises the header.
ProfileSource = str | Path | Profile | None


@dataclass(frozen=True)
class ImageInfo:
    """What the headers say of an image, its pixels not read.

    Attributes
    ----------
    path : str
    hdu : Hdu
    profile : Profile
    calibration : Calibration
    wcs : astropy.wcs.WCS or None
    mjd : float
    texts : dict
        ``filter``, ``exposure_id``, ``ccd``, ``survey``; empty where unknown.
    cards : dict
        Keywords and values, the primary header's included.
    notes : list of str
        Remarks on the WCS.
    """

    path: str
    hdu: Hdu
    profile: Profile
    calibration: Calibration
    wcs: Any
    mjd: float
    texts: dict[str, str]
    cards: dict[str, Any]
    notes: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.hdu.shape[0], self.hdu.shape[1]


def inspect_image(path: str | Path, *, profile: ProfileSource = None, otherwise: ProfileSource = None) -> ImageInfo:
    """Read the headers of an image only; raises the errors that `read_image` would raise on them."""
    location, hdu = split_hdu(path)
    with open_fits(location) as file:
        return inspect_open(file, hdu, profile, otherwise)


def image_hdus(path: str | Path) -> list[str]:
    """The images of a file as ``path[hdu]``: one for each CCD of a multi-extension file, the bare path if only one."""
    location, hdu = split_hdu(path)
    if hdu is not None:
        return [str(path)]
    with open_fits(location) as file:
        candidates = _candidates(file, _choose_profile(_first_cards(file), None, None))
        names = [candidate.name for candidate in candidates]
        if len(candidates) < 2:
            return [str(path)]
        unique = all(names) and len(set(names)) == len(names)
        return [f"{path}[{c.name if unique else c.index}]" for c in candidates]


def unknown_unit(info: ImageInfo) -> ReadError:
    """The error of an image whose unit cannot be turned into electrons."""
    unit, profile = info.calibration.unit, info.profile.name
    rule = info.profile.unit.electrons.get("".join(unit.split()).lower(), "")
    found = f"pixels in {unit!r}" + (" and no exposure time" if "exptime" in rule else "")
    expected = f"a unit that the profile {profile} can turn into electrons"
    return ReadError(
        f"{info.path}[{info.hdu.index}]: {found}; expected {expected}. "
        f"Give the gain (electrons per unit of the file) in the manifest's column gain, or a variance plane, or the "
        f"unit in [unit.electrons] of a profile of your own.",
        path=info.path,
        hdu=info.hdu.index,
        found=found,
        expected=expected,
        profile=profile,
    )


def inspect_open(file: FitsFile, hdu: int | str | None, profile: ProfileSource, otherwise: ProfileSource) -> ImageInfo:
    """`inspect_image` for a file that is open already."""
    if hdu is None:
        target = _choose_image(file, _choose_profile(_first_cards(file), profile, otherwise))
    else:
        target = file.find(hdu)
        file.require_image(target)
    cards = file[0].cards | target.cards
    chosen = _choose_profile(cards, profile, otherwise)
    _refuse_raw(file, target, cards, chosen)
    shape = (target.shape[0], target.shape[1])
    calibration = calibrate(cards, chosen, shape)
    wcs, note = celestial_wcs(target.header, shape)
    texts = {name: text(cards, getattr(chosen, name)) or "" for name in ("filter", "exposure_id", "ccd", "survey")}
    mjd = measured_time(cards, chosen.time, calibration.exposure_time)
    return ImageInfo(str(file.path), target, chosen, calibration, wcs, mjd, texts, cards, [note] if note else [])


def _first_cards(file: FitsFile) -> dict[str, Any]:
    """Cards of the primary HDU and of the first image, by which a profile is recognised."""
    image = next((hdu for hdu in file if hdu.is_image_2d), file[0])
    return file[0].cards | image.cards


def _choose_profile(cards: Mapping[str, Any], profile: ProfileSource, otherwise: ProfileSource) -> Profile:
    if profile is not None:
        return load_profile(profile)
    found = load_profile(cards)
    if otherwise is None:
        return found
    named = load_profile(otherwise)
    return named if found.name == "generic" or not named.match or named.recognises(cards) else found


def _candidates(file: FitsFile, profile: Profile) -> list[Hdu]:
    """The HDUs that may be meant by the file's bare path."""
    images = [hdu for hdu in file if hdu.is_image_2d and hdu.name not in profile.extensions.planes]
    return [hdu for hdu in images if hdu.name in profile.extensions.image] or images


def _choose_image(file: FitsFile, profile: Profile) -> Hdu:
    candidates = _candidates(file, profile)
    if len(candidates) == 1:
        file.require_image(candidates[0])
        return candidates[0]
    if not candidates:
        for hdu in file:  # one with pixels, but not of two dimensions, deserves its own words
            if hdu.kind == "image" and hdu.shape and not hdu.is_image_2d:
                file.require_image(hdu)
        raise file.error(f"HDUs {file.contents()}", "a 2-D image in one of them", do="Name an HDU, as in path[1].")
    for hdu in candidates[:1]:
        _refuse_raw(file, hdu, file[0].cards | hdu.cards, profile)
    raise file.error(
        f"{len(candidates)} images in HDUs {', '.join(hdu.label for hdu in candidates)}",
        "one, or the HDU named",
        do=f"Write {file.path}[{candidates[0].name or candidates[0].index}], say; one row of the manifest for each.",
    )


def _refuse_raw(file: FitsFile, hdu: Hdu, cards: Mapping[str, Any], profile: Profile) -> None:
    reason = raw_reason(cards, profile, (hdu.shape[0], hdu.shape[1]))
    if reason is None:
        return
    raise RawFrameError(
        f"{file.path}[{hdu.index}]: not a calibrated image: {reason}. Subtract calibrated images (bias, flat field); "
        f"if this is one, say so in a profile of your own: [raw] of {profile.name}.toml has the tests.",
        path=str(file.path),
        hdu=hdu.index,
        found=reason,
        expected="a calibrated image",
        profile=profile.name,
    )
