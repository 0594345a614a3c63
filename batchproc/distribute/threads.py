"""Threads are counted in one place: one number feeds every library that makes threads of its own.

Most libraries read their environment when they are first imported, so a new process must have it before; what is
imported already is told as far as it listens. FFTW and ONNX Runtime take their number with each plan and session.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

__all__ = ["limit_threads", "thread_environment"]

_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "BLOSC_NTHREADS",
)


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables for a process that has not imported NumPy yet."""
    return dict.fromkeys(_VARIABLES, str(threads))


def limit_threads(threads: int) -> ExitStack:
    """Hold what this process has imported to so many threads: Numba, Blosc, Zarr, Arrow, and BLAS with threadpoolctl.

    Returns
    -------
    ExitStack
        Used in a ``with`` block, it puts back at its end what was before; else the limits stay.
    """
    before = ExitStack()
    if "numba" in sys.modules:
        import numba

        before.callback(numba.set_num_threads, numba.get_num_threads())
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if "numcodecs" in sys.modules:
        from numcodecs import blosc

        before.callback(blosc.set_nthreads, blosc.set_nthreads(threads))
    if "zarr" in sys.modules:
        import zarr

        before.callback(zarr.config.set, {"threading.max_workers": zarr.config.get("threading.max_workers")})
        zarr.config.set({"threading.max_workers": threads})
    if "pyarrow" in sys.modules:
        import pyarrow

        before.callback(pyarrow.set_cpu_count, pyarrow.cpu_count())
        pyarrow.set_cpu_count(threads)
    try:
        import threadpoolctl
    except ImportError:  # not one of our dependencies: then the environment alone holds BLAS
        return before
    before.callback(threadpoolctl.threadpool_limits(threads).restore_original_limits)
    return before
