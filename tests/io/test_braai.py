"""braai from Keras weights: the network that is made answers as the file's would, and other files are refused."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from batchproc.cli import cli
from batchproc.config import Config
from batchproc.errors import ModelError
from batchproc.imaging.simulate import Scene, simulate_pair
from batchproc.io.braai import add_braai
from batchproc.io.cards import InputCard, read_card
from batchproc.io.model_checks import check_model
from batchproc.io.models import load_model, models_folder
from batchproc.io.onnx_int8 import quantise_onnx
from batchproc.learning.evaluate import auc_roc
from batchproc.training.cases import Case
from batchproc.training.examples import REAL
from batchproc.training.harvest import harvest
from tests._real import data
from tests.io import _keras


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """No test sees, or touches, the models of whoever runs it."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))


@pytest.fixture
def weights():
    """Random ones."""
    return _keras.braai_weights()


@pytest.fixture
def file(tmp_path, weights):
    """A Keras file of braai's network."""
    return _keras.write_keras(tmp_path / "mine.h5", _keras.braai_layers(), weights)


def stamps_of(n=12, size=63, seed=0):
    return np.random.default_rng(seed).normal(5.0, 2.0, (n, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("normalisation", ["ztf-row-l2", "image-l2"])
def test_the_model_answers_as_the_network_of_the_file(file, weights, normalisation):
    """Layer by layer in float64, dropout left out; channels last, as it was trained."""
    model = load_model(add_braai(file, normalisation=normalisation))
    stamps = stamps_of()
    tensor, _ = model.card.input.prepare(stamps)
    assert tensor.shape == (12, 63, 63, 3)
    expected = _keras.answer(weights, tensor)
    assert np.ptp(expected) > 1e-4
    np.testing.assert_allclose(model.predict(stamps), expected, atol=1e-6)
    assert check_model(model.name) == [
        "float: model.onnx is the file on the card, runs on CPUExecutionProvider",
        "float-tflite: model.tflite is the file on the card, runs on LiteRT",
        "float-tflite: differs from float by at most 0.000 on 32 generated stamps",
    ]
    as_tflite = load_model(model.name, variant="float-tflite").predict(stamps)
    np.testing.assert_allclose(as_tflite, expected, atol=1e-6)


def test_the_card_says_what_it_is(file):
    """Where it came from, how it wants its stamps, and that weights of one's own are not the published ones."""
    card = read_card(add_braai(file, normalisation="image-l2"))
    assert card.input == InputCard(
        63,
        "image-l2",
        layout="NHWC",
        min_finite=0.25,
        truncated="corner",
        padding=1e-9,
        sky=13.0,
        sign="positive",
    )
    assert (card.name, card.version[:7]) == ("braai-own", "sha256 ")
    assert "Duev et al. 2019" in card.training["source"]
    assert card.licence == "MIT (the network); not known (these weights)"


def test_the_normalisation_of_unknown_weights_must_be_given(file):
    """It cannot be seen in a file, and a wrong one gives scores that look like scores."""
    with pytest.raises(ModelError, match=r"not the weights of a published version \(d6_m7, d6_m9\).*--normalisation"):
        add_braai(file)
    with pytest.raises(ModelError, match="never trained with 'noise-log'; known: ztf-row-l2, image-l2"):
        add_braai(file, normalisation="noise-log")
    assert not models_folder().exists()


def changed(change):
    layers = _keras.braai_layers()
    change(layers)
    return layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0]["config"].update(activation="elu"), "layer 1 of 9.*found Conv2D.*=elu.*expected.*=relu"),
        (lambda x: x[1]["config"].update(padding="same"), "layer 2 of 9.*found.* padding=same"),
        (lambda x: x[0]["config"].update(batch_input_shape=[None, 51, 51, 3]), "the input: found input 51×51×3; exp"),
        (lambda x: x.pop(6), "layer 6 of 8.*found Flatten; expected MaxPooling2D pool_size=4×4"),
        (lambda x: x.append(_keras.dense("more", 1, "sigmoid")), "layer 10 of 10.*found Dense.*; expected nothing"),
        (
            lambda x: x.insert(2, {"class_name": "Lambda", "config": {"name": "own"}}),
            "layer 3 of 10.*found Lambda; exp",
        ),
    ],
)
def test_another_network_is_refused(tmp_path, weights, change, message):
    """With the first layer that differs, as found and as expected."""
    path = _keras.write_keras(tmp_path / "other.h5", changed(change), weights)
    with pytest.raises(ModelError, match=f"another network than expected.*{message}"):
        add_braai(path, normalisation="image-l2")


def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    """Of another shape, missing, or not finite."""
    for name, replacement, message in (
        ("fc_1", (np.zeros((288, 256)), np.zeros(256)), "found Dense.* weights 288×256 256; expected"),
        ("conv3", (), "found Conv2D filters=32 kernel_size=3×3 activation=relu; expected"),
        ("fc_out", (np.full((256, 1), np.nan), np.zeros(1)), "layer fc_out has weights that are not finite"),
    ):
        path = _keras.write_keras(tmp_path / "bad.h5", _keras.braai_layers(), weights | {name: replacement})
        with pytest.raises(ModelError, match=message):
            add_braai(path, normalisation="image-l2")


def test_files_that_are_no_sequential_keras_model_are_refused(tmp_path, weights, file):
    """Not HDF5, weights without the architecture, a model of another kind, a folder, nothing at all."""
    (tmp_path / "text.h5").write_text("weights")
    with h5py.File(tmp_path / "bare.h5", "w") as bare:
        bare["kernel"] = np.zeros(3)
    with h5py.File(tmp_path / "list.h5", "w") as bare:
        bare.attrs["model_config"] = json.dumps([1, 2])
    _keras.write_keras(tmp_path / "functional.h5", _keras.braai_layers(), weights, class_name="Functional")
    for name, message in (
        ("text.h5", "cannot be read as HDF5"),
        ("bare.h5", "not a sequential Keras model with its weights.*model_config"),
        ("list.h5", "not a sequential Keras model"),
        ("functional.h5", "its class is Functional"),
        ("", "a folder; expected the HDF5 file"),
        ("absent.h5", "No such file"),
    ):
        with pytest.raises(ModelError, match=message):
            add_braai(tmp_path / name, normalisation="image-l2")


@pytest.mark.parametrize("seed", range(8))
def test_torn_and_altered_files_are_refused_or_harmless(tmp_path, file, seed):
    """Cut short or with a run of bytes overwritten: a `ModelError`, or a network whose scores are probabilities."""
    random = np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    if seed % 2:
        del content[random.integers(len(content)) :]
    else:
        start = random.integers(20_000)  # where the structure is
        content[start : start + 64] = random.bytes(64)
    path = tmp_path / "altered.h5"
    path.write_bytes(content)
    try:
        scores = load_model(add_braai(path, normalisation="image-l2")).predict(stamps_of(4))
    except ModelError:
        return
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("package", ["h5py", "onnx"])
def test_a_missing_package_is_named_with_its_extra(file, monkeypatch, package):
    """What to type is in the message."""
    there = builtins.__import__

    def without(name, *arguments, **options):
        if name == package:
            raise ImportError(f"No module named {package!r}")
        return there(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=rf"pip install 'batchproc\[import\]' \(No module named '{package}'\)"):
        add_braai(file, normalisation="image-l2")


def test_one_command_adds_it(file):
    """And says where; what cannot be meant is a usage error."""

    def typed(*words):
        return CliRunner().invoke(cli, ["models", "add", *map(str, words)], standalone_mode=False)

    made = typed("braai", file, "--name", "mine", "--normalisation", "image-l2")
    assert made.output.strip() == str(models_folder() / "mine")
    assert load_model("mine").normalisation == "image-l2"
    assert "batchproc models add braai d6_m7.h5" in str(typed("braai").exception)
    assert "two paths" in str(typed("elsewhere", file).exception)
    assert "on its card" in str(typed("elsewhere", "--normalisation", "image-l2").exception)


def test_an_int8_version_is_one_with_named_nodes_or_without(file):
    """All but the last product are quantised: a node without a name does not except every other from it."""
    model = load_model(add_braai(file, normalisation="image-l2"))
    tensor, _ = model.card.input.prepare(stamps_of(8))
    bare = onnx.load(model.file)
    for node in bare.graph.node:
        node.ClearField("name")
    onnx.save(bare, file.parent / "bare.onnx")
    for path in (Path(model.file), file.parent / "bare.onnx"):
        quantised = onnx.load_from_string(quantise_onnx(path, tensor))
        constants = [a for a in quantised.graph.initializer if a.data_type == onnx.TensorProto.INT8]
        kernels = sorted(tuple(a.dims) for a in constants if len(a.dims) > 1)
        assert kernels == [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (1152, 256)]


@pytest.mark.realdata
def test_drb_of_the_real_alerts_comes_back():
    """Every one of the 174 that have one, within 1e-5, truncated and filled templates included."""
    model = load_model(add_braai(data("models") / "d6_m7.h5"))
    with np.load(data("alerts") / "ztf_triplets.npz") as alerts:
        stamps, drb = alerts["triplets"].transpose(0, 3, 1, 2), alerts["drb"]
    scores = model.predict(stamps)
    known = np.isfinite(drb)
    assert known.sum() == 174
    assert np.abs(scores[known] - drb[known]).max() < 1e-5
    assert (model.version, model.card.licence) == ("d6_m7", "MIT")


@pytest.mark.realdata
def test_published_weights_are_known_and_are_not_each_other():
    """d6_m9 has its own normalisation, which cannot be overruled, and does not make the drb of the packets."""
    path = data("models") / "braai_d6_m9.h5"
    with pytest.raises(ModelError, match="d6_m9 was trained with image-l2, not ztf-row-l2"):
        add_braai(path, normalisation="ztf-row-l2")
    model = load_model(add_braai(path))
    with np.load(data("alerts") / "ztf_triplets.npz") as alerts:
        stamps, drb = alerts["triplets"].transpose(0, 3, 1, 2), alerts["drb"]
    scores = model.predict(stamps)
    known = np.isfinite(drb)
    assert (model.version, model.normalisation) == ("d6_m9", "image-l2")
    assert np.abs(scores[known] - drb[known]).max() > 0.5
    assert np.corrcoef(scores[known], drb[known])[0, 1] > 0.7


@pytest.mark.realdata
def test_stamps_of_a_run_are_shown_as_it_knows_them():
    """On pixels that it never saw, ranked far above chance, also what has vanished; without sky and sign it is lost."""
    model = load_model(add_braai(data("models") / "d6_m7.h5"))
    bare = replace(model, card=replace(model.card, input=replace(model.card.input, sky=0.0, sign="new-ref")))
    search = Config.from_dict({"detect": {"threshold": 4.0}, "cutouts": {"size": 63}})
    told = {"registration_jitter": 0.15, "cosmic_rays": 15, "hot_pixels": 15}
    scene = Scene(fwhm_new=2.3, fwhm_ref=2.0, n_transients=40, transient_snr=(10, 100), **told)
    found = []
    for seed in range(3):
        pair = simulate_pair((512, 512), seed=seed, scene=scene)
        new, ref = pair.exposures()
        found.append(harvest(Case(f"pair{seed}", f"pair{seed}", new, (ref,), pair.truth), search))
    stamps = np.concatenate([each.stamps for each in found])
    real = np.concatenate([each.label == REAL for each in found])
    assert min(real.sum(), (~real).sum()) > 50
    shown = auc_roc(real, model.predict(stamps))
    assert shown > 0.9
    assert auc_roc(real, bare.predict(stamps)) < shown - 0.2
