"""Exact copies, against dictionaries of bytes and of pixels."""

import random
import re
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.dedup.decisions import REASONS
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.exact_duplicates import of_shared_size
from dinov2_toolkit.curate.dedup.image_keys import first_with_same_key, read_keys
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.images import image_id
from dinov2_toolkit.store.manifest import open_manifest, removed_path
from dinov2_toolkit.store.pixels import pixel_id

Row = dict[str, object]

_, SAME_BYTES, SAME_PIXELS, RESEMBLES, _ = REASONS


def keys(*values: str | None) -> list[pa.ChunkedArray]:
    """Return the values in two pieces."""
    middle = len(values) // 2
    return [pa.chunked_array([pa.array(part, pa.string())]) for part in (values[:middle], values[middle:])]


def picture(seed: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_images(folder: Path, files: dict[str, bytes], name: str = "images.parquet") -> Path:
    """Write files, and a manifest of other origin that only names them."""
    for file, data in files.items():
        (folder / file).write_bytes(data)
    pq.write_table(pa.table({"uri": list(files)}), folder / name)
    return folder / name


def dedup(manifest: Path, output: str = "unique.parquet", **settings: object) -> tuple[list[Row], list[Row]]:
    """Return the rows that stay and the rows that go."""
    path = manifest.with_name(output)
    dedup_images(manifest, str(path), DedupSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    return pq.read_table(path).to_pylist(), pq.read_table(removed_path(path)).to_pylist()


def names(rows: list[Row], column: str = "uri") -> list[str]:
    return [Path(str(row[column])).name for row in rows]


def test_the_first_of_equal_keys_is_found_and_null_equals_nothing() -> None:
    values = [random.Random(0).choice(["a", "b", "c", None, str(row)]) for row in range(200)]
    expected = [row if value is None else values.index(value) for row, value in enumerate(values)]
    assert first_with_same_key(keys(*values), 200, None).tolist() == expected


def test_arrays_are_the_same_only_if_all_their_values_are() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 12, 5), dtype=np.uint16)
    hidden, fine = values.copy(), values.copy()
    hidden[0, 0, 4] ^= 1  # beyond the channels that are shown
    fine[0, 0, 0] ^= 1  # below their 8 bits
    ids = []
    for array in (values, values, np.asfortranarray(values), hidden, fine, values.reshape(12, 8, 5)):
        file = BytesIO()
        np.save(file, array)
        ids.append(pixel_id(file.getvalue()))
    assert ids[0] == ids[1] == ids[2] and len(set(ids)) == 4


def test_the_first_image_of_other_sets_with_the_same_key_is_found() -> None:
    mine = ("a", None, "b", "a", "d", "e")
    found = first_with_same_key(keys(*mine), 6, 1 << 28, [keys("b", "a", None, "a"), keys("a", "e")])
    assert found.tolist() == [1, -1, 0, 1, -1, 5]
    assert first_with_same_key(keys(*mine), 6, None, []).tolist() == [-1] * 6


def test_only_images_of_a_size_that_another_has_are_decoded() -> None:
    assert of_shared_size(np.array([3, 5, 3, 4])).tolist() == [0, 2]
    assert of_shared_size(np.array([3, -1, 4])).tolist() == [0, 1, 2]  # any may have the size that is not known


def test_pixels_are_equal_whatever_the_file_and_unequal_where_one_differs() -> None:
    image = picture(0)
    changed = image.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    same = {pixel_id(encoded(image, kind)) for kind in ("PNG", "BMP", "TIFF")}
    assert len(same) == 1
    assert pixel_id(encoded(image, "WEBP", lossless=True)) in same
    assert pixel_id(encoded(changed, "PNG")) not in same
    blank = [encoded(Image.new("RGB", size), "PNG") for size in ((2, 8), (8, 2), (4, 4))]
    assert len({pixel_id(data) for data in blank}) == 3  # as many pixels, another shape


def test_reading_keys_says_what_cannot_be_read_and_keeps_the_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for number, file in enumerate(files):
        if number != 7:
            file.write_bytes(encoded(picture(number), "PNG"))
    ids = read_keys([pa.chunked_array([[str(file) for file in files]])], 40, image_id, "reading")
    assert ids.to_pylist() == [None if n == 7 else image_id(file.read_bytes()) for n, file in enumerate(files)]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 40 images cannot be read" in said and "7.png: no such file" in said


def test_exact_copies_are_removed_without_any_vectors(tmp_path: Path) -> None:
    files = {f"{number}.png": encoded(picture(number), "PNG") for number in range(6)}
    files["copy.png"] = files["2.png"]
    files["again.png"] = files["2.png"]
    files["other.bmp"] = encoded(picture(4), "BMP")
    pool = write_images(tmp_path, files)
    kept, removed = dedup(pool, exact="bytes", keep="first")
    assert names(kept) == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "other.bmp"]
    assert [row["duplicates"] for row in kept] == [0, 0, 2, 0, 0, 0, 0]
    assert list(zip(names(removed), names(removed, "duplicate_of"), strict=True)) == [
        ("copy.png", "2.png"),
        ("again.png", "2.png"),
    ]
    assert {row["reason"] for row in removed} == {SAME_BYTES}

    kept, removed = dedup(pool, exact="pixels", keep="first")
    assert Counter(str(row["reason"]) for row in removed) == {SAME_BYTES: 2, SAME_PIXELS: 1}
    assert names(removed, "duplicate_of")[-1] == "4.png" and removed[-1]["group_id"] == 4
    made = open_manifest(tmp_path / "unique.parquet").provenance
    assert made is not None and made.kind == "images" and made.figures["same_pixels"] == 1


def test_every_planted_exact_copy_is_found(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(60):
        image = picture(number, (8 + number % 5, 9))
        files[f"{number}.png"] = encoded(image, "PNG")
        files[f"{number}_bytes.png"] = files[f"{number}.png"]
        files[f"{number}_pixels.tif"] = encoded(image, "TIFF")
    order = random.Random(1).sample(list(files), len(files))
    kept, removed = dedup(write_images(tmp_path, {name: files[name] for name in order}), exact="pixels")
    assert len(kept) == 60 and len(removed) == 120
    assert all(row["duplicates"] == 2 for row in kept)
    for gone in removed:
        mine, of = (re.split(r"[_.]", names([gone], column)[0])[0] for column in ("uri", "duplicate_of"))
        assert mine == of


def test_exact_copies_of_other_sets_are_removed(tmp_path: Path) -> None:
    images = {f"{number}.png": encoded(picture(number), "PNG") for number in range(5)}
    pool = write_images(tmp_path, images)
    known = write_images(tmp_path, {"known.bmp": encoded(picture(1), "BMP"), "known.png": images["2.png"]}, "k.parquet")
    evaluation = write_images(tmp_path, {"evaluation.tif": encoded(picture(3), "TIFF")}, "e.parquet")
    kept, removed = dedup(pool, exact="pixels", known=(known,), against=(evaluation,))
    assert names(kept) == ["0.png", "4.png"]
    assert [(*names([row]), row["reason"], *names([row], "duplicate_of")) for row in removed] == [
        ("1.png", SAME_PIXELS, "known.bmp"),
        ("2.png", SAME_BYTES, "known.png"),
        ("3.png", RESEMBLES, "evaluation.tif"),
    ]
    kept, removed = dedup(pool, exact="bytes", known=(known,), against=(evaluation,))
    assert names(removed) == ["2.png"]


def test_an_unreadable_image_is_kept_and_none_readable_is_an_error(tmp_path: Path) -> None:
    pool = write_images(
        tmp_path, {"0.png": encoded(picture(0), "PNG"), "broken.png": b"no image", "x.png": b"no image"}
    )
    kept, removed = dedup(pool, exact="pixels")
    assert names(kept) == ["0.png", "broken.png"] and names(removed) == ["x.png"]  # its bytes are the same all the same
    pq.write_table(pa.table({"uri": ["missing.png", "gone.png"]}), tmp_path / "gone.parquet")
    with pytest.raises(ToolkitError, match=r"none of 2 images can be read \(.*missing.png: no such file\)"):
        dedup(tmp_path / "gone.parquet", exact="bytes")
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ToolkitError, match="names no images"):
        dedup(tmp_path / "numbers.parquet", exact="bytes")


def test_ids_of_other_origin_are_not_trusted(tmp_path: Path) -> None:
    pool = write_images(tmp_path, {f"{number}.png": encoded(picture(number), "PNG") for number in range(3)})
    table = pq.read_table(pool).append_column("image_id", pa.array(["slide"] * 3))
    pq.write_table(table, pool)
    kept, removed = dedup(pool, exact="bytes")
    assert len(kept) == 3 and removed == []
