"""Bringing one image onto another grid: what it costs, and what it does to stars whose truth is painted on that grid.

The image is a noiseless field of separate stars of FWHM 2.4 pixels; the grids are tangent planes, dithered and turned
by 0.3 degrees (SWarp knows no SIP). ``measure`` is called in a fresh process (`run_fresh`).
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from batchproc.distribute.memory import keep_freed_memory
from tests.benchmarks._fresh import Peak, cpu_and_wall, rfft2_seconds
from tests.benchmarks._quadrant import tan_wcs

FWHM = 2.4
SPACING = 32  # pixels between stars


def measure(name: str, *, side: int = 2048, repeat: int = 3) -> dict[str, Any]:
    """Fewest CPU and wall seconds of several calls, MB above the inputs, and the errors of flux, position and width.

    Returns ``{"absent": program}`` where the contender is not installed.
    """
    try:
        work = CONTENDERS[name](field := _Field(side))
    except ImportError as error:
        return {"absent": error.name or str(error)}
    keep_freed_memory()  # as every worker of a run does
    peak = Peak()
    times, result = [], None
    for _ in range(repeat):
        del result
        children = _cpu_of_children()
        result, cpu, wall = cpu_and_wall(work)
        times.append((cpu + _cpu_of_children() - children, wall))
    memory = peak.above_start_mb()
    best = times[1:] or times
    return {
        "CPU": min(cpu for cpu, _ in best),
        "wall": min(wall for _, wall in best),
        "MB": memory if name != "SWarp" else None,
        "Mpix": side**2 / 1e6,
        "rfft2": rfft2_seconds((side, side)),
        **field.errors(result),
    }


class _Field:
    """The stars on the grid of the image and, as they should come out, on the other."""

    def __init__(self, side: int) -> None:
        from batchproc.imaging.simulate import add_sources

        rng = np.random.default_rng(5)
        self.shape = (side, side)
        self.wcs = tan_wcs(self.shape, (0.0, 0.0), 0.0)
        self.wcs_out = tan_wcs(self.shape, (7.3, -4.6), 0.3)
        places = np.arange(2 * SPACING, side - 2 * SPACING, SPACING) + 0.5
        x, y = np.meshgrid(places, places)
        self.x, self.y = (a.ravel() + rng.uniform(-0.5, 0.5, a.size) for a in (x, y))
        xi, yi = self.wcs.all_world2pix(*self.wcs_out.all_pix2world(self.x, self.y, 0), 0)
        flux = np.full(self.x.size, 1e5)
        self.data = add_sources(np.zeros(self.shape), xi, yi, flux, FWHM).astype(np.float32)
        self.truth = add_sources(np.zeros(self.shape), self.x, self.y, flux, FWHM)

    def errors(self, image: np.ndarray) -> dict[str, float]:
        """Of flux in a circle of 2.5 FWHM, of windowed position, and of width (by the sum of squares: 1 / FWHM²)."""
        import sep

        image = np.ascontiguousarray(np.nan_to_num(image), np.float64)
        flux, true = (sep.sum_circle(a, self.x, self.y, 2.5 * FWHM)[0] for a in (image, self.truth))
        (x, y, _), (tx, ty, _) = (
            sep.winpos(a, self.x, self.y, np.full(self.x.size, FWHM / 2.35)) for a in (image, self.truth)
        )
        squares, true_squares = (sep.sum_circle(a**2, self.x, self.y, 2.5 * FWHM)[0] for a in (image, self.truth))
        ratio = flux / true
        width = np.sqrt(true_squares / squares * ratio**2)
        return {
            "flux bias": float(np.median(ratio) - 1),
            "flux rms": float(np.std(ratio)),
            "position rms": float(np.sqrt(np.mean((x - tx) ** 2 + (y - ty) ** 2) / 2)),
            "wider by": float(np.median(width) - 1),
        }


def ours(field: _Field) -> Any:
    """`batchproc`: the map through both WCS and Lanczos 3, with mask."""
    from batchproc.imaging.pixelmap import PixelMap
    from batchproc.imaging.resample import resample

    mask = np.zeros(field.shape, np.uint8)

    def work() -> np.ndarray:
        pixel_map = PixelMap.from_wcs(field.wcs_out, field.wcs, field.shape)
        return resample(field.data, pixel_map, field.shape, mask=mask).data

    return work


def interp(field: _Field) -> Any:
    """`reproject_interp`, bicubic. It conserves surface brightness; on these grids of one scale that is flux."""
    from reproject import reproject_interp

    def work() -> np.ndarray:
        arguments = (field.data, field.wcs), field.wcs_out, field.shape
        return reproject_interp(*arguments, order="bicubic", roundtrip_coords=False, return_footprint=False)

    return work


def adaptive(field: _Field) -> Any:
    """`reproject_adaptive` with flux conserved."""
    from reproject import reproject_adaptive

    def work() -> np.ndarray:
        arguments = (field.data, field.wcs), field.wcs_out, field.shape
        return reproject_adaptive(*arguments, conserve_flux=True, roundtrip_coords=False, return_footprint=False)

    return work


def swarp(field: _Field) -> Any:
    """SWarp, Lanczos 3, one thread, reading and writing FITS files as it must."""
    program = shutil.which("SWarp") or shutil.which("swarp")
    if program is None:
        raise ImportError("SWarp is not installed", name="SWarp")
    from astropy.io import fits

    folder = Path(tempfile.mkdtemp(prefix="batchproc-swarp-"))
    fits.PrimaryHDU(field.data, field.wcs.to_header()).writeto(folder / "in.fits")
    header = fits.PrimaryHDU(np.zeros(field.shape, np.float32), field.wcs_out.to_header()).header
    (folder / "out.head").write_text(header.tostring(sep="\n", endcard=False, padding=False) + "\nEND\n")
    options = "-RESAMPLING_TYPE LANCZOS3 -SUBTRACT_BACK N -FSCALASTRO_TYPE VARIABLE -NTHREADS 1 -WRITE_XML N"
    command = [program, "in.fits", "-IMAGEOUT_NAME", "out.fits", *options.split(), "-VERBOSE_TYPE", "QUIET"]

    def work() -> np.ndarray:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return fits.getdata(folder / "out.fits")

    return work


CONTENDERS = {"batchproc": ours, "reproject interp": interp, "reproject adaptive": adaptive, "SWarp": swarp}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
