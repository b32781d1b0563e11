from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models import cpu
from dinov2_toolkit.models.block import ActivationCheckpointing, Block
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.train.config import COST_KEYS, TrainConfig
from dinov2_toolkit.train.data.masking import block_masks
from dinov2_toolkit.train.engine.accumulate import microbatch_backward
from dinov2_toolkit.train.engine.parallelize import check_compiler, compile_networks, prepare
from dinov2_toolkit.train.objective.distill_model import DistillModel
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.masks import Padding
from dinov2_toolkit.train.objective.multi_student import MultiStudent
from dinov2_toolkit.train.objective.ssl_model import SSLModel


def small_model(checkpointing: ActivationCheckpointing = "none") -> SSLModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        patch_size=4, embed_dim=16, depth=3, num_heads=2, img_size=8, layer_scale=1.0, drop_path=0.4
    )
    for block in backbone.blocks:
        assert isinstance(block, Block)
        block.activation_checkpointing = checkpointing
    return SSLModel(backbone, ProjectionHead(16, 13, hidden_dim=8, bottleneck_dim=4)).train()


def losses_and_gradients(model: SSLModel) -> dict[str, Tensor]:
    """Of a fixed batch, with the sequences dropped that a fixed seed drops."""
    torch.manual_seed(1)
    masks = torch.rand(10, 4) < 0.3
    crops = torch.randn(10, 3, 8, 8), torch.randn(15, 3, 4, 4)
    model.zero_grad()
    losses = model(model.teacher_targets(*crops, masks, teacher_temp=0.1))
    losses["total"].backward()
    gradients = {name: weight.grad for name, weight in model.student.named_parameters() if weight.grad is not None}
    return {name: value.detach().clone() for name, value in (losses | gradients).items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_have_the_losses_gradients_and_names_of_others(checkpointing: ActivationCheckpointing) -> None:
    model = small_model(checkpointing)
    names = list(model.state_dict())
    expected = losses_and_gradients(model)
    compile_networks(model)
    got = losses_and_gradients(model)
    assert got.keys() == expected.keys() and "backbone.blocks.0.attn.qkv.weight" in got
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5 * max(1.0, float(value.abs().max())))
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_compiled_blocks_take_the_halves_of_a_step_on_a_cpu() -> None:
    losses = []
    for compiled in (False, True):
        model = small_model()
        if compiled:
            compile_networks(model)
            model.losses = replace(model.losses, compile=True)
        torch.manual_seed(1)
        masks, crops = torch.rand(10, 4) < 0.3, (torch.randn(10, 3, 8, 8), torch.randn(15, 3, 4, 4))
        batch = model.teacher_targets(*crops, masks, teacher_temp=0.1)
        losses.append(microbatch_backward(model, batch, Tensor.backward, seed=0)["total"])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_compile_compiles_every_block_and_head() -> None:
    for wanted in (False, True):
        model = small_model()
        prepare(model, TrainConfig(mixed_precision="no", compile=wanted), Accelerator(cpu=True))
        for side in (model.student, model.teacher):
            backbone = side["backbone"]
            assert isinstance(backbone, VisionTransformer)
            compiled = [part._compiled_call_impl is not None for part in (*backbone.blocks, side["dino_head"])]
            assert compiled == [wanted] * 4


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_padded_steps_are_compiled_once_and_have_the_losses_and_gradients_of_others(
    checkpointing: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU. Every graph is a full one, which could not ask for a value of a tensor.
    monkeypatch.setattr(cpu, "ENABLED", False)
    models = [small_model(checkpointing) for _ in range(2)]
    for model in models:
        model.padding = Padding(0.15, 0.5)
    compile_networks(models[1])
    models[1].losses = replace(models[1].losses, compile=True)
    generator = np.random.default_rng(0)
    crops = torch.randn(10, 3, 32, 32), torch.randn(15, 3, 8, 8)

    def losses_and_gradients(model: SSLModel, masks: NDArray[np.bool_], teacher_temp: float) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        losses: dict[str, Tensor] = model(model.teacher_targets(*crops, masks, teacher_temp=teacher_temp))
        torch.autograd.backward(losses["total"])
        losses = {name: value.detach() for name, value in losses.items()}
        named = [(name, weight.grad) for name, weight in model.student.named_parameters()]
        return losses | {name: grad.clone() for name, grad in named if grad is not None}

    num_masked, num_graphs = set(), 0
    for step in range(4):
        masks = block_masks(10, (8, 8), generator)
        num_masked.add(int(masks.sum()))
        expected = losses_and_gradients(models[0], masks, 0.1 + step / 100)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = losses_and_gradients(models[1], masks, 0.1 + step / 100)
        assert got.keys() == expected.keys() and "dino_head.last_layer.weight_v" in got
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=2e-5 * max(1.0, float(value.abs().max())))
        graphs = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert step == 0 or graphs == num_graphs
        num_graphs = graphs
    assert len(num_masked) > 1


def small_students() -> MultiStudent:
    teacher = FrozenTeacher(dict(small_model().teacher.items()))
    backbones = {name: small_model().student["backbone"] for name in ("one", "two")}
    return MultiStudent(
        {name: DistillModel(part, teacher) for name, part in backbones.items() if isinstance(part, VisionTransformer)}
    )


def test_a_frozen_teacher_and_several_students_are_compiled_too() -> None:
    model = small_students()
    compile_networks(model)
    for part in (model.frozen.networks["backbone"], model.student["one_backbone"], model.student["two_backbone"]):
        assert isinstance(part, VisionTransformer)
        assert all(block._compiled_call_impl is not None for block in part.blocks)


@pytest.mark.slow
def test_compiled_students_have_the_losses_of_others() -> None:
    model = small_students().train()
    crops, masks = (torch.randn(10, 3, 8, 8), torch.randn(15, 3, 4, 4)), torch.zeros(10, 4, dtype=torch.bool)

    def losses() -> dict[str, Tensor]:
        named: dict[str, Tensor] = model(model.teacher_targets(*crops, masks, teacher_temp=0.1))
        return named

    for block in (part for part in model.modules() if isinstance(part, Block)):
        block.drop_path = 0.0
    expected = losses()
    compile_networks(model)
    for name, value in losses().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_compile_is_not_among_the_parameters_of_a_run() -> None:
    assert "compile" in COST_KEYS and not TrainConfig().compile


def test_a_missing_compiler_is_said_in_one_line(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    with pytest.raises(
        ToolkitError, match="compile=true needs .* there is no g\\+\\+; install it, or set compile=false"
    ):
        check_compiler({"PATH": str(tmp_path)})
    with pytest.raises(ToolkitError, match="there is no c\\+\\+"):
        check_compiler({"PATH": str(tmp_path), "CXX": "c++"})
    compiler.touch(mode=0o755)
    check_compiler({"PATH": str(tmp_path), "CXX": "c++"})
