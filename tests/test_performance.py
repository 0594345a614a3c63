"""What `docs/performance.md` promises: the cheap part always, the whole with ``-m slow``.

Times are CPU seconds, the least of several calls, beside float32 transforms in the same process between the same
calls: a loaded machine slows both alike.
"""

from __future__ import annotations

import os

import pytest

from tests.benchmarks import performance, resampling
from tests.benchmarks._fresh import cpu_and_wall, rfft2_plan, run_fresh
from tests.benchmarks._pairs import count, load_pair, make_pair
from tests.benchmarks.contenders import FLOOR_TRANSFORMS, subtract_full
from tests.benchmarks.scaling import laid_out


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory):
    return make_pair(str(tmp_path_factory.mktemp("pair")), "plain", 1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return os.environ.get("BATCHPROC_BENCH_DATA") or str(tmp_path_factory.mktemp("bench"))


def test_a_subtraction_costs_hardly_more_than_its_transforms(small_pair):
    """D, S, S_corr, flux and error of 2048² pixels take at most 2.5 times the CPU time of 15 float32 transforms.

    A few rounds may all have been disturbed by others; a subtraction that is too slow stays so in all ten.
    """
    pair = load_pair(**small_pair)
    work, score_of = subtract_full(pair, hard=False)
    found = count(score_of(work()), pair)
    assert found["found"] >= 0.9 * found["expected"], "what is fast must be right as well"
    work, _ = subtract_full(laid_out(pair, 2048), hard=False)
    transform = rfft2_plan((2048, 2048))
    work()
    transform.execute()
    cost, floor = [], []
    for rounds in range(10):
        cost.append(cpu_and_wall(work)[1])
        floor.append(cpu_and_wall(lambda: [transform.execute() for _ in range(FLOOR_TRANSFORMS)])[1])
        if rounds >= 2 and min(cost) <= 2.5 * min(floor):
            break
    assert min(cost) <= 2.5 * min(floor)


def test_a_subtraction_takes_little_memory(small_pair):
    """2048² pixels: at most 0.25 GB above the inputs, all that comes out included."""
    row = run_fresh("tests.benchmarks.scaling:measure", side=2048, repeat=1, **small_pair)
    assert 60 < row["MB"] <= 250  # four float32 planes of 17 MB come out


@pytest.mark.slow
def test_cost_and_memory_by_size(small_pair):
    """The cost of a pixel is the same from 1024² to 8192² within 20 %; 4096² takes at most 0.6 GB above its inputs."""
    rows = {
        side: run_fresh("tests.benchmarks.scaling:measure", side=side, repeat=4, **small_pair)
        for side in (1024, 2048, 4096, 8192)
    }
    assert rows[4096]["MB"] <= 600
    costs = [row["CPU per Mpix"] for row in rows.values()]
    assert max(costs) <= 1.2 * min(costs)


@pytest.mark.slow
def test_a_subtraction_beside_its_peer(data):
    """2048²: at most twice the transform floor, and an eighth of stdpipe's CPU time for the same finds."""
    pair = run_fresh("tests.benchmarks._pairs:make_pair", data=data, kind="plain")
    ours = run_fresh("tests.benchmarks.contenders:measure", name="subtract, all on", repeat=6, **pair)
    assert ours["CPU"] <= 2 * FLOOR_TRANSFORMS * ours["rfft2"]
    theirs = run_fresh("tests.benchmarks.contenders:measure", name="stdpipe", repeat=2, **pair)
    if "absent" in theirs:
        pytest.skip("stdpipe is not installed (the extra 'bench')")
    assert ours["CPU"] <= theirs["CPU"] / 8
    assert ours["found"] >= theirs["found"]
    assert ours["false"] <= theirs["false"]


@pytest.mark.slow
def test_the_whole_chain(data):
    """A quadrant of 3080 × 3072, files to files without classification: at most 0.6 CPU seconds a megapixel, warm."""
    entry = run_fresh("tests.benchmarks.stages:prepare", data=data, shape=[3080, 3072])
    numbers = run_fresh("tests.benchmarks.stages:measure", entry=entry, repeat=3)
    assert numbers["warm"]["total"] / numbers["Mpix"] <= 0.6


def test_the_tables_find_their_place_on_the_page(tmp_path):
    """What was measured replaces what was there, and nothing else; a page without its markers is refused."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n")
    performance.write("new", page)
    performance.write("newer", page)
    text = page.read_text()
    assert text == f"before\n{performance.BEGIN}\n\nnewer\n\n{performance.END}\nafter\n"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the lines"):
        performance.write("new", page)


def test_a_program_that_is_not_installed_is_said_so(monkeypatch):
    """A missing contender gives a row that names it, and nothing fails."""
    monkeypatch.setenv("PATH", "")
    row = resampling.measure("SWarp", side=128)
    assert row == {"absent": "SWarp"}
    assert performance._why(row) == ["not installed (SWarp)"]


def test_a_process_that_fails_says_why():
    """Its last words come back to whoever started it."""
    with pytest.raises(RuntimeError, match=r"_fresh:nothing: AttributeError.*nothing"):
        run_fresh("tests.benchmarks._fresh:nothing")


def test_the_page_has_its_place_for_the_tables():
    """`make bench ARGS=--write` will find it."""
    text = performance.PAGE.read_text()
    assert text.count(performance.BEGIN) == text.count(performance.END) == 1
