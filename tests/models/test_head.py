import pytest
import torch

from dinov2_toolkit.models.head import ProjectionHead


def tiny_head() -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(12, 20, hidden_dim=16, bottleneck_dim=6)


def test_names_are_those_of_official_checkpoints() -> None:
    assert {name: tuple(tensor.shape) for name, tensor in tiny_head().state_dict().items()} == {
        "mlp.0.weight": (16, 12),
        "mlp.0.bias": (16,),
        "mlp.2.weight": (16, 16),
        "mlp.2.bias": (16,),
        "mlp.4.weight": (6, 16),
        "mlp.4.bias": (6,),
        "last_layer.weight_g": (20, 1),
        "last_layer.weight_v": (20, 6),
    }


@pytest.mark.parametrize(
    ("in_dim", "num_prototypes", "bottleneck_dim", "millions"),
    [(1024, 65_536, 256, 23.7), (1024, 131_072, 384, 57.5), (1024, 131_072, 256, 40.5), (1536, 131_072, 384, 58.6)],
)
def test_parameter_counts_are_those_of_the_paper(
    in_dim: int, num_prototypes: int, bottleneck_dim: int, millions: float
) -> None:
    with torch.device("meta"):
        head = ProjectionHead(in_dim, num_prototypes, bottleneck_dim=bottleneck_dim)
    assert sum(parameter.numel() for parameter in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_initial_logits_are_cosines() -> None:
    head, tokens = tiny_head(), torch.randn(50, 12)
    bottleneck = head.mlp(tokens)
    expected = torch.cosine_similarity(bottleneck[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(tokens), expected, rtol=1e-4, atol=1e-5)


def test_prototype_lengths_scale_their_logits_and_are_trained() -> None:
    head, tokens = tiny_head(), torch.randn(3, 12)
    before = head(tokens)
    head.last_layer.weight_g.data[7] = 2.5
    after = head(tokens)
    torch.testing.assert_close(after[:, 7], 2.5 * before[:, 7])
    after.sum().backward()
    assert head.last_layer.weight_g.grad is not None and head.last_layer.weight_g.grad.all()


def test_no_rows_give_no_logits() -> None:
    assert tiny_head()(torch.empty(0, 12)).shape == (0, 20)


def test_tokens_of_zero_length_give_finite_logits_and_gradients() -> None:
    head = tiny_head()
    head.get_parameter("mlp.4.weight").data.zero_()
    logits = head(torch.randn(2, 12))
    logits.sum().backward()
    assert not logits.any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in head.parameters())
