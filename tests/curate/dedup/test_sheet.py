"""The sheet of groups: which groups and images are on it, and that a missing image is only an empty tile."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.dedup.sheet import GROUPS, MEMBERS, shown_groups, shown_members
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.sheet import BLANK, Tile, draw_sheet, picture_provenance, read_tile
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest, removed_path
from dinov2_toolkit.tests.embedded import write_embeddings


def crowds(folder: Path, sizes: list[int]) -> Path:
    """Write a pool of groups of these sizes, looser from group to group, with an image file for every row."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    vectors, uris = [], []
    for number, size in enumerate(sizes):
        noise = rng.normal(size=(size, 64)) * 0.002 * (number + 1)
        vectors.append(centres[number] + noise)
        for member in range(size):
            file = folder / f"{number}-{member}.png"
            Image.new("RGB", (20, 20), (10 * number, 5 * member, 90)).save(file)
            uris.append(str(file))
    return write_embeddings(folder / "pool.parquet", np.concatenate(vectors).astype(np.float32), uris=uris)


def test_the_largest_groups_come_first_then_the_loosest_of_the_others(tmp_path: Path) -> None:
    sizes = [1, *range(2, 30)]
    pool = crowds(tmp_path, sizes)
    dedup_images(pool, str(tmp_path / "unique.parquet"), DedupSettings(0.5), Options())
    groups = shown_groups(open_manifest(tmp_path / "unique.parquet"))
    starts = np.cumsum([0, *sizes])
    largest = [int(starts[number]) for number in range(28, 28 - GROUPS, -1)]
    loosest = [int(starts[number]) for number in range(28 - GROUPS, 28 - 2 * GROUPS, -1)]  # each looser than the last
    assert list(groups)[:GROUPS] == largest
    assert sorted(list(groups)[GROUPS:]) == sorted(loosest)
    assert [heading.split(":")[0] for heading, _ in groups.values()] == ["large"] * GROUPS + ["loose"] * GROUPS

    removed = open_manifest(removed_path(tmp_path / "unique.parquet"))
    members = shown_members(removed, list(groups))
    assert {len(members[group]) for group in largest} == {MEMBERS}
    nine = int(starts[8])
    assert len(shown_members(removed, [nine])[nine]) == 8  # all the others
    captions = [float(tile.caption) for tile in members[largest[0]]]
    assert captions == sorted(captions, reverse=True)
    assert groups[largest[0]][0].split("similarity ")[1].split(",")[0] == f"{captions[-1]:.4f}"  # down to the lowest


def test_the_sheet_is_drawn_with_the_result_or_later_and_shows_missing_images_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = crowds(tmp_path, [3, 2, 1])
    (tmp_path / "0-1.png").unlink()
    output, sheet = tmp_path / "unique.parquet", tmp_path / "groups.png"
    dedup_images(pool, str(output), DedupSettings(0.5), Options())
    dedup_images(pool, str(output), DedupSettings(0.5, sheet=sheet), Options())  # up to date, but not drawn yet
    said = capsys.readouterr().err
    assert "0-1.png cannot be shown: no such file" in said and "groups.png: 2 groups" in said
    made = picture_provenance(sheet)
    assert made is not None and made.inputs[0].content_id == open_manifest(output).content_id
    with pytest.raises(ToolkitError, match="groups.png exists"):
        dedup_images(pool, str(tmp_path / "other.parquet"), DedupSettings(0.6, sheet=sheet), Options())
    assert not (tmp_path / "other.parquet").exists()


def test_groups_are_read_from_manifests_with_the_old_column_name(tmp_path: Path) -> None:
    output = tmp_path / "unique.parquet"
    dedup_images(crowds(tmp_path, [3, 2, 1]), str(output), DedupSettings(0.5), Options())
    groups = shown_groups(open_manifest(output))
    table = pq.read_table(output)
    old = ["weakest" if name == "min_similarity_to_kept" else name for name in table.column_names]
    metadata = {key: value for key, value in pq.read_metadata(output).metadata.items() if key != b"ARROW:schema"}
    pq.write_table(table.rename_columns(old).replace_schema_metadata(metadata), output)
    assert len(groups) == 2 and shown_groups(open_manifest(output)) == groups


def test_without_groups_there_is_no_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = crowds(tmp_path, [1, 1])
    settings = DedupSettings(0.99, sheet=tmp_path / "groups.png")
    dedup_images(pool, str(tmp_path / "unique.parquet"), settings, Options())
    assert not (tmp_path / "groups.png").exists() and "not drawn" in capsys.readouterr().err


def test_an_unreadable_image_is_an_empty_tile(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for uri in (None, str(tmp_path / "missing.png"), str(tmp_path / "broken.png"), "https://example.org/a.png"):
        tile = read_tile(uri, "0.9", 32)
        assert tile.image.size == (32, 32) and tile.image.getcolors() == [(32 * 32, tuple(bytes.fromhex(BLANK[1:])))]
        assert tile.caption == "0.9 cannot be read"


def test_headings_stand_above_their_rows() -> None:
    rows = [[[Tile(Image.new("RGB", (30, 30), "red"))]]] * 2
    plain, headed = (draw_sheet(rows, title="t", headings=headings, tile_px=30) for headings in ((), ("one", "two")))
    assert headed.height > plain.height
    reds = [np.flatnonzero((np.asarray(sheet)[:, 30] == (255, 0, 0)).all(axis=1)) for sheet in (plain, headed)]
    assert [len(rows_of) for rows_of in reds] == [60, 60]
