"""Statistics of mesh cells and surfaces through them are those of plain NumPy and SciPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from scipy.interpolate import CubicSpline

from batchproc.imaging.background import _significant
from batchproc.imaging.mesh import (
    CLIPPED_WIDTH,
    Cells,
    Surface,
    look_at_cells,
    measure_cells,
    smooth_nodes,
)


def spline(values, n):
    """A natural cubic spline through the middles of equal intervals, at whole pixels; straight on beyond the ends."""
    at = (np.arange(len(values)) + 0.5) * n / len(values) - 0.5
    x = np.arange(n, dtype=float)
    if len(values) == 1:
        return np.repeat(values, n, axis=0)
    curve = CubicSpline(at, values, bc_type="natural")
    inside = curve(np.clip(x, at[0], at[-1]))
    return inside + (x - np.clip(x, at[0], at[-1]))[:, None] * curve(np.clip(x, at[0], at[-1]), 1)


@given(
    shape=st.tuples(st.integers(3, 90), st.integers(3, 90)),
    mesh=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_surfaces_are_natural_splines(shape, mesh, seed):
    """Bicubic, natural, straight on beyond the outermost middles: SciPy's along one axis, then the other."""
    nodes = np.random.default_rng(seed).normal(1000, 50, (min(mesh[0], shape[0]), min(mesh[1], shape[1])))
    surface = Surface(shape, nodes)
    expected = spline(spline(nodes, shape[0]).T, shape[1]).T
    np.testing.assert_allclose(surface.image(), expected, atol=2e-3)
    image = np.random.default_rng(seed + 1).normal(1000, 5, shape).astype(np.float32)
    mask = np.random.default_rng(seed + 2).choice([0, 1, 4, 6], shape).astype(np.uint8)
    np.testing.assert_allclose(surface.below(image, mask, 4), np.where(mask & 4, 0, image - expected), atol=2e-3)


def clipped(values):
    """Mean and width of a sample after cutting at 3 sigma about the median until nothing changes."""
    values = np.sort(np.asarray(values, np.float64))
    middle = values[len(values) // 2]
    sigma = middle - values[int(0.158655 * len(values))]
    kept = values[np.abs(values - middle) <= 3 * sigma] if sigma > 0 else values
    for _ in range(30):
        middle, sigma, before = np.median(kept), kept.std(), kept
        kept = values[np.abs(values - middle) <= 3 * sigma]
        if len(kept) == len(before):
            break
    return kept.mean(), kept.std() / CLIPPED_WIDTH


def dirty(shape, seed):
    """Noise with stars, NaN and masked pixels."""
    rng = np.random.default_rng(seed)
    image = rng.normal(300, 7, shape).astype(np.float32)
    image[rng.random(shape) < 0.05] += 200
    image[rng.random(shape) < 0.01] = np.nan
    mask = (rng.random(shape) < 0.1).astype(np.uint8) * 8
    image[(mask != 0) & (rng.random(shape) < 0.5)] = -1e9
    return image, mask


def in_cells(cells, plane):
    for j in range(cells.n[0]):
        for i in range(cells.n[1]):
            yield (j, i), plane[cells.rows[j] : cells.rows[j + 1], cells.columns[i] : cells.columns[i + 1]]


def test_the_first_look_is_a_clipped_mean():
    """In cells small enough to be taken whole: NumPy's, above the plane that is handed in."""
    image, mask = dirty((67, 81), 3)
    cells = Cells.of(image.shape, 16)
    plane = np.array([3.0, 0.2, -0.1])
    level, width = look_at_cells(image, mask, cells, plane)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    flat = np.where((mask == 0) & np.isfinite(image), image - (plane[0] + plane[1] * x + plane[2] * y), np.nan)
    for cell, values in in_cells(cells, flat.astype(np.float32)):
        mean, sigma = clipped(values[np.isfinite(values)])
        assert level[cell] == pytest.approx(mean, abs=0.02)
        assert width[cell] == pytest.approx(sigma, rel=0.01)


def test_histograms_tell_what_the_pixels_tell():
    """Clipped means and widths from bins of 1/20 sigma agree with those of the pixels to a hundredth of a sigma."""
    image, mask = dirty((200, 131), 4)
    hidden = np.random.default_rng(5).random((100, 66)) < 0.1
    cells = Cells.of(image.shape, 64)
    surface = Surface(image.shape, np.full((2, 2), 298.0))
    mean, width = measure_cells(image, mask, hidden, cells, surface, np.full(cells.n, 2.0), np.full(cells.n, 7.0))
    good = (mask == 0) & np.isfinite(image) & ~hidden.repeat(2, 0).repeat(2, 1)[:200, :131]
    for cell, values in in_cells(cells, np.where(good, image - 298, np.nan)):
        expected = clipped(values[np.isfinite(values)])
        assert mean[cell] == pytest.approx(expected[0], abs=0.07)
        assert width[cell] == pytest.approx(expected[1], rel=0.01)


def test_cells_without_pixels_say_nothing():
    """Masked, hidden, or not finite all over: NaN; so with fewer than 64 good pixels."""
    image = np.random.default_rng(1).normal(0, 1, (64, 192)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[:, :64] = 1
    mask[:7, :9] = 0
    image[:, 64:128] = np.nan
    cells = Cells.of(image.shape, 64)
    level, _ = look_at_cells(image, mask, cells, np.zeros(3))
    assert np.isfinite(level).tolist() == [[False, False, True]]
    hidden = np.zeros((32, 96), bool)
    hidden[:, 64:] = True
    surface = Surface(image.shape, np.zeros((1, 1)))
    assert np.isnan(measure_cells(image, mask, hidden, cells, surface, np.zeros((1, 3)), np.ones((1, 3)))[0]).all()


@pytest.mark.parametrize("quantum", [0.0, 1.0])
def test_a_constant_cell_and_whole_numbers_have_their_means(quantum):
    """All pixels in one bin: the value, without width. Sky of 0.7 in whole numbers: neither is rounded."""
    rng = np.random.default_rng(2)
    image = (
        np.round(rng.normal(50.3, 0.7 * quantum, (64, 64))).astype(np.float32)
        if quantum
        else np.full((64, 64), 50.3, np.float32)
    )
    cells = Cells.of(image.shape, 64)
    hidden = np.zeros((32, 32), bool)
    surface = Surface(image.shape, np.full((1, 1), 50.0))
    scale = np.full((1, 1), max(0.7 * quantum, 1e-3))
    mean, width = measure_cells(
        image, np.zeros(image.shape, np.uint8), hidden, cells, surface, np.full((1, 1), 0.3), scale
    )
    assert mean[0, 0] == pytest.approx(float(image.mean()) - 50, abs=0.02)
    assert width[0, 0] == pytest.approx(np.hypot(0.7, 12**-0.5) if quantum else 0, abs=0.03)


def test_gaps_between_nodes_are_bridged():
    """A hole in a tilted plane of nodes is filled within the span of its rim; medians leave a plane as it is."""
    y, x = np.mgrid[:9, :11]
    plane = 2.0 * x - y
    holed = np.where((x > 2) & (x < 7) & (y > 3), np.nan, plane)
    filled = smooth_nodes(holed, 1)
    np.testing.assert_array_equal(filled[np.isfinite(holed)], plane[np.isfinite(holed)])
    assert np.abs(filled - plane).max() < 5
    np.testing.assert_allclose(smooth_nodes(plane, 3)[1:-1, 1:-1], plane[1:-1, 1:-1])
    assert np.isnan(smooth_nodes(np.full((2, 2), np.nan), 3)).all()


@pytest.mark.parametrize("shape", [(64, 64), (67, 131)])
def test_significant_light_is_found_by_squares_of_four(shape):
    """Blocks of 2×2 in a square of 4×4 whose light exceeds 3 of its noise, over the good pixels alone."""
    image, mask = dirty(shape, 6)
    image[20:24, 30:34] += 20
    even = tuple(2 * ((n + 1) // 2) for n in shape)
    good = np.zeros(even, bool)
    good[: shape[0], : shape[1]] = (mask == 0) & np.isfinite(image)
    flat = np.zeros(even)
    flat[: shape[0], : shape[1]] = np.where(good[: shape[0], : shape[1]], image - 300, 0)
    total, count = (sliding_window_view(p, (4, 4))[::2, ::2].sum((2, 3)) for p in (flat, good))
    strong = total > 3 * 7 * np.sqrt(count)
    expected = np.zeros((even[0] // 2, even[1] // 2), bool)
    for dy in (0, 1):
        for dx in (0, 1):
            expected[dy : dy + strong.shape[0], dx : dx + strong.shape[1]] |= strong
    light, found = np.empty(expected.shape, np.float32), np.zeros(expected.shape, bool)
    surface = Surface(shape, np.full((1, 1), 300.0))
    _significant(image, mask, surface.nodes, surface.curvature, np.full((1, 1), 7.0), light, found)
    np.testing.assert_allclose(light, flat.reshape(even[0] // 2, 2, -1, 2).sum((1, 3)), atol=1e-2)
    assert np.count_nonzero(found != expected) <= 4  # on the threshold, to the last digit
    assert found.any()
