"""What a header says of its image, read through an instrument profile: gain, time, filter, raw or calibrated.

Cards in, plain numbers out. Every value that was not in the header is noted, in words, in ``assumed``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from batchproc.io.profiles import Lookup, Profile, Times

__all__ = ["Calibration", "amplifier_sections", "calibrate", "measured_time", "number", "raw_reason", "text"]

Cards = Mapping[str, Any]
#: x0, x1, y0, y1 in array indices
Section = tuple[int, int, int, int]


@dataclass(frozen=True)
class Calibration:
    """Numbers of one image.

    Attributes
    ----------
    electrons_per_unit : float
        NaN where the unit of the file is unknown.
    read_noise : float
        Electrons; 0 where unknown.
    saturation : float
        File units, the smallest of all amplifiers; inf where unknown.
    saturation_sections : list of (section, level)
        Where each amplifier has its own.
    zero_point : float
        Magnitude of one file unit; NaN where unknown.
    exposure_time : float
        Seconds; NaN where unknown.
    unit : str
        As the file spells it.
    assumed : dict
        ``gain``, ``read_noise``, ``saturation`` → a sentence, where the header did not give them.
    """

    electrons_per_unit: float
    read_noise: float
    saturation: float
    saturation_sections: list[tuple[Section, float]]
    zero_point: float
    exposure_time: float
    unit: str
    assumed: dict[str, str] = field(default_factory=dict)


def calibrate(cards: Cards, profile: Profile, shape: tuple[int, int]) -> Calibration:
    """Read the numbers of an image from its header.

    Parameters
    ----------
    cards : mapping
        Keywords and values, those of the primary header included.
    profile : Profile
    shape : (ny, nx)
    """
    assumed: dict[str, str] = {}
    exposure_time = number(cards, profile.exposure_time, _positive)
    unit = _unit(cards, profile)
    rule = profile.unit.electrons.get(_plain(unit), "")
    gain = _number_or_default("gain", cards, profile, np.mean, 1.0, assumed) if "gain" in rule else 1.0
    factors = {"1": 1.0, "gain": gain, "exptime": exposure_time, "gain*exptime": gain * exposure_time}
    saturation = _number_or_default("saturation", cards, profile, np.min, math.inf, assumed)
    sky = next((_float(cards.get(key)) for key in profile.saturation.subtract if key in cards), 0.0)
    sky = sky if math.isfinite(sky) and sky < saturation else 0.0
    return Calibration(
        electrons_per_unit=factors.get(rule, math.nan),
        read_noise=_number_or_default("read_noise", cards, profile, np.max, 0.0, assumed),
        saturation=saturation - sky,
        saturation_sections=[(where, level - sky) for where, level in _saturation_sections(cards, profile, shape)],
        zero_point=_zero_point(cards, profile, exposure_time),
        exposure_time=exposure_time,
        unit=unit,
        assumed=assumed,
    )


def _number_or_default(
    name: str, cards: Cards, profile: Profile, combine: Any, unknown: float, assumed: dict[str, str]
) -> float:
    lookup: Lookup = getattr(profile, name)
    value = number(cards, lookup, _positive, combine)
    if not math.isnan(value):
        return value
    value = unknown if lookup.default is None else float(lookup.default)
    # That the read noise or the saturation is unknown is no assumption; a gain of 1 is.
    if lookup.default is not None or name == "gain":
        flat = [key for keys in lookup.keys for key in (keys if isinstance(keys, list) else [keys])]
        found = ", ".join(f"{key} = {cards[key]}" for key in flat if key in cards) or f"no {', '.join(flat)}"
        assumed[name] = f"{name} = {value:g} (profile {profile.name}; the header has {found})"
    return value


def _unit(cards: Cards, profile: Profile) -> str:
    return next((str(cards[key]) for key in profile.unit.keys if str(cards.get(key, "")).strip()), profile.unit.default)


def _plain(unit: str) -> str:
    return re.sub(r"\s", "", unit).lower()


def _zero_point(cards: Cards, profile: Profile, exposure_time: float) -> float:
    zero_point = number(cards, profile.zero_point, lambda value: 0 < value < 60)
    if math.isnan(zero_point) and profile.zero_point.default is not None:
        zero_point = float(profile.zero_point.default)
    return zero_point + 2.5 * math.log10(exposure_time) if profile.zero_point.per_second else zero_point


def _saturation_sections(cards: Cards, profile: Profile, shape: tuple[int, int]) -> list[tuple[Section, float]]:
    sections = amplifier_sections(cards, profile.amplifiers, shape)
    for keys in profile.saturation.keys if sections else []:
        levels = [_float(cards.get(key)) for key in keys] if isinstance(keys, list) else []
        if len(levels) == len(sections) and all(level > 0 for level in levels):
            return list(zip(sections, levels, strict=True))
    return []


def number(
    cards: Cards,
    lookup: Lookup,
    valid: Callable[[float], bool] = math.isfinite,
    combine: Callable[[Sequence[float]], float] = np.mean,
) -> float:
    """First valid number among the keywords, amplifiers combined; NaN where there is none."""
    for keys in lookup.keys:
        values = [_float(cards.get(key)) for key in (keys if isinstance(keys, list) else [keys])]
        values = [value for value in values if math.isfinite(value) and valid(value)]
        if values:
            return float(combine(values))
    return math.nan


def text(cards: Cards, lookup: Lookup) -> str | None:
    """First text among the keywords, cut out by the pattern; the default where there is none."""
    for keys in lookup.keys:
        parts = [str(cards.get(key, "")).strip() for key in (keys if isinstance(keys, list) else [keys])]
        if not all(parts):
            continue
        value = "_".join(parts)
        if lookup.pattern:
            match = re.search(lookup.pattern, value, re.IGNORECASE)
            value = (match[1] if match.lastindex else match[0]) if match else value
        return value
    return None if lookup.default is None else str(lookup.default)


def measured_time(cards: Cards, times: Times, exposure_time: float) -> float:
    """MJD (UTC) of mid-exposure; of the start where the exposure time is unknown; NaN where no time is given."""
    for keys in times.mid:
        mjd = _mjd(cards, keys)
        if not math.isnan(mjd):
            return mjd
    for keys in times.start:
        mjd = _mjd(cards, keys)
        if not math.isnan(mjd):
            return mjd + (exposure_time / 2 / 86400 if math.isfinite(exposure_time) else 0.0)
    return math.nan


def _mjd(cards: Cards, keys: Any) -> float:
    values = [cards.get(key) for key in (keys if isinstance(keys, list) else [keys])]
    if any(value in (None, "") for value in values):
        return math.nan
    day = _float(values[0])
    if len(values) == 1 and math.isfinite(day):
        day -= 2400000.5 if day > 2400000 else 0.0
        return day if 15000 < day < 120000 else math.nan  # 1899 to 2187: anything else is not a date
    # A date alone is no time: one would be half a day off and not know it.
    stamp = "T".join(str(value).strip() for value in values).replace(" ", "T")
    if "T" not in stamp or str(values[0]).count("T") + len(values) > 2:
        return math.nan
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return math.nan
    moment = moment.replace(tzinfo=moment.tzinfo or UTC)
    return (moment - datetime(1858, 11, 17, tzinfo=UTC)).total_seconds() / 86400


def raw_reason(cards: Cards, profile: Profile, shape: tuple[int, int]) -> str | None:
    """Why this is a raw or a calibration frame; None where it looks calibrated."""
    tests = profile.raw
    for kind, conditions in (("calibration", tests.frame_types), ("raw", tests.unprocessed)):
        for key, pattern in conditions.items():
            if key in cards and re.search(pattern, str(cards[key]), re.IGNORECASE):
                return f"{key} = {cards[key]!r} marks a {kind} frame"
    if any(_matches(key, tests.processed) and _done(value) for key, value in cards.items()):
        return None
    trimmed = [_section(value) for key, value in cards.items() if _matches(key, tests.trimmed)]
    areas = [_area(section) for section in trimmed if section]
    if sum(areas) == shape[0] * shape[1] or any(section and _size(section) == shape for section in trimmed):
        return None
    for key, value in cards.items():
        section = _section(value) if _matches(key, tests.overscan) else None
        if section and _inside(section, shape):
            return f"{key} = {value!r}: the overscan is still in the image, and no keyword tells of a calibration"
    return None


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _done(value: Any) -> bool:
    return str(value).strip().lower() not in ("", "f", "false", "no", "none", "omit", "perform", "0") and not _section(
        value
    )


def amplifier_sections(cards: Cards, keys: Sequence[str], shape: tuple[int, int]) -> list[Section]:
    """Sections of the amplifiers in array indices, if they tile the image; otherwise none.

    Sections are in the pixels of the detector; LTV and LTM (IRAF) tell where those have gone.
    """
    sections = [_section(cards.get(key)) for key in keys]
    if not sections or any(section is None for section in sections):
        return []
    dx, dy = (v if math.isfinite(v := _float(cards.get(key))) else 0.0 for key in ("LTV1", "LTV2"))
    if any(_float(cards.get(key, 1.0)) != 1.0 for key in ("LTM1_1", "LTM2_2")):
        return []
    ny, nx = shape
    cut = []
    for section in sections:
        x0, x1, y0, y1 = (round(v + d) for v, d in zip(section or (), (dx, dx, dy, dy), strict=True))
        cut.append((max(x0, 0), min(x1, nx), max(y0, 0), min(y1, ny)))
    cover = np.zeros(shape, np.uint8)
    for x0, x1, y0, y1 in cut:
        cover[y0 : max(y1, 0), x0 : max(x1, 0)] += 1
    return cut if bool((cover == 1).all()) else []


def _section(value: Any) -> Section | None:
    """``[x1:x2,y1:y2]`` (1-based, inclusive) in array indices."""
    match = re.fullmatch(r"\[\s*(\d+)\s*:\s*(\d+)\s*,\s*(\d+)\s*:\s*(\d+)\s*\]", str(value).strip())
    if match is None:
        return None
    x1, x2, y1, y2 = (int(group) for group in match.groups())
    return min(x1, x2) - 1, max(x1, x2), min(y1, y2) - 1, max(y1, y2)


def _size(section: Section) -> tuple[int, int]:
    return section[3] - section[2], section[1] - section[0]


def _area(section: Section) -> int:
    return math.prod(_size(section))


def _inside(section: Section, shape: tuple[int, int]) -> bool:
    return section[1] <= shape[1] and section[3] <= shape[0]


def _positive(value: float) -> bool:
    return 1e-30 < value < 1e30  # what single precision can count with


def _float(value: Any) -> float:
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
