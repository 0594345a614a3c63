"""Operators of ONNX that look at rows and columns, as TFLite has them: convolutions, pooling, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchproc.io.tflite.lowering import LAST, Lowering, Rule, Value
from batchproc.io.tflite.onnx_graph import Node

__all__ = ["IMAGE_RULES"]


def _conv(net: Lowering, node: Node) -> Value:
    weights, bias = net.constant(node, 1), net.optional(node, 2)
    if weights.ndim != 4:
        raise net.refuse(node, f"is over {weights.ndim - 2} axes, not over rows and columns")
    image = net.arranged(net.value(node), LAST)
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
    return net.add(node, kind, inputs, net.network.shapes[node.output], LAST, **options)


def _pool(net: Lowering, node: Node) -> Value:
    image = net.arranged(net.value(node), LAST)
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
    return net.add(node, kind, (image.tensor,), shape, LAST, **options)


def _global_pool(net: Lowering, node: Node) -> Value:
    image = net.arranged(net.value(node), LAST)
    shape = net.network.shapes[node.output]
    if node.kind == "GlobalMaxPool":
        _, _, rows, columns = image.shape
        options = {"padding": "VALID", "strideH": 1, "strideW": 1, "filterHeight": rows, "filterWidth": columns}
        return net.add(node, "MAX_POOL_2D", (image.tensor,), shape, LAST, **options, fusedActivationFunction="NONE")
    axes = net.store(np.array([1, 2]), np.int32)
    return net.add(node, "MEAN", (image.tensor, axes), shape, LAST, keepDims=True)


def _reduce_mean(net: Lowering, node: Node) -> Value:
    given = node.attributes.get("axes", net.optional(node, 1))
    value = net.value(node)
    rank = len(value.shape)
    if rank != 4 or given is None or sorted(int(axis) % rank for axis in np.atleast_1d(given)) != [2, 3]:
        raise net.refuse(node, "is over other axes than rows and columns")
    axes = net.store(np.array([1, 2]), np.int32)
    kept = (*value.shape[:2], 1, 1)
    mean = net.add(node, "MEAN", (net.arranged(value, LAST).tensor, axes), kept, LAST, keepDims=True)
    return mean if node.attributes.get("keepdims", 1) else replace(mean, shape=kept[:2], flat_from=kept)


def _pair(node: Node, name: str) -> tuple[int, int]:
    first, second = node.attributes.get(name, (1, 1))[:2] if len(node.attributes.get(name, (1, 1))) > 1 else (1, 1)
    return int(first), int(second)


def _padded(
    net: Lowering,
    node: Node,
    image: Value,
    reach: Sequence[int],
    strides: Sequence[int],
    *,
    explicit: bool = True,
) -> tuple[Value, str]:
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
    return net.add(None, "PAD", (image.tensor, widths), shape, LAST), "VALID"


def _pads(
    node: Node, image: Value, reach: Sequence[int], strides: Sequence[int]
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


def _pad(net: Lowering, node: Node) -> Value:
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


IMAGE_RULES: dict[str, Rule] = {
    "AveragePool": _pool,
    "Conv": _conv,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "MaxPool": _pool,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
}
