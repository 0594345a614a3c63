"""Synthetic pairs of known PSFs for every subtraction alike, and one way to count what each of them found.

"plain": constant noise-free PSFs handed to everybody, no saturation, nothing masked: only the algebra is on trial.
"hard": as it comes, with 0.15 px of registration jitter, saturated stars that bleed, and dead columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt, maximum_filter
from scipy.spatial import cKDTree

from batchproc.imaging.render import ParametricPsf
from batchproc.imaging.simulate import Scene, simulate_pair

JITTER = 0.15  # pixels
MATCH_RADIUS = 3.0  # pixels
MARGIN = 10  # pixels around masks and edges where nobody's detections count

_COMMON: dict[str, Any] = {"fwhm_new": 3.4, "fwhm_ref": 2.6, "n_transients": 80}
SCENES = {
    "plain": Scene(**_COMMON, saturation=np.inf, star_flux=(500.0, 5e5)),
    "hard": Scene(**_COMMON, registration_jitter=JITTER, bad_columns=2),
}


@dataclass(frozen=True)
class Pair:
    """Background-subtracted images in electrons, ``(ny, nx)`` float32, and what is true of them.

    Attributes
    ----------
    new, ref, variance_new, variance_ref, mask_new, mask_ref, sigma_new, sigma_ref, flux_ratio
        As in `batchproc.imaging.simulate.SimulatedPair`.
    x, y, flux : ndarray
        The transients, without those beside a mask or an edge.
    sure : ndarray of bool
        Which of them have an S/N of 5 or more; the others may be found, and need not.
    """

    new: np.ndarray
    ref: np.ndarray
    variance_new: np.ndarray
    variance_ref: np.ndarray
    mask_new: np.ndarray
    mask_ref: np.ndarray
    sigma_new: float
    sigma_ref: float
    flux_ratio: float
    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    sure: np.ndarray

    @property
    def psf_new(self) -> ParametricPsf:
        """Of new, the same everywhere."""
        return ParametricPsf(_COMMON["fwhm_new"])

    @property
    def psf_ref(self) -> ParametricPsf:
        """Of ref, the same everywhere."""
        return ParametricPsf(_COMMON["fwhm_ref"])

    @property
    def mask(self) -> np.ndarray:
        """True where either image is bad."""
        return (self.mask_new | self.mask_ref) != 0


def make_pair(data: str, kind: str, side: int = 2048, seed: int = 4) -> dict[str, str]:
    """The file of a pair, made if it is not there."""
    path = Path(data) / f"pair_{kind}_{side}_{seed}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pair = simulate_pair((side, side), seed, scene=SCENES[kind])
        images = ("new", "ref", "variance_new", "variance_ref", "mask_new", "mask_ref")
        truth = {name: pair.truth[name] for name in ("x", "y", "flux", "snr_local")}
        numbers = {name: getattr(pair, name) for name in ("sigma_new", "sigma_ref", "flux_ratio")}
        np.savez(path, **{name: getattr(pair, name) for name in images}, **truth, **numbers)
    return {"path": str(path)}


def load_pair(path: str) -> Pair:
    """The pair of a file."""
    with np.load(path) as file:
        contents = {name: file[name] for name in file.files}
    contents["sure"] = contents.pop("snr_local") >= 5
    clear = _clear((contents["mask_new"] | contents["mask_ref"]) != 0, contents["x"], contents["y"])
    for name in ("x", "y", "flux", "sure"):
        contents[name] = contents[name][clear]
    for name in ("sigma_new", "sigma_ref", "flux_ratio"):
        contents[name] = float(contents[name])
    return Pair(**contents)


def count(score: np.ndarray, pair: Pair, threshold: float = 5.0) -> dict[str, int]:
    """How many transients have a peak of their sign above the threshold in a map of S/N; how many peaks are of none."""
    height = np.abs(np.nan_to_num(score))
    rows, columns = np.nonzero((height >= threshold) & (height == maximum_filter(height, 7)))
    clear = _clear(pair.mask, columns, rows)
    rows, columns = rows[clear], columns[clear]
    if not len(rows):
        return {"expected": int(pair.sure.sum()), "found": 0, "false": 0}
    peaks = cKDTree(np.c_[columns, rows])
    distance, nearest = peaks.query(np.c_[pair.x, pair.y])
    same_sign = np.sign(score[rows, columns])[nearest] == np.sign(pair.flux)
    away, _ = cKDTree(np.c_[pair.x, pair.y]).query(np.c_[columns, rows])
    return {
        "expected": int(pair.sure.sum()),
        "found": int((pair.sure & same_sign & (distance <= MATCH_RADIUS)).sum()),
        "false": int((away > MATCH_RADIUS).sum()),
    }


def _clear(bad: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    distance = distance_transform_edt(~np.pad(bad, 1, constant_values=True))[1:-1, 1:-1]
    return distance[np.rint(y).astype(int), np.rint(x).astype(int)] > MARGIN
