import math

import pytest
import torch

from dinov2_toolkit.train.monitor.health import collapse_reason, feature_std, health_figures, rank_me


def outputs(probs: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model would return for teacher probabilities (rows, K) and class tokens."""
    return {
        "teacher_cls_probs": probs.mean(0),
        "teacher_entropy": torch.special.entr(probs).sum(1).mean(),
        "student_cls_tokens": tokens,
    }


def test_rank_me_counts_equal_directions_and_ignores_scale() -> None:
    assert rank_me(torch.eye(6)) == pytest.approx(6, rel=1e-5)
    assert rank_me(100 * torch.eye(6)[:4]) == pytest.approx(4, rel=1e-5)
    assert rank_me(torch.ones(5, 3)) == pytest.approx(1, rel=1e-3)
    # Two directions with shares 3/4 and 1/4: exp of their entropy.
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(wanted, rel=1e-5)


def test_feature_std_is_0_for_equal_tokens_and_1_for_antipodal_ones() -> None:
    assert feature_std(torch.ones(4, 8)) == pytest.approx(0, abs=1e-4)
    assert feature_std(torch.tensor([[2.0, 0.0], [-3.0, 0.0]])) == pytest.approx(1)
    assert feature_std(torch.eye(4)) == pytest.approx(math.sqrt(1 - 1 / 4))


def test_figures_of_healthy_uniform_and_constant_teachers() -> None:
    one_hot, uniform = torch.eye(8), torch.full((8, 8), 1 / 8)
    healthy = health_figures(outputs(one_hot, torch.eye(8)))
    assert healthy["teacher_entropy"] == 0
    assert healthy["teacher_kl_to_uniform"] == pytest.approx(math.log(8))
    assert healthy["prototype_perplexity"] == pytest.approx(8)
    assert collapse_reason(healthy) is None

    flat = collapse_reason(health_figures(outputs(uniform, torch.eye(8))))
    assert flat is not None and "uniform (entropy 2.08 of 2.08 nats)" in flat
    constant = collapse_reason(health_figures(outputs(one_hot[:1].expand(8, -1), torch.eye(8))))
    assert constant is not None and "same prototype (1.0 in use)" in constant
    alike = collapse_reason(health_figures(outputs(one_hot, torch.ones(8, 8))))
    assert alike is not None and "alike" in alike
