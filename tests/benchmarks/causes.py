"""What makes false detections, planted one by one: ``python -m tests.benchmarks.causes``.

One row a cause: how many detections it makes, and how many of them carry no flag, without its remedy and with it. Where
the remedy is a flag, "without" does not look at that flag; where it is a variance, a mask or a table, it is left out.
`tests/imaging/test_causes.py` holds the rows against their bounds. PSFs, noise and variances are handed in, except
where their error is the cause.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.ndimage import convolve1d
from scipy.spatial import cKDTree

from batchproc import simulate
from batchproc.config import DetectConfig
from batchproc.imaging.detect import Candidates, detect, find_peaks
from batchproc.imaging.saturation import grow_saturated, saturated_stars
from batchproc.imaging.sources import bright_stars, find_sources
from batchproc.imaging.subtract import subtract
from batchproc.records import Flag, MaskBit

SHAPE = (640, 640)
NONE = Flag(0)
PARTICLE = Flag.COSMIC_RAY | Flag.HOT_PIXEL_REF | Flag.STREAK | Flag.BAD_FIT
QUIET = {"n_transients": 0, "n_galaxies": 20, "n_stars": 250, "star_flux": (500.0, 1e5)}


@dataclass(frozen=True)
class Cause:
    """A pair that shows one cause, and what to do without and with its remedy."""

    pair: simulate.SimulatedPair
    near: np.ndarray | None = None  # (n, 2): detections within `radius` of these count; all of them without
    radius: float = 4.0
    flags: Flag = NONE  # the remedy's
    without: dict[str, Any] = field(default_factory=dict)  # arguments of `subtract`
    remedy: dict[str, Any] = field(default_factory=dict)
    bright: bool = False  # the remedy has a list of bright stars
    peaks: bool = False  # without the remedy, every peak is a detection
    sources: bool = False


def run(pair: simulate.SimulatedPair, *, bright: bool = False, sources: bool = False, **more: Any) -> Candidates:
    """Subtraction and detection with known PSFs and variances; `more` replaces arguments of `subtract`."""
    given: dict[str, Any] = {
        "rms_new": np.full(pair.new.shape, pair.sigma_new, np.float32),
        "rms_ref": np.full(pair.new.shape, pair.sigma_ref, np.float32),
        "flux_ratio": pair.flux_ratio,
        "variance_new": pair.variance_new,
        "variance_ref": pair.variance_ref,
        "mask_new": grow_saturated(pair.mask_new, pair.psf_new.fwhm),
        "mask_ref": grow_saturated(pair.mask_ref, pair.psf_ref.fwhm),
        "star_residuals": False,
        "renormalise": False,  # the noise is known, and what is planted would count as some
    }
    result = subtract(pair.new, pair.ref, more.pop("psf_new", pair.psf_new), pair.psf_ref, **given | more)
    found = find_sources(pair.ref, given["rms_ref"], pair.mask_ref) if bright or sources else None
    stars = None
    if bright:
        f_s, fwhm = result.difference.kernels[0].f_s, max(pair.psf_new.fwhm, pair.psf_ref.fwhm)
        stars = saturated_stars(result.difference.mask, fwhm) + bright_stars(
            found, snr_of_flux=pair.flux_ratio * np.sqrt(f_s), misfit=result.residuals.amplitude, fwhm=fwhm
        )
    return detect(result.difference, sources=found, bright=stars)


def count(found: Candidates, cause: Cause, ignored: Flag = NONE) -> tuple[int, int]:
    """Detections that the cause makes, and those of them without a flag (but the ignored ones)."""
    own = np.ones(len(found), bool)
    if cause.near is not None and len(found):
        own = cKDTree(cause.near).query(np.column_stack([found["x"], found["y"]]))[0] < cause.radius
    return int(own.sum()), int((own & (found["flags"] & ~int(ignored) == 0)).sum())


def measure(cause: Cause) -> dict[str, int]:
    """Detections and unflagged ones, without and with the remedy."""
    found = run(cause.pair, sources=cause.sources, bright=cause.bright, **cause.remedy)
    kept, kept_clean = count(found, cause)
    if cause.peaks:
        lost, lost_clean = all_peaks(cause)
    elif cause.without != cause.remedy or cause.bright:
        lost, lost_clean = count(run(cause.pair, **cause.without), cause, cause.flags)
    else:
        lost, lost_clean = count(found, cause, cause.flags)
    return {"without": lost, "without, unflagged": lost_clean, "with": kept, "with, unflagged": kept_clean}


def all_peaks(cause: Cause) -> tuple[int, int]:
    """Peaks of S_corr above the threshold: what a detector that knows no trails reports."""
    pair = cause.pair
    rms = [np.full(pair.new.shape, sigma, np.float32) for sigma in (pair.sigma_new, pair.sigma_ref)]
    d = subtract(
        pair.new, pair.ref, pair.psf_new, pair.psf_ref, rms_new=rms[0], rms_ref=rms[1], flux_ratio=pair.flux_ratio
    ).difference
    x, y, _ = find_peaks(d.score_corr, DetectConfig())
    own = cKDTree(cause.near).query(np.column_stack([x, y]))[0] < cause.radius
    return int(own.sum()), int(own.sum())


def places(artefacts: np.ndarray, image: str, kind: str) -> np.ndarray:
    rows = artefacts[(artefacts["image"] == image) & (artefacts["kind"] == kind)]
    return np.column_stack([rows["x"], rows["y"]])


def grid(step: int = 40) -> np.ndarray:
    x, y = np.meshgrid(*[np.arange(step, SHAPE[0] - step + 1, step)] * 2)
    return np.column_stack([x.ravel(), y.ravel()]).astype(float)


def cosmic_rays() -> Cause:
    pair = simulate.simulate_pair(SHAPE, seed=1, cosmic_rays=150, **QUIET)
    return Cause(pair, places(pair.artefacts, "new", "cosmic_ray"), 6.0, PARTICLE)


def hot_pixels() -> Cause:
    pair = simulate.simulate_pair(SHAPE, seed=2, hot_pixels=150, **QUIET)
    return Cause(pair, places(pair.artefacts, "new", "hot_pixel"), 3.0, PARTICLE)


def hot_pixels_of_a_resampled_reference() -> Cause:
    """Hits that a Lanczos kernel has moved by 0.3 and 0.4 pixels."""
    pair = simulate.simulate_pair(SHAPE, seed=3, fwhm_new=2.8, fwhm_ref=2.8, **QUIET)
    where, rng = grid(), np.random.default_rng(3)
    hits = np.zeros(SHAPE)
    hits[where[:, 1].astype(int), where[:, 0].astype(int)] = pair.sigma_ref * rng.uniform(20, 100, len(where))
    for axis, shift in ((1, 0.3), (0, 0.4)):
        t = np.arange(-3, 4) - shift
        kernel = np.sinc(t) * np.sinc(t / 3) * (np.abs(t) < 3)
        hits = convolve1d(hits, kernel / kernel.sum(), axis=axis)
    return Cause(replace(pair, ref=(pair.ref + hits).astype(np.float32)), where + np.array([0.3, 0.4]), 3.0, PARTICLE)


def saturated() -> Cause:
    """Stars up to a hundred times the full well, with their bleeds; a PSF that is 2 % too wide."""
    settings = QUIET | {"star_flux": (1e6, 5e7), "n_stars": 40}
    pair = simulate.simulate_pair(SHAPE, seed=4, **settings)
    mask = np.zeros(SHAPE, np.uint8)
    wrong = {"psf_new": Wider(pair, 1.02)}
    return Cause(
        pair,
        flags=Flag.SATURATED | Flag.BRIGHT_STAR,
        without=wrong | {"mask_new": mask, "mask_ref": mask},
        remedy=wrong | {"star_residuals": True},
        bright=True,
    )


def wrong_psf() -> Cause:
    """Stars of S/N up to 2000 and a PSF that is 2 % too wide."""
    pair = simulate.simulate_pair(SHAPE, seed=5, **QUIET | {"star_flux": (5e3, 1e6), "saturation": 1e9})
    wrong = {"psf_new": Wider(pair, 1.02)}
    return Cause(pair, flags=Flag.BRIGHT_STAR, without=wrong, remedy=wrong | {"star_residuals": True}, bright=True)


def wrong_flux_ratio() -> Cause:
    pair = simulate.simulate_pair(SHAPE, seed=6, **QUIET | {"star_flux": (1e4, 3e5)})
    wrong = {"flux_ratio": 1.02 * pair.flux_ratio}
    return Cause(pair, without=wrong, remedy=wrong | {"star_residuals": True})


def registration() -> Cause:
    """Each source of ref is displaced by 0.15 pixel (rms in x and in y)."""
    pair = simulate.simulate_pair(SHAPE, seed=7, registration_jitter=0.15, **QUIET | {"star_flux": (5e3, 3e5)})
    return Cause(pair, flags=Flag.DIPOLE, remedy={"star_residuals": True}, sources=True)


def moving_stars() -> Cause:
    """One star in twenty has moved by 0.4 pixel since the reference was taken."""
    pair = simulate.simulate_pair(SHAPE, seed=8, **QUIET)
    where = grid(60)
    flux = np.geomspace(1e4, 6e4, len(where))
    new, ref = (
        np.asarray(simulate.add_sources(np.zeros(SHAPE), where[:, 0] + dx, where[:, 1], flux, psf))
        for dx, psf in ((0.4, pair.psf_new), (0.0, pair.psf_ref))
    )
    moved = replace(
        pair,
        new=(pair.new + new).astype(np.float32),
        ref=(pair.ref + ref / pair.flux_ratio).astype(np.float32),
        variance_new=(pair.variance_new + new).astype(np.float32),
        variance_ref=(pair.variance_ref + ref / pair.flux_ratio / pair.scene.depth).astype(np.float32),
    )
    return Cause(moved, where, 6.0, Flag.DIPOLE, sources=True)


def trail(dashed: bool = False) -> Cause:
    pair = simulate.simulate_pair((1024, 1024), seed=9, satellite_trail=10.0, **QUIET)
    points = places(pair.artefacts, "new", "trail")
    if dashed:
        plain = simulate.simulate_pair((1024, 1024), seed=9, **QUIET)
        y, x = np.mgrid[:1024, :1024]
        way = (points[-1] - points[0]) / np.hypot(*(points[-1] - points[0]))
        off = (((x - points[0, 0]) * way[0] + (y - points[0, 1]) * way[1]) // 150).astype(int) % 2 == 1
        images = {name: np.where(off, getattr(plain, name), getattr(pair, name)) for name in ("new", "variance_new")}
        pair = replace(pair, **images)
    return Cause(pair, points, 14.0, Flag.STREAK, peaks=True)


def dashes() -> Cause:
    """Dashes of 150 pixels, as of a combination of exposures."""
    return trail(dashed=True)


def coverage() -> Cause:
    """The reference ends within the image, along a ragged slanted edge."""
    pair = simulate.simulate_pair(SHAPE, seed=10, **QUIET)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    beyond = x > 420 + 0.3 * y
    mask = np.where(beyond, np.uint8(MaskBit.NO_DATA), np.uint8(0))
    cut = replace(pair, ref=np.where(beyond, 0, pair.ref), mask_ref=mask | pair.mask_ref)
    return Cause(cut, flags=Flag.EDGE, without={"mask_ref": pair.mask_ref}, remedy={})


def patches() -> Cause:
    """Smooth light that one image has more of than the other: galaxies and sky that are not subtracted to the last."""
    pair = simulate.simulate_pair(SHAPE, seed=11, **QUIET)
    where = grid(80)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    light = sum(np.exp(-((x - i) ** 2 + (y - j) ** 2) / (2 * 8.0**2)) for i, j in where)
    return Cause(replace(pair, new=(pair.new + 20 * light).astype(np.float32)), where, 20.0, Flag.BAD_FIT)


class Wider:
    """The PSF of new, wider by a factor."""

    def __init__(self, pair: simulate.SimulatedPair, factor: float) -> None:
        scene = replace(pair.scene, fwhm_new=factor * pair.scene.fwhm_new)
        self._psf = simulate.scene_psfs(scene, pair.new.shape, pair.new.shape)[0]
        self.size, self.fwhm, self.at = self._psf.size, self._psf.fwhm, self._psf.at


CAUSES: dict[str, Callable[[], Cause]] = {
    "cosmic-ray tracks in new": cosmic_rays,
    "hot pixels in new": hot_pixels,
    "hot pixels in a resampled ref": hot_pixels_of_a_resampled_reference,
    "saturated stars and bleeds": saturated,
    "bright stars, PSF 2 % too wide": wrong_psf,
    "flux ratio 2 % off": wrong_flux_ratio,
    "registration scatter 0.15 px": registration,
    "stars that moved 0.4 px": moving_stars,
    "satellite trail": trail,
    "satellite trail in dashes": dashes,
    "edge of the reference": coverage,
    "smooth patches": patches,
}


def table(names: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Rows by name of the cause."""
    return {name: measure(CAUSES[name]()) for name in names or CAUSES}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    print(f"{'cause':34s} {'without remedy':>16s} {'unflagged':>10s} {'with remedy':>13s} {'unflagged':>10s}")
    for name, row in table().items():
        a, b, c, d = row.values()
        print(f"{name:34s} {a:16d} {b:10d} {c:13d} {d:10d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
