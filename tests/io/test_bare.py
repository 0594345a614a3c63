"""Files without a card: what they tell is taken from them, what is not usual in the rest is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from batchproc import cli
from batchproc.errors import ModelError
from batchproc.io.bare import Said, add_file, card_of
from batchproc.io.models import load_model, read_card
from batchproc.learning.inputs import CHANNELS

onnx = pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """No test sees, or touches, the models of whoever runs it."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))


def write(path, inputs, classes=1, *, softmax=True, kind=None):
    """A file that averages what it is given, and answers `classes` probabilities."""
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    number = onnx.TensorProto.FLOAT
    nodes = []
    for name in inputs:
        nodes += [node("Flatten", [name], [f"{name}_flat"], axis=1)]
        nodes += [node("ReduceMean", [f"{name}_flat"], [f"{name}_mean"], axes=[1], keepdims=1)]
    nodes += [node("Sum", [f"{name}_mean" for name in inputs], ["all"])]
    nodes += [node("Mul", ["all", "weights"], ["z"]), node("Sigmoid" if softmax else "Identity", ["z"], ["score"])]
    outputs = [value("score", number, ["n", classes])]
    if kind is not None:
        nodes.append(node("Cast", ["score"], ["label"], to=kind))
        outputs = [value("label", kind, ["n", classes]), *outputs]
    weights = onnx.numpy_helper.from_array(np.ones((1, classes), np.float32), "weights")
    given = [value(name, number, shape) for name, shape in inputs.items()]
    graph = onnx.helper.make_graph(nodes, "g", given, outputs, [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


NCHW, NHWC = ["n", 3, 31, 31], ["n", 31, 31, 3]


@pytest.mark.parametrize(
    ("inputs", "classes", "said", "expected"),
    [
        ({"stamps": NCHW}, 1, {}, {"size": 31, "layout": "NCHW", "channels": CHANNELS, "features": ()}),
        ({"stamps": NHWC}, 1, {}, {"size": 31, "layout": "NHWC", "channels": CHANNELS, "features": ()}),
        ({"stamps": ["n", 1, 21, 21]}, 1, {"channels": ("difference",)}, {"size": 21, "channels": ("difference",)}),
        ({"stamps": ["n", 3, "h", "w"]}, 1, {"size": 31, "layout": "NCHW"}, {"size": 31, "layout": "NCHW"}),
        ({"stamps": NCHW}, 3, {"classes": ("SN", "AGN", "bogus")}, {"size": 31}),
        ({"stamps": NCHW, "columns": ["n", 2]}, 1, {"features": ("chi2", "dipole")}, {"features": ("chi2", "dipole")}),
    ],
)
def test_a_file_tells_what_it_takes(inputs, classes, said, expected, tmp_path):
    """Size, axes and number of answers; the model then runs by its name."""
    path = write(tmp_path / "mine.onnx", inputs, classes)
    folder = add_file(path, Said(normalisation="min-max", **said))
    card = read_card(folder)
    assert card.name == "mine"
    assert {key: getattr(card.input, key) for key in expected} == expected
    assert card.classes == said.get("classes", ("real",))
    stamps = np.random.default_rng(0).normal(size=(4, 3, 31, 31)).astype(np.float32)
    features = np.ones((4, 2)) if card.input.features else None
    scores = load_model("mine").predict(stamps, features)
    assert np.isfinite(scores).all()


def test_what_is_usual_is_assumed(tmp_path):
    """The order of three channels, what one answer is, and the threshold, where nothing is said of them."""
    path = write(tmp_path / "mine.onnx", {"stamps": NCHW})
    card = card_of(path, Said(normalisation="min-max"))
    assert (card.input.channels, card.classes, card.threshold) == (("new", "ref", "difference"), ("real",), 0.5)
    wanted = card.input
    assert (wanted.min_finite, wanted.truncated, wanted.padding) == (0.5, "centre", 0.0)


def test_a_file_of_features_alone_reads_no_stamps(tmp_path):
    """Nothing about stamps is asked."""
    path = write(tmp_path / "table.onnx", {"columns": ["n", 2]})
    card = read_card(add_file(path, Said(features=("chi2", "dipole"), licence="MIT", threshold=0.2)))
    assert (card.input.size, card.input.channels, card.licence, card.threshold) == (0, (), "MIT", 0.2)
    np.testing.assert_allclose(load_model("table").predict(None, [[1.0, 3.0]]), [1 / (1 + np.exp(-2))], rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "classes", "said", "message"),
    [
        ({"stamps": NCHW}, 1, {"normalisation": ""}, r"--normalisation none\|row-l2"),
        ({"stamps": NCHW}, 1, {"normalisation": "nix"}, "input.normalisation = 'nix'"),
        ({"stamps": NCHW}, 2, {}, "answers 2 numbers. Name its classes"),
        ({"stamps": NCHW}, 2, {"classes": ("a", "b", "c")}, "answers 2 numbers, 3 were named: a, b, c"),
        ({"stamps": ["n", 2, 31, 31]}, 1, {}, "has 2 channels. Say which, in its order: --channels ref,difference"),
        ({"stamps": ["n", "c", "h", "w"]}, 1, {}, r"which axis is the channels\? --layout NCHW\|NHWC"),
        ({"stamps": ["n", 3, 3, 3]}, 1, {}, "which axis is the channels"),
        ({"stamps": ["n", 3, "h", "w"]}, 1, {"layout": "NCHW"}, "takes any size. Say it: --size PIXELS"),
        (
            {"stamps": NCHW},
            1,
            {"size": 63},
            r"takes \(\?, 3, 31, 31\); --size, --channels and --layout lead to \(\?, 3, 63",
        ),
        ({"stamps": NCHW}, 1, {"channels": ("new",)}, r"lead to \(\?, 1, 31, 31\)"),
        ({"stamps": NCHW, "columns": ["n", 2]}, 1, {}, "takes 2 features, 0 were named. Name the columns"),
        ({"stamps": NCHW, "columns": ["n", 2]}, 1, {"features": ("chi2",)}, "takes 2 features, 1 were named: chi2"),
        ({"stamps": NCHW}, 1, {"features": ("chi2",)}, "takes 0 features, 1 were named"),
        ({"columns": ["n", 1]}, 1, {"features": ("chi2",)}, "takes no stamps, so that there is nothing for --norm"),
        ({"a": NCHW, "b": NCHW}, 1, {}, r"takes a \(\?, 3, 31, 31\), b \(\?, 3, 31, 31\); expected stamps"),
        ({"stamps": NCHW}, 1, {"name": "a b"}, "name 'a b'"),
    ],
)
def test_what_a_file_does_not_tell_is_asked_for(inputs, classes, said, message, tmp_path):
    """And what it contradicts is refused, with what to say; nothing is added."""
    path = write(tmp_path / "mine.onnx", inputs, classes)
    with pytest.raises(ModelError, match=message):
        add_file(path, Said(**{"normalisation": "min-max", **said}))
    assert not (tmp_path / "models" / "mine").exists()


def test_labels_are_no_probabilities(tmp_path):
    """A file whose first answer is the class and not its probability would score 0 and 1 in silence."""
    path = write(tmp_path / "mine.onnx", {"stamps": NCHW}, kind=onnx.TensorProto.INT64)
    with pytest.raises(ModelError, match=r"first output label is tensor\(int64\).*without labels and ZipMap"):
        card_of(path, Said(normalisation="none"))


def test_logits_are_refused(tmp_path):
    """With what to do."""
    path = write(tmp_path / "mine.onnx", {"stamps": NCHW}, softmax=False)
    with pytest.raises(ModelError, match="answers logits needs a final sigmoid"):
        add_file(path, Said(normalisation="none"))


def test_a_file_is_added_from_the_command_line(tmp_path, capsys):
    """Its options make the card; they are refused where there is one."""
    path = write(tmp_path / "mine.onnx", {"stamps": NHWC}, 2)
    words = ["models", "add", str(path), "--normalisation", "row-l2", "--classes", "real, bogus", "--name", "ours"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 0
    folder = capsys.readouterr().out.strip()
    card = read_card(folder)
    assert (card.name, card.classes, card.input.normalisation) == ("ours", ("real", "bogus"), "row-l2")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["models", "add", folder, "--classes", "real,bogus"])
    assert exit_.value.code == 2
    assert "--classes is for a file without a card" in capsys.readouterr().err
