import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models import cpu
from dinov2_toolkit.models.block import ActivationCheckpointing
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.train.engine.accumulate import microbatch_backward, sum_outputs
from dinov2_toolkit.train.monitor.health import teacher_figures
from dinov2_toolkit.train.objective.distill_model import DistillModel
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.losses import koleo_loss, sinkhorn_knopp
from dinov2_toolkit.train.objective.micro_batch import split_by_view, split_microbatches
from dinov2_toolkit.train.objective.networks import update_teacher
from dinov2_toolkit.train.objective.ssl_model import Centering, LossSettings, SSLModel

NUM_IMAGES, NUM_LOCALS, NUM_PROTOTYPES = 4, 8, 10


def tiny_model(
    *,
    separate: bool = False,
    centering: Centering = "sinkhorn_knopp",
    koleo_weight: float = 0.1,
    drop_path: float = 0.0,
) -> SSLModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=2,
        num_register_tokens=1,
        img_size=16,
        layer_scale=1.0,
        drop_path=drop_path,
    )
    model = SSLModel(
        backbone,
        ProjectionHead(12, NUM_PROTOTYPES, hidden_dim=16, bottleneck_dim=8),
        ProjectionHead(12, NUM_PROTOTYPES + 3, hidden_dim=16, bottleneck_dim=6) if separate else None,
        centering=centering,
        losses=LossSettings(koleo_weight=koleo_weight),
    )
    for parameter in model.teacher.parameters():  # a teacher unlike the student
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def crops_and_masks(num_locals: int = NUM_LOCALS) -> tuple[Tensor, Tensor | None, Tensor]:
    torch.manual_seed(1)
    masks = torch.zeros(2 * NUM_IMAGES, 16, dtype=torch.bool)
    for crop, num_masked in {0: 5, 3: 2, 6: 7, 7: 1}.items():
        masks[crop, torch.randperm(16)[:num_masked]] = True
    global_crops = torch.randn(2 * NUM_IMAGES, 3, 16, 16)
    return global_crops, torch.randn(num_locals * NUM_IMAGES, 3, 8, 8) if num_locals else None, masks


def plain_dict(parts: nn.ModuleDict) -> dict[str, Any]:
    """Return the parts without a type: a ModuleDict knows only that they are modules."""
    return dict(parts.items())


def cross_entropy(probs: Tensor, logits: Tensor) -> Tensor:
    return -(probs * (logits / 0.1).log_softmax(-1)).sum()


@pytest.mark.parametrize("separate", [False, True])
def test_the_losses_are_those_of_a_slow_loop_over_crops_and_pairs(separate: bool) -> None:
    model = tiny_model(separate=separate)
    global_crops, local_crops, masks = crops_and_masks()
    assert local_crops is not None
    step = model.teacher_targets(global_crops, local_crops, masks, teacher_temp=0.06)
    losses = model(step) | teacher_figures(step)

    patch_head = "ibot_head" if separate else "dino_head"
    teacher, student = plain_dict(model.teacher), plain_dict(model.student)
    with torch.no_grad():
        # One crop a pass; all class tokens, and all masked patches, are centered together.
        theirs = [teacher["backbone"].forward_features(crop[None]) for crop in global_crops]
        cls_probs = sinkhorn_knopp(torch.cat([teacher["dino_head"](features.cls_token) for features in theirs]), 0.06)
        patch_probs = sinkhorn_knopp(
            torch.cat([teacher[patch_head](f.patch_tokens[0, mask]) for f, mask in zip(theirs, masks, strict=True)]),
            0.06,
        )
        seen = [
            student["backbone"].forward_features(crop[None], mask[None])
            for crop, mask in zip(global_crops, masks, strict=True)
        ]
        seen_locals = [student["backbone"].forward_features(crop[None]) for crop in local_crops]

        pairs: dict[str, list[Tensor]] = {"dino_local": [], "dino_global": []}
        for teacher_view in range(2):
            for student_view in range(2 + NUM_LOCALS):
                if student_view == teacher_view:
                    continue
                terms = []
                for image in range(NUM_IMAGES):
                    probs = cls_probs[teacher_view * NUM_IMAGES + image]
                    features = (seen + seen_locals)[student_view * NUM_IMAGES + image]
                    terms.append(cross_entropy(probs, student["dino_head"](features.cls_token)[0]))
                pairs["dino_global" if student_view < 2 else "dino_local"].append(torch.stack(terms).mean())
        assert len(pairs["dino_local"]) + len(pairs["dino_global"]) == 18
        expected = {name: torch.stack(terms).sum() / 18 for name, terms in pairs.items()}

        crop_means, row = [], 0
        for crop, mask in enumerate(masks):
            terms = []
            for patch in mask.nonzero()[:, 0]:
                logits = student[patch_head](seen[crop].patch_tokens[0, patch][None])[0]
                terms.append(cross_entropy(patch_probs[row], logits))
                row += 1
            crop_means.append(torch.stack(terms).mean() if terms else torch.tensor(0.0))
        expected["ibot"] = torch.stack(crop_means).mean()

        views = [torch.cat([f.cls_token for f in part]) for part in (seen[:NUM_IMAGES], seen[NUM_IMAGES:])]
        expected["koleo"] = koleo_loss(views[0]) + koleo_loss(views[1])
        dino = expected["dino_local"] + expected["dino_global"]
        expected["total"] = dino + expected["ibot"] + 0.1 * expected["koleo"]

    for name, value in expected.items():
        torch.testing.assert_close(losses[name].detach(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["student_cls_tokens"], torch.cat(views), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["teacher_cls_probs"], cls_probs.mean(0))
    entropies = [-sum(p * math.log(p) for p in row.tolist() if p > 0) for row in cls_probs]
    assert losses["teacher_entropy"].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_the_losses_of_a_uniform_model_start_where_the_paper_says() -> None:
    model = tiny_model()
    for half in (model.student, model.teacher):
        half.get_parameter("dino_head.last_layer.weight_g").data.zero_()
    losses = model(model.teacher_targets(*crops_and_masks(), teacher_temp=0.04))
    log_k = math.log(NUM_PROTOTYPES)
    assert losses["dino_local"].item() == pytest.approx(log_k * 16 / 18, rel=1e-5)
    assert losses["dino_global"].item() == pytest.approx(log_k * 2 / 18, rel=1e-5)
    assert losses["ibot"].item() == pytest.approx(log_k / 2, rel=1e-5)  # half of the crops have masks


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("num_locals", [0, 1, 3])
def test_every_student_weight_gets_a_gradient_and_no_teacher_weight(num_locals: int, separate: bool) -> None:
    model = tiny_model(separate=separate, drop_path=0.3)
    losses = model(model.teacher_targets(*crops_and_masks(num_locals), teacher_temp=0.05))
    losses["total"].backward()
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert (losses["dino_local"] == 0) == (num_locals == 0)
    assert not losses["student_cls_tokens"].requires_grad


def test_without_any_mask_every_weight_still_gets_a_gradient() -> None:
    model = tiny_model(separate=True)
    global_crops, local_crops, masks = crops_and_masks()
    losses = model(model.teacher_targets(global_crops, local_crops, torch.zeros_like(masks), teacher_temp=0.05))
    losses["total"].backward()
    assert losses["ibot"].item() == 0
    assert all(parameter.grad is not None for parameter in model.student.parameters())


def test_the_teacher_starts_as_the_student_and_follows_it() -> None:
    model = tiny_model()
    student = plain_dict(model.student)
    fresh = SSLModel(student["backbone"], student["dino_head"])
    students, teachers = fresh.student.state_dict(), fresh.teacher.state_dict()
    assert students.keys() == teachers.keys()
    assert all(torch.equal(students[name], teachers[name]) for name in students)
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    update_teacher(model.teacher, model.student, 0.9)
    for name, tensor in model.teacher.state_dict().items():
        torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * model.student.state_dict()[name])


def test_the_teacher_stays_in_evaluation_mode() -> None:
    model = tiny_model(drop_path=0.5)
    assert model.student.training and not any(module.training for module in model.teacher.modules())


def test_centers_move_only_while_training() -> None:
    model = tiny_model(separate=True, centering="softmax_center")
    model.eval().teacher_targets(*crops_and_masks(), teacher_temp=0.05)
    assert not model.dino_center.any() and not model.ibot_center.any()
    global_crops, local_crops, masks = crops_and_masks()
    figures = teacher_figures(model.train().teacher_targets(global_crops, local_crops, masks, teacher_temp=0.05))
    teacher = plain_dict(model.teacher)
    with torch.no_grad():
        features = teacher["backbone"].forward_features(global_crops)
        dino_logits = teacher["dino_head"](features.cls_token)
        ibot_logits = teacher["ibot_head"](features.patch_tokens[masks])
    torch.testing.assert_close(figures["teacher_cls_probs"], (dino_logits / 0.05).softmax(-1).mean(0))
    torch.testing.assert_close(model.dino_center, 0.1 * dino_logits.mean(0, keepdim=True))
    torch.testing.assert_close(model.ibot_center, 0.1 * ibot_logits.mean(0, keepdim=True))
    assert {"dino_center", "ibot_center"} <= model.state_dict().keys()


def test_koleo_needs_two_images_unless_it_is_off() -> None:
    global_crops, _, masks = crops_and_masks()
    crops = global_crops[[0, NUM_IMAGES]], None, masks[[0, NUM_IMAGES]]
    model, without = tiny_model(), tiny_model(koleo_weight=0.0)
    with pytest.raises(ToolkitError, match="KoLeo needs at least 2 images"):
        model(model.teacher_targets(*crops, teacher_temp=0.05))
    losses = without(without.teacher_targets(*crops, teacher_temp=0.05))
    assert losses["koleo"].item() == 0 and losses["total"].isfinite()


def test_autocast_changes_little_and_losses_stay_in_float32() -> None:
    model = tiny_model()
    exact = model(model.teacher_targets(*crops_and_masks(), teacher_temp=0.07))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(model.teacher_targets(*crops_and_masks(), teacher_temp=0.07))
    for name in ("dino_local", "dino_global", "ibot", "koleo", "total"):
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.05, abs=0.02)
    rough["total"].backward()


def tiny_distill_model() -> DistillModel:
    frozen = tiny_model(separate=True).teacher
    student = VisionTransformer(patch_size=4, embed_dim=6, depth=2, num_heads=1, img_size=16, layer_scale=1.0)
    return DistillModel(student, FrozenTeacher(dict(frozen.items()))).train()


def losses_and_gradients(
    model: SSLModel | DistillModel, num_locals: int, *, by_view: bool, num_images: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    step = model.teacher_targets(*crops_and_masks(num_locals), teacher_temp=0.05)
    outputs = []
    for part in split_microbatches(step, sequential_views=by_view, num_images=num_images):
        outputs.append(model(part))
        outputs[-1]["total"].backward()
    gradients = {name: weight.grad for name, weight in model.student.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return {name: value.detach() for name, value in sum_outputs(outputs).items()}, gradients, len(outputs)


@pytest.mark.parametrize("num_locals", [0, 1, NUM_LOCALS])
@pytest.mark.parametrize("kind", ["shared head", "separate heads", "distilled"])
def test_views_one_after_the_other_add_up_to_the_packed_pass(kind: str, num_locals: int) -> None:
    model = tiny_distill_model() if kind == "distilled" else tiny_model(separate=kind == "separate heads")
    whole, whole_gradients, _ = losses_and_gradients(model, num_locals, by_view=False)
    split, split_gradients, num_parts = losses_and_gradients(model, num_locals, by_view=True)
    assert num_parts == 2 + min(num_locals, 2)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value)
    assert split_gradients.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def in_halves(
    model: SSLModel | DistillModel, num_locals: int, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = microbatch_backward(
        model, model.teacher_targets(*crops_and_masks(num_locals), teacher_temp=0.05), Tensor.backward, seed
    )
    gradients = {name: weight.grad for name, weight in model.student.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return losses, gradients


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_locals", [0, 1, 3, NUM_LOCALS])
@pytest.mark.parametrize("kind", ["shared head", "separate heads", "distilled"])
def test_halves_in_threads_add_up_to_the_packed_pass(kind: str, num_locals: int, num_threads: int) -> None:
    model = tiny_distill_model() if kind == "distilled" else tiny_model(separate=kind == "separate heads")
    whole, whole_gradients, _ = losses_and_gradients(model, num_locals, by_view=False)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    losses, gradients = in_halves(model, num_locals)
    assert torch.get_num_threads() == num_threads
    torch.set_num_threads(before)
    assert losses.keys() == whole.keys() and gradients.keys() == whole_gradients.keys()
    for name, value in whole.items():
        torch.testing.assert_close(losses[name], value)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_is_the_same_without_the_paths_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(separate=True)
    (losses, gradients), counts = in_halves(model, NUM_LOCALS), []
    monkeypatch.setattr(cpu, "ENABLED", False)
    monkeypatch.setattr(cpu, "in_threads", lambda *_: counts.append(1))
    plain, plain_gradients = in_halves(model, NUM_LOCALS)
    assert counts == [] and plain.keys() == losses.keys() and plain_gradients.keys() == gradients.keys()
    for name, value in plain.items():
        torch.testing.assert_close(losses[name], value)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_stochastic_depth_in_halves_depends_on_the_seed_alone() -> None:
    model = tiny_model(drop_path=0.5)
    (first, gradients), (again, same), (other, _) = (in_halves(model, NUM_LOCALS, seed) for seed in (3, 3, 4))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert all(torch.equal(same[name], value) for name, value in gradients.items())
    assert not torch.allclose(first["student_cls_tokens"], other["student_cls_tokens"])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one_by_one, _ = in_halves(model, NUM_LOCALS, seed=3)
    torch.set_num_threads(before)
    for name, value in first.items():
        torch.testing.assert_close(one_by_one[name], value)


def test_halves_have_a_view_each_and_share_the_local_crops() -> None:
    model = tiny_model()
    step = model.teacher_targets(*crops_and_masks(3), teacher_temp=0.05)
    first, second = split_by_view(step, 0)
    assert step.local_crops is not None and first.local_crops is not None and second.local_crops is not None
    assert torch.equal(torch.cat([first.global_crops, second.global_crops]), step.global_crops)
    assert torch.equal(torch.cat([first.local_crops, second.local_crops]), step.local_crops)
    assert torch.equal(torch.cat([first.patch_targets, second.patch_targets]), step.patch_targets)
    assert len(first.local_crops) == 2 * NUM_IMAGES
    assert all(
        half.local_crops is None
        for half in split_by_view(model.teacher_targets(*crops_and_masks(0), teacher_temp=0.05), 0)
    )


@pytest.mark.parametrize("by_view", [False, True])
@pytest.mark.parametrize("num_images", [1, 3, NUM_IMAGES])
def test_without_koleo_micro_batches_of_images_add_up_too(num_images: int, by_view: bool) -> None:
    model = tiny_model(separate=True, koleo_weight=0.0)
    whole, whole_gradients, _ = losses_and_gradients(model, NUM_LOCALS, by_view=False)
    split, gradients, num_parts = losses_and_gradients(model, NUM_LOCALS, by_view=by_view, num_images=num_images)
    assert num_parts == -(-NUM_IMAGES // num_images) * (4 if by_view else 1)
    for name in ("dino_local", "dino_global", "ibot", "total"):
        torch.testing.assert_close(split[name], whole[name])
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_koleo_compares_the_images_of_a_micro_batch() -> None:
    model = tiny_model()
    step = model.teacher_targets(*crops_and_masks(), teacher_temp=0.05)
    halves = [model(part)["koleo"] for part in split_microbatches(step, sequential_views=False, num_images=2)]
    alone = [
        model(part)["koleo"] / part.loss_weight
        for part in split_microbatches(step, sequential_views=False, num_images=2)
    ]
    torch.testing.assert_close(torch.stack(halves).sum(), torch.stack(alone).mean())
    assert not torch.allclose(torch.stack(halves).sum(), model(step)["koleo"])


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_activation_checkpointing_changes_no_gradient(checkpointing: ActivationCheckpointing, drop_path: float) -> None:
    model = tiny_model(separate=True, drop_path=drop_path)
    gradients = []
    for chosen in ("none", checkpointing):
        for block in plain_dict(model.student)["backbone"].blocks:
            block.activation_checkpointing = chosen
        torch.manual_seed(7)
        gradients.append(losses_and_gradients(model, NUM_LOCALS, by_view=True)[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
