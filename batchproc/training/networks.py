"""Networks to train, by name, and how any of them is given more classes or features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from batchproc.errors import UsageError
from batchproc.training.network import SIZE, RealBogusNet

__all__ = ["NETWORKS", "Recipe", "StampNet", "new_network"]

#: Beside that many outputs of the stamps, features get a layer of so many.
_MIXED = 32


class Standardise(nn.Module):
    """Features less their mean, over their deviation, clipped at ten. Part of the model, which so takes raw columns."""

    def __init__(self, features: NDArray[np.float32]) -> None:
        super().__init__()
        deviation = features.std(axis=0, dtype=np.float64)
        self.register_buffer("mean", torch.from_numpy(features.mean(axis=0, dtype=np.float64)).float())
        self.register_buffer("deviation", torch.from_numpy(np.where(deviation > 0, deviation, 1.0)).float())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The same shape ``(n, k)``."""
        return torch.clamp((features - self.mean) / self.deviation, -10.0, 10.0)


class StampNet(nn.Module):
    """A body that makes numbers of stamps, features beside them, and a last layer.

    Parameters
    ----------
    body : Module
        Stamps ``(n, 3, size, size)``, and features if `takes_features` → ``(n, width)``.
    width : int
    outputs : int
        Logits: one for real or bogus, otherwise one a class.
    features : ndarray (m, k), optional
        Those of the training part, from which their scale follows.
    head : Module, optional
        A last layer to go on from; without it a new one.
    takes_features : bool
        The body has them already, standardised and all.
    """

    def __init__(
        self,
        body: nn.Module,
        width: int,
        outputs: int,
        *,
        features: NDArray[np.float32] | None = None,
        head: nn.Module | None = None,
        takes_features: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.takes_features = body, takes_features
        beside = features is not None and not takes_features
        self.scale = Standardise(features) if features is not None and beside else None
        if head is not None:
            self.head = head
        elif beside and features is not None:
            mixed = nn.Linear(width + features.shape[1], _MIXED)
            self.head = nn.Sequential(mixed, nn.ReLU(), nn.Linear(_MIXED, outputs))
        else:
            self.head = nn.Linear(width, outputs)

    def forward(self, stamps: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``(n, outputs)``."""
        found = self.body(stamps, features) if self.takes_features else self.body(stamps)
        if self.scale is not None:
            found = torch.cat([found, self.scale(features)], dim=1)
        logits: torch.Tensor = self.head(found)
        return logits


@dataclass(frozen=True)
class Recipe:
    """A network to begin with."""

    body: Callable[[int], tuple[nn.Module, int]]
    """Side of the stamps → body, numbers that it gives."""
    size: int
    """Side of the stamps that it is made for."""
    normalisation: str
    fixed: bool
    """Whether it takes stamps of that size only."""
    scales: tuple[int, ...] = (1,)
    """Sizes of its pixels in those of the stamps."""


def _realbogus(size: int, channels: int = 3) -> tuple[nn.Module, int]:
    net = RealBogusNet(channels=channels)
    *before, last = net.answer
    return nn.Sequential(net.features, *before), last.in_features


def _two_scales(size: int) -> tuple[nn.Module, int]:
    """The same with what is around beside the stamp: how crowded it is, and how wide stars are, lies further out."""
    return _realbogus(size, channels=6)


def _vgg6(size: int) -> tuple[nn.Module, int]:
    """The network of braai: Duev et al. 2019, doi:10.1093/mnras/stz2357."""
    layers: list[nn.Module] = []
    for channels_in, channels_out, pool in ((3, 16, 2), (16, 32, 4)):
        layers += [nn.Conv2d(channels_in, channels_out, 3), nn.ReLU(), nn.Conv2d(channels_out, channels_out, 3)]
        layers += [nn.ReLU(), nn.MaxPool2d(pool), nn.Dropout(0.25)]
    side = ((size - 4) // 2 - 4) // 4
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * side * side, 256), nn.ReLU(), nn.Dropout(0.5)), 256


#: Name → network. To add one is to add a function and a line.
NETWORKS = {
    "realbogus": Recipe(_realbogus, SIZE, "noise-log", fixed=True),
    "two-scales": Recipe(_two_scales, SIZE, "noise-log", fixed=True, scales=(1, 2)),
    "vgg6": Recipe(_vgg6, 63, "image-l2", fixed=False),
}


def new_network(name: str, size: int, outputs: int, features: NDArray[np.float32] | None) -> StampNet:
    """A network with random weights.

    Raises
    ------
    UsageError
        No such network, or a size that it does not take.
    """
    recipe = recipe_of(name)
    if (recipe.fixed and size != recipe.size) or size < 24:
        raise UsageError(
            f"network {name}: takes stamps of {recipe.size} pixels, not {size}; leave size out of the settings"
        )
    body, width = recipe.body(size)
    return StampNet(body, width, outputs, features=features)


def recipe_of(name: str) -> Recipe:
    """Of a name; raises `UsageError` naming those that there are."""
    if name not in NETWORKS:
        raise UsageError(f"no network {name!r}; there are: {', '.join(NETWORKS)}")
    return NETWORKS[name]
