"""Principal components against NumPy, and coordinates that repeat and keep neighbours together."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinov2_toolkit.curate.map import projection
from dinov2_toolkit.curate.map.projection import (
    PLACED_BY,
    fit,
    main_axes,
    place,
    principal_components,
    project,
)
from dinov2_toolkit.features.search.neighbors import SearchSettings
from dinov2_toolkit.store.manifest import Provenance, Source
from dinov2_toolkit.store.progress import Progress
from dinov2_toolkit.store.vectors import Float32, Int64, Vectors
from dinov2_toolkit.tests.embedded import unit

BASE = Source("base", "base", "id")
EXACT = SearchSettings(recall=1.0)
GROUPS = 8


def vectors_of(array: Float32) -> Vectors:
    return Vectors(array, np.arange(len(array)), BASE)


def groups(num: int, dim: int = 32, seed: int = 0) -> tuple[Float32, Int64]:
    """Return vectors scattered about the same eight centres, and which each belongs to."""
    centres = np.random.default_rng(7).standard_normal((GROUPS, dim))
    rng = np.random.default_rng(seed)
    group = rng.integers(GROUPS, size=num)
    return (centres[group] + 0.3 * rng.standard_normal((num, dim))).astype(np.float32), group


def agreement(coordinates: Float32, group: Int64, k: int = 10) -> float:
    """Return how many of the k nearest on the map are of the point's own group, as a share."""
    distances = ((coordinates[:, None] - coordinates[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return float((group[np.argsort(distances, axis=1)[:, :k]] == group[:, None]).mean())


def test_principal_components_are_those_of_numpy() -> None:
    array = np.random.default_rng(0).standard_normal((500, 20)).astype(np.float32) * np.linspace(
        3, 0.1, 20, dtype=np.float32
    )
    got = principal_components(vectors_of(array), 5)
    exact = unit(array)
    _, _, directions = np.linalg.svd(exact, full_matrices=False)
    expected = exact @ directions[:5].T
    assert got.array.shape == (500, 5)
    np.testing.assert_allclose(np.abs(got.array), np.abs(expected), atol=2e-6)
    assert principal_components(vectors_of(array[:, :3].copy()), 5).array.shape == (500, 3)


def test_components_keep_cosines_and_leave_zero_vectors_at_zero() -> None:
    array = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float16)
    array[3] = 0
    points = principal_components(Vectors(array, np.arange(50)[::-1].copy(), BASE), 8).array
    exact = unit(array)[::-1]
    np.testing.assert_allclose(points @ points.T, exact @ exact.T, atol=1e-5)
    assert not points[46].any()


def test_the_main_axes_are_those_of_largest_variance() -> None:
    points = np.random.default_rng(2).standard_normal((400, 6)).astype(np.float32) * [5, 1, 9, 1, 1, 1] + 100
    axes = main_axes(points.astype(np.float32))
    assert abs(np.corrcoef(axes[:, 0], points[:, 2])[0, 1]) > 0.999
    assert abs(np.corrcoef(axes[:, 1], points[:, 0])[0, 1]) > 0.999
    np.testing.assert_allclose(axes.mean(axis=0), 0, atol=1e-4)
    assert not main_axes(points[:, :1].astype(np.float32))[:, 1].any()


def test_neighbours_stay_together_and_coordinates_repeat() -> None:
    array, group = groups(600)
    one, two = (fit(principal_components(vectors_of(array), 50), EXACT) for _ in range(2))
    assert one.dtype == np.float32 and one.shape == (600, 2)
    np.testing.assert_array_equal(one, two)
    assert agreement(one, group) > 0.97
    np.testing.assert_allclose(one.mean(axis=0), 0, atol=1e-3)


def test_components_of_other_rows_have_another_id() -> None:
    array, _ = groups(100)
    parts = [principal_components(Vectors(array, np.arange(start, 60 + start), BASE), 50) for start in (0, 1, 0)]
    assert parts[0].base == parts[2].base != parts[1].base


@pytest.mark.parametrize("num", [1, 2, 3, 59])
def test_few_images_are_shown_by_two_components(num: int) -> None:
    array, _ = groups(num)
    points = principal_components(vectors_of(array), 50)
    assert np.abs(fit(points, EXACT) - main_axes(points.raw(0, num))).max() < 1e-6


def test_copies_and_constant_vectors_are_no_problem() -> None:
    assert np.isfinite(fit(principal_components(vectors_of(np.ones((100, 8), np.float32)), 50), EXACT)).all()
    array = np.repeat(groups(20)[0], 10, axis=0)
    assert np.isfinite(fit(principal_components(vectors_of(array), 50), EXACT)).all()


@pytest.mark.parametrize("indexed_for", [13_000, 0])  # all compared with all; by cells
def test_placed_images_lie_among_their_neighbours(
    tmp_path: Path, indexed_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "INDEXED_FOR", indexed_for)
    array, group = groups(900)
    provenance = Provenance("selection", "curate map", {})
    coordinates = project(vectors_of(array), 300, SearchSettings(), Progress(provenance, str(tmp_path)))
    assert agreement(coordinates, group) > 0.95

    points = principal_components(vectors_of(array), 50)
    sample = np.sort(np.random.default_rng(3).choice(900, 300, replace=False))
    places = np.random.default_rng(4).standard_normal((300, 2)).astype(np.float32)
    got = place(points, sample, places, EXACT)
    np.testing.assert_array_equal(got[sample], places)
    exact = unit(points.array)
    for other in np.setdiff1d(np.arange(900), sample)[::40]:
        near = np.argsort(-(exact[sample] @ exact[other]))[:PLACED_BY]
        np.testing.assert_allclose(got[other], np.median(places[near], axis=0), rtol=1e-6)


def test_an_interrupted_projection_goes_on_from_its_sample(tmp_path: Path) -> None:
    array, _ = groups(300)
    progress = Progress(Provenance("selection", "curate map", {}), str(tmp_path))
    progress.save("projected", coordinates=np.full((100, 2), 5, np.float32))
    np.testing.assert_array_equal(project(vectors_of(array), 100, EXACT, progress), np.full((300, 2), 5))
    progress.remove()
    assert np.ptp(project(vectors_of(array), 100, EXACT, progress)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("num", [2_000, 12_000])  # of so many, openTSNE sums by a tree, and by interpolation
def test_coordinates_do_not_depend_on_the_number_of_threads(tmp_path: Path, num: int) -> None:
    array, _ = groups(num)
    np.save(tmp_path / "vectors.npy", array)
    program = """
import sys
import numpy as np
from dinov2_toolkit.curate.map.projection import fit, principal_components
from dinov2_toolkit.features.search.neighbors import SearchSettings
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Vectors
array = np.load(sys.argv[1])
vectors = Vectors(array, np.arange(len(array)), Source("base", "base", "id"))
np.save(sys.argv[2], fit(principal_components(vectors, 50), SearchSettings(recall=1.0)))
"""
    made = []
    for threads in (1, 2, 3):
        target = tmp_path / f"{threads}.npy"
        names = [str(tmp_path / "vectors.npy"), str(target)]
        subprocess.run(
            [sys.executable, "-c", program, *names], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        made.append(np.load(target))
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])
