"""Trainings from end to end on stamps that a child could tell apart. Needs the extra ``train``."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from batchproc.errors import ModelError, UsageError
from batchproc.io.cards import CARD, InputCard, ModelCard, read_card
from batchproc.io.model_checks import check_model
from batchproc.io.models import file_hash, load_model
from batchproc.io.quantise import quantise_model
from batchproc.learning.evaluate import auc_pr
from batchproc.training.examples import REAL, Examples
from batchproc.training.settings import TrainSettings
from batchproc.training.train import train_model

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: train)")

SETTINGS = TrainSettings(epochs=4, group="group", resamples=50)


def toys(n, seed, classes=("real", "bogus"), size=33, broad=(1.0, 2.2), sharp=0.3):
    """Stars, hot pixels and rows in noise, as many classes as asked for; a column that tells them apart, roughly."""
    random = np.random.default_rng(seed)
    stamps = random.normal(size=(n, 3, size, size))
    label = random.choice(classes, n)
    y, x = np.mgrid[:size, :size] - size // 2
    for i in range(n):
        width = random.uniform(*broad) if label[i] == classes[0] else sharp
        long = 8.0 if len(classes) > 2 and label[i] == classes[2] else width
        profile = np.exp(-(x**2) / (2 * long**2) - y**2 / (2 * width**2))
        stamps[i, 0] += random.uniform(20, 200) * profile / np.sqrt((profile**2).sum())
    stamps[:, 2] = stamps[:, 0] - stamps[:, 1]
    hint = (label == classes[0]) * 100.0 + random.normal(0, 10, n) + 5000
    table = pd.DataFrame({"id": [f"c{seed}-{k}" for k in range(n)], "group": [f"g{k % 60}" for k in range(n)]})
    return Examples(stamps.astype(np.float32), label.astype(np.str_), table.assign(hint=hint.astype(np.float32)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that tells stars from hot pixels."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "out"
    return train_model(toys(1500, 0), out, SETTINGS, quiet=True)


def test_what_comes_out(trained):
    """All that was asked for is in the folder, and the model is one that can be used."""
    assert {p.name for p in trained.folder.iterdir()} == {
        "config.toml",
        "split.parquet",
        "history.csv",
        "curves.png",
        "model",
    }
    assert TrainSettings.from_toml(trained.folder / "config.toml") == SETTINGS
    split = pd.read_parquet(trained.folder / "split.parquet")
    assert list(split["id"]) == [f"c0-{k}" for k in range(1500)]
    assert split.groupby("group")["part"].nunique().max() == 1
    history = pd.read_csv(trained.folder / "history.csv")
    best = trained.card.training["epochs"]
    assert history["valid_loss"].idxmin() + 1 == best
    assert (trained.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(check_model(trained.model_folder)) == 1
    fresh = toys(300, 9)
    assert auc_pr(fresh.label == "real", load_model(trained.model_folder).predict(fresh.stamps)) > 0.97


def test_the_card_says_how_good_and_on_what(trained):
    """Metrics are of the test part alone, with prevalence and interval; the threshold keeps what was asked for."""
    card = read_card(trained.model_folder)
    (table,) = card.metrics
    split = pd.read_parquet(trained.folder / "split.parquet")
    test = split[split["part"] == "test"]
    assert (table["n_real"], table["n_bogus"]) == ((test["label"] == "real").sum(), (test["label"] == "bogus").sum())
    assert table["prevalence"] == 0.5
    assert table["auc_pr_interval"][0] <= table["auc_pr"] <= table["auc_pr_interval"][1]
    valid = (split["part"] == "valid") & (split["label"] == "real")
    scores = load_model(trained.model_folder).predict(toys(1500, 0).stamps[valid])
    assert (scores >= card.threshold).mean() >= 0.99
    assert card.training["n_train"] == trained.counts.loc["train", ["bogus", "real"]].to_dict()
    assert f"AUC-PR at 1:1                  {table['auc_pr']:.4f}" in trained.text()


def test_the_same_seed_gives_the_same_file(trained, tmp_path):
    """And another one another."""
    again = train_model(toys(1500, 0), tmp_path / "again", SETTINGS, quiet=True)
    assert again.card.files == trained.card.files
    other = train_model(toys(1500, 0), tmp_path / "other", replace(SETTINGS, seed=1, epochs=1), quiet=True)
    assert other.card.files != trained.card.files


def test_a_finished_training_is_not_overwritten(trained):
    """Unless that is asked for."""
    before = (trained.model_folder / CARD).read_bytes()
    with pytest.raises(UsageError, match="holds a trained model already; another folder, or --overwrite"):
        train_model(toys(100, 0), trained.folder, SETTINGS)
    assert (trained.model_folder / CARD).read_bytes() == before


def with_novae(examples, seed):
    """Half of the stars become novae, which look alike, but for a column."""
    nova = (examples.label == "star") & (np.random.default_rng(seed).uniform(size=len(examples)) < 0.5)
    table = examples.table.assign(hint=examples.table["hint"] + np.where(nova, 100, 0).astype(np.float32))
    return Examples(examples.stamps, np.where(nova, "nova", examples.label), table)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_several_classes_with_features(tmp_path, layout):
    """One probability a class, in the order on the card; features go in as they are in the catalogue."""
    settings = replace(SETTINGS, features=("hint",), layout=layout, epochs=8, balance="sampling")
    found = train_model(with_novae(toys(1200, 1, ("star", "hot")), 0), tmp_path / "out", settings, quiet=True)
    assert found.card.classes == ("hot", "nova", "star")
    fresh = with_novae(toys(200, 2, ("star", "hot")), 1)
    model = load_model(found.model_folder)
    scores = model.predict(fresh.stamps, fresh.table[["hint"]].to_numpy())
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert (np.array(model.classes)[scores.argmax(axis=1)] == fresh.label).mean() > 0.9
    (table,) = found.card.metrics
    assert set(table["auc_pr"]) == {"hot", "nova", "star"}
    assert table["macro_f1_interval"][0] <= table["macro_f1"] <= table["macro_f1_interval"][1]


@pytest.mark.parametrize(("features", "swapped"), [((), True), (("hint",), False)])
def test_epochs_are_exchanged_only_where_no_feature_contradicts(tmp_path, monkeypatch, features, swapped):
    """Features of the epochs as they were go with stamps as they were."""
    from batchproc.training import fit

    found = []
    monkeypatch.setattr(fit, "swap_epochs", lambda stamps, _: found.append(1) or stamps)
    settings = replace(SETTINGS, features=features, epochs=1, resamples=2)
    train_model(toys(120, 14), tmp_path / "out", settings, quiet=True)
    assert bool(found) == swapped


def test_few_labels_improve_a_model_elsewhere(trained, tmp_path):
    """Where hot pixels are as broad as the base has never seen them, eighty labels help; the card names the base."""
    domain = {"broad": (1.2, 1.3), "sharp": 0.8}
    few, fresh = toys(80, 3, **domain), toys(500, 4, **domain)
    settings = replace(SETTINGS, base=str(trained.model_folder), epochs=30, valid=0.25)
    found = train_model(few, tmp_path / "out", settings, quiet=True)
    real = fresh.label == "real"
    before, after = (
        auc_pr(real, load_model(m).predict(fresh.stamps)) for m in (trained.model_folder, found.model_folder)
    )
    assert after > before + 0.02
    base = found.card.training["continued_from"]
    assert (base["name"], base["sha256"]) == ("trained", trained.card.files["float"]["sha256"])
    assert found.card.training["agreement_with_base"] < 1e-4
    assert found.card.input == trained.card.input
    same = found.card.training["base_on_the_same"]
    assert same["auc_pr"] < found.card.metrics[0]["auc_pr"]
    assert f"the base: {same['auc_pr']:.4f}" in found.text()


def test_nothing_learnt_leaves_the_base_as_it_was(trained, tmp_path):
    """At a rate of learning that spoils every weight, epoch 0 is kept, and scores are the base's."""
    settings = replace(
        SETTINGS, base=str(trained.model_folder), epochs=2, learning_rate=5.0, head_epochs=0, body_rate=1.0
    )
    found = train_model(toys(120, 5), tmp_path / "out", settings, quiet=True)
    assert found.card.training["epochs"] == 0
    fresh = toys(40, 6)
    base, same = (load_model(m).predict(fresh.stamps) for m in (trained.model_folder, found.model_folder))
    np.testing.assert_allclose(same, base, atol=1e-5)


def test_only_the_last_layer_is_fitted_when_frozen(trained, tmp_path):
    """All other weights are those of the base."""
    import onnx
    from onnx import numpy_helper

    settings = replace(SETTINGS, base=str(trained.model_folder), freeze=True, epochs=3, head_epochs=0)
    found = train_model(toys(200, 6, broad=(0.5, 0.6)), tmp_path / "out", settings, quiet=True)

    def weights(folder):
        graph = onnx.load(folder / "model.onnx").graph
        return {tuple(one.dims): numpy_helper.to_array(one) for one in graph.initializer if len(one.dims) > 1}

    before, after = weights(trained.model_folder), weights(found.model_folder)
    assert before.keys() == after.keys()
    changed = [shape for shape in before if not np.allclose(before[shape], after[shape], atol=1e-6)]
    assert len(before) == 5
    assert changed == [shape for shape in before if shape[0] == 1]


def test_other_classes_get_a_last_layer_of_their_own(trained, tmp_path):
    """The body is continued."""
    examples = toys(300, 7, classes=("star", "hot", "trail"))
    found = train_model(examples, tmp_path / "out", replace(SETTINGS, base=str(trained.model_folder)), quiet=True)
    assert found.card.classes == ("hot", "star", "trail")
    assert found.card.training["last_layer"] == "new"
    settings = replace(SETTINGS, base=str(trained.model_folder), size=25)
    with pytest.raises(UsageError, match="size = 25: trained was trained with 31; leave it out"):
        train_model(examples, tmp_path / "other", settings, quiet=True)
    assert not (tmp_path / "other/model").exists()


def test_ctrl_c_keeps_the_best_so_far(tmp_path, monkeypatch):
    """The model is that of the best epoch, and all say so; before the first epoch is over nothing is written."""
    from batchproc.training import fit

    calls = []
    whole = fit._augmented

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(fit, "_augmented", interrupting)
    examples = toys(400, 8)
    stop = 1
    with pytest.raises(KeyboardInterrupt):
        train_model(examples, tmp_path / "out", SETTINGS, quiet=True)
    assert not (tmp_path / "out/model").exists()
    calls, stop = [], 20
    found = train_model(examples, tmp_path / "out", replace(SETTINGS, epochs=30), quiet=True)
    assert found.interrupted
    assert 1 <= len(found.history) < 4
    assert read_card(found.model_folder).training["interrupted"] is True
    assert "interrupted, these are the best weights so far" in found.text()


def test_what_cannot_be_trained_is_refused_before_it_begins(tmp_path):
    """One class; a column that is not there or holds no numbers; too many stamps without data."""
    examples = toys(60, 10)
    one = Examples(examples.stamps, np.full(60, "real"), examples.table)
    with pytest.raises(UsageError, match="all 60 examples are real: two classes are needed"):
        train_model(one, tmp_path / "out", SETTINGS)
    with pytest.raises(UsageError, match="feature 'fwhm': no such column; columns of numbers are: hint"):
        train_model(examples, tmp_path / "out", replace(SETTINGS, features=("fwhm",)))
    with pytest.raises(UsageError, match="feature 'id': the column holds"):
        train_model(examples, tmp_path / "out", replace(SETTINGS, features=("id",)))
    blank = Examples(np.where(examples.label[:, None, None, None] == "real", np.nan, examples.stamps), *_rest(examples))
    with pytest.raises(UsageError, match=r"examples can be scored \(data in enough of the stamp.*none is real"):
        train_model(blank, tmp_path / "out", SETTINGS, quiet=True)
    assert not (tmp_path / "out/model").exists()


def _rest(examples):
    return examples.label, examples.table


# --- ONNX files as networks -------------------------------------------------------------------------------------------


def small_net(layout="NCHW", last=None):
    """Of the layers that such networks have."""
    from torch import nn

    class Turn(nn.Module):
        def forward(self, x):
            return x.permute(0, 3, 1, 2)

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.MaxPool2d(2, padding=1)]
    layers += [nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.Tanh(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten()]
    layers += [nn.Linear(6, 5), nn.ReLU6(), last or nn.Linear(5, 2), nn.Softmax(dim=1)]
    return nn.Sequential(*([Turn()] if layout == "NHWC" else []), *layers).eval()


def model_of(net, folder, layout="NCHW", training=False):
    """A model folder of any network; without folding, all its layers are nodes."""
    folder.mkdir()
    shape = (1, 24, 24, 3) if layout == "NHWC" else (1, 3, 24, 24)
    torch.onnx.export(
        net,
        (torch.zeros(shape),),
        str(folder / "model.onnx"),
        input_names=["stamps"],
        output_names=["score"],
        dynamic_axes={"stamps": {0: "n"}, "score": {0: "n"}},
        opset_version=17,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE if training else torch.onnx.TrainingMode.EVAL,
        do_constant_folding=not training,
    )
    card = ModelCard(
        name="small",
        version="1",
        description="",
        licence="",
        threshold=0.5,
        default_variant="float",
        input=InputCard(size=24, normalisation="min-max", layout=layout),
        files={"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}},
        classes=("a", "b"),
    )
    (folder / CARD).write_text(card.to_toml())
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("training", [False, True])
def test_a_network_of_others_is_read_and_goes_on(tmp_path, layout, training):
    """Its scores are ONNX Runtime's; its normalisation, size and layout are kept."""
    base = model_of(small_net(layout), tmp_path / "base", layout, training)
    examples = toys(120, 11, classes=("a", "b"))
    found = train_model(
        examples, tmp_path / "out", replace(SETTINGS, base=str(base), epochs=1, head_epochs=0), quiet=True
    )
    assert found.card.training["agreement_with_base"] < 1e-5
    assert found.card.input == read_card(base).input
    assert len(check_model(found.model_folder)) == 1


@pytest.mark.filterwarnings("ignore")
def test_the_same_classes_keep_the_order_and_the_last_layer_of_the_base(tmp_path):
    """Whatever the alphabet says; each example counts for its own class."""
    from batchproc.training.neural import _labelled

    base = model_of(small_net(), tmp_path / "base")
    (base / CARD).write_text(read_card(base).to_toml().replace('"a",\n    "b",', '"b",\n    "a",'))
    examples = toys(120, 11, classes=("a", "b"))
    settings = replace(SETTINGS, base=str(base), epochs=1, resamples=2)
    card = train_model(examples, tmp_path / "out", settings, quiet=True).card
    assert (card.classes, card.training["last_layer"]) == (("b", "a"), "continued")
    assert set(card.training["base_on_the_same"]) > {"macro_f1"}
    truth = _labelled("train", examples, card.input, card.classes).truth
    np.testing.assert_array_equal(truth, examples.label == "a")


@pytest.mark.filterwarnings("ignore")
def test_an_operator_that_is_not_known_is_named(tmp_path):
    """As is an end that is no dense layer, and a file that is quantised."""
    from torch import nn

    class Erf(nn.Module):
        def forward(self, x):
            return torch.erf(x)

    base = model_of(small_net(last=nn.Sequential(Erf(), nn.Linear(5, 2))), tmp_path / "base")
    with pytest.raises(ModelError, match="the operator Erf cannot be trained further; known: Conv, BatchNorm"):
        train_model(toys(90, 0, classes=("a", "b")), tmp_path / "out", replace(SETTINGS, base=str(base)), quiet=True)
    base = model_of(small_net(last=nn.Sequential(nn.Linear(5, 2), nn.Tanh())), tmp_path / "other")
    with pytest.raises(ModelError, match="its last layer is Tanh; expected Gemm or Add or MatMul"):
        train_model(toys(90, 0, classes=("a", "b")), tmp_path / "out", replace(SETTINGS, base=str(base)), quiet=True)
    text = (base / CARD).read_text().replace("[files.float]", "[files.int8]").replace('"float"', '"int8"')
    (base / CARD).write_text(text)
    with pytest.raises(ModelError, match="no float variant in ONNX to continue from; there are: int8"):
        train_model(toys(90, 0, classes=("a", "b")), tmp_path / "out", replace(SETTINGS, base=str(base)), quiet=True)


def test_other_networks_by_name(tmp_path):
    """braai's VGG6 at a size of one's own; sizes that a network does not take are refused."""
    settings = replace(SETTINGS, network="vgg6", size=32, epochs=1)
    found = train_model(toys(100, 12), tmp_path / "out", settings, quiet=True)
    assert found.card.input == InputCard(size=32, normalisation="image-l2")
    with pytest.raises(UsageError, match="network realbogus: takes stamps of 31 pixels, not 32"):
        train_model(toys(100, 12), tmp_path / "a", replace(settings, network="realbogus"), quiet=True)
    with pytest.raises(UsageError, match="no network 'resnet'; there are: realbogus, two-scales, vgg6"):
        train_model(toys(100, 12), tmp_path / "b", replace(settings, network="resnet"), quiet=True)


def test_two_scales_of_a_stamp(tmp_path):
    """A network that sees what is around: from its stamps, all of them read, to 8 bits and to being continued."""
    from batchproc.training.gather import stamp_size

    settings = replace(SETTINGS, network="two-scales", epochs=6)
    assert stamp_size(settings) == 63
    with pytest.raises(UsageError, match=r"looks at scales \(1, 2\) of stamps prepared by noise-log, not min-max"):
        train_model(toys(100, 12), tmp_path / "a", replace(settings, normalisation="min-max"), quiet=True)
    made = train_model(toys(600, 12, size=63), tmp_path / "out", settings, quiet=True)
    assert made.card.input == InputCard(size=31, normalisation="noise-log", scales=(1, 2))
    some = toys(300, 13, size=63)
    model = load_model(made.model_folder)
    shown = model.predict(some.stamps)
    assert auc_pr(some.label == REAL, shown, prevalence=0.5) > 0.95
    blinkered = some.stamps.copy()
    blinkered[:, :, :16] = blinkered[:, :, 47:] = np.nan
    blinkered[:, :, :, :16] = blinkered[:, :, :, 47:] = np.nan
    assert np.abs(model.predict(blinkered) - shown).max() > 1e-3, "what is around is looked at"
    # Such toys are told apart so well that the threshold lies where 8 bits end: what crosses it says nothing.
    every = {"formats": ("onnx", "tflite", "edgetpu"), "tolerance": 0.05, "lost_tolerance": 1.0}
    quantise_model(made.model_folder, some.stamps, **every)
    assert np.abs(load_model(made.model_folder, variant="int8").predict(some.stamps) - shown).mean() < 0.05
    again = replace(settings, base=str(made.model_folder), epochs=1, network="realbogus")
    assert stamp_size(again) == 63
    assert train_model(some, tmp_path / "again", again, quiet=True).card.input.scales == (1, 2)


# --- The command line -------------------------------------------------------------------------------------------------


def test_from_the_command_line(tmp_path, capsys):
    """Options go before the file of settings; the model can be added; a second time is refused."""
    from batchproc.cli import main

    toys(300, 13).save(tmp_path / "set.npz")
    (tmp_path / "settings.toml").write_text('epochs = 30\ngroup = "group"\nresamples = 50\n')
    out = str(tmp_path / "out")
    line = ["train", str(tmp_path / "set.npz"), "--out", out, "--settings", str(tmp_path / "settings.toml"), "-q"]
    for extra, code in ((["--dry-run"], 0), (["--epochs", "2", "--name", "mine"], 0), ([], 2)):
        with pytest.raises(SystemExit) as ended:
            main([*line, *extra])
        assert ended.value.code == code
        said = capsys.readouterr()
        if "--dry-run" in extra:
            assert "would train: realbogus, at most 30 epochs" in said.out
            assert not (tmp_path / "out").exists()
    assert "--overwrite" in said.err
    assert tomllib.loads((tmp_path / "out/config.toml").read_text())["epochs"] == 2
    assert load_model(tmp_path / "out/model").name == "mine"
