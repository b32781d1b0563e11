"""The logistic regression protocol: a path of L2 penalties, in double precision, by L-BFGS.

N images, D numbers a feature, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import console
from ..store.vectors import Float32, Int64
from .linear import threads_for
from .scores import Measurement, accuracies
from .task import Task, hold_out, most_likely

PENALTIES = tuple(np.logspace(-6, 5, 45).tolist())  # C: the weight of the data against the L2 penalty
PATIENCE = 12  # chosen: the path ends when so many penalties, three decades, were no better
HELD_OUT = 10  # one image in ten of a class chooses the penalty
MAX_ITERATIONS = 1_000
GRADIENT_TOLERANCE = 1e-7  # chosen: in units in which the curvature is about 1
LOSS_TOLERANCE = 1e-11  # chosen: of the mean loss, from one step to the next
HISTORY = 20  # steps that L-BFGS remembers


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted classifier."""

    weight: Tensor  # (D, C) float64
    bias: Tensor  # (C,)

    def predict(self, features: Float32, topk: int = 1) -> Int64:
        """Return the most likely classes of features (M, D), (M, topk), best first."""
        return most_likely(torch.from_numpy(features.astype(np.float64)) @ self.weight + self.bias, topk)


def measure_logreg(task: Task) -> Iterator[Measurement]:
    """Yield the accuracy of the logistic regression whose penalty is best on a tenth of the training images.

    Source: the logistic regression of DINOv2, dinov2/eval/log_regression.py (class token as it is, float64, 45
    penalties from 1e-6 to 1e5, 1,000 iterations).
    Raises ToolkitError when there are too few images to hold any out.
    """
    train, test = task.class_tokens()
    labels = task.train_labels
    fit, held_out = hold_out(labels, HELD_OUT, task.seed, "a logistic regression, which chooses its penalty")
    accuracy: list[float] = []
    with console.progress("logistic regressions", len(PENALTIES), "penalties") as advance:
        for fitted in regression_path(train[fit], labels[fit], task.num_classes, PENALTIES):
            accuracy.append(float(np.mean(fitted.predict(train[held_out])[:, 0] == labels[held_out])))
            advance()
            if len(accuracy) - int(np.argmax(accuracy)) > PATIENCE:
                break
    best = PENALTIES[int(np.argmax(accuracy))]  # of equals the strongest penalty
    (chosen,) = regression_path(train, labels, task.num_classes, (best,))
    parameters: dict[str, object] = {
        "C": best,
        "penalty": "L2: sum of losses + |W|^2 / (2 C), the bias free",
        "grid": f"{len(PENALTIES)} values from {PENALTIES[0]:g} to {PENALTIES[-1]:g}, up to {PATIENCE} beyond the best",
        "chosen_on": f"1/{HELD_OUT} of train",
        "max_iterations": MAX_ITERATIONS,
        "features": "class token, not normalised",
    }
    yield from accuracies(parameters, chosen.predict(test, task.topk), task.test_labels, len(train), task.seed)


def regression_path(
    features: Float32, labels: Int64, num_classes: int, penalties: tuple[float, ...]
) -> Iterator[LogisticRegression]:
    """Yield the minimum of sum_i cross-entropy_i + |W|^2 / (2 C) over weights W and biases, for each C in `penalties`.

    Each starts where the one before ended, so give rising penalties. Features are (N, D), labels (N,) in 0..C-1.

    The features are preconditioned: centred, turned to their principal directions, and each direction divided by the
    square root of its curvature (the variance over the number of classes, plus the penalty), for a tenth of the steps.
    """
    inputs = torch.from_numpy(features.astype(np.float64))
    shift = inputs.mean(dim=0)
    inputs -= shift
    variances, directions = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    inputs = inputs @ directions
    targets = torch.from_numpy(labels)
    weight, bias = torch.zeros(len(variances), num_classes, dtype=torch.float64), torch.zeros(num_classes).double()
    for penalty in penalties:
        decay = 1 / (penalty * len(inputs))  # of the mean loss
        scale = (variances.clamp_min(0) / num_classes + decay).rsqrt()[:, None]
        weight, bias = _minimum(inputs, targets, weight, bias, scale, decay)
        turned = directions @ weight
        yield LogisticRegression(turned, bias - shift @ turned)


def _minimum(
    inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """Return weights (D, C) and biases (C,) that minimise mean cross-entropy + decay / 2 |W|^2, from those given.

    L-BFGS works on W / scale; the gradient is written out: softmax minus one-hot.
    """
    scaled, free = (weight / scale).requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled, free],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=LOSS_TOLERANCE,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    rows = torch.arange(len(targets))

    @torch.no_grad()
    def loss() -> Tensor:
        unscaled = scale * scaled
        logits = torch.addmm(free, inputs, unscaled)  # (N, C)
        log_shares = torch.log_softmax(logits, dim=1)
        error = log_shares.exp()
        error[rows, targets] -= 1
        error /= len(targets)
        scaled.grad = scale * (inputs.T @ error + decay * unscaled)
        free.grad = error.sum(dim=0)
        return -log_shares[rows, targets].mean() + decay / 2 * unscaled.square().sum()

    with threads_for(flops=4 * len(inputs) * weight.numel()):
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (scale * scaled).detach(), free.detach()
