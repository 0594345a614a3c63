"""Where a reference lies on new: by its WCS if the stars confirm it, otherwise by star patterns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from batchproc.config import AlignConfig
from batchproc.errors import AlignError
from batchproc.imaging.background import measure_background
from batchproc.imaging.patterns import match_patterns
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.registration import Registration, register
from batchproc.imaging.starlist import MAX_STARS, Stars, detect_stars, rough_sky
from batchproc.records import Exposure

__all__ = ["Field", "Placed", "name_of", "overlapping", "place", "settled"]

#: Where the grids are the same, a correction smaller than this (rms, pixels) is not worth an interpolation.
NEGLIGIBLE_SHIFT_PIX = 0.02
#: Pixels of ref that are looked at beyond the footprint of new.
CROP_MARGIN = 64


@dataclass(frozen=True)
class Field:
    """An image with what a first look at it tells: its noise and its stars."""

    exposure: Exposure
    rms: float
    stars: Stars

    @classmethod
    def of(cls, image: Exposure) -> Field:
        """Look at an image; one that is masked all over has no stars."""
        data, mask = np.ascontiguousarray(image.data, np.float32), np.ascontiguousarray(image.mask, np.uint8)
        sky = rough_sky(data, mask)
        return cls(image, float(np.median(sky.rms)), detect_stars(data, mask, image.saturation, sky=sky))

    @cached_property
    def subtracted(self) -> NDArray[np.float32]:
        """The image without its sky, 0 where bad."""
        data, mask = self.exposure.data, self.exposure.mask
        level = measure_background(data, mask != 0).level
        return np.where((mask != 0) | ~np.isfinite(data), np.float32(0), data - level)


@dataclass(frozen=True)
class Placed:
    """A reference and where it lies.

    Attributes
    ----------
    field : Field
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

    field: Field
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
    def rms(self) -> tuple[float, float]:
        """Registration error along x and y, pixels: what is left, and a correction that was called for and not made."""
        rms = self.registration.rms_x, self.registration.rms_y
        if self.refine and not self.is_unchanged:
            return rms
        left = self.registration.size_xy
        return float(np.hypot(rms[0], left[0])), float(np.hypot(rms[1], left[1]))


def overlapping(new: Exposure, refs: Sequence[Exposure]) -> list[tuple[Exposure, PixelMap | None]]:
    """The references that overlap with new as far as can be told, with their map where there is one."""
    found: list[tuple[Exposure, PixelMap | None]] = []
    misses: list[str] = []
    for ref in refs:
        if not (_has_sky(new) and _has_sky(ref)):
            same = new.shape == ref.shape
            found.append((ref, PixelMap.from_affine([[1, 0, 0], [0, 1, 0]], new.shape) if same else None))
            continue
        try:
            base = PixelMap.from_wcs(new.wcs, ref.wcs, new.shape)
        except AlignError:
            misses.append(name_of(ref) + _centre(ref))
            continue
        if base.overlap(ref.shape) > 0:
            found.append((ref, base))
        else:
            misses.append(name_of(ref) + _centre(ref))
    if not found:
        raise AlignError(
            f"no overlap: 0 % of {name_of(new)}{_centre(new)} lies on {', '.join(misses)}; "
            "pair it with references of the same field (or, if a WCS is wrong by more than the field, remove it "
            "to match by star patterns)",
            overlap_percent=0.0,
            n_refs=len(refs),
        )
    return found


def place(new: Field, ref: Exposure, base: PixelMap | None, config: AlignConfig) -> Placed:
    """Find the place of one reference: by its WCS if stars confirm it, otherwise by star patterns."""
    x0, y0, part = (0, 0, ref) if base is None else _crop(ref, base)
    field = Field.of(part)
    tried: Placed | None = None
    if base is not None:
        method = "wcs" if _has_sky(new.exposure) and _has_sky(ref) else "stars"
        tried = _confirm(new, field, (x0, y0), base.cropped(x0, y0), method, config)
        if tried.problem is None:
            return tried
    for by_patterns in _pattern_maps(new, field, None if tried is None else tried.base, config):
        again = _confirm(new, field, (x0, y0), by_patterns, "stars", config)
        if again.problem is None:
            return again
    if tried is not None:
        return tried
    raise AlignError(
        f"{name_of(ref)} and {name_of(new.exposure)} have no WCS in common, and their star patterns do not match "
        f"({len(new.stars)} stars in new, {len(field.stars)} in ref, at least {config.min_matches} must agree); "
        "give both a WCS, or check that they show the same field",
        found=0,
        needed=config.min_matches,
        stars_new=len(new.stars),
        stars_ref=len(field.stars),
    )


def _confirm(
    new: Field, ref: Field, origin: tuple[int, int], base: PixelMap, method: str, config: AlignConfig
) -> Placed:
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
            f"{name_of(ref.exposure)}: {n} stars match those of {name_of(new.exposure)} within "
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
    return Placed(ref, origin, base, registration, method, n_possible, config.refine, problem)


def _pattern_maps(new: Field, ref: Field, base: PixelMap | None, config: AlignConfig) -> Iterator[PixelMap]:
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


def settled(placed: Placed, best: Placed, config: AlignConfig) -> Placed:
    """A reference that its stars confirm, or that has too few to tell and is taken on the word of another one.

    References of one survey share one astrometric system, so the displacement of one holds for the next.
    """
    if placed.problem is None:
        return placed
    if placed.n_possible >= 2 * config.min_matches or best.method != "wcs":
        raise placed.problem
    return replace(placed, registration=best.registration, problem=None)


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


def name_of(image: Exposure) -> str:
    """What to call an image in a message."""
    return str(image.meta.get("path", "image"))


def _has_sky(image: Exposure) -> bool:
    return image.wcs is not None and bool(image.wcs.has_celestial)


def _centre(image: Exposure) -> str:
    ra, dec = image.wcs.celestial.all_pix2world((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2, 0)
    return f" (centre at RA {float(ra):.4f}, Dec {float(dec):+.4f})"
