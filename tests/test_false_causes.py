"""What makes false detections, planted one by one: none of it comes out unflagged.

A ratio of fluxes that varies across the image, stars that bleed, references that end inside the image.
"""

from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS
from scipy.ndimage import distance_transform_edt

from batchproc import flow, simulate
from batchproc.config import Config
from batchproc.imaging.align import align
from batchproc.imaging.photometry import measure_flux_ratio
from batchproc.records import MaskBit

N = 768
FULL_WELL = 6e4


def subtract(new, ref, config=None):
    """The catalogue of a pair, and the distance of its rows from the places where `near` will be asked for."""
    return flow.subtract_exposures(new, align(new, [ref]), config or Config(), image_id="pair")


def at(plane, catalogue):
    """Values of a plane at the candidates."""
    row, column = (
        np.clip(np.rint(catalogue[name]).astype(int), 0, n - 1) for name, n in zip("yx", plane.shape, strict=True)
    )
    return plane[row, column]


# --- A ratio that varies ----------------------------------------------------------------------------------------------


def test_the_ratio_follows_a_gradient_among_variable_stars():
    """±2 % across the image, a tenth of the stars variable by up to a factor of 4: right within 0.3 % everywhere."""
    rng = np.random.default_rng(5)
    n = 300
    x, y = rng.uniform(0, 1000, (2, n))
    true, noise = rng.uniform(300, 1e4, n), np.ones(n)
    new = 1.3 * true * (1 + 0.02 * (2 * x / 1000 - 1)) + rng.normal(size=n)
    new[:30] *= rng.uniform(0.5, 4, 30)
    ratio = measure_flux_ratio(new, noise, true + rng.normal(size=n), noise, x=x, y=y, shape=(1000, 1000))
    expected = 1.3 * (1 + 0.02 * (2 * np.arange(1000) / 1000 - 1))
    assert np.abs(ratio.value * ratio.image((1000, 1000)) / expected - 1).max() < 0.003
    assert ratio.scatter < 0.003


def tilted_pair(seed):
    """Bright stars, a reference through a flat field that is ±2 % off, and a tenth of the stars brighter or fainter.

    Returns the two exposures, and the positions of the variable stars.
    """
    pair = simulate.simulate_pair(
        (N, N), seed=seed, n_transients=0, n_stars=700, n_galaxies=20, star_flux=(2e3, 4e5), star_slope=0.15
    )
    rng = np.random.default_rng(seed)
    new, ref = pair.exposures()
    which = rng.choice(len(pair.stars), len(pair.stars) // 10, replace=False)
    x, y, flux = (pair.stars[name][which] for name in ("x", "y", "flux"))
    data = simulate.inject(new.data, pair.psf_new, x, y, 0.3 * flux * rng.choice([-1, 1], len(x)), rng=rng)
    tilt = (1 + 0.02 * (2 * np.arange(N, dtype=np.float32) / N - 1))[None, :]
    return replace(new, data=data), replace(ref, data=pair.ref * tilt + pair.sky_ref), (x, y)


def test_a_smooth_ratio_takes_the_false_detections_of_a_constant_one_away(monkeypatch):
    """Without counting misfit as noise: one number for the ratio leaves several false detections at bright stars
    towards the edges, the smooth ratio one at most."""
    new, ref, (x, y) = tilted_pair(11)
    config = Config.from_dict({"subtract": {"star_residuals": False}})

    def false():
        found = subtract(new, ref, config).catalogue
        far = np.hypot(found["x"][:, None] - x, found["y"][:, None] - y).min(axis=1) > 4
        return int((far & (found["flags"] == 0)).sum())

    smooth = false()
    monkeypatch.setattr(flow, "measure_flux_ratio", lambda *stars, **places: measure_flux_ratio(*stars))
    constant = false()
    assert smooth <= 1
    assert constant >= smooth + 4


# --- Stars that bleed -------------------------------------------------------------------------------------------------


def bleed(counts, rng):
    """Charge above the full well runs along the columns; it trails off at the ends, and some spills to the sides."""
    data = np.array(counts, np.float64)
    simulate_bleed(data)
    full = data >= FULL_WELL
    for column in np.flatnonzero(full.sum(axis=0) > 25):
        rows = np.flatnonzero(full[:, column])
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
            if len(run) < 25:
                continue
            for start, step in ((run[0] - 1, -1), (run[-1] + 1, 1)):
                tail = start + step * np.arange(30)
                fade = 0.4 * FULL_WELL * np.exp(-np.arange(30) / 5)
                inside = (tail >= 0) & (tail < len(data))
                data[tail[inside], column] += rng.poisson(fade[inside])
            for side in (column - 1, column + 1):
                if 0 <= side < data.shape[1]:
                    data[run, side] += rng.poisson(0.03 * FULL_WELL, len(run))
    return np.minimum(data, FULL_WELL).astype(np.float32)


def simulate_bleed(data):
    """Half of what exceeds the full well flows up, half down."""
    for column in np.flatnonzero((data > FULL_WELL).any(axis=0)):
        line = data[:, column]
        for row in np.flatnonzero(line > FULL_WELL):
            excess, line[row] = line[row] - FULL_WELL, FULL_WELL
            for step in (-1, 1):
                left, at_row = excess / 2, row + step
                while left > 0 and 0 <= at_row < len(line):
                    taken = min(max(FULL_WELL - line[at_row], 0), left)
                    line[at_row] += taken
                    left -= taken
                    at_row += step


@pytest.mark.parametrize("seed", [1, 2])
def test_bleeding_stars_leave_nothing_unflagged(seed):
    """Eight stars of up to 10⁸ electrons, bleeds hundreds of pixels long with fading tails, masked only where full:
    within 40 pixels of them everything is flagged, and less than 3 % of the image is lost."""
    pair = simulate.simulate_pair((N, N), seed=seed, n_transients=0, n_stars=900, psf_variation=0.04)
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(60, N - 60, (2, 8))
    flux = np.exp(rng.uniform(*np.log([2e6, 1e8]), 8))
    exposures = []
    for exposure, psf, flux_seen in zip(
        pair.exposures(), (pair.psf_new, pair.psf_ref), (flux, flux / 1.3), strict=True
    ):
        data = bleed(simulate.inject(exposure.data, psf, x, y, flux_seen, rng=rng), rng)
        mask = np.where(data >= FULL_WELL, np.uint8(MaskBit.SATURATED), np.uint8(0))
        exposures.append(replace(exposure, data=data, mask=mask, saturation=FULL_WELL))
    full = (exposures[0].mask | exposures[1].mask) != 0
    assert full.sum(axis=0).max() > 100
    result = subtract(*exposures)
    near = at(distance_transform_edt(~full), result.catalogue) < 40
    assert near.sum() > 5
    assert not (near & (result.catalogue["flags"] == 0)).any()
    assert result.receipt.quality["masked_fraction"] < 0.03


# --- Edges of coverage ------------------------------------------------------------------------------------------------


def wcs_of(dx, dy):
    """A plain TAN solution, its reference pixel moved."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [150, 2]
    wcs.wcs.crpix, wcs.wcs.cd = [N / 2 + dx, N / 2 + dy], np.diag([-1, 1]) * 0.3 / 3600
    wcs.wcs.set()
    return wcs


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.37, -0.41)])
def test_a_reference_that_ends_inside_the_image_leaves_nothing_unflagged_at_its_edge(shift):
    """70 % of new covered, a ragged edge, holes of a few pixels; copied or interpolated: within 10 pixels (a PSF) of
    what is not covered nothing is unflagged but true transients, and nothing at all lies beyond it."""
    rng = np.random.default_rng(2)
    pair = simulate.simulate_pair(
        (N, N), seed=2, n_stars=1500, n_transients=30, to_ref=lambda x, y: (x + shift[0], y + shift[1])
    )
    new, ref = pair.exposures()
    edge = 0.7 * N + 12 * np.sin(np.arange(N) / 23) + np.cumsum(rng.normal(0, 1.5, N))
    lost = np.arange(N)[None, :] > edge[:, None]
    for row, column, height, width in np.c_[rng.integers(20, 500, (25, 2)), rng.integers(1, 12, (25, 2))]:
        lost[row : row + height, column : column + width] = True
    # As a reader hands it over: NaN is NO_DATA, and holds the median.
    data = np.where(lost, np.median(ref.data), ref.data)
    ref = replace(ref, data=data, mask=ref.mask | np.where(lost, np.uint8(MaskBit.NO_DATA), np.uint8(0)))
    result = subtract(replace(new, wcs=wcs_of(0, 0)), replace(ref, wcs=wcs_of(*shift)))
    catalogue = result.catalogue
    uncovered = (result.difference.mask & MaskBit.NO_DATA) != 0
    assert 0.25 < uncovered.mean() < 0.4
    clean, distance = catalogue["flags"] == 0, at(distance_transform_edt(~uncovered), catalogue)
    real = np.hypot(catalogue["x"][:, None] - pair.truth["x"], catalogue["y"][:, None] - pair.truth["y"]).min(1) < 3
    assert (clean & real).sum() > 5
    assert not (clean & ~real & (distance < 10)).any()
    assert distance.min() >= 1
