"""What one image tells: each injected source against its expectation, and the detections that are nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, map_coordinates
from scipy.spatial import cKDTree

from batchproc.config import DetectConfig
from batchproc.flow import ImageResult
from batchproc.imaging.cutouts import windows
from batchproc.imaging.detect import detect
from batchproc.imaging.measure import PointSource
from batchproc.imaging.theory import Detectability, gaussian_difference, position_bound
from batchproc.records import Difference, Kernels

__all__ = ["SOURCE", "TRUTH", "Sample", "forced_flux", "image_facts", "look_at_nothing", "look_at_sources"]

#: One injected source. ``flux`` in electrons; ``snr``: T / σ_α expected at its place; ``expected``: probability to find
#: it; ``scorr``, ``dx``, ``dy``: of the detection, NaN where there is none; ``pull``: (α − T) / σ_α at the injected
#: position, found or not; ``bound_x``, ``bound_y``: smallest possible errors, pixels.
SOURCE = np.dtype(
    [(name, np.float64) for name in ("x", "y", "flux", "snr", "expected", "scorr", "dx", "dy", "pull", "ratio")]
    + [("bound_x", np.float64), ("bound_y", np.float64), ("flags", np.int32), ("place", "U16"), ("usable", bool)]
)

#: What was put in: flux in electrons of new; ``snr``: T / σ_α expected at its place; what is there.
TRUTH = np.dtype([*((name, np.float64) for name in ("x", "y", "flux", "snr")), ("place", "U16")])

#: One detection that is nothing: signed S_corr, flags, and whether the reference has a source there.
ALARM = np.dtype(
    [*((name, np.float64) for name in ("x", "y", "scorr")), ("flags", np.int32), ("place", "U16")],
)

_CLEAR_FWHM = 3.0  # detections closer to an injected source are not counted as false


@dataclass(frozen=True)
class Sample:
    """What one image tells.

    Attributes
    ----------
    name : str
    sources : structured ndarray of `SOURCE`
    alarms : structured ndarray of `ALARM`
        Detections where nothing was put, away from masked pixels and edges.
    mpix : float
        Area they were looked for in.
    gaussian : structured ndarray of `ALARM`
        Detections in Gaussian fields of this image's P_D.
    gaussian_mpix : float
    facts : mapping
        ``sky`` (electrons a pixel), ``rms`` and ``mean`` (of S_corr on blank sky before renormalisation), ``n_blank``
        (its pixels), ``fwhm`` (of P_D), ``image_mpix``, ``seconds`` (CPU of the flow), and numbers of the receipt.
    """

    name: str
    sources: NDArray[np.void]
    alarms: NDArray[np.void]
    mpix: float
    gaussian: NDArray[np.void]
    gaussian_mpix: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def look_at_sources(
    result: ImageResult, truth: NDArray[np.void], *, threshold: float, rng: np.random.Generator, gain: float = 1.0
) -> NDArray[np.void]:
    """What became of each injected source.

    Parameters
    ----------
    result : ImageResult
        Of the image that holds them.
    truth : structured ndarray (n,) of `TRUTH`
    threshold : float
        From which a source counts as found, sigma; not below that of the result.
    rng : Generator
    gain : float
        Electrons per unit of the catalogue's fluxes.

    Returns
    -------
    structured ndarray (n,) of `SOURCE`
    """
    difference = result.difference
    kernels, source = _kernels(difference)
    radius = max(2.0, source.fwhm)
    found = Found.of(result)
    rows = np.zeros(len(truth), SOURCE)
    for key in TRUTH.names or ():
        rows[key] = truth[key]
    index = found.match(truth["x"], truth["y"], np.sign(truth["flux"]), radius, threshold)
    hit = index >= 0
    for key in ("scorr", "dx", "dy", "ratio"):
        rows[key] = np.nan
    rows["scorr"][hit] = found.scorr[index[hit]]
    rows["flags"][hit] = found.flags[index[hit]]
    rows["dx"][hit] = found.x[index[hit]] - truth["x"][hit]
    rows["dy"][hit] = found.y[index[hit]] - truth["y"][hit]
    rows["ratio"][hit] = found.flux[index[hit]] * gain / truth["flux"][hit]
    alpha, error = forced_flux(difference, truth["x"], truth["y"])
    rows["pull"] = (alpha - truth["flux"]) / error
    rows["expected"] = Detectability.of(kernels.psf, radius=radius, rng=rng).probability(truth["snr"], threshold)
    bounds = position_bound(kernels.psf)
    rows["bound_x"], rows["bound_y"] = (bound / truth["snr"] for bound in bounds)
    rows["usable"] = _at(distance_to_bad(difference), truth["x"], truth["y"]) > 1.5 * source.fwhm
    rows["usable"] &= np.isfinite(rows["pull"])
    return rows


def look_at_nothing(
    result: ImageResult, x: NDArray, y: NDArray, *, lowest: float, rng: np.random.Generator, fields: int = 1
) -> tuple[NDArray[np.void], float, NDArray[np.void]]:
    """Detections where nothing was put, and those of Gaussian fields of the same P_D and size.

    Parameters
    ----------
    result : ImageResult
        Of a configuration whose detection threshold was `lowest`, sigma.
    x, y : ndarray (n,)
        Where something was put: within 3 FWHM of there nothing is counted, nor within 1.5 FWHM of masked pixels and
        edges.
    lowest : float
    rng : Generator
    fields : int
        How many Gaussian fields.

    Returns
    -------
    alarms : structured ndarray of `ALARM`
    mpix : float
        Area that was searched.
    gaussian : structured ndarray of `ALARM`
    """
    difference = result.difference
    shape = difference.mask.shape
    kernels, source = _kernels(difference)
    area = distance_to_bad(difference) > 1.5 * source.fwhm
    area &= distance_to_points(shape, x, y) > _CLEAR_FWHM * source.fwhm
    found = Found.of(result)
    nothing = _at(area, found.x, found.y) & (np.abs(found.scorr) > lowest)
    near = np.where(np.asarray(result.catalogue["ref_distance"]) < 1.5 * source.fwhm, "on a source", "blank sky")
    config = DetectConfig(threshold=lowest, max_candidates=10**6)
    noises = [detect(gaussian_difference(kernels, shape, rng), config=config) for _ in range(fields)]
    noise = {key: np.concatenate([n[key] for n in noises]) for key in ("x", "y", "scorr", "flags")}
    return (
        _alarms(found.x[nothing], found.y[nothing], found.scorr[nothing], found.flags[nothing], near[nothing]),
        float(np.count_nonzero(area)) / 1e6,
        _alarms(noise["x"], noise["y"], noise["scorr"], noise["flags"], np.full(len(noise["x"]), "blank sky")),
    )


def image_facts(result: ImageResult, blank: NDArray[np.bool_]) -> dict[str, Any]:
    """Noise of S_corr on blank sky, and what else of the receipt explains the rest.

    Parameters
    ----------
    result : ImageResult
    blank : ndarray (ny, nx) of bool
        Pixels that hold sky alone.
    """
    quality = result.receipt.quality
    values = result.difference.score_corr[blank & (result.difference.mask == 0)].astype(np.float64)
    values *= quality["renormalisation"]
    fwhm = _kernels(result.difference)[1].fwhm
    names = ("fwhm_new", "fwhm_ref", "renormalisation", "flux_ratio", "residual_amplitude", "residual_shift")
    return {
        "rms": float(values.std()) if values.size else float("nan"),
        "mean": float(values.mean()) if values.size else float("nan"),
        "n_blank": int(values.size),
        "fwhm": fwhm,
        "image_mpix": result.difference.mask.size / 1e6,
        "masked_fraction": float(np.mean(result.difference.mask != 0)),
        **{name: quality[name] for name in names},
    }


def _kernels(difference: Difference) -> tuple[Kernels, PointSource]:
    ny, nx = difference.mask.shape
    kernels = difference.kernels_at(nx / 2, ny / 2)
    return kernels, PointSource(kernels.psf)


@dataclass(frozen=True)
class Found:
    """Detections of one image."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    scorr: NDArray[np.float64]
    flux: NDArray[np.float64]
    flags: NDArray[np.int32]

    @classmethod
    def of(cls, result: ImageResult) -> Found:
        """Those of a result."""
        return cls(*(np.asarray(result.catalogue[key]) for key in ("x", "y", "scorr", "flux", "flags")))

    def match(self, x: NDArray, y: NDArray, sign: NDArray, radius: float, threshold: float) -> NDArray[np.int64]:
        """For each place the nearest detection of that sign above the threshold, −1 where none is within the radius."""
        index = np.full(len(x), -1)
        for one in (1, -1):
            rows, places = np.flatnonzero(one * self.scorr > threshold), np.flatnonzero(sign == one)
            if len(rows) and len(places):
                tree = cKDTree(np.column_stack([self.x[rows], self.y[rows]]))
                distance, nearest = tree.query(np.column_stack([x[places], y[places]]))
                index[places] = np.where(distance <= radius, rows[nearest], -1)
        return index


def forced_flux(difference: Difference, x: NDArray, y: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """α and σ_α (E41, E43) at given positions, whether anything was detected there or not.

    Parameters
    ----------
    difference : Difference
    x, y : ndarray (n,)
        Pixels, not confined to whole ones: α = S / F_S is interpolated by quintic splines, σ_α linearly.

    Returns
    -------
    flux, error : ndarray (n,) float64
        NaN where there is no data within 8 pixels.
    """
    half = 8
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    planes = [windows(plane, column, row, half, np.nan) for plane in (difference.flux, difference.flux_err)]
    out = np.full((2, len(x)), np.nan)
    for k in range(len(x)):
        place = [[half + y[k] - row[k]], [half + x[k] - column[k]]]
        for plane, order, values in zip(planes, (5, 1), out, strict=True):
            if np.isfinite(plane[k]).all():
                values[k] = map_coordinates(plane[k].astype(np.float64), place, order=order, mode="nearest")[0]
    return out[0], out[1]


def distance_to_bad(difference: Difference) -> NDArray[np.float64]:
    """Of every pixel, to the nearest masked one or the edge of the image, pixels."""
    good = np.pad(difference.mask == 0, 1, constant_values=False)
    return np.asarray(distance_transform_edt(good))[1:-1, 1:-1]


def distance_to_points(shape: tuple[int, int], x: NDArray, y: NDArray) -> NDArray[np.float64]:
    """Of every pixel, to the nearest of these places, pixels; inf where there is none inside the image."""
    empty = np.ones(shape, bool)
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = (column >= 0) & (column < shape[1]) & (row >= 0) & (row < shape[0])
    if not inside.any():
        return np.full(shape, np.inf)
    empty[row[inside], column[inside]] = False
    return np.asarray(distance_transform_edt(empty))


def _at(plane: NDArray, x: NDArray, y: NDArray) -> NDArray:
    row = np.clip(np.rint(y).astype(int), 0, plane.shape[0] - 1)
    column = np.clip(np.rint(x).astype(int), 0, plane.shape[1] - 1)
    return plane[row, column]


def _alarms(x: NDArray, y: NDArray, scorr: NDArray, flags: NDArray, place: NDArray) -> NDArray[np.void]:
    rows = np.zeros(len(x), ALARM)
    for name, values in (("x", x), ("y", y), ("scorr", scorr), ("flags", flags), ("place", place)):
        rows[name] = values
    return rows
