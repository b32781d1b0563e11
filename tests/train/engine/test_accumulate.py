from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.engine.accumulate import forward_backward, halved, weighted_losses
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.objective.micro_batch import MicroBatch
from dinov2_toolkit.train.objective.ssl_model import SSLModel
from dinov2_toolkit.train.pretrain import pretrain

SETTINGS = [
    "arch=vit_tiny",
    "depth=2",
    "steps=2",
    "batch_size=8",
    "log_every=1",
    "patch_size=4",
    "num_prototypes=32",
    "hidden_dim=16",
    "bottleneck_dim=8",
    "global_crop_size_px=12",
    "local_crop_size_px=8",
    "num_local_crops=2",
    "drop_path=0.3",
    "mixed_precision=no",
    "num_workers=0",
    "warmup_steps=1",
    "freeze_last_layer_steps=0",
]


def settings(*changes: str) -> TrainConfig:
    return resolve(TrainConfig, recipe=None, environment={}, flags={}, assignments=[*SETTINGS, *changes])


class SmallMemory(nn.Module):
    """A model on a device that holds the activations of so many images, and finds out going forward or backward."""

    def __init__(self, model: nn.Module, num_images: int, *, backward: bool) -> None:
        super().__init__()
        self.model, self.num_images, self.backward = model, num_images, backward

    def forward(self, part: MicroBatch) -> dict[str, Tensor]:
        if part.num_images > self.num_images and not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory")
        outputs: dict[str, Tensor] = self.model(part)
        if part.num_images > self.num_images:
            outputs["total"].register_hook(self.run_out)  # type: ignore[no-untyped-call]
        return outputs

    def run_out(self, grad: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def step_of(model: SSLModel) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    global_crops, local_crops = (torch.randn(16, 3, side, side, generator=generator) for side in (12, 8))
    masks = torch.rand(16, 9, generator=generator) < 0.3
    masks[:, 0] = True
    return model.teacher_targets(global_crops, local_crops, masks, teacher_temp=0.07)


def gradients(model: nn.Module, step: MicroBatch, micro_batch_size: int, smallest: int = 2) -> tuple[list[Tensor], int]:
    model.zero_grad()
    _, size = forward_backward(
        model,
        step,
        Accelerator(cpu=True),
        seed=3,
        sequential_views=False,
        micro_batch_size=micro_batch_size,
        smallest=smallest,
    )
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None], size


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_halves_the_images_at_a_time_and_changes_nothing_else(
    backward: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build_model(settings()).train()
    step = step_of(model)
    wanted, _ = gradients(model, step, 2)
    got, size = gradients(SmallMemory(model, 2, backward=backward), step, 0)
    assert size == 2
    assert len(got) == len(wanted) and all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    said = capsys.readouterr().err
    assert "from here on 4 images at a time instead of 8; the batch stays 8" in said
    assert "from here on 2 images at a time instead of 4; the batch stays 8" in said
    with pytest.raises(ToolkitError, match="does not suffice for 2 images at a time; set sequential_views=true"):
        gradients(SmallMemory(model, 1, backward=backward), step, 0)


def test_half_as_many_images_leave_no_micro_batch_too_small() -> None:
    assert halved(8, 8, 2) == 4
    assert halved(9, 9, 2) == 3  # 4 would leave one
    assert halved(9, 9, 1) == 4
    assert halved(3, 9, 2) is None
    assert halved(2, 8, 1) == 1
    assert halved(1, 8, 1) is None


def test_a_run_that_is_out_of_memory_is_the_run_with_that_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    uris = [str(tmp_path / f"{number}.png") for number in range(8)]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "images.parquet")
    pretrain(tmp_path / "images.parquet", str(tmp_path / "given"), settings("micro_batch_size=4"), Options())
    whole = SSLModel.forward

    def small(model: SSLModel, part: MicroBatch) -> dict[str, Tensor]:
        if part.num_images > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, part)

    monkeypatch.setattr(SSLModel, "forward", small)
    pretrain(tmp_path / "images.parquet", str(tmp_path / "found"), settings(), Options())
    given, found = (read_metrics(tmp_path / name) for name in ("given", "found"))
    assert [line["micro_batch_size"] for line in found] == [4, 4]
    assert [line["total"] for line in found] == [line["total"] for line in given]
    given_weights, found_weights = (load_file(tmp_path / name / "teacher.safetensors") for name in ("given", "found"))
    assert all(torch.equal(value, found_weights[name]) for name, value in given_weights.items())


def test_a_micro_batch_that_leaves_one_image_for_koleo_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a.png"]}), tmp_path / "images.parquet")
    config = settings("batch_size=9", "micro_batch_size=4")
    with pytest.raises(ToolkitError, match="micro_batch_size 4 leaves a single one of the 9 images"):
        pretrain(tmp_path / "images.parquet", str(tmp_path / "a"), config, Options(dry_run=True))


def test_weighted_losses_add_up_to_the_total() -> None:
    config = TrainConfig(dino_weight=2.0, ibot_weight=0.5, koleo_weight=0.1)
    figures = weighted_losses({"dino_local": 3.0, "dino_global": 1.0, "ibot": 4.0, "koleo": -1.0}, config)
    assert figures == pytest.approx(
        {"dino_local_weighted": 6.0, "dino_global_weighted": 2.0, "ibot_weighted": 2.0, "koleo_weighted": -0.1}
    )
