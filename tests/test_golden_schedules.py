"""Schedules are the numbers of the official ones at every iteration (relative difference under 1e-5)."""

import json
import math
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dinov2_toolkit.train.engine.schedules import last_layer_lr, linear_then_constant, scaled_lr, warmup_then_cosine

GOLDEN = Path(os.environ.get("DINOV2_GOLDEN", Path(__file__).parent / "golden"))
SETTINGS = json.loads((GOLDEN / "meta.json").read_text())["schedules"]
EXPECTED = {name: values.tolist() for name, values in load_file(GOLDEN / "schedules.safetensors").items()}
NUM_STEPS = SETTINGS["epochs"] * SETTINGS["epoch_length"]


def lr(step: int) -> float:
    return warmup_then_cosine(
        step,
        base=scaled_lr(SETTINGS["base_lr_at_1024"], SETTINGS["batch_size"]),
        final=SETTINGS["min_lr"],
        num_steps=NUM_STEPS,
        warmup_steps=SETTINGS["warmup_epochs"] * SETTINGS["epoch_length"],
    )


def head_lr(step: int) -> float:
    return last_layer_lr(step, lr(step), freeze_steps=SETTINGS["freeze_last_layer_epochs"] * SETTINGS["epoch_length"])


def weight_decay(step: int) -> float:
    start, final = SETTINGS["weight_decay"]
    return warmup_then_cosine(step, base=start, final=final, num_steps=NUM_STEPS)


def teacher_momentum(step: int) -> float:
    start, final = SETTINGS["teacher_momentum"]
    return warmup_then_cosine(step, base=start, final=final, num_steps=NUM_STEPS)


def teacher_temp(step: int) -> float:
    start, final = SETTINGS["teacher_temp"]
    num_steps = SETTINGS["teacher_temp_warmup_epochs"] * SETTINGS["epoch_length"]
    return linear_then_constant(step, start=start, final=final, num_steps=num_steps)


SCHEDULES = {
    "lr": lr,
    "last_layer_lr": head_lr,
    "weight_decay": weight_decay,
    "teacher_momentum": teacher_momentum,
    "teacher_temp": teacher_temp,
}


def test_every_golden_schedule_is_compared() -> None:
    assert SCHEDULES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_the_official_one_at_every_step(name: str) -> None:
    for step, expected in enumerate(EXPECTED[name]):
        assert math.isclose(SCHEDULES[name](step), expected, rel_tol=1e-5, abs_tol=1e-12), (name, step)


def test_schedules_keep_their_final_value() -> None:
    assert lr(NUM_STEPS + 7) == head_lr(NUM_STEPS + 7) == SETTINGS["min_lr"]
    assert weight_decay(NUM_STEPS) == SETTINGS["weight_decay"][1]
    assert teacher_momentum(NUM_STEPS) == SETTINGS["teacher_momentum"][1]
    assert teacher_temp(NUM_STEPS) == SETTINGS["teacher_temp"][1]
