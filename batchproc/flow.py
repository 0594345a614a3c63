"""The story, in one process: an image and its reference in, candidates, stamps and a receipt out.

    read → align → background → psf → photometry → subtract → detect → cutouts

No Dask, no argument parsing, no writing of files. Every other module is a detail of this one.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.config import Config
from batchproc.errors import ExposureError, PsfError, SubtractError
from batchproc.imaging.align import Aligned, align
from batchproc.imaging.background import Background, measure_background
from batchproc.imaging.centres import match_centres
from batchproc.imaging.cutouts import cut, round_to_noise
from batchproc.imaging.detect import Candidates, detect
from batchproc.imaging.noise import measure_autocorrelation, seen_by
from batchproc.imaging.photometry import FluxRatio, KeptPsf, measure_flux_ratio, psf_flux
from batchproc.imaging.psf import fit_psf
from batchproc.imaging.saturation import grow_saturated, saturated_stars
from batchproc.imaging.sources import bright_stars, find_sources
from batchproc.imaging.stars import Stars, find_stars
from batchproc.imaging.subtract import MapTiles, subtract
from batchproc.imaging.variance import source_variance
from batchproc.io.fitsfile import split_hdu
from batchproc.io.images import read_new, read_refs
from batchproc.io.wcs import pixel_scale_arcsec
from batchproc.records import CATALOGUE, Difference, Exposure, ManifestEntry, MaskBit, PsfLike, Receipt

__all__ = ["ImageResult", "process_image"]


@dataclass(frozen=True)
class ImageResult:
    """What comes out of one image.

    Attributes
    ----------
    catalogue : dict of ndarray
        One array a column of `CATALOGUE`, one row a candidate; ``stamp_index`` counts from 0.
    stamps : ndarray (n, 3, size, size) float32
        new, ref, difference: background-subtracted, in the file units of new; NaN where there is no data.
    receipt : Receipt
    difference : Difference
    new, ref : ndarray (ny, nx) float32
        Background-subtracted, electrons, on the grid of new; ref is not scaled to new, but where the flux ratio varies
        across the image, that is taken out.
    """

    catalogue: dict[str, NDArray]
    stamps: NDArray[np.float32]
    receipt: Receipt
    difference: Difference
    new: NDArray[np.float32]
    ref: NDArray[np.float32]


def process_image(
    entry: ManifestEntry, config: Config | None = None, *, map_tiles: MapTiles | None = None
) -> ImageResult:
    """Find what changed between one image and its reference.

    Parameters
    ----------
    entry : ManifestEntry
        One row of a manifest.
    config : Config, optional
    map_tiles : callable, optional
        Does the tiles of the subtraction somewhere else: see `subtract`.

    Returns
    -------
    ImageResult

    Raises
    ------
    ExposureError
        A foreseen failure: which file, what was found, what was expected, what to do. Its ``metadata`` has the numbers.
    """
    config = config or Config()
    clock = Clock()
    with _naming(entry):
        with clock("read"):
            new = read_new(entry)
        with _placing(new.meta):
            with clock("read"):
                refs = read_refs(entry)
            with clock("align"):
                aligned = align(new, refs, config.align)
            del refs  # several of them, and where one was interpolated, its pixels are needed no more
            return subtract_exposures(
                new, aligned, config, image_id=entry.image_id, clock=clock, map_tiles=map_tiles, overwrite=True
            )


@contextmanager
def _naming(entry: ManifestEntry) -> Iterator[None]:
    """A failure that names neither file, for numerics know of none, leaves with that of new before its message."""
    try:
        yield
    except ExposureError as error:
        if not any(str(split_hdu(path)[0]) in str(error) for path in (entry.new, *entry.ref)):
            error.args = (f"{entry.new}: {error}",)
        raise


@contextmanager
def _placing(meta: Mapping[str, Any]) -> Iterator[None]:
    """A failure after new was read leaves with exposure, CCD, filter and time of new, as far as they are known."""
    try:
        yield
    except ExposureError as error:
        for name in ("exposure_id", "ccd", "filter", "mjd"):
            value = meta.get(name)
            if value and value == value:  # no empty text, no NaN
                error.metadata.setdefault(name, value)
        raise


def subtract_exposures(
    new: Exposure,
    aligned: Aligned,
    config: Config,
    *,
    image_id: str,
    clock: Clock | None = None,
    map_tiles: MapTiles | None = None,
    overwrite: bool = False,
) -> ImageResult:
    """The flow from two exposures on one grid; `process_image` is this after reading and aligning.

    With `overwrite`, the sky is taken off the exposures' own pixels: a third less memory, for who needs them no more.
    """
    clock = clock or Clock()
    with clock("background"):
        sky = measure_background(new.data, new.mask, config.background)
        sky_ref = measure_background(aligned.ref.data, aligned.ref.mask, config.background)
        image = sky.subtracted(new.data, new.mask, overwrite=overwrite)
        reference = sky_ref.subtracted(aligned.ref.data, aligned.ref.mask, overwrite=overwrite)
    with clock("psf"):
        stars = find_stars(image, sky.rms, new.mask, saturation=new.saturation - sky.global_level, config=config.psf)
        psf, psf_quality = _psf_of(new, image, sky, config, "new", stars)
        psf_ref, psf_ref_quality = _psf_of(aligned.ref, reference, sky_ref, config, "ref")
        noise, seen = _noise_of(image, new.mask, sky, psf, None)
        noise_ref, seen_ref = _noise_of(reference, aligned.ref.mask, sky_ref, psf_ref, aligned.noise)
    with clock("photometry"):
        # As filters see it that are as wide as a PSF; the pixels by themselves scatter less where they are correlated.
        variance = _total_variance(new, image, sky.rms, seen, psf)
        variance_ref = _total_variance(aligned.ref, reference, sky_ref.rms, seen_ref, psf_ref)
        # Centroids and PSF fits differ by hundredths of a pixel: the PSF of ref goes where its stars are.
        kept, kept_ref = KeptPsf(psf), KeptPsf(psf_ref)
        centres = match_centres(
            image,
            reference,
            kept,
            kept_ref,
            stars.x,
            stars.y,
            variance_new=variance,
            variance_ref=variance_ref,
            mask_new=new.mask,
            mask_ref=aligned.ref.mask,
        )
        ratio = _flux_ratio(new, aligned.ref, image, reference, variance, variance_ref, kept, centres.psf, stars)
        psf_ref = replace(centres.psf, psf=psf_ref)
        variance *= np.float32(1 / seen)
        variance_ref *= np.float32(1 / seen_ref)
        rms_ref = sky_ref.rms
        # Flat fields and thin clouds make the ratio vary across the image; what is left is one number.
        if ratio.varies:
            evened = ratio.image(new.shape)
            rms_ref = rms_ref * evened
            for plane in (reference, variance_ref, variance_ref):
                plane *= evened
        registration = (centres.rms_x, centres.rms_y) if centres.n_stars else (aligned.rms_x, aligned.rms_y)
    with clock("subtract"):
        subtraction = subtract(
            image,
            reference,
            psf,
            psf_ref,
            rms_new=sky.rms,
            rms_ref=rms_ref,
            flux_ratio=ratio.value,
            variance_new=variance if config.subtract.source_noise else None,
            variance_ref=variance_ref if config.subtract.source_noise else None,
            mask_new=grow_saturated(new.mask, psf.fwhm),
            mask_ref=grow_saturated(aligned.ref.mask, psf_ref.fwhm),
            registration_sigma=registration,
            flux_ratio_error=ratio.error / ratio.value,
            noise_new=noise,
            noise_ref=noise_ref,
            tile=config.subtract.tile,
            renormalise=config.subtract.renormalise,
            star_residuals=config.subtract.star_residuals,
            map_tiles=map_tiles,
        )
        _require_sane_noise(subtraction.renormalisation, new)
    with clock("detect"):
        sources = find_sources(reference, sky_ref.rms, aligned.ref.mask)
        fwhm = max(psf.fwhm, psf_ref.fwhm)
        f_s = subtraction.difference.kernels_at(new.shape[1] / 2, new.shape[0] / 2).f_s
        bright = saturated_stars(subtraction.difference.mask, fwhm) + bright_stars(
            sources,
            snr_of_flux=ratio.value * np.sqrt(f_s),
            misfit=subtraction.residuals.amplitude,
            fwhm=fwhm,
        )
        candidates = detect(subtraction.difference, sources=sources, bright=bright, config=config.detect)
    with clock("cutouts"):
        stamps = _stamps(image, reference, ratio.value, subtraction.difference, candidates, new, config)
    catalogue = _catalogue(candidates, new, aligned, psf, psf_ref, ratio, image_id)
    quality = {
        "shape": list(new.shape),
        **{name: new.meta.get(name) or "" for name in ("filter", "exposure_id", "ccd")},
        "mjd": new.meta.get("mjd", np.nan),
        "gain": new.gain,
        "pixel_scale": np.nan if new.wcs is None else pixel_scale_arcsec(new.wcs),
        "align_method": aligned.method,
        "n_matches": aligned.n_matches,
        "registration_rms_x": registration[0],
        "registration_rms_y": registration[1],
        "sky_new": sky.global_level / new.gain,
        "sigma_new": sky.global_rms / new.gain,
        "sigma_ref": sky_ref.global_rms * ratio.value / new.gain,
        **{f"{key}_new": value for key, value in psf_quality.items()},
        **{f"{key}_ref": value for key, value in psf_ref_quality.items()},
        "flux_ratio": ratio.value,
        "flux_ratio_error": ratio.error,
        "flux_ratio_scatter": ratio.scatter,
        "n_flux_ratio_stars": ratio.n_stars,
        "f_s": f_s,
        "renormalisation": subtraction.renormalisation,
        "residual_amplitude": subtraction.residuals.amplitude,
        "residual_shift": subtraction.residuals.shift,
        "n_residual_stars": subtraction.residuals.n_stars,
        "n_tiles": subtraction.n_tiles,
        "masked_fraction": np.count_nonzero(subtraction.difference.mask) / subtraction.difference.mask.size,
        "zero_point": new.zero_point,
        "assumed": list(new.meta.get("assumed", ())),
        "scorr_hist": subtraction.histogram.tolist(),
        "trails": _in_file_units(candidates.trails, new.gain),
    }
    receipt = clock.receipt(image_id, n_candidates=len(stamps), quality=quality)
    return ImageResult(catalogue, stamps, receipt, subtraction.difference, image, reference)


class Clock:
    """Seconds of each step, and the stage that a failure happened in."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._cpu = time.process_time()

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time a step; a foreseen failure inside leaves with the seconds so far in its metadata."""
        start = time.perf_counter()
        try:
            yield
        except ExposureError as error:
            error.metadata.setdefault("step", step)
            raise
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def receipt(self, image_id: str, *, n_candidates: int, quality: Mapping[str, Any]) -> Receipt:
        """The receipt of a finished image."""
        return Receipt(
            image_id=image_id,
            status="done",
            n_candidates=n_candidates,
            seconds=dict(self.seconds),
            cpu_seconds=time.process_time() - self._cpu,
            peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            quality=dict(quality),
        )


def _psf_of(
    exposure: Exposure, data: NDArray, sky: Background, config: Config, which: str, stars: Stars | None = None
) -> tuple[PsfLike, dict[str, Any]]:
    """The PSF that was supplied, or the one that the image's stars give."""
    if exposure.psf is not None:
        return exposure.psf, {"fwhm": exposure.psf.fwhm, "psf": "given", "n_psf_stars": 0}
    saturation = exposure.saturation - sky.global_level
    try:
        model = fit_psf(data, None, exposure.mask, rms=sky.rms, saturation=saturation, config=config.psf, stars=stars)
    except PsfError as error:
        raise PsfError(f"{which} ({exposure.meta.get('path', '?')}): {error}", image=which, **error.metadata) from None
    quality = {f"psf_{key}": value for key, value in model.quality.items() if key != "n_stars"}
    return model, {"fwhm": model.fwhm, "psf": "measured", "n_psf_stars": model.n_stars, **quality}


def _noise_of(
    data: NDArray, mask: NDArray[np.uint8], sky: Background, psf: PsfLike, expected: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64] | None, float]:
    """Autocorrelation of the noise (None where it is white), and how much more of it than white noise a PSF sees.

    Measured; where there are too few pixels for that, what the resampling is expected to do.
    """
    stamp = psf.at((data.shape[1] - 1) / 2, (data.shape[0] - 1) / 2)
    measured = measure_autocorrelation(data, mask, sky.rms, psf=stamp)
    acf = measured.values if np.isfinite(measured.error) else expected
    if acf is None or np.count_nonzero(acf) == 1:
        return None, 1.0
    return acf, seen_by(stamp, acf)


def _total_variance(exposure: Exposure, data: NDArray, rms: NDArray, seen: float, psf: PsfLike) -> NDArray[np.float32]:
    """Variance of each pixel in electrons²: the measured sky noise times `seen`, and the photon noise of sources.

    The sources' part comes from the survey's variance plane where that counts them (what it has above its level on
    blank sky), else from a smoothed model of the image itself.
    """
    variance = np.square(rms)
    variance *= np.float32(seen)
    if exposure.variance is None or not exposure.meta.get("variance_has_sources", True):
        return source_variance(data, variance, psf, mask=exposure.mask, out=variance)
    sample = tuple(slice(None, None, max(1, n // 1024)) for n in data.shape)
    blank = (exposure.mask[sample] == 0) & (data[sample] < rms[sample])
    level = np.float32(np.median(exposure.variance[sample][blank])) if blank.any() else np.float32(0)
    above = exposure.variance - level
    variance += np.maximum(above, 0, out=above)
    return variance


def _flux_ratio(
    new: Exposure,
    ref: Exposure,
    image: NDArray,
    reference: NDArray,
    variance: NDArray,
    variance_ref: NDArray,
    psf: PsfLike,
    psf_ref: PsfLike,
    stars: Stars,
) -> FluxRatio:
    """F_new / F_ref from PSF fluxes of the same stars in both images, at positions measured on new."""
    x, y = stars.x, stars.y
    flux, error, _, good = psf_flux(image, variance, new.mask, x, y, psf)
    flux_ref, error_ref, _, good_ref = psf_flux(reference, variance_ref, ref.mask, x, y, psf_ref)
    both = good & good_ref
    ratio = measure_flux_ratio(
        flux[both], error[both], flux_ref[both], error_ref[both], x=x[both], y=y[both], shape=new.shape
    )
    if ratio.n_stars == 0:
        raise SubtractError(
            f"{new.meta.get('path', '?')}: {int(both.sum())} of {len(stars)} stars can be measured in both images, "
            "too few for their flux ratio: check that the reference shows the same field, and check the masks",
            stage="photometry",
            found=int(both.sum()),
            stars=len(stars),
        )
    return ratio


def _require_sane_noise(width: float, new: Exposure) -> None:
    """S_corr of blank sky should be 1 wide; correlated noise makes it 0.7 to 1.6, a broken image anything."""
    if not 1 / 3 < width < 3:
        raise SubtractError(
            f"{new.meta.get('path', '?')}: S_corr on blank sky is {width:.2g} wide, 1 is expected (1/3 to 3 is let "
            "through): the noise of an image is far from what its sky shows. Look for areas without data that are not "
            "masked, a sky that changes within a few pixels, or a wrong gain or variance plane",
            renormalisation=width,
        )


def _stamps(
    image: NDArray,
    reference: NDArray,
    ratio: float,
    difference: Difference,
    found: Candidates,
    new: Exposure,
    config: Config,
) -> NDArray[np.float32]:
    """Triplets in the file units of new, rounded to a fraction of each image's noise."""
    stamps = cut(
        image,
        reference,
        difference.difference,
        found["x"],
        found["y"],
        config.cutouts.size,
        no_data=difference.mask & np.uint8(MaskBit.NO_DATA),
    )
    stamps[:, 1] *= np.float32(ratio)
    stamps[:, 2] /= zero_points(difference, found["x"], found["y"], config.cutouts.size)
    stamps /= np.float32(new.gain)
    sigma = np.column_stack([found["sigma_new"], found["sigma_ref"] * ratio, 1 / found.f_d]) / new.gain
    return round_to_noise(stamps, sigma, config.cutouts.noise_fraction)


def zero_points(difference: Difference, x: NDArray, y: NDArray, size: int) -> NDArray[np.float32]:
    """F_D of every pixel of stamps, (n, size, size): D / F_D is in the units of new, and continuous across tiles."""
    offsets = np.arange(size) - size // 2
    columns, rows = (np.rint(place).astype(np.int64)[:, None] + offsets for place in (x, y))  # (n, size)
    f_d = np.ones((len(columns), size, size), np.float32)
    for k in difference.kernels:
        inside_x, inside_y = (columns >= k.x0) & (columns < k.x1), (rows >= k.y0) & (rows < k.y1)
        here = np.flatnonzero(inside_x.any(axis=1) & inside_y.any(axis=1))
        own = inside_y[here][:, :, None] & inside_x[here][:, None, :]
        f_d[here] = np.where(own, np.float32(k.f_d), f_d[here])
    return f_d


def _in_file_units(trails: Sequence[Mapping[str, Any]], gain: float) -> list[dict[str, Any]]:
    return [{**trail, "brightness": trail["brightness"] / gain} for trail in trails]


def _catalogue(
    found: Candidates,
    new: Exposure,
    aligned: Aligned,
    psf: PsfLike,
    psf_ref: PsfLike,
    ratio: FluxRatio,
    image_id: str,
) -> dict[str, NDArray]:
    """Every column of `CATALOGUE`: what detection measured, in file units, with identity, place and magnitude."""
    columns = dict(found.columns)
    n = len(columns["x"])
    for name in ("flux", "flux_err", "aper_flux", "aper_flux_err"):
        columns[name] = columns[name] / new.gain
    columns["ref_flux"] = columns["ref_flux"] * ratio.value / new.gain
    x, y = columns["x"], columns["y"]
    columns["candidate_id"] = np.array(
        [candidate_id(image_id, *position) for position in zip(x, y, columns["scorr"], strict=True)], dtype=object
    )
    columns["ra"], columns["dec"] = aligned.sky_position(new.wcs, x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["mag"] = new.zero_point - 2.5 * np.log10(np.abs(columns["flux"]))
        columns["mag_err"] = 2.5 / np.log(10) * np.abs(columns["flux_err"] / columns["flux"])
        columns["ref_mag"] = new.zero_point - 2.5 * np.log10(columns["ref_flux"])
    columns["sigma_new"] = columns["sigma_new"] / new.gain
    columns["sigma_ref"] = columns["sigma_ref"] * ratio.value / new.gain
    columns["stamp_index"] = np.arange(n)
    constants = {
        "image_id": image_id,
        "mjd": new.meta.get("mjd", np.nan),
        "filter": new.meta.get("filter") or "",
        "survey": new.meta.get("survey") or "",
        "exposure_id": new.meta.get("exposure_id") or "",
        "ccd": new.meta.get("ccd") or "",
        "fwhm_new": psf.fwhm,
        "fwhm_ref": psf_ref.fwhm,
        "zero_point": new.zero_point,
    }
    for name, value in constants.items():
        columns[name] = np.full(n, value, dtype=object if isinstance(value, str) else np.float64)
    return {c.name: np.asarray(columns[c.name]).astype(object if c.dtype == "str" else c.dtype) for c in CATALOGUE}


def candidate_id(image_id: str, x: float, y: float, scorr: float) -> str:
    """A name made of image, sign and position (to 0.1 pixel), so that a rerun gives the same one."""
    return f"{image_id}_{'p' if scorr > 0 else 'n'}{max(x, 0):07.1f}_{max(y, 0):07.1f}"
