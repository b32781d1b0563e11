"""Neighbour search against float64 brute force."""

import importlib

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_toolkit.features.search.candidates import _by_gpu, _by_tiles, candidates
from dinov2_toolkit.features.search.exact_search import KnnTask, exact_neighbors
from dinov2_toolkit.features.search.neighbors import Identity, Neighbors, first_identical, nearest, tolerance
from dinov2_toolkit.features.threads import workers
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Float64, Int64, Stored, Vectors


def as_vectors(array: Stored) -> Vectors:
    return Vectors(array, np.arange(len(array)), Source("base", "memory", "0"))


def drawn(num: int, dim: int, seed: int, kind: type = np.float16) -> Stored:
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(kind)


def brute_force(
    queries: Vectors, pool: Vectors, k: int, order: Int64, identity: Identity | None = None, above: float = -np.inf
) -> Neighbors:
    """Compare every query with every pool vector, one pair at a time in the order that `similarities` sums in."""
    left, right = queries.raw(0, len(queries)).astype(np.float64), pool.raw(0, len(pool)).astype(np.float64)
    squares = np.einsum("nd,nd->n", right, right)
    indices, best = np.full((len(left), k), -1), np.full((len(left), k), -np.inf)
    for row, query in enumerate(left):
        lengths = np.sqrt(np.einsum("nd,nd->n", query[None], query[None]) * squares)
        dots = np.einsum("nd,nd->n", np.broadcast_to(query, right.shape), right)
        cosines = np.clip(dots / np.where(lengths > 0, lengths, 1), -1, 1)
        allowed = [
            p
            for p in range(len(right))
            if cosines[p] > above and (identity is None or identity.queries[row] != identity.pool[p])
        ]
        ranked = sorted(allowed, key=lambda p: (-cosines[p], order[p]))[:k]
        indices[row, : len(ranked)], best[row, : len(ranked)] = ranked, cosines[ranked]
    return Neighbors(indices, best)


def assert_same(found: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


def shuffled(num: int) -> Int64:
    return np.random.default_rng(9).permutation(num)


@pytest.mark.parametrize("k", [1, 5, 64])
def test_neighbors_equal_brute_force(k: int) -> None:
    queries, pool = as_vectors(drawn(50, 24, 0)), as_vectors(drawn(400, 24, 1))
    order = shuffled(400)
    assert_same(nearest(queries, pool, k, order=order), brute_force(queries, pool, k, order))


def test_a_self_join_never_finds_the_row_itself() -> None:
    vectors = as_vectors(drawn(300, 16, 2))
    itself = Identity(np.arange(300), np.arange(300))
    found = nearest(vectors, vectors, 8, order=np.arange(300), identity=itself)
    assert not (found.indices == np.arange(300)[:, None]).any()
    assert_same(found, brute_force(vectors, vectors, 8, np.arange(300), itself))


def test_hundreds_of_copies_come_in_the_given_order() -> None:
    array = drawn(900, 16, 3)
    array[100:500] = array[7]  # 400 copies: far more than the candidates of a search for 5
    array[600:640] = 3 * array[8].astype(np.float32)  # of another length, so equal only up to rounding
    pool, queries = as_vectors(array), as_vectors(np.concatenate([array[[7, 8, 650]], drawn(20, 16, 4)]))
    order = shuffled(900)
    assert_same(nearest(queries, pool, 5, order=order), brute_force(queries, pool, 5, order))


def test_all_rows_of_one_image_are_left_out() -> None:
    pool = as_vectors(drawn(200, 8, 5))
    queries = pool.take(np.arange(30))
    identity = Identity(np.arange(30) % 3, np.arange(200) % 40)  # five pool rows to an image
    order = shuffled(200)
    found = nearest(queries, pool, 6, order=order, identity=identity)
    assert_same(found, brute_force(queries, pool, 6, order, identity))


def test_only_what_is_strictly_above_is_returned() -> None:
    array = np.zeros((60, 4), np.float32)
    array[:, 0], array[:30, 1] = 1.0, 1.0  # cosines 1 and sqrt(1/2) with the query below
    query, pool = as_vectors(np.array([[1, 0, 0, 0]], np.float32)), as_vectors(array)
    half = float(brute_force(query, pool, 60, np.arange(60)).similarities[0, -1])
    found = nearest(query, pool, 40, order=np.arange(60), above=half)
    assert found.indices[0].tolist() == [*range(30, 60), *[-1] * 10]
    assert (found.similarities[0, :30] == 1.0).all() and (found.similarities[0, 30:] == -np.inf).all()


def test_a_larger_k_than_the_pool_returns_the_whole_pool() -> None:
    queries, pool = as_vectors(drawn(3, 8, 6)), as_vectors(drawn(10, 8, 7))
    found = nearest(queries, pool, 50, order=np.arange(10))
    assert_same(found, brute_force(queries, pool, 10, np.arange(10)))


def test_zero_vectors_are_similar_to_nothing() -> None:
    array = drawn(40, 8, 8)
    array[::4] = 0
    vectors = as_vectors(array)
    found = nearest(vectors, vectors, 40, order=np.arange(40))
    assert (found.similarities[0] == 0).all() and found.indices[0].tolist() == list(range(40))


@pytest.mark.parametrize("tile", [1_024, 100, 30])
@pytest.mark.parametrize("block_bytes", [1 << 16, 1 << 18, 1 << 22])
def test_vectors_among_themselves_are_multiplied_once(
    tile: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = drawn(900, 12, 22)
    array[500:530] = array[3]
    vectors, copies, order = as_vectors(array), as_vectors(array.copy()), shuffled(900)
    assert vectors.are(vectors) and not vectors.are(copies)
    monkeypatch.setattr("dinov2_toolkit.features.search.candidates.TILE", tile)
    found = exact_neighbors(KnnTask(vectors, vectors, 20, order), block_bytes=block_bytes)
    assert_same(found, exact_neighbors(KnnTask(vectors, copies, 20, order), block_bytes=block_bytes))
    assert_same(found, brute_force(vectors, vectors, 20, order))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_bytes", [1 << 16, 1 << 18])
def test_blocks_and_threads_do_not_change_the_result(
    threads: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = drawn(1_500, 12, 10)
    array[1_000:1_200] = array[3]
    vectors = as_vectors(array)
    order, itself = shuffled(1_500), Identity(np.arange(1_500), np.arange(1_500))
    whole = nearest(vectors, vectors, 20, order=order, identity=itself)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    assert_same(exact_neighbors(KnnTask(vectors, vectors, 20, order, itself), block_bytes=block_bytes), whole)


def test_float32_is_as_near_as_the_tolerance_says() -> None:
    pool = as_vectors(np.abs(drawn(500, 384, 11, np.float32)) * 100)  # all of one sign: the sums err most
    exact: Float64 = pool.exact(np.arange(500)) @ pool.exact(np.arange(500)).T
    for start, positions, similarities in candidates(pool, pool, 500):
        rows = np.arange(start, start + len(positions))[:, None]
        assert np.abs(similarities - exact[rows, positions]).max() < tolerance(384)
        assert (np.sort(positions, axis=1) == np.arange(500)).all()


def test_identical_vectors_point_to_the_first() -> None:
    array = drawn(50, 6, 12)
    array[[9, 30, 49]] = array[2]
    array[[40, 41]] = 0
    expected = np.arange(50)
    expected[[9, 30, 49]], expected[41] = 2, 40
    assert first_identical(as_vectors(array)).tolist() == expected.tolist()


def test_a_pool_in_rising_order_of_similarity_is_searched_as_well() -> None:
    angles = np.linspace(1.5, 0.01, 9_000)  # every vector is nearer to the query than all before it
    pool = as_vectors(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    found = nearest(as_vectors(np.array([[1, 0], [1, 0.001]], np.float32)), pool, 4, order=np.arange(9_000))
    assert found.indices.tolist() == [[8_999, 8_998, 8_997, 8_996]] * 2


def test_the_search_for_a_gpu_proposes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def knn(resources: object, left: Tensor, right: Tensor, num: int, *, metric: int) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(part) for part in faiss.knn(left.numpy(), right.numpy(), num, metric))

    importlib.import_module("faiss.contrib.torch_utils")  # replaces what is replaced here
    monkeypatch.setattr(faiss, "knn_gpu", knn)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None)
    monkeypatch.setattr("dinov2_toolkit.features.search.candidates.GPU_TILE_POOL", 700)
    queries, pool = as_vectors(drawn(70, 24, 20)), as_vectors(drawn(3_000, 24, 21))
    with workers() as threads:
        one = next(_by_gpu(queries, 0, 70, pool, 12, threads, lambda count: None))
        other = next(_by_tiles(queries, 0, 70, pool, 12, threads, lambda count: None))
    first, second = np.argsort(one[1], axis=1), np.argsort(other[1], axis=1)  # candidates come in no order
    np.testing.assert_array_equal(np.take_along_axis(one[1], first, 1), np.take_along_axis(other[1], second, 1))
    one_sorted, other_sorted = np.take_along_axis(one[0], first, 1), np.take_along_axis(other[0], second, 1)
    np.testing.assert_allclose(one_sorted, other_sorted, atol=tolerance(24))


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    assert torch.cuda.is_available(), "torch finds no GPU"
    queries, pool = as_vectors(drawn(2_000, 384, 13)), as_vectors(drawn(9_000, 384, 14))
    order = shuffled(9_000)
    assert_same(nearest(queries, pool, 64, order=order), brute_force(queries, pool, 64, order))
