"""The course of a training as a picture: losses, and what is wanted of the model, epoch by epoch."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from batchproc.drawing import GREY, colour, png

__all__ = ["draw_curves"]


def draw_curves(history: pd.DataFrame, best_epoch: int | None) -> bytes:
    """A PNG of a history as `Learnt` has it; the epoch whose weights were kept is marked."""

    def draw(figure: Figure) -> None:
        loss, quality = figure.subplots(1, 2)
        marker = "o" if len(history) < 3 else ""
        loss.plot(history["epoch"], history["train_loss"], marker=marker, color=colour(0), label="training part")
        loss.plot(history["epoch"], history["valid_loss"], marker=marker, color=colour(1), label="validation part")
        loss.set(xlabel="epoch", title="loss (cross entropy, classes balanced)")
        quality.plot(history["epoch"], history["valid_auc_pr"], marker=marker, color=colour(1))
        quality.set(xlabel="epoch", title="AUC-PR at 1:1, validation part")
        for axes in (loss, quality):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if best_epoch is not None:
                axes.axvline(best_epoch, color=GREY, linestyle="--", linewidth=1, label=f"kept: epoch {best_epoch}")
        loss.legend()

    return png(draw, (8.0, 3.2))
