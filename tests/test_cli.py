"""The command line: every verb explains itself with an example, says what it did, and exits with the right code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import count

import click
import numpy as np
import pytest
from astropy.io import fits

from batchproc import cli, job
from batchproc.errors import ReadError
from batchproc.io.manifest import write_manifest
from batchproc.io.run_folder import RunFolder
from batchproc.io.status import read_status
from tests import _runs
from tests.io._packets import packet, record

STUBS = job.Steps(process=_runs.process, model=_runs.load_model, wisdom=_runs.no_wisdom, report=_runs.report)


def verbs(command: click.Command = cli.cli, path: tuple[str, ...] = ()):
    """Every command of the tree with its path."""
    yield path, command
    for name in getattr(command, "commands", {}):
        yield from verbs(command.commands[name], (*path, name))


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command line; returns its exit code, standard output and standard error."""
    for verb in (job.run, job.retry, job.classify):
        monkeypatch.setitem(verb.__kwdefaults__, "steps", STUBS)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in words])
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def night(tmp_path):
    """A manifest, and settings, of the stand-ins."""
    settings = tmp_path / "settings.toml"
    settings.write_text(_runs.CONFIG.to_toml())

    def night(*names: str) -> tuple:
        write_manifest(_runs.entries(*names), tmp_path / "night.csv")
        where = ("--out", tmp_path / "run", "--config", settings, "--cluster", "serial")
        return tmp_path / "night.csv", *where

    return night


@pytest.mark.parametrize(
    ("path", "command"), verbs(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_verb_explains_itself(path, command, call):
    """Help says in a sentence what the verb does, explains each option, and shows an example that parses."""
    code, out, _ = call(*path, "--help")
    assert code == 0
    assert command.help
    assert command.help[0].isupper()
    assert "Example:" in out
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name
    examples = [line.split()[1:] for line in command.epilog.splitlines() if line.strip().startswith("batchproc ")]
    assert any(tuple(example[: len(path)]) == path for example in examples)
    for example in examples:
        target: click.Command = cli.cli
        while isinstance(target, click.Group):
            target = target.commands[example.pop(0)]
        target.make_context("example", example)


def test_help_is_quick():
    """`batchproc --help` answers within a second: nothing heavy is imported for it."""
    start = time.monotonic()
    code = "import sys; from batchproc import cli; print([m for m in ('numpy', 'dask', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert time.monotonic() - start < 5  # on a busy machine; 0.2 s on an idle one


def test_run_tells_what_came_out(call, night):
    """The summary is on standard output, progress on standard error; 0 when all is done."""
    code, out, err = call("run", *night("n1", "n2"))
    assert code == 0
    assert "2 of 2 images done" in out
    assert "3 candidates" in out
    assert "report.html" in out
    assert "2/2 images" in err


def test_failed_images_are_exit_code_1(call, night):
    """They are counted by kind, and the next command is named."""
    code, out, _ = call("run", *night("n1", "bad1", "bad2"), "--quiet")
    assert code == 1
    assert "2 × align: AlignError" in out
    assert "batchproc retry" in out


def test_bugs_are_exit_code_3(call, night):
    """A bug is not a failed image."""
    assert call("run", *night("n1", "bug"), "-q")[0] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run",), "Missing argument 'MANIFEST'"),
        (("run", "absent.csv", "--out", "x"), "absent.csv: no such file"),
        (("run", "absent.csv", "--out", "x", "--config", "absent.toml"), "absent.toml: cannot be read"),
        (("status", "."), "not a run folder"),
        (("fly",), "No such command 'fly'"),
        (("models", "show", "absent"), "absent"),
    ],
)
def test_usage_errors_are_exit_code_2_and_one_line(call, tmp_path, monkeypatch, words, message):
    """What was asked wrongly is said on standard error, without a traceback."""
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_cluster_is_exit_code_2(call, night, tmp_path):
    """Before a run is begun."""
    code, _, err = call("run", *night("n1")[:-1], "moon")
    assert code == 2
    assert "expected local, serial" in err
    assert not (tmp_path / "run").exists()


def test_a_fault_of_the_machine_and_a_bug_are_exit_code_3(call, monkeypatch):
    """A full disk is one line; an error nobody foresaw shows where it came from."""
    full = OSError(28, "No space left on device", "/runs/x")
    monkeypatch.setattr("batchproc.io.run_folder.RunFolder.existing", lambda path: (_ for _ in ()).throw(full))
    assert call("status", "x") == (3, "", "batchproc: /runs/x: No space left on device\n")
    bug = KeyError("oops")
    monkeypatch.setattr("batchproc.io.run_folder.RunFolder.existing", lambda path: (_ for _ in ()).throw(bug))
    code, _, err = call("status", "x")
    assert code == 3
    assert "Traceback" in err
    assert "a bug in batchproc" in err
    monkeypatch.setattr(
        "batchproc.io.run_folder.RunFolder.existing", lambda path: (_ for _ in ()).throw(ReadError("x.fits: empty"))
    )
    assert call("status", "x") == (2, "", "batchproc: x.fits: empty\n")
    monkeypatch.setattr(
        "batchproc.io.run_folder.RunFolder.existing", lambda path: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert call("status", "x")[0] == 130


def test_dry_run_computes_nothing(call, night, tmp_path):
    """It says how many images, how much to read and to write, and leaves no trace."""
    code, out, _ = call("run", *night("n1", "n2", "n3"), "--dry-run")
    assert code == 0
    assert "3 images: 0 done, 0 failed before, 3 to do" in out
    assert "files are not there" in out
    assert not (tmp_path / "run").exists()


def test_pilot_measures_and_the_rest_follows(call, night, monkeypatch):
    """A pilot says what the rest will take; then the same command without it does the rest."""
    monkeypatch.setattr("batchproc.distribute.tasks._images", count(1))  # whether or not another test was here before
    code, out, _ = call("run", *night("n1", "n2", "n3", "n4"), "--pilot", 2, "--workers", 1)
    assert code == 0
    assert "2 of 4 images done, 2 missing" in out
    assert "measured on 2 images" in out
    assert "4 of 4 images done" in call("run", *night("n1", "n2", "n3", "n4"))[1]


def test_retry_does_not_call_a_run_done_that_is_not(call, night, tmp_path):
    """Images that were never tried are counted, and the command is named that does them; it works."""
    call("run", *night("n1", "n2", "n3", "n4"), "--pilot", 2, "-q")
    code, out, _ = call("retry", tmp_path / "run", "--cluster", "serial", "-q")
    assert code == 1
    command = f"batchproc run {tmp_path}/run/manifest.parquet --out {tmp_path}/run"
    assert f"2 images were not tried: `{command}`" in out
    code, out, _ = call(*command.split()[1:], "--cluster", "serial", "-q")
    assert code == 0
    assert "4 of 4 images done" in out


def test_settings_may_come_through_a_pipe(call, night, tmp_path):
    """They are read once, so nothing falls back to the defaults."""
    words = night("n1", "n2")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(_runs.CONFIG.to_toml(),), daemon=True)
    writer.start()
    code, out, _ = call("run", *[pipe if str(word).endswith(".toml") else word for word in words], "--pilot", 1)
    assert code == 0
    assert "measured on 1 image:" in out
    assert RunFolder(tmp_path / "run").config() == _runs.CONFIG


def test_status_for_people_and_programs(call, night, tmp_path):
    """The same numbers as text and as JSON."""
    call("run", *night("n1", "bad"), "-q")
    code, out, _ = call("status", tmp_path / "run", "--json")
    status = json.loads(out)
    assert code == 0
    assert (status["total"], status["done"], status["failed"], status["missing"]) == (2, 1, 1, 0)
    assert status["errors"] == {"align: AlignError": 1}
    assert "1 of 2 images done, 1 failed" in call("status", tmp_path / "run")[1]


def test_status_watches_until_nobody_is_at_work(call, night, tmp_path, monkeypatch):
    """Look after look while a driver works; then the last one, and an end."""
    call("run", *night("n1"), "-q")
    found = read_status(RunFolder(tmp_path / "run"))
    working = replace(found, driver=replace(found.driver, running=True))
    looks = iter([working, working, found])
    monkeypatch.setattr("batchproc.io.status.read_status", lambda folder: next(looks))
    monkeypatch.setattr("batchproc.cli.running.WATCH_S", 0.01)
    code, out, _ = call("status", tmp_path / "run", "--watch", "--json")
    assert code == 0
    assert [json.loads(line)["driver"]["running"] for line in out.splitlines()] == [True, True, False]


def test_what_cannot_fit_is_refused_before_anything_starts(call, night, tmp_path, monkeypatch):
    """The plan is shown and the way out named; a run that is begun all the same is refused too."""
    fits.PrimaryHDU(np.zeros((300, 300), np.float32)).writeto(tmp_path / "im.fits")
    table = tmp_path / "large.csv"
    table.write_text("image_id,new,ref\na,im.fits,im.fits\nb,im.fits,im.fits\n")
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 9 * 10**8)
    words = ("run", table, *night("n1")[1:5], "--cluster", "local", "--workers", 2)
    code, out, err = call(*words, "--dry-run")
    assert code == 2
    assert "2 images: 0 done, 0 failed before, 2 to do" in out
    assert "image a (300 x 300 pixels, 1 reference) needs about 0.47 GB, and a worker may have 0.38 GB" in err
    assert "`--workers 1` leaves enough" in err
    assert call(*words, "-q")[::2] == (2, err)


def test_retry_and_classify(call, night, tmp_path):
    """Both say how many they did."""
    call("run", *night("n1", "n2", "bad"), "-q")
    code, out, err = call("retry", tmp_path / "run", "--cluster", "serial")
    assert code == 1
    assert "1 images failed before" in err
    assert "2 of 3 images done" in out
    words = ("classify", tmp_path / "run", "--model", "stub", "--cluster", "serial", "-q")
    assert call(*words)[:2] == (0, "3 candidates scored\n")
    assert "nothing to score" in call(*words)[1]
    assert "scored by stub" in call("status", tmp_path / "run")[1]


def test_alerts_are_classified_into_a_table(call, tmp_path):
    """0: all scored; 1: not all; 2: nothing was started. The counts are on standard output, progress on the other."""
    stamp = np.random.default_rng(0).normal(100.0, 9.0, (3, 63, 63)).astype(np.float32)
    (tmp_path / "a.avro").write_bytes(packet(record(1, stamp)))
    words = ("classify-alerts", tmp_path, "--model", "realbogus", "--out", tmp_path / "scores.parquet")
    code, out, err = call(*words)
    assert (code, out) == (0, f"1 alerts: 1 scored, 0 not scored, 0 unreadable\n{tmp_path / 'scores.parquet'}\n")
    assert "1/1 MB" in err
    assert "(1 alerts)" in err
    (tmp_path / "b.avro").write_bytes(b"torn")
    code, out, err = call(*words, "-q")
    assert (code, err) == (1, "")
    assert "2 alerts: 1 scored, 0 not scored, 1 unreadable" in out
    code, out, err = call("classify-alerts", tmp_path / "absent", *words[2:])
    assert (code, out) == (2, "")
    assert "no such file or folder" in err
    assert call(*words, "--model", "realbogus")[0] == 2


def test_manifest_check_tells_unusable_from_incomplete(call, night, tmp_path):
    """1: images will fail; 2: the table itself cannot be used."""
    code, out, _ = call("manifest", "check", night("n1")[0])
    assert code == 1
    assert "no such file: /nights/n1.fits" in out
    (tmp_path / "wrong.csv").write_text("image_id,ref\na,b\n")
    assert call("manifest", "check", tmp_path / "wrong.csv")[0] == 2


def test_several_references_after_one_option():
    """A shell's pattern after --reference gives references, not images."""
    command = cli.cli.commands["manifest"].commands["build"]
    words = ["a.fits", "b.fits", "--reference", "r1", "r2", "--instrument", "ztf", "--reference", "r3", "-o", "m.csv"]
    context = command.make_context("build", words)
    assert [str(path) for path in context.params["images"]] == ["a.fits", "b.fits"]
    assert context.params["references"] == ("r1", "r2", "r3")
