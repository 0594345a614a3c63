"""Images: a FITS file, its planes and its instrument profile become an `Exposure` in electrons.

`fitsfile` opens files, `profiles` and `headers` know what headers say, `planes` what masks and variances mean, `wcs`
where the image lies. Here they are put together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ExposureError, ReadError
from batchproc.imaging.psf_model import PsfModel
from batchproc.io.companions import companion_names
from batchproc.io.fitsfile import FitsFile, Hdu, Section, open_fits, split_hdu
from batchproc.io.headers import Calibration, number
from batchproc.io.inspection import ImageInfo, ProfileSource, image_hdus, inspect_image, inspect_open, unknown_unit
from batchproc.io.planes import (
    BLANK_SIDE,
    blank_areas,
    decode_mask,
    decode_variance,
    finish_pixels,
    flag_pixels,
    mask_rule,
)
from batchproc.io.profiles import Profile, list_profiles
from batchproc.io.wcs import pixel_scale_arcsec
from batchproc.records import Exposure, ManifestEntry, MaskBit, PsfLike

__all__ = [
    "ImageInfo",
    "image_hdus",
    "inspect_image",
    "read_image",
    "read_new",
    "read_psf",
    "read_refs",
    "unknown_unit",
]

#: Columns of the manifest that stand in for the header.
OVERRIDES = ("gain", "read_noise", "saturation", "filter", "mjd", "exposure_id", "ccd", "survey")


def read_new(entry: ManifestEntry, *, profile: ProfileSource = None) -> Exposure:
    """Read the new image of a manifest entry.

    Parameters
    ----------
    entry : ManifestEntry
        Its columns go before the header. ``gain`` is in electrons per unit of the file, ``saturation`` in units of the
        file, ``read_noise`` in electrons.
    profile : str, Path or Profile, optional
        Default: the one that the column ``survey`` names, else the one that recognises the header.

    Returns
    -------
    Exposure
        In electrons. `Exposure.meta` has ``path``, ``hdu``, ``profile``, ``unit``, ``mjd`` (mid-exposure; NaN where
        unknown), ``filter``, ``exposure_id``, ``ccd``, ``survey`` (empty where unknown), ``exposure_time`` (s),
        ``pixel_scale`` (arcsec), ``assumed`` and ``notes`` (tuples of sentences), and ``variance_has_sources`` (whether
        the variance plane holds the photon noise of sources too; None without a plane).

    Raises
    ------
    ReadError
        With path, HDU, what was found, what was expected, what to do.
    RawFrameError
        The frame is not calibrated.
    """
    given = {name: getattr(entry, name) for name in OVERRIDES if getattr(entry, name) is not None}
    return read_image(
        entry.new,
        mask=entry.new_mask,
        variance=entry.new_variance,
        psf=entry.new_psf,
        profile=profile or _named_profile(entry),
        given=given,
    )


def read_refs(entry: ManifestEntry, *, profile: ProfileSource = None) -> list[Exposure]:
    """Read the reference images of a manifest entry, in its order; see `read_new`.

    The columns ``gain``, ``read_noise`` and ``saturation`` are those of new; for a reference they stand in where its
    own header says nothing.
    """
    fallback = {name: getattr(entry, name) for name in OVERRIDES[:3] if getattr(entry, name) is not None}
    return [
        read_image(
            path,
            mask=_nth(entry.ref_mask, number),
            variance=_nth(entry.ref_variance, number),
            psf=_nth(entry.ref_psf, number),
            profile=profile,
            otherwise=_named_profile(entry),
            fallback=fallback,
        )
        for number, path in enumerate(entry.ref)
    ]


def read_image(
    path: str | Path,
    *,
    mask: str | None = None,
    variance: str | None = None,
    psf: str | None = None,
    profile: ProfileSource = None,
    otherwise: ProfileSource = None,
    given: Mapping[str, Any] | None = None,
    fallback: Mapping[str, Any] | None = None,
    section: Section | None = None,
) -> Exposure:
    """Read one image with its planes.

    Parameters
    ----------
    path : str or Path
        ``image.fits``, ``image.fits[1]`` or ``image.fits[SCI]``; plain, ``.gz`` or ``.fz``.
    mask, variance, psf : str, optional
        Planes in other files; without them, those beside the image in its own file are taken.
    profile : str, Path or Profile, optional
        Default: the one that recognises the header.
    otherwise : str, Path or Profile, optional
        Takes the place of the generic profile where none recognises the header.
    given : mapping, optional
        Values that go before those of the header: see `OVERRIDES`.
    fallback : mapping, optional
        ``gain``, ``read_noise``, ``saturation`` where the header gives none.
    section : (slice, slice), optional
        Only these rows and columns, within the image; one without any good pixel is no error.

    Returns
    -------
    Exposure
        Its WCS is that of the section.
    """
    location, hdu = split_hdu(path)
    with open_fits(location) as file:
        info = inspect_open(file, hdu, profile, otherwise)
        pixels = file.pixels(info.hdu, section)
        mask_plane = _own_plane(file, info, "mask", section) if mask is None else None
        variance_plane = _own_plane(file, info, "variance", section) if variance is None else None
    if mask is not None:
        mask_plane = _separate_plane(mask, info, "mask", section)
    if variance is not None:
        variance_plane = _separate_plane(variance, info, "variance", section)

    calibration = _override(info, given or {}, fallback or {}, has_variance=variance_plane is not None)
    if mask_plane is None:
        bits = np.zeros(pixels.shape, np.uint8)
    else:
        cards = info.cards | mask_plane.cards
        bits = decode_mask(mask_plane.pixels, mask_rule(info.profile.mask, cards), cards)
    gain = calibration.electrons_per_unit
    data, notes = _clean(pixels, bits, info, calibration, section)
    del pixels
    total_variance = None
    if variance_plane is not None:
        total_variance, bad = decode_variance(variance_plane.pixels, variance_plane.meaning, gain)
        bits[bad] |= np.uint8(MaskBit.BAD)
    return Exposure(
        data=data,
        variance=total_variance,
        mask=bits,
        psf=None if psf is None else read_psf(psf),
        gain=gain,
        read_noise=calibration.read_noise,
        saturation=calibration.saturation * gain,
        zero_point=calibration.zero_point,
        wcs=info.wcs if info.wcs is None or section is None else info.wcs.slice(section),
        meta=_meta(info, calibration, given or {}, variance_plane=variance_plane, notes=notes),
    )


def read_psf(path: str | Path) -> PsfLike:
    """Read a PSF: an image stamp, or a PSFEx ``.psf`` file.

    Raises
    ------
    ReadError
        Neither of the two, or a stamp that is no PSF.
    """
    location, hdu = split_hdu(path)
    with open_fits(location) as file:
        for candidate in [file.find(hdu)] if hdu is not None else list(file):
            if candidate.kind == "table" and "POLNAXIS" in candidate.header:
                table = file.table(candidate)
                return _as_psf(file, candidate, lambda c=candidate, t=table: PsfModel.from_psfex(c.header, t))
            if candidate.kind == "image" and candidate.shape:
                stamp = np.asarray(file.pixels(candidate), dtype=np.float64)
                return _as_psf(file, candidate, lambda s=stamp: PsfModel.from_array(s))
        raise file.error(f"HDUs {file.contents()}", "a PSF stamp, or a PSFEx table", do="Name the HDU of the PSF.")


def _as_psf(file: FitsFile, hdu: Hdu, build: Any) -> PsfLike:
    try:
        return build()  # type: ignore[no-any-return]
    except ExposureError as error:
        raise file.error(f"no usable PSF ({error})", "an odd-sized stamp with a positive sum", hdu=hdu.index) from error
    except (KeyError, ValueError) as error:
        raise file.error(f"no usable PSF ({error!r})", "an image stamp or a PSFEx table", hdu=hdu.index) from error


def _named_profile(entry: ManifestEntry) -> str | None:
    return entry.survey if entry.survey in list_profiles() else None


# ---- planes


@dataclass(frozen=True)
class _Plane:
    pixels: NDArray[Any]
    cards: dict[str, Any]
    meaning: str
    has_sources: bool


def _own_plane(file: FitsFile, info: ImageInfo, kind: str, section: Section | None) -> _Plane | None:
    """The plane that sits beside the image: of the same EXTVER, or the next one after it."""
    names = _plane_names(info.profile, kind)
    found = [hdu for hdu in file if hdu.is_image_2d and hdu.name in names and hdu.index != info.hdu.index]
    if len(found) > 1:
        same_version = [hdu for hdu in found if hdu.version == info.hdu.version]
        # Of several kinds (VARIANCE and WEIGHT) the first in the profile's order; of one kind the next in the file.
        order = {name: number for number, name in enumerate(names)}
        found = sorted(same_version or found, key=lambda hdu: (order[hdu.name], hdu.index < info.hdu.index, hdu.index))
    return _load_plane(file, found[0], info, kind, section) if found else None


def _separate_plane(spec: str, info: ImageInfo, kind: str, section: Section | None) -> _Plane:
    """A plane from another file: the HDU named, or the only one, or the one whose EXTNAME or number fits."""
    location, wanted = split_hdu(spec)
    with open_fits(location) as file:
        if wanted is not None:
            return _load_plane(file, file.find(wanted), info, kind, section)
        images = [hdu for hdu in file if hdu.is_image_2d]
        names = _plane_names(info.profile, kind)
        for choice in (
            images if len(images) == 1 else [],
            [hdu for hdu in images if hdu.name in names],
            [hdu for hdu in images if hdu.name == info.hdu.name and hdu.version == info.hdu.version],
            [hdu for hdu in images if hdu.index == info.hdu.index],
        ):
            if len(choice) == 1:
                return _load_plane(file, choice[0], info, kind, section)
        raise file.error(f"HDUs {file.contents()}", f"one {kind} plane", do=f"Name its HDU, as in {spec}[1].")


def _plane_names(profile: Profile, kind: str) -> list[str]:
    extensions = profile.extensions
    return extensions.mask if kind == "mask" else [*extensions.variance, *extensions.weight, *extensions.sigma]


def _load_plane(file: FitsFile, hdu: Hdu, info: ImageInfo, kind: str, section: Section | None) -> _Plane:
    file.require_image(hdu)
    if hdu.shape != info.hdu.shape:
        found, expected = (f"{shape[1]} x {shape[0]} pixels" for shape in (hdu.shape, info.hdu.shape))
        do = "Give the plane that belongs to this image."
        raise file.error(
            f"a {kind} plane of {found}", f"{expected}, as {info.path}[{info.hdu.index}]", hdu=hdu.index, do=do
        )
    extensions = info.profile.extensions
    meaning, has_sources = info.profile.variance.meaning, info.profile.variance.has_sources
    for name in ("weight", "sigma"):
        if file.path.name in companion_names(Path(info.path).name, info.profile.companions, name):
            # Maps of SWarp and SExtractor, which tell of the sky alone.
            meaning, has_sources = name, False
    for name, names in (("variance", extensions.variance), ("weight", extensions.weight), ("sigma", extensions.sigma)):
        meaning = name if hdu.name in names else meaning
    return _Plane(file.pixels(hdu, section), hdu.cards, meaning, has_sources)


# ---- numbers


def _override(
    info: ImageInfo, given: Mapping[str, Any], fallback: Mapping[str, Any], *, has_variance: bool
) -> Calibration:
    """Put the manifest's numbers in, and make sure that there is a gain."""
    now = info.calibration
    values = {"gain": now.electrons_per_unit, "read_noise": now.read_noise, "saturation": now.saturation}
    unknown = {
        "gain": math.isnan(values["gain"]),
        "read_noise": now.read_noise == 0,
        "saturation": math.isinf(now.saturation),
    }
    sections, assumed = now.saturation_sections, dict(now.assumed)
    for name in values:
        if name in given:
            values[name] = float(given[name])
            assumed.pop(name, None)
            sections = [] if name == "saturation" else sections
        elif name in fallback and (name in assumed or unknown[name]):
            values[name] = float(fallback[name])
            assumed[name] = f"{name} = {values[name]:g} (the manifest's, given for new)"
    if math.isnan(values["gain"]):
        if not has_variance:
            raise unknown_unit(info)
        values["gain"] = 1.0
        assumed["gain"] = f"gain = 1 (unit {now.unit!r} is not in electrons; the variance plane tells the noise)"
    return replace(
        now,
        electrons_per_unit=values["gain"],
        read_noise=values["read_noise"],
        saturation=values["saturation"],
        saturation_sections=sections,
        assumed=assumed,
    )


def _clean(
    pixels: NDArray[Any], bits: NDArray[np.uint8], info: ImageInfo, calibration: Calibration, section: Section | None
) -> tuple[NDArray[np.float32], list[str]]:
    """Pixels as float32 in electrons, and remarks; pixels that are float32 already are overwritten.

    What is no number, and what lies in an area filled with exact zeros, becomes NO_DATA in `bits` and holds the median
    instead; what is saturated becomes SATURATED. A whole image without any pixel of the sky is refused.
    """
    with np.errstate(all="ignore"):
        data = np.require(pixels, np.float32, ["C", "W"])
    n_bad, n_zeros, lowest, highest = flag_pixels(data, bits)
    blank = blank_areas(data) if n_zeros >= BLANK_SIDE**2 else None
    notes = []
    if blank is not None and (section is not None or not blank.all()):
        found_now = np.count_nonzero(blank & ((bits & MaskBit.NO_DATA) == 0))
        if found_now:
            notes = [f"{found_now} pixels in areas of exact zeros were taken for pixels without data"]
        bits[blank] |= np.uint8(MaskBit.NO_DATA)
        data[blank] = np.nan
        n_bad, _, lowest, highest = flag_pixels(data, bits)
    if section is None and not lowest < highest:
        n_good = bits.size - np.count_nonzero(bits & MaskBit.NO_DATA)
        found = f"no finite pixel{' but zeros' * bool(notes)}" if n_good == 0 else f"{lowest:g} in every pixel"
        raise ReadError(
            f"{info.path}[{info.hdu.index}]: {found}; expected an image of the sky. Look at the file: make it again, "
            f"or take its row out of the manifest.",
            path=info.path,
            hdu=info.hdu.index,
            found=found,
            expected="an image of the sky",
        )
    fill = np.float32(0)
    if n_bad and lowest <= highest:
        good = data[(bits & MaskBit.NO_DATA) == 0]
        fill = np.float32(np.median(good[:: max(1, good.size // 100_000)]))
    top, left = (0, 0) if section is None else (section[0].start, section[1].start)
    for (x0, x1, y0, y1), level in calibration.saturation_sections:
        x0, x1, y0, y1 = max(x0 - left, 0), max(x1 - left, 0), max(y0 - top, 0), max(y1 - top, 0)
        bits[y0:y1, x0:x1][data[y0:y1, x0:x1] >= level] |= np.uint8(MaskBit.SATURATED)
    saturation = np.inf if calibration.saturation_sections else calibration.saturation
    finish_pixels(data, bits, fill, np.float32(saturation), np.float32(calibration.electrons_per_unit))
    return data, notes


def _meta(
    info: ImageInfo,
    calibration: Calibration,
    given: Mapping[str, Any],
    *,
    variance_plane: _Plane | None,
    notes: list[str],
) -> dict[str, Any]:
    scale = pixel_scale_arcsec(info.wcs) if info.wcs is not None else number(info.cards, info.profile.pixel_scale)
    return {
        "path": info.path,
        "hdu": info.hdu.label,
        "profile": info.profile.name,
        "unit": calibration.unit,
        "mjd": float(given.get("mjd", info.mjd)),
        **{name: str(given.get(name, value)) for name, value in info.texts.items()},
        "exposure_time": calibration.exposure_time,
        "pixel_scale": scale,
        "assumed": tuple(calibration.assumed.values()),
        "notes": (*info.notes, *notes),
        "variance_has_sources": variance_plane.has_sources if variance_plane is not None else None,
    }


def _nth(paths: tuple[str, ...], number: int) -> str | None:
    return (paths[number] or None) if number < len(paths) else None
