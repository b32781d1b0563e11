"""Nearest centroids by a coarse quantizer, against comparing with all."""

import numpy as np
import pytest

from dinov2_toolkit.features.search import centroids as centroid_search
from dinov2_toolkit.features.search.centroids import (
    fit_coarse_quantizer,
    nearest_centroids,
    neighbors_of_centroids,
    several_nearest,
    train_coarse_quantizer,
)
from dinov2_toolkit.features.threads import workers
from dinov2_toolkit.store.vectors import Float32
from dinov2_toolkit.tests.embedded import unit


@pytest.fixture(autouse=True)
def small_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use coarse quantizers for some hundred centroids."""
    monkeypatch.setattr(centroid_search, "EXACT_CENTROIDS", 100)
    monkeypatch.setattr(centroid_search, "COARSE_FACTOR", 4)
    monkeypatch.setattr(centroid_search, "FIRST_CANDIDATES", 4)


def mixture(num: int, dim: int, num_concepts: int) -> Float32:
    """Return vectors of length 1 around concepts, the first ones crowded."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, num_concepts + 1)
    concepts = rng.choice(num_concepts, num, p=shares / shares.sum())
    points = rng.normal(size=(num_concepts, dim))[concepts] + 0.4 * rng.normal(size=(num, dim))
    return unit(points.astype(np.float32)).astype(np.float32)


def test_a_coarse_quantizer_finds_the_share_of_nearest_centroids_that_was_asked_for() -> None:
    points = mixture(4_000, 16, 400)
    centroids = points[:600]
    exact, cosines = nearest_centroids(points, centroids)
    with workers() as threads:
        coarse, measured = fit_coarse_quantizer(centroids, points[1_000:], 0.9, threads, 0)
        assert coarse is not None and measured >= 0.9 and coarse.candidates.shape[1] < 600
        found, found_cosines = nearest_centroids(points, centroids, coarse)
        assert (found[1_000:] == exact[1_000:]).mean() == pytest.approx(measured)
        assert (found_cosines <= cosines + 1e-5).all()
        np.testing.assert_allclose(found_cosines[found == exact], cosines[found == exact], rtol=1e-5, atol=1e-5)
        assert fit_coarse_quantizer(centroids, points, 1.0, threads, 0) == (None, 1.0)
        every = train_coarse_quantizer(centroids, 600, threads, 0)
        assert nearest_centroids(points, centroids, every)[0].tolist() == exact.tolist()


def test_neighbors_of_many_centroids_are_nearly_those_of_comparing_with_all() -> None:
    centroids = mixture(600, 16, 400)
    with workers() as threads:
        exact = several_nearest(centroids, centroids, 20, threads)
        found = neighbors_of_centroids(centroids, 20, threads)
        assert exact.tolist() == np.sort((centroids @ centroids.T).argsort(axis=1)[:, -20:], axis=1).tolist()
    assert found.shape == exact.shape and (np.diff(found) > 0).all()
    assert (found == np.arange(600)[:, None]).any(axis=1).all()  # each is among its own
    shared = [len(np.intersect1d(one, other)) for one, other in zip(exact, found, strict=True)]
    assert np.mean(shared) > 0.9 * 20
