"""How many files a run leaves on the disk, and how quickly its images are found among them."""

from __future__ import annotations

import pytest

from batchproc.io.index import read_index
from batchproc.io.packs import PACK_IMAGES
from tests.benchmarks.storage import CANDIDATES, cpu_seconds, files_of_a_run, list_done, marked_run


def test_a_run_leaves_few_files(tmp_path):
    """Five a pack and some that every run has: less than one per 20 of 10⁵ images, scored by three models."""
    files = files_of_a_run(tmp_path / "run", 150)
    assert files.packs == 1
    assert files.left <= 5 + 30
    assert files.at(100_000, models=3) <= 100_000 / 20
    assert files.most <= files.left + 5 * PACK_IMAGES


@pytest.mark.slow
def test_the_cost_of_finding_images_is_linear(tmp_path):
    """Ten times the images take ten times as long, and 10⁵ of them less than two seconds."""
    small, large = (marked_run(tmp_path / str(n), n) for n in (10_000, 100_000))
    for look in (read_index, list_done):
        look(small)
        seconds = cpu_seconds(look, large)
        assert seconds < 2
        assert seconds < 30 * min(cpu_seconds(look, small) for _ in range(3))
    assert len(read_index(large)) == 100_000 * CANDIDATES
