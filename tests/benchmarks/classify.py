"""How fast models score stamps, and in how much memory.

python -m tests.benchmarks.classify speed [--write]     stamps per CPU second, normalisation included, beside braai
python -m tests.benchmarks.classify million             memory of one worker while it scores 10^6 stamps

``speed`` takes every model that is bundled or added, in every variant that this machine runs, and braai besides, made
of the weights of BATCHPROC_TEST_DATA where they are; ``--write`` puts the table into docs/performance.md. ``million``
has a worker's task score chunks of a generated source and write its parts of scores, and looks at the process after
each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks._fresh import Peak, cpu_and_wall, resident_mb, run_fresh

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: python -m tests.benchmarks.classify speed --write -->", "<!-- end of the models' speed -->"
BATCH = 256


def stamps_of(n: int, size: int = 63, seed: int = 0) -> np.ndarray:
    """Noise, and on it a source of 0 to 1000 sigma, in new and in the difference; some in the reference too."""
    random = np.random.default_rng(seed)
    stamps = random.normal(0.0, 5.0, (n, 3, size, size)).astype(np.float32)
    y, x = np.mgrid[:size, :size] - size // 2
    psf = np.exp(-(x**2 + y**2) / (2 * 1.3**2)).astype(np.float32)
    peak = (5 * np.geomspace(0.5, 1000, n)).astype(np.float32)[random.permutation(n), None, None]
    stamps[:, 0] += peak * psf
    stamps[:, 2] += peak * psf
    stamps[::3, 1] += 3 * peak[::3] * psf
    return stamps


# --- Speed ------------------------------------------------------------------------------------------------------------


def speed(stamps: int = 2048, repeat: int = 9, weights: str | None = None) -> list[dict[str, Any]]:
    """CPU time of each model and variant, taken in turns, and of its normalisation alone; one thread."""
    from batchproc.errors import ModelError
    from batchproc.io.models import list_models, load_model, read_card

    with tempfile.TemporaryDirectory() as folder:
        if weights and "braai-d6_m7" not in list_models():
            _add_braai(weights, folder)
        pixels = stamps_of(stamps)
        models = []
        for name in list_models():
            for variant in read_card(list_models()[name]).files:
                try:
                    model = load_model(name, variant=variant)
                    if model.takes_stamps and not model.card.input.features:
                        model.predict(pixels[:BATCH])
                        models.append(model)
                except ModelError as error:
                    print(f"{name}, {variant}: {error}", file=sys.stderr)
        return _in_turns(models, pixels, repeat)


def _add_braai(weights: str, folder: str) -> None:
    from batchproc.io.braai import add_braai

    before = os.environ.get("BATCHPROC_MODELS")
    if before is None:  # nobody's own models are touched
        os.environ["BATCHPROC_MODELS"] = folder
    add_braai(weights)


def _in_turns(models: list[Any], pixels: np.ndarray, repeat: int) -> list[dict[str, Any]]:
    spent: list[list[float]] = [[] for _ in models]
    prepared: list[list[float]] = [[] for _ in models]
    for _ in range(repeat):
        for k, model in enumerate(models):
            spent[k].append(cpu_and_wall(lambda model=model: model.predict(pixels, batch=BATCH))[1])
            prepared[k].append(cpu_and_wall(lambda model=model: _prepare(model, pixels))[1])
    return [
        {
            "model": model.name,
            "variant": model.variant,
            "provider": model.provider,
            "normalisation": model.normalisation,
            "size": model.card.input.size,
            "bytes": Path(model.file).stat().st_size,
            "best": len(pixels) / min(spent[k]),
            "median": len(pixels) / statistics.median(spent[k]),
            "normalisation_us": 1e6 * min(prepared[k]) / len(pixels),
            "share": min(prepared[k]) / min(spent[k]),
        }
        for k, model in enumerate(models)
    ]


def _prepare(model: Any, pixels: np.ndarray) -> None:
    card = model.card.input_of(model.variant)
    for start in range(0, len(pixels), BATCH):
        card.prepare(pixels[start : start + BATCH])


def speed_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    braai = max((row["best"] for row in rows if row["model"].startswith("braai")), default=float("nan"))
    lines = [
        "| model | variant | runs on | file | stamps per CPU s | median | of these, normalisation | against braai |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['variant']} | {row['provider'].replace('CPUExecutionProvider', 'ONNX Runtime')} "
            f"| {row['bytes'] / 1e3:.0f} kB | {row['best']:,.0f} | {row['median']:,.0f} "
            f"| {row['normalisation_us']:.1f} µs, {row['share']:.0%} | {row['best'] / braai:.1f} |"
        )
    return "\n".join(lines)


def write(text: str, page: Path = PAGE) -> None:
    """Put the table between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest:
        raise SystemExit(f"{page}: has no line {BEGIN}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


# --- Memory -----------------------------------------------------------------------------------------------------------


def million(
    stamps: int = 1_000_000, images: int = 100, candidates: int = 150, size: int = 63, models: list[str] | None = None
) -> dict[str, Any]:
    """Resident memory of this process after each chunk that it scores as a worker does; in MB."""
    import pyarrow as pa

    from batchproc.config import Config
    from batchproc.distribute import chunks
    from batchproc.distribute.chunks import Chunk, classify_chunk
    from batchproc.distribute.tasks import Job
    from batchproc.io import catalogue
    from batchproc.io.freeze import freeze
    from batchproc.io.index import Place
    from batchproc.io.models import load_model
    from batchproc.io.run_folder import RunFolder
    from batchproc.records import ManifestEntry

    pool = stamps_of(512, size)
    random = np.random.default_rng(1)

    def rows(folder: Any, places: Any, columns: Any) -> Any:
        ids = [(f"{place.image_id}_{row:05d}", place.image_id) for place in places for row in range(place.n)]
        names = zip(*ids, strict=True)
        return pa.table([pa.chunked_array([list(values)]) for values in names], ["candidate_id", "image_id"])

    def pixels(folder: Any, piece: Any) -> Any:  # twice in memory for a moment, as what is read of a run's stores
        return np.concatenate([pool[random.integers(0, len(pool), part.stop - part.start)] for part in piece.parts])

    catalogue.read_rows, chunks._read = rows, pixels
    scorers = [load_model(name) for name in models or ["realbogus"]]
    names = tuple(model.name for model in scorers)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run")
        config = replace(Config(), classify=replace(Config().classify, model=""))
        freeze(folder, [ManifestEntry("any", "/any.fits", ("/any.fits",))], config, lambda: "")
        for name in names:
            folder.scores_of(name).mkdir(parents=True)
        job = Job(str(folder.path), folder.identity())
        seen, peak, cpu, n = [], Peak(), 0.0, 0
        while n < stamps:
            places = tuple(Place(f"image{n:09d}_{k:04d}", candidates) for k in range(images))
            failed, spent, _ = cpu_and_wall(lambda places=places: classify_chunk(job, scorers, Chunk(places, names)))
            if failed:
                raise next(iter(failed.values())).error
            n, cpu = n + images * candidates, cpu + spent
            seen.append((n, resident_mb()))
        numbers = np.array(seen)
        settled = numbers[len(numbers) // 4 :]
        slope = float(np.polyfit(settled[:, 0] / 1e6, settled[:, 1], 1)[0]) if len(settled) > 2 else float("nan")
        return {
            "stamps": n,
            "peak_mb": peak.total_mb(),
            "slope_mb_a_million": slope,
            "grown_mb": float(settled[-1, 1] - settled[0, 1]),
            "cpu_s": cpu,
            "seen": seen,
        }


def tell_million(found: dict[str, Any]) -> str:
    """Memory over time, some ten lines, and what it comes to."""
    seen = found["seen"]
    lines = [f"{n:>9,} stamps  {mb:6.0f} MB" for n, mb in seen[:: max(1, len(seen) // 10)]]
    lines.append(
        f"{found['stamps']:,} stamps in {found['cpu_s']:.0f} CPU s ({found['stamps'] / found['cpu_s']:,.0f} a second, "
        f"making and writing included); peak {found['peak_mb']:.0f} MB, after the first quarter "
        f"{found['slope_mb_a_million']:+.1f} MB a million stamps"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True, dest="what")
    fast = what.add_parser("speed")
    fast.add_argument("--stamps", type=int, default=2048)
    fast.add_argument("--repeat", type=int, default=9)
    fast.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    large = what.add_parser("million")
    large.add_argument("--stamps", type=int, default=1_000_000)
    large.add_argument("--size", type=int, default=63)
    large.add_argument("--model", action="append", dest="models")
    options = vars(parser.parse_args(arguments))
    if options.pop("what") == "million":
        print(tell_million(run_fresh("tests.benchmarks.classify:million", echo=True, **options)))
        return
    to_page = options.pop("write")
    data = os.environ.get("BATCHPROC_TEST_DATA")
    weights = Path(data) / "models" / "d6_m7.h5" if data else None
    options["weights"] = str(weights) if weights and weights.is_file() else None
    text = speed_table(run_fresh("tests.benchmarks.classify:speed", echo=True, **options))
    print(text)
    if to_page:
        write(text)


if __name__ == "__main__":
    main()
