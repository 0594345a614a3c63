"""Where a pixel of one image lies on another: a smooth map known exactly on a coarse grid of nodes.

Two WCS are expensive to evaluate and smooth to follow, so they are evaluated on nodes some tens of pixels apart, and a
bicubic spline does the rest. Resampling reads the spline directly (`resample`); everybody else calls the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.wcs import NoConvergence
from astropy.wcs.utils import wcs_to_celestial_frame
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline

from batchproc.errors import AlignError

__all__ = ["PixelMap", "world_to_pixel"]

Function = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]

#: Nodes reach this far beyond the image, so that stars and PSFs at its edge need no extrapolation.
MARGIN = 16.0
#: Distance of nodes in pixels to begin with, and at least; from one to the other it is halved while it is too coarse.
STEPS = (64, 32, 16, 8)
#: Largest error of the interpolation in pixels, measured half-way between nodes.
TOLERANCE = 3e-4


@dataclass(frozen=True)
class PixelMap:
    """Pixel coordinates of new → pixel coordinates of ref.

    Build one with `from_wcs`, `from_affine` or `from_function`; call it with arrays ``(x, y)``.

    Attributes
    ----------
    shape : (int, int)
        (ny, nx) of new, the image that the map was made for.
    origin : float
        Both coordinates of the first node.
    step : (float, float)
        Distance of nodes in pixels along y and x.
    nodes : ndarray (2, 4, n_y, n_x) float64
        For x and y of ref: value, ∂x, ∂y and ∂xy at the nodes, derivatives in units of the step (a bicubic Hermite
        spline, C2 because the derivatives are those of a not-a-knot cubic spline).
    valid : ndarray (n_y - 1, n_x - 1) bool
        Cells between nodes that all have a position on ref.
    """

    shape: tuple[int, int]
    origin: float
    step: tuple[float, float]
    nodes: NDArray[np.float64]
    valid: NDArray[np.bool_]

    @classmethod
    def from_function(cls, function: Function, shape: tuple[int, int]) -> PixelMap:
        """Follow a smooth function ``(x, y) -> (xr, yr)`` of arrays; NaN where it has no answer.

        The step between nodes is halved until the spline agrees with the function half-way between nodes.

        Raises
        ------
        AlignError
            When the function has an answer at fewer than 16 nodes.
        """
        for step in STEPS:
            result = cls._on_nodes(function, shape, step)
            ys, xs = result._axes()
            x, y = np.meshgrid((xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2)
            exact, found = function(x, y), result(x, y)
            error = np.maximum(np.abs(exact[0] - found[0]), np.abs(exact[1] - found[1]))[result.valid]
            if error.size == 0 or not np.nanmax(error, initial=0.0) > TOLERANCE:
                break
        return result

    @classmethod
    def from_wcs(cls, wcs_new: Any, wcs_ref: Any, shape_new: tuple[int, int]) -> PixelMap:
        """Through the sky: two `astropy.wcs.WCS` with any projection and distortion (TAN, SIP, TPV, tables).

        Parameters
        ----------
        wcs_new, wcs_ref : astropy.wcs.WCS
            Celestial; frames that differ (FK5 and ICRS, say) are converted.
        shape_new : (int, int)

        Raises
        ------
        AlignError
            When the two have nothing to do with each other, so that hardly a node of new has a place on ref.
        """
        wcs_new, wcs_ref = _celestial(wcs_new), _celestial(wcs_ref)
        frame_new, frame_ref = wcs_to_celestial_frame(wcs_new), wcs_to_celestial_frame(wcs_ref)
        same_frame = frame_new.is_equivalent_frame(frame_ref)

        def function(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
            lon, lat = wcs_new.all_pix2world(x.ravel(), y.ravel(), 0)
            if not same_frame:
                sky = SkyCoord(lon, lat, unit="deg", frame=frame_new).transform_to(frame_ref)
                lon, lat = sky.spherical.lon.deg, sky.spherical.lat.deg
            xr, yr = world_to_pixel(wcs_ref, lon, lat)
            return xr.reshape(x.shape), yr.reshape(x.shape)

        return cls.from_function(function, shape_new)

    @classmethod
    def from_affine(cls, matrix: ArrayLike, shape: tuple[int, int]) -> PixelMap:
        """``xr = m00 x + m01 y + m02``, ``yr = m10 x + m11 y + m12``."""
        (a, b, c), (d, e, f) = np.asarray(matrix, np.float64)
        return cls.from_function(lambda x, y: (a * x + b * y + c, d * x + e * y + f), shape)

    def __call__(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixel coordinates on ref of the points (x, y) of new; beyond the nodes, the last cell's cubic goes on."""
        values, shape = self._evaluate(x, y)
        return values[0].reshape(shape), values[1].reshape(shape)

    def jacobian(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """``(…, 2, 2)``: rows xr, yr; columns ∂/∂x, ∂/∂y."""
        values, shape = self._evaluate(x, y)
        return values[2:].T.reshape((*shape, 2, 2))

    def inverse(self, xr: ArrayLike, yr: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixel coordinates on new of points of ref, by Newton's method; good to 1e-6 px in and around new.

        Points that do not get there (far outside) are NaN.
        """
        xr, yr = np.asarray(xr, np.float64), np.asarray(yr, np.float64)
        centre = (self.shape[1] - 1) / 2, (self.shape[0] - 1) / 2
        x, y = np.full(xr.shape, centre[0]), np.full(xr.shape, centre[1])
        # Beyond twice the image nothing is looked for, and cubics must not run away.
        reach = 2.0 * max(self.shape)
        for _ in range(12):
            found_x, found_y = self(x, y)
            j = self.jacobian(x, y)
            determinant = j[..., 0, 0] * j[..., 1, 1] - j[..., 0, 1] * j[..., 1, 0]
            dx, dy = xr - found_x, yr - found_y
            step_x = (j[..., 1, 1] * dx - j[..., 0, 1] * dy) / determinant
            step_y = (j[..., 0, 0] * dy - j[..., 1, 0] * dx) / determinant
            x = np.clip(x + step_x, -reach, 2 * reach)
            y = np.clip(y + step_y, -reach, 2 * reach)
        found_x, found_y = self(x, y)
        good = np.hypot(found_x - xr, found_y - yr) < 1e-6 * max(1.0, *self.scales)
        return np.where(good, x, np.nan), np.where(good, y, np.nan)

    def shifted(self, dx: Function | Any, dy: Any = None) -> PixelMap:
        """The map after a correction on new's grid: ``(x, y) → self(x + dx, y + dy)``.

        Parameters
        ----------
        dx : callable or float
            Either a function ``(x, y) -> (dx, dy)`` of arrays, such as a `Registration`, or a number with `dy`.
        dy : float, optional
        """
        move: Function = dx if callable(dx) else (lambda x, y: (np.full(x.shape, dx), np.full(x.shape, dy)))

        def function(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
            shift_x, shift_y = move(x, y)
            xr, yr = self(x + shift_x, y + shift_y)
            known = self._is_valid(x, y)
            return np.where(known, xr, np.nan), np.where(known, yr, np.nan)

        return type(self).from_function(function, self.shape)

    def cropped(self, x0: int, y0: int) -> PixelMap:
        """The map to a cut-out of ref that begins at its pixel (x0, y0)."""
        nodes = self.nodes.copy()
        nodes[0, 0] -= x0
        nodes[1, 0] -= y0
        return PixelMap(self.shape, self.origin, self.step, nodes, self.valid)

    @property
    def scales(self) -> tuple[float, float]:
        """Ref pixels per pixel of new, along ref's x and y axis (medians over the image); above 1: ref is finer."""
        gradient = self._node_gradients()
        sx = np.median(np.hypot(gradient[0, 0], gradient[0, 1]))
        sy = np.median(np.hypot(gradient[1, 0], gradient[1, 1]))
        return float(sx), float(sy)

    @property
    def area(self) -> float:
        """Ref pixels that a pixel of new covers (median over the image)."""
        g = self._node_gradients()
        return float(np.median(np.abs(g[0, 0] * g[1, 1] - g[0, 1] * g[1, 0])))

    def is_identity(self, tolerance: float = 1e-3) -> bool:
        """Whether every pixel lies on the pixel of ref with the same indices, to within `tolerance` pixels."""
        return self.whole_shift(tolerance) == (0, 0)

    def whole_shift(self, tolerance: float = 1e-3) -> tuple[int, int] | None:
        """(dx, dy) where every pixel (x, y) lies on (x + dx, y + dy) of ref, to within `tolerance` pixels; or None."""
        ys, xs = self._axes()
        off_x, off_y = self.nodes[0, 0] - xs[None, :], self.nodes[1, 0] - ys[:, None]
        dx, dy = round(float(np.median(off_x))), round(float(np.median(off_y)))
        off = max(float(np.abs(off_x - dx).max()), float(np.abs(off_y - dy).max()))
        return (dx, dy) if off < tolerance and bool(self.valid.all()) else None

    def bounds(self) -> tuple[float, float, float, float]:
        """x_min, x_max, y_min, y_max on ref of the valid part of the map."""
        corner = np.zeros(self.nodes.shape[2:], bool)
        for j in (0, 1):
            for i in (0, 1):
                corner[j : j + self.valid.shape[0], i : i + self.valid.shape[1]] |= self.valid
        x, y = self.nodes[0, 0][corner], self.nodes[1, 0][corner]
        return float(x.min()), float(x.max()), float(y.min()), float(y.max())

    def overlap(self, shape_ref: tuple[int, int]) -> float:
        """Fraction of new's area that lies on an image of shape (ny, nx)."""
        x = np.linspace(-0.5, self.shape[1] - 0.5, 65)
        y = np.linspace(-0.5, self.shape[0] - 0.5, 65)
        x, y = (m.ravel() for m in np.meshgrid((x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2))
        xr, yr = self(x, y)
        inside = (xr > -0.5) & (xr < shape_ref[1] - 0.5) & (yr > -0.5) & (yr < shape_ref[0] - 0.5)
        return float(np.mean(inside & self._is_valid(x, y)))

    @classmethod
    def _on_nodes(cls, function: Function, shape: tuple[int, int], spacing: float) -> PixelMap:
        axes, steps = [], []
        for length in shape:
            span = length - 1 + 2 * MARGIN
            n = max(3, int(np.ceil(span / spacing)))  # cells; a not-a-knot spline needs four nodes
            axes.append(-MARGIN + span / n * np.arange(n + 1))
            steps.append(span / n)
        ys, xs = axes
        x, y = np.meshgrid(xs, ys)
        xr, yr = function(x, y)
        good = np.isfinite(xr) & np.isfinite(yr)
        if good.sum() < 16:
            raise AlignError(
                f"only {good.sum()} of {good.size} grid points of new have a place on ref: the two WCS do not describe "
                "the same piece of sky; check them, or drop the reference's WCS to match by star patterns",
                found=int(good.sum()),
                needed=16,
            )
        values = []
        for value in (xr, yr):
            f = value if good.all() else _extrapolate(x, y, value, good)
            fx = CubicSpline(xs, f, axis=1)(xs, 1) * steps[1]
            fy = CubicSpline(ys, f, axis=0)(ys, 1) * steps[0]
            fxy = CubicSpline(ys, fx, axis=0)(ys, 1) * steps[0]
            values.append([f, fx, fy, fxy])
        valid = good[1:, 1:] & good[1:, :-1] & good[:-1, 1:] & good[:-1, :-1]
        return cls((int(shape[0]), int(shape[1])), -MARGIN, (steps[0], steps[1]), np.array(values), valid)

    def _axes(self) -> tuple[NDArray, NDArray]:
        n_y, n_x = self.nodes.shape[2:]
        return self.origin + self.step[0] * np.arange(n_y), self.origin + self.step[1] * np.arange(n_x)

    def _evaluate(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], tuple[int, ...]]:
        x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        out = np.empty((6, x.size))
        _evaluate_points(self.nodes, self.origin, *self.step, x.ravel(), y.ravel(), out)
        return out, x.shape

    def _is_valid(self, x: NDArray, y: NDArray) -> NDArray[np.bool_]:
        i = np.clip(((x - self.origin) // self.step[1]).astype(int), 0, self.valid.shape[1] - 1)
        j = np.clip(((y - self.origin) // self.step[0]).astype(int), 0, self.valid.shape[0] - 1)
        return self.valid[j, i]

    def _node_gradients(self) -> NDArray[np.float64]:
        """(2, 2, n_y, n_x): [xr, yr] by [∂x, ∂y]."""
        return self.nodes[:, 1:3] / np.array([self.step[1], self.step[0]])[None, :, None, None]


def world_to_pixel(wcs: Any, lon: NDArray, lat: NDArray) -> tuple[NDArray, NDArray]:
    """`wcs.all_world2pix` (0-based) with NaN for the points that it cannot invert, instead of an exception for all.

    Distortions are inverted by iteration, which fails far outside of an image; one such point must not take its
    neighbours along. Points whose failure is not told one by one are separated by halving.
    """
    if lon.size == 0:
        return np.empty(0), np.empty(0)
    try:
        x, y = wcs.all_world2pix(lon, lat, 0)
    except NoConvergence as error:
        x, y = error.best_solution.T.copy()
        for bad in (error.divergent, error.slow_conv):
            if bad is not None:
                x[bad], y[bad] = np.nan, np.nan
    except Exception:  # wcslib says in many ways that a point cannot be inverted
        if lon.size == 1:
            return np.full(1, np.nan), np.full(1, np.nan)
        half = lon.size // 2
        parts = world_to_pixel(wcs, lon[:half], lat[:half]), world_to_pixel(wcs, lon[half:], lat[half:])
        x, y = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    good = np.isfinite(x) & np.isfinite(y)
    x[~good], y[~good] = np.nan, np.nan
    return x, y


def _celestial(wcs: Any) -> Any:
    if wcs.naxis == 2 and wcs.has_celestial:
        return wcs
    if not wcs.has_celestial:
        raise AlignError(
            f"a WCS without celestial axes (CTYPE {list(wcs.wcs.ctype)}) cannot align images: "
            "drop it to match by star patterns",
            ctype=str(list(wcs.wcs.ctype)),
        )
    return wcs.celestial


def _extrapolate(x: NDArray, y: NDArray, value: NDArray, good: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`value`, with a cubic fitted to the good nodes where it is missing: such cells are invalid but must be smooth."""
    u, v = (x - x.mean()) / np.ptp(x), (y - y.mean()) / np.ptp(y)
    degree = 3 if good.sum() >= 40 else 1
    terms = np.stack([u**i * v**j for i in range(degree + 1) for j in range(degree + 1 - i)], axis=-1)
    coefficients = np.linalg.lstsq(terms[good], value[good], rcond=None)[0]
    return np.where(good, value, terms @ coefficients)


@njit(cache=True, nogil=True)
def _evaluate_points(nodes, origin, step_y, step_x, x, y, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (6, n): xr, yr, ∂xr/∂x, ∂xr/∂y, ∂yr/∂x, ∂yr/∂y of the bicubic Hermite spline."""
    n_y, n_x = nodes.shape[2], nodes.shape[3]
    for k in range(x.size):
        u, v = (x[k] - origin) / step_x, (y[k] - origin) / step_y
        i = min(max(int(np.floor(u)), 0), n_x - 2)
        j = min(max(int(np.floor(v)), 0), n_y - 2)
        bx, gx = hermite(u - i)
        by, gy = hermite(v - j)
        for c in range(2):
            value, slope_x, slope_y = 0.0, 0.0, 0.0
            for b in range(2):
                for a in range(2):
                    f, fx = nodes[c, 0, j + b, i + a], nodes[c, 1, j + b, i + a]
                    fy, fxy = nodes[c, 2, j + b, i + a], nodes[c, 3, j + b, i + a]
                    along_x = bx[2 * a] * f + bx[2 * a + 1] * fx
                    along_x_y = bx[2 * a] * fy + bx[2 * a + 1] * fxy
                    value += by[2 * b] * along_x + by[2 * b + 1] * along_x_y
                    slope_y += gy[2 * b] * along_x + gy[2 * b + 1] * along_x_y
                    slope_x += by[2 * b] * (gx[2 * a] * f + gx[2 * a + 1] * fx) + by[2 * b + 1] * (
                        gx[2 * a] * fy + gx[2 * a + 1] * fxy
                    )
            out[c, k] = value
            out[2 + 2 * c, k] = slope_x / step_x
            out[3 + 2 * c, k] = slope_y / step_y


@njit(cache=True, nogil=True, inline="always")
def hermite(t):  # type: ignore[no-untyped-def]
    """Cubic Hermite basis (value and slope at 0, value and slope at 1) at t, and its derivative."""
    s = 1.0 - t
    basis = ((1.0 + 2.0 * t) * s * s, t * s * s, t * t * (3.0 - 2.0 * t), -t * t * s)
    slope = (-6.0 * t * s, s * (s - 2.0 * t), 6.0 * t * s, t * (t - 2.0 * s))
    return basis, slope
