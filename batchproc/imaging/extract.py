"""Source extraction: SEP, fed with arrays it accepts and asked again, less greedily, where it gives up.

Holds nothing but the call. What a source means is decided by its callers (sky: `background`; stars: `stars`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sep
from numpy.typing import NDArray

__all__ = ["extract_sources"]

#: Pixels above the threshold that SEP may hold at once, at least: its default. A crowded 4k image needs more, but room
#: for them all takes longer to make than a small image to search.
_PIXEL_STACK = 300_000


def extract_sources(
    data: NDArray[np.float32],
    rms: NDArray[np.float32],
    bad: NDArray[np.bool_],
    *,
    threshold: float,
    min_area: int = 5,
    deblend: bool = True,
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Sources above a threshold in an image without sky.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image.
    rms : ndarray (ny, nx)
        Sky noise of a pixel, in the units of `data`.
    bad : ndarray (ny, nx) bool
        Pixels to leave out.
    threshold : float
        In units of `rms`, for a pixel of the image smoothed by SEP's default 3×3 kernel.
    min_area : int
        Fewest connected pixels of a source.
    deblend : bool
        Separate blended sources (slow in large galaxies).

    Returns
    -------
    objects : structured ndarray (n,)
        SEP's columns (``x``, ``y``, ``a``, ``b``, ``theta``, ``flux``, ``peak`` …).
    segments : ndarray (ny, nx) int32
        Row of the source that owns the pixel, plus one; 0 for sky.
    """
    sep.set_extract_pixstack(max(_PIXEL_STACK, data.size // 2))
    image = np.where(bad, 0.0, data).astype(np.float32)
    noise = np.array(rms, dtype=np.float32, order="C")  # SEP takes no read-only arrays, even to read
    mask = np.array(bad, dtype=bool, order="C")
    # SEP refuses images with too many overlapping sub-objects; a higher threshold leaves fewer of them.
    for factor, contrast in ((1.0, 0.005 if deblend else 1.0), (1.0, 0.05), (2.0, 1.0), (4.0, 1.0), (16.0, 1.0)):
        try:
            return sep.extract(  # type: ignore[no-any-return]
                image,
                factor * threshold,
                err=noise,
                mask=mask,
                minarea=min_area,
                deblend_cont=contrast,
                segmentation_map=True,
            )
        except Exception as error:  # SEP raises plain Exception for its overflows
            if "overflow" not in str(error) and "full" not in str(error):
                raise
    return np.zeros(0, dtype=[("x", "f8"), ("y", "f8")]), np.zeros(data.shape, dtype=np.int32)
