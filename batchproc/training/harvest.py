"""Labelled stamps: what the pipeline finds in images whose transients are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.config import Config
from batchproc.errors import ExposureError
from batchproc.flow import subtract_exposures
from batchproc.imaging.align import align
from batchproc.records import Flag
from batchproc.training.cases import Case

__all__ = ["Harvest", "harvest", "label"]

#: Pixels of a stamp that is kept for training.
STAMP_SIZE = 39
#: Settings of a `Case` that is careless.
CARELESS = {"subtract": {"source_noise": False, "star_residuals": False}, "align": {"refine": False}}


@dataclass(frozen=True)
class Harvest:
    """Candidates with their truth, one row each.

    Attributes
    ----------
    stamps : ndarray (n, 3, size, size) float32
    real : ndarray (n,) bool
    scorr : ndarray (n,)
    flags : ndarray (n,) int32
    snr : ndarray (n,)
        Of the planted transient; NaN for artefacts.
    kind : ndarray (n,) str
        That of the transient; empty for artefacts.
    image, region : ndarray (n,) str
        The image; its group and place on a grid of 3 × 3, by which bootstrap intervals are drawn.
    group : ndarray (n,) str
        See `Case`.
    """

    stamps: NDArray[np.float32]
    real: NDArray[np.bool_]
    scorr: NDArray[np.float32]
    flags: NDArray[np.int32]
    snr: NDArray[np.float64]
    kind: NDArray[np.str_]
    image: NDArray[np.str_]
    region: NDArray[np.str_]
    group: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, rows: NDArray) -> Harvest:
        return Harvest(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def join(cls, parts: Iterable[Harvest]) -> Harvest:
        """One after the other."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def harvest(case: Case, *, threshold: float = 3.75, faint: int = 150, most: int = 500, seed: int = 0) -> Harvest:
    """Run the pipeline on a case and label what it finds; an empty harvest where it cannot process the images.

    Parameters
    ----------
    case : Case
    threshold : float
        In sigma, lower than that of a survey: more artefacts to learn from.
    faint : int
        Of unflagged artefacts below 4.6 sigma, mere noise, at most so many are kept, drawn at random by `seed`.
    most : int
        Of the other artefacts, at most so many.
    """
    settings = {"detect": {"threshold": threshold}, "cutouts": {"size": STAMP_SIZE}}
    config = Config.from_dict(settings | (CARELESS if case.careless else {}))
    try:
        result = subtract_exposures(case.new, align(case.new, case.refs, config.align), config, image_id=case.name)
    except ExposureError as error:
        print(f"{case.name}: left out: {error}")
        return _rows(case, np.zeros((0, 3, STAMP_SIZE, STAMP_SIZE), np.float32), {})
    catalogue = result.catalogue
    real, match = label(catalogue, case.truth, fwhm=result.receipt.quality["fwhm_new"], doubtful=case.doubtful)
    known = match >= 0
    columns = {
        "real": real == 1,
        "scorr": catalogue["scorr"],
        "flags": catalogue["flags"],
        "snr": np.where(known, case.truth["snr"][match] if len(case.truth) else 0.0, np.nan),
        "kind": np.where(known, case.truth["kind"][match] if len(case.truth) else "", ""),
        "x": catalogue["x"],
        "y": catalogue["y"],
    }
    noise = (real == 0) & (catalogue["flags"] == 0) & (np.abs(catalogue["scorr"]) < 4.6)
    random = np.random.default_rng(seed)
    kept = [np.flatnonzero(real == 1)]
    for rows, number in ((noise, faint), ((real == 0) & ~noise, most)):
        kept.append(random.permutation(np.flatnonzero(rows))[:number])
    keep = np.sort(np.concatenate(kept))
    return _rows(case, result.stamps[keep], {name: values[keep] for name, values in columns.items()})


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


def _rows(case: Case, stamps: NDArray[np.float32], columns: dict[str, NDArray]) -> Harvest:
    n = len(stamps)
    ny, nx = case.new.shape
    empty = np.zeros(0)
    x, y = columns.get("x", empty), columns.get("y", empty)
    tile = (3 * np.clip(x, 0, nx - 1) / nx).astype(int) + 3 * (3 * np.clip(y, 0, ny - 1) / ny).astype(int)
    return Harvest(
        stamps=stamps,
        real=columns.get("real", empty).astype(bool),
        scorr=columns.get("scorr", empty).astype(np.float32),
        flags=columns.get("flags", empty).astype(np.int32),
        snr=columns.get("snr", empty).astype(np.float64),
        kind=columns.get("kind", empty).astype("U8"),
        image=np.full(n, case.name, "U64"),
        region=np.array([f"{case.group}/{k}" for k in tile], "U68"),
        group=np.full(n, case.group, "U64"),
    )
