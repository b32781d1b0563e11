"""The linear protocol: a grid of linear classifiers trained at once on frozen features.

N images, E numbers a feature, C classes, V views of a feature, G learning rates.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ToolkitError
from ..store.vectors import Float32, Int64
from .labelled import held_back
from .scores import Measurement, accuracies
from .task import Task

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at batch 256
BLOCKS = 4  # the last so many blocks' class tokens are tried together, beside the last one's
BATCH_SIZE = 128
STEPS = 12_500  # of the protocol; small training sets have converged long before
STEPS_PER_IMAGE, MIN_STEPS = 3, 1_000  # chosen: 384 passes; more did not change the accuracy on 1,000 images
MOMENTUM = 0.9
INITIAL_STD = 0.01
ONE_THREAD_FLOPS = 5e8  # a smaller step is no faster on several threads, and ten times slower where cores are busy
HELD_BACK = 5  # every fifth image of a class chooses among the grid


@dataclass(frozen=True)
class View:
    """What a classifier sees of a feature: class tokens of the last blocks, and perhaps the mean patch token."""

    blocks: int
    mean_patch: bool
    columns: slice  # of the feature


@dataclass(frozen=True)
class LinearProbe:
    """A trained classifier and how it was chosen."""

    weight: Tensor  # (E', C), for the columns of its view, scaled by `shift` and `scale`
    bias: Tensor  # (C,)
    shift: Tensor  # (E,)
    scale: float
    view: View
    learning_rate: float  # the one chosen, at batch 256
    held_back_accuracy: tuple[tuple[float, ...], ...]  # of each view and rate of the grid

    def guesses(self, features: Float32, num_guesses: int = 1) -> Int64:
        """Return the most likely classes of features (M, E), (M, num_guesses), best first."""
        inputs = ((torch.from_numpy(np.array(features)) - self.shift) / self.scale)[:, self.view.columns]
        order: Int64 = np.argsort(-(inputs @ self.weight + self.bias).numpy(), axis=1, kind="stable")[:, :num_guesses]
        return order


def measure_linear(task: Task) -> Iterator[Measurement]:
    """Yield the accuracy of the best classifier of the grid, chosen on every fifth training image, trained on all.

    Raises ToolkitError when there are too few images to hold any back.
    Source: the linear evaluation of DINOv2, dinov2/eval/linear.py. There, training crops are augmented, and the best
    of the grid is chosen on the test images. Here features are computed once, and the test images choose nothing.
    """
    steps = num_steps(len(task.train))
    views = grid_views(task.embed_dim, task.blocks, task.has_mean)
    probe = train_linear_probe(task.train, task.targets, views, steps=steps, seed=task.seed)
    parameters: dict[str, object] = {
        "learning_rate": probe.learning_rate,
        "blocks": probe.view.blocks,
        "mean_patch": probe.view.mean_patch,
        "grid": {
            "learning_rates": list(LEARNING_RATES),
            "blocks": sorted({view.blocks for view in views}),
            "mean_patch": sorted({view.mean_patch for view in views}),
        },
        "chosen_on": f"1/{HELD_BACK} of train",
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "augmentation": "none, features computed once",
    }
    guesses = probe.guesses(task.test, task.num_guesses)
    yield from accuracies(parameters, guesses, task.truth, len(task.train), task.seed)


def grid_views(embed_dim: int, blocks: int, has_mean: bool) -> tuple[View, ...]:
    """Return the views of a feature that holds class tokens of `blocks` blocks, and perhaps the mean patch token."""
    views = []
    for count in sorted({1, blocks}):
        first, end = (blocks - count) * embed_dim, blocks * embed_dim
        views.append(View(count, False, slice(first, end)))
        if has_mean:
            views.append(View(count, True, slice(first, end + embed_dim)))
    return tuple(views)


def num_steps(num_images: int) -> int:
    """Return how many steps a training set of this size is given: the protocol's, or less where that is plenty."""
    return min(STEPS, max(MIN_STEPS, STEPS_PER_IMAGE * num_images))


def train_linear_probe(
    features: Float32,
    labels: Int64,
    views: tuple[View, ...] | None = None,
    *,
    steps: int,
    seed: int,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
) -> LinearProbe:
    """Train a linear classifier on features (N, E) with labels (N,) in 0..C-1.

    Every view and rate of the grid is trained on four fifths of the images; the one most accurate on the others (of
    equals the one with the lowest rate, and the smallest view) is trained again on all. Features are shifted by their
    mean and divided by one number, so that features of any size suit the same rates. Without views, the whole feature
    is one.

    Raises ToolkitError when there are too few images to hold any back.
    """
    if len(labels) < HELD_BACK:
        raise ToolkitError(
            f"{len(labels)} labelled training images are too few for a linear probe, which chooses its"
            f" learning rate on every fifth; give at least {HELD_BACK}, or use --method knn"
        )
    views = views or grid_views(features.shape[1], 1, has_mean=False)
    num_classes = int(labels.max()) + 1
    inputs = torch.from_numpy(np.array(features))  # a copy: it is changed, and may be a memory-mapped file
    shift = inputs.mean(dim=0)
    inputs -= shift
    scale = float(inputs[:, views[0].columns].square().mean().sqrt()) or 1.0
    inputs /= scale
    targets = torch.from_numpy(labels)

    held = held_back(labels, HELD_BACK, seed)
    fit = np.setdiff1d(np.arange(len(labels)), held)
    trained = train_grid(inputs[fit], targets[fit], num_classes, learning_rates, views, steps=steps, seed=seed)
    accuracy = torch.stack([_accuracy(inputs[held], targets[held], *each) for each in zip(views, trained, strict=True)])
    rate, number = divmod(int(accuracy.T.argmax()), len(views))
    view, best = views[number], learning_rates[rate]

    ((weights, biases),) = train_grid(inputs, targets, num_classes, (best,), (view,), steps=steps, seed=seed)
    held_back_accuracy = tuple(tuple(of_view) for of_view in accuracy.tolist())
    return LinearProbe(weights[0], biases[0], shift, scale, view, best, held_back_accuracy)


def _accuracy(inputs: Tensor, targets: Tensor, view: View, classifiers: tuple[Tensor, Tensor]) -> Tensor:
    """Return the accuracy of each of a view's classifiers, (G,)."""
    weights, biases = classifiers
    guesses = (inputs[:, view.columns] @ weights + biases[:, None]).argmax(dim=2)  # (G, N, C) -> (G, N)
    return (guesses == targets).double().mean(dim=1)


def train_grid(
    inputs: Tensor,
    targets: Tensor,
    num_classes: int,
    learning_rates: tuple[float, ...],
    views: Sequence[View],
    *,
    steps: int,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each view, weights (G, E', C) and biases (G, C) of one softmax classifier a rate.

    All are shown the same batches. Stochastic gradient descent with momentum on the cross-entropy of inputs (N, E) and
    targets (N,); rates are for batch 256, scaled to the batch, and fall to 0 by a cosine. The gradient is written
    out: softmax minus one-hot. A view's classifiers do not depend on which others are trained beside them.
    """
    num_rates, num_images = len(learning_rates), len(inputs)
    one_hot = torch.nn.functional.one_hot(targets, num_classes).float()
    rates = torch.tensor(learning_rates).repeat_interleave(num_classes) * BATCH_SIZE / 256  # (G * C)
    weights = [_initial(view, inputs.shape[1], num_classes, num_rates, seed) for view in views]
    velocities = [torch.zeros_like(of_view) for of_view in weights]
    batches = _batches(num_images, steps, torch.Generator().manual_seed(seed))
    ones = torch.ones(BATCH_SIZE, 1)
    with threads_for(flops=4 * BATCH_SIZE * sum(of_view.numel() for of_view in weights)):
        for step, chosen in enumerate(batches):
            batch, truth = inputs[chosen], one_hot[chosen][:, None]
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            for view, of_view, velocity in zip(views, weights, velocities, strict=True):
                seen = torch.cat([batch[:, view.columns], ones], dim=1)  # (B, E' + 1): the last is for the bias
                error = torch.softmax((seen @ of_view).view(BATCH_SIZE, num_rates, num_classes), dim=2) - truth
                velocity.mul_(MOMENTUM).addmm_(seen.T, error.flatten(1), alpha=1 / BATCH_SIZE)
                of_view -= decay * rates * velocity
    trained = []
    for of_view in weights:
        by_rate = of_view.view(-1, num_rates, num_classes).transpose(0, 1)  # (E' + 1, G * C) -> (G, E' + 1, C)
        trained.append((by_rate[:, :-1], by_rate[:, -1]))
    return trained


def _initial(view: View, dim: int, num_classes: int, num_rates: int, seed: int) -> Tensor:
    """Return the first weights of a view's classifiers, side by side for one matrix product: (E' + 1, G * C).

    The last row is the bias. The same numbers belong to a column of the feature, whatever the view.
    """
    drawn = torch.randn(dim, num_classes, generator=torch.Generator().manual_seed(seed + 1)) * INITIAL_STD
    return torch.cat([drawn[view.columns], torch.zeros(1, num_classes)]).repeat(1, num_rates)


@contextmanager
def threads_for(flops: int) -> Iterator[None]:
    """Let torch use one thread where a step is small, all of them otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if flops < ONE_THREAD_FLOPS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(num_images: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return the images of each step, (steps, B): all of them in a random order, again and again."""
    passes = -(-steps * BATCH_SIZE // num_images)
    order = torch.cat([torch.randperm(num_images, generator=generator) for _ in range(passes)])
    return order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
