"""Copies of an image's files on the node's own disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchproc.errors import ReadError
from batchproc.io.staging import staged
from batchproc.records import ManifestEntry


@pytest.fixture
def entry(tmp_path) -> ManifestEntry:
    files = {}
    for night in ("one", "two"):
        (tmp_path / night).mkdir()
        for kind in ("image", "mask"):
            path = tmp_path / night / f"{kind}.fits"
            path.write_text(f"{kind} of {night}")
            files[f"{night}-{kind}"] = str(path)
    return ManifestEntry(
        "a",
        files["one-image"] + "[SCI]",
        (files["two-image"], files["one-image"] + "[2]"),
        new_mask=files["one-mask"],
        ref_mask=(files["two-mask"],),
    )


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("BATCHPROC_SCRATCH", str(folder))
    monkeypatch.setenv("BATCHPROC_STAGE", "1")
    return folder


def path_of(spec: str) -> Path:
    return Path(spec.split("[")[0])


def test_files_are_read_from_the_nodes_disk(entry, scratch):
    """Same contents, same names, same extensions; a file that is named twice is copied once; nothing is left."""
    with staged(entry) as local:
        given = [entry.new, *entry.ref, entry.new_mask, *entry.ref_mask]
        copies = [local.new, *local.ref, local.new_mask, *local.ref_mask]
        for original, copy in zip(given, copies, strict=True):
            assert path_of(copy).is_relative_to(scratch)
            assert path_of(copy).read_text() == path_of(original).read_text()
            assert copy.endswith(Path(original).name)
        assert path_of(local.new) == path_of(local.ref[1])
        assert len([path for path in scratch.rglob("*") if path.is_file()]) == 4
        assert local.image_id == "a"
        assert local.new_psf is None
    assert list(scratch.iterdir()) == []


def test_nothing_is_copied_unless_asked_for(entry, scratch, monkeypatch):
    """Scratch alone is for temporary files."""
    monkeypatch.delenv("BATCHPROC_STAGE")
    with staged(entry) as local:
        assert local is entry


def test_a_file_that_cannot_be_copied_is_named_where_it_is(entry, scratch, tmp_path):
    """Reading tells what is wrong with it."""
    missing = str(tmp_path / "nowhere.fits")
    with staged(replace(entry, new=missing)) as local:
        assert local.new == missing
        assert path_of(local.ref[0]).is_relative_to(scratch)


@pytest.mark.parametrize("written", ["./{}", "night//{}[1]", "{}[SCI,2]", "night/../{}"])
def test_paths_are_copied_however_they_are_written(tmp_path, scratch, monkeypatch, written):
    """Relative, or with what a shell would leave out; what stands in brackets stays."""
    (tmp_path / "night").mkdir()
    for path in ("a.fits", "night/a.fits"):
        (tmp_path / path).write_text("pixels")
    monkeypatch.chdir(tmp_path)
    spec = written.format("a.fits")
    with staged(ManifestEntry("a", spec, (spec,))) as local:
        assert path_of(local.new).is_relative_to(scratch)
        assert path_of(local.new).read_text() == "pixels"
        assert local.new.partition("[")[2] == spec.partition("[")[2]


def test_a_node_without_its_disk_is_no_matter(entry, scratch):
    """Cleaned away, or so full that it takes no folder: files are read where they are."""
    scratch.rmdir()
    with staged(entry) as local:
        assert local is entry


def test_a_full_disk_of_the_node_is_no_matter(entry, scratch, monkeypatch):
    """Files are then read where they are."""

    def full(source, target):
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with staged(entry) as local:
        assert local == entry


def test_a_failure_names_the_file_of_the_manifest(entry, scratch):
    """Nobody is sent to a folder that is gone."""
    with pytest.raises(ReadError) as caught, staged(entry) as local:
        raise ReadError(f"{path_of(local.new)}: truncated", path=str(path_of(local.new)), found=3)
    assert str(caught.value) == f"{path_of(entry.new)}: truncated"
    assert caught.value.metadata == {"path": str(path_of(entry.new)), "found": 3}
    assert list(scratch.iterdir()) == []
