"""The report says what the run folder holds, in one page that needs nothing else."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from batchproc.config import Config
from batchproc.errors import UsageError
from batchproc.io.catalogue import write_scores
from batchproc.io.events import EventLog
from batchproc.io.freeze import freeze
from batchproc.io.progress import ReceiptLog, gather
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import store_image
from batchproc.records import CATALOGUE, Flag, ManifestEntry, Receipt
from batchproc.report import write_report
from batchproc.report.facts import HISTOGRAM_EDGES, gather_facts
from batchproc.report.figures import steps
from batchproc.report.stamps import triplet_png

NORMAL = np.histogram(np.random.default_rng(0).standard_normal(200_000), HISTOGRAM_EDGES)[0]


def columns(image_id, n, rng, band):
    """Plausible rows of one image."""
    values = {c.name: rng.normal(size=n) for c in CATALOGUE if c.dtype != "str"}
    values |= {c.name: np.full(n, "", dtype=object) for c in CATALOGUE if c.dtype == "str"}
    sign = rng.choice([-1, 1], n)
    values |= {
        "image_id": np.full(n, image_id, dtype=object),
        "candidate_id": np.array([f"{image_id}_{i}" for i in range(n)], dtype=object),
        "x": rng.uniform(0, 1000, n),
        "y": rng.uniform(0, 1000, n),
        "scorr": sign * rng.uniform(5, 60, n),
        "flux": sign * rng.uniform(100, 1000, n),
        "flux_err": np.full(n, 20.0),
        "mag": rng.uniform(18, 22, n),
        "flags": rng.choice([0, 0, int(Flag.EDGE | Flag.DIPOLE), int(Flag.COSMIC_RAY)], n),
        "filter": np.full(n, band, dtype=object),
        "stamp_index": np.arange(n),
    }
    return {c.name: np.asarray(values[c.name]).astype(object if c.dtype == "str" else c.dtype) for c in CATALOGUE}


def make_run(path, candidates=(12, 7), failed=(), scores=False, size=15, quality=None, name="im{}", first_seconds=1.5):
    """A run folder, written through the package's own writers."""
    folder, rng = RunFolder(path), np.random.default_rng(1)
    config = Config.from_dict({"cutouts": {"size": size}})
    ids = [name.format(i) for i in range(len(candidates))]
    names = [*ids, *(receipt.image_id for receipt in failed)]
    entries = [ManifestEntry(image_id=name, new=f"/data/{name}.fits", ref=("/data/ref.fits",)) for name in names]
    freeze(folder, entries, config, lambda: "")
    tables = []
    with ReceiptLog(folder) as log:
        for number, (image_id, n) in enumerate(zip(ids, candidates, strict=True)):
            rows = columns(image_id, n, rng, "gr"[number % 2])
            stamps = rng.normal(size=(n, 3, size, size)).astype(np.float32)
            stamps[:, ::2, size // 2, size // 2] += 50
            receipt = Receipt(
                image_id=image_id,
                status="done",
                n_candidates=n,
                seconds={"read": 0.1, "subtract": 1.5 if number else first_seconds},
                cpu_seconds=1.4,
                peak_memory_mb=300.0,
                quality={
                    "shape": [1000, 1000],
                    "fwhm_new": 3.1 + 0.01 * number,
                    "fwhm_ref": 2.5,
                    "renormalisation": 1.01,
                    "scorr_hist": NORMAL.tolist(),
                    **(quality or {}),
                },
            )
            store_image(folder, entries[number], rows, stamps, receipt, config.image_digest)
            tables.append(pd.DataFrame(rows))
        for receipt in failed:
            log.add(receipt)
    gather(folder)
    catalogue = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if scores:
        model = SimpleNamespace(name="realbogus", version="2", hash="f" * 64, fingerprint="f", normalisation="none")
        values = np.where(catalogue["flags"].to_numpy() == 0, 0.9, 0.1).astype(np.float32)
        (folder.scores / "realbogus").mkdir(parents=True)
        part = folder.scores / "realbogus" / "0.parquet"
        write_scores(
            part, catalogue["image_id"].to_numpy(object), catalogue["candidate_id"].to_numpy(object), values, model
        )
    return catalogue


EVERYTHING = {
    "n_psf_stars_new": 133,
    "n_psf_stars_ref": 213,
    "registration_rms_x": 0.043,
    "registration_rms_y": 0.037,
    "flux_ratio": 0.27,
    "masked_fraction": 0.004,
}
FAILED = Receipt("broken", "failed", stage="read", error="ReadError", message="cut off <at 5 MB>; fetch it again")
BUG = Receipt("odd", "bug", stage="process", error="KeyError", message="'x'", traceback="Traceback of the bug")


class Page(HTMLParser):
    """Elements of a page, and whether every one that was opened was closed."""

    EMPTY = frozenset({"meta", "img", "link", "br", "input"})

    def __init__(self, text):
        super().__init__()
        self.text, self.stack, self.elements = text, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def words(self):
        body = re.sub(r"<(style|svg).*?</\1>", " ", self.text, flags=re.DOTALL)
        return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def report(path, truth=None):
    page = Page(write_report(path, truth).read_text())
    assert page.stack == []
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "night-7"
    catalogue = make_run(path, failed=[FAILED, BUG], scores=True)
    return path, catalogue


@pytest.fixture(scope="module")
def page(full):
    return report(full[0])


def test_the_page_stands_alone(page):
    """Nothing is fetched: pictures are in it, no script, no style sheet, no font from elsewhere; all have words."""
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe"}
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#"))
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["aria-label"]
    assert "@import" not in page.text
    assert "url(h" not in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    targets = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert set(targets) <= set(ids)


def test_it_says_what_came_out(full, page):
    """Counts of the verdict are those of the catalogue and the receipts."""
    catalogue, words = full[1], page.words()
    real = int((catalogue["flags"] == 0).sum())
    assert "2 of 4 images done, 1 failed, 1 stopped by a bug" in words
    assert f"19 candidates above 5 σ, {real} of them likely real" in words
    assert "night-7" in words
    assert "realbogus 2" in words
    assert "cosmic ray" in words


def test_failures_say_what_to_do_and_cannot_break_the_page(full, page):
    """Messages are shown whole, with what looks like HTML in them as text; a bug comes first, with its traceback."""
    assert "cut off &lt;at 5 MB&gt;; fetch it again" in page.text
    assert "Traceback of the bug" in page.text
    assert page.text.index("Traceback of odd") > 0
    facts = gather_facts(RunFolder(full[0]))
    assert [receipt.status for receipt in facts.failures] == ["bug", "failed"]


def test_times_are_those_of_most_images_not_of_the_one_that_compiled(tmp_path):
    """The headline is the median, as that of the CPU time is."""
    make_run(tmp_path / "run", candidates=(3,) * 5, first_seconds=60.0)
    assert "1.6 s per image, median" in report(tmp_path / "run").words()


def test_each_number_of_a_step_stands_below_its_name():
    """The mean is not printed as if it were the value of the mark beside it."""
    images = pd.DataFrame({"step:read": [1.0] * 8 + [2.0, 10.0], "step:psf": [3.0] * 10})
    texts = re.findall(r"<text [^>]*>([^<]+)</text>", steps(images))
    columns = texts[texts.index("mean") :][:6]
    assert columns == ["mean", "2.00", "3.00", "90 %", "2.80", "3.00"]


def test_every_section_is_in_the_navigation(tmp_path):
    """That of the course too, once a driver wrote a log, with letters as large as those of other wide figures."""
    make_run(tmp_path / "run", failed=[FAILED])
    with EventLog(RunFolder(tmp_path / "run")) as events:
        events.write("run_begun", before=0, to_do=3, command="run")
        events.write("image_done", image_id="im0")
    page = report(tmp_path / "run")
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert "course" in sections
    assert [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"] == sections
    widths = [float(a["viewbox"].split()[2]) for _, a in page.elements if a.get("aria-label", "").startswith("Im")]
    assert widths == [pytest.approx(12.4 * 72)]


def test_the_gallery_ranks_by_score_and_sets_flagged_ones_aside(full):
    """Likely real candidates are in the first gallery, the strongest first; one of each kind of flag in the second."""
    facts = gather_facts(RunFolder(full[0]))
    strengths = [abs(c.row["scorr"]) for c in facts.best]
    assert strengths == sorted(strengths, reverse=True)
    assert all(c.score > 0.5 and not c.flags for c in facts.best)
    assert {tuple(c.flags) for c in facts.aside[:2]} == {("edge", "dipole"), ("cosmic ray",)}
    for candidate in facts.best:  # the stamps are the candidate's own: of the brightest pixel in the middle
        assert candidate.stamp.shape == (3, 15, 15)
        assert candidate.stamp[0, 7, 7] > 40


def test_the_noise_is_compared_with_a_unit_normal(full, page):
    """Histograms of all images are added; the width that is told is that of the numbers behind them."""
    facts = gather_facts(RunFolder(full[0]))
    np.testing.assert_array_equal(facts.histogram, 2 * NORMAL)
    assert re.search(r"(0\.99\d|1\.00\d) \(1 is right\)", page.words())


def test_the_same_run_gives_the_same_page(full, page):
    """Nothing but the run folder is in the report: no clock, no chance."""
    assert write_report(full[0]).read_text() == page.text


def test_known_transients_are_counted_once_and_by_sign(tmp_path):
    """Found means: within 3 pixels, with the right sign; masked ones and those of failed images are left out."""
    catalogue = make_run(tmp_path / "run", candidates=(6,), failed=[FAILED])
    rows = catalogue.iloc[:3]
    truth = pd.DataFrame(
        {
            "image_id": ["im0"] * 5 + ["broken"],
            "x": [*(rows["x"] + 0.5), 5000.0, 6000.0, 10.0],
            "y": [*rows["y"], 5000.0, 6000.0, 10.0],
            "flux": [*(rows["flux"] * [2, 2, -2]), 100.0, 100.0, 100.0],
            "snr": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0],
            "masked": [False, False, False, False, True, False],
        }
    )
    truth.to_parquet(tmp_path / "truth.parquet")
    known = gather_facts(RunFolder(tmp_path / "run"), tmp_path / "truth.parquet").truth
    assert known.table["found"].tolist() == [True, True, False, False]
    np.testing.assert_allclose(known.table["dx"][:2], -0.5)
    np.testing.assert_allclose(known.table["flux_ratio"][:2], 0.5)
    assert (known.n_masked, known.n_elsewhere) == (1, 1)
    assert known.n_false == 3  # the one of the wrong sign is at the place of a known transient all the same
    assert "2 of 4 (50.0%) found" in report(tmp_path / "run", tmp_path / "truth.parquet").words()


def test_truth_in_the_run_folder_is_found_and_a_bad_one_refused(tmp_path):
    """`truth.parquet` beside the catalogue is taken unasked; a missing or foreign table is a usage error."""
    catalogue = make_run(tmp_path / "run", candidates=(3,))
    assert "Known transients" not in report(tmp_path / "run").words()
    catalogue[["image_id", "x", "y", "flux"]].assign(snr=9.0).to_parquet(tmp_path / "run" / "truth.parquet")
    assert "3 of 3 (100.0%) found" in report(tmp_path / "run").words()
    with pytest.raises(UsageError, match="no such file"):
        write_report(tmp_path / "run", tmp_path / "nowhere.parquet")
    pd.DataFrame({"ra": [1.0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="needs the columns"):
        write_report(tmp_path / "run", tmp_path / "other.parquet")


def test_the_truth_may_be_csv_and_nothing_else(tmp_path):
    """CSV tells the same as Parquet; a broken file, words for numbers, or another kind of table is a usage error."""
    catalogue = make_run(tmp_path / "run", candidates=(3,))
    known = catalogue[["image_id", "x", "y", "flux"]].assign(snr=9.0)
    known.to_csv(tmp_path / "truth.csv", index=False)
    assert "3 of 3 (100.0%) found" in report(tmp_path / "run", tmp_path / "truth.csv").words()
    known.assign(x="left").to_csv(tmp_path / "words.csv", index=False)
    for name, content in [
        ("truth.txt", b"x"),
        ("truth.fits", b"x"),
        ("empty.csv", b""),
        ("other.parquet", b"image_id,x"),
    ]:
        (tmp_path / name).write_bytes(content)
    for name, words in [
        ("words.csv", "the column x holds .* expected numbers"),
        ("truth.txt", "unknown kind of table '.txt'; expected .csv or .parquet"),
        ("truth.fits", "unknown kind of table"),
        ("empty.csv", "not a CSV table"),
        ("other.parquet", "not a PARQUET table"),
    ]:
        with pytest.raises(UsageError, match=words):
            write_report(tmp_path / "run", tmp_path / name)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"candidates": (0, 0)}, "No candidates above the threshold."),
        ({"candidates": (), "failed": [FAILED, BUG]}, "Nothing could be searched."),
        ({"candidates": (4, 0, 5)}, "9 candidates above 5 σ"),
        ({"candidates": (1,), "size": 9}, "1 candidate above 5 σ"),
    ],
    ids=["no candidates", "all failed", "no scores", "one candidate"],
)
def test_every_outcome_has_a_page(tmp_path, keywords, said):
    """Empty, failed and tiny runs get a report too, known transients or not."""
    make_run(tmp_path / "run", **keywords)
    columns = {"image_id": "im0", "x": [500.0], "y": 500.0, "flux": 10.0, "snr": 9.0}
    pd.DataFrame(columns).to_parquet(tmp_path / "run" / "truth.parquet")
    assert said in report(tmp_path / "run").words()


def test_an_unfinished_run_says_so(tmp_path):
    """Images without a receipt are counted as not tried yet."""
    make_run(tmp_path / "run", candidates=(3, 4))
    shutil.rmtree(tmp_path / "run" / "done")
    (tmp_path / "run" / "done").mkdir()
    assert "0 of 2 images done, 2 not tried yet" in report(tmp_path / "run").words()


def test_size_does_not_grow_with_the_run(tmp_path):
    """10^5 candidates, many failures: still a page of a few megabytes."""
    failures = [Receipt(f"f{i}", "failed", stage="read", error="ReadError", message="x" * 900) for i in range(300)]
    make_run(tmp_path / "run", candidates=(20_000,) * 5, failed=failures, scores=True, size=9)
    page = report(tmp_path / "run")
    assert len(page.text.encode()) < 6e6
    assert sum(tag == "img" for tag, _ in page.elements) <= 36
    assert "240 more are in failures.parquet" in page.words()


def decode(address):
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_a_triplet_shows_gain_white_loss_black_and_no_data_apart():
    """Three panels side by side; the difference is mid-grey where nothing changed; NaN has a colour of its own."""
    rng = np.random.default_rng(3)
    stamp = rng.normal(size=(3, 63, 63)).astype(np.float32)
    stamp[:, 31, 31] += (200, 0, 200)
    stamp[:, :, :12] = np.nan
    picture = decode(triplet_png(stamp))
    assert picture.shape[:2] == (47, 3 * 47 + 4)
    new, ref, difference = picture[:, :47], picture[:, 49:96], picture[:, 98:]
    assert new[23, 23, 0] == pytest.approx(1, abs=0.01)
    assert ref[23, 23, 0] < 0.6
    assert difference[23, 23, 0] == pytest.approx(1, abs=0.01)
    assert np.median(difference[:, 10:, 0]) == pytest.approx(0.5, abs=0.02)
    assert not np.array_equal(difference[:, 0, 0], difference[:, 0, 2])
    stamp[2] *= -1
    assert decode(triplet_png(stamp))[23, 98 + 23, 0] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("fill", [np.nan, 0.0])
def test_an_empty_triplet_is_drawn_too(fill):
    """Stamps without data, or without contrast, give a picture and no warning."""
    assert triplet_png(np.full((3, 15, 15), fill, np.float32)).startswith("data:image/png")


@pytest.mark.browser
def test_a_browser_shows_it(full, tmp_path):
    """Headless Chromium paints the page: not empty, with grey stamps among it."""
    path, picture = write_report(full[0]), tmp_path / "page.png"
    in_chromium(tmp_path, path, f"--screenshot={picture}", "--window-size=1200,2000")
    assert len(np.unique(matplotlib.image.imread(picture)[..., 0])) > 100


MEASURE = """<script>
const box = document.querySelector("#images .wide"); document.title = `${box.scrollWidth} in ${box.clientWidth}`;
</script></body>"""


@pytest.mark.browser
def test_the_table_of_images_fits_a_screen_whatever_the_ids(tmp_path):
    """Its last column is not cut at 1280 pixels."""
    make_run(tmp_path / "run", quality=EVERYTHING, name="ztf_20180521123456_000123_zr_c{:02d}_o_q4")
    page = tmp_path / "page.html"
    page.write_text(write_report(tmp_path / "run").read_text().replace("</body>", MEASURE))
    shown = in_chromium(tmp_path, page, "--dump-dom", "--window-size=1280,1000")
    width, room = re.search(r"<title>(\d+) in (\d+)", shown).groups()
    assert 0 < int(width) <= int(room)


def in_chromium(folder, page, *what):
    """What headless Chromium prints of a page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium found")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
    ]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [chromium, *options, *what, page.resolve().as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
