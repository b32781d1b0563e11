import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.files import remove
from dinov2_toolkit.tests.train.small_run import noise_images, repeatable_metrics, settings
from dinov2_toolkit.train.engine import half_precision
from dinov2_toolkit.train.engine.half_precision import FIRST_SCALE, MAX_SCALE, MIN_SCALE, LossScale, supported
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.pretrain import pretrain

CPU = torch.device("cpu")


def test_the_scale_goes_the_way_of_torchs_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "GROWTH_STEPS", 3)
    own, theirs = LossScale({}, CPU), GradScaler("cpu", growth_interval=3)
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for is_bad in (0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1):
        torch.autograd.backward(theirs.scale(weight * (torch.inf if is_bad else 1.0)))
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        own.update(torch.tensor(float(is_bad)), torch.tensor(1.0))
        state = theirs.state_dict()
        assert own.counts() == {"loss_scale": state["scale"], "loss_scale_steps": state["_growth_tracker"]}


def test_gradients_are_those_of_the_loss_and_small_ones_do_not_vanish_in_fp16() -> None:
    layer = nn.Linear(3, 2, bias=False)
    weight, rows = layer.weight, torch.tensor([[1.0, 2.0, 3.0]])
    gradients: list[Tensor] = []
    for scale in (1, 2**16):
        loss_scale = LossScale({"loss_scale": scale}, CPU)
        half = weight.half() @ rows.half().T
        weight.grad = None
        torch.autograd.backward(loss_scale.scale(half.float().sum() * 1e-8))
        loss_scale.unscale(nn.ModuleDict({"head": layer}))
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert not gradients[0].any()
    torch.testing.assert_close(gradients[1], 1e-8 * rows.expand(2, 3), rtol=1e-3, atol=0)


def test_a_skipped_step_counts_only_where_another_scale_would_not_help() -> None:
    bad, good, loss = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0)
    loss_scale = LossScale({"loss_scale": 4}, CPU)
    assert [float(loss_scale.update(bad, loss)) for _ in range(4)] == [0, 0, 1, 1]  # at 4, 2, 1 and 1
    assert loss_scale.counts()["loss_scale"] == MIN_SCALE
    assert float(loss_scale.update(good, loss)) == 0
    fresh = LossScale({}, CPU)
    assert float(fresh.update(bad, torch.tensor(torch.nan))) == 1
    assert fresh.counts()["loss_scale"] == FIRST_SCALE / 2
    largest = LossScale({"loss_scale": int(MAX_SCALE), "loss_scale_steps": half_precision.GROWTH_STEPS}, CPU)
    largest.update(good, loss)
    assert largest.counts() == {"loss_scale": MAX_SCALE, "loss_scale_steps": 0}


def test_what_is_wanted_is_supported_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert [supported(wanted) for wanted in half_precision.HALF] == ["no", "bf16", "fp16"]


@pytest.fixture
def _another_precision() -> Iterator[None]:
    """Accelerate takes one precision a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_another_precision")
def test_a_run_in_fp16_finds_its_scale_skips_what_overflows_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = noise_images(tmp_path)
    changes = "mixed_precision=fp16", "steps=8", "layer_scale=1.0"
    monkeypatch.setattr(half_precision, "FIRST_SCALE", first := 2.0**7)
    pretrain(manifest, str(tmp_path / "whole"), settings(*changes), Options())
    metrics = read_metrics(tmp_path / "whole")
    scales = [line["loss_scale"] for line in metrics]
    assert first > scales[0] > scales[-1] == scales[-2] and 0 < metrics[-1]["loss_scale_steps"] < 8
    assert metrics[-1]["skipped_steps"] == metrics[-1]["skipped_in_a_row"] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for later in ("checkpoints/step-0000004", "checkpoints/step-0000006", "checkpoints/step-0000008", "model.json"):
        remove(tmp_path / "killed" / later)
    pretrain(manifest, str(tmp_path / "killed"), settings(*changes), Options(), resume=True)
    assert repeatable_metrics(tmp_path / "killed") == repeatable_metrics(tmp_path / "whole")
    AcceleratorState._reset_state()
    pretrain(manifest, str(tmp_path / "single"), settings("steps=1", "layer_scale=1.0"), Options())
    single = read_metrics(tmp_path / "single")[0]["total"]
    assert metrics[0]["total"] == pytest.approx(single, rel=0.01) and metrics[0]["total"] != single
    whole, killed = ((tmp_path / run / "teacher.safetensors").read_bytes() for run in ("whole", "killed"))
    assert whole == killed
