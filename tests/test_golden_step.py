"""A whole training step gives the numbers of the official modules (relative difference under 1e-4)."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.train.engine.optimizer import apply_schedules, build_optimizer, clip_gradients
from dinov2_toolkit.train.objective.networks import update_teacher
from dinov2_toolkit.train.objective.ssl_model import LossSettings, SSLModel

GOLDEN = Path(os.environ.get("DINOV2_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((GOLDEN / "meta.json").read_text())

# The optimizer's settings are written out as a sentence.
OPTIMIZER = re.search(
    r"betas \((?P<beta1>\S+), (?P<beta2>\S+)\).* lr (?P<lr>\S+) \(last layer (?P<last_layer_lr>\S+)\)"
    r".* weight decay (?P<weight_decay>\S+) .*clipped at (?P<max_norm>\S+)",
    META["step"]["optimizer"],
)
assert OPTIMIZER, META["step"]["optimizer"]
BETA1, BETA2, LR, LAST_LAYER_LR, WEIGHT_DECAY, MAX_NORM = map(float, OPTIMIZER.groups())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.numel() == expected.numel()
    assert (actual.reshape(expected.shape) - expected).norm() <= 1e-4 * expected.norm()


def golden_head(golden: dict[str, Tensor], prefix: str) -> ProjectionHead:
    hidden_dim, in_dim = golden[f"{prefix}.mlp.0.weight"].shape
    num_prototypes, bottleneck_dim = golden[f"{prefix}.last_layer.weight_v"].shape
    return ProjectionHead(in_dim, num_prototypes, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)


def golden_model(golden: dict[str, Tensor]) -> SSLModel:
    dims, settings = META["dims"], META[META["step"]["backbone"]]
    backbone = VisionTransformer(
        patch_size=dims["patch"],
        embed_dim=dims["dim"],
        depth=dims["depth"],
        num_heads=dims["heads"],
        ffn="swiglu" if settings["ffn_layer"].startswith("swiglu") else "mlp",
        num_register_tokens=settings["num_register_tokens"],
        img_size=dims["img"],
        drop_path=META["step"]["drop_path"],
        pos_embed_antialias=settings["interpolate_antialias"],
        pos_embed_offset=settings["interpolate_offset"],
    )
    model = SSLModel(
        backbone,
        golden_head(golden, "student.dino_head"),
        golden_head(golden, "student.ibot_head") if "student.ibot_head.mlp.0.weight" in golden else None,
        centering=META["step"]["teacher_probabilities"],
        losses=LossSettings(
            student_temp=META["step"]["student_temp"],
            dino_weight=META["step"]["dino_weight"],
            ibot_weight=META["step"]["ibot_weight"],
            koleo_weight=META["step"]["koleo_weight"],
        ),
    )
    for name in ("student", "teacher"):
        weights = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
        getattr(model, name).load_state_dict(weights)
    return model.train()


@dataclass(frozen=True)
class Step:
    """The golden numbers, and ours at every stage of one training step."""

    golden: dict[str, Tensor]
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norms: dict[str, Tensor]
    clipped_gradients: dict[str, Tensor]
    after: dict[str, Tensor]


@pytest.fixture(scope="module", params=["step_shared_head", "step_separate_head"])
def step(request: pytest.FixtureRequest) -> Step:
    settings = META["step"]
    golden = load_file(GOLDEN / f"{request.param}.safetensors")
    model = golden_model(golden)
    optimizer = build_optimizer(
        model.student,
        layerwise_decay=settings["layerwise_decay"],
        patch_embed_lr_mult=settings["patch_embed_lr_mult"],
        betas=(BETA1, BETA2),
    )
    crops = golden["in.global_crops"], golden["in.local_crops"], golden["in.masks"]
    losses = model(model.teacher_targets(*crops, teacher_temp=settings["teacher_temp"]))
    losses["total"].backward()
    gradients = cloned_gradients(model)
    norms = clip_gradients(model.student, MAX_NORM)
    clipped_gradients = cloned_gradients(model)
    apply_schedules(optimizer, lr=LR, last_layer_lr=LAST_LAYER_LR, weight_decay=WEIGHT_DECAY)
    optimizer.step()
    update_teacher(model.teacher, model.student, settings["ema_momentum"])
    after = {name: weight.detach() for name, weight in model.named_parameters()}
    return Step(golden, losses, gradients, norms, clipped_gradients, after)


def cloned_gradients(model: SSLModel) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.student.named_parameters() if weight.grad is not None}


def test_losses_of_the_step(step: Step) -> None:
    for name in ("dino_local", "dino_global", "ibot", "total"):
        assert_close(step.losses[name], step.golden[f"out.{name}"])
    assert_close(META["step"]["koleo_weight"] * step.losses["koleo"], step.golden["out.koleo_weighted"])


def test_norm_of_every_gradient_before_clipping(step: Step) -> None:
    expected = {key.removeprefix("grad_norm."): norm for key, norm in step.golden.items() if "grad_norm." in key}
    assert step.gradients.keys() == expected.keys()
    for name, gradient in step.gradients.items():
        assert_close(gradient.norm(), expected[name])


def test_norm_of_each_part_before_clipping(step: Step) -> None:
    prefix = "out.clip_total_norm_"
    expected = {key.removeprefix(prefix): norm for key, norm in step.golden.items() if key.startswith(prefix)}
    assert step.norms.keys() == expected.keys()
    for name, norm in step.norms.items():
        assert_close(norm, expected[name])


def test_whole_gradients(step: Step) -> None:
    whole = [key for key in step.golden if key.startswith("grad.")]
    assert whole
    for key in whole:  # kept as clipping left them
        assert_close(step.clipped_gradients[key.removeprefix("grad.")], step.golden[key])


def test_weights_after_the_optimizer_step_and_the_ema(step: Step) -> None:
    after = [key for key in step.golden if key.startswith("after.")]
    assert after
    for key in after:
        name = key.removeprefix("after.")
        assert_close(step.after[name], step.golden[key])
        # The change itself too: the weights alone would agree to 1e-4 with hardly any step. Looser, since the change
        # is some 1e-3 of a weight in float32 and Adam's first step is a gradient's sign, however small it is.
        change, expected = step.after[name] - step.golden[name], step.golden[key] - step.golden[name]
        assert (change - expected).norm() <= 1e-3 * expected.norm()
