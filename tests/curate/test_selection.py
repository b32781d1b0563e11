"""Images that stay on disk until they are written: order, identity, conditions and rows against plain Arrow."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.inputs import EmbeddedImages, open_input, read_embedded
from dinov2_toolkit.curate.retrieve.retrieve import RetrieveSettings, retrieve_images
from dinov2_toolkit.curate.retrieve.same_image import identity_of
from dinov2_toolkit.curate.selection import Selection, selected, write_table
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store import manifest as manifests
from dinov2_toolkit.store import tables
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.image_columns import image_batches, read_images
from dinov2_toolkit.store.manifest import Provenance, open_manifest
from dinov2_toolkit.store.vectors import Int64
from dinov2_toolkit.tests.embedded import write_embeddings


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything into pieces of few rows."""
    monkeypatch.setattr(manifests, "ROW_GROUP_ROWS", 7)
    monkeypatch.setattr(tables, "BATCH_ROWS", 50)


def pool_of(folder: Path, num_rows: int = 300, name: str = "pool") -> Path:
    """Write a pool in which ids and names repeat and are missing."""
    rng = np.random.default_rng(num_rows)
    ids = [None if number == 0 else f"{number:03}" for number in rng.integers(40, size=num_rows).tolist()]
    uris = [None if number == 0 else f"/{number}.png" for number in rng.integers(4, size=num_rows).tolist()]
    vectors = rng.normal(size=(num_rows, 6)).astype(np.float16)
    sizes = [(row, 2 * row) for row in range(num_rows)]
    labels = [None if row % 3 else f"class {row % 5}" for row in range(num_rows)]
    return write_embeddings(folder / f"{name}.parquet", vectors, image_ids=ids, uris=uris, sizes=sizes, labels=labels)


def queries_of(folder: Path) -> Path:
    vectors = np.random.default_rng(5).normal(size=(20, 6)).astype(np.float32)
    return write_embeddings(folder / "q.parquet", vectors, role="queries")


def opened(path: Path, where: str | None = None) -> EmbeddedImages:
    return read_embedded(open_input("pool", path, path.with_name("output.parquet"), where=where))


def test_the_order_is_by_id_then_uri_then_row_and_nulls_come_last(tmp_path: Path) -> None:
    path = pool_of(tmp_path)
    table = read_images(open_manifest(path)).append_column("row", pa.array(np.arange(300)))
    ranked = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ("image_id", "uri", "row")])
    assert (np.argsort(opened(path).order) == ranked.to_numpy()).all()


def test_rows_are_written_in_the_order_asked_for(tmp_path: Path) -> None:
    images, rng = opened(pool_of(tmp_path)), np.random.default_rng(0)
    table = read_images(images.source.manifest).append_column("row", pa.array(np.arange(300)))
    for indices in (rng.permutation(300), np.arange(0, 300, 2), rng.permutation(300)[:51], np.empty(0, np.int64)):
        number = pa.array(np.arange(len(indices)), pa.int32())
        rows = selected(images, indices).append_column(pa.field("number", pa.int32()), number)
        write_table(tmp_path / "output.parquet", rows, Provenance("selection", "test", {}), {})
        expected = table.take(pa.array(indices)).append_column("number", number)
        assert pq.read_table(tmp_path / "output.parquet").equals(expected)
        assert images.uris(indices).to_pylist() == expected.column("uri").to_pylist()


def test_rows_of_two_manifests_can_be_mixed(tmp_path: Path) -> None:
    first, second = opened(pool_of(tmp_path, 90)), opened(pool_of(tmp_path, 70, "other"))
    chosen = np.random.default_rng(0).permutation(90)[:60], np.random.default_rng(1).permutation(70)
    places = np.random.default_rng(2).permutation(130)
    rows = Selection(((first, chosen[0]), (second, chosen[1])), places, {})
    tables_of = [
        read_images(part.source.manifest).append_column("row", part.rows).take(pa.array(indices))
        for part, indices in ((first, chosen[0]), (second, chosen[1]))
    ]
    expected = pa.concat_tables(tables_of).take(pa.array(np.argsort(places)))
    assert pa.concat_tables(rows.batches()).equals(expected)
    assert [table.num_rows for table in rows.batches()] == [50, 50, 30]


def test_some_rows_of_some_columns_are_read_from_all_parts(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    whole = pa.table({"path": [f"{row}.png" for row in range(60)], "width": np.arange(60), "score": np.arange(60) / 7})
    for number, (start, stop) in enumerate(((0, 25), (25, 26), (26, 60))):
        pq.write_table(whole.slice(start, stop - start), folder / f"{number}.parquet", row_group_size=9)
    (folder / "_manifest.json").write_text(json.dumps({"parts": [f"{number}.parquet" for number in range(3)]}))
    manifest = open_manifest(folder)
    rows = np.array([0, 3, 8, 24, 25, 26, 44, 59])
    read = pa.concat_tables(image_batches(manifest, ["uri", "width"], more=["score"], rows=rows))
    assert read.column("uri").to_pylist() == [str(tmp_path / f"{row}.png") for row in rows.tolist()]
    assert read.column("width").to_pylist() == rows.tolist()
    assert read.column("score").to_pylist() == [row / 7 for row in rows.tolist()]
    assert read_images(manifest, 27).column("width").to_pylist() == list(range(27))
    found = np.concatenate([batch.column(0).to_numpy() for batch in tables.rows_where(manifest, "width % 5 = 1")])
    assert found.tolist() == list(range(1, 60, 5))


def same_image(queries: list[EmbeddedImages], pool: EmbeddedImages) -> list[list[bool]]:
    """Tell of every query and pool row whether they are the same image."""

    def keys(part: EmbeddedImages) -> list[tuple[object, ...]]:
        names = read_images(part.source.manifest).select(["image_id", "uri"]).to_pylist()
        named = [(row["image_id"], row["uri"]) for row in names]
        base = part.vectors.base.content_id
        return [(base, row) if key == (None, None) else key for row, key in enumerate(named)]

    of_pool = keys(pool)
    return [[key == other for other in of_pool] for part in queries for key in keys(part)]


def test_identity_is_by_name_and_without_one_by_row_of_the_same_embeddings(tmp_path: Path) -> None:
    pool, other = opened(pool_of(tmp_path)), opened(pool_of(tmp_path, 80, "other"))
    for queries in ([pool], [other], [other, pool]):
        identity = identity_of(queries, pool)
        found = identity.queries[:, None] == identity.pool[None, :]
        assert found.tolist() == same_image(queries, pool)
        assert (identity.pool[~found.any(axis=0)] == -1).all()


def written(queries: Path, pool: Path, output: Path, **settings: object) -> list[dict[str, object]]:
    made = RetrieveSettings(**settings)  # type: ignore[arg-type]
    retrieve_images(queries, pool, str(output), made, Options(force=True))
    rows: list[dict[str, object]] = pq.read_table(output).to_pylist()
    return rows


@pytest.mark.parametrize("mode", [{"k": 3}, {"k": 3, "fill": True}, {"per_cluster": 9, "num_clusters": 5}])
def test_a_condition_leaves_the_same_pool_as_a_manifest_of_these_rows(tmp_path: Path, mode: dict[str, object]) -> None:
    pool = pool_of(tmp_path)
    queries = queries_of(tmp_path)
    where = "width >= 100 and label is not null"
    kept = [row for row in range(100, 300) if row % 3 == 0]
    table = pq.read_table(pool).take(kept)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "less.parquet")
    rows = written(queries, pool, tmp_path / "a.parquet", where=where, **mode)
    less = written(queries, tmp_path / "less.parquet", tmp_path / "b.parquet", **mode)
    for row in less:
        row["row"] = kept[int(str(row["row"]))]
    assert rows == less and len(rows) > 20
    provenance = open_manifest(tmp_path / "a.parquet").provenance
    assert provenance is not None and provenance.parameters["where"] == where and provenance.figures["pool"] == 66
    retrieve_images(queries, pool, str(tmp_path / "a.parquet"), RetrieveSettings(where=where, **mode), Options())  # type: ignore[arg-type]
    with pytest.raises(ToolkitError, match="where width >= 100 and label is not null, now None"):
        retrieve_images(queries, pool, str(tmp_path / "a.parquet"), RetrieveSettings(**mode), Options())  # type: ignore[arg-type]


def test_a_limit_is_of_the_rows_before_the_condition(tmp_path: Path) -> None:
    images = open_input("pool", pool_of(tmp_path), tmp_path / "x.parquet", where="width >= 100")
    assert images.rows(150).tolist() == list(range(100, 150)) and images.num_rows() == 200
    assert (read_embedded(images, 150).vectors.rows == np.arange(100, 150)).all()


def test_a_condition_on_a_selection_asks_its_own_columns(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    queries = queries_of(tmp_path)
    written(queries, pool, tmp_path / "near.parquet", k=10)
    near = pq.read_table(tmp_path / "near.parquet")
    images = opened(tmp_path / "near.parquet", "rank <= 2 -- the nearest only")
    assert images.rows.to_pylist() == near.filter(pc.field("rank") <= 2).column("row").to_pylist()
    assert images.column("rank").to_pylist() == near.filter(pc.field("rank") <= 2).column("rank").to_pylist()


def test_a_condition_over_another_manifest_is_an_input(tmp_path: Path) -> None:
    pool, other = pool_of(tmp_path), pool_of(tmp_path, 20, "other")
    source = open_input("pool", pool, tmp_path / "x.parquet", where=f"width not in (select width from '{other}')")
    assert source.num_rows() == 280
    assert [each.role for each in source.sources()] == ["pool", "where"]


def test_a_wrong_condition_is_one_line(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    for where, words in (
        (
            "widht > 3",
            r"--where 'widht > 3' cannot be asked of .*pool\.parquet \(.*widht.*over its columns \(image_id, uri",
        ),
        ("width >", "cannot be asked"),
        ("width::date > 3", "cannot be asked"),
        ("label::int > 3", "cannot be asked"),
        ("width > 1000", "keeps none of the 300 rows"),
    ):
        with pytest.raises(ToolkitError, match=words) as problem:
            open_input("pool", pool, tmp_path / "x.parquet", where=where)
        assert "\n" not in str(problem.value)


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    vectors[17, 2] = np.nan
    pool = write_embeddings(tmp_path / "nan.parquet", vectors)
    with pytest.raises(ToolkitError, match="row 17 of .* not finite"):
        written(pool_of(tmp_path, 20), pool, tmp_path / "x.parquet")
    with pytest.raises(ToolkitError, match="row 17 of .* not finite"):
        written(pool, pool_of(tmp_path, 20), tmp_path / "x.parquet")


@pytest.mark.parametrize("which", ["queries", "pool"])
def test_a_manifest_without_rows_is_refused(tmp_path: Path, which: str) -> None:
    empty, full = write_embeddings(tmp_path / "empty.parquet", np.empty((0, 6), np.float32)), pool_of(tmp_path, 20)
    queries, pool = (empty, full) if which == "queries" else (full, empty)
    with pytest.raises(ToolkitError, match=r"empty\.parquet has no rows"):
        written(queries, pool, tmp_path / "x.parquet")


def test_pieces_do_not_show_in_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indices: Int64 = np.random.default_rng(0).permutation(300)
    written_ids = set()
    for piece in (5, 64, 1_000):
        monkeypatch.setattr(manifests, "ROW_GROUP_ROWS", piece)
        images = opened(pool_of(tmp_path))
        monkeypatch.setattr(tables, "BATCH_ROWS", piece)
        monkeypatch.setattr(manifests, "ROW_GROUP_ROWS", 7)
        made = write_table(tmp_path / "o.parquet", selected(images, indices), Provenance("selection", "test", {}), {})
        written_ids.add(made.content_id)
    assert len(written_ids) == 1
