"""Star patterns: which similarity brings one star list onto another, when nothing else tells.

`astroalign` finds triangles that both lists have. Its search is seeded by chance, so what it returns is only a
beginning here: matched stars and least squares settle on the same transformation whatever triangle came first.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from batchproc.imaging.starlist import match_stars

__all__ = ["match_patterns"]

#: Brightest stars of new and of ref that triangles are made of: few first, because a search in vain takes seconds at 50
#: and minutes at 100; unequal, because one image may show much more sky than the other.
LIST_LENGTHS = ((25, 25), (50, 25), (25, 50), (50, 50))
#: Stars agree with a pattern within so many pixels.
AGREE_PIX = 4.0


def match_patterns(
    xy_new: NDArray[np.float64], xy_ref: NDArray[np.float64], min_matches: int, *, mirrored: bool = True
) -> NDArray[np.float64] | None:
    """Affine matrix ``(2, 3)`` from new's pixels to ref's, or None where no pattern is shared.

    Parameters
    ----------
    xy_new, xy_ref : ndarray (n, 2)
        Star lists, the brightest first; rotated, scaled, shifted and mirrored at will, with a part in common.
    min_matches : int
        Stars of the lists that have to agree.
    mirrored : bool
        Whether to look for mirror images too.
    """
    if min(len(xy_new), len(xy_ref)) < 3:
        return None
    # Triangles are blind to mirror images, similarities are not: if need be the list is mirrored.
    for n_new, n_ref in LIST_LENGTHS:
        for parity in (1.0, -1.0) if mirrored else (1.0,):
            seed = _similarity(xy_new[:n_new] * (parity, 1.0), xy_ref[:n_ref])
            if seed is None:
                continue
            matrix = _settle(seed * (parity, 1.0, 1.0), xy_new, xy_ref)
            if matrix is not None and _agree(matrix, xy_new, xy_ref, min_matches):
                return matrix
        if n_new >= len(xy_new) and n_ref >= len(xy_ref):
            break
    return None


def _similarity(source: NDArray, target: NDArray) -> NDArray[np.float64] | None:
    import astroalign  # needs scikit-image: slow to load, rarely needed

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transform, _ = astroalign.find_transform(source, target, max_control_points=len(source))
    except (astroalign.MaxIterError, ValueError, TypeError, IndexError, np.linalg.LinAlgError):
        return None
    matrix = np.asarray(transform.params, np.float64)[:2]
    return matrix if np.isfinite(matrix).all() else None


def _settle(matrix: NDArray, xy_new: NDArray, xy_ref: NDArray) -> NDArray[np.float64] | None:
    """Match, fit, and match again until the matches stay; affine once there are enough of them."""
    before: tuple[NDArray, NDArray] | None = None
    for _ in range(20):
        pairs = match_stars(_apply(matrix, xy_new), xy_ref, AGREE_PIX * _scale(matrix))
        if pairs[0].size < 3:
            return None
        if before is not None and np.array_equal(pairs[0], before[0]) and np.array_equal(pairs[1], before[1]):
            break
        before = pairs
        source, target = xy_new[pairs[0]], xy_ref[pairs[1]]
        if len(source) >= 6:
            terms = np.column_stack([source, np.ones(len(source))])
            matrix = np.linalg.lstsq(terms, target, rcond=None)[0].T
    return matrix


def _agree(matrix: NDArray, xy_new: NDArray, xy_ref: NDArray, min_matches: int) -> bool:
    """Enough stars agree, and many more than would by chance."""
    radius = AGREE_PIX * _scale(matrix)
    on_ref = _apply(matrix, xy_new)
    n = match_stars(on_ref, xy_ref, radius)[0].size
    low, high = xy_ref.min(axis=0), xy_ref.max(axis=0)
    inside = np.count_nonzero(((on_ref >= low) & (on_ref <= high)).all(axis=1))
    by_chance = inside * len(xy_ref) * np.pi * radius**2 / max(float(np.prod(high - low)), 1.0)
    return bool(n >= min_matches and n > 3 * by_chance)


def _apply(matrix: NDArray, xy: NDArray) -> NDArray[np.float64]:
    return xy @ matrix[:, :2].T + matrix[:, 2]


def _scale(matrix: NDArray) -> float:
    """Pixels of ref per pixel of new."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
