"""Vectors: a manifest's own, those of its base, and those of other features."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store import cache
from dinov2_toolkit.store.cache import cache_folder, cached
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, ROW_FIELD, ManifestWriter, Provenance, open_manifest
from dinov2_toolkit.store.vectors import base_rows, checked_rows, open_vectors


def foreign(path: Path, vectors: list[list[float]], kind: pa.DataType | None = None) -> Path:
    ids = [f"id{row}" for row in range(len(vectors))]
    column = pa.array(vectors, kind or pa.list_(pa.float32()))
    pq.write_table(pa.table({"image_id": ids, "uri": [f"/{name}" for name in ids], "embedding": column}), path)
    return path


def select(path: Path, base: Path, rows: list[int | None] | pa.Array) -> Path:
    provenance = Provenance("selection", "curate dedup", {}, base=open_manifest(base).source("base"))
    filled = [row if type(row) is int else 0 for row in rows]
    column = rows if isinstance(rows, pa.Array) else pa.array(rows, ROW_FIELD.type)
    table = pa.table(
        {
            "image_id": [f"id{row}" for row in filled],
            "uri": [f"/id{row}" for row in filled],
            "width": pa.nulls(len(rows), pa.int32()),
            "height": pa.nulls(len(rows), pa.int32()),
            "label": pa.nulls(len(rows), pa.string()),
            "row": column,
        }
    )
    with ManifestWriter(path, [*IMAGE_FIELDS, pa.field("row", column.type)], provenance) as writer:
        writer.write(table)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.float16()), pa.list_(pa.float32(), 2), pa.large_list(pa.float64())])
def test_any_list_of_floats_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = foreign(tmp_path / "a.parquet", [[3, 4], [0, 0], [1, 0]], kind)
    vectors = open_vectors(open_manifest(path))
    assert vectors.raw(0, 3).tolist() == [[3, 4], [0, 0], [1, 0]]
    np.testing.assert_allclose(vectors.unit(0, 2), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert vectors.exact(np.array([2, 0])).tolist() == [[1.0, 0.0], [0.6, 0.8]]


def test_a_selection_reads_its_rows_from_the_base(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[float(row), 1] for row in range(6)])
    vectors = open_vectors(open_manifest(select(tmp_path / "s.parquet", base, [4, 1, 5])))
    assert len(vectors) == 3
    assert vectors.raw(0, 3)[:, 0].tolist() == [4, 1, 5]
    assert vectors.raw(1, 2)[:, 0].tolist() == [1]


def test_what_is_opened_twice_is_the_same(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[float(row), 1] for row in range(6)])
    twice = open_vectors(open_manifest(base)), open_vectors(open_manifest(base))
    assert twice[0].are(twice[1])
    assert twice[0].take(np.array([2, 1])).are(twice[1].take(np.array([2, 1])))
    assert not twice[0].take(np.array([2, 1])).are(twice[1].take(np.array([1, 2])))
    other = foreign(tmp_path / "other.parquet", [[float(row), 2] for row in range(6)])
    assert not twice[0].are(open_vectors(open_manifest(other)))


def test_a_folder_moved_as_a_whole_still_works(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    base = foreign(tmp_path / "old" / "base.parquet", [[1, 2], [3, 4]])
    select(tmp_path / "old" / "s.parquet", base, [1])
    (tmp_path / "old").rename(tmp_path / "new")
    assert open_vectors(open_manifest(tmp_path / "new" / "s.parquet")).raw(0, 1).tolist() == [[3, 4]]


def test_a_base_that_changed_or_went_is_an_error(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[1, 2], [3, 4]])
    selection = open_manifest(select(tmp_path / "s.parquet", base, [1]))
    foreign(base, [[1, 2], [3, 5]])
    with pytest.raises(ToolkitError, match="has changed since"):
        open_vectors(selection)
    base.unlink()
    with pytest.raises(ToolkitError, match="are gone"):
        open_vectors(selection)


def test_other_features_are_matched_by_image(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[0, 1], [1, 1], [2, 1]])
    selection = open_manifest(select(tmp_path / "s.parquet", base, [2, 0]))
    pq.write_table(
        pq.read_table(foreign(tmp_path / "x.parquet", [[7], [8], [9]])).take([2, 1, 0]), tmp_path / "x.parquet"
    )
    assert open_vectors(selection, features=open_manifest(tmp_path / "x.parquet")).raw(0, 2).tolist() == [[9], [7]]
    foreign(tmp_path / "few.parquet", [[7]])
    with pytest.raises(ToolkitError, match="1 of 2 images .* are not in"):
        open_vectors(selection, features=open_manifest(tmp_path / "few.parquet"))


def test_a_selection_without_rows_is_named(tmp_path: Path) -> None:
    foreign(tmp_path / "base.parquet", [[0, 1], [1, 1]])
    with pytest.raises(ToolkitError, match=r"^\S*base.parquet refers to embeddings, but has no column `row`; make it"):
        base_rows(open_manifest(tmp_path / "base.parquet"))


def test_features_are_matched_by_text_alone(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[0, 1], [1, 1]])
    selection = open_manifest(select(tmp_path / "s.parquet", base, [1]))
    table = pq.read_table(base)
    place = table.column_names.index("image_id")
    pq.write_table(table.set_column(place, "image_id", table.column("image_id").cast(pa.large_string())), base)
    assert open_vectors(selection, features=open_manifest(base)).raw(0, 1).tolist() == [[1, 1]]
    pq.write_table(table.set_column(place, "image_id", pa.array([["x"], ["y"]])), base)
    with pytest.raises(
        ToolkitError, match=r"`image_id` column of \S*base.parquet is list<.*>; --features are matched by"
    ):
        open_vectors(selection, features=open_manifest(base))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1, 2], [np.nan, 1]], "row 1 of .* not finite"),
        ([[1, 2], [np.inf, 1]], "row 1 of .* not finite"),
        ([[1, 2], [1]], "not all 2 numbers long"),
        ([[1, 2], None], "not all 2 numbers long"),
        ([], "has no rows"),
    ],
)
def test_vectors_that_cannot_be_compared_are_errors(tmp_path: Path, vectors: list[list[float]], message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        open_vectors(open_manifest(foreign(tmp_path / "a.parquet", vectors)))
    assert cached() == []


def test_a_manifest_without_embeddings_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match="has no embeddings"):
        open_vectors(open_manifest(tmp_path / "a.parquet"))


def test_a_base_without_embeddings_is_an_error(tmp_path: Path) -> None:
    base = tmp_path / "base.parquet"
    pq.write_table(pa.table({"image_id": ["id0"], "uri": ["/id0"]}), base)
    with pytest.raises(ToolkitError, match=r"base.parquet has no embeddings \(columns: image_id, uri\); run"):
        open_vectors(open_manifest(select(tmp_path / "s.parquet", base, [0])))


def test_included_queries_have_no_row(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[1, 2], [3, 4]])
    with pytest.raises(ToolkitError, match="1 rows of .* have no vector"):
        open_vectors(open_manifest(select(tmp_path / "s.parquet", base, [1, None])))


def test_the_scratch_arrays_stay_below_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE_BYTES", 100)
    for number in range(3):
        open_vectors(open_manifest(foreign(tmp_path / f"{number}.parquet", [[number, 2.0, 3.0, 4.0]])))
    assert len(list(cache_folder().glob("*.npy"))) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pa.array([0, -1, 1]), r"`row` of .*s.parquet is -1 \(in its row 1\); it must be a whole number from 0"),
        (pa.array([0, 1, 2]), r"`row` of .*s.parquet is 2 \(in its row 2\), and .*base.parquet has 2 rows; make"),
        (pa.array([0, 1, 2**62]), r"is 4611686018427387904 \(in its row 2\), and .* has 2 rows"),
        (pa.array([0, 2**64 - 1], pa.uint64()), r"`row` of .* is 1.8446744073709552e\+19 \(in its row 1\)"),
        (pa.array([0.0, 1.5]), r"`row` of .* is 1.5 \(in its row 1\)"),
        (pa.array([0.0, 1e300]), r"`row` of .* is 1e\+300 \(in its row 1\)"),
        (pa.array([1.0, float("nan")], from_pandas=False), r"`row` of .* is nan \(in its row 1\)"),
        (pa.array([1.0, float("inf")]), r"`row` of .* is inf \(in its row 1\)"),
        (pa.array(["0", "1"]), "the `row` column of .* holds string; it must hold whole numbers"),
        (pa.array([[0], [1]]), "the `row` column of .* holds list"),
        (pa.array([True, False]), "the `row` column of .* holds bool"),
        (pa.array([0, None]), "1 rows of .* have no vector"),
        (pa.nulls(2), "2 rows of .* have no vector"),
    ],
)
def test_what_is_no_row_of_the_base_is_an_error(tmp_path: Path, rows: pa.Array, message: str) -> None:
    base = foreign(tmp_path / "base.parquet", [[1, 2], [3, 4]])
    path = select(tmp_path / "s.parquet", base, rows)
    with pytest.raises(ToolkitError, match=message):
        open_vectors(open_manifest(path))


def test_whole_numbers_of_any_type_are_rows(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[1, 2], [3, 4]])
    for kind in (pa.int8(), pa.uint64(), pa.float32()):
        path = select(tmp_path / "s.parquet", base, pa.array([1, 0]).cast(kind))
        assert open_vectors(open_manifest(path)).raw(0, 2)[:, 0].tolist() == [3, 1]


@pytest.mark.parametrize("value", [1e300, -1e39, 1e20])
def test_vectors_too_long_for_float32_are_errors(tmp_path: Path, value: float) -> None:
    path = foreign(tmp_path / "a.parquet", [[1, 2], [3, 4], [value, 1]], pa.list_(pa.float64()))
    with pytest.raises(ToolkitError, match=r"row 2 of .*a.parquet has a vector that overflows float32"):
        open_vectors(open_manifest(path))
    assert cached() == []


def test_rows_are_checked_where_no_vector_is_read(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base.parquet", [[1, 2], [3, 4]])
    manifest = open_manifest(select(tmp_path / "s.parquet", base, pa.array([0, 2])))
    with pytest.raises(ToolkitError, match=r"`row` of .* is 2 \(in its row 1\), and .*base.parquet has 2 rows"):
        checked_rows(manifest)
    base.unlink()
    assert checked_rows(manifest).to_pylist() == [0, 2]
