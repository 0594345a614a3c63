"""Stamps as another survey's packets hold them: with their sky, or the difference the way round that it is seen.

Stamps of a run have lost their sky, and their difference is new − ref. ZTF's packets keep the sky of both images, and
turn the difference round where a source has faded, so that it is a peak always. A network that learnt from such and
divides by a norm is at a loss with other pixels: braai's answers to stamps of a run are then no better than chance.
What a network expects is on its card; here stamps that are not so are made so, and all others left as they are.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from batchproc.learning.noise_log import NO_DATA_LIMIT, sky_and_noise

__all__ = ["SIGNS", "to_convention"]

#: Signs of the difference: new − ref; or that of the candidate, which is positive in it whether it rose or faded.
SIGNS = ("new-ref", "positive")

#: A reference with a sky has more than so many times its own noise of it: that of a coadd is 10 to 200.
_SKY_FROM = 5.0


def to_convention(stamps: NDArray[np.floating], *, sky: float, sign: str) -> NDArray[np.float32]:
    """A copy of stamps in which sky and sign are as a model expects them.

    Parameters
    ----------
    stamps : ndarray (n, 3, h, w)
        New, reference, difference, un-normalised; the candidate at ``(h // 2, w // 2)``. Not modified.
    sky : float
        In units of the noise of new: what new and reference are given under them where the reference has no sky, less
        that is than five times its own noise. 0: nothing.
    sign : {"new-ref", "positive"}
        "positive": the difference is negated where its middle (3 × 3 pixels) is negative on the whole.

    Returns
    -------
    ndarray (n, 3, h, w) float32
    """
    with np.errstate(over="ignore"):
        out = np.array(stamps, np.float32, order="C")
    if sky:
        _give_sky(out, sky)
    if sign == "positive":
        _turn_round(out)
    return out


@njit(cache=True, nogil=True)
def _give_sky(stamps: NDArray[np.float32], sky: float) -> None:
    n, _, h, w = stamps.shape
    flat = stamps.reshape(n, 3, h * w)
    for i in range(n):
        sky_ref, noise_ref = sky_and_noise(flat[i, 1])
        if sky_ref > _SKY_FROM * noise_ref:
            continue
        sky_new, noise_new = sky_and_noise(flat[i, 0])
        for k in range(h * w):
            flat[i, 0, k] += np.float32(sky * noise_new - sky_new)
            flat[i, 1, k] += np.float32(sky * noise_new - sky_ref)


@njit(cache=True, nogil=True)
def _turn_round(stamps: NDArray[np.float32]) -> None:
    n, _, h, w = stamps.shape
    for i in range(n):
        total = np.float64(0.0)
        for y in range(max(h // 2 - 1, 0), min(h // 2 + 2, h)):
            for x in range(max(w // 2 - 1, 0), min(w // 2 + 2, w)):
                value = np.float64(stamps[i, 2, y, x])
                total += value if abs(value) < NO_DATA_LIMIT else 0.0  # False for NaN
        if total < 0.0:
            for y in range(h):
                for x in range(w):
                    stamps[i, 2, y, x] = -stamps[i, 2, y, x]
