"""Simulated images with known truth, and transients injected into real ones. Arrays only; files are made by `io.night`.

>>> from batchproc import simulate, zogy
>>> pair = simulate.simulate_pair((256, 256), seed=1, n_transients=5)
>>> pair.new.shape, pair.truth.dtype.names
((256, 256), ('x', 'y', 'flux', 'snr', 'snr_local', 'kind'))

Everything is in electrons. Each function that draws takes a seed or a `numpy.random.Generator`; the same seed gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial import cKDTree

from batchproc.imaging.render import (
    GALAXY,
    AnyPsf,
    ParametricPsf,
    add_galaxies,
    add_sources,
    gaussian_psf,
    moffat_psf,
    psf_stamp,
)
from batchproc.records import Exposure, MaskBit

__all__ = [
    "Scene",
    "SimulatedEpoch",
    "SimulatedPair",
    "add_galaxies",
    "add_sources",
    "choose_positions",
    "expected_snr",
    "gaussian_psf",
    "inject",
    "make_epoch",
    "moffat_psf",
    "simulate_pair",
    "transform_wcs",
]

STAR = np.dtype([("x", np.float64), ("y", np.float64), ("flux", np.float64)])

#: ``flux`` in electrons of new, negative where light was lost; ``snr`` = |flux| √F_S, the S/N on blank sky;
#: ``snr_local`` counts the photon noise of what is there.
TRUTH = np.dtype([*((n, np.float64) for n in ("x", "y", "flux", "snr", "snr_local")), ("kind", "U8")])

ARTEFACT = np.dtype([("x", np.float64), ("y", np.float64), ("image", "U3"), ("kind", "U12")])

_BORDER = 60  # stars and galaxies live up to this many pixels outside, so that edges look like sky


@dataclass(frozen=True)
class Scene:
    """What a simulated pair shows; numbers in electrons and pixels, per exposure."""

    fwhm_new: float = 3.4
    """Seeing of new."""
    fwhm_ref: float = 2.6
    """Seeing of ref."""
    beta: float | None = 3.5
    """Moffat exponent of both PSFs; None for Gaussians."""
    axis_ratio: float = 1.0
    """Minor over major axis of new's PSF."""
    axis_ratio_ref: float = 1.0
    """That of ref's."""
    theta: float = 30.0
    """Angle of the major axis of both, degrees from x towards y."""
    psf_variation: float = 0.0
    """See `ParametricPsf.variation`; the same in both images."""
    psf_waves: float = 0.0
    """See `ParametricPsf.waves`; other ones in each image."""
    halo: float = 0.0
    """See `ParametricPsf.halo`; the same in both images."""
    brighter_fatter: float = 0.0
    """A star whose peak is at the full well is wider by this fraction than a faint one."""
    sky_new: float = 400.0
    """Sky of new, electrons per pixel."""
    sky_ref: float = 300.0
    """Sky of each exposure of ref."""
    sky_slope: float = 0.0
    """The sky of new rises by this fraction across the image."""
    read_noise: float = 5.0
    """Of an exposure, electrons rms."""
    depth: int = 4
    """Exposures that ref is the mean of."""
    flux_ratio: float = 1.3
    """F_new / F_ref."""
    saturation: float = 6e4
    """Full well in electrons; what exceeds it bleeds along the columns."""
    n_stars: int = 400
    """Per 1024 × 1024 pixels."""
    star_flux: tuple[float, float] = (500.0, 5e6)
    """Faintest and brightest star, electrons of new."""
    star_slope: float = 0.8
    """N(> flux) falls as flux^-slope."""
    n_galaxies: int = 60
    """Per 1024 × 1024 pixels; Sérsic profiles, fluxes by the same power law up to 1e5 electrons."""
    n_transients: int = 40
    """In all. 70 % are new, 15 % have vanished, 15 % are stars that vary."""
    transient_snr: tuple[float, float] = (5.0, 100.0)
    """Range of their S/N on blank sky; drawn uniformly in its logarithm."""
    near_galaxies: float = 0.4
    """Fraction of the new ones that lie on a galaxy."""
    registration_jitter: float = 0.0
    """Each star and galaxy of ref is displaced by this much, rms pixels in x and in y."""
    cosmic_rays: int = 0
    """Particle tracks in new; unmasked, listed in ``artefacts``."""
    hot_pixels: int = 0
    """Single hot pixels in each of new and ref; unmasked, listed."""
    bad_columns: int = 0
    """Dead columns in each of new and ref; masked, listed."""
    satellite_trail: float = 0.0
    """Peak of a satellite's trail across new, in sigma of the sky; 0 for none; unmasked, listed."""


@dataclass(frozen=True)
class SimulatedPair:
    """Two images of one field, on one grid unless asked otherwise, ready for `zogy`, and the truth about them.

    Attributes
    ----------
    new, ref : ndarray (ny, nx) float32
        Background-subtracted, electrons; ref in its own electrons (its stars are ``flux_ratio`` times fainter).
    sky_new, sky_ref : ndarray (ny, nx) float32
        What was subtracted.
    sigma_new, sigma_ref : float
        Sky and read noise, electrons rms.
    variance_new, variance_ref : ndarray (ny, nx) float32
        True variance of each pixel (of the expected counts, not of the noisy ones).
    mask_new, mask_ref : ndarray (ny, nx) uint8
        Bits of `MaskBit`.
    psf_new, psf_ref : ParametricPsf
    truth : structured ndarray (n_transients,)
        ``x, y, flux, snr, snr_local, kind``; kind is new, vanished or variable. See `TRUTH`.
    stars, galaxies, artefacts : structured ndarrays
        What else is there; fluxes in electrons of new.
    scene : Scene
    """

    new: NDArray[np.float32]
    ref: NDArray[np.float32]
    sky_new: NDArray[np.float32]
    sky_ref: NDArray[np.float32]
    sigma_new: float
    sigma_ref: float
    variance_new: NDArray[np.float32]
    variance_ref: NDArray[np.float32]
    mask_new: NDArray[np.uint8]
    mask_ref: NDArray[np.uint8]
    psf_new: ParametricPsf
    psf_ref: ParametricPsf
    truth: NDArray
    stars: NDArray
    galaxies: NDArray
    artefacts: NDArray
    scene: Scene = field(default_factory=Scene)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True where either image is bad."""
        return (self.mask_new | self.mask_ref) != 0

    @property
    def flux_ratio(self) -> float:
        """F_new / F_ref."""
        return self.scene.flux_ratio

    def exposures(self, *, known_psf: bool = False) -> tuple[Exposure, Exposure]:
        """The pair as `Exposure` (sky included, gain 1), as a reader would give them; with their PSF if asked."""
        read_noise = self.scene.read_noise
        new = Exposure(
            data=self.new + self.sky_new,
            variance=None,
            mask=self.mask_new,
            psf=self.psf_new if known_psf else None,
            read_noise=read_noise,
            saturation=self.scene.saturation,
            meta={"path": "simulated new", "filter": "r", "mjd": 60000.0, "survey": "simulated"},
        )
        ref = replace(
            new,
            data=self.ref + self.sky_ref,
            mask=self.mask_ref,
            psf=self.psf_ref if known_psf else None,
            read_noise=read_noise / np.sqrt(self.scene.depth),
            meta={**new.meta, "path": "simulated ref"},
        )
        return new, ref


def simulate_pair(
    shape: tuple[int, int] = (1024, 1024),
    seed: int | np.random.Generator = 0,
    *,
    scene: Scene | None = None,
    to_ref: Callable[[NDArray, NDArray], tuple[NDArray, NDArray]] | None = None,
    shape_ref: tuple[int, int] | None = None,
    **changes: Any,
) -> SimulatedPair:
    """Two images of one field with stars, galaxies and transients, with Poisson and read noise.

    Parameters
    ----------
    shape : (ny, nx)
    seed : int or Generator
    scene : Scene, optional
        What to show.
    to_ref : callable, optional
        Pixels (x, y) of new to those of ref, where ref has a grid of its own; the pair is then to be aligned first.
        Grids of one scale are meant (a few degrees of rotation, a dither, a distortion).
    shape_ref : (ny, nx), optional
        Shape of that grid.
    **changes
        Single settings of the scene: ``simulate_pair(seed=3, fwhm_new=4.2, cosmic_rays=50)``.

    Returns
    -------
    SimulatedPair
    """
    rng = np.random.default_rng(seed)
    scene = replace(scene or Scene(), **changes)
    to_ref = to_ref or (lambda x, y: (x, y))
    shape_ref = shape_ref or shape
    psf_new, psf_ref = scene_psfs(scene, shape, shape_ref)
    sigma_new, sigma_ref = scene_sigmas(scene)
    stars, galaxies = draw_field(shape, scene, rng)

    truth, hosts = draw_transients(shape, scene, galaxies, rng)
    stars = np.concatenate([stars, hosts])
    ref_stars, ref_galaxies = (_on_ref(table, to_ref, scene.registration_jitter, rng) for table in (stars, galaxies))
    gained, lost = truth[truth["kind"] != "vanished"], truth[truth["kind"] == "vanished"]
    lost = _on_ref(lost, to_ref, 0.0, rng)
    lost["flux"] *= -1

    light_new = _paint(shape, [stars, gained], galaxies, psf_new)
    light_ref = _paint(shape_ref, [ref_stars, lost], ref_galaxies, psf_ref) / scene.flux_ratio
    slope = 1 + scene.sky_slope * (np.arange(shape[1]) / shape[1] - 0.5)
    sky_new = np.broadcast_to(scene.sky_new * slope, shape).astype(np.float32)
    sky_ref = np.full(shape_ref, scene.sky_ref, np.float32)

    artefacts: list[tuple[float, float, str, str]] = []
    if scene.satellite_trail:
        light_new += _trail(shape, scene.satellite_trail * sigma_new, scene.fwhm_new, rng, artefacts)
    hits_new = _particle_hits(shape, scene.cosmic_rays, rng, artefacts) + _hot(shape, scene, "new", rng, artefacts)
    hits_ref = _hot(shape_ref, scene, "ref", rng, artefacts)
    new, mask_new = expose(
        light_new + sky_new, rng, read_noise=scene.read_noise, saturation=scene.saturation, hits=hits_new
    )
    ref, mask_ref = expose(
        light_ref + sky_ref,
        rng,
        read_noise=scene.read_noise,
        saturation=scene.saturation,
        hits=hits_ref,
        depth=scene.depth,
    )
    for image, data, mask in (("new", new, mask_new), ("ref", ref, mask_ref)):
        _kill_columns(data, mask, scene.bad_columns, image, rng, artefacts)

    variance_new = (light_new + sky_new + scene.read_noise**2).astype(np.float32)
    variance_ref = ((light_ref + sky_ref + scene.read_noise**2) / scene.depth).astype(np.float32)
    truth["snr_local"] = expected_snr(
        truth["flux"],
        truth["x"],
        truth["y"],
        psf_new=psf_new,
        psf_ref=psf_ref,
        sigma_new=sigma_new,
        sigma_ref=sigma_ref,
        flux_ratio=scene.flux_ratio,
        variance_new=variance_new,
        variance_ref=variance_ref,
        xy_ref=to_ref(truth["x"], truth["y"]),
    )
    return SimulatedPair(
        new=new - sky_new,
        ref=ref - sky_ref,
        sky_new=sky_new,
        sky_ref=sky_ref,
        sigma_new=sigma_new,
        sigma_ref=sigma_ref,
        variance_new=variance_new,
        variance_ref=variance_ref,
        mask_new=mask_new,
        mask_ref=mask_ref,
        psf_new=psf_new,
        psf_ref=psf_ref,
        truth=truth,
        stars=stars,
        galaxies=galaxies,
        artefacts=np.array(artefacts, dtype=ARTEFACT),
        scene=scene,
    )


def inject(
    image: NDArray,
    psf: AnyPsf,
    x: ArrayLike,
    y: ArrayLike,
    flux: ArrayLike,
    *,
    gain: float = 1.0,
    rng: int | np.random.Generator | None = 0,
) -> NDArray:
    """The image with transients added at known places, with the photon noise that they bring.

    Parameters
    ----------
    image : ndarray (ny, nx)
        Real or simulated, with or without its sky; left alone.
    psf : AnyPsf
        `PsfLike`, a centred stamp, a function of (x, y), or a number: the FWHM in pixels of a round Moffat profile.
        For an honest test, one that the pipeline is not told.
    x, y : array_like (n,)
        0-based positions, not confined to whole pixels.
    flux : array_like (n,)
        In the units of the image, within the PSF's stamp. Negative takes light away (without noise: the photons that
        are not there leave the noise of those that are).
    gain : float
        Electrons per unit of the image.
    rng : int or Generator or None
        Seed of the photon noise; None for no noise.

    Returns
    -------
    ndarray (ny, nx)
        Of the floating type of ``image`` (float32 for integers).

    Examples
    --------
    >>> image = inject(np.zeros((64, 64)), 3.0, [30.4], [31.7], [5000.0], rng=None)
    >>> float(image[25:40, 25:40].sum()) > 4800
    True
    """
    image = np.asarray(image)
    dtype = image.dtype.newbyteorder("=") if np.issubdtype(image.dtype, np.floating) else np.dtype(np.float32)
    light = add_sources(np.zeros(image.shape), x, y, flux, psf)
    if rng is not None:
        electrons = np.maximum(light, 0) * gain
        light = np.minimum(light, 0) + np.random.default_rng(rng).poisson(electrons) / gain
    return (image.astype(np.float64) + light).astype(dtype)


def choose_positions(
    shape: tuple[int, int],
    n: int,
    rng: int | np.random.Generator = 0,
    *,
    margin: float = 30.0,
    min_separation: float = 30.0,
    mask: NDArray | None = None,
    avoid: ArrayLike | None = None,
    near: ArrayLike | None = None,
    near_fraction: float = 0.5,
    near_radius: ArrayLike = 3.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places for transients.

    Parameters
    ----------
    shape : (ny, nx)
    n : int
    rng : int or Generator
    margin : float
        Distance from the edges, pixels.
    min_separation : float
        Between each other and from ``avoid``, pixels.
    mask : ndarray (ny, nx), optional
        Non-zero where no transient may be centred.
    avoid : array_like (k, 2), optional
        Places (x, y) to keep clear of.
    near : array_like (k, 2), optional
        Places (x, y), galaxies for instance, of which a transient is put beside one.
    near_fraction : float
        Fraction of the transients that are (fewer where there is no room).
    near_radius : float or array_like (k,)
        They are scattered by this much around it, rms pixels in x and in y.

    Returns
    -------
    x, y : ndarray (n,) float64

    Raises
    ------
    ValueError
        No room for so many.
    """
    rng = np.random.default_rng(rng)
    ny, nx = shape
    near = np.empty((0, 2)) if near is None else np.atleast_2d(np.asarray(near, dtype=np.float64))
    radius = np.broadcast_to(np.asarray(near_radius, dtype=np.float64), (len(near),))
    taken = [] if avoid is None else [np.asarray(avoid, dtype=np.float64).reshape(-1, 2)]
    n_near = round(n * near_fraction) if len(near) else 0

    def accepted(places: NDArray, wanted: int) -> NDArray:
        """Of many tries, the first ``wanted`` ones that are free."""
        x, y = places.T
        inside = (x >= margin) & (x <= nx - 1 - margin) & (y >= margin) & (y <= ny - 1 - margin)
        places = places[inside]
        if mask is not None and len(places):
            column, row = np.rint(places).astype(int).T
            places = places[np.asarray(mask)[row, column] == 0]
        chosen: list[NDArray] = []
        for place in places[_clear_of(places, taken, min_separation)]:
            if len(chosen) == wanted:
                break
            if not chosen or np.min(np.hypot(*(np.array(chosen) - place).T)) >= min_separation:
                chosen.append(place)
        return np.array(chosen).reshape(-1, 2)

    if n_near:
        which = rng.integers(len(near), size=20 * n_near)
        scatter = rng.standard_normal((len(which), 2)) * radius[which, None]
        taken.append(accepted(near[which] + scatter, n_near))
    missing = n - (len(taken[-1]) if n_near else 0)
    anywhere = rng.uniform((margin, margin), (max(nx - 1 - margin, margin), max(ny - 1 - margin, margin)), (50 * n, 2))
    taken.append(accepted(anywhere, missing))
    if len(taken[-1]) < missing:
        raise ValueError(
            f"room for {n - missing + len(taken[-1])} of {n} positions in {nx} × {ny} pixels; "
            f"lower margin ({margin}) or min_separation ({min_separation})"
        )
    places = np.concatenate(taken[-2:] if n_near else taken[-1:])
    return places[:, 0], places[:, 1]


def expected_snr(
    flux: ArrayLike,
    x: ArrayLike = 0.0,
    y: ArrayLike = 0.0,
    *,
    psf_new: AnyPsf,
    psf_ref: AnyPsf,
    sigma_new: float,
    sigma_ref: float,
    flux_ratio: float = 1.0,
    variance_new: NDArray | None = None,
    variance_ref: NDArray | None = None,
    xy_ref: tuple[ArrayLike, ArrayLike] | None = None,
) -> NDArray[np.float64]:
    """|S_corr| that a source of known flux is expected to have, without noise.

    On blank sky that is |T| √F_S (E42); with variance planes, |T| F_S over the root of the local V(S) (E25–E29, without
    the astrometric term).

    Parameters
    ----------
    flux : array_like (n,)
        T, electrons of new.
    x, y : array_like (n,)
        Places on new; they matter where a PSF varies or variances are given.
    psf_new, psf_ref : AnyPsf
    sigma_new, sigma_ref : float
        Sky rms in electrons, ref in its own.
    flux_ratio : float
        F_new / F_ref.
    variance_new, variance_ref : ndarray (ny, nx), optional
        Total variance of each pixel, electrons².
    xy_ref : (x, y), optional
        The same places on ref, where its grid is another.

    Returns
    -------
    ndarray (n,) float64

    References
    ----------
    Zackay, Ofek & Gal-Yam (2016), ApJ 830, 27, doi:10.3847/0004-637X/830/1/27.
    """
    columns = (flux, x, y, *(xy_ref or (x, y)))
    flux, x, y, x_ref, y_ref = np.broadcast_arrays(*(np.atleast_1d(np.asarray(c, dtype=np.float64)) for c in columns))
    out = np.empty(flux.shape)
    filters = None
    constant = all(_is_constant(p) for p in (psf_new, psf_ref))
    for i, t in enumerate(flux):
        new, ref = (x[i], y[i]), (x_ref[i], y_ref[i])
        if filters is None or not constant:
            filters = _filters(psf_stamp(psf_new, *new), psf_stamp(psf_ref, *ref), sigma_new, sigma_ref, flux_ratio)
        f_s, k_new, k_ref = filters
        variance = 0.0
        for plane, place, kernel, sigma in (
            (variance_new, new, k_new, sigma_new),
            (variance_ref, ref, k_ref, sigma_ref),
        ):
            blank = sigma**2
            local = np.full(kernel.shape, blank) if plane is None else _patch(plane, *place, len(kernel), blank)
            variance += np.sum(local * kernel[::-1, ::-1] ** 2)
        out[i] = abs(t) * f_s / np.sqrt(variance)
    return out


@dataclass(frozen=True)
class SimulatedEpoch:
    """A science image made from a reference.

    Attributes
    ----------
    data : ndarray (ny, nx) float32
        Electrons, sky included; 0 where the reference has nothing.
    mask : ndarray (ny, nx) uint8
        Bits of `MaskBit`.
    matrix : ndarray (2, 3) float64
        ``(x_ref, y_ref) = matrix[:, :2] @ (x, y) + matrix[:, 2]``.
    """

    data: NDArray[np.float32]
    mask: NDArray[np.uint8]
    matrix: NDArray[np.float64]


def make_epoch(
    reference: NDArray,
    *,
    fwhm_ref: float,
    fwhm_new: float,
    sky: float,
    read_noise: float = 5.0,
    flux_ratio: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    rotation: float = 0.0,
    mask: NDArray[np.uint8] | None = None,
    saturation: float = float("inf"),
    rng: int | np.random.Generator = 0,
) -> SimulatedEpoch:
    """A noisier, more blurred, slightly moved science image from a real, deep reference.

    Transients are then added with `inject`. Noise of the reference remains in the result (blurred), so choose a ``sky``
    well above the reference's own variance.

    Parameters
    ----------
    reference : ndarray (ny, nx)
        Background-subtracted, electrons. NaN is taken for no data.
    fwhm_ref, fwhm_new : float
        Seeing before and after, pixels; the image is convolved with a Gaussian that makes up the difference.
    sky : float
        Electrons per pixel; with ``read_noise`` it makes the noise.
    flux_ratio : float
        F_new / F_ref.
    shift : (dx, dy)
        The centre of the result shows this offset from the reference's centre, in pixels of the reference.
    rotation : float
        Degrees.
    mask : ndarray (ny, nx) uint8, optional
        Bits of `MaskBit` of the reference.
    saturation : float
        Electrons.
    rng : int or Generator

    Returns
    -------
    SimulatedEpoch

    Raises
    ------
    ValueError
        The new seeing is sharper than the reference's.
    """
    if fwhm_new < fwhm_ref:
        raise ValueError(f"fwhm_new = {fwhm_new} is sharper than fwhm_ref = {fwhm_ref}: blurring cannot do that")
    rng = np.random.default_rng(rng)
    reference = np.asarray(reference, dtype=np.float64)
    bits = np.zeros(reference.shape, np.uint8) if mask is None else mask.astype(np.uint8)
    bits = bits | np.where(np.isfinite(reference), np.uint8(0), np.uint8(MaskBit.NO_DATA))
    sigma = np.sqrt(fwhm_new**2 - fwhm_ref**2) / (2 * np.sqrt(2 * np.log(2)))
    matrix = _rotation_about_centre(reference.shape, shift, rotation)

    def moved(plane: NDArray, order: int, outside: float) -> NDArray:
        blurred = gaussian_filter(plane, sigma, mode="constant", cval=outside) if sigma > 0 else plane
        # scipy counts (y, x); ours is (x, y).
        return affine_transform(
            blurred, matrix[::-1, 1::-1], matrix[::-1, 2], order=order, mode="constant", cval=outside
        )

    light = moved(np.where(bits & MaskBit.NO_DATA, 0.0, reference), 3, 0.0) * flux_ratio
    new_bits = np.zeros(reference.shape, np.uint8)
    for bit in MaskBit:
        touched = moved((bits & bit != 0).astype(np.float64), 1, float(bit is MaskBit.NO_DATA))
        new_bits |= np.where(touched > 0.02, np.uint8(bit), np.uint8(0))
    data, full = expose(np.maximum(light, -sky) + sky, rng, read_noise=read_noise, saturation=saturation)
    new_bits |= full
    return SimulatedEpoch(np.where(new_bits & MaskBit.NO_DATA, np.float32(0), data), new_bits, matrix)


def transform_wcs(wcs: Any, matrix: NDArray) -> Any:
    """The WCS of an image whose pixels map onto those of ``wcs`` by an affine matrix; SIP is carried over exactly.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        Celestial; left alone.
    matrix : ndarray (2, 3)
        New pixels (0-based) to pixels of ``wcs``, as in `SimulatedEpoch`.

    Returns
    -------
    astropy.wcs.WCS
    """
    from astropy.wcs import Sip

    linear, offset = np.asarray(matrix)[:, :2], np.asarray(matrix)[:, 2]
    out = wcs.deepcopy()
    out.wcs.crpix = np.linalg.solve(linear, wcs.wcs.crpix - 1 - offset) + 1
    if wcs.wcs.has_cd():
        out.wcs.cd = wcs.wcs.cd @ linear
    else:
        out.wcs.cdelt = (1.0, 1.0)
        out.wcs.pc = np.diag(wcs.wcs.cdelt) @ wcs.wcs.get_pc() @ linear
    if wcs.sip is not None:
        a, b = _transformed_sip(wcs.sip, linear)
        out.sip = Sip(a, b, None, None, out.wcs.crpix)
    out.wcs.set()
    return out


# --- parts that simulated nights share


def scene_psfs(
    scene: Scene, shape: tuple[int, int], shape_ref: tuple[int, int] | None = None
) -> tuple[ParametricPsf, ParametricPsf]:
    """The PSFs of new and of ref."""
    new = ParametricPsf(
        scene.fwhm_new,
        beta=scene.beta,
        axis_ratio=scene.axis_ratio,
        theta=scene.theta,
        variation=scene.psf_variation,
        shape=shape,
        waves=scene.psf_waves,
        halo=scene.halo,
    )
    ref = replace(
        new, fwhm=scene.fwhm_ref, axis_ratio=scene.axis_ratio_ref, size=0, shape=shape_ref or shape, phase=2.0
    )
    if scene.brighter_fatter:
        # Sources are painted in electrons of new; ref's own are fewer by the flux ratio.
        full = scene.brighter_fatter / scene.saturation
        new = replace(new, growth=full * new.stamp().max())
        ref = replace(ref, growth=full * ref.stamp().max() / scene.flux_ratio)
    return new, ref


def scene_sigmas(scene: Scene) -> tuple[float, float]:
    """Sky rms of new and of ref, each in its own electrons."""
    return (
        float(np.sqrt(scene.sky_new + scene.read_noise**2)),
        float(np.sqrt((scene.sky_ref + scene.read_noise**2) / scene.depth)),
    )


def draw_field(shape: tuple[int, int], scene: Scene, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Stars (`STAR`) and galaxies (`GALAXY`) over the image and a little beyond; fluxes in electrons of new."""
    ny, nx = shape
    area = (ny + 2 * _BORDER) * (nx + 2 * _BORDER) / 1024**2

    def positions(table: NDArray) -> None:
        table["x"] = rng.uniform(-_BORDER - 0.5, nx + _BORDER - 0.5, len(table))
        table["y"] = rng.uniform(-_BORDER - 0.5, ny + _BORDER - 0.5, len(table))

    stars = np.zeros(round(scene.n_stars * area), STAR)
    positions(stars)
    faintest, brightest = scene.star_flux
    stars["flux"] = _power_law(faintest, brightest, scene.star_slope, len(stars), rng)

    galaxies = np.zeros(round(scene.n_galaxies * area), GALAXY)
    positions(galaxies)
    galaxies["flux"] = _power_law(4 * faintest, max(1e5, 8 * faintest), scene.star_slope, len(galaxies), rng)
    galaxies["radius"] = rng.uniform(1.5, 3.0, len(galaxies)) * (galaxies["flux"] / (4 * faintest)) ** 0.25
    galaxies["index"] = rng.choice([1.0, 1.0, 2.0, 4.0], len(galaxies))
    galaxies["axis_ratio"] = rng.uniform(0.4, 1.0, len(galaxies))
    galaxies["theta"] = rng.uniform(0, 180, len(galaxies))
    return stars, galaxies


def draw_transients(
    shape: tuple[int, int], scene: Scene, galaxies: NDArray, rng: np.random.Generator
) -> tuple[NDArray, NDArray]:
    """Transients (`TRUTH`, without ``snr_local``), and the constant part of those that vary (`STAR`)."""
    n = scene.n_transients
    truth = np.zeros(n, TRUTH)
    psf_new, psf_ref = scene_psfs(scene, shape)
    truth["x"], truth["y"] = choose_positions(
        shape,
        n,
        rng,
        margin=min(30.0, min(shape) / 8),
        min_separation=min(30.0, min(shape) / 3 / np.sqrt(max(n, 1))),
        near=np.stack([galaxies["x"], galaxies["y"]], axis=-1) if len(galaxies) else None,
        near_fraction=0.7 * scene.near_galaxies,
        near_radius=galaxies["radius"],
    )
    # choose_positions puts those on galaxies first; they are of the first kind.
    n_vanished = n_variable = round(0.15 * n)
    truth["kind"] = ["new"] * (n - n_vanished - n_variable) + ["vanished"] * n_vanished + ["variable"] * n_variable
    low, high = np.log(scene.transient_snr)
    truth["snr"] = np.exp(rng.uniform(low, high, n))
    sigma_new, sigma_ref = scene_sigmas(scene)
    unit = expected_snr(
        np.ones(n),
        truth["x"],
        truth["y"],
        psf_new=psf_new,
        psf_ref=psf_ref,
        sigma_new=sigma_new,
        sigma_ref=sigma_ref,
        flux_ratio=scene.flux_ratio,
    )
    truth["flux"] = truth["snr"] / unit
    varying = truth["kind"] == "variable"
    fading = (truth["kind"] == "vanished") | (varying & (rng.uniform(size=n) < 0.5))
    truth["flux"][fading] *= -1
    hosts = np.zeros(int(varying.sum()), STAR)
    hosts["x"], hosts["y"] = truth["x"][varying], truth["y"][varying]
    hosts["flux"] = np.abs(truth["flux"][varying]) * rng.uniform(1.0, 4.0, len(hosts))
    return truth, hosts


def expose(
    expected: NDArray,
    rng: np.random.Generator,
    *,
    read_noise: float,
    saturation: float = float("inf"),
    depth: int = 1,
    hits: NDArray | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """What a detector records of an expected number of electrons: the mean of ``depth`` exposures, and its mask.

    Parameters
    ----------
    expected : ndarray (ny, nx)
        Electrons of one exposure, sky included.
    rng : Generator
    read_noise : float
        Electrons rms of one exposure.
    saturation : float
        Full well in electrons. What exceeds it flows along the columns, half up and half down.
    depth : int
        Exposures in the mean.
    hits : ndarray (ny, nx), optional
        Charge that did not come through the optics.

    Returns
    -------
    data : ndarray (ny, nx) float32
    mask : ndarray (ny, nx) uint8
        `MaskBit.SATURATED` where full or bled into.
    """
    counts = rng.poisson(np.maximum(expected, 0) * depth) / depth
    if hits is not None:
        counts = counts + hits
    full = _bleed(counts, float(saturation)) if np.isfinite(saturation) else np.zeros(counts.shape, dtype=bool)
    data = counts + rng.standard_normal(counts.shape) * (read_noise / np.sqrt(depth))
    data = np.where(counts >= saturation, saturation, np.minimum(data, saturation))
    return data.astype(np.float32), np.where(full, np.uint8(MaskBit.SATURATED), np.uint8(0))


@njit(cache=True)
def _bleed(image: Any, full: float) -> Any:  # pragma: no cover - compiled
    """Let charge above the full well flow into the pixels above and below, in place; True where full or bled into."""
    ny, nx = image.shape
    touched = image >= full
    for i in range(nx):
        for j in range(ny):
            excess = image[j, i] - full
            if excess <= 0:
                continue
            image[j, i] = full
            for step in (-1, 1):
                rest, k = excess / 2, j + step
                while rest > 0 and 0 <= k < ny:
                    taken = min(max(full - image[k, i], 0.0), rest)
                    image[k, i] += taken
                    touched[k, i] = True
                    rest -= taken
                    k += step
    return touched


def _paint(shape: tuple[int, int], points: list[NDArray], galaxies: NDArray, psf: AnyPsf) -> NDArray[np.float64]:
    """Expected light of several tables of point sources and of galaxies."""
    x, y, flux = (np.concatenate([p[name] for p in points]) for name in ("x", "y", "flux"))
    return add_galaxies(add_sources(np.zeros(shape), x, y, flux, psf), galaxies, psf)


def _on_ref(
    table: NDArray,
    to_ref: Callable[[NDArray, NDArray], tuple[NDArray, NDArray]],
    jitter: float,
    rng: np.random.Generator,
) -> NDArray:
    """The sources at their places on ref, each displaced by the registration jitter."""
    table = table.copy()
    table["x"], table["y"] = to_ref(table["x"], table["y"])
    if jitter:
        for name in ("x", "y"):
            table[name] += jitter * rng.standard_normal(len(table))
    return table


def _power_law(low: float, high: float, slope: float, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw from N(> f) ∝ f^-slope between two limits."""
    u = rng.uniform(size=n)
    return (low**-slope + u * (high**-slope - low**-slope)) ** (-1 / slope)


def _particle_hits(shape: tuple[int, int], n: int, rng: np.random.Generator, artefacts: list) -> NDArray[np.float64]:
    """Straight tracks, one pixel wide, of 10³ to 10⁴ electrons a pixel, most of them short."""
    ny, nx = shape
    charge = np.zeros(shape)
    for _ in range(n):
        x, y, angle = rng.uniform(0, nx - 1), rng.uniform(0, ny - 1), rng.uniform(0, 2 * np.pi)
        length, density = 1 + rng.exponential(4.0), 10 ** rng.uniform(2.7, 3.7)
        steps = np.arange(0, length, 0.25)
        columns = np.rint(x + steps * np.cos(angle)).astype(int)
        rows = np.rint(y + steps * np.sin(angle)).astype(int)
        inside = (columns >= 0) & (columns < nx) & (rows >= 0) & (rows < ny)
        np.add.at(charge, (rows[inside], columns[inside]), density / 4)
        artefacts.append((float(columns[inside].mean()), float(rows[inside].mean()), "new", "cosmic_ray"))
    return charge


def _hot(
    shape: tuple[int, int], scene: Scene, image: str, rng: np.random.Generator, artefacts: list
) -> NDArray[np.float64]:
    """Single hot pixels."""
    charge = np.zeros(shape)
    for _ in range(scene.hot_pixels):
        row, column = rng.integers(shape[0]), rng.integers(shape[1])
        charge[row, column] += 10 ** rng.uniform(2.7, 3.7)
        artefacts.append((float(column), float(row), image, "hot_pixel"))
    return charge


def _trail(
    shape: tuple[int, int], peak: float, fwhm: float, rng: np.random.Generator, artefacts: list
) -> NDArray[np.float64]:
    """Light of a satellite that crosses the image near its middle; listed every 20 pixels."""
    ny, nx = shape
    angle = rng.uniform(0, np.pi)
    x0, y0 = nx * rng.uniform(0.3, 0.7), ny * rng.uniform(0.3, 0.7)
    y, x = np.mgrid[:ny, :nx]
    across = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    for along in np.arange(-max(shape), max(shape), 20.0):
        px, py = x0 + along * np.cos(angle), y0 + along * np.sin(angle)
        if 0 <= px < nx and 0 <= py < ny:
            artefacts.append((px, py, "new", "trail"))
    light: NDArray[np.float64] = peak * np.exp(-4 * np.log(2) * (across / fwhm) ** 2)
    return light


def _kill_columns(data: NDArray, mask: NDArray, n: int, image: str, rng: np.random.Generator, artefacts: list) -> None:
    """Dead columns, masked; they read as half the sky."""
    for column in rng.integers(data.shape[1], size=n):
        data[:, column] *= 0.5
        mask[:, column] |= np.uint8(MaskBit.BAD)
        artefacts.append((float(column), data.shape[0] / 2, image, "bad_column"))


def _filters(
    psf_new: NDArray, psf_ref: NDArray, sigma_new: float, sigma_ref: float, flux_ratio: float
) -> tuple[float, NDArray, NDArray]:
    """F_S (E42) and the filters k_n, k_r (E28, E29) for F_n = 1, F_r = 1/β, centred on their odd stamps."""
    n = 2 * max(len(psf_new), len(psf_ref)) + 1
    f_r = 1 / flux_ratio
    hat_new, hat_ref = (np.fft.fft2(_centred_on_corner(p, n)) for p in (psf_new, psf_ref))
    power_new, power_ref = np.abs(hat_new) ** 2, np.abs(hat_ref) ** 2
    den = sigma_new**2 * f_r**2 * power_ref + sigma_ref**2 * power_new
    den[den == 0] = 1.0
    f_s = float(np.sum(power_new * f_r**2 * power_ref / den)) / n**2
    k_new = np.fft.ifft2(f_r**2 * np.conj(hat_new) * power_ref / den).real
    k_ref = np.fft.ifft2(f_r * np.conj(hat_ref) * power_new / den).real
    return f_s, np.fft.fftshift(k_new), np.fft.fftshift(k_ref)


def _centred_on_corner(psf: NDArray, n: int) -> NDArray[np.float64]:
    """A stamp padded to (n, n), its centre on pixel [0, 0]."""
    wide = np.zeros((n, n))
    wide[: psf.shape[0], : psf.shape[1]] = psf
    return np.roll(wide, (-(psf.shape[0] // 2), -(psf.shape[1] // 2)), axis=(0, 1))


def _patch(plane: NDArray, x: float, y: float, size: int, fill: float) -> NDArray[np.float64]:
    """Square of odd side around a pixel; ``fill`` outside the image."""
    half, column, row = size // 2, round(x), round(y)
    out = np.full((size, size), fill)
    rows, columns = np.arange(row - half, row + half + 1), np.arange(column - half, column + half + 1)
    inside_y, inside_x = ((at >= 0) & (at < n) for at, n in zip((rows, columns), plane.shape, strict=True))
    out[np.ix_(inside_y, inside_x)] = plane[np.ix_(rows[inside_y], columns[inside_x])]
    return out


def _is_constant(psf: AnyPsf) -> bool:
    if isinstance(psf, ParametricPsf):
        return psf.variation == 0
    return isinstance(psf, np.ndarray | float | int)


def _clear_of(places: NDArray, taken: list[NDArray], distance: float) -> NDArray[np.bool_]:
    """Which places keep their distance from all those taken."""
    clear = np.ones(len(places), dtype=bool)
    for others in taken:
        if len(others) and len(places):
            clear &= cKDTree(others).query(places)[0] >= distance
    return clear


def _rotation_about_centre(shape: tuple[int, ...], shift: tuple[float, float], rotation: float) -> NDArray[np.float64]:
    """Affine matrix (2, 3), new to ref: a rotation about the image centre, then a shift."""
    centre = (np.array([shape[1], shape[0]]) - 1) / 2
    angle = np.radians(rotation)
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([linear, centre - linear @ centre + np.asarray(shift, dtype=np.float64)])


def _transformed_sip(sip: Any, linear: NDArray) -> tuple[NDArray, NDArray]:
    """SIP coefficients for pixels u with u_ref = linear @ u: the same polynomial degree, so a fit is exact."""
    order = max(sip.a_order, sip.b_order)
    scale = 1000.0
    u, v = (grid.ravel() for grid in np.meshgrid(*[np.linspace(-1, 1, 2 * order + 3)] * 2))
    reference = linear @ np.stack([u, v]) * scale
    powers = [(p, q) for p in range(order + 1) for q in range(order + 1 - p) if p + q >= 2]
    correction = np.stack(
        [
            sum(coefficients[p, q] * reference[0] ** p * reference[1] ** q for p, q in np.argwhere(coefficients != 0))
            + np.zeros_like(u)
            for coefficients in (sip.a, sip.b)
        ]
    )
    design = np.stack([u**p * v**q for p, q in powers], axis=-1)
    solution = np.linalg.lstsq(design, np.linalg.solve(linear, correction).T, rcond=None)[0]  # (n_powers, 2)
    out = np.zeros((2, order + 1, order + 1))
    for (p, q), values in zip(powers, solution, strict=True):
        out[:, p, q] = values / scale ** (p + q)
    return out[0], out[1]
