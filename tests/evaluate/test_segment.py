"""Segmentation: a made-up set whose answer is known, scores by their definition, and masks that do not suit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate import segment
from dinov2_toolkit.evaluate.masks import decode_mask, open_masked_split, read_mask
from dinov2_toolkit.evaluate.probe import ProbeSettings, probe
from dinov2_toolkit.evaluate.segment import at_points, mean_iou, pixel_accuracy, pixel_counts, predict
from dinov2_toolkit.features.image_workers import image_workers
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.images import UnreadableImage

COLOURS = np.array([(40, 60, 160), (200, 40, 40), (220, 200, 60)])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segment, "MIN_STEPS", 120)
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=48, depth=1, num_heads=2, img_size=32, layer_scale=0.1)
    save_model(
        Path("run"),
        backbone=backbone,
        heads={},
        preprocess=Preprocess(32, 1.0, (0.5,) * 3, (0.25,) * 3),
    )


def draw(name: str, count: int, seed: int, sizes: Sequence[tuple[int, int]] = ((32, 32), (32, 48), (40, 64))) -> str:
    """Noisy pictures of three colours in rectangles; the mask says which colour, 255 on a strip that is black."""
    random = np.random.default_rng(seed)
    rows = []
    Path(name).mkdir()
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        mask = np.zeros((height, width), np.uint8)
        for value in (1, 2):
            top, left = 4 * random.integers(0, height // 8), 4 * random.integers(0, width // 8)
            mask[top : top + height // 2, left : left + width // 2] = value
        pixels = COLOURS[mask] + random.integers(-15, 16, (height, width, 3))
        mask[:, -4:] = 255
        pixels[:, -4:] = 0
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f"{name}/{number}.png")
        Image.fromarray(mask).save(f"{name}/{number}.mask.png")
        rows.append({"uri": f"{name}/{number}.png", "mask": f"{name}/{number}.mask.png"})
    pq.write_table(pa.Table.from_pylist(rows), f"{name}.parquet")
    return f"{name}.parquet"


def measure(train: str, test: str, output: str = "scores.parquet", **settings: object) -> dict[str, float]:
    probe(train, test, output, ProbeSettings(("run",), ("segment",), num_workers=1, **settings), Options())  # type: ignore[arg-type]
    return {row["metric"]: row["value"] for row in pq.read_table(output).to_pylist()}


def test_a_set_whose_answer_is_known_is_solved_and_shuffled_masks_are_not() -> None:
    train, test = draw("train", 12, seed=0), draw("test", 6, seed=1)
    found = measure(train, test)
    assert found["miou"] > 0.95
    assert found["pixel_accuracy"] > 0.97
    table = pq.read_table(train)
    for size in range(3):  # masks change places among images of one size
        rows = np.arange(size, 12, 3)
        for row, other in zip(rows, np.roll(rows, 1), strict=True):
            Path(f"shuffled{row}.png").write_bytes(Path(f"train/{other}.mask.png").read_bytes())
    masks = pa.array([f"shuffled{row}.png" for row in range(12)])
    pq.write_table(table.set_column(1, "mask", masks), "shuffled.parquet")
    assert measure("shuffled.parquet", test, "shuffled_scores.parquet")["miou"] < 0.6


def test_larger_windows_and_another_column_can_be_named() -> None:
    train, test = draw("train", 6, seed=0), draw("test", 3, seed=1)
    for name in (train, test):
        pq.write_table(pq.read_table(name).rename_columns(["uri", "annotation"]), name)
    assert measure(train, test, masks="annotation", image_size=48)["miou"] > 0.9
    assert pq.read_table("scores.parquet").column("num_test").to_pylist() == [3, 3]


def test_masks_may_lie_in_the_file_itself() -> None:
    train, test = draw("train", 6, seed=0), draw("test", 3, seed=1)
    by_name = measure(train, test)
    for name in (train, test):
        table = pq.read_table(name)
        held = [{"bytes": Path(mask).read_bytes(), "path": None} for mask in table.column("mask").to_pylist()]
        pq.write_table(table.set_column(1, "mask", pa.array(held)), name)
    assert measure(train, test, "held.parquet") == by_name


def test_scores_are_their_definition() -> None:
    mask = np.array([[0, 0, 1, 255], [2, 1, 1, 255]], np.uint8)
    predictions = np.array([[0, 1, 1, 7], [0, 1, 3, 7]])
    counts = pixel_counts(predictions, mask)
    assert mean_iou(counts) == pytest.approx(np.mean([1 / 3, 2 / 4, 0 / 1, 0 / 1]))  # classes 0, 1, 2, and 3 predicted
    assert pixel_accuracy(counts) == pytest.approx(3 / 6)


def test_pixels_between_patches_are_those_of_bilinear_enlargement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "PREDICTED_NUMBERS", 5 * 29 * 3)  # strips of three rows
    logits = torch.randn(1, 5, 4, 7, generator=torch.Generator().manual_seed(0))
    enlarged = torch.nn.functional.interpolate(logits, (18, 29), mode="bilinear", align_corners=False)
    predictions = predict(torch.nn.Identity(), logits[0].permute(1, 2, 0), (18, 29))
    np.testing.assert_array_equal(predictions, enlarged[0].argmax(dim=0).numpy())


def test_random_pixels_of_a_tile_get_the_logits_of_the_whole_map() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 9, 3, generator=generator)
    mask = np.arange(240, dtype=np.uint8).reshape(12, 20)  # every pixel has a number of its own
    points, values = segment._random_pixels(segment.Sample(tokens, mask), 2, 5, 4, np.random.default_rng(0))
    tile = tokens[2:6, 5:9].permute(2, 0, 1)[None]
    here = at_points(tile, points[None, None])[0, :, 0]  # (3, P)
    whole = torch.nn.functional.interpolate(tokens.permute(2, 0, 1)[None], (12, 20), mode="bilinear")[0]
    down, across = values // 20, values % 20
    inside = (points.abs() < 1 - 1 / 4).all(dim=1)  # nearer to its edge, a tile has no neighbours to look at
    assert inside.sum() > 100
    torch.testing.assert_close(here[:, inside], whole[:, down[inside], across[inside]], rtol=1e-4, atol=1e-5)


def test_images_without_a_mask_to_use_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = draw("train", 4, seed=0), draw("test", 4, seed=1, sizes=((32, 32), (32, 48), (32, 32), (32, 260)))
    Path("train/3.mask.png").write_bytes(b"no picture")
    Image.new("L", (30, 32)).save("test/1.mask.png")
    measure(train, test)
    scores = pq.read_table("scores.parquet").to_pylist()
    assert {(row["num_train"], row["num_test"]) for row in scores} == {(3, 2)}
    said = capsys.readouterr().err
    assert "train: 1 images left out for their masks, first" in said and "cannot be read: not an image of" in said
    assert "test: 2 images left out for their masks, first" in said
    assert "1.mask.png is 30 x 32 pixels, but its image 48 x 32)" in said
    Image.new("L", (30, 32)).save("test/0.mask.png")
    Image.new("L", (30, 32)).save("test/2.mask.png")
    with pytest.raises(
        ToolkitError, match=r"no image of .*test\.parquet has a mask to use, first .*0\.png \(the mask .*"
    ):
        measure(train, test, "other.parquet")
    assert not Path("other.parquet").exists()


def test_a_long_image_has_no_tokens_for_all_of_its_mask() -> None:
    with image_workers(decode_mask, 1) as workers:
        found = segment._mask(workers, "gone.png", 32, 257)
    assert isinstance(found, UnreadableImage) and found.reason == "it is 32 x 257 pixels, too long; cut it to pieces"


def test_masks_in_colour_or_gone_cannot_be_read() -> None:
    Image.new("RGB", (4, 4)).save("colour.png")
    Image.new("RGB", (4, 4)).save("colour.eps")  # which Pillow reads by starting Ghostscript
    for name, why in [
        ("colour.png", "it is of mode RGB, and a mask is a picture of one channel"),
        ("colour.eps", "not an image of a known format"),
        ("gone.png", "no such file"),
    ]:
        found = read(name, 4)
        assert isinstance(found, UnreadableImage)
        assert found.reason.startswith(f"the mask {name} cannot be read: {why}")


def read(name: str, side: int) -> np.ndarray | UnreadableImage:
    with image_workers(decode_mask, 1) as workers:
        return read_mask(workers, name, side, side)


def test_palette_masks_count_by_number_and_16_bit_ones_by_value() -> None:
    numbers = np.array([[0, 3], [255, 1]], np.uint8)
    picture = Image.fromarray(numbers)
    picture.convert("P").save("palette.png")
    Image.fromarray(numbers.astype(np.uint16)).save("deep.png")
    for name in ("palette.png", "deep.png"):
        np.testing.assert_array_equal(read(name, 2), numbers)
    Image.fromarray(numbers.astype(np.uint16) * 7).save("deep.png")
    found = read("deep.png", 2)
    assert isinstance(found, UnreadableImage) and "holds the value 1785; classes are 0 to 254" in found.reason


def test_rows_without_a_mask_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    train = draw("train", 3, seed=0)
    table = pq.read_table(train)
    pq.write_table(table.set_column(1, "mask", pa.array([None, "train/1.mask.png", None], pa.string())), train)
    split = open_masked_split("train", train, "mask", None)
    assert [Path(uri).name for uri in split.uris] == ["1.png"]
    assert "train: 2 of 3 rows have no mask and are left out" in capsys.readouterr().err


def test_a_single_class_is_an_error_and_an_unknown_one_counts_as_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = draw("train", 6, seed=0), draw("test", 3, seed=1)
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save("test/0.mask.png")
    assert measure(train, test)["pixel_accuracy"] < 0.8
    assert "classes that no training mask has (9); their pixels count as wrong" in capsys.readouterr().err
    for number in range(6):
        height, width = np.asarray(Image.open(f"train/{number}.png")).shape[:2]
        Image.new("L", (width, height), 1).save(f"train/{number}.mask.png")
    with pytest.raises(ToolkitError, match="hold only the class 1; a probe needs two or more"):
        measure(train, test, "other.parquet")


def test_what_segmentation_needs_is_said_in_one_line() -> None:
    train = draw("train", 3, seed=0)
    asked = ProbeSettings(("pixels",), ("segment",))
    with pytest.raises(ToolkitError, match="'pixels' has no patch tokens, which segmentation needs"):
        probe(train, train, "scores.parquet", asked, Options())
    with pytest.raises(ToolkitError, match="no column 'masks' with masks .did you mean 'mask'..; it has uri, mask;"):
        probe(train, train, "scores.parquet", ProbeSettings(("run",), ("segment",), masks="masks"), Options())
    with pytest.raises(ToolkitError, match="--train train is no Parquet file"):
        probe("train", train, "scores.parquet", ProbeSettings(("run",), ("segment",)), Options())
