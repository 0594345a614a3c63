"""TFLite files made of ONNX ones: in float the same scores, in integers what the arithmetic of integers gives."""

from __future__ import annotations

from itertools import cycle, product

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import ModelError
from batchproc.io.backends.litert import LiteRTBackend
from batchproc.io.tflite.files import float_file, integer_file
from batchproc.io.tflite.graph import Graph, Operator, Steps, Tensor
from batchproc.io.tflite.integers import in_integers
from batchproc.io.tflite.lower import lower
from batchproc.io.tflite.ranges import observed_ranges
from batchproc.io.tflite.write import to_bytes
from tests.io._networks import BLOCKS, HEADS, Builder, plain, random_network

networks = st.builds(
    random_network,
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4),
    ending=st.sampled_from(HEADS),
    classes=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where networks are written."""
    return tmp_path_factory.mktemp("networks")


def stamps_of(n=40, channels=3, size=13, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (n, channels, size, size)).astype(np.float32)


def last(stamps):
    return np.ascontiguousarray(stamps.transpose(0, 2, 3, 1))


def in_onnx(path, stamps, outputs=None):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(outputs, {"stamps": stamps})[0]


def in_litert(data, stamps):
    return LiteRTBackend("made.tflite", data, 1).run([last(stamps)])


# --- In float ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, derandomize=True)
@given(net=networks)
def test_in_float_scores_are_those_of_onnx_runtime(place, net):
    """Whatever the network, for any number of stamps."""
    path = net.save(place / "net.onnx")
    data, stamps = float_file(path, "NCHW"), stamps_of(7)
    np.testing.assert_allclose(in_litert(data, stamps), in_onnx(path, stamps), atol=2e-5)
    np.testing.assert_array_equal(in_litert(data, stamps[:3]), in_litert(data, stamps)[:3])


@pytest.mark.parametrize(("kind", "ending"), [*zip(BLOCKS, cycle(HEADS), strict=False), *product(["branches"], HEADS)])
def test_every_block_and_every_head(place, kind, ending):
    """None is left to chance."""
    path = random_network([kind], ending, 3).save(place / "net.onnx")
    stamps = stamps_of(3)
    np.testing.assert_allclose(in_litert(float_file(path, "NCHW"), stamps), in_onnx(path, stamps), atol=2e-5)


def test_nothing_is_transposed_for_the_order_of_the_axes(place):
    """Weights are; and channels-last stamps that the network turns itself stay as they are."""
    for net, layout in ((plain(), "NCHW"), (channels_last(), "NHWC")):
        graph = lower(net.save(place / "net.onnx"), layout)
        assert [o.kind for o in graph.operators if o.kind == "TRANSPOSE"] == []
        assert graph.tensors["stamps"].shape == (13, 13, 3)
        assert {o.options.get("fusedActivationFunction") for o in graph.operators} >= {"RELU"}


def channels_last():
    net = Builder()
    net.shape = (13, 13, 3)
    net.add("Transpose", perm=[0, 3, 1, 2])
    net.conv(6)
    net.add("Relu")
    net.add("Transpose", perm=[0, 2, 3, 1])
    net.add("Flatten")
    net.dense(1)
    net.add("Sigmoid")
    return net


def test_an_activation_is_not_drawn_into_what_others_see_without_it(place):
    """A value that is used before its ReLU too, directly or under another name, keeps its negative numbers."""
    for through in ("Identity", "Flatten"):
        net = Builder()
        before = net.conv(4)
        positive = net.add("Relu")
        net.add("Flatten", given=positive)
        first = net.dense(2)
        net.add(through, given=before)
        if through == "Identity":
            net.add("Flatten")
        else:
            net.add("Relu", given=net.last)
        second = net.dense(2)
        net.add("Add", first, given=second)
        path = net.save(place / "net.onnx")
        stamps = stamps_of(5)
        np.testing.assert_allclose(in_litert(float_file(path, "NCHW"), stamps), in_onnx(path, stamps), atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: net.add("Erf"), r"net\.onnx: the operator Erf cannot be written to TFLite; .* Conv, .* stay with"),
        (lambda net: net.add("Clip", net.constant(-3.0), net.constant(2.0)), r"Clip .* clips to -3 … 2"),
        (lambda net: net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), "MaxPool .*ceil_mode"),
        (lambda net: net.add("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 0, 0]), "MaxPool .* pads by"),
        (lambda net: net.add("Softmax", axis=1), "Softmax .* over another axis than the last"),
        (lambda net: net.add("Transpose", perm=[1, 0, 2, 3]), "moves the axis of the stamps"),
        (lambda net: net.add("Pad", net.constant([0, 0, 1, 1] * 2, np.int64), mode="reflect"), "other than zeros"),
    ],
)
def test_what_cannot_be_written_is_named(place, make, message):
    """An operator, or a setting of one."""
    net = Builder()
    net.conv(4)
    make(net)
    with pytest.raises(ModelError, match=message):
        float_file(net.save(place / "net.onnx"), "NCHW")


def test_a_file_that_is_no_network_is_refused(place):
    """Text under the name of an ONNX file."""
    (place / "text.onnx").write_text("weights")
    with pytest.raises(ModelError, match=r"text\.onnx: its network cannot be read"):
        float_file(place / "text.onnx", "NCHW")


# --- What is seen -----------------------------------------------------------------------------------------------------


def test_ranges_are_the_true_minima_and_maxima(place):
    """Those of ONNX Runtime with everything between as outputs, one outlier included, whatever the batch."""
    net = plain()
    path = net.save(place / "net.onnx")
    stamps = stamps_of(100)
    stamps[70] *= 50
    model = net.model()
    inner = [node.output[0] for node in model.graph.node if node.op_type in ("Relu", "Gemm", "Sigmoid")]
    inner.remove("v5")  # a dense layer with its ReLU is one operator
    for name in inner[:-1]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    seen = [(v.min(), v.max()) for v in session.run(inner, {"stamps": stamps})]
    for batch in (7, 64):
        found = observed_ranges(lower(path), [last(stamps)], batch=batch)
        assert found["stamps"] == (float(stamps.min()), float(stamps.max()))
        for low, high in seen:
            assert min(max(abs(a - low), abs(b - high)) for a, b in found.values()) < 1e-5 * max(1.0, high)


# --- In integers ------------------------------------------------------------------------------------------------------


def whole(path, stamps, **how):
    """Graph and file in integers, calibrated on the stamps."""
    graph = lower(path)
    made = in_integers(graph, observed_ranges(graph, [last(stamps)]), **how)
    return made, to_bytes(made)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(net=networks)
def test_in_integers_scores_are_close(place, net):
    """Within what eight bits hold, where nothing is beyond what was calibrated on; int8 from input to output."""
    path, stamps = net.save(place / "net.onnx"), stamps_of(60)
    made, data = whole(path, stamps)
    assert {t.dtype for t in made.tensors.values()} <= {np.int8, np.int32}
    exact, found = in_onnx(path, stamps), in_litert(data, stamps)
    assert np.abs(found - exact).mean() < 0.02
    assert np.abs(found - exact).max() < 0.1


@pytest.mark.parametrize("per_channel", [True, False])
def test_in_integers_the_numbers_are_those_of_the_arithmetic(place, per_channel):
    """Sums in int32, scaled and rounded, tensor by tensor: at most one step from NumPy's."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    path, stamps = plain().save(place / "net.onnx"), stamps_of(50)
    made, data = whole(path, stamps, dense_per_channel=per_channel)
    fresh = last(stamps_of(8, seed=2))
    given_steps = made.tensors["stamps"].steps
    scale, zero = float(given_steps.scale[0]), given_steps.zero_point
    expected = {"stamps": np.clip(np.rint(fresh / scale) + zero, -128, 127).astype(np.int64)}
    interpreter = Interpreter(
        model_content=data,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    numbers = {name: k for k, name in enumerate(made.tensors)}
    interpreter.resize_tensor_input(0, fresh.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, expected["stamps"].astype(np.int8))
    interpreter.invoke()
    for operator in made.operators:
        seen = {name: interpreter.get_tensor(numbers[name]).astype(np.int64) for name in operator.inputs}
        wanted = in_numpy(made, operator, seen)
        got = interpreter.get_tensor(numbers[operator.output]).astype(np.int64)
        assert np.abs(got - wanted).max() <= (0 if operator.kind == "RESHAPE" else 1), operator.kind
        assert np.mean(got != wanted) < 0.01, operator.kind


def in_numpy(graph, operator, seen):
    """One operator in integers, as TFLite's specification has it."""
    steps = graph.tensors[operator.output].steps
    name_in = operator.inputs[0]
    x = seen[name_in] - graph.tensors[name_in].steps.zero_point
    scale_in = graph.tensors[name_in].steps.scale[0]
    if operator.kind == "RESHAPE":
        return seen[name_in].reshape(len(x), -1)
    if operator.kind == "LOGISTIC":
        return np.clip(np.rint(256 / (1 + np.exp(-x * np.float64(scale_in)))) - 128, -128, 127)
    weights, bias = seen[operator.inputs[1]], seen[operator.inputs[2]]
    if operator.kind == "CONV_2D":
        k, stride = weights.shape[1], operator.options["strideH"]
        size = (x.shape[1] - k) // stride + 1
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride][:, :size, :size]
        sums = np.einsum("nyxcij,oijc->nyxo", windows, weights) + bias
    else:
        sums = x @ weights.T + bias
    scales = graph.tensors[operator.inputs[1]].steps.scale.astype(np.float64)
    out = np.rint(sums * (scale_in * scales / steps.scale[0])) + steps.zero_point
    low = max(-128, steps.zero_point) if operator.options["fusedActivationFunction"] == "RELU" else -128
    return np.clip(out, low, 127)


def test_weights_have_a_scale_for_each_channel(place):
    """Convolutions and dense layers; biases in steps of input times weight; probabilities in 1/256."""
    made, _ = whole(plain().save(place / "net.onnx"), stamps_of(50))
    for operator in made.operators:
        if operator.kind in ("CONV_2D", "FULLY_CONNECTED"):
            x, weights, bias = (made.tensors[name] for name in operator.inputs)
            assert len(weights.steps.scale) == weights.shape[0] == len(bias.data)
            np.testing.assert_allclose(bias.steps.scale, x.steps.scale[0] * weights.steps.scale, rtol=1e-6)
            assert (bias.dtype, weights.steps.zero_point) == (np.int32, 0)
            assert np.abs(weights.data).reshape(len(weights.data), -1).max(axis=1).tolist() == [127] * len(bias.data)
    assert made.tensors[made.output].steps == Steps(made.tensors[made.output].steps.scale, -128)
    assert made.tensors[made.output].steps.scale == [1 / 256]


def test_tiny_weights_and_dead_channels_do_no_harm(place):
    """A channel of zeros, and one whose bias would not fit into 32 bits in steps of its weights."""
    net = plain()
    weights = onnx.numpy_helper.to_array(net.constants[0]).copy()
    weights[0], weights[1] = 0.0, weights[1] * 1e-12
    net.constants[0] = onnx.numpy_helper.from_array(weights, net.constants[0].name)
    path, stamps = net.save(place / "net.onnx"), stamps_of(60)
    _, data = whole(path, stamps)
    assert np.abs(in_litert(data, stamps) - in_onnx(path, stamps)).max() < 0.05


def test_what_integers_cannot_hold_in_the_same_steps_is_refused():
    """Probabilities joined with large numbers."""
    tensors = {name: Tensor(name, (4,)) for name in ("x", "p", "both")}
    operators = (
        Operator("LOGISTIC", ("x",), "p"),
        Operator("CONCATENATION", ("x", "p"), "both", {"axis": 1, "fusedActivationFunction": "NONE"}),
    )
    graph = Graph(tensors, operators, ("x",), "both")
    with pytest.raises(ModelError, match=r"probabilities and other numbers \(-9 to 9\) are joined"):
        in_integers(graph, {"x": (-9.0, 9.0), "p": (0.0, 1.0), "both": (-9.0, 9.0)})


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_that_is_asked_for_is_in_the_file(place, batch):
    """And the scores are the same."""
    path, stamps = plain().save(place / "net.onnx"), stamps_of(30)
    any_number = integer_file(path, "NCHW", [last(stamps)])
    fixed = integer_file(path, "NCHW", [last(stamps)], batch=batch)
    backend = LiteRTBackend("fixed.tflite", fixed, 1)
    assert backend.slots[0].shape == (batch, 13, 13, 3)
    np.testing.assert_array_equal(backend.run([last(stamps)]), in_litert(any_number, stamps))
