"""A model that there is, as a network to train further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from batchproc.errors import ModelError, UsageError
from batchproc.io.cards import InputCard, read_card
from batchproc.io.models import Model, find_model, load_model
from batchproc.training.examples import Examples
from batchproc.training.graphs import Graph, read_onnx
from batchproc.training.networks import StampNet
from batchproc.training.settings import TrainSettings

__all__ = ["SAME", "continue_from"]

#: Largest difference of scores between PyTorch and what runs the model.
SAME = 1e-4
_TRIED = 64


class _ByLayout(nn.Module):
    """A body that wants its stamps in another layout than channels first."""

    def __init__(self, body: Graph, layout: str) -> None:
        super().__init__()
        self.body, self.layout = body, layout

    def forward(self, stamps: torch.Tensor, *features: torch.Tensor) -> torch.Tensor:
        """Of stamps ``(n, c, size, size)``."""
        found = self.body(stamps.permute(0, 2, 3, 1) if self.layout == "NHWC" else stamps, *features)
        return found if found.ndim == 2 else torch.flatten(found, 1)


def continue_from(
    settings: TrainSettings, classes: Sequence[str], train: Examples
) -> tuple[InputCard, StampNet, dict[str, Any]]:
    """What a base wants to see, its network, and notes of where it comes from.

    Classes that are not the base's get a last layer of their own.

    Raises
    ------
    ModelError
        No such model; no float file in ONNX; an operator that is not known; a network that does not give the scores
        that the file gives.
    UsageError
        Settings that contradict the base's card.
    """
    base = load_model(settings.base, variant=_variant(settings.base))
    card = base.card.input_of(base.variant)
    _check_settings(settings, base, card)
    found = read_onnx(base.file)
    body = _ByLayout(found.body, card.layout)
    takes_features = bool(card.features)
    net = StampNet(body, found.head.in_features, len(base.classes), head=found.head, takes_features=takes_features)
    difference = _difference(base, card, net, train)
    if not difference <= SAME:
        raise ModelError(
            f"{base.file}: read into PyTorch its scores differ by {difference:.2g}; expected at most {SAME:g}: it "
            "cannot be trained further"
        )
    same = tuple(classes) == base.classes
    if not same:
        net = StampNet(body, found.head.in_features, len(classes), takes_features=takes_features)
    notes = {
        "continued_from": {
            "name": base.name,
            "version": base.version,
            "sha256": base.hash,
            "licence": base.card.licence,
        },
        "last_layer": "continued" if same else "new",
        "agreement_with_base": float(f"{difference:.2g}"),
    }
    return replace(card, layout=settings.layout or card.layout), net, notes


def _variant(name: str) -> str:
    card = read_card(find_model(name))
    if not card.files.get("float", {}).get("path", "").endswith(".onnx"):
        there = ", ".join(f"{variant} ({file['path']})" for variant, file in card.files.items())
        raise ModelError(f"model {card.name}: no float variant in ONNX to continue from; there are: {there}")
    return "float"


def _check_settings(settings: TrainSettings, base: Model, card: InputCard) -> None:
    for name in ("size", "normalisation", "features"):
        asked, there = getattr(settings, name), getattr(card, name)
        if asked and asked != there:
            raise UsageError(f"{name} = {asked!r}: {base.name} was trained with {there!r}; leave it out")
    if not card.channels:
        raise UsageError(f"{base.name} takes no stamps: it is no network of stamps to continue from")


def _difference(base: Model, card: InputCard, net: StampNet, train: Examples) -> float:
    """Largest difference of scores on some stamps of the training part."""
    rows = np.unique(np.linspace(0, len(train) - 1, _TRIED).astype(int))
    tensor, scored = replace(card, layout="NCHW").prepare(train.stamps[rows])
    features = None
    if card.features:
        features = train.table[list(card.features)].to_numpy(np.float32, na_value=np.nan)[rows]
        scored = scored & np.isfinite(features).all(axis=1)
    if not scored.any():
        raise UsageError(f"{base.name}: none of {len(rows)} stamps tried could be scored (data in enough of the stamp)")
    expected = base.predict(train.stamps[rows[scored]], None if features is None else features[scored])
    net.eval()
    with torch.no_grad():
        given = [] if features is None else [torch.from_numpy(features[scored])]
        logits = net(torch.from_numpy(tensor[scored]), *given)
        scores = torch.softmax(logits, 1) if len(base.classes) > 1 else torch.sigmoid(logits)
    return float(np.max(np.abs(scores.numpy().reshape(expected.shape) - expected)))
