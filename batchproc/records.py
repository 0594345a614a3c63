"""The words of batchproc: the records that travel between its floors, and the columns of the catalogue.

Nothing here computes. Arrays are ``(ny, nx)``, pixel coordinates are 0-based with pixel centres at whole numbers,
``x`` runs along the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CATALOGUE",
    "Column",
    "Difference",
    "Exposure",
    "Flag",
    "Kernels",
    "ManifestEntry",
    "MaskBit",
    "PsfLike",
    "Receipt",
]


class MaskBit(IntFlag):
    """Bits of an image mask (``uint8``); 0 is a good pixel."""

    BAD = 1  #: the mask plane or the data-quality bits say so
    SATURATED = 2  #: at or above the saturation level, or bled into
    NO_DATA = 4  #: NaN, blank, or outside the footprint
    COSMIC_RAY = 8  #: a particle hit found by us


class Flag(IntFlag):
    """Bits of the catalogue column ``flags``; 0 is a clean detection."""

    EDGE = 1  #: within the PSF radius of the edge of the image or of the reference's coverage
    MASKED = 2  #: masked pixels under the core of the PSF
    SATURATED = 4  #: within reach of a saturated star
    BRIGHT_STAR = 8  #: on the residual of a star too bright for the PSF model
    DIPOLE = 16  #: a positive and a negative lobe side by side, or a star of ref that moved a little
    COSMIC_RAY = 32  #: a hot pixel or a track of them in new explains it better than the PSF (E129)
    HOT_PIXEL_REF = 64  #: a hot pixel or a track of them in ref explains it better than the PSF (E133)
    STREAK = 128  #: part of an elongated trail
    BAD_FIT = 256  #: the PSF does not describe it (chi-square), or a smooth patch does better


@runtime_checkable
class PsfLike(Protocol):
    """A PSF that may vary across the image."""

    @property
    def size(self) -> int:
        """Side of the (odd, square) stamp in pixels."""
        ...

    @property
    def fwhm(self) -> float:
        """Full width at half maximum at the image centre, in pixels."""
        ...

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """PSF stamp ``(size, size)`` at pixel (x, y): centred, unit sum."""
        ...


@dataclass(frozen=True)
class Exposure:
    """One image, ready for numerics.

    Attributes
    ----------
    data : ndarray (ny, nx) float32
        Counts in **electrons**, sky included. Masked pixels may hold anything finite.
    variance : ndarray (ny, nx) float32 or None
        Total variance of a pixel in electrons², sky and sources, where the survey supplies one.
    mask : ndarray (ny, nx) uint8
        Bits of `MaskBit`; 0 is good.
    psf : PsfLike or None
        Where the survey supplies one.
    gain : float
        Electrons per unit of the file (``data = file * gain``).
    read_noise : float
        Electrons rms; 0 where unknown (the measured noise rules).
    saturation : float
        Level in electrons at and above which a pixel is saturated; ``inf`` where unknown.
    zero_point : float
        Magnitude of a source of one *file unit* (``mag = zero_point − 2.5 log10(flux / gain)``); NaN where unknown.
    wcs : astropy.wcs.WCS or None
    meta : mapping
        At least ``path``, ``mjd``, ``filter``, ``exposure_id``, ``ccd``, ``survey``, ``unit`` where known.
    """

    data: NDArray[np.float32]
    variance: NDArray[np.float32] | None
    mask: NDArray[np.uint8]
    psf: PsfLike | None = None
    gain: float = 1.0
    read_noise: float = 0.0
    saturation: float = float("inf")
    zero_point: float = float("nan")
    wcs: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.data.shape  # type: ignore[return-value]


@dataclass(frozen=True)
class Kernels:
    """What ZOGY's images look like to a point source, in one tile.

    Attributes
    ----------
    x0, x1, y0, y1 : int
        The pixels it holds for: ``[y0:y1, x0:x1]``.
    psf : ndarray (size, size) float64
        P_D, the PSF of D; unit sum (E14).
    delta_new, delta_ref : ndarray (size, size) float64
        Shape in D of a single hot pixel in new (E129) and in ref (E133), unit sum of squares.
    f_d : float
        F_D, the zero point of D (E15): a source of flux T (in new) has F_D T counts in D.
    f_s : float
        F_S (E42): S = T F_S at the place of a source of flux T; also the variance of S on blank sky.
    sigma_new, sigma_ref : float
        Sky rms of the two images in the tile, electrons.
    """

    x0: int
    x1: int
    y0: int
    y1: int
    psf: NDArray[np.float64]
    delta_new: NDArray[np.float64]
    delta_ref: NDArray[np.float64]
    f_d: float
    f_s: float
    sigma_new: float
    sigma_ref: float


@dataclass(frozen=True)
class Difference:
    """The result of one subtraction, on the grid of new.

    Attributes
    ----------
    difference : ndarray (ny, nx)
        D (E13): white, unit variance on blank sky.
    score_corr : ndarray (ny, nx)
        S_corr (E25), in sigma.
    flux, flux_err : ndarray (ny, nx)
        α and σ_α (E41, E43): flux of a source at each pixel, in the units of new as it was handed in.
    mask : ndarray (ny, nx) uint8
        Bits of `MaskBit`, joined from new and ref.
    kernels : tuple of Kernels
        One a tile; one in all for an untiled subtraction.
    """

    difference: NDArray[np.floating]
    score_corr: NDArray[np.floating]
    flux: NDArray[np.floating]
    flux_err: NDArray[np.floating]
    mask: NDArray[np.uint8]
    kernels: tuple[Kernels, ...]

    @property
    def score(self) -> NDArray[np.floating]:
        """S (E12): the matched filter of D. Made of the flux on demand (S = α F_S); 0 where there is no flux."""
        score = np.nan_to_num(self.flux)
        for k in self.kernels:
            score[k.y0 : k.y1, k.x0 : k.x1] *= k.f_s
        return score

    @property
    def psf(self) -> NDArray[np.float64]:
        """P_D at the centre of the image: an odd-sized stamp of unit sum."""
        ny, nx = self.difference.shape
        return self.kernels_at(nx / 2, ny / 2).psf

    def kernels_at(self, x: float, y: float) -> Kernels:
        """Kernels of the tile that owns pixel (x, y) (the nearest one outside the image)."""

        def outside(k: Kernels) -> float:
            return max(k.x0 - 0.5 - x, x - k.x1 + 0.5, 0.0) + max(k.y0 - 0.5 - y, y - k.y1 + 0.5, 0.0)

        return min(self.kernels, key=outside)


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One row of a manifest. Paths are absolute; ``None`` means: take it from the header, or measure it."""

    image_id: str
    new: str
    ref: tuple[str, ...]
    survey: str | None = None
    new_mask: str | None = None
    ref_mask: tuple[str, ...] = ()
    new_psf: str | None = None
    ref_psf: tuple[str, ...] = ()
    new_variance: str | None = None
    ref_variance: tuple[str, ...] = ()
    gain: float | None = None
    read_noise: float | None = None
    saturation: float | None = None
    filter: str | None = None
    mjd: float | None = None
    exposure_id: str | None = None
    ccd: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What a task says of itself: a few hundred bytes, never pixels.

    Attributes
    ----------
    image_id : str
    status : {"done", "failed", "bug"}
    n_candidates : int
    seconds : dict
        Wall-clock seconds of each step, by name.
    cpu_seconds : float
    peak_memory_mb : float
        Largest resident size of the process up to the end of the task.
    quality : dict
        Measured numbers: ``n_psf_stars_new``, ``fwhm_new``, ``flux_ratio``, ``renormalisation`` …
    stage, error, message, traceback : str
        Where it failed and why; empty when done.
    metadata : dict
        The numbers of the failure.
    """

    image_id: str
    status: str
    n_candidates: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    quality: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""
    error: str = ""
    message: str = ""
    traceback: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of the catalogue: name, NumPy dtype (``"str"`` for text), unit (FITS spelling, "" for none), meaning."""

    name: str
    dtype: str
    unit: str
    meaning: str


#: The catalogue, in order. Docs and the Parquet schema are generated from this.
CATALOGUE: tuple[Column, ...] = (
    Column("candidate_id", "str", "", "stable name, made from image_id and position: same input, same id"),
    Column("image_id", "str", "", "image_id of the manifest"),
    Column("x", "float64", "pix", "position on new, 0-based, from a PSF fit to D"),
    Column("y", "float64", "pix", "position on new, 0-based, from a PSF fit to D"),
    Column("xy_err", "float32", "pix", "1-sigma error of x and of y (background-limited)"),
    Column("ra", "float64", "deg", "right ascension, ICRS; NaN without a WCS"),
    Column("dec", "float64", "deg", "declination, ICRS; NaN without a WCS"),
    Column("scorr", "float32", "", "signed S_corr at its extremum, in sigma, after renormalisation"),
    Column("flux", "float64", "file unit", "PSF flux of the change, in the units of the file of new"),
    Column("flux_err", "float64", "file unit", "its 1-sigma error, source noise included"),
    Column("mag", "float32", "mag", "magnitude of |flux|; NaN without a zero point"),
    Column("mag_err", "float32", "mag", "its 1-sigma error"),
    Column(
        "aper_flux", "float64", "file unit", "flux of the change in a circle of radius 1.5 FWHM, aperture-corrected"
    ),
    Column("aper_flux_err", "float64", "file unit", "its 1-sigma error"),
    Column("fwhm", "float32", "pix", "FWHM of the detection in D, from second moments"),
    Column("elongation", "float32", "", "major over minor axis in D"),
    Column("theta", "float32", "deg", "position angle of the major axis, from x towards y"),
    Column("chi2", "float32", "", "reduced chi-square of the PSF fit to D"),
    Column("dipole", "float32", "", "strength of the opposite lobe over that of the detection, 0 to 1"),
    Column("delta_new", "float32", "", "hot-pixel score in new over the PSF score (E129); above 1: a cosmic ray"),
    Column("delta_ref", "float32", "", "hot-pixel score in ref over the PSF score (E133); above 1: a hot pixel in ref"),
    Column("edge_distance", "float32", "pix", "to the nearest edge of new or of the reference's coverage"),
    Column("mask_distance", "float32", "pix", "to the nearest masked pixel"),
    Column("bright_distance", "float32", "pix", "to the nearest bright star; inf where there is none"),
    Column("ref_flux", "float64", "file unit", "flux of the nearest reference source, scaled to new; NaN without one"),
    Column("ref_mag", "float32", "mag", "its magnitude; NaN without a zero point"),
    Column("ref_distance", "float32", "pix", "to the nearest reference source; inf where there is none"),
    Column("ref_fwhm", "float32", "pix", "FWHM of the nearest reference source; NaN without one"),
    Column("flags", "int32", "", "bits of batchproc.Flag; 0 is clean"),
    Column("mjd", "float64", "d", "time of new (mid-exposure where the header tells)"),
    Column("filter", "str", "", "filter of new"),
    Column("survey", "str", "", "survey or instrument"),
    Column("exposure_id", "str", "", "exposure that new belongs to"),
    Column("ccd", "str", "", "CCD or quadrant of the exposure"),
    Column("fwhm_new", "float32", "pix", "FWHM of the PSF of new"),
    Column("fwhm_ref", "float32", "pix", "FWHM of the PSF of ref"),
    Column("sigma_new", "float32", "file unit", "sky rms of new at the place"),
    Column("sigma_ref", "float32", "file unit", "sky rms of ref at the place, scaled to new"),
    Column("zero_point", "float32", "mag", "magnitude of one file unit in new; NaN where unknown"),
    Column("stamp_index", "int64", "", "row of the stamp in open_stamps(RUN); valid within one opened RUN"),
)
