"""A marker tells by what an image was done, and whether its results are still those."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batchproc
from batchproc.errors import StorageError
from batchproc.io.catalogue import make_rows
from batchproc.io.index import iter_markers
from batchproc.io.markers import (
    MARKER_SCHEMA,
    Marker,
    chunks_digest,
    entry_digest,
    input_digest,
    marker_row,
    now,
    read_marker,
    row_marker,
    rows_digest,
    write_marker,
)
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import open_shard, write_chunks
from batchproc.io.store import stored_receipt
from batchproc.job import Steps, run
from batchproc.records import ManifestEntry, Receipt
from tests import _runs

RECEIPT = Receipt("ä/1", "done", 3, {"read": 0.1}, 2, np.float64(1 / 3), {"fwhm": np.float32(2.5), "bad": np.nan})
MARKER = Marker(RECEIPT, "c", "e", "i", {"batchproc": "9"}, {"cnn": "h"}, "r", "s", now(), {"catalogue": "f"})
ROWS = make_rows(_runs.result("x", 9).catalogue)


def test_a_marker_comes_back(tmp_path):
    """From its own file and from a row of a pack, with the digest that it had."""
    write_marker(tmp_path / "m.json", MARKER)
    read, digest = read_marker(tmp_path / "m.json")
    assert read.digest == digest == MARKER.digest
    assert (read.image_id, read.n_rows, read.time, read.files) == ("ä/1", 3, MARKER.time, MARKER.files)
    row = pa.Table.from_pylist([marker_row(read)], MARKER_SCHEMA).to_pylist()[0]
    packed, digest = row_marker(row)
    assert packed.digest == digest == MARKER.digest
    assert row["version"] == "9"


@pytest.mark.parametrize("change", [{"entry_digest": "x"}, {"models": {}}, {"receipt": replace(RECEIPT, stage="x")}])
def test_whatever_is_altered_in_a_marker_alters_its_digest(change):
    """Settings, input, models, receipt: all but where the files are."""
    assert replace(MARKER, **change).digest != MARKER.digest
    assert replace(MARKER, files={}).digest == MARKER.digest


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"receipt": 3}', '{"receipt": {"image_id": "a", "x": 1}}'])
def test_what_is_no_marker_is_told_with_its_path(tmp_path, text):
    """Torn, empty, or of another kind."""
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match=r"m\.json: no done-marker"):
        read_marker(tmp_path / "m.json")


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), max_size=4))
def test_the_digest_of_rows_is_that_of_their_values(cuts):
    """However the rows are cut into chunks, or out of a larger table."""
    bounds = sorted({0, 9, *cuts})
    pieces = pa.concat_tables([ROWS.slice(0, 0), *(ROWS.slice(a, b - a) for a, b in pairwise(bounds))])
    assert rows_digest(pieces) == rows_digest(ROWS)
    assert rows_digest(pa.concat_tables([ROWS, ROWS, ROWS]).slice(9, 9)) == rows_digest(ROWS)


def test_rows_that_differ_have_other_digests():
    """In a value, in the cut between two strings, in the order, in number, in the last bit."""
    names = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["abc", ""], ["abc", None], []]
    columns = [pa.array(n, pa.string()) for n in names]
    columns += [pa.array(n) for n in ([1.0], [np.nextafter(1.0, 2)], [np.nan], [0.0], [-0.0], [0])]
    digests = [rows_digest(pa.table({"x": column})) for column in columns]
    assert len({*digests, rows_digest(pa.table({"y": columns[0]}))}) == len(columns) + 1


def test_the_digest_of_chunks_tells_where_one_ends_and_which_is_empty():
    """Bytes that move from one chunk to the next, or an empty chunk for none, are another content."""
    contents = [[b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"abc", None], [b"abc", b""], [None, b"abc"], []]
    assert len({chunks_digest(chunks) for chunks in contents}) == len(contents)


def test_input_is_known_by_name_size_and_time(tmp_path):
    """A file that is rewritten, grows, or goes away makes another input; an HDU is not part of a file's name."""
    path = tmp_path / "new.fits"
    path.write_bytes(b"x")
    entry = ManifestEntry("a", f"{path}[1]", (str(tmp_path / "ref.fits"),))
    digests = [input_digest(entry)]
    assert input_digest(replace(entry, new=str(path))) == digests[0]
    os.utime(path, (1, 1))
    digests.append(input_digest(entry))
    path.write_bytes(b"xy")
    os.utime(path, (1, 1))
    digests.append(input_digest(entry))
    path.unlink()
    digests.append(input_digest(entry))
    assert len(set(digests)) == 4


def test_a_task_that_runs_again_knows_what_it_has_done(tmp_path):
    """From the marker, if that is of the same entry and settings and unaltered."""
    folder = _runs.begin(tmp_path / "run", "a")
    (entry,) = _runs.entries("a")
    assert stored_receipt(folder, entry, _runs.CONFIG.image_digest) is None
    _runs.store(folder, "a", 3)
    receipt = stored_receipt(folder, entry, _runs.CONFIG.image_digest)
    assert (receipt.n_candidates, receipt.quality) == (3, {"fwhm_new": 3.5})
    assert stored_receipt(folder, entry, "other") is None
    assert stored_receipt(folder, replace(entry, gain=2.0), _runs.CONFIG.image_digest) is None
    said = json.loads(folder.marker("a").read_text())
    folder.marker("a").write_text(json.dumps(said | {"models": {"x": "y"}}))
    assert stored_receipt(folder, entry, _runs.CONFIG.image_digest) is None


def test_rows_stamps_and_receipt_are_of_one_number(tmp_path):
    """What does not fit together is not stored."""
    folder = _runs.begin(tmp_path / "run", "a")
    made = _runs.result("a", 3)
    for stamps, n in ((made.stamps[:2], 3), (made.stamps, 2)):
        with pytest.raises(ValueError, match="3 rows and"):
            _runs.store_image(
                folder, *_runs.entries("a"), made.catalogue, stamps, replace(made.receipt, n_candidates=n), ""
            )
    assert not list(folder.catalogue.iterdir())


def test_a_disk_that_refuses_is_told_from_an_image_that_fails(tmp_path, monkeypatch):
    """Full, over quota, read-only: the run stops. Away for a moment: the image is tried again."""
    folder = _runs.begin(tmp_path / "run", "a")
    for number, expected in ((errno.ENOSPC, StorageError), (errno.EDQUOT, StorageError), (errno.ESTALE, OSError)):

        def refuse(*arguments, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(expected, match=os.strerror(number)):
                _runs.store(folder, "a", 3)
    assert not folder.marker("a").exists()


def test_a_shard_is_known_by_its_index(tmp_path):
    """Chunks come back as they were written, empty ones as none; a cut or altered file is told."""
    folder = _runs.begin(tmp_path / "run", "a")
    _runs.store(folder, "a", 70)
    shard = open_shard(folder.stamps_part("a"))
    chunks = list(shard.chunks())
    assert len(chunks) == shard.n_chunks == 3
    shard.path.unlink()
    write_chunks(shard.path, [chunks[0], None, chunks[2]])
    assert list(shard.chunks()) == [chunks[0], None, chunks[2]]
    assert list(shard.some([2, 0])) == [chunks[2], chunks[0]]
    os.truncate(shard.path, 20)
    with pytest.raises(ValueError, match="too short for the index of 3 chunks"):
        list(shard.chunks())


def test_a_marker_names_the_model_that_the_run_scores_with(tmp_path):
    """And the software, the settings, the row of the manifest and the files of the image."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="stub"))
    steps = Steps(process=_runs.process, model=_runs.load_model, wisdom=_runs.no_wisdom, report=_runs.report)
    run(_runs.entries("n3"), tmp_path / "run", config=config, cluster="serial", steps=steps, quiet=True)
    (row,) = (
        row for table in iter_markers(RunFolder(tmp_path / "run"), MARKER_SCHEMA.names) for row in table.to_pylist()
    )
    marker, _ = row_marker(row)
    assert marker.models == {"stub": "0" * 64}
    assert marker.config_digest == config.image_digest
    assert marker.entry_digest == entry_digest(*_runs.entries("n3"))
    assert marker.input_digest == input_digest(*_runs.entries("n3"))
    assert marker.versions["batchproc"] == batchproc.__version__
