"""Painting point sources and galaxies: profiles evaluated at their true sub-pixel positions.

Noise, scenes and truth are the business of `batchproc.imaging.simulate`.

A PSF here is the *effective* one: what the pixels record, pixel integration included. Its stamp has unit sum, and the
flux of a source is what falls into a stamp centred on it; light of a Moffat profile beyond the stamp comes on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.signal import fftconvolve
from scipy.special import gammaincinv

from batchproc.records import PsfLike

__all__ = [
    "GALAXY",
    "AnyPsf",
    "ParametricPsf",
    "add_galaxies",
    "add_sources",
    "gaussian_psf",
    "moffat_psf",
    "psf_stamp",
    "shifted_stamp",
]

#: What `add_sources` takes for a PSF: a `PsfLike`, a centred stamp ``(size, size)``, a function of (x, y) that gives
#: one, or a number, which is the FWHM in pixels of a round Moffat profile with β = 3.5.
AnyPsf = PsfLike | NDArray | Callable[[float, float], NDArray] | float

#: One galaxy a row: place and flux, half-light radius in pixels, Sérsic index, axis ratio, angle of the major axis in
#: degrees from x towards y.
GALAXY = np.dtype(
    [(name, np.float64) for name in ("x", "y", "flux", "radius", "index", "axis_ratio", "theta")],
)

_HALO_WIDTH, _HALO_BETA = 4.0, 1.6
_MAX_RADIUS_SIZES = 3  # a bright star is painted out to at most three stamp sizes


def gaussian_psf(
    fwhm: float,
    size: int | None = None,
    *,
    axis_ratio: float = 1.0,
    theta: float = 0.0,
    dx: float = 0.0,
    dy: float = 0.0,
) -> NDArray[np.float64]:
    """Gaussian stamp of unit sum.

    Parameters
    ----------
    fwhm : float
        Geometric mean of the full widths at half maximum along the two axes, pixels.
    size : int, optional
        Odd side of the stamp; by default 8 FWHM.
    axis_ratio : float
        Minor over major axis.
    theta : float
        Angle of the major axis, degrees from x towards y.
    dx, dy : float
        Offset of the centre from the middle pixel, pixels.

    Returns
    -------
    ndarray (size, size) float64

    Examples
    --------
    >>> gaussian_psf(3.0).shape
    (25, 25)
    """
    psf = ParametricPsf(fwhm, beta=None, axis_ratio=axis_ratio, theta=theta, size=size or _default_size(fwhm))
    return psf.stamp(dx=dx, dy=dy)


def moffat_psf(
    fwhm: float,
    beta: float = 3.5,
    size: int | None = None,
    *,
    axis_ratio: float = 1.0,
    theta: float = 0.0,
    dx: float = 0.0,
    dy: float = 0.0,
) -> NDArray[np.float64]:
    """Moffat stamp of unit sum, ``(1 + r²/α²)^−β``; arguments as for `gaussian_psf`.

    References
    ----------
    Moffat (1969), A&A 3, 455.
    """
    psf = ParametricPsf(fwhm, beta=beta, axis_ratio=axis_ratio, theta=theta, size=size or _default_size(fwhm))
    return psf.stamp(dx=dx, dy=dy)


@dataclass(frozen=True)
class ParametricPsf:
    """A Gaussian or Moffat PSF, constant or varying across the image; a `PsfLike`.

    Parameters
    ----------
    fwhm : float
        At the centre of the image, pixels; geometric mean of both axes.
    beta : float or None
        Moffat exponent; None for a Gaussian.
    axis_ratio : float
        Minor over major axis at the centre.
    theta : float
        Angle of the major axis, degrees from x towards y.
    size : int
        Odd side of the stamps; 0 for 8 FWHM.
    variation : float
        The FWHM grows by this fraction from the centre to a corner (as the square of the distance), and the two
        components of the ellipticity change by half of it from the centre to an edge (linearly).
    shape : (ny, nx)
        Of the image; needed where ``variation`` or ``waves`` is not zero.
    waves : float
        On top, the FWHM goes up and down by this fraction, and the ellipticity by half of it, in waves one and a half
        of which cross the image: no polynomial of low degree follows them.
    phase : float
        Of these waves, radians.
    halo : float
        This part of the light in the stamp is of a halo, 4 FWHM wide and falling like r^-3.2, that reaches far beyond.
    growth : float
        The FWHM grows by this fraction per electron of a source (brighter-fatter effect); `stamp` is that of a faint
        one.

    Examples
    --------
    >>> psf = ParametricPsf(3.0, beta=3.5)
    >>> psf.size, round(psf.at(10, 10).sum(), 12)
    (25, 1.0)
    """

    fwhm: float
    beta: float | None = 3.5
    axis_ratio: float = 1.0
    theta: float = 0.0
    size: int = 0
    variation: float = 0.0
    shape: tuple[int, int] = (0, 0)
    waves: float = 0.0
    phase: float = 0.0
    halo: float = 0.0
    growth: float = 0.0

    def __post_init__(self) -> None:
        if self.size == 0:
            object.__setattr__(self, "size", _default_size(self.fwhm))
        if self.fwhm <= 0 or self.size % 2 == 0 or not 0 < self.axis_ratio <= 1:
            raise ValueError(
                f"fwhm = {self.fwhm}, size = {self.size}, axis_ratio = {self.axis_ratio}: "
                "must be positive, odd, and above 0 up to 1"
            )
        if self.beta is not None and self.beta <= 1:
            raise ValueError(f"beta = {self.beta}: a Moffat profile of finite flux has β > 1")
        if (self.variation or self.waves) and min(self.shape) < 1:
            raise ValueError(f"variation = {self.variation or self.waves} needs the shape of the image: {self.shape}")

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """PSF stamp ``(size, size)`` at pixel (x, y): centred, unit sum."""
        return self.stamp(x, y)

    def stamp(self, x: float = 0.0, y: float = 0.0, *, dx: float = 0.0, dy: float = 0.0) -> NDArray[np.float64]:
        """The PSF of place (x, y), its centre (dx, dy) pixels off the middle pixel; unit sum."""
        form = self._form(np.array([x]), np.array([y]))
        image = np.zeros((self.size, self.size))
        half = self.size // 2
        place = np.array([half + dx]), np.array([half + dy])
        _paint(image, *place, np.array([1 - self.halo]), form, self._beta, half, 0.0)
        if self.halo:
            _paint(image, *place, np.array([self.halo]), form / _HALO_WIDTH**2, _HALO_BETA, half, 0.0)
        return image / image.sum()

    def paint(self, image: NDArray[np.float64], x: NDArray, y: NDArray, flux: NDArray, faintest: float) -> None:
        """Add sources to a float64 image in place, each out to where it has fallen below ``faintest`` per pixel."""
        form = self._form(x, y)
        wider = form / (1 + self.growth * np.maximum(flux, 0))[:, None] ** 2
        _paint(image, x, y, (1 - self.halo) * flux, wider, self._beta, self.size // 2, faintest)
        if self.halo:
            _paint(image, x, y, self.halo * flux, form / _HALO_WIDTH**2, _HALO_BETA, self.size // 2, faintest)

    @property
    def _beta(self) -> float:
        return -1.0 if self.beta is None else self.beta

    def _form(self, x: NDArray, y: NDArray) -> NDArray[np.float64]:
        """Coefficients (n, 3) of the quadratic form q = a dx² + b dy² + c dx dy, of which the profile is a function."""
        fwhm = np.full(x.shape, float(self.fwhm))
        e = (1 - self.axis_ratio) / (1 + self.axis_ratio)
        e1 = np.full(x.shape, e * np.cos(2 * np.radians(self.theta)))
        e2 = np.full(x.shape, e * np.sin(2 * np.radians(self.theta)))
        if self.variation:
            ny, nx = self.shape
            u, v = (2 * x + 1) / nx - 1, (2 * y + 1) / ny - 1
            fwhm = fwhm * (1 + self.variation * (u**2 + v**2) / 2)
            e1, e2 = e1 + self.variation * u / 2, e2 + self.variation * v / 2
        if self.waves:
            ny, nx = self.shape
            u, v = (2 * x + 1) / nx - 1, (2 * y + 1) / ny - 1
            along, across = np.pi * (1.5 * u + 0.7 * v) + self.phase, np.pi * (1.5 * v - 0.7 * u) + 2 * self.phase
            fwhm = fwhm * (1 + self.waves * np.sin(along))
            e1, e2 = e1 + self.waves / 2 * np.sin(across), e2 + self.waves / 2 * np.cos(across)
        e = np.minimum(np.hypot(e1, e2), 0.6)
        angle = np.arctan2(e2, e1) / 2
        ratio = (1 - e) / (1 + e)
        if self.beta is None:
            scale = fwhm / (2 * np.sqrt(2 * np.log(2))) * np.sqrt(2)
        else:
            scale = fwhm / (2 * np.sqrt(2 ** (1 / self.beta) - 1))
        major, minor = ratio / scale**2, 1 / (ratio * scale**2)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.stack(
            [major * cos**2 + minor * sin**2, major * sin**2 + minor * cos**2, 2 * sin * cos * (major - minor)], axis=-1
        )


def add_sources(
    image: NDArray, x: ArrayLike, y: ArrayLike, flux: ArrayLike, psf: AnyPsf, *, faintest: float = 0.01
) -> NDArray[np.float64]:
    """The image with noiseless point sources added at sub-pixel positions.

    Parameters
    ----------
    image : ndarray (ny, nx)
        Left alone.
    x, y : array_like (n,)
        0-based pixel positions; sources beyond the edge shed their light across it.
    flux : array_like (n,)
        Flux within the PSF's stamp, in the units of the image; may be negative.
    psf : AnyPsf
        See `AnyPsf`. Parametric profiles are evaluated at the true position; stamps are shifted by a Fourier phase.
    faintest : float
        A parametric profile is painted at least over its stamp, and beyond it until it falls below this.

    Returns
    -------
    ndarray (ny, nx) float64
    """
    x, y, flux = _columns(x, y, flux)
    out = np.array(image, dtype=np.float64)
    if isinstance(psf, float | int | np.floating | np.integer):
        psf = ParametricPsf(float(psf))
    if isinstance(psf, ParametricPsf):
        psf.paint(out, x, y, flux, faintest)
        return out
    for xi, yi, fi in zip(x, y, flux, strict=True):
        column, row = int(np.floor(xi + 0.5)), int(np.floor(yi + 0.5))
        stamp = shifted_stamp(psf_stamp(psf, xi, yi), xi - column, yi - row)
        _add_stamp(out, fi * stamp, column, row)
    return out


def add_galaxies(image: NDArray, galaxies: NDArray, psf: AnyPsf) -> NDArray[np.float64]:
    """The image with noiseless Sérsic galaxies added, each seen through the PSF of its place.

    Parameters
    ----------
    image : ndarray (ny, nx)
        Left alone.
    galaxies : structured ndarray (n,)
        Rows of `GALAXY`; their flux is complete within the painted square of 8 half-light radii (and the PSF's wings).
    psf : AnyPsf
        See `add_sources`.

    Returns
    -------
    ndarray (ny, nx) float64

    References
    ----------
    Sérsic (1963), BAAA 6, 41; b(n) from the median of the gamma distribution.
    """
    out = np.array(image, dtype=np.float64)
    for galaxy in galaxies:
        column, row = int(np.floor(galaxy["x"] + 0.5)), int(np.floor(galaxy["y"] + 0.5))
        profile = _sersic(galaxy, galaxy["x"] - column, galaxy["y"] - row)
        stamp = fftconvolve(profile, psf_stamp(psf, galaxy["x"], galaxy["y"]), mode="full")
        _add_stamp(out, galaxy["flux"] * stamp, column, row)
    return out


def psf_stamp(psf: AnyPsf, x: float, y: float) -> NDArray[np.float64]:
    """The centred stamp of unit sum that any of the accepted kinds of PSF has at (x, y)."""
    if isinstance(psf, float | int | np.floating | np.integer):
        return ParametricPsf(float(psf)).at(x, y)
    if isinstance(psf, np.ndarray):
        stamp = psf
    elif isinstance(psf, PsfLike):
        stamp = psf.at(x, y)
    else:
        stamp = psf(x, y)
    stamp = np.asarray(stamp, dtype=np.float64)
    if stamp.ndim != 2 or stamp.shape[0] % 2 == 0 or stamp.shape[1] % 2 == 0:
        raise ValueError(f"a PSF stamp must be two-dimensional with odd sides, found shape {stamp.shape}")
    return stamp / stamp.sum()


def shifted_stamp(stamp: NDArray, dx: float, dy: float) -> NDArray[np.float64]:
    """The stamp moved by (dx, dy) pixels through a Fourier phase, on a wider zero border so that nothing wraps."""
    if dx == 0 and dy == 0:
        return np.asarray(stamp, dtype=np.float64)
    wide = np.pad(np.asarray(stamp, dtype=np.float64), 8)
    ny, nx = wide.shape
    phase = np.exp(-2j * np.pi * (np.fft.fftfreq(ny)[:, None] * dy + np.fft.rfftfreq(nx)[None, :] * dx))
    return np.fft.irfft2(np.fft.rfft2(wide) * phase, s=wide.shape)[8:-8, 8:-8]


@njit(cache=True)
def _paint(
    image: Any, x: Any, y: Any, flux: Any, form: Any, beta: float, half: int, faintest: float
) -> None:  # pragma: no cover - compiled
    """``image += flux * profile / (sum of the centred profile over the stamp)`` for each source; β < 0: Gaussian."""
    ny, nx = image.shape
    for k in range(len(x)):
        a, b, c = form[k]
        norm = 0.0
        for j in range(-half, half + 1):
            for i in range(-half, half + 1):
                q = a * i * i + b * j * j + c * i * j
                norm += np.exp(-q) if beta < 0 else (1.0 + q) ** (-beta)
        peak = abs(flux[k]) / norm
        radius = half
        if faintest > 0 and peak > faintest:
            # Where the profile has fallen to `faintest` along its major axis.
            q = np.log(peak / faintest) if beta < 0 else (peak / faintest) ** (1 / beta) - 1
            smallest = 0.5 * (a + b - np.sqrt((a - b) ** 2 + c * c))
            radius = min(max(half, int(np.sqrt(q / smallest)) + 1), 2 * half * _MAX_RADIUS_SIZES)
        i0, j0 = int(np.floor(x[k] + 0.5)), int(np.floor(y[k] + 0.5))
        for j in range(max(j0 - radius, 0), min(j0 + radius + 1, ny)):
            dy = j - y[k]
            for i in range(max(i0 - radius, 0), min(i0 + radius + 1, nx)):
                dx = i - x[k]
                q = a * dx * dx + b * dy * dy + c * dx * dy
                image[j, i] += flux[k] / norm * (np.exp(-q) if beta < 0 else (1.0 + q) ** (-beta))


def _sersic(galaxy: Any, dx: float, dy: float, oversampling: int = 5) -> NDArray[np.float64]:
    """Sérsic profile of unit sum in an odd square around its middle pixel, averaged over each pixel."""
    half = max(4, int(np.ceil(4 * galaxy["radius"])))
    side = 2 * half + 1
    fine = (np.arange(side * oversampling) + 0.5) / oversampling - 0.5 - half
    u, v = fine[None, :] - dx, fine[:, None] - dy
    cos, sin = np.cos(np.radians(galaxy["theta"])), np.sin(np.radians(galaxy["theta"]))
    ratio = galaxy["axis_ratio"]
    r = np.hypot((u * cos + v * sin) * np.sqrt(ratio), (v * cos - u * sin) / np.sqrt(ratio))
    b = gammaincinv(2 * galaxy["index"], 0.5)
    profile = np.exp(-b * (r / galaxy["radius"]) ** (1 / galaxy["index"]))
    profile = profile.reshape(side, oversampling, side, oversampling).mean(axis=(1, 3))
    return profile / profile.sum()


def _add_stamp(image: NDArray, stamp: NDArray, column: int, row: int) -> None:
    """Add an odd stamp centred on pixel (column, row), as far as it lies inside."""
    ny, nx = image.shape
    x0, y0 = column - stamp.shape[1] // 2, row - stamp.shape[0] // 2
    xs, ys = slice(max(x0, 0), min(x0 + stamp.shape[1], nx)), slice(max(y0, 0), min(y0 + stamp.shape[0], ny))
    if xs.start < xs.stop and ys.start < ys.stop:
        image[ys, xs] += stamp[ys.start - y0 : ys.stop - y0, xs.start - x0 : xs.stop - x0]


def _columns(*values: ArrayLike) -> list[NDArray[np.float64]]:
    """Arguments as float64 arrays (n,) of one length."""
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in values))
    return [np.ascontiguousarray(a) for a in arrays]


def _default_size(fwhm: float) -> int:
    return 2 * max(4, round(4 * fwhm)) + 1
