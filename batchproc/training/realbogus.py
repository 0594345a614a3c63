"""Make the bundled real/bogus model: ``python -m batchproc.training.realbogus --data DATA --out FOLDER``.

1. Stamps: the pipeline itself runs on simulated nights and on science images made from a real coadd, with a low
   threshold; what it finds is labelled by what was planted (`cases`, `harvest`).
2. Variations of stamps of other simulated nights, those of a survey as ZTF is, are shown to braai (`taught`).
3. A small network is fitted to all of them (`network`, `neural`), to the truth of the first and the answers to the
   second; nights and regions that it does not learn from tell which epoch is kept.
4. It is written as ONNX in float and in int8, measured on images that no step has seen (`report`), and the faster
   of the two, if as accurate, becomes the default. All of that goes on the card.

``DATA`` holds ``images/decam_coadd`` (learnt from, by regions), ``models/d6_m7.h5`` (braai's weights) and, if there,
``images/goto`` and ``alerts/ztf_triplets.npz``, which are only ever tested on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc import __version__
from batchproc.config import Config
from batchproc.errors import ExposureError, UsageError
from batchproc.io.braai import write_braai
from batchproc.io.cards import CARD, ModelCard, read_card
from batchproc.io.images import read_image
from batchproc.io.models import Model, file_hash, load_model
from batchproc.io.quantise import quantise_model
from batchproc.learning.evaluate import auc_pr, bogus_removed, threshold_for_completeness
from batchproc.training.cases import Case, coadd_cases, draw_survey_scene, pair_cases, simulated_cases
from batchproc.training.examples import REAL, Examples
from batchproc.training.harvest import harvest
from batchproc.training.neural import learn, wanted_input
from batchproc.training.report import measure
from batchproc.training.settings import TrainSettings
from batchproc.training.taught import Taught, teach
from batchproc.training.train import Learnt

VERSION = "3.0"
THRESHOLD_SIGMA = 3.75  # of the search that stamps are taken from

#: Settings of the pipeline, and those that a `Case` has besides that is careless.
SEARCH: dict[str, Any] = {"detect": {"threshold": THRESHOLD_SIGMA}, "cutouts": {"size": 63}}
CARELESS: dict[str, Any] = {"subtract": {"source_noise": False, "star_residuals": False}, "align": {"refine": False}}

#: Part → seeds of simulated nights, and of rounds over the coadd's regions of that part.
NIGHTS = {"train": range(1000, 1150), "valid": range(2000, 2012), "test": range(3000, 3012)}
SURVEY_NIGHTS, ASKED = range(8000, 8140), 300_000  # what braai is shown: nights, variations of their stamps
ROUNDS = {"train": range(100, 112), "valid": range(200, 206), "test": range(300, 306)}
GOTO_SEEDS = range(8)
#: Parts → what a card says they are.
MEASURED_ON = {
    "simulated-test": "simulated nights, other seeds",
    "decam-test": "DECam coadd, regions held out",
    "goto-test": "GOTO pair, both directions; no image of GOTO was learnt from",
}
SETTINGS = TrainSettings(network="two-scales", epochs=52, patience=52, batch=256, learning_rate=3e-3)


# --- Stamps -----------------------------------------------------------------------------------------------------------


def harvest_all(data: Path, cache: Path) -> dict[str, Examples]:
    """Every part's examples, from the cache where they are there already."""
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


def _cached(path: Path, cases: Iterator[Case], **how: int) -> Examples:
    """The stored examples of a part; each case is stored by itself until all are done."""
    if not path.exists():
        parts = path.with_suffix("")
        parts.mkdir(exist_ok=True)
        for number, case in enumerate(cases):
            try:
                found = harvest(case, _config(case), **how)
            except ExposureError as error:
                print(f"{case.name}: left out: {error}", flush=True)
                continue
            found.save(parts / f"{number:05d}.npz")
            print(f"{case.name}: {found.counts()}", flush=True)
        Examples.join(map(Examples.load, sorted(parts.glob("*.npz")))).save(path)
        shutil.rmtree(parts)
    found = Examples.load(path)
    wanted = SEARCH["cutouts"]["size"]
    if found.stamps.shape[-1] != wanted:
        raise UsageError(f"{path}: stamps of {found.stamps.shape[-1]} pixels, and {wanted} are wanted: remove it")
    return found


def harvest_taught(data: Path, cache: Path) -> Taught:
    """What braai answers to variations of stamps of simulated nights, from the cache where it is there already."""
    path = cache / "taught.npz"
    if not path.exists():
        with TemporaryDirectory() as folder:
            write_braai(data / "models/d6_m7.h5", Path(folder))
            nights = partial(simulated_cases, draw=draw_survey_scene)
            found = _cached(cache / "survey-train.npz", chain.from_iterable(map(nights, SURVEY_NIGHTS)), noise=40)
            scorr = found.table["scorr"].to_numpy()
            teach(load_model(folder), wanted_input(SETTINGS), found.stamps, scorr, ASKED, seed=1).save(path)
    return Taught.load(path)


def _config(case: Case) -> Config:
    return Config.from_dict(SEARCH | (CARELESS if case.careless else {}))


# --- The network ------------------------------------------------------------------------------------------------------


def train(parts: dict[str, Examples], taught: Taught, out: Path, settings: TrainSettings) -> None:
    """Fit on the training nights and regions and on what was taught; the validation ones tell which epoch is kept.

    The card is without metrics yet. Parts that are learnt from are taken out of `parts`: gigabytes, not to be there
    twice.
    """
    both = {
        name: Examples.join(parts.pop(f"{kind}-{name}") for kind in ("simulated", "decam"))
        for name in ("train", "valid")
    }
    out.mkdir(parents=True, exist_ok=True)
    learnt = learn(**both, classes=(REAL,), folder=out, settings=settings, quiet=False, taught=taught)
    card = _card(learnt, out, both["train"].counts(), len(taught), settings)
    (out / CARD).write_text(card.to_toml())
    valid = both["valid"]
    scores = load_model(out).predict(valid.stamps)
    scored = np.isfinite(scores)
    threshold = threshold_for_completeness(valid.label[scored] == REAL, scores[scored], 0.99)
    (out / CARD).write_text(replace(card, threshold=float(np.floor(threshold * 1000) / 1000)).to_toml())
    quantise_model(out, valid.stamps, formats=("onnx", "tflite", "edgetpu"), labels=valid.label)


def _card(learnt: Learnt, folder: Path, n_train: dict[str, int], n_taught: int, settings: TrainSettings) -> ModelCard:
    return ModelCard(
        name="realbogus",
        version=VERSION,
        description=(
            "Real or bogus, from a stamp of new, reference and difference: a small convolutional network. Its score is "
            "about the probability of being real if as many real as bogus ones come in (1:1)."
        ),
        licence="BSD-3-Clause",
        threshold=0.5,
        default_variant="float",
        input=learnt.input,
        files={"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}},
        meant_for={"fwhm_pix": [1.6, 6.5], "pixel_scale_arcsec": [0.2, 1.3], "sigma_at_least": 5.0},
        training={
            "data": "simulated nights and science images made from regions of a DECam g coadd, through this pipeline; "
            "and what ZTF's network braai d6_m7 answers to variations of simulated stamps",
            "made_with": f"batchproc {__version__}",
            "search_threshold_sigma": THRESHOLD_SIGMA,
            "n_train": n_train,
            "n_taught": n_taught,
            **learnt.notes,
            **{
                f"fit_{name}": getattr(settings, name)
                for name in ("batch", "learning_rate", "weight_decay", "seed", "swap")
            },
        },
    )


# --- What it is worth -------------------------------------------------------------------------------------------------


def tables(model: Model, parts: dict[str, Examples], data: Path) -> list[dict[str, Any]]:
    """Metrics of one variant on everything it has not seen."""
    out = []
    for part, on in MEASURED_ON.items():
        if part not in parts:
            continue
        found = parts[part]
        real, known = found.label == REAL, found.table
        scores, significance = model.predict(found.stamps), np.abs(known["scorr"].to_numpy())
        planted, varies = real & (known["planted_snr"] >= 8), real & (known["kind"] == "variable")
        strong = significance >= 5
        region = known["region"].to_numpy(str)
        if part == "goto-test":  # rounds and directions are of one pair, which shows the same sky
            region = known["region"].str.rsplit("/").str[-1].to_numpy(str)
        every = f"all artefacts above {THRESHOLD_SIGMA} sigma"
        for selection, rows in (
            (f"transients with expected S/N >= 8 against {every}", ~real | (planted & ~varies)),
            (f"transients of whatever S/N they are found at, against {every}", ~real | ~varies),
            (
                f"stars that vary by a tenth or more, with expected S/N >= 8, against {every}",
                ~real | (planted & varies),
            ),
            ("transients and variables against artefacts, all above 5 sigma, flagged or not", strong),
            (
                "transients and variables against artefacts, all above 5 sigma and unflagged",
                strong & (known["flags"] == 0),
            ),
        ):
            rows = np.asarray(rows)
            table = measure(on, selection, real[rows], scores[rows], threshold=model.threshold, groups=region[rows])
            table |= _without_a_network(real[rows], significance[rows])
            out.append({"variant": model.variant, **table})
    triplets = data / "alerts/ztf_triplets.npz"
    if triplets.is_file():
        stamps, drb = ztf_triplets(triplets)
        rows = (drb > 0.9) | (drb < 0.5)
        on, selection = "real ZTF alerts (none learnt from)", "drb above 0.9 against drb below 0.5"
        scores = model.predict(stamps)
        table = measure(on, selection, drb[rows] > 0.9, scores[rows], threshold=model.threshold)
        out.append({"variant": model.variant, **table})
    return out


def _without_a_network(real: NDArray[np.bool_], significance: NDArray[np.floating]) -> dict[str, float]:
    """What the significance does alone."""
    threshold = threshold_for_completeness(real, significance, 0.99)
    return {
        "auc_pr_of_scorr": round(auc_pr(real, significance, prevalence=0.5), 4),
        "bogus_removed_at_99_completeness_by_scorr": round(bogus_removed(real, significance, threshold), 4),
    }


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


def main(arguments: list[str] | None = None) -> None:
    """Parse, then do the steps above."""
    parser = argparse.ArgumentParser(prog="python -m batchproc.training.realbogus", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, models/ and alerts/")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--cache", type=Path, default=Path("realbogus-stamps"), help="where the stamps are kept")
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    settings = replace(
        SETTINGS, epochs=options.epochs, patience=options.epochs, seed=options.seed, threads=options.threads
    )
    # Before the parts are there, for it takes as much memory again.
    taught = harvest_taught(options.data, options.cache)
    parts = harvest_all(options.data, options.cache)
    train(parts, taught, options.out, settings)
    finish_card(options.out, parts, options.data)


def finish_card(out: Path, parts: dict[str, Examples], data: Path) -> None:
    """Measure every variant that any CPU takes, choose the default, and write it all on the card."""
    card = read_card(out)
    found = {name: tables(load_model(out, variant=name), parts, data) for name in card.files if name != "edgetpu"}
    metrics = tuple(table for variant in found.values() for table in variant)
    card = replace(card, default_variant=_default(card, found), metrics=metrics)
    (out / CARD).write_text(card.to_toml())
    for table in metrics:
        print(
            f"{table['variant']}: {table['on']}; {table['selection']}; {table['n_real']} real, {table['n_bogus']} bogus"
        )
        for name in ("auc_pr", "auc_roc", "bogus_removed_at_99_completeness", "completeness", "bogus_removed"):
            print(f"    {name:34s} {table[name]:.4f} {table[f'{name}_interval']}")
    print(f"default: {card.default_variant}; stamps per CPU-second: {dict(card.speed)}")


def _default(card: ModelCard, found: dict[str, list[dict[str, Any]]]) -> str:
    """``int8`` if faster and nowhere worse by more than 0.002. TFLite never is: LiteRT is an extra."""
    equal = all(
        b[name] >= a[name] - 0.002
        for a, b in zip(found["float"], found["int8"], strict=True)
        if "alerts" not in a["on"]
        for name in ("auc_pr", "completeness", "bogus_removed")
    )
    return "int8" if equal and card.speed["int8"] > card.speed["float"] else "float"


if __name__ == "__main__":
    main()
