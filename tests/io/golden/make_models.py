"""Remakes the small ONNX files here: ``python tests/io/golden/make_models.py`` (needs the extra ``train``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(name, nodes, inputs, classes, constants=()):
    """One file: named inputs with their shapes, one output."""
    given = [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in inputs.items()]
    out = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", classes])
    weights = [numpy_helper.from_array(np.asarray(value, np.float32), key) for key, value in dict(constants).items()]
    graph = helper.make_graph(nodes, name, given, [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, Path(__file__).parent / f"{name}.onnx")


stamps = {"stamps": ["n", 3, 5, 5]}
centre = np.zeros((75, 1))
centre[2 * 25 + 12] = 1.0  # the central pixel of the difference
node = helper.make_node
# The probability is the sigmoid of that pixel.
save(
    "centre",
    [node("Flatten", ["stamps"], ["flat"]), node("Gemm", ["flat", "w"], ["z"]), node("Sigmoid", ["z"], ["score"])],
    stamps,
    1,
    {"w": centre},
)
# The pixel itself: no probability.
save("logit", [node("Flatten", ["stamps"], ["flat"]), node("Gemm", ["flat", "w"], ["score"])], stamps, 1, {"w": centre})
# Softmax of (pixel, first feature, second feature), from channels-last stamps.
save(
    "classes",
    [
        node("Flatten", ["stamps"], ["flat"]),
        node("Gemm", ["flat", "w"], ["z"]),
        node("Concat", ["z", "features"], ["all"], axis=1),
        node("Softmax", ["all"], ["score"], axis=1),
    ],
    {"stamps": ["n", 5, 5, 3], "features": ["n", 2]},
    3,
    {"w": np.eye(75)[:, [12 * 3 + 2]]},
)
