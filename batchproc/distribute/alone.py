"""A call in a process of its own, whose end is not ours: what makes it crash, hang or eat memory is found out here.

The child has the caller's Python, modules and number of threads, and does nothing else. Its parent watches time and
memory, and tells precisely what became of it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any

from batchproc.distribute.threads import thread_environment
from batchproc.errors import CrashError, MemoryLimitError, TimeLimitError

__all__ = ["run_alone"]

_POLL_S = 0.05
_BEGIN_S = 300.0  # that a child may take to begin, besides its limit
_READY = b"!"
_LAST_WORDS = 4000  # characters kept of what the child said on standard error
_DUMP_S = 5.0  # that it gets to say where it was
_PR_SET_PDEATHSIG = 1


def run_alone(
    function: Callable[..., Any],
    *arguments: Any,
    time_limit: float = 0.0,
    memory_limit: int = 0,
    threads: int = 1,
    imports: Sequence[str] = (),
) -> Any:
    """Call a function in a child process.

    Parameters
    ----------
    function, *arguments
        What can be pickled (by value where no module has it).
    time_limit : float
        Seconds, from when the child is ready; 0: none.
    memory_limit : int
        Bytes of resident memory; 0: none.
    threads : int
        For every library of the child.
    imports : sequence of str
        Modules that the child imports to be ready: on a busy machine that may take longer than the call.

    Returns
    -------
    What the function returns; what it raises is raised here.

    Raises
    ------
    TimeLimitError, MemoryLimitError
        It was stopped at a limit; ``.metadata`` has the numbers.
    CrashError
        The child ended without an answer. These three have ``last_words`` in their ``.metadata``: what the child said
        last, with where each of its threads was.
    """
    import cloudpickle

    environment = os.environ | thread_environment(threads) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Files without a name in place of pipes: nothing can fill up, and nothing is left behind.
    with TemporaryFile() as question, TemporaryFile() as answer, TemporaryFile() as words:
        cloudpickle.dump((imports, function, arguments), question)
        question.seek(0)
        command = [sys.executable, "-m", "batchproc.distribute.alone", str(os.getpid())]
        with subprocess.Popen(command, stdin=question, stdout=answer, stderr=words, env=environment) as child:
            try:
                _watch(child, answer, words, time_limit, memory_limit)
            finally:
                child.kill()
        answer.seek(0)
        reply = answer.read()
        if len(reply) <= len(_READY):
            raise _crash(child.returncode, words)
        value, error = pickle.loads(reply[len(_READY) :])
        if error is not None:
            raise error
        return value


def _watch(
    child: subprocess.Popen[bytes], answer: IO[bytes], words: IO[bytes], time_limit: float, memory_limit: int
) -> None:
    """Wait for its end; raise where it goes beyond a limit."""
    import psutil

    ready = False
    start = time.monotonic() + _BEGIN_S
    process = psutil.Process(child.pid)
    while True:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_S)
            return
        if not ready and os.fstat(answer.fileno()).st_size:
            ready, start = True, time.monotonic()
        if time_limit and time.monotonic() - start > time_limit:
            _ask_where(child)
            raise TimeLimitError(
                f"took longer than time_limit = {time_limit:g} s, also in a process of its own; raise time_limit if "
                "it may, or look at its traceback",
                limit_s=time_limit,
                last_words=_last(words),
            )
        with suppress(psutil.Error):
            used = process.memory_info().rss
            if memory_limit and used > memory_limit:
                _ask_where(child)
                raise MemoryLimitError(
                    f"needs more than the {memory_limit / 1e9:.2f} GB that a worker has ({used / 1e9:.2f} GB when it "
                    "was stopped in a process of its own); give workers more memory, with fewer of them "
                    "(`batchproc retry RUN --workers N`) or by the site's profile",
                    limit_bytes=memory_limit,
                    used_bytes=used,
                    last_words=_last(words),
                )


def _ask_where(child: subprocess.Popen[bytes]) -> None:
    """Have it write where its threads are, which ends it."""
    child.send_signal(signal.SIGABRT)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_DUMP_S)
    child.kill()


def _crash(code: int, words: IO[bytes]) -> CrashError:
    if code == -signal.SIGKILL:
        how = "was killed (SIGKILL), most likely by the system for want of memory"
    elif code < 0:
        how = f"crashed ({_signal_name(-code)})"
    else:
        how = f"left with exit code {code}"
    return CrashError(
        f"its process {how}, with nothing else to do; its traceback tells where",
        exit_code=code,
        last_words=_last(words),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last(words: IO[bytes]) -> str:
    words.seek(0)
    text = words.read().decode(errors="replace")
    # A stack is told from its innermost frame on, so its beginning is what counts.
    start = text.find("Fatal Python error")
    return text[start : start + _LAST_WORDS] if start >= 0 else text[-_LAST_WORDS:]


def _main(parent: int) -> None:
    """The child: one call, from standard input to standard output."""
    with suppress(OSError, AttributeError, TypeError):  # Linux: not to outlive the worker
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    faulthandler.enable()
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # what libraries print is no answer
        imports, function, arguments = pickle.load(sys.stdin.buffer)
        for name in imports:
            importlib.import_module(name)
        answer.write(_READY)
        answer.flush()
        reply: tuple[Any, Exception | None]
        try:
            reply = (function(*arguments), None)
        except Exception as error:
            reply = (None, error)
        answer.write(pickle.dumps(reply))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
