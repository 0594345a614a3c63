"""What every evaluation says beside its numbers: how intervals were made, and what the models cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import BatchprocError, UsageError
from batchproc.io.catalogue import open_catalogue
from batchproc.io.cost import Cost, measure_cost
from batchproc.io.models import load_model
from batchproc.io.stamps import open_stamps
from batchproc.judging.measures import Plan

__all__ = ["ENOUGH_GROUPS", "bootstrap_words", "check_groups", "cost_rows", "costs_on_run", "how"]

#: Fewer make bootstrapped intervals that are too narrow.
ENOUGH_GROUPS = 20
#: Stamps that costs are measured on.
_STAMPS = 2048


def check_groups(group: NDArray[np.str_] | None, name: str, n: int) -> int:
    """How many there are to draw from, of `n` candidates; raises `UsageError` where it is one."""
    n_groups = n if group is None else len(np.unique(group))
    if n_groups < 2:
        raise UsageError(f"all candidates are of one {name}: no interval follows; --group none draws singly")
    return n_groups


def how(plan: Plan, group: str, n_groups: int) -> dict[str, Any]:
    """How intervals were made, for JSON."""
    return {
        "resamples": plan.resamples,
        "level": plan.level,
        "seed": plan.seed,
        "group": group,
        "groups": n_groups,
    }


def bootstrap_words(plan: Plan, group: str, n_groups: int) -> str:
    """The same in words."""
    drawn = "single candidates" if group == "none" else f"{n_groups} groups ({group})"
    return f"intervals: {plan.level:.0%} of {plan.resamples} resamples of {drawn}"


def cost_rows(names: Sequence[str], costs: Mapping[str, Cost]) -> list[tuple[str, ...]]:
    """Rows of a table with a column a model; none where nothing was measured."""
    if not costs:
        return []
    found = [costs.get(name) for name in names]
    return [
        ("stamps per CPU-second", "1 thread", *(f"{one.stamps_per_second:,.0f}" if one else "–" for one in found)),
        ("peak memory of the model", "1 thread", *(f"{one.memory_mb:.0f} MB" if one else "–" for one in found)),
    ]


def costs_on_run(run: str | Path, models: Mapping[str, str], n: int = _STAMPS) -> tuple[dict[str, Cost], list[str]]:
    """What the models that have scored a run cost on its stamps.

    Parameters
    ----------
    run : path
    models : mapping
        Name → SHA-256 of the file that scored.
    n : int
        Stamps at most; spread evenly over the run.

    Returns
    -------
    costs : dict
        By name; of those models that are found here as they were when they scored.
    notes : list of str
        What was measured on, and why of which models nothing was.
    """
    costs: dict[str, Cost] = {}
    notes = []
    stamps = open_stamps(run)
    rows = np.unique(np.linspace(0, max(len(stamps) - 1, 0), min(n, len(stamps))).astype(np.intp))
    for name, sha256 in models.items():
        try:
            variant, features = _as_it_scored(name, sha256)
            table = open_catalogue(run, columns=list(features)) if features else None
            numbers = None if table is None else table.to_numpy(np.float32, na_value=np.nan)[rows]
            costs[name] = measure_cost(name, stamps[rows], numbers, variant=variant)
        except BatchprocError as error:
            notes.append(f"{name}: speed and memory are not measured: {error}")
    if costs:
        batch = next(iter(costs.values())).batch
        notes.append(
            f"speed and memory: of {len(rows)} stamps of this run in batches of {batch}, what makes tensors of them "
            "included, in a process of its own; memory above that of the packages and the stamps"
        )
    return costs, notes


def _as_it_scored(name: str, sha256: str) -> tuple[str, tuple[str, ...]]:
    """Variant and features of the model of this name, which must have a file of this hash."""
    card = load_model(name).card
    for variant, file in card.files.items():
        if file["sha256"] == sha256:
            return variant, card.input.features
    raise UsageError(f"the model of this name has changed since it scored (SHA-256 {sha256[:12]}…)")
