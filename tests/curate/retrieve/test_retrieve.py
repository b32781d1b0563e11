"""Retrieval from a pool full of ties and copies, from manifest to manifest, against brute force over all pairs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.cluster.kmeans import cluster_vectors
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.retrieve.retrieve import RetrieveSettings, retrieve_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Provenance, Source, open_manifest
from dinov2_toolkit.store.vectors import Float64, Stored, Vectors
from dinov2_toolkit.tests.embedded import similarity, unit, write_embeddings

Row = dict[str, object]
Found = tuple[int, int, int]  # query, rank, pool image


@dataclass(frozen=True)
class Images:
    """What a manifest was written from."""

    path: Path
    vectors: Stored
    image_ids: list[str]
    uris: list[str]

    def key(self, row: int) -> tuple[str, str]:
        return self.image_ids[row], self.uris[row]


def planted(folder: Path, more: dict[str, pa.Array] | None = None) -> tuple[Images, Images]:
    """Write 40 queries and a pool of 400 around the same centres, with copies, and queries that are in the pool."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 16))
    vectors = centres[rng.integers(12, size=400)] + 0.4 * rng.normal(size=(400, 16))
    vectors[50:80] = vectors[3]  # more copies than most k ask for
    vectors[90:93] = vectors[7]
    pool_ids = [f"{number // 2:032x}" for number in rng.permutation(400).tolist()]  # two of each: uris break the tie
    pool_uris = [f"/pool/{row}.png" for row in range(400)]
    pool = Images(folder / "pool.parquet", vectors.astype(np.float16), pool_ids, pool_uris)
    write_embeddings(pool.path, pool.vectors, image_ids=pool_ids, uris=pool_uris, more=more)

    sought = centres[rng.integers(8, size=40)] + 0.4 * rng.normal(size=(40, 16))
    sought[:6] = vectors[[3, 7, 50, 90, 100, 101]]
    sought[30:33] = sought[29]  # equal queries want the same images
    ids, uris = [f"{row:031x}q" for row in range(40)], [f"/queries/{row}.png" for row in range(40)]
    for query, row in ((2, 50), (3, 90), (4, 100)):  # these are the pool's images; 0, 1 and 5 only look like them
        ids[query], uris[query] = pool.key(row)
    queries = Images(folder / "queries.parquet", sought.astype(np.float16), ids, uris)
    write_embeddings(queries.path, queries.vectors, image_ids=ids, uris=uris, role="queries")
    return queries, pool


def in_memory(vectors: Stored) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def brute_force(queries: Images, pool: Images, k: int) -> list[Found]:
    """Rank the whole pool for every query; a pool image stays with the query it is most similar to."""
    left, right = unit(queries.vectors), unit(pool.vectors)
    best: dict[int, tuple[float, int, int]] = {}
    for query in range(len(left)):
        others = [row for row in range(len(right)) if pool.key(row) != queries.key(query)]
        cosines = {row: similarity(left[query], right[row]) for row in others}
        ranked = sorted(others, key=lambda row: (-cosines[row], *pool.key(row)))
        for rank, row in enumerate(ranked[:k], start=1):
            if row not in best or (-cosines[row], query) < best[row][:2]:
                best[row] = (-cosines[row], query, rank)
    return sorted((query, rank, row) for row, (_, query, rank) in best.items())


def brute_force_of_clusters(
    queries: Images, pool: Images, clusters: list[int | None], centroids: Float64, num_wanted: int
) -> list[Found]:
    """Take of every cluster that a query falls into the images that are most similar to one of its queries."""
    left, right = in_memory(queries.vectors).exact(np.arange(40)), in_memory(pool.vectors).exact(np.arange(400))
    # In the order that `similarities` sums in: here 1 - 1e-16 and 1, both of copies, are compared across queries.
    cosines = [np.minimum(np.einsum("nd,nd->n", np.broadcast_to(query, right.shape), right), 1) for query in left]
    fallen = [int(np.argmax(centroids @ query)) for query in left]
    brought: list[list[int]] = [[] for _ in left]
    for cluster in set(fallen):
        offers = []
        for row in (row for row, own in enumerate(clusters) if own == cluster):
            mine = [q for q in range(40) if fallen[q] == cluster and queries.key(q) != pool.key(row)]
            if mine:
                best, query = min((-float(cosines[q][row]), q) for q in mine)
                offers.append((best, pool.key(row), query, row))
        for _, _, query, row in sorted(offers)[:num_wanted]:
            brought[query].append(row)
    return [(query, rank, row) for query, rows in enumerate(brought) for rank, row in enumerate(rows, start=1)]


def retrieve(queries: Path, pool: Path, output: Path, **settings: object) -> list[Row]:
    made = RetrieveSettings(**settings)  # type: ignore[arg-type]
    retrieve_images(queries, pool, str(output), made, Options(force=True))
    rows: list[Row] = pq.read_table(output).to_pylist()
    return rows


def provenance_of(path: Path) -> Provenance:
    provenance = open_manifest(path).provenance
    assert provenance is not None
    return provenance


def assert_same(rows: list[Row], expected: list[Found], queries: Images, pool: Images) -> None:
    """Compare images, query, rank, similarity and their order."""
    columns = ("query_id", "rank", "row", "image_id", "uri")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (queries.image_ids[query], rank, row, *pool.key(row)) for query, rank, row in expected
    ]
    left, right = unit(queries.vectors), unit(pool.vectors)
    cosines = [similarity(left[query], right[row]) for query, _, row in expected]
    assert [row["similarity"] for row in rows] == pytest.approx(cosines, abs=1e-7)


@pytest.mark.parametrize("k", [1, 4, 1_000])
def test_ties_and_collisions_are_settled_as_by_brute_force(tmp_path: Path, k: int) -> None:
    queries, pool = planted(tmp_path)
    rows = retrieve(queries.path, pool.path, tmp_path / "curated.parquet", k=k)
    expected = brute_force(queries, pool, k)
    assert_same(rows, expected, queries, pool)
    assert len(expected) == 400 if k == 1_000 else len(expected) < 400
    figures = provenance_of(tmp_path / "curated.parquet").figures
    num_wanted = 40 * k if k < 400 else 40 * 400 - 3  # three queries are in the pool themselves
    assert figures["retrieved"] == figures["images"] == len(expected)
    assert figures["collisions"] == num_wanted - len(expected)
    assert {row["source"] for row in rows} == {"queries"}  # the manifest of the queries


def test_an_image_that_two_queries_want_stays_with_the_most_similar(tmp_path: Path) -> None:
    def at(*degrees: float) -> Stored:
        radians = np.radians(degrees)
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

    names = ["a", "b", "c"]
    queries = write_embeddings(tmp_path / "queries.parquet", at(0, 20, 20), image_ids=names, role="queries")
    pool = write_embeddings(tmp_path / "pool.parquet", at(12, -30, 40))
    rows = retrieve(queries, pool, tmp_path / "curated.parquet", k=2)
    # The image at 12 degrees is nearest to both, and nearer to b; c, equal to b, comes later.
    assert [(row["query_id"], row["rank"], row["row"]) for row in rows] == [("a", 2, 1), ("b", 1, 0), ("b", 2, 2)]


def test_an_image_alone_retrieves_nothing(tmp_path: Path) -> None:
    alone = write_embeddings(tmp_path / "alone.parquet", np.ones((1, 4), np.float32))
    assert retrieve(alone, alone, tmp_path / "none.parquet") == []
    assert retrieve(alone, alone, tmp_path / "none.parquet", per_cluster=2) == []


@pytest.mark.parametrize("num_wanted", [1, 5, 1_000])
def test_per_cluster_takes_from_the_clusters_that_the_pool_has(tmp_path: Path, num_wanted: int) -> None:
    numbers = np.random.default_rng(2).integers(20, size=400).tolist()
    own: list[int | None] = [8 if number == 7 else number for number in numbers]  # 7 is empty
    own[10], own[11] = None, None
    queries, pool = planted(tmp_path, {"cluster_0": pa.array(own, pa.int32())})
    rows = retrieve(queries.path, pool.path, tmp_path / "curated.parquet", per_cluster=num_wanted)
    exact = unit(pool.vectors)
    members = [[row for row in range(400) if own[row] == cluster] for cluster in range(20)]
    means = unit(np.array([exact[rows].sum(axis=0) for rows in members]))  # zero, so nearest to no query, where empty
    assert_same(rows, brute_force_of_clusters(queries, pool, own, means, num_wanted), queries, pool)


def test_cluster_numbers_of_others_may_be_of_any_size_but_no_text(tmp_path: Path) -> None:
    numbers = np.random.default_rng(2).integers(20, size=400)
    queries, pool = planted(tmp_path, {"cluster_0": pa.array(numbers, pa.int32())})
    expected = retrieve(queries.path, pool.path, tmp_path / "curated.parquet", per_cluster=3)
    table = pq.read_table(pool.path)
    place = table.column_names.index("cluster_0")
    for kind, values in ((pa.int64(), numbers * (1 << 58)), (pa.string(), numbers.astype(str))):
        table = table.set_column(place, "cluster_0", pa.array(values, kind)).replace_schema_metadata()
        pq.write_table(table, tmp_path / f"{kind}.parquet")
    large = retrieve(queries.path, tmp_path / "int64.parquet", tmp_path / "large.parquet", per_cluster=3)
    assert [(row["uri"], row["query_id"]) for row in large] == [(row["uri"], row["query_id"]) for row in expected]
    with pytest.raises(ToolkitError, match=r"`cluster_0` of \S*string.parquet is string, not cluster numbers"):
        retrieve(queries.path, tmp_path / "string.parquet", tmp_path / "text.parquet", per_cluster=3)


@pytest.mark.parametrize("num_clusters", [None, 7, 1])
def test_per_cluster_makes_clusters_where_there_are_none(tmp_path: Path, num_clusters: int | None) -> None:
    queries, pool = planted(tmp_path)
    output = tmp_path / "curated.parquet"
    rows = retrieve(queries.path, pool.path, output, per_cluster=6, num_clusters=num_clusters)
    made = cluster_vectors(in_memory(pool.vectors), num_clusters or 20, num_resamplings=10, seed=0)  # 20 * 20 = 400
    centroids = unit(made.centroids)
    expected = brute_force_of_clusters(queries, pool, made.assignments.tolist(), centroids, 6)
    assert_same(rows, expected, queries, pool)
    figures = provenance_of(output).figures
    assert figures["clusters"] == (num_clusters or 20)
    assert figures["clusters_hit"] == len(set((unit(queries.vectors) @ centroids.T).argmax(axis=1)))


@pytest.mark.parametrize("settings", [{"k": 4}, {"per_cluster": 4, "num_clusters": 9}])
def test_a_query_that_is_in_the_pool_is_written_only_once(tmp_path: Path, settings: dict[str, object]) -> None:
    queries, pool = planted(tmp_path)
    without = retrieve(queries.path, pool.path, tmp_path / "without.parquet", **settings)
    rows = retrieve(queries.path, pool.path, tmp_path / "with.parquet", include_queries=True, **settings)
    keys = [queries.key(query) for query in range(40)]
    assert [(row["image_id"], row["uri"]) for row in rows if row["rank"] == 0] == keys
    assert [row for row in rows if row["rank"] != 0] == [
        row for row in without if (row["image_id"], row["uri"]) not in keys
    ]
    order = {image_id: query for query, image_id in enumerate(queries.image_ids)}
    places = [(order[str(row["query_id"])], int(str(row["rank"]))) for row in rows]
    assert places == sorted(places)


def test_weights_of_the_pool_are_carried(tmp_path: Path) -> None:
    weights = np.linspace(0.5, 2, 400).astype(np.float32)
    queries, pool = planted(tmp_path, {"weight": pa.array([None, *weights[1:].tolist()], pa.float32())})
    weights[0] = 1.0  # what none means
    rows = retrieve(queries.path, pool.path, tmp_path / "curated.parquet", k=1_000, include_queries=True)
    for row in rows:
        assert row["weight"] == (1.0 if row["rank"] == 0 else weights[int(str(row["row"]))])
    plain = write_embeddings(tmp_path / "plain.parquet", pool.vectors)
    assert "weight" not in retrieve(queries.path, plain, tmp_path / "plain_curated.parquet")[0]


def test_a_pool_that_was_deduplicated_refers_to_its_embeddings(tmp_path: Path) -> None:
    queries, pool = planted(tmp_path)
    unique = tmp_path / "unique.parquet"
    dedup_images(pool.path, str(unique), DedupSettings(0.9999), Options())
    kept = pq.read_table(unique).column("row").to_pylist()
    rows = retrieve(queries.path, unique, tmp_path / "curated.parquet", k=3)
    ids, uris = [pool.image_ids[row] for row in kept], [pool.uris[row] for row in kept]
    expected = brute_force(queries, Images(unique, pool.vectors[kept], ids, uris), 3)
    assert_same(rows, [(query, rank, kept[row]) for query, rank, row in expected], queries, pool)
    base = provenance_of(tmp_path / "curated.parquet").base
    assert len(kept) < 400 and base is not None and base.path == str(pool.path)


@pytest.mark.parametrize("settings", [RetrieveSettings(), RetrieveSettings(per_cluster=5, include_queries=True)])
def test_two_runs_write_the_same_content(tmp_path: Path, settings: RetrieveSettings) -> None:
    queries, pool = planted(tmp_path)
    for name in ("a.parquet", "b.parquet"):
        retrieve_images(queries.path, pool.path, str(tmp_path / name), settings, Options(seed=4))
    assert provenance_of(tmp_path / "a.parquet").content_id == provenance_of(tmp_path / "b.parquet").content_id


def test_a_limit_is_of_the_pool(tmp_path: Path) -> None:
    queries, pool = planted(tmp_path)
    output = tmp_path / "curated.parquet"
    retrieve_images(queries.path, pool.path, str(output), RetrieveSettings(k=2), Options(limit=150))
    less = Images(pool.path, pool.vectors[:150], pool.image_ids[:150], pool.uris[:150])
    assert_same(pq.read_table(output).to_pylist(), brute_force(queries, less, 2), queries, pool)


def test_a_bare_retrieve_without_both_or_by_two_models_lists_what_there_is(tmp_path: Path) -> None:
    output = str(tmp_path / "curated.parquet")
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    write_embeddings(tmp_path / "pool.parquet", vectors)
    with pytest.raises(ToolkitError, match=r"no manifest with role 'queries'.*pool\.parquet"):
        retrieve_images(None, None, output, RetrieveSettings(), Options())
    write_embeddings(tmp_path / "queries.parquet", vectors, role="queries", model="another")
    with pytest.raises(ToolkitError, match=r"two models.*queries\.parquet.*pool\.parquet"):
        retrieve_images(None, None, output, RetrieveSettings(), Options())


def test_impossible_settings_are_errors_of_a_dry_run_too(tmp_path: Path) -> None:
    queries, pool = planted(tmp_path)
    output = tmp_path / "curated.parquet"
    other = write_embeddings(tmp_path / "other.parquet", queries.vectors, model="another", role="queries")
    wide = tmp_path / "wide.parquet"  # of unknown origin
    pq.write_table(pa.table({"embedding": [[0.5] * 24] * 3}), wide)
    for given, settings, words in (
        (queries.path, RetrieveSettings(k=0), "--k 0 "),
        (queries.path, RetrieveSettings(k=4, per_cluster=4), "exclude each other"),
        (queries.path, RetrieveSettings(per_cluster=3, num_clusters=0), "--num-clusters 0 "),
        (queries.path, RetrieveSettings(per_cluster=3, num_clusters=401), "--num-clusters 401 is more than 400"),
        (other, RetrieveSettings(), "two models"),
        (wide, RetrieveSettings(), "24 and 16 numbers"),
    ):
        for options in (Options(), Options(dry_run=True)):
            with pytest.raises(ToolkitError, match=words):
                retrieve_images(given, pool.path, str(output), settings, options)
    for given in (queries.path, pool.path):
        with pytest.raises(ToolkitError, match="what the step reads"):
            retrieve_images(queries.path, pool.path, str(given), RetrieveSettings(), Options(force=True))
    assert not output.exists()


def drawn(num_rows: int, seed: int, dim: int = 12) -> Stored:
    return np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float16)


def query_set(tmp_path: Path, vectors: Stored) -> Path:
    ids = [f"q{row}" for row in range(len(vectors))]
    return write_embeddings(tmp_path / "seeds.parquet", vectors, image_ids=ids, role="queries")


def test_threads_and_a_second_run_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = query_set(tmp_path, drawn(40, 5))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(800, 6))
    clustered = tmp_path / "clustered.parquet"
    cluster_images(pool, str(clustered), ClusterSettings("20", resample=1), Options())
    for settings, manifest in ((RetrieveSettings(k=5), pool), (RetrieveSettings(per_cluster=7), clustered)):
        ids = set()
        for run, threads in enumerate((1, 2, 1)):
            monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
            output = tmp_path / f"{settings.k}-{run}.parquet"
            retrieve_images(queries, manifest, str(output), settings, Options())
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
        rows = retrieve(queries, pool, tmp_path / "curated.parquet", k=1)
        assert [(row["row"], row["query_id"]) for row in rows] == [(50 + row, f"{row:032x}") for row in range(10)]


def test_rows_without_names_are_identified_by_row(tmp_path: Path) -> None:
    vectors = drawn(30, 8)
    pool = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"embedding": vectors.astype(np.float32).tolist()}), pool)
    rows = retrieve(pool, pool, tmp_path / "curated.parquet", k=29)
    assert len(rows) == 30 and {row["query_id"] for row in rows} == {None}
    cosines = unit(vectors.astype(np.float32)) @ unit(vectors.astype(np.float32)).T - 2 * np.eye(30)
    by_row = {row["row"]: row["similarity"] for row in rows}
    assert [by_row[row] for row in range(30)] == pytest.approx(cosines.max(axis=0).tolist(), abs=1e-6)


def test_queries_are_written_before_what_they_retrieve(tmp_path: Path) -> None:
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
    rows = retrieve(seeds, pool, tmp_path / "curated.parquet", k=3, include_queries=True)
    themselves = [row for row in rows if row["rank"] == 0]
    assert [row["query_id"] for row in themselves] == ["q0", "q1", "q2", "q3", "/pool/7.png"]
    assert [(row["row"], row["source"], row["similarity"]) for row in themselves] == [(None, "queries", 1.0)] * 5
    assert [row["label"] for row in themselves] == list("abcde")
    assert [row["weight"] for row in rows] == [3.0 if row["rank"] == 0 else 1.0 for row in rows]
    assert [row["uri"] for row in rows].count("/pool/7.png") == 1
    order = [(["q0", "q1", "q2", "q3", "/pool/7.png"].index(str(row["query_id"])), row["rank"]) for row in rows]
    assert order == sorted(order)


def test_few_queries_say_how_many_images_k_can_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = query_set(tmp_path, drawn(3, 17))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(200, 18))
    retrieve(queries, pool, tmp_path / "curated.parquet", k=4)
    said = capsys.readouterr().err
    assert "--k retrieves at most 12 of 200 images; --per-cluster M takes up to M of every cluster with a query" in said


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


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    queries = query_set(tmp_path, drawn(5, 24))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(50, 25))
    before = sorted(tmp_path.rglob("*"))
    for settings in (RetrieveSettings(), RetrieveSettings(per_cluster=3)):
        assert retrieve_images(queries, pool, str(tmp_path / "c.parquet"), settings, Options(dry_run=True)) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_four_images_a_query_are_retrieved_by_default(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(50, 4))
    assert len(retrieve(query_set(tmp_path, drawn(1, 3)), pool, tmp_path / "curated.parquet")) == 4


def test_a_pool_without_clusters_is_clustered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = query_set(tmp_path, drawn(3, 15))
    pool = write_embeddings(tmp_path / "pool.parquet", drawn(200, 16))
    rows = retrieve(queries, pool, tmp_path / "curated.parquet", per_cluster=5)
    assert 0 < len(rows) <= 15 and "making 14 clusters" in capsys.readouterr().err
    retrieve(queries, pool, tmp_path / "curated.parquet", per_cluster=5, num_clusters=6)
    assert "making 6 clusters" in capsys.readouterr().err
