"""Site profiles: what they may say, and how they are found."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from batchproc.distribute import batch
from batchproc.distribute.clusters import Where, expected_workers, worker_memory
from batchproc.distribute.sites import LAUNCHER_MEMORY, Site, find_site, load_site
from batchproc.errors import ConfigError, UsageError

ROOT = Path(__file__).parents[2]
GIVEN = {"system": "slurm", "cores": 4, "memory": "8GiB", "walltime": "02:00:00"}


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_of_ours_is_valid(path):
    """A profile in cluster/ is read without complaint, and so is what is commented out in it."""
    load_site(str(path))
    text = re.sub(r"^# (?=\w+ = )", "", path.read_text(), flags=re.MULTILINE)
    Site.from_dict(tomllib.loads(text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memroy": "1GB"}, "did you mean memory?"),
        ({"driver": {"waltime": "1"}}, "did you mean driver.walltime?"),
        ({"cores": "4"}, "expected int, found str"),
        ({"directives": "--exclusive"}, "expected a list of strings"),
        ({"system": "sge"}, "must be slurm, pbs, lsf or address"),
        ({"walltime": "2h"}, '"12:00:00"'),
        ({"walltime": "00:00:00"}, "must be longer"),
        ({"memory": "8"}, "a size with its unit"),
        ({"memory": "1.2.3GB"}, "a size with its unit"),
        ({"driver": {"memory": "0GB"}}, "driver.memory = '0GB': must be at least 400 MB"),
        ({"python": "~/env/bin/python"}, "must be a path in full"),
        ({"python": "env/bin/python"}, "must be a path in full"),
        ({"memory": "1GB"}, "leaves 198 MB to each of 4 workers"),
        ({"min_jobs": 3, "max_jobs": 2}, "min_jobs = 3"),
        ({"margin": 7200}, "shorter than the walltime"),
        ({"system": "lsf", "qos": "high"}, "say it in directives"),
        ({"stage": True}, "needs scratch"),
        ({"resources": {"GPU": 0}}, "positive numbers"),
        ({"address": "tcp://host:1"}, "address is for system = 'address'"),
        ({"system": "address"}, "tls://host:port"),
        ({"certificates": {"ca": "ca.pem"}}, "needed together"),
    ],
)
def test_a_wrong_profile_says_what_is_wrong(change, said):
    """Unknown keys, wrong types and values out of range are refused, with what was found and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        Site.from_dict({**GIVEN, **change})
    assert said in str(caught.value)


@pytest.mark.parametrize("key", sorted(GIVEN))
def test_what_decides_the_cost_must_be_given(key):
    """Nobody gets a default for the size of his jobs."""
    with pytest.raises(ConfigError, match=f"{key}: must be given"):
        Site.from_dict({name: value for name, value in GIVEN.items() if name != key})


def test_a_profile_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    """By name: here in cluster/, then the user's own, then a checkout's; by path: that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    own, here = tmp_path / "config" / "batchproc" / "clusters" / "slurm.toml", tmp_path / "cluster" / "slurm.toml"
    assert find_site("slurm") == ROOT / "cluster" / "slurm.toml"
    for path in (own, here):
        path.parent.mkdir(parents=True)
        path.write_text("")
        assert find_site("slurm").resolve() == path
    assert find_site("elsewhere/x.toml") == Path("elsewhere/x.toml")


def test_an_unknown_word_is_refused_with_what_is_there():
    """Before anything is connected to or started."""
    with pytest.raises(UsageError, match=r"did you mean slurm\?"):
        Where("slrum").check()
    for word in ("local", "serial", "tcp://10.0.0.1:8786"):
        with pytest.raises(UsageError, match=f"are for jobs of a batch system, and {word} has none"):
            Where(word, max_jobs=3).check()
    with pytest.raises(UsageError, match="expected local, serial"):
        Where("nonsense").check()
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        Where("nowhere.toml").check()


@pytest.mark.parametrize(("package", "need"), [("dask_jobqueue", "jobs on a queue"), ("cryptography", "TLS")])
def test_a_missing_package_is_told_with_what_to_type(package, need, tmp_path, monkeypatch):
    """Before anything is started; own certificates, or none, need no package that makes them."""
    monkeypatch.setattr(batch, "find_spec", lambda name: None if name == package else object())
    path = tmp_path / "site.toml"
    path.write_text('system = "slurm"\ncores = 4\nmemory = "8GiB"\nwalltime = "02:00:00"\n')
    with pytest.raises(UsageError, match=rf"{need} needs? the package {package}: python -m pip install"):
        Where(str(path)).check()
    path.write_text(path.read_text() + "tls = false\n")
    if package == "cryptography":
        Where(str(path)).check()


def test_memory_of_a_worker_is_its_share_of_the_job():
    """The workers of a job and the process that watches them fit into its memory."""
    site = Site.from_dict(GIVEN)
    assert site.processes(1) == 4
    assert site.processes(2) == 2
    for threads in (1, 2, 8):
        assert site.worker_memory(threads) * site.processes(threads) + LAUNCHER_MEMORY <= site.memory_bytes
    assert site.worker_memory(4) > 0.9 * 8 * 2**30


def test_workers_leave_before_the_walltime():
    """A tenth of it before, ten minutes at most, unless the profile says otherwise."""
    for walltime, margin, leave in (
        ("02:00:00", 0, 6600),
        ("00:10:00", 0, 540),
        ("24:00:00", 0, 85800),
        ("02:00:00", 60, 7140),
    ):
        assert Site.from_dict({**GIVEN, "walltime": walltime, "margin": margin}).leave_after_s == leave


@pytest.mark.parametrize(
    ("where", "tasks", "jobs"),
    [
        (Where("x"), 10**6, (2, 5)),
        (Where("x", min_jobs=0), 10**6, (0, 5)),
        (Where("x", max_jobs=1), 10**6, (1, 1)),
        (Where("x", min_jobs=7), 10**6, (7, 7)),
        (Where("x", workers=9), 10**6, (3, 3)),
        (Where("x", workers=9, min_jobs=1), 10**6, (1, 3)),
        (Where("x"), 5, (2, 2)),
        (Where("x"), 1, (1, 1)),
    ],
)
def test_number_of_jobs(where, tasks, jobs):
    """Options overrule the profile; nobody asks for more jobs than there are tasks for."""
    site = Site.from_dict({**GIVEN, "min_jobs": 2, "max_jobs": 5})
    assert where.jobs(site, 1, tasks) == jobs


def test_what_a_worker_will_have_is_known_before_anything_starts(tmp_path):
    """Memory and number of workers, of a profile, a local cluster, and of nobody knows what."""
    path = tmp_path / "site.toml"
    path.write_text('system = "slurm"\ncores = 4\nmemory = "8GiB"\nwalltime = "02:00:00"\nmax_jobs = 3\n')
    assert worker_memory(Where(str(path))) == Site.from_dict(GIVEN).worker_memory(1)
    assert expected_workers(Where(str(path)), 1) == 12
    assert worker_memory(Where("tcp://10.0.0.1:8786")) is None
    one, two = (worker_memory(Where("local", n)) for n in (1, 2))
    assert abs(one - 2 * two) < 3
    assert worker_memory(Where("local", 8), tasks=2) == two
    assert expected_workers(Where("serial", 8), 1) == 1
