"""The noise that sources bring: their photons, from a smoothed model of the image itself.

What the sky scatters by is measured in `background`; what it is needed for is V(S_N) and V(S_R) of ZOGY (E26, E27).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from batchproc.imaging.fill import dilate
from batchproc.imaging.planes import as_bytes
from batchproc.records import MaskBit, PsfLike

__all__ = ["source_variance"]

#: Masked pixels may hold anything, and light a star that is not there. Saturated ones hold light, and much of it.
_LIGHT = int(MaskBit.SATURATED)


def source_variance(
    data: NDArray[np.floating],
    sky_variance: NDArray[np.floating] | float,
    psf: PsfLike,
    gain: float = 1.0,
    *,
    mask: NDArray[np.uint8] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Variance of each pixel: the sky's, and the photon noise of the sources.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image; pixels that are not finite count as sky.
    sky_variance : ndarray (ny, nx) or float
        Variance of the sky, in the units of `data` squared.
    psf : PsfLike
        Sets the scale of smoothing.
    gain : float
        Electrons per unit of `data`.
    mask : ndarray (ny, nx) uint8, optional
        Bits of `MaskBit`; masked pixels count as sky, unless all that is wrong with them is saturation.
    out : ndarray (ny, nx) float32, optional
        Where the result goes; it may be `sky_variance` itself.

    Returns
    -------
    ndarray (ny, nx) float32
        ``sky_variance + sources / gain``. On blank sky it is exactly the sky's: ``max(data, 0)`` would count the noise
        twice there. Sources are where the image, smoothed like the PSF, stands 4 sigma out of its noise, and within
        one FWHM of there; their light is the image smoothed by a third of the PSF, in a way that keeps the height of
        peaks (``2 g − g ⊗ g``: the kernel's second moment is zero).

    Notes
    -----
    Sources are looked for on blocks of 2×2 pixels. Equivalent, in an image of even sides, to::

        blocks = data.reshape(ny // 2, 2, nx // 2, 2).mean(axis=(1, 3))
        width = sqrt(max(sigma**2 - 1 / 4, 0)) / 2  # a block has smoothed already
        score = gaussian_filter(blocks, width, mode="constant", truncate=3) / sqrt(sky_variance[::2, ::2])
        found = maximum_filter(score > 4 * noise(score), 2 * ceil(psf.fwhm / 2) + 1).repeat(2, 0).repeat(2, 1)
        g = gaussian_filter(data, 0.35 * sigma, mode="constant", truncate=3)
        light = 2 * g - gaussian_filter(g, 0.35 * sigma, mode="constant", truncate=3)
        where(found, sky_variance + maximum(light, 0) / gain, sky_variance)
    """
    image = np.ascontiguousarray(data, dtype=np.float32)
    if out is None:
        out = np.empty(image.shape, np.float32)
    if out is not sky_variance:
        out[:] = sky_variance
    bad = as_bytes(mask, image.shape)
    sigma = psf.fwhm / 2.3548
    narrow = _gaussian(0.35 * sigma)
    _add_light(
        image, bad, _shining(image, bad, out, psf), narrow, np.convolve(narrow, narrow), np.float32(1 / gain), out
    )
    return out


def _shining(
    image: NDArray[np.float32], bad: NDArray[np.uint8], sky_variance: NDArray[np.float32], psf: PsfLike
) -> NDArray[np.bool_]:
    """Blocks of 2×2 pixels within one FWHM of a source."""
    width = np.sqrt(max((psf.fwhm / 2.3548) ** 2 - 0.25, 0.0)) / 2
    score = np.empty(((image.shape[0] + 1) // 2, (image.shape[1] + 1) // 2), np.float32)
    _score(image, bad, sky_variance, _gaussian(width), score)
    # Noise of the smoothed image from itself, since neighbouring pixels may be correlated.
    sample = score[:: max(1, score.shape[0] // 256), :: max(1, score.shape[1] // 256)]
    noise = 1.4826 * float(np.median(np.abs(sample - np.median(sample))))
    expected = 1 / (4 * np.sqrt(np.pi) * max(width, 0.5))
    return dilate(score > np.float32(4 * max(noise, expected)), int(np.ceil(psf.fwhm / 2)))  # type: ignore[no-any-return]


def _gaussian(sigma: float) -> NDArray[np.float32]:
    """Weights of a Gaussian cut at 3 sigma, as `scipy.ndimage.gaussian_filter` has them."""
    offsets = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
    return (weights / weights.sum()).astype(np.float32)  # type: ignore[no-any-return]


@njit(cache=True, nogil=True)
def _light_of(value, bad):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    known = (abs(value) < np.float32(np.inf)) & ((bad & ~_LIGHT) == 0)
    return value if known else np.float32(0)


@njit(cache=True, nogil=True)
def _score(image, bad, sky, weights, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Means of 2×2 pixels, smoothed along both axes (zeros outside), in units of the sky's rms."""
    ny, nx = image.shape
    n_rows, n_columns = out.shape
    reach = weights.size // 2
    n = 2 * reach + 1
    ring = np.zeros((n, n_columns), np.float32)  # rows smoothed along x
    padded = np.zeros(n_columns + 2 * reach, np.float32)
    tiny = np.float32(1.1754944e-38)
    for j in range(n_rows + reach):
        line = ring[j % n]
        line[:] = 0
        if j < n_rows:
            blocks = padded[reach : reach + n_columns]
            blocks[:] = 0
            for y in range(2 * j, min(2 * j + 2, ny)):
                pixels, bits = image[y], bad[y]
                for i in range(nx // 2):
                    blocks[i] += _light_of(pixels[2 * i], bits[2 * i]) + _light_of(pixels[2 * i + 1], bits[2 * i + 1])
                if nx % 2:
                    blocks[n_columns - 1] += _light_of(pixels[nx - 1], bits[nx - 1])
            for k in range(n):
                _add(padded[k : k + n_columns], np.float32(0.25) * weights[k], line)
        row = j - reach
        if row >= 0:
            target, noise = out[row], sky[2 * row]
            target[:] = 0
            for k in range(-reach, reach + 1):
                _add(ring[(row + k) % n], weights[k + reach], target)
            for i in range(n_columns):
                target[i] /= np.sqrt(max(noise[2 * i], tiny))


@njit(cache=True, nogil=True)
def _add(values, weight, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """``out += weight values``."""
    for x in range(out.size):
        out[x] += weight * values[x]


@njit(cache=True, nogil=True)
def _add_light(image, bad, found, narrow, wide, per_electron, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add ``max(2 g − g ⊗ g, 0)`` of the image where `found` (blocks of 2×2), run by run of each row."""
    ny, nx = image.shape
    reach = wide.size // 2
    once, twice = np.empty(nx + 1 + 2 * reach, np.float32), np.empty(nx + 1 + 2 * reach, np.float32)
    light = np.empty(nx + 1, np.float32)
    for y in range(ny):
        row = found[y // 2]
        i = 0
        while i < row.size:
            if not row[i]:
                i += 1
                continue
            begin = 2 * i
            while i < row.size and row[i]:
                i += 1
            end = min(2 * i, nx)
            _light(image, bad, y, begin, end, narrow, wide, once, twice, light)
            for x in range(begin, end):
                out[y, x] += max(light[x - begin], np.float32(0)) * per_electron


@njit(cache=True, nogil=True)
def _light(image, bad, y, begin, end, narrow, wide, once, twice, light):  # type: ignore[no-untyped-def]  # pragma: no cover
    """``2 g − g ⊗ g`` of a run of pixels of row y, along y first."""
    ny, nx = image.shape
    reach, short = wide.size // 2, narrow.size // 2
    first, last = begin - reach, end + reach
    once[: last - first] = 0
    twice[: last - first] = 0
    x0, x1 = max(first, 0), min(last, nx)
    u, v = once[x0 - first : x1 - first], twice[x0 - first : x1 - first]
    for dy in range(max(-reach, -y), min(reach, ny - 1 - y) + 1):
        w = wide[dy + reach]
        n = narrow[dy + short] if abs(dy) <= short else np.float32(0)
        pixels, bits = image[y + dy, x0:x1], bad[y + dy, x0:x1]
        for x in range(x1 - x0):
            p = _light_of(pixels[x], bits[x])
            u[x] += n * p
            v[x] += w * p
    light[: end - begin] = 0
    for k in range(wide.size):
        _add(twice[k : k + end - begin], -wide[k], light[: end - begin])
    for k in range(narrow.size):
        _add(once[k + reach - short : k + reach - short + end - begin], 2 * narrow[k], light[: end - begin])
