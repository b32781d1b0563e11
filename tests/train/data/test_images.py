from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.limits import Limits
from dinov2_toolkit.train.data.images import (
    Batch,
    ImageSet,
    PixelCache,
    decoded_bytes,
    drawn_rows,
    image_set,
    read_batches,
)
from dinov2_toolkit.train.data.packed import Buffer, packed
from dinov2_toolkit.train.data.pixels import decode_pixels

SIZES = [(12, 9), (7, 14), (10, 10), (5, 6), (16, 8)]  # width, height


def write_images(folder: Path, num_images: int) -> ImageSet:
    """PNG files of constant colour, image i having red value i, in sizes that repeat."""
    uris = []
    for number in range(num_images):
        path = folder / f"{number}.png"
        Image.new("RGB", SIZES[number % len(SIZES)], (number, 0, 0)).save(path)
        uris.append(str(path))
    return image_set(pa.table({"uri": uris}))


def batches(images: ImageSet, samples: range = range(0, 24), size: int = 4, **settings: Any) -> list[Batch]:
    """Batches with images of their own; those that are read hold until the next one."""
    read = read_batches(
        images,
        seed=3,
        batches=[samples[start : start + size] for start in range(0, len(samples), size)],
        short_side_px=100,
        **settings,
    )
    return [replace(batch, images=packed(pixels(batch))) for batch in read]


def pixels(batch: Batch) -> list[np.ndarray]:
    return [batch.images.image(number).numpy().copy() for number in range(len(batch.samples))]


def reds(batch: Batch) -> list[int]:
    return [int(image[0, 0, 0]) for image in pixels(batch)]


def test_every_pass_sees_each_image_once_in_another_order() -> None:
    images = ImageSet(pa.chunked_array([[str(i) for i in range(10)]]), None)
    rows = drawn_rows(images, 0, np.arange(30)).reshape(3, 10)
    assert (np.sort(rows) == np.arange(10)).all()
    assert (rows[0] != rows[1]).any() and (rows[1] != rows[2]).any()
    assert (drawn_rows(images, 1, np.arange(30)).reshape(3, 10) != rows).any()
    assert (drawn_rows(images, 0, np.arange(7, 12)) == rows.ravel()[7:12]).all()


def test_weights_say_how_often_an_image_is_drawn() -> None:
    weights = np.array([1.0, 0.0, 2.5, 0.5, 6.0])
    images = image_set(pa.table({"uri": list("abcde"), "weight": weights}))
    counts = np.bincount(drawn_rows(images, 0, np.arange(5 * 400)), minlength=5) / 400
    np.testing.assert_allclose(counts, 5 * weights / weights.sum(), atol=0.1)
    assert counts[1] == 0
    equal = image_set(pa.table({"uri": list("abcde"), "weight": [2.0] * 5}))
    assert equal.cumulative_weights is None


def test_weights_and_uris_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ToolkitError, match="no rows"):
        image_set(pa.table({"uri": pa.array([], pa.string())}))
    with pytest.raises(ToolkitError, match="1 of 2 rows have no uri"):
        image_set(pa.table({"uri": ["a", None]}))
    with pytest.raises(ToolkitError, match="negative"):
        image_set(pa.table({"uri": ["a", "b"], "weight": [1.0, -1.0]}))


def test_batches_hold_the_images_of_their_samples(tmp_path: Path) -> None:
    images = write_images(tmp_path, 10)
    for number, batch in enumerate(batches(images)):
        assert batch.samples.tolist() == list(range(4 * number, 4 * number + 4))
        rows = drawn_rows(images, 3, batch.samples).tolist()
        for image, size, row in zip(pixels(batch), batch.images.sizes, rows, strict=True):
            width, height = SIZES[row % len(SIZES)]
            assert image.shape == (height, width, 3) and size.tolist() == [height, width]
            assert (image == np.array([row, 0, 0])).all()


def test_an_image_takes_its_own_memory_and_no_more(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(32)]
    for number, path in enumerate(paths):
        Image.new("RGB", {0: (400, 100), 1: (100, 400)}.get(number, (100, 100))).save(path)
    images = image_set(pa.table({"uri": list(map(str, paths))}))
    (batch,) = read_batches(images, seed=0, batches=[range(32)], short_side_px=100)
    assert 38 * 30_000 <= len(batch.images.data) < 42 * 30_000  # on a canvas for all it would be 512


def test_neither_workers_nor_the_cache_nor_a_restart_change_a_batch(tmp_path: Path) -> None:
    images = write_images(tmp_path, 10)
    (tmp_path / "4.png").write_bytes(b"broken")
    wanted = batches(images)
    for workers, cache in ((1, 0), (2, 0), (4, 0), (0, 10**6), (3, 10**6), (3, 1000)):
        got = batches(images, num_workers=workers, cache_bytes=cache)
        assert [[image.tolist() for image in pixels(batch)] for batch in got] == [
            [image.tolist() for image in pixels(batch)] for batch in wanted
        ]
        assert [batch.num_replaced for batch in got] == [batch.num_replaced for batch in wanted]
    assert [reds(batch) for batch in batches(images, size=12, num_workers=2)] == [
        [red for batch in wanted[start : start + 3] for red in reds(batch)] for start in (0, 3)
    ]
    later = batches(images, samples=range(12, 24), num_workers=2)
    assert [reds(batch) for batch in later] == [reds(batch) for batch in wanted[3:]]


def test_the_processes_divide_a_batch(tmp_path: Path) -> None:
    images = write_images(tmp_path, 10)
    whole = [reds(batch) for batch in batches(images)]
    halves = [[reds(batch) for batch in batches(images, process=rank, num_processes=2)] for rank in range(2)]
    assert [[a, b, c, d] for (a, c), (b, d) in zip(*halves, strict=True)] == whole


def test_an_unreadable_image_is_counted_and_replaced_by_the_next_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path, 10)
    rows = drawn_rows(images, 3, np.arange(25)).tolist()
    broken = rows[5]
    (tmp_path / f"{broken}.png").unlink()
    got = batches(images)
    assert sum(batch.num_replaced for batch in got) == rows[:24].count(broken)
    for batch in got:
        for red, sample in zip(reds(batch), batch.samples, strict=True):
            following = rows[sample] if rows[sample] != broken else rows[sample + 1]
            assert red == following
    assert capsys.readouterr().err.count(f"{broken}.png: no such file") == 1


def test_an_image_over_a_limit_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path, 10)
    large = drawn_rows(images, 3, np.arange(24)).tolist()[5]
    Image.effect_noise((90, 90), 50).save(tmp_path / f"{large}.png")
    assert sum(batch.num_replaced for batch in batches(images, limits=Limits(max_pixels=8_099))) >= 1
    assert f"{large}.png: 90 x 90 pixels, more than --max-pixels 8099; training goes" in capsys.readouterr().err


def test_a_manifest_without_readable_images_ends_with_its_reason(tmp_path: Path) -> None:
    images = image_set(pa.table({"uri": [str(tmp_path / "a.png"), str(tmp_path / "b.png")]}))
    for workers in (0, 2):
        with pytest.raises(ToolkitError, match=r"1000 images in a row cannot be read, the last one .*png"):
            batches(images, num_workers=workers)


def test_large_images_are_shrunk_when_read(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 800).astype(np.uint8)
    picture = np.broadcast_to(gradient[None, :, None], (600, 800, 3))
    for name in ("a.jpg", "a.png"):
        Image.fromarray(picture).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        pixels = decode_pixels(data, short_side_px=60)
        assert pixels.shape == (60, 80, 3)
        np.testing.assert_allclose(pixels[30, :, 0].astype(float), gradient[5::10], atol=4)
        assert decode_pixels(data, short_side_px=600).shape == (600, 800, 3)


def test_the_memory_of_decoded_images_is_estimated_by_reading_some(tmp_path: Path) -> None:
    images = write_images(tmp_path, 40)
    read = np.linspace(0, 39, 32).astype(int)
    taken = [SIZES[row % len(SIZES)][0] * SIZES[row % len(SIZES)][1] * 3 for row in read]
    assert decoded_bytes(images, short_side_px=60) == np.mean(taken)
    for row in read[:5]:
        (tmp_path / f"{row}.png").write_bytes(b"no image")
    assert decoded_bytes(images, short_side_px=60) == np.mean(taken[5:])
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert decoded_bytes(images, short_side_px=60) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_kept_pixels_come_back_until_there_is_no_room(dtype: type[np.uint8] | type[np.uint16]) -> None:
    rng = np.random.default_rng(0)
    shapes = [(7, 5, 3), (4, 4, 1), (200, 150, 3), (1, 1, 3)]
    images = [rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True) for shape in shapes]
    cache = PixelCache(sum(image.nbytes for image in images[:3]))
    for row, image in enumerate(images):
        cache.add(10 * row, image)
    assert [10 * row in cache for row in range(4)] == [True, True, True, False]
    for row, image in enumerate(images[:3]):
        np.testing.assert_array_equal(cache.pixels(10 * row), image)
        assert cache.pixels(10 * row).dtype == dtype


def test_a_buffer_takes_images_before_and_after_it_has_room() -> None:
    rng, buffer = np.random.default_rng(0), Buffer()
    for shapes in ([(3, 5, 3), (7, 2, 3)], [(2, 2, 3)], [(3, 5, 3), (9, 9, 3), (1, 40, 3)]):
        images = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
        found = buffer.packed([buffer.add(image) for image in images], 3, torch.uint8)
        for number, image in enumerate(images):
            np.testing.assert_array_equal(found.image(number).numpy(), image)
        assert found.starts[-1] + images[-1].nbytes + 3 * found.sizes[:, 1].max() <= len(found.data) + 63
        buffer.clear()


def test_a_later_batch_takes_the_memory_of_an_earlier_one(tmp_path: Path) -> None:
    images = write_images(tmp_path, 10)
    read = read_batches(images, seed=3, batches=[range(4)] * 12, short_side_px=100, num_workers=2)
    assert len({batch.images.data.data_ptr() for batch in read}) <= 4  # two ahead, one that is read, one at hand
