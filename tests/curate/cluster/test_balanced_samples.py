"""Clusters and balanced subsets of a long-tailed pool, from manifest to manifest."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.cluster.kmeans import cluster_vectors
from dinov2_toolkit.curate.cluster.metrics import normalized_entropy
from dinov2_toolkit.curate.cluster.sampling import allocate, seeded_keys
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Provenance, Source, open_manifest
from dinov2_toolkit.store.vectors import Stored, Vectors
from dinov2_toolkit.tests.embedded import unit, write_embeddings

Row = dict[str, object]


def long_tail(seed: int = 0, num_rows: int = 600, num_concepts: int = 20, dim: int = 16) -> tuple[Stored, list[str]]:
    """Return vectors around concepts, concept c about 1/(c + 1) as often as the first, and the concepts."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_concepts + 1)
    concepts = rng.choice(num_concepts, num_rows, p=shares / shares.sum())
    concepts[:num_concepts] = np.arange(num_concepts)
    vectors = rng.normal(size=(num_concepts, dim))[concepts] + 0.3 * rng.normal(size=(num_rows, dim))
    return vectors.astype(np.float16), [f"concept {concept}" for concept in concepts]


def cluster(manifest: Path, num_clusters: str, seed: int = 0, **settings: object) -> list[Row]:
    output = manifest.with_name("clusters.parquet")
    settings.setdefault("resample", 1)
    made = ClusterSettings(num_clusters, **settings)  # type: ignore[arg-type]
    cluster_images(manifest, str(output), made, Options(seed=seed, force=True))
    rows: list[Row] = pq.read_table(output).to_pylist()
    return rows


def provenance_of(path: Path) -> Provenance:
    provenance = open_manifest(path).provenance
    assert provenance is not None
    return provenance


def test_all_images_stay_in_order_and_every_finer_cluster_lies_in_one_coarser(tmp_path: Path) -> None:
    vectors, labels = long_tail()
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, labels=labels)
    rows = cluster(pool, "30,8,3")
    assert [row["row"] for row in rows] == list(range(600))
    assert [row["uri"] for row in rows] == [f"/pool/{row}.png" for row in range(600)]
    assert [row["label"] for row in rows] == labels
    for level, count in enumerate((30, 8, 3)):
        assert {row[f"cluster_{level}"] for row in rows} == set(range(count))  # none is empty
    for level in (1, 2):
        pairs = {(row[f"cluster_{level - 1}"], row[f"cluster_{level}"]) for row in rows}
        assert len(pairs) == len({finer for finer, _ in pairs})


def test_the_distance_is_one_less_the_cosine_to_the_nearest_centroid(tmp_path: Path) -> None:
    vectors, _ = long_tail(1)
    rows = cluster(write_embeddings(tmp_path / "pool.parquet", vectors), "25", seed=3)
    in_memory = Vectors(vectors, np.arange(600), Source("base", "memory", "0"))
    centroids = cluster_vectors(in_memory, 25, num_resamplings=1, seed=3).centroids
    cosines = unit(vectors) @ unit(centroids).T
    assert [row["cluster_0"] for row in rows] == cosines.argmax(axis=1).tolist()
    assert [row["distance"] for row in rows] == pytest.approx((1 - cosines.max(axis=1)).tolist(), abs=1e-7)


@pytest.mark.parametrize("num_images", [1, 37, 600])
@pytest.mark.parametrize("pick", ["random", "closest"])
def test_a_sample_is_that_many_rows_of_what_all_images_would_give(tmp_path: Path, num_images: int, pick: str) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", long_tail(2)[0])
    every = cluster(pool, "20,5", resample=1)
    rows = cluster(pool, "20,5", resample=1, sample=num_images, pick=pick)
    kept = {row["row"] for row in rows}
    assert len(kept) == num_images and rows == [row for row in every if row["row"] in kept]


def test_a_sample_repeats_by_its_seed(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", long_tail(3)[0])
    samples = [[row["row"] for row in cluster(pool, "20", seed, sample=100)] for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_a_sample_of_one_level_is_water_filling_with_the_closest_images(tmp_path: Path) -> None:
    vectors, _ = long_tail(4)
    vectors[300:310] = vectors[299]  # ties, settled by image_id
    image_ids = [f"{number:032x}" for number in np.random.default_rng(0).permutation(600).tolist()]
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, image_ids=image_ids)
    every = cluster(pool, "20", resample=1)
    sizes = np.bincount([int(str(row["cluster_0"])) for row in every], minlength=20)
    counts = allocate(sizes, np.array([150]), seeded_keys(20, 0, 1))
    assert counts.min() < counts.max()
    expected: list[object] = []
    for number, count in enumerate(counts.tolist()):
        members = [row for row in every if row["cluster_0"] == number]
        ranked = sorted(members, key=lambda row: (float(str(row["distance"])), str(row["image_id"])))
        expected += [row["row"] for row in ranked[:count]]
    rows = cluster(pool, "20", resample=1, sample=150, pick="closest")
    assert len(rows) == 150 and {row["row"] for row in rows} == set(expected)


def test_a_sample_is_more_balanced_than_the_pool(tmp_path: Path) -> None:
    vectors, labels = long_tail(5, 2_000, 40)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, labels=labels)
    rows = cluster(pool, "40", sample=300)
    figures = provenance_of(tmp_path / "clusters.parquet").figures
    entropies = [
        normalized_entropy(np.array([among.count(name) for name in sorted(set(labels))]))
        for among in (labels, [str(row["label"]) for row in rows])
    ]
    assert [figures["class_entropy"], figures["sample_class_entropy"]] == pytest.approx(entropies)
    assert entropies[1] > entropies[0] + 0.08 and entropies[1] > 0.95
    assert float(str(figures["sample_entropy_0"])) > float(str(figures["entropy_0"]))
    assert figures["images"] == 300 and figures["clusters_0"] == 40


def test_two_runs_write_the_same_content_and_the_selection_names_its_base(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", long_tail(6)[0])
    ids = []
    for name in ("a.parquet", "b.parquet"):
        cluster_images(pool, str(tmp_path / name), ClusterSettings("20,4", sample=100), Options(seed=7))
        provenance = provenance_of(tmp_path / name)
        assert provenance.kind == "selection" and provenance.base is not None
        assert provenance.base.content_id == open_manifest(pool).content_id
        ids.append(provenance.content_id)
    assert ids[0] == ids[1]


def test_clusters_of_what_dedup_kept_refer_to_the_same_embeddings(tmp_path: Path) -> None:
    vectors, _ = long_tail(7, 300)
    vectors[200:] = vectors[:100]
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    dedup_images(pool, str(tmp_path / "unique.parquet"), DedupSettings(0.9999), Options())
    rows = cluster(tmp_path / "unique.parquet", "10,3", sample=50)
    base = provenance_of(tmp_path / "clusters.parquet").base
    assert base is not None and base.path == str(pool)
    alone = cluster(write_embeddings(tmp_path / "first.parquet", vectors[:200]), "10,3", sample=50)
    for name in ("row", "cluster_0", "cluster_1", "distance"):
        assert [row[name] for row in rows] == [row[name] for row in alone]


def test_a_limit_is_as_if_the_rest_were_not_there(tmp_path: Path) -> None:
    vectors, _ = long_tail(8)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    less = write_embeddings(tmp_path / "less.parquet", vectors[:100])
    cluster_images(pool, str(tmp_path / "limited.parquet"), ClusterSettings("9", resample=1), Options(limit=100))
    limited = pq.read_table(tmp_path / "limited.parquet", columns=["row", "cluster_0", "distance"]).to_pylist()
    assert limited == [{name: row[name] for name in limited[0]} for row in cluster(less, "9", resample=1)]


def test_a_bare_cluster_again_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_embeddings(tmp_path / "pool.parquet", long_tail(9, 100)[0])
    first = cluster_images(None, "clusters.parquet", ClusterSettings("5"), Options())
    stamp = (tmp_path / "clusters.parquet").stat().st_mtime_ns
    again = cluster_images(None, "clusters.parquet", ClusterSettings("5"), Options())
    assert first == again and (tmp_path / "clusters.parquet").stat().st_mtime_ns > stamp
    with pytest.raises(ToolkitError, match="--force"):
        cluster_images(None, "clusters.parquet", ClusterSettings("6"), Options())


def test_impossible_settings_are_errors_of_a_dry_run_too(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", long_tail(10, 50)[0])
    for settings, words in (
        (ClusterSettings("51"), "more clusters than the 50 images"),
        (ClusterSettings("10,20"), "does not fall"),
        (ClusterSettings("10", sample=51), "--sample 51"),
    ):
        for options in (Options(), Options(dry_run=True)):
            with pytest.raises(ToolkitError, match=words):
                cluster_images(pool, str(tmp_path / "out.parquet"), settings, options)
    with pytest.raises(ToolkitError, match="what the step reads"):
        cluster_images(pool, str(pool), ClusterSettings("5"), Options(force=True))
    assert not (tmp_path / "out.parquet").exists()
