"""A short run of benchmarks/loader.py and benchmarks/host_overhead.py, part by part."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from dinov2_toolkit.benchmarks import host_overhead, loader
from dinov2_toolkit.train.data.images import image_set


def test_workers_bring_the_same_batches_and_the_memory_is_watched(tmp_path: Path) -> None:
    paths = loader.make_images(tmp_path, (50, 40), 8)
    assert min(loader.loaded(paths * 8, 4, 2)) > 0
    digests = {loader.digest(paths, 24, 4, num_workers) for num_workers in (0, 1, 2)}
    assert len(digests) == 1
    assert loader.digest(paths, 23, 4, 1) not in digests
    seen, sizes = zip(*loader.memory(paths, 40, 4), strict=True)
    assert seen == tuple(range(4, 41, 4)) and min(sizes) > 50


def test_bare_decoding_is_that_of_training(tmp_path: Path) -> None:
    paths = loader.make_images(tmp_path, (50, 40), 2)
    loader.decode_files(paths)
    batch = next(loader.batches_of(paths, 2, 2, 0))
    assert batch.images.sizes.tolist() == [[40, 50]] * 2


def test_the_host_is_measured_beside_a_model_that_sleeps(tmp_path: Path) -> None:
    images = image_set(pa.table({"uri": loader.make_images(tmp_path, (50, 40), 4)}))
    config = host_overhead.settings(4, 7)
    found = host_overhead.parts(config, images, 3)
    assert list(found) == list(host_overhead.PARTS) and min(found.values()) > 0
    left = host_overhead.loop(config, images, tmp_path / "run", 6)
    assert list(left) == list(host_overhead.LEFT)
    assert all(np.less(left[name], left["everything"]).all() for name in ("views", "update"))
