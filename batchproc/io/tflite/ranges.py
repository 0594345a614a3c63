"""What every tensor of a network takes on for real stamps: its least and its largest number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.tflite.graph import Graph
from batchproc.io.tflite.write import EXTRA, to_bytes

__all__ = ["observed_ranges"]


def observed_ranges(
    graph: Graph, tensors: Sequence[NDArray[np.float32]], *, batch: int = 64
) -> Mapping[str, tuple[float, float]]:
    """True minima and maxima: no outlier is clipped, nothing is averaged over batches.

    Parameters
    ----------
    graph : Graph
        In float.
    tensors : sequence of ndarray (n, …) float32
        Prepared stamps, and features where it takes any, in the order of its inputs.
    batch : int
        Stamps at a time.

    Returns
    -------
    mapping of str to (low, high)
        For everything that is given or computed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise ModelError(f"to run a TFLite file, install what that needs: {EXTRA} ({error})") from None
    interpreter = Interpreter(
        model_content=to_bytes(graph),
        experimental_preserve_all_tensors=True,  # else they share memory, and hold what came last
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    numbers = {name: k for k, name in enumerate(graph.tensors)}
    low = dict.fromkeys(graph.activations, np.inf)
    high = dict.fromkeys(graph.activations, -np.inf)
    for start in range(0, len(tensors[0]), batch):
        given = [np.ascontiguousarray(tensor[start : start + batch]) for tensor in tensors]
        for name, tensor in zip(graph.inputs, given, strict=True):
            interpreter.resize_tensor_input(numbers[name], tensor.shape)
        interpreter.allocate_tensors()
        for name, tensor in zip(graph.inputs, given, strict=True):
            interpreter.set_tensor(numbers[name], tensor)
        interpreter.invoke()
        for name in graph.activations:
            found = interpreter.get_tensor(numbers[name])
            low[name], high[name] = min(low[name], float(found.min())), max(high[name], float(found.max()))
    return {name: (low[name], high[name]) for name in low}
