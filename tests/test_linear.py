"""The linear probe: the grid against its members, the update against autograd, and how the rate is chosen."""

import numpy as np
import pytest
import torch

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.labelled import held_back
from dinov2_toolkit.evaluate.linear import LEARNING_RATES, View, grid_views, num_steps, train_grid, train_linear_probe

WHOLE = grid_views(24, 1, has_mean=False)


def blobs(num_images: int, num_classes: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    centres = np.random.default_rng(99).standard_normal((num_classes, 24))
    return (centres[labels] + spread * random.standard_normal((num_images, 24))).astype(np.float32), labels


def test_separable_classes_are_told_apart_without_a_mistake() -> None:
    features, labels = blobs(200, 5, 0.1, seed=0)
    unseen, truth = blobs(100, 5, 0.1, seed=1)
    probe = train_linear_probe(features, labels, steps=300, seed=0)
    assert (probe.guesses(unseen)[:, 0] == truth).all()
    assert probe.guesses(unseen, 3).shape == (100, 3)


@pytest.mark.parametrize("rate", [0, 6, 12])
@pytest.mark.parametrize("view", range(4))
def test_a_member_trained_alone_equals_the_same_in_the_grid(rate: int, view: int) -> None:
    features, labels = blobs(150, 7, 2.0, seed=0)
    inputs, targets = torch.from_numpy(features), torch.from_numpy(labels)
    views = grid_views(8, 2, has_mean=True)  # two class tokens and the mean patch token
    together = train_grid(inputs, targets, 7, LEARNING_RATES, views, steps=100, seed=3)
    ((weights, biases),) = train_grid(inputs, targets, 7, (LEARNING_RATES[rate],), (views[view],), steps=100, seed=3)
    torch.testing.assert_close(together[view][0][rate], weights[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[view][1][rate], biases[0], rtol=1e-6, atol=1e-6)


def test_views_are_one_block_or_all_with_and_without_the_mean_patch() -> None:
    assert grid_views(8, 4, has_mean=True) == (
        View(1, False, slice(24, 32)),
        View(1, True, slice(24, 40)),
        View(4, False, slice(0, 32)),
        View(4, True, slice(0, 40)),
    )
    assert grid_views(8, 1, has_mean=False) == (View(1, False, slice(0, 8)),)


def test_the_view_that_tells_the_classes_apart_is_chosen() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(200) % 4
    tokens = random.standard_normal((200, 24)).astype(np.float32)  # two class tokens and the mean patch token
    tokens[:, 16:] += 6 * np.eye(8)[labels]  # only the mean knows
    probe = train_linear_probe(tokens, labels, grid_views(8, 2, has_mean=True), steps=200, seed=0)
    assert (probe.view.mean_patch, probe.view.blocks) == (True, 1)
    assert (probe.guesses(tokens)[:, 0] == labels).mean() > 0.99


def test_training_equals_torch_sgd_on_the_cross_entropy() -> None:
    features, labels = blobs(90, 4, 1.0, seed=0)
    inputs, targets = torch.from_numpy(features), torch.from_numpy(labels)
    ((weights, biases),) = train_grid(inputs, targets, 4, (0.1,), WHOLE, steps=20, seed=5)

    generator = torch.Generator().manual_seed(5)
    layer = torch.nn.Linear(24, 4)
    layer.weight.data = (torch.randn(24, 4, generator=torch.Generator().manual_seed(6)) * 0.01).T.clone()
    layer.bias.data.zero_()
    order = torch.cat([torch.randperm(90, generator=generator) for _ in range(29)])[: 20 * 128].view(20, 128)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * 128 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for batch in order:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(inputs[batch]), targets[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(weights[0], layer.weight.data.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(biases[0], layer.bias.data, rtol=1e-4, atol=1e-5)


def test_the_rate_is_the_best_on_the_images_held_back() -> None:
    features, labels = blobs(100, 5, 1.5, seed=0)
    probe = train_linear_probe(features, labels, steps=50, seed=0)
    assert np.shape(probe.held_back_accuracy) == (1, len(LEARNING_RATES))
    assert probe.learning_rate == LEARNING_RATES[int(np.argmax(probe.held_back_accuracy))]


def test_a_fifth_of_every_class_is_held_back() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    held = held_back(labels, 5, seed=0)
    assert np.bincount(labels[held]).tolist() == [10, 4, 2]
    assert len(set(held)) == len(held)
    assert not np.array_equal(held, held_back(labels, 5, seed=1))


def test_features_of_any_scale_and_offset_give_the_same_guesses() -> None:
    features, labels = blobs(100, 5, 1.0, seed=0)
    plain = train_linear_probe(features, labels, steps=100, seed=0)
    moved = train_linear_probe(features * 128 + 16, labels, steps=100, seed=0)
    assert plain.learning_rate == moved.learning_rate
    torch.testing.assert_close(plain.weight, moved.weight, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_classifier() -> None:
    features, labels = blobs(60, 3, 1.0, seed=0)
    first, second, other = (train_linear_probe(features, labels, steps=30, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_equal_features_do_not_break_it() -> None:
    probe = train_linear_probe(np.ones((10, 3), np.float32), np.arange(10) % 2, steps=10, seed=0)
    assert torch.isfinite(probe.weight).all()


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ToolkitError, match="4 labelled training images are too few"):
        train_linear_probe(np.eye(4, dtype=np.float32), np.arange(4), steps=1, seed=0)


def test_small_sets_get_fewer_steps_than_the_protocol() -> None:
    assert [num_steps(count) for count in (10, 1_000, 60_000)] == [1_000, 3_000, 12_500]
