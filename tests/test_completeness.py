"""`evaluate completeness`: its verdicts can fail, its numbers are right, and in simulation theory and product agree."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from batchproc import cli
from batchproc.completeness.campaign import Campaign, simulated_sample, simulated_tasks
from batchproc.completeness.evaluate import evaluate, plan
from batchproc.completeness.real import RealTask, real_sample
from batchproc.completeness.sample import ALARM, SOURCE, Sample, forced_flux
from batchproc.completeness.verdicts import Rate, _rate_verdict, poisson_binomial, summarise
from batchproc.config import DetectConfig
from batchproc.distribute.executors import WorkerDiedError
from batchproc.errors import PsfError, UsageError
from batchproc.imaging.detect import detect
from batchproc.imaging.render import add_sources, gaussian_psf
from batchproc.imaging.theory import gaussian_difference
from batchproc.imaging.zogy import zogy
from batchproc.io.manifest import read_manifest
from batchproc.io.night import simulate_night

SMALL = Campaign(images=5, size=512, per_image=20, seed=3)


# --- verdicts, on made-up samples whose truth is known


def made_up(
    rng,
    *,
    n=2000,
    lost=0.0,
    pull_width=1.0,
    position_width=1.0,
    alarm_factor=1.0,
    rms=1.0,
    mpix=60.0,
    gaussian_rate=8.0,
):
    """A sample that agrees with theory but for what is asked."""
    sources = np.zeros(n, SOURCE)
    sources["snr"] = rng.uniform(3, 15, n)
    sources["flux"], sources["usable"], sources["place"] = 100.0, True, "blank sky"
    sources["expected"] = 1 / (1 + np.exp(-2.0 * (sources["snr"] - 5)))
    found = (rng.uniform(size=n) < sources["expected"]) & (rng.uniform(size=n) >= lost)
    sources["scorr"] = np.where(found, sources["snr"], np.nan)
    sources["pull"] = rng.normal(0, pull_width, n)
    for axis in "xy":
        sources[f"bound_{axis}"] = 2 / sources["snr"]
        noise = rng.normal(0, position_width, n) * sources[f"bound_{axis}"]
        sources[f"d{axis}"] = np.where(found, noise, np.nan)

    def alarms(n):
        rows = np.zeros(n, ALARM)
        rows["scorr"] = (4 + rng.exponential(0.2, n)) * rng.choice([-1, 1], n)
        return rows

    facts = {
        "sky": "400 e-",
        "rms": rms,
        "mean": 0.0,
        "n_blank": mpix * 1e6,
        "fwhm": 3.0,
        "seconds": 1.0,
        "image_mpix": mpix,
    }
    n_gaussian = rng.poisson(2 * gaussian_rate * mpix)
    n_alarms = rng.poisson(2 * gaussian_rate * mpix * alarm_factor)
    return Sample("one", sources, alarms(n_alarms), mpix, alarms(n_gaussian), mpix, facts)


def missed(sample):
    summary = summarise([sample], threshold=5.0, snr=(3.0, 15.0), lowest=4.0)
    return {verdict.promise.split(",")[0] for verdict in summary.verdicts if verdict.ok is False}


def test_what_agrees_with_theory_is_ok():
    """Nothing is missed, and nothing is left without a verdict."""
    sample = made_up(np.random.default_rng(0))
    assert missed(sample) == set()
    assert summarise([sample], threshold=5.0, snr=(3.0, 15.0), lowest=4.0).ok


@pytest.mark.parametrize(
    ("departure", "promise"),
    [
        ({"lost": 0.06}, "completeness at 5 σ"),
        ({"pull_width": 1.12}, "flux pulls at injected places"),
        ({"position_width": 1.3}, "positions"),
        ({"alarm_factor": 2.0}, "false alarms at 4 σ"),
        ({"alarm_factor": 0.5}, "false alarms at 4 σ"),
        ({"rms": 1.015}, "S_corr rms"),
    ],
)
def test_each_departure_is_noticed(departure, promise):
    """A few per cent of lost sources, wide pulls, bad positions, twice or half the false alarms, wide noise."""
    assert promise in missed(made_up(np.random.default_rng(0), **departure))


def test_too_little_to_tell_is_no_verdict():
    """Three sources and a thousandth of a Mpix neither keep nor break a promise about sources."""
    sample = made_up(np.random.default_rng(0), n=3, mpix=1e-3)
    verdicts = summarise([sample], threshold=5.0, snr=(3.0, 15.0), lowest=4.0).verdicts
    assert all(v.ok is None for v in verdicts if not v.promise.startswith("S_corr"))


def test_false_alarms_where_gaussian_fields_have_none_are_a_miss():
    """None expected: one may be chance, thirty are not, and in no area at all nothing is told."""
    for found, mpix, ok in ((1, 10.0, None), (30, 10.0, False), (0, 0.0, None)):
        assert _rate_verdict(Rate(4.0, 1, found, mpix, gaussian=0, gaussian_mpix=10.0)).ok is ok


def test_flagged_detections_and_unusable_sources_do_not_count():
    """What the flags speak against is no false alarm; a source under a mask is not lost."""
    sample = made_up(np.random.default_rng(0))
    strange = sample.alarms.copy()
    strange["flags"] = 4
    hidden = sample.sources[:500].copy()
    hidden["scorr"], hidden["usable"] = np.nan, False
    changed = replace(
        sample,
        alarms=np.concatenate([sample.alarms, strange]),
        sources=np.concatenate([sample.sources, hidden]),
    )
    assert missed(changed) == set()


def test_bands_are_those_of_the_binomial_where_all_are_alike():
    """The distribution of found sources, of equal and of different probabilities."""
    np.testing.assert_allclose(poisson_binomial(np.full(30, 0.3)), binom.pmf(np.arange(31), 30, 0.3), atol=1e-14)
    p = np.array([0.1, 0.5, 0.95])
    count = poisson_binomial(p)
    assert count.sum() == pytest.approx(1)
    assert count @ np.arange(4) == pytest.approx(p.sum())


def test_images_count_with_the_area_that_was_searched():
    """An image half of which is masked expects half of the false alarms of its Gaussian field."""
    one = made_up(np.random.default_rng(0))
    half = replace(one, alarms=one.alarms[::2], mpix=one.mpix / 2)
    assert missed(half) == set()
    rate = summarise([half], threshold=5.0, snr=(3.0, 15.0), lowest=4.0).rates[0]
    assert rate.gaussian_per_mpix == pytest.approx(rate.gaussian / one.mpix)


# --- measurements


def test_forced_flux_between_the_pixels():
    """α at the very place of a source is its flux, wherever in the pixel; NaN where there is no data."""
    psf_new, psf_ref = gaussian_psf(3.4), gaussian_psf(2.6)
    x, y = np.array([40.3, 90.5, 41.0]), np.array([40.2, 60.5, 99.9])
    new = add_sources(np.zeros((140, 140)), x, y, [900.0, 500.0, -700.0], psf_new)
    d = zogy(new, np.zeros_like(new), psf_new, psf_ref, sigma_new=20, sigma_ref=9, flux_ratio=1.3)
    flux, error = forced_flux(d, x, y)
    np.testing.assert_allclose(flux, [900.0, 500.0, -700.0], rtol=2e-3)
    assert np.isfinite(error).all()
    assert np.isnan(forced_flux(d, [1.0], [70.0])[0])


def test_a_detection_at_5_sigma_is_one_at_4_that_is_above_5():
    """So that one pass serves all thresholds."""
    psf = gaussian_psf(3.0)
    pair = np.zeros((256, 256))
    k = zogy(pair, pair, psf, psf, sigma_new=1, sigma_ref=1).kernels[0]
    noise = gaussian_difference(k, (1024, 1024), 5)
    low, high = (detect(noise, config=DetectConfig(threshold=t)) for t in (3.5, 4.5))
    above = np.abs(low["scorr"]) > 4.5
    assert len(high) > 1
    np.testing.assert_allclose(np.sort(low["x"][above]), np.sort(high["x"]), atol=1e-6)


def test_a_small_campaign(tmp_path):
    """Five pairs: noise, pulls and completeness as promised within what so few can tell; files that can be read."""
    found = evaluate(SMALL, tmp_path / "out", cluster="serial", quiet=True)
    summary = found.summary
    assert found.failures == ()
    assert all(values["rms"] == pytest.approx(1, abs=0.03) for values in summary.skies.values())
    assert list(summary.skies) == ["25 e-", "100 e-", "400 e-", "2000 e-", "10000 e-"]
    n = sum(b.n for b in summary.bins)
    expected, spread = (
        sum(b.expected for b in summary.bins),
        np.sqrt(sum(b.expected * (1 - b.expected / b.n) for b in summary.bins)),
    )
    assert n > 80
    assert sum(b.found for b in summary.bins) == pytest.approx(expected, abs=4 * spread)
    sources = pd.read_parquet(tmp_path / "out" / "sources.parquet")
    assert len(sources) == 100
    assert sources["pull"].std() == pytest.approx(1, abs=4 / np.sqrt(200))
    alarms = pd.read_parquet(tmp_path / "out" / "false_alarms.parquet")
    assert set(alarms["gaussian"]) == {True, False}
    document = json.loads((tmp_path / "out" / "completeness.json").read_text(), parse_constant=pytest.fail)
    assert len(document["images"]) == 5
    assert (tmp_path / "out" / "completeness.png").read_bytes().startswith(b"\x89PNG")
    assert all(verdict.promise in found.text() for verdict in summary.verdicts)


def test_an_image_does_not_depend_on_the_others():
    """Same task, same sample, whatever ran before it: so the results are the same on any number of workers."""
    task = list(simulated_tasks(replace(SMALL, size=256, per_image=8)))[2]
    one, other = simulated_sample(task), simulated_sample(task)
    for name in ("sources", "alarms", "gaussian"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def test_real_images(tmp_path):
    """From a manifest: sources go on blank sky, on galaxies and near stars, seen through the image's own stars."""
    manifest = simulate_night(tmp_path, n_images=1, size=512, seed=1)
    entry = read_manifest(manifest)[0]
    sample = real_sample(RealTask(0, entry, Campaign(per_image=30, snr=(8.0, 30.0))))
    rows = sample.sources[sample.sources["usable"]]
    assert set(rows["place"]) == {"blank sky", "on a galaxy", "near a star"}
    blank = rows[rows["place"] == "blank sky"]
    assert np.isfinite(blank["scorr"]).mean() > 0.9
    assert np.median(blank["ratio"][np.isfinite(blank["ratio"])]) == pytest.approx(1, abs=0.1)
    assert np.median(np.abs(blank["pull"])) < 1.5
    assert 0.05 < sample.mpix < 0.27


# --- command line


def call(*words):
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(word) for word in words])
    return exit_.value.code


def test_dry_run_computes_nothing(tmp_path, capsys):
    """Pairs, Mpix, sources and time; no folder."""
    out = tmp_path / "out"
    assert call("evaluate", "completeness", "--images", 7, "--size", 512, "--dry-run", "--out", out) == 0
    text = capsys.readouterr().out
    assert "7 pairs, 1.84 Mpix, 210 sources" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--snr", "3"), "two numbers as in 3:15"),
        (("--snr", "9:3"), "the lower end"),
        (("--sky", "dark"), "numbers as in"),
        (("--sky", "-5,3"), "above 0"),
        (("--sky", "nan"), "above 0"),
        (("--snr", "3:inf"), "the lower end"),
        (("--threshold", "nan"), "threshold"),
        (("--manifest", "night.csv", "--sky", "100", "--resampled"), "--sky, --resampled: of simulated pairs"),
        (("--manifest", "absent.csv"), "absent.csv"),
    ],
)
def test_usage_errors_are_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    """Said in a line, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    assert call("evaluate", "completeness", "--out", "out", *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--check",), 1)])
def test_only_check_makes_a_miss_an_exit_code(words, code, tmp_path, monkeypatch, capsys):
    """The verdicts are printed either way, for people or as JSON."""
    from batchproc.completeness import evaluate as module

    sample = made_up(np.random.default_rng(0), lost=0.5)
    monkeypatch.setattr(module, "simulated_sample", lambda task: sample)
    common = ("evaluate", "completeness", "--images", 1, "--cluster", "serial", "-q", "--out", tmp_path / "out")
    assert call(*common, *words) == code
    assert "MISSED" in capsys.readouterr().out
    assert call(*common, "--json", *words) == code
    assert json.loads(capsys.readouterr().out)["ok"] is False


def failing(error):
    """In place of a sample."""

    def sample(task):
        if task.index == 0:
            raise error
        return made_up(np.random.default_rng(2))

    return sample


def test_images_that_fail_are_told_and_fail_the_check(tmp_path, monkeypatch, capsys):
    """One that cannot be processed, or that killed its worker, costs the others nothing; a check does not pass."""
    from batchproc.completeness import evaluate as module

    common = ("evaluate", "completeness", "--images", 2, "--cluster", "serial", "-q", "--out", tmp_path / "out")
    for error in (PsfError("too few stars"), WorkerDiedError("the worker died")):
        monkeypatch.setattr(module, "simulated_sample", failing(error))
        assert call(*common, "--check") == 1
        text = capsys.readouterr().out
        assert f"{error}" in text.split("failed: ")[1]
        assert "MISSED" not in text
        assert call(*common) == 0
        capsys.readouterr()


def test_an_interrupt_says_that_nothing_is_kept(tmp_path, monkeypatch, capsys):
    """An evaluation does not resume, and says so."""
    from batchproc.completeness import evaluate as module

    monkeypatch.setattr(module, "simulated_sample", failing(KeyboardInterrupt()))
    common = ("evaluate", "completeness", "--images", 2, "--cluster", "serial", "-q", "--out", tmp_path / "out")
    assert call(*common) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_known_before_the_work(tmp_path, monkeypatch):
    """Nothing is computed for a place that cannot hold it."""
    from batchproc.completeness import evaluate as module

    monkeypatch.setattr(module, "simulated_sample", lambda task: pytest.fail("computed"))
    (tmp_path / "file").touch()
    assert call("evaluate", "completeness", "--cluster", "serial", "-q", "--out", tmp_path / "file") == 3


def test_a_campaign_that_cannot_be_is_refused():
    """With what is wrong in it."""
    for wrong in ({"snr": (5.0, 5.0)}, {"psf": "guessed"}, {"skies": ()}, {"seeing": (0.0, 3.0)}):
        with pytest.raises(UsageError):
            Campaign(**wrong)
    assert plan(SMALL).sources == 100


# --- the promises themselves


@pytest.mark.slow
@pytest.mark.parametrize("psf", ["known", "measured"])
def test_simulation_agrees_with_theory(psf, tmp_path):
    """Over 50 Mpix of skies from 25 to 10,000 electrons: every verdict."""
    found = evaluate(Campaign(images=52, psf=psf, seed=2), tmp_path, cluster="serial", quiet=True)
    print(found.text())
    assert found.failures == ()
    assert found.summary.facts["mpix_searched"] >= 50
    missed = [verdict for verdict in found.summary.verdicts if not verdict.ok]
    assert missed == []
