"""Everything that a training can be told, in one place."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from batchproc.config import settings_from
from batchproc.errors import ConfigError

__all__ = ["FitConfig", "TrainSettings"]

_CHOICES = {
    "kind": ("network", "forest"),
    "balance": ("weights", "sampling", "none"),
    "layout": ("", "NCHW", "NHWC"),
}


@dataclass(frozen=True)
class FitConfig:
    """How to fit a network."""

    epochs: int = 40
    """At most so many passes over the examples."""
    batch: int = 128
    """Examples to a step; fewer where there are few."""
    learning_rate: float = 2e-3
    """Highest; falls to zero as half a cosine."""
    weight_decay: float = 1e-3
    """Of AdamW."""
    patience: int = 10
    """Stop after so many epochs without a lower loss on the validation part; the best weights are kept."""
    seed: int = 0
    """Of everything random."""
    balance: str = "weights"
    """Classes count alike by ``weights`` of the loss, by ``sampling``, or not (``none``)."""
    augment: bool = True
    """Turn and mirror the stamps at random, the eight ways of a square."""
    swap: bool = True
    """Of real or bogus on stamps alone (no features), and of nothing else: exchange new and reference, and the sign of
    the difference, at random. Subtraction is antisymmetric."""
    freeze: bool = False
    """Of a model that is continued, fit the last layer only."""
    head_epochs: int = 3
    """Of a model that is continued, fit the last layer alone for so many epochs first."""
    body_rate: float = 0.3
    """Learning rate of all but the last layer of a model that is continued, over that of the last."""


@dataclass(frozen=True)
class TrainSettings(FitConfig):
    """How to train: what is learnt, from which part of the examples, and how (`FitConfig`).

    Raises
    ------
    ConfigError
        A value that is not understood or out of range.
    """

    # --- The model ---
    kind: str = "network"
    """``network`` (PyTorch, on stamps) or ``forest`` (scikit-learn, on features)."""
    network: str = "realbogus"
    """Which network, where none is continued from: a name in `batchproc.training.networks.NETWORKS`."""
    base: str = ""
    """Model to continue from (name or folder); its network, size, normalisation and layout are kept."""
    name: str = "trained"
    """On the card."""
    version: str = "1"
    """On the card."""
    licence: str = "not stated"
    """On the card."""
    size: int = 0
    """Side of the stamp that the model looks at, in pixels; 0: as the network is made for."""
    normalisation: str = ""
    """A name in `batchproc.learning.inputs.NORMALISATIONS`; by default that of the network."""
    layout: str = ""
    """Axes of the exported input, ``NCHW`` or ``NHWC``; by default NCHW, or that of the base."""
    features: tuple[str, ...] = ()
    """Columns that the model takes besides the stamp, raw: they are standardised inside it. Of a forest, which takes
    nothing else, also terms made of them (`batchproc.training.terms`), by default those listed there."""

    # --- Parts ---
    valid: float = 0.15
    """Share of the examples by which training is stopped and the threshold chosen."""
    test: float = 0.2
    """Share that is only measured on."""
    group: str = "sky"
    """What is never divided: ``sky``, cells of the sky (where positions are not known, the column ``group``), or the
    name of a column."""
    cell_arcmin: float = 1.0
    """Side of those cells: larger than a stamp."""
    same_arcsec: float = 5.0
    """Candidates nearer than this to each other go into one cell, also across its border; what is farther apart
    may still share pixels of its stamps (`apart_arcsec`)."""
    apart_arcsec: float = 0.0
    """What of the parts to learn from lies nearer than this to what is measured on is left out; 0: nothing.
    With half the diagonal of a stamp no candidate is in a stamp of another part; with all of it they share no pixel."""
    strata: tuple[str, ...] = ("ccd", "filter", "seeing", "mjd")
    """Columns over which, and over the classes, the parts are alike; those that are not there are passed over."""
    bins: int = 3
    """Quantiles into which columns of numbers are cut for that."""
    holdout: tuple[str, ...] = ()
    """``COLUMN=VALUE``: all of these are measured on, and only these."""

    # --- Of a forest ---
    trees: int = 200
    """Their number."""
    leaves: int = 256
    """Of a tree, at most."""
    smallest_leaf: int = 5
    """Examples in a leaf, at least."""

    # --- The rest ---
    completeness: float = 0.99
    """The threshold keeps at least this fraction of the real ones of the validation part."""
    resamples: int = 500
    """Of the bootstrap, by groups, from which intervals are."""
    threads: int = 1
    """Of the computation."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ConfigError(problem)

    def _problems(self) -> Any:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                yield f"{name} = {getattr(self, name)!r}; expected one of: {', '.join(filter(None, known))}"
        if not (0 < self.valid < 1 and 0 < self.test < 1 and self.valid + self.test < 1):
            yield f"valid = {self.valid}, test = {self.test}: shares above 0 that leave something to train on"
        for name in ("epochs", "batch", "patience", "bins", "threads", "resamples", "trees", "smallest_leaf"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: must be at least 1"
        for name in (
            "size",
            "learning_rate",
            "weight_decay",
            "body_rate",
            "head_epochs",
            "same_arcsec",
            "apart_arcsec",
            "seed",
        ):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        if self.leaves < 2:
            yield f"leaves = {self.leaves}: must be at least 2"
        if not self.cell_arcmin > 0:
            yield f"cell_arcmin = {self.cell_arcmin}: must be above 0"
        if not 0 < self.completeness <= 1:
            yield f"completeness = {self.completeness}: must be above 0 and at most 1"
        for text in self.holdout:
            if "=" not in text:
                yield f"holdout = {text!r}: expected COLUMN=VALUE, such as survey=GOTO"
        if self.freeze and not self.base:
            yield "freeze: there is no body to hold still without a base to continue from"

    def to_toml(self) -> str:
        """As text; `from_toml` gives the same settings back."""
        return tomli_w.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()})

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainSettings:
        """Settings from a file; keys left out have their defaults.

        Raises
        ------
        ConfigError
            A file that cannot be read, unknown keys, values of another type or out of range.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as settings: {error}") from error
        try:
            settings: TrainSettings = settings_from(cls, values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return settings
