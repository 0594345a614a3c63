"""Fitting, exporting and quantising, on stamps that a child could tell apart. Needs the extra ``train``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from batchproc.errors import ModelError, UsageError
from batchproc.io.cards import InputCard, ModelCard, read_card
from batchproc.io.model_checks import check_model
from batchproc.io.models import file_hash, load_model
from batchproc.io.quantise import agreement, quantise_model
from batchproc.learning.evaluate import auc_roc
from batchproc.training.examples import Examples

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: train)")

INPUT = InputCard(size=31, normalisation="noise-log")


def toy_stamps(n, seed):
    """Stars in new against hot pixels in new, in noise; sky and gain differ from stamp to stamp."""
    random = np.random.default_rng(seed)
    stamps = random.normal(size=(n, 3, 39, 39))
    real = random.uniform(size=n) < 0.5
    y, x = np.mgrid[:39, :39] - 19
    for i in range(n):
        width = random.uniform(1.0, 2.2) if real[i] else 0.3
        dx, dy = random.uniform(-0.5, 0.5, 2)
        profile = np.exp(-((x - dx) ** 2 + (y - dy) ** 2) / (2 * width**2))
        stamps[i, 0] += random.uniform(20, 200) * profile / np.sqrt((profile**2).sum())
    stamps[:, 2] = stamps[:, 0] - stamps[:, 1]
    return (stamps * random.uniform(0.5, 50, (n, 1, 1, 1))).astype(np.float32), real


@pytest.fixture(scope="module")
def fitted():
    """A network fitted for two epochs, and what it was fitted to."""
    from batchproc.training.fit import FitConfig, Labelled, fit
    from batchproc.training.network import RealBogusNet

    torch.set_num_threads(1)
    stamps, real = toy_stamps(1500, 0)
    tensor, _ = INPUT.prepare(stamps)
    train, valid = Labelled(tensor[:1000], real[:1000]), Labelled(tensor[1000:], real[1000:])

    def make():
        torch.manual_seed(0)
        net = RealBogusNet()
        return net, fit(net, train, valid, FitConfig(epochs=4), progress=False)

    return make


@pytest.fixture(scope="module")
def folder(fitted, tmp_path_factory):
    """The fitted network as a model folder with both variants."""
    from batchproc.training.fit import export_onnx

    path = tmp_path_factory.mktemp("model")
    export_onnx(fitted()[0], path / "model.onnx", 31, INPUT.depth)
    files = {"float": {"path": "model.onnx", "sha256": file_hash(path / "model.onnx")}}
    card = ModelCard("toy", "1", "toy", "none", 0.5, "float", INPUT, files)
    (path / "card.toml").write_text(card.to_toml())
    quantise_model(path, toy_stamps(300, 2)[0], tolerance=0.05)
    return path


def test_it_learns_and_repeats(fitted):
    """Stars from hot pixels within four epochs; the same seed gives the same weights."""
    (net, history), (again, _) = fitted(), fitted()
    assert history.valid_auc_pr[history.best_epoch] > 0.99
    assert history.valid_loss[history.best_epoch] == min(history.valid_loss)
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_what_is_written_is_what_was_fitted(fitted, folder):
    """ONNX Runtime's scores are PyTorch's, for any number of stamps."""
    from batchproc.training.fit import predict

    stamps, real = toy_stamps(70, 1)
    expected = 1 / (1 + np.exp(-predict(fitted()[0], INPUT.prepare(stamps)[0])))
    scores = load_model(folder).predict(stamps, batch=32)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert auc_roc(real, scores) > 0.99


def test_int8_agrees_and_says_how_well(folder):
    """Its own file with its own hash on the card, its agreement measured, and it scores alike."""
    card = read_card(folder)
    assert set(card.files) == {"float", "int8"}
    assert card.default_variant == "float"
    assert card.quantisation["int8"]["n_stamps"] == 150  # half of them were calibrated on
    assert card.quantisation["int8"]["mean_difference"] < 0.05
    assert len(check_model(folder)) == 3
    stamps, real = toy_stamps(200, 3)
    scores = load_model(folder, variant="int8").predict(stamps)
    assert auc_roc(real, scores) > 0.99
    found = agreement(load_model(folder).predict(stamps), scores, 0.5)
    assert found.mean_difference < 0.05
    assert found.n_stamps == 200


def test_scores_do_not_depend_on_the_batch(folder):
    """Bytes repeat, however the stamps are divided."""
    stamps, _ = toy_stamps(100, 4)
    for variant in ("float", "int8"):
        model = load_model(folder, variant=variant)
        np.testing.assert_array_equal(model.predict(stamps, batch=256), model.predict(stamps, batch=17))


def test_a_quantised_model_that_disagrees_is_not_kept(folder):
    """Nor is one that was calibrated on next to nothing."""
    card = (folder / "card.toml").read_text()
    with pytest.raises(ModelError, match="int8 differs from float by"):
        quantise_model(folder, toy_stamps(200, 5)[0], tolerance=0.0)
    with pytest.raises(ModelError, match="10 usable stamps; at least 128"):
        quantise_model(folder, toy_stamps(10, 5)[0])
    assert (folder / "card.toml").read_text() == card


def test_the_eight_orientations():
    """All different, and each an isometry of the square."""
    from batchproc.training.fit import dihedral

    stamps = torch.arange(2 * 3 * 25.0).reshape(2, 3, 5, 5)
    turned = [dihedral(stamps, k) for k in range(8)]
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    for t in turned:
        assert torch.equal(t[..., 2, 2], stamps[..., 2, 2])
        assert torch.equal(t.flatten(2).sort().values, stamps.flatten(2))


def test_exchanging_the_epochs():
    """What appeared has vanished; twice is nothing; the others stay."""
    from batchproc.training.fit import swap_epochs

    stamps = torch.randn(4, 3, 5, 5)
    which = torch.tensor([True, False, True, False])
    swapped = swap_epochs(stamps, which)
    assert torch.equal(swapped[1], stamps[1])
    assert torch.equal(swapped[0, 0], stamps[0, 1])
    assert torch.equal(swapped[0, 2], -stamps[0, 2])
    assert torch.equal(swap_epochs(swapped, which), stamps)


def test_classes_count_alike_whatever_their_numbers():
    """Repeating the bogus ones changes nothing: scores are probabilities at 1:1."""
    from batchproc.training.fit import balanced_loss

    logits = torch.tensor([1.0, -0.5, 0.3])
    real = np.array([True, False, False])
    once = balanced_loss(logits[:, None], real, real)
    more, truth = torch.cat([logits, logits[1:]]), np.append(real, real[1:])
    assert torch.allclose(once, balanced_loss(more[:, None], truth, truth))


@pytest.mark.parametrize("good", [0, 1])
def test_a_loss_that_is_no_number_ends_it(monkeypatch, good):
    """The weights from before are kept; where there are none, the error says what to set."""
    from batchproc.training import fit

    net, whole, losses = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1)), fit._loss, []

    def diverging(*arguments):
        losses.append(whole(*arguments))
        return losses[-1] * (1 if len(losses) <= 3 * good else torch.nan)  # of an epoch: two steps and the validation

    monkeypatch.setattr(fit, "_loss", diverging)
    part = fit.Labelled(np.ones((32, 3, 1, 1), np.float32), np.arange(32) % 2 == 0)
    config = fit.FitConfig(epochs=5)
    if not good:
        with pytest.raises(UsageError, match="is nan after the first epoch"):
            fit.fit(net, part, part, config, progress=False)
        return
    history = fit.fit(net, part, part, config, progress=False)
    assert (history.best_epoch, len(history.valid_loss)) == (0, 2)
    assert np.isnan(history.valid_auc_pr[1])
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("balance", ["none", "weights", "sampling"])
@pytest.mark.parametrize("n_known", [0, 300])
def test_answers_are_learnt_in_place_of_the_truth(balance, n_known):
    """Told the opposite by another network it learns the opposite, graded as it is told; of the others, the truth."""
    from batchproc.training import fit

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    tensor = random.standard_normal((600 + n_known, 3, 1, 1)).astype(np.float32)
    answered = np.arange(len(tensor)) >= n_known
    tensor[:, 1, 0, 0] = np.where(answered, 2.0, -2.0)  # tells which is which
    truth = tensor[:, 0, 0, 0] > 0
    graded = np.where(truth, 0.2, 0.7).astype(np.float32)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    config = fit.FitConfig(epochs=40, batch=32, balance=balance, swap=False, augment=False, learning_rate=0.02)
    taught = fit.Labelled(tensor, truth, answer=np.where(answered, graded, np.float32(np.nan)))
    fit.fit(net, taught, fit.Labelled(tensor, np.where(answered, ~truth, truth)), config, progress=False)
    score = 1 / (1 + np.exp(-fit.predict(net, tensor)))
    for which in (truth, ~truth):
        assert np.median(score[which & answered]) == pytest.approx(graded[which][0], abs=0.1)
        if n_known:
            assert np.median(score[which & ~answered]) == pytest.approx(float(truth[which][0]), abs=0.1)


def test_answers_that_are_not_for_such_a_network_are_refused(tmp_path):
    """Before anything is fitted."""
    from batchproc.training.neural import learn
    from batchproc.training.settings import TrainSettings
    from batchproc.training.taught import Taught

    stamps, label = np.random.default_rng(0).normal(size=(40, 3, 33, 33)).astype(np.float32), ["real", "bogus"] * 20
    some = Examples(stamps, np.array(label), pd.DataFrame({"x": np.zeros(40)}))
    taught = Taught(np.zeros((5, 6, 31, 31), np.float16), np.zeros(5, np.float32))
    with pytest.raises(UsageError, match=r"answers to tensors \(6, 31, 31\) .* takes \(3, 31, 31\)"):
        learn(some, some, classes=("real",), folder=tmp_path, settings=TrainSettings(), quiet=True, taught=taught)


@pytest.mark.parametrize("balance", ["weights", "sampling"])
@pytest.mark.parametrize(("n_known", "n_answered"), [(40, 100), (40, 20), (40, 0), (0, 40)])
def test_an_epoch_has_all_that_is_known_and_as_many_answers(balance, n_known, n_answered):
    """Not the same ones each time; and all the answers where there is nothing else."""
    from batchproc.training.fit import _order

    truth, known = np.arange(n_known + n_answered) % 3 == 0, np.arange(n_known + n_answered) < n_known
    draws = torch.Generator().manual_seed(1)
    seen = [_order(truth, known, balance, draws).numpy() for _ in range(2)]
    for rows in seen:
        answered = rows[rows >= n_known]
        assert (rows < n_known).sum() == n_known
        assert len(answered) == min(n_answered, n_known or n_answered)
        assert len(set(answered)) == len(answered)
        if balance == "weights":
            assert len(set(rows)) == len(rows)
    if n_answered > n_known > 0:
        assert set(seen[0][seen[0] >= n_known]) != set(seen[1][seen[1] >= n_known])


def test_what_is_known_and_what_is_answered_are_learnt_together():
    """Rows of the second follow those of the first, in whatever order they are asked for."""
    from batchproc.training.neural import Joined

    first, second = (np.arange(n * 2, dtype=dtype).reshape(n, 2, 1, 1) for n, dtype in ((5, "f4"), (3, "f2")))
    joined, whole = Joined(first, second), np.concatenate([first, second])
    assert len(joined) == 8
    for rows in (np.array([7, 0, 5, 4]), np.array([1]), np.array([6, 6]), slice(3, 7), slice(None)):
        np.testing.assert_array_equal(joined[rows], whole[rows])
        assert joined[rows].dtype == np.float32


def test_epochs_are_swapped_at_every_scale():
    """New for reference, the difference negated; twice is as before."""
    from batchproc.training.fit import swap_epochs

    stamps = torch.randn(4, 6, 3, 3)
    which = torch.tensor([True, False, True, False])
    found = swap_epochs(stamps, which)
    assert torch.equal(found[1::2], stamps[1::2])
    sign = torch.tensor([1, 1, -1, 1, 1, -1])[:, None, None]
    assert torch.equal(found[::2], stamps[::2][:, [1, 0, 2, 4, 3, 5]] * sign)
    assert torch.equal(swap_epochs(found, which), stamps)


def test_metrics_carry_their_mixture_and_their_intervals(folder):
    """A table that could be misread is not written."""
    from batchproc.training.report import measure

    stamps, real = toy_stamps(300, 6)
    scores = load_model(folder).predict(stamps)
    scores[:5] = np.nan
    table = measure("toys", "all", real, scores, threshold=0.5, groups=np.arange(300) % 10, resamples=50)
    assert table["n_real"] + table["n_bogus"] == 295
    assert table["n_not_scored"] == 5
    assert table["prevalence"] == 0.5
    for name in ("auc_pr", "auc_roc", "completeness", "bogus_removed", "bogus_removed_at_99_completeness"):
        low, high = table[f"{name}_interval"]
        assert low <= table[name] <= high
    assert table["precision_at_1_to_100"] >= table["precision_at_1_to_10000"]


def test_quantising_needs_a_float_variant(folder, tmp_path):
    """There is nothing to start from otherwise."""
    card = read_card(folder)
    files = {"int8": card.files["int8"]}
    (tmp_path / "card.toml").write_text(replace(card, files=files, default_variant="int8").to_toml())
    with pytest.raises(ModelError, match="no float variant in ONNX to start from"):
        quantise_model(tmp_path, toy_stamps(10, 0)[0])
