"""Views in order, the next ones made ahead; on a GPU those of a stream of its own are those made at once."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dinov2_toolkit.tests.train.small_run import settings
from dinov2_toolkit.train.config import TrainConfig
from dinov2_toolkit.train.data.images import ImageSet, image_set, read_batches
from dinov2_toolkit.train.data.loader import load_views, made_ahead
from dinov2_toolkit.train.data.multicrop import Views, decoded_side_px, make_views
from dinov2_toolkit.train.data.packed import packed

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    rng = np.random.default_rng(0)
    for number in range(12):
        size = tuple(rng.integers(20, 60, 2))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{number}.png")
    return image_set(pa.table({"uri": [str(tmp_path / f"{number}.png") for number in range(12)]}))


def views(
    images: ImageSet, config: TrainConfig, device: torch.device, *, num_steps: int = 6, num_workers: int = 0
) -> Iterator[Views]:
    batches = read_batches(
        images,
        seed=config.seed,
        batches=(range(4 * step, 4 * step + 4) for step in range(num_steps)),
        short_side_px=decoded_side_px(config),
        num_workers=num_workers,
        is_pinned=device.type == "cuda",
    )
    return load_views(batches, config, device)


def same(first: Views, second: Views) -> bool:
    crops = zip(first[:2], second[:2], strict=True)
    are_equal = [torch.equal(one.cpu(), other.cpu()) for one, other in crops if one is not None and other is not None]
    return all(are_equal) and len(are_equal) == 2 and np.array_equal(first.masks, second.masks)


def test_neither_workers_nor_a_thread_ahead_change_a_bit(images: ImageSet) -> None:
    config = settings()
    wanted = list(views(images, config, CPU))
    assert len(wanted) == 6
    for num_workers in (1, 2, 4):
        found = list(views(images, config, CPU, num_workers=num_workers))
        assert all(map(same, found, wanted))
    batches = read_batches(
        images,
        seed=config.seed,
        batches=(range(4 * step, 4 * step + 4) for step in range(6)),
        short_side_px=decoded_side_px(config),
        num_workers=2,
    )
    ahead = list(made_ahead(batches, lambda batch: make_views(batch, config, CPU), lambda _: lambda: None))
    assert len(ahead) == 6 and all(map(same, ahead, wanted))


class Steps:
    """Notes in which order batches are asked for, made and taken."""

    def __init__(self, num_batches: int) -> None:
        self.notes: list[str] = []
        self.num_batches = num_batches

    def batches(self) -> Iterator[int]:
        for number in range(self.num_batches):
            self.notes.append(f"ask {number}")
            yield number

    def make(self, number: int) -> int:
        self.notes.append(f"make {number}")
        return number

    def take(self, number: int) -> Callable[[], None]:
        self.notes.append(f"take {number}")
        return lambda: self.notes.append(f"wait {number}")


def test_one_batch_is_made_ahead_and_none_before_the_wait_for_the_one_before() -> None:
    steps = Steps(3)
    assert list(made_ahead(steps.batches(), steps.make, steps.take)) == [0, 1, 2]  # type: ignore[arg-type]
    order = [f"{what} {number}" for number in range(3) for what in ("ask", "make", "take", "wait")]
    assert steps.notes == order


def test_the_next_batch_is_made_in_a_thread_while_the_caller_computes() -> None:
    is_made = threading.Event()

    def make(number: int) -> int:
        if number == 1:
            is_made.set()
        return number

    ahead = made_ahead(iter(range(3)), make, lambda _: lambda: None)  # type: ignore[arg-type]
    assert next(ahead) == 0
    assert is_made.wait(10)  # without being asked for
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]


def test_what_is_yielded_is_freed_as_soon_as_the_caller_drops_it() -> None:
    ahead = made_ahead(iter(range(3)), lambda _: torch.zeros(1), lambda _: lambda: None)  # type: ignore[arg-type]
    for _ in range(3):
        reference, deadline = weakref.ref(next(ahead)), time.monotonic() + 10
        while reference() is not None:  # until the thread has passed it on
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_goes_wrong_ahead_is_raised_when_its_batch_is_asked_for() -> None:
    def make(number: int) -> int:
        if number == 1:
            raise ValueError("bad")
        return number

    ahead = made_ahead(iter(range(3)), make, lambda _: lambda: None)  # type: ignore[arg-type]
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="bad"):
        next(ahead)


def test_the_end_of_views_is_that_of_the_decoders(images: ImageSet) -> None:
    batches = read_batches(images, seed=0, batches=[range(4)] * 9, short_side_px=20, num_workers=2)
    loaded = load_views(batches, settings(), CPU)
    next(loaded)
    loaded.close()
    assert next(batches, None) is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "image-timeout"))]


@pytest.mark.gpu
def test_crops_from_the_stream_ahead_are_those_made_at_once(images: ImageSet) -> None:
    config, device = settings(), torch.device("cuda")
    wanted = [
        make_views(batch, config, device)
        for batch in read_batches(
            images,
            seed=config.seed,
            batches=(range(4 * step, 4 * step + 4) for step in range(40)),
            short_side_px=decoded_side_px(config),
        )
    ]
    weight = torch.randn(2048, 2048, device=device)
    for found, other in zip(views(images, config, device, num_steps=40, num_workers=2), wanted, strict=True):
        for _ in range(50):  # the step, in which the next crops are made
            weight = weight @ weight / 2048
        assert same(found, other)


@pytest.mark.gpu
def test_crops_on_a_gpu_are_those_of_a_cpu(images: ImageSet) -> None:
    config = settings()
    for found, wanted in zip(views(images, config, torch.device("cuda")), views(images, config, CPU), strict=True):
        for one, other in zip(found[:2], wanted[:2], strict=True):
            assert one is not None and other is not None
            torch.testing.assert_close(one.cpu(), other, atol=2e-2, rtol=0)  # in TF32 where that is on


@pytest.mark.gpu
def test_images_are_copied_from_pinned_memory_which_later_batches_take_again(images: ImageSet) -> None:
    read = read_batches(images, seed=0, batches=[range(4)] * 12, short_side_px=20, num_workers=2, is_pinned=True)
    places = set()
    for batch in read:
        assert batch.images.data.is_pinned()
        places.add(batch.images.data.data_ptr())
    assert len(places) <= 4
    one = packed([np.full((2, 2, 3), 7, np.uint8)])
    assert (one.on(torch.device("cuda")).image(0) == 7).all()
