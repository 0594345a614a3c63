"""Draw the picture of the README from a finished run: ``python docs/make_picture.py RUN [PICTURE]``.

Triplets of unflagged candidates: the new image, the reference, and the difference. They are chosen evenly along the
significance, from the strongest down to `FAINTEST`: nobody picks the pretty ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from batchproc import open_catalogue, open_stamps

COLUMNS = 8
FAINTEST = 10.0  # sigma


def choose(catalogue: pd.DataFrame, count: int) -> pd.DataFrame:
    """``count`` unflagged candidates, from the most to the least significant."""
    clean = catalogue[(np.abs(catalogue["scorr"]) >= FAINTEST) & (catalogue["flags"] == 0)]
    clean = clean.iloc[np.argsort(-np.abs(clean["scorr"].to_numpy()), kind="stable")]
    return clean.iloc[np.linspace(0, len(clean) - 1, count).round().astype(int)]


def draw(run: str | Path, picture: str | Path, columns: int = COLUMNS) -> None:
    """Write the picture."""
    chosen = choose(open_catalogue(run), columns)
    stamps = open_stamps(run)
    figure, axes = plt.subplots(3, columns, figsize=(1.25 * columns, 4.1), layout="constrained")
    for column, (_, row) in zip(axes.T, chosen.iterrows(), strict=True):
        triplet = np.asarray(stamps[row["stamp_index"]])
        noise = 1.4826 * np.nanmedian(np.abs(triplet[2] - np.nanmedian(triplet[2])))
        ranges = [(-3 * row["sigma_new"], 12 * row["sigma_new"])] * 2 + [(-8 * noise, 8 * noise)]
        for axis, plane, (low, high) in zip(column, triplet, ranges, strict=True):
            axis.imshow(plane, vmin=low, vmax=high, cmap="gray", origin="lower", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        column[0].set_title(f"{row['scorr']:+.0f} σ".replace("-", "−"), fontsize=9)
    for axis, name in zip(axes[:, 0], ("new", "reference", "difference"), strict=True):
        axis.set_ylabel(name, fontsize=9)
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    draw(arguments[0], arguments[1] if arguments[1:] else Path(__file__).parent / "images" / "transients.png")
