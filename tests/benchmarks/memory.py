"""How much memory a worker needs for an image: measured in fresh processes that do what a worker does, and predicted.

python -m tests.benchmarks.memory
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from astropy.io import fits

from batchproc.distribute.prediction import predict_image
from batchproc.imaging.simulate import Scene, simulate_pair
from batchproc.records import ManifestEntry
from tests.benchmarks._fresh import Peak, resident_mb, run_fresh
from tests.benchmarks._quadrant import as_entry, entry_arguments, tan_wcs

_SCENE = Scene(fwhm_new=2.8, fwhm_ref=2.4, n_stars=150, n_transients=20)


def pair_of_files(
    folder: Path, shape: tuple[int, int], shape_ref: tuple[int, int] | None = None, n_ref: int = 1, planes: bool = False
) -> ManifestEntry:
    """The manifest entry of a simulated pair, as plain FITS; references lie on a grid of their own.

    With ``planes`` each image has its variance and its mask as files.
    """
    shape_ref = shape_ref or shape
    name = f"{shape[0]}x{shape[1]}_{shape_ref[0]}x{shape_ref[1]}"
    new, ref = (folder / f"{name}_{kind}.fits" for kind in ("new", "ref"))
    extra = {(p.stem, kind): p.with_name(f"{p.stem}_{kind}.fits") for p in (new, ref) for kind in ("variance", "mask")}
    if not new.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        wcs, wcs_ref = tan_wcs(shape, (7.3, -4.6), 0.05), tan_wcs(shape, (0.0, 0.0), 0.0)

        def to_ref(x: Any, y: Any) -> Any:
            return wcs_ref.all_world2pix(*wcs.all_pix2world(x, y, 0), 0)

        pair = simulate_pair(shape, 1, scene=_SCENE, to_ref=to_ref)
        more = [b - a for a, b in zip(shape, shape_ref, strict=True)]
        pad = [(n // 2, n - n // 2) for n in more]
        wcs_ref.wcs.crpix = wcs_ref.wcs.crpix + np.array([pad[1][0], pad[0][0]])
        for path, data, variance, mask, where in (
            (new, pair.new + pair.sky_new, pair.variance_new, pair.mask_new, wcs),
            (ref, pair.ref + pair.sky_ref, pair.variance_ref, pair.mask_ref, wcs_ref),
        ):
            wanted = [(path, data.astype(np.float32))]
            wanted += [(extra[path.stem, "variance"], variance.astype(np.float32))]
            wanted += [(extra[path.stem, "mask"], mask.astype(np.int16))]
            for target, plane in wanted:
                _write(target, plane if path == new else np.pad(plane, pad, mode="reflect"), where)
    more_files: dict[str, Any] = {}
    if planes:
        more_files = {
            f"{side}_{kind}": str(extra[path.stem, kind]) if side == "new" else (str(extra[path.stem, kind]),) * n_ref
            for side, path in (("new", new), ("ref", ref))
            for kind in ("variance", "mask")
        }
    return ManifestEntry(image_id=name, new=str(new), ref=(str(ref),) * n_ref, **more_files)


def measure(entry: dict[str, Any], again: int = 1) -> dict[str, Any]:
    """What a process has before and at most while it does an image; called in a process of its own."""
    import distributed  # noqa: F401  every worker has these
    import pyarrow.parquet  # noqa: F401
    import zarr  # noqa: F401

    from batchproc.config import Config
    from batchproc.distribute.memory import keep_freed_memory
    from batchproc.flow import process_image

    keep_freed_memory()
    start = resident_mb()
    peaks = []
    for _ in range(again):
        peak = Peak()
        result = process_image(as_entry(entry), Config())
        peaks.append(peak.total_mb())
        del result
    return {"start_mb": start, "peak_mb": peaks}


def _write(path: Path, data: np.ndarray, wcs: Any) -> None:
    header = wcs.to_header()
    header.update({"GAIN": 1.0, "RDNOISE": 5.0, "SATURATE": 6e4, "MJD-OBS": 60000.0, "FILTER": "r"})
    fits.PrimaryHDU(data, header).writeto(path, overwrite=True)


#: Shape of new, shape of each reference, number of references, whether with planes of variance and mask.
CASES: tuple[tuple[tuple[int, int], tuple[int, int], int, bool], ...] = (
    ((512, 512), (512, 512), 1, False),
    ((1024, 1024), (1024, 1024), 1, True),
    ((1024, 1024), (2048, 2048), 4, True),
    ((2048, 2048), (2048, 2048), 1, False),
    ((2048, 2048), (2048, 2048), 3, False),
    ((2048, 2048), (3072, 3072), 2, True),
    ((3072, 3072), (3072, 3072), 1, False),
    ((4096, 2048), (4096, 2048), 1, False),
    ((4096, 4096), (4096, 4096), 1, True),
)


def measured_and_predicted(folder: Path, case: tuple[tuple[int, int], tuple[int, int], int, bool]) -> tuple[float, int]:
    """Largest size of a process that has done the image twice, and its prediction; bytes."""
    entry = pair_of_files(folder, *case)
    found = run_fresh("tests.benchmarks.memory:measure", entry=entry_arguments(entry), again=2)
    prediction = predict_image(entry)
    assert prediction is not None
    return max(found["peak_mb"]) * 2**20, prediction.bytes


def main() -> None:
    """Print the table."""
    print("new          reference    n  planes   measured  predicted  ratio")
    with TemporaryDirectory() as folder:
        for case in CASES:
            measured, predicted = measured_and_predicted(Path(folder), case)
            (ny, nx), (ry, rx), n, planes = case
            print(
                f"{f'{nx} x {ny}':12} {f'{rx} x {ry}':12} {n} {'yes' if planes else 'no':>6} "
                f"{measured / 1e9:8.2f} GB {predicted / 1e9:7.2f} GB {measured / predicted:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
