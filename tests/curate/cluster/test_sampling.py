"""Balanced samples and the allocation below them: exact, within sizes, fair, and the same for clusters in any order."""

import numpy as np
import pytest

from dinov2_toolkit.curate.cluster.sampling import allocate, balanced_sample, seeded_keys
from dinov2_toolkit.store.vectors import Int64


def drawn_levels(seed: int) -> list[Int64]:
    """Return 300 images in 30 clusters, crowded ones and empty ones, in 7, in 3."""
    rng = np.random.default_rng(seed)
    images = np.minimum(rng.geometric(0.15, 300) - 1, 29)
    images[images == 4] = 5
    return [images, rng.integers(7, size=30), np.array([0, 1, 2, 0, 1, 1, 0])]


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("num_images", [1, 50, 299, 300])
def test_every_level_is_shared_as_evenly_as_its_clusters_allow(num_levels: int, num_images: int) -> None:
    levels = drawn_levels(0)[:num_levels]
    preference = np.random.default_rng(1).permutation(300)
    positions = balanced_sample(levels, num_images, [preference], seed=5)
    assert len(positions) == num_images and (np.diff(positions) > 0).all()

    clusters = [levels[0]]
    for parents in levels[1:]:
        clusters.append(parents[clusters[-1]])
    above = [np.zeros(300, np.int64), *reversed(clusters)]
    for parents_of, children_of in zip(above[:-1], above[1:], strict=True):
        for parent in np.unique(parents_of):
            children = np.unique(children_of[parents_of == parent])
            sizes = [int((children_of == child).sum()) for child in children]
            given = [int((children_of[positions] == child).sum()) for child in children]
            assert all(count <= size for count, size in zip(given, sizes, strict=True))
            unsated = [count for count, size in zip(given, sizes, strict=True) if count < size]
            assert not unsated or max(given) <= min(unsated) + 1  # nobody who wants more has two fewer than another
    for cluster in np.unique(levels[0]):  # of a cluster come the preferred
        members = np.flatnonzero(levels[0] == cluster)
        taken = np.intersect1d(members, positions)
        assert set(taken) == set(members[np.argsort(preference[members])][: len(taken)])


def test_the_remainder_of_a_division_goes_by_the_seed_alone() -> None:
    levels, preference = [np.repeat(np.arange(30), 10)], np.arange(300)
    samples = [balanced_sample(levels, 100, [preference], seed).tolist() for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]


def test_keys_are_those_of_splitmix64_and_differ() -> None:
    keys = seeded_keys(10_000, 7, 1)
    assert len(np.unique(keys)) == 10_000
    assert keys[:10].tolist() == seeded_keys(10, 7, 1).tolist()
    assert not set(keys.tolist()) & set(seeded_keys(10_000, 8, 1).tolist() + seeded_keys(10_000, 7, 2).tolist())

    def mixed(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    step = 0x9E3779B97F4A7C15
    start = mixed((7 * step + 1) % 2**64)
    assert keys[:3].tolist() == [mixed((start + number * step) % 2**64) for number in (1, 2, 3)]
    assert mixed(step) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 at seed 0


def slow_water_fill(sizes: list[int], num_images: int, keys: list[int]) -> list[int]:
    """Hand out one a round to everyone who has more; in the last round, which is not full, the largest come first."""
    counts = [0] * len(sizes)
    while num_images:
        richer = [i for i in range(len(sizes)) if counts[i] < sizes[i]]
        richer = sorted(richer, key=lambda i: (-sizes[i], keys[i]))[:num_images]
        for i in richer:
            counts[i] += 1
        num_images -= len(richer)
    return counts


def drawn_sizes(seed: int) -> Int64:
    rng = np.random.default_rng(seed)
    sizes: Int64 = np.minimum(rng.zipf(1.4, rng.integers(1, 30)) - 1, 60)
    return sizes


@pytest.mark.parametrize("seed", range(20))
def test_equal_weights_give_what_handing_out_one_by_one_gives(seed: int) -> None:
    sizes = drawn_sizes(seed)
    keys = seeded_keys(len(sizes), seed, 0)
    drawn = np.random.default_rng(seed).integers(sizes.sum() + 1, size=10).tolist()
    for num_images in {0, int(sizes.sum()), *drawn}:
        counts = allocate(sizes, np.array([num_images]), keys)
        assert counts.tolist() == slow_water_fill(sizes.tolist(), num_images, keys.tolist())


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_counts_are_exact_within_sizes_monotone_and_the_same_in_any_order(power: float, seed: int) -> None:
    sizes = drawn_sizes(seed)
    keys = seeded_keys(len(sizes), seed, 0)
    rng = np.random.default_rng(seed)
    for num_images in {0, 1, int(sizes.sum()), *rng.integers(sizes.sum() + 1, size=8).tolist()}:
        if num_images > sizes.sum():
            continue
        counts = allocate(sizes, np.array([num_images]), keys, weights=sizes.astype(float) ** power)
        assert counts.sum() == num_images and (counts >= 0).all() and (counts <= sizes).all()
        for size, count in zip(sizes, counts, strict=True):
            assert (counts[sizes > size] >= count).all()
        order = rng.permutation(len(sizes))
        again = allocate(sizes[order], np.array([num_images]), keys[order], weights=sizes[order].astype(float) ** power)
        assert again.tolist() == counts[order].tolist()


def test_counts_are_in_proportion_to_weights_until_a_cluster_is_exhausted() -> None:
    def shares(sizes: list[int], total: int, power: float) -> list[int]:
        given, keys = np.array(sizes), seeded_keys(len(sizes), 0, 0)
        counts: list[int] = allocate(given, np.array([total]), keys, weights=given.astype(float) ** power).tolist()
        return counts

    assert shares([100, 200, 700], 100, 1.0) == [10, 20, 70]  # proportional
    assert shares([100, 400, 900], 60, 0.5) == [10, 20, 30]  # the square root
    assert shares([1, 100, 100], 61, 0.0) == [1, 30, 30]
    assert shares([10, 10, 1000], 5, 1.0) == [0, 0, 5]  # remainders of 0.05 and 0.9
    assert shares([0, 5], 5, 1.0) == [0, 5]


def test_a_cluster_without_weight_gives_only_what_the_others_cannot() -> None:
    sizes, keys = np.array([50, 50, 50]), seeded_keys(3, 0, 0)
    for total, expected in ((60, [0, 10, 50]), (100, [0, 50, 50]), (110, [10, 50, 50])):
        counts = allocate(sizes, np.array([total]), keys, weights=np.array([0.0, 1.0, 7.0]))
        assert counts.tolist() == expected
    assert allocate(sizes, np.array([60]), keys, weights=np.zeros(3)).tolist() == [20, 20, 20]


def test_the_children_of_every_parent_add_up_to_its_total() -> None:
    rng = np.random.default_rng(0)
    sizes, parents, keys = rng.integers(0, 50, 200), rng.integers(0, 9, 200), seeded_keys(200, 1, 1)
    totals = np.bincount(parents, sizes, 10).astype(np.int64) // 3  # parent 9 has no children
    counts = allocate(sizes, totals, keys, parents=parents, weights=sizes.astype(float) ** 0.5)
    for parent in range(9):
        mine = parents == parent
        alone = allocate(sizes[mine], totals[parent : parent + 1], keys[mine], weights=sizes[mine].astype(float) ** 0.5)
        assert counts[mine].tolist() == alone.tolist() and alone.sum() == totals[parent]


def test_a_total_above_the_sizes_is_an_error() -> None:
    with pytest.raises(ValueError, match="a total of 4 of 3"):
        allocate(np.array([1, 2]), np.array([4]), seeded_keys(2, 0, 0))


@pytest.mark.parametrize("is_proportional", [False, True])
def test_samples_have_the_size_asked_for_and_proportional_ones_keep_the_shares(is_proportional: bool) -> None:
    rng = np.random.default_rng(1)
    levels: list[Int64] = [rng.choice(40, 4_000, p=np.arange(1, 41) / 820), rng.integers(6, size=40)]
    for num_images in (1, 399, 4_000):
        keys = [seeded_keys(4_000, 0, 0)]
        positions = balanced_sample(levels, num_images, keys, 0, is_proportional=is_proportional)
        assert len(positions) == num_images and (np.diff(positions) > 0).all()
    if is_proportional:
        positions = balanced_sample(levels, 400, [seeded_keys(4_000, 0, 0)], 0, is_proportional=True)
        taken = np.bincount(levels[0][positions], minlength=40)
        assert np.abs(taken - np.bincount(levels[0], minlength=40) / 10).max() < 2
