"""Fitting a network to labelled tensors, and writing it as ONNX. Knows tensors, not where they came from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from batchproc.display import show
from batchproc.errors import UsageError
from batchproc.learning.evaluate import auc_pr
from batchproc.training.settings import FitConfig

__all__ = [
    "FitConfig",
    "History",
    "Labelled",
    "Tensors",
    "balanced_loss",
    "dihedral",
    "export_onnx",
    "fit",
    "predict",
    "swap_epochs",
]


class Tensors(Protocol):
    """What is asked of normalised stamps ``(n, 3, size, size)``: an array will do, or what prepares them when asked."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        """Those of a slice, or of an array of row numbers."""


@dataclass(frozen=True)
class Labelled:
    """Tensors with their truth.

    Attributes
    ----------
    tensor : ndarray (n, 3, size, size) float32, or `Tensors`
        Normalised (`batchproc.learning.inputs.to_tensor`), channels first.
    truth : ndarray (n,) bool or int
        Whether it is real; of several classes, the number of the class.
    features : ndarray (n, k) float32, optional
        As they are in the catalogue.
    answer : ndarray (n,) float32, optional
        Where it is not NaN, the probability to learn in place of the truth: what another network answers. Such stamps
        are not swapped, for to that the answer might be another. An epoch takes at most as many of them as of the rest.
    """

    tensor: Tensors
    truth: NDArray[Any]
    features: NDArray[np.float32] | None = None
    answer: NDArray[np.float32] | None = None


@dataclass
class History:
    """One entry an epoch."""

    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_auc_pr: list[float] = field(default_factory=list)
    """At 1:1; of several classes, the mean of each against all others."""
    best_epoch: int = -1
    """Counted from 0; -1: as it was before the first."""
    interrupted: bool = False
    """Ctrl-C came: the weights are the best until then."""

    def note(self) -> str:
        """How it goes, in a few words."""
        if not self.valid_auc_pr:
            return ""
        return (
            f"loss {self.valid_loss[-1]:.3f}, AUC-PR at 1:1 {self.valid_auc_pr[-1]:.4f}, "
            f"best of epoch {self.best_epoch + 1}"
        )


def fit(
    net: nn.Module,
    train: Labelled,
    valid: Labelled,
    config: FitConfig,
    *,
    head: nn.Module | None = None,
    progress: bool = True,
) -> History:
    """Train in place, with classes balanced, and keep the weights that did best on `valid`.

    The same seed, data and number of threads give the same weights on one type of CPU. Ctrl-C after the first epoch
    ends it as if the epochs were over, and the history says so; before, it is raised.

    Parameters
    ----------
    net : Module
        Called with stamps, and features where there are any; answers logits ``(n, 1)`` or ``(n, classes)``.
    train, valid : Labelled
    config : FitConfig
    head : Module, optional
        The last layer of a network that has learnt something already: it is fitted first, and faster. What the network
        was stays, as epoch -1, if nothing becomes better.
    progress : bool
        Show a bar.

    Raises
    ------
    UsageError
        The loss is not finite after the first epoch; later, the weights from before are kept, and it ends.
    """
    random = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # dropout draws from the global one
    net.to(memory_format=torch.channels_last)  # convolutions are a sixth faster so
    batch = min(config.batch, max(16, len(train.truth) // 8))
    known = np.ones(len(train.truth), np.bool_) if train.answer is None else np.isnan(train.answer)
    steps = max(1, len(_order(train.truth, known, config.balance, random)) // batch)
    optimiser, schedule = _optimiser(net, head, config, config.epochs * steps)
    weights = _class_weights(train.truth[known]) if config.balance == "weights" and known.any() else None
    valid_weights = None if config.balance == "none" else _class_weights(valid.truth)
    history, best = History(), copy.deepcopy(net.state_dict())
    least = np.inf if head is None else _validated(net, valid, valid_weights)[0]
    epochs = show(range(config.epochs), config.epochs, "epochs", note=history.note, quiet=not progress)
    try:
        for epoch in epochs:
            net.train()
            _thaw(net, head, whole=not config.freeze and epoch >= config.head_epochs)
            losses = []
            order = _order(train.truth, known, config.balance, random)
            for k in range(steps):
                rows = order[k * batch : (k + 1) * batch].numpy()
                logits = _call(net, *_augmented(train, rows, config, random))
                loss = _loss(logits, train.truth[rows], weights, None if train.answer is None else train.answer[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
            valid_loss, valid_auc_pr = _validated(net, valid, valid_weights)
            history.train_loss.append(float(np.mean(losses)))
            history.valid_loss.append(valid_loss)
            history.valid_auc_pr.append(valid_auc_pr)
            if not np.isfinite(valid_loss):
                break  # weights that are no numbers do not become numbers again
            if valid_loss < least:
                history.best_epoch, least, best = epoch, valid_loss, copy.deepcopy(net.state_dict())
            elif epoch - history.best_epoch >= config.patience:
                break
    except KeyboardInterrupt:
        if not history.valid_auc_pr:
            raise
        for values in (history.train_loss, history.valid_loss, history.valid_auc_pr):
            del values[len(history.valid_auc_pr) :]
        history.interrupted = True
    if history.best_epoch < 0 and head is None:
        raise UsageError(
            f"the loss of the validation part is {history.valid_loss[-1]} after the first epoch, at learning_rate = "
            f"{config.learning_rate}: set a lower one, or look for features or stamps of extreme values"
        )
    _thaw(net, head, whole=True)
    net.load_state_dict(best)
    net.eval()
    return history


def predict(
    net: nn.Module,
    tensor: Tensors,
    batch: int = 1024,
    *,
    features: NDArray[np.float32] | None = None,
    squeeze: bool = True,
) -> NDArray[np.float32]:
    """Logits ``(n,)`` of normalised stamps; ``(n, classes)`` of several classes, or with `squeeze` false."""
    net.eval()
    with torch.no_grad():
        parts = []
        for k in range(0, len(tensor), batch):
            given = None if features is None else torch.from_numpy(features[k : k + batch])
            parts.append(_call(net, torch.from_numpy(tensor[k : k + batch]), given))
    logits: NDArray[np.float32] = torch.cat(parts).numpy()
    return logits[:, 0] if squeeze and logits.shape[1] == 1 else logits


def dihedral(stamps: torch.Tensor, which: int) -> torch.Tensor:
    """One of the eight ways (0 to 7) to turn and mirror a square: the sky has no up."""
    turned = torch.rot90(stamps, which % 4, dims=(-2, -1))
    return torch.flip(turned, dims=(-1,)) if which >= 4 else turned


def swap_epochs(stamps: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Exchange new and reference and negate the difference, at each scale, where `which` is true."""
    each = [stamps[:, k : k + 3] for k in range(0, stamps.shape[1], 3)]
    swapped = torch.cat([torch.stack([views[:, 1], views[:, 0], -views[:, 2]], dim=1) for views in each], dim=1)
    return torch.where(which[:, None, None, None], swapped, stamps)


def balanced_loss(logits: torch.Tensor, truth: NDArray[Any], all_truth: NDArray[Any]) -> torch.Tensor:
    """Cross entropy with classes weighted alike, by their numbers in `all_truth`.

    Scores are then probabilities in a mixture with as many of one class as of another.
    """
    return _loss(logits, truth, _class_weights(all_truth))


# --- Parts of the loop ------------------------------------------------------------------------------------------------


def _validated(net: nn.Module, valid: Labelled, weights: NDArray[np.float32] | None) -> tuple[float, float]:
    """Loss and AUC-PR of the validation part; NaN for the latter where the loss is not finite."""
    logits = predict(net, valid.tensor, features=valid.features, squeeze=False)
    loss = _loss(torch.from_numpy(logits), valid.truth, weights).item()
    return loss, _mean_auc_pr(valid.truth, logits) if np.isfinite(loss) else np.nan


def _call(net: nn.Module, stamps: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
    return net(stamps) if features is None else net(stamps, features)


def _optimiser(net: nn.Module, head: nn.Module | None, config: FitConfig, steps: int) -> tuple[Any, Any]:
    last = {id(p) for p in head.parameters()} if head is not None else set()
    groups = [{"params": [p for p in net.parameters() if id(p) not in last]}]
    rates = [config.learning_rate]
    if head is not None:
        groups.append({"params": list(head.parameters())})
        rates = [config.learning_rate * config.body_rate, config.learning_rate]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps)


def _thaw(net: nn.Module, head: nn.Module | None, *, whole: bool) -> None:
    """Let all of a network learn, or its head alone."""
    if head is None:
        return
    net.requires_grad_(whole)
    head.requires_grad_(True)


def _order(truth: NDArray[Any], known: NDArray[np.bool_], balance: str, random: torch.Generator) -> torch.Tensor:
    """Rows of an epoch, in random order: those of which the truth is known, and at most as many of the others.

    Of the known, all; or with "sampling" as many, drawn so that classes are equally common. With none, all the others.
    """
    rows, others = (torch.from_numpy(np.flatnonzero(which)) for which in (known, ~known))
    if balance == "sampling" and len(rows):
        weight = torch.from_numpy(_class_weights(truth[known])[truth[known].astype(np.intp)])
        rows = rows[torch.multinomial(weight, len(rows), replacement=True, generator=random)]
    drawn = others[torch.randperm(len(others), generator=random)[: len(rows) or None]]
    both = torch.cat([rows, drawn])
    return both[torch.randperm(len(both), generator=random)]


def _augmented(
    examples: Labelled, rows: NDArray[np.int64], config: FitConfig, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    stamps = torch.from_numpy(np.ascontiguousarray(examples.tensor[rows]))
    if config.augment:
        stamps = dihedral(stamps, int(torch.randint(8, (1,), generator=random)))
    if config.swap and examples.truth.dtype == np.bool_:
        swapped = torch.rand(len(rows), generator=random) < 0.5
        if examples.answer is not None:
            swapped &= torch.from_numpy(np.isnan(examples.answer[rows]))
        stamps = swap_epochs(stamps, swapped)
    return stamps, None if examples.features is None else torch.from_numpy(examples.features[rows])


def _class_weights(truth: NDArray[Any]) -> NDArray[np.float32]:
    """Of each class: the mean over all examples is 1, and the sum over a class is the same for every class."""
    counts = np.bincount(truth.astype(np.intp), minlength=2)
    with np.errstate(divide="ignore"):
        weights = np.where(counts > 0, len(truth) / (np.count_nonzero(counts) * counts), 0.0)
    return weights.astype(np.float32)


def _loss(
    logits: torch.Tensor,
    truth: NDArray[Any],
    weights: NDArray[np.float32] | None,
    answer: NDArray[np.float32] | None = None,
) -> torch.Tensor:
    """Mean cross entropy; of one column of logits, of true against false, or against the answers that there are.

    What is answered weighs 1, of whatever class: it comes as often as it is.
    """
    number = truth.astype(np.int64)
    weighted = None if weights is None else weights[number]
    wanted = number.astype(np.float32)
    if answer is not None:
        wanted = np.where(np.isnan(answer), wanted, answer)
        weighted = None if weighted is None else np.where(np.isnan(answer), weighted, np.float32(1.0))
    weight = None if weighted is None else torch.from_numpy(weighted)
    if logits.shape[1] == 1:
        target = torch.from_numpy(wanted)
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target, weight=weight)
    each = nn.functional.cross_entropy(logits, torch.from_numpy(number), reduction="none")
    return (each if weight is None else each * weight).mean()


def _mean_auc_pr(truth: NDArray[Any], logits: NDArray[np.float32]) -> float:
    return float(np.mean(list(_each_auc_pr(truth.astype(np.int64), logits))))


def _each_auc_pr(truth: NDArray[np.int64], logits: NDArray[np.float32]) -> Iterator[float]:
    if logits.shape[1] == 1:
        yield auc_pr(truth == 1, logits[:, 0], prevalence=0.5)
        return
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = shifted / shifted.sum(axis=1, keepdims=True)
    for k in np.unique(truth):
        yield auc_pr(truth == k, scores[:, k], prevalence=0.5)


# --- Out --------------------------------------------------------------------------------------------------------------


class _Answering(nn.Module):
    """A network with probabilities behind it and the wanted layout before it."""

    def __init__(self, net: nn.Module, layout: str, several: bool) -> None:
        super().__init__()
        self.net, self.layout = net, layout
        self.answer = nn.Softmax(dim=1) if several else nn.Sigmoid()

    def forward(self, stamps: torch.Tensor, *features: torch.Tensor) -> torch.Tensor:
        """Probabilities."""
        if self.layout == "NHWC":
            stamps = stamps.permute(0, 3, 1, 2)
        answer: torch.Tensor = self.answer(self.net(stamps, *features))
        return answer


def export_onnx(
    net: nn.Module,
    path: Path,
    size: int,
    channels: int = 3,
    *,
    layout: str = "NCHW",
    n_features: int = 0,
    several: bool = False,
) -> None:
    """Write the network, with a sigmoid behind it (a softmax for several classes), as ONNX for any number of stamps."""
    whole = _Answering(net, layout, several).eval()
    shape = (1, size, size, channels) if layout == "NHWC" else (1, channels, size, size)
    given = [torch.zeros(shape)] + ([torch.zeros(1, n_features)] if n_features else [])
    names = ["stamps", "features"][: len(given)]
    with warnings.catch_warnings():
        # The tracing exporter is called old; the new one writes the same graph with much more around it.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            whole,
            tuple(given),
            str(path),
            input_names=names,
            output_names=["score"],
            dynamic_axes={name: {0: "n"} for name in [*names, "score"]},
            opset_version=17,
            dynamo=False,
        )
