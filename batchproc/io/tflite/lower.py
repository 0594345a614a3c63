"""The network of an ONNX file in TFLite's operators, in float: the same scores, channels last."""

from __future__ import annotations

from pathlib import Path

from batchproc.errors import ModelError
from batchproc.io.tflite.graph import Graph
from batchproc.io.tflite.image_rules import IMAGE_RULES
from batchproc.io.tflite.lowering import Lowering
from batchproc.io.tflite.number_rules import NUMBER_RULES
from batchproc.io.tflite.onnx_graph import read_network

__all__ = ["lower"]


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
    return Lowering(str(path), network, layout).graph(IMAGE_RULES | NUMBER_RULES)
