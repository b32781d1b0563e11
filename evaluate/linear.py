"""The linear protocol: a grid of linear classifiers trained together on frozen features.

N images, E numbers a feature, E' of them that a classifier sees, C classes, G learning rates.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .scores import Measurement, accuracies
from .task import Task, hold_out, most_likely

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at batch 256
BLOCKS = 4  # the last so many blocks' class tokens are tried together, beside the last one's
BATCH_SIZE = 128
STEPS = 12_500  # of the protocol; small training sets have converged long before
STEPS_PER_IMAGE, MIN_STEPS = 3, 1_000  # chosen: 384 passes; more did not change the accuracy on 1,000 images
MOMENTUM = 0.9
INITIAL_STD = 0.01
ONE_THREAD_FLOPS = 5e8  # a smaller step is no faster on several threads, and ten times slower where cores are busy
HELD_OUT = 5  # one image in five of a class chooses among the grid


@dataclass(frozen=True)
class TokenSet:
    """The tokens that a classifier sees: class tokens of the last blocks, and perhaps the mean patch token."""

    blocks: int
    mean_patch: bool
    columns: slice  # of the feature


def measure_linear(task: Task) -> Iterator[Measurement]:
    """Yield the accuracy of the best classifier of the grid, chosen on held-out training images, trained on all.

    Every token set and learning rate is trained on four fifths of the images. The most accurate on the others (of
    equals the one with the lowest rate, and the smallest set) is trained again on all. Features are shifted by their
    mean and divided by one number, so that features of any size suit the same rates.
    Raises ToolkitError when there are too few images to hold any out.
    Source: the linear evaluation of DINOv2, dinov2/eval/linear.py. There, training crops are augmented, and the best
    of the grid is chosen on the test images. Here features are computed once, and the test images choose nothing.
    """
    fit, held_out = hold_out(task.train_labels, HELD_OUT, task.seed, "a linear probe, which chooses its learning rate")
    steps = min(STEPS, max(MIN_STEPS, STEPS_PER_IMAGE * len(task.train)))
    dim, end = task.embed_dim, task.blocks * task.embed_dim
    token_sets = [
        TokenSet(blocks, mean_patch, slice(end - blocks * dim, end + mean_patch * dim))
        for blocks in sorted({1, task.blocks})
        for mean_patch in sorted({False, task.has_mean})
    ]
    train = torch.from_numpy(np.array(task.train))  # a copy: it is changed, and may be a memory-mapped file
    shift = train.mean(dim=0)
    train -= shift
    scale = float(train[:, token_sets[0].columns].square().mean().sqrt()) or 1.0
    train /= scale
    labels = torch.from_numpy(task.train_labels)
    sizes = {"num_classes": task.num_classes, "steps": steps, "seed": task.seed}
    trained = train_grid(train[fit], labels[fit], LEARNING_RATES, token_sets, **sizes)
    others = train[held_out]
    logits = (others[:, each.columns] @ w + b[:, None] for each, (w, b) in zip(token_sets, trained, strict=True))
    correct = (each.argmax(dim=2) == labels[held_out] for each in logits)  # (G, N, C) -> (G, N)
    accuracy = torch.stack([each.double().mean(dim=1) for each in correct])
    rate, number = divmod(int(accuracy.T.argmax()), len(token_sets))
    best, learning_rate = token_sets[number], LEARNING_RATES[rate]

    ((weights, biases),) = train_grid(train, labels, (learning_rate,), (best,), **sizes)
    test = ((torch.from_numpy(np.array(task.test)) - shift) / scale)[:, best.columns]
    parameters: dict[str, object] = {
        "learning_rate": learning_rate,
        "blocks": best.blocks,
        "mean_patch": best.mean_patch,
        "grid": {
            "learning_rates": list(LEARNING_RATES),
            "blocks": sorted({token_set.blocks for token_set in token_sets}),
            "mean_patch": sorted({token_set.mean_patch for token_set in token_sets}),
        },
        "chosen_on": f"1/{HELD_OUT} of train",
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "augmentation": "none, features computed once",
    }
    predictions = most_likely(test @ weights[0] + biases[0], task.topk)
    yield from accuracies(parameters, predictions, task.test_labels, len(train), task.seed)


def train_grid(
    inputs: Tensor,
    labels: Tensor,
    learning_rates: tuple[float, ...],
    token_sets: Sequence[TokenSet],
    *,
    num_classes: int,
    steps: int,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each token set, weights (G, E', C) and biases (G, C) of one softmax classifier a rate.

    All see the same batches. Stochastic gradient descent with momentum on the cross-entropy of inputs (N, E) and
    labels (N,); rates are for batch 256, scaled to the batch, and fall to 0 by a cosine. The gradient is written
    out: softmax minus one-hot. A classifier does not depend on which others are trained beside it.
    """
    num_rates, num_images = len(learning_rates), len(inputs)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    rates = torch.tensor(learning_rates).repeat_interleave(num_classes) * BATCH_SIZE / 256  # (G * C)
    # A column of the feature starts from the same numbers in every token set. The last row is the bias.
    drawn = torch.randn(inputs.shape[1], num_classes, generator=torch.Generator().manual_seed(seed + 1)) * INITIAL_STD
    weights = [  # of all rates side by side, for one matrix product: (E' + 1, G * C)
        torch.cat([drawn[each.columns], torch.zeros(1, num_classes)]).repeat(1, num_rates) for each in token_sets
    ]
    velocities = [torch.zeros_like(each) for each in weights]
    ones = torch.ones(BATCH_SIZE, 1)
    with threads_for(flops=4 * BATCH_SIZE * sum(each.numel() for each in weights)):
        for step, rows in enumerate(_batches(num_images, steps, torch.Generator().manual_seed(seed))):
            batch, truth = inputs[rows], one_hot[rows][:, None]
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            for token_set, weight, velocity in zip(token_sets, weights, velocities, strict=True):
                seen = torch.cat([batch[:, token_set.columns], ones], dim=1)  # (B, E' + 1)
                error = torch.softmax((seen @ weight).view(BATCH_SIZE, num_rates, num_classes), dim=2) - truth
                velocity.mul_(MOMENTUM).addmm_(seen.T, error.flatten(1), alpha=1 / BATCH_SIZE)
                weight -= decay * rates * velocity
    by_rate = [each.view(-1, num_rates, num_classes).transpose(0, 1) for each in weights]  # (G, E' + 1, C)
    return [(each[:, :-1], each[:, -1]) for each in by_rate]


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
