"""Triplets of stamps as PNG: new and ref in one stretch, the difference symmetric about zero."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

__all__ = ["triplet_png"]

_GAP = 2  # pixels between the panels
_NO_DATA = (0.45, 0.47, 0.5, 1.0)


def triplet_png(stamp: NDArray[np.float32], side: int = 47) -> str:
    """The middle of a stamp triplet as a ``data:`` address of a PNG.

    New and ref share one asinh stretch, from two sigma below the sky to the brightest pixel of the source; the
    difference is grey at zero, light where light was gained, dark where it was lost. North is not sought: y points up.

    Parameters
    ----------
    stamp : ndarray (3, h, w)
        New, ref, difference; NaN where there is no data.
    side : int
        At most so many pixels of the middle are shown.

    Returns
    -------
    str
    """
    panels = [_middle(plane, side) for plane in stamp]
    grey = matplotlib.colormaps["gray"]
    low, high, sigma = _range(panels[0], panels[1])
    pictures = [grey(_asinh((p - low) / (high - low), sigma / (high - low))) for p in panels[:2]]
    reach = _reach(panels[2])
    pictures.append(grey(0.5 + 0.5 * np.clip(panels[2] / reach, -1, 1)))
    for panel, picture in zip(panels, pictures, strict=True):
        picture[~np.isfinite(panel)] = _NO_DATA
    gap = np.zeros((panels[0].shape[0], _GAP, 4))
    row = np.concatenate([pictures[0], gap, pictures[1], gap, pictures[2]], axis=1)
    buffer = io.BytesIO()
    imsave(buffer, (row[::-1] * 255 + 0.5).astype(np.uint8), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _middle(plane: NDArray, side: int) -> NDArray[np.float64]:
    cut = [max((n - side) // 2, 0) for n in plane.shape]
    return np.asarray(plane[cut[0] : plane.shape[0] - cut[0], cut[1] : plane.shape[1] - cut[1]], dtype=np.float64)


def _range(new: NDArray, ref: NDArray) -> tuple[float, float, float]:
    """Black, white and noise of the two images together."""
    both = np.concatenate([new.ravel(), ref.ravel()])
    both = both[np.isfinite(both)]
    if len(both) == 0:
        return 0.0, 1.0, 1.0
    sky = float(np.median(both))
    sigma = max(1.4826 * float(np.median(np.abs(both - sky))), 1e-6 * (float(np.ptp(both)) or 1.0), 1e-12)
    core = np.concatenate([_middle(new, 11).ravel(), _middle(ref, 11).ravel()])
    core = core[np.isfinite(core)]
    peak = max(float(np.max(core, initial=sky)), float(np.percentile(both, 99.5)))
    return sky - 2 * sigma, max(peak, sky + 8 * sigma), sigma


def _reach(difference: NDArray) -> float:
    """The difference's value that is shown white, its negative black: the source's own peak, not its neighbours'."""
    good = difference[np.isfinite(difference)]
    if len(good) == 0:
        return 1.0
    core = _middle(difference, 9)
    core = core[np.isfinite(core)]
    noise = 1.4826 * float(np.median(np.abs(good - np.median(good))))
    return max(0.8 * float(np.max(np.abs(core), initial=0.0)), 4 * noise, 1e-12)


def _asinh(unit: NDArray, softening: float) -> NDArray[np.float64]:
    """0…1 to 0…1, linear below a few times the softening, logarithmic above."""
    scale = max(6 * softening, 1e-3)
    out: NDArray[np.float64] = np.arcsinh(np.clip(unit, 0, 1) / scale) / np.arcsinh(1 / scale)
    return out
