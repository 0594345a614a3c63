"""How good a classifier of several classes is: who is taken for whom, and what follows from that.

Everything that is said of answers derives from the confusion matrix; of it, what depends on how common the classes are
is had for any mixture by weighting its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["accuracy", "class_numbers", "confusion", "f1", "macro_f1", "mixed", "precision", "recall"]

Matrix = NDArray[np.float64]


def class_numbers(label: NDArray[np.str_], classes: Sequence[str]) -> NDArray[np.intp]:
    """The place of each label among `classes`, which may be in any order; one that is none of them is a KeyError."""
    places = {name: k for k, name in enumerate(classes)}
    names, which = np.unique(label, return_inverse=True)
    return np.array([places[str(name)] for name in names], np.intp)[which]


def confusion(truth: ArrayLike, answer: ArrayLike, n: int, *, drawn: NDArray[np.int64] | None = None) -> Matrix:
    """How many of class i (rows) were taken for class j (columns), ``(n, n)``.

    Parameters
    ----------
    truth, answer : array_like (m,) of int
        Numbers of classes, 0 to n − 1.
    n : int
    drawn : ndarray (m,) of int, optional
        How often each candidate counts; once by default.
    """
    pair = np.asarray(truth, np.intp) * n + np.asarray(answer, np.intp)
    return np.bincount(pair, drawn, n * n).reshape(n, n).astype(np.float64)


def mixed(matrix: Matrix, shares: ArrayLike | None = None) -> Matrix:
    """The matrix if the classes had these shares (all alike by default); a class without any is left 0."""
    wanted = np.full(len(matrix), 1 / len(matrix)) if shares is None else np.asarray(shares, np.float64)
    there = matrix.sum(axis=1)
    return matrix * (wanted / np.where(there > 0, there, 1))[:, None]


def recall(matrix: Matrix) -> NDArray[np.float64]:
    """Of each class, the fraction that was recognised (completeness); NaN where there is none."""
    return _over(np.diag(matrix), matrix.sum(axis=1))


def precision(matrix: Matrix) -> NDArray[np.float64]:
    """Of what was taken for each class, the fraction that is (purity), in this mixture; NaN where nothing was."""
    return _over(np.diag(matrix), matrix.sum(axis=0))


def f1(matrix: Matrix) -> NDArray[np.float64]:
    """Harmonic mean of precision and recall of each class: 2 · right / (there are + taken for it); NaN for neither."""
    return _over(2 * np.diag(matrix), matrix.sum(axis=0) + matrix.sum(axis=1))


def macro_f1(matrix: Matrix) -> float:
    """Mean of F1 over the classes that there are, or that something was taken for: a rare one counts as much."""
    found = f1(matrix)
    return float(np.mean(found[~np.isnan(found)]))


def accuracy(matrix: Matrix) -> float:
    """Fraction that was recognised; means nothing without that of the commonest class."""
    return float(np.trace(matrix) / matrix.sum())


def _over(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(part / whole, np.float64)
