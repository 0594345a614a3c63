"""An ONNX file as plain nodes and constants, with everything done away with that only matters in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.tflite.write import EXTRA

__all__ = ["Network", "Node", "read_network"]


@dataclass(frozen=True)
class Node:
    """An operator of ONNX."""

    kind: str
    """``Conv``; with the domain where it is none of ONNX's own."""
    inputs: tuple[str, ...]
    """Empty names for those left out."""
    output: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """A network for one stamp: what leads to its first output."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]
    shapes: Mapping[str, tuple[int, ...]]
    """Of everything that is computed; the first axis counts stamps."""
    inputs: tuple[str, ...]
    output: str


def read_network(path: str | Path) -> Network:
    """Read an ONNX file whose inputs all have an axis of stamps in front.

    ONNX Runtime's own rewriting comes first: constants are computed, batch normalisation goes into the convolution
    before it, and what does nothing is dropped.

    Raises
    ------
    ModelError
        ``onnx`` is not installed, or the file cannot be read or has shapes that depend on more than the batch.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModelError(f"to read the network of an ONNX file, install what that needs: {EXTRA} ({error})") from None
    try:
        model = onnx.load(path)
        constants = {tensor.name for tensor in model.graph.initializer}
        for given in model.graph.input:
            if given.name not in constants:
                given.type.tensor_type.shape.dim[0].dim_value = 1
        for answer in (*model.graph.output, *model.graph.value_info):
            answer.type.tensor_type.ClearField("shape")  # they may tell of another batch
        model = onnx.shape_inference.infer_shapes(_simplified(onnx, model), data_prop=True)
    except Exception as error:  # protobuf's, onnx's and ONNX Runtime's exceptions share no base class
        raise ModelError(f"{path}: its network cannot be read for one stamp: {error}") from error
    return _network(onnx, path, model.graph)


def _simplified(onnx: Any, model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "simplified.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _network(onnx: Any, path: str | Path, graph: Any) -> Network:
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = onnx.numpy_helper.to_array(attributes["value"])
            continue
        kind = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        nodes.append(Node(kind, tuple(node.input), node.output[0], attributes))
    output = graph.output[0].name
    nodes = _needed(nodes, output)
    inputs = tuple(given.name for given in graph.input if given.name not in constants)
    shapes = {info.name: _shape(info) for info in (*graph.input, *graph.value_info, *graph.output)}
    unknown = [node.kind for node in nodes if shapes.get(node.output) is None]
    if unknown:
        raise ModelError(f"{path}: the shape of what {unknown[0]} gives depends on more than the number of stamps")
    return Network(tuple(nodes), constants, {k: v for k, v in shapes.items() if v is not None}, inputs, output)


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """Those that an output depends on."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _shape(info: Any) -> tuple[int, ...] | None:
    axes: Iterable[Any] = info.type.tensor_type.shape.dim
    if not info.type.tensor_type.HasField("shape") or not all(axis.HasField("dim_value") for axis in axes):
        return None
    return tuple(int(axis.dim_value) for axis in axes)
