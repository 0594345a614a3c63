"""Remakes the small TFLite files here, and their twin in ONNX: ``python tests/io/golden/make_tflite.py``.

Needs ``ai-edge-litert`` (for its tables of the format) and ``onnx``; no TensorFlow. Those called small hold one network
with the same weights: a convolution of 3 × 3 with ReLU, a dense layer, a sigmoid; stamps of 5 × 5 pixels with three
channels.
"""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as tfl
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
SIZE, FILTERS = 5, 4
OP = tfl.BuiltinOperator
TYPES = {
    "f4": tfl.TensorType.FLOAT32,
    "i1": tfl.TensorType.INT8,
    "u1": tfl.TensorType.UINT8,
    "i4": tfl.TensorType.INT32,
}


def weights():
    """Kernel (out, y, x, in), its bias, the dense layer (1, y · x · filter) and its bias."""
    rng = np.random.default_rng(5)
    kernel, dense = rng.normal(0, 0.3, (FILTERS, 3, 3, 3)), rng.normal(0, 0.3, (1, 9 * FILTERS))
    return kernel, rng.normal(0, 0.1, FILTERS), dense, np.array([0.2])


class File:
    """A TFLite file under construction."""

    def __init__(self):
        self.tensors, self.operators, self.codes = [], [], []
        self.buffers = [tfl.BufferT()]

    def tensor(self, name, shape, kind, *, data=None, scale=None, zero=0, axis=0, any_batch=False):
        """Add a tensor and return its number; `scale` and `zero` as numbers, or one scale a channel."""
        tensor = tfl.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), TYPES[kind], 0
        if any_batch:
            tensor.shapeSignature = [-1, *shape[1:]]
        if scale is not None:
            tensor.quantization = tfl.QuantizationParametersT()
            tensor.quantization.scale = [float(s) for s in np.atleast_1d(scale)]
            tensor.quantization.zeroPoint = [int(zero)] * np.size(scale)
            tensor.quantization.quantizedDimension = axis
        if data is not None:
            buffer = tfl.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data, f"<{kind}").tobytes(), np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, code, inputs, outputs, options=None, kind=0, custom=None):
        """Add an operator."""
        entry = tfl.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1 if custom else 3
        entry.customCode = custom
        self.codes.append(entry)
        operator = tfl.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.codes) - 1, inputs, outputs
        operator.builtinOptions, operator.builtinOptionsType = options, kind
        self.operators.append(operator)

    def save(self, name, inputs, outputs):
        """Write the file."""
        graph = tfl.SubGraphT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, inputs, outputs
        model = tfl.ModelT()
        model.version, model.description = 3, "batchproc test"
        model.operatorCodes, model.subgraphs, model.buffers = self.codes, [graph], self.buffers
        builder = flatbuffers.Builder(4096)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        (HERE / f"{name}.tflite").write_bytes(bytes(builder.Output()))


def network(name, batch, *, any_batch=False, whole=False, unsigned=False, last=OP.LOGISTIC):
    """The network in float, or `whole`: in int8 from end to end, or with `unsigned` ends."""
    file, (kernel, bias, dense, offset) = File(), weights()
    kind = "i1" if whole else "f4"
    s_in, s_mid, s_logit = 8 / 255, 6 / 255, 12 / 255
    k_scale, d_scale = np.abs(kernel).max(axis=(1, 2, 3)) / 127, np.abs(dense).max() / 127

    def activation(label, shape, scale, zero):
        quantised = {"scale": scale, "zero": zero} if whole else {}
        return file.tensor(label, (batch, *shape), kind, any_batch=any_batch, **quantised)

    def constant(label, values, scale, per_channel):
        if not whole:
            return file.tensor(label, values.shape, "f4", data=values)
        steps = scale.reshape(-1, *[1] * (values.ndim - 1)) if per_channel else scale
        return file.tensor(label, values.shape, "i1", data=np.rint(values / steps), scale=scale)

    def biases(label, values, scale):
        if not whole:
            return file.tensor(label, values.shape, "f4", data=values)
        return file.tensor(label, values.shape, "i4", data=np.rint(values / scale), scale=scale)

    stamps = activation("stamps", (SIZE, SIZE, 3), s_in, 0)
    k, b = constant("kernel", kernel, k_scale, True), biases("bias", bias, k_scale * s_in)
    features = activation("features", (3, 3, FILTERS), s_mid, -128)
    d, o = constant("dense", dense, d_scale, False), biases("offset", offset, d_scale * s_mid)
    logit, score = activation("logit", (1,), s_logit, 0), activation("score", (1,), 1 / 256, -128)

    convolution = tfl.Conv2DOptionsT()
    convolution.padding, convolution.strideW, convolution.strideH = tfl.Padding.VALID, 1, 1
    convolution.fusedActivationFunction = tfl.ActivationFunctionType.RELU
    file.operator(OP.CONV_2D, [stamps, k, b], [features], convolution, tfl.BuiltinOptions.Conv2DOptions)
    connected = tfl.FullyConnectedOptionsT()
    file.operator(OP.FULLY_CONNECTED, [features, d, o], [logit], connected, tfl.BuiltinOptions.FullyConnectedOptions)
    file.operator(last, [logit], [score])
    if not unsigned:
        file.save(name, [stamps], [score])
        return
    outer_stamps = file.tensor("outer_stamps", (batch, SIZE, SIZE, 3), "u1", scale=s_in, zero=128)
    outer_score = file.tensor("outer_score", (batch, 1), "u1", scale=1 / 256)
    file.operator(OP.QUANTIZE, [outer_stamps], [stamps])
    file.operators.insert(0, file.operators.pop())
    file.operator(OP.QUANTIZE, [score], [outer_score])
    file.save(name, [outer_stamps], [outer_score])


def classes():
    """What classes.onnx is: softmax of (central pixel, two features); the features come first, as converters do it."""
    file, centre = File(), np.eye(75)[12 * 3 + 2][None]
    features = file.tensor("features", (1, 2), "f4", any_batch=True)
    stamps = file.tensor("stamps", (1, SIZE, SIZE, 3), "f4", any_batch=True)
    weight = file.tensor("w", centre.shape, "f4", data=centre)
    pixel, everything, score = (
        file.tensor(name, (1, n), "f4", any_batch=True) for name, n in (("z", 1), ("all", 3), ("score", 3))
    )
    connected, joined, soft = tfl.FullyConnectedOptionsT(), tfl.ConcatenationOptionsT(), tfl.SoftmaxOptionsT()
    joined.axis, soft.beta = 1, 1.0
    kinds = tfl.BuiltinOptions
    file.operator(OP.FULLY_CONNECTED, [stamps, weight, -1], [pixel], connected, kinds.FullyConnectedOptions)
    file.operator(OP.CONCATENATION, [pixel, features], [everything], joined, kinds.ConcatenationOptions)
    file.operator(OP.SOFTMAX, [everything], [score], soft, kinds.SoftmaxOptions)
    file.save("classes", [features, stamps], [score])


def compiled():
    """What edgetpu_compiler leaves of such a network: one operator of its own. It cannot be run here."""
    file = File()
    stamps = file.tensor("stamps", (1, SIZE, SIZE, 3), "i1", scale=8 / 255)
    score = file.tensor("score", (1, 1), "i1", scale=1 / 256, zero=-128)
    file.operator(OP.CUSTOM, [stamps], [score], custom="edgetpu-custom-op")
    file.save("edgetpu", [stamps], [score])


def twin():
    """The network in ONNX, channels first."""
    kernel, bias, dense, offset = weights()
    # TFLite flattens (y, x, filter), ONNX (filter, y, x).
    columns = dense.reshape(3, 3, FILTERS).transpose(2, 0, 1).reshape(-1, 1)
    constants = {"kernel": kernel.transpose(0, 3, 1, 2), "bias": bias, "dense": columns, "offset": offset}
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Conv", ["stamps", "kernel", "bias"], ["features"]),
            node("Relu", ["features"], ["positive"]),
            node("Flatten", ["positive"], ["flat"]),
            node("Gemm", ["flat", "dense", "offset"], ["logit"]),
            node("Sigmoid", ["logit"], ["score"]),
        ],
        "small",
        [helper.make_tensor_value_info("stamps", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(value.astype(np.float32), key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, HERE / "small.onnx")


if __name__ == "__main__":
    twin()
    network("small", 4)
    network("small_any", 1, any_batch=True)
    network("small_int8", 1, whole=True)
    network("small_uint8", 4, whole=True, unsigned=True)
    network("small_hard", 1, whole=True, last=OP.ABS)  # an operator that the Edge TPU does not have
    classes()
    compiled()
