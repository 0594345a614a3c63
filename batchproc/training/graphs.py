"""An ONNX file as a PyTorch module, cut before its last layer, so that training can go on from it.

Of ONNX this knows what classifiers of stamps are made of, and names what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

from batchproc.errors import ModelError

__all__ = ["OPERATORS", "Graph", "Pretrained", "read_onnx"]

#: Operator → which of its inputs training changes: weights, and what is added to what weights have made.
_LEARNT_INPUTS = {"Conv": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1), "Add": (0, 1), "BatchNormalization": (1, 2)}
_LEARNT = "|learnt"

Values = list[Any]
Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One operator: its name, the names of what goes in (empty: left out) and comes out, and its attributes."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes


@dataclass(frozen=True)
class Pretrained:
    """A network that has learnt something.

    Attributes
    ----------
    body : Graph
        All before the last layer.
    head : Linear
        The last layer, without the sigmoid or softmax behind it.
    n_inputs : int
        2 where it takes features.
    """

    body: Graph
    head: nn.Linear
    n_inputs: int


class Graph(nn.Module):
    """Runs the nodes one after the other; what is learnt in them is a parameter, all other constants are buffers."""

    def __init__(
        self, nodes: Sequence[Node], constants: Mapping[str, NDArray], inputs: Sequence[str], output: str
    ) -> None:
        super().__init__()
        self.inputs, self.output = tuple(inputs), output
        self.nodes = tuple(replace(node, inputs=_told_apart(node, constants)) for node in nodes)
        self._member: dict[str, str] = {}
        for name in dict.fromkeys(name for node in self.nodes for name in node.inputs):
            original, learnt = name.removesuffix(_LEARNT), name.endswith(_LEARNT)
            if original not in constants:
                continue
            tensor, member = torch.from_numpy(np.array(constants[original])), f"c{len(self._member)}"
            if learnt and tensor.is_floating_point():
                self.register_parameter(member, nn.Parameter(tensor))
            else:
                self.register_buffer(member, tensor)
            self._member[name] = member

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """What the last node gives."""
        values: dict[str, Any] = dict(zip(self.inputs, given, strict=True))
        values |= {name: getattr(self, member) for name, member in self._member.items()}
        values[""] = None
        for node in self.nodes:
            values[node.output] = OPERATORS[node.operator]([values[name] for name in node.inputs], node.attributes)
        answer: torch.Tensor = values[self.output]
        return answer


def read_onnx(path: str | Path) -> Pretrained:
    """The network in an ONNX file that ends in a dense layer (Gemm, or MatMul and Add) and a sigmoid or softmax.

    Raises
    ------
    ModelError
        An operator that is not known, or another end.
    """
    graph = onnx.load(str(path)).graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
            continue
        if node.op_type not in OPERATORS:
            raise ModelError(
                f"{path}: the operator {node.op_type} cannot be trained further; known: {', '.join(OPERATORS)}"
                + ("; this file is quantised: begin with the float one" if "Quantize" in node.op_type else "")
            )
        nodes.append(Node(node.op_type, tuple(node.input), node.output[0], attributes))
    inputs = [one.name for one in graph.input if one.name not in constants]
    return _cut(path, nodes, constants, inputs, graph.output[0].name)


def _cut(
    path: str | Path, nodes: list[Node], constants: dict[str, NDArray], inputs: list[str], output: str
) -> Pretrained:
    """Divide a network before its last layer."""
    by_output = {node.output: node for node in nodes}

    def found(name: str, operators: tuple[str, ...], what: str) -> Node:
        node = by_output.get(name)
        if node is None or node.operator not in operators:
            there = "an input" if node is None else node.operator
            raise ModelError(f"{path}: {what} is {there}; expected {' or '.join(operators)}")
        return node

    while output in by_output and by_output[output].operator in _PASSES:
        output = by_output[output].inputs[0]
    last = found(output, ("Sigmoid", "Softmax"), "what gives its scores")
    name = last.inputs[0]
    while name in by_output and by_output[name].operator in _PASSES:
        name = by_output[name].inputs[0]
    dense = found(name, ("Gemm", "Add", "MatMul"), "its last layer")
    bias = None
    if dense.operator == "Add":
        constant = [n for n in dense.inputs if n in constants]
        if len(constant) != 1:
            raise ModelError(f"{path}: its last layer is an Add of no constant; expected Gemm or MatMul")
        bias = constants[constant[0]].reshape(-1)
        dense = found(next(n for n in dense.inputs if n not in constants), ("MatMul",), "its last layer before Add")
    weight = constants.get(dense.inputs[1])
    plain = dense.attributes.get("alpha", 1.0) == dense.attributes.get("beta", 1.0) == 1.0
    if weight is None or not plain or dense.attributes.get("transA"):
        raise ModelError(f"{path}: its last layer is no plain dense layer with constant weights")
    weight = weight if dense.attributes.get("transB") else weight.T
    if dense.operator == "Gemm" and len(dense.inputs) > 2:
        bias = constants[dense.inputs[2]]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight.copy()))
        head.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.from_numpy(bias.copy()))
    body = Graph(_needed(nodes, dense.inputs[0]), constants, inputs, dense.inputs[0])
    return Pretrained(body, head, len(inputs))


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that `output` follows from, in their order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if node.output in wanted:
            kept.append(node)
            wanted |= set(node.inputs)
    return kept[::-1]


def _told_apart(node: Node, constants: Mapping[str, NDArray]) -> tuple[str, ...]:
    """The inputs of a node, those that training changes by a name of their own.

    Exporters write equal constants once: the bias and the mean of a normalisation may be one array of zeros.
    """
    slots = _LEARNT_INPUTS.get(node.operator, ())
    return tuple(n + _LEARNT if k in slots and n in constants else n for k, n in enumerate(node.inputs))


# --- Operators: inputs, attributes → output ---------------------------------------------------------------------------


def _pads(attributes: Attributes, stamps: torch.Tensor, kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Left, right, top, bottom, as `functional.pad` has them."""
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        out = []
        for size, k, s in reversed(list(zip(stamps.shape[2:], kernel, strides, strict=True))):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            small, large = total // 2, total - total // 2
            out += [small, large] if auto == "SAME_UPPER" else [large, small]
        return out
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    return [left, right, top, bottom]


def _conv(values: Values, attributes: Attributes) -> torch.Tensor:
    x, weight, *rest = values
    strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pads = _pads(attributes, x, reach, strides)
    x = functional.pad(x, pads) if any(pads) else x
    bias = rest[0] if rest else None
    return functional.conv2d(x, weight, bias, tuple(strides), 0, tuple(dilations), attributes.get("group", 1))


def _pool(values: Values, attributes: Attributes, *, largest: bool) -> torch.Tensor:
    x, kernel = values[0], attributes["kernel_shape"]
    strides = attributes.get("strides", [1] * len(kernel))
    pads = _pads(attributes, x, kernel, strides)
    if any(pads) and (not largest and not attributes.get("count_include_pad", 0)):
        ones = functional.pad(torch.ones_like(x), pads)
        total = functional.avg_pool2d(functional.pad(x, pads), kernel, strides)
        return total / functional.avg_pool2d(ones, kernel, strides)
    if any(pads):
        x = functional.pad(x, pads, value=-torch.inf if largest else 0.0)
    pool: Callable[..., torch.Tensor] = functional.max_pool2d if largest else functional.avg_pool2d
    return pool(x, kernel, strides, ceil_mode=bool(attributes.get("ceil_mode", 0)))


def _batch_norm(values: Values, attributes: Attributes) -> torch.Tensor:
    """With the mean and variance that it has learnt: few stamps would make bad ones."""
    x, scale, bias, mean, variance = values
    return functional.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _gemm(values: Values, attributes: Attributes) -> torch.Tensor:
    a, b, *rest = values
    bias = rest[0] if rest else None
    a = a.T if attributes.get("transA") else a
    weight = b if attributes.get("transB") else b.T
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    bias = bias if bias is None or beta == 1.0 else beta * bias
    return functional.linear(a, weight if alpha == 1.0 else alpha * weight, bias)


def _reshape(values: Values, attributes: Attributes) -> torch.Tensor:
    x, shape = values[0], values[1].tolist()
    sizes = [x.shape[k] if size == 0 else size for k, size in enumerate(shape)]
    # A first axis that was written down as 1 is that of the stamps.
    return x.reshape(-1, *sizes[1:]) if sizes[0] == 1 and -1 not in sizes else x.reshape(sizes)


def _flatten(values: Values, attributes: Attributes) -> torch.Tensor:
    if attributes.get("axis", 1) != 1:
        raise ModelError(f"Flatten with axis {attributes['axis']} cannot be trained further; expected 1")
    return torch.flatten(values[0], 1)


def _mean(values: Values, attributes: Attributes) -> torch.Tensor:
    axes = attributes["axes"] if "axes" in attributes else values[1].tolist()
    return values[0].mean(dim=tuple(axes), keepdim=bool(attributes.get("keepdims", 1)))


def _clip(values: Values, attributes: Attributes) -> torch.Tensor:
    low, high = (*values[1:], None, None)[:2]
    return torch.clamp(values[0], low, high)


OPERATORS: dict[str, Callable[[Values, Attributes], torch.Tensor]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Relu": lambda v, a: functional.relu(v[0]),
    "LeakyRelu": lambda v, a: functional.leaky_relu(v[0], a.get("alpha", 0.01)),
    "Sigmoid": lambda v, a: torch.sigmoid(v[0]),
    "Tanh": lambda v, a: torch.tanh(v[0]),
    "Softmax": lambda v, a: torch.softmax(v[0], a.get("axis", -1)),
    "Clip": _clip,
    "MaxPool": lambda v, a: _pool(v, a, largest=True),
    "AveragePool": lambda v, a: _pool(v, a, largest=False),
    "GlobalAveragePool": lambda v, a: v[0].mean(dim=(2, 3), keepdim=True),
    "GlobalMaxPool": lambda v, a: v[0].amax(dim=(2, 3), keepdim=True),
    "ReduceMean": _mean,
    "Gemm": _gemm,
    "MatMul": lambda v, a: v[0] @ v[1],
    "Add": lambda v, a: v[0] + v[1],
    "Sub": lambda v, a: v[0] - v[1],
    "Mul": lambda v, a: v[0] * v[1],
    "Div": lambda v, a: v[0] / v[1],
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": lambda v, a: v[0].permute(*a["perm"]),
    "Concat": lambda v, a: torch.cat(v, dim=a["axis"]),
    "Dropout": lambda v, a: v[0],
    "Identity": lambda v, a: v[0],
}
_PASSES = ("Identity", "Dropout", "Flatten")
