"""`dinov2 curate embed` after a stop, and over a folder that has changed: nothing is embedded twice."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.embed import embed, parts
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.embed.filters import Filters
from dinov2_toolkit.curate.embed.parts import finished_parts, read_arrow, work_folder
from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.features.extract import extract
from dinov2_toolkit.features.extract.decoding import ImageBatch
from dinov2_toolkit.features.extract.extract import FeatureModel
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.cache import cache_folder

NUM_IMAGES, NUM_BROKEN = 50, 3
FILES = ("pool.parquet", "pool.removed.parquet")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "BLOCK_ENTRIES", 20)


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Fifty images in two folders, and three files that are none."""
    folder = tmp_path / "photos"
    for number in range(NUM_IMAGES):
        draw(folder / ("cat", "dog")[number % 2] / f"{number:02}.png", number)
    for number in range(NUM_BROKEN):
        (folder / "cat" / f"{number}x.png").write_text("no image")
    return folder


@pytest.fixture
def settings(run: Path) -> EmbedSettings:
    return EmbedSettings(model=str(run), dtype="float32", batch_size=8, num_workers=2)


def rows(path: str = "pool.parquet") -> list[dict[str, object]]:
    listed: list[dict[str, object]] = pq.read_table(path).to_pylist()
    return listed


def files() -> list[bytes]:
    return [Path(name).read_bytes() for name in FILES]


def embedded(sources: list[str], settings: EmbedSettings, **options: bool) -> None:
    embed_images(sources, "pool.parquet", settings, Options(**options))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many images every batch has; SIGTERM comes where `stop_after` says."""
    counts: list[int] = []
    forward_batch = extract._forward_batch

    def counting(model: FeatureModel, batch: ImageBatch, *arguments: Any) -> object:
        counts.append(len(batch.pixels))
        if len(counts) == int(os.environ.get("STOP_AFTER", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_batch(model, batch, *arguments)

    monkeypatch.setattr(extract, "_forward_batch", counting)
    return counts


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_a_stopped_run_resumes_and_ends_like_one_without_a_stop(
    photos: Path,
    settings: EmbedSettings,
    seen: list[int],
    batches: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    embedded(["photos"], settings)
    whole = files()
    assert sum(seen) == NUM_IMAGES
    for name in FILES:
        Path(name).unlink()

    seen.clear()
    monkeypatch.setenv("STOP_AFTER", str(batches))
    with pytest.raises(Stopped, match=r"stopped: \d+ of 53 images are embedded and kept; the same command resumes"):
        embedded(["photos"], settings)
    assert not Path("pool.parquet").exists()
    monkeypatch.delenv("STOP_AFTER")
    capsys.readouterr()
    embedded(["photos"], settings)
    assert "resuming: " in capsys.readouterr().err
    assert files() == whole
    assert NUM_IMAGES <= sum(seen) <= NUM_IMAGES + 8  # a batch that was begun is begun again
    assert not work_folder(Path("pool.parquet")).exists()


def test_a_failure_leaves_no_folder_of_its_own_and_every_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("DINOV2_CATALOG", str(own / "catalog.duckdb"))
    with pytest.raises(ToolkitError, match="no file or folder missing"):
        embed_images(["missing"], "pool.parquet", EmbedSettings(), Options())
    assert list(own.iterdir()) == []
    monkeypatch.delenv("DINOV2_CATALOG")
    with pytest.raises(ToolkitError, match="no file or folder missing"):
        embed_images(["missing"], "pool.parquet", EmbedSettings(), Options())
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_parts_with_other_settings_are_discarded_with_a_message(
    photos: Path,
    settings: EmbedSettings,
    seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STOP_AFTER", "4")
    with pytest.raises(Stopped):
        embedded(["photos"], settings)
    seen.clear()
    monkeypatch.delenv("STOP_AFTER")
    embedded(["photos"], EmbedSettings(str(settings.model), labels="none", dtype="float32"))
    assert "that a stopped run embedded with other settings (labels folder, now none)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert sum(seen) == NUM_IMAGES


def test_force_starts_afresh(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AFTER", "4")
    with pytest.raises(Stopped):
        embedded(["photos"], settings)
    monkeypatch.delenv("STOP_AFTER")
    seen.clear()
    embedded(["photos"], settings, force=True)
    assert sum(seen) == NUM_IMAGES
    seen.clear()
    embedded(["photos"], settings, force=True)
    assert sum(seen) == NUM_IMAGES


def test_an_interrupted_force_resumes_without_it(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(["photos"], EmbedSettings(str(settings.model), labels="none"))
    seen.clear()
    monkeypatch.setenv("STOP_AFTER", "4")
    with pytest.raises(Stopped):
        embedded(["photos"], settings, force=True)
    monkeypatch.delenv("STOP_AFTER")
    embedded(["photos"], settings)
    assert sum(seen) <= NUM_IMAGES + 8
    assert rows()[0]["label"] == "cat"


def test_a_part_that_is_half_written_is_made_again(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(["photos"], settings)
    whole = files()
    embedded_again = EmbedSettings(str(settings.model), dtype="float32", batch_size=8)
    monkeypatch.setenv("STOP_AFTER", str(len(seen) + 4))
    with pytest.raises(Stopped):
        embedded(["photos"], embedded_again, force=True)
    assert files() == whole  # until the end
    (part,) = finished_parts(work_folder(Path("pool.parquet")))
    half = part.with_name(f".{part.name}.1.tmp")  # as a kill leaves it
    half.write_bytes(part.read_bytes()[:100])
    part.unlink()
    monkeypatch.delenv("STOP_AFTER")
    embedded(["photos"], embedded_again)
    assert files() == whole and not half.exists()


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_SECONDS", 0.0)
    write_part = parts.write_part

    def full(folder: Path, table: pa.Table) -> None:
        if len(finished_parts(folder)) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_part(folder, table)

    monkeypatch.setattr(parts, "write_part", full)
    with pytest.raises(ToolkitError, match="the disk is full; 20 images are kept: make room and run the same command"):
        embedded(["photos"], settings)
    seen.clear()
    monkeypatch.setattr(parts, "write_part", write_part)
    embedded(["photos"], settings)
    assert sum(seen) == NUM_IMAGES - 20 + NUM_BROKEN


@pytest.mark.parametrize("name", ["part", "provenance.json", "listing.arrow", "todo.arrow", "lock"])
@pytest.mark.parametrize("how", ["empty", "cut", "one byte", "gone"])
def test_a_stopped_run_whose_scratch_is_damaged_ends_like_one_without_a_stop(
    photos: Path,
    settings: EmbedSettings,
    name: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    embedded(["photos"], settings)
    whole = files()
    for file in FILES:
        Path(file).unlink()
    monkeypatch.setattr(parts, "PART_SECONDS", 0.0)
    count, write_part = iter(range(99)), parts.write_part

    def stopping(folder: Path, table: pa.Table) -> None:
        write_part(folder, table)
        if next(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "write_part", stopping)
        embedded(["photos"], settings)
    folder = work_folder(Path("pool.parquet"))
    path = finished_parts(folder)[1] if name == "part" else folder / name
    data, half = path.read_bytes(), path.stat().st_size // 2
    path.unlink()
    if how != "gone":
        changed = (
            data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :] if data and how == "one byte" else data[:half]
        )
        path.write_bytes(b"" if how == "empty" else changed)
    capsys.readouterr()
    embedded(["photos"], settings)
    assert files() == whole and not folder.exists()
    if name == "part" and how != "gone":
        assert f"{path} is damaged; it is made again" in capsys.readouterr().err


def test_two_commands_do_not_write_one_output(photos: Path, settings: EmbedSettings) -> None:
    with (
        parts.locked(work_folder(Path("pool.parquet")), Path("pool.parquet")),
        pytest.raises(ToolkitError, match="another process is embedding to pool.parquet"),
    ):
        embedded(["photos"], settings)


def change(photos: Path) -> None:
    """Add, change, touch, rename and remove files."""
    for number in range(100, 105):
        draw(photos / "cow" / f"{number}.png", number)
    draw(photos / "cat" / "00.png", 500)  # changed
    os.utime(photos / "cat" / "02.png", (1, 1))  # touched
    (photos / "cat" / "04.png").rename(photos / "dog" / "04.png")
    (photos / "cat" / "06.png").unlink()
    (photos / "cat" / "0x.png").unlink()


def test_only_new_and_changed_images_of_a_folder_are_embedded(
    photos: Path, settings: EmbedSettings, seen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    embedded(["photos"], settings)
    before = {str(row["uri"]): row for row in rows()}
    change(photos)
    seen.clear()
    capsys.readouterr()
    embedded(["photos"], settings)
    said = capsys.readouterr().err
    assert "pool.parquet: 46 images reused, 10 new or changed to read, 2 gone" in said
    assert "54 images embedded, 48 of them reused, 2 files removed" in said
    assert sum(seen) == 6  # five new, one changed: the touched and the renamed one are known by their bytes
    after = rows()
    for row in after:
        if (old := before.get(str(row["uri"]))) and "cat/00" not in str(row["uri"]):
            assert row == old
    updated = files()
    embedded(["photos"], settings, force=True)
    afresh = rows()
    for row in [*after, *afresh]:
        row["embedding"] = np.round(np.array(row["embedding"]), 5).tolist()  # batches differ in the last bit
    assert after == afresh
    assert files()[1] == updated[1]
    assert next(row for row in after if "dog/04" in str(row["uri"]))["label"] == "dog"


def test_without_its_cache_an_image_is_recognised_by_its_bytes(
    photos: Path, settings: EmbedSettings, seen: list[int]
) -> None:
    embedded(["photos"], settings)
    change(photos)
    shutil.rmtree(cache_folder())
    seen.clear()
    embedded(["photos"], settings)
    assert sum(seen) == 6 and len(rows()) == 54


def test_an_update_can_be_stopped_too(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(["photos"], settings)
    for number in range(100, 140):
        draw(photos / "ant" / f"{number}.png", number)
    shutil.copytree(".", "../whole", ignore=shutil.ignore_patterns("photos"))
    embedded(["photos"], settings)
    whole = files()
    for name in FILES:
        shutil.copy(f"../whole/{name}", name)
    monkeypatch.setenv("STOP_AFTER", str(len(seen) + 3))
    seen_before = sum(seen)
    with pytest.raises(Stopped):
        embedded(["photos"], settings)
    monkeypatch.delenv("STOP_AFTER")
    embedded(["photos"], settings)
    assert files() == whole
    assert sum(seen) - seen_before <= 48
    shutil.rmtree("../whole")


def test_images_that_come_while_it_is_stopped_cost_only_themselves(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AFTER", "4")
    with pytest.raises(Stopped):
        embedded(["photos"], settings)
    monkeypatch.delenv("STOP_AFTER")
    draw(photos / "ant" / "1.png", 1_000)
    embedded(["photos"], settings)
    assert len(rows()) == NUM_IMAGES + 1
    assert sum(seen) <= NUM_IMAGES + 1 + 8


def test_rows_of_a_manifest_are_resumed_and_later_recognised_by_their_bytes(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [str(path) for path in sorted(photos.rglob("*.png"))]
    pq.write_table(pa.table({"uri": uris}), "list.parquet")
    monkeypatch.setenv("STOP_AFTER", "4")
    with pytest.raises(Stopped):
        embedded(["list.parquet"], settings)
    monkeypatch.delenv("STOP_AFTER")
    embedded(["list.parquet"], settings)
    assert NUM_IMAGES <= sum(seen) <= NUM_IMAGES + 8
    before = rows()
    seen.clear()
    draw(photos / "cat" / "00.png", 500)
    pq.write_table(pa.table({"uri": uris[::-1]}), "list.parquet")
    embedded(["list.parquet"], settings)
    assert sum(seen) == 1
    changed = str(photos / "cat" / "00.png")
    after = [row for row in rows()[::-1] if row["uri"] != changed]
    assert after == [row for row in before if row["uri"] != changed]


def test_a_file_that_is_listed_twice_has_two_equal_rows(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AFTER", "2")
    with pytest.raises(Stopped):
        embedded(["photos", "photos/dog"], EmbedSettings(str(settings.model), labels="none"))
    monkeypatch.delenv("STOP_AFTER")
    embedded(["photos", "photos/dog"], EmbedSettings(str(settings.model), labels="none"))
    table = rows()
    dogs = [row for row in table[:NUM_IMAGES] if "/dog/" in str(row["uri"])]
    assert table[NUM_IMAGES:] == dogs and len(dogs) == NUM_IMAGES // 2


def test_parts_of_an_older_version_are_discarded_with_a_message(
    photos: Path, settings: EmbedSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = work_folder(Path("pool.parquet"))
    folder.mkdir(parents=True)
    (folder / "work.json").write_text("{}")
    parts.write_part(folder, pa.table({"number": range(8)}))
    embedded(["photos"], settings)
    assert "discarding 8 images that a stopped run embedded" in " ".join(capsys.readouterr().err.split())
    assert len(rows()) == NUM_IMAGES and not folder.exists()


def test_an_update_that_would_drop_most_images_is_refused(photos: Path, settings: EmbedSettings) -> None:
    embedded(["photos"], settings)
    written = files()
    shutil.rmtree(photos / "cat")
    (photos / "dog" / "01.png").unlink()
    with pytest.raises(ToolkitError, match="has 50 images, and the sources list only 24 of them now; .*--force"):
        embedded(["photos"], settings)
    assert files() == written
    embedded(["photos"], settings, force=True)
    assert len(rows()) == 24


def test_what_was_stopped_is_embedded_in_the_batches_of_a_run_without_a_stop(
    photos: Path, settings: EmbedSettings, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(["photos"], settings, force=True)  # blocks of 20, batches of 8; three of the first block are no images
    assert seen == [8, 8, 1, 8, 8, 4, 8, 5]
    seen.clear()
    monkeypatch.setenv("STOP_AFTER", "2")
    with pytest.raises(Stopped):
        embedded(["photos"], settings, force=True)
    monkeypatch.delenv("STOP_AFTER")
    todo = read_arrow(work_folder(Path("pool.parquet")) / "todo.arrow")
    assert todo.column("position").to_pylist() == list(range(53))
    embedded(["photos"], settings)
    assert seen == [8, 8, 1, 8, 8, 4, 8, 5]


def test_filtered_images_are_removed_with_their_numbers_and_are_no_failures(photos: Path, run: Path) -> None:
    Image.new("L", (40, 40), 7).save(photos / "grey.png")
    Image.new("L", (20, 40), 7).save(photos / "small.png")
    settings = EmbedSettings(str(run), filters=Filters(min_side=25, min_contrast=2.0), max_failed=0.06)
    embedded(["photos"], settings)  # 3 of 55 cannot be read
    assert len(rows()) == NUM_IMAGES
    assert [row["reason"] for row in rows("pool.removed.parquet")][-2:] == [
        "below --min-contrast 2: 0.00",
        "below --min-side 25: 20 x 40 pixels",
    ]


def command(*arguments: str, **options: object) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "dinov2_toolkit", "curate", "embed", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(photos: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "BLOCK_ENTRIES", 1_024)
    for number in range(1_000):  # so many that both have a share
        shutil.copy(photos / "cat" / "00.png", photos / f"{number:04}.png")
    arguments = ["photos", "-o", "pool.parquet", "--model", str(run)]
    embed_images(["photos"], "pool.parquet", EmbedSettings(str(run)), Options())
    whole = files()
    for name in FILES:
        Path(name).unlink()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = command(*arguments, "--num-processes", "2", env=environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "pool.parquet\n"), err
    assert err.count("images embedded") == 1
    assert files() == whole
