"""Manifests: read whole or refused whole, checked against the files, built from lists of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import ManifestError
from batchproc.io.images import read_new, read_refs
from batchproc.io.manifest import build_manifest, check_manifest, manifest_digest, read_manifest, write_manifest
from batchproc.io.night import simulate_night
from batchproc.records import ManifestEntry
from tests.io.fitsfiles import CARDS, SHAPE, sky, write, write_mef

SUFFIXES = [".csv", ".ecsv", ".parquet"]


def manifest(folder: Path, text: str) -> Path:
    path = folder / "m.csv"
    path.write_text(text)
    return path


# ---- the table


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str) -> None:
    """In every format: paths, several references, numbers to the last digit, and what is not there."""
    entries = [
        ManifestEntry(
            "a",
            str(tmp_path / "new.fits[1]"),
            (str(tmp_path / "r1.fits"), str(tmp_path / "r2.fits")),
            survey="ztf",
            ref_mask=("", str(tmp_path / "m.fits")),
            gain=1.1,
            mjd=58249.96631944412,
            ccd="07",
        ),
        ManifestEntry("b", str(tmp_path / "n.fits"), (str(tmp_path / "r.fits"),), new_psf=str(tmp_path / "p.psf")),
    ]
    path = tmp_path / f"m{suffix}"
    write_manifest(entries, path)
    assert read_manifest(path) == entries


def test_relative_paths_start_at_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the user happens to be; ~ is the home folder, absolute paths stay."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/me")
    path = manifest(tmp_path, "image_id,new,ref\na,sub/n.fits[1],/x/r.fits ; ~/s.fits;\n")
    (entry,) = read_manifest(path)
    assert entry.new == f"{tmp_path}/sub/n.fits[1]"
    assert entry.ref == ("/x/r.fits", "/home/me/s.fits")
    monkeypatch.chdir(tmp_path)
    assert read_manifest("m.csv") == [entry]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    """With its row, so that one round of corrections is enough."""
    path = manifest(
        tmp_path,
        "image_id,new,ref,gain,mjd,ref_mask,refs\n"
        "a,n.fits,r.fits,1.5,58000,,\n"
        "a,n.fits,r.fits,,,,\n"
        ",n.fits,r.fits,,,,\n"
        "d,,,,,,\n"
        "e,n.fits,r.fits,zero,2458000,,\n"
        "f,n.fits,r.fits;s.fits,-1,,m.fits,\n"
        "g,n.fits;o.fits,s3://bucket/r.fits,,,,\n",
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    message = str(caught.value)
    for words in (
        "11 problems",
        "row 1 (a): image_id 'a' is there 2 times",
        "row 2 (a): image_id 'a' is there 2 times",
        "row 3: image_id is empty",
        "row 4 (d): new is empty",
        "row 4 (d): ref is empty",
        "row 5 (e): gain = 'zero': expected a number, positive",
        "row 5 (e): mjd = '2458000'",
        "row 6 (f): gain = '-1'",
        "row 6 (f): ref_mask has 1 paths for 2 references",
        "row 7 (g): new has 2 paths; expected one",
        "row 7 (g): ref is an address",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", "image_id,new,ref\n", "no rows"),
        ("m.csv", "", "empty; expected a header line"),
        ("m.csv", "image_id,new\na,b\n", "no column ref; found image_id, new"),
        ("m.csv", "image_id,new,ref\na,b,c,d\n", "expected 3 fields in each row, not so in row 1"),
        ("m.csv", "image_id,new,ref,ref\na,b,c,d\n", "column ref is there more than once"),
        ("m.csv", "image_id;new;ref\na;b;c\n", "separated by ';'"),
        ("m.csv", "image_id,new,ref,new_maks\na,b,c,d\n", "did you mean 'new_mask'"),
        ("m.csv", "image_id,new,ref,Gain\na,b,c,d\n", "did you mean 'gain'"),
        ("m.txt", "image_id,new,ref\na,b,c\n", r"unknown kind of table '.txt'; expected .csv, .ecsv or .parquet"),
        ("m.parquet", "image_id,new,ref\na,b,c\n", "not a PARQUET table"),
        ("m.ecsv", "image_id,new,ref\na,b,c\n", "not a ECSV table"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, name: str, content: str, words: str) -> None:
    """A manifest that cannot be used at all says why."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=words):
        read_manifest(tmp_path / name)


def test_a_missing_manifest(tmp_path: Path) -> None:
    """Is a ManifestError, not a traceback."""
    for suffix in SUFFIXES:
        with pytest.raises(ManifestError, match="no such file"):
            read_manifest(tmp_path / f"m{suffix}")


def test_other_columns_are_left_out_and_said_so(tmp_path: Path) -> None:
    """Surveys keep more in their tables than we need."""
    path = manifest(tmp_path, "image_id,new,ref,field\na,n.fits,r.fits,881\n")
    assert len(read_manifest(path)) == 1
    assert any("'field'" in str(p) and p.level == "note" for p in check_manifest(path, read_headers=False))


def test_ids_of_any_kind(tmp_path: Path) -> None:
    """Whole numbers with gaps elsewhere in a Parquet table stay whole; spreadsheets' byte-order marks are ignored."""
    table = pd.DataFrame({"image_id": [1, 2], "new": ["a", "b"], "ref": ["r", "r"], "ccd": [3.0, np.nan]})
    table.to_parquet(tmp_path / "m.parquet")
    first, second = read_manifest(tmp_path / "m.parquet")
    assert (first.image_id, first.ccd, second.ccd) == ("1", "3", None)
    (tmp_path / "m.csv").write_text("image_id,new,ref\na b/c,n,r\n", encoding="utf-8-sig")
    assert read_manifest(tmp_path / "m.csv")[0].image_id == "a b/c"
    with pytest.raises(ManifestError, match="printable"):
        read_manifest(manifest(tmp_path, f"image_id,new,ref\n{'x' * 300},n,r\n"))


@given(order=st.permutations(range(4)), changed=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_the_digest_is_of_the_set_of_rows(order: list[int], changed: int) -> None:
    """Any order gives the same digest; any change another."""
    entries = [ManifestEntry(f"i{number}", f"/n{number}", ("/r",)) for number in range(4)]
    digest = manifest_digest(entries)
    assert manifest_digest([entries[number] for number in order]) == digest
    other = list(entries)
    other[changed] = replace(other[changed], gain=2.0)
    assert manifest_digest(other) != digest
    assert manifest_digest(entries[:3]) != digest


# ---- against the files


def levels(path: Path, **options: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"error": [], "warning": [], "note": []}
    for problem in check_manifest(path, **options):
        found[problem.level].append(str(problem))
    return found


def test_a_good_manifest_has_only_notes(tmp_path: Path) -> None:
    """The profile that was recognised is said once for all images."""
    for name in ("n1.fits", "n2.fits", "r.fits"):
        write(tmp_path / name)
    found = levels(manifest(tmp_path, "image_id,new,ref\na,n1.fits,r.fits\nb,n2.fits,r.fits\n"))
    assert found == {"error": [], "warning": [], "note": ["profile generic (2 images, the first in row 1)"]}


def test_check_finds_what_would_fail(tmp_path: Path) -> None:
    """Missing and broken files, raw frames, unknown units, no overlap: the same words as the run would have."""
    write(tmp_path / "good.fits")
    write(tmp_path / "raw.fits", PROCTYPE="raw")
    write(tmp_path / "unit.fits", BUNIT="nJy")
    write(tmp_path / "far.fits", CRVAL2=50.0)
    write(tmp_path / "bare.fits", GAIN=None, **{"MJD-OBS": None})
    (tmp_path / "broken.fits").write_bytes(b"")
    text = "image_id,new,ref\n" + "".join(
        f"{name},{name}.fits,{ref}.fits\n"
        for name, ref in [
            ("good", "good"), ("gone", "good"), ("raw", "good"), ("unit", "good"), ("far", "good"), ("bare", "lost"),
            ("broken", "good"),
        ]
    )  # fmt: skip
    path = manifest(tmp_path, text)
    found = levels(path)
    errors = "\n".join(found["error"])
    for words in (
        "row 2 (gone): new: no such file",
        "row 3 (raw): new: ",
        "PROCTYPE = 'raw' marks a raw frame",
        "row 4: new: ",
        "pixels in 'nJy'",
        "row 5: ref does not overlap new",
        "row 6 (bare): ref: no such file",
        "row 7 (broken): new: ",
        "empty (0 bytes)",
    ):
        assert words in errors
    assert len(found["error"]) == 6
    assert any("assumed: gain = 1" in line for line in found["warning"])
    assert any("no time in the header" in line for line in found["warning"])
    quick = levels(path, read_headers=False)
    assert len(quick["error"]) == 2
    assert not quick["warning"]


def test_check_of_a_bad_table_does_not_raise(tmp_path: Path) -> None:
    """It is a finding like the others."""
    found = levels(manifest(tmp_path, "image_id,new\na,b\n"))
    assert len(found["error"]) == 1
    repeated = levels(manifest(tmp_path, "image_id,new,ref\na,n,r\nb,n,r\n"), read_headers=False)
    assert any("new is that of row 1 too" in line for line in repeated["warning"])


# ---- built from files


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., str]:
    """Write an image whose centre lies so many pixels from the origin."""

    def put(name: str, dx: float = 0, dy: float = 0, **cards: object) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return str(write(tmp_path / name, CRPIX1=25.0 - dx, CRPIX2=20.0 - dy, **cards))

    return put


def test_each_image_gets_the_references_that_cover_it(place: Callable[..., str], tmp_path: Path) -> None:
    """One where one is enough, two where it takes two, none of another filter; the rest is reported."""
    images = [
        place("inside.fits"),
        place("between.fits", dx=30),
        place("far.fits", dx=5000),
        place("green.fits", FILTER="g"),
    ]
    references = [
        place("r0.fits"),
        place("r1.fits", dx=50),
        place("r2.fits", dx=-400),
        place("r3.fits", FILTER="i"),
        place("r4.fits", dx=2),
    ]
    table = build_manifest(images, references)
    assert table["image_id"].tolist() == ["inside", "between"]
    assert table["ref"].tolist() == [references[0], f"{references[1]};{references[0]}"]
    notes = "\n".join(table.attrs["notes"])
    assert "far.fits: left out: none of 5 references overlaps it" in notes
    assert "green.fits: left out: it is in filter 'g', the references here in ['i', 'r']" in notes
    write_manifest(table, tmp_path / "m.parquet")
    entries = read_manifest(tmp_path / "m.parquet")
    assert read_new(entries[1]).shape == SHAPE
    assert len(read_refs(entries[1])) == 2


def test_no_reference_at_all_is_an_error(place: Callable[..., str]) -> None:
    """That says why, for each image."""
    with pytest.raises(ManifestError, match=r"no image has a reference:\n.*a\.fits: left out: none of 1"):
        build_manifest([place("a.fits")], [place("r.fits", dx=900)])
    with pytest.raises(ManifestError, match=r"missing\.fits: no such file"):
        build_manifest(["missing.fits"], [place("r2.fits")])


def test_an_image_is_not_its_own_reference(place: Callable[..., str]) -> None:
    """With one list for both, each is subtracted from another."""
    both = [place("e1.fits"), place("e2.fits")]
    table = build_manifest(both, both)
    assert table["ref"].tolist() == both[::-1]


def test_ids_are_made_unique(place: Callable[..., str]) -> None:
    """Files of the same name in different folders, and names that no file should have."""
    images = [place("n1/a.fits"), place("n2/a.fits.gz"), place("n2/a b(1).fits")]
    assert build_manifest(images, [place("r.fits")])["image_id"].tolist() == ["a", "a_2", "a_b_1"]


def test_every_ccd_is_a_row(tmp_path: Path) -> None:
    """A multi-extension exposure becomes one row for each CCD, with the file of masks that its survey has."""
    wcs = {key: value for key, value in CARDS.items() if key[:2] in ("CT", "CR", "CD", "CU")}
    hdus = [(name, sky(), wcs | {"CRPIX1": 25.0 - 50 * number}) for number, name in enumerate(("N1", "N2"))]
    primary = CARDS | {"INSTRUME": "DECam"}
    exposure = write_mef(tmp_path / "c4d_ooi_r.fits", hdus, primary)
    mask = write_mef(tmp_path / "c4d_ood_r.fits", [(n, np.eye(*SHAPE, dtype=np.uint8), {}) for n in ("N1", "N2")], {})
    template = write_mef(tmp_path / "template.fits", hdus, primary)
    table = build_manifest([exposure], [template])
    assert table["image_id"].tolist() == ["c4d_ooi_r_N1", "c4d_ooi_r_N2"]
    assert table["ref"].tolist() == [f"{template}[N1]", f"{template}[N2]"]
    assert table["new_mask"].tolist() == [f"{mask}[N1]", f"{mask}[N2]"]
    assert "new_variance" not in table
    assert set(table["survey"]) == {"decam"}
    write_manifest(table, tmp_path / "m.csv")
    assert read_new(read_manifest(tmp_path / "m.csv")[1]).mask.sum() == min(SHAPE)


@pytest.mark.parametrize(
    ("image", "mask", "variance"),
    [
        ("x.fits", "x_mask.fits", "x_variance.fits"),
        ("x.fits", "x.mask.fits.fz", "x.weight.fits"),
        ("x.fits.fz", "x_mask.fits.fz", "x_var.fits.gz"),
        ("x.fits.gz", "x.msk.fits", "x.rms.fits.gz"),
        ("x.fit", "x_dq.fit", "x_weight.fit"),
    ],
)
def test_planes_are_no_images(place: Callable[..., str], image: str, mask: str, variance: str) -> None:
    """With everything of a folder given, each plane goes to its image, however compressed, and is no row of its own."""
    given = [place(f"night/{name}") for name in (variance, mask, image)] + [place("night/lonely_mask.fits")]
    reference, ref_mask = place("refs/r.fits"), place("refs/r_mask.fits")
    table = build_manifest(given, [reference, ref_mask])
    assert table["new"].tolist() == given[2:]
    assert table["new_mask"].tolist() == [given[1], ""]
    assert table["new_variance"].tolist() == [given[0], ""]
    assert set(table["ref"]) == {reference}
    assert set(table["ref_mask"]) == {ref_mask}
    owners = [(given[0], given[2]), (given[1], given[2]), (ref_mask, reference)]
    assert table.attrs["notes"] == [f"{plane}: left out: it belongs to {owner}" for plane, owner in owners]


def test_weights_and_rms_are_known_by_their_names(tmp_path: Path) -> None:
    """Without an EXTNAME the file's name tells what it holds; of the sky alone, so sources are still to be added."""
    image = write(tmp_path / "x.fits")
    for name, value, sources in [("x_var.fits", 25, True), ("x.weight.fits", 1 / 25, False), ("x_rms.fits", 5, False)]:
        plane = write(tmp_path / name, np.full(SHAPE, value, np.float32))
        read = read_new(ManifestEntry(image_id="x", new=str(image), ref=("r",), new_variance=str(plane)))
        np.testing.assert_allclose(read.variance, 25 * 2**2, rtol=1e-6)
        assert read.meta["variance_has_sources"] is sources


def test_a_simulated_night_is_found_again_from_its_folder(tmp_path: Path) -> None:
    """All files of images/ and references/ give the rows that the simulation wrote: files, extensions and masks."""
    written = read_manifest(simulate_night(tmp_path, n_images=6, size=256, n_transients=1))
    images, references = (sorted((tmp_path / name).iterdir()) for name in ("images", "references"))
    write_manifest(build_manifest(images, references), tmp_path / "built.csv")
    built = read_manifest(tmp_path / "built.csv")
    assert {(e.new, e.ref, e.new_mask) for e in built} == {(e.new, e.ref, e.new_mask) for e in written}


def test_one_reference_without_a_wcs_is_taken(place: Callable[..., str]) -> None:
    """Star patterns will tell; of several, none can be chosen."""
    image, plain = place("a.fits"), place("r.fits", CTYPE1=None)
    assert build_manifest([image], [plain])["ref"].tolist() == [plain]
    with pytest.raises(ManifestError, match="none of 2 references"):
        build_manifest([image], [plain, place("s.fits", CTYPE1=None)])
    with pytest.raises(ManifestError, match="more than one reference to choose from"):
        build_manifest([plain], [image, place("t.fits", dx=1)])


def test_the_instrument_can_be_named(place: Callable[..., str], tmp_path: Path) -> None:
    """Where headers do not tell; but a run must be able to find it by that name."""
    image, reference = place("a.fits"), place("r.fits")
    assert build_manifest([image], [reference], instrument="goto")["survey"].tolist() == ["goto"]
    (tmp_path / "mine.toml").write_text("[gain]\ndefault = 2.0\n")
    with pytest.raises(ManifestError, match="BATCHPROC_INSTRUMENTS"):
        build_manifest([image], [reference], instrument=str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("ra", [0.0, 180.0, 359.999])
@pytest.mark.parametrize("dec", [-89.995, 0.0, 89.995])
def test_overlap_holds_everywhere_on_the_sky(place: Callable[..., str], ra: float, dec: float) -> None:
    """Across RA 0 and at the poles too."""
    image = place("a.fits", dx=20, dy=10, CRVAL1=ra, CRVAL2=dec)
    near, far = place("r.fits", CRVAL1=ra, CRVAL2=dec), place("s.fits", dx=120, CRVAL1=ra, CRVAL2=dec)
    assert build_manifest([image], [far, near])["ref"].tolist() == [near]


@pytest.mark.realdata
def test_real_images_make_a_manifest(tmp_path: Path) -> None:
    """The GOTO pair, through a manifest."""
    folder = Path(os.environ.get("BATCHPROC_TEST_DATA", "")) / "images" / "goto"
    if not (folder / "epoch1.fits").is_file():
        pytest.skip("no GOTO images: BATCHPROC_TEST_DATA is not set, or has none")
    table = build_manifest([folder / "epoch2.fits"], [folder / "epoch1.fits"])
    write_manifest(table, tmp_path / "m.ecsv")
    assert [problem.level for problem in check_manifest(tmp_path / "m.ecsv")].count("error") == 0
    (entry,) = read_manifest(tmp_path / "m.ecsv")
    assert (entry.image_id, entry.survey) == ("epoch2", "goto")


def test_reading_changes_no_file(tmp_path: Path) -> None:
    """Checking opens files for reading only."""
    path = write(tmp_path / "n.fits")
    os.chmod(path, 0o444)
    before = path.read_bytes(), path.stat().st_mtime_ns
    check_manifest(manifest(tmp_path, "image_id,new,ref\na,n.fits,n.fits\n"))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert fits.getheader(path)["GAIN"] == 2.0
