"""An ONNX file of the layers of a Keras network; by the package ``onnx`` alone (extra ``import``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.keras import EXTRA, Layer

__all__ = ["to_onnx"]

OPSET, IR_VERSION = 17, 8  # what every ONNX Runtime that batchproc takes can read
_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid"}


def to_onnx(layers: Sequence[Layer], input_shape: tuple[int, int, int]) -> bytes:
    """The same network as an ONNX file.

    Parameters
    ----------
    layers : sequence of Layer
        ``Conv2D`` and ``MaxPooling2D`` (both without padding), ``Flatten`` and ``Dense``, with ReLU, sigmoid or no
        activation.
    input_shape : (rows, columns, channels)

    Returns
    -------
    bytes
        Input ``stamps`` (n, rows, columns, channels) float32, output ``score`` (n, units of the last layer) float32.

    Raises
    ------
    ModelError
        ``onnx`` is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModelError(f"to write an ONNX file, install what that needs: {EXTRA} ({error})") from None
    graph = _Graph(onnx.helper, onnx.numpy_helper)
    graph.then("Transpose", perm=[0, 3, 1, 2])  # ONNX convolves with the channels in front
    for layer in layers:
        _append(graph, layer)
    graph.nodes[-1].output[0] = "score"
    number = onnx.TensorProto.FLOAT
    given = onnx.helper.make_tensor_value_info("stamps", number, ["n", *input_shape])
    answer = onnx.helper.make_tensor_value_info("score", number, ["n", len(layers[-1].weights[-1])])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "network", [given], [answer], graph.constants),
        producer_name="batchproc",
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


class _Graph:
    """A chain of nodes, each of which takes what the last one gave."""

    def __init__(self, helper: Any, numpy_helper: Any) -> None:
        self._helper, self._numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def then(self, operation: str, *arrays: NDArray[np.float32], **attributes: Any) -> None:
        """Append a node with its constants."""
        names = []
        for array in arrays:
            names.append(f"constant{len(self.constants)}")
            self.constants.append(self._numpy_helper.from_array(np.ascontiguousarray(array, np.float32), names[-1]))
        before = self.nodes[-1].output[0] if self.nodes else "stamps"
        after = f"{operation.lower()}{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(operation, [before, *names], [after], after, **attributes))


def _append(graph: _Graph, layer: Layer) -> None:
    settings = layer.settings
    if layer.kind == "Conv2D":
        kernel, bias = layer.weights
        graph.then("Conv", kernel.transpose(3, 2, 0, 1), bias, strides=settings["strides"])
    elif layer.kind == "MaxPooling2D":
        graph.then("MaxPool", kernel_shape=settings["pool_size"], strides=settings["strides"])
    elif layer.kind == "Flatten":
        graph.then("Transpose", perm=[0, 2, 3, 1])  # Keras counts channels fastest
        graph.then("Flatten")
    elif layer.kind == "Dense":
        graph.then("Gemm", *layer.weights)
    if settings.get("activation") in _ACTIVATIONS:
        graph.then(_ACTIVATIONS[settings["activation"]])
