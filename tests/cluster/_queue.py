"""A batch system that fits into a folder: stand-ins of the commands of PBS and LSF, to be put first on the path.

``python -m tests.cluster._queue FOLDER`` is what every stand-in calls. A job is a process group of this machine; what
was asked is in ``FOLDER/asked``. Each of the files ``FOLDER/refuse`` and ``FOLDER/lose`` makes one submission fail: it
is refused, or its job ends at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SUBMIT = {"qsub": "{job}.head", "bsub": "Job <{job}> is submitted to queue <normal>."}
ROOT = Path(__file__).parents[2]


def install(folder: Path) -> None:
    """Executables in ``folder/bin``."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in ("qsub", "qstat", "qdel", "bsub", "bjobs", "bkill"):
        path = folder / "bin" / name
        path.write_text(
            f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.cluster._queue {folder} {name} "$@"\n'
        )
        path.chmod(0o755)


def alive(folder: Path, job: str) -> bool:
    """Whether the process group of a job has living members."""
    try:
        pid = int((folder / "jobs" / job).read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return False
    return state != "Z"


def kill(folder: Path, job: str, number: int = signal.SIGKILL) -> None:
    if alive(folder, job):
        os.killpg(int((folder / "jobs" / job).read_text()), number)


def _submit(folder: Path, name: str, script: str) -> int:
    for trouble in ("refuse", "lose"):
        if (folder / trouble).exists():
            (folder / trouble).unlink()
            if trouble == "refuse":
                print(f"{name}: would exceed the limit of your group", file=sys.stderr)
                return 1
            script = "#!/bin/sh\nexit 1\n"
    job = str(1000 + len(list((folder / "jobs").iterdir())))
    (folder / f"{job}.sh").write_text(script)
    with (folder / f"{job}.out").open("w") as output:
        process = subprocess.Popen(
            ["bash", str(folder / f"{job}.sh")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PBS_JOBID": job},
        )
    (folder / "jobs" / job).write_text(str(process.pid))
    print(SUBMIT[name].format(job=job))
    return 0


def main(folder: Path, name: str, words: list[str]) -> int:
    with (folder / "asked").open("a") as file:
        file.write(" ".join([name, *words]) + "\n")
    ids = [word for word in words if word.isdigit()]
    if name in SUBMIT:
        return _submit(folder, name, Path(words[-1]).read_text() if words else sys.stdin.read())
    if name in ("qdel", "bkill"):
        for job in ids:
            kill(folder, job, signal.SIGTERM)
        return 0
    for job in ids:
        if alive(folder, job):
            print(f"{job}.head batchproc me 0 R normal" if name == "qstat" else f"{job} RUN")
        else:
            print(f"qstat: Unknown Job Id {job}" if name == "qstat" else f"Job <{job}> is not found", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
