"""Operators of ONNX that take numbers one by one, or all of a stamp's at once, as TFLite has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from batchproc.io.tflite.lowering import Lowering, Rule, Value
from batchproc.io.tflite.onnx_graph import Node

__all__ = ["NUMBER_RULES"]

#: Operators that may have an activation at their end, on every runtime and in integers.
_FUSING = ("ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


# --- Matrices ---------------------------------------------------------------------------------------------------------


def _gemm(net: Lowering, node: Node) -> Value:
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
        value = net.reshaped(Value(value.tensor, lying, tuple(range(len(lying)))), value.shape)
    inputs = (value.tensor, net.store(weights.T), net.store(np.broadcast_to(np.ravel(offsets), weights.shape[1])))
    shape = net.network.shapes[node.output]
    return net.add(node, "FULLY_CONNECTED", inputs, shape, (0, 1), fusedActivationFunction="NONE")


def _reshape(net: Lowering, node: Node) -> Value:
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


def _transpose(net: Lowering, node: Node) -> Value:
    value = net.value(node)
    if value.flat_from is not None:
        value = net.in_order(value)
    axes = [int(axis) for axis in node.attributes.get("perm", range(len(value.shape))[::-1])]
    if axes[0] != 0:
        raise net.refuse(node, "moves the axis of the stamps")
    order = tuple(axes.index(axis) for axis in value.order)  # the tensor stays where it is
    return Value(value.tensor, tuple(value.shape[axis] for axis in axes), order)


def _concat(net: Lowering, node: Node) -> Value:
    given = [net.value(node, k) for k in range(len(node.inputs))]
    rank = len(given[0].shape)
    order = given[0].order if rank == 4 and given[0].flat_from is None else tuple(range(rank))
    given = [net.arranged(value, order) for value in given]
    axis = order.index(int(node.attributes["axis"]) % rank)
    names = tuple(value.tensor for value in given)
    shape = net.network.shapes[node.output]
    return net.add(node, "CONCATENATION", names, shape, order, axis=axis, fusedActivationFunction="NONE")


# --- Number by number -------------------------------------------------------------------------------------------------


def _same_value(net: Lowering, node: Node) -> Value:
    return net.value(node)


def _unary(kind: str, **settings: Any) -> Rule:
    def rule(net: Lowering, node: Node) -> Value:
        return _mapped(net, node, kind, **settings)

    return rule


def _mapped(net: Lowering, node: Node, kind: str, **options: Any) -> Value:
    """An operator on each number, wherever it lies."""
    value = net.value(node)
    base = value.flat_from or value.shape
    out = net.add(node, kind, (value.tensor,), base, value.order, **options)
    return replace(out, shape=value.shape, flat_from=value.flat_from)


def _leaky(net: Lowering, node: Node) -> Value:
    return _mapped(net, node, "LEAKY_RELU", alpha=float(node.attributes.get("alpha", 0.01)))


def _activation(net: Lowering, node: Node, name: str) -> Value:
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


def _relu(net: Lowering, node: Node) -> Value:
    return _activation(net, node, "RELU")


def _clip(net: Lowering, node: Node) -> Value:
    low = node.attributes.get("min", net.optional(node, 1))
    high = node.attributes.get("max", net.optional(node, 2))
    limits = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
    known = {(0.0, 6.0): "RELU6", (0.0, np.inf): "RELU"}
    if limits[0] == 0.0 and limits[1] > 1e30:
        limits = (0.0, np.inf)
    if limits not in known:
        raise net.refuse(node, f"clips to {limits[0]:g} … {limits[1]:g} (0 … 6 and 0 … inf are known)")
    return _activation(net, node, known[limits])


def _softmax(net: Lowering, node: Node) -> Value:
    value = net.value(node)
    rank = len(value.shape)
    if int(node.attributes.get("axis", -1)) % rank != rank - 1:
        raise net.refuse(node, "is over another axis than the last")
    value = net.in_order(value)
    return net.add(node, "SOFTMAX", (value.tensor,), value.shape, value.order, beta=1.0)


def _binary(kind: str) -> Rule:
    def rule(net: Lowering, node: Node) -> Value:
        shape = net.network.shapes[node.output]
        computed = [k for k in (0, 1) if node.inputs[k] in net.values]
        first = net.value(node, computed[0])
        if first.flat_from is not None:
            first = net.in_order(first)
        order = first.order if len(first.shape) == len(shape) else tuple(range(len(shape)))
        names = [_operand(net, node, k, order) for k in (0, 1)]
        return net.add(node, kind, names, shape, order, fusedActivationFunction="NONE")

    return rule


def _operand(net: Lowering, node: Node, k: int, order: tuple[int, ...]) -> str:
    """An input of a sum or product as a tensor with axes in this order."""
    if node.inputs[k] in net.values:
        value = net.values[node.inputs[k]]
        if len(value.shape) != len(order):
            raise net.refuse(node, "combines values of different ranks")
        return net.arranged(value, order).tensor
    constant = net.constant(node, k)
    full = constant.reshape((1,) * (len(order) - constant.ndim) + constant.shape)
    return net.store(full.transpose(order))


def _batch_norm(net: Lowering, node: Node) -> Value:
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


NUMBER_RULES: dict[str, Rule] = {
    "Add": _binary("ADD"),
    "BatchNormalization": _batch_norm,
    "Cast": _same_value,
    "Clip": _clip,
    "Concat": _concat,
    "Dropout": _same_value,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "Identity": _same_value,
    "LeakyRelu": _leaky,
    "MatMul": _gemm,
    "Mul": _binary("MUL"),
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
