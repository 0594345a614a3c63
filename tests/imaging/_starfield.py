"""A star field whose every photon is known: any PSF, integrated over pixels at sub-pixel positions, Poisson noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: psf(u, v, x, y): density at offset (u, v) from a star at (x, y).
Psf = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]


def gaussian(fwhm: float) -> Psf:
    variance = (fwhm / 2.3548) ** 2
    return lambda u, v, x, y: np.exp(-(u**2 + v**2) / 2 / variance) / (2 * np.pi * variance)


def moffat(fwhm: float, beta: float = 3.0, stretch: float = 1.0, angle: float = 0.0) -> Psf:
    """Axes fwhm·√stretch and fwhm/√stretch, the longer at `angle` (radians) from x."""
    return lambda u, v, x, y: elliptical(u, v, fwhm, beta, stretch, angle)


def varying(n: int, fwhm: float = 3.5, amplitude: float = 0.15) -> Psf:
    """Wider to the right, elongated along y at the right edge and along x at the left."""

    def psf(u, v, x, y):
        a, b = 2 * x / n - 1, 2 * y / n - 1
        return elliptical(u, v, fwhm * (1 + amplitude * a + 0.3 * amplitude * b**2), 3.0, 1 - amplitude * a, 0.3)

    return psf


def lopsided(u, v, x, y):
    """A core with a fainter companion: no symmetry at all."""
    return (
        0.75 * elliptical(u, v, 3.2, 3.0, 1.2, 0.5)
        + 0.15 * elliptical(u - 1.5, v - 0.5, 4.0, 4.0, 1.0, 0.0)
        + 0.1 * elliptical(u - 2.5, v - 2.0, 5.0, 5.0, 1.0, 0.0)
    )


def elliptical(u, v, fwhm, beta, stretch, angle):
    alpha = fwhm / 2 / np.sqrt(2 ** (1 / beta) - 1)
    along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    q = (along**2 / stretch + across**2 * stretch) / alpha**2
    return (beta - 1) / np.pi / alpha**2 * (1 + q) ** -beta


def stamp(psf: Psf, size: int, x: float = 0.0, y: float = 0.0, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Pixels (size, size) of a star of unit flux at (x, y), (dx, dy) off the middle pixel, integrated 3×3."""
    half = size // 2
    v, u = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    inner = (np.arange(3) - 1) / 3
    return sum(psf(u + a - dx, v + b - dy, x, y) for a in inner for b in inner) / 9


@dataclass
class Field:
    data: np.ndarray  # with noise and sky
    light: np.ndarray  # what the sources put in
    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    sky: float
    rms: float

    @property
    def flat(self) -> np.ndarray:
        """Without its sky, exactly."""
        return (self.data - self.sky).astype(np.float32)

    @property
    def rms_map(self) -> np.ndarray:
        return np.full(self.data.shape, self.rms, dtype=np.float32)


def star_field(
    psf: Psf,
    *,
    n: int = 512,
    n_stars: int = 80,
    flux: tuple[float, float] = (3e3, 2e5),
    sky: float = 400.0,
    read_noise: float = 5.0,
    separation: float = 20.0,
    margin: float = 12.0,
    seed: int = 1,
    extra: np.ndarray | None = None,
) -> Field:
    """Stars at random sub-pixel places, no two closer than `separation`, log-uniform in flux."""
    rng = np.random.default_rng(seed)
    places: list[np.ndarray] = []
    while len(places) < n_stars:
        place = rng.uniform(margin, n - 1 - margin, 2)
        if all(np.hypot(*(place - other)) > separation for other in places):
            places.append(place)
    x, y = np.array(places).T if places else (np.zeros(0), np.zeros(0))
    fluxes = np.exp(rng.uniform(*np.log(flux), n_stars))
    light = np.zeros((n, n)) if extra is None else extra.copy()
    for a, b, f in zip(x, y, fluxes, strict=True):
        add(light, psf, a, b, f)
    data = rng.poisson(light + sky) + rng.normal(0, read_noise, light.shape)
    return Field(data.astype(np.float32), light, x, y, fluxes, sky, float(np.hypot(np.sqrt(sky), read_noise)))


def add(image: np.ndarray, psf: Psf, x: float, y: float, flux: float, size: int = 61) -> None:
    """Put a star into an image."""
    column, row, half = round(x), round(y), size // 2
    pixels = flux * stamp(psf, size, x, y, x - column, y - row)
    ny, nx = image.shape
    j0, j1, i0, i1 = max(0, row - half), min(ny, row + half + 1), max(0, column - half), min(nx, column + half + 1)
    image[j0:j1, i0:i1] += pixels[j0 - row + half : j1 - row + half, i0 - column + half : i1 - column + half]
