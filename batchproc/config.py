"""Settings: one frozen dataclass a stage, checked once when built, read from and written to TOML.

>>> config = Config.from_dict({"detect": {"threshold": 6.0}})
>>> config.detect.threshold
6.0

Every key is optional. An unknown key, a changed type or a value out of range is a `ConfigError` that says what is
allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from batchproc.errors import ConfigError

__all__ = [
    "AlignConfig",
    "BackgroundConfig",
    "ClassifyConfig",
    "Config",
    "CutoutConfig",
    "DetectConfig",
    "PsfConfig",
    "SubtractConfig",
    "read_toml",
    "settings_from",
]


@dataclass(frozen=True)
class BackgroundConfig:
    """Sky and noise, by a mesh of cells."""

    mesh_size: int = 64
    """Side of a mesh cell in pixels; the cell must be large against the stars and small against the sky's structure."""
    filter_size: int = 3
    """Cells of the median filter over the mesh."""

    def __post_init__(self) -> None:
        _require(self.mesh_size >= 8, self, "mesh_size", "at least 8")
        _require(self.filter_size >= 1, self, "filter_size", "at least 1")


@dataclass(frozen=True)
class AlignConfig:
    """Bringing the reference onto the grid of new."""

    kernel_order: int = 3
    """Lanczos order a: 2, 3 or 4."""
    match_radius_pix: float = 4.0
    """Stars of the two images are the same within this distance after the WCS has been applied."""
    min_matches: int = 8
    """Fewer matched stars than this is an error, unless the WCS is good and at least three agree that are most of the
    stars there are (then a constant shift is all that is corrected)."""
    max_rms_pix: float = 0.5
    """A larger scatter of the matched stars means that the WCS is wrong: star patterns take over."""
    refine: bool = True
    """Correct the residual registration where it is significant."""

    def __post_init__(self) -> None:
        _require(self.kernel_order in (2, 3, 4), self, "kernel_order", "2, 3 or 4")
        _require(self.match_radius_pix > 0, self, "match_radius_pix", "positive")
        _require(self.min_matches >= 3, self, "min_matches", "at least 3")


@dataclass(frozen=True)
class PsfConfig:
    """The empirical PSF."""

    min_stars: int = 5
    """Fewer usable stars than this is an error unless a PSF is given."""
    min_stars_varying: int = 60
    """Fewer than this: a constant PSF."""
    max_stars: int = 400
    """The best so many are used."""
    max_degree: int = 2
    """Highest degree of the polynomial in (x, y) by which the PSF varies."""
    snr_min: float = 20.0
    """Stars fainter than this are left out."""
    size_fwhm: float = 8.0
    """Side of the PSF stamp in units of the FWHM (made odd, 15 to 81 pixels)."""

    def __post_init__(self) -> None:
        _require(self.min_stars >= 1, self, "min_stars", "at least 1")
        _require(0 <= self.max_degree <= 4, self, "max_degree", "0 to 4")


@dataclass(frozen=True)
class SubtractConfig:
    """ZOGY."""

    tile: int = 1024
    """Largest side of the Fourier tiles in pixels, border included: 256, 512, 1024 or 2048; each has its own PSF."""
    renormalise: bool = True
    """Divide S_corr by its measured width on blank sky; the factor is in the receipt."""
    source_noise: bool = True
    """Count the photon noise of sources (otherwise S_corr is S over its blank-sky width)."""
    star_residuals: bool = True
    """Measure how well bright stars subtract, and count the misfit of the PSF model as noise."""

    def __post_init__(self) -> None:
        _require(self.tile in (256, 512, 1024, 2048), self, "tile", "256, 512, 1024 or 2048")


@dataclass(frozen=True)
class DetectConfig:
    """Detection on S_corr."""

    threshold: float = 5.0
    """In sigma, both signs."""
    max_candidates: int = 20000
    """More than this in one image is a failed subtraction, not a discovery: an error."""

    def __post_init__(self) -> None:
        _require(self.threshold > 0, self, "threshold", "positive")
        _require(self.max_candidates > 0, self, "max_candidates", "positive")


@dataclass(frozen=True)
class CutoutConfig:
    """Stamps."""

    size: int = 63
    """Side in pixels, odd."""
    noise_fraction: float = 0.0625
    """Stamps are rounded to a power of two not larger than this fraction of the sky noise, so that they compress."""

    def __post_init__(self) -> None:
        _require(self.size % 2 == 1 and 9 <= self.size <= 255, self, "size", "odd, 9 to 255")
        _require(0 <= self.noise_fraction <= 0.5, self, "noise_fraction", "0 (exact) to 0.5")


@dataclass(frozen=True)
class ClassifyConfig:
    """Real or bogus."""

    model: str = "realbogus"
    """A bundled or added model, or the path of one; empty for none. The report ranks by it."""
    more_models: tuple[str, ...] = ()
    """Further models that score in the same pass over the stamps; each has columns of its own."""
    batch: int = 256
    """Stamps to a call of the model."""
    device: str = "cpu"
    """What runs the model: ``cpu``, ``gpu`` or ``edgetpu``. Scoring goes to the workers that offer it as a Dask
    resource (``GPU``, ``EDGETPU``)."""

    def __post_init__(self) -> None:
        _require(self.batch >= 1, self, "batch", "at least 1")
        _require(len(set(self.models)) == len(self.models), self, "more_models", "each once, and not `model` again")
        _require(all(self.more_models), self, "more_models", "names or paths")
        _require(self.device in ("cpu", "gpu", "edgetpu"), self, "device", "cpu, gpu or edgetpu")

    @property
    def models(self) -> tuple[str, ...]:
        """All that score, the one that the report ranks by first."""
        return (self.model, *self.more_models) if self.model else self.more_models


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    psf: PsfConfig = field(default_factory=PsfConfig)
    subtract: SubtractConfig = field(default_factory=SubtractConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    cutouts: CutoutConfig = field(default_factory=CutoutConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    threads: int = 1
    """Threads of each worker process, for every library alike."""
    spread: str = "auto"
    """What the workers share out: ``images`` (one a task), the ``tiles`` of each image (a large one is done sooner), or
    ``auto``: tiles where there are fewer images than workers, and large ones. The results are the same."""
    time_limit: float = 1800.0
    """Seconds that one image may take. One that takes longer twice, at last alone, is a failure; 0: no limit."""

    def __post_init__(self) -> None:
        _require(self.threads >= 1, self, "threads", "at least 1")
        _require(self.spread in ("auto", "images", "tiles"), self, "spread", "auto, images or tiles")
        _require(self.time_limit >= 0, self, "time_limit", "positive, or 0 for none")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from nested dictionaries; raises `ConfigError` on an unknown key, type or value."""
        return settings_from(cls, values)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Read a TOML file; raises `ConfigError`."""
        values = read_toml(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries that `from_dict` takes back."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The effective configuration as TOML."""
        values = self.to_dict()
        # Bare values must come before the tables in TOML.
        return tomli_w.dumps(dict(sorted(values.items(), key=lambda item: isinstance(item[1], dict))))

    @property
    def digest(self) -> str:
        """Short hash of every setting that decides what comes out: all but those that say how it is computed."""
        return _digest(self.to_dict(), without=_HOW)

    @property
    def image_digest(self) -> str:
        """Short hash of what decides the rows and stamps of an image: all of `digest` but the model's."""
        return _digest(self.to_dict(), without=(*_HOW, "classify"))


#: Settings that say how something is computed, not what.
_HOW = ("threads", "spread", "time_limit", "classify.device")


def _digest(values: Mapping[str, Any], without: Collection[str]) -> str:
    kept = {key: value for key, value in values.items() if key not in without}
    for key, table in kept.items():
        if isinstance(table, dict):
            kept[key] = {name: value for name, value in table.items() if f"{key}.{name}" not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _require(condition: bool, owner: object, key: str, wanted: str) -> None:
    if not condition:
        table = type(owner).__name__.removesuffix("Config").lower()
        name = f"{table}.{key}" if table else key
        raise ConfigError(f"{name} = {getattr(owner, key)!r}: must be {wanted}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file says; raises `ConfigError`."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def settings_from(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a dataclass all of whose fields have defaults, which give the types; raises `ConfigError`."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key {name}; {hint}")
        default = getattr(cls(), key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: expected a table, found {type(value).__name__}")
            value = settings_from(type(default), value, f"{name}.")
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif isinstance(default, tuple):
            if not (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
                raise ConfigError(f"{name} = {value!r}: expected a list of strings")
            value = tuple(value)
        elif type(value) is not type(default):
            raise ConfigError(f"{name} = {value!r}: expected {type(default).__name__}, found {type(value).__name__}")
        arguments[key] = value
    return cls(**arguments)
