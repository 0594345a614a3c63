"""The tiles of an image on many workers: a map in order, bounded, and the bytes of a serial run."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner

from batchproc import simulate
from batchproc.cli import cli
from batchproc.cli.texts import tell_plan
from batchproc.config import Config
from batchproc.distribute import tiles
from batchproc.distribute.clusters import Where
from batchproc.distribute.executors import WorkerDiedError
from batchproc.distribute.plan import choose_spread, images_at_once
from batchproc.distribute.tiles import TileMap, tiles_under_way
from batchproc.errors import ReadError
from batchproc.imaging.fft import frozen_wisdom, get_fft, import_wisdom
from batchproc.imaging.subtract import subtract
from batchproc.io.night import simulate_night
from batchproc.job import Steps, plan, run
from tests import _runs

STEPS = Steps(wisdom=_runs.no_wisdom, report=_runs.report)


def double(x):
    return 2 * x


def tell_place(x):
    time.sleep(0.02)
    return x, os.getpid(), threading.get_ident()


def fail(x):
    if x == 3:
        raise ReadError("tile 3", found=3)
    return x


def die(x):
    os._exit(9)


def mapped(function, n):
    """What the task of an image does: it runs on a worker, and maps."""
    return list(TileMap()(function, range(n)))


def mapped_afar(function, n):
    """The same where every worker is on a machine of its own."""
    with mock.patch.object(tiles, "_with_own_machine_here", lambda threads, address: threads):
        map_tiles = TileMap()
        return list(map_tiles(function, range(n))), map_tiles.cpu_elsewhere


def how_far_ahead(n):
    """The most inputs that had been drawn before their results were there."""
    drawn, most = 0, 0

    def inputs():
        nonlocal drawn
        for i in range(n):
            drawn += 1
            yield i

    for taken, _ in enumerate(TileMap()(tell_place, inputs())):
        most = max(most, drawn - taken)
    return most


@pytest.fixture
def client(dask_executor):
    return dask_executor.client


@pytest.fixture(scope="module")
def pair():
    """Large enough for four tiles of 512."""
    return simulate.simulate_pair((760, 800), seed=5, n_transients=10)


def subtracted(pair, map_tiles=None):
    """Bytes of everything that a subtraction gives."""
    found = subtract(
        pair.new,
        pair.ref,
        pair.psf_new,
        pair.psf_ref,
        rms_new=np.full(pair.new.shape, pair.sigma_new, np.float32),
        rms_ref=np.full(pair.new.shape, pair.sigma_ref, np.float32),
        flux_ratio=pair.flux_ratio,
        variance_new=pair.variance_new,
        variance_ref=pair.variance_ref,
        mask_new=pair.mask_new,
        mask_ref=pair.mask_ref,
        registration_sigma=(0.02, 0.03),
        tile=512,
        map_tiles=map_tiles,
    )
    d = found.difference
    kernels = [plane.tobytes() for k in d.kernels for plane in (k.psf, k.delta_new, k.delta_ref)]
    numbers = (found.renormalisation, found.residuals, [(k.f_d, k.f_s, k.x0, k.y0) for k in d.kernels])
    assert len(d.kernels) >= 4
    return [getattr(d, name).tobytes() for name in ("difference", "score_corr", "flux", "flux_err")], kernels, numbers


def in_threads(function, inputs):
    with ThreadPoolExecutor(3) as pool:
        yield from pool.map(function, inputs)


def test_tiles_have_the_same_bytes_wherever_they_are_computed(pair, client):
    """Here, in threads, and in other processes: every pixel, kernel and number of the subtraction."""
    expected = subtracted(pair)
    assert subtracted(pair, map) == expected
    assert subtracted(pair, in_threads) == expected
    assert subtracted(pair, TileMap(client=client)) == expected


def test_the_map_is_the_builtin_one(client):
    """From the driver as from within a task, results come back whole and in the order of the inputs."""
    expected = list(map(double, range(20)))
    assert list(TileMap(client=client)(double, range(20))) == expected
    assert client.submit(mapped, double, 20, pure=False).result() == expected
    assert client.submit(mapped, double, 0, pure=False).result() == []


def test_tiles_stay_on_their_machine_in_as_many_threads_as_it_has_workers(client):
    """In the process that has the image: no pixel is sent next door."""
    found = client.submit(mapped, tell_place, 24, pure=False).result()
    assert [x for x, _, _ in found] == list(range(24))
    assert len({process for _, process, _ in found}) == 1
    assert len({thread for _, _, thread in found}) == 2


def test_tiles_go_to_the_workers_of_other_machines(client):
    """In about equal parts, to that of the task too, which waits; what they spend elsewhere is known."""
    found, cpu_elsewhere = client.submit(mapped_afar, tell_place, 24, pure=False).result()
    assert [x for x, _, _ in found] == list(range(24))
    processes = [process for _, process, _ in found]
    assert len(set(processes)) == 2
    assert all(processes.count(process) >= 6 for process in set(processes))
    assert 0 < cpu_elsewhere < 5


def test_machines_are_told_apart_by_their_address():
    """Threads of workers next door count as our own; others keep theirs."""
    threads = {"tcp://10.0.0.1:1": 1, "tcp://10.0.0.1:2": 2, "tls://10.0.0.2:1": 4, "tcp://[::1]:7": 1}
    assert tiles._with_own_machine_here(threads, "tcp://10.0.0.1:2") == {
        "": 3,
        "tls://10.0.0.2:1": 4,
        "tcp://[::1]:7": 1,
    }


def test_no_more_frames_are_drawn_than_keep_the_workers_busy(client):
    """However many tiles there are, two for each worker are under way."""
    assert client.submit(how_far_ahead, 40, pure=False).result() == tiles_under_way(2) == 4


def test_several_images_share_the_workers(client):
    """More images than workers, all waiting for tiles at once, do not block one another."""
    futures = [client.submit(mapped, double, n, pure=False) for n in (5, 6, 7, 8, 9)]
    assert [len(future.result(timeout=60)) for future in futures] == [5, 6, 7, 8, 9]
    futures = [client.submit(mapped_afar, double, n, pure=False) for n in (5, 6, 7, 8, 9)]
    assert [len(future.result(timeout=60)[0]) for future in futures] == [5, 6, 7, 8, 9]


def test_an_error_of_a_tile_is_raised_where_it_was_asked_for(client):
    """With its type and its numbers; the workers go on."""
    for where in (mapped, mapped_afar):
        with pytest.raises(ReadError, match="tile 3") as caught:
            client.submit(where, fail, 9, pure=False).result()
        assert caught.value.metadata == {"found": 3}
    assert client.submit(mapped, double, 3, pure=False).result() == [0, 2, 4]


def test_nothing_is_left_on_the_cluster(client):
    """Neither frames nor results are kept once they have been taken."""
    client.submit(mapped_afar, double, 20, pure=False).result()
    deadline = time.monotonic() + 10
    while any(client.has_what().values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(client.has_what().values())


def test_a_worker_that_dies_under_a_tile_is_told_apart(client):
    """Not an error of the image: the campaign tries it again."""
    with pytest.raises(WorkerDiedError, match="tile"):
        list(TileMap(client=client)(die, range(1)))
    client.wait_for_workers(2, timeout=30)


@pytest.mark.parametrize(
    ("wanted", "n_images", "workers", "pixels", "expected"),
    [
        ("auto", 1, 2, 2**26, "tiles"),
        ("auto", 7, 8, 2**26, "tiles"),
        ("auto", 2, 2, 2**26, "images"),  # every worker has an image
        ("auto", 1, 8, 2**20, "images"),  # too small to pay
        ("auto", 1, 8, 0, "images"),  # nobody knows how large
        ("auto", 1, 1, 2**26, "images"),
        ("tiles", 100, 2, 2**20, "tiles"),
        ("tiles", 1, 1, 2**26, "images"),  # nobody to share with
        ("images", 1, 8, 2**26, "images"),
    ],
)
def test_what_is_spread_depends_on_the_campaign(wanted, n_images, workers, pixels, expected):
    """Tiles where workers would be idle and images are large, unless the user says otherwise."""
    assert choose_spread(wanted, n_images, workers, pixels) == expected


def test_images_under_way_when_tiles_are_spread():
    """All where they are fewer than workers; one by one otherwise, as who asks for that has large images."""
    assert [images_at_once(n, 4) for n in (1, 3, 4, 100)] == [1, 3, 1, 1]


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return simulate_night(tmp_path_factory.mktemp("night"), n_images=1, size=560, seed=4)


def test_a_run_has_the_same_bytes_with_its_tiles_spread(night, tmp_path, dask_executor):
    """Catalogue and stamps of a run that spreads tiles are those of a serial one, and either can be continued as the
    other.
    """
    config = Config.from_dict({"subtract": {"tile": 256}, "classify": {"model": ""}})
    address = dask_executor.client.scheduler.address
    serial = run(night, tmp_path / "a", config=config, cluster="serial", quiet=True, steps=STEPS)
    tiles = run(night, tmp_path / "b", config=config, cluster=address, spread="tiles", quiet=True, steps=STEPS)
    assert serial.exit_code == tiles.exit_code == 0
    assert serial.status.n_candidates > 5

    def contents(folder):
        files = [path for name in ("catalogue", "stamps") for path in (folder / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    again = run(night, tmp_path / "b", config=config, cluster="serial", spread="images", quiet=True, steps=STEPS)
    assert again.processed == 0


def test_an_image_whose_tile_killed_a_worker_is_tried_again_and_then_fails(tmp_path, dask_executor):
    """It is a failure with a reason, not a bug of ours."""
    address = dask_executor.client.scheduler.address
    steps = replace(STEPS, process=deadly)
    summary = run(
        _runs.entries("n3"), tmp_path, config=_runs.CONFIG, cluster=address, spread="tiles", quiet=True, steps=steps
    )
    assert (summary.exit_code, summary.status.failed, summary.status.bugs) == (1, 1, 0)
    dask_executor.client.wait_for_workers(2, timeout=30)


def deadly(entry, config, *, map_tiles=map):
    """An image whose tiles are fatal, on other workers and in a process of its own."""
    return list(map_tiles(die, range(1)))


def test_the_plan_says_what_is_spread(night, tmp_path):
    """And how large the images are, and the memory of the tiles; nothing is computed for that."""
    found = plan(night, tmp_path / "run", config=Config())
    assert found.need.pixels == 560**2
    assert found.spread(2) == "images"
    forced = plan(night, tmp_path / "run", config=Config(), spread="tiles")
    assert (forced.spread(2), forced.spread(1)) == ("tiles", "images")
    assert forced.tile_bytes(4) == 2 * forced.tile_bytes(2) > 4 * 1024**2
    assert not (tmp_path / "run").exists()


def test_threads_prepare_once(tmp_path):
    """Two threads of a worker that come for the same run together do not take FFTW's plans over twice."""
    from batchproc.distribute import tasks

    folder = _runs.begin(tmp_path, "n1")
    job = tasks.Job(str(folder.path), folder.identity(), here=True)
    tasks._prepare_once.cache_clear()
    barrier = threading.Barrier(4)

    def prepare(_):
        barrier.wait()
        return tasks.prepare(job)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(prepare, range(4)))
    assert tasks._prepare_once.cache_info().misses == 1


def test_a_worker_on_another_processor_estimates(tmp_path):
    """Wisdom of the driver that FFTW does not accept here costs time, and no image."""
    from batchproc.distribute import tasks

    folder = _runs.begin(tmp_path, "n1")
    folder.wisdom_file.write_text('["bm8=", "bm8=", "bm8="]')
    job = tasks.Job(str(folder.path), folder.identity(), here=True)
    try:
        tasks.prepare(job)
        transform = get_fft((96, 96))
        real = np.random.default_rng(0).normal(size=(96, 96)).astype(np.float32)
        np.testing.assert_allclose(transform.forward(real.copy(), transform.half()), np.fft.rfft2(real), atol=1e-3)
    finally:
        tasks._prepare_once.cache_clear()
        import_wisdom(frozen_wisdom())  # for the tests that follow


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--spread", "tiles", "--workers", "4"], "are spread over 4 workers"),
        (["--spread", "tiles", "--cluster", "serial"], "1 task, an image each; 1 at a time"),
        (["--workers", "4"], "1 task, an image each; 1 at a time"),
    ],
)
def test_the_dry_run_says_what_is_spread(night, tmp_path, options, said):
    """In a line, before anything is begun."""
    result = CliRunner().invoke(cli, ["run", str(night), "--out", str(tmp_path / "run"), "--dry-run", *options])
    assert result.exit_code == 0, result.output
    assert said in result.output


def test_the_dry_run_counts_the_threads_of_each_worker(night, tmp_path):
    """As many workers as the run would have: one for so many cores."""
    found = plan(night, tmp_path / "run", config=Config(threads=4096), spread="tiles")
    assert "1 task, an image each; 1 at a time" in tell_plan(found, Where("local"))
