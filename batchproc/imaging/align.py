"""The reference on the grid of new: the story of aligning.

    map (WCS, or star patterns) → register (stars of both) → resample, once → join, where there are several

Stars are found on the images as they come, so that the correction they call for goes into the map *before* anything is
interpolated: every pixel is interpolated once, or not at all where the grids are already the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.config import AlignConfig
from batchproc.errors import AlignError
from batchproc.imaging.join import PSF_STEP, JoinedPsf, MappedPsf, join, star_flux_ratio, weights_of
from batchproc.imaging.noise import kernel_autocorrelation
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.place import Field, Placed, name_of, overlapping, place, settled
from batchproc.imaging.registration import Registration, measure_registration
from batchproc.imaging.resample import Resampled, resample
from batchproc.records import Exposure, MaskBit

__all__ = ["Aligned", "PixelMap", "Registration", "Resampled", "align", "measure_registration", "resample"]


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
        Stars that new and ref share (counted for each reference, where several).
    rms_x, rms_y : float
        Registration error that is left, pixels of new (for E30); of the worst reference, where several.
    overlap : float
        Fraction of new that has reference data.
    noise : ndarray (n, n) float64 or None
        Autocorrelation of the noise, 1 in the middle, as interpolation makes it of white noise; None where nothing was
        interpolated.
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
    noise: NDArray[np.float64] | None
    interpolated: bool
    n_refs: int
    placed: Placed

    def sky_position(self, wcs_new: Any, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        """ICRS right ascension and declination of pixels of new, in degrees; NaN where no WCS tells.

        Through new's own WCS where the stars have confirmed it. Where it is wrong or absent, and star patterns have
        placed the reference, through the reference's.
        """
        trusted = self.method == "wcs" and wcs_new is not None
        wcs = wcs_new if trusted else self.placed.field.exposure.wcs
        if wcs is None or len(x) == 0:
            return np.full(len(x), np.nan), np.full(len(x), np.nan)
        if not trusted:
            x, y = (
                position + start
                for position, start in zip(self.placed.pixel_map(x, y), self.placed.origin, strict=True)
            )
        sky = wcs.pixel_to_world(x, y).icrs
        return np.asarray(sky.ra.deg), np.asarray(sky.dec.deg)


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
    field = Field.of(new)
    if len(field.stars) < 3:
        raise AlignError(
            f"{name_of(new)}: {len(field.stars)} usable stars, at least 3 are needed to align a reference to it; "
            "is it empty, masked all over, saturated or trailed?",
            found=len(field.stars),
            needed=3,
        )
    placed = [place(field, ref, base, config) for ref, base in overlapping(new, refs)]
    good = [p for p in placed if p.problem is None]
    if not good:
        raise placed[0].problem or AlignError("no reference could be placed")
    best = max(good, key=lambda p: p.registration.n_matches)
    placed = [settled(p, best, config) for p in placed]

    n_refs = len(placed)
    interpolated = n_refs > 1 or not placed[0].is_unchanged
    if not interpolated:
        ref, noise = replace(placed[0].field.exposure, wcs=new.wcs), None
    elif n_refs == 1:
        ref, noise = _resample_one(new, placed[0], config)
    else:
        layers = _layers(field, placed, config)
        n_refs = len(layers)
        ref, noise = _join(new, layers, config)
    rms_x, rms_y = np.max([p.rms for p in placed], axis=0)
    return Aligned(
        ref=ref,
        registration=best.registration,
        method=best.method,
        n_matches=sum(p.registration.n_matches for p in good),
        rms_x=float(rms_x),
        rms_y=float(rms_y),
        overlap=1 - np.count_nonzero(ref.mask & MaskBit.NO_DATA) / ref.mask.size,
        noise=noise,
        interpolated=interpolated,
        n_refs=n_refs,
        placed=best,
    )


def _resample_one(new: Exposure, placed: Placed, config: AlignConfig) -> tuple[Exposure, NDArray[np.float64]]:
    """One reference on new's grid, its sky with it."""
    ref, pixel_map = placed.field.exposure, placed.pixel_map
    image = resample(ref.data, pixel_map, new.shape, variance=ref.variance, mask=ref.mask, order=config.kernel_order)
    psf = None if ref.psf is None else _mapped_psf(placed, config)
    aligned = replace(
        ref,
        data=image.data,
        variance=image.variance,
        mask=image.mask,
        psf=psf,
        saturation=ref.saturation * pixel_map.area,
        wcs=new.wcs,
    )
    return aligned, kernel_autocorrelation(pixel_map, config.kernel_order)


@dataclass(frozen=True)
class _Layer:
    """A reference on new's grid, without its sky; `scale` brings it to the flux system (electrons) of the first."""

    placed: Placed
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


def _layers(new: Field, placed: Sequence[Placed], config: AlignConfig) -> list[_Layer]:
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


def _join(new: Exposure, layers: Sequence[_Layer], config: AlignConfig) -> tuple[Exposure, NDArray[np.float64]]:
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
        variance=joined.variance,
        mask=joined.mask,
        psf=psf,
        saturation=min(layer.saturation for layer in layers),
        wcs=new.wcs,
    )
    # Weights are inverse variances of the sky: each part has its weight's share in the variance of the sum.
    share = weights.mean(axis=(1, 2), dtype=np.float64)
    acfs = [kernel_autocorrelation(layer.placed.pixel_map, config.kernel_order) for layer in layers]
    return aligned, np.average(acfs, axis=0, weights=share)


def _flux_scale(new: Field, first: _Layer, layer: _Layer) -> float | None:
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


def _mapped_psf(placed: Placed, config: AlignConfig) -> MappedPsf:
    psf = placed.field.exposure.psf
    assert psf is not None
    x0, y0 = placed.origin
    return MappedPsf(psf, placed.pixel_map.cropped(-x0, -y0), config.kernel_order)
