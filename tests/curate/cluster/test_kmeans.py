"""k-means against plain Lloyd iterations and exact search, on one and two threads, killed and gone on with."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from dinov2_toolkit.curate.cluster import kmeans, lloyd
from dinov2_toolkit.curate.cluster.kmeans import Clustering, cluster_levels, cluster_vectors
from dinov2_toolkit.curate.cluster.lloyd import (
    add_points,
    initial_state,
    iterate,
    kmeans_plus_plus,
    reassign,
    relocate_empty_clusters,
)
from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.features.search import centroids as centroid_search
from dinov2_toolkit.features.search.centroids import nearest_centroids
from dinov2_toolkit.features.threads import workers
from dinov2_toolkit.store.manifest import Provenance, Source
from dinov2_toolkit.store.progress import Progress
from dinov2_toolkit.store.vectors import Float32, Float64, Int64, Stored, Vectors
from dinov2_toolkit.tests.embedded import unit


def in_memory(vectors: Stored) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def mixture(num: int = 3_000, dim: int = 16, num_concepts: int = 40, seed: int = 0) -> Float32:
    """Return vectors around concepts, the first ones crowded."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_concepts + 1)
    concepts = rng.choice(num_concepts, num, p=shares / shares.sum())
    return (rng.normal(size=(num_concepts, dim))[concepts] + 0.4 * rng.normal(size=(num, dim))).astype(np.float32)


def slow_lloyd(points: Float64, centroids: Float64, num_iterations: int) -> Float64:
    """Compare all with all, and average, so many times."""
    for _ in range(num_iterations):
        nearest = slow_nearest(points, centroids)
        means = np.stack([points[nearest == cluster].mean(axis=0) for cluster in range(len(centroids))])
        centroids = means / np.linalg.norm(means, axis=1, keepdims=True)
    return centroids


def slow_nearest(points: Float64, centroids: Float64) -> Int64:
    points, centroids = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (points, centroids))
    squares: Float64 = ((points[:, None] - centroids[None]) ** 2).sum(axis=2)
    nearest: Int64 = squares.argmin(axis=1)
    return nearest


def cost(vectors: Stored, made: Clustering) -> float:
    return float(made.distances.sum(dtype=np.float64))


def test_iterations_among_all_neighbors_are_those_of_lloyd() -> None:
    points = unit(mixture(600)).astype(np.float32)
    with workers() as threads:
        start = initial_state(points, 12, 0, threads)
        state = iterate(start, points, threads, num_iterations=4)
    expected = slow_lloyd(points.astype(np.float64), start.centroids.astype(np.float64), state.iteration)
    np.testing.assert_allclose(state.centroids, expected, atol=2e-6)
    assert state.iteration == 4


def test_every_vector_has_its_nearest_centroid_and_the_distance_to_it() -> None:
    vectors = mixture(1_000).astype(np.float16)
    made = cluster_vectors(in_memory(vectors), 150, num_resamplings=1, seed=3)
    exact, centroids = vectors.astype(np.float64), made.centroids.astype(np.float64)
    assert made.assignments.tolist() == slow_nearest(exact, centroids).tolist()
    expected = 1 - (unit(vectors) * unit(made.centroids)[made.assignments]).sum(axis=1)
    np.testing.assert_allclose(made.distances, expected, atol=1e-6)
    assert np.bincount(made.assignments, minlength=150).min() >= 1


def test_searching_near_the_present_centroid_loses_next_to_nothing() -> None:
    points = unit(mixture(3_000, 24, 150)).astype(np.float32)
    made = cluster_vectors(in_memory(points), 150, num_resamplings=0, seed=0)
    best = min(
        (1 - (points @ faiss_centroids(points, 150, seed).T).max(axis=1)).sum(dtype=np.float64) for seed in range(2)
    )
    assert cost(points, made) < 1.01 * best


def faiss_centroids(points: Float32, num_clusters: int, seed: int) -> Float32:
    fitted = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=20,
        seed=seed,
        spherical=True,
        init_method=faiss.ClusteringInitMethod_AFK_MC2,
        min_points_per_centroid=1,
    )
    fitted.train(points)
    assert fitted.centroids is not None
    return fitted.centroids


def test_greedy_kmeans_plus_plus_hits_every_group_that_lies_apart() -> None:
    rng = np.random.default_rng(0)
    sizes = (200, 60, 20, 12, 8)
    belongs = np.repeat(np.arange(5), sizes)
    for seed in range(20):
        points = (np.eye(16)[belongs] + 0.01 * rng.normal(size=(300, 16))).astype(np.float32)
        chosen = kmeans_plus_plus(points, 5, np.random.default_rng(seed))
        assert sorted(belongs[chosen].tolist()) == [0, 1, 2, 3, 4]


def test_initial_centroids_are_different_rows_even_among_copies() -> None:
    points = np.ones((50, 4), np.float32)
    points[7] = 2
    chosen = kmeans_plus_plus(points, 50, np.random.default_rng(0))
    assert sorted(chosen.tolist()) == list(range(50))


def test_many_clusters_by_a_coarse_quantizer_are_as_good_as_by_comparing_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = mixture(1_500, 8, 100).astype(np.float16)
    costs = []
    for exact in (4_000, 60):
        for module in (centroid_search, lloyd):
            monkeypatch.setattr(module, "EXACT_CENTROIDS", exact)
        monkeypatch.setattr(centroid_search, "COARSE_FACTOR", 2)
        monkeypatch.setattr(centroid_search, "FIRST_CANDIDATES", 32)
        made = cluster_vectors(in_memory(vectors), 150, num_resamplings=1, seed=0, recall=0.8)
        costs.append(cost(vectors, made))
        assert (made.agreement == 1) is (exact == 4_000) and made.agreement >= 0.8
        assert np.bincount(made.assignments, minlength=150).min() >= 1
    assert costs[1] == pytest.approx(costs[0], rel=0.05)


def test_the_same_seed_gives_the_same_bits_and_so_do_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = in_memory(mixture(1_500, 32).astype(np.float16))
    made = []
    for threads in (1, 1, 2):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        made.append(cluster_vectors(vectors, 50, num_resamplings=1, seed=0))
    for other in made[1:]:
        np.testing.assert_array_equal(made[0].centroids, other.centroids)
        np.testing.assert_array_equal(made[0].assignments, other.assignments)
        np.testing.assert_array_equal(made[0].distances, other.distances)
        assert cost(vectors.array, made[0]) == pytest.approx(cost(vectors.array, other), rel=1e-5)
    assert (cluster_vectors(vectors, 50, num_resamplings=1, seed=1).assignments != made[0].assignments).any()


def test_blocks_and_mapped_files_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = mixture(3_000).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    rows = np.arange(0, 3_000, 2)
    whole = cluster_vectors(in_memory(vectors[rows]), 50, num_resamplings=1, seed=0)
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 512)
    parts = cluster_vectors(
        Vectors(mapped, rows, Source("base", "disk", "0")), 50, num_resamplings=1, seed=0, progress=kept("blocks")
    )
    np.testing.assert_array_equal(whole.assignments, parts.assignments)
    np.testing.assert_array_equal(whole.centroids, parts.centroids)


def kept(name: str) -> Progress:
    return Progress(Provenance("selection", f"test {name}", {}))


def killed() -> list[Progress]:
    return [kept(f"killed {level}") for level in range(2)]


class Killed(Exception):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("num_done", [1, 6, 12, 19])
def test_a_killed_clustering_goes_on_and_ends_with_the_same_bits(
    num_done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = in_memory(mixture(1_500).astype(np.float16))
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 256)
    whole = cluster_levels(vectors, [25, 4], num_resamplings=1, seed=0)

    monkeypatch.setattr("dinov2_toolkit.store.progress.SAVE_EVERY_S", 0.0)
    keep = Progress.save
    count = 0

    def save_and_die(self: Progress, name: str, **arrays: object) -> None:
        nonlocal count
        keep(self, name, **arrays)  # type: ignore[arg-type]
        count += 1
        if count == num_done + 1:
            raise Killed

    monkeypatch.setattr(Progress, "save", save_and_die)
    with pytest.raises(Killed):
        cluster_levels(vectors, [25, 4], num_resamplings=1, seed=0, progress=killed())
    num_saved = count
    count = 1_000  # the second run lives
    again = cluster_levels(vectors, [25, 4], num_resamplings=1, seed=0, progress=killed())
    assert num_saved == num_done + 1 and count > 1_000
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.assignments, other.assignments)
        np.testing.assert_array_equal(one.centroids, other.centroids)
        np.testing.assert_array_equal(one.distances, other.distances)


def test_a_signal_ends_at_the_next_save_and_the_work_goes_on() -> None:
    vectors = in_memory(mixture(1_000).astype(np.float16))
    whole = cluster_vectors(vectors, 20, num_resamplings=1, seed=0)
    stopped = kept("stopped")
    stopped.signals.append(15)
    with pytest.raises(Stopped, match="the same command resumes"):
        cluster_vectors(vectors, 20, num_resamplings=1, seed=0, progress=stopped)
    again = kept("stopped")
    assert again.load("fit") is not None
    np.testing.assert_array_equal(
        cluster_vectors(vectors, 20, num_resamplings=1, seed=0, progress=again).assignments, whole.assignments
    )
    again.remove()
    assert again.load("fit") is None


def test_empty_clusters_take_the_farthest_of_the_costliest() -> None:
    assignments = np.array([0, 0, 0, 1, 1, 3], np.int32)
    distances = np.array([0.1, 0.5, 0.2, 0.9, 0.3, 0.0], np.float32)
    relocate_empty_clusters(
        assignments, distances, 6, 4
    )  # 2, 4 and 5 are empty; 0 and 1 have something to give, 3 has not
    assert assignments.tolist() == [0, 4, 0, 2, 1, 3]


def test_points_are_added_to_sums_and_subtracted() -> None:
    points, clusters = mixture(9_000, 8), np.random.default_rng(0).integers(7, size=9_000).astype(np.int32)
    clusters[:5_000] = 3  # more than one job
    sums = np.zeros((7, 8))
    with workers() as threads:
        add_points(sums, points, np.arange(9_000), clusters, threads)
        expected = np.stack([points[clusters == number].astype(np.float64).sum(axis=0) for number in range(7)])
        np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-9)
        add_points(sums, points, np.arange(9_000), clusters, threads, sign=-1)
    np.testing.assert_allclose(sums, 0, atol=1e-9)


def test_a_point_moves_to_the_nearest_of_the_centroids_near_its_own() -> None:
    points = unit(mixture(2_000)).astype(np.float32)
    centroids = points[:150]
    exact, _ = nearest_centroids(points, centroids)
    with workers() as threads:
        found, distances = reassign(points, exact.astype(np.int32), centroids, threads)
    assert found.tolist() == exact.tolist()
    np.testing.assert_allclose(distances, 1 - (points @ points[:150].T).max(axis=1), atol=1e-6)


def test_copies_by_the_hundred_thousand_zero_vectors_one_row_and_one_cluster() -> None:
    rng = np.random.default_rng(0)
    few = rng.normal(size=(5, 4)).astype(np.float32)
    vectors = np.repeat(few, [100_000, 50_000, 3, 2, 1], axis=0)
    made = cluster_vectors(in_memory(vectors), 5, num_resamplings=2, seed=0)
    assert sorted(np.bincount(made.assignments, minlength=5).tolist()) == [1, 2, 3, 50_000, 100_000]
    made = cluster_vectors(in_memory(vectors[99_990:]), 9, num_resamplings=2, seed=0)
    assert (np.bincount(made.assignments, minlength=9) > 0).sum() == 5
    made = cluster_vectors(in_memory(np.zeros((10, 4), np.float16)), 3, num_resamplings=1, seed=0)
    assert set(made.assignments.tolist()) == {0} and np.isfinite(made.distances).all()
    made = cluster_vectors(in_memory(few[:1]), 1, num_resamplings=3, seed=0)
    assert made.assignments.tolist() == [0] and made.distances[0] == pytest.approx(0, abs=1e-6)
    made = cluster_vectors(in_memory(few), 5, num_resamplings=3, seed=0)
    assert sorted(made.assignments.tolist()) == [0, 1, 2, 3, 4]
    made = cluster_vectors(in_memory(few), 1, num_resamplings=0, seed=0)
    mean = unit(few).mean(axis=0, keepdims=True).astype(np.float32)
    np.testing.assert_allclose(made.centroids, unit(mean), atol=1e-6)


def test_the_sample_is_as_large_as_memory_allows_and_too_little_is_an_error() -> None:
    vectors = in_memory(mixture(2_000, 64))
    sizes = []
    fit = kmeans.fit_centroids

    def watched(points: Float32, *rest: object) -> Float32:
        sizes.append(len(points))
        return fit(points, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kmeans, "fit_centroids", watched)
        for memory in (1 << 30, 3 * 4 * 64 * 300):
            cluster_vectors(vectors, 5, num_resamplings=0, seed=0, memory=memory)
    assert sizes == [5 * 256, 300]
    with pytest.raises(ToolkitError, match="--memory"):
        cluster_vectors(vectors, 500, num_resamplings=0, seed=0, memory=3 * 4 * 64 * 300)


def test_four_levels_each_group_the_one_below() -> None:
    made = cluster_levels(in_memory(mixture(800, 16, 100)), [80, 30, 10, 3], num_resamplings=1, seed=0)
    assert [len(level.assignments) for level in made] == [800, 80, 30, 10]
    for level, count in zip(made, (80, 30, 10, 3), strict=True):
        assert set(level.assignments.tolist()) == set(range(count))  # none is empty
