"""Health of a run: figures of the teacher's outputs and the student's features, and the reason of a collapse.

Shapes: K prototypes, B class tokens of one step, D embed_dim.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..objective.micro_batch import MicroBatch

UNIFORM_SHARE = 0.99  # of the largest entropy ln K; chosen: healthy runs sharpen well below it within their first steps
MIN_PERPLEXITY = 2.0  # prototypes in use; chosen: below it nearly all images share one
MIN_FEATURE_STD = 0.05  # of a possible 1; chosen: below it all class tokens point nearly the same way
RANK_STEPS = 100  # between two RankMe; chosen: its eigenvalues take as long as some layers
PATIENCE_STEPS = 100  # chosen: a collapse is warned of when it lasts, since every run starts with all features alike


def teacher_figures(step: MicroBatch) -> dict[str, Tensor]:
    """Return the mean of a step's teacher probabilities over class tokens, (K,), and their mean entropy, ().

    Empty where the teacher's targets are features instead of probabilities.
    """
    if not step.are_probs:
        return {}
    probs = step.cls_targets.flatten(0, 1)  # (2, B, K) -> (2 B, K)
    return {"teacher_cls_probs": probs.mean(0), "teacher_entropy": torch.special.entr(probs).sum(1).mean()}


def health_figures(outputs: Mapping[str, Tensor], *, with_rank: bool = True) -> dict[str, float]:
    """Return the figures of one step from `[NAME_]student_cls_tokens` (B, D) and the output of `teacher_figures`.

    Returns:
        `teacher_entropy` in nats; `teacher_kl_to_uniform` = ln K - entropy, 0 when all prototypes are equally likely;
        `prototype_perplexity` in [1, K], the number of prototypes that the batch uses; `rank_me` in [1, min(B, D)], the
        effective rank of the class tokens, where it is asked for; `feature_std` in [0, 1], 0 when they are all alike.
        The first three only where the teacher has prototypes.

    Source: RankMe, Garrido et al. 2023, eq. 1.
    """
    figures = {}
    if "teacher_cls_probs" in outputs:
        probs = outputs["teacher_cls_probs"].float()
        entropy = float(outputs["teacher_entropy"])
        figures = {
            "teacher_entropy": entropy,
            "teacher_kl_to_uniform": math.log(len(probs)) - entropy,
            "prototype_perplexity": float(torch.special.entr(probs).sum().exp()),
        }
    for name, tokens in outputs.items():
        student, is_tokens, _ = name.partition("student_cls_tokens")
        if is_tokens:
            figures |= {f"{student}rank_me": rank_me(tokens)} if with_rank else {}
            figures |= {f"{student}feature_std": feature_std(tokens)}
    return figures


def rank_me(tokens: Tensor) -> float:
    """Return the effective rank of tokens (B, D): exp of the entropy of their normalised singular values.

    They are the roots of the eigenvalues of the Gram matrix, much cheaper than a decomposition of the tokens. In
    float64, where eigenvalues that are 0 come out below 1e-15 of the largest: as roots they add nothing either.
    """
    if not tokens.isfinite().all():
        return math.nan
    rows = tokens.double() if len(tokens) <= tokens.shape[1] else tokens.double().T
    with torch.autocast(tokens.device.type, enabled=False):
        singular_values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).sqrt()
    shares = singular_values / singular_values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


def feature_std(tokens: Tensor) -> float:
    """Return the spread of L2-normalised tokens (B, D): the root of their total variance, 0 (all equal) to 1."""
    normed = torch.nn.functional.normalize(tokens.float(), dim=1)
    return float(normed.var(dim=0, correction=0).sum().sqrt())


def collapse_reason(figures: Mapping[str, float]) -> str | None:
    """Say how the figures, those of the teacher if there are any, show a collapse and what to change; None else."""
    if "teacher_entropy" in figures:
        entropy, to_uniform = figures["teacher_entropy"], figures["teacher_kl_to_uniform"]
        if to_uniform < (1 - UNIFORM_SHARE) * (entropy + to_uniform):
            found = f"the teacher's outputs are uniform (entropy {entropy:.2f} of {entropy + to_uniform:.2f} nats)"
            return f"{found}: lower teacher_temp, set centering to sinkhorn_knopp, or raise base_lr if it is very low"
        if (perplexity := figures["prototype_perplexity"]) < MIN_PERPLEXITY:
            found = f"the teacher gives all images the same prototype ({perplexity:.1f} in use)"
            return f"{found}: set centering to sinkhorn_knopp, lower base_lr, or raise momentum"
    feature_std = min(value for name, value in figures.items() if name.endswith("feature_std"))
    if feature_std < MIN_FEATURE_STD:
        found = f"the class tokens of all images are alike (spread {feature_std:.3f} of 1)"
        return f"{found}: raise koleo_weight, lower base_lr, or raise batch_size"
    return None
