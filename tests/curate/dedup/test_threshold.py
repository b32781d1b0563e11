"""The threshold that dedup takes when none is given."""

from pathlib import Path

import numpy as np
import pytest

from dinov2_toolkit.curate.dedup.threshold import (
    FIXED_THRESHOLD,
    LOSS,
    chance_model,
    threshold_from_pool,
    threshold_of,
)
from dinov2_toolkit.models.copy_descriptor import THRESHOLD
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.store.vectors import Float64, Vectors, open_vectors
from dinov2_toolkit.tests.embedded import write_embeddings


def spread(num: int, dim: int) -> Float64:
    vectors = np.random.default_rng(3).normal(size=(num, dim))
    unit: Float64 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def pool(path: Path, vectors: Float64, model: str) -> tuple[Vectors, float | None]:
    """Return the vectors of a manifest, and the threshold of the descriptor that it names."""
    manifest = open_manifest(write_embeddings(path, vectors.astype(np.float32), model=model))
    assert manifest.provenance is not None
    return open_vectors(manifest), threshold_of(manifest.provenance.model())


@pytest.fixture(autouse=True)
def _weights_of_the_test_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_toolkit.curate.dedup.threshold.copy_content_id", lambda: "copy of 32")


def test_the_descriptor_for_copies_brings_its_own_threshold(tmp_path: Path) -> None:
    for num in (4, 500):
        threshold, origin = threshold_from_pool(*pool(tmp_path / f"{num}.parquet", spread(num, 32), "copy"))
        assert threshold == THRESHOLD and "descriptor" in origin


def test_in_a_crowd_the_descriptors_threshold_rises_until_chance_costs_no_more(tmp_path: Path) -> None:
    vectors = np.zeros((3_000, 32))
    vectors[:, :4] = spread(3_000, 4)  # in three dimensions many are near another
    threshold, origin = threshold_from_pool(*pool(tmp_path / "pool.parquet", vectors, "copy"))
    assert threshold > THRESHOLD and "by chance" in origin
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -1)
    lost = (similarities.max(axis=1) > threshold).mean()
    assert LOSS / 2 < lost < 2 * LOSS


def test_pairs_of_copies_do_not_change_the_threshold_of_a_crowd() -> None:
    vectors = spread(2_000, 5)
    rng = np.random.default_rng(4)
    copies = vectors[:600] + 1e-3 * rng.normal(size=(600, 5))
    everything = np.concatenate([vectors, copies / np.linalg.norm(copies, axis=1, keepdims=True)])
    thresholds = []
    for each in (vectors, everything):
        similarities = each @ each.T
        np.fill_diagonal(similarities, -1)
        nearest: Float64 = -np.sort(-similarities, axis=1)[:, :32]
        thresholds.append(chance_model(np.minimum(nearest, 1.0)).threshold(0.02 * len(nearest)))
    assert 1 - thresholds[1] == pytest.approx(1 - thresholds[0], rel=0.35)


def test_other_features_and_other_weights_have_no_threshold_of_their_own(tmp_path: Path) -> None:
    for name, dim in (("a model", 32), ("copy", 16)):  # vectors of 16 numbers come from other weights
        threshold, origin = threshold_from_pool(*pool(tmp_path / f"{dim}.parquet", spread(500, dim), name))
        assert threshold != THRESHOLD and origin.startswith("from the pool: of the images")
        threshold, _ = threshold_from_pool(*pool(tmp_path / f"{dim}-few.parquet", spread(9, dim), name))
        assert threshold == FIXED_THRESHOLD
