"""Sharing out: exact, within what there is, fair, and the same for the same clusters in any order."""

import numpy as np
import pytest

from dinov2_toolkit.curate.cluster.allocation import allocate, parse_allocation
from dinov2_toolkit.curate.cluster.sampling import balanced_sample, seeded_keys
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.vectors import Int64


def slow_water_fill(sizes: list[int], num_wanted: int, keys: list[int]) -> list[int]:
    """Hand out one a round to everyone who has more; in the last round, which is not full, the largest come first."""
    counts = [0] * len(sizes)
    while num_wanted:
        richer = [i for i in range(len(sizes)) if counts[i] < sizes[i]]
        richer = sorted(richer, key=lambda i: (-sizes[i], keys[i]))[:num_wanted]
        for i in richer:
            counts[i] += 1
        num_wanted -= len(richer)
    return counts


def drawn_sizes(seed: int) -> Int64:
    rng = np.random.default_rng(seed)
    sizes: Int64 = np.minimum(rng.zipf(1.4, rng.integers(1, 30)) - 1, 60)
    return sizes


@pytest.mark.parametrize("seed", range(20))
def test_equal_weights_equal_handing_out_one_by_one(seed: int) -> None:
    sizes = drawn_sizes(seed)
    keys = seeded_keys(len(sizes), seed, 0)
    wanted = np.random.default_rng(seed).integers(sizes.sum() + 1, size=10).tolist()
    for num_wanted in {0, int(sizes.sum()), *wanted}:
        counts = allocate(sizes, np.array([num_wanted]), keys)
        assert counts.tolist() == slow_water_fill(sizes.tolist(), num_wanted, keys.tolist())


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_shares_are_exact_within_sizes_monotone_and_the_same_in_any_order(power: float, seed: int) -> None:
    sizes = drawn_sizes(seed)
    keys = seeded_keys(len(sizes), seed, 0)
    rng = np.random.default_rng(seed)
    for num_wanted in {0, 1, int(sizes.sum()), *rng.integers(sizes.sum() + 1, size=8).tolist()}:
        if num_wanted > sizes.sum():
            continue
        counts = allocate(sizes, np.array([num_wanted]), keys, weights=sizes.astype(float) ** power)
        assert counts.sum() == num_wanted and (counts >= 0).all() and (counts <= sizes).all()
        for size, count in zip(sizes, counts, strict=True):
            assert (counts[sizes > size] >= count).all()
        order = rng.permutation(len(sizes))
        again = allocate(sizes[order], np.array([num_wanted]), keys[order], weights=sizes[order].astype(float) ** power)
        assert again.tolist() == counts[order].tolist()


def test_weights_share_in_proportion_until_someone_has_no_more() -> None:
    def shares(sizes: list[int], wanted: int, power: float) -> list[int]:
        given, keys = np.array(sizes), seeded_keys(len(sizes), 0, 0)
        counts: list[int] = allocate(given, np.array([wanted]), keys, weights=given.astype(float) ** power).tolist()
        return counts

    assert shares([100, 200, 700], 100, 1.0) == [10, 20, 70]  # proportional
    assert shares([100, 400, 900], 60, 0.5) == [10, 20, 30]  # the square root
    assert shares([1, 100, 100], 61, 0.0) == [1, 30, 30]
    assert shares([10, 10, 1000], 5, 1.0) == [0, 0, 5]  # remainders of 0.05 and 0.9
    assert shares([0, 5], 5, 1.0) == [0, 5]


def test_what_has_no_weight_gives_only_what_the_others_cannot() -> None:
    sizes, keys = np.array([50, 50, 50]), seeded_keys(3, 0, 0)
    for wanted, expected in ((60, [0, 10, 50]), (100, [0, 50, 50]), (110, [10, 50, 50])):
        counts = allocate(sizes, np.array([wanted]), keys, weights=np.array([0.0, 1.0, 7.0]))
        assert counts.tolist() == expected
    assert allocate(sizes, np.array([60]), keys, weights=np.zeros(3)).tolist() == [20, 20, 20]


def test_the_children_of_every_parent_add_up_to_what_is_wanted_of_it() -> None:
    rng = np.random.default_rng(0)
    sizes, parents, keys = rng.integers(0, 50, 200), rng.integers(0, 9, 200), seeded_keys(200, 1, 1)
    wanted = np.bincount(parents, sizes, 10).astype(np.int64) // 3  # parent 9 has no children
    counts = allocate(sizes, wanted, keys, parents=parents, weights=sizes.astype(float) ** 0.5)
    for parent in range(9):
        mine = parents == parent
        alone = allocate(sizes[mine], wanted[parent : parent + 1], keys[mine], weights=sizes[mine].astype(float) ** 0.5)
        assert counts[mine].tolist() == alone.tolist() and alone.sum() == wanted[parent]


def test_more_than_there_is_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="4 wanted of 3"):
        allocate(np.array([1, 2]), np.array([4]), seeded_keys(2, 0, 0))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_samples_by_any_power_have_the_size_asked_for_and_proportional_ones_keep_the_shares(power: float) -> None:
    rng = np.random.default_rng(1)
    levels: list[Int64] = [rng.choice(40, 4_000, p=np.arange(1, 41) / 820), rng.integers(6, size=40)]
    for num_wanted in (1, 399, 4_000):
        positions = balanced_sample(levels, num_wanted, seeded_keys(4_000, 0, 0), 0, power)
        assert len(positions) == num_wanted and (np.diff(positions) > 0).all()
    if power == 1:
        taken = np.bincount(levels[0][balanced_sample(levels, 400, seeded_keys(4_000, 0, 0), 0, 1.0)], minlength=40)
        assert np.abs(taken - np.bincount(levels[0], minlength=40) / 10).max() < 2


def test_allocations_have_names() -> None:
    found = [parse_allocation(text) for text in ("water", "flat", "proportional", "power:0.5", "power:.25", "power:1")]
    assert found == [0, 0, 1, 0.5, 0.25, 1]
    for text in ("even", "power:", "power:2", "power:-1", "power:half", "POWER:1"):
        with pytest.raises(ToolkitError, match="--allocation"):
            parse_allocation(text)
