"""The cells of a pool, and retrieval by them, against exact search."""

from collections.abc import Iterator

import numpy as np
import pytest

from dinov2_toolkit.features.search import cells, neighbors
from dinov2_toolkit.features.search.candidates import TopK
from dinov2_toolkit.features.search.cell_search import cell_neighbors
from dinov2_toolkit.features.search.cells import cells_key, open_cells
from dinov2_toolkit.features.search.exact_search import KnnTask, exact_neighbors
from dinov2_toolkit.features.search.neighbors import Identity, Neighbors, SearchSettings, nearest
from dinov2_toolkit.store.cache import cache_folder, cached
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Int64, Stored, Vectors

SURE = SearchSettings(recall=1 - 1e-9)  # all neighbours of the sample, which is all queries here


def in_memory(vectors: Stored) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def drawn(num: int, seed: int, dim: int = 24) -> Stored:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, dim))
    return (centres[rng.integers(0, 20, num)] + 0.7 * rng.normal(size=(num, dim))).astype(np.float16)


def by_cells(
    queries: Vectors,
    pool: Vectors,
    k: int,
    order: Int64,
    identity: Identity | None = None,
    above: float = -np.inf,
    search: SearchSettings = SURE,
) -> Neighbors:
    return cell_neighbors(KnnTask(queries, pool, k, order, identity, above), search, None)


def exactly(
    queries: Vectors, pool: Vectors, k: int, order: Int64, identity: Identity | None = None, above: float = -np.inf
) -> Neighbors:
    return exact_neighbors(KnnTask(queries, pool, k, order, identity, above))


def assert_same(found: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cells, "ROWS_A_CELL", 30)
    yield


def test_cells_hold_every_vector_once_sorted_by_cell() -> None:
    array = drawn(3_000, 1)
    made = open_cells(in_memory(array), 0)
    assert np.sort(made.ids).tolist() == list(range(3_000))
    np.testing.assert_array_equal(made.stored, array[made.ids])
    own = np.repeat(np.arange(len(made.centroids)), np.diff(made.offsets))
    np.testing.assert_array_equal(made.nearest[:, 0], own)
    assert len(made.centroids) == pytest.approx(100, abs=5) and (made.gaps[:, 0] == 0).all()
    inside = np.diff(own) == 0
    assert (np.diff(made.ids)[inside] > 0).all()


def test_nearly_every_vector_lies_in_the_cell_of_its_nearest_centroid() -> None:
    array = drawn(3_000, 2)
    made = open_cells(in_memory(array), 0)
    products = in_memory(array).unit(0, 3_000)[made.ids] @ made.centroids.T
    assert (products.argmax(axis=1) == made.nearest[:, 0]).mean() > 0.9
    gaps = products[np.arange(3_000), made.nearest[:, 0]] - products[np.arange(3_000), made.nearest[:, 3]]
    np.testing.assert_allclose(gaps, made.gaps[:, 3].astype(np.float32), atol=2e-3)


def test_cells_are_kept_for_the_next_search_of_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, other = in_memory(drawn(600, 3)), in_memory(drawn(600, 4))
    first = open_cells(pool, 0)
    others = cells_key(other, 0, 16), cells_key(pool, 1, 16), cells_key(pool, 0, 17)
    assert cells_key(pool, 0, 16) not in (*others, cells_key(pool.take(np.arange(599)), 0, 16))
    monkeypatch.setattr(cells, "fit_centroids", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(open_cells(pool, 0).ids, first.ids)
    next(cache_folder().glob("*-gaps.npy")).unlink()
    with pytest.raises(pytest.fail.Exception):
        open_cells(pool, 0)


def test_more_cells_mean_more_nearest_cells_of_a_row() -> None:
    assert [cells.usual_nearest(num) for num in (1, 3_906, 39_062, 555_000)] == [16, 16, 34, 82]


def test_cells_that_were_not_finished_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = cells._gather

    def stop(source: Stored, rows: Int64, target: Stored) -> None:
        if isinstance(target, np.memmap):  # a file
            raise KeyboardInterrupt
        gather(source, rows, target)

    monkeypatch.setattr(cells, "_gather", stop)
    with pytest.raises(KeyboardInterrupt):
        open_cells(in_memory(drawn(600, 5)), 0)
    assert cached() == []


@pytest.mark.parametrize("k", [1, 10])
def test_a_recall_of_nearly_one_finds_all_neighbours(k: int) -> None:
    queries, pool = in_memory(drawn(200, 6)), in_memory(drawn(3_000, 7))
    order = np.random.default_rng(8).permutation(3_000)
    found = by_cells(queries, pool, k, order)
    assert_same(found, exactly(queries, pool, k, order))
    assert found.recall == 1


def test_the_measured_recall_holds_for_queries_that_were_not_measured() -> None:
    queries, pool = in_memory(drawn(2_000, 9)), in_memory(drawn(6_000, 10))
    order = np.arange(6_000)
    found = by_cells(queries, pool, 10, order, search=SearchSettings(recall=0.9))
    exact = exactly(queries, pool, 10, order)
    share = np.mean(
        [len(np.intersect1d(one, other)) / 10 for one, other in zip(found.indices, exact.indices, strict=True)]
    )
    assert share == pytest.approx(found.recall, abs=0.02) and 0.9 <= found.recall < 1


def test_copies_by_the_hundred_come_in_the_given_order_and_the_image_itself_never() -> None:
    array = drawn(2_000, 11)
    array[500:900] = array[7]
    pool = in_memory(array)
    queries = pool.take(np.arange(40))
    order, identity = np.random.default_rng(12).permutation(2_000), Identity(np.arange(40), np.arange(2_000))
    for above in (-np.inf, 0.8):
        found = by_cells(queries, pool, 5, order, identity=identity, above=above)
        assert_same(found, exactly(queries, pool, 5, order, identity, above))


def test_zero_vectors_and_a_k_beyond_the_pool() -> None:
    array = drawn(300, 13)
    array[::3] = 0
    queries, pool = in_memory(array[:20]), in_memory(array)
    order = np.arange(300)
    assert_same(by_cells(queries, pool, 1_000, order), exactly(queries, pool, 1_000, order))


def test_threads_and_blocks_of_queries_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, pool = in_memory(drawn(500, 14)), in_memory(drawn(3_000, 15))
    found = []
    for threads, rows in ((1, 65_536), (2, 100), (3, 65_536)):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        monkeypatch.setattr("dinov2_toolkit.features.search.cell_search.QUERY_ROWS", rows)
        for file in cache_folder().glob("*.npy") if cache_folder().exists() else []:
            file.unlink()
        found.append(by_cells(queries, pool, 10, np.arange(3_000), search=SearchSettings(recall=0.8)))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was said, lines joined that the width of the terminal broke."""
    return " ".join(capsys.readouterr().err.split())


def test_the_size_decides_how_it_is_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, pool = in_memory(drawn(100, 16)), in_memory(drawn(2_000, 17))
    order = np.arange(2_000)
    exact = nearest(queries, pool, 4, order=order)
    monkeypatch.setattr(neighbors, "EXACT_PRODUCTS", 1_000)
    assert_same(nearest(queries, pool, 4, order=order, search=SearchSettings(recall=0.7)), exact)
    assert "comparing 100 with all of 2,000 vectors, 4.8e+06 products: so few" in said(capsys)
    monkeypatch.setattr(neighbors, "INDEXED_FOR", 100)
    assert nearest(queries, pool, 4, order=order, search=SearchSettings(recall=0.7)).recall < 1
    assert "cells probed each" in said(capsys)
    assert_same(nearest(queries, pool, 4, order=order, search=SearchSettings(recall=1)), exact)
    assert "products: --recall 1" in said(capsys)


def test_the_largest_of_probes_in_any_order_are_the_largest_of_all() -> None:
    """Queries come by turns, some never; of each the largest stay, or all where it saw too few."""
    rng = np.random.default_rng(18)
    num_queries, num, width = 40, 5, 30
    best = TopK(num_queries, num)
    seen: list[dict[int, float]] = [{} for _ in range(num_queries)]
    for start in range(0, 600, width):
        probing = np.sort(rng.choice(num_queries - 1, 12, replace=False))
        products = rng.normal(size=(12, width if start else 3)).astype(np.float32)
        query, column = best.passing(probing, products)
        best.add_pairs(probing, query, products[query, column], column + start)
        for row, values in zip(probing.tolist(), products.tolist(), strict=True):
            seen[row] |= {start + place: value for place, value in enumerate(values)}
    values, positions = best.found()
    for row in range(num_queries):
        expected = sorted(seen[row].items(), key=lambda item: -item[1])[:num]
        order = np.argsort(-values[row])[: len(expected)]
        assert positions[row][order].tolist() == [place for place, _ in expected]
        assert values[row][order].tolist() == [value for _, value in expected]
        assert np.isneginf(values[row]).sum() == num - len(expected)
    assert np.isneginf(values[-1]).all()
