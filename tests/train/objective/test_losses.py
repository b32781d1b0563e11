import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.train.objective.losses import (
    CHUNK_ROWS,
    all_reduce_max,
    all_reduce_sum,
    cross_entropy,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    softmax_center,
    updated_center,
)


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


def textbook_sinkhorn_knopp(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Normalise a (K, rows) matrix in float64 as the paper says, constants and all."""
    matrix = (logits.double() / temperature).T.exp()
    num_prototypes, num_rows = matrix.shape
    matrix /= matrix.sum()
    for _ in range(num_iterations):
        matrix /= matrix.sum(1, keepdim=True) * num_prototypes
        matrix /= matrix.sum(0, keepdim=True) * num_rows
    return (matrix * num_rows).T


# Cross-entropy

COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("is_compiled", COMPILED)
def test_cross_entropy_and_its_gradient_are_those_of_log_softmax(is_compiled: bool) -> None:
    torch.manual_seed(0)
    num_rows = CHUNK_ROWS + 3  # more than one chunk
    logits = torch.randn(2, num_rows, 7, requires_grad=True)
    targets, weights = probabilities(num_rows, 7), torch.rand(2, num_rows)
    losses = cross_entropy(logits, targets, student_temp=0.3, is_compiled=is_compiled)
    torch.autograd.backward((losses * weights).sum())
    plain = logits.detach().clone().requires_grad_()
    expected = -(targets * (plain / 0.3).log_softmax(-1)).sum(-1)
    torch.autograd.backward((expected * weights).sum())
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, plain.grad)


@pytest.mark.parametrize("is_compiled", COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype, is_compiled: bool) -> None:
    logits = torch.randn(1, 4, 50).to(dtype).requires_grad_()
    losses = cross_entropy(logits, probabilities(4, 50), student_temp=0.1, is_compiled=is_compiled)
    expected = -(probabilities(4, 50) * (logits.detach().float() / 0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)
    torch.autograd.backward(losses.sum())
    plain = logits.detach().float().requires_grad_()
    torch.autograd.backward(cross_entropy(plain, probabilities(4, 50), student_temp=0.1).sum())
    assert logits.grad is not None and plain.grad is not None and logits.grad.dtype == dtype
    assert torch.equal(logits.grad, plain.grad.to(dtype)) or is_compiled
    torch.testing.assert_close(logits.grad, plain.grad.to(dtype), rtol=0.01, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_computes_the_losses_and_targets_of_a_cpu_without_a_second_matrix_of_logits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 700, 8192).bfloat16(), torch.randn(700, 8192).clamp(-1, 1)
    targets = sinkhorn_knopp(teacher, 0.07)
    plain = logits.clone().requires_grad_()
    torch.autograd.backward(cross_entropy(plain, targets, student_temp=0.1).mean())
    placed, scores = logits.cuda().requires_grad_(), teacher.cuda()
    before = torch.cuda.memory_allocated()
    found = sinkhorn_knopp(scores, 0.07, overwrite_logits=True, is_compiled=True)
    torch.testing.assert_close(found.cpu(), targets, rtol=1e-4, atol=1e-8)
    torch.autograd.backward(cross_entropy(placed, found, student_temp=0.1, is_compiled=True).mean())
    assert torch.cuda.max_memory_allocated() - before < 1.1 * logits.nbytes  # the gradient
    assert placed.grad is not None and plain.grad is not None
    torch.testing.assert_close(placed.grad.cpu(), plain.grad, rtol=0.01, atol=1e-8)


# DINO and iBOT


def test_dino_loss_is_the_sum_over_all_pairs() -> None:
    student, teacher = torch.randn(3, 5, 9), probabilities(2, 5, 9)
    expected = torch.tensor(0.0)
    for student_view in student:
        for teacher_view in teacher:
            pair = [-(p * (z / 0.1).log_softmax(-1)).sum() for z, p in zip(student_view, teacher_view, strict=True)]
            expected += torch.stack(pair).mean()
    torch.testing.assert_close(dino_loss(student, teacher), expected)


def test_dino_loss_of_uniform_outputs_is_the_log_of_the_number_of_prototypes() -> None:
    loss = dino_loss(torch.zeros(8, 4, 64), torch.full((2, 4, 64), 1 / 64))
    assert loss.item() == pytest.approx(16 * math.log(64), rel=1e-6)


def test_dino_loss_without_views_is_0_and_goes_backward() -> None:
    student = torch.zeros(0, 4, 8, requires_grad=True)
    loss = dino_loss(student, probabilities(2, 4, 8))
    torch.autograd.backward(loss)
    assert loss.item() == 0


def test_ibot_loss_is_the_mean_over_crops_of_each_crops_mean() -> None:
    masks = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    student, teacher = torch.randn(4, 6), probabilities(4, 6)
    losses = -(teacher * (student / 0.1).log_softmax(-1)).sum(-1)
    expected = (losses[:3].mean() + 0 + losses[3]) / 3
    torch.testing.assert_close(ibot_loss(student, teacher, masks), expected)


def test_ibot_loss_without_masks_is_0_and_goes_backward() -> None:
    student = torch.zeros(0, 8, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 8), torch.zeros(4, 9, dtype=torch.bool))
    torch.autograd.backward(loss)
    assert loss.item() == 0


# KoLeo


def test_koleo_of_antipodal_points_is_minus_log_2() -> None:
    points = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])  # only directions count
    assert koleo_loss(points).item() == pytest.approx(-math.log(2), rel=1e-6)


def test_koleo_of_a_square_is_minus_log_of_the_root_of_2() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert koleo_loss(points).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_koleo_of_copies_is_finite_and_gives_them_no_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 16).to(dtype)
    features[1] = features[0]
    features.requires_grad_()
    loss = koleo_loss(features)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert features.grad is not None and features.grad.isfinite().all()
    assert not features.grad[:2].float().abs().max() > 10  # an endless pull apart would be 1e6
    assert features.grad[2:].any()


def test_koleo_ignores_autocast() -> None:
    features = torch.randn(8, 16)
    expected = koleo_loss(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo_loss(features), expected)


def test_koleo_of_one_image_is_refused() -> None:
    with pytest.raises(ToolkitError, match="at least 2 images in each process's batch and got 1"):
        koleo_loss(torch.randn(1, 8))


# Teacher probabilities


@pytest.mark.parametrize("is_compiled", COMPILED)
def test_sinkhorn_knopp_equals_the_textbook(is_compiled: bool) -> None:
    logits = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    expected = textbook_sinkhorn_knopp(logits, 0.05).float()
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05, is_compiled=is_compiled), expected, rtol=1e-4, atol=1e-7)


def test_sinkhorn_knopp_takes_the_memory_of_logits_that_nobody_needs() -> None:
    logits = torch.randn(12, 30)
    expected = sinkhorn_knopp(logits, 0.1)
    found = sinkhorn_knopp(logits, 0.1, overwrite_logits=True)
    assert torch.equal(found, expected) and found.data_ptr() == logits.data_ptr()


def test_sinkhorn_knopp_gives_rows_of_sum_1_and_prototypes_of_equal_mass() -> None:
    probs = sinkhorn_knopp(torch.randn(40, 10), 0.5, num_iterations=50)
    torch.testing.assert_close(probs.sum(1), torch.ones(40))
    torch.testing.assert_close(probs.sum(0), torch.full((10,), 4.0), rtol=1e-4, atol=0)


def test_sinkhorn_knopp_leaves_its_input_alone_and_is_in_float32() -> None:
    logits = torch.randn(4, 6)
    before = logits.clone()
    assert sinkhorn_knopp(logits, 0.1).dtype == sinkhorn_knopp(logits.bfloat16(), 0.1).dtype == torch.float32
    assert torch.equal(logits, before)


def test_sinkhorn_knopp_ignores_autocast() -> None:
    logits = torch.randn(16, 32)
    expected = sinkhorn_knopp(logits, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_knopp(logits, 0.1), expected)


@pytest.mark.parametrize("scale", [10.0, 1000.0])
def test_sinkhorn_knopp_of_huge_logits_neither_overflows_nor_vanishes(scale: float) -> None:
    torch.manual_seed(0)
    probs = sinkhorn_knopp(scale * torch.randn(8, 20), 0.04)
    torch.testing.assert_close(probs.sum(1), torch.ones(8))
    assert (probs >= 0).all()


def test_sinkhorn_knopp_of_no_rows_is_empty() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).shape == (0, 5)


def test_the_center_moves_towards_the_mean_and_shifts_the_softmax() -> None:
    logits, center = torch.tensor([[1.0, 3.0], [3.0, 5.0]]), torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(updated_center(center, logits), torch.tensor([[1.1, 1.3]]))
    torch.testing.assert_close(updated_center(center, torch.zeros(0, 2)), center)
    expected = torch.tensor([[0.0, 2 / 0.5], [2 / 0.5, 4 / 0.5]]).softmax(-1)
    torch.testing.assert_close(softmax_center(logits, center, 0.5), expected)


# Several processes


def test_one_process_reduces_to_itself() -> None:
    x = torch.randn(3)
    assert all_reduce_sum(x) is x and all_reduce_max(x) is x


NUM_ROWS_OF_THE_FIRST = {"unequal": 5, "none": 7}  # of 7; the second process holds the others


def all_logits() -> Tensor:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
    logits[2] += 40  # an outlier on the first process, whose maximum the other must use too
    return logits


def all_features() -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def results_of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", NUM_ROWS_OF_THE_FIRST)
def test_two_processes_with_unequal_rows_agree_with_one(
    case: str, results_of_two_processes: list[dict[str, Tensor]]
) -> None:
    probs = torch.cat([result[f"{case}.sinkhorn"] for result in results_of_two_processes])
    torch.testing.assert_close(probs, sinkhorn_knopp(all_logits(), 0.1), rtol=1e-5, atol=1e-8)
    for result in results_of_two_processes:
        torch.testing.assert_close(result[f"{case}.center"], updated_center(torch.zeros(1, 11), all_logits()))


def test_gathered_koleo_of_two_processes_has_the_loss_and_gradient_of_one(
    results_of_two_processes: list[dict[str, Tensor]],
) -> None:
    features = all_features().requires_grad_()
    loss = koleo_loss(features)
    (grad,) = torch.autograd.grad(loss, features)
    first, second = results_of_two_processes
    torch.testing.assert_close((first["gathered"] + second["gathered"]) / 2, loss.detach())
    # The mean over the processes, as DDP takes it.
    torch.testing.assert_close(torch.cat([first["gathered.grad"], second["gathered.grad"]]) / 2, grad)
    torch.testing.assert_close(first["alone"], koleo_loss(all_features()[:4]))
    assert not torch.isclose((first["alone"] + second["alone"]) / 2, loss)


def test_two_processes_reduce_copies(results_of_two_processes: list[dict[str, Tensor]]) -> None:
    for rank, result in enumerate(results_of_two_processes):
        assert [result[name].item() for name in ("sum", "max", "own")] == [3, 2, rank + 1]


def main(folder: Path, rank: int) -> None:
    """Be one of the two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    own = torch.tensor(rank + 1.0)
    results = {"sum": all_reduce_sum(own), "max": all_reduce_max(own), "own": own}
    for case, cut in NUM_ROWS_OF_THE_FIRST.items():
        logits = all_logits()[:cut] if rank == 0 else all_logits()[cut:]
        results[f"{case}.sinkhorn"] = sinkhorn_knopp(logits, 0.1)
        results[f"{case}.center"] = updated_center(torch.zeros(1, 11), logits)
    features = all_features()[4 * rank : 4 * rank + 4].requires_grad_()
    gathered = koleo_loss(features, gather=True)
    (results["gathered.grad"],) = torch.autograd.grad(gathered, features)
    results |= {"gathered": gathered.detach(), "alone": koleo_loss(features).detach()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
