"""From samples to verdicts: one line a promise, with its goal, what was measured, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from batchproc.completeness.sample import Sample

__all__ = ["Bin", "Rate", "Summary", "Verdict", "false_alarm_rates", "poisson_binomial", "snr_bins", "summarise"]

#: Thresholds, in sigma, at which false alarms are counted (those not below what was detected).
ALARM_LEVELS = (4.0, 4.5, 5.0)

_BAND = 0.95
_SURE = 8.0  # S/N from which positions are held against their bound: below, selection shapes them


@dataclass(frozen=True)
class Verdict:
    """One promise.

    Attributes
    ----------
    promise, goal, measured : str
    ok : bool or None
        None where there is nothing to tell from.
    """

    promise: str
    goal: str
    measured: str
    ok: bool | None


@dataclass(frozen=True)
class Bin:
    """Sources of one range of S/N.

    Attributes
    ----------
    low, high : float
    n, found : int
    expected : float
        Mean number that is found where noise is Gaussian.
    band : (float, float)
        Fractions between which the found one lies with a probability of 95 % or a little more.
    pull_mean, pull_width : float
        Of forced fluxes, found or not.
    position_x, position_y : float
        Scatter of the positions of the found ones over their bound.
    """

    low: float
    high: float
    n: int
    found: int
    expected: float
    band: tuple[float, float]
    pull_mean: float
    pull_width: float
    position_x: float
    position_y: float

    @property
    def inside(self) -> bool:
        """Whether the found fraction lies in the band."""
        return self.band[0] <= self.found / self.n <= self.band[1]


@dataclass(frozen=True)
class Rate:
    """Unflagged false alarms of one sign above one threshold, and those of Gaussian fields of the same correlation."""

    threshold: float
    sign: int
    found: int
    mpix: float
    gaussian: int
    gaussian_mpix: float

    @property
    def per_mpix(self) -> float:
        """Measured."""
        return self.found / self.mpix if self.mpix else float("nan")

    @property
    def gaussian_per_mpix(self) -> float:
        """Expected."""
        return self.gaussian / self.gaussian_mpix if self.gaussian_mpix else float("nan")

    @property
    def ratio(self) -> float:
        """Measured over expected."""
        return self.per_mpix / self.gaussian_per_mpix if self.gaussian else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the ratio from both counts (Clopper–Pearson for the share of one in their sum)."""
        total, exposure = self.found + self.gaussian, self.gaussian_mpix / max(self.mpix, 1e-12)
        if total == 0:
            return 0.0, float("inf")
        low, high = stats.binomtest(self.found, total).proportion_ci(_BAND)
        return exposure * low / max(1 - low, 1e-12), exposure * high / (1 - high) if high < 1 else float("inf")


@dataclass(frozen=True)
class Summary:
    """All that a campaign found.

    Attributes
    ----------
    verdicts : tuple of Verdict
    bins : tuple of Bin
    rates : tuple of Rate
    skies : mapping of str to dict
        By sky level: images, rms and mean of S_corr on blank sky before renormalisation, standard error of the rms.
    places : mapping of str to dict
        By place of the sources: n, found, unflagged, expected, mean and width of their flux pulls.
    alarm_places : mapping of str to dict
        By what the reference has at the place: unflagged false alarms above the threshold, of both signs; flagged.
    facts : mapping
        images, mpix, sources, cpu_seconds_per_mpix …
    """

    verdicts: tuple[Verdict, ...]
    bins: tuple[Bin, ...]
    rates: tuple[Rate, ...]
    skies: dict[str, dict[str, float]]
    places: dict[str, dict[str, float]]
    alarm_places: dict[str, dict[str, int]]
    facts: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing that could be told was missed."""
        return all(verdict.ok is not False for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not a finite number is None."""
        rates = [{**asdict(r), "ratio": r.ratio, "interval": r.interval} for r in self.rates]
        document = {
            "ok": self.ok,
            "facts": self.facts,
            "verdicts": [asdict(v) for v in self.verdicts],
            "bins": [{**asdict(b), "inside": b.inside} for b in self.bins],
            "false_alarms": rates,
            "skies": self.skies,
            "places": self.places,
            "alarm_places": self.alarm_places,
        }
        plain: dict[str, Any] = finite(document)
        return plain


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def summarise(samples: Sequence[Sample], *, threshold: float, snr: tuple[float, float], lowest: float) -> Summary:
    """Verdicts, and the numbers behind them.

    Parameters
    ----------
    samples : sequence of Sample
    threshold : float
        From which sources count as found, sigma.
    snr : (float, float)
        Range of the bins; sources whose local S/N lies outside take no part.
    lowest : float
        Threshold that was detected with.
    """
    sources = np.concatenate([s.sources[s.sources["usable"]] for s in samples])
    sources = sources[(sources["snr"] >= snr[0]) & (sources["snr"] < snr[1])]
    bins = tuple(snr_bins(sources, snr))
    rates = tuple(false_alarm_rates(samples, [level for level in ALARM_LEVELS if level >= lowest]))
    skies = _by_sky(samples)
    return Summary(
        verdicts=(
            *_noise_verdicts(skies),
            *(_rate_verdict(rate) for rate in rates),
            _completeness_verdict(bins, sources, threshold),
            *_flux_verdicts(sources),
            *_position_verdicts(sources),
        ),
        bins=bins,
        rates=rates,
        skies=skies,
        places={str(place): _count(sources[sources["place"] == place]) for place in np.unique(sources["place"])},
        alarm_places=_alarm_places(samples, threshold),
        facts=_facts(samples, sources),
    )


def snr_bins(sources: NDArray[np.void], snr: tuple[float, float]) -> Iterator[Bin]:
    """Sources by unit steps of local S/N; empty bins are left out."""
    edges = np.append(np.arange(snr[0], snr[1], 1.0), snr[1])
    for low, high in pairwise(edges):
        rows = sources[(sources["snr"] >= low) & (sources["snr"] < high)]
        if len(rows) == 0:
            continue
        hit = np.isfinite(rows["scorr"])
        count = poisson_binomial(rows["expected"])
        tail = np.cumsum(count)
        outside = (1 - _BAND) / 2
        band = np.searchsorted(tail, [outside, 1 - outside]) / len(rows)
        yield Bin(
            low=float(low),
            high=float(high),
            n=len(rows),
            found=int(hit.sum()),
            expected=float(rows["expected"].sum()),
            band=(float(band[0]), float(band[1])),
            pull_mean=float(rows["pull"].mean()),
            pull_width=_width(rows["pull"]),
            position_x=_width(rows["dx"][hit] / rows["bound_x"][hit]),
            position_y=_width(rows["dy"][hit] / rows["bound_y"][hit]),
        )


def poisson_binomial(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distribution (n + 1,) of the number of successes of n trials of these probabilities, by convolution."""
    out = np.ones(1)
    for p in probabilities:
        out = np.convolve(out, [1 - p, p])
    return out


def false_alarm_rates(samples: Sequence[Sample], levels: Sequence[float]) -> Iterator[Rate]:
    """Both signs at each threshold, summed over the images; detections without flags, in both kinds of field."""
    alarms = np.concatenate([_unflagged(s.alarms) for s in samples])
    gaussian = np.concatenate([_unflagged(s.gaussian) for s in samples])
    # Images have other PSFs, hence other rates: each counts with the area that it was searched in.
    shares = [(len(_unflagged(s.gaussian)), s.mpix / max(s.gaussian_mpix, 1e-12)) for s in samples]
    weight = np.concatenate([np.full(n, share) for n, share in shares])
    mpix = sum(s.mpix for s in samples)
    gaussian_mpix = sum(s.gaussian_mpix for s in samples)
    for level in levels:
        for sign in (1, -1):
            above = sign * gaussian > level
            n = int(above.sum())
            expected = float(weight[above].sum())  # in the area that was searched
            yield Rate(
                threshold=level,
                sign=sign,
                found=int(np.count_nonzero(sign * alarms > level)),
                mpix=mpix,
                gaussian=n,
                gaussian_mpix=n * mpix / expected if expected else gaussian_mpix,
            )


def _unflagged(rows: NDArray[np.void]) -> NDArray[np.float64]:
    return rows["scorr"][rows["flags"] == 0]


def _by_sky(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Rms of S_corr on blank sky: the mean over images, each weighing with its number of independent areas."""
    out = {}
    for sky in dict.fromkeys(s.facts["sky"] for s in samples):
        rms, mean, weight = [], [], []
        for s in samples:
            if s.facts["sky"] == sky and s.facts["n_blank"]:
                rms.append(s.facts["rms"])
                mean.append(s.facts["mean"])
                weight.append(s.facts["n_blank"] / s.facts["fwhm"] ** 2)
        if rms:
            wide = float(np.sqrt(np.average(np.square(rms), weights=weight)))
            # The square of Gaussian noise is independent over some 2.3 FWHM² of P_D: 4 π σ², σ that of P_D.
            error = float(np.sqrt(0.5 * 4 * np.pi / 2.3548**2 / np.sum(weight)))
            out[sky] = {
                "images": len(rms),
                "rms": wide,
                "error": error,
                "mean": float(np.average(mean, weights=weight)),
            }
    return out


def _noise_verdicts(skies: dict[str, dict[str, float]]) -> Iterator[Verdict]:
    for sky, values in skies.items():
        yield Verdict(
            f"S_corr rms, blank sky of {sky}",
            "1.00 ± 0.01",
            f"{values['rms']:.4f} ± {values['error']:.4f}",
            abs(values["rms"] - 1) <= 0.01,
        )


def _rate_verdict(rate: Rate) -> Verdict:
    low, high = rate.interval
    within = 1 / 1.5 <= rate.ratio <= 1.5
    possible = low <= 1.5 and high >= 1 / 1.5  # or too few to be told from what is allowed
    # At the level that is promised, a count too small to tell is no verdict, neither way.
    promised = rate.threshold == ALARM_LEVELS[0]
    silent = not rate.mpix or (possible and (not rate.gaussian or (promised and not within)))
    sign = "positive" if rate.sign > 0 else "negative"
    return Verdict(
        f"false alarms at {rate.threshold:g} σ, {sign}",
        f"{rate.gaussian_per_mpix:.3g} /Mpix × 1.5 or / 1.5",
        f"{rate.per_mpix:.3g} /Mpix in {rate.mpix:.3g} Mpix: × {rate.ratio:.2f} ({low:.2f} to {high:.2f})",
        None if silent else within or (possible and not promised),
    )


def _completeness_verdict(bins: Sequence[Bin], sources: NDArray[np.void], threshold: float) -> Verdict:
    """Joint chi-square of all bins in which something could go either way."""
    square, freedom = 0.0, 0
    for b in bins:
        p = sources["expected"][(sources["snr"] >= b.low) & (sources["snr"] < b.high)]
        variance = float(np.sum(p * (1 - p)))
        if variance > 1.0:
            square += (b.found - b.expected) ** 2 / variance
            freedom += 1
    inside = sum(b.inside for b in bins)
    if not freedom:
        return Verdict(f"completeness at {threshold:g} σ", "joint 95 % band", "too few sources", None)
    limit = float(stats.chi2.ppf(_BAND, freedom))
    found, expected = sum(b.found for b in bins), sum(b.expected for b in bins)
    return Verdict(
        f"completeness at {threshold:g} σ",
        f"χ² ≤ {limit:.1f} for {freedom} bins (95 %)",
        f"χ² = {square:.1f}; {inside} of {len(bins)} bins in their band; {found} found, {expected:.1f} expected",
        square <= limit,
    )


def _flux_verdicts(sources: NDArray[np.void]) -> Iterator[Verdict]:
    pulls = sources["pull"]
    if len(pulls) < 20:
        yield Verdict("flux pulls at injected places, width", "1.00 ± 0.05", "too few sources", None)
        return
    width, error = float(np.std(pulls)), float(np.std(pulls) / np.sqrt(2 * len(pulls)))
    yield Verdict(
        "flux pulls at injected places, width",
        "1.00 ± 0.05",
        f"{width:.3f} ± {error:.3f} (robust {_width(pulls):.3f})",
        abs(width - 1) <= 0.05,
    )
    mean = float(np.mean(pulls * np.sign(sources["flux"])))
    error = width / np.sqrt(len(pulls))
    yield Verdict(
        "flux pulls at injected places, mean",
        "0.00 ± 0.10",
        f"{mean:+.3f} ± {error:.3f}",
        abs(mean) <= 0.1,
    )


def _position_verdicts(sources: NDArray[np.void]) -> Iterator[Verdict]:
    rows = sources[np.isfinite(sources["dx"]) & (sources["snr"] >= _SURE)]
    for axis in ("x", "y"):
        promise = f"positions, S/N ≥ {_SURE:g}, {axis}: scatter over the bound"
        if len(rows) < 20:
            yield Verdict(promise, "at most 1.10", "too few sources", None)
            continue
        scaled = rows[f"d{axis}"] / rows[f"bound_{axis}"]
        width = _width(scaled)
        error = width * np.sqrt(0.5 / len(rows)) * 1.3  # of percentiles
        offset = float(np.median(rows[f"d{axis}"]))
        yield Verdict(
            promise, "at most 1.10", f"{width:.3f} ± {error:.3f} (median offset {offset:+.4f} px)", width <= 1.1
        )


def _count(rows: NDArray[np.void]) -> dict[str, float]:
    hit = np.isfinite(rows["scorr"])
    return {
        "n": len(rows),
        "found": int(hit.sum()),
        "unflagged": int((hit & (rows["flags"] == 0)).sum()),
        "expected": float(rows["expected"].sum()),
        "pull_mean": float(np.mean(rows["pull"] * np.sign(rows["flux"]))) if len(rows) else float("nan"),
        "pull_width": _width(rows["pull"]),
    }


def _alarm_places(samples: Sequence[Sample], threshold: float) -> dict[str, dict[str, int]]:
    rows = np.concatenate([s.alarms for s in samples])
    rows = rows[np.abs(rows["scorr"]) > threshold]
    out = {}
    for place in np.unique(rows["place"]):
        here = rows[rows["place"] == place]
        clean = here["flags"] == 0
        positive = here["scorr"] > 0
        out[str(place)] = {
            "positive": int((clean & positive).sum()),
            "negative": int((clean & ~positive).sum()),
            "flagged": int((~clean).sum()),
        }
    return out


def _facts(samples: Sequence[Sample], sources: NDArray[np.void]) -> dict[str, Any]:
    searched, total = sum(s.mpix for s in samples), sum(s.facts["image_mpix"] for s in samples)
    return {
        "images": len(samples),
        "mpix": total,
        "mpix_searched": searched,
        "sources": int(sum(len(s.sources) for s in samples)),
        "sources_used": len(sources),
        "cpu_seconds_per_mpix": sum(s.facts["seconds"] for s in samples) / max(total, 1e-12),
    }


def _width(values: NDArray) -> float:
    """Half the distance of the 16th from the 84th percentile; NaN of fewer than 5."""
    if len(values) < 5:
        return float("nan")
    return float(np.diff(np.percentile(values, [15.865525, 84.134475]))[0] / 2)
