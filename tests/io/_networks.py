"""Small networks in ONNX, of the operators that real/bogus classifiers are made of; random ones too."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """A network under construction: each call appends a node to `last`, or to the value that is given."""

    def __init__(self, channels=3, size=13, seed=0, opset=17):
        self.random = np.random.default_rng(seed)
        self.nodes, self.constants = [], []
        self.shape, self.last, self.opset = (channels, size, size), "stamps", opset

    def constant(self, array, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def add(self, kind, *more, given=None, **attributes):
        """A node on the last value; the name of what it gives."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [given or self.last, *more], [name], **attributes))
        self.last = name
        return name

    def conv(self, out, kernel=3, *, group=1, bias=True, channels=None, given=None, **attributes):
        channels = channels or self.channels()
        shape = (out, channels // group, kernel, kernel)
        weights = self.random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        more = [self.constant(self.random.normal(0, 0.2, out))] if bias else []
        return self.add("Conv", self.constant(weights), *more, given=given, group=group, **attributes)

    def batch_norm(self, channels=None):
        c = channels or self.channels()
        scale, offset = self.random.uniform(0.5, 1.5, c), self.random.normal(0, 0.3, c)
        mean, variance = self.random.normal(0, 0.3, c), self.random.uniform(0.5, 2.0, c)
        return self.add("BatchNormalization", *(self.constant(each) for each in (scale, offset, mean, variance)))

    def dense(self, out, *, transposed=True, matmul=False):
        columns = int(np.prod(self.inferred()[1:]))
        weights, bias = self.random.normal(0, columns**-0.5, (columns, out)), self.random.normal(0, 0.2, out)
        if matmul:
            self.add("MatMul", self.constant(weights))
            return self.add("Add", self.constant(bias))
        given = weights.T if transposed else weights
        return self.add("Gemm", self.constant(given), self.constant(bias), transB=int(transposed))

    def channels(self):
        return self.inferred()[1]

    def inferred(self):
        """Shape of the last value, for one stamp."""
        if self.last == "stamps":
            return (1, *self.shape)
        model = onnx.shape_inference.infer_shapes(self.model(batch=1))
        dims = model.graph.output[0].type.tensor_type.shape.dim
        return tuple(d.dim_value for d in dims)

    def model(self, batch="n"):
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("stamps", TensorProto.FLOAT, [batch, *self.shape])],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def save(self, path):
        onnx.save(self.model(), path)
        return path


def plain(seed=0, size=13, channels=3):
    """Convolutions with an early stride, ReLU, dense layers, a sigmoid: what batchproc's own network is like."""
    net = Builder(channels, size, seed)
    net.conv(8, strides=[2, 2])
    net.add("Relu")
    net.conv(12)
    net.add("Relu")
    net.add("Flatten")
    net.dense(10)
    net.add("Relu")
    net.dense(1)
    net.add("Sigmoid")
    return net


def block(net, kind):
    """One part of a network, by name."""
    c = net.channels()
    if kind == "conv":
        net.conv(8, 3, pads=[1, 1, 1, 1])
        net.add("Relu")
    elif kind == "strided":
        net.conv(6, 3, strides=[2, 2], pads=[1, 1, 1, 1], bias=False)
        net.batch_norm(6)
        net.add("Relu")
    elif kind == "lopsided":
        net.conv(7, 2, pads=[0, 1, 1, 0])
    elif kind == "dilated":
        net.conv(5, 3, dilations=[2, 2], pads=[2, 2, 2, 2])
    elif kind == "automatic":
        net.conv(5, 2, strides=[2, 2], auto_pad="SAME_LOWER")
    elif kind == "depthwise":
        net.conv(2 * c, 3, group=c, pads=[1, 1, 1, 1])
        net.add("Clip", net.constant(0.0), net.constant(6.0))
    elif kind == "grouped":
        net.conv(8, 1)
        net.conv(4, 3, group=2)
    elif kind == "residual":
        before = net.last
        net.conv(c, 3, pads=[1, 1, 1, 1])
        net.add("Add", before)
        net.add("Relu")
    elif kind == "squeeze":
        before = net.last
        net.add("GlobalAveragePool")
        net.conv(c, 1)
        net.add("Sigmoid")
        net.add("Mul", before)
    elif kind == "branches":
        before = net.last
        left = net.conv(3, 1)
        net.conv(4, 3, pads=[1, 1, 1, 1], channels=c, given=before)
        net.add("Relu")
        net.add("Concat", left, axis=1)
    elif kind == "max":
        net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    elif kind == "mean":
        net.add("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    elif kind == "leaky":
        net.add("LeakyRelu", alpha=0.1)
    elif kind == "scaled":
        net.batch_norm()
    elif kind == "there and back":
        net.add("Transpose", perm=[0, 2, 3, 1])
        net.add("Mul", net.constant(np.linspace(0.5, 1.5, c)))
        net.add("Transpose", perm=[0, 3, 1, 2])


# fmt: off
BLOCKS = (
    "conv", "strided", "lopsided", "dilated", "automatic", "depthwise", "grouped", "residual", "squeeze", "branches",
    "max", "mean", "leaky", "scaled", "there and back",
)
# fmt: on
HEADS = ("flat", "reshaped", "pooled", "mean of axes", "channels last", "matmul")


def head(net, kind, classes):
    """Scores of a network, by name of how it gets to them."""
    if kind == "flat":
        net.add("Flatten")
    elif kind == "reshaped":
        net.add("Reshape", net.constant([0, -1], np.int64))
    elif kind == "pooled":
        net.add("GlobalAveragePool")
        net.add("Flatten")
    elif kind == "mean of axes":
        net.add("ReduceMean", axes=[2, 3], keepdims=0)
    elif kind == "channels last":
        net.add("Transpose", perm=[0, 2, 3, 1])
        net.add("Reshape", net.constant([0, -1], np.int64))
    else:
        net.add("Flatten")
        net.dense(6, matmul=True)
        net.add("Tanh")
    net.dense(classes, transposed=kind != "flat")
    net.add("Sigmoid" if classes == 1 else "Softmax")


def random_network(blocks, ending, classes=1, seed=0):
    """These blocks, one after the other, and a head."""
    net = Builder(seed=seed)
    for kind in blocks:
        block(net, kind)
    head(net, ending, classes)
    return net
