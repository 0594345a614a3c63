"""A network on its way from ONNX to TFLite: what is known of each value, and what can be done with it.

ONNX counts the axes of an image as (n, channels, rows, columns), TFLite as (n, rows, columns, channels). Nothing is
moved for that: a `Value` knows in which order the axes of its tensor lie, weights are put into that order, and only
what depends on the order of numbers (a reshape to other than rows of a matrix, an output) has a transposition before
it. What becomes of each operator is in `image_rules` and `number_rules`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.tflite.graph import Graph, Operator, Tensor
from batchproc.io.tflite.onnx_graph import Network, Node

__all__ = ["LAST", "Lowering", "Rule", "Value"]

#: Where each axis of an image lies in TFLite: its axes are ONNX's 0, 2, 3, 1.
LAST = (0, 2, 3, 1)


@dataclass(frozen=True)
class Value:
    """An ONNX value, and the tensor that holds it."""

    tensor: str
    shape: tuple[int, ...]
    """Of the ONNX value."""
    order: tuple[int, ...]
    """Axis k of the tensor is axis ``order[k]`` of what the ONNX value is, or was before it was flattened."""
    flat_from: tuple[int, ...] | None = None
    """Of a matrix that lies there as an image still: the shape of that, in ONNX's order of axes."""


Rule = Callable[["Lowering", Node], "Value"]


class Lowering:
    """One network on its way."""

    def __init__(self, path: str, network: Network, layout: str) -> None:
        self.path, self.network = path, network
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.values: dict[str, Value] = {}
        self.made_for: dict[str, str] = {}  # tensor → the first ONNX value that it held
        self.uses = Counter([network.output, *(name for node in network.nodes for name in node.inputs)])
        for name in network.inputs:
            shape = network.shapes[name]
            order = LAST if len(shape) == 4 and layout == "NCHW" else tuple(range(len(shape)))
            self.tensors[name] = Tensor(name, tuple(shape[axis] for axis in order[1:]))
            self.values[name] = Value(name, shape, order)

    def graph(self, rules: Mapping[str, Rule]) -> Graph:
        """Everything lowered by the rule for each operator of ONNX; raises `ModelError` where there is none."""
        for node in self.network.nodes:
            rule = rules.get(node.kind)
            if rule is None:
                raise ModelError(
                    f"{self.path}: the operator {node.kind} cannot be written to TFLite; those that can: "
                    f"{', '.join(rules)}. Leave it out of the network, or stay with ONNX"
                )
            found = self.values[node.output] = rule(self, node)
            self.made_for.setdefault(found.tensor, node.output)
        output = self.in_order(self.values[self.network.output])
        return Graph(self.tensors, tuple(self.operators), self.network.inputs, output.tensor)

    def refuse(self, node: Node, what: str) -> ModelError:
        """What to raise for a setting that TFLite does not have."""
        return ModelError(f"{self.path}: {node.kind} ({node.output}) {what}, which cannot be written to TFLite")

    # --- Values -------------------------------------------------------------------------------------------------------

    def constant(self, node: Node, k: int) -> NDArray[Any]:
        """Input k, which must be a constant."""
        array = self.optional(node, k)
        if array is None:
            raise self.refuse(node, f"has an input {k} that is computed or missing")
        return array

    def optional(self, node: Node, k: int) -> NDArray[Any] | None:
        """Input k where it is a constant that is there."""
        return self.network.constants.get(node.inputs[k]) if k < len(node.inputs) else None

    def value(self, node: Node, k: int = 0) -> Value:
        """Input k, which must be computed."""
        if node.inputs[k] not in self.values:
            raise self.refuse(node, f"has a constant as input {k}")
        return self.values[node.inputs[k]]

    def add(
        self,
        node: Node | None,
        kind: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        order: tuple[int, ...],
        **options: Any,
    ) -> Value:
        """Append an operator; `shape` is that of the ONNX value, which lies in the tensor in this `order`."""
        name = f"{len(self.operators)}_{node.output if node else kind.lower()}"
        stored = tuple(int(shape[axis]) for axis in order[1:])
        self.tensors[name] = Tensor(name, stored)
        self.operators.append(Operator(kind, tuple(inputs), name, options))
        return Value(name, tuple(shape), order)

    def store(self, data: NDArray[Any], dtype: type[Any] = np.float32) -> str:
        """A constant of the file; its name."""
        name = f"constant{len(self.tensors)}"
        self.tensors[name] = Tensor(name, data.shape, np.ascontiguousarray(data, dtype), dtype)
        return name

    def arranged(self, value: Value, order: tuple[int, ...]) -> Value:
        """The value with its axes in this order, moved where they are not."""
        if value.flat_from is not None:
            value = self.in_order(value)
        if value.order == order:
            return value
        steps = [value.order.index(axis) for axis in order]
        moved = self.store(np.array(steps), np.int32)
        return self.add(None, "TRANSPOSE", (value.tensor, moved), value.shape, order)

    def in_order(self, value: Value) -> Value:
        """The value number for number as in ONNX."""
        if value.flat_from is not None:
            image = self.arranged(Value(value.tensor, value.flat_from, value.order), tuple(range(len(value.order))))
            return self.reshaped(image, value.shape)
        return self.arranged(value, tuple(range(len(value.shape))))

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The same numbers in another shape; both in the order in which they lie."""
        target = (-1, *(int(length) for length in shape[1:]))
        wanted = self.store(np.array(target), np.int32)
        inputs = (value.tensor, wanted)
        return self.add(None, "RESHAPE", inputs, shape, tuple(range(len(shape))), newShape=list(target))
