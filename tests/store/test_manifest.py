"""Manifests: what is written is read back, whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store import manifest as module
from dinov2_toolkit.store.content_id import data_content_id
from dinov2_toolkit.store.manifest import (
    IMAGE_FIELDS,
    PROVENANCE_KEY,
    ROW_GROUP_ROWS,
    ManifestWriter,
    Provenance,
    Source,
    embedding_field,
    open_manifest,
    removed_path,
)

PROVENANCE = Provenance(
    kind="embeddings",
    command="curate embed",
    parameters={"model": "pixels"},
    seed=3,
    inputs=(Source("model", "m", "ab"),),
)


def images(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "image_id": [f"{row:032x}" for row in range(num_rows)],
            "uri": [f"/images/{row}.png" for row in range(num_rows)],
            "width": pa.array([4] * num_rows, pa.int32()),
            "height": pa.array([5] * num_rows, pa.int32()),
            "label": pa.array([None if row % 2 else "even" for row in range(num_rows)], pa.string()),
        }
    )


def write(path: Path, num_rows: int = 7, pieces: int = 1) -> ManifestWriter:
    vectors = np.arange(num_rows * 3, dtype=np.float16).reshape(num_rows, 3)
    field = embedding_field(3, pa.float16())
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 3).cast(field.type)
    table = images(num_rows).append_column(field, column)
    with ManifestWriter(path, [*IMAGE_FIELDS, field], PROVENANCE) as writer:
        for piece in range(pieces):
            writer.write(table.slice(piece * num_rows // pieces, num_rows // pieces))
        writer.set_figures(count=num_rows)
    return writer


def test_rows_and_provenance_come_back(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    manifest = open_manifest(tmp_path / "a.parquet")
    assert manifest.num_rows == 7
    assert manifest.read(["uri", "label"]).slice(0, 2).to_pylist() == [
        {"uri": "/images/0.png", "label": "even"},
        {"uri": "/images/1.png", "label": None},
    ]
    assert manifest.provenance is not None
    assert manifest.provenance.same_work(PROVENANCE)
    assert manifest.provenance.figures == {"count": 7}
    assert manifest.provenance.content_id == manifest.content_id == data_content_id(manifest.path)


def test_provenance_stands_in_the_schema_metadata(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    values = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[PROVENANCE_KEY.encode()])
    assert values["format"] == 1
    assert values["command"] == "curate embed"
    assert values["parameters"] == {"model": "pixels"}
    assert values["seed"] == 3
    assert values["inputs"] == [{"role": "model", "path": "m", "content_id": "ab"}]


def test_vectors_are_fixed_size_lists_without_dictionary(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    kind = pq.read_schema(tmp_path / "a.parquet").field("embedding").type
    assert pa.types.is_fixed_size_list(kind) and kind.list_size == 3 and pa.types.is_float16(kind.value_type)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    vectors = metadata.row_group(0).column(metadata.num_columns - 1)
    assert vectors.path_in_schema == "embedding.list.element"
    assert vectors.compression == "UNCOMPRESSED" and "RLE_DICTIONARY" not in vectors.encodings


def test_equal_rows_have_equal_bytes_and_content_ids(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet")
    assert first.provenance.content_id == second.provenance.content_id
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert write(tmp_path / "c.parquet", num_rows=8).provenance.content_id != first.provenance.content_id


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    before = (tmp_path / "a.parquet").read_bytes()
    with (
        pytest.raises(KeyboardInterrupt),
        ManifestWriter(tmp_path / "a.parquet", list(IMAGE_FIELDS), PROVENANCE) as writer,
    ):
        writer.write(images(2))
        raise KeyboardInterrupt
    assert (tmp_path / "a.parquet").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_limit_ends_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", num_rows=8, pieces=4)
    assert open_manifest(tmp_path / "a.parquet").read(["uri"], limit=5).num_rows == 5


def test_a_folder_of_parts_is_one_manifest(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "0.parquet", 3)
    write(tmp_path / "parts" / "1.parquet", 4)
    (tmp_path / "parts" / "_manifest.json").write_text(json.dumps({"parts": ["0.parquet", "1.parquet"]}))
    manifest = open_manifest(tmp_path / "parts")
    assert manifest.num_rows == 7
    assert manifest.read(["uri"]).column("uri").to_pylist() == [f"/images/{row}.png" for row in [0, 1, 2, 0, 1, 2, 3]]


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1" * 8])
def test_what_is_no_parquet_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ToolkitError, match="a.parquet is not a readable Parquet file"):
        open_manifest(tmp_path / "a.parquet")


def test_a_missing_manifest_and_a_plain_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no manifest at"):
        open_manifest(tmp_path / "none.parquet")
    with pytest.raises(ToolkitError, match="without _manifest.json"):
        open_manifest(tmp_path)


def test_a_foreign_file_has_a_content_id_of_its_content(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a", "b"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"uri": ["a", "b"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"uri": ["a", "c"]}), tmp_path / "c.parquet")
    first, same, other = (open_manifest(tmp_path / f"{name}.parquet") for name in "abc")
    assert first.provenance is None
    assert first.content_id == same.content_id != other.content_id


def test_removed_rows_stand_beside_their_manifest() -> None:
    assert removed_path(Path("x/pool.parquet")) == Path("x/pool.removed.parquet")


def test_reading_in_batches_keeps_no_more_than_a_few_row_groups(tmp_path: Path) -> None:
    dim, num_groups = 64, 24
    group = np.random.default_rng(0).normal(size=(ROW_GROUP_ROWS, dim)).astype(np.float32)
    fields = [pa.field("uri", pa.string()), embedding_field(dim, pa.float32())]
    with ManifestWriter(tmp_path / "m.parquet", fields, PROVENANCE) as writer:
        for _ in range(num_groups):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(group.reshape(-1)), type=fields[1].type)
            writer.write(pa.table([pa.array(["/a.png"] * len(group)), vectors], schema=pa.schema(fields)))
    before, most = pa.total_allocated_bytes(), 0
    for _ in open_manifest(tmp_path / "m.parquet").batches(["embedding"]):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 4 * group.nbytes  # of 24


def test_vectors_that_a_file_cannot_hold_are_refused_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their place would be allocated."""
    monkeypatch.setattr(module, "MOST_NUMBERS", 1 << 20)
    kind = pa.list_(pa.float16(), 1 << 19)
    numbers = pa.array(np.zeros(20 << 19, np.float16))
    vectors = pa.FixedSizeListArray.from_arrays(numbers, type=kind)
    pq.write_table(pa.table({"embedding": vectors}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(ToolkitError, match=r"declares 20 vectors of 524,288 numbers in [0-9,]+ bytes; make it again"):
        open_manifest(tmp_path / "bomb.parquet")


def test_a_pipe_is_no_manifest_nor_a_part_of_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "_manifest.json").write_text('{"parts": ["../pipe.parquet"]}')
    (tmp_path / "listed").mkdir()
    os.mkfifo(tmp_path / "listed" / "_manifest.json")
    for name in ("pipe.parquet", "parts", "listed"):
        with pytest.raises(ToolkitError, match="is a named pipe, not a regular file; name a file"):
            open_manifest(tmp_path / name)
