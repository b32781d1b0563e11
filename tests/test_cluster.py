"""k-means, hierarchies and balanced subsets of made-up embeddings."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.cluster import ClusterSettings, cluster_images, cluster_levels, parse_num_clusters
from dinov2_toolkit.curate.kmeans import KMeansSettings, cluster_vectors
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Source, open_manifest
from dinov2_toolkit.store.vectors import Int64, Stored, Vectors
from dinov2_toolkit.tests.embedded import unit, write_embeddings

SIZES = (200, 60, 20, 12, 8)  # a long tail


def blobs(seed: int = 0) -> tuple[Stored, Int64]:
    """Return 300 vectors around five directions far apart, and to which each belongs, in mixed order."""
    rng = np.random.default_rng(seed)
    belongs = rng.permutation(np.repeat(np.arange(5), SIZES))
    return (np.eye(16)[belongs] + 0.05 * rng.normal(size=(300, 16))).astype(np.float16), belongs


def in_memory(vectors: Stored) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def cluster(pool: Path, name: str = "clusters.parquet", **settings: object) -> list[dict[str, object]]:
    output = pool.with_name(name)
    cluster_images(pool, str(output), ClusterSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    rows: list[dict[str, object]] = pq.read_table(output).to_pylist()
    return rows


def figures_of(path: Path) -> dict[str, object]:
    provenance = open_manifest(path).provenance
    assert provenance is not None
    return provenance.figures


def same_partition(one: Int64, other: Int64) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize("resample", [0, 10])
def test_clusters_are_the_groups_that_are_there(tmp_path: Path, resample: int) -> None:
    vectors, belongs = blobs()
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, labels=[f"group {group}" for group in belongs])
    rows = cluster(pool, num_clusters="5", resample=resample)
    assert [row["row"] for row in rows] == list(range(300))
    assert same_partition(np.array([row["cluster_0"] for row in rows]), belongs)
    figures = figures_of(tmp_path / "clusters.parquet")
    assert (figures["smallest_0"], figures["median_0"], figures["largest_0"]) == (8, 20.0, 200)
    shares = np.array(SIZES) / 300
    expected = -(shares * np.log(shares)).sum() / np.log(5)
    assert figures["entropy_0"] == pytest.approx(expected) == figures["class_entropy"]


def test_every_vector_is_with_its_most_similar_centroid() -> None:
    vectors: Stored = np.random.default_rng(1).normal(size=(500, 12)).astype(np.float32)
    made = cluster_levels(in_memory(vectors), [20, 4], KMeansSettings(resample=3), 0)
    levels, distances = made.levels, made.distances
    found = cluster_vectors(in_memory(vectors), 20, num_resamplings=3, seed=0)
    products = unit(vectors) @ unit(found.centroids).T
    assert levels[0].tolist() == found.assignments.tolist() == products.argmax(axis=1).tolist()
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), np.ones(20), atol=1e-5)
    np.testing.assert_allclose(distances, 1 - products.max(axis=1), atol=1e-6)
    assert levels[1].shape == (20,) and set(levels[1].tolist()) == {0, 1, 2, 3}


def test_upper_levels_group_the_clusters_below(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    above = rng.permutation(np.repeat(np.arange(3), 100))
    below = 4 * above + rng.integers(4, size=300)
    centres = np.repeat(np.eye(24)[:3], 4, axis=0) + 0.4 * np.eye(24)[3:15]
    pool = write_embeddings(
        tmp_path / "pool.parquet", (centres[below] + 0.02 * rng.normal(size=(300, 24))).astype(np.float16)
    )
    rows = cluster(pool, num_clusters="12,3")
    coarse_of_fine = {(row["cluster_0"], row["cluster_1"]) for row in rows}
    assert len(coarse_of_fine) == len({fine for fine, _ in coarse_of_fine}) == 12
    assert same_partition(np.array([row["cluster_1"] for row in rows]), above)


def test_resampling_moves_centroids_from_crowds_to_the_rest() -> None:
    rng = np.random.default_rng(3)
    crowd = np.eye(8)[0] + 0.3 * rng.normal(size=(2_000, 8))
    rest = np.eye(8)[1] + 0.3 * rng.normal(size=(200, 8))
    points = unit(np.concatenate([crowd, rest]).astype(np.float32)).astype(np.float32)

    def share_of_rest(num_resamplings: int) -> float:
        centroids = cluster_vectors(in_memory(points), 40, num_resamplings=num_resamplings, seed=0).centroids
        return float((centroids[:, 1] > centroids[:, 0]).mean())

    assert share_of_rest(10) > 1.5 * share_of_rest(0)


def test_no_cluster_is_empty_where_there_are_enough_distinct_vectors() -> None:
    rng = np.random.default_rng(4)
    vectors = np.repeat(rng.normal(size=(1, 6)), 400, axis=0).astype(np.float32)
    vectors[:30] = rng.normal(size=(30, 6))
    found = cluster_vectors(in_memory(vectors), 31, num_resamplings=2, seed=0)
    assert np.bincount(found.assignments, minlength=31).min() == 1


def test_fewer_distinct_vectors_than_clusters_leave_some_empty(tmp_path: Path) -> None:
    vectors = np.tile(np.eye(3, dtype=np.float32), (20, 1))
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    rows = cluster(pool, num_clusters="5", sample=31)
    assert len(rows) == 31
    assert figures_of(tmp_path / "clusters.parquet")["empty_0"] == 2


def test_zero_vectors_are_clustered_too(tmp_path: Path) -> None:
    vectors, _ = blobs(5)
    vectors[:10] = 0
    rows = cluster(write_embeddings(tmp_path / "pool.parquet", vectors), num_clusters="6,2")
    assert len(rows) == 300 and all(row["distance"] == 1 for row in rows[:10])


@pytest.mark.parametrize("num_wanted", [1, 40, 41, 299, 300])
def test_a_sample_has_exactly_the_size_asked_for_and_is_balanced(tmp_path: Path, num_wanted: int) -> None:
    vectors, belongs = blobs(6)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    rows = cluster(pool, num_clusters="5", sample=num_wanted)
    chosen = [int(str(row["row"])) for row in rows]
    assert len(rows) == num_wanted and chosen == sorted(set(chosen))
    counts = np.bincount(belongs[chosen], minlength=5)
    if num_wanted in (40, 41):
        assert sorted(counts.tolist()) == sorted([8, 8, 8, 8, num_wanted - 32])
    assert (counts <= np.array(SIZES)).all()


def test_closest_takes_the_images_at_the_centre(tmp_path: Path) -> None:
    vectors, _ = blobs(7)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    everything = cluster(pool, num_clusters="5")
    closest = {row["row"] for row in cluster(pool, num_clusters="5", sample=25, pick="closest")}
    for number in range(5):
        members = [row for row in everything if row["cluster_0"] == number]
        nearest = sorted(members, key=lambda row: (row["distance"], row["image_id"]))[:5]
        assert {row["row"] for row in nearest} <= closest
    assert len(closest) == 25


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_sample(tmp_path: Path) -> None:
    vectors, _ = blobs(8)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    ids = []
    for name, seed in (("a.parquet", 0), ("b.parquet", 0), ("c.parquet", 1), ("d.parquet", -1)):
        settings = ClusterSettings("20,5", resample=2, sample=100)
        cluster_images(pool, str(tmp_path / name), settings, Options(seed=seed))
        ids.append(open_manifest(tmp_path / name).content_id)
    assert ids[0] == ids[1] and len(set(ids)) == 3


@pytest.mark.parametrize(("model", "warned"), [("pixels", True), ("copy", True), ("runs/first", False)])
def test_clusters_of_looks_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, warned: bool
) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", blobs()[0], model=model)
    cluster(pool, num_clusters="5", resample=0)
    assert (f"come from `{model}`" in capsys.readouterr().err) is warned


def test_the_number_of_clusters_falls_from_level_to_level() -> None:
    assert parse_num_clusters("50,10, 2", 50) == [50, 10, 2]
    for text, words in (
        ("51", "more clusters than the 50 images"),
        ("10,10", "does not fall"),
        ("10,20", "does not fall"),
        ("0", "0 clusters"),
        ("10,-1", "-1 clusters"),
        ("ten", "no list of whole numbers"),
        ("", "no list of whole numbers"),
    ):
        with pytest.raises(ToolkitError, match=words):
            parse_num_clusters(text, 50)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", blobs()[0])
    for settings, words in (
        (ClusterSettings("5", sample=301), "--sample 301 of 300"),
        (ClusterSettings("5", sample=0), "--sample 0"),
        (ClusterSettings("5", resample=-1), "--resample -1"),
    ):
        with pytest.raises(ToolkitError, match=words):
            cluster_images(pool, str(tmp_path / "clusters.parquet"), settings, Options())
    with pytest.raises(ToolkitError, match="more clusters than the 4 images"):
        cluster_images(pool, str(tmp_path / "clusters.parquet"), ClusterSettings("5"), Options(limit=4))
    assert not (tmp_path / "clusters.parquet").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", blobs()[0])
    before = sorted(tmp_path.rglob("*"))
    assert cluster_images(pool, str(tmp_path / "c.parquet"), ClusterSettings("5"), Options(dry_run=True)) is None
    assert sorted(tmp_path.rglob("*")) == before
