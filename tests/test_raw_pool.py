"""The demo's raw pool: what its folders hold, and what the toolkit makes of it."""

import hashlib
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError
from typer.testing import CliRunner

from dinov2_toolkit.curate.cli import app
from dinov2_toolkit.examples.raw_pool import DATA, HOSTILE_NAMES, UNWANTED, clipart_crops, write_raw_pool

NUM_UNWANTED = 600


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    write_raw_pool(folder, NUM_UNWANTED)
    return folder


def grey(path: Path) -> np.ndarray | None:
    """Return the pixels of a file, None if it cannot be read."""
    try:
        return np.asarray(Image.open(path).convert("L"))
    except (UnidentifiedImageError, OSError):
        return None


def test_clothes_are_the_files_of_the_parquet_by_label(pool: Path) -> None:
    rows = pq.read_table(DATA / "fashion_pool.parquet", columns=["image", "label"]).to_pylist()
    wanted = {(row["label"], hashlib.blake2b(row["image"]["bytes"]).digest()) for row in rows}
    folders = [folder for folder in pool.iterdir() if folder.name != UNWANTED]
    found = [(path.parent.name, hashlib.blake2b(path.read_bytes()).digest()) for f in folders for path in f.iterdir()]
    assert len(found) == 12_000 and set(found) == wanted


def test_unwanted_files_are_crops_blanks_and_broken_files(pool: Path) -> None:
    pictures = [grey(path) for path in (pool / UNWANTED).iterdir()]
    readable = [pixels for pixels in pictures if pixels is not None]
    blank = [pixels for pixels in readable if pixels.std() < 2]
    assert len(pictures) == NUM_UNWANTED
    assert len(pictures) - len(readable) == NUM_UNWANTED // 200
    assert len(blank) == NUM_UNWANTED // 100
    assert {pixels.shape for pixels in readable if pixels.std() >= 2} == {(28, 28)}


def test_hostile_names_occur_once_each(pool: Path) -> None:
    names = Counter(os.fsencode(path.stem) for path in pool.glob("*/*"))
    assert all(names[name] == 1 for name in HOSTILE_NAMES)
    assert sum(not name.isdigit() for name in names) == len(HOSTILE_NAMES)


def test_crops_are_distinct_have_contrast_and_depend_on_the_seed() -> None:
    crops = clipart_crops(2_500, seed=1)
    pixels = [np.asarray(Image.open(io.BytesIO(crop))) for crop in crops]
    assert len({image.tobytes() for image in pixels}) == len(crops) == 2_500
    assert {image.shape for image in pixels} == {(28, 28)} and min(image.std() for image in pixels) >= 24
    assert crops == clipart_crops(2_500, seed=1)
    assert crops != clipart_crops(2_500, seed=2)


def test_crops_are_dark_on_white_or_inverted() -> None:
    on_white, on_dark = (
        np.array([np.asarray(Image.open(io.BytesIO(crop))) for crop in clipart_crops(50, on_dark=on_dark)])
        for on_dark in (False, True)
    )
    assert on_white.mean() > 128 > on_dark.mean()


def test_an_existing_folder_is_not_written_to(pool: Path) -> None:
    with pytest.raises(FileExistsError, match="remove it"):
        write_raw_pool(pool)


def test_every_file_becomes_a_row_or_a_removed_row(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["embed", str(pool), "-o", "pool.parquet", "--model", "pixels", "--min-contrast", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    kept, removed = pq.read_table("pool.parquet"), pq.read_table("pool.removed.parquet")
    assert kept.num_rows + removed.num_rows == 12_000 + NUM_UNWANTED
    assert removed.num_rows == NUM_UNWANTED // 100 + NUM_UNWANTED // 200
    labels = Counter(kept["label"].to_pylist())
    assert len(labels) == 11 and labels[UNWANTED] == NUM_UNWANTED - removed.num_rows
    assert kept.num_rows == len(set(kept["image_id"].to_pylist()))
