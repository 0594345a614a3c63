"""Images of any kind, looked at by rectangles: arrays, memory maps, dask and zarr arrays, FITS files, exposures.

Nothing is read before a `Part` is loaded, and then no more than its rectangle. What stands for a part (`Image.cut`)
travels to another process as a name and four numbers where the pixels lie on a disk, as the pixels themselves where
they are in memory, and as the keys of its chunks where it is a dask array.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.io.fitsfile import Section
from batchproc.io.images import inspect_image, read_image
from batchproc.records import Exposure, MaskBit, PsfLike

__all__ = ["Image", "Part", "load_part", "open_image"]

_KNOWN = MaskBit.BAD | MaskBit.SATURATED | MaskBit.NO_DATA | MaskBit.COSMIC_RAY


@dataclass(frozen=True)
class Part:
    """A rectangle of an image, in memory.

    Attributes
    ----------
    data : ndarray (h, w) float32
        Electrons; 0 where there is no data (no number, or masked in a masked array).
    mask : ndarray (h, w) uint8
        Bits of `MaskBit`.
    variance : ndarray (h, w) float32 or None
        Total variance, electrons².
    sigma : ndarray (h, w) float32 or None
        Sky rms, electrons; None where the sky is still in the data.
    """

    data: NDArray[np.float32]
    mask: NDArray[np.uint8]
    variance: NDArray[np.float32] | None
    sigma: NDArray[np.float32] | None


@dataclass(frozen=True)
class Image:
    """An image and what lies on its grid, not read: see `open_image`.

    Attributes
    ----------
    data : array_like (ny, nx), or a `FitsPixels`, which brings mask and variance along
    mask, variance : array_like (ny, nx) or None
    sigma : array_like (ny, nx), float or None
    psf : PsfLike or None
    saturation : float
        Electrons; inf where unknown.
    wcs : astropy.wcs.WCS or None
    """

    data: Any
    mask: Any = None
    variance: Any = None
    sigma: Any = None
    psf: PsfLike | None = None
    saturation: float = float("inf")
    wcs: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def is_dask(self) -> bool:
        """Whether any of it is a dask array."""
        return any(hasattr(plane, "__dask_graph__") for plane in (self.data, self.mask, self.variance, self.sigma))

    def cut(self, area: Section) -> tuple[Any, ...]:
        """What stands for a rectangle of it until `load_part` reads it."""
        return tuple(_piece(plane, area) for plane in (self.data, self.mask, self.variance, self.sigma))


def open_image(
    image: Any, *, mask: Any = None, variance: Any = None, sigma: Any = None, psf: PsfLike | None = None
) -> Image:
    """An `Image` of whatever a user has.

    Parameters
    ----------
    image : array_like (ny, nx), Exposure, str or Path
        A file is a FITS file, ``path[hdu]`` of several; its mask and variance planes are found as `read_image` does.
    mask, variance, sigma : array_like (ny, nx), optional
        `sigma` may be a number. They go before what the image brings along.
    psf : PsfLike, optional

    Raises
    ------
    UsageError
        When something has another shape than the image.
    ReadError
        When the file cannot be used; only its headers are read.
    """
    if isinstance(image, (str, Path)):
        info = inspect_image(image)
        found = Image(
            FitsPixels(str(image), info.shape),
            _array(mask),
            _array(variance),
            _array(sigma),
            psf,
            saturation=info.calibration.saturation * info.calibration.electrons_per_unit,
            wcs=info.wcs,
        )
    elif isinstance(image, Exposure):
        found = Image(
            _array(image.data),
            _array(image.mask if mask is None else mask),
            _array(image.variance if variance is None else variance),
            _array(sigma),
            image.psf if psf is None else psf,
            image.saturation,
            image.wcs,
        )
    else:
        found = Image(_array(image), _array(mask), _array(variance), _array(sigma), psf)
    if len(found.shape) != 2:
        raise UsageError(f"an image of shape {found.shape}: two dimensions are expected")
    for name, plane in (("mask", found.mask), ("variance", found.variance), ("sigma", found.sigma)):
        if plane is not None and np.ndim(plane) and plane.shape != found.shape:
            raise UsageError(f"{name} has shape {plane.shape}, the image {found.shape}")
    return found


def load_part(cut: tuple[Any, ...]) -> Part:
    """Read what `Image.cut` stands for."""
    pixels, mask, variance, sigma = (piece.read() if isinstance(piece, Piece) else piece for piece in cut)
    if isinstance(pixels, Exposure):
        mask = pixels.mask if mask is None else mask
        variance = pixels.variance if variance is None else variance
        pixels = pixels.data
    data = np.asarray(pixels, np.float32)
    bits = np.zeros(data.shape, np.uint8) if mask is None else _bits(np.asarray(mask))
    bad = ~np.isfinite(data) | np.ma.getmask(pixels)
    if variance is not None:
        variance = np.asarray(variance, np.float32)
        bad |= ~np.isfinite(variance)
    if bad.any():
        bits[bad] |= np.uint8(MaskBit.NO_DATA)
        data = np.where(bad, np.float32(0), data)
    if sigma is not None:
        sigma = np.ascontiguousarray(np.broadcast_to(np.asarray(sigma, np.float32), data.shape))
    return Part(data, bits, variance, sigma)


@dataclass(frozen=True)
class Piece:
    """A rectangle of pixels that lie somewhere else; small where it is sent."""

    source: Any
    area: Section

    def read(self) -> Any:
        """The pixels, in memory."""
        found = self.source[self.area]
        return found if isinstance(found, Exposure) else np.asarray(found)


@dataclass(frozen=True)
class FitsPixels:
    """The pixels of a FITS image, read by section, each as an `Exposure` with its planes."""

    path: str
    shape: tuple[int, int]

    def __getitem__(self, area: Section) -> Exposure:
        return read_image(self.path, section=area)


@dataclass(frozen=True)
class MappedPixels:
    """A memory map by the name of its file: opened for each section, so that neither memory nor pickles grow."""

    path: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]

    def __getitem__(self, area: Section) -> NDArray:
        return np.array(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[area])


def _bits(mask: NDArray) -> NDArray[np.uint8]:
    """Bits of `MaskBit`; whatever else is not zero is BAD."""
    with np.errstate(invalid="ignore"):  # NaN is not zero, whatever it is cast to
        bits = mask.astype(np.uint8) & np.uint8(_KNOWN)
    bits[(mask != 0) & (bits == 0)] = np.uint8(MaskBit.BAD)
    return bits  # type: ignore[no-any-return]


def _array(given: Any) -> Any:
    """Arrays as they are (NumPy, dask, zarr, HDF5: whatever has a shape and can be cut), all else as NumPy arrays."""
    if given is None or np.isscalar(given):
        return given
    if isinstance(given, np.memmap) and isinstance(given.base, mmap.mmap) and given.flags.c_contiguous:
        return MappedPixels(str(given.filename), given.dtype, given.offset, given.shape)
    return given if hasattr(given, "shape") and hasattr(given, "__getitem__") else np.asarray(given)


def _piece(plane: Any, area: Section) -> Any:
    if plane is None or np.isscalar(plane):
        return plane
    if isinstance(plane, np.ndarray) or hasattr(plane, "__dask_graph__"):
        return plane[area]
    return Piece(plane, area)
