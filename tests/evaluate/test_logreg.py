"""Logistic regression: the minimum by its conditions, in closed form, and over the path of penalties."""

import numpy as np
import pytest
import torch

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate import logreg
from dinov2_toolkit.evaluate.logreg import measure_logreg, regression_path
from dinov2_toolkit.evaluate.task import Task


def blobs(num_images: int, seed: int, dim: int = 12, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes in badly scaled, shifted features."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    centres = np.random.default_rng(99).standard_normal((num_classes, dim))
    features = (centres[labels] + 1.5 * random.standard_normal((num_images, dim))) * np.logspace(0, -2, dim) + 3
    return features.astype(np.float32), labels


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_at_the_minimum_the_gradient_of_the_penalised_loss_is_zero(penalty: float) -> None:
    features, labels = blobs(200, seed=0)
    (fitted,) = regression_path(features, labels, 4, (penalty,))
    weight, bias = fitted.weight.clone().requires_grad_(), fitted.bias.clone().requires_grad_()
    logits = torch.from_numpy(features).double() @ weight + bias
    loss = penalty * torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    of_weight, of_bias = torch.autograd.grad(loss + weight.square().sum() / 2, [weight, bias])
    scale = penalty * len(labels)
    assert float(of_weight.abs().max()) < 1e-5 * scale
    assert float(of_bias.abs().max()) < 1e-5 * scale


def test_a_penalty_gives_the_same_classifier_alone_and_on_the_path() -> None:
    features, labels = blobs(200, seed=0)
    *_, last = regression_path(features, labels, 4, (1e-3, 1e-2, 1e-1, 1.0))
    (alone,) = regression_path(features, labels, 4, (1.0,))
    torch.testing.assert_close(last.weight, alone.weight, rtol=1e-3, atol=1e-4)


def test_a_penalty_too_strong_to_learn_leaves_the_shares_of_the_classes() -> None:
    features, _ = blobs(40, seed=0)
    labels = np.repeat([0, 1], [30, 10])
    (fitted,) = regression_path(features, labels, 2, (1e-12,))
    torch.testing.assert_close(fitted.weight, torch.zeros(12, 2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.softmax(fitted.bias, 0), torch.tensor([0.75, 0.25]).double(), rtol=1e-4, atol=0)


def task(num_train: int = 300) -> Task:
    (train, train_labels), (test, test_labels) = blobs(num_train, seed=0), blobs(200, seed=1)
    return Task(train, train_labels, test, test_labels, [], [])


def test_the_penalty_is_the_best_on_a_tenth_and_fitted_again_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logreg, "PENALTIES", (1e-6, 1e-1, 1.0))
    (measured,) = measure_logreg(task())
    assert measured.metric == "top1"
    assert measured.parameters["C"] in (1e-1, 1.0)
    (fitted,) = regression_path(task().train, task().train_labels, 4, (float(str(measured.parameters["C"])),))
    assert measured.value == np.mean(fitted.predict(task().test)[:, 0] == task().test_labels) > 0.5
    assert (measured.num_train, measured.num_test) == (300, 200)


def test_the_path_ends_when_nothing_better_came_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logreg, "PATIENCE", 2)
    tried: list[float] = []
    path = logreg.regression_path

    def counted(features, labels, num_classes, penalties):  # type: ignore[no-untyped-def]
        for penalty, fitted in zip(penalties, path(features, labels, num_classes, penalties), strict=True):
            tried.append(penalty)
            yield fitted

    monkeypatch.setattr(logreg, "regression_path", counted)
    (measured,) = measure_logreg(task())
    assert len(tried) < len(logreg.PENALTIES)
    assert tried[-4] == measured.parameters["C"]  # two more were tried
    assert tried[-1] == measured.parameters["C"]  # the last is fitted on all


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ToolkitError, match="9 labelled training images are too few"):
        next(measure_logreg(task(9)))
