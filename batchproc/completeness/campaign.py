"""Images with sources put into them, and the whole flow run on each: one image, one task, one `Sample`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from batchproc.completeness.sample import TRUTH, Sample, image_facts, look_at_nothing, look_at_sources
from batchproc.config import Config
from batchproc.errors import UsageError
from batchproc.flow import subtract_exposures
from batchproc.imaging.align import align
from batchproc.imaging.simulate import Scene, SimulatedPair, simulate_pair

__all__ = ["LOWEST", "Campaign", "simulated_sample", "simulated_tasks"]

#: False alarms are counted from here on, sigma.
LOWEST = 4.0


@dataclass(frozen=True)
class Campaign:
    """What is to be measured.

    Attributes
    ----------
    images : int
        Simulated pairs.
    size : int
        Their side, pixels.
    snr : (float, float)
        Of the injected sources on blank sky; drawn uniformly in its logarithm.
    per_image : int
        Sources injected into each.
    seeing : (float, float)
        FWHM of the PSFs of new and of ref, each drawn uniformly in its logarithm, pixels. PSFs below 2 pixels are not
        sampled: see docs/completeness.md.
    threshold : float
        From which a source counts as found, sigma.
    skies : tuple of float
        Sky levels that the pairs take in turn, electrons a pixel and exposure.
    psf : {"known", "measured"}
        Whether the flow is told the PSFs or measures them from the stars.
    resampled : bool
        The reference has a grid of its own.
    seed : int
    config : Config
    """

    images: int = 50
    size: int = 1024
    snr: tuple[float, float] = (3.0, 15.0)
    per_image: int = 30
    seeing: tuple[float, float] = (2.0, 5.0)
    threshold: float = 5.0
    skies: tuple[float, ...] = (25.0, 100.0, 400.0, 2000.0, 10000.0)
    psf: str = "known"
    resampled: bool = False
    seed: int = 0
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        for name, (low, high) in (("snr", self.snr), ("seeing", self.seeing)):
            if not 0 < low < high < np.inf:
                raise UsageError(f"{name} = {low:g}:{high:g}: the lower end is positive and below the upper")
        if not 0 < self.threshold < np.inf:
            raise UsageError(f"threshold = {self.threshold:g}: a positive number of sigmas")
        if self.psf not in ("known", "measured"):
            raise UsageError(f"psf = {self.psf!r}: known or measured")
        if not self.skies or not all(0 < sky < np.inf for sky in self.skies):
            raise UsageError(f"sky = {self.skies}: levels in electrons, above 0")

    @property
    def lowest(self) -> float:
        """Threshold that the flow detects with."""
        return min(LOWEST, self.threshold)

    @property
    def flow_config(self) -> Config:
        """The settings with that threshold; 4 sigma finds many, and a stop would be no measurement."""
        return replace(
            self.config,
            detect=replace(self.config.detect, threshold=self.lowest, max_candidates=10**6),
        )


@dataclass(frozen=True)
class SimulatedTask:
    """One pair to be simulated."""

    index: int
    campaign: Campaign


def simulated_tasks(campaign: Campaign) -> Iterator[SimulatedTask]:
    """All pairs of a campaign."""
    return (SimulatedTask(index, campaign) for index in range(campaign.images))


def simulated_sample(task: SimulatedTask) -> Sample:
    """Simulate a pair, run the flow on it, compare with the truth."""
    campaign = task.campaign
    rng = np.random.default_rng([campaign.seed, task.index])
    pair = simulated_pair(campaign, campaign.skies[task.index % len(campaign.skies)], rng)
    new, ref = pair.exposures(known_psf=campaign.psf == "known")
    start = time.process_time()
    config = campaign.flow_config
    name = f"sim{task.index:04d}"
    result = subtract_exposures(new, align(new, [ref], config.align), config, image_id=name)
    seconds = time.process_time() - start
    truth = np.zeros(len(pair.truth), TRUTH)
    for key in ("x", "y", "flux"):
        truth[key] = pair.truth[key]
    truth["snr"], truth["place"] = pair.truth["snr_local"], _places(pair)
    alarms, mpix, gaussian = look_at_nothing(result, truth["x"], truth["y"], lowest=campaign.lowest, rng=rng)
    return Sample(
        name=name,
        sources=look_at_sources(result, truth, threshold=campaign.threshold, rng=rng, gain=new.gain),
        alarms=alarms,
        mpix=mpix,
        gaussian=gaussian,
        gaussian_mpix=campaign.size**2 / 1e6,
        facts={
            "sky": f"{pair.scene.sky_new:g} e-",
            "seconds": seconds,
            "true_flux_ratio": pair.flux_ratio,
            **image_facts(result, _blank(pair)),
        },
    )


def simulated_pair(campaign: Campaign, sky: float, rng: np.random.Generator) -> SimulatedPair:
    """A pair of any seeing and flux ratio; its transients have the campaign's S/N."""
    fwhm_new, fwhm_ref = np.exp(rng.uniform(np.log(campaign.seeing[0]), np.log(campaign.seeing[1]), 2))
    to_ref = None
    if campaign.resampled:
        angle, shift = np.radians(rng.uniform(-0.3, 0.3)), rng.uniform(-5, 5, 2)
        cos, sin, middle = np.cos(angle), np.sin(angle), campaign.size / 2

        def to_ref(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
            u, v = x - middle, y - middle
            return cos * u - sin * v + middle + shift[0], sin * u + cos * v + middle + shift[1]

    faintest = 20 * float(np.sqrt(sky + Scene.read_noise**2))  # bright skies show as many stars as dark ones
    return simulate_pair(
        (campaign.size, campaign.size),
        rng,
        to_ref=to_ref,
        star_flux=(faintest, 5e6),
        sky_new=sky,
        sky_ref=sky,
        fwhm_new=float(fwhm_new),
        fwhm_ref=float(fwhm_ref),
        flux_ratio=float(np.exp(rng.uniform(np.log(0.6), np.log(1.6)))),
        n_transients=campaign.per_image,
        transient_snr=campaign.snr,
    )


def _blank(pair: SimulatedPair) -> NDArray[np.bool_]:
    """Pixels without light to speak of: no more than 2 % of the sky's variance, and no transient within 4 FWHM."""
    blank = (pair.variance_new < 1.02 * pair.sigma_new**2) & ~pair.mask
    if pair.variance_ref.shape == blank.shape:
        blank &= pair.variance_ref < 1.02 * pair.sigma_ref**2
    reach = int(np.ceil(4 * max(pair.scene.fwhm_new, pair.scene.fwhm_ref)))
    for x, y in zip(np.rint(pair.truth["x"]).astype(int), np.rint(pair.truth["y"]).astype(int), strict=True):
        blank[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = False
    edge = reach + 2
    blank[:edge], blank[-edge:], blank[:, :edge], blank[:, -edge:] = False, False, False, False
    return blank


def _places(pair: SimulatedPair) -> NDArray:
    """Where each transient lies: on blank sky, on a source, or on the star that varies."""
    noise = np.where(pair.truth["snr_local"] > 0.97 * pair.truth["snr"], "blank sky", "on a source")
    return np.where(pair.truth["kind"] == "variable", "variable", noise)
