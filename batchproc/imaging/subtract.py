"""ZOGY on a real image: by tiles with local PSFs, with masks, and with the errors of the models counted as noise.

`zogy` holds the algebra of one frame. Here a frame becomes a tile with a border (so that the cyclic transforms leak
nothing into the part that is kept), each with the PSFs at its centre and its own scalar sigmas; bad pixels are treated
alike in both images; and S_corr is brought to unit width where it is not.

    prepare      what the tiles of an image need, once
    subtract_tile   one tile: a pure function of what little it needs, so it may run anywhere
    finish       what is measured on all tiles together: residuals of stars, the width of S_corr

`subtract` is the three of them. Everything that tiles hand back is scaled by sqrt(F_S) of its tile, so that it is
continuous where tiles meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numba
import numpy as np
from numpy.typing import NDArray

from batchproc.errors import SubtractError
from batchproc.imaging.fft import SIDES
from batchproc.imaging.zogy import (
    MOST_VARIANCE,
    Frame,
    Planes,
    filter_frame,
    interpolate_over,
    make_filters,
    score_frame,
)
from batchproc.records import Difference, Kernels, MaskBit, PsfLike

__all__ = [
    "FILL_REACH",
    "HISTOGRAM_EDGES",
    "MapTiles",
    "ResidualModel",
    "Subtraction",
    "Tile",
    "TileInput",
    "TileResult",
    "finish",
    "plan_tiles",
    "prepare",
    "subtract",
    "subtract_tile",
    "tile_border",
]

#: S_corr's histogram in receipts: counts on these edges.
HISTOGRAM_EDGES = np.arange(-8.0, 8.01, 0.25)

#: So far away, in pixels, are the good ones that a bad one takes its value from.
FILL_REACH = 32

#: The finer histogram that the width is read from: this many bins per sigma, out to as many sigma.
_BINS_PER_SIGMA, _HISTOGRAM_REACH = 256, 16

#: Farther out than this many sigma, blank sky is not asked how wide its noise is.
_CUT = 2.5

#: Sigma maps are smooth: their median over a tile is taken from every so many pixels.
_STRIDE = 8


@dataclass(frozen=True)
class Tile:
    """Where one Fourier frame lies: it covers ``[fy : fy + side, fx : fx + side]`` and owns ``[y0:y1, x0:x1]``."""

    fy: int
    fx: int
    side: int
    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def own(self) -> tuple[slice, slice]:
        """The pixels it owns, as an index into the image."""
        return np.s_[self.y0 : self.y1, self.x0 : self.x1]

    def covered(self, shape: tuple[int, int]) -> tuple[slice, slice]:
        """The part of the image under its frame, as an index into the image."""
        return (
            slice(max(self.fy, 0), min(self.fy + self.side, shape[0])),
            slice(max(self.fx, 0), min(self.fx + self.side, shape[1])),
        )


@dataclass(frozen=True)
class ResidualModel:
    """How badly static stars subtract, as variances of S relative to what ZOGY sees of the star itself.

    ``V_extra = amplitude² S_R² + shift² |∇S|²``, in units of S²; both measured on bright stars of the image.

    Attributes
    ----------
    amplitude : float
        Relative misfit of PSF and flux ratio.
    shift : float
        Rms misregistration in pixels, beyond what was handed in.
    n_stars : int
        Stars it was measured on; 0: not measured, both numbers are 0.
    """

    amplitude: float = 0.0
    shift: float = 0.0
    n_stars: int = 0


@dataclass(frozen=True)
class Subtraction:
    """A `Difference` and how it was made.

    Attributes
    ----------
    difference : Difference
    renormalisation : float
        Width of S_corr on blank sky before it was divided by it.
    residuals : ResidualModel
    histogram : ndarray (64,) int
        Counts of S_corr on blank sky, renormalised, on `HISTOGRAM_EDGES`.
    n_tiles : int
    """

    difference: Difference
    renormalisation: float
    residuals: ResidualModel
    histogram: NDArray[np.int64]
    n_tiles: int


@dataclass(frozen=True)
class TileInput:
    """All that one tile needs: views of the image under its frame (they travel as copies), and numbers.

    Attributes
    ----------
    tile : Tile
    y, x : int
        Where the views begin in the frame.
    new, ref : ndarray (h, w)
        Electrons, background-subtracted.
    variance_new, variance_ref : ndarray (h, w)
        Electrons²; with ``as_rms``, electrons: their square is meant.
    mask_new, mask_ref : ndarray (h, w) uint8
    fill : ndarray (n, 3) float64
        Row and column in the views, and value for new, of pixels that are bad in both images.
    psf_new, psf_ref : ndarray (size, size) float64
        The PSFs at the tile's centre.
    sigma_new, sigma_ref, flux_ratio, registration_sigma, flux_ratio_error, noise_new, noise_ref
        As in `zogy`.
    """

    tile: Tile
    y: int
    x: int
    new: NDArray
    ref: NDArray
    variance_new: NDArray
    variance_ref: NDArray
    as_rms: tuple[bool, bool]
    mask_new: NDArray[np.uint8]
    mask_ref: NDArray[np.uint8]
    fill: NDArray[np.float64]
    psf_new: NDArray[np.float64]
    psf_ref: NDArray[np.float64]
    sigma_new: float
    sigma_ref: float
    flux_ratio: float
    registration_sigma: tuple[float, float]
    flux_ratio_error: float
    noise_new: NDArray[np.float64] | None
    noise_ref: NDArray[np.float64] | None


@dataclass(frozen=True)
class TileResult:
    """What a tile hands back: planes of the pixels it owns, and its kernels."""

    planes: Planes
    kernels: Kernels


#: `map` of `subtract_tile` over its inputs: gives the results in their order, from wherever they were computed.
MapTiles = Callable[[Callable[[TileInput], TileResult], Iterable[TileInput]], Iterable[TileResult]]


def plan_tiles(shape: tuple[int, int], border: int, largest: int = 1024) -> tuple[Tile, ...]:
    """Cover an image with square frames of one size.

    The size is the one of `fft.SIDES` up to `largest` that transforms the fewest pixels, borders included.

    Raises
    ------
    SubtractError
        When the border leaves less than a quarter of the largest tile's side.
    """
    sizes = [side for side in SIDES if side <= largest and side - 2 * border >= side // 4]
    if not sizes:
        raise SubtractError(
            f"a PSF stamp that needs a border of {border} pixels leaves {largest - 2 * border} of a tile of {largest}; "
            "use a larger subtract.tile or a smaller psf.size_fwhm",
            border=border,
            tile=largest,
        )

    def cost(side: int) -> float:
        frames = math.prod(-(-length // (side - 2 * border)) for length in shape)
        return frames * side**2 * math.log2(side)

    side = min(sizes, key=cost)
    core = side - 2 * border
    tiles = [
        Tile(y0 - border, x0 - border, side, y0, y1, x0, x1)
        for y0, y1 in _split(shape[0], core)
        for x0, x1 in _split(shape[1], core)
    ]
    return tuple(tiles)


def tile_border(psf_new: PsfLike, psf_ref: PsfLike) -> int:
    """Border of a tile in pixels: as far as the filters of this pair reach."""
    return (psf_new.size + psf_ref.size) // 2 + 1


def _split(length: int, core: int) -> Iterator[tuple[int, int]]:
    n = -(-length // core)
    edges = np.linspace(0, length, n + 1).round().astype(int)
    return zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def subtract(
    new: NDArray,
    ref: NDArray,
    psf_new: PsfLike,
    psf_ref: PsfLike,
    *,
    rms_new: NDArray,
    rms_ref: NDArray,
    flux_ratio: float,
    variance_new: NDArray | None = None,
    variance_ref: NDArray | None = None,
    mask_new: NDArray[np.uint8] | None = None,
    mask_ref: NDArray[np.uint8] | None = None,
    registration_sigma: tuple[float, float] = (0.0, 0.0),
    flux_ratio_error: float = 0.0,
    noise_new: NDArray | None = None,
    noise_ref: NDArray | None = None,
    tile: int = 1024,
    renormalise: bool = True,
    star_residuals: bool = True,
    map_tiles: MapTiles | None = None,
) -> Subtraction:
    """Subtract ref from new on a common grid.

    Parameters
    ----------
    new, ref : ndarray (ny, nx)
        Background-subtracted, electrons. Not modified.
    psf_new, psf_ref : PsfLike
    rms_new, rms_ref : ndarray (ny, nx)
        Sky rms maps, electrons; each tile uses their medians in its filters.
    flux_ratio : float
        F_new / F_ref.
    variance_new, variance_ref : ndarray (ny, nx), optional
        Total variance, electrons²; default ``rms²``. Of a pixel, up to `zogy.MOST_VARIANCE` times the sky's counts.
    mask_new, mask_ref : ndarray (ny, nx) uint8, optional
        Bits of `MaskBit`.
    registration_sigma, flux_ratio_error, noise_new, noise_ref
        As in `zogy`.
    tile : int
        Largest side of a Fourier frame.
    renormalise : bool
        Divide S_corr by its measured width on blank sky.
    star_residuals : bool
        Measure a `ResidualModel` on bright stars and count it as variance.
    map_tiles : callable, optional
        ``map_tiles(subtract_tile, inputs)`` gives the results in the inputs' order, from wherever they were computed.
        Default: one after the other, here.

    Raises
    ------
    SubtractError
        When no good pixel is left, or inputs do not fit together.
    """
    inputs = prepare(
        new,
        ref,
        psf_new,
        psf_ref,
        rms_new=rms_new,
        rms_ref=rms_ref,
        flux_ratio=flux_ratio,
        variance_new=variance_new,
        variance_ref=variance_ref,
        mask_new=mask_new,
        mask_ref=mask_ref,
        registration_sigma=registration_sigma,
        flux_ratio_error=flux_ratio_error,
        noise_new=noise_new,
        noise_ref=noise_ref,
        tile=tile,
    )
    planes = Planes.empty(new.shape)
    kernels = []
    if map_tiles is None:
        for each in inputs:
            kernels.append(subtract_tile(each, planes.cut(each.tile.own)).kernels)
    else:
        given = list(inputs)  # views; what is sent away is copied when it goes
        for each, result in zip(given, map_tiles(subtract_tile, given), strict=True):
            for plane, part in zip(planes.cut(each.tile.own), result.planes, strict=True):
                plane[:] = part
            kernels.append(result.kernels)
    mask = _joined(new.shape, mask_new, mask_ref)
    return finish(
        planes, tuple(kernels), mask, radius=round(psf_new.fwhm), renormalise=renormalise, star_residuals=star_residuals
    )


def prepare(
    new: NDArray,
    ref: NDArray,
    psf_new: PsfLike,
    psf_ref: PsfLike,
    *,
    rms_new: NDArray,
    rms_ref: NDArray,
    flux_ratio: float,
    variance_new: NDArray | None = None,
    variance_ref: NDArray | None = None,
    mask_new: NDArray[np.uint8] | None = None,
    mask_ref: NDArray[np.uint8] | None = None,
    registration_sigma: tuple[float, float] = (0.0, 0.0),
    flux_ratio_error: float = 0.0,
    noise_new: NDArray | None = None,
    noise_ref: NDArray | None = None,
    tile: int = 1024,
    tiles: Sequence[Tile] | None = None,
) -> Iterator[TileInput]:
    """The inputs of every tile, one by one; parameters as in `subtract`.

    `tiles` names those that are wanted, by default all that `plan_tiles` gives. Of a part of an image that reaches
    `FILL_REACH` beyond their frames (or to the image's edge) they are the same as of the whole.

    Raises
    ------
    SubtractError
        When no good pixel is left, or inputs do not fit together.
    """
    shape: tuple[int, int] = new.shape  # type: ignore[assignment]
    if ref.shape != shape:
        raise SubtractError(f"new has shape {shape} and ref {ref.shape}: align ref first")
    no_mask = np.broadcast_to(np.uint8(0), shape)
    mask_new = no_mask if mask_new is None else mask_new
    mask_ref = no_mask if mask_ref is None else mask_ref
    rows, columns, n_good = _bad_in_both(mask_new, mask_ref, np.uint8(MaskBit.NO_DATA))
    if n_good == 0 and tiles is None:
        raise SubtractError(
            "no pixel is good in both new and ref: check the masks, and that the reference covers the image",
            n_bad_new=int(np.count_nonzero(mask_new)),
            n_bad_ref=int(np.count_nonzero(mask_ref)),
        )
    values = interpolate_over(new, mask_new, rows, columns)
    wanted = plan_tiles(shape, tile_border(psf_new, psf_ref), tile) if tiles is None else tiles

    def inputs() -> Iterator[TileInput]:
        for t in wanted:
            under = t.covered(shape)
            y, x = under[0].start, under[1].start
            centre = (t.x0 + t.x1 - 1) / 2, (t.y0 + t.y1 - 1) / 2
            here = (rows >= y) & (rows < under[0].stop) & (columns >= x) & (columns < under[1].stop)
            yield TileInput(
                tile=t,
                y=y - t.fy,
                x=x - t.fx,
                new=new[under],
                ref=ref[under],
                variance_new=(rms_new if variance_new is None else variance_new)[under],
                variance_ref=(rms_ref if variance_ref is None else variance_ref)[under],
                as_rms=(variance_new is None, variance_ref is None),
                mask_new=mask_new[under],
                mask_ref=mask_ref[under],
                fill=np.column_stack([rows[here] - y, columns[here] - x, values[here]]),
                psf_new=psf_new.at(*centre),
                psf_ref=psf_ref.at(*centre),
                sigma_new=_median_rms(rms_new, mask_new, mask_ref, t.own),
                sigma_ref=_median_rms(rms_ref, mask_new, mask_ref, t.own),
                flux_ratio=float(flux_ratio),
                registration_sigma=registration_sigma,
                flux_ratio_error=flux_ratio_error,
                noise_new=noise_new,
                noise_ref=noise_ref,
            )

    return inputs()


def subtract_tile(given: TileInput, out: Planes | None = None) -> TileResult:
    """ZOGY of one tile.

    Parameters
    ----------
    given : TileInput
    out : Planes, optional
        Written to, where the results are wanted.
    """
    t = given.tile
    filters = make_filters(
        (t.side, t.side),
        given.psf_new,
        given.psf_ref,
        sigma_new=given.sigma_new,
        sigma_ref=given.sigma_ref,
        flux_ratio=given.flux_ratio,
        noise_new=given.noise_new,
        noise_ref=given.noise_ref,
    )
    frame = Frame(*(filters.fft.real(name) for name in Frame._fields))
    _load(
        given.new,
        given.ref,
        given.variance_new,
        given.variance_ref,
        given.as_rms[0],
        given.as_rms[1],
        given.mask_new,
        given.mask_ref,
        np.uint8(MaskBit.NO_DATA),
        given.fill,
        given.sigma_new,
        given.sigma_ref,
        given.flux_ratio,
        given.y,
        given.x,
        frame,
    )
    planes = Planes.empty((t.y1 - t.y0, t.x1 - t.x0)) if out is None else out
    sigma2 = (np.float32(sigma**2) for sigma in (*given.registration_sigma, given.flux_ratio_error))
    score_frame(filter_frame(filters, frame), t.y0 - t.fy, t.x0 - t.fx, *sigma2, planes)
    return TileResult(planes, replace(filters.kernels, x0=t.x0, x1=t.x1, y0=t.y0, y1=t.y1))


def finish(
    planes: Planes,
    kernels: tuple[Kernels, ...],
    mask: NDArray[np.uint8],
    *,
    radius: int,
    renormalise: bool = True,
    star_residuals: bool = True,
    residuals: ResidualModel | None = None,
    width: float | None = None,
) -> Subtraction:
    """S_corr, fluxes and their errors of a whole image from the planes of its tiles, whose memory they take over.

    Parameters
    ----------
    planes : Planes
        Of the whole image. Overwritten.
    kernels : tuple of Kernels
    mask : ndarray (ny, nx) uint8
    radius : int
        Of a star's core in pixels.
    renormalise, star_residuals : bool
        As in `subtract`.
    residuals : ResidualModel, optional
    width : float, optional
        Of S_corr on blank sky. Both are measured unless given: of a part of an image they are those of the whole.
    """
    if residuals is None:
        residuals = measure_residuals(planes, mask, radius) if star_residuals else ResidualModel()
    fine, n_lost = _correct(planes, mask, np.float32(residuals.amplitude**2), np.float32(residuals.shift**2))
    if n_lost:
        raise SubtractError(
            f"S_corr is not finite in {n_lost} pixels that no mask covers: look for pixels or variances of new or "
            "ref that are not finite, or variances that are not positive, and mask them",
            n_pixels=n_lost,
        )
    if width is None:
        width = _width(fine) if fine.any() else 1.0
    histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)
    for k in kernels:
        own = np.s_[k.y0 : k.y1, k.x0 : k.x1]
        _normalise(
            planes.cut(own),
            mask[own],
            np.uint8(MaskBit.NO_DATA),
            np.float32(width if renormalise else 1.0),
            np.float32(math.sqrt(k.f_s)),
            histogram,
        )
    return Subtraction(
        difference=Difference(
            difference=planes.difference,
            score_corr=planes.total,
            flux=planes.score,
            flux_err=planes.variance,
            mask=mask,
            kernels=kernels,
        ),
        renormalisation=float(width),
        residuals=residuals,
        histogram=histogram,
        n_tiles=len(kernels),
    )


def _width(fine: NDArray[np.int64]) -> float:
    """Standard deviation of the noise behind the fine histogram, real sources among it or not.

    Half the distance between the two percentiles that are one sigma from the middle of a Gaussian cut at `_CUT` sigma:
    what lies farther out is sources more than noise, and counted it would make the noise 1 % too wide where there are
    150 sources a Mpix.
    """
    if fine.sum() < 100:
        return 1.0
    edges = (np.arange(fine.size + 1) - fine.size // 2) / _BINS_PER_SIGMA
    cumulative = np.concatenate([[0], np.cumsum(fine)])
    share = math.erf(math.sqrt(0.5)) / math.erf(_CUT * math.sqrt(0.5))
    low, high = np.interp(np.array([0.15865525, 0.84134475]) * cumulative[-1], cumulative, edges)
    for _ in range(10):
        middle, width = (low + high) / 2, (high - low) / 2
        below, above = np.interp([middle - _CUT * width, middle + _CUT * width], edges, cumulative)
        wanted = below + (above - below) * np.array([1 - share, 1 + share]) / 2
        low, high = np.interp(wanted, cumulative, edges)
    width = float(high - low) / 2
    return width if width > 0 else 1.0


#: A star with this part of its light in the difference has changed, or something lies on it: no model is that wrong.
_CHANGED = 0.2

#: S/N, in the noise at its peak, of a star that shows a misfit of half a per cent; and the fewest to ask.
_TELLING_SNR, _FEWEST_TELLING = 200.0, 20


def measure_residuals(planes: Planes, mask: NDArray[np.uint8], radius: int) -> ResidualModel:
    """Fit ``S² = V + amplitude² S_R² + shift² |∇S|²`` on stars bright enough to show it.

    Each star gives one number: the excess of S² over V summed over its core, against the same sums of S_R² and |∇S|².
    Both coefficients are medians over stars (first the gradient's share is bounded by the steepest pixels, then the
    amplitude takes what is left at the peak), so that a few variable stars or transients do not drive them.

    Parameters
    ----------
    planes : Planes
    mask : ndarray (ny, nx) uint8
    radius : int
        Of a star's core in pixels.
    """
    ys, xs = _star_peaks(planes.score_ref, mask, max(3, 2 * radius + 1) // 2, radius)
    if ys.size < 5:
        return ResidualModel()
    order = np.argsort(-planes.score_ref[ys, xs], kind="stable")[:500]
    offsets = np.arange(-radius, radius + 1)
    rows = ys[order][:, None, None] + offsets[None, :, None]
    columns = xs[order][:, None, None] + offsets[None, None, :]
    usable = (mask[rows, columns] == 0).all(axis=(1, 2))
    rows, columns = rows[usable], columns[usable]
    if len(rows) < 5:
        return ResidualModel()

    def cores(plane: NDArray) -> NDArray[np.float64]:
        return plane[rows, columns].astype(np.float64).reshape(len(rows), -1)

    score2, level2 = cores(planes.score) ** 2, cores(planes.score_ref) ** 2
    unchanged = score2.max(axis=1) < _CHANGED**2 * level2.max(axis=1)
    rows, columns, score2, level2 = rows[unchanged], columns[unchanged], score2[unchanged], level2[unchanged]
    if len(rows) < 5:
        return ResidualModel()
    excess, slope2 = score2 - cores(planes.total), cores(planes.gradient2)
    # Two normal equations a star; weights 1 / level^4 would favour the wings, so stars are scaled by their own peak.
    scale = level2.max(axis=1, keepdims=True)
    # Where noise hides a misfit, the median says that there is none: the stars that would show a per cent tell.
    told = np.flatnonzero(scale[:, 0] > (_TELLING_SNR * np.sqrt(cores(planes.total)).max(axis=1)) ** 2)
    told = told if told.size >= _FEWEST_TELLING else np.argsort(-scale[:, 0], kind="stable")[:_FEWEST_TELLING]
    excess, level2, slope2 = (values[told] / scale[told] for values in (excess, level2, slope2))
    ll, ss, ls = (level2**2).sum(1), (slope2**2).sum(1), (level2 * slope2).sum(1)
    el, es = (excess * level2).sum(1), (excess * slope2).sum(1)
    determinant = np.maximum(ll * ss - ls**2, 1e-30)
    amplitude2 = max(float(np.median((el * ss - es * ls) / determinant)), 0.0)
    shift2 = max(float(np.median((es * ll - el * ls) / determinant)), 0.0)
    # The median of a one-degree chi-square is 0.455 of its mean: bring the medians to variances.
    return ResidualModel(
        amplitude=float(np.sqrt(amplitude2 / 0.455)), shift=float(np.sqrt(shift2 / 0.455)), n_stars=len(told)
    )


def _joined(shape: tuple[int, int], *masks: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    joined = np.zeros(shape, np.uint8)
    for mask in masks:
        if mask is not None:
            joined |= mask
    return joined


def _median_rms(
    rms: NDArray, mask_new: NDArray[np.uint8], mask_ref: NDArray[np.uint8], own: tuple[slice, slice]
) -> float:
    """Median over the good pixels of a tile, or over all where none is good."""
    sparse = np.s_[::_STRIDE, ::_STRIDE]
    sample = rms[own][sparse]
    values = sample[(mask_new[own][sparse] | mask_ref[own][sparse]) == 0]
    return float(np.median(values if values.size else sample))


@numba.njit(cache=True, nogil=True)
def _bad_in_both(mask_new, mask_ref, no_data):  # type: ignore[no-untyped-def]  # numba
    """Rows and columns of pixels without a good value in either image, no-data apart; and how many are good in both."""
    n_bad = n_good = 0
    for i in range(mask_new.shape[0]):
        for j in range(mask_new.shape[1]):
            m, r = mask_new[i, j], mask_ref[i, j]
            n_good += m | r == 0
            n_bad += m != 0 and r != 0 and (m | r) & no_data == 0
    rows, columns = np.empty(n_bad, np.int64), np.empty(n_bad, np.int64)
    k = 0
    if n_bad:
        for i in range(mask_new.shape[0]):
            for j in range(mask_new.shape[1]):
                m, r = mask_new[i, j], mask_ref[i, j]
                if m != 0 and r != 0 and (m | r) & no_data == 0:
                    rows[k], columns[k] = i, j
                    k += 1
    return rows, columns, n_good


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _load(  # type: ignore[no-untyped-def]  # numba
    new,
    ref,
    variance_new,
    variance_ref,
    square_new,
    square_ref,
    mask_new,
    mask_ref,
    no_data,
    fill,
    sigma_new,
    sigma_ref,
    flux_ratio,
    y0,
    x0,
    frame,
):
    """Fill a frame in units of sigma: bad pixels replaced alike in both images, blank sky where there is nothing."""
    n, r, v_n, v_r = frame
    one = np.float32(1)
    per_new, per_ref = np.float32(1 / sigma_new), np.float32(1 / sigma_ref)
    per_new2, per_ref2 = per_new * per_new, per_ref * per_ref
    to_new, to_ref = np.float32(flux_ratio), np.float32(1 / flux_ratio)
    h, w = new.shape
    for i in range(n.shape[0]):
        a = i - y0
        if a < 0 or a >= h:
            n[i], r[i], v_n[i], v_r[i] = 0, 0, one, one
            continue
        n[i, :x0], r[i, :x0], v_n[i, :x0], v_r[i, :x0] = 0, 0, one, one
        n[i, x0 + w :], r[i, x0 + w :], v_n[i, x0 + w :], v_r[i, x0 + w :] = 0, 0, one, one
        for j in range(w):
            bad_n, bad_r = mask_new[a, j], mask_ref[a, j]
            if bad_n | bad_r == 0:
                v, u = np.float32(variance_new[a, j]), np.float32(variance_ref[a, j])
                n[i, x0 + j], r[i, x0 + j] = np.float32(new[a, j]) * per_new, np.float32(ref[a, j]) * per_ref
                v_n[i, x0 + j] = _at_most((v * v if square_new else v) * per_new2)
                v_r[i, x0 + j] = _at_most((u * u if square_ref else u) * per_ref2)
                continue
            x, y = np.float32(0), np.float32(0)
            if (bad_n | bad_r) & no_data == 0:
                if bad_n == 0:
                    x = np.float32(new[a, j])
                    y = x * to_ref
                elif bad_r == 0:
                    y = np.float32(ref[a, j])
                    x = y * to_new
            _replace(frame, i, x0 + j, x * per_new, y * per_ref)
    for k in range(fill.shape[0]):
        x = np.float32(fill[k, 2])
        _replace(frame, y0 + int(fill[k, 0]), x0 + int(fill[k, 1]), x * per_new, x * to_ref * per_ref)


@numba.njit(cache=True, nogil=True)
def _replace(frame, i, j, new, ref):  # type: ignore[no-untyped-def]  # numba
    """A replaced pixel is known no better than by its own height: that keeps surroundings of saturated stars quiet."""
    frame[0][i, j], frame[1][i, j] = new, ref
    frame[2][i, j], frame[3][i, j] = _at_most(np.float32(1) + new * new), _at_most(np.float32(1) + ref * ref)


@numba.njit(cache=True, nogil=True)
def _at_most(variance):  # type: ignore[no-untyped-def]  # numba
    """What is not finite stays so, to be found."""
    most = np.float32(MOST_VARIANCE)
    return most if most < variance < np.float32(np.inf) else variance


@numba.njit(cache=True, nogil=True)
def _star_peaks(score_ref, mask, reach, margin):  # type: ignore[no-untyped-def]  # numba
    """Maxima of S_R above 50 within `reach` pixels (of equal ones, all), `margin` away from the image's edge."""
    ny, nx = score_ref.shape
    ys, xs = [0], [0]
    for i in range(margin, ny - margin):
        for j in range(margin, nx - margin):
            value = score_ref[i, j]
            if value > 50 and mask[i, j] == 0:
                largest = True
                for y in range(max(i - reach, 0), min(i + reach + 1, ny)):
                    for x in range(max(j - reach, 0), min(j + reach + 1, nx)):
                        if score_ref[y, x] > value:
                            largest = False
                            break
                    if not largest:
                        break
                if largest:
                    ys.append(i)
                    xs.append(j)
    return np.array(ys[1:]), np.array(xs[1:])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _correct(planes, mask, amplitude2, shift2):  # type: ignore[no-untyped-def]  # numba
    """S_corr in the place of the total variance; the fine histogram of blank sky; how many pixels are no number."""
    _, score, variance, total, score_ref, gradient2 = planes
    histogram = np.zeros(2 * _HISTOGRAM_REACH * _BINS_PER_SIGMA, np.int64)
    scale, middle = np.float32(_BINS_PER_SIGMA), np.float32(_HISTOGRAM_REACH * _BINS_PER_SIGMA)
    n_lost = 0
    for i in range(score.shape[0]):
        for j in range(score.shape[1]):
            static = score_ref[i, j]
            noise = total[i, j] + amplitude2 * static * static + shift2 * gradient2[i, j]
            if mask[i, j] != 0:
                total[i, j] = 0
                continue
            value = score[i, j] / np.sqrt(noise)
            total[i, j] = value
            n_lost += not np.isfinite(value)
            if abs(static) < 3 and variance[i, j] < 1.5:
                place = value * scale + middle
                if 0 <= place < histogram.size:
                    histogram[int(place)] += 1
    return histogram, n_lost


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _normalise(planes, mask, no_data, width, root_f_s, histogram):  # type: ignore[no-untyped-def]  # numba
    """One tile's last pass: S_corr over its width; flux and its error in the places of score and variance.

    What is too wide on blank sky is the noise, so the errors of fluxes share the factor.
    """
    difference, score, variance, total, score_ref, _ = planes
    to_flux, to_error = 1 / root_f_s, width / root_f_s
    for i in range(score.shape[0]):
        for j in range(score.shape[1]):
            value = total[i, j] / width
            total[i, j] = value
            if mask[i, j] == 0 and abs(score_ref[i, j]) < 3 and variance[i, j] < 1.5 and abs(value) <= 8:
                histogram[min(int((value + 8) * 4), 63)] += 1
            if mask[i, j] & no_data:
                difference[i, j] = 0
                score[i, j] = variance[i, j] = np.nan
            else:
                score[i, j] *= to_flux
                variance[i, j] = np.sqrt(variance[i, j]) * to_error
