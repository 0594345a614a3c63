"""A difference image to look around in: nothing is computed before it is looked at, and then only the tiles in view.

>>> import numpy as np
>>> from batchproc import difference, simulate
>>> pair = simulate.simulate_pair((512, 512), seed=1, n_transients=5)
>>> d = difference(
...     pair.new,
...     pair.ref,
...     psf_new=pair.psf_new,
...     psf_ref=pair.psf_ref,
...     sigma_new=pair.sigma_new,
...     sigma_ref=pair.sigma_ref,
...     flux_ratio=pair.flux_ratio,
... )
>>> d[100:164, 200:264].score_corr.compute().shape
(64, 64)

A tile here is a tile of `batchproc.imaging.subtract`: with the same inputs and the same `Recipe` every pixel is the
same. What only a whole image can tell (PSFs, flux ratio, how badly stars subtract, the width of S_corr) is the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray

from batchproc.config import Config
from batchproc.errors import SubtractError, UsageError
from batchproc.imaging.psf_model import PsfModel
from batchproc.imaging.psf_view import PsfView
from batchproc.imaging.subtract import FILL_REACH, Tile, finish, plan_tiles, prepare, subtract_tile, tile_border
from batchproc.imaging.zogy import Planes
from batchproc.io.fitsfile import Section
from batchproc.io.parts import Image, load_part, open_image
from batchproc.recipe import Recipe, make_ready, measure_recipe
from batchproc.records import Kernels, MaskBit, PsfLike

__all__ = ["LazyDifference", "Recipe", "difference"]

#: Two images whose WCS agree so well are on one grid.
_SAME_GRID_PIX = 0.1
#: Tiles along each axis from which star residuals and the width of S_corr are measured.
SAMPLE_TILES = 3


@dataclass(frozen=True)
class LazyDifference:
    """A difference image that is computed where, and when, it is looked at.

    Cut it with ``d[y0:y1, x0:x1]``: everything is cut alike, the WCS too, and nothing is computed. ``.compute()`` of an
    array (or ``dask.compute`` of several, which shares the work) does the tiles that it touches.

    Attributes
    ----------
    difference, score_corr, flux, flux_err, mask : dask.array.Array (ny, nx)
        As in `batchproc.records.Difference`; float32, the mask uint8. A chunk is a tile.
    y0, x0 : int
        Where this part begins on new.
    wcs_new : astropy.wcs.WCS or None
        Of the whole of new.
    recipe : Recipe
    """

    difference: da.Array
    score_corr: da.Array
    flux: da.Array
    flux_err: da.Array
    mask: da.Array
    y0: int
    x0: int
    wcs_new: Any
    recipe: Recipe

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.score_corr.shape  # type: ignore[no-any-return]

    @property
    def wcs(self) -> Any:
        """The WCS of this part, whose first pixel is (0, 0); None where new has none."""
        (ny, nx), y, x = self.shape, self.y0, self.x0
        return None if self.wcs_new is None else self.wcs_new.slice(np.s_[y : y + ny, x : x + nx])

    @property
    def y(self) -> NDArray[np.int64]:
        """Rows on new, 0-based."""
        return self.y0 + np.arange(self.shape[0])

    @property
    def x(self) -> NDArray[np.int64]:
        """Columns on new, 0-based."""
        return self.x0 + np.arange(self.shape[1])

    def __getitem__(self, area: Any) -> LazyDifference:
        """A rectangle of it: ``d[y0:y1, x0:x1]``, in its own pixels."""
        rows, columns = _ranges(area, self.shape)
        return replace(
            self,
            **{name: getattr(self, name)[rows, columns] for name in _FIELDS},
            y0=self.y0 + rows.start,
            x0=self.x0 + columns.start,
        )

    def to_xarray(self) -> Any:
        """The same as an `xarray.Dataset`, still lazy: pixel coordinates ``y`` and ``x`` on new, 0-based.

        Its attribute ``wcs`` is a FITS header for these coordinates (plus one, as FITS counts), so it stays right
        however the dataset is cut. Needs the extra ``explore``.
        """
        try:
            import xarray
        except ImportError as error:
            raise UsageError("xarray is not installed: pip install 'batchproc[explore]'") from error
        attrs = {"renormalisation": self.recipe.renormalisation, "flux_ratio": self.recipe.flux_ratio}
        if self.wcs_new is not None:
            attrs["wcs"] = self.wcs_new.to_header(relax=True).tostring(sep="\n")
        return xarray.Dataset(
            {name: (("y", "x"), getattr(self, name)) for name in _FIELDS}, {"y": self.y, "x": self.x}, attrs
        )


_FIELDS = ("difference", "score_corr", "flux", "flux_err", "mask")


def difference(
    new: Any,
    ref: Any,
    *,
    psf_new: PsfLike | NDArray | None = None,
    psf_ref: PsfLike | NDArray | None = None,
    sigma_new: Any = None,
    sigma_ref: Any = None,
    flux_ratio: float | None = None,
    variance_new: Any = None,
    variance_ref: Any = None,
    mask_new: Any = None,
    mask_ref: Any = None,
    recipe: Recipe | None = None,
    wcs: Any = None,
    config: Config | None = None,
) -> LazyDifference:
    """Subtract ref from new where it is looked at.

    Parameters
    ----------
    new, ref : array_like (ny, nx), Exposure, str or Path
        On the same pixel grid (`batchproc.align` brings ref there), in electrons. NumPy, dask, zarr and HDF5 arrays and
        memory maps are taken as they are; a path is that of a FITS file, plain or tile-compressed, ``path[hdu]`` of
        several. They may be larger than memory: a tile reads what is under it. On a cluster the workers read files and
        zarr arrays themselves; NumPy arrays are sent to them.
    psf_new, psf_ref : PsfLike or ndarray (h, w), optional
        A stamp is odd-sized, centred and of unit sum. Default: what the exposure brings, else measured.
    sigma_new, sigma_ref : float or array_like (ny, nx), optional
        Sky rms, electrons; given, the image is taken for background-subtracted. Default: sky and its noise are measured
        in each tile, where saturated stars are masked a little wider too, as a run does it.
    flux_ratio : float, optional
        F_new / F_ref. Default: measured, and with it the error of the registration.
    variance_new, variance_ref : array_like (ny, nx), optional
        Total variance, electrons². Default: that of the sky, and where the sky is measured the photon noise of sources.
    mask_new, mask_ref : array_like (ny, nx), optional
        Bits of `MaskBit`; any other non-zero number is bad too.
    recipe : Recipe, optional
        Everything that holds for the whole image, from an earlier call (``d.recipe``): then nothing is read here, and
        `psf_new`, `psf_ref` and `flux_ratio` are its own.
    wcs : astropy.wcs.WCS, optional
        Of new. Default: what new brings.
    config : Config, optional
        ``subtract.tile``, ``background``, ``psf``, and whether to renormalise and to count star residuals.

    Returns
    -------
    LazyDifference

    Raises
    ------
    SubtractError
        When ref is not on the grid of new.
    PsfError
        When a PSF is not given and cannot be measured.

    Notes
    -----
    Without a recipe this call reads a sample, at most nine blocks and nine tiles spread over the image (the whole of
    one that is no larger), and measures on it what is not given: PSFs and flux ratio first, then how badly bright
    stars subtract and how wide S_corr is. So S_corr has unit width on blank sky, and memory is bounded by a sample or
    by the tiles that are worked on at a time, whichever is more, not by the image.
    """
    config = config or Config()
    image = open_image(new, mask=mask_new, variance=variance_new, sigma=sigma_new, psf=_psf(psf_new))
    reference = open_image(ref, mask=mask_ref, variance=variance_ref, sigma=sigma_ref, psf=_psf(psf_ref))
    image = image if wcs is None else replace(image, wcs=wcs)
    _require_one_grid(image, reference)
    if recipe is None:
        recipe = measure_recipe(image, reference, flux_ratio, config)
        recipe = _with_residuals(recipe, image, reference, config)
    tiles = plan_tiles(image.shape, tile_border(recipe.psf_new, recipe.psf_ref), config.subtract.tile)
    finished = _delayed(_finished_tile, recipe, tiles, image, reference, config)
    return LazyDifference(
        **{name: _joined(finished, tiles, number) for number, name in enumerate(_FIELDS)},
        y0=0,
        x0=0,
        wcs_new=image.wcs,
        recipe=recipe,
    )


def _delayed(
    function: Any, recipe: Recipe, tiles: Sequence[Tile], image: Image, reference: Image, config: Config
) -> list[Any]:
    """A call for each tile, with what stands for the pixels under its frame and around it."""
    shared = dask.delayed((recipe, config), traverse=False)
    calls = []
    for t in tiles:
        area = _widened(t, image.shape)
        corner = area[0].start, area[1].start
        calls.append(dask.delayed(function, pure=False)(shared, t, corner, image.cut(area), reference.cut(area)))
    return calls


def _widened(tile: Tile, shape: tuple[int, int]) -> Section:
    """The image under a tile's frame, and as far around it as bad pixels look for good ones."""
    rows, columns = (
        slice(max(s.start - FILL_REACH, 0), min(s.stop + FILL_REACH, n))
        for s, n in zip(tile.covered(shape), shape, strict=True)
    )
    return rows, columns


def _tile(
    shared: tuple[Recipe, Config], tile: Tile, corner: tuple[int, int], cut_new: tuple, cut_ref: tuple
) -> tuple[Planes, Kernels, NDArray[np.uint8]]:
    """Planes, kernels and mask of what a tile owns, before anything is divided by the whole image's noise."""
    recipe, config = shared
    y, x = corner
    new = make_ready(load_part(cut_new), recipe.psf_new, recipe.noise_new, config)
    ref = make_ready(load_part(cut_ref), recipe.psf_ref, recipe.noise_ref, config)
    here = Tile(tile.fy - y, tile.fx - x, tile.side, tile.y0 - y, tile.y1 - y, tile.x0 - x, tile.x1 - x)
    (given,) = prepare(
        new.data,
        ref.data,
        _Elsewhere(recipe.psf_new, y, x),
        _Elsewhere(recipe.psf_ref, y, x),
        rms_new=new.rms,
        rms_ref=ref.rms,
        flux_ratio=recipe.flux_ratio,
        variance_new=new.variance,
        variance_ref=ref.variance,
        mask_new=new.mask,
        mask_ref=ref.mask,
        registration_sigma=recipe.registration_sigma,
        flux_ratio_error=recipe.flux_ratio_error,
        noise_new=None if recipe.noise_new is None else recipe.noise_new.acf,
        noise_ref=None if recipe.noise_ref is None else recipe.noise_ref.acf,
        tiles=[here],
    )
    result = subtract_tile(given)
    kernels = replace(result.kernels, x0=0, x1=here.x1 - here.x0, y0=0, y1=here.y1 - here.y0)
    return result.planes, kernels, new.mask[here.own] | ref.mask[here.own]


def _finished_tile(shared: tuple[Recipe, Config], *arguments: Any) -> tuple[NDArray, ...]:
    """The fields of a `LazyDifference` where a tile owns them."""
    recipe, _ = shared
    planes, kernels, mask = _tile(shared, *arguments)
    found = finish(
        planes,
        (kernels,),
        mask,
        radius=round(recipe.psf_new.fwhm),
        residuals=recipe.residuals,
        width=recipe.renormalisation,
    ).difference
    return tuple(getattr(found, name) for name in _FIELDS)


def _with_residuals(recipe: Recipe, image: Image, reference: Image, config: Config) -> Recipe:
    """The recipe with what only tiles can tell: star residuals, and the width of S_corr on blank sky."""
    tiles = plan_tiles(image.shape, tile_border(recipe.psf_new, recipe.psf_ref), config.subtract.tile)
    rows, columns = ({getattr(t, axis): t for t in tiles} for axis in ("y0", "x0"))
    wanted_y, wanted_x = (_spread(sorted(starts), SAMPLE_TILES) for starts in (rows, columns))
    sample = [t for t in tiles if t.y0 in wanted_y and t.x0 in wanted_x]
    # Here, like the rest of the sample, unless only a cluster may have the pixels.
    scheduler = None if image.is_dask or reference.is_dask else "threads"
    parts = dask.compute(*_delayed(_tile, recipe, sample, image, reference, config), scheduler=scheduler)
    found = finish(
        *_side_by_side(sample, parts, round(recipe.psf_new.fwhm)),
        radius=round(recipe.psf_new.fwhm),
        star_residuals=config.subtract.star_residuals,
    )
    width = found.renormalisation if config.subtract.renormalise else 1.0
    return replace(recipe, residuals=found.residuals, renormalisation=width)


def _spread(values: Sequence[int], n: int) -> list[int]:
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int))]


def _side_by_side(
    tiles: Sequence[Tile], parts: Sequence[tuple[Planes, Kernels, NDArray]], radius: int
) -> tuple[Planes, tuple[Kernels, ...], NDArray[np.uint8]]:
    """Planes, kernels and mask of the tiles of a sample as of one image; masked where what meets was not neighbours."""
    heights = {t.y0: t.y1 for t in sorted(tiles, key=lambda t: t.y0)}
    widths = {t.x0: t.x1 for t in sorted(tiles, key=lambda t: t.x0)}
    tops = dict(zip(heights, np.cumsum([0, *(b - a for a, b in heights.items())]).tolist(), strict=False))
    lefts = dict(zip(widths, np.cumsum([0, *(b - a for a, b in widths.items())]).tolist(), strict=False))
    shape = sum(b - a for a, b in heights.items()), sum(b - a for a, b in widths.items())
    planes, mask = Planes.empty(shape), np.empty(shape, np.uint8)
    kernels = []
    for t, (own, k, bits) in zip(tiles, parts, strict=True):
        y, x = tops[t.y0], lefts[t.x0]
        here = np.s_[y : y + own.score.shape[0], x : x + own.score.shape[1]]
        for plane, part in zip(planes.cut(here), own, strict=True):
            plane[:] = part
        mask[here] = bits
        kernels.append(replace(k, y0=y, y1=here[0].stop, x0=x, x1=here[1].stop))
    ends_y, ends_x = set(heights.values()), set(widths.values())
    for y0, top in tops.items():
        if top and y0 not in ends_y:
            mask[top - radius : top + radius] |= np.uint8(MaskBit.BAD)
    for x0, left in lefts.items():
        if left and x0 not in ends_x:
            mask[:, left - radius : left + radius] |= np.uint8(MaskBit.BAD)
    return planes, tuple(kernels), mask


def _joined(finished: Sequence[Any], tiles: Sequence[Tile], number: int) -> da.Array:
    """One field of all tiles as a dask array."""
    dtype = np.uint8 if _FIELDS[number] == "mask" else np.float32
    rows: dict[int, list[da.Array]] = {}
    for t, tile in zip(tiles, finished, strict=True):
        shape = t.y1 - t.y0, t.x1 - t.x0
        rows.setdefault(t.y0, []).append(da.from_delayed(tile[number], shape, dtype))
    return da.block(list(rows.values()))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Elsewhere(PsfView):
    """A PSF in the coordinates of a part of the image."""

    y0: int
    x0: int

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        return self.psf.at(x + self.x0, y + self.y0)


def _psf(given: PsfLike | NDArray | None) -> PsfLike | None:
    return given if given is None or isinstance(given, PsfLike) else PsfModel.from_array(np.asarray(given))


def _ranges(area: Any, shape: tuple[int, int]) -> Section:
    """Two slices with both ends, without steps; raises `UsageError` on anything else."""
    area = area if isinstance(area, tuple) else (area,)
    if len(area) > 2 or not all(isinstance(s, slice) and s.step in (None, 1) for s in area):
        raise UsageError(f"{area!r}: cut a rectangle, as in d[100:200, 300:400]")
    rows, columns = (slice(*s.indices(n)[:2]) for s, n in zip((*area, slice(None))[:2], shape, strict=True))
    return slice(rows.start, max(rows.start, rows.stop)), slice(columns.start, max(columns.start, columns.stop))


def _require_one_grid(new: Image, ref: Image) -> None:
    if new.shape != ref.shape:
        raise SubtractError(f"new has shape {new.shape} and ref {ref.shape}: bring ref there first (batchproc.align)")
    if new.wcs is None or ref.wcs is None:
        return
    ny, nx = new.shape
    x, y = np.array([0, nx - 1, 0, nx - 1, nx / 2]), np.array([0, 0, ny - 1, ny - 1, ny / 2])
    there = ref.wcs.all_world2pix(np.column_stack(new.wcs.all_pix2world(x, y, 0)), 0, quiet=True)
    distance = float(np.max(np.hypot(there[:, 0] - x, there[:, 1] - y)))
    if not distance < _SAME_GRID_PIX:
        raise SubtractError(
            f"ref is not on the grid of new: their WCS are up to {distance:.2f} pixels apart, {_SAME_GRID_PIX} is let "
            "through; bring ref there first (batchproc.align)",
            distance_pix=distance,
        )
