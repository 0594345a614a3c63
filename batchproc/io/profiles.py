"""Instrument profiles: what the headers and planes of a survey mean, as data.

A profile is a TOML file. Those of `batchproc/instruments` come with the package; one's own live in the folder that
``BATCHPROC_INSTRUMENTS`` names (else ``~/.config/batchproc/instruments``) or anywhere, given by path. What a profile
does not say is taken from ``generic.toml``, where every table is explained. This module finds, merges and checks
profiles; `headers` and `planes` apply them.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from batchproc.errors import ConfigError

__all__ = ["Lookup", "MaskRule", "Profile", "RawTests", "VariancePlanes", "list_profiles", "load_profile"]

BUNDLED = Path(__file__).resolve().parent.parent / "instruments"

#: Conditions on a header: keyword → regular expression (searched, case ignored; empty: the keyword is there).
Condition = dict[str, str]


@dataclass(frozen=True)
class Lookup:
    """Where a quantity is found.

    Attributes
    ----------
    keys : list
        Header keywords in order of preference; the first usable value counts. A list inside the list is one candidate
        made of several keywords: amplifiers for a number, parts joined by ``_`` for a text.
    default : float, str or None
        Used where no keyword gives a value; noted in ``meta["assumed"]``.
    pattern : str
        For texts: regular expression whose first group is the value.
    subtract : list of str
        For the saturation: keyword of a sky level that was subtracted from the image and is taken off here too.
    per_second : bool
        For the zero point: it holds for one unit per second, while the image has whole exposures.
    """

    keys: list[Any] = field(default_factory=list)
    default: Any = None
    pattern: str = ""
    subtract: list[str] = field(default_factory=list)
    per_second: bool = False

    def __post_init__(self) -> None:
        for key in self.keys:
            parts = key if isinstance(key, list) else [key]
            if not parts or not all(isinstance(part, str) for part in parts):
                raise ConfigError(f"keys = {self.keys!r}: expected keywords, or lists of keywords")


@dataclass(frozen=True)
class Times:
    """Keywords of the time: of mid-exposure, or of its start (half the exposure time is added).

    Dates are MJD, JD or ISO 8601, UTC; a list inside the list is a date and a time of day.
    """

    mid: list[Any] = field(default_factory=list)
    start: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Extensions:
    """EXTNAMEs of the planes that may live in the file of the image."""

    image: list[str] = field(default_factory=list)
    mask: list[str] = field(default_factory=list)
    variance: list[str] = field(default_factory=list)
    weight: list[str] = field(default_factory=list)
    sigma: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    @property
    def planes(self) -> set[str]:
        """Every name that is not the image's."""
        return {*self.mask, *self.variance, *self.weight, *self.sigma, *self.other}


@dataclass(frozen=True)
class Companions:
    """File names of the planes: pairs of what stands in the name of the image and what stands there instead.

    An empty first text stands for the end of the name, before ``.fits`` and the like.
    """

    mask: list[Any] = field(default_factory=list)
    variance: list[Any] = field(default_factory=list)
    weight: list[Any] = field(default_factory=list)
    sigma: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pair in (*self.mask, *self.variance, *self.weight, *self.sigma):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
                raise ConfigError(f'companions: {pair!r}: expected a pair of texts, as in ["sciimg", "mskimg"]')


@dataclass(frozen=True)
class Unit:
    """What the pixel values are.

    Attributes
    ----------
    keys : list of str
    default : str
        Where no keyword tells.
    electrons : dict
        Electrons per file unit, by the unit in lower case without blanks: ``"1"``, ``"gain"``, ``"exptime"`` or
        ``"gain*exptime"``.
    """

    keys: list[str] = field(default_factory=list)
    default: str = ""
    electrons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit, rule in self.electrons.items():
            if rule not in ("1", "gain", "exptime", "gain*exptime"):
                raise ConfigError(f'unit.electrons.{unit} = {rule!r}: must be "1", "gain", "exptime" or "gain*exptime"')


@dataclass(frozen=True)
class MaskRule:
    """What the values of a mask plane mean.

    Attributes
    ----------
    when : dict
        Conditions on the headers of mask and image; the first rule whose conditions all hold counts.
    kind : {"nonzero", "bits", "values"}
        Every non-zero pixel is bad; or the lists name bits (0 is the lowest); or they name whole values.
    bad, saturated, no_data, cosmic_ray : list
        Bits or values. A text is the keyword of the mask's header that holds the number (``MP_SAT``).
    """

    when: Condition = field(default_factory=dict)
    kind: str = "nonzero"
    bad: list[Any] = field(default_factory=list)
    saturated: list[Any] = field(default_factory=list)
    no_data: list[Any] = field(default_factory=list)
    cosmic_ray: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in ("nonzero", "bits", "values"):
            raise ConfigError(f'mask.kind = {self.kind!r}: must be "nonzero", "bits" or "values"')


@dataclass(frozen=True)
class VariancePlanes:
    """Variance planes and weight maps.

    Attributes
    ----------
    meaning : {"variance", "weight", "sigma"}
        Of a separate file whose EXTNAME does not tell: file units², 1/variance, or rms.
    has_sources : bool
        Whether the photon noise of sources is in it, not that of the sky alone.
    """

    meaning: str = "variance"
    has_sources: bool = True

    def __post_init__(self) -> None:
        if self.meaning not in ("variance", "weight", "sigma"):
            raise ConfigError(f'variance.meaning = {self.meaning!r}: must be "variance", "weight" or "sigma"')


@dataclass(frozen=True)
class RawTests:
    """How raw and calibration frames betray themselves.

    Attributes
    ----------
    frame_types : dict
        Conditions, one of which is enough: bias, dark, flat and the like, processed or not.
    unprocessed : dict
        Conditions, one of which is enough: the header itself says raw.
    overscan, trimmed : list of str
        Keywords (``*`` stands for anything) of overscan and of data sections. Overscan that lies inside the image,
        while the image is not of the trimmed size, means a raw frame, unless
    processed : list of str
        one of these keywords says that a step of the calibration was done.
    """

    frame_types: Condition = field(default_factory=dict)
    unprocessed: Condition = field(default_factory=dict)
    overscan: list[str] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)
    processed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Profile:
    """One instrument. See ``batchproc/instruments/generic.toml`` for each table."""

    name: str
    description: str = ""
    match: list[Condition] = field(default_factory=list)
    extensions: Extensions = field(default_factory=Extensions)
    companions: Companions = field(default_factory=Companions)
    unit: Unit = field(default_factory=Unit)
    gain: Lookup = field(default_factory=Lookup)
    read_noise: Lookup = field(default_factory=Lookup)
    saturation: Lookup = field(default_factory=Lookup)
    amplifiers: list[str] = field(default_factory=list)
    zero_point: Lookup = field(default_factory=Lookup)
    exposure_time: Lookup = field(default_factory=Lookup)
    pixel_scale: Lookup = field(default_factory=Lookup)
    time: Times = field(default_factory=Times)
    filter: Lookup = field(default_factory=Lookup)
    exposure_id: Lookup = field(default_factory=Lookup)
    ccd: Lookup = field(default_factory=Lookup)
    survey: Lookup = field(default_factory=Lookup)
    mask: list[MaskRule] = field(default_factory=list)
    variance: VariancePlanes = field(default_factory=VariancePlanes)
    raw: RawTests = field(default_factory=RawTests)

    def recognises(self, cards: Mapping[str, Any]) -> bool:
        """Whether one of the ``[[match]]`` tables fits this header."""
        return any(holds(condition, cards) for condition in self.match)


def holds(condition: Mapping[str, str], cards: Mapping[str, Any]) -> bool:
    """Whether every keyword is there and its value matches; an empty condition holds."""
    return all(
        key in cards and re.search(pattern, str(cards[key]), re.IGNORECASE) for key, pattern in condition.items()
    )


def load_profile(source: str | Path | Mapping[str, Any] | Profile | None) -> Profile:
    """Get a profile by name, by path, or by what a header looks like.

    Parameters
    ----------
    source : str, Path, mapping, Profile or None
        A name (``"ztf"``), the path of a TOML file, the header of an image, a profile (handed back), or None (generic).

    Raises
    ------
    ConfigError
        No such profile, or one with unknown keys or wrong types.
    """
    if isinstance(source, Profile):
        return source
    if source is None:
        return load_profile("generic")
    if isinstance(source, str | Path):
        if str(source).endswith(".toml"):
            return _load(Path(source).expanduser(), _mtime(Path(source).expanduser()))
        known = list_profiles()
        if str(source) in known:
            return _load(known[str(source)], _mtime(known[str(source)]))
        close = difflib.get_close_matches(str(source), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
        raise ConfigError(f"no instrument profile {source!r}; {hint}; or give the path of a .toml file")
    profiles = (load_profile(name) for name in list_profiles() if name != "generic")
    return next((profile for profile in profiles if profile.recognises(source)), load_profile("generic"))


def list_profiles() -> dict[str, Path]:
    """Names and files of the profiles at hand; one's own come first and hide bundled ones of the same name."""
    default = Path("~/.config/batchproc/instruments").expanduser()
    own = Path(os.environ.get("BATCHPROC_INSTRUMENTS") or default).expanduser()
    found: dict[str, Path] = {}
    for folder in (own, BUNDLED):
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            found.setdefault(path.stem, path)
    return found


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"instrument profile {path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=64)
def _load(path: Path, mtime: int) -> Profile:
    generic = BUNDLED / "generic.toml"
    values = _read_toml(path)
    if path != generic:
        base = {key: value for key, value in _read_toml(generic).items() if key not in ("name", "description", "match")}
        values = _merge(base, values)
    if values.setdefault("name", path.stem) != path.stem:
        raise ConfigError(
            f"instrument profile {path}: name = {values['name']!r}: must be that of the file, {path.stem!r}"
        )
    try:
        return _build(Profile, values, "")  # type: ignore[no-any-return]
    except ConfigError as error:
        raise ConfigError(f"instrument profile {path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"instrument profile {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"instrument profile {path}: not valid TOML: {error}") from error
    if isinstance(values.get("match"), dict):  # one table, or several alternatives
        values["match"] = [values["match"]]
    return values


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key; anything else replaces what was there."""
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: expected a table, found {type(values).__name__}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown key {name}; "
                + (f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}")
            )
        default = cls(**({"name": ""} if cls is Profile else {}))
        arguments[key] = _convert(getattr(default, key), value, name)
    return cls(**arguments)


def _convert(default: Any, value: Any, name: str) -> Any:
    if name == "mask" and isinstance(value, list):
        return [_build(MaskRule, rule, f"mask[{number}].") for number, rule in enumerate(value)]
    if dataclasses.is_dataclass(default):
        return _build(type(default), value, f"{name}.")
    if default is not None and type(value) is not type(default):
        raise ConfigError(f"{name} = {value!r}: expected {type(default).__name__}, found {type(value).__name__}")
    if isinstance(value, dict) or name == "match":
        for condition in value if isinstance(value, list) else [value]:
            _check_patterns(condition, name)
    if name.endswith(".pattern"):
        _check_patterns({name: value}, name)
    return value


def _check_patterns(condition: Any, name: str) -> None:
    if not isinstance(condition, dict) or not all(isinstance(pattern, str) for pattern in condition.values()):
        raise ConfigError(f'{name} = {condition!r}: expected a table of keyword = "pattern"')
    for key, pattern in condition.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{name}.{key} = {pattern!r}: not a regular expression ({error})") from None
