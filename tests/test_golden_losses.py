"""Losses and teacher probabilities are the numbers of the official modules (relative difference under 1e-5)."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.train.objective.losses import (
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    softmax_center,
    updated_center,
)

GOLDEN = Path(os.environ.get("DINOV2_GOLDEN", Path(__file__).parent / "golden"))
SETTINGS = json.loads((GOLDEN / "meta.json").read_text())["losses"]
LOSSES = load_file(GOLDEN / "losses.safetensors")


def golden(prefix: str) -> Tensor:
    """Return the one tensor whose name starts so: names may end in a temperature."""
    [name] = [name for name in LOSSES if name.startswith(prefix)]
    return LOSSES[name]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.numel() == expected.numel()
    assert (actual.reshape(expected.shape) - expected).norm() <= 1e-5 * expected.norm()


def test_sinkhorn_knopp_of_class_tokens() -> None:
    probs = sinkhorn_knopp(LOSSES["dino.teacher_logits"], SETTINGS["dino_sinkhorn_temp"])
    assert_close(probs, golden("dino.sinkhorn"))


def test_sinkhorn_knopp_of_masked_patches() -> None:
    probs = sinkhorn_knopp(LOSSES["ibot.teacher_logits"], SETTINGS["ibot_sinkhorn_temp"])
    assert_close(probs, golden("ibot.sinkhorn"))


def test_centering_over_two_steps() -> None:
    first, second = LOSSES["dino.teacher_logits"], LOSSES["dino.teacher_logits_step1"]
    center = torch.zeros(1, first.shape[1])
    assert_close(softmax_center(first, center, SETTINGS["dino_center_temp"]), LOSSES["dino.softmax_center_step0"])
    center = updated_center(center, first, momentum=SETTINGS["center_momentum"])
    assert_close(center, LOSSES["dino.center_after1"])
    assert_close(softmax_center(second, center, SETTINGS["dino_center_temp"]), LOSSES["dino.softmax_center_step1"])


def test_dino_loss_over_all_pairs() -> None:
    probs = golden("dino.sinkhorn")
    swapped = torch.cat(probs.chunk(2)[::-1])
    loss = dino_loss(
        LOSSES["dino.student_logits"], torch.stack([probs, swapped]), student_temp=SETTINGS["student_temp"]
    )
    assert_close(loss, LOSSES["dino.cross_entropy_sum_over_pairs"])


def test_ibot_loss() -> None:
    loss = ibot_loss(
        LOSSES["ibot.student_logits"],
        golden("ibot.sinkhorn"),
        LOSSES["ibot.masks"],
        student_temp=SETTINGS["student_temp"],
    )
    assert_close(loss, LOSSES["ibot.loss"])


def test_koleo_loss() -> None:
    assert_close(koleo_loss(LOSSES["koleo.input"]), LOSSES["koleo.loss"])
