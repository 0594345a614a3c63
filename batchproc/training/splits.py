"""Which examples are learnt from, which decide when to stop, and which are only measured on.

A classifier that has seen a star, or a galaxy's nucleus, knows it again: so nothing at one place of the sky is in two
parts. Stamps are larger than places: two candidates on either side of a cell's border share pixels, unless
`TrainSettings.apart_arcsec` keeps the parts that far from each other. And parts that differ in chips, filters, seeing
or season measure that difference besides the model: so the parts are alike in these. A cut in time does neither: the
same sky is on both sides of it. Arrays only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from batchproc.errors import UsageError
from batchproc.training.settings import TrainSettings

__all__ = ["PARTS", "Split", "group_of", "near_any", "sky_groups", "split_examples", "strata_of"]

PARTS = ("train", "valid", "test")
_TIMES = ("mjd", "date", "night", "time", "jd")
#: The parts can be no finer than groups: with one that holds more than this share of the examples, or
#: with fewer than `_FEW` in a part, that is said.
_LARGE = 0.3
#: Of what a base has not seen, at most this share is kept to measure on.
_MOST_TEST = 0.8
_FEW = 10


@dataclass(frozen=True)
class Split:
    """What goes where.

    Attributes
    ----------
    part : ndarray (n,) str
        One of `PARTS`, or empty: left out, for it lies where something held out lies.
    group : ndarray (n,) str
        What is never divided.
    notes : tuple of str
        What ought to be known of it, in words.
    """

    part: NDArray[np.str_]
    group: NDArray[np.str_]
    notes: tuple[str, ...] = ()

    def rows(self, part: str) -> NDArray[np.intp]:
        """Row numbers of a part."""
        return np.flatnonzero(self.part == part)


def split_examples(
    label: ArrayLike, table: pd.DataFrame, settings: TrainSettings, *, seen: NDArray[np.bool_] | None = None
) -> Split:
    """Divide examples into parts, by groups, so that classes and strata have the same shares in each.

    Parameters
    ----------
    label : array_like (n,) of str
    table : DataFrame of n rows
        As of `Examples`.
    settings : TrainSettings
        Its second block. The same seed and rows give the same parts.
    seen : ndarray (n,) bool, optional
        What the base has learnt from: with its group it is learnt from again, or nothing, but not measured on.

    Raises
    ------
    UsageError
        A column to hold out or to group by that is not there, nothing or everything held out, a cut in time, or a part
        without one of the classes: too few groups, or none that the base has not seen.
    """
    classes = np.asarray(label).astype(np.str_)
    group = group_of(table, settings)
    held = _held_out(classes, table, settings.holdout)
    part = np.full(len(classes), "", "U5")
    notes = []
    if settings.holdout:
        part[held] = "test"
        beside = ~held & np.isin(group, group[held])
        free = np.flatnonzero(~held & ~beside)
        shares = {"train": 1 - settings.valid, "valid": settings.valid}
        if beside.any():
            notes.append(f"{beside.sum()} examples at places where something is held out were left out")
    else:
        free = np.arange(len(classes))
        shares = {"train": 1 - settings.valid - settings.test, "valid": settings.valid, "test": settings.test}
    known = np.zeros(len(classes), np.bool_) if seen is None else np.isin(group, group[seen])
    part[held & known] = ""
    if known.any():
        notes.append(f"{known.sum()} examples lie where {settings.base} has learnt: none of them is measured on")
    for rows, wanted in _shared_out(free, known, shares):
        strata = strata_of(classes[rows], table.iloc[rows], settings.strata, settings.bins)
        names, number = np.unique(group[rows], return_inverse=True)
        n_classes = len(np.unique(classes[rows]))
        chosen = _divide(number, len(names), strata, n_classes, np.array(list(wanted.values())), settings.seed)
        part[rows] = np.array(list(wanted))[chosen[number]]
    crowded = _too_near(part, table, settings.apart_arcsec)
    part[crowded] = ""
    if crowded.any():
        notes.append(f"{crowded.sum()} examples within {settings.apart_arcsec:g}″ of another part were left out")
    if known.any() and not (part == "test").any():
        raise UsageError(
            f"nothing is left to measure on: {known.sum()} of {len(part)} examples lie where {settings.base} has "
            "learnt. Give examples from elsewhere, or smaller cells (--cell)"
        )
    _check_parts(classes, part, group, tuple(shares), settings)
    notes += [*_large_groups(group[free]), *_few_groups(part, group)]
    return Split(part, group, tuple(notes))


# --- Groups -----------------------------------------------------------------------------------------------------------


def group_of(table: pd.DataFrame, settings: TrainSettings) -> NDArray[np.str_]:
    """The group of each row: see `TrainSettings.group`; rows of which nothing is known are groups of one.

    Raises
    ------
    UsageError
        No such column.
    """
    alone = np.char.add("row ", np.arange(len(table)).astype(np.str_))
    if settings.group == "none":
        return alone
    if settings.group != "sky" and settings.group not in table:
        raise UsageError(
            f"group = {settings.group!r}: no such column; there are: {', '.join(map(str, table))} (or sky, or none)"
        )
    column = _text(table, "group" if settings.group == "sky" else settings.group)
    group = np.where(column == "", alone, column)
    if settings.group == "sky" and {"ra", "dec"} <= set(table):
        ra, dec = (table[name].to_numpy(np.float64, na_value=np.nan) for name in ("ra", "dec"))
        known = np.isfinite(ra) & np.isfinite(dec)
        cells = sky_groups(ra[known], dec[known], cell_arcmin=settings.cell_arcmin, same_arcsec=settings.same_arcsec)
        group = group.astype(object)
        group[known] = cells
    return group.astype(np.str_)


def sky_groups(ra: ArrayLike, dec: ArrayLike, *, cell_arcmin: float, same_arcsec: float) -> NDArray[np.str_]:
    """Cells of the sky, none of which cuts through what lies within `same_arcsec` of each other.

    Friends of friends (linking length `same_arcsec`) are one thing, and go where their middle is: into one of the
    cells, `cell_arcmin` a side, that bands of declination are divided into. Positions in degrees.
    """
    xyz = _directions(ra, dec)
    if not len(xyz):
        return np.zeros(0, "U1")
    pairs = cKDTree(xyz).query_pairs(_chord(same_arcsec), output_type="ndarray")
    links = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(len(xyz), len(xyz)))
    n_things, thing = connected_components(links, directed=False)
    total = np.stack([np.bincount(thing, xyz[:, k], n_things) for k in range(3)])
    middle = total / np.sqrt((total**2).sum(axis=0))
    side = cell_arcmin / 60
    declination = np.degrees(np.arcsin(np.clip(middle[2], -1, 1)))
    band = np.floor((declination + 90) / side).astype(np.int64)
    around = np.maximum(1, np.floor(360 * np.cos(np.radians((band + 0.5) * side - 90)) / side)).astype(np.int64)
    turn = np.mod(np.degrees(np.arctan2(middle[1], middle[0])), 360) / 360
    cell = np.minimum((turn * around).astype(np.int64), around - 1)
    names = np.char.add(np.char.add(band.astype(np.str_), "/"), cell.astype(np.str_))
    return names[thing]


def _directions(ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
    """Unit vectors ``(n, 3)`` of positions in degrees."""
    longitude, latitude = np.radians(np.asarray(ra, float)), np.radians(np.asarray(dec, float))
    cosine = np.cos(latitude)
    return np.column_stack([cosine * np.cos(longitude), cosine * np.sin(longitude), np.sin(latitude)])


def _chord(arcsec: float) -> float:
    """Distance of two unit vectors so far from each other."""
    return float(2 * np.sin(np.radians(arcsec / 3600) / 2))


def near_any(these: pd.DataFrame, those: pd.DataFrame, within_arcsec: float) -> NDArray[np.bool_]:
    """Which of the positions (``ra``, ``dec`` in degrees) have another table's so near; none where one is not known."""
    one, other = (table[["ra", "dec"]].to_numpy(np.float64, na_value=np.nan) for table in (these, those))
    here, there = (np.isfinite(sky).all(axis=1) for sky in (one, other))
    near = np.zeros(len(one), np.bool_)
    if here.any() and there.any():
        tree = cKDTree(_directions(*other[there].T))
        distance = tree.query(_directions(*one[here].T), distance_upper_bound=_chord(within_arcsec))[0]
        near[here] = np.isfinite(distance)
    return near


def _too_near(part: NDArray[np.str_], table: pd.DataFrame, apart_arcsec: float) -> NDArray[np.bool_]:
    """What of valid lies that near to test, and what of train to test or to what is left of valid."""
    left_out = np.zeros(len(part), np.bool_)
    if not apart_arcsec or not {"ra", "dec"} <= set(table):
        return left_out
    for name, others in (("valid", ["test"]), ("train", ["test", "valid"])):
        rows, held = part == name, np.isin(part, others) & ~left_out
        left_out[rows] = near_any(table[rows], table[held], apart_arcsec)
    return left_out


def _large_groups(group: NDArray[np.str_]) -> list[str]:
    names, sizes = np.unique(group, return_counts=True)
    if not len(names) or sizes.max() <= _LARGE * len(group) or len(names) == 1:
        return []
    return [
        f"{sizes.max()} of {len(group)} examples are of one group ({names[sizes.argmax()]}): the shares of the parts "
        "cannot come near those asked for"
    ]


def _few_groups(part: NDArray[np.str_], group: NDArray[np.str_]) -> list[str]:
    n = {name: len(np.unique(group[part == name])) for name in PARTS}
    return [f"the part {name} is of {k} groups: too few to stand for others" for name, k in n.items() if k < _FEW]


# --- Strata -----------------------------------------------------------------------------------------------------------


def strata_of(label: NDArray, table: pd.DataFrame, columns: Sequence[str], bins: int) -> csr_array:
    """What the parts shall be alike in: of each row, its class, its class in each column, and all of that together.

    Returns
    -------
    csr_array (n, strata) of float
        1 where a row belongs to a stratum. Columns of numbers are cut at their quantiles; unknown is a value as well.
    """
    classes = np.unique(label, return_inverse=True)[1]
    keys = [classes]
    together = classes
    for name in columns:
        if name in table:
            values = _binned(table[name], bins)
            keys.append(np.unique(np.column_stack([classes, values]), axis=0, return_inverse=True)[1].ravel())
            together = np.unique(np.column_stack([together, values]), axis=0, return_inverse=True)[1].ravel()
    if len(keys) > 2:
        keys.append(together)
    n = len(label)
    offsets = np.cumsum([0, *(int(key.max(initial=-1)) + 1 for key in keys)])
    column = np.concatenate([key + offset for key, offset in zip(keys, offsets, strict=False)])
    rows = np.tile(np.arange(n), len(keys))
    return coo_array((np.ones(len(rows)), (rows, column)), shape=(n, int(offsets[-1]))).tocsr()


def _binned(column: pd.Series, bins: int) -> NDArray[np.intp]:
    """Number of the bin of each value; numbers by quantiles, -1 for NaN; others by value."""
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return np.unique(column.astype(object).fillna("").astype(str), return_inverse=True)[1]
    values = column.to_numpy(np.float64, na_value=np.nan)
    known = np.isfinite(values)
    out = np.full(len(values), -1, np.intp)
    if known.any():
        edges = np.unique(np.quantile(values[known], np.arange(1, bins) / bins))
        out[known] = np.searchsorted(edges, values[known], side="right")
    return out


def _divide(
    number: NDArray[np.intp], n_groups: int, strata: csr_array, n_classes: int, shares: NDArray[np.float64], seed: int
) -> NDArray[np.intp]:
    """A part for each group: one after the other, the large ones first, each to where it brings the shares nearest.

    The distance is the sum over strata k and parts p of (found − wanted)² / wanted, with wanted = share_p × total_k:
    chi-square, so that rare classes weigh as much as common ones. Strata of fewer groups than it takes to give the
    smallest part one are passed over, but for the classes, which are the first `n_classes`: such strata can but be in
    the largest part, and would draw everything there.
    """
    membership = coo_array((np.ones(len(number)), (number, np.arange(len(number)))), shape=(n_groups, len(number)))
    counts = (membership.tocsr() @ strata).tocsc()
    divisible = np.diff(counts.indptr) >= 1 / shares.min()
    divisible[:n_classes] = True
    counts = counts[:, divisible].tocsr()
    sizes = np.bincount(number, minlength=n_groups)
    shuffled = np.random.default_rng(seed).permutation(n_groups)
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    wanted = shares[:, None] * np.asarray(counts.sum(axis=0)).ravel()  # (parts, strata)
    found = np.zeros_like(wanted)
    chosen = np.zeros(n_groups, np.intp)
    for g in order:
        span = slice(counts.indptr[g], counts.indptr[g + 1])
        k, more = counts.indices[span], counts.data[span]
        grown = ((2 * (found[:, k] - wanted[:, k]) + more) * more / wanted[:, k]).sum(axis=1)
        chosen[g] = int(np.argmin(grown))
        found[chosen[g], k] += more
    _give_each_a_group(chosen, counts[:, :n_classes].toarray() > 0, order[::-1], len(shares))
    return chosen


def _give_each_a_group(
    chosen: NDArray[np.intp], has: NDArray[np.bool_], smallest_first: NDArray[np.intp], n_parts: int
) -> None:
    """Move single groups, in place, so that every part has every class, where there are groups enough."""
    for k in range(has.shape[1]):
        for part in range(n_parts):
            if has[chosen == part, k].any():
                continue
            held = np.array([has[chosen == p].sum(axis=0) for p in range(n_parts)])  # groups (parts, classes)
            for g in smallest_first:
                if has[g, k] and (held[chosen[g]][has[g]] > 1).all():
                    chosen[g] = part
                    break


# --- What is held out, and what may not be ----------------------------------------------------------------------------


def _held_out(label: NDArray, table: pd.DataFrame, holdout: Sequence[str]) -> NDArray[np.bool_]:
    held = np.zeros(len(table), np.bool_)
    for text in holdout:
        name, _, value = text.partition("=")
        if name in _TIMES:
            raise UsageError(
                f"--holdout {text}: a cut in time alone has the same sky on both sides; hold out a survey, a field or "
                "a CCD (times are among the strata already)"
            )
        if name != "label" and name not in table:
            raise UsageError(f"--holdout {text}: no column {name!r}; there are: label, {', '.join(map(str, table))}")
        values = label if name == "label" else _text(table, name)
        here = values == value
        if not here.any():
            known = ", ".join(np.unique(values)[:10])
            raise UsageError(f"--holdout {text}: no example has that; {name} is one of: {known}")
        held |= here
    if held.all() and len(held):
        raise UsageError(f"--holdout {', '.join(holdout)}: that is all of them, and nothing is left to learn from")
    return held


def _text(table: pd.DataFrame, name: str) -> NDArray:
    """A column as text, empty where there is none."""
    if name not in table:
        return np.full(len(table), "", object)
    return table[name].astype(object).where(table[name].notna(), "").astype(str).to_numpy(object)


def _shared_out(
    free: NDArray[np.intp], known: NDArray[np.bool_], shares: dict[str, float]
) -> Iterator[tuple[NDArray[np.intp], dict[str, float]]]:
    """Rows, and the shares of the parts among them: what is known goes into no test, and the rest makes up for that."""
    old, new = free[known[free]], free[~known[free]]
    if "test" not in shares or not len(old):
        yield free, shares
        return
    learnt = {name: share / (1 - shares["test"]) for name, share in shares.items() if name != "test"}
    yield old, learnt
    if len(new):
        test = min(_MOST_TEST, shares["test"] * len(free) / len(new))
        yield new, {**{name: share * (1 - test) for name, share in learnt.items()}, "test": test}


def _check_parts(
    label: NDArray, part: NDArray, group: NDArray, divided: tuple[str, ...], settings: TrainSettings
) -> None:
    for name in divided:
        missing = sorted(set(label[part != ""]) - set(label[part == name]))
        if missing:
            n = {c: len(np.unique(group[(label == c) & (part != "")])) for c in missing}
            told = ", ".join(f"{c} is in {k} group{'s' * (k != 1)}" for c, k in n.items())
            cells = f" in cells of {settings.cell_arcmin:g} arcmin" if settings.group == "sky" else ""
            raise UsageError(
                f"the part {name} has no {' and no '.join(missing)}: {told}, grouped by {settings.group}{cells}. "
                "Give more examples, smaller cells (--cell), or another column to group by (--group)"
            )
