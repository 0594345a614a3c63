from __future__ import annotations

import pytest

from batchproc.cli import main
from tests.finish import _night


def said(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["finish", *map(str, words)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_a_dry_run_tells_what_will_be_made_and_the_command_what_was(night, capsys):
    """A line a product: rows, bytes, files; the second time that it is current."""
    only = ["--only", "stamps", "--only", "focal-planes"]
    code, out, _ = said(capsys, night.path, "--dry-run", *only)
    assert code == 0
    assert f"{night.path}/stamps.zarr: to be made from 630 rows, about" in out
    assert f"{night.path}/focal_planes.parquet: to be made from 24 rows" in out
    assert "hats" not in out.replace(str(night.path), "")
    code, out, err = said(capsys, night.path, "--cluster", "serial", "-q", *only)
    assert (code, err) == (0, "")
    assert f"{night.path}/stamps.zarr made in" in out
    assert "630 rows" in out
    code, out, _ = said(capsys, night.path, "--cluster", "serial", *only)
    assert code == 0
    assert out.count("is current") == 2


def test_altered_results_end_it_with_the_command_that_finds_them(night, capsys):
    """Exit code 3, one line that names the image and says what to type."""
    (shard,) = night.stamps_part("e0-c0").glob("c*")
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(bytes(data))
    code, _, err = said(capsys, night.path, "--cluster", "serial", "-q", "--only", "stamps")
    assert code == 3
    assert "e0-c0" in err
    assert f"batchproc verify {night.path} --repair" in err


def test_no_run_and_an_unknown_product_are_usage_errors(tmp_path, capsys):
    """Exit code 2, and nothing is made."""
    assert said(capsys, tmp_path, "--only", "stamps")[0] == 2
    assert said(capsys, tmp_path, "--only", "margins")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_which_nothing_is_done_has_nothing_to_make(tmp_path, capsys):
    """No error: it says so."""
    folder = _night.begin(tmp_path / "run")
    code, out, _ = said(capsys, folder.path, "--cluster", "serial", "-q", "--only", "stamps")
    assert code == 0
    assert out == f"{folder.path}/stamps.zarr: not made, no candidates\n"
