"""What few labels of one's own are worth to a model that learnt elsewhere.

python -m tests.benchmarks.continuing [--write]     the table of docs/training.md (extra 'train', some minutes)

Candidates above 5 sigma of the GOTO pair, flagged or not, with injected transients. Five of nine tiles of the image are
held out; from the others labels are drawn, as many real as bogus, and a quarter of them decides when to stop.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from batchproc.errors import ExposureError
from batchproc.io.braai import write_braai
from batchproc.io.cards import CARD
from batchproc.io.models import Model, find_model, load_model
from batchproc.learning.evaluate import auc_pr, bootstrap
from batchproc.training.examples import BOGUS, REAL, Examples

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- measured: python -m tests.benchmarks.continuing --write -->", "<!-- end of what labels are worth -->"
HELD = (0, 2, 4, 6, 8)  # of the 3 × 3 tiles of the image


def examples(data: Path, seeds: range) -> Examples:
    """Candidates above 5 sigma of the pair in both directions."""
    from batchproc.config import Config
    from batchproc.training.cases import pair_cases
    from batchproc.training.harvest import harvest
    from batchproc.training.realbogus import SEARCH

    goto = data / "images/goto"
    one, two = goto / "epoch1.fits", goto / "epoch2.fits"
    config = Config.from_dict(SEARCH | {"cutouts": {"size": 63}})
    found = []
    for seed in seeds:
        for new, ref in ((two, one), (one, two)):
            for case in pair_cases(new, ref, seed):
                try:
                    found.append(harvest(case, config))
                except ExposureError as error:
                    print(f"{case.name}: left out: {error}", file=sys.stderr)
    whole = Examples.join(found)
    return whole[(np.abs(whole.table["scorr"]) >= 5).to_numpy()]


def held_out(whole: Examples) -> np.ndarray:
    """Which candidates lie in a tile that is only measured on."""
    return np.isin(whole.table["region"].str.rsplit("/").str[-1].astype(int), HELD)


#: AUC-PR afterwards; what was gained, and the limits of that.
Gained = tuple[float, float, float, float]


def gains(base: Path, whole: Examples, n: int, draws: int, scratch: Path) -> Iterator[Gained]:
    """Of each draw of `n` labels: AUC-PR at 1:1 afterwards, and what was gained with its interval by region."""
    held = held_out(whole)
    apart, ours = whole[held], whole[~held]
    for draw in range(draws):
        learnt = load_model(_continued(base, ours, n, draw, scratch / f"{n}-{draw}"))
        known = load_model(base, variant="float")
        real, region = apart.label == REAL, apart.table["region"].to_numpy(str)
        before, after = known.predict(apart.stamps), learnt.predict(apart.stamps)
        both = np.isfinite(before) & np.isfinite(after)
        found = _gain(real[both], before[both], after[both], region[both])
        yield auc_pr(real[both], after[both], prevalence=0.5), *found


def _continued(base: Path, ours: Examples, n: int, draw: int, folder: Path) -> Path:
    from batchproc.io.cards import read_card
    from batchproc.io.models import file_hash
    from batchproc.training.neural import learn
    from batchproc.training.settings import TrainSettings

    random = np.random.default_rng(draw)
    rows = np.concatenate([random.permutation(np.flatnonzero(ours.label == one))[: n // 2] for one in (REAL, BOGUS)])
    stop = np.arange(n) % 4 == 0
    folder.mkdir(parents=True)
    settings = TrainSettings(base=str(base), seed=draw)
    made = learn(ours[rows[~stop]], ours[rows[stop]], classes=(REAL,), folder=folder, settings=settings, quiet=True)
    files = {"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}}
    card = replace(read_card(base), input=made.input, files=files, default_variant="float", quantisation={}, speed={})
    (folder / CARD).write_text(card.to_toml())
    return folder


def _gain(real: np.ndarray, before: np.ndarray, after: np.ndarray, region: np.ndarray) -> tuple[float, float, float]:
    """What one score has over the other, on the same resamples."""
    pairs = np.column_stack([before, after])

    def gain(r: np.ndarray, rows: np.ndarray) -> float:
        chosen = pairs[rows.astype(np.intp)]
        return auc_pr(r, chosen[:, 1], prevalence=0.5) - auc_pr(r, chosen[:, 0], prevalence=0.5)

    found = bootstrap(gain, real, np.arange(len(real)), groups=region)
    return found.value, found.low, found.high


def table(data: Path, seeds: range, labels: list[int], draws: int) -> str:
    """Markdown."""
    whole = examples(data, seeds)
    lines = ["| from | labels | before | after | gain |", "|---|---|---|---|---|"]
    with TemporaryDirectory() as scratch:
        models = {"realbogus": find_model("realbogus")}
        if (data / "models/d6_m7.h5").is_file():
            models["braai"] = Path(scratch) / "braai"
            models["braai"].mkdir()
            write_braai(data / "models/d6_m7.h5", models["braai"])
        for name, base in models.items():
            known: Model = load_model(base, variant="float")
            told = f"{name} {known.version}"
            for n in labels:
                each = sorted(gains(base, whole, n, draws, Path(scratch) / f"of-{name}"))
                before = each[0][0] - each[0][1]
                after = ", ".join(f"{value:.3f}" for value, *_ in each)
                gained = "; ".join(f"{value:.3f} [{low:.3f}, {high:.3f}]" for _, value, low, high in each)
                lines.append(f"| {told} | {n} | {before:.3f} | {after} | {gained.replace('-', '−')} |")
                print(lines[-1], file=sys.stderr, flush=True)
    held = held_out(whole)
    regions = whole.table["region"][held].nunique()
    return "\n".join(
        [*lines, "", f"{held.sum()} candidates of {len(whole)} are held out; they lie in {regions} regions."]
    )


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("BATCHPROC_TEST_DATA"))
    parser.add_argument("--seeds", type=int, default=4, help="rounds of injections, in both directions each")
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = parser.parse_args()
    if options.data is None:
        parser.error("set BATCHPROC_TEST_DATA, or say --data FOLDER with images/goto and models/d6_m7.h5")
    found = table(Path(options.data), range(options.seeds), options.labels, options.draws)
    print(found)
    if options.write:
        text = PAGE.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(f"{text[:start]}\n{found}\n{text[end:]}")


if __name__ == "__main__":
    main()
