"""The example data is as examples/data/README.md describes it."""

import importlib.util
import io
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
FASHION_SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLIPART_SOURCE = Path("/usr/share/openclipart/png")
FASHION_SETS = ("fashion_pool", "fashion_queries", "fashion_probe_train", "fashion_probe_test")


@pytest.fixture(scope="module")
def sets() -> dict[str, pa.Table]:
    return {path.stem: pq.read_table(path) for path in (EXAMPLES / "data").glob("*.parquet")}


@pytest.fixture(scope="module")
def images(sets: dict[str, pa.Table]) -> dict[str, list[Image.Image]]:
    """Decode every image; a broken one fails."""
    return {name: [decoded(value["bytes"]) for value in table["image"].to_pylist()] for name, table in sets.items()}


@pytest.fixture(scope="module")
def build_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_data", EXAMPLES / "build_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decoded(image_bytes: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(image_bytes))
    image.load()
    return image


def paths(table: pa.Table) -> list[str]:
    return [value["path"] for value in table["image"].to_pylist()]


def test_sets_have_their_sizes_and_hugging_face_columns(sets: dict[str, pa.Table]) -> None:
    sizes = {name: table.num_rows for name, table in sets.items()}
    assert 1_800 <= sizes.pop("clipart") <= 2_200
    assert sizes == dict(zip(FASHION_SETS, (12_000, 300, 1_000, 2_000), strict=True))
    for name, table in sets.items():
        assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        truth = ["planted_of", "planted_kind"] if name == "fashion_pool" else []
        assert table.column_names == ["image", "label", *truth]
        assert table["label"].null_count == 0


def test_all_files_together_are_at_most_14_mb() -> None:
    sizes = [path.stat().st_size for path in (EXAMPLES / "data").iterdir()]
    assert sum(sizes) <= 14_000_000
    assert max(sizes) <= 8_000_000


def test_paths_are_unique(sets: dict[str, pa.Table]) -> None:
    fashion = [path for name in FASHION_SETS for path in paths(sets[name])]
    assert len(set(fashion)) == len(fashion)
    assert len(set(paths(sets["clipart"]))) == sets["clipart"].num_rows


def test_fashion_images_are_28_pixels_grey(images: dict[str, list[Image.Image]]) -> None:
    for name in FASHION_SETS:
        assert {(image.mode, image.size) for image in images[name]} == {("L", (28, 28))}


def test_pool_has_a_long_tail_of_distinct_images_over_ten_classes(sets: dict[str, pa.Table]) -> None:
    distinct = [row["label"] for row in sets["fashion_pool"].to_pylist() if row["planted_of"] is None]
    counts = np.array([count for _, count in Counter(distinct).most_common()])
    assert len(counts) == 10
    assert 80 <= counts[0] / counts[-1] <= 125
    assert np.all(np.abs(counts[:-1] / counts[1:] - 100 ** (1 / 9)) < 0.06)  # geometric, up to rounding


def test_a_tenth_of_the_pool_is_planted_a_third_of_each_kind(sets: dict[str, pa.Table]) -> None:
    pool = sets["fashion_pool"]
    assert pool.num_rows - pool["planted_of"].null_count == 1_200
    assert Counter(pool["planted_kind"].to_pylist()) == {None: 10_800, "jpeg": 400, "shift": 400, "brightness": 400}
    planted = {row["label"] for row in pool.to_pylist() if row["planted_of"] is not None}
    assert planted == {"t_shirt_top", "trouser", "pullover", "dress", "coat"}  # the five most common


def test_planted_images_are_similar_but_not_equal_to_their_original(
    sets: dict[str, pa.Table], images: dict[str, list[Image.Image]]
) -> None:
    rows = sets["fashion_pool"].to_pylist()
    pixels = [np.asarray(image, dtype=np.float32) for image in images["fashion_pool"]]
    place = {row["image"]["path"]: i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        if row["planted_of"] is None:
            continue
        original = place[row["planted_of"]]
        assert rows[original]["label"] == row["label"] and rows[original]["planted_of"] is None
        assert not np.array_equal(pixels[i], pixels[original])
        if row["planted_kind"] == "shift":
            moved = [np.roll(pixels[original], step, axis) for axis in (0, 1) for step in (1, -1)]
            assert min(np.count_nonzero(pixels[i] != image) for image in moved) <= 28  # except at the border
        else:
            cosine = (pixels[i] * pixels[original]).sum() / np.linalg.norm(pixels[i]) / np.linalg.norm(pixels[original])
            assert cosine > 0.9


def test_queries_are_balanced(sets: dict[str, pa.Table]) -> None:
    counts = Counter(sets["fashion_queries"]["label"].to_pylist())
    assert set(counts.values()) == {30} and set(counts) == set(sets["fashion_pool"]["label"].to_pylist())


def test_probe_sets_are_balanced_and_of_the_test_split(sets: dict[str, pa.Table]) -> None:
    for name, count in (("fashion_probe_train", 100), ("fashion_probe_test", 200)):
        counts = Counter(sets[name]["label"].to_pylist())
        assert len(counts) == 10 and set(counts.values()) == {count}
        assert all(path.startswith("t10k/") for path in paths(sets[name]))
    assert all(path.startswith("train/") for path in paths(sets["fashion_pool"]) + paths(sets["fashion_queries"]))


def test_fashion_sets_share_no_image(images: dict[str, list[Image.Image]]) -> None:
    pixels = [{image.tobytes() for image in images[name]} for name in FASHION_SETS]
    assert len(set.union(*pixels)) == sum(len(part) for part in pixels)
    assert [len(part) for part in pixels[1:]] == [300, 1_000, 2_000]


def test_clipart_is_small_and_comes_in_several_modes(
    sets: dict[str, pa.Table], images: dict[str, list[Image.Image]]
) -> None:
    modes = Counter(image.mode for image in images["clipart"])
    assert min(modes[mode] for mode in ("RGBA", "P", "LA", "RGB", "L")) >= 10
    assert any(image.mode == "P" and "transparency" in image.info for image in images["clipart"])
    assert max(max(image.size) for image in images["clipart"]) == 128
    assert len(set(value["bytes"] for value in sets["clipart"]["image"].to_pylist())) == sets["clipart"].num_rows


def test_clipart_labels_are_the_top_folders_with_ten_images_or_more(sets: dict[str, pa.Table]) -> None:
    labels = sets["clipart"]["label"].to_pylist()
    assert labels == [path.split("/")[0] for path in paths(sets["clipart"])]
    assert len(set(labels)) >= 15 and min(Counter(labels).values()) >= 10


def test_long_tail_counts_are_geometric_and_sum_to_the_total(build_data: ModuleType) -> None:
    assert build_data.long_tail_counts(3, 111, 100.0) == [100, 10, 1]
    assert sum(build_data.long_tail_counts(10, 10_800, 100.0)) == 10_800


def test_a_palette_picture_is_scaled_without_leaving_its_mode(build_data: ModuleType) -> None:
    picture = Image.new("RGBA", (300, 200), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 150, 200))
    small = decoded(build_data.encode(build_data.scaled(picture.quantize(), 128)))
    assert small.mode == "P" and small.size == (128, 85)
    colours = np.asarray(small.convert("RGBA"), np.int64)  # (85, 128, 4)
    assert colours[40, 10, 3] == 0
    assert np.abs(colours[40, 110] - (200, 30, 30, 255)).max() <= 4


@pytest.mark.slow
@pytest.mark.skipif(
    not (FASHION_SOURCE.is_dir() and CLIPART_SOURCE.is_dir()),
    reason="needs the Debian packages dataset-fashion-mnist and openclipart-png",
)
def test_the_script_builds_the_same_rows_again(
    build_data: ModuleType, sets: dict[str, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["build_data.py", "--output", str(tmp_path)])
    build_data.main()
    assert {path.stem for path in tmp_path.iterdir()} == set(sets)
    for name, table in sets.items():
        again = pq.read_table(tmp_path / f"{name}.parquet")
        assert paths(again) == paths(table)
        assert again.drop_columns("image").equals(table.drop_columns("image"))
        if name != "clipart":  # whose pixels depend on Pillow's version
            assert [decoded(value["bytes"]).tobytes() for value in again["image"].to_pylist()] == [
                decoded(value["bytes"]).tobytes() for value in table["image"].to_pylist()
            ]
