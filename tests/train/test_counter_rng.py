from hashlib import blake2b

import numpy as np
import pytest

from dinov2_toolkit.train import counter_rng

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The output function of splitmix64 in Python's unbounded integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_gives_its_published_first_output_for_state_zero() -> None:
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_hashed_is_splitmix64_of_stream_sample_and_slot() -> None:
    stream = int.from_bytes(blake2b(b"7/crops", digest_size=8).digest(), "little")
    values = counter_rng.hashed(7, "crops", np.array([0, 5, 10**12]), 3)
    for row, sample in enumerate([0, 5, 10**12]):
        state = splitmix64(stream + (sample + 1) * 0x9E3779B97F4A7C15)
        for slot in range(3):
            assert int(values[row, slot]) == splitmix64(state + (slot + 1) * 0x9E3779B97F4A7C15)


def test_values_never_change_between_versions() -> None:
    assert counter_rng.uniform(0, "order", 0, 2).tolist() == [0.28758536409338586, 0.44082118544123494]
    assert counter_rng.derived_seed(0, "order", 3) == 3022727302509890760


def test_values_depend_on_the_sample_alone_not_on_its_batch() -> None:
    samples = np.arange(60).reshape(3, 4, 5)
    whole = counter_rng.uniform(1, "x", samples, 7)
    assert whole.shape == (3, 4, 5, 7)
    assert (counter_rng.uniform(1, "x", samples[1, 2, 3], 4) == whole[1, 2, 3, :4]).all()


def test_uniform_is_uniform_and_uncorrelated() -> None:
    values = counter_rng.uniform(3, "x", np.arange(50_000), 8)
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=200, range=(0, 1))[0]
    chi2 = ((counts - values.size / 200) ** 2 / (values.size / 200)).sum()
    assert abs(chi2 - 199) < 5 * np.sqrt(2 * 199)
    correlations = np.corrcoef(values.T) - np.eye(8)  # between slots
    assert np.abs(correlations).max() < 5 / np.sqrt(50_000)
    neighbours = np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]  # between samples
    other_purpose = np.corrcoef(values[:, 0], counter_rng.uniform(3, "y", np.arange(50_000), 1)[:, 0])[0, 1]
    other_seed = np.corrcoef(values[:, 0], counter_rng.uniform(4, "x", np.arange(50_000), 1)[:, 0])[0, 1]
    assert max(abs(neighbours), abs(other_purpose), abs(other_seed)) < 5 / np.sqrt(50_000)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permuted_visits_every_position_once_and_differs_between_rounds(length: int) -> None:
    first = counter_rng.permuted(0, "order", 0, np.arange(length), length)
    assert sorted(first.tolist()) == list(range(length))
    if length >= 16:
        assert (counter_rng.permuted(0, "order", 1, np.arange(length), length) != first).any()


def test_permuted_sends_a_position_anywhere_with_equal_chance() -> None:
    for length in (5, 37):
        rounds = np.arange(20_000)
        images = counter_rng.permuted(0, "order", rounds[:, None], np.array([0, length - 1]), length)
        for column in images.T:
            counts = np.bincount(column, minlength=length)
            chi2 = ((counts - 20_000 / length) ** 2 / (20_000 / length)).sum()
            assert chi2 < length - 1 + 5 * np.sqrt(2 * (length - 1))
        pair = np.bincount(images[:, 0] * length + images[:, 1], minlength=length**2).reshape(length, length)
        assert (np.diag(pair) == 0).all()
        expected = 20_000 / (length * (length - 1))
        chi2 = ((pair[~np.eye(length, dtype=bool)] - expected) ** 2 / expected).sum()
        assert chi2 < length * (length - 1) + 5 * np.sqrt(2 * length * (length - 1))
