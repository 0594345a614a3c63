"""Pairs whose reference lies on a grid of its own, from the images to S_corr: interpolated noise, distorted fields."""

from dataclasses import replace

import numpy as np
import pytest

from batchproc import flow, simulate
from batchproc.config import Config
from batchproc.imaging import registration
from batchproc.imaging.align import align
from batchproc.imaging.noise import measure_autocorrelation
from tests.benchmarks.promises import match
from tests.imaging._stars import tan_wcs

SIZE = 1024


def shifted_pair(shift, *, known_psf, seed=1):
    """A pair whose reference is as noisy as new, displaced by `shift` pixels, and says so in its WCS."""
    shape_ref = (SIZE + 100, SIZE + 100)
    pair = simulate.simulate_pair(
        (SIZE, SIZE), seed=seed, depth=1, shape_ref=shape_ref, to_ref=lambda x, y: (x + shift[0], y + shift[1])
    )
    new, ref = pair.exposures(known_psf=known_psf)
    centre = (SIZE / 2, SIZE / 2)
    return (
        replace(new, wcs=tan_wcs((SIZE, SIZE), centre=centre)),
        replace(ref, wcs=tan_wcs(shape_ref, centre=(centre[0] + shift[0], centre[1] + shift[1]))),
    )


class TestNoise:
    @pytest.mark.parametrize("known_psf", [True, False])
    def test_s_corr_has_unit_width_and_the_difference_is_white(self, known_psf, monkeypatch):
        """A reference interpolated half-way between its pixels, before anything is renormalised. Taken for white, its
        noise makes S_corr 11 % too wide, and neighbours in D hang together."""
        new, ref = shifted_pair((40.5, 40.5), known_psf=known_psf)
        aligned = align(new, [ref])
        result = flow.subtract_exposures(new, aligned, Config(), image_id="pair")
        assert result.receipt.quality["renormalisation"] == pytest.approx(1, abs=0.01)
        d = result.difference
        found = measure_autocorrelation(d.difference, d.mask, 1.0)
        beyond = np.abs(found.values).sum() - 1
        assert beyond < 4 * found.error

        monkeypatch.setattr(flow, "_noise_of", lambda *_: (None, 1.0))
        taken_for_white = flow.subtract_exposures(new, aligned, Config(), image_id="pair")
        assert taken_for_white.receipt.quality["renormalisation"] > 1.09
        d = taken_for_white.difference
        assert measure_autocorrelation(d.difference, d.mask, 1.0).values[3, 4] > 10 * found.error


def distorted(x, y, size):
    """A cubic of some 1 px in the corners, and waves of 0.2 px over 700 pixels."""
    u, v = (x - size / 2) / (size / 2), (y - size / 2) / (size / 2)
    dx = 1.2 * u**3 - 0.8 * u * v**2 + 0.3 * v + 0.2 * np.sin(2 * np.pi * (0.8 * x + 0.6 * y) / 700)
    dy = -0.9 * v**3 + 0.7 * u**2 * v + 0.2 * np.cos(2 * np.pi * (0.9 * y - 0.45 * x) / 700)
    return x + dx, y + dy


class TestDistortion:
    def residual(self, new, ref):
        """Of the alignment, and the rms error of its correction over the image."""
        size = new.shape[0]
        aligned = align(new, [ref])
        x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(20, size - 20, 40), np.linspace(20, size - 20, 40)))
        moved = distorted(x, y, size)
        error = np.array(aligned.registration(x, y)) - (moved[0] - x, moved[1] - y)
        return aligned, float(np.sqrt(np.mean(error**2)))

    @pytest.mark.slow
    def test_a_field_finds_what_a_shift_loses(self, monkeypatch):
        """Stars of a usual field, some 250 of which match: a shift leaves 0.35 px rms, a cubic 0.14 px, the field less
        than 0.05 px. Registration errors that are told are counted as noise, so they cost transients and flags rather
        than they make false detections: with the field, all are found, without flags."""
        size = 1536
        pair = simulate.simulate_pair(
            (size, size), seed=11, to_ref=lambda x, y: distorted(x, y, size), shape_ref=(size, size), n_transients=60
        )
        new, ref = pair.exposures()
        expected = np.abs(pair.truth["snr_local"]) >= 8
        measure = registration.measure_registration
        residual, clean, false = {}, {}, {}
        for name, options in (("shift", {"max_degree": 0, "field": False}), ("cubic", {"field": False}), ("field", {})):
            monkeypatch.setattr(
                registration, "measure_registration", lambda *a, options=options, **k: measure(*a, **(k | options))
            )
            aligned, residual[name] = self.residual(new, ref)
            c = flow.subtract_exposures(new, aligned, Config(), image_id=name).catalogue
            index, spurious = match(c["x"], c["y"], pair.truth["x"], pair.truth["y"])
            found = index[expected]
            clean[name] = int(np.count_nonzero(c["flags"][found[found >= 0]] == 0))
            false[name] = int(np.count_nonzero(spurious & (c["flags"] == 0)))
        assert residual["shift"] > 0.3
        assert residual["cubic"] > 0.1
        assert residual["field"] < 0.05
        assert clean["field"] >= 0.98 * expected.sum()
        assert clean["field"] > clean["shift"]
        assert false["field"] <= min(false["shift"], 1)
