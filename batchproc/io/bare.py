"""A file without a card, as a training left it: its card is made of what the file tells and what is said of it.

The file tells the shapes of its inputs and of its answer. How the stamps were normalised, what several classes are
called, and which features or which other channels than three it takes, it does not tell: that is asked for. What else
it does not tell is as is usual unless it is said: three channels are new, reference, difference in this order,
one answer is the probability of being real, and the threshold is 0.5. How much of a stamp must hold data, where
truncated ones go and how they are padded is as by default on a card (`InputCard`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from batchproc.errors import ModelError
from batchproc.io.backends import Backend, open_backend, provider_for
from batchproc.io.backends.batches import Slot
from batchproc.io.cards import CARD, SUFFIXES, InputCard, ModelCard, check_card
from batchproc.io.model_checks import add_model
from batchproc.io.models import file_hash
from batchproc.learning.inputs import CHANNELS, LAYOUTS, NORMALISATIONS, SIGNS

__all__ = ["Said", "add_file", "card_of"]


@dataclass(frozen=True)
class Said:
    """What is said of a file, in place of a card; None or empty: see what the file tells.

    Attributes
    ----------
    name : str
        By default that of the file.
    normalisation : str
        How its stamps were prepared; needed where it takes stamps.
    sky : float
        If it learnt from stamps with their sky: how much of it those without are given, in units of new's noise.
    sign : {"new-ref", "positive"}
        That of the difference it learnt from, see `batchproc.learning.conventions`.
    size : int
    channels : tuple of str
        In its order; needed where they are not three. By default three are taken for new, ref, difference: whether a
        file wants them in another order cannot be seen.
    layout : {"NCHW", "NHWC"}
    classes : tuple of str
        In the order of its answer; needed where it has several. By default one is the probability of being real.
    features : tuple of str
        Catalogue columns in its order; needed where it takes any.
    threshold : float
        Scores at or above it are taken for real; 0.5 is assumed, not measured.
    version, licence, description : str
    """

    name: str = ""
    normalisation: str = ""
    sky: float = 0.0
    sign: str = ""
    size: int = 0
    channels: tuple[str, ...] = ()
    layout: str = ""
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    threshold: float = 0.5
    version: str = "1"
    licence: str = "not stated"
    description: str = ""


def add_file(path: str | Path, said: Said) -> Path:
    """Write a card for an ``.onnx`` or ``.tflite`` file, check both, and copy them to where runs find models by name.

    Returns
    -------
    Path
        The model's folder.

    Raises
    ------
    ModelError
        As `card_of` and `batchproc.io.model_checks.add_model`.
    """
    file = Path(path)
    card = card_of(file, said)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(file, folder / file.name)
        (folder / CARD).write_text(card.to_toml(), encoding="utf-8")
        return add_model(folder)


def card_of(path: str | Path, said: Said) -> ModelCard:
    """The card of a file.

    Raises
    ------
    ModelError
        A file that cannot be run here, something that it does not tell and nobody said, or something said that the
        file contradicts; with the option that says it.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ModelError(
            f"{file}: found a file; expected one that ends in {' or '.join(SUFFIXES)}, or a model's folder"
        )
    found = file_hash(file)
    provider = provider_for(file, "cpu")
    if provider is None:
        raise ModelError(f"{file}: compiled for the Edge TPU: nothing can be read from it. Write its card by hand")
    backend = open_backend(str(file), found, 1, provider)
    stamps, features = _slots(file, backend.slots)
    wanted = InputCard(**_of_stamps(file, stamps, said), features=_of_features(file, features, said.features))
    card = ModelCard(
        name=said.name or file.stem,
        version=said.version,
        description=said.description or f"From {file.name}; nothing else was said of it.",
        licence=said.licence,
        threshold=said.threshold,
        default_variant="float",
        input=wanted,
        files={"float": {"path": file.name, "sha256": found}},
        classes=_classes(file, _answers(file, backend, wanted), said.classes),
    )
    check_card(card, file)
    return card


def _slots(file: Path, slots: Sequence[Slot]) -> tuple[Slot | None, Slot | None]:
    """The input of stamps, which has four axes and comes first, and that of features, which has two."""
    axes = [len(slot.shape) for slot in slots]
    if axes not in ([4], [4, 2], [2]):
        told = ", ".join(f"{slot.name} {_shape(slot)}" for slot in slots)
        raise ModelError(
            f"{file}: takes {told}; expected stamps with four axes, features with two, or both in this order"
        )
    return (slots[0] if axes[0] == 4 else None), (slots[-1] if axes[-1] == 2 else None)


def _shape(slot: Slot) -> str:
    return f"({', '.join('?' if length is None else str(length) for length in slot.shape)})"


def _of_stamps(file: Path, slot: Slot | None, said: Said) -> dict[str, Any]:
    if slot is None:
        extra = [
            option for option in ("size", "channels", "layout", "normalisation", "sky", "sign") if getattr(said, option)
        ]
        if extra:
            raise ModelError(f"{file}: takes no stamps, so that there is nothing for --{extra[0]} to say")
        return {"size": 0, "normalisation": "none", "channels": ()}
    if not said.normalisation:
        raise ModelError(
            f"{file}: how its stamps were normalised does not stand in the file. Say it: --normalisation "
            f"{'|'.join(NORMALISATIONS)}"
        )
    layout = said.layout or _layout(file, slot)
    _, *axes = slot.shape
    n_channels, height, width = axes if layout == "NCHW" else (axes[2], axes[0], axes[1])
    size = said.size or height or width
    if not size:
        raise ModelError(f"{file}: input {slot.name} {_shape(slot)} takes any size. Say it: --size PIXELS")
    channels = said.channels or (CHANNELS if n_channels in (None, len(CHANNELS)) else ())
    if not channels:
        raise ModelError(
            f"{file}: input {slot.name} has {n_channels} channels. Say which, in its order: --channels "
            f"{','.join(CHANNELS[-(n_channels or 1) :])} (known: {', '.join(CHANNELS)})"
        )
    there = (len(channels), size, size) if layout == "NCHW" else (size, size, len(channels))
    if not slot.takes((1, *there)):
        raise ModelError(
            f"{file}: input {slot.name} takes {_shape(slot)}; --size, --channels and --layout lead to "
            f"(?, {', '.join(map(str, there))})"
        )
    about = {"normalisation": said.normalisation, "sky": said.sky, "sign": said.sign or SIGNS[0]}
    return {"size": size, "channels": channels, "layout": layout, **about}


def _layout(file: Path, slot: Slot) -> str:
    """Where the channels stand: they are one to three, and the other two axes are longer."""
    few = [length is not None and length <= len(CHANNELS) for length in slot.shape[1:]]
    if few == [True, False, False]:
        return LAYOUTS[0]
    if few == [False, False, True]:
        return LAYOUTS[1]
    raise ModelError(
        f"{file}: input {slot.name} {_shape(slot)}: which axis is the channels? --layout {'|'.join(LAYOUTS)}"
    )


def _of_features(file: Path, slot: Slot | None, names: tuple[str, ...]) -> tuple[str, ...]:
    n = 0 if slot is None else slot.shape[1]
    if n is None and not names:
        raise ModelError(f"{file}: takes features. Say which columns of the catalogue, in its order: --features A,B")
    if n is not None and n != len(names):
        raise ModelError(
            f"{file}: takes {n} features, {len(names)} were named{': ' if names else ''}{', '.join(names)}. Name the "
            f"columns of the catalogue in its order: --features A,B"
        )
    return names


def _answers(file: Path, backend: Backend, wanted: InputCard) -> int:
    """How many numbers it answers to a candidate: found by asking it."""
    n = 2
    tensors = []
    if wanted.channels:
        inner = (wanted.size, wanted.size)
        shape = (n, wanted.depth, *inner) if wanted.layout == "NCHW" else (n, *inner, wanted.depth)
        tensors.append(np.zeros(shape, np.float32))
    if wanted.features:
        tensors.append(np.zeros((n, len(wanted.features)), np.float32))
    out = backend.run(tensors)
    if out.size == 0 or out.size % n:
        raise ModelError(f"{file}: answered {out.shape} to {n} candidates; expected as many rows")
    return out.size // n


def _classes(file: Path, n: int, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names and n == 1:
        return ("real",)
    if len(names) != n:
        named = f", {len(names)} were named: {', '.join(names)}" if names else ""
        raise ModelError(f"{file}: answers {n} numbers{named}. Name its classes in its order: --classes A,B")
    return names
