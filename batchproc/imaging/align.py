"""The reference on the grid of new: the story of aligning.

    map (WCS, or star patterns) → register (stars of both) → resample, once → join, where there are several

Stars are found on the images as they come, so that the correction they call for goes into the map *before* anything is
interpolated: every pixel is interpolated once, or not at all where the grids are already the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import sep
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from batchproc.config import AlignConfig
from batchproc.errors import AlignError
from batchproc.imaging.join import PSF_STEP, JoinedPsf, MappedPsf, join, star_flux_ratio, weights_of
from batchproc.imaging.patterns import match_patterns
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.registration import (
    MAX_STARS,
    Registration,
    Stars,
    detect_stars,
    measure_registration,
    register,
)
from batchproc.imaging.resample import Resampled, resample
from batchproc.records import Exposure, MaskBit

__all__ = ["Aligned", "PixelMap", "Registration", "Resampled", "align", "measure_registration", "resample"]

#: Where the grids are the same, a correction smaller than this (rms, pixels) is not worth an interpolation.
NEGLIGIBLE_SHIFT_PIX = 0.02
#: Pixels of ref that are looked at beyond the footprint of new.
CROP_MARGIN = 64


@dataclass(frozen=True)
class Aligned:
    """A reference on the grid of new.

    Attributes
    ----------
    ref : Exposure
        On new's grid: flux of a source as in the original (electrons of the first reference), NO_DATA where there is
        none. A single reference keeps its sky, several joined ones have none. ``variance``, where supplied, is that of
        white noise that does the same to a matched filter (and equals the counts again where the noise is Poisson's):
        more than the pixels scatter by themselves, because interpolation correlates them.
    registration : Registration
        What the stars said (of the reference with the most matches); applied where significant.
    method : {"wcs", "stars"}
        Where the map came from.
    n_matches : int
        Stars that new and ref share.
    rms_x, rms_y : float
        Registration error that is left, pixels of new (for E30).
    overlap : float
        Fraction of new that has reference data.
    noise_kept : ndarray (ny, nx) float32
        Local mean of that of `Resampled`; 1 where nothing was interpolated. A sky rms that is measured on the pixels of
        ref has to be divided by its root before a matched filter may use it.
    interpolated : bool
        False where the grids are the same and ref was returned as it is.
    n_refs : int
        References that were resampled and, where several, joined.
    """

    ref: Exposure
    registration: Registration
    method: str
    n_matches: int
    rms_x: float
    rms_y: float
    overlap: float
    noise_kept: NDArray[np.float32]
    interpolated: bool
    n_refs: int


def align(new: Exposure, refs: Sequence[Exposure], config: AlignConfig | None = None) -> Aligned:
    """Bring the references of an image onto its grid.

    Parameters
    ----------
    new : Exposure
    refs : sequence of Exposure
        One or several that overlap with new; those that do not are left out. Electrons, sky included.
    config : AlignConfig, optional

    Returns
    -------
    Aligned

    Raises
    ------
    AlignError
        No overlap, no stars, or too few that match, with the numbers.

    Notes
    -----
    The map of a reference is its WCS; without one, that of a reference of the same shape is at first taken for the
    identity. Stars of both then decide: if too few of them match within ``match_radius_pix``, or if they scatter by
    more than ``max_rms_pix``, star patterns take over.

    Fewer than ``min_matches`` but at least three matches will do for a WCS (and a constant shift at most) if they agree
    with each other and are most of the stars that there are: small fields have no more, and that a wrong WCS brings
    most of a handful of stars together within a fraction of a pixel is most unlikely.
    """
    config = config or AlignConfig()
    if not refs:
        raise AlignError("no reference given: name at least one in the manifest's column 'ref'", found=0, needed=1)
    field = _Field.of(new)
    if len(field.stars) < 3:
        raise AlignError(
            f"{_name(new)}: {len(field.stars)} usable stars, at least 3 are needed to align a reference to it; "
            "is it empty, masked all over, saturated or trailed?",
            found=len(field.stars),
            needed=3,
        )
    placed = [_place(field, ref, base, config) for ref, base in _overlapping(new, refs)]
    good = [p for p in placed if p.problem is None]
    if not good:
        raise placed[0].problem or AlignError("no reference could be placed")
    best = max(good, key=lambda p: p.registration.n_matches)
    placed = [_settled(p, best, config) for p in placed]

    n_refs = len(placed)
    interpolated = n_refs > 1 or not placed[0].is_unchanged
    if not interpolated:
        ref, noise_kept = replace(placed[0].field.exposure, wcs=new.wcs), np.ones(new.shape, np.float32)
    elif n_refs == 1:
        ref, noise_kept = _resample_one(new, placed[0], config)
    else:
        layers = _layers(field, placed, config)
        n_refs = len(layers)
        ref, noise_kept = _join(new, layers, config)
    left_x, left_y = best.left_over
    return Aligned(
        ref=ref,
        registration=best.registration,
        method=best.method,
        n_matches=best.registration.n_matches,
        rms_x=float(np.hypot(best.registration.rms_x, left_x)),
        rms_y=float(np.hypot(best.registration.rms_y, left_y)),
        overlap=float(np.mean((ref.mask & MaskBit.NO_DATA) == 0)),
        noise_kept=noise_kept,
        interpolated=interpolated,
        n_refs=n_refs,
    )


@dataclass(frozen=True)
class _Field:
    """An image with what a first look at it tells: a quick background, its noise, its stars."""

    exposure: Exposure
    subtracted: NDArray[np.float32]
    rms: float
    stars: Stars

    @classmethod
    def of(cls, image: Exposure) -> _Field:
        data = np.ascontiguousarray(image.data, np.float32)
        bad = (image.mask != 0) | ~np.isfinite(data)
        if bad.all():
            return cls(image, np.zeros_like(data), 1.0, Stars(*np.empty((5, 0))))
        if bad.any():
            data = np.where(bad, np.float32(0), data)
        background = sep.Background(data, mask=bad, bw=64, bh=64)
        level = background.back(dtype=np.float32)
        subtracted = data - level
        subtracted[bad] = 0.0
        # A simulated image without noise has no sigma to count in: any small number will do.
        rms = float(background.globalrms) or 1e-3
        stars = detect_stars(subtracted, bad, image.saturation, background=level, rms=rms)
        return cls(image, subtracted, rms, stars)


@dataclass(frozen=True)
class _Placed:
    """A reference and where it lies.

    Attributes
    ----------
    field : _Field
        The part of ref that new can see.
    origin : (int, int)
        Where that part begins in ref, x and y.
    base : PixelMap
        New → `field`, before the registration.
    registration : Registration
    method : {"wcs", "stars"}
    n_possible : int
        Stars that could have matched: the shorter of the two lists where the images overlap.
    refine : bool
        Whether a significant correction is wanted.
    problem : AlignError or None
        Why the stars do not confirm this place.
    """

    field: _Field
    origin: tuple[int, int]
    base: PixelMap
    registration: Registration
    method: str
    n_possible: int
    refine: bool
    problem: AlignError | None

    @property
    def is_unchanged(self) -> bool:
        """The grids are the same, and what the stars call for is negligible: nothing needs to be interpolated."""
        return (
            self.field.exposure.shape == self.base.shape
            and self.base.is_identity()
            and (not self.refine or self.registration.size < NEGLIGIBLE_SHIFT_PIX)
        )

    @property
    def pixel_map(self) -> PixelMap:
        """New → `field`, with the registration."""
        correct = self.refine and self.registration.significant
        return self.base.shifted(self.registration) if correct else self.base

    @property
    def left_over(self) -> tuple[float, float]:
        """Rms of the correction that was called for and not made, pixels."""
        return self.registration.size_xy if self.is_unchanged or not self.refine else (0.0, 0.0)


def _overlapping(new: Exposure, refs: Sequence[Exposure]) -> list[tuple[Exposure, PixelMap | None]]:
    """The references that overlap with new as far as can be told, with their map where there is one."""
    found: list[tuple[Exposure, PixelMap | None]] = []
    misses: list[str] = []
    for ref in refs:
        if new.wcs is None or ref.wcs is None:
            same = new.shape == ref.shape
            found.append((ref, PixelMap.from_affine([[1, 0, 0], [0, 1, 0]], new.shape) if same else None))
            continue
        try:
            base = PixelMap.from_wcs(new.wcs, ref.wcs, new.shape)
        except AlignError:
            misses.append(_name(ref) + _centre(ref))
            continue
        if base.overlap(ref.shape) > 0:
            found.append((ref, base))
        else:
            misses.append(_name(ref) + _centre(ref))
    if not found:
        raise AlignError(
            f"no overlap: 0 % of {_name(new)}{_centre(new)} lies on {', '.join(misses)}; "
            "pair it with references of the same field (or, if a WCS is wrong by more than the field, remove it "
            "to match by star patterns)",
            overlap_percent=0.0,
            n_refs=len(refs),
        )
    return found


def _place(new: _Field, ref: Exposure, base: PixelMap | None, config: AlignConfig) -> _Placed:
    """Find the place of one reference: by its WCS if stars confirm it, otherwise by star patterns."""
    x0, y0, part = (0, 0, ref) if base is None else _crop(ref, base)
    field = _Field.of(part)
    tried: _Placed | None = None
    if base is not None:
        has_wcs = new.exposure.wcs is not None and ref.wcs is not None
        tried = _confirm(new, field, (x0, y0), base.cropped(x0, y0), "wcs" if has_wcs else "stars", config)
        if tried.problem is None:
            return tried
    for by_patterns in _pattern_maps(new, field, None if tried is None else tried.base, config):
        again = _confirm(new, field, (x0, y0), by_patterns, "stars", config)
        if again.problem is None:
            return again
    if tried is not None:
        return tried
    raise AlignError(
        f"{_name(ref)} and {_name(new.exposure)} have no WCS in common, and their star patterns do not match "
        f"({len(new.stars)} stars in new, {len(field.stars)} in ref, at least {config.min_matches} must agree); "
        "give both a WCS, or check that they show the same field",
        found=0,
        needed=config.min_matches,
        stars_new=len(new.stars),
        stars_ref=len(field.stars),
    )


def _confirm(
    new: _Field, ref: _Field, origin: tuple[int, int], base: PixelMap, method: str, config: AlignConfig
) -> _Placed:
    """Match the stars through a map, and judge it by them."""
    shape = new.exposure.shape
    stars_new = _inside(new.stars, *base(new.stars.x, new.stars.y), ref.exposure.shape)
    on_new = _on_new(ref.stars, base)
    stars_ref = _inside(on_new, on_new.x, on_new.y, shape)
    n_possible = min(len(stars_new), len(stars_ref))
    registration = register(
        stars_new, stars_ref, shape, config.match_radius_pix, where=_common(base, ref.exposure.shape)
    )
    n, rms = registration.n_matches, max(registration.rms_x, registration.rms_y)
    area = max(base.overlap(ref.exposure.shape) * shape[0] * shape[1], 1.0)
    by_chance = len(stars_new) * len(stars_ref) * np.pi * config.match_radius_pix**2 / area
    enough = n >= config.min_matches and n > 2 * by_chance
    handful = method == "wcs" and 3 <= n < config.min_matches and 2 * n >= n_possible and by_chance < 0.5
    problem = None
    if not (enough or handful) or rms > config.max_rms_pix:
        scatter = f" and scatter by {rms:.2f} px (at most {config.max_rms_pix:g})" if n >= 3 else ""
        problem = AlignError(
            f"{_name(ref.exposure)}: {n} stars match those of {_name(new.exposure)} within "
            f"{config.match_radius_pix:g} px (at least {config.min_matches} are needed, {n_possible} were possible, "
            f"{by_chance:.1f} match by chance){scatter}; star patterns do not match either. "
            "Check that both show the same field, and the WCS of both",
            found=n,
            needed=config.min_matches,
            possible=n_possible,
            rms_pix=rms,
            max_rms_pix=config.max_rms_pix,
            stars_new=len(new.stars),
            stars_ref=len(ref.stars),
        )
    return _Placed(ref, origin, base, registration, method, n_possible, config.refine, problem)


def _pattern_maps(new: _Field, ref: _Field, base: PixelMap | None, config: AlignConfig) -> Iterator[PixelMap]:
    """Maps that star patterns propose.

    First on top of the WCS: it may be off by a shift or a turn and still have the right distortions. Then without it.
    """
    shape = new.exposure.shape
    if base is not None:
        matrix = match_patterns(new.stars.xy, _on_new(ref.stars, base).xy, config.min_matches, mirrored=False)
        if matrix is not None:
            yield base.shifted(_Displacement(matrix))
    matrix = match_patterns(new.stars.xy, ref.stars.xy, config.min_matches)
    if matrix is not None:
        yield PixelMap.from_affine(matrix, shape)


@dataclass(frozen=True)
class _Displacement:
    """(dx, dy) of an affine matrix (2, 3)."""

    matrix: NDArray[np.float64]

    def __call__(self, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        (a, b, c), (d, e, f) = self.matrix
        return (a - 1) * x + b * y + c, d * x + (e - 1) * y + f


def _settled(placed: _Placed, best: _Placed, config: AlignConfig) -> _Placed:
    """A reference that its stars confirm, or that has too few to tell and is taken on the word of another one.

    References of one survey share one astrometric system, so the displacement of one holds for the next.
    """
    if placed.problem is None:
        return placed
    if placed.n_possible >= 2 * config.min_matches or best.method != "wcs":
        raise placed.problem
    return replace(placed, registration=best.registration, problem=None)


def _resample_one(new: Exposure, placed: _Placed, config: AlignConfig) -> tuple[Exposure, NDArray[np.float32]]:
    """One reference on new's grid, its sky with it."""
    ref, pixel_map = placed.field.exposure, placed.pixel_map
    image = resample(ref.data, pixel_map, new.shape, variance=ref.variance, mask=ref.mask, order=config.kernel_order)
    psf = None if ref.psf is None else _mapped_psf(placed, config)
    aligned = replace(
        ref,
        data=image.data,
        variance=_white_variance(image),
        mask=image.mask,
        psf=psf,
        saturation=ref.saturation * pixel_map.area,
        wcs=new.wcs,
    )
    return aligned, _local_mean(image.noise_kept)


@dataclass(frozen=True)
class _Layer:
    """A reference on new's grid, without its sky; `scale` brings it to the flux system (electrons) of the first."""

    placed: _Placed
    image: Resampled
    area: float
    scale: float = 1.0

    @property
    def rms(self) -> float:
        """Sky noise per pixel of new, in the common system, as sums over many pixels see it."""
        return self.placed.field.rms * float(np.sqrt(self.area)) * self.scale

    @property
    def saturation(self) -> float:
        return self.placed.field.exposure.saturation * self.area * self.scale


def _layers(new: _Field, placed: Sequence[_Placed], config: AlignConfig) -> list[_Layer]:
    """Each reference resampled and brought to scale."""
    layers: list[_Layer] = []
    for p in placed:
        ref, pixel_map = p.field.exposure, p.pixel_map
        image = resample(
            p.field.subtracted,
            pixel_map,
            new.exposure.shape,
            variance=ref.variance,
            mask=ref.mask,
            order=config.kernel_order,
        )
        layer = _Layer(p, image, pixel_map.area)
        scale = _flux_scale(new, layers[0], layer) if layers else 1.0
        # A sliver with neither zero point nor stars cannot be brought to scale: no data is better than wrong data.
        if scale is not None:
            layers.append(replace(layer, scale=scale))
    return layers


def _join(new: Exposure, layers: Sequence[_Layer], config: AlignConfig) -> tuple[Exposure, NDArray[np.float32]]:
    """Several references as one image without sky, in the flux system of the first."""
    images = [layer.image for layer in layers]
    weights = weights_of(images, [layer.rms for layer in layers])
    joined = join(images, [layer.scale for layer in layers], weights)
    psf = None
    if all(layer.placed.field.exposure.psf is not None for layer in layers):
        parts = tuple(_mapped_psf(layer.placed, config) for layer in layers)
        psf = JoinedPsf(parts, weights[:, ::PSF_STEP, ::PSF_STEP].copy())
    aligned = replace(
        layers[0].placed.field.exposure,
        data=joined.data,
        variance=_white_variance(joined),
        mask=joined.mask,
        psf=psf,
        saturation=min(layer.saturation for layer in layers),
        wcs=new.wcs,
    )
    return aligned, _local_mean(joined.noise_kept)


def _white_variance(image: Resampled) -> NDArray[np.float32] | None:
    """The variance of white noise that sums over many pixels cannot tell from this image's."""
    if image.variance is None:
        return None
    return np.divide(image.variance, image.noise_kept, out=image.variance.copy(), where=image.noise_kept > 0)


def _local_mean(noise_kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the non-zero values over some 64 pixels (in steps of 16): what a sky rms of a mesh cell contains."""
    block = 16
    edges = [np.arange(0, n, block) for n in noise_kept.shape]

    def block_sums(plane: NDArray) -> NDArray:
        sums = np.add.reduceat(np.add.reduceat(plane, edges[1], axis=1), edges[0], axis=0)
        return uniform_filter(sums.astype(np.float64), 4)

    total, count = block_sums(noise_kept), block_sums((noise_kept > 0).astype(np.float32))
    mean = np.divide(total, count, out=np.ones_like(total), where=count > 1e-6).astype(np.float32)
    full = np.repeat(np.repeat(mean, block, axis=0), block, axis=1)
    return full[: noise_kept.shape[0], : noise_kept.shape[1]]


def _flux_scale(new: _Field, first: _Layer, layer: _Layer) -> float | None:
    """Factor that brings a reference to the flux system (electrons) of the first; None where there is no telling.

    By zero points; where one is unknown, by stars that the two share; failing that, by those that both share with new.
    """
    one, other = first.placed.field.exposure, layer.placed.field.exposure
    if np.isfinite(one.zero_point) and np.isfinite(other.zero_point):
        return float(one.gain / other.gain * 10 ** (0.4 * (one.zero_point - other.zero_point)))
    stars = new.stars[:500]
    fields = [field for field in (new, first.placed.field, layer.placed.field) if len(field.stars)]
    radius = 2.0 * max(float(np.median(field.stars.fwhm)) for field in fields)

    def ratio(a: tuple[NDArray, NDArray], b: tuple[NDArray, NDArray]) -> float | None:
        return star_flux_ratio(*a, *b, stars.x, stars.y, radius)

    on_new = (new.subtracted, new.exposure.mask)
    on_first, on_this = ((image.data, image.mask) for image in (first.image, layer.image))
    direct = ratio(on_first, on_this)
    if direct is not None:
        return direct
    to_first, to_this = ratio(on_first, on_new), ratio(on_new, on_this)
    return to_first * to_this if to_first and to_this else None


def _mapped_psf(placed: _Placed, config: AlignConfig) -> MappedPsf:
    psf = placed.field.exposure.psf
    assert psf is not None
    x0, y0 = placed.origin
    return MappedPsf(psf, placed.pixel_map.cropped(-x0, -y0), config.kernel_order)


def _crop(ref: Exposure, base: PixelMap) -> tuple[int, int, Exposure]:
    """The part of ref that new can see, with a margin; its first pixel."""
    x_min, x_max, y_min, y_max = base.bounds()
    ny, nx = ref.shape
    x0, x1 = max(int(x_min) - CROP_MARGIN, 0), min(int(x_max) + CROP_MARGIN, nx)
    y0, y1 = max(int(y_min) - CROP_MARGIN, 0), min(int(y_max) + CROP_MARGIN, ny)
    if (x0, y0, x1, y1) == (0, 0, nx, ny) or x1 - x0 < 8 or y1 - y0 < 8:
        return 0, 0, ref
    box = np.s_[y0:y1, x0:x1]
    variance = None if ref.variance is None else ref.variance[box]
    return x0, y0, replace(ref, data=ref.data[box], mask=ref.mask[box], variance=variance)


def _on_new(stars: Stars, base: PixelMap) -> Stars:
    """Stars of ref in pixels of new; those without a place there are left out."""
    x, y = base.inverse(stars.x, stars.y)
    scale = np.sqrt(base.area)
    on_new = replace(stars, x=x, y=y, sigma=stars.sigma / scale, fwhm=stars.fwhm / scale)
    return on_new[np.isfinite(x)]


def _common(base: PixelMap, shape_ref: tuple[int, int]) -> NDArray[np.float64]:
    """Points (n, 2) of new, on a grid, that lie on ref."""
    x, y = (axis.ravel() for axis in np.meshgrid(*(np.linspace(0, n - 1, 17) for n in base.shape[::-1])))
    xr, yr = base(x, y)
    inside = (xr > -0.5) & (yr > -0.5) & (xr < shape_ref[1] - 0.5) & (yr < shape_ref[0] - 0.5)
    return np.column_stack([x, y])[inside]


def _inside(stars: Stars, x: NDArray, y: NDArray, shape: tuple[int, int]) -> Stars:
    """The brightest stars whose places (x, y) lie in an image of this shape."""
    inside = (x > -0.5) & (y > -0.5) & (x < shape[1] - 0.5) & (y < shape[0] - 0.5)
    return stars[inside][:MAX_STARS]


def _name(image: Exposure) -> str:
    return str(image.meta.get("path", "image"))


def _centre(image: Exposure) -> str:
    ra, dec = image.wcs.celestial.all_pix2world((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2, 0)
    return f" (centre at RA {float(ra):.4f}, Dec {float(dec):+.4f})"
