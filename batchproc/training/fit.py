"""Fitting a classifier to labelled stamps, and writing it as ONNX. Knows tensors, not where they came from."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from batchproc.learning.evaluate import auc_pr

__all__ = ["FitConfig", "History", "Labelled", "dihedral", "export_onnx", "fit", "predict", "swap_epochs"]


@dataclass(frozen=True)
class Labelled:
    """Tensors with their truth.

    Attributes
    ----------
    tensor : ndarray (n, 3, size, size) float32
        Normalised (`batchproc.learning.inputs.to_tensor`).
    real : ndarray (n,) bool
    """

    tensor: NDArray[np.float32]
    real: NDArray[np.bool_]


@dataclass(frozen=True)
class FitConfig:
    """How to fit."""

    epochs: int = 40
    """At most so many passes over the data."""
    batch: int = 128
    learning_rate: float = 2e-3
    """Highest; falls to zero as half a cosine."""
    weight_decay: float = 1e-3
    patience: int = 10
    """Stop after so many epochs without a better validation loss; the best weights are kept."""
    seed: int = 0
    swap: bool = True
    """Exchange new and reference (and the sign of the difference) at random: subtraction is antisymmetric."""


@dataclass
class History:
    """One entry an epoch."""

    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_auc_pr: list[float] = field(default_factory=list)
    best_epoch: int = -1


def fit(net: nn.Module, train: Labelled, valid: Labelled, config: FitConfig, *, progress: bool = True) -> History:
    """Train in place, on real and bogus weighted 1:1, and keep the weights that did best on `valid`.

    The same seed, data and number of threads give the same weights on one type of CPU.
    """
    random = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # dropout draws from the global one
    tensor, real = torch.from_numpy(train.tensor), torch.from_numpy(train.real.astype(np.float32))
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * max(1, len(tensor) // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=steps)
    history, best = History(), copy.deepcopy(net.state_dict())
    bar = tqdm(range(config.epochs), desc="training", disable=not progress)
    for epoch in bar:
        net.train()
        losses = []
        order = torch.randperm(len(tensor), generator=random)
        for k in range(max(1, len(tensor) // config.batch)):
            rows = order[k * config.batch : (k + 1) * config.batch]
            stamps = dihedral(tensor[rows], int(torch.randint(8, (1,), generator=random)))
            if config.swap:
                stamps = swap_epochs(stamps, torch.rand(len(rows), generator=random) < 0.5)
            loss = _balanced_loss(net(stamps)[:, 0], real[rows], train.real)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        logits = predict(net, valid.tensor)
        history.train_loss.append(float(np.mean(losses)))
        truth = torch.from_numpy(valid.real.astype(np.float32))
        history.valid_loss.append(_balanced_loss(torch.from_numpy(logits), truth, valid.real).item())
        history.valid_auc_pr.append(auc_pr(valid.real, logits, prevalence=0.5))
        bar.set_postfix(loss=history.valid_loss[-1], auc_pr=history.valid_auc_pr[-1])
        if history.valid_loss[-1] <= min(history.valid_loss):
            history.best_epoch, best = epoch, copy.deepcopy(net.state_dict())
        elif epoch - history.best_epoch >= config.patience:
            break
    net.load_state_dict(best)
    net.eval()
    return history


def predict(net: nn.Module, tensor: NDArray[np.float32], batch: int = 1024) -> NDArray[np.float32]:
    """Logits ``(n,)`` of normalised stamps."""
    net.eval()
    with torch.no_grad():
        parts = [net(torch.from_numpy(tensor[k : k + batch]))[:, 0] for k in range(0, len(tensor), batch)]
    return torch.cat(parts).numpy()


def dihedral(stamps: torch.Tensor, which: int) -> torch.Tensor:
    """One of the eight ways (0 to 7) to turn and mirror a square: the sky has no up."""
    turned = torch.rot90(stamps, which % 4, dims=(-2, -1))
    return torch.flip(turned, dims=(-1,)) if which >= 4 else turned


def swap_epochs(stamps: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Exchange new and reference and negate the difference of those stamps for which `which` is true."""
    swapped = torch.stack([stamps[:, 1], stamps[:, 0], -stamps[:, 2]], dim=1)
    return torch.where(which[:, None, None, None], swapped, stamps)


def _balanced_loss(logits: torch.Tensor, real: torch.Tensor, all_real: NDArray[np.bool_]) -> torch.Tensor:
    """Cross entropy with real and bogus weighted to 1:1, so that scores are probabilities at that prevalence."""
    share = float(all_real.mean())
    weights = torch.where(real > 0, 0.5 / share, 0.5 / (1 - share))
    return nn.functional.binary_cross_entropy_with_logits(logits, real, weight=weights)


def export_onnx(net: nn.Module, path: Path, size: int, channels: int = 3) -> None:
    """Write the network, with a sigmoid behind it, as ONNX for any number of stamps."""
    whole = nn.Sequential(net, nn.Sigmoid()).eval()
    with warnings.catch_warnings():
        # The tracing exporter is called old; the new one writes the same graph with much more around it.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            whole,
            (torch.zeros(1, channels, size, size),),
            str(path),
            input_names=["stamps"],
            output_names=["score"],
            dynamic_axes={"stamps": {0: "n"}, "score": {0: "n"}},
            opset_version=17,
            dynamo=False,
        )
