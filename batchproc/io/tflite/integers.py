"""A graph in 8-bit integers throughout, by the rules of TFLite's kernels.

Activations are int8 with a scale and a zero point of their tensor, from the smallest and largest number that it took
on; weights are int8 with a scale for each output channel, biases int32 in steps of input times weight. Some operators
have rules of their own for what comes out of them: https://ai.google.dev/edge/litert/conversion/tensorflow/quantization
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.tflite.graph import Graph, Operator, Steps, Tensor
from batchproc.learning.integers import activation_steps, quantise, weight_scales

__all__ = ["in_integers"]

#: Weighted sums → the axis of their weights that counts output channels.
_WEIGHTED = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
#: What comes out is in the same steps as what goes in.
_SAME_STEPS = frozenset({"AVERAGE_POOL_2D", "CONCATENATION", "MAX_POOL_2D", "PAD", "RESHAPE", "TRANSPOSE"})
#: What comes out is in these steps, whatever the network.
_FIXED = {"LOGISTIC": (1 / 256, -128), "SOFTMAX": (1 / 256, -128), "TANH": (1 / 128, 0)}

Ranges = Mapping[str, tuple[float, float]]


def in_integers(graph: Graph, ranges: Ranges, *, dense_per_channel: bool = True) -> Graph:
    """The same network in integers.

    Parameters
    ----------
    graph : Graph
        In float.
    ranges : mapping of str to (low, high)
        Of everything that is given or computed: `batchproc.io.tflite.ranges.observed_ranges`.
    dense_per_channel : bool
        A scale for each output of dense layers too; some runtimes know one for all of them alone.

    Raises
    ------
    ModelError
        Something that would have to be in two kinds of steps at a time.
    """
    steps = _activation_steps(graph, ranges)
    tensors = {name: replace(graph.tensors[name], dtype=np.int8, steps=steps[name]) for name in graph.activations}
    for operator in graph.operators:
        if operator.kind in _WEIGHTED:
            tensors |= _weights(graph, operator, steps, per_channel=_per_channel(operator, dense_per_channel))
        else:
            tensors |= _constants(graph, operator)
    ordered = {name: tensors[name] for name in graph.tensors if name in tensors}
    return replace(graph, tensors=ordered)


def _per_channel(operator: Operator, dense: bool) -> bool:
    return dense or operator.kind != "FULLY_CONNECTED"


def _activation_steps(graph: Graph, ranges: Ranges) -> dict[str, Steps]:
    steps: dict[str, Steps] = {}
    for group in _in_common(graph):
        fixed = {_FIXED[o.kind] for o in graph.operators if o.output in group and o.kind in _FIXED}
        low, high = min(ranges[name][0] for name in group), max(ranges[name][1] for name in group)
        scale, zero_point = fixed.pop() if fixed else activation_steps(low, high)
        least, most = scale * (-128 - zero_point), scale * (128 - zero_point)
        if fixed or low < least - scale or high > most + scale:
            raise ModelError(
                f"{', '.join(sorted(group))}: probabilities and other numbers ({low:g} to {high:g}) are joined, which "
                f"integers cannot hold in the same steps. Stay with float or ONNX"
            )
        steps |= dict.fromkeys(group, Steps(np.array([scale], np.float32), zero_point))
    return steps


def _in_common(graph: Graph) -> Iterable[frozenset[str]]:
    """Activations by the steps that they share."""
    groups = {name: {name} for name in graph.activations}
    for operator in graph.operators:
        if operator.kind in _SAME_STEPS:
            joined = set().union(*(groups[name] for name in (*_computed(graph, operator), operator.output)))
            groups |= dict.fromkeys(joined, joined)
    return dict.fromkeys(frozenset(group) for group in groups.values())


def _computed(graph: Graph, operator: Operator) -> list[str]:
    return [name for name in operator.inputs if not graph.is_constant(name)]


def _weights(graph: Graph, operator: Operator, steps: Mapping[str, Steps], *, per_channel: bool) -> dict[str, Tensor]:
    given, weights, bias = (graph.tensors[name] for name in operator.inputs)
    axis = _WEIGHTED[operator.kind]
    scale_in = float(steps[given.name].scale[0])
    scales = weight_scales(_data(weights), _data(bias), scale_in, axis if per_channel else None)
    spread = [1] * len(weights.shape)
    spread[axis] = -1
    whole = np.rint(_data(weights) / scales.reshape(spread)).clip(-127, 127)
    offsets = np.rint(_data(bias).astype(np.float64) / (np.float64(scale_in) * scales))
    return {
        weights.name: replace(weights, data=whole, dtype=np.int8, steps=Steps(scales, 0, axis)),
        bias.name: replace(bias, data=offsets, dtype=np.int32, steps=Steps((scale_in * scales).astype(np.float32))),
    }


def _constants(graph: Graph, operator: Operator) -> dict[str, Tensor]:
    """Numbers that are added or multiplied in int8; axes and shapes as they are."""
    found = {}
    for tensor in (graph.tensors[name] for name in operator.inputs if graph.is_constant(name)):
        if tensor.dtype is np.float32:
            data = _data(tensor)
            scale, zero_point = activation_steps(float(data.min()), float(data.max()))
            whole = quantise(data, scale, zero_point)
            tensor = replace(tensor, data=whole, dtype=np.int8, steps=Steps(np.array([scale], np.float32), zero_point))
        found[tensor.name] = tensor
    return found


def _data(tensor: Tensor) -> NDArray[Any]:
    if tensor.data is None:
        raise ModelError(f"{tensor.name}: weights that are computed cannot be put into integers")
    return tensor.data
