"""8-bit versions of models: what is on the card was measured on stamps of its own, and what harms is not written."""

from __future__ import annotations

import builtins
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from batchproc.cli import cli
from batchproc.errors import ModelError, UsageError
from batchproc.io import quantise
from batchproc.io.backends import LITERT, litert
from batchproc.io.cards import InputCard, ModelCard, read_card
from batchproc.io.model_checks import check_model, set_default
from batchproc.io.models import file_hash, find_model, load_model
from batchproc.io.quantise import FORMATS, agreement, quantise_model
from tests._real import data
from tests.io._networks import Builder, plain

VARIANTS = ("int8", "int8-tflite", "edgetpu")


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """No test sees, or touches, the models of whoever runs it; and none waits for speeds to be measured well."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(quantise, "stamps_per_second", lambda model, stamps: 1234.4)


def model_of(folder, net, **changes):
    """A model folder around a network."""
    folder.mkdir(parents=True)
    net.save(folder / "model.onnx")
    card = ModelCard(
        name="toy",
        version="1",
        description="Weights drawn at random.",
        licence="BSD-3-Clause",
        threshold=0.5,
        default_variant="float",
        input=InputCard(size=13, normalisation="none"),
        files={"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}},
    )
    (folder / "card.toml").write_text(replace(card, **changes).to_toml())
    return folder


@pytest.fixture
def toy(tmp_path):
    """A model of stamps alone, in float."""
    return model_of(tmp_path / "toy", plain())


def stamps_of(n=300, seed=0):
    stamps = np.random.default_rng(seed).normal(size=(n, 3, 13, 13)).astype(np.float32)
    stamps[-5:] = np.nan  # cannot be scored
    return stamps


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Agreement --------------------------------------------------------------------------------------------------------


def test_agreement_is_what_it_says():
    """Differences of absolute values, and who crosses the threshold; what either did not score is left out."""
    a = np.array([0.1, 0.6, 0.4, 0.9, np.nan, 0.2], np.float32)
    b = np.array([0.2, 0.4, 0.5, 0.9, 0.3, np.nan], np.float32)
    found = agreement(a, b, 0.5)
    assert (found.n_stamps, found.above, found.lost, found.gained) == (4, 2, 1, 1)
    assert found.largest_difference == pytest.approx(0.2)
    assert found.mean_difference == pytest.approx(0.1)
    assert found.auc_pr is None


def test_with_labels_both_have_an_auc_pr():
    """That of scikit-learn at 1:1; stamps without a label are not counted in it."""
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels = np.array(["real", "bogus", ""] * 40)
    scores = np.clip(0.4 * (labels == "real") + random.uniform(0, 0.6, 120), 0, 1).astype(np.float32)
    worse = np.clip(scores + random.normal(0, 0.2, 120), 0, 1).astype(np.float32)
    found = agreement(scores, worse, 0.5, labels)
    known = labels != ""
    expected = [sklearn.average_precision_score(labels[known] == "real", s[known]) for s in (scores, worse)]
    assert [found.auc_pr_float, found.auc_pr] == pytest.approx(expected, abs=1e-6)
    assert found.auc_pr < found.auc_pr_float


def test_of_several_classes_a_flip_is_another_most_probable_one():
    """And the AUC-PR is the mean over the classes that occur."""
    a = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.5, 0.4]], np.float32)
    b = np.array([[0.3, 0.6, 0.1], [0.2, 0.5, 0.3], [0.1, 0.5, 0.4]], np.float32)
    found = agreement(a, b, 0.5, ["sn", "agn", "agn"], ("sn", "agn", "star"))
    assert (found.above, found.lost, found.gained) == (3, 1, 1)
    assert found.auc_pr_float == 1.0
    assert found.auc_pr < 1.0


# --- The card ---------------------------------------------------------------------------------------------------------


def test_every_format_is_a_variant_that_runs(toy):
    """Each its own file with its own hash, its own agreement, and the default is what it was."""
    found = quantise_model(toy, stamps_of(), formats=tuple(FORMATS))
    card = read_card(toy)
    assert tuple(found) == tuple(card.quantisation) == VARIANTS
    assert tuple(card.files) == ("float", *VARIANTS)
    assert card.default_variant == "float"
    assert card.speed == dict.fromkeys(("float", *VARIANTS), 1234)
    assert card.files["int8-tflite"]["layout"] == "NHWC"
    assert not {path.name for path in toy.iterdir()} - {file["path"] for file in card.files.values()} - {"card.toml"}
    assert len(check_model(toy)) == 4 + 3
    assert load_model(toy, variant="edgetpu").provider == LITERT
    exact = load_model(toy).predict(stamps_of(50, 1))
    for variant in VARIANTS:
        scores = load_model(toy, variant=variant).predict(stamps_of(50, 1))
        assert np.isnan(scores[-5:]).all()
        assert np.nanmean(np.abs(scores - exact)) < 0.01  # one lies beyond the range that was calibrated on


def test_agreement_is_measured_on_stamps_that_were_not_calibrated_on(toy, monkeypatch):
    """Half are calibrated on; the numbers on the card are those of the other half."""
    seen, make = [], FORMATS["tflite"].make

    def spying(path, layout, tensor):
        seen.append(tensor)
        return make(path, layout, tensor)

    monkeypatch.setitem(FORMATS, "tflite", replace(FORMATS["tflite"], make=spying))
    stamps = stamps_of(300)
    found = quantise_model(toy, stamps, formats=("tflite",))["int8-tflite"]
    (calibrated,) = seen
    used = np.array([any(np.array_equal(stamp, one) for one in calibrated) for stamp in stamps])
    rest = ~used & np.isfinite(stamps).all(axis=(1, 2, 3))
    assert (used.sum(), rest.sum(), found.n_stamps) == (147, 148, 148)
    exact, scores = (load_model(toy, variant=v).predict(stamps[rest]) for v in ("float", "int8-tflite"))
    again = agreement(exact, scores, 0.5)
    assert again == found
    noted = read_card(toy).quantisation["int8-tflite"]
    assert (noted["n_calibrated_on"], noted["n_stamps"]) == (147, 148)
    assert noted["mean_difference"] == found.mean_difference


def test_the_same_stamps_and_seed_give_the_same_files(toy, tmp_path):
    """Byte for byte; made again, they take the place of the old ones."""
    other = tmp_path / "other"
    shutil.copytree(toy, other)
    for folder in (toy, other):
        quantise_model(folder, stamps_of(), formats=("tflite", "onnx"))
    assert contents(toy) == contents(other)
    quantise_model(toy, stamps_of(300, 7), formats=("tflite",), seed=3)
    assert contents(toy)["model_int8.tflite"] != contents(other)["model_int8.tflite"]
    assert contents(toy)["model_int8.onnx"] == contents(other)["model_int8.onnx"]
    assert len(check_model(toy)) == 5


def test_labels_are_measured_by(toy):
    """AUC-PR in float and in integers is on the card, with the mixture that it holds for."""
    stamps = stamps_of()
    labels = np.where(np.arange(300) % 2, "real", "bogus")
    quantise_model(toy, stamps, formats=("tflite",), labels=labels, auc_pr_tolerance=1.0)
    noted = read_card(toy).quantisation["int8-tflite"]
    assert {"auc_pr", "auc_pr_float"} <= set(noted)
    assert noted["prevalence"] == 0.5


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_what_harms_is_not_written(toy, name):
    """Beyond the tolerance of the mean difference: not a byte of the folder changes."""
    before = contents(toy)
    with pytest.raises(ModelError, match=r"differs from float by 0\.0\d+ on average over .* allowed: 1e-07. Nothing"):
        quantise_model(toy, stamps_of(), formats=(name,), tolerance=1e-7)
    assert contents(toy) == before


def test_what_loses_auc_pr_is_not_written(toy, monkeypatch):
    """Though scores differ little on average."""
    labels = np.where(np.arange(300) % 2, "real", "bogus")
    before = contents(toy)
    values = iter([0.99, 0.9])
    monkeypatch.setattr(quantise, "auc_pr", lambda real, scores, prevalence: next(values))
    with pytest.raises(ModelError, match=r"AUC-PR at 1:1 of 0\.9000 where float has 0\.9900.* lost: 0\.005\. Nothing"):
        quantise_model(toy, stamps_of(), formats=("tflite",), labels=labels)
    assert contents(toy) == before


def test_what_loses_many_at_the_threshold_is_not_written(toy, monkeypatch):
    """Though scores differ little on average; of few above it, a share says nothing."""
    stamps = stamps_of()
    scores = load_model(toy).predict(stamps)
    card = read_card(toy)
    (toy / "card.toml").write_text(replace(card, threshold=float(np.nanmedian(scores))).to_toml())
    before = contents(toy)
    real = quantise.agreement

    def worse(reference, scores, *args):
        return real(reference, reference - np.float32(0.009), *args)

    monkeypatch.setattr(quantise, "agreement", worse)
    with pytest.raises(
        ModelError, match=r"int8-tflite loses \d+ of \d+ stamps at the threshold, .*; allowed: 0.1%.*Noth"
    ):
        quantise_model(toy, stamps, formats=("tflite",), lost_tolerance=0.001)
    assert contents(toy) == before
    (toy / "card.toml").write_text(replace(card, threshold=float(np.sort(scores[:-5])[-20])).to_toml())
    found = quantise_model(toy, stamps, formats=("tflite",), lost_tolerance=0)["int8-tflite"]
    assert 0 < found.lost <= found.above < quantise.FEWEST_ABOVE


def test_an_operator_that_cannot_be_written_is_named_and_nothing_is_written(tmp_path):
    """TFLite lacks it here, ONNX has it."""
    net = Builder()
    net.add("Erf")
    net.add("Flatten")
    net.dense(1)
    net.add("Sigmoid")
    folder = model_of(tmp_path / "erf", net)
    before = contents(folder)
    with pytest.raises(ModelError, match=r"model\.onnx: the operator Erf cannot be written to TFLite"):
        quantise_model(folder, stamps_of(), formats=("onnx", "tflite"))
    assert contents(folder) == before


def test_too_few_stamps_are_refused(toy):
    """Blank ones are not counted."""
    with pytest.raises(ModelError, match="127 usable stamps; at least 128 are needed, half of them to calibrate"):
        quantise_model(toy, stamps_of(132))
    quantise_model(toy, stamps_of(133), formats=("tflite",))


def test_what_comes_with_batchproc_is_not_written_to():
    """With what to type instead."""
    for change in (lambda: quantise_model("realbogus", stamps_of()), lambda: set_default("realbogus", "int8")):
        with pytest.raises(ModelError, match=r"comes with batchproc.*\n  batchproc models add realbogus --name my-"):
            change()


def test_a_variant_of_that_name_that_was_made_elsewhere_is_left_alone(toy):
    """It may be better than ours."""
    card = read_card(toy)
    (toy / "theirs.onnx").write_bytes((toy / "model.onnx").read_bytes())
    files = {**card.files, "int8": {"path": "theirs.onnx", "sha256": file_hash(toy / "theirs.onnx")}}
    (toy / "card.toml").write_text(replace(card, files=files).to_toml())
    with pytest.raises(ModelError, match=r"has a variant int8 that was not made here \(theirs.onnx\)"):
        quantise_model(toy, stamps_of())


def test_models_that_take_features_or_have_no_float_file_are_refused(tmp_path, toy):
    """Each with what is there instead."""
    wanted = InputCard(size=13, normalisation="none", features=("fwhm",))
    with pytest.raises(ModelError, match="takes fwhm; only models of stamps alone"):
        quantise_model(model_of(tmp_path / "features", plain(), input=wanted), stamps_of())
    card = read_card(toy)
    quantise_model(toy, stamps_of(), formats=("tflite",))
    files = {"float": read_card(toy).files["int8-tflite"]}
    (toy / "card.toml").write_text(replace(card, files=files).to_toml())
    with pytest.raises(ModelError, match=r"no float variant in ONNX to start from; there are: float \(model_int8"):
        quantise_model(toy, stamps_of())
    with pytest.raises(UsageError, match="format coreml: known: onnx, tflite, edgetpu"):
        quantise_model(toy, stamps_of(), formats=("coreml",))


def changing(toy, monkeypatch, **changes):
    """Someone else writes to the card while versions are being made."""
    make = FORMATS["tflite"].make

    def made(*args):
        (toy / "card.toml").write_text(replace(read_card(toy), **changes).to_toml())
        return make(*args)

    monkeypatch.setitem(FORMATS, "tflite", replace(FORMATS["tflite"], make=made))


def test_what_is_written_to_the_card_meanwhile_stays(toy, monkeypatch):
    """Measuring takes minutes."""
    changing(toy, monkeypatch, description="Of better words.")
    monkeypatch.setattr(quantise, "stamps_per_second", lambda model, stamps: set_default(toy, "int8-tflite") or 1.0)
    quantise_model(toy, stamps_of(), formats=("tflite",))
    card = read_card(toy)
    assert (card.description, card.default_variant) == ("Of better words.", "int8-tflite")
    assert set(card.speed) == {"float", "int8-tflite"}


def test_what_was_measured_of_another_model_is_not_written(toy, monkeypatch):
    """The threshold has been changed meanwhile."""
    changing(toy, monkeypatch, threshold=0.9)
    with pytest.raises(ModelError, match=r"the threshold were changed while .* give the same command again"):
        quantise_model(toy, stamps_of(), formats=("tflite",))
    assert set(contents(toy)) == {"model.onnx", "card.toml"}


def test_files_and_card_change_together(toy):
    """Where one of them cannot be written, none is."""
    quantise_model(toy, stamps_of(), formats=("onnx",))
    (toy / "model_int8.tflite" / "in the way").mkdir(parents=True)
    before = {path.name: path.read_bytes() for path in toy.iterdir() if path.is_file()}
    with pytest.raises(OSError):  # noqa: PT011, the words are those of the system
        quantise_model(toy, stamps_of(300, 7), formats=("onnx", "tflite"), seed=3)
    assert {path.name: path.read_bytes() for path in toy.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(("missing", "format_"), [("onnx", "onnx"), ("onnx", "tflite"), ("ai_edge_litert", "tflite")])
def test_what_is_not_installed_is_said(toy, monkeypatch, missing, format_):
    """With the line that installs it."""
    real = builtins.__import__

    def without(name, *args, **more):
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {missing!r}")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"pip install 'batchproc\[quantise\]'"):
        quantise_model(toy, stamps_of(), formats=(format_,))


def test_without_litert_the_other_variants_are_checked_and_timed(toy, monkeypatch):
    """What cannot be run is said; where nothing can be, that is an error."""
    quantise_model(toy, stamps_of(), formats=("tflite",))
    monkeypatch.setattr(litert, "_RUNTIMES", ("litert_that_is_not_there",))
    lines = check_model(toy)
    assert lines[0].startswith("float: model.onnx is the file on the card, runs on CPU")
    assert lines[1].startswith(
        "int8-tflite: model_int8.tflite is the file on the card, not run: neither ai-edge-litert"
    )
    quantise_model(toy, stamps_of(), formats=("onnx",))
    assert set(read_card(toy).speed) == {"float", "int8"}
    card = read_card(toy)
    alone = {"int8-tflite": card.files["int8-tflite"]}
    (toy / "card.toml").write_text(replace(card, files=alone, default_variant="int8-tflite").to_toml())
    with pytest.raises(ModelError, match=r"pip install 'batchproc\[litert\]'"):
        check_model(toy)


# --- Which is used, and where -----------------------------------------------------------------------------------------


def test_the_default_can_be_chosen(toy):
    """One that runs here; another is refused and nothing changes."""
    quantise_model(toy, stamps_of(), formats=("tflite",))
    set_default(toy, "int8-tflite")
    assert load_model(toy).variant == "int8-tflite"
    with pytest.raises(ModelError, match="no variant 'int4'; there are: float, int8-tflite"):
        set_default(toy, "int4")
    assert read_card(toy).default_variant == "int8-tflite"


def test_the_file_for_the_edge_tpu_is_one_that_its_compiler_would_take(toy, monkeypatch):
    """All of 8 bits, batch 1, known operators; and it is run there by nothing else."""
    quantise_model(toy, stamps_of(), formats=("edgetpu", "tflite"))
    lines = check_model(toy, "edgetpu")
    assert lines[0].startswith("edgetpu: model_edgetpu.tflite is all of 8 bits, batch 1, 6 operators that the Edge TPU")
    assert "int8-tflite: model_int8.tflite is not for the Edge TPU: input stamps has an open batch" in lines[1]
    assert lines[2].startswith(f"to run it there: edgetpu_compiler {toy / 'model_edgetpu.tflite'}")
    with pytest.raises(ModelError, match=r"expected a \.tflite file from edgetpu_compiler"):
        load_model(toy, device="edgetpu")
    # What the compiler makes carries its mark, and runs nowhere but on the device.
    monkeypatch.setattr(litert, "DELEGATE", "libedgetpu_that_is_not_there.so.1")
    compiled = toy / "model_edgetpu_edgetpu.tflite"
    compiled.write_bytes((toy / "model_edgetpu.tflite").read_bytes() + b"edgetpu-custom-op")
    card = read_card(toy)
    files = {**card.files, "compiled": {**card.files["edgetpu"], "path": compiled.name, "sha256": file_hash(compiled)}}
    (toy / "card.toml").write_text(replace(card, files=files).to_toml())
    model = load_model(toy, device="edgetpu")
    assert model.variant == "compiled"
    with pytest.raises(ModelError, match=r"libedgetpu_that_is_not_there.so.1 cannot be loaded"):
        model.predict(stamps_of(3))


# --- By command -------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli, ["models", *map(str, arguments)], catch_exceptions=False)


def test_the_verb_writes_what_it_prints(toy, tmp_path):
    """From an .npz of labelled stamps; then the default is changed."""
    stamps = stamps_of()
    np.savez(tmp_path / "some.npz", stamps=stamps, real=np.arange(300) % 2 == 0)
    options = ("--auc-pr-tolerance", "1", "--format", "tflite", "--format", "onnx")
    found = run("quantise", toy, "--stamps", tmp_path / "some.npz", *options)
    assert found.exit_code == 0
    lines = found.output.splitlines()
    card = read_card(toy)
    for line, variant in zip(lines, ("int8-tflite", "int8"), strict=False):
        noted = card.quantisation[variant]
        assert line.startswith(f"{variant} against float: largest difference {noted['largest_difference']:.3f}, mean ")
        assert line.endswith(f"AUC-PR at 1:1 {noted['auc_pr']:.4f}, in float {noted['auc_pr_float']:.4f}")
    assert lines[2].endswith("of this machine: float 1234, int8-tflite 1234, int8 1234")
    assert run("default", toy, "int8").exit_code == 0
    assert read_card(toy).default_variant == "int8"


def test_a_copy_of_what_comes_with_batchproc_can_be_quantised():
    """By its own name."""
    assert run("add", "realbogus", "--name", "mine").exit_code == 0
    random = np.random.default_rng(0)
    stamps = random.normal(size=(200, 3, 31, 31)).astype(np.float32)
    stamps[::2, [0, 2], 15, 15] += 30
    found = quantise_model("mine", stamps, formats=("tflite", "edgetpu"))
    assert all(each.mean_difference < 0.01 for each in found.values())
    card = read_card(find_model("mine"))
    assert (card.name, set(card.files)) == ("mine", {"float", *VARIANTS})


@pytest.mark.realdata
def test_braai_in_integers_agrees_on_real_alerts(tmp_path):
    """Calibrated on half of them, measured on the others: no one crosses the threshold."""
    from batchproc.io.braai import add_braai

    folder = add_braai(data("models") / "d6_m7.h5")
    with np.load(data("alerts") / "ztf_triplets.npz") as alerts:
        stamps = alerts["triplets"].transpose(0, 3, 1, 2)
    found = quantise_model(folder, stamps, formats=("tflite", "edgetpu"))
    for each in found.values():
        assert each.n_stamps == 107
        assert each.mean_difference < 0.006
        assert each.largest_difference < 0.06
        assert each.lost + each.gained == 0
