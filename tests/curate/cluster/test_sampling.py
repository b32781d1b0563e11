"""Sampling through levels, keys and entropy."""

import numpy as np
import pytest

from dinov2_toolkit.curate.cluster.sampling import balanced_sample, normalised_entropy, seeded_keys
from dinov2_toolkit.store.vectors import Int64


def drawn_levels(seed: int) -> list[Int64]:
    """Return 300 images in 30 clusters, crowded ones and empty ones, in 7, in 3."""
    rng = np.random.default_rng(seed)
    images = np.minimum(rng.geometric(0.15, 300) - 1, 29)
    images[images == 4] = 5
    return [images, rng.integers(7, size=30), np.array([0, 1, 2, 0, 1, 1, 0])]


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("num_wanted", [1, 50, 299, 300])
def test_every_level_is_shared_as_evenly_as_its_clusters_allow(num_levels: int, num_wanted: int) -> None:
    levels = drawn_levels(0)[:num_levels]
    preference = np.random.default_rng(1).permutation(300)
    positions = balanced_sample(levels, num_wanted, preference, seed=5)
    assert len(positions) == num_wanted and (np.diff(positions) > 0).all()

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


def test_who_gets_the_odd_ones_depends_on_the_seed_alone() -> None:
    levels, preference = [np.repeat(np.arange(30), 10)], np.arange(300)
    samples = [balanced_sample(levels, 100, preference, seed).tolist() for seed in (3, 3, 4)]
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


def test_entropy_is_one_when_all_are_equal_and_zero_when_one_has_everything() -> None:
    assert normalised_entropy(np.array([5, 5, 5])) == pytest.approx(1.0)
    assert normalised_entropy(np.array([9, 0, 0])) == 0.0
    assert normalised_entropy(np.array([1, 1, 0, 0])) == pytest.approx(0.5)
    assert normalised_entropy(np.array([3])) == 1.0
