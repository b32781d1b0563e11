"""k-means, hierarchies and balanced subsets of made-up embeddings."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images, parse_num_clusters
from dinov2_toolkit.curate.cluster.kmeans import cluster_levels, cluster_vectors
from dinov2_toolkit.curate.cluster.metrics import (
    contingency,
    normalized_entropy,
    normalized_mutual_information,
    purity,
)
from dinov2_toolkit.curate.cluster.sampling import balanced_sample, seeded_keys
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Source, open_manifest
from dinov2_toolkit.store.vectors import Int64, Stored, Vectors
from dinov2_toolkit.tests.embedded import unit, write_embeddings

Drawn = tuple[Stored, Int64, Int64]

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
    settings.setdefault("resample", 1)
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
    made = cluster_levels(in_memory(vectors), [20, 4], num_resamplings=3, seed=0)
    levels, distances = [each.assignments for each in made], made[0].distances
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


@pytest.mark.parametrize("num_images", [1, 40, 41, 299, 300])
def test_a_sample_has_exactly_the_size_asked_for_and_is_balanced(tmp_path: Path, num_images: int) -> None:
    vectors, belongs = blobs(6)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    rows = cluster(pool, num_clusters="5", sample=num_images)
    chosen = [int(str(row["row"])) for row in rows]
    assert len(rows) == num_images and chosen == sorted(set(chosen))
    counts = np.bincount(belongs[chosen], minlength=5)
    if num_images in (40, 41):
        assert sorted(counts.tolist()) == sorted([8, 8, 8, 8, num_images - 32])
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
def test_plain_features_are_warned_about(
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


def two_levels(seed: int = 0, supers: int = 8, concepts: int = 10, num: int = 4_000, dim: int = 64) -> Drawn:
    """Return vectors of concepts, concept and super-concept of each, long-tailed on both levels; 0 supers: on one."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(max(supers, 1) * concepts if supers else 300, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shares = 1 / np.arange(1, len(directions) + 1) ** 1.1
    if supers:
        above = np.linalg.qr(rng.normal(size=(dim, supers)))[0].T.repeat(concepts, axis=0)
        directions = 0.8 * above + 0.6 * directions
        tails = [1 / np.arange(1, count + 1) ** 1.1 for count in (supers, concepts)]
        shares = np.outer(*tails).reshape(-1)
    concept = rng.choice(len(directions), num, p=shares / shares.sum())
    vectors = directions[concept] + 0.5 / dim**0.5 * rng.normal(size=(num, dim))
    return vectors.astype(np.float16), concept, concept // concepts


def test_balance_rises_from_random_to_flat_to_resampled_and_with_a_level_above() -> None:
    vectors, concept, above = two_levels()
    entropies: dict[str, tuple[float, float]] = {}

    def note(name: str, positions: Int64) -> None:
        counts = np.bincount(concept[positions], minlength=80), np.bincount(above[positions], minlength=8)
        entropies[name] = normalized_entropy(counts[0]), normalized_entropy(counts[1])

    keys = seeded_keys(4_000, 0, 0)
    note("random", np.argsort(keys)[:400])
    for name, resample in (("", 0), ("resampled ", 5)):
        made = cluster_levels(in_memory(vectors), [60, 8], num_resamplings=resample, seed=0)
        levels = [each.assignments for each in made]
        note(f"{name}flat", balanced_sample(levels[:1], 400, [keys], 0))
        note(f"{name}two", balanced_sample(levels, 400, [keys], 0))
    assert entropies["resampled flat"][0] > entropies["flat"][0] > entropies["random"][0]
    assert entropies["resampled two"][1] > entropies["flat"][1]
    assert entropies["resampled two"][1] >= 0.95


@pytest.mark.parametrize(("supers", "found"), [(8, True), (0, False)])
def test_a_level_without_a_hierarchy_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], supers: int, found: bool
) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", two_levels(supers=supers)[0])
    cluster(pool, num_clusters="80,8", resample=1)
    assert ("level 1 finds no hierarchy" in capsys.readouterr().err) is not found
    assert figures_of(tmp_path / "clusters.parquet")["hub_1"] is not found


def test_impossible_settings_are_errors(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", blobs()[0])
    for settings, words in (
        (ClusterSettings("5", sample=301), "--sample 301 of 300"),
        (ClusterSettings("5", sample=0), "--sample 0"),
        (ClusterSettings("5", resample=-1), "--resample -1"),
        (ClusterSettings("5", recall=0), "--recall 0"),
        (ClusterSettings("5", memory="much"), "--memory much"),
        (ClusterSettings("5", allocation="flat"), "give --sample too"),
        (ClusterSettings("5", sheet=tmp_path / "sheet.jpg"), "does not end in .png"),
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


def pictures(folder: Path, belongs: Int64) -> list[str]:
    """Draw a picture of one colour for every row, the same for all of a group."""
    folder.mkdir()
    for row, group in enumerate(belongs.tolist()):
        Image.new("RGB", (40, 30), (40 * group, 80, 250 - 40 * group)).save(folder / f"{row}.png")
    return [str(folder / f"{row}.png") for row in range(len(belongs))]


def test_a_sheet_shows_the_clusters(tmp_path: Path) -> None:
    vectors, belongs = blobs()
    vectors, belongs = vectors[:60], belongs[:60]
    labels = [None if row == 0 else f"group <{group}>" for row, group in enumerate(belongs)]
    uris = pictures(tmp_path / "images", belongs)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, labels=labels, uris=uris)
    sheet = tmp_path / "sheet.png"
    cluster(pool, num_clusters="5,2", sample=20, sheet=sheet, resample=1)
    with Image.open(sheet) as picture:
        seen = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(40 * group, 80, 250 - 40 * group) for group in range(5)} <= seen

    settings = ClusterSettings("5,2", sample=20, resample=1, sheet=sheet)
    sheet.unlink()
    cluster_images(pool, str(tmp_path / "clusters.parquet"), settings, Options())  # up to date: only drawn again
    assert sheet.exists()


def test_the_table_of_clusters_counts_what_is_there(tmp_path: Path) -> None:
    vectors, belongs = blobs()
    labels = [None if row % 7 == 0 else f"group {group}" for row, group in enumerate(belongs)]
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, labels=labels)
    every = cluster(pool, num_clusters="9,4,2")
    rows = cluster(pool, num_clusters="9,4,2", sample=100)
    table = pq.read_table(tmp_path / "clusters.clusters.parquet")
    assert open_manifest(tmp_path / "clusters.clusters.parquet").names()[-1] == "embedding"
    assert table.num_rows == 9 + 4 + 2
    centroids = np.stack([row["embedding"] for row in table.to_pylist()[:9]])
    for made in table.to_pylist():
        level, number = made["level"], made["cluster"]
        members = [row for row in every if row[f"cluster_{level}"] == number]
        assert made["images"] == len(members)
        assert made["sampled"] == sum(row[f"cluster_{level}"] == number for row in rows)
        if level < 2:
            assert {row[f"cluster_{level + 1}"] for row in members} == {made["parent"]}
        named = [str(row["label"]) for row in members if row["label"] is not None]
        assert made["purity"] == pytest.approx(named.count(made["label"]) / len(named))
        assert named.count(made["label"]) == max(named.count(name) for name in named)
        if level == 0:
            distances = [float(str(row["distance"])) for row in members]
            assert made["mean_distance"] == pytest.approx(np.mean(distances), abs=1e-6)
            others = np.delete(centroids @ centroids[number], number)
            assert made["isolation"] == pytest.approx(1 - others.max(), abs=1e-6)


def test_purity_and_information_are_those_of_the_definition(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clusters, codes = rng.integers(6, size=500), rng.integers(-1, 4, size=500)
    codes[clusters == 2] = 1
    named = codes >= 0
    table = contingency(clusters[named], codes[named])
    counts = np.array([[((clusters == a) & (codes == b)).sum() for b in range(4)] for a in range(6)])
    assert purity(table) == pytest.approx(counts.max(axis=1).sum() / named.sum())
    shares = counts / counts.sum()
    outer = shares.sum(axis=1, keepdims=True) * shares.sum(axis=0, keepdims=True)
    information = (shares[shares > 0] * np.log(shares[shares > 0] / outer[shares > 0])).sum()
    entropies = [-(part[part > 0] * np.log(part[part > 0])).sum() for part in (shares.sum(axis=0), shares.sum(axis=1))]
    assert normalized_mutual_information(table) == pytest.approx(2 * information / sum(entropies))


def test_tiny_clusters_far_from_all_others_are_suspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    centres = np.abs(rng.normal(size=(20, 32)))  # all on one side
    vectors = centres[rng.integers(20, size=400)] + 0.1 * rng.normal(size=(400, 32))
    vectors[17] = -np.eye(32)[0]
    pool = write_embeddings(tmp_path / "pool.parquet", vectors.astype(np.float16))
    rows = cluster(pool, num_clusters="21", resample=0)
    figures = figures_of(tmp_path / "clusters.parquet")
    assert (figures["junk_clusters"], figures["junk_images"]) == (1, 1)
    err = capsys.readouterr().err
    assert "1 tiny clusters far from all others" in err and "/pool/17.png" in err
    suspected = [
        row["cluster"] for row in pq.read_table(tmp_path / "clusters.clusters.parquet").to_pylist() if row["suspected"]
    ]
    assert suspected == [rows[17]["cluster_0"]]


def test_allocations_share_a_sample_as_they_are_named(tmp_path: Path) -> None:
    vectors, belongs = blobs()
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)

    def taken(allocation: str) -> list[int]:
        rows = cluster(pool, num_clusters="5,2", sample=100, allocation=allocation)
        return sorted(np.bincount(belongs[[int(str(row["row"])) for row in rows]], minlength=5).tolist())

    assert taken("flat") == [8, 12, 20, 30, 30]
    assert taken("proportional")[-1] > taken("water")[-1]
    with pytest.raises(ToolkitError, match="allocation flat, now"):
        cluster(pool, num_clusters="5,2", sample=100, allocation="flat")
        again = ClusterSettings("5,2", sample=100, allocation="water")
        cluster_images(pool, str(tmp_path / "clusters.parquet"), again, Options())


def test_a_condition_chooses_what_is_clustered(tmp_path: Path) -> None:
    vectors, belongs = blobs()
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, labels=[f"g{group}" for group in belongs])
    rows = cluster(pool, num_clusters="4", where="label <> 'g0'")
    assert len(rows) == 100 and same_partition(
        np.array([row["cluster_0"] for row in rows]), belongs[[int(str(row["row"])) for row in rows]]
    )
    with pytest.raises(ToolkitError, match="more clusters than the 100 images"):
        cluster(pool, num_clusters="101", where="label <> 'g0'")


def test_an_empty_pool_is_an_error(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", np.empty((0, 4), np.float16))
    with pytest.raises(ToolkitError, match="more clusters than the 0 images"):
        cluster(pool, num_clusters="1")
