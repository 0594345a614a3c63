"""Several models score a run in one pass: each stamp read once, each model's scores its own, and what fails said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from batchproc import open_catalogue, open_stamps
from batchproc.cli import main
from batchproc.distribute import chunks as module
from batchproc.distribute.chunks import Chunk
from batchproc.distribute.executors import SerialExecutor, WorkerDiedError
from batchproc.distribute.scoring import check_workers, classify_chunks, images_of_a_chunk, plan_chunks
from batchproc.errors import ConfigError, ModelError, StorageError, UsageError
from batchproc.io import catalogue as catalogue_module
from batchproc.io import stamps as stamps_module
from batchproc.io.cards import InputCard
from batchproc.io.index import CHUNK_ROWS, Place, read_index
from batchproc.io.models import Model, load_model
from batchproc.io.prepared import Prepared
from batchproc.io.run_folder import RunFolder
from batchproc.job import Steps, classify, run, unscored
from tests import _runs
from tests.io.test_models import make_model

STUBS = Steps(process=_runs.process, wisdom=_runs.no_wisdom, report=_runs.report)
SERIAL = {"cluster": "serial", "quiet": True}


class Dying(SerialExecutor):
    """Workers that die under one of the models."""

    def submit(self, function, *arguments, resources=None, priority=0):
        def call(chunk):
            if "deadly" in chunk.models:
                raise WorkerDiedError("died")
            return function(chunk)

        return super().submit(call, *arguments)


@pytest.fixture
def folder(tmp_path):
    """A finished run of 3, 40 and 33 candidates."""
    run(_runs.entries("n3", "n40", "n33"), tmp_path / "run", config=_runs.CONFIG, steps=STUBS, report=False, **SERIAL)
    return RunFolder(tmp_path / "run")


@pytest.fixture
def models(tmp_path):
    """Two of one recipe, one of another, and one of several classes and features."""
    features = InputCard(size=5, normalisation="none", layout="NHWC", features=("ref_distance", "fwhm"))
    other = InputCard(size=5, normalisation="none", channels=("ref", "difference", "new"))
    return [
        make_model(tmp_path / "a", name="a"),
        make_model(tmp_path / "b", name="b"),
        make_model(tmp_path / "c", name="c", input=other),
        make_model(tmp_path / "d", "classes", name="d", classes=("sn", "agn", "star"), input=features),
    ]


def names_of(models):
    return [str(model) for model in models]


def test_each_model_scores_as_if_it_were_alone(folder, models, monkeypatch):
    """The stamps are read once, and what models of one recipe look at is made once."""
    reads, made = [], []
    whole, prepare = stamps_module._read_all, InputCard.prepare
    monkeypatch.setattr(stamps_module, "_read_all", lambda *a: reads.append(sum(p.n for p in a[1])) or whole(*a))
    monkeypatch.setattr(InputCard, "prepare", lambda card, stamps: made.append(len(stamps)) or prepare(card, stamps))
    assert classify(folder.path, names_of(models), **SERIAL).candidates == 76
    assert sum(reads) == 76
    assert sum(made) == 3 * 76
    catalogue, stamps = open_catalogue(folder.path), open_stamps(folder.path)[:]
    monkeypatch.undo()
    for model in models[:3]:
        np.testing.assert_array_equal(catalogue[f"score_{model.name}"], load_model(model).predict(stamps))
    table = catalogue[["ref_distance", "fwhm"]].to_numpy()
    several = catalogue[["score_d_sn", "score_d_agn", "score_d_star"]].to_numpy()
    np.testing.assert_array_equal(several, load_model(models[3]).predict(stamps, table))
    assert not np.array_equal(catalogue["score_a"], catalogue["score_c"])


def test_only_what_is_lacking_is_scored(folder, models, monkeypatch):
    """A model that has scored an image does not look at it again, whoever else does."""
    assert classify(folder.path, names_of(models[:1]), **SERIAL).candidates == 76
    before = {path: path.stat().st_mtime_ns for path in folder.scores.rglob("*.parquet")}
    assert unscored(folder.path, names_of(models[:2])).lacking == {"a": 0, "b": 76}
    asked = []
    predict = Model.predict
    monkeypatch.setattr(Model, "predict", lambda model, *a, **k: asked.append(model.name) or predict(model, *a, **k))
    assert classify(folder.path, names_of(models[:3]), **SERIAL).candidates == 76
    assert set(asked) == {"b", "c"}
    assert classify(folder.path, names_of(models[:3]), **SERIAL).candidates == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.scores.rglob("*.parquet")}.items()


def test_images_that_lack_the_same_models_come_together(folder):
    """Chunks of whole images; each says who shall score it."""
    a, b = _runs.Model("a"), _runs.Model("b")
    first = next(plan_chunks(folder, [a], size=1))
    assert [place.image_id for place in first.places] == ["n3"]
    assert list(classify_chunks(folder, [first], SerialExecutor(), models=[a])) == [first]
    found = list(plan_chunks(folder, [a, b], size=50))
    assert [([place.image_id for place in chunk.places], chunk.models) for chunk in found] == [
        (["n40", "n33"], ("a", "b")),
        (["n3"], ("b",)),
    ]


def test_a_model_that_fails_costs_the_others_nothing(folder, models, monkeypatch):
    """Foreseen or a bug: their scores are written, the failure is said, and the same call tries again what lacks."""
    predict = Model.predict

    def fails(model, *a, **k):
        if model.name in ("b", "c"):
            raise ModelError("unfit") if model.name == "b" else KeyError("nobody thought of this")
        return predict(model, *a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "predict", fails)
        found = classify(folder.path, names_of(models), **SERIAL)
    assert (found.candidates, found.exit_code) == (76, 1)
    assert found.problems[0] == "scoring by b: unfit"
    assert "nobody thought of this" in found.problems[1]
    assert "Traceback" in found.problems[1]
    columns = [name for name in open_catalogue(folder.path) if name.startswith("score_")]
    assert columns == ["score_a", "score_d_sn", "score_d_agn", "score_d_star"]
    assert unscored(folder.path, names_of(models)).lacking == {"a": 0, "b": 76, "c": 76, "d": 0}
    assert classify(folder.path, names_of(models), **SERIAL).problems == ()
    with monkeypatch.context() as patch:
        patch.setattr(Model, "predict", fails)
        single = make_model(Path(models[1]).parent / "again", name="b", version="2")
        other = run(_runs.entries("n5"), folder.path.with_name("other"), config=_runs.CONFIG, steps=STUBS, **SERIAL)
        assert other.exit_code == 0
        with pytest.raises(ModelError, match="unfit"):
            classify(folder.path.with_name("other"), str(single), **SERIAL)


def test_a_model_under_which_workers_die_is_found(folder):
    """After the first death each scores by itself: the others' scores are there, and it is named."""
    models, failed = [_runs.Model("a"), _runs.Model("deadly"), _runs.Model("b")], {}
    chunks = list(plan_chunks(folder, models))
    done = list(classify_chunks(folder, chunks, Dying(), models=models, failed=failed))
    assert sorted(name for chunk in done for name in chunk.models) == ["a", "b"]
    assert list(failed) == ["deadly"]
    assert isinstance(failed["deadly"].error, WorkerDiedError)
    assert [name for name in open_catalogue(folder.path) if name.startswith("score_")] == ["score_a", "score_b"]


def test_a_model_that_has_failed_is_not_asked_again_where_workers_died(tmp_path):
    """What is left of a chunk is seen when its turn comes, also the second time."""

    class Fragile(SerialExecutor):
        """Workers that die under several models at once."""

        def submit(self, function, *arguments, resources=None, priority=0):
            def call(chunk):
                if len(chunk.models) > 1:
                    raise WorkerDiedError("died")
                asked.extend(chunk.models)
                return function(chunk)

            return super().submit(call, *arguments)

    names = [f"n{i}" for i in range(1, 11)]
    run(_runs.entries(*names), tmp_path / "run", config=_runs.CONFIG, steps=STUBS, report=False, **SERIAL)
    folder, models = RunFolder(tmp_path / "run"), [_runs.Model("a"), _runs.Model("broken")]
    asked, failed = [], {}
    chunks = list(plan_chunks(folder, models, size=1))
    done = list(classify_chunks(folder, chunks, Fragile(), models=models, failed=failed))
    assert (len(done), asked.count("a"), list(failed)) == (10, 10, ["broken"])
    assert asked.count("broken") < 5  # those that were under way already


def test_what_the_disk_refuses_is_no_models_fault(folder, models, monkeypatch):
    """It ends the pass."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalogue_module.pq, "write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        classify(folder.path, names_of(models), **SERIAL)


def test_features_alone_need_no_pixels(folder, monkeypatch):
    """Where no model looks at them, the stamps are not opened."""
    model = _runs.Model("forest")
    model.takes_stamps = False
    model.card = SimpleNamespace(input=SimpleNamespace(features=("fwhm", "scorr")))
    model.predict = lambda stamps, features, batch: features[:, 1] / 50 if stamps is None else pytest.fail("pixels")
    monkeypatch.setattr(stamps_module, "read_stamps_of", lambda *a: pytest.fail("opened"))
    assert list(classify_chunks(folder, plan_chunks(folder, [model]), SerialExecutor(), models=[model]))
    catalogue = open_catalogue(folder.path)
    np.testing.assert_allclose(catalogue["score_forest"], catalogue["scorr"] / 50, rtol=1e-6)


def test_no_more_than_a_piece_is_in_memory(folder, monkeypatch):
    """An image of many candidates is read in parts; the scores are the same."""
    monkeypatch.setattr(module.Chunk.pieces, "__defaults__", (CHUNK_ROWS,))
    seen = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda *a, **k: seen.append(read(*a, **k)) or seen[-1])
    model = _runs.Model("a")
    list(classify_chunks(folder, plan_chunks(folder, [model]), SerialExecutor(), models=[model]))
    assert [len(stamps) for stamps in seen] == [3, 32, 8, 32, 1]
    np.testing.assert_array_equal(np.concatenate(seen), open_stamps(folder.path)[:])
    catalogue = open_catalogue(folder.path)
    np.testing.assert_array_equal(catalogue["score_a"], catalogue["scorr"] / 100)
    chunk = Chunk(tuple(read_index(folder).places()))
    assert [part for piece in chunk.pieces(64) for part in piece.parts] == [slice(0, 3), slice(0, 40), slice(0, 33)]


@pytest.mark.parametrize("models", [1, 2, 5, 10, 20])
def test_files_of_scores_are_few_whoever_scores(models):
    """At 100,000 images at most one file for 20 images, packs and all, in one pass or one after the other."""
    images = 100_000
    packs = 5 * images // 500 + 25
    at_once = models * -(-images // images_of_a_chunk(images, models))
    in_turn = sum(-(-images // images_of_a_chunk(images, k)) for k in range(1, models + 1))
    assert at_once + packs <= images / 20
    assert in_turn + packs <= images / 20
    assert images_of_a_chunk(1999, models) == 1


def test_a_chunk_has_an_end_however_large_images_are(folder, monkeypatch):
    """Its scores are in memory until they are written."""
    places = [Place(f"i{k}", 20_000) for k in range(40)]
    index = SimpleNamespace(image_ids=tuple(place.image_id for place in places), place=places.__getitem__)
    monkeypatch.setattr("batchproc.io.index.read_index", lambda folder: index)
    monkeypatch.setattr("batchproc.distribute.scoring._MANY", 10)
    assert [len(chunk.places) for chunk in plan_chunks(folder, [_runs.Model("a")])] == [13, 13, 13, 1]


def test_a_run_scores_with_all_models_of_its_settings(tmp_path, models):
    """The first one is what the report ranks by; each is named once, in settings and on cards."""
    first, second, *_ = names_of(models)
    scoring = replace(_runs.CONFIG.classify, model=first, more_models=(second,))
    config = replace(_runs.CONFIG, classify=scoring)
    summary = run(_runs.entries("n3", "n4"), tmp_path / "run", config=config, steps=STUBS, **SERIAL)
    assert (summary.scored, summary.exit_code) == (7, 0)
    catalogue = open_catalogue(tmp_path / "run")
    np.testing.assert_array_equal(catalogue["score_a"], catalogue["score_b"])
    assert set(RunFolder(tmp_path / "run").models()) == {"a", "b"}
    assert type(config).from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="each once, and not `model` again"):
        replace(scoring, more_models=(first,))
    twin = make_model(tmp_path / "twin", name="a")
    with pytest.raises(UsageError, match="two models of the name a"):
        classify(tmp_path / "run", [first, str(twin)], **SERIAL)


def test_one_failing_model_of_a_run_is_a_problem_of_it(tmp_path):
    """The images are done, the others have scored, and the summary says which has not."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="stub", more_models=("unfit",)))
    steps = replace(STUBS, model=_runs.load_model)
    summary = run(_runs.entries("n3"), tmp_path / "run", config=config, steps=steps, **SERIAL)
    assert (summary.status.done, summary.scored, summary.exit_code) == (1, 3, 3)
    assert summary.problem.startswith("scoring by unfit: stamps of 9 pixels")


def test_the_verb_says_what_there_is_to_do_and_does_it(folder, models, capsys):
    """--dry-run scores nothing; again there is nothing left; the exit code is that of the pass."""
    asked = [word for model in models[:2] for word in ("--model", str(model))]

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main(["classify", str(folder.path), *asked, *words])
        return caught.value.code, capsys.readouterr().out

    assert call("--dry-run") == (0, "76 candidates\na: 76 to score\nb: 76 to score\n")
    assert not folder.scores.is_dir()
    assert call("--cluster", "serial", "-q") == (0, "76 candidates scored\n")
    assert call("--dry-run") == (0, "76 candidates\na: has scored all\nb: has scored all\n")
    assert call("--cluster", "serial", "-q")[1] == "nothing to score: these models have scored all candidates\n"


def test_tensors_are_made_once_for_a_recipe(models):
    """Features do not matter to it; another recipe is another tensor."""
    stamps = np.random.default_rng(0).normal(size=(4, 3, 9, 9)).astype(np.float32)
    batch = Prepared(stamps)
    a, b, c, d = (load_model(model) for model in models)
    assert batch.tensor(a.card.input)[0] is batch.tensor(b.card.input)[0]
    assert batch.tensor(a.card.input)[0] is not batch.tensor(c.card.input)[0]
    assert batch.tensor(replace(d.card.input, features=()))[0] is batch.tensor(d.card.input)[0]
    np.testing.assert_array_equal(a.predict(batch), a.predict(stamps, batch=3))


class Cluster(SerialExecutor):
    """Workers elsewhere, with or without a GPU."""

    here = False

    def __init__(self, has="GPU"):
        super().__init__()
        self.has = has

    def offers(self, resource):
        return resource == self.has


def test_workers_prove_that_they_have_the_device():
    """Before images are done: a resource that nobody offers, and a worker that cannot open the model."""
    model = _runs.Model("a")
    model.open = lambda: None
    assert check_workers([model], "gpu", Cluster())
    assert check_workers([model], "cpu", Cluster(has=""))
    with pytest.raises(UsageError, match="no worker offers the resource GPU"):
        check_workers([model], "gpu", Cluster(has=""))

    def absent():
        raise ModelError("no GPU answers")

    model.open = absent
    with pytest.raises(ModelError, match="no GPU answers"):
        check_workers([model], "gpu", Cluster())
