"""One data frame over the parts of a run, in step with the stamps, with scores beside it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from batchproc import open_catalogue, open_stamps
from batchproc.errors import RunMismatchError, UsageError
from batchproc.io.catalogue import (
    SCHEMA,
    forget_scores,
    make_rows,
    scored_images,
    scores_digest,
    write_part,
    write_scores,
)
from batchproc.records import CATALOGUE
from tests import _runs

MODEL = SimpleNamespace(
    name="cnn", version="1.2", hash="abc123", fingerprint="1", normalisation="noise", classes=("real",)
)
THREE = SimpleNamespace(
    name="kinds", version="1", hash="def", fingerprint="2", normalisation="none", classes=("a", "b", "c")
)


def score(folder, image_id, values, model=MODEL):
    ids = pq.read_table(folder.catalogue_part(image_id))["candidate_id"].to_pylist()
    folder.scores_of(model.name).mkdir(parents=True, exist_ok=True)
    path = folder.scores_of(model.name) / f"{image_id}.parquet"
    write_scores(path, np.full(len(ids), image_id, object), ids, np.asarray(values, np.float32), model)


@pytest.fixture
def folder(tmp_path):
    folder = _runs.begin(tmp_path / "run", "z", "none", "a", "unfinished")
    _runs.store(folder, "a", 4)
    _runs.store(folder, "none", 0)
    _runs.store(folder, "z", 3)
    write_part(folder.catalogue_part("unfinished"), make_rows(_runs.result("unfinished", 5).catalogue))
    return folder


def test_columns_types_and_units_are_those_of_the_catalogue(folder):
    """Every column is there in order with its dtype; units are in the schema and in the frame's attributes."""
    frame = open_catalogue(folder.path)
    assert list(frame) == [column.name for column in CATALOGUE]
    for column in CATALOGUE:
        if column.dtype == "str":
            assert pd.api.types.is_string_dtype(frame[column.name])
        else:
            assert frame[column.name].dtype == column.dtype
    assert frame.attrs["units"]["ra"] == "deg"
    schema = pq.read_schema(folder.catalogue_part("a"))
    assert schema.field("flux").metadata[b"unit"] == b"file unit"
    assert all(schema.field(column.name).metadata[b"meaning"].decode() == column.meaning for column in CATALOGUE)


def test_rows_belong_to_their_stamps(folder):
    """stamp_index counts through the run in the manifest's order and finds the stamp of each row."""
    frame, stamps = open_catalogue(folder.path), open_stamps(folder.path)
    assert frame["stamp_index"].tolist() == list(range(7)) == list(range(len(stamps)))
    assert frame["image_id"].tolist() == ["z"] * 3 + ["a"] * 4
    np.testing.assert_array_equal(stamps[frame["stamp_index"]][:, 0, 0, 1], frame["scorr"])
    seeds = [sum(name.encode()) for name in frame["image_id"]]
    np.testing.assert_array_equal(stamps[:][:, 0, 0, 0], seeds)


def test_values_come_back_exactly(folder):
    """What was written is what is read, to the last bit."""
    frame = open_catalogue(folder.path)
    expected = _runs.result("a", 4).catalogue
    for name in SCHEMA.names:
        if name != "stamp_index":
            np.testing.assert_array_equal(frame[name][3:].to_numpy(), expected[name])


def test_filters_and_columns(folder):
    """Conditions all hold, on any column; only the columns asked for come; the index still finds the stamp."""
    frame = open_catalogue(
        folder.path, columns=["scorr", "stamp_index"], filters=[("scorr", ">=", 1), ("image_id", "in", ["a"])]
    )
    assert list(frame) == ["scorr", "stamp_index"]
    assert frame["stamp_index"].tolist() == [4, 5, 6]
    assert frame.index.tolist() == [0, 1, 2]
    assert open_catalogue(folder.path, columns=["x"], filters=[("stamp_index", "==", 2)]).shape == (1, 1)
    assert len(open_catalogue(folder.path, filters=[("image_id", "not in", ["a", "z"])])) == 0


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (("scorr", ">", 7), r"'scorr' is no condition"),
        ([[("scorr", ">", 7)]], r"is no condition"),
        ([[("scorr", ">", 7), ("x", "<", 3), ("y", "<", 3)]], r"is no condition"),
        ("scorr > 7", r"filters = 'scorr > 7'"),
        ({"scorr": 7}, r"filters = "),
        ([("scorr", ">")], r"is no condition"),
        ([("scorr", "=>", 7)], r"unknown operator '=>'"),
        ([("stamp_index", "~", 7)], r"unknown operator '~'"),
        ([("scorr", ["<"], 7)], r"unknown operator"),
        ([("image_id", "in", "a")], r"'in' needs a list of values"),
        ([("flags", "not in", 0)], r"'not in' needs a list of values"),
        ([("scorr", ">", "7")], r"the column scorr holds numbers"),
        ([("scorr", "==", None)], r"the column scorr holds numbers"),
        ([("image_id", "==", 7)], r"the column image_id holds text"),
    ],
)
def test_a_filter_of_another_form_is_refused_with_the_right_one(folder, filters, words):
    """Bare tuples, nested lists, unknown operators and values of another kind are usage errors that tell the form."""
    with pytest.raises(UsageError, match=words) as caught:
        open_catalogue(folder.path, filters=filters)
    assert "[(column, operator, value), …]" in str(caught.value)
    assert "==  !=  <  <=  >  >=  in  not in" in str(caught.value)


def test_numpy_values_filter_too(folder):
    """Values from an array or a data frame are as good as Python's."""
    filters = [("scorr", ">=", np.float32(1)), ("image_id", "in", np.array(["a"])), ("stamp_index", "in", np.arange(9))]
    assert len(open_catalogue(folder.path, filters=filters)) == 3


def test_scores_are_joined_by_candidate(folder):
    """A score column a model, NaN where it has not scored; its version, hash and normalisation are told."""
    score(folder, "a", [0.1, np.nan, 0.7, 0.9])
    frame = open_catalogue(folder.path)
    np.testing.assert_array_equal(frame["score_cnn"], np.float32([np.nan] * 3 + [0.1, np.nan, 0.7, 0.9]))
    assert frame["score_cnn"].dtype == np.float32
    assert frame.attrs["models"] == {"cnn": {"version": "1.2", "hash": "abc123", "normalisation": "noise"}}
    best = open_catalogue(folder.path, columns=["image_id"], filters=[("score_cnn", ">", 0.5), ("scorr", "<", 3)])
    assert best["image_id"].tolist() == ["a"]


def test_a_model_of_several_classes_has_a_column_each(folder):
    """(n, classes) scores become score_<model>_<class>."""
    score(folder, "z", np.arange(9).reshape(3, 3), THREE)
    score(folder, "z", [0, 1, 2])
    frame = open_catalogue(folder.path, columns=["score_kinds_b", "score_cnn"])
    np.testing.assert_array_equal(frame["score_kinds_b"][:3], [1, 4, 7])
    np.testing.assert_array_equal(frame["score_cnn"][:3], [0, 1, 2])


def test_scores_of_another_version_are_not_mixed(folder):
    """What is scored is known by the model's hash; other scores under its name are a clear error."""
    score(folder, "a", [0, 0, 0, 0])
    assert scored_images(folder, MODEL) == {"a"}
    assert scored_images(folder, THREE) == set()
    with pytest.raises(RunMismatchError, match=r"version 1\.2 .*now is version 2"):
        scored_images(folder, SimpleNamespace(name="cnn", version="2", hash="fff", normalisation="noise"))


def test_scores_of_another_card_are_not_mixed(folder):
    """The same file, shown something else, gives other scores; those that do not say are known by their file."""
    score(folder, "a", [0, 0, 0, 0])
    other = SimpleNamespace(**(vars(MODEL) | {"fingerprint": "3", "normalisation": "min-max"}))
    with pytest.raises(RunMismatchError, match=r"another card \(version 1\.2, normalisation noise; now .* min-max"):
        scored_images(folder, other)
    path = next(folder.scores_of("cnn").glob("*.parquet"))
    table = pq.read_table(path)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"fingerprint"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert scored_images(folder, other) == {"a"}


def test_scores_carry_a_digest_of_what_they_say(folder):
    """Of the scores, of whom they are about, and of the model: also after some were forgotten."""
    score(folder, "a", [0.1, 0.2, 0.3, 0.4])
    path = folder.scores_of("cnn") / "both.parquet"
    write_scores(path, np.array(["a", "z"]), np.array(["a-0", "z-0"]), np.float32([0.5, 0.6]), MODEL)
    forget_scores(folder, ["z"])
    for part in folder.scores_of("cnn").iterdir():
        table = pq.read_table(part)
        said = table.schema.metadata
        assert json.loads(said[b"images"]) == ["a"] == sorted(set(table["image_id"].to_pylist()))
        assert scores_digest(table) == said[b"digest"].decode()
        assert scores_digest(table.replace_schema_metadata(said | {b"hash": b"other"})) != said[b"digest"].decode()
        assert scores_digest(table.slice(1)) != said[b"digest"].decode()


def test_a_run_without_candidates_keeps_its_types(tmp_path):
    """No rows, and still every column with its dtype: code that works on a catalogue works on an empty one."""
    folder = _runs.begin(tmp_path / "run", "a")
    empty = open_catalogue(folder.path)
    _runs.store(folder, "a", 0)
    for frame in (empty, open_catalogue(folder.path)):
        assert len(frame) == 0
        assert frame["flux"].dtype == np.float64
        assert frame["stamp_index"].dtype == np.int64


def test_an_unknown_column_is_refused_with_the_known_ones(folder):
    """A score that has not been made says how to make it."""
    with pytest.raises(UsageError, match=r"no column 'score_cnn'.*known: candidate_id.*batchproc classify"):
        open_catalogue(folder.path, columns=["score_cnn"])
    with pytest.raises(UsageError, match="no column 'magnitude'"):
        open_catalogue(folder.path, filters=[("magnitude", "<", 20)])
