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
from batchproc.records import Difference

__all__ = ["SOURCE", "Sample", "assess", "forced_flux"]

#: One injected source. ``flux`` in electrons; ``snr``: T / σ_α expected at its place; ``expected``: probability to find
#: it; ``scorr``, ``dx``, ``dy``: of the detection, NaN where there is none; ``pull``: (α − T) / σ_α at the injected
#: position, found or not; ``bound_x``, ``bound_y``: smallest possible errors, pixels.
SOURCE = np.dtype(
    [(name, np.float64) for name in ("x", "y", "flux", "snr", "expected", "scorr", "dx", "dy", "pull", "ratio")]
    + [("bound_x", np.float64), ("bound_y", np.float64), ("flags", np.int32), ("place", "U12"), ("usable", bool)]
)

#: One detection that is nothing: signed S_corr and flags.
ALARM = np.dtype([("x", np.float64), ("y", np.float64), ("scorr", np.float64), ("flags", np.int32)])

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
        Detections in one Gaussian field of this image's P_D.
    gaussian_mpix : float
    facts : mapping
        ``sky`` (electrons a pixel), ``rms`` (of S_corr on blank sky before renormalisation), ``rms_error``, ``fwhm``
        (of P_D), ``seconds`` (CPU of the flow), and the receipt's quality.
    """

    name: str
    sources: NDArray[np.void]
    alarms: NDArray[np.void]
    mpix: float
    gaussian: NDArray[np.void]
    gaussian_mpix: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def assess(
    name: str,
    result: ImageResult,
    truth: NDArray[np.void],
    *,
    threshold: float,
    lowest: float,
    rng: np.random.Generator,
    facts: Mapping[str, Any],
    gain: float = 1.0,
) -> Sample:
    """Hold the result of one image against what was put into it.

    Parameters
    ----------
    name : str
    result : ImageResult
        Of a configuration whose detection threshold was `lowest`.
    truth : structured ndarray (n,)
        ``x, y, flux`` (electrons), ``snr`` (local), ``place``.
    threshold : float
        From which a source counts as found, sigma.
    lowest : float
        From which false alarms are counted, sigma.
    rng : Generator
    facts : mapping
    gain : float
        Electrons per unit of the catalogue's fluxes.
    """
    difference = result.difference
    ny, nx = difference.difference.shape
    kernels = difference.kernels_at(nx / 2, ny / 2)
    source = PointSource(kernels.psf)
    radius = max(2.0, source.fwhm)
    distance = _distance_to_bad(difference)
    catalogue = result.catalogue
    found = Found(*(np.asarray(catalogue[key]) for key in ("x", "y", "scorr", "flux", "flags")))

    rows = np.zeros(len(truth), SOURCE)
    for key in ("x", "y", "flux", "snr", "place"):
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
    rows["usable"] = (_at(distance, truth["x"], truth["y"]) > 1.5 * source.fwhm) & np.isfinite(rows["pull"])

    area = distance > 1.5 * source.fwhm
    clear = _CLEAR_FWHM * source.fwhm
    area &= _distance_to_points((ny, nx), truth["x"], truth["y"]) > clear
    nothing = _at(area, found.x, found.y) & (np.abs(found.scorr) > lowest)
    field_of_noise = gaussian_difference(kernels, (ny, nx), rng)
    noise = detect(field_of_noise, config=DetectConfig(threshold=lowest, max_candidates=10**6))
    return Sample(
        name=name,
        sources=rows,
        alarms=_alarms(found.x[nothing], found.y[nothing], found.scorr[nothing], found.flags[nothing]),
        mpix=float(np.count_nonzero(area)) / 1e6,
        gaussian=_alarms(noise["x"], noise["y"], noise["scorr"], noise["flags"]),
        gaussian_mpix=ny * nx / 1e6,
        facts={**facts, "fwhm": source.fwhm, "radius": radius},
    )


@dataclass(frozen=True)
class Found:
    """Detections of one image."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    scorr: NDArray[np.float64]
    flux: NDArray[np.float64]
    flags: NDArray[np.int32]

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


def _distance_to_bad(difference: Difference) -> NDArray[np.float64]:
    """Of every pixel, to the nearest masked one or the edge of the image, pixels."""
    good = np.pad(difference.mask == 0, 1, constant_values=False)
    return np.asarray(distance_transform_edt(good))[1:-1, 1:-1]


def _distance_to_points(shape: tuple[int, int], x: NDArray, y: NDArray) -> NDArray[np.float64]:
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


def _alarms(x: NDArray, y: NDArray, scorr: NDArray, flags: NDArray) -> NDArray[np.void]:
    rows = np.zeros(len(x), ALARM)
    for name, values in (("x", x), ("y", y), ("scorr", scorr), ("flags", flags)):
        rows[name] = values
    return rows
