"""Groups of near-duplicates and the self-join they come from, against loops over all pairs."""

from collections.abc import Iterator

import numpy as np
import pytest
from torch import Tensor

from dinov2_toolkit.curate.dedup.groups import DuplicateGroups, first_independent, group_duplicates
from dinov2_toolkit.features.search import cells, join, products
from dinov2_toolkit.features.search.exact_search import SearchSettings
from dinov2_toolkit.features.search.graph import Graph
from dinov2_toolkit.features.search.join import components_above
from dinov2_toolkit.store.cache import cache_folder
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Float64, Int64, Stored, Vectors
from dinov2_toolkit.tests.embedded import unit


def in_memory(vectors: Stored) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def concepts(num: int, seed: int = 0, dim: int = 32, noise: float = 0.25) -> Stored:
    """Return vectors around 12 directions, of which every fifth is an earlier one with some noise."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(12, dim))[rng.integers(0, 12, num)] + noise * 4 * rng.normal(size=(num, dim))
    for row in range(5, num, 5):
        vectors[row] = vectors[rng.integers(row)] + rng.uniform(0.02, 0.3) * rng.normal(size=dim)
    vectors[40:60] = vectors[3]
    return vectors.astype(np.float16)


def cosines(vectors: Stored) -> Float64:
    exact = unit(vectors)
    return exact @ exact.T


def slow_components(near: np.ndarray) -> list[int]:
    labels = list(range(len(near)))
    for left, right in np.argwhere(near).tolist():
        low, high = sorted((labels[left], labels[right]))
        labels = [low if label == high else label for label in labels]
    return labels


def slow_star(near: np.ndarray, priority: Int64) -> list[int]:
    kept: list[int] = []
    of = list(range(len(near)))
    for row in np.argsort(priority).tolist():
        first = next((other for other in kept if near[row, other]), None)
        if first is None:
            kept.append(row)
        else:
            of[row] = first
    return of


def groups_of(vectors: Stored, threshold: float, k: int, **settings: object) -> DuplicateGroups:
    searched = in_memory(vectors)
    settings.setdefault("priority", np.arange(len(vectors)))
    return group_duplicates(searched, threshold, k, **settings)  # type: ignore[arg-type]


def assert_same(one: DuplicateGroups, other: DuplicateGroups) -> None:
    for name in ("labels", "kept", "min_similarity_to_kept", "num_saturated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def by_cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Search by cells, however few vectors there are."""
    monkeypatch.setattr(join, "EXACT_PRODUCTS", 0)
    monkeypatch.setattr(cells, "ROWS_A_CELL", 24)
    yield


@pytest.mark.parametrize("k", [1, 3, 64, 1_000])
@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_components_equal_a_loop_over_all_pairs(threshold: float, k: int) -> None:
    vectors = concepts(400)
    near = cosines(vectors) > threshold
    priority = np.random.default_rng(1).permutation(400)
    found = groups_of(vectors, threshold, k, priority=priority)
    assert found.labels.tolist() == slow_components(near)
    assert found.num_saturated == (near.sum(axis=1) - 1 >= k).sum()
    for label in set(found.labels.tolist()):
        members = np.flatnonzero(found.labels == label)
        assert (found.kept[members] == members[priority[members].argmin()]).all()


@pytest.mark.parametrize("threshold", [0.6, 0.75, 0.9])
def test_a_star_equals_going_through_the_images_by_priority(threshold: float) -> None:
    vectors = concepts(400, 2)
    near = cosines(vectors) > threshold
    priority = np.random.default_rng(3).permutation(400)
    found = groups_of(vectors, threshold, 8, priority=priority, linkage="star")
    expected = np.array(slow_star(near, priority))
    assert found.kept.tolist() == expected.tolist()
    for kept in set(expected.tolist()):
        members = np.flatnonzero(expected == kept)
        assert (found.labels[members] == members.min()).all()


def test_the_lowest_similarity_in_each_group_is_that_to_the_kept_image() -> None:
    vectors = concepts(300, 4)
    exact = cosines(vectors)
    for linkage in ("components", "star"):
        found = groups_of(vectors, 0.8, 8, linkage=linkage)
        for label in set(found.labels.tolist()):
            members = np.flatnonzero(found.labels == label)
            lowest = exact[members, found.kept[members]].min()
            assert found.min_similarity_to_kept[members] == pytest.approx(np.full(len(members), lowest), abs=1e-12)
            assert linkage == "components" or len(members) == 1 or found.min_similarity_to_kept[members[0]] > 0.8


def test_large_and_small_components_give_the_same_star(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = concepts(400, 5)
    priority = np.random.default_rng(6).permutation(400)
    whole = groups_of(vectors, 0.6, 8, priority=priority, linkage="star")
    monkeypatch.setattr("dinov2_toolkit.curate.dedup.groups.BLOCK_ROWS", 16)
    monkeypatch.setattr("dinov2_toolkit.curate.dedup.groups.KEPT_TILE", 5)
    assert_same(groups_of(vectors, 0.6, 8, priority=priority, linkage="star"), whole)


def test_first_independent_follows_long_chains() -> None:
    chain = np.arange(9)
    assert first_independent(10, chain, chain + 1).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert first_independent(3, np.array([0, 1]), np.array([2, 2])).tolist() == [0, 1, 0]
    assert first_independent(2, np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == [0, 1]


def test_a_graph_names_every_component_by_its_smallest_row() -> None:
    chain = np.random.default_rng(0).permutation(999)
    joined = Graph(np.ones(1_001, np.int64), 2)
    for part in np.array_split(chain, 7):
        joined.add(part, part + 1)
    assert joined.components().tolist() == [0] * 1_000 + [1_000]
    assert joined.degree.tolist() == [1, *[2] * 998, 1, 0]


@pytest.mark.parametrize("linkage", ["components", "star"])
def test_cells_find_nearly_all_and_recall_says_how_many(by_cells: None, linkage: str) -> None:
    vectors = concepts(2_000, 7)
    near = cosines(vectors) > 0.93
    np.fill_diagonal(near, False)
    found = groups_of(vectors, 0.93, 64, linkage=linkage)
    left, right = np.nonzero(near)
    share = (found.labels[left] == found.labels[right]).mean()
    assert found.recall >= 0.97
    assert linkage == "star" or share > 0.97
    assert near[found.kept != np.arange(2_000), found.kept[found.kept != np.arange(2_000)]].all() or linkage != "star"


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.93])
def test_a_recall_of_one_compares_all(by_cells: None, threshold: float) -> None:
    vectors = concepts(1_200, 8)
    near = cosines(vectors) > threshold
    found = groups_of(vectors, threshold, 5, search=SearchSettings(recall=1))
    assert found.recall == 1 and found.labels.tolist() == slow_components(near)
    assert found.num_saturated == (near.sum(axis=1) - 1 >= 5).sum()


def test_the_rows_that_probe_a_cell_are_those_near_enough(by_cells: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cells.open_cells(in_memory(concepts(900, 15)), 0)
    monkeypatch.setattr(join, "PROBE_ROWS", 100)
    probing, offsets = join._probing_rows(made, 0.3)
    for cell in range(len(made.centroids)):
        near = [
            row
            for row in range(len(made))
            if cell in made.nearest[row, 1:] and made.gaps[row, made.nearest[row].tolist().index(cell)] <= 0.3
        ]
        assert probing[offsets[cell] : offsets[cell + 1]].tolist() == near
    assert len(probing) > 900


def test_threads_and_memory_do_not_change_the_groups(by_cells: None, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = concepts(2_000, 10)
    found = []
    for threads, memory in ((1, None), (2, 1 << 28), (4, None)):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        for file in cache_folder().glob("*.npy"):
            file.unlink()
        found.append(groups_of(vectors, 0.9, 8, linkage="star", search=SearchSettings(memory)))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("recall", [0.99, 1])
def test_an_interrupted_join_resumes(by_cells: None, recall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "EXACT_ROWS", 64)
    vectors, ones, search = in_memory(concepts(2_000, 11)), np.ones(2_000, np.int64), SearchSettings(recall=recall)
    whole = components_above(vectors, 0.9, weights=ones, enough=8, search=search)
    monkeypatch.setattr("dinov2_toolkit.store.progress.SAVE_EVERY_S", 0.0)
    compare, calls = join._compare, 0

    def stopping(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise KeyboardInterrupt
        compare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(join, "_compare", stopping)
    with pytest.raises(KeyboardInterrupt):
        components_above(vectors, 0.9, weights=ones, enough=8, search=search)
    assert len(list(cache_folder().glob("progress-*/*/graph.npz"))) == 1
    again = components_above(vectors, 0.9, weights=ones, enough=8, search=search)
    np.testing.assert_array_equal(again.labels, whole.labels)
    np.testing.assert_array_equal(again.degree >= 8, whole.degree >= 8)
    assert not list(cache_folder().glob("progress-*"))


@pytest.mark.parametrize("linkage", ["components", "star"])
def test_a_crowd_of_near_copies_costs_a_strip_of_its_pairs(linkage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(12)
    crowd = rng.normal(size=16) + 0.01 * rng.normal(size=(5_000, 16))
    vectors = np.concatenate([crowd, rng.normal(size=(200, 16))]).astype(np.float32)
    compared = 0
    product = products.product

    def counting(left: Tensor, right: Tensor) -> object:
        nonlocal compared
        compared += len(left) * len(right)
        return product(left, right)

    monkeypatch.setattr(products, "product", counting)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what is compared before the crowd is known is up to the threads
    found = groups_of(vectors, 0.95, 64, linkage=linkage)
    assert (found.labels[:5_000] == 0).all() and found.num_saturated == 5_000
    assert compared < 0.3 * 5_200**2


def test_identical_copies_by_the_thousand_are_one_group() -> None:
    vectors = concepts(100, 13)[np.arange(20_000) % 50]
    found = groups_of(vectors, 0.99, 64)
    assert found.num_saturated == 20_000 and (found.labels == found.labels[np.arange(20_000) % 50]).all()


def test_one_vector_and_none() -> None:
    one = groups_of(np.ones((1, 4), np.float32), 0.5, 4)
    assert one.labels.tolist() == [0] and one.kept.tolist() == [0] and one.min_similarity_to_kept.tolist() == [1.0]
    for linkage in ("components", "star"):
        assert groups_of(np.ones((0, 4), np.float32), 0.5, 4, linkage=linkage).labels.tolist() == []


def test_zero_vectors_are_alone_above_zero_and_together_below() -> None:
    vectors = np.concatenate([np.zeros((3, 4)), np.eye(4)[:2]]).astype(np.float32)
    assert groups_of(vectors, 0.5, 4).labels.tolist() == [0, 1, 2, 3, 4]
    assert groups_of(vectors, -0.5, 4).labels.tolist() == [0] * 5


def test_more_cells_are_probed_where_few_are_too_few(
    by_cells: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.random.default_rng(14).normal(size=(2_000, 6)).astype(np.float32)  # pairs everywhere, no clusters
    monkeypatch.setattr(cells, "usual_nearest", lambda num_cells: 1)
    monkeypatch.setattr(join, "MORE", 48)
    search = SearchSettings(recall=0.999)
    found = components_above(in_memory(vectors), 0.98, weights=np.ones(2_000, np.int64), enough=8, search=search)
    assert "probing more" in capsys.readouterr().err and found.recall >= 0.999
