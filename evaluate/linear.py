"""The linear probe: a grid of linear classifiers trained at once on frozen features.

N images, D numbers a feature, C classes, G learning rates.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ToolkitError
from ..store.vectors import Float32, Int64

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at batch 256
BATCH_SIZE = 128
STEPS = 12_500  # of the protocol; small training sets have converged long before
STEPS_PER_IMAGE, MIN_STEPS = 3, 1_000  # chosen: 384 passes; more did not change the accuracy on 1,000 images
MOMENTUM = 0.9
INITIAL_STD = 0.01
ONE_THREAD_FLOPS = 5e8  # a smaller step is no faster on several threads, and ten times slower where cores are busy
HELD_BACK = 5  # every fifth image of a class chooses the rate


@dataclass(frozen=True)
class LinearProbe:
    """A trained classifier and how it was chosen."""

    weight: torch.Tensor  # (D, C), for features scaled by `shift` and `scale`
    bias: torch.Tensor  # (C,)
    shift: torch.Tensor  # (D,)
    scale: float
    learning_rate: float  # the one chosen, at batch 256
    held_back_accuracy: tuple[float, ...]  # of each rate of the grid

    def guesses(self, features: Float32, num_guesses: int = 1) -> Int64:
        """Return the most likely classes of features (M, D), (M, num_guesses), best first."""
        scores = (torch.from_numpy(features) - self.shift) / self.scale @ self.weight + self.bias
        order: Int64 = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :num_guesses]
        return order


def num_steps(num_images: int) -> int:
    """Return how many steps a training set of this size is given: the protocol's, or less where that is plenty."""
    return min(STEPS, max(MIN_STEPS, STEPS_PER_IMAGE * num_images))


def train_linear_probe(
    features: Float32,
    labels: Int64,
    *,
    steps: int,
    seed: int,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
) -> LinearProbe:
    """Train a linear classifier on features (N, D) with labels (N,) in 0..C-1.

    Every rate of the grid is trained on four fifths of the images; the one most accurate on the others (the lowest
    of equals) is trained again on all.

    Raises ToolkitError when there are too few images to hold any back.
    Source: the linear evaluation of DINOv2, dinov2/eval/linear.py. There, crops are augmented, the class tokens of
    1 or 4 blocks and the mean patch token are tried too, and the rate is chosen on the test images. Here the
    features are computed once, shifted by their mean and divided by one number, so that features of any size
    suit the same rates.
    """
    if len(labels) < HELD_BACK:
        raise ToolkitError(
            f"{len(labels)} labelled training images are too few for a linear probe, which chooses its"
            f" learning rate on every fifth; give at least {HELD_BACK}, or use --method knn"
        )
    num_classes = int(labels.max()) + 1
    shift = torch.from_numpy(features.mean(axis=0))
    centred = torch.from_numpy(features) - shift
    scale = float(centred.square().mean().sqrt()) or 1.0
    inputs, targets = centred / scale, torch.from_numpy(labels)

    held = _held_back(labels, seed)
    fit = np.setdiff1d(np.arange(len(labels)), held)
    weights, biases = train_grid(inputs[fit], targets[fit], num_classes, learning_rates, steps=steps, seed=seed)
    correct = (inputs[held] @ weights + biases[:, None]).argmax(dim=2) == targets[held]  # (G, held)
    accuracy = correct.double().mean(dim=1)
    best = learning_rates[int(accuracy.argmax())]

    weights, biases = train_grid(inputs, targets, num_classes, (best,), steps=steps, seed=seed)
    return LinearProbe(weights[0], biases[0], shift, scale, best, tuple(accuracy.tolist()))


def _held_back(labels: Int64, seed: int) -> Int64:
    """Return every fifth image in an order that is random within classes, so that the classes keep their shares."""
    shuffled = np.random.default_rng([seed, 1]).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return by_class[HELD_BACK // 2 :: HELD_BACK]


def train_grid(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    num_classes: int,
    learning_rates: tuple[float, ...],
    *,
    steps: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (G, D, C) and biases (G, C) of one softmax classifier a rate, all shown the same batches.

    Stochastic gradient descent with momentum on the cross-entropy of inputs (N, D) and targets (N,); rates are for
    batch 256, scaled to the batch, and fall to 0 by a cosine. The gradient is written out: softmax minus one-hot.
    """
    num_rates, dim = len(learning_rates), inputs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    initial = torch.randn(dim, num_classes, generator=generator) * INITIAL_STD
    # The classifiers stand side by side, one matrix product for all; the last row is the bias, against ones.
    weights = torch.cat([initial, torch.zeros(1, num_classes)]).repeat(1, num_rates)  # (D + 1, G * C)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    one_hot = torch.nn.functional.one_hot(targets, num_classes).float()
    rates = torch.tensor(learning_rates).repeat_interleave(num_classes) * BATCH_SIZE / 256  # (G * C)
    velocity = torch.zeros_like(weights)
    batches = _batches(len(inputs), steps, generator)
    with _threads_for(flops=4 * BATCH_SIZE * weights.numel()):
        for step, chosen in enumerate(batches):
            batch = inputs[chosen]
            error = torch.softmax((batch @ weights).view(BATCH_SIZE, num_rates, num_classes), dim=2)
            error -= one_hot[chosen][:, None]
            velocity.mul_(MOMENTUM).addmm_(batch.T, error.flatten(1), alpha=1 / BATCH_SIZE)
            weights -= 0.5 * (1 + math.cos(math.pi * step / steps)) * rates * velocity
    by_rate = weights.view(dim + 1, num_rates, num_classes).transpose(0, 1)  # (G, D + 1, C)
    return by_rate[:, :-1], by_rate[:, -1]


@contextmanager
def _threads_for(flops: int) -> Iterator[None]:
    """Let torch use one thread where a step is small, all of them otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if flops < ONE_THREAD_FLOPS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(num_images: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Return the images of each step, (steps, B): all of them in a random order, again and again."""
    passes = -(-steps * BATCH_SIZE // num_images)
    order = torch.cat([torch.randperm(num_images, generator=generator) for _ in range(passes)])
    return order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
