"""Several manifests as one: every image once, and drawn by training as often as its parts say."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.inputs import open_input
from dinov2_toolkit.curate.retrieve.retrieve import RetrieveSettings, retrieve_images
from dinov2_toolkit.curate.union import Part, UnionSettings, parse_parts, union_manifests
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.image_columns import read_images
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, Provenance, open_manifest
from dinov2_toolkit.store.vectors import open_vectors
from dinov2_toolkit.tests.embedded import write_embeddings
from dinov2_toolkit.train.data.images import drawn_rows, image_set

Row = dict[str, object]


def pool_of(folder: Path, num_rows: int = 60, name: str = "pool") -> Path:
    vectors = np.random.default_rng(num_rows).normal(size=(num_rows, 8)).astype(np.float16)
    ids = [f"{name}{row:03}" for row in range(num_rows)]
    return write_embeddings(folder / f"{name}.parquet", vectors, image_ids=ids)


def rows_of(pool: Path, output: Path, rows: list[int]) -> Path:
    """Write some rows of a pool as a selection of it."""
    wanted = f"row in ({', '.join(map(str, rows))})"
    everything = output.with_name(f"all-of-{pool.name}")
    dedup_images(pool, str(everything), DedupSettings(threshold=1.0), Options())
    union_manifests([Part(everything)], str(output), UnionSettings(where=wanted), Options(force=True))
    return output


def union(parts: list[Part], output: Path, **settings: object) -> tuple[list[Row], Provenance]:
    union_manifests(parts, str(output), UnionSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    provenance = open_manifest(output).provenance
    assert provenance is not None
    rows: list[Row] = pq.read_table(output).to_pylist()
    return rows, provenance


def test_what_was_retrieved_and_what_was_sampled_make_one_selection(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    vectors = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    queries = write_embeddings(tmp_path / "q.parquet", vectors, role="queries")
    retrieve_images(queries, pool, str(tmp_path / "near.parquet"), RetrieveSettings(k=4), Options())
    cluster_images(pool, str(tmp_path / "even.parquet"), ClusterSettings("5", resample=1, sample=20), Options())
    paths = [tmp_path / "near.parquet", tmp_path / "even.parquet"]
    rows, provenance = union([Part(path) for path in paths], tmp_path / "mix.parquet")
    near, even = (pq.read_table(path).to_pylist() for path in paths)
    seen = {row["row"] for row in near}
    assert [row["row"] for row in rows] == [
        *(row["row"] for row in near),
        *(r["row"] for r in even if r["row"] not in seen),
    ]
    assert [row["source"] for row in rows] == ["near"] * len(near) + ["even"] * (len(rows) - len(near))
    assert "weight" not in rows[0] and list(rows[0]) == [*(field.name for field in IMAGE_FIELDS), "source", "row"]
    assert provenance.kind == "selection" and provenance.base == open_input("pool", pool, tmp_path / "x").base()
    assert (open_vectors(open_manifest(tmp_path / "mix.parquet")).rows == [row["row"] for row in rows]).all()
    figures = provenance.figures
    assert figures["images"] == len(rows) and figures["collisions"] == len(near) + 20 - len(rows)
    dedup_images(tmp_path / "mix.parquet", str(tmp_path / "next.parquet"), DedupSettings(threshold=1.0), Options())
    assert open_manifest(tmp_path / "next.parquet").num_rows == len(rows)


def test_training_draws_each_part_as_often_as_its_share_says(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    few, many = (
        rows_of(pool, tmp_path / "few.parquet", list(range(10))),
        rows_of(pool, tmp_path / "many.parquet", list(range(10, 60))),
    )
    rows, provenance = union([Part(few, 3), Part(many, 1)], tmp_path / "mix.parquet")
    images = image_set(read_images(open_manifest(tmp_path / "mix.parquet")))
    drawn = drawn_rows(images, 0, np.arange(60 * 100))
    counts = np.bincount(drawn, minlength=60)
    assert counts[:10].sum() == pytest.approx(4500, abs=100) and counts[10:].sum() == pytest.approx(1500, abs=100)
    weights = np.array([row["weight"] for row in rows])
    assert weights == pytest.approx([4.5] * 10 + [0.3] * 50)  # of mean 1, so that a pass stays a pass
    composition = provenance.figures["composition"]
    assert composition == [
        {"source": "few", "rows": 10, "images": 10, "share": 0.75},
        {"source": "many", "rows": 50, "images": 50, "share": 0.25},
    ]


def test_an_image_of_several_parts_gets_what_each_gives_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    own = np.array([1, 3, 0], np.float32)
    write_embeddings(first, np.eye(3, 8, dtype=np.float32), image_ids=["x", "y", "z"], uris=["/x", "/y", "/z"],
                     more={"weight": pa.array(own)})  # fmt: skip
    write_embeddings(second, np.eye(2, 8, dtype=np.float32), image_ids=["y", "v"], uris=["/y", "/v"])
    rows, provenance = union([Part(first, 1), Part(second, 4)], tmp_path / "mix.parquet")
    assert [(row["image_id"], row["source"]) for row in rows] == [("x", "a"), ("y", "a"), ("z", "a"), ("v", "b")]
    shares = [0.2 / 4, 0.2 * 3 / 4 + 0.8 / 2, 0, 0.8 / 2]
    assert [row["weight"] for row in rows] == pytest.approx([4 * share for share in shares], rel=1e-6)
    assert provenance.kind == "images" and provenance.base is None and "row" not in rows[0]
    rows, _ = union([Part(first), Part(second)], tmp_path / "mix.parquet")
    assert [row["weight"] for row in rows] == [1, 3, 0, 1]  # as they are, 1 where a part has none


def test_the_same_content_in_another_place_is_another_image(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(
            pa.table({"image_id": ["x", None, None], "uri": [f"/{name}/1", "/2", None]}), tmp_path / f"{name}.parquet"
        )
    rows, _ = union([Part(tmp_path / "a.parquet"), Part(tmp_path / "b.parquet")], tmp_path / "mix.parquet")
    assert [(row["uri"], row["source"]) for row in rows] == [
        ("/a/1", "a"),
        ("/2", "a"),
        (None, "a"),
        ("/b/1", "b"),
        (None, "b"),
    ]


def test_rows_without_a_name_are_the_same_where_they_count_in_the_same_embeddings(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    nothing = [None] * 5
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, image_ids=nothing, uris=nothing)
    table = (
        pq.read_table(pool)
        .set_column(0, "image_id", pa.nulls(5, pa.string()))
        .set_column(1, "uri", pa.nulls(5, pa.string()))
    )
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(table.replace_schema_metadata(None), foreign)
    dedup_images(foreign, str(tmp_path / "all.parquet"), DedupSettings(threshold=1.0), Options())
    rows, provenance = union([Part(foreign), Part(tmp_path / "all.parquet")], tmp_path / "mix.parquet", where="true")
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4] and provenance.kind == "selection"


def test_a_grown_pool_takes_its_vectors_along(tmp_path: Path) -> None:
    old, new = pool_of(tmp_path, 30), pool_of(tmp_path, 20, "new")
    clean, survivors = (
        rows_of(old, tmp_path / "clean.parquet", [2, 5, 9]),
        rows_of(new, tmp_path / "fresh.parquet", [1, 4]),
    )
    rows, provenance = union([Part(clean), Part(survivors)], tmp_path / "grown.parquet", embeddings=True)
    assert provenance.kind == "embeddings" and provenance.model() is not None and "row" not in rows[0]
    vectors = open_vectors(open_manifest(tmp_path / "grown.parquet"))
    expected = np.concatenate(
        [open_vectors(open_manifest(part)).exact(np.arange(n)) for part, n in ((clean, 3), (survivors, 2))]
    )
    assert (vectors.exact(np.arange(5)) == expected).all() and vectors.array.dtype == np.float16
    images, provenance = union([Part(clean), Part(survivors)], tmp_path / "images.parquet")
    assert provenance.kind == "images" and [row["uri"] for row in images] == [row["uri"] for row in rows]
    other = write_embeddings(tmp_path / "other.parquet", np.eye(3, 8, dtype=np.float16), model="another")
    with pytest.raises(ToolkitError, match="two models"):
        union([Part(clean), Part(other)], tmp_path / "x.parquet", embeddings=True)


def test_a_condition_holds_for_every_part(tmp_path: Path) -> None:
    parts = [pool_of(tmp_path, 10, "a"), pool_of(tmp_path, 20, "b")]
    rows, provenance = union([Part(path) for path in parts], tmp_path / "mix.parquet", where="image_id like '%7'")
    assert [row["image_id"] for row in rows] == ["a007", "b007", "b017"]
    assert provenance.parameters["where"] == "image_id like '%7'"
    with pytest.raises(ToolkitError, match=r"keeps none of the 10 rows of .*a\.parquet"):
        union([Part(path) for path in parts], tmp_path / "mix.parquet", where="image_id = 'b007'")


def test_the_same_again_is_up_to_date_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [Part(pool_of(tmp_path, 10, "a"), 1), Part(pool_of(tmp_path, 20, "b"), 2)]
    output = tmp_path / "mix.parquet"
    _, first = union(parts, output)
    assert union(parts, output)[1].content_id == first.content_id
    union_manifests(parts, str(output), UnionSettings(), Options())
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(ToolkitError, match="weights"):
        union_manifests([Part(parts[0].path, 5), parts[1]], str(output), UnionSettings(), Options())
    assert union_manifests(parts, str(tmp_path / "no.parquet"), UnionSettings(), Options(dry_run=True)) is None
    assert not (tmp_path / "no.parquet").exists()


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    assert parse_parts(["a.parquet=0.5", "b.parquet=2"]) == (Part(Path("a.parquet"), 0.5), Part(Path("b.parquet"), 2.0))
    for texts, words in (
        (["a.parquet=0"], "'0' is no weight"),
        (["a.parquet=-1"], "'-1' is no weight"),
        (["a.parquet=nan"], "'nan' is no weight"),
        (["a.parquet=inf"], "'inf' is no weight"),
        (["a.parquet="], "'' is no weight"),
        (["a.parquet=2", "b.parquet"], r"b\.parquet without a weight"),
    ):
        with pytest.raises(ToolkitError, match=words):
            parse_parts(texts)
    pool = pool_of(tmp_path, 10)
    negative = tmp_path / "negative.parquet"
    pq.write_table(pa.table({"uri": ["a"], "weight": [-1.0]}), negative)
    nameless = tmp_path / "nameless.parquet"
    pq.write_table(pa.table({"width": [3]}), nameless)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), empty)
    for parts, output, words in (
        ([Part(pool), Part(pool)], "mix.parquet", "given twice"),
        ([Part(pool)], "pool.parquet", "is one of the parts"),
        ([Part(pool, 1), Part(negative, 1)], "mix.parquet", "negative values"),
        ([Part(pool), Part(nameless)], "mix.parquet", "names no images"),
        ([Part(pool, 1), Part(empty, 1)], "mix.parquet", "no rows to draw from"),
    ):
        with pytest.raises(ToolkitError, match=words):
            union(parts, tmp_path / output)
    assert not (tmp_path / "mix.parquet").exists()
    assert len(union([Part(pool), Part(empty)], tmp_path / "mix.parquet")[0]) == 10
