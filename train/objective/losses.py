"""The losses of DINOv2 as functions of tensors, in float32 whatever the autocast.

Shapes: B images a process, V student views, K prototypes, M masked patches of all global crops, D embed_dim.
Functions that look at all processes' rows do so through `all_reduce_sum` and `all_reduce_max`.
Source: Oquab et al. 2023 (DINOv2), section 4; github.com/facebookresearch/dinov2 (dinov2/loss).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...errors import ToolkitError

P = ParamSpec("P")
R = TypeVar("R")

# Rows of logits that are in float32 at a time where nothing is compiled; chosen. On a CPU few fit in its cache; on a
# GPU launches count. Compiled, no row of logits is ever written in float32.
CHUNK_ROWS = 256  # 128 MB at 131,072 prototypes
GPU_CHUNK_BYTES = 1 << 30
COMPILED_SHAPES = 64  # chosen: kinds of batch that a function or a block is compiled for before it is an error
MIN_KOLEO_DISTANCE = 1e-6  # chosen: well above the rounding of unit vectors in float32 (about 1e-7)
MIN_SINKHORN_WEIGHT = 1e-18  # chosen: keeps K / weight finite in float32 for any K


_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Have this process compute in the block as if there were no others."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def has_others() -> bool:
    """Tell whether there are other processes whose rows count too."""
    return dist.is_available() and dist.is_initialized() and not _is_alone


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over all processes, or `x` itself when there is one."""
    return _all_reduced(x, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor) -> Tensor:
    """Return the elementwise maximum of `x` over all processes, or `x` itself when there is one."""
    return _all_reduced(x, dist.ReduceOp.MAX)


def _all_reduced(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not has_others():
        return x
    x = x.clone()
    dist.all_reduce(x, op=operation)
    return x


@cache
def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of tensors compiled, for each of their shapes: on a GPU its passes over them become few."""
    limit = {"recompile_limit": COMPILED_SHAPES}
    result: Callable[P, R] = torch.compile(function, dynamic=False, fullgraph=True, **limit)  # type: ignore[call-overload]  # its stubs lack the limit
    return result


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of V views of student logits against the same targets, without a float32 copy of the logits.

    Autograd by itself would keep one and make two more matrices of their size going back.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, targets: Tensor, temperature: float, is_compiled: bool
    ) -> Tensor:
        losses = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)  # (V, B)
        log_normalisers = torch.empty_like(losses)
        write = compiled(_write_losses) if is_compiled else _write_losses
        for part in _parts(logits, is_compiled):
            write(losses[part], log_normalisers[part], logits[part], targets[part[1]], temperature)
        ctx.save_for_backward(logits, targets, log_normalisers)
        ctx.temperature, ctx.is_compiled = temperature, is_compiled  # type: ignore[attr-defined]  # what is no tensor
        return losses

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, log_normalisers = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        is_compiled: bool = ctx.is_compiled  # type: ignore[attr-defined]
        grad = torch.empty_like(logits)
        write = compiled(_write_gradient) if is_compiled else _write_gradient
        for part in _parts(logits, is_compiled):
            factors = grad_losses[part] / temperature
            write(grad[part], logits[part], targets[part[1]], log_normalisers[part], factors, temperature)
        return grad, None, None, None


def _parts(logits: Tensor, is_compiled: bool) -> list[tuple[int | slice, slice]]:
    """Return which views and rows of logits (V, B, K) are computed at a time."""
    if is_compiled:
        return [(slice(None), slice(None))]
    num_rows = CHUNK_ROWS
    if logits.device.type != "cpu":
        num_rows = max(CHUNK_ROWS, GPU_CHUNK_BYTES // (4 * logits.shape[2]))
    slices = [slice(start, start + num_rows) for start in range(0, logits.shape[1], num_rows)]
    return [(view, rows) for view in range(len(logits)) for rows in slices]


def _write_losses(losses: Tensor, log_normalisers: Tensor, logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Write the losses of some rows, and the logarithms of their softmax's denominators, (..., rows) each."""
    scaled, probs = logits.float() / temperature, targets.float()
    log_normalisers.copy_(scaled.logsumexp(-1))
    losses.copy_(log_normalisers * probs.sum(-1) - (scaled * probs).sum(-1))


def _write_gradient(
    grad: Tensor, logits: Tensor, targets: Tensor, log_normalisers: Tensor, factors: Tensor, temperature: float
) -> None:
    """Write the gradient (..., rows, K) of some rows of logits, times a factor a row."""
    probs = targets.float()
    softmax = (logits.float() / temperature - log_normalisers[..., None]).exp_()
    step = softmax.mul_(probs.sum(-1, keepdim=True)).sub_(probs)
    grad.copy_(step.mul_(factors[..., None]))


def cross_entropy(
    student_logits: Tensor, teacher_probs: Tensor, *, student_temp: float, is_compiled: bool = False
) -> Tensor:
    """Return -sum_k p_k log softmax(z / student_temp)_k for each row: (V, B, K), (B, K) -> (V, B), float32.

    Gradient flows to the logits only. Targets need not sum to 1: a sum of two teachers' rows gives the sum of losses.
    `is_compiled` has torch compile it, for each new shape.
    """
    targets = teacher_probs.detach()
    losses: Tensor = _CrossEntropy.apply(student_logits, targets, student_temp, is_compiled)  # type: ignore[no-untyped-call]
    return losses


def dino_loss(
    student_logits: Tensor, teacher_probs: Tensor, *, student_temp: float = 0.1, is_compiled: bool = False
) -> Tensor:
    """Return the batch-mean cross-entropy of every pair of a student view and a teacher view, summed over the pairs.

    Args:
        student_logits: (V, B, K), row b of each view from image b.
        teacher_probs: (teacher views, B, K), rows that sum to 1.
        student_temp, is_compiled: as in `cross_entropy`.

    Source: DINO objective, section 4 of Oquab et al. 2023. Dividing by the number of pairs is left to the caller.
    """
    # Cross-entropy is linear in the target: one pass over the sum of the teachers serves all pairs of a view.
    targets = teacher_probs.sum(0)
    losses = cross_entropy(student_logits, targets, student_temp=student_temp, is_compiled=is_compiled)
    return losses.mean(1).sum()


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    masks: Tensor,
    *,
    student_temp: float = 0.1,
    weights: Tensor | None = None,
    is_compiled: bool = False,
) -> Tensor:
    """Return the cross-entropy of masked patches, averaged within each crop, then over all crops, the unmasked as 0.

    Args:
        student_logits: (M, K), the masked patches crop by crop, in the order `patch_tokens[masks]` gives.
        teacher_probs: (M, K), of the same patches.
        masks: (crops, N) bool with M True in all.
        student_temp, is_compiled: as in `cross_entropy`.
        weights: (M,), 1 / the masked patches of its crop; 0 for rows beyond those of the masks. None: by the masks.

    Source: iBOT objective, section 4 of Oquab et al. 2023; Zhou et al. 2022.
    """
    one_view = student_logits[None]
    losses = cross_entropy(one_view, teacher_probs, student_temp=student_temp, is_compiled=is_compiled)[0]  # (M,)
    if weights is None:
        num_masked = masks.sum(1)
        weights = torch.repeat_interleave(1 / num_masked.float(), num_masked, output_size=len(losses))
    return (losses * weights).sum() / len(masks)


class _Gathered(torch.autograd.Function):
    """Rows of all processes, (B, D) -> (processes x B, D); going back, each process's rows get the sum of gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = all_reduce_sum(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def koleo_loss(features: Tensor, *, gather: bool = False) -> Tensor:
    """Return minus the mean log distance of each L2-normalised feature (B, D) to its nearest neighbour in the batch.

    Distances below 1e-6 (copies of one image) count as 1e-6 and give no gradient, instead of an endless one.

    Args:
        features: B of them on every process.
        gather: look for the neighbours among all processes' features, so that the mean over the processes is the loss
            of one process with all of them; otherwise, as in the official code, among this process's.

    Raises:
        ToolkitError: if B is below 2, since a single image has no neighbour.

    Source: KoLeo regulariser, section 4 of Oquab et al. 2023; Sablayrolles et al. 2019.
    """
    if len(features) < 2:
        needed = "KoLeo needs at least 2 images in each process's batch"
        raise ToolkitError(f"{needed} and got {len(features)}; raise batch_size or set koleo_weight to 0")
    with torch.autocast(features.device.type, enabled=False):
        normed = F.normalize(features.float(), dim=-1, eps=1e-8)
        everyone, first = normed, 0
        if gather and has_others():
            everyone, first = _Gathered.apply(normed), dist.get_rank() * len(normed)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            similarities = normed @ everyone.T
            similarities[:, first : first + len(normed)].fill_diagonal_(-torch.inf)
            nearest = similarities.argmax(1)
        distances = torch.linalg.vector_norm(normed - everyone.index_select(0, nearest) + 1e-8, dim=1)
        loss: Tensor = -(distances.clamp(min=MIN_KOLEO_DISTANCE) + 1e-8).log().mean()
        return loss


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temperature: float,
    is_row: Tensor | None = None,
    *,
    num_iterations: int = 3,
    overwrite_logits: bool = False,
    is_compiled: bool = False,
) -> Tensor:
    """Return teacher probabilities whose prototypes are used about equally over all processes' rows.

    Alternates between giving every prototype the same mass over all rows of all processes and every row the mass 1.
    Every process must call it, also one with no rows; their numbers of rows may differ.

    Args:
        logits: (rows, K), any floating dtype.
        temperature: of the teacher; 0.04 to 0.07 in the paper.
        is_row: (rows,) 1 for a row and 0 for padding; None: there is none.
        overwrite_logits: the result may take the logits' memory, which saves a matrix of their size.
        is_compiled: have torch compile what runs over the whole matrix beside products, for each new shape.

    Returns:
        (rows, K) float32; each row sums to 1, padding to 0.

    Source: section 4 of Oquab et al. 2023; Caron et al. 2020 (SwAV). The matrix is kept as
    diag(row_weights) exp(z - row maximum) diag(prototype_weights), so an iteration reads it twice and writes nothing,
    and no exponential overflows. Mass constants (1 / K, 1 / rows) cancel in the last step, so they are left out.
    """
    # Autocast would turn the matrix products to half precision.
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(torch.float32, copy=not overwrite_logits)
        divisor = scores.new_full((), temperature)  # as a number it would be compiled in, and it changes
        row_max = (compiled(_exponentials_) if is_compiled else _exponentials_)(scores, divisor)  # (rows,)
        # The lone -inf stands for a process without rows, which must take part in the collectives all the same.
        global_max = all_reduce_max(torch.cat([row_max, row_max.new_full((1,), -torch.inf)]).amax())
        counts = torch.ones_like(row_max) if is_row is None else is_row
        row_weights = (row_max - global_max).exp_().clamp_(min=MIN_SINKHORN_WEIGHT).mul_(counts)
        smallest = torch.finfo(torch.float32).tiny
        for _ in range(num_iterations):
            prototype_weights = 1 / all_reduce_sum(row_weights @ scores).clamp_(min=smallest)  # (K,)
            row_weights = counts / (scores @ prototype_weights).clamp_(min=smallest)  # (rows,)
        (compiled(_weight_) if is_compiled else _weight_)(scores, prototype_weights, row_weights)
        return scores


def _exponentials_(logits: Tensor, temperature: Tensor) -> Tensor:
    """Replace z (rows, K) by exp(z / temperature - row maximum) and return the maxima (rows,)."""
    row_max = logits.div_(temperature).amax(1)
    logits.sub_(row_max[:, None]).exp_()
    return row_max


def _weight_(scores: Tensor, prototype_weights: Tensor, row_weights: Tensor) -> None:
    scores.mul_(prototype_weights).mul_(row_weights[:, None])


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return softmax((z - center) / temperature), as in DINO: (rows, K), (1, K) -> (rows, K), float32."""
    return ((logits.float() - center) / temperature).softmax(-1)


@torch.no_grad()
def updated_center(center: Tensor, logits: Tensor, is_row: Tensor | None = None, *, momentum: float = 0.9) -> Tensor:
    """Return the center (1, K) moved towards the mean of all processes' logits (rows, K); unmoved if there are none.

    The mean is over rows, those alone where `is_row` (rows,) is 1; the official code averages the processes' means,
    which weighs a process with few masked patches more.
    """
    rows = logits.float() if is_row is None else logits.float() * is_row[:, None]
    total = all_reduce_sum(rows.sum(0, keepdim=True))
    num_rows = all_reduce_sum(rows.new_full((), len(rows)) if is_row is None else is_row.sum())
    moved = center * momentum + total / num_rows.clamp(min=1) * (1 - momentum)
    return torch.where(num_rows > 0, moved, center)
