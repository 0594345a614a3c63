"""What a forest looks at: terms made of catalogue columns, mostly ratios, so that no survey's units are learnt.

A term is written as it is read: ``chi2``, ``|scorr|``, ``fwhm/fwhm_new``, ``|ref_flux/flux|``, or ``flags&16`` for
whether that bit is set. It is computed in float32 by `compute` for training, and by the nodes of `to_onnx` inside the
model's file, whose input are plain catalogue columns: whoever scores needs to know nothing of terms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError

__all__ = ["IR", "LIMIT", "OPSET", "TERMS", "Term", "columns_of", "compute", "parse", "to_onnx"]

#: What tells artefacts from sources whatever the units, the depth and the pixels of a survey: significance; size, shape
#: and fit; lobes; sharpness; what lies beneath in the reference. Of the flags, those that say what a thing looks like:
#: the others say where on the detector it lies.
TERMS: tuple[str, ...] = (
    "|scorr|",
    "|flux/flux_err|",
    "chi2",
    "dipole",
    "elongation",
    "delta_new",
    "delta_ref",
    "fwhm/fwhm_new",
    "aper_flux/flux",
    "ref_distance/fwhm_new",
    "|ref_flux/flux|",
    "ref_fwhm/fwhm_ref",
    "flags&16",
    "flags&32",
    "flags&64",
    "flags&128",
    "flags&256",
)
#: Terms are clipped to ± this, and 0/0 is 0: a forest takes finite numbers.
LIMIT = 1e30
#: Of the files that are written.
OPSET, IR = 18, 8

_NAME = r"[A-Za-z_]\w*"
_TERM = re.compile(rf"(?P<bar>\|?)(?P<over>{_NAME})(?:/(?P<under>{_NAME})|&(?P<bit>\d+))?(?P<end>\|?)")


@dataclass(frozen=True)
class Term:
    """One number of a candidate: a column, over another where `under` names one, without its sign where `absolute`."""

    over: str
    under: str = ""
    absolute: bool = False
    bit: int = 0
    """Where it is not 0: whether this bit (a power of two) of the column is set."""

    @property
    def columns(self) -> tuple[str, ...]:
        """That it is made of."""
        return (self.over, self.under) if self.under else (self.over,)


def parse(term: str) -> Term:
    """Read a term as it is written; raises `UsageError` for what is none."""
    found = _TERM.fullmatch(term.replace(" ", ""))
    bit = int(found["bit"] or 0) if found else 0
    if found is None or found["bar"] != found["end"] or (found["bit"] and (bit < 1 or bit & (bit - 1))):
        raise UsageError(
            f"feature {term!r}: expected a catalogue column, |COLUMN|, COLUMN/COLUMN, |COLUMN/COLUMN| or COLUMN&BIT "
            "with a power of two"
        )
    return Term(found["over"], found["under"] or "", bool(found["bar"]), bit)


def columns_of(terms: Sequence[str]) -> tuple[str, ...]:
    """The columns that terms are made of, each once, in the order of their first use."""
    return tuple(dict.fromkeys(column for term in terms for column in parse(term).columns))


def compute(terms: Sequence[str], table: pd.DataFrame | Mapping[str, NDArray]) -> NDArray[np.float32]:
    """Terms ``(n, len(terms))`` of the rows of a table; all finite where the columns are.

    Raises
    ------
    UsageError
        A column that the table lacks.
    """
    missing = [name for name in columns_of(terms) if name not in table]
    if missing:
        raise UsageError(f"no column {', '.join(missing)}; found {', '.join(map(str, table))}")

    def column(name: str) -> NDArray[np.float32]:
        return np.asarray(table[name]).astype(np.float32)

    with np.errstate(all="ignore"):
        values = [_value(parse(term), column) for term in terms]
        stacked = np.stack(values, axis=1)
    return np.clip(np.where(np.isnan(stacked), np.float32(0), stacked), np.float32(-LIMIT), np.float32(LIMIT))


def _value(term: Term, column: Any) -> NDArray[np.float32]:
    value: NDArray[np.float32] = column(term.over)
    if term.bit:
        return np.mod(np.floor(value / np.float32(term.bit)), np.float32(2))
    if term.under:
        value = value / column(term.under)
    return np.abs(value) if term.absolute else value


def to_onnx(terms: Sequence[str], columns: Sequence[str]) -> Any:
    """An ONNX model from ``features`` ``(n, len(columns))`` to ``terms``, equal to `compute` to the last bit."""
    import onnx

    node, value = onnx.helper.make_node, onnx.TensorProto.FLOAT
    nodes = [node("Split", ["features"], [f"c_{name}" for name in columns], axis=1, num_outputs=len(columns))]
    constants: dict[str, Any] = {"low": np.float32(-LIMIT), "high": np.float32(LIMIT), "zero": np.float32(0)}
    constants["two"] = np.float32(2)
    for k, term in enumerate(map(parse, terms)):
        last = f"c_{term.over}"
        steps: list[tuple[str, list[str]]] = []
        if term.bit:
            constants[f"bit_{k}"] = np.float32(term.bit)
            steps = [("Div", [f"bit_{k}"]), ("Floor", []), ("Mod", ["two"])]
        elif term.under:
            steps = [("Div", [f"c_{term.under}"])]
        for step, (kind, others) in enumerate([*steps, *([("Abs", [])] if term.absolute else [])]):
            more = {"fmod": 1} if kind == "Mod" else {}
            nodes.append(node(kind, [last, *others], [f"t_{k}_{step}"], **more))
            last = f"t_{k}_{step}"
        nodes.append(node("Identity", [last], [f"t_{k}"]))
    nodes += [
        node("Concat", [f"t_{k}" for k in range(len(terms))], ["joined"], axis=1),
        node("IsNaN", ["joined"], ["is_nan"]),
        node("Where", ["is_nan", "zero", "joined"], ["numbers"]),
        node("Clip", ["numbers", "low", "high"], ["terms"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "terms",
        [onnx.helper.make_tensor_value_info("features", value, ["n", len(columns)])],
        [onnx.helper.make_tensor_value_info("terms", value, ["n", len(terms)])],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR)
