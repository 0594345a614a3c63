"""Model cards: what is known of a model, written as ``card.toml`` in its folder."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.learning.inputs import CHANNELS, LAYOUTS, NORMALISATIONS, SCALES, SIGNS, TRUNCATED, to_tensor

__all__ = ["CARD", "LEARNT_FROM", "InputCard", "ModelCard", "check_card", "read_card"]

CARD = "card.toml"
#: Beside it, where that is known: positions and ids of what the model has learnt from.
LEARNT_FROM = "learnt_from.parquet"
#: Files that can be run: by ONNX Runtime, by LiteRT.
SUFFIXES = (".onnx", ".tflite")


@dataclass(frozen=True)
class InputCard:
    """What a model wants to see: the arguments of `batchproc.learning.inputs.to_tensor`, and features.

    A model of features alone has no channels: ``size = 0``, ``normalisation = "none"``, ``channels = []``.
    """

    size: int
    """Side in pixels; 0 for a model of features alone."""
    normalisation: str
    """A name in `batchproc.learning.inputs.NORMALISATIONS`."""
    channels: tuple[str, ...] = CHANNELS
    """Channels in the model's order; none: it takes features alone."""
    layout: str = "NCHW"
    """Order of the axes of its input."""
    min_finite: float = 0.5
    """Fraction of the pixels of each channel that must hold data; with fewer, a stamp is not scored."""
    features: tuple[str, ...] = ()
    """Catalogue columns that it takes besides the stamp, in its order."""
    truncated: str = "centre"
    """Where stamps that are not square go: "centre", or "corner" for padding at the bottom and right only."""
    padding: float = 0.0
    """What stands, after normalising, where its input reaches beyond a stamp."""
    sky: float = 0.0
    """What new and reference are given where they have no sky, in units of new's noise: for a model that learnt from
    stamps with theirs, as ZTF's packets hold them, and whose normalisation does not take it out."""
    sign: str = "new-ref"
    """Of the difference: "new-ref", or "positive" as in ZTF's packets, where that of a fading source is turned."""
    scales: tuple[int, ...] = (1,)
    """Sizes of its pixels in those of the stamp; of each, all the channels: (1,) or (1, 2)."""

    @property
    def reach(self) -> int:
        """Side of what it looks at, in pixels of the stamps."""
        return self.size if self.scales == SCALES[0] else 2 * self.size + 1

    @property
    def depth(self) -> int:
        """Channels of the tensor: those of all scales."""
        return len(self.channels) * len(self.scales)

    def prepare(self, stamps: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The tensor that the model wants of raw stamps ``(n, 3, h, w)``, and which of them can be scored."""
        return to_tensor(
            stamps,
            size=self.size,
            normalisation=self.normalisation,
            channels=self.channels,
            layout=self.layout,
            min_finite=self.min_finite,
            truncated=self.truncated,
            padding=self.padding,
            sky=self.sky,
            sign=self.sign,
            scales=self.scales,
        )


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model. ``card.toml`` holds the same names."""

    name: str
    version: str
    description: str
    licence: str
    threshold: float
    """Scores at or above it are taken for real."""
    default_variant: str
    """The faster variant of those that are equally accurate."""
    input: InputCard
    files: Mapping[str, Mapping[str, str]]
    """Variant → ``path`` (within the folder; ``.onnx`` or ``.tflite``) and ``sha256``; ``layout`` where the axes of
    this file's input have another order than ``input`` says."""
    classes: tuple[str, ...] = ("real",)
    """One: a probability a stamp; several: one a class, in this order."""
    meant_for: Mapping[str, Any] = field(default_factory=dict)
    """Ranges: ``fwhm_pix``, ``pixel_scale_arcsec``."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Data, seeds, sizes."""
    quantisation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Quantised variant → how, and its agreement with float on stamps that it was not calibrated on."""
    speed: Mapping[str, Any] = field(default_factory=dict)
    """Variant → stamps a second of CPU time on one thread, normalisation included; ``cpu`` → measured on which."""
    metrics: tuple[Mapping[str, Any], ...] = ()
    """On images it has not seen: one table a data set, each with its prevalence and intervals."""

    def input_of(self, variant: str) -> InputCard:
        """What the file of a variant wants to see."""
        return replace(self.input, layout=self.files[variant].get("layout", self.input.layout))

    def to_toml(self) -> str:
        """The text of ``card.toml``; `read_card` gives the same card back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"input": asdict(self.input)}
        # Bare values must come before the tables in TOML; empty tables say nothing.
        told = [(key, value) for key, value in values.items() if not (isinstance(value, Mapping | tuple) and not value)]
        bare_first = sorted(told, key=lambda item: isinstance(item[1], Mapping) or item[0] == "metrics")
        return tomli_w.dumps(_plain(dict(bare_first)))


def read_card(folder: str | Path) -> ModelCard:
    """Read ``card.toml`` of a model folder; raises `ModelError` on what is missing, unknown or of the wrong type."""
    path = Path(folder) / CARD
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid TOML: {error}") from error
    if isinstance(values.get("input"), dict):
        values["input"] = _build(InputCard, values["input"], f"{path}: [input]")
    if values.get("quantisation") and not all(isinstance(table, dict) for table in values["quantisation"].values()):
        values["quantisation"] = {"int8": values["quantisation"]}  # cards from before there were several
    card = _build(ModelCard, values, str(path))
    check_card(card, path)
    return card


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A card from TOML: every key known, none missing, lists as tuples."""
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ModelError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ModelError(f"{where}: {', '.join(missing)} missing")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def check_card(card: ModelCard, path: Path) -> None:
    """Raise `ModelError` for the first thing that is wrong with a card; `path` is where it came from."""
    for problem in _problems(card):
        raise ModelError(f"{path}: {problem}")


def _problems(card: ModelCard) -> Iterator[str]:
    strings = ("name", "version", "description", "licence", "default_variant")
    yield from (f"{key} must be text" for key in strings if not isinstance(getattr(card, key), str))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", str(card.name)):
        yield f"name {card.name!r}: letters, digits, '.', '_', '-', beginning with one of the first two, at most 64"
    if not isinstance(card.input, InputCard):
        yield "[input] must be a table"
        return
    wanted = card.input
    if not wanted.channels and not wanted.features:
        yield "input.channels and input.features are both empty: what does the model look at?"
    least = 1 if wanted.channels else 0
    if not isinstance(wanted.size, int) or wanted.size < least or (wanted.size and not wanted.channels):
        expected = "a whole number of pixels" if wanted.channels else "0 where there are no channels"
        yield f"input.size = {wanted.size!r}: must be {expected}"
    if wanted.normalisation not in NORMALISATIONS:
        yield f"input.normalisation = {wanted.normalisation!r}; known: {', '.join(NORMALISATIONS)}"
    if not set(wanted.channels) <= set(CHANNELS):
        yield f"input.channels = {list(wanted.channels)}; known: {', '.join(CHANNELS)}"
    if wanted.layout not in LAYOUTS:
        yield f"input.layout = {wanted.layout!r}; known: {', '.join(LAYOUTS)}"
    if wanted.truncated not in TRUNCATED:
        yield f"input.truncated = {wanted.truncated!r}; known: {', '.join(TRUNCATED)}"
    if not isinstance(wanted.padding, float | int) or not abs(wanted.padding) < np.inf:
        yield f"input.padding = {wanted.padding!r}: must be a finite number"
    if not isinstance(wanted.sky, float | int) or not 0 <= wanted.sky < np.inf:
        yield f"input.sky = {wanted.sky!r}: must be 0 or more, in units of the noise of new"
    if wanted.sign not in SIGNS:
        yield f"input.sign = {wanted.sign!r}; known: {', '.join(SIGNS)}"
    if wanted.scales not in SCALES:
        yield f"input.scales = {wanted.scales!r}; known: {' or '.join(str(list(each)) for each in SCALES)}"
    elif wanted.scales != SCALES[0] and (wanted.normalisation != "noise-log" or wanted.padding):
        yield f"input.scales = {list(wanted.scales)} goes with normalisation noise-log, and no padding"
    if not isinstance(wanted.min_finite, float | int) or not 0 <= wanted.min_finite <= 1:
        yield f"input.min_finite = {wanted.min_finite!r}: must be 0 to 1"
    if not isinstance(card.threshold, float | int) or not 0 <= card.threshold <= 1:
        yield f"threshold = {card.threshold!r}: must be 0 to 1"
    if not card.classes:
        yield "classes: at least one"
    if not isinstance(card.files, Mapping) or not card.files:
        yield "[files.VARIANT] with path and sha256: at least one"
        return
    for variant, file in card.files.items():
        yield from _file_problems(variant, file)
    if card.default_variant not in card.files:
        yield f"default_variant = {card.default_variant!r}; there are: {', '.join(card.files)}"


def _file_problems(variant: str, file: Any) -> Iterator[str]:
    if not isinstance(file, Mapping) or set(file) - {"layout"} != {"path", "sha256"}:
        yield f"[files.{variant}] must have path and sha256, and may have layout"
        return
    if Path(file["path"]).name != file["path"]:
        yield f"files.{variant}.path = {file['path']!r}: must be a file in the model's own folder"
    if Path(file["path"]).suffix not in SUFFIXES:
        yield f"files.{variant}.path = {file['path']!r}: must end in {' or '.join(SUFFIXES)}"
    if file.get("layout", LAYOUTS[0]) not in LAYOUTS:
        yield f"files.{variant}.layout = {file['layout']!r}; known: {', '.join(LAYOUTS)}"


def _plain(value: Any) -> Any:
    """The same in dictionaries, lists and Python numbers, as TOML writes them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
