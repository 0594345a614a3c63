"""Make the bundled real/bogus model: ``python -m batchproc.training.realbogus --data DATA --out FOLDER``.

1. Stamps: the pipeline itself runs on simulated nights and on science images made from a real coadd, with a low
   threshold; what it finds is labelled by what was planted (`cases`, `harvest`).
2. A small network is fitted to them (`network`, `fit`), stopped by nights and regions that it does not learn from.
3. It is written as ONNX in float and in int8, measured on images that neither step has seen (`report`), and the faster
   of the two, if as accurate, becomes the default. All of that goes on the card.

``DATA`` holds ``images/decam_coadd`` (learnt from, by regions) and, if there, ``images/goto`` and
``alerts/ztf_triplets.npz``, which are only ever tested on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchproc import __version__
from batchproc.io.cards import CARD, InputCard, ModelCard, read_card
from batchproc.io.images import read_image
from batchproc.io.models import Model, file_hash, load_model
from batchproc.io.quantise import quantise_model
from batchproc.learning.evaluate import threshold_for_completeness
from batchproc.training.cases import Case, coadd_cases, pair_cases, simulated_cases
from batchproc.training.fit import FitConfig, History, Labelled, export_onnx, fit
from batchproc.training.harvest import Harvest, harvest
from batchproc.training.network import SIZE, RealBogusNet
from batchproc.training.report import measure, stamps_per_second

VERSION = "1.0"
THRESHOLD_SIGMA = 3.75  # of the search that stamps are taken from
INPUT = InputCard(size=SIZE, normalisation="noise-log")

#: Part → seeds of simulated nights, and of rounds over the coadd's regions of that part.
NIGHTS = {"train": range(1000, 1240), "valid": range(2000, 2012), "test": range(3000, 3012)}
ROUNDS = {"train": range(100, 116), "valid": range(200, 206), "test": range(300, 305)}
GOTO_SEEDS = range(6)


# --- Stamps -----------------------------------------------------------------------------------------------------------


def harvest_all(data: Path, cache: Path) -> dict[str, Harvest]:
    """Every part's stamps, from the cache where they are there already."""
    cache.mkdir(parents=True, exist_ok=True)
    return {name: _cached(cache / f"{name}.npz", cases) for name, cases in _parts(data).items()}


def _parts(data: Path) -> dict[str, Iterator[Case]]:
    """Name of a part → its cases, made when asked for."""
    folder, goto = data / "images/decam_coadd", data / "images/goto"
    coadd = read_image(folder / "coadd.fits.fz", mask=str(folder / "mask.fits.fz"))
    parts: dict[str, Iterator[Case]] = {}
    for part in ("train", "valid", "test"):
        parts[f"simulated-{part}"] = chain.from_iterable(map(simulated_cases, NIGHTS[part]))
        parts[f"decam-{part}"] = chain.from_iterable(map(partial(coadd_cases, coadd, part), ROUNDS[part]))
    if goto.is_dir():
        one, two = goto / "epoch1.fits", goto / "epoch2.fits"
        pairs = ((new, ref, k) for k in GOTO_SEEDS for new, ref in ((two, one), (one, two)))
        parts["goto-test"] = chain.from_iterable(starmap(pair_cases, pairs))
    return parts


def _cached(path: Path, cases: Iterator[Case]) -> Harvest:
    if not path.exists():
        found = []
        for case in cases:
            found.append(harvest(case, threshold=THRESHOLD_SIGMA))
            print(f"{case.name}: {found[-1].real.sum()} real, {(~found[-1].real).sum()} bogus", flush=True)
        whole = Harvest.join(found)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **{f.name: getattr(whole, f.name) for f in fields(Harvest)})
        temporary.rename(path)
    with np.load(path) as stored:
        return Harvest(**{f.name: stored[f.name] for f in fields(Harvest)})


# --- The network ------------------------------------------------------------------------------------------------------


def labelled(stamps: Harvest) -> Labelled:
    """Normalised tensors and truth of what can be scored."""
    tensor, scored = INPUT.prepare(stamps.stamps)
    return Labelled(tensor[scored], stamps.real[scored])


def train(parts: dict[str, Harvest], config: FitConfig) -> tuple[RealBogusNet, History]:
    """Fit on the training nights and regions; the validation ones decide when to stop."""
    torch.manual_seed(config.seed)
    net = RealBogusNet()
    both = {part: Harvest.join(parts[f"{source}-{part}"] for source in ("simulated", "decam")) for part in _LEARNT}
    history = fit(net, labelled(both["train"]), labelled(both["valid"]), config)
    return net, history


_LEARNT = ("train", "valid")


def write_model(net: RealBogusNet, parts: dict[str, Harvest], out: Path, notes: dict[str, Any]) -> None:
    """Both ONNX files and a card without metrics yet."""
    out.mkdir(parents=True, exist_ok=True)
    export_onnx(net, out / "model.onnx", SIZE)
    valid = Harvest.join(parts[f"{source}-valid"] for source in ("simulated", "decam"))
    card = ModelCard(
        name="realbogus",
        version=VERSION,
        description=(
            "Real or bogus, from a stamp of new, reference and difference: a small convolutional network. Its score is "
            "the probability of being real if as many real as bogus ones come in (1:1)."
        ),
        licence="BSD-3-Clause",
        threshold=0.5,
        default_variant="float",
        input=INPUT,
        files={"float": {"path": "model.onnx", "sha256": file_hash(out / "model.onnx")}},
        meant_for={"fwhm_pix": [1.8, 6.5], "pixel_scale_arcsec": [0.2, 1.3], "sigma_at_least": 5.0},
        training=notes,
    )
    (out / CARD).write_text(card.to_toml())
    scores = load_model(out).predict(valid.stamps)
    scored = np.isfinite(scores)
    threshold = threshold_for_completeness(valid.real[scored], scores[scored], 0.99)
    (out / CARD).write_text(replace(card, threshold=float(np.floor(threshold * 1000) / 1000)).to_toml())
    quantise_model(out, calibration(parts))


def calibration(parts: dict[str, Harvest], n: int = 2000) -> NDArray[np.float32]:
    """Stamps to calibrate int8 on: drawn from those learnt from, real and bogus."""
    train_set = Harvest.join(parts[f"{source}-train"] for source in ("simulated", "decam"))
    rows = np.random.default_rng(0).permutation(len(train_set))[:n]
    return train_set.stamps[np.sort(rows)]


# --- What it is worth -------------------------------------------------------------------------------------------------


def tables(model: Model, parts: dict[str, Harvest], data: Path) -> list[dict[str, Any]]:
    """Metrics of one variant on everything it has not seen."""
    names = {
        "simulated-test": "simulated nights, other seeds",
        "decam-test": "DECam coadd, regions held out",
        "goto-test": "GOTO pair, both directions; no image of GOTO was learnt from",
    }
    out = []
    for part, on in names.items():
        if part not in parts:
            continue
        found = parts[part]
        scores = model.predict(found.stamps)
        strong = np.abs(found.scorr) >= 5
        planted = ~found.real | (found.snr >= 8)
        for selection, rows in (
            (
                f"planted with expected S/N >= 8 against all artefacts above {THRESHOLD_SIGMA} sigma",
                planted,
            ),
            ("planted against artefacts, all above 5 sigma, flagged or not", strong),
            ("planted against artefacts, all above 5 sigma and unflagged", strong & (found.flags == 0)),
        ):
            table = measure(
                on, selection, found.real[rows], scores[rows], threshold=model.threshold, groups=found.region[rows]
            )
            out.append({"variant": model.variant, **table})
    triplets = data / "alerts/ztf_triplets.npz"
    if triplets.is_file():
        stamps, drb = ztf_triplets(triplets)
        rows = (drb > 0.9) | (drb < 0.5)
        on, selection = "real ZTF alerts (not learnt from)", "drb above 0.9 against drb below 0.5"
        scores = model.predict(stamps)
        out.append(
            {
                "variant": model.variant,
                **measure(on, selection, drb[rows] > 0.9, scores[rows], threshold=model.threshold),
            }
        )
    return out


def ztf_triplets(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Stamps in our order and sign, and the survey's own score, of stored ZTF alerts.

    ZTF cuts the stamps of negative candidates from the negated difference.
    """
    with np.load(path) as stored:
        stamps = stored["triplets"].transpose(0, 3, 1, 2).astype(np.float32)
        drb = stored["drb"]
        negative = np.array([json.loads(str(text))["isdiffpos"] in ("f", "0") for text in stored["meta"]])
    stamps[negative, 2] *= -1
    return stamps, drb


def choose_default(out: Path, parts: dict[str, Harvest], found: dict[str, list[dict[str, Any]]]) -> tuple[str, dict]:
    """The faster variant, if its AUC-PR and completeness are nowhere lower by more than 0.002."""
    stamps = parts["simulated-test"].stamps[:4096]
    speed = {variant: round(stamps_per_second(load_model(out, variant=variant), stamps)) for variant in found}
    equal = all(
        b[name] >= a[name] - 0.002
        for a, b in zip(found["float"], found["int8"], strict=True)
        if "alerts" not in a["on"]
        for name in ("auc_pr", "completeness", "bogus_removed")
    )
    return ("int8" if equal and speed["int8"] > speed["float"] else "float"), speed


def main(arguments: list[str] | None = None) -> None:
    """Parse, then do the steps above."""
    parser = argparse.ArgumentParser(prog="python -m batchproc.training.realbogus", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and alerts/")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--cache", type=Path, default=Path("realbogus-stamps"), help="where the stamps are kept")
    parser.add_argument("--epochs", type=int, default=FitConfig.epochs)
    parser.add_argument("--seed", type=int, default=FitConfig.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    parts = harvest_all(options.data, options.cache)
    config = FitConfig(epochs=options.epochs, seed=options.seed)
    net, history = train(parts, config)
    learnt = [parts[f"{source}-train"] for source in ("simulated", "decam")]
    notes = {
        "data": "simulated nights and science images made from regions of a DECam g coadd, through this pipeline",
        "made_with": f"batchproc {__version__}, torch {torch.__version__}",
        "n_real": int(sum(part.real.sum() for part in learnt)),
        "n_bogus": int(sum((~part.real).sum() for part in learnt)),
        "search_threshold_sigma": THRESHOLD_SIGMA,
        "parameters": sum(p.numel() for p in net.parameters()),
        "epochs": history.best_epoch + 1,
        **{f"fit_{key}": value for key, value in asdict(config).items()},
    }
    write_model(net, parts, options.out, notes)
    finish_card(options.out, parts, options.data)


def finish_card(out: Path, parts: dict[str, Harvest], data: Path) -> None:
    """Measure both variants, choose the default, and write it all on the card."""
    found = {variant: tables(load_model(out, variant=variant), parts, data) for variant in ("float", "int8")}
    default, speed = choose_default(out, parts, found)
    card = read_card(out)
    metrics = tuple(table for variant in found for table in found[variant])
    card = replace(card, default_variant=default, speed={**card.speed, **speed}, metrics=metrics)
    (out / CARD).write_text(card.to_toml())
    for table in metrics:
        print(
            f"{table['variant']}: {table['on']}; {table['selection']}; {table['n_real']} real, {table['n_bogus']} bogus"
        )
        for name in ("auc_pr", "auc_roc", "bogus_removed_at_99_completeness", "completeness", "bogus_removed"):
            print(f"    {name:34s} {table[name]:.4f} {table[f'{name}_interval']}")
    print(f"default: {default}; stamps per CPU-second: {speed}")


if __name__ == "__main__":
    main()
