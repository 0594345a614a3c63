"""Mask and variance planes: file values in, `MaskBit` and electrons² out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.io.profiles import MaskRule, holds
from batchproc.records import MaskBit

__all__ = [
    "BLANK_SIDE",
    "blank_areas",
    "decode_mask",
    "decode_variance",
    "finish_pixels",
    "flag_pixels",
    "mask_rule",
]

#: Larger values than this are some program's way to say "nothing here".
NONSENSE = 1e30
#: Connected zeros are an area without data when a square of so many pixels a side fits into them.
BLANK_SIDE = 9


def blank_areas(data: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Find the areas that a resampling program filled with exact zeros, for it had no data there.

    Parameters
    ----------
    data : ndarray (ny, nx)

    Returns
    -------
    ndarray (ny, nx) bool or None
        Zeros connected (by their sides) to a square of `BLANK_SIDE` zeros; None where there is no such square. Zeros
        on their own are pixel values like others.
    """
    zero = data == 0
    if np.count_nonzero(zero) < BLANK_SIDE**2:
        return None
    # Minimum of a running square: True in the centre of each square of zeros.
    centres = ndimage.minimum_filter(zero.view(np.uint8), BLANK_SIDE, mode="constant", cval=0).view(bool)
    if not centres.any():
        return None
    labels, n_labels = ndimage.label(zero)
    blank = np.zeros(n_labels + 1, bool)
    blank[labels[centres]] = True
    return blank[labels]  # type: ignore[no-any-return]


def mask_rule(rules: Sequence[MaskRule], cards: Mapping[str, Any]) -> MaskRule:
    """The first rule that holds for these headers; without one, every non-zero pixel is bad."""
    return next((rule for rule in rules if holds(rule.when, cards)), MaskRule())


def decode_mask(plane: NDArray[Any], rule: MaskRule, cards: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Translate a mask plane.

    Parameters
    ----------
    plane : ndarray (ny, nx)
        Integers, or floating point with whole values; NaN is bad.
    rule : MaskRule
    cards : mapping
        Header of the plane, where the rule refers to it.

    Returns
    -------
    ndarray (ny, nx) uint8
        Bits of `MaskBit`.
    """
    if rule.kind == "nonzero":
        return (plane != 0).view(np.uint8) * np.uint8(MaskBit.BAD)  # NaN is not zero
    out = np.zeros(plane.shape, np.uint8)
    if not np.issubdtype(plane.dtype, np.integer):
        broken = ~(np.abs(plane) < 2**62)
        out[broken] |= np.uint8(MaskBit.BAD)
        plane = np.where(broken, 0, plane).astype(np.int64)
    for bit, listed in (
        (MaskBit.BAD, rule.bad),
        (MaskBit.SATURATED, rule.saturated),
        (MaskBit.NO_DATA, rule.no_data),
        (MaskBit.COSMIC_RAY, rule.cosmic_ray),
    ):
        found = [cards.get(item) if isinstance(item, str) else item for item in listed]
        numbers = [value for value in found if isinstance(value, int) and value >= 0]
        if rule.kind == "values":
            out[np.isin(plane, numbers)] |= np.uint8(bit)
        else:
            # Bits above the width of the plane's type cannot be set.
            pattern = sum(
                1 << value for value in numbers if value < 8 * plane.dtype.itemsize - (plane.dtype.kind == "i")
            )
            out[(plane & plane.dtype.type(pattern)) != 0] |= np.uint8(bit)
    return out


def decode_variance(
    plane: NDArray[Any], meaning: str, electrons_per_unit: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Turn a variance, weight or rms plane into electrons².

    Parameters
    ----------
    plane : ndarray (ny, nx)
    meaning : {"variance", "weight", "sigma"}
        File units squared, their inverse, or file units.
    electrons_per_unit : float

    Returns
    -------
    variance : ndarray (ny, nx) float32
        Electrons²; bad pixels hold the median of the good ones.
    bad : ndarray (ny, nx) bool
        Zero weight, or no positive finite variance.
    """
    values = plane.astype(np.float64)
    with np.errstate(all="ignore"):
        if meaning == "weight":
            np.reciprocal(values, out=values)
        elif meaning == "sigma":
            # An rms below zero is none; its square must not look like one.
            np.copysign(values * values, values, out=values)
        values *= electrons_per_unit**2
        bad = ~((values > 0) & (values < NONSENSE))
    if bad.all():
        return np.zeros(plane.shape, np.float32), bad
    if bad.any():
        values[bad] = np.median(values[~bad])
    return values.astype(np.float32), bad


@njit(cache=True, nogil=True)
def flag_pixels(data, bits):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Mark what is no number (or as large as `NONSENSE`) as NO_DATA in `bits`.

    Returns
    -------
    n_bad, n_zeros : int
        Pixels marked; pixels that are exactly zero.
    lowest, highest : float
        Of the pixels that are not NO_DATA; inf and −inf where there are none.
    """
    n_bad = n_zeros = 0
    lowest, highest = np.float32(np.inf), np.float32(-np.inf)
    limit = np.float32(NONSENSE)
    empty = np.uint8(4)  # MaskBit.NO_DATA
    for y in range(data.shape[0]):
        row, row_bits = data[y], bits[y]
        for x in range(row.size):
            v = row[x]
            bad = not abs(v) < limit
            row_bits[x] |= empty if bad else np.uint8(0)
            n_bad += bad
            n_zeros += v == 0
            known = (row_bits[x] & empty) == 0
            lowest = v if known and v < lowest else lowest
            highest = v if known and v > highest else highest
    return n_bad, n_zeros, lowest, highest


@njit(cache=True, nogil=True)
def finish_pixels(data, bits, fill, saturation, gain):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """In place: `fill` for what is no number; SATURATED in `bits` from `saturation` on; then times `gain`."""
    limit = np.float32(NONSENSE)
    saturated = np.uint8(2)  # MaskBit.SATURATED
    for y in range(data.shape[0]):
        row, row_bits = data[y], bits[y]
        for x in range(row.size):
            v = row[x] if abs(row[x]) < limit else fill
            row_bits[x] |= saturated if v >= saturation else np.uint8(0)
            row[x] = v * gain
