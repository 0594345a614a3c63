"""A PSF seen through something else: a shift, other coordinates, a memory."""

from __future__ import annotations

from dataclasses import dataclass

from batchproc.records import PsfLike

__all__ = ["PsfView"]


@dataclass(frozen=True, eq=False)
class PsfView:
    """What all views of a PSF share: its size and width are those of the PSF; each has its own ``at``.

    Attributes
    ----------
    psf : PsfLike
    """

    psf: PsfLike

    @property
    def size(self) -> int:
        """Side of the (odd, square) stamp in pixels."""
        return self.psf.size

    @property
    def fwhm(self) -> float:
        """Full width at half maximum at the image centre, in pixels."""
        return self.psf.fwhm
