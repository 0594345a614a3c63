"""Which reference covers which image: manifests from lists of files.

Footprints are sampled: a grid of points over each image, taken to the sky and into the pixels of the references.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import ManifestError, ReadError
from batchproc.io.companions import PLANES, find_companions
from batchproc.io.fitsfile import quiet, split_hdu
from batchproc.io.inspection import ImageInfo, image_hdus, inspect_image
from batchproc.io.profiles import list_profiles, load_profile

__all__ = ["build_manifest", "covers"]

#: Points a side of the grid over an image.
GRID = 9


def build_manifest(
    images: Iterable[str | Path], references: Iterable[str | Path], *, instrument: str | None = None
) -> pd.DataFrame:
    """Give each image the references that cover it.

    Parameters
    ----------
    images, references : iterable of str or Path
        Files; one with several CCDs gives a row, or a reference, for each of them. A file that is the mask, variance
        or weight map of another one, by its name, is left out.
    instrument : str, optional
        Name of the instrument profile; by default each header is recognised.

    Returns
    -------
    DataFrame
        Columns ``image_id`` (from the file's name, made unique), ``new``, ``ref``, ``survey`` and, where such files
        exist, ``new_mask``, ``ref_mask``, ``new_variance``, ``ref_variance``; absolute paths. An image gets the fewest
        references of its filter that together cover what can be covered of it. ``attrs["notes"]`` says which images
        were left out, and why.

    Raises
    ------
    ManifestError
        No image has a reference.
    """
    # A profile that cannot be found by its name would be lost between the manifest and the run.
    if instrument is not None and load_profile(instrument).name not in list_profiles():
        raise ManifestError(f"put {instrument} into the folder that BATCHPROC_INSTRUMENTS names, and give its name")
    notes: list[str] = []
    given = [[os.path.abspath(os.path.expanduser(path)) for path in paths] for paths in (images, references)]
    files = _Files()
    inspected = _inspect_all(dict.fromkeys([*given[0], *given[1]]), instrument)
    owners = _planes_of(inspected, files)
    notes += [f"{path}: left out: it belongs to {owners[path]}" for path in inspected if path in owners]
    news, refs = (list(_readable(paths, inspected, owners, notes)) for paths in given)
    rows = []
    for (spec, info), chosen in zip(news, _choose_all([i for _, i in news], [i for _, i in refs]), strict=True):
        if not chosen:
            notes.append(f"{spec}: {_why_none(info, [i for _, i in refs])}")
            continue
        rows.append(_row(spec, info, [refs[number] for number in chosen], files))
    if not rows:
        detail = "\n".join(f"  {note}" for note in notes[:20]) or "  no images given"
        raise ManifestError(f"no image has a reference:\n{detail}")
    table = pd.DataFrame(rows)
    table.insert(0, "image_id", _unique_ids(table["new"]))
    table = table.loc[:, [name for name in table if table[name].astype(bool).any()]]
    table.attrs["notes"] = notes
    return table


def covers(reference: ImageInfo, image: ImageInfo) -> NDArray[np.bool_]:
    """Which points of a grid over an image fall on a reference.

    Returns
    -------
    ndarray (GRID², ) bool
        All False where either has no WCS.
    """
    if reference.wcs is None or image.wcs is None:
        return np.zeros(GRID * GRID, bool)
    ny, nx = reference.shape
    with quiet(), np.errstate(all="ignore"):
        sky = image.wcs.all_pix2world(_grid(image.shape), 0)
        # The inverse of a distortion may not converge far from the image it was fitted on: good enough without it.
        try:
            xy = reference.wcs.all_world2pix(sky, 0, quiet=True)
        except Exception:
            xy = reference.wcs.wcs_world2pix(sky, 0)
    inside = (xy >= -0.5) & (xy <= [nx - 0.5, ny - 0.5])
    return np.asarray(inside.all(axis=1))


def _grid(shape: tuple[int, int]) -> NDArray[np.float64]:
    ny, nx = shape
    y, x = np.meshgrid(np.linspace(0, ny - 1, GRID), np.linspace(0, nx - 1, GRID), indexing="ij")
    return np.column_stack([x.ravel(), y.ravel()])


#: What the headers of a file say: of each of its images, or why it cannot be read.
Inspected = dict[str, list[tuple[str, ImageInfo]] | ReadError]


class _Files(dict[Path, frozenset[str]]):
    """Names of the files of a folder: each folder is read once, however many names are looked for."""

    def __missing__(self, folder: Path) -> frozenset[str]:
        try:
            self[folder] = frozenset(os.listdir(folder))
        except OSError:
            self[folder] = frozenset()
        return self[folder]


def _inspect_all(paths: Iterable[str], instrument: str | None) -> Inspected:
    found: Inspected = {}
    for path in paths:
        try:
            found[path] = [(spec, inspect_image(spec, profile=instrument)) for spec in image_hdus(path)]
        except ReadError as error:
            found[path] = error
    return found


def _planes_of(inspected: Inspected, files: _Files) -> dict[str, str]:
    """Given files that are the mask, the variance, … of another given one, and of which."""
    by_path = {split_hdu(given)[0]: given for given in inspected}
    owners: dict[str, str] = {}
    for path, given in by_path.items():
        images = inspected[given]
        # An image that cannot be read still owns its planes: they are no images either.
        profile = load_profile("generic") if isinstance(images, ReadError) else images[0][1].profile
        for kind in PLANES:
            for plane in find_companions(path, profile.companions, kind, files[path.parent]):
                if plane in by_path:
                    owners[by_path[plane]] = given
    return owners


def _readable(
    paths: Iterable[str], inspected: Inspected, owners: Mapping[str, str], notes: list[str]
) -> Iterator[tuple[str, ImageInfo]]:
    for path in paths:
        images = inspected[path]
        if path in owners:
            continue
        if isinstance(images, ReadError):
            notes.append(str(images))
        else:
            yield from images


def _choose_all(images: Sequence[ImageInfo], references: Sequence[ImageInfo]) -> list[list[int]]:
    """Indices of the references of each image."""
    from scipy.spatial import cKDTree  # here: 20 MB that a driver of runs never needs

    placed = [number for number, reference in enumerate(references) if reference.wcs is not None]
    if placed:
        centres, radii = zip(*(_circle(references[number]) for number in placed), strict=True)
        tree, largest = cKDTree(np.array(centres)), max(radii)
    chosen: list[list[int]] = []
    for image in images:
        if len(references) == 1 and (image.wcs is None or references[0].wcs is None):
            # Nothing says that they do not belong together: star patterns will tell.
            chosen.append([0] if _allowed(image, references[0]) else [])
            continue
        if image.wcs is None or not placed:
            chosen.append([])
            continue
        centre, radius = _circle(image)
        near = [placed[number] for number in sorted(tree.query_ball_point(centre, largest + radius))]
        chosen.append(_cover(image, references, [number for number in near if _allowed(image, references[number])]))
    return chosen


def _cover(image: ImageInfo, references: Sequence[ImageInfo], near: Sequence[int]) -> list[int]:
    """Greedily the reference that adds most, until nothing is added; of equal ones the first."""
    covered = {number: covers(references[number], image) for number in near}
    chosen: list[int] = []
    left = np.ones(GRID * GRID, bool)
    while covered:
        best = max(covered, key=lambda number: (int((covered[number] & left).sum()), -number))
        if not (covered[best] & left).any():
            break
        chosen.append(best)
        left &= ~covered.pop(best)
    return chosen


def _allowed(image: ImageInfo, reference: ImageInfo) -> bool:
    filters = image.texts["filter"], reference.texts["filter"]
    same_file = image.path == reference.path and image.hdu.index == reference.hdu.index
    return not same_file and (not all(filters) or filters[0] == filters[1])


def _circle(info: ImageInfo) -> tuple[NDArray[np.float64], float]:
    """Unit vector of the image's centre, and the chord from there to its farthest point."""
    with quiet():
        lon, lat = np.radians(info.wcs.all_pix2world(_grid(info.shape), 0)).T
    points = np.column_stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    centre = points[len(points) // 2]
    return centre, float(np.sqrt(((points - centre) ** 2).sum(axis=1)).max())


def _why_none(image: ImageInfo, references: Sequence[ImageInfo]) -> str:
    if image.wcs is None:
        return f"left out: {image.notes[0] if image.notes else 'no WCS'}, and more than one reference to choose from"
    overlapping = {reference.texts["filter"] for reference in references if covers(reference, image).any()}
    if overlapping:
        return f"left out: it is in filter {image.texts['filter']!r}, the references here in {sorted(overlapping)}"
    return f"left out: none of {len(references)} references overlaps it"


def _row(spec: str, info: ImageInfo, references: Sequence[tuple[str, ImageInfo]], files: _Files) -> dict[str, Any]:
    name = info.profile.name
    row: dict[str, Any] = {
        "new": spec,
        "ref": ";".join(reference for reference, _ in references),
        "survey": "" if name == "generic" else name,
    }
    for column, kinds in (("mask", PLANES[:1]), ("variance", PLANES[1:])):
        row[f"new_{column}"] = _companion(spec, info, kinds, files)
        planes = [_companion(reference, described, kinds, files) for reference, described in references]
        row[f"ref_{column}"] = ";".join(planes) if any(planes) else ""
    return row


def _companion(spec: str, info: ImageInfo, kinds: Sequence[str], files: _Files) -> str:
    """Path of the file with a plane of one of these kinds, if there is one; "" if not."""
    path, hdu = split_hdu(spec)
    for kind in kinds:
        for other in find_companions(path, info.profile.companions, kind, files[path.parent]):
            return f"{other}[{hdu}]" if isinstance(hdu, str) else str(other)
    return ""


def _unique_ids(specs: Iterable[str]) -> list[str]:
    """Ids from file names: the name without FITS suffixes, the HDU, and a number where names are the same."""
    ids: list[str] = []
    taken: set[str] = set()
    for spec in specs:
        path, hdu = split_hdu(spec)
        stem = re.sub(r"(\.(fits?|fts|fz|gz))+$", "", path.name, flags=re.IGNORECASE)
        name = re.sub(r"[^\w.+-]+", "_", stem if hdu is None else f"{stem}_{hdu}").strip("._") or "image"
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        ids.append(unique)
    return ids
