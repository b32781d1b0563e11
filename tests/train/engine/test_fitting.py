"""Memory that runs out, simulated: in one process, and in one of two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.launch import ALONE
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.pair import ended, said, started_pair
from dinov2_toolkit.tests.train.small_run import noise_images, repeatable_metrics, settings
from dinov2_toolkit.train import pretrain as loop
from dinov2_toolkit.train.data import loader
from dinov2_toolkit.train.engine import fitting
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.engine.fitting import halved, step_that_fits
from dinov2_toolkit.train.launch import read_status
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.objective.micro_batch import MicroBatch
from dinov2_toolkit.train.objective.ssl_model import SSLModel
from dinov2_toolkit.train.pretrain import pretrain


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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


def gradients(model: nn.Module, step: MicroBatch, micro_batch_size: int) -> tuple[list[Tensor], int]:
    model.zero_grad()
    _, _, size = step_that_fits(
        model,
        torch.optim.AdamW(model.parameters()),
        lambda micro_batch_size, before_exchange: step,
        Accelerator(cpu=True),
        ALONE,
        settings(),
        seed=3,
        num_images=8,
        micro_batch_size=micro_batch_size,
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


def test_memory_that_runs_out_where_the_others_cannot_be_told_names_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_model(settings())
    monkeypatch.setattr(fitting._Agreement, "tell", lambda self, problem: False)
    with pytest.raises(ToolkitError, match="process 0 has too little memory for 8 images .*micro_batch_size=4"):
        gradients(SmallMemory(model, 4, backward=False), step_of(model), 0)


def test_half_as_many_images_leave_no_micro_batch_too_small() -> None:
    assert halved(8, 8, 2) == 4
    assert halved(9, 9, 2) == 3  # 4 would leave one
    assert halved(9, 9, 1) == 4
    assert halved(3, 9, 2) is None
    assert halved(2, 8, 1) == 1
    assert halved(1, 8, 1) is None


def out_of_memory_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose first call runs out of memory."""
    calls = []

    def called(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments, **keywords)

    return called


STAGES: dict[str, tuple[Any, str]] = {
    "crops": (loader, "make_views"),
    "teacher": (SSLModel, "teacher_targets"),
    "student": (SSLModel, "forward"),
    "backward": (Accelerator, "backward"),
    "optimizer": (fitting, "step_unless"),
}
TRIED = ("backward", "optimizer")  # what a trial step finds


def run_out_in(stage: str, patch: pytest.MonkeyPatch) -> None:
    """Have this process run out of memory in a stage of its first step, or of the trial before it."""
    target, name = STAGES[stage]
    patch.setattr(target, name, out_of_memory_once(getattr(target, name)))


def assert_equal_runs(first: Path, second: Path) -> None:
    assert repeatable_metrics(first) == repeatable_metrics(second)
    weights, others = (load_file(folder / "teacher.safetensors") for folder in (first, second))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_out_of_memory_is_the_run_with_that_micro_batch(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, changes = noise_images(tmp_path), ("steps=3", "centering=softmax_center")
    pretrain(images, str(tmp_path / "given"), settings(*changes, "micro_batch_size=4"), Options())
    monkeypatch.setattr(loop, "is_tried_first", lambda device: stage in TRIED)
    run_out_in(stage, monkeypatch)
    pretrain(images, str(tmp_path / "found"), settings(*changes), Options())
    assert [line["micro_batch_size"] for line in read_metrics(tmp_path / "found")] == [4, 4, 4]
    assert_equal_runs(tmp_path / "found", tmp_path / "given")


def pair_of(images: Path, name: str, stage: str | None, *changes: str) -> list[int | None]:
    """Train in two processes, the second of which runs out of memory in a stage; return the exit codes."""

    def work(rank: int) -> None:
        patch = pytest.MonkeyPatch()
        patch.setattr(loop, "is_tried_first", lambda device: stage in TRIED)
        if rank == 1 and stage is not None:
            run_out_in(stage, patch)
        config = settings("steps=3", "centering=softmax_center", *changes)
        pretrain(images, str(images.parent / name), config, Options())

    return ended(started_pair(work, images.parent), 60)


@pytest.mark.parametrize(
    "stage",
    ["student", *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES if stage != "student")],
)
def test_where_one_of_two_processes_is_out_of_memory_both_take_half(stage: str, tmp_path: Path) -> None:
    images = noise_images(tmp_path)
    assert pair_of(images, "given", None, "micro_batch_size=2") == [0, 0], said(tmp_path)
    assert pair_of(images, "found", stage) == [0, 0], said(tmp_path)
    assert sum("from here on 2 images at a time instead of 4" in line for line in said(tmp_path)) == 1
    assert [line["micro_batch_size"] for line in read_metrics(tmp_path / "found")] == [2, 2, 2]
    assert_equal_runs(tmp_path / "found", tmp_path / "given")


@pytest.mark.slow
def test_memory_that_runs_out_where_others_wait_ends_both_with_one_line(tmp_path: Path) -> None:
    images = noise_images(tmp_path)

    def work(rank: int) -> None:
        if rank == 1:
            run_out_in("backward", pytest.MonkeyPatch())
        pretrain(images, str(tmp_path / "run"), settings(), Options())

    assert ended(started_pair(work, tmp_path), 60) == [1, 1]
    told = "the GPU of process 1 has too little memory for 4 images at a time; set micro_batch_size=2"
    assert [line for line in said(tmp_path) if line.startswith("error")] == [f"error: {told}"]
    assert read_status(tmp_path / "run") == {"exit_code": 1, "message": told}
