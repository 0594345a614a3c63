"""Stars to align by: well-exposed, isolated, unsaturated, with centroids and what these are good to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["MAX_STARS", "Stars", "detect_stars", "match_stars"]

#: Brightest stars of each image that are compared; more add time, not accuracy, and chance matches in crowded fields.
MAX_STARS = 1000
#: With so many stars nothing else is looked at.
ENOUGH_STARS = 20


@dataclass(frozen=True)
class Stars:
    """Stars for registration, the brightest first. All arrays ``(n,)`` float64.

    Attributes
    ----------
    x, y : windowed centroids, pixels
    sigma : 1-sigma noise of x and of y each, pixels
    flux : electrons
    fwhm : pixels, twice the half-light radius
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    sigma: NDArray[np.float64]
    flux: NDArray[np.float64]
    fwhm: NDArray[np.float64]

    def __len__(self) -> int:
        return self.x.size

    def __getitem__(self, index: NDArray | slice) -> Stars:
        return Stars(self.x[index], self.y[index], self.sigma[index], self.flux[index], self.fwhm[index])

    @property
    def xy(self) -> NDArray[np.float64]:
        """(n, 2)."""
        return np.column_stack([self.x, self.y])


def detect_stars(
    data: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    saturation: float = np.inf,
    *,
    background: NDArray[np.float32] | None = None,
    rms: float,
) -> Stars:
    """Well-exposed, isolated, unsaturated point sources.

    Parameters
    ----------
    data : ndarray (ny, nx) float32
        Background-subtracted, electrons.
    mask : ndarray (ny, nx) bool or None
        True where bad; a star with a bad pixel within its half-light radius is left out.
    saturation : float
        Electrons, sky included.
    background : ndarray (ny, nx), optional
        The sky that was subtracted, to compare with `saturation`.
    rms : float
        Sky noise, electrons.

    Returns
    -------
    Stars
        At most 2 `MAX_STARS`.

    Notes
    -----
    The noise of a centroid with a Gaussian window of the star's own width s is, for a Gaussian star of flux F on sky
    noise σ, ``8π s⁴ σ² / F² + (16/9) s² / F`` per coordinate, squared.
    """
    bad = mask
    found = _extract(data, rms, bad)
    found = found[np.argsort(-found["flux"], kind="stable")]
    if found.size == 0:
        return Stars(*np.empty((5, 0)))
    alone = _isolated(found["x"], found["y"], found["flux"], 5 * float(np.median(found["a"])))
    # Deblended (2), cut by the edge (8) or with an incomplete aperture or isophote (16, 32): no good centroid.
    whole = (found["flag"] & (2 | 8 | 16 | 32)) == 0
    found = found[alone & whole & (found["flux"] > 0)][: 4 * MAX_STARS]
    x, y = found["x"], found["y"]
    half_light, _ = sep.flux_radius(
        data, x, y, 6.0 * np.clip(found["a"], 1.0, 30.0), 0.5, mask=bad, normflux=found["flux"]
    )
    half_light = np.clip(half_light, 0.5, 30.0)
    window = half_light * (2 / 2.3548)  # of a Gaussian with this half-light radius
    x_win, y_win, flag = sep.winpos(data, x, y, window, mask=bad)

    sky = 0.0 if background is None else background[y.round().astype(int), x.round().astype(int)]
    snr = found["flux"] / (rms * 2 * np.sqrt(np.pi) * window)
    good = (np.hypot(x_win - x, y_win - y) < half_light) & (flag == 0) & (snr > 5)
    good &= found["peak"] + sky < 0.9 * saturation
    if bad is not None and bad.any():
        good &= ~_near_masked(bad, x_win, y_win, half_light)
    # The stellar locus: the brightest good ones are stars; much sharper is a particle hit, much wider a galaxy.
    bright = np.nonzero(good & (snr > 20))[0][:50]
    bright = bright if bright.size >= 5 else np.nonzero(good)[0][:50]
    if bright.size:
        locus = np.median(half_light[bright])
        good &= half_light > 0.6 * locus
        compact = good & (half_light < 1.6 * locus)
        # In a field with hardly a star, galaxies are better than nothing.
        good = compact if compact.sum() >= ENOUGH_STARS else good
    flux = found["flux"]
    sigma = np.sqrt(8 * np.pi * window**4 * rms**2 / flux**2 + 16 / 9 * window**2 / flux)
    stars = Stars(x_win, y_win, sigma, flux, 2 * half_light)
    return stars[good][: 2 * MAX_STARS]


def match_stars(
    xy_new: NDArray[np.float64], xy_ref: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of stars that are each other's nearest within `radius`; inputs (n, 2)."""
    if len(xy_new) == 0 or len(xy_ref) == 0:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    distance, j = cKDTree(xy_ref).query(xy_new, distance_upper_bound=radius)
    _, i = cKDTree(xy_new).query(xy_ref)
    mine = np.nonzero(np.isfinite(distance))[0]
    mine = mine[i[j[mine]] == mine]
    return mine, j[mine]


def _extract(data: NDArray, rms: float, bad: NDArray[np.bool_] | None) -> NDArray:
    """`sep.extract` at 5 sigma, with more room where a crowded or bright image overflows its buffers."""
    room = sep.get_extract_pixstack()
    try:
        for _ in range(4):
            try:
                return sep.extract(data, 5.0, err=rms, mask=bad, minarea=5)
            except Exception as error:
                if "internal pixel buffer full" not in str(error):
                    raise
                sep.set_extract_pixstack(sep.get_extract_pixstack() * 8)
        return sep.extract(data, 50.0, err=rms, mask=bad, minarea=5)
    finally:
        sep.set_extract_pixstack(room)


def _near_masked(bad: NDArray[np.bool_], x: NDArray, y: NDArray, radius: NDArray) -> NDArray[np.bool_]:
    """Any bad pixel in the square of half-width `radius` around (x, y)."""
    low_x, high_x = (np.maximum(np.round(x + side * radius), 0).astype(int) for side in (-1, 1))
    low_y, high_y = (np.maximum(np.round(y + side * radius), 0).astype(int) for side in (-1, 1))
    boxes = zip(low_y, high_y, low_x, high_x, strict=True)
    return np.array([bad[y0 : y1 + 1, x0 : x1 + 1].any() for y0, y1, x0, x1 in boxes], bool)


def _isolated(x: NDArray, y: NDArray, flux: NDArray, radius: float) -> NDArray[np.bool_]:
    """No neighbour within `radius` that has more than a twentieth of the star's flux."""
    alone = np.ones(x.size, bool)
    pairs = cKDTree(np.column_stack([x, y])).query_pairs(radius, output_type="ndarray")
    for i, j in (pairs.T, pairs.T[::-1]):
        alone[i[flux[j] > 0.05 * flux[i]]] = False
    return alone
