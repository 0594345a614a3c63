"""The README's figures, measured: ``python -m tests.benchmarks.promises known-psf | measured-psf | goto``.

Each command prints a table and returns its numbers; `tests/test_promises.py` holds them against their bounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import sep
from scipy.spatial import cKDTree

from batchproc import simulate
from batchproc.config import Config
from batchproc.imaging.detect import detect
from batchproc.imaging.subtract import subtract
from batchproc.records import ManifestEntry

MATCH_RADIUS = 3.0  # pixels


def match(x, y, x_true, y_true):
    """Index of the nearest detection to each true position, and which detections belong to none."""
    if len(x) == 0:
        return np.full(len(x_true), -1), np.zeros(0, bool)
    distance, index = cKDTree(np.c_[x, y]).query(np.c_[x_true, y_true])
    index = np.where(distance <= MATCH_RADIUS, index, -1)
    if len(x_true) == 0:
        return index, np.ones(len(x), bool)
    nearest, _ = cKDTree(np.c_[x_true, y_true]).query(np.c_[x, y])
    return index, nearest > MATCH_RADIUS


def plane(shape, value):
    return np.full(shape, value, np.float32)


def known_psf(n_images=49, shape=(1024, 1024), n_noise=24):
    """ZOGY and detection where PSFs, noise and flux ratio are known: nothing but the algebra."""
    psf_pulls, flux_ratio, widths, offsets, bounds, found, expected = [], [], [], [], [], 0, 0
    n_false = n_pixels = 0
    for seed in range(n_images):
        pair = simulate.simulate_pair(shape, seed=seed, fwhm_new=3.4, fwhm_ref=2.6)
        d = _subtract_known(pair)
        candidates = detect(d.difference, config=Config().detect).columns
        widths.append(d.renormalisation)
        truth = pair.truth[~_near_mask(pair.mask, pair.truth)]
        index, spurious = match(candidates["x"], candidates["y"], truth["x"], truth["y"])
        bright = truth["snr_local"] >= 8
        expected += int(bright.sum())
        found += int((index[bright] >= 0).sum())
        use = bright & (index >= 0)
        i = index[use]
        flux_ratio.append(candidates["flux"][i] / truth["flux"][use])
        psf_pulls.append((candidates["flux"][i] - truth["flux"][use]) / candidates["flux_err"][i])
        offsets.append(np.c_[candidates["x"][i] - truth["x"][use], candidates["y"][i] - truth["y"][use]])
        k = d.difference.kernels_at(shape[1] / 2, shape[0] / 2)
        bounds.append(np.sqrt(2) * _gaussian_sigma(k.psf) / np.abs(truth["snr_local"][use]))
        clean = candidates["flags"] == 0
        n_false += int((spurious & clean & ~_near_mask_xy(pair.mask, candidates["x"], candidates["y"])).sum())
        n_pixels += int((~pair.mask).sum())
    offsets, bounds = np.concatenate(offsets), np.concatenate(bounds)
    scaled = offsets / bounds[:, None]
    noise_rate = noise_false_alarms(n_noise, shape)
    return {
        "Mpix": n_pixels / 1e6,
        "S_corr width before renormalisation": float(np.mean(widths)),
        "S_corr width, largest departure": float(np.max(np.abs(np.array(widths) - 1))),
        "median flux / true": float(np.median(np.concatenate(flux_ratio))),
        "flux pull width": float(_robust(np.concatenate(psf_pulls))),
        "mean offset x (px)": float(np.median(offsets[:, 0])),
        "mean offset y (px)": float(np.median(offsets[:, 1])),
        "scatter / bound": float(_robust(scaled.ravel())),
        "expected S/N >= 8": expected,
        "found": found,
        "completeness": found / expected,
        "false per Mpix": n_false / (n_pixels / 1e6),
        "false per Mpix, pure noise": noise_rate,
    }


def noise_false_alarms(n_images, shape=(1024, 1024), threshold=5.0):
    """Detections per Mpix, both signs, in subtractions of pure Gaussian noise of the same correlation."""
    counts = 0
    base = simulate.simulate_pair((64, 64), seed=0, n_transients=0)
    config = replace(Config().detect, threshold=threshold)
    for seed in range(n_images):
        rng = np.random.default_rng([seed, 77])
        new = rng.normal(0, base.sigma_new, shape).astype(np.float32)
        ref = rng.normal(0, base.sigma_ref, shape).astype(np.float32)
        d = subtract(
            new,
            ref,
            base.psf_new,
            base.psf_ref,
            rms_new=plane(shape, base.sigma_new),
            rms_ref=plane(shape, base.sigma_ref),
            flux_ratio=base.flux_ratio,
            star_residuals=False,
        )
        found = detect(d.difference, config=config)
        counts += len(found.columns["x"])
    return counts / (n_images * shape[0] * shape[1] / 1e6)


def measured_psf(n_images=13, shape=(2048, 2048)):
    """The same where everything is measured from the images."""
    from batchproc.flow import subtract_exposures
    from batchproc.imaging.align import align

    ratios, found, expected, n_false, n_pixels, widths = [], 0, 0, 0, 0, []
    for seed in range(n_images):
        pair = simulate.simulate_pair(shape, seed=1000 + seed, n_transients=100, psf_variation=0.03)
        new, ref = pair.exposures()
        config = Config()
        result = subtract_exposures(new, align(new, [ref], config.align), config, image_id=f"sim{seed}")
        candidates = result.catalogue
        widths.append(result.receipt.quality["renormalisation"])
        truth = pair.truth[~_near_mask(pair.mask, pair.truth)]
        index, spurious = match(candidates["x"], candidates["y"], truth["x"], truth["y"])
        bright = truth["snr_local"] >= 8
        expected += int(bright.sum())
        found += int((index[bright] >= 0).sum())
        use = bright & (index >= 0)
        ratios.append(candidates["flux"][index[use]] / truth["flux"][use])
        n_false += int((spurious & (candidates["flags"] == 0)).sum())
        n_pixels += int((~pair.mask).sum())
    return {
        "Mpix": n_pixels / 1e6,
        "renormalisation": float(np.mean(widths)),
        "median flux / true": float(np.median(np.concatenate(ratios))),
        "expected S/N >= 8": expected,
        "found": found,
        "completeness": found / expected,
        "false per Mpix": n_false / (n_pixels / 1e6),
    }


def goto(seeds=(1, 2, 3), n_injected=60):
    """The GOTO pair: epoch 1 as reference, injections of a PSF that the pipeline is not told.

    Epoch 2 holds, before anything is injected, point sources that epoch 1 lacks (`sources_in_one_only`). They are
    counted apart: "false" is everything unflagged away from injections, "false, unexplained" what remains without
    those.
    """
    from batchproc.flow import process_image

    if "BATCHPROC_TEST_DATA" not in os.environ:
        raise SystemExit("set BATCHPROC_TEST_DATA to the folder that holds images/goto (epoch1.fits, epoch2.fits)")
    folder = Path(os.environ["BATCHPROC_TEST_DATA"]) / "images" / "goto"
    from astropy.io import fits

    header, original = fits.getheader(folder / "epoch2.fits"), fits.getdata(folder / "epoch2.fits").astype(np.float32)
    entry = ManifestEntry(image_id="goto", new=str(folder / "epoch2.fits"), ref=(str(folder / "epoch1.fits"),))
    first = process_image(entry)
    f_s = first.receipt.quality["f_s"]
    psf = independent_psf(original)
    epochs = original, fits.getdata(folder / "epoch1.fits").astype(np.float32)
    extra, control = sources_in_one_only(*epochs), sources_in_one_only(*epochs[::-1])
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            snr = np.exp(rng.uniform(np.log(7), np.log(50), n_injected))
            x, y = simulate.choose_positions(
                original.shape, n_injected, rng, margin=40, min_separation=30, mask=first.difference.mask
            )
            image = simulate.inject(original, psf, x, y, snr / np.sqrt(f_s), gain=1.0, rng=rng)
            path = Path(scratch) / f"new{seed}.fits"
            fits.writeto(path, image, header)
            result = process_image(replace(entry, new=str(path)))
            c = result.catalogue
            index, spurious = match(c["x"], c["y"], x, y)
            clean = c["flags"] == 0
            unexplained = spurious & clean
            if len(extra):
                distance, _ = cKDTree(extra).query(np.c_[c["x"], c["y"]])
                unexplained &= distance > MATCH_RADIUS
            rows.append(
                {
                    "seed": seed,
                    "found": int((index >= 0).sum()),
                    "found unflagged": int((clean[index] & (index >= 0)).sum()),
                    "false": int((spurious & clean).sum()),
                    "false, unexplained": int(unexplained.sum()),
                    "masked %": 100 * float(np.mean(result.difference.mask != 0)),
                    "renormalisation": result.receipt.quality["renormalisation"],
                    "flux / true": float(np.median(c["flux"][index[index >= 0]] / (snr / np.sqrt(f_s))[index >= 0])),
                }
            )
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "seed"}
    return {
        "rows": rows,
        "sources in epoch 2 alone": len(extra),
        "sources in epoch 1 alone": len(control),
        **mean,
    }


def independent_psf(image, half=20):
    """One PSF for the whole image, by plain tools: the median of its bright isolated stars, shifted by splines.

    It shares no code and no choice of stars with the pipeline, does not vary across the image, and is what is injected.
    """
    from scipy.ndimage import shift

    sky = sep.Background(image)
    data = image - sky.back()
    o = sep.extract(data, 5, err=sky.globalrms)
    gap, _ = cKDTree(np.c_[o["x"], o["y"]]).query(np.c_[o["x"], o["y"]], k=2)
    margin = half + 5
    good = (o["peak"] > 1500) & (o["peak"] < 20000) & (gap[:, 1] > half) & (o["flag"] == 0)
    for name, length in (("x", image.shape[1]), ("y", image.shape[0])):
        good &= (o[name] > margin) & (o[name] < length - margin)
    o = o[good]
    o = o[np.abs(o["a"] - np.median(o["a"])) < 0.4]
    x, y, _ = sep.winpos(data, o["x"], o["y"], np.full(len(o), 1.5))
    stamps = []
    for x0, y0 in zip(x, y, strict=True):
        column, row = round(x0), round(y0)
        stamp = data[row - margin : row + margin + 1, column - margin : column + margin + 1].astype(np.float64)
        stamp = shift(stamp, (row - y0, column - x0), order=5)[5:-5, 5:-5]
        stamps.append(stamp / stamp[half - 8 : half + 9, half - 8 : half + 9].sum())
    psf = np.clip(np.median(stamps, axis=0), 0, None)
    return psf / psf.sum()


def sources_in_one_only(new, ref, threshold=3.5, radius=2.0):
    """Positions (x, y) of point sources in new that ref does not have, from plain source lists of the two files.

    No subtraction and no registration: each image has its large-scale light (sky, galaxies) removed by a 15-pixel
    median. A source that SEP finds in new is missing from ref where ref has less than half its light in an aperture,
    and the loss of light is itself significant at `threshold` sigma. With the images exchanged it tells how many such
    sources noise and galaxies make: as many as that must not be called explained.
    """
    from scipy.ndimage import median_filter

    flat = [np.ascontiguousarray(image - median_filter(image, 15)) for image in (new, ref)]
    rms = [1.4826 * float(np.median(np.abs(image - np.median(image)))) for image in flat]
    o = sep.extract(flat[0], 1.5, err=rms[0], minarea=5)
    inside = (o["x"] > 5) & (o["y"] > 5) & (o["x"] < new.shape[1] - 6) & (o["y"] < new.shape[0] - 6)
    o = o[inside]
    light = [sep.sum_circle(image, o["x"], o["y"], radius)[0] for image in flat]
    absent = light[1] < 0.5 * light[0]
    significant = light[0] - light[1] > threshold * np.sqrt(np.pi) * radius * np.hypot(*rms)
    return np.c_[o["x"], o["y"]][absent & significant]


def _subtract_known(pair):
    return subtract(
        pair.new,
        pair.ref,
        pair.psf_new,
        pair.psf_ref,
        rms_new=plane(pair.new.shape, pair.sigma_new),
        rms_ref=plane(pair.new.shape, pair.sigma_ref),
        flux_ratio=pair.flux_ratio,
        variance_new=pair.variance_new,
        variance_ref=pair.variance_ref,
        mask_new=pair.mask_new,
        mask_ref=pair.mask_ref,
        renormalise=False,
        star_residuals=False,
    )


def _near_mask(mask, truth, radius=10):
    return _near_mask_xy(mask, truth["x"], truth["y"], radius)


def _near_mask_xy(mask, x, y, radius=10):
    """True for positions within `radius` of a masked pixel or of the edge."""
    from scipy.ndimage import distance_transform_edt

    padded = np.pad(mask, 1, constant_values=True)
    distance = distance_transform_edt(~padded)[1:-1, 1:-1]
    column = np.clip(np.rint(x).astype(int), 0, mask.shape[1] - 1)
    row = np.clip(np.rint(y).astype(int), 0, mask.shape[0] - 1)
    return distance[row, column] <= radius


def _robust(values):
    return float(np.diff(np.percentile(values, [15.865525, 84.134475]))[0] / 2)


def _gaussian_sigma(psf):
    """σ of the Gaussian whose FWHM is that of the stamp's core (noise-equivalent area: Σp² = 1 / 4πσ²)."""
    return float(1 / np.sqrt(4 * np.pi * np.sum(psf**2)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["known-psf", "measured-psf", "goto"])
    parser.add_argument("--images", type=int, help="fewer images, for a quick look")
    options = parser.parse_args(arguments)
    keywords = {"n_images": options.images} if options.images else {}
    measure = {"known-psf": known_psf, "measured-psf": measured_psf, "goto": goto}[options.what]
    for key, value in measure(**keywords).items():
        if key == "rows":
            for row in value:
                print("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
        else:
            print(f"{key:42s} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
