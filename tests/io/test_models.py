"""Models on disk: what is run is what the card describes, and what does not fit is refused with both numbers."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchproc.errors import ModelError
from batchproc.io.backends import open_backend
from batchproc.io.cards import CARD, InputCard, ModelCard, read_card
from batchproc.io.model_checks import add_model, check_model
from batchproc.io.models import (
    CPU,
    Model,
    file_hash,
    find_model,
    list_models,
    load_model,
    models_folder,
    show_model,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """No test sees, or touches, the models of whoever runs it."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))


def make_model(folder, golden="centre", **changes):
    """A model folder around one of the golden files."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / f"{golden}.onnx", folder / "model.onnx")
    card = ModelCard(
        name="toy",
        version="1",
        description="The sigmoid of the central pixel of the difference.",
        licence="BSD-3-Clause",
        threshold=0.5,
        default_variant="float",
        input=InputCard(size=5, normalisation="none"),
        files={"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}},
    )
    (folder / "card.toml").write_text(replace(card, **changes).to_toml())
    return folder


@pytest.fixture
def toy(tmp_path):
    """A model folder."""
    return make_model(tmp_path / "toy")


@pytest.fixture
def classes(tmp_path):
    """A model of three classes that takes two features and channels-last stamps."""
    wanted = InputCard(size=5, normalisation="none", layout="NHWC", features=("ref_distance", "fwhm"))
    return make_model(tmp_path / "classes", "classes", name="classes", classes=("sn", "agn", "star"), input=wanted)


def stamps_of(n=6, size=9, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3, size, size)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_fingerprint_is_of_all_that_scores_depend_on(toy, tmp_path):
    """The file, what it is shown, and what its answers are called; nothing else of the card."""
    model = load_model(toy)
    wanted = InputCard(size=5, normalisation="none")
    same = make_model(tmp_path / "same", version="2", threshold=0.9, input=replace(wanted, min_finite=0.5))
    assert load_model(same).fingerprint == model.fingerprint
    others = [
        {"input": replace(wanted, **change)}
        for change in (
            {"normalisation": "min-max"},
            {"size": 7},
            {"min_finite": 0.4},
            {"padding": 1.0},
            {"truncated": "corner"},
            {"channels": ("ref", "new", "difference")},
        )
    ]
    others.append({"classes": ("sn",)})
    found = {load_model(make_model(tmp_path / str(i), **other)).fingerprint for i, other in enumerate(others)}
    assert len(found | {model.fingerprint}) == 1 + len(others)


def test_scores_are_those_of_the_model(toy):
    """One float32 a stamp, whatever the batch; nothing is modified."""
    stamps = stamps_of()
    before = stamps.copy()
    model = load_model(toy)
    scores = model.predict(stamps)
    assert (scores.shape, scores.dtype) == ((6,), np.float32)
    np.testing.assert_allclose(scores, sigmoid(stamps[:, 2, 4, 4]), rtol=1e-5)
    np.testing.assert_array_equal(model.predict(stamps, batch=1), scores)
    np.testing.assert_array_equal(model.predict(stamps, batch=4), scores)
    np.testing.assert_array_equal(stamps, before)
    assert (model.name, model.version, model.normalisation, model.provider) == ("toy", "1", "none", CPU)
    assert model.hash == file_hash(toy / "model.onnx")


def test_nothing_to_score_is_nan_not_a_number(toy):
    """A stamp without data in one channel gets no score; its neighbours keep theirs."""
    stamps = stamps_of()
    expected = load_model(toy).predict(stamps)
    stamps[2, 1] = np.nan
    scores = load_model(toy).predict(stamps)
    assert np.isnan(scores[2])
    np.testing.assert_array_equal(np.delete(scores, 2), np.delete(expected, 2))


def test_no_stamps_give_no_scores(toy):
    """An image without candidates is no special case."""
    assert load_model(toy).predict(np.empty((0, 3, 63, 63), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 9, 9, 3), r"shape \(4, 9, 9, 3\); expected \(n, 3, h, w\) .*transpose\(0, 3, 1, 2\)"),
        ((3, 9, 9), r"shape \(3, 9, 9\)"),
        ((4, 2, 9, 9), r"expected \(n, 3, h, w\)"),
        ((4, 3, 3, 3), "stamps of 3 × 3 pixels; it looks at 5 × 5"),
    ],
)
def test_stamps_that_do_not_fit_are_refused(toy, shape, message):
    """With the shape found, the shape expected, and what to do."""
    with pytest.raises(ModelError, match=message):
        load_model(toy).predict(np.zeros(shape, np.float32))


def test_stamps_are_read_a_batch_at_a_time(toy):
    """A lazy array never has to fit into memory."""

    class Lazy:
        shape = (10, 3, 9, 9)
        largest = 0

        def __getitem__(self, rows):
            stamps = stamps_of(10)[rows]
            self.largest = max(self.largest, len(stamps))
            return stamps

    lazy = Lazy()
    np.testing.assert_array_equal(load_model(toy).predict(lazy, batch=4), load_model(toy).predict(stamps_of(10)))
    assert lazy.largest == 4


def test_several_classes_with_features(classes):
    """(n, classes), each row a distribution; a row with a missing feature is not scored."""
    stamps, features = stamps_of(), np.random.default_rng(1).normal(size=(6, 2))
    features[3, 1] = np.nan
    scores = load_model(classes).predict(stamps, features)
    logits = np.column_stack([stamps[:, 2, 4, 4], features])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.isnan(scores[3]).all()
    np.testing.assert_allclose(np.delete(scores, 3, 0), np.delete(expected, 3, 0), rtol=1e-5)


def test_features_must_be_those_on_the_card(toy, classes):
    """Missing, of the wrong shape, or given to a model that takes none: said, not guessed."""
    with pytest.raises(ModelError, match="needs the features ref_distance, fwhm"):
        load_model(classes).predict(stamps_of())
    with pytest.raises(ModelError, match=r"shape \(6, 3\); expected \(6, 2\)"):
        load_model(classes).predict(stamps_of(), np.zeros((6, 3)))
    with pytest.raises(ModelError, match="takes no features"):
        load_model(toy).predict(stamps_of(), np.zeros((6, 2)))


def test_a_model_travels_and_is_built_where_it_lands(toy):
    """It pickles to a few hundred bytes, holds no session, and scores alike in another process."""
    model = load_model(toy)
    expected = model.predict(stamps_of())
    assert len(pickle.dumps(model)) < 2000
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(model.predict, stamps_of()).result(), expected)


def test_the_session_is_made_once_a_process_with_its_threads_counted(toy):
    """One thread by default, none that spins."""
    model = load_model(toy, threads=1)
    backend = open_backend(model.file, model.hash, model.threads, model.provider)
    assert backend is open_backend(model.file, model.hash, model.threads, model.provider)
    options = backend.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_another_file_than_the_one_on_the_card_is_refused(toy):
    """On loading, and again where it is used, should it change in between."""
    model = load_model(toy)
    shutil.copy(GOLDEN / "logit.onnx", toy / "model.onnx")
    with pytest.raises(ModelError, match="not the file that was described"):
        load_model(toy)
    with pytest.raises(ModelError, match="has changed since"):
        replace(model, threads=2).predict(stamps_of())


def test_what_computes_is_what_was_asked_for(toy):
    """No silent fall back to the CPU."""
    with pytest.raises(ModelError, match="provider CUDAExecutionProvider is not in this ONNX Runtime"):
        load_model(toy, provider="CUDAExecutionProvider").predict(stamps_of())


def test_a_file_that_is_no_model_is_an_error_of_ours(toy):
    """Not one of ONNX Runtime's."""
    (toy / "model.onnx").write_bytes(b"not a model")
    broken = Model(read_card(toy), str(toy / "model.onnx"), "float", file_hash(toy / "model.onnx"))
    with pytest.raises(ModelError, match="ONNX Runtime cannot load it"):
        broken.predict(stamps_of())


def test_a_card_is_read_as_it_was_written(tmp_path):
    """Everything on it, through TOML and back."""
    folder = make_model(
        tmp_path / "m",
        classes=("sn", "bogus"),
        input=InputCard(size=5, normalisation="row-l2", channels=("difference", "new"), features=("fwhm",)),
        meant_for={"fwhm_pix": (1.5, 8.0)},
        metrics=({"on": "images", "auc_pr": np.float64(0.5), "prevalence": 0.5, "auc_pr_interval": (0.4, 0.6)},),
    )
    card = read_card(folder)
    assert card.classes == ("sn", "bogus")
    assert card.input == InputCard(5, "row-l2", ("difference", "new"), features=("fwhm",))
    assert card.metrics[0]["auc_pr_interval"] == [0.4, 0.6]
    (folder / "card.toml").write_text(card.to_toml())
    assert read_card(folder) == card


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('version = "1"\n', "", "version missing"),
        ('version = "1"', 'versoin = "1"', "unknown versoin; known: name, version"),
        ('normalisation = "none"', 'normalisation = "zscale"', "known: none, row-l2"),
        ("threshold = 0.5", "threshold = 5", "threshold = 5: must be 0 to 1"),
        ('name = "toy"', 'name = "../toy"', "name '../toy'"),
        ('path = "model.onnx"', 'path = "../model.onnx"', "in the model's own folder"),
        ('default_variant = "float"', 'default_variant = "int8"', "default_variant = 'int8'; there are: float"),
        ("size = 5", "size = 5 px", "not valid TOML"),
        ('path = "model.onnx"', 'path = "model.h5"', r"path = 'model.h5': must end in .onnx or .tflite"),
        ('path = "model.onnx"', 'path = "model.onnx"\nlayout = "HWC"', "layout = 'HWC'; known: NCHW, NHWC"),
    ],
)
def test_a_card_with_a_mistake_says_which(toy, old, new, message):
    """Key, value, and what is allowed."""
    text = (toy / "card.toml").read_text()
    assert old in text
    (toy / "card.toml").write_text(text.replace(old, new))
    with pytest.raises(ModelError, match=message):
        load_model(toy)


def test_models_are_found_by_name_or_by_path(toy):
    """An unknown one is an error that lists the known ones and says how to add one."""
    add_model(toy, "mine")
    assert find_model("mine") == models_folder() / "mine"
    assert list_models()["mine"] == models_folder() / "mine"
    assert find_model(toy) == toy
    assert load_model("mine").name == "mine"
    with pytest.raises(ModelError, match=r"no model 'yours'.*known: .*mine.*batchproc models add"):
        find_model("yours")
    with pytest.raises(ModelError, match=r"no card\.toml in this folder"):
        find_model(toy.parent)


def test_adding_never_replaces(toy):
    """A name that is taken is refused, and nothing half copied stays behind."""
    add_model(toy)
    with pytest.raises(ModelError, match="there is a model 'toy' already"):
        add_model(toy)
    assert sorted(p.name for p in models_folder().iterdir()) == ["toy"]
    assert "The sigmoid of the central pixel" in show_model("toy")


def test_a_model_is_checked_before_it_is_added(tmp_path):
    """One that answers logits would be read as probabilities."""
    folder = make_model(tmp_path / "logit", "logit")
    with pytest.raises(ModelError, match="expected probabilities"):
        add_model(folder)
    assert list_models().keys() - {"realbogus"} == set()
    with pytest.raises(ModelError, match="a model is a folder with a card"):
        add_model(folder / "model.onnx")


def test_checking_says_what_holds(toy, classes):
    """A line a variant."""
    assert check_model(toy) == ["float: model.onnx is the file on the card, runs on CPUExecutionProvider"]
    assert len(check_model(classes)) == 1


def test_a_card_that_contradicts_its_file_is_found(tmp_path):
    """Classes and inputs as the file has them."""
    with pytest.raises(ModelError, match=r"answered \(33, 1\) to 33 stamps; expected \(33, 2\)"):
        check_model(make_model(tmp_path / "a", classes=("real", "bogus")))
    wanted = InputCard(size=5, normalisation="none", features=("fwhm",))
    with pytest.raises(ModelError, match="takes 1 inputs"):
        check_model(make_model(tmp_path / "b", input=wanted))


def test_a_card_from_before_there_were_several_quantised_variants_can_be_read(toy):
    """Its one table is that of int8."""
    path = toy / "card.toml"
    path.write_text(path.read_text() + '\n[quantisation]\nmethod = "static"\nmean_difference = 0.002\n')
    assert read_card(toy).quantisation == {"int8": {"method": "static", "mean_difference": 0.002}}


@pytest.fixture
def features_alone(tmp_path):
    """A model folder whose file takes two features and answers their softmax."""
    onnx = pytest.importorskip("onnx")
    info, value = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Softmax", ["features"], ["score"], axis=1)],
        "features",
        [info("features", value, ["n", 2])],
        [info("score", value, ["n", 2])],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    folder = tmp_path / "table"
    folder.mkdir()
    onnx.save(made, folder / "model.onnx")
    card = ModelCard(
        name="table",
        version="1",
        description="for tests",
        licence="BSD-3-Clause",
        threshold=0.5,
        default_variant="float",
        input=InputCard(size=0, normalisation="none", channels=(), features=("chi2", "dipole")),
        files={"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}},
        classes=("real", "bogus"),
    )
    (folder / CARD).write_text(card.to_toml())
    return folder


def test_a_model_of_features_alone_reads_no_stamps(features_alone):
    """Its card survives, it is checked like others, and a candidate that lacks a feature is not scored."""
    card = read_card(features_alone)
    assert card.input.channels == ()
    assert check_model(features_alone)[0].startswith("float: model.onnx is the file on the card")
    model = load_model(features_alone)
    assert not model.takes_stamps
    table = np.array([[0.0, 0.0], [np.nan, 1.0], [1e39, 1.0], [3.0, 1.0]])
    scores = model.predict(None, table, batch=3)
    np.testing.assert_allclose(scores[[0, 3]], [[0.5, 0.5], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))]], rtol=1e-6)
    assert np.isnan(scores[1:3]).all()
    with pytest.raises(ModelError, match=r"shape \(4, 1\); expected \(n, 2\): chi2, dipole"):
        model.predict(None, table[:, :1])
    with pytest.raises(ModelError, match="needs the features chi2, dipole"):
        model.predict(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ()}, "both empty"),
        ({"size": 31}, "must be 0 where there are no channels"),
        ({"size": -1}, "must be 0 where there are no channels"),
        ({"channels": ("new",)}, "must be a whole number of pixels"),
    ],
)
def test_what_a_model_looks_at_is_stamps_or_features(features_alone, change, message):
    """A card that says neither, or a size without channels, is refused."""
    card = read_card(features_alone)
    wrong = replace(card, input=replace(card.input, **change))
    (features_alone / CARD).write_text(wrong.to_toml())
    with pytest.raises(ModelError, match=message):
        read_card(features_alone)
