"""Retrieval against brute force over all queries and pool images."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.dedup import DedupSettings, dedup_images
from dinov2_toolkit.curate.retrieve import RetrieveSettings, retrieve_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.store.vectors import Stored
from dinov2_toolkit.tests.embedded import similarity, unit, write_embeddings

Found = tuple[int, int, int, float]  # query, rank, pool row, similarity


def drawn(num_rows: int, seed: int, dim: int = 12) -> Stored:
    return np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float16)


def shuffled_ids(num_rows: int, seed: int) -> list[str]:
    return [f"{number:032x}" for number in np.random.default_rng(seed).permutation(num_rows).tolist()]


def query_set(tmp_path: Path, vectors: Stored) -> Path:
    ids = [f"q{row}" for row in range(len(vectors))]
    return write_embeddings(tmp_path / "seeds.parquet", vectors, image_ids=ids, role="queries")


def retrieve(tmp_path: Path, queries: Path, pool: Path, **settings: object) -> list[dict[str, object]]:
    output = tmp_path / "curated.parquet"
    retrieve_images(queries, pool, str(output), RetrieveSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    rows: list[dict[str, object]] = pq.read_table(output).to_pylist()
    return rows


def found_in(rows: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(row["query_id"], row["rank"], row["row"], round(float(str(row["similarity"])), 6)) for row in rows]


def expected_rows(found: list[Found]) -> list[tuple[object, ...]]:
    return [(f"q{query}", rank, row, round(float(np.float32(cosine)), 6)) for query, rank, row, cosine in sorted(found)]


def nearest_by_brute_force(queries: Stored, pool: Stored, image_ids: list[str], k: int) -> list[Found]:
    """Rank the pool for every query; then give every pool image to the query that it is most similar to."""
    left, right = unit(queries), unit(pool)
    best: dict[int, Found] = {}
    for query, vector in enumerate(left):
        cosines = [similarity(vector, other) for other in right]
        ranked = sorted(range(len(right)), key=lambda row: (-cosines[row], image_ids[row]))[:k]
        for rank, row in enumerate(ranked, start=1):
            if row not in best or cosines[row] > best[row][3]:
                best[row] = (query, rank, row, cosines[row])
    return list(best.values())


@pytest.mark.parametrize("k", [1, 4, 40])
def test_retrieval_equals_brute_force(tmp_path: Path, k: int) -> None:
    queries, pool, image_ids = drawn(60, 0), drawn(500, 1), shuffled_ids(500, 2)
    pool[200:320] = pool[10]  # more copies than are looked at first
    queries[5], queries[6], queries[30] = pool[10], pool[10], queries[3]  # two of them the same query
    rows = retrieve(
        tmp_path,
        query_set(tmp_path, queries),
        write_embeddings(tmp_path / "pool.parquet", pool, image_ids=image_ids),
        k=k,
    )
    assert found_in(rows) == expected_rows(nearest_by_brute_force(queries, pool, image_ids, k))
    assert [row["image_id"] for row in rows] == [image_ids[int(str(row["row"]))] for row in rows]
    assert {row["source"] for row in rows} == {"seeds"}


def test_four_images_are_retrieved_when_nothing_else_is_said(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(50, 4))
    assert len(retrieve(tmp_path, query_set(tmp_path, drawn(1, 3)), pool)) == 4


def test_threads_and_a_second_run_do_not_show(tmp_path: Path) -> None:
    queries = query_set(tmp_path, drawn(40, 5))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(800, 6))
    clustered = tmp_path / "clustered.parquet"
    cluster_images(pool, str(clustered), ClusterSettings("20", resample=1), Options())
    before = faiss.omp_get_max_threads()
    for settings, manifest in ((RetrieveSettings(k=5), pool), (RetrieveSettings(per_cluster=7), clustered)):
        ids = set()
        for run, threads in enumerate((1, 2, 1)):
            faiss.omp_set_num_threads(threads)
            try:
                output = tmp_path / f"{settings.k}-{run}.parquet"
                retrieve_images(queries, manifest, str(output), settings, Options())
            finally:
                faiss.omp_set_num_threads(before)
            ids.add(open_manifest(output).content_id)
        assert len(ids) == 1


def test_a_query_that_is_in_the_pool_never_finds_itself(tmp_path: Path) -> None:
    vectors = drawn(100, 7)
    vectors[50:60] = vectors[:10]  # other files with the same content
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    subset = tmp_path / "subset.parquet"
    dedup_images(pool, str(subset), DedupSettings(threshold=1.0), Options(limit=10))
    again = write_embeddings(tmp_path / "again.parquet", vectors[:10], uris=[f"/pool/{row}.png" for row in range(10)])
    for queries in (subset, again):  # rows of the same base; another manifest of the same files
        rows = retrieve(tmp_path, queries, pool, k=1)
        assert [(row["row"], row["query_id"]) for row in rows] == [(50 + row, f"{row:032x}") for row in range(10)]


def test_rows_without_any_name_are_themselves_by_row(tmp_path: Path) -> None:
    vectors = drawn(30, 8)
    pool = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"embedding": vectors.astype(np.float32).tolist()}), pool)
    rows = retrieve(tmp_path, pool, pool, k=29)
    assert len(rows) == 30 and {row["query_id"] for row in rows} == {None}
    cosines = unit(vectors.astype(np.float32)) @ unit(vectors.astype(np.float32)).T - 2 * np.eye(30)
    by_row = {row["row"]: row["similarity"] for row in rows}
    assert [by_row[row] for row in range(30)] == pytest.approx(cosines.max(axis=0).tolist(), abs=1e-6)


def test_a_larger_k_than_the_pool_retrieves_all_of_it(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(9, 9))
    rows = retrieve(tmp_path, query_set(tmp_path, drawn(3, 10)), pool, k=100)
    assert sorted(int(str(row["row"])) for row in rows) == list(range(9))


def test_queries_come_along_first_of_their_own(tmp_path: Path) -> None:
    queries = drawn(5, 11)
    seeds = write_embeddings(
        tmp_path / "seeds.parquet",
        queries,
        image_ids=[*(f"q{row}" for row in range(4)), None],
        uris=[*(f"/seeds/{row}.png" for row in range(4)), "/pool/7.png"],
        labels=list("abcde"),
        more={"weight": pa.array([3.0] * 5, pa.float32())},
    )
    pool_vectors = drawn(40, 12)
    pool_vectors[7] = queries[0]
    ids: list[str | None] = [f"{row:032x}" for row in range(40)]
    ids[7] = None  # the last query, by its uri
    pool = write_embeddings(tmp_path / "pool.parquet", pool_vectors, image_ids=ids)
    rows = retrieve(tmp_path, seeds, pool, k=3, include_queries=True)
    themselves = [row for row in rows if row["rank"] == 0]
    assert [row["query_id"] for row in themselves] == ["q0", "q1", "q2", "q3", "/pool/7.png"]
    assert [(row["row"], row["source"], row["similarity"]) for row in themselves] == [(None, "queries", 1.0)] * 5
    assert [row["label"] for row in themselves] == list("abcde")
    assert [row["weight"] for row in rows] == [3.0 if row["rank"] == 0 else 1.0 for row in rows]
    assert [row["uri"] for row in rows].count("/pool/7.png") == 1
    order = [(["q0", "q1", "q2", "q3", "/pool/7.png"].index(str(row["query_id"])), row["rank"]) for row in rows]
    assert order == sorted(order)


def test_clusters_that_queries_fall_into_give_their_nearest_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    belongs = rng.integers(8, size=400)
    centres = rng.normal(size=(8, 12))
    pool_vectors = (centres[belongs] + 0.3 * rng.normal(size=(400, 12))).astype(np.float16)
    queries = (centres[[0, 0, 0, 3, 5, 5]] + 0.3 * rng.normal(size=(6, 12))).astype(np.float16)
    image_ids = shuffled_ids(400, 14)
    pool = write_embeddings(tmp_path / "pool.parquet", pool_vectors, image_ids=image_ids)
    clustered = tmp_path / "clustered.parquet"
    cluster_images(pool, str(clustered), ClusterSettings("10"), Options())
    clusters = pq.read_table(clustered)["cluster_0"].to_numpy()

    left, right = unit(queries), unit(pool_vectors)
    centroids = np.array([right[clusters == number].mean(axis=0) for number in range(10)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    fallen = (left @ centroids.T).argmax(axis=1)
    expected: list[Found] = []
    for number in sorted(set(fallen.tolist())):
        best = []
        for row in np.flatnonzero(clusters == number).tolist():
            mine = np.flatnonzero(fallen == number).tolist()
            query = max(mine, key=lambda q: (similarity(left[q], right[row]), -q))  # noqa: B023
            best.append((-similarity(left[query], right[row]), image_ids[row], query, row))
        brought: dict[int, int] = {}
        for cosine, _, query, row in sorted(best)[:12]:
            brought[query] = brought.get(query, 0) + 1
            expected.append((query, brought[query], row, -cosine))
    rows = retrieve(tmp_path, query_set(tmp_path, queries), clustered, per_cluster=12)
    assert found_in(rows) == expected_rows(expected)
    assert len(rows) == 12 * len(set(fallen.tolist()))


def test_a_pool_without_clusters_is_clustered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = query_set(tmp_path, drawn(3, 15))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(200, 16))
    rows = retrieve(tmp_path, queries, pool, per_cluster=5)
    assert 0 < len(rows) <= 15 and "making 14 clusters" in capsys.readouterr().err
    retrieve(tmp_path, queries, pool, per_cluster=5, num_clusters=6)
    assert "making 6 clusters" in capsys.readouterr().err


def test_few_queries_are_told_what_they_can_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = query_set(tmp_path, drawn(3, 17))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(200, 18))
    retrieve(tmp_path, queries, pool, k=4)
    said = capsys.readouterr().err
    assert "3 queries with --k 4 give at most 12 of 200 images" in said
    assert "--per-cluster M would give up to M from each of the at most 3 of 14 clusters" in said


def test_a_bare_retrieve_takes_the_newest_queries_and_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolkitError, match="no manifest with role"):
        retrieve_images(None, None, "curated.parquet", RetrieveSettings(), Options())
    query_set(tmp_path, drawn(5, 19))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(50, 20))
    dedup_images(pool, "unique.parquet", DedupSettings(threshold=0.99), Options())
    capsys.readouterr()
    retrieve_images(None, None, "curated.parquet", RetrieveSettings(), Options())
    said = capsys.readouterr().err
    assert "queries: seeds.parquet" in said and "pool: unique.parquet" in said
    retrieve_images(None, None, "curated.parquet", RetrieveSettings(), Options())
    assert "curated.parquet is up to date" in capsys.readouterr().err
    retrieve_images(None, pool, "other.parquet", RetrieveSettings(), Options())
    provenance = open_manifest(tmp_path / "other.parquet").provenance
    assert provenance is not None and provenance.base is not None and provenance.base.path == str(pool)
    assert {source.role for source in provenance.inputs} == {"pool", "queries", "model"}


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    queries = query_set(tmp_path, drawn(5, 21))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(50, 22))
    other = write_embeddings(tmp_path / "other.parquet", drawn(50, 22), model="another")
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"embedding": drawn(50, 23, 7).astype(np.float32).tolist()}), foreign)
    for manifest, settings, words in (
        (pool, RetrieveSettings(k=0), "--k 0"),
        (pool, RetrieveSettings(per_cluster=0), "--per-cluster 0"),
        (pool, RetrieveSettings(k=4, per_cluster=4), "exclude each other"),
        (pool, RetrieveSettings(num_clusters=4), "belongs to --per-cluster"),
        (pool, RetrieveSettings(per_cluster=4, num_clusters=0), "--num-clusters 0"),
        (pool, RetrieveSettings(per_cluster=4, num_clusters=51), "51 is more than"),
        (other, RetrieveSettings(), "two models"),
        (foreign, RetrieveSettings(), "12 and 7 numbers"),
    ):
        with pytest.raises(ToolkitError, match=words):
            retrieve_images(queries, manifest, str(tmp_path / "curated.parquet"), settings, Options())
    assert not (tmp_path / "curated.parquet").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    queries = query_set(tmp_path, drawn(5, 24))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(50, 25))
    before = sorted(tmp_path.rglob("*"))
    for settings in (RetrieveSettings(), RetrieveSettings(per_cluster=3)):
        assert retrieve_images(queries, pool, str(tmp_path / "c.parquet"), settings, Options(dry_run=True)) is None
    assert sorted(tmp_path.rglob("*")) == before
