"""One subtraction of one pair by one program, in a process of its own: CPU, wall, memory, found, false.

Everybody gets the same images in memory, the same variances and the same PSFs (sfft, which takes none, gets none), and
is asked for a difference and for what it takes to detect on it. ``measure`` is called in a fresh process (`run_fresh`),
so that the largest resident size is the contender's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from batchproc.distribute.memory import keep_freed_memory
from tests.benchmarks._fresh import Peak, cpu_and_wall, rfft2_seconds
from tests.benchmarks._pairs import JITTER, Pair, count, load_pair

#: What a contender makes of a pair: the work that is timed, and what turns its result into a map of S/N.
Contender = Callable[[Pair, bool], tuple[Callable[[], Any], Callable[[Any], np.ndarray]]]

FLOOR_TRANSFORMS = 15


def measure(name: str, path: str, *, hard: bool = False, repeat: int = 3) -> dict[str, Any]:
    """Fewest CPU and wall seconds of several calls, MB above the inputs, and what was found.

    Returns ``{"absent": package}`` where the contender is not installed. The first call counts only where it is the
    only one: it may compile and plan.
    """
    pair = load_pair(path)
    try:
        work, score_of = CONTENDERS[name](pair, hard)
    except ImportError as error:
        return {"absent": error.name or str(error)}
    keep_freed_memory()  # as every worker of a run does
    peak = Peak()
    times, result = [], None
    for _ in range(repeat):
        del result
        result, cpu, wall = cpu_and_wall(work)
        times.append((cpu, wall))
    memory = peak.above_start_mb()
    best = times[1:] or times
    found = count(score_of(result), pair)
    return {
        "CPU": min(cpu for cpu, _ in best),
        "wall": min(wall for _, wall in best),
        "first CPU": times[0][0],
        "MB": memory,
        "rfft2": rfft2_seconds(pair.new.shape),
        **found,
    }


def _planes(pair: Pair) -> dict[str, Any]:
    return {
        "rms_new": np.full(pair.new.shape, pair.sigma_new, np.float32),
        "rms_ref": np.full(pair.new.shape, pair.sigma_ref, np.float32),
        "flux_ratio": pair.flux_ratio,
        "variance_new": pair.variance_new,
        "variance_ref": pair.variance_ref,
        "mask_new": pair.mask_new,
        "mask_ref": pair.mask_ref,
    }


def subtract_bare(pair: Pair, hard: bool, **options: Any) -> Any:
    """`batchproc.imaging.subtract.subtract`: tiles and masks; D, S, S_corr, flux and its error, nothing measured."""
    from batchproc.imaging.subtract import subtract

    options = {"star_residuals": False, "renormalise": False} | options
    planes = _planes(pair)  # inputs, like the images
    jitter = (JITTER, JITTER) if hard else (0.0, 0.0)

    def work() -> Any:
        done = subtract(
            pair.new, pair.ref, pair.psf_new, pair.psf_ref, registration_sigma=jitter, **planes, **options
        ).difference
        return done, done.score

    return work, lambda result: result[0].score_corr


def subtract_full(pair: Pair, hard: bool) -> Any:
    """The same as the flow asks for it: star residuals measured and counted, S_corr renormalised."""
    return subtract_bare(pair, hard, star_residuals=True, renormalise=True)


def one_frame(pair: Pair, hard: bool) -> Any:
    """`batchproc.zogy`: the whole image as one cyclic frame."""
    from batchproc import zogy

    shape = pair.new.shape
    centre = shape[1] / 2, shape[0] / 2
    keywords = {
        "sigma_new": pair.sigma_new,
        "sigma_ref": pair.sigma_ref,
        "flux_ratio": pair.flux_ratio,
        "variance_new": pair.variance_new,
        "variance_ref": pair.variance_ref,
        "mask": pair.mask if hard else None,
        "registration_sigma": (JITTER, JITTER) if hard else (0.0, 0.0),
    }
    psf_new, psf_ref = pair.psf_new.at(*centre), pair.psf_ref.at(*centre)

    def work() -> Any:
        done = zogy(pair.new, pair.ref, psf_new, psf_ref, **keywords)
        return done, done.score

    return work, lambda result: result[0].score_corr


def stdpipe(pair: Pair, hard: bool) -> Any:
    """`stdpipe.subtraction.run_zogy`, its fits of scale and shift off, in double precision as in its documentation."""
    from stdpipe.subtraction import run_zogy

    bad = pair.mask
    images = [np.where(bad, np.nan, image).astype(np.float64) for image in (pair.new, pair.ref)]
    errors = [np.sqrt(variance.astype(np.float64)) for variance in (pair.variance_new, pair.variance_ref)]
    jitter = JITTER if hard else 0.0

    def work() -> Any:
        return run_zogy(
            *images,
            err=errors[0].copy(),  # it writes into them
            template_err=errors[1].copy(),
            image_psf=_psfex(pair.psf_new),
            template_psf=_psfex(pair.psf_ref),
            scale=1 / pair.flux_ratio,
            dx=jitter,
            dy=jitter,
            fit_scale=False,
            fit_shift=False,
            get_psf=True,
            get_Fpsf=True,
            nthreads=1,
        )

    return work, lambda result: result[1]


def _psfex(psf: Any) -> dict[str, Any]:
    """A constant PSF as stdpipe describes them."""
    stamp = psf.at(0.0, 0.0)
    size = {"width": stamp.shape[1], "height": stamp.shape[0], "fwhm": psf.fwhm}
    return {"data": stamp[None], "degree": 0, "sampling": 1.0, "x0": 0, "y0": 0, "sx": 1, "sy": 1, **size}


def sfft(pair: Pair, hard: bool) -> Any:
    """`sfft` with a constant kernel (order 0) of half-width 2 FWHM on the CPU; bad pixels 0 in both images.

    Its Numba functions are compiled, or read from its cache, before the clock starts. It has no noise model: S/N is its
    difference seen through new's PSF, over the noise of that, brought to unit width on blank sky.
    """
    from scipy.signal import fftconvolve
    from sfft.sfftcore.SFFTConfigure import SingleSFFTConfigure
    from sfft.sfftcore.SFFTSubtract import GeneralSFFTSubtract

    images = [np.where(pair.mask, 0, image).astype(np.float64) for image in (pair.ref, pair.new)]
    ny, nx = pair.new.shape
    how = {"BACKEND_4SUBTRACT": "Numpy", "NUM_CPU_THREADS_4SUBTRACT": 1, "VERBOSE_LEVEL": 0}
    plan = SingleSFFTConfigure.SSC(
        NX=ny, NY=nx, KerHW=round(2 * pair.psf_new.fwhm), KerPolyOrder=0, BGPolyOrder=0, ConstPhotRatio=True, **how
    )

    def work() -> Any:
        ref, new = images
        return GeneralSFFTSubtract.GSS(ref, new, ref, new, plan, **how)[1]

    def score(difference: np.ndarray) -> np.ndarray:
        psf = pair.psf_new.at(0.0, 0.0)
        variance = pair.variance_new + pair.flux_ratio**2 * pair.variance_ref
        snr = fftconvolve(difference, psf, "same") / np.sqrt(np.maximum(fftconvolve(variance, psf**2, "same"), 1e-9))
        low, high = np.percentile(snr, [15.865525, 84.134475])
        return snr / ((high - low) / 2)

    return work, score


CONTENDERS: dict[str, Contender] = {
    "subtract": subtract_bare,
    "subtract, all on": subtract_full,
    "zogy": one_frame,
    "stdpipe": stdpipe,
    "sfft": sfft,
}
