"""The PSF of an image as a function of place: what it is made of, and where it may come from besides `psf.fit_psf`.

A stamp is a smooth elliptical profile, whose shape follows a polynomial in (x, y), plus a map of pixel values, each
of them a polynomial in (x, y). The first carries strong changes of width and elongation, which no polynomial in pixel
values could; the second carries whatever an ellipse is not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.errors import PsfError
from batchproc.imaging.moments import measure_moments
from batchproc.imaging.polynomial import Frame, n_terms, terms_at
from batchproc.imaging.shift import shift_stamp, taps, transform

__all__ = [
    "EllipticalProfile",
    "PsfModel",
    "add_profile",
    "centred",
    "edge_taper",
    "half_maximum_width",
    "moffat_table",
]

#: Largest stamp in pixels; tiles leave a border of half of it.
MAX_SIZE = 81
_TABLE_STEPS = 256


@dataclass(frozen=True)
class EllipticalProfile:
    """Moffat profile ``(1 + dᵀ A⁻¹ d)^-β`` with ``A = exp(L)``, L a polynomial in (x, y).

    Attributes
    ----------
    coefficients : ndarray (n_terms, 3) float64
        Of the entries of L as `stars.log_shape` orders them; A in pixels².
    degree : int
    beta : float
    """

    coefficients: NDArray[np.float64]
    degree: int
    beta: float

    def matrix(self, frame: Frame, x: Any, y: Any) -> NDArray[np.float64]:
        """A⁻¹ at places (n,): columns xx, yy, xy, (n, 3)."""
        return inverse_shape(frame.terms(x, y, self.degree) @ self.coefficients)


@njit(cache=True)
def inverse_shape(shape):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Exponentials (n, 3) of −[[mean + half, cross], [cross, mean − half]], as rows xx, yy, xy."""
    out = np.empty(shape.shape)
    for n in range(shape.shape[0]):
        mean, half, cross = shape[n, 0], shape[n, 1], shape[n, 2]
        radius = np.hypot(half, cross)
        even = np.exp(-mean) * np.cosh(radius)
        odd = -np.exp(-mean) * (np.sinh(radius) / radius if radius > 1e-9 else 1.0)
        out[n, 0], out[n, 1], out[n, 2] = even + odd * half, even - odd * half, odd * cross
    return out


@dataclass(frozen=True, eq=False)
class PsfModel:
    """A PSF that may vary across the image.

    `at` gives the stamp of a source that sits exactly on pixel (x, y): centred by the definition of
    `moments.measure_moments` (which star positions share), of unit sum.

    Attributes
    ----------
    planes : ndarray (n_terms, size, size) float64
        Pixel values: coefficients of the polynomial terms of `frame`.
    degree : int
        Of `planes` in (x, y); 0 is constant.
    fwhm : float
        In pixels, at the image centre: diameter of the circle of the area above half maximum.
    n_stars : int
        Stars it was measured from; 0 where it was given.
    quality : mapping
        ``n_stars``, ``n_found``, ``degree``, ``chi2``, ``residual``, ``ellipticity`` … see `psf.fit_psf`.
    frame : Frame
    profile : EllipticalProfile or None
        Added to `planes`.
    offset : ndarray (n_terms, 2) float64
        Polynomial of the same frame (degree `offset_degree`): what `at` moves the stamp by, so that it is centred.
    """

    planes: NDArray[np.float64]
    degree: int
    fwhm: float
    n_stars: int = 0
    quality: Mapping[str, Any] = field(default_factory=dict)
    frame: Frame = field(default_factory=lambda: Frame(0.0, 0.0, 1.0, 1.0))
    profile: EllipticalProfile | None = None
    offset: NDArray[np.float64] | None = None
    offset_degree: int = 0

    @property
    def size(self) -> int:
        """Side of the (odd, square) stamp in pixels."""
        return int(self.planes.shape[-1])

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """PSF stamp ``(size, size)`` of a source on pixel (x, y): centred, unit sum."""
        frame = self.frame
        u, v = frame.normalised(x, y)
        dx = dy = 0.0
        if self.offset is not None:
            dx, dy = (terms_at(u, v, self.offset_degree) @ self.offset).tolist()
        stamp = np.empty((self.size, self.size))
        mix = terms_at(u, v, self.degree)
        if self.profile is None and max(abs(dx), abs(dy)) > 1:
            stamp = shift_stamp(np.tensordot(mix, self.planes, axes=1), dx, dy)
        else:
            _mix_planes(self.planes, mix, dx, dy, stamp)
        if self.profile is not None:
            shape = terms_at(u, v, self.profile.degree) @ self.profile.coefficients
            add_profile(stamp, inverse_shape(shape[None])[0], moffat_table(self.profile.beta), dx, dy)
            stamp *= edge_taper(self.size)
        stamp /= stamp.sum()
        return stamp

    @classmethod
    def from_array(cls, psf: NDArray[np.floating]) -> PsfModel:
        """A constant PSF from a stamp.

        Parameters
        ----------
        psf : ndarray (h, w)
            Any size from 5 to some hundred pixels, odd or even, any positive sum, roughly centred.

        Raises
        ------
        PsfError
            Where it cannot be a PSF: not two-dimensional, not finite, no positive sum, no peak near its middle.
        """
        stamp = np.array(psf, dtype=np.float64)
        if stamp.ndim != 2 or min(stamp.shape) < 5:
            raise PsfError(
                f"PSF stamp of shape {stamp.shape}: expected two dimensions of 5 pixels or more; "
                "give a square stamp, or leave the PSF out to have it measured",
                found=list(stamp.shape),
                needed=[5, 5],
            )
        if not np.isfinite(stamp).all():
            raise PsfError(
                f"PSF stamp with {np.count_nonzero(~np.isfinite(stamp))} values that are not finite, expected none; "
                "replace them, or leave the PSF out to have it measured",
                found=int(np.count_nonzero(~np.isfinite(stamp))),
                needed=0,
            )
        if not stamp.sum() > 0:
            raise PsfError(
                f"PSF stamp with a sum of {stamp.sum():g}, expected a positive one; "
                "leave the PSF out to have it measured",
                found=float(stamp.sum()),
                needed=1.0,
            )
        stamp = centred(_odd_square(stamp / stamp.sum()))
        return cls(planes=stamp[None], degree=0, fwhm=half_maximum_width(stamp), quality=_quality_of(stamp, 0))

    @classmethod
    def from_psfex(cls, header: Mapping[str, Any], data: Any) -> PsfModel:
        """A PSF written by PSFEx (``.psf``: a binary table of one row with the column ``PSF_MASK``).

        Parameters
        ----------
        header : mapping
            Of the table: ``POLNAXIS``, ``POLDEG1``, ``POLNAME1…``, ``POLZERO1…``, ``POLSCAL1…``, ``PSF_SAMP``.
        data : FITS record array, or ndarray (n_terms, h, w)
            The table's data, or its ``PSF_MASK``.

        Raises
        ------
        PsfError
            Where the model depends on anything but position, or keywords and data disagree.

        Notes
        -----
        Model pixels are `PSF_SAMP` image pixels wide; they are interpolated at the centres of image pixels. The pixel
        coordinates of PSFEx begin at 1. (Bertin 2011, ASPC 442, 435; PSFEx manual.)
        """
        cube = _psfex_cube(data)
        degree, frame = _psfex_frame(header, cube.shape[0])
        step = float(header.get("PSF_SAMP", 1.0)) or 1.0
        planes = _resampled(cube, step)
        flux = planes[0].sum()
        if not (np.isfinite(planes).all() and flux > 0):
            raise PsfError(
                f"PSFEx model with a sum of {flux:g}, expected a positive, finite one; run PSFEx again, or leave the "
                "PSF out to have it measured",
                found=float(flux),
                needed=1.0,
            )
        bare = cls(planes=planes / flux, degree=degree, fwhm=1.0, frame=frame)
        offset, offset_degree = centring_offset(bare)
        middle = cls(bare.planes, degree, 1.0, frame=frame, offset=offset, offset_degree=offset_degree)
        stamp = middle.at(frame.x0, frame.y0)
        return cls(
            planes=bare.planes,
            degree=degree,
            fwhm=half_maximum_width(stamp),
            quality=_quality_of(stamp, degree),
            frame=frame,
            offset=offset,
            offset_degree=offset_degree,
        )


def centred(stamp: NDArray[np.float64]) -> NDArray[np.float64]:
    """The stamp moved so that its centre is the middle pixel, and scaled to unit sum.

    Raises
    ------
    PsfError
        Where there is no peak near the middle to centre on.
    """
    first = _centre(stamp)
    flat = np.count_nonzero(stamp > 0.5 * stamp.max()) > stamp.size / 3
    out = stamp
    if not flat and np.hypot(*first) < stamp.shape[0] / 4:
        for _ in range(3):
            dx, dy = _centre(out)
            if not np.hypot(dx, dy) < stamp.shape[0] / 4:
                break
            out = shift_stamp(out, -dx, -dy)
        if out.sum() > 0 and np.hypot(*_centre(out)) < 0.05:
            return out / out.sum()  # type: ignore[no-any-return]
    raise PsfError(
        f"PSF stamp of {stamp.shape[0]} pixels without a peak near its middle (found at {first[0]:.1f}, {first[1]:.1f} "
        "from there); give a centred PSF, or leave it out to have it measured",
        found=[float(v) for v in first],
        needed=[0.0, 0.0],
    )


def centring_offset(model: PsfModel) -> tuple[NDArray[np.float64], int]:
    """Polynomial (n_terms, 2), and its degree, of the move that centres a model everywhere."""
    degree = 0 if model.degree == 0 and model.profile is None else max(2, model.degree)
    frame = model.frame
    grid = np.linspace(-frame.limit, frame.limit, 1 if degree == 0 else degree + 3)
    u, v = (a.ravel() for a in np.meshgrid(grid, grid))
    x, y = frame.x0 + u * frame.x_scale, frame.y0 + v * frame.y_scale
    basis = frame.terms(x, y, degree)
    offset = np.zeros((n_terms(degree), 2))
    for _ in range(3):
        moved = PsfModel(
            model.planes, model.degree, 1.0, frame=frame, profile=model.profile, offset=offset, offset_degree=degree
        )
        centre = np.array([_centre(moved.at(a, b)) for a, b in zip(x, y, strict=True)])
        offset = offset - np.linalg.lstsq(basis, centre, rcond=None)[0]
    return offset, degree


def half_maximum_width(stamp: NDArray[np.float64]) -> float:
    """FWHM in pixels: diameter of the circle of the area above half maximum (geometric mean of an ellipse's axes)."""
    fine = 0.1
    reach = (stamp.shape[0] - 1) / 2
    spline = ndimage.spline_filter(stamp, order=5)
    height = stamp.max()
    half = min(reach, 2.0 + 1.5 * np.sqrt(np.count_nonzero(stamp > 0.3 * height)))
    steps = np.arange(-half, half + fine / 2, fine)
    grid = np.meshgrid(reach + steps, reach + steps, indexing="ij")
    values = ndimage.map_coordinates(spline, grid, order=5, prefilter=False)
    area = np.count_nonzero(values > values.max() / 2) * fine**2
    return float(2 * np.sqrt(area / np.pi))


@functools.cache
def edge_taper(size: int) -> NDArray[np.float64]:
    """1 inside, falling smoothly to 0 over the outer tenth of the circle that fits the stamp: no step at its edge."""
    half = (size - 1) / 2
    axis = np.arange(size) - half
    r = np.hypot(axis[:, None], axis[None, :]) / (half + 0.5)
    taper = 0.5 * (1 + np.cos(np.pi * np.clip((r - 0.88) / 0.12, 0, 1)))
    taper.flags.writeable = False  # one array serves all
    return taper  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def moffat_table(beta: float) -> NDArray[np.float64]:
    """``(1 + s²)^-β (β − 1) / π`` at s = 0, 1/256, …; powers for every pixel would take half the time of the fit.

    Linear between entries: within 4e-6 of the peak.
    """
    s = np.arange(64 * _TABLE_STEPS) / _TABLE_STEPS
    table = (beta - 1) / np.pi * (1 + s**2) ** -beta
    table.flags.writeable = False  # one array serves all
    return table  # type: ignore[no-any-return]


@njit(cache=True, fastmath=True, forceinline=True)
def add_profile(stamp, matrix, table, dx, dy):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Add an elliptical Moffat profile of unit integral, centred (dx, dy) off the middle, to a stamp.

    `matrix` is a row of `EllipticalProfile.matrix`, `table` is `moffat_table` of its β.
    """
    xx, yy, xy = matrix[0], matrix[1], matrix[2]
    ny, nx = stamp.shape
    cy, cx = (ny - 1) / 2 + dy, (nx - 1) / 2 + dx
    norm = np.sqrt(max(xx * yy - xy * xy, 0.0))
    last = table.size - 2
    for j in range(ny):
        v = j - cy
        for i in range(nx):
            u = i - cx
            s = _TABLE_STEPS * np.sqrt(max(xx * u * u + yy * v * v + 2.0 * xy * u * v, 0.0))
            k = min(int(s), last)
            stamp[j, i] += norm * (table[k] + min(s - k, 1.0) * (table[k + 1] - table[k]))


@njit(cache=True)
def _mix_planes(planes, terms, dx, dy, stamp):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """``Σ terms planes``, moved by (dx, dy), each within a pixel."""
    size = stamp.shape[0]
    mixed = np.zeros((size, size))
    for k in range(planes.shape[0]):
        for j in range(size):
            for i in range(size):
                mixed[j, i] += terms[k] * planes[k, j, i]
    if dx == 0.0 and dy == 0.0:
        stamp[:] = mixed
    else:
        transform(mixed, taps(dx), taps(dy), stamp, np.empty((size, size)))


def _centre(stamp: NDArray[np.float64]) -> tuple[float, float]:
    """Centre relative to the middle pixel; (inf, inf) where there is none."""
    half = (stamp.shape[0] - 1) / 2
    above = stamp > 0.5 * stamp.max()
    j, i = (np.mean(k) for k in np.nonzero(above))
    fwhm = 2 * np.sqrt(np.count_nonzero(above) / np.pi)
    found = measure_moments(stamp, np.array([i]), np.array([j]), fwhm=max(1.5, float(fwhm)))[0]
    if not found["ok"]:
        return float("inf"), float("inf")
    return float(found["x"] - half), float(found["y"] - half)


def _quality_of(stamp: NDArray[np.float64], degree: int) -> dict[str, Any]:
    return {"n_stars": 0, "n_found": 0, "degree": degree, "ellipticity": ellipticity(stamp)}


def ellipticity(stamp: NDArray[np.float64]) -> float:
    """1 − b/a of the core; NaN where it cannot be told."""
    half = (stamp.shape[0] - 1) / 2
    found = measure_moments(stamp, np.array([half]), np.array([half]), fwhm=max(1.5, half_maximum_width(stamp)))[0]
    if not found["ok"]:
        return float("nan")
    mean, radius = (found["xx"] + found["yy"]) / 2, np.hypot((found["xx"] - found["yy"]) / 2, found["xy"])
    return float(1 - np.sqrt(max(mean - radius, 0.0) / (mean + radius)))


def _odd_square(stamp: NDArray[np.float64]) -> NDArray[np.float64]:
    """Padded with zeros, or cut, about its middle to an odd square of 15 to `MAX_SIZE` pixels."""
    size = int(np.clip(max(stamp.shape) + 1 - max(stamp.shape) % 2, 15, MAX_SIZE))
    out = np.zeros((size, size))
    to, frm = [], []
    for n in stamp.shape:
        start = size // 2 - n // 2
        to.append(slice(max(0, start), min(size, start + n)))
        frm.append(slice(max(0, -start), min(n, size - start)))
    out[tuple(to)] = stamp[tuple(frm)]
    return out


def _psfex_cube(data: Any) -> NDArray[np.float64]:
    names = getattr(getattr(data, "dtype", None), "names", None)
    if names is not None:
        if "PSF_MASK" not in names:
            raise PsfError(
                f"PSFEx table with columns {list(names)}, expected PSF_MASK; give the .psf file that PSFEx wrote",
                found=list(names),
                needed=["PSF_MASK"],
            )
        data = data["PSF_MASK"][0]
    cube = np.array(data, dtype=np.float64)
    cube = cube[None] if cube.ndim == 2 else cube
    if cube.ndim != 3:
        raise PsfError(
            f"PSFEx model of {cube.ndim} dimensions, expected 3 (terms, y, x)", found=int(cube.ndim), needed=3
        )
    return cube


def _psfex_frame(header: Mapping[str, Any], n_planes: int) -> tuple[int, Frame]:
    """Degree of the polynomial and the coordinates it runs in."""
    n_axes = int(header.get("POLNAXIS", 0))
    degree = int(header.get("POLDEG1", 0)) if n_axes else 0
    names = [str(header.get(f"POLNAME{k}", "")).strip() for k in range(1, n_axes + 1)]
    positions = all(re.fullmatch(rf"(\w*{axis}\w*)", name, re.I) for axis, name in zip("XY", names, strict=False))
    if (n_axes not in (0, 2) and degree > 0) or not positions or int(header.get("POLNGRP", 1)) > 1:
        raise PsfError(
            f"PSFEx model that depends on {names}, expected [X_IMAGE, Y_IMAGE]; run PSFEx with "
            "PSFVAR_KEYS X_IMAGE,Y_IMAGE and PSFVAR_GROUPS 1,1",
            found=names,
            needed=["X_IMAGE", "Y_IMAGE"],
        )
    if n_planes != n_terms(degree):
        raise PsfError(
            f"PSFEx model with {n_planes} planes, expected {n_terms(degree)} for POLDEG1 = {degree}; "
            "the file is damaged or of another kind",
            found=n_planes,
            needed=n_terms(degree),
        )
    if degree == 0:
        return 0, Frame(0.0, 0.0, 1.0, 1.0)
    zero = [float(header[f"POLZERO{k}"]) for k in (1, 2)]
    scale = [float(header[f"POLSCAL{k}"]) or 1.0 for k in (1, 2)]
    # POLSCAL is the full range of the stars' positions: u runs from -1/2 to 1/2 over them, a little more in the image.
    return degree, Frame(zero[0] - 1, zero[1] - 1, scale[0], scale[1], limit=0.6)


def _resampled(cube: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Planes whose pixels are `step` image pixels wide, at the centres of image pixels; odd size."""
    _, ny, nx = cube.shape
    half = int(np.clip((min(ny, nx) * step - 1) / 2, 2, (MAX_SIZE - 1) // 2))
    steps = np.arange(-half, half + 1) / step
    grid = np.meshgrid(ny // 2 + steps, nx // 2 + steps, indexing="ij")
    return np.stack([ndimage.map_coordinates(plane, grid, order=5, mode="constant") for plane in cube])
