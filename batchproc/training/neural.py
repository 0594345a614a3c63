"""The learner of networks: new ones, and such that go on from a model that there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.io.cards import InputCard
from batchproc.learning.classes import class_numbers
from batchproc.learning.inputs import CHANNELS, SCALES, SIGNS
from batchproc.training.examples import BOGUS, REAL, Examples
from batchproc.training.settings import TrainSettings
from batchproc.training.taught import Taught
from batchproc.training.train import Learnt

if TYPE_CHECKING:
    from batchproc.training.fit import Tensors

__all__ = ["Joined", "Normalised", "check_torch", "learn", "wanted_input"]

#: Stamps prepared at a time where all are looked at.
_CHUNK = 4096


class Normalised:
    """Normalised stamps ``(n, c, size, size)``, made when they are asked for: only the raw ones are held.

    Parameters
    ----------
    stamps : ndarray (m, 3, h, w)
    card : InputCard
    rows : ndarray (n,) of int
        Those that are meant.
    """

    def __init__(self, stamps: NDArray[np.float32], card: InputCard, rows: NDArray[np.intp]) -> None:
        self._stamps, self._rows, self._card = stamps, rows, replace(card, layout="NCHW")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        return self._card.prepare(self._stamps[self._rows[rows]])[0]


class Joined:
    """Tensors of one after those of another.

    Parameters
    ----------
    first, second : Tensors
        Of the same shape but for their number.
    """

    def __init__(self, first: Tensors, second: Tensors) -> None:
        self._parts = first, second

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        numbers = np.arange(len(self))[rows]
        first, second = self._parts
        later = numbers >= len(first)
        one, other = first[numbers[~later]], second[numbers[later] - len(first)]
        out = np.empty((len(numbers), *one.shape[1:]), np.float32)
        out[~later], out[later] = one, other
        return out


def learn(
    train: Examples,
    valid: Examples,
    *,
    classes: Sequence[str],
    folder: Path,
    settings: TrainSettings,
    quiet: bool,
    taught: Taught | None = None,
) -> Learnt:
    """Fit a network (a `Learner`).

    With `taught`, of one class, it learns besides to answer as another does; its tensors must be as those that this
    network takes.

    Raises
    ------
    UsageError
        PyTorch is not installed; no such network, or not with that normalisation; too few stamps that can be scored;
        answers that are not for such a network.
    ModelError
        A base that cannot be continued from.
    """
    torch = check_torch()
    from batchproc.training.fit import export_onnx, fit
    from batchproc.training.networks import new_network

    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    outputs = len(classes)
    if settings.base:
        from batchproc.training.continued import continue_from

        card, net, notes = continue_from(settings, classes, train)
    else:
        card = wanted_input(settings)
        net = new_network(settings.network, card.size, outputs, _features(train, card, _usable(train, card)))
        notes = {"network": settings.network}
    known, apart = _labelled("train", train, card, classes), _labelled("valid", valid, card, classes)
    if taught is not None:
        if outputs > 1 or card.features or taught.tensor.shape[1:] != (card.depth, card.size, card.size):
            raise UsageError(
                f"answers to tensors {taught.tensor.shape[1:]} are for a network of one class without features that "
                f"takes such; this one has {outputs} and takes {(card.depth, card.size, card.size)}"
            )
        known = _with_answers(known, taught)
    # What is swapped is the first two channels; features are of the epochs as they were, and would contradict them. So
    # would a difference that has been turned round, or a sky by the noise of new.
    swaps = card.channels == CHANNELS and not card.features and card.sign == SIGNS[0] and not card.sky
    config = replace(settings, swap=settings.swap and swaps)
    history = fit(net, known, apart, config=config, head=net.head if settings.base else None, progress=not quiet)
    export_onnx(
        net,
        folder / "model.onnx",
        card.size,
        card.depth,
        layout=card.layout,
        n_features=len(card.features),
        several=outputs > 1,
    )
    table = pd.DataFrame(
        {
            "epoch": np.arange(1, len(history.valid_loss) + 1),
            "train_loss": history.train_loss,
            "valid_loss": history.valid_loss,
            "valid_auc_pr": history.valid_auc_pr,
        }
    )
    return Learnt(
        files={"float": "model.onnx"},
        input=card,
        notes={
            **notes,
            "parameters": sum(p.numel() for p in net.parameters()),
            "epochs": history.best_epoch + 1,
            "torch": str(torch.__version__),
        },
        history=table,
        best_epoch=history.best_epoch + 1,
        interrupted=history.interrupted,
    )


def wanted_input(settings: TrainSettings) -> InputCard:
    """What a new network wants to see; raises `UsageError` for no such network, or not with that normalisation."""
    from batchproc.training.networks import recipe_of

    recipe = recipe_of(settings.network)
    if settings.normalisation not in ("", recipe.normalisation) and recipe.scales != SCALES[0]:
        raise UsageError(
            f"network {settings.network}: looks at scales {recipe.scales} of stamps prepared by "
            f"{recipe.normalisation}, not {settings.normalisation}; leave that setting out, or take vgg6"
        )
    return InputCard(
        size=settings.size or recipe.size,
        normalisation=settings.normalisation or recipe.normalisation,
        layout=settings.layout or "NCHW",
        features=settings.features,
        scales=recipe.scales,
    )


def check_torch() -> Any:
    """The package; raises `UsageError` saying what to install where it is not there."""
    try:
        import onnx  # noqa: F401  # the exporter of torch needs it
        import torch
    except ImportError as error:
        raise UsageError(
            f"to train a network, install what that needs: pip install 'batchproc[train]' ({error})"
        ) from None
    return torch


def _labelled(name: str, examples: Examples, card: InputCard, classes: Sequence[str]) -> Any:
    """Tensors and truth of what can be scored."""
    from batchproc.training.fit import Labelled

    rows = _usable(examples, card)
    label = examples.label[rows]
    wanted = [REAL, BOGUS] if tuple(classes) == (REAL,) else list(classes)
    missing = [one for one in wanted if not (label == one).any()]
    if missing:
        raise UsageError(
            f"the part {name}: {len(rows)} of {len(examples)} examples can be scored (data in enough of the stamp, "
            f"finite features), and none is {' or '.join(missing)}"
        )
    truth = label == REAL if len(classes) == 1 else class_numbers(label, classes)
    return Labelled(Normalised(examples.stamps, card, rows), truth, _features(examples, card, rows))


def _with_answers(known: Any, taught: Taught) -> Any:
    """What is known, and what another network answers."""
    unknown = np.full(len(known.truth), np.nan, np.float32)
    return replace(
        known,
        tensor=Joined(known.tensor, taught.tensor),
        truth=np.concatenate([known.truth, taught.score >= 0.5]),
        answer=np.concatenate([unknown, taught.score]),
    )


def _usable(examples: Examples, card: InputCard) -> NDArray[np.intp]:
    """Rows of which a model with this card would give a score."""
    scored = np.zeros(len(examples), np.bool_)
    for k in range(0, len(examples), _CHUNK):
        scored[k : k + _CHUNK] = card.prepare(examples.stamps[k : k + _CHUNK])[1]
    if card.features:
        scored &= np.isfinite(_columns(examples, card)).all(axis=1)
    return np.flatnonzero(scored)


def _features(examples: Examples, card: InputCard, rows: NDArray[np.intp]) -> NDArray[np.float32] | None:
    return _columns(examples, card)[rows] if card.features else None


def _columns(examples: Examples, card: InputCard) -> NDArray[np.float32]:
    return examples.table[list(card.features)].to_numpy(np.float32, na_value=np.nan)
