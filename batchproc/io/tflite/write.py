"""The TFLite file of a graph: https://github.com/google-ai-edge/LiteRT/blob/main/tflite/schema/schema.fbs."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchproc.errors import ModelError
from batchproc.io.tflite.graph import Graph, Operator, Tensor

__all__ = ["EXTRA", "to_bytes"]

EXTRA = "pip install 'batchproc[quantise]'"
#: Operator → the table of its options, and the oldest version of it that takes float32, and int8.
# fmt: off
_OPERATORS: dict[str, tuple[str, int, int]] = {
    "ADD": ("AddOptions", 1, 2),
    "AVERAGE_POOL_2D": ("Pool2DOptions", 1, 2),
    "CONCATENATION": ("ConcatenationOptions", 1, 2),
    "CONV_2D": ("Conv2DOptions", 1, 3),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", 1, 3),
    "FULLY_CONNECTED": ("FullyConnectedOptions", 1, 4),
    "LEAKY_RELU": ("LeakyReluOptions", 1, 2),
    "LOGISTIC": ("", 1, 2),
    "MAX_POOL_2D": ("Pool2DOptions", 1, 2),
    "MEAN": ("ReducerOptions", 1, 2),
    "MUL": ("MulOptions", 1, 2),
    "PAD": ("PadOptions", 1, 2),
    "RELU": ("", 1, 2),
    "RELU6": ("", 1, 2),
    "RESHAPE": ("ReshapeOptions", 1, 1),
    "SOFTMAX": ("SoftmaxOptions", 1, 2),
    "SUB": ("SubOptions", 1, 2),
    "TANH": ("", 1, 2),
    "TRANSPOSE": ("TransposeOptions", 1, 2),
}
# fmt: on
_ENUMERATIONS = {"padding": "Padding", "fusedActivationFunction": "ActivationFunctionType"}
_TYPES = {np.float32: "FLOAT32", np.int8: "INT8", np.int32: "INT32"}


def to_bytes(graph: Graph, batch: int | None = None) -> bytes:
    """A graph as a TFLite file.

    Parameters
    ----------
    graph : Graph
    batch : int, optional
        Stamps that it takes at a time; None: any number.

    Raises
    ------
    ModelError
        ai-edge-litert is not installed: its tables of the format are used.
    """
    try:
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise ModelError(f"to write a TFLite file, install what that needs: {EXTRA} ({error})") from None
    model = _model(schema, graph, batch)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _model(schema: Any, graph: Graph, batch: int | None) -> Any:
    model = schema.ModelT()
    model.version, model.description = 3, b"batchproc"
    model.buffers = [schema.BufferT()]  # the first one is empty, for tensors that are computed
    whole = graph.tensors[graph.inputs[0]].dtype is np.int8
    kinds = sorted({operator.kind for operator in graph.operators})
    model.operatorCodes = [_code(schema, kind, whole) for kind in kinds]
    numbers = {name: k for k, name in enumerate(graph.tensors)}
    part = schema.SubGraphT()
    part.name = b"main"
    part.tensors = [_tensor(schema, tensor, batch, model.buffers) for tensor in graph.tensors.values()]
    part.operators = [_operator(schema, operator, kinds, numbers) for operator in graph.operators]
    part.inputs, part.outputs = [numbers[name] for name in graph.inputs], [numbers[graph.output]]
    model.subgraphs = [part]
    return model


def _code(schema: Any, kind: str, whole: bool) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = _OPERATORS[kind][2 if whole else 1]
    return code


def _tensor(schema: Any, tensor: Tensor, batch: int | None, buffers: list[Any]) -> Any:
    out = schema.TensorT()
    out.name, out.type = tensor.name.encode(), getattr(schema.TensorType, _TYPES[tensor.dtype])
    if tensor.data is None:
        out.shape, out.buffer = [batch or 1, *tensor.shape], 0
        if batch is None:
            out.shapeSignature = [-1, *tensor.shape]
    else:
        out.shape, out.buffer = list(tensor.shape), len(buffers)
        buffers.append(schema.BufferT())
        little = np.dtype(tensor.dtype).newbyteorder("<")
        buffers[-1].data = np.frombuffer(np.ascontiguousarray(tensor.data, little).tobytes(), np.uint8)
    if tensor.steps is not None:
        out.quantization = schema.QuantizationParametersT()
        out.quantization.scale = np.atleast_1d(tensor.steps.scale).astype(np.float32)
        out.quantization.zeroPoint = np.full(np.size(tensor.steps.scale), tensor.steps.zero_point, np.int64)
        out.quantization.quantizedDimension = tensor.steps.axis
    return out


def _operator(schema: Any, operator: Operator, kinds: list[str], numbers: dict[str, int]) -> Any:
    out = schema.OperatorT()
    out.opcodeIndex = kinds.index(operator.kind)
    out.inputs, out.outputs = [numbers[name] for name in operator.inputs], [numbers[operator.output]]
    table = _OPERATORS[operator.kind][0]
    if table:
        out.builtinOptionsType = getattr(schema.BuiltinOptions, table)
        out.builtinOptions = getattr(schema, f"{table}T")()
        for name, value in operator.options.items():
            known = getattr(schema, _ENUMERATIONS[name]) if name in _ENUMERATIONS else None
            setattr(out.builtinOptions, name, getattr(known, value) if known else value)
    return out
