"""The logistic regression protocol: a path of L2 penalties, in double precision, by L-BFGS.

N images, D numbers a feature, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..store.vectors import Float32, Int64
from .labelled import held_back
from .linear import threads_for
from .scores import Measurement, accuracies
from .task import Task

PENALTIES = tuple(np.logspace(-6, 5, 45).tolist())  # C: the weight of the data against the L2 penalty
PATIENCE = 12  # chosen: the path ends when so many penalties, three decades, have brought nothing better
HELD_BACK = 10  # every tenth image of a class chooses the penalty
MAX_ITERATIONS = 1_000
GRADIENT_TOLERANCE = 1e-7  # chosen: in units in which the curvature is about 1
LOSS_TOLERANCE = 1e-11  # chosen: of the mean loss, from one step to the next
HISTORY = 20  # steps that L-BFGS remembers


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted classifier."""

    weight: Tensor  # (D, C) float64
    bias: Tensor  # (C,)

    def guesses(self, features: Float32, num_guesses: int = 1) -> Int64:
        """Return the most likely classes of features (M, D), (M, num_guesses), best first."""
        scores = torch.from_numpy(features.astype(np.float64)) @ self.weight + self.bias
        order: Int64 = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :num_guesses]
        return order


def measure_logreg(task: Task) -> Iterator[Measurement]:
    """Yield the accuracy of the logistic regression whose penalty is best on every tenth training image.

    Source: the logistic regression of DINOv2, dinov2/eval/log_regression.py (class token as it is, float64, 45
    penalties from 1e-6 to 1e5, 1,000 iterations).
    Raises ToolkitError when there are too few images to hold any back.
    """
    train, test = task.train_tokens, task.test_tokens
    if len(train) < HELD_BACK:
        raise ToolkitError(
            f"{len(train)} labelled training images are too few for a logistic regression, which chooses its"
            f" penalty on every tenth; give at least {HELD_BACK}, or use --method knn"
        )
    held = held_back(task.targets, HELD_BACK, task.seed)
    fit = np.setdiff1d(np.arange(len(train)), held)
    accuracy: list[float] = []
    with console.progress("logistic regressions", len(PENALTIES), "penalties") as advance:
        for fitted in regression_path(train[fit], task.targets[fit], task.num_classes, PENALTIES):
            accuracy.append(float(np.mean(fitted.guesses(train[held])[:, 0] == task.targets[held])))
            advance()
            if len(accuracy) - int(np.argmax(accuracy)) > PATIENCE:
                break
    best = PENALTIES[int(np.argmax(accuracy))]  # of equals the strongest penalty

    (chosen,) = regression_path(train, task.targets, task.num_classes, (best,))
    parameters: dict[str, object] = {
        "C": best,
        "penalty": "L2: sum of losses + |W|^2 / (2 C), the bias free",
        "grid": f"{len(PENALTIES)} values from {PENALTIES[0]:g} to {PENALTIES[-1]:g}, up to {PATIENCE} beyond the best",
        "chosen_on": f"1/{HELD_BACK} of train",
        "max_iterations": MAX_ITERATIONS,
        "features": "class token, not normalised",
    }
    guesses = chosen.guesses(test, task.num_guesses)
    yield from accuracies(parameters, guesses, task.truth, len(train), task.seed)


def regression_path(
    features: Float32, labels: Int64, num_classes: int, penalties: tuple[float, ...]
) -> Iterator[LogisticRegression]:
    """Yield the minimum of sum_i cross-entropy_i + |W|^2 / (2 C) over weights W and biases, for each C in `penalties`.

    Each starts where the one before ended, so the penalties had best rise. Features are (N, D), labels (N,) in 0..C-1.

    The minimum is that of the features as they are. It is looked for in coordinates in which the problem is round:
    centred, along the principal directions, each divided by the square root of its curvature (the variance, times the
    1/C by which a class changes at most, plus the penalty). That takes a tenth of the steps.
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
