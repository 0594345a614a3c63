"""From ONNX's operators to TFLite's, in float: the same scores, channels last.

ONNX counts the axes of an image as (n, channels, rows, columns), TFLite as (n, rows, columns, channels). Nothing is
moved for that: a `_Value` knows in which order the axes of its tensor lie, weights are put into that order here, and
only what depends on the order of numbers (a reshape to other than rows of a matrix, an output) has a transposition
before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.tflite.graph import Graph, Operator, Tensor
from batchproc.io.tflite.onnx_graph import Network, Node, read_network

__all__ = ["SUPPORTED", "lower"]

#: Where each axis of an image lies in TFLite: its axes are ONNX's 0, 2, 3, 1.
_LAST = (0, 2, 3, 1)


def lower(path: str | Path, layout: str = "NCHW") -> Graph:
    """The network of an ONNX file in TFLite's operators, in float.

    Parameters
    ----------
    path : str or Path
    layout : {"NCHW", "NHWC"}
        Order of the axes of the ONNX file's image input. That of the graph is NHWC always.

    Raises
    ------
    ModelError
        An operator, or a setting of one, that is not known here; it is named.
    """
    network = read_network(path)
    if network.output in network.inputs or not network.nodes:
        raise ModelError(f"{path}: a network that does nothing")
    return _Lowering(str(path), network, layout).graph()


@dataclass(frozen=True)
class _Value:
    """An ONNX value, and the tensor that holds it."""

    tensor: str
    shape: tuple[int, ...]
    """Of the ONNX value."""
    order: tuple[int, ...]
    """Axis k of the tensor is axis ``order[k]`` of what the ONNX value is, or was before it was flattened."""
    flat_from: tuple[int, ...] | None = None
    """Of a matrix that lies there as an image still: the shape of that, in ONNX's order of axes."""

    @property
    def plain(self) -> bool:
        """Whether the tensor is the ONNX value number for number."""
        return self.flat_from is None and self.order == tuple(range(len(self.order)))


class _Lowering:
    """One network on its way."""

    def __init__(self, path: str, network: Network, layout: str) -> None:
        self.path, self.network = path, network
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.values: dict[str, _Value] = {}
        self.made_for: dict[str, str] = {}  # tensor → the first ONNX value that it held
        self.uses = Counter([network.output, *(name for node in network.nodes for name in node.inputs)])
        for name in network.inputs:
            shape = network.shapes[name]
            order = _LAST if len(shape) == 4 and layout == "NCHW" else tuple(range(len(shape)))
            self.tensors[name] = Tensor(name, tuple(shape[axis] for axis in order[1:]))
            self.values[name] = _Value(name, shape, order)

    def graph(self) -> Graph:
        """Everything lowered."""
        for node in self.network.nodes:
            rule = _RULES.get(node.kind)
            if rule is None:
                raise ModelError(
                    f"{self.path}: the operator {node.kind} cannot be written to TFLite; those that can: "
                    f"{', '.join(SUPPORTED)}. Leave it out of the network, or stay with ONNX"
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

    def value(self, node: Node, k: int = 0) -> _Value:
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
    ) -> _Value:
        """Append an operator; `shape` is that of the ONNX value, which lies in the tensor in this `order`."""
        name = f"{len(self.operators)}_{node.output if node else kind.lower()}"
        stored = tuple(int(shape[axis]) for axis in order[1:])
        self.tensors[name] = Tensor(name, stored)
        self.operators.append(Operator(kind, tuple(inputs), name, options))
        return _Value(name, tuple(shape), order)

    def store(self, data: NDArray[Any], dtype: type[Any] = np.float32) -> str:
        """A constant of the file; its name."""
        name = f"constant{len(self.tensors)}"
        self.tensors[name] = Tensor(name, data.shape, np.ascontiguousarray(data, dtype), dtype)
        return name

    def arranged(self, value: _Value, order: tuple[int, ...]) -> _Value:
        """The value with its axes in this order, moved where they are not."""
        if value.flat_from is not None:
            value = self.in_order(value)
        if value.order == order:
            return value
        steps = [value.order.index(axis) for axis in order]
        moved = self.store(np.array(steps), np.int32)
        return self.add(None, "TRANSPOSE", (value.tensor, moved), value.shape, order)

    def in_order(self, value: _Value) -> _Value:
        """The value number for number as in ONNX."""
        if value.flat_from is not None:
            image = self.arranged(_Value(value.tensor, value.flat_from, value.order), tuple(range(len(value.order))))
            return self.reshaped(image, value.shape)
        return self.arranged(value, tuple(range(len(value.shape))))

    def reshaped(self, value: _Value, shape: Sequence[int]) -> _Value:
        """The same numbers in another shape; both in the order in which they lie."""
        target = (-1, *(int(length) for length in shape[1:]))
        wanted = self.store(np.array(target), np.int32)
        inputs = (value.tensor, wanted)
        return self.add(None, "RESHAPE", inputs, shape, tuple(range(len(shape))), newShape=list(target))


# --- Images -----------------------------------------------------------------------------------------------------------


def _conv(net: _Lowering, node: Node) -> _Value:
    weights, bias = net.constant(node, 1), net.optional(node, 2)
    if weights.ndim != 4:
        raise net.refuse(node, f"is over {weights.ndim - 2} axes, not over rows and columns")
    image = net.arranged(net.value(node), _LAST)
    out, channels, groups = weights.shape[0], image.shape[1], int(node.attributes.get("group", 1))
    strides, dilations = _pair(node, "strides"), _pair(node, "dilations")
    reach = tuple(dilations[k] * (weights.shape[2 + k] - 1) + 1 for k in (0, 1))
    image, padding = _padded(net, node, image, reach, strides)
    offsets = net.store(np.zeros(out) if bias is None else bias)
    options: dict[str, Any] = {"padding": padding, "strideH": strides[0], "strideW": strides[1]}
    options |= {"dilationHFactor": dilations[0], "dilationWFactor": dilations[1], "fusedActivationFunction": "NONE"}
    if groups == channels and groups > 1:
        kernel = net.store(weights.transpose(1, 2, 3, 0))  # (1, rows, columns, out)
        inputs, kind = (image.tensor, kernel, offsets), "DEPTHWISE_CONV_2D"
        options["depthMultiplier"] = out // channels
    else:
        kernel = net.store(weights.transpose(0, 2, 3, 1))  # (out, rows, columns, in of a group)
        inputs, kind = (image.tensor, kernel, offsets), "CONV_2D"
    return net.add(node, kind, inputs, net.network.shapes[node.output], _LAST, **options)


def _pool(net: _Lowering, node: Node) -> _Value:
    image = net.arranged(net.value(node), _LAST)
    window, strides = _pair(node, "kernel_shape"), _pair(node, "strides")
    if _pair(node, "dilations") != (1, 1) or len(node.attributes["kernel_shape"]) != 2:
        raise net.refuse(node, "is dilated, or not over rows and columns")
    mean = node.kind == "AveragePool"
    zeros_count = not mean or bool(node.attributes.get("count_include_pad", 0))
    image, padding = _padded(net, node, image, window, strides, explicit=mean and zeros_count)
    kind = "AVERAGE_POOL_2D" if mean else "MAX_POOL_2D"
    options = {"padding": padding, "strideH": strides[0], "strideW": strides[1], "filterHeight": window[0]}
    shape = net.network.shapes[node.output]
    if padding == "VALID" and any((image.shape[2 + k] - window[k]) // strides[k] + 1 != shape[2 + k] for k in (0, 1)):
        raise net.refuse(node, "rounds its size up (ceil_mode)")
    options |= {"filterWidth": window[1], "fusedActivationFunction": "NONE"}
    return net.add(node, kind, (image.tensor,), shape, _LAST, **options)


def _global_pool(net: _Lowering, node: Node) -> _Value:
    image = net.arranged(net.value(node), _LAST)
    shape = net.network.shapes[node.output]
    if node.kind == "GlobalMaxPool":
        _, _, rows, columns = image.shape
        options = {"padding": "VALID", "strideH": 1, "strideW": 1, "filterHeight": rows, "filterWidth": columns}
        return net.add(node, "MAX_POOL_2D", (image.tensor,), shape, _LAST, **options, fusedActivationFunction="NONE")
    axes = net.store(np.array([1, 2]), np.int32)
    return net.add(node, "MEAN", (image.tensor, axes), shape, _LAST, keepDims=True)


def _reduce_mean(net: _Lowering, node: Node) -> _Value:
    given = node.attributes.get("axes", net.optional(node, 1))
    value = net.value(node)
    rank = len(value.shape)
    if rank != 4 or given is None or sorted(int(axis) % rank for axis in np.atleast_1d(given)) != [2, 3]:
        raise net.refuse(node, "is over other axes than rows and columns")
    axes = net.store(np.array([1, 2]), np.int32)
    kept = (*value.shape[:2], 1, 1)
    mean = net.add(node, "MEAN", (net.arranged(value, _LAST).tensor, axes), kept, _LAST, keepDims=True)
    return mean if node.attributes.get("keepdims", 1) else replace(mean, shape=kept[:2], flat_from=kept)


def _pair(node: Node, name: str) -> tuple[int, int]:
    first, second = node.attributes.get(name, (1, 1))[:2] if len(node.attributes.get(name, (1, 1))) > 1 else (1, 1)
    return int(first), int(second)


def _padded(
    net: _Lowering,
    node: Node,
    image: _Value,
    reach: Sequence[int],
    strides: Sequence[int],
    *,
    explicit: bool = True,
) -> tuple[_Value, str]:
    """The image, and TFLite's word for its padding; with zeros around it where TFLite has no word and `explicit`."""
    before, after = _pads(node, image, reach, strides)
    if not any((*before, *after)):
        return image, "VALID"
    same = [_same(image.shape[2 + k], reach[k], strides[k]) for k in (0, 1)]
    if [(before[k], after[k]) for k in (0, 1)] == same and not (explicit and node.kind == "AveragePool"):
        return image, "SAME"
    if not explicit:
        raise net.refuse(node, f"pads by {before} before and {after} behind")
    widths = net.store(np.array([(0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)]), np.int32)
    n, c, rows, columns = image.shape
    shape = (n, c, rows + before[0] + after[0], columns + before[1] + after[1])
    return net.add(None, "PAD", (image.tensor, widths), shape, _LAST), "VALID"


def _pads(
    node: Node, image: _Value, reach: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of padding before the image, and behind it."""
    automatic = node.attributes.get("auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        each = [_same(image.shape[2 + k], reach[k], strides[k]) for k in (0, 1)]
        each = [pair[::-1] if automatic == b"SAME_LOWER" else pair for pair in each]
        return (each[0][0], each[1][0]), (each[0][1], each[1][1])
    top, left, bottom, right = map(int, node.attributes.get("pads", (0, 0, 0, 0)))
    return (top, left), (bottom, right)


def _same(length: int, reach: int, stride: int) -> tuple[int, int]:
    """What TFLite's padding SAME adds before and behind."""
    total = max(((length + stride - 1) // stride - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def _pad(net: _Lowering, node: Node) -> _Value:
    value = net.value(node)
    filler = net.optional(node, 2)
    if node.attributes.get("mode", b"constant") != b"constant" or (filler is not None and np.any(filler != 0)):
        raise net.refuse(node, "fills with other than zeros")
    if value.flat_from is not None or len(node.inputs) > 3:
        value = net.in_order(value)
    rank = len(value.shape)
    widths = np.reshape(net.constant(node, 1), (2, rank)).T[list(value.order)]
    name = net.store(widths, np.int32)
    return net.add(node, "PAD", (value.tensor, name), net.network.shapes[node.output], value.order)


# --- Matrices ---------------------------------------------------------------------------------------------------------


def _gemm(net: _Lowering, node: Node) -> _Value:
    weights = net.constant(node, 1)  # (in, out)
    bias = net.optional(node, 2)
    if len(node.inputs) > 2 and node.inputs[2] and bias is None:
        raise net.refuse(node, "adds something that is computed")
    if node.attributes.get("transA", 0) or weights.ndim != 2:
        raise net.refuse(node, "transposes what is computed, or multiplies more than matrices")
    weights = weights.T if node.attributes.get("transB", 0) else weights
    weights = weights * np.float32(node.attributes.get("alpha", 1.0))
    offsets = np.zeros(weights.shape[1]) if bias is None else bias * np.float32(node.attributes.get("beta", 1.0))
    value = net.value(node)
    if len(value.shape) != 2:
        raise net.refuse(node, f"multiplies {len(value.shape)} axes")
    if value.flat_from is not None:
        places = np.arange(weights.shape[0]).reshape(value.flat_from[1:])
        weights = weights[places.transpose([axis - 1 for axis in value.order[1:]]).ravel()]
        lying = tuple(value.flat_from[axis] for axis in value.order)
        value = net.reshaped(_Value(value.tensor, lying, tuple(range(len(lying)))), value.shape)
    inputs = (value.tensor, net.store(weights.T), net.store(np.broadcast_to(np.ravel(offsets), weights.shape[1])))
    shape = net.network.shapes[node.output]
    return net.add(node, "FULLY_CONNECTED", inputs, shape, (0, 1), fusedActivationFunction="NONE")


def _reshape(net: _Lowering, node: Node) -> _Value:
    """Flatten, Reshape, Squeeze, Unsqueeze: rows of a matrix are left lying as the image that they were."""
    value, shape = net.value(node), net.network.shapes[node.output]
    if shape == value.shape:
        return value
    if shape[0] != value.shape[0]:
        raise net.refuse(node, f"makes {shape} of {value.shape} for one stamp, mixing stamps")
    if value.flat_from is not None:
        value = net.in_order(value)
    if len(shape) == 2:
        return replace(value, shape=shape, flat_from=value.shape)
    return net.reshaped(net.in_order(value), shape)


def _transpose(net: _Lowering, node: Node) -> _Value:
    value = net.value(node)
    if value.flat_from is not None:
        value = net.in_order(value)
    axes = [int(axis) for axis in node.attributes.get("perm", range(len(value.shape))[::-1])]
    if axes[0] != 0:
        raise net.refuse(node, "moves the axis of the stamps")
    order = tuple(axes.index(axis) for axis in value.order)  # the tensor stays where it is
    return _Value(value.tensor, tuple(value.shape[axis] for axis in axes), order)


def _concat(net: _Lowering, node: Node) -> _Value:
    given = [net.value(node, k) for k in range(len(node.inputs))]
    rank = len(given[0].shape)
    order = given[0].order if rank == 4 and given[0].flat_from is None else tuple(range(rank))
    given = [net.arranged(value, order) for value in given]
    axis = order.index(int(node.attributes["axis"]) % rank)
    names = tuple(value.tensor for value in given)
    shape = net.network.shapes[node.output]
    return net.add(node, "CONCATENATION", names, shape, order, axis=axis, fusedActivationFunction="NONE")


# --- Number by number -------------------------------------------------------------------------------------------------


def _same_value(net: _Lowering, node: Node) -> _Value:
    return net.value(node)


def _unary(kind: str, **settings: Any) -> Callable[[_Lowering, Node], _Value]:
    def rule(net: _Lowering, node: Node) -> _Value:
        return _mapped(net, node, kind, **settings)

    return rule


def _mapped(net: _Lowering, node: Node, kind: str, **options: Any) -> _Value:
    """An operator on each number, wherever it lies."""
    value = net.value(node)
    base = value.flat_from or value.shape
    out = net.add(node, kind, (value.tensor,), base, value.order, **options)
    return replace(out, shape=value.shape, flat_from=value.flat_from)


def _leaky(net: _Lowering, node: Node) -> _Value:
    return _mapped(net, node, "LEAKY_RELU", alpha=float(node.attributes.get("alpha", 0.01)))


def _activation(net: _Lowering, node: Node, name: str) -> _Value:
    """ReLU and its like: part of the operator before, where that can be."""
    value = net.value(node)
    last = net.operators[-1] if net.operators else None
    alone = net.uses[node.inputs[0]] == 1 and net.made_for.get(value.tensor) == node.inputs[0]
    if alone and last is not None and last.output == value.tensor and last.kind in _FUSING:
        fused = {**last.options, "fusedActivationFunction": name}
        if last.options["fusedActivationFunction"] == "NONE":
            net.operators[-1] = replace(last, options=fused)
            return value
    return _mapped(net, node, name)


def _relu(net: _Lowering, node: Node) -> _Value:
    return _activation(net, node, "RELU")


def _clip(net: _Lowering, node: Node) -> _Value:
    low = node.attributes.get("min", net.optional(node, 1))
    high = node.attributes.get("max", net.optional(node, 2))
    limits = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
    known = {(0.0, 6.0): "RELU6", (0.0, np.inf): "RELU"}
    if limits[0] == 0.0 and limits[1] > 1e30:
        limits = (0.0, np.inf)
    if limits not in known:
        raise net.refuse(node, f"clips to {limits[0]:g} … {limits[1]:g} (0 … 6 and 0 … inf are known)")
    return _activation(net, node, known[limits])


def _softmax(net: _Lowering, node: Node) -> _Value:
    value = net.value(node)
    rank = len(value.shape)
    if int(node.attributes.get("axis", -1)) % rank != rank - 1:
        raise net.refuse(node, "is over another axis than the last")
    value = net.in_order(value)
    return net.add(node, "SOFTMAX", (value.tensor,), value.shape, value.order, beta=1.0)


def _binary(kind: str) -> Callable[[_Lowering, Node], _Value]:
    def rule(net: _Lowering, node: Node) -> _Value:
        shape = net.network.shapes[node.output]
        computed = [k for k in (0, 1) if node.inputs[k] in net.values]
        first = net.value(node, computed[0])
        if first.flat_from is not None:
            first = net.in_order(first)
        order = first.order if len(first.shape) == len(shape) else tuple(range(len(shape)))
        names = [_operand(net, node, k, order) for k in (0, 1)]
        return net.add(node, kind, names, shape, order, fusedActivationFunction="NONE")

    return rule


def _operand(net: _Lowering, node: Node, k: int, order: tuple[int, ...]) -> str:
    """An input of a sum or product as a tensor with axes in this order."""
    if node.inputs[k] in net.values:
        value = net.values[node.inputs[k]]
        if len(value.shape) != len(order):
            raise net.refuse(node, "combines values of different ranks")
        return net.arranged(value, order).tensor
    constant = net.constant(node, k)
    full = constant.reshape((1,) * (len(order) - constant.ndim) + constant.shape)
    return net.store(full.transpose(order))


def _batch_norm(net: _Lowering, node: Node) -> _Value:
    """Where there is no convolution before it to go into: a product and a sum."""
    scale, offset, mean, variance = (net.constant(node, k) for k in range(1, 5))
    factor = scale / np.sqrt(variance + np.float32(node.attributes.get("epsilon", 1e-5)))
    value = net.value(node)
    if value.flat_from is not None:
        value = net.in_order(value)
    spread = [1] * len(value.shape)
    spread[1] = -1
    given = value.tensor
    for kind, numbers in (("MUL", factor), ("ADD", offset - mean * factor)):
        constant = net.store(numbers.reshape(spread).transpose(value.order))
        out = net.add(node, kind, (given, constant), value.shape, value.order, fusedActivationFunction="NONE")
        given = out.tensor
    return out


#: Operators that may have an activation at their end, on every runtime and in integers.
_FUSING = ("ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")

_Rule = Callable[[_Lowering, Node], _Value]
_RULES: dict[str, _Rule] = {
    "Add": _binary("ADD"),
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Cast": _same_value,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Dropout": _same_value,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Identity": _same_value,
    "LeakyRelu": _leaky,
    "MatMul": _gemm,
    "MaxPool": _pool,
    "Mul": _binary("MUL"),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _unary("LOGISTIC"),
    "Softmax": _softmax,
    "Squeeze": _reshape,
    "Sub": _binary("SUB"),
    "Tanh": _unary("TANH"),
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
#: Operators of ONNX that can be written.
SUPPORTED = tuple(_RULES)
