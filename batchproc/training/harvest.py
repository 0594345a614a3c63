"""Labelled stamps: what the pipeline finds in images whose transients are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.config import Config
from batchproc.flow import subtract_exposures
from batchproc.imaging.align import align
from batchproc.records import Flag
from batchproc.training.cases import Case
from batchproc.training.examples import BOGUS, REAL, Examples
from batchproc.training.sources import add_seeing

__all__ = ["harvest", "label"]

#: Unflagged artefacts fainter than this are mere noise.
_NOISE_BELOW = 4.6


def harvest(case: Case, config: Config, *, noise: int = 150, most: int = 500, seed: int = 0) -> Examples:
    """Run the pipeline on a case and label what it finds.

    Parameters
    ----------
    case : Case
    config : Config
        With a threshold lower than that of a survey there are more artefacts to learn from.
    noise : int
        Of unflagged artefacts below 4.6 sigma, mere noise, at most so many are kept, drawn at random by `seed`.
    most : int
        Of the other artefacts, at most so many.

    Returns
    -------
    found : Examples
        Labelled `REAL` or `BOGUS`; what can be told neither is left out. In the table, beside the catalogue's columns:
        ``kind`` and ``planted_snr`` of the transient, ``group`` of the case, and ``region``: the group and the place on
        a grid of 3 × 3, by which intervals are bootstrapped.

    Raises
    ------
    ExposureError
        The pipeline cannot process the images.
    """
    aligned = align(case.new, case.refs, config.align)
    result = subtract_exposures(case.new, aligned, config, image_id=case.name)
    catalogue = result.catalogue
    real, match = label(catalogue, case.truth, fwhm=result.receipt.quality["fwhm_new"], doubtful=case.doubtful)
    faint = (real == 0) & (catalogue["flags"] == 0) & (np.abs(catalogue["scorr"]) < _NOISE_BELOW)
    random = np.random.default_rng(seed)
    kept = [np.flatnonzero(real == 1)]
    for rows, number in ((faint, noise), ((real == 0) & ~faint, most)):
        kept.append(random.permutation(np.flatnonzero(rows))[:number])
    keep = np.sort(np.concatenate(kept))
    found = real[keep] == 1
    planted = case.truth[match[keep]] if len(case.truth) else np.zeros(len(keep), case.truth.dtype)
    table = add_seeing(pd.DataFrame(catalogue)).iloc[keep].drop(columns="stamp_index").reset_index(drop=True)
    ny, nx = case.new.shape
    tile = (3 * np.clip(table["x"], 0, nx - 1) / nx).astype(int) + 3 * (3 * np.clip(table["y"], 0, ny - 1) / ny).astype(
        int
    )
    table = table.assign(
        group=case.group,
        region=[f"{case.group}/{k}" for k in tile],
        kind=np.where(found, planted["kind"], ""),
        planted_snr=np.where(found, planted["snr"], np.nan),
    )
    return Examples(result.stamps[keep], np.where(found, REAL, BOGUS), table)


def label(
    catalogue: dict[str, NDArray], truth: NDArray, *, fwhm: float, doubtful: NDArray | None = None
) -> tuple[NDArray[np.int8], NDArray[np.intp]]:
    """What each candidate is.

    Returns
    -------
    real : ndarray (n,) int8
        1: the detection of a transient (the nearest of the right sign); 0: an artefact; −1: neither, in the wings of
        a transient, with masked pixels at its core, or at a doubtful place (x, y).
    match : ndarray (n,) intp
        Row of the transient, −1 for none.
    """
    n = len(catalogue["x"])
    real, match = np.zeros(n, np.int8), np.full(n, -1, np.intp)
    found = np.column_stack([catalogue["x"], catalogue["y"]])
    if n and doubtful is not None and len(doubtful):
        real[cKDTree(doubtful).query(found)[0] < fwhm + 2.0] = -1
    if n == 0 or len(truth) == 0:
        return real, match
    places = np.column_stack([truth["x"], truth["y"]])
    distance, nearest = cKDTree(places).query(found)
    real[distance < 2.0 * fwhm + 3.0] = -1
    close = distance < max(1.5, 0.6 * fwhm)
    right = close & (np.sign(catalogue["scorr"]) == np.sign(truth["flux"][nearest]))
    for k in np.flatnonzero(right)[np.argsort(-distance[right])]:
        match[k] = nearest[k]  # the nearest comes last
        others = right & (nearest == nearest[k]) & (np.arange(n) != k)
        match[others] = -1
    damaged = (catalogue["flags"] & (Flag.MASKED | Flag.EDGE)) != 0
    real[(match >= 0) & ~damaged] = 1
    return real, match
