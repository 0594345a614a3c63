"""Scripts of jobs, as text: nothing is submitted."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")

from batchproc.distribute.batch import SYSTEMS, driver_script, worker_script
from batchproc.distribute.clusters import DASK
from batchproc.distribute.sites import Site
from batchproc.distribute.threads import thread_environment
from batchproc.errors import UsageError

BASE = {
    "cores": 4,
    "memory": "8GiB",
    "walltime": "26:30:00",
    "account": "sky",
    "queue": "regular",
    "directives": ["--one thing", "--another"],
    "prologue": ["module load python"],
    "driver": {"walltime": "100:00:00", "memory": "3GiB", "queue": "long", "directives": ["--mine"]},
}
RUN = Path("/data/RUN/log")
HEADERS = {
    "slurm": (
        {"-p regular", "-A sky", "-t 26:30:00", "--mem=8G", "--cpus-per-task=4", "--qos=high"},
        {"-p long", "-A sky", "-t 100:00:00", "--mem=3G", "--cpus-per-task=1", "--qos=high"},
    ),
    "pbs": (
        {"-q regular", "-A sky", "-l walltime=26:30:00", "-l select=1:ncpus=4:mem=8192MB", "-j oe"},
        {"-q long", "-A sky", "-l walltime=100:00:00", "-l select=1:ncpus=1:mem=3072MB", "-j oe"},
    ),
    "lsf": ({"-q regular", '-P "sky"', "-W 26:30", "-n 4"}, {"-q long", '-P "sky"', "-W 100:00", "-n 1"}),
}
PREFIX = {"slurm": "#SBATCH", "pbs": "#PBS", "lsf": "#BSUB"}


def site(system: str, **changes) -> Site:
    qos = {"qos": "high"} if system == "slurm" else {}
    return Site.from_dict({"system": system, **BASE, **qos, **changes})


def workers(system: str, threads: int = 1, **changes) -> str:
    return worker_script(site(system, **changes), threads, RUN, DASK)


def driver(system: str) -> str:
    return driver_script(site(system), "bp-RUN", RUN, ["/sw/python", "-m", "it", "two words"], Path("/home/me/a b"))


def directives(script: str, system: str) -> set[str]:
    return {
        line.removeprefix(PREFIX[system]).strip() for line in script.splitlines() if line.startswith(PREFIX[system])
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_directives_of_the_workers(system):
    """Account, queue, quality of service, size, time and whatever else the profile says; the driver's are its own."""
    found = directives(workers(system), system)
    assert found >= HEADERS[system][0] | {"--one thing", "--another"}
    assert "--mine" not in found
    assert not any(line.startswith("-e ") for line in found)  # one file of output a job
    assert any(line.startswith("-o /data/RUN/log/jobs/") for line in found)


@pytest.mark.parametrize("system", SYSTEMS)
def test_directives_of_the_driver(system):
    """It has its own size, time, queue and directives, and the account of the workers."""
    found = directives(driver(system), system)
    assert found >= HEADERS[system][1] | {"--mine"}
    assert "--another" not in found


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", [workers, driver], ids=["workers", "driver"])
def test_directives_come_first_and_the_rest_is_shell(system, kind):
    """A batch system stops reading directives at the first command; bash understands what follows."""
    script = kind(system)
    lines = [line for line in script.splitlines()[1:] if line]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith(PREFIX[system]) for line in lines[first:])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert script.startswith("#!")
    assert "module load python" in script


@pytest.mark.parametrize("threads", [1, 2])
def test_every_library_of_a_worker_is_told_its_threads(threads):
    """In the environment, after the site's own lines; and a worker process has one task at a time."""
    script = workers("slurm", threads)
    for name in thread_environment(threads):
        assert script.index("module load") < script.index(f"export {name}={threads}")
    command = script.splitlines()[-1]
    assert re.findall(r"--nthreads (\d+)", command)[-1] == "1"
    assert re.findall(r"--nworkers (\d+)", command) == [str(4 // threads)]
    assert int(re.findall(r"--memory-limit (\d+)(?= )", command)[-1]) == site("slurm").worker_memory(threads)


def test_dasks_settings_travel_to_the_workers():
    """What the scheduler is told in Python, a worker is told in its environment."""
    script = workers("slurm")
    assert "export DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE=0.95" in script
    assert "DASK_DISTRIBUTED__SCHEDULER" not in script


def test_workers_are_told_when_to_leave():
    """Not all jobs at the same moment, and none later than the margin before the walltime."""
    script = workers("slurm", walltime="01:00:00", margin=400)
    line = next(line for line in script.splitlines() if "BATCHPROC_LEAVE_AT" in line)
    program = f"{line}; echo $((BATCHPROC_LEAVE_AT - $(date +%s)))"
    seconds = [int(subprocess.run(["bash", "-c", program], capture_output=True, text=True).stdout) for _ in range(20)]
    assert all(3600 - 400 - 101 <= s <= 3600 - 400 + 1 for s in seconds)
    assert len(set(seconds)) > 3
    assert "--preload batchproc.distribute.leaving" in script


def test_encryption_is_the_default_and_can_be_switched_off():
    """The keys are files of a folder of the run; no page of a worker listens outside its node."""
    command = workers("slurm").splitlines()[-1]
    assert "tls://" in command
    for what in ("ca-file", "cert", "key"):
        assert re.search(rf"--tls-{what} /data/RUN/log/tls-\S+\.pem", command)
    assert "--no-dashboard --dashboard-address 127.0.0.1:0" in command
    plain = workers("slurm", tls=False).splitlines()[-1]
    assert "tls" not in plain
    own = workers("slurm", certificates={"ca": "/k/ca", "cert": "/k/cert", "key": "/k/key"}).splitlines()[-1]
    assert "--tls-ca-file /k/ca --tls-cert /k/cert --tls-key /k/key" in own


def test_resources_of_the_workers_are_announced():
    """So that scoring on a GPU goes to workers that have one."""
    assert "--resources GPU=1,EDGETPU=2" in workers("slurm", resources={"GPU": 1, "EDGETPU": 2})
    assert "--resources" not in workers("slurm")


def test_a_selection_of_nodes_replaces_ours():
    """PBS takes one only."""
    found = directives(workers("pbs", directives=["-l select=1:ncpus=4:model=bro", "-l place=excl"]), "pbs")
    assert "-l select=1:ncpus=4:model=bro" in found
    assert "-l place=excl" in found
    assert len([line for line in found if "select" in line]) == 1


def test_interface_and_python_of_the_site():
    """They are the site's, not this machine's."""
    script = workers("slurm", interface="hsn0", python="/sw/my env/bin/python")
    assert "--interface hsn0" in script
    assert "'/sw/my env/bin/python' -m distributed" in script


@pytest.mark.parametrize("system", SYSTEMS)
def test_scratch_is_the_jobs_own_and_is_removed(system, tmp_path):
    """Temporary files go to a folder of the job's own on the node's disk, which is gone when the job is."""
    script = workers(system, scratch="$WHERE/scratch", stage=True)
    lines = script.splitlines()
    lines[-1] = 'env | grep -E "^(TMPDIR|BATCHPROC_)"; touch "$TMPDIR/left"; ls -ld "$TMPDIR"'
    done = subprocess.run(
        ["bash", "-c", "\n".join(line for line in lines if not line.startswith("module"))],
        env={"WHERE": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = re.search(r"^BATCHPROC_SCRATCH=(.*)$", done.stdout, re.MULTILINE)[1]
    assert Path(folder).parent == tmp_path / "scratch"
    assert f"TMPDIR={folder}" in done.stdout
    assert "BATCHPROC_STAGE=1" in done.stdout
    assert "drwx------" in done.stdout
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_driver_knows_its_end_and_runs_where_it_was_submitted():
    """Words of its command stay words."""
    script = driver("slurm")
    assert "export BATCHPROC_END_AT=$(($(date +%s) + 360000))" in script
    assert script.endswith("cd '/home/me/a b' || exit 1\nexec /sw/python -m it 'two words'\n")


@pytest.mark.parametrize("folder", ["/data/my run/log", "/data/50%/log", "/data/a;b/log"])
def test_paths_that_directives_cannot_say_are_refused(folder):
    """Directives know no quotation marks, and some letters mean something in them."""
    with pytest.raises(UsageError, match="letters, digits"):
        worker_script(site("slurm"), 1, Path(folder), DASK)


@pytest.mark.parametrize(
    ("system", "output", "errors", "at_work"),
    [
        ("slurm", "12 RUNNING\n13 PENDING\n14 COMPLETING\n", "", {"12", "13"}),
        ("slurm", "", "slurm_load_jobs error: Invalid job id specified\n", set()),
        ("slurm", "", "slurm_load_jobs error: Unable to contact slurm controller\n", None),
        ("slurm", "", "", set()),
        ("pbs", "Job Use\n----- -\n12.head R\n13.head C\n14.head Q\n", "", {"12", "14"}),
        ("pbs", "", "qstat: Unknown Job Id Error 12.head\n", set()),
        ("pbs", "", "qstat: cannot connect to server\n", None),
        ("lsf", "12 RUN\n13 PEND\n14 EXIT\n", "Job <15> is not found\n", {"12", "13"}),
        ("lsf", "", "Failed in an LSF library call\n", None),
    ],
)
def test_what_a_batch_system_says_of_jobs(system, output, errors, at_work):
    """Which wait or work; nothing is concluded where it does not answer."""
    assert SYSTEMS[system].at_work(output, errors) == at_work
