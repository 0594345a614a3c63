"""What holds for a whole image, measured on a sample of it: for differences of which only a part is ever computed.

`flow` has whole images in memory and measures on all of them. Here the image may be larger than memory: sky and noise
come from each part by itself, PSFs and flux ratio from a few blocks that are spread over it and set side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchproc.config import Config
from batchproc.errors import PsfError, SubtractError
from batchproc.imaging.background import measure_background
from batchproc.imaging.centres import match_centres
from batchproc.imaging.noise import measure_autocorrelation, seen_by
from batchproc.imaging.photometry import measure_flux_ratio, psf_flux
from batchproc.imaging.psf import fit_psf
from batchproc.imaging.psf_view import PsfView
from batchproc.imaging.saturation import grow_saturated
from batchproc.imaging.stars import Stars, find_stars
from batchproc.imaging.subtract import ResidualModel
from batchproc.imaging.variance import source_variance
from batchproc.io.parts import Image, Part, load_part
from batchproc.records import MaskBit, PsfLike

__all__ = ["Noise", "Ready", "Recipe", "make_ready", "measure_recipe"]

#: Side of the blocks of a sample in pixels, and how many of them along each axis.
BLOCK, BLOCKS = 768, 3
#: Pixels that are masked where blocks meet: nothing there is as it is in the image.
_SEAM = 3


@dataclass(frozen=True)
class Noise:
    """How the noise of neighbouring pixels hangs together: see `batchproc.imaging.noise`.

    Attributes
    ----------
    acf : ndarray (n, n) float64
        Autocorrelation, 1 at zero lag.
    seen : float
        Variance of it that the image's PSF sees, in units of white noise of the same rms.
    """

    acf: NDArray[np.float64]
    seen: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a subtraction must know that a tile cannot tell.

    Attributes
    ----------
    psf_new, psf_ref : PsfLike
    flux_ratio : float
        F_new / F_ref.
    flux_ratio_error : float
        Relative.
    registration_sigma : (float, float)
        Rms in x and y, pixels.
    noise_new, noise_ref : Noise or None
        None: white.
    residuals : ResidualModel
        How badly stars subtract.
    renormalisation : float
        Width of S_corr on blank sky, which it is divided by.
    """

    psf_new: PsfLike = field(repr=False)
    psf_ref: PsfLike = field(repr=False)
    flux_ratio: float
    flux_ratio_error: float = 0.0
    registration_sigma: tuple[float, float] = (0.0, 0.0)
    noise_new: Noise | None = field(default=None, repr=False)
    noise_ref: Noise | None = field(default=None, repr=False)
    residuals: ResidualModel = field(default_factory=ResidualModel)
    renormalisation: float = 1.0


@dataclass(frozen=True)
class Ready:
    """A part of an image as `batchproc.imaging.subtract.prepare` wants it.

    Attributes
    ----------
    data : ndarray (h, w) float32
        Background-subtracted, electrons.
    rms : ndarray (h, w) float32
        Of the sky, electrons.
    variance : ndarray (h, w) float32 or None
        None: that of the sky alone.
    mask : ndarray (h, w) uint8
    """

    data: NDArray[np.float32]
    rms: NDArray[np.float32]
    variance: NDArray[np.float32] | None
    mask: NDArray[np.uint8]


def make_ready(part: Part, psf: PsfLike, noise: Noise | None, config: Config) -> Ready:
    """Take the sky out of a part, unless that has been done, and say how noisy its pixels are.

    Where the sky is measured, the photon noise of sources is counted and saturated stars are masked half a FWHM wider,
    as in a run; where it was given, the part is taken as it stands.
    """
    if part.sigma is not None:
        return Ready(part.data, part.sigma, part.variance, part.mask)
    sky = measure_background(part.data, part.mask, config.background)
    data, variance = sky.subtracted(part.data, part.mask), part.variance
    if variance is None and config.subtract.source_noise:
        # Sources are looked for as filters see the noise, which is more than its pixels scatter where it is correlated.
        seen = np.float32(1 if noise is None else noise.seen)
        variance = source_variance(data, np.square(sky.rms) * seen, psf, mask=part.mask) / seen
    return Ready(data, sky.rms, variance, grow_saturated(part.mask, psf.fwhm))


def measure_recipe(new: Image, ref: Image, flux_ratio: float | None, config: Config) -> Recipe:
    """PSFs, flux ratio and registration, as far as they are not given; residuals and renormalisation are left open.

    Raises
    ------
    PsfError
        Too few stars in the sample.
    SubtractError
        Too few of them in both images.
    """
    psfs_given = new.psf is not None and ref.psf is not None
    prepared = new.sigma is not None and ref.sigma is not None
    if new.psf is not None and ref.psf is not None and flux_ratio is not None and prepared:
        return Recipe(psf_new=new.psf, psf_ref=ref.psf, flux_ratio=flux_ratio)
    rows, columns = (_Sampling.of(length) for length in new.shape)
    a, b = (_Sample.of(image, rows, columns, config) for image in (new, ref))
    psf_new, psf_ref = (s.psf(image, config, name) for s, image, name in ((a, new, "new"), (b, ref, "ref")))
    noise_new, noise_ref = a.noise(psf_new, new), b.noise(psf_ref, ref)
    variances = [
        source_variance(s.data, np.square(s.rms) * np.float32(1 if noise is None else noise.seen), psf, mask=s.mask)
        for s, psf, noise in ((a, psf_new, noise_new), (b, psf_ref, noise_ref))
    ]
    stars = a.stars(config)
    registration = (0.0, 0.0)
    if not psfs_given:
        # Centroids and PSF fits differ by hundredths of a pixel: the PSF of ref goes where its stars are.
        centres = match_centres(
            a.data,
            b.data,
            psf_new,
            psf_ref,
            stars.x,
            stars.y,
            variance_new=variances[0],
            variance_ref=variances[1],
            mask_new=a.mask,
            mask_ref=b.mask,
        )
        psf_ref, registration = centres.psf, (centres.rms_x, centres.rms_y)
    error = 0.0
    if flux_ratio is None:
        flux, flux_err, _, good = psf_flux(a.data, variances[0], a.mask, stars.x, stars.y, psf_new)
        flux_ref, err_ref, _, good_ref = psf_flux(b.data, variances[1], b.mask, stars.x, stars.y, psf_ref)
        both = good & good_ref
        ratio = measure_flux_ratio(flux[both], flux_err[both], flux_ref[both], err_ref[both])
        if ratio.n_stars == 0:
            raise SubtractError(
                f"{int(both.sum())} of {len(stars)} stars can be measured in both images, too few for their flux "
                "ratio: give flux_ratio, or check that both show the same field",
                found=int(both.sum()),
                stars=len(stars),
            )
        flux_ratio, error = ratio.value, ratio.error / ratio.value
    return Recipe(
        psf_new=_on_image(psf_new, rows, columns) if new.psf is None else new.psf,
        psf_ref=ref.psf if psfs_given and ref.psf else _on_image(psf_ref, rows, columns),
        flux_ratio=flux_ratio,
        flux_ratio_error=error,
        registration_sigma=registration,
        noise_new=noise_new,
        noise_ref=noise_ref,
    )


@dataclass(frozen=True)
class _Sampling:
    """Which rows, or columns, of an image are in a sample: blocks of one length, evenly spread, or all."""

    length: int
    block: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, length: int) -> _Sampling:
        if length <= BLOCK * BLOCKS:
            return cls(length, length, (0,))
        return cls(length, BLOCK, tuple(np.linspace(0, length - BLOCK, BLOCKS).round().astype(int).tolist()))

    @property
    def whole(self) -> bool:
        return len(self.starts) == 1

    @property
    def size(self) -> int:
        return self.block * len(self.starts)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Where each block lies in the sample, and where in the image."""
        for k, start in enumerate(self.starts):
            yield slice(k * self.block, (k + 1) * self.block), slice(start, start + self.block)

    def to_image(self) -> tuple[NDArray, NDArray]:
        """Nodes of the map from the sample to the image."""
        ends = [(at.start, to.start, at.stop - 1, to.stop - 1) for at, to in self.pieces()]
        return np.ravel([(e[0], e[2]) for e in ends]), np.ravel([(e[1], e[3]) for e in ends])

    def to_sample(self) -> tuple[NDArray, NDArray]:
        """Nodes of a smooth map from the image to the sample, true in the middle of each block."""
        half = (self.block - 1) / 2
        at = [0.0, *(k * self.block + half for k in range(len(self.starts))), self.size - 1.0]
        return np.array([0.0, *(start + half for start in self.starts), self.length - 1.0]), np.array(at)


@dataclass(frozen=True)
class _PlacedPsf(PsfView):
    """A PSF whose coordinates are those of a sample, asked in the image's, or the other way round."""

    rows: tuple[NDArray, NDArray]
    columns: tuple[NDArray, NDArray]

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        return self.psf.at(float(np.interp(x, *self.columns)), float(np.interp(y, *self.rows)))


def _on_image(psf: PsfLike, rows: _Sampling, columns: _Sampling) -> PsfLike:
    return psf if rows.whole and columns.whole else _PlacedPsf(psf, rows.to_sample(), columns.to_sample())


@dataclass(frozen=True)
class _Sample:
    """Blocks of an image side by side, without their sky."""

    data: NDArray[np.float32]
    rms: NDArray[np.float32]
    mask: NDArray[np.uint8]
    saturation: float
    rows: _Sampling
    columns: _Sampling

    @classmethod
    def of(cls, image: Image, rows: _Sampling, columns: _Sampling, config: Config) -> _Sample:
        shape = rows.size, columns.size
        data, rms, mask = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.uint8)
        levels = []
        for at_y, y in rows.pieces():
            for at_x, x in columns.pieces():
                here = at_y, at_x
                part = load_part(_computed(image.cut((y, x))))
                mask[here] = part.mask
                if part.sigma is None:
                    sky = measure_background(part.data, part.mask, config.background)
                    data[here], rms[here] = sky.subtracted(part.data, part.mask), sky.rms
                    levels.append(sky.global_level)
                else:
                    data[here], rms[here] = part.data, part.sigma
        for at_y, _ in list(rows.pieces())[1:]:
            mask[at_y.start - _SEAM : at_y.start + _SEAM] |= np.uint8(MaskBit.BAD)
        for at_x, _ in list(columns.pieces())[1:]:
            mask[:, at_x.start - _SEAM : at_x.start + _SEAM] |= np.uint8(MaskBit.BAD)
        level = float(np.median(levels)) if levels else 0.0
        return cls(data, rms, mask, image.saturation - level, rows, columns)

    def stars(self, config: Config) -> Stars:
        return find_stars(self.data, self.rms, self.mask, saturation=self.saturation, config=config.psf)

    def noise(self, psf: PsfLike, image: Image) -> Noise | None:
        """The noise of an image whose sky was measured; white where it was given."""
        if image.sigma is not None:
            return None
        stamp = psf.at((self.columns.size - 1) / 2, (self.rows.size - 1) / 2)
        found = measure_autocorrelation(self.data, self.mask, self.rms, psf=stamp)
        if not np.isfinite(found.error) or np.count_nonzero(found.values) == 1:
            return None
        return Noise(found.values, seen_by(stamp, found.values))

    def psf(self, image: Image, config: Config, name: str) -> PsfLike:
        """The image's own PSF, or the one that the sample's stars give; in the sample's coordinates."""
        if image.psf is not None:
            whole = self.rows.whole and self.columns.whole
            return image.psf if whole else _PlacedPsf(image.psf, self.rows.to_image(), self.columns.to_image())
        try:
            return fit_psf(self.data, None, self.mask, rms=self.rms, saturation=self.saturation, config=config.psf)
        except PsfError as error:
            raise PsfError(f"{name}: {error}; or give psf_{name}", image=name, **error.metadata) from None


def _computed(cut: tuple) -> tuple:
    """A cut whose dask arrays have been computed."""
    import dask

    return dask.compute(*cut)  # type: ignore[no-any-return]
