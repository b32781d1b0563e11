"""A training step asks a GPU for no value, and copies little to it.

Traced with fake tensors, which raise where a value is asked for, in main memory without the paths for CPUs: a torch
without CUDA cannot go backward on fake tensors of a GPU. Copies are counted on the meta device, which holds no values.
"""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_toolkit.models import cpu
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.data.images import Batch
from dinov2_toolkit.train.data.multicrop import make_masks, make_views
from dinov2_toolkit.train.data.packed import packed
from dinov2_toolkit.train.engine.accumulate import forward_backward
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.engine.half_precision import LossScale
from dinov2_toolkit.train.engine.optimizer import (
    apply_schedules,
    build_optimizer,
    clip_gradients,
    not_finite,
    step_unless,
)
from dinov2_toolkit.train.objective.masks import Padding, placed_masks
from dinov2_toolkit.train.objective.networks import update_teacher
from dinov2_toolkit.train.objective.ssl_model import SSLModel

NARROW = ("embed_dim=32", "num_heads=2", "depth=2", "num_prototypes=64", "ibot_num_prototypes=48", "hidden_dim=16")
CASES = {
    "the recipe": (),
    "views apart": ("sequential_views=true", "activation_checkpointing=selective"),
    "micro-batches": ("micro_batch_size=4", "activation_checkpointing=full", "centering=softmax_center"),
    "separate heads": ("separate_heads=true", "koleo_distributed=true"),
}
NUM_IMAGES, MAX_COPIES = 8, 4


@pytest.fixture(autouse=True)
def _without_the_paths_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ENABLED", False)


def settings(case: str) -> TrainConfig:
    return resolve(TrainConfig, "vits16-1gpu", assignments=[*NARROW, "compile=false", *CASES[case]])


def fake_model(config: TrainConfig, mode: FakeTensorMode) -> SSLModel:
    """The model with the padding that it has on a GPU, of fake tensors."""
    model = build_model(config)
    model.padding = Padding(config.mask_probability * sum(config.mask_ratio) / 2, config.mask_ratio[1])
    with mode:
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(torch.empty(weight.shape), weight.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.empty(buffer.shape))
    return model.train()


def crops(config: TrainConfig) -> tuple[Tensor, Tensor]:
    sizes = ((2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px))
    first, second = (torch.randn(views * NUM_IMAGES, 3, side, side) for views, side in sizes)
    return first, second


def batch_of_images() -> Batch:
    """Images of several sizes in main memory."""
    sizes = [(300, 200), (40, 400), (500, 60), (64, 64)] * (NUM_IMAGES // 4)
    return Batch(packed([np.zeros((*size, 3), np.uint8) for size in sizes]), np.arange(NUM_IMAGES), 0)


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the copies from main memory to a device, by their bytes, and tensors made of numbers of the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.num_constants = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:
            self.num_constants += 1
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != result.device.type:
            self.sizes.append(args[0].numel() * args[0].element_size())
        return result


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("the recipe", torch.float32), ("the recipe", torch.float16), *((case, torch.bfloat16) for case in CASES)],
)
def test_a_step_asks_for_no_value_forward_or_backward(case: str, dtype: torch.dtype) -> None:
    config = settings(case)
    masks = make_masks(np.arange(NUM_IMAGES), config)
    accelerator, mode = Accelerator(cpu=True), FakeTensorMode()
    model = fake_model(config, mode)
    with mode:
        optimizer = build_optimizer(model.student)
        apply_schedules(optimizer, lr=1e-3, last_layer_lr=0.0, weight_decay=0.04)
        accelerator.scaler = loss_scale = LossScale({}, torch.device("cpu")) if dtype == torch.float16 else None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), Copies() as copies:
            step = model.teacher_targets(*crops(config), masks, teacher_temp=0.04)
            outputs = forward_backward(
                model,
                step,
                accelerator,
                seed=0,
                sequential_views=config.sequential_views,
                micro_batch_size=int(config.micro_batch_size),
            )
        if loss_scale is not None:
            loss_scale.unscale(model.student)
        norms = clip_gradients(model.student, 3.0)
        is_bad = not_finite([outputs["total"], *norms.values()])
        step_unless(is_bad, optimizer)
        update_teacher(model.teacher, model.student, 0.99, is_bad)
        if loss_scale is not None:
            loss_scale.update(is_bad, outputs["total"])
        assert copies.num_constants == 4  # the arrays of the masks
        assert all(weight.grad is not None for weight in model.student.parameters())
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):  # as any question would
            float(is_bad)


def test_a_step_copies_pixels_and_at_most_four_small_tables_to_the_device() -> None:
    config, device = settings("the recipe"), torch.device("meta")
    batch = batch_of_images()
    with Copies() as copies:
        torch.zeros(3).to(device)
        assert copies.sizes == [12]  # it is seen
        copies.sizes.clear()
        global_crops, local_crops, masks, *_ = make_views(batch, config, device)
        placed = placed_masks(masks, device, Padding(0.15, 0.5))
    assert local_crops is not None
    assert {global_crops.device.type, local_crops.device.type, placed.patches.device.type} == {"meta"}
    pixels = batch.images.data.numel()
    assert copies.sizes.count(pixels) == 1
    tables = [size for size in copies.sizes if size != pixels]
    assert 0 < len(tables) <= MAX_COPIES and max(tables) < 300 * 1024
