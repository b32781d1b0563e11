import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_toolkit.models import block
from dinov2_toolkit.models import linear as linear_module
from dinov2_toolkit.models.linear import HAS_ONEDNN, linear
from dinov2_toolkit.models.vit import VisionTransformer

SHAPES = [(1,), (7,), (300,), (2, 5)]


def inputs(shape: tuple[int, ...], *, has_bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(*shape, 12), (20, 12), *([(20,)] if has_bias else [])]
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def is_ours(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_LinearBackward"


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients_are_those_of_double_precision(shape: tuple[int, ...], has_bias: bool) -> None:
    given, exact = inputs(shape, has_bias=has_bias), inputs(shape, has_bias=has_bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in exact]
    output, wanted = linear(*given), F.linear(*exact)
    assert is_ours(output) == HAS_ONEDNN
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(output.shape)
    torch.autograd.backward((output * weights).sum())
    torch.autograd.backward((wanted * weights.double()).sum())
    for tensor, exact_tensor in zip(given, exact, strict=True):
        assert tensor.grad is not None and exact_tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), exact_tensor.grad, rtol=1e-5, atol=1e-5)


def test_only_gradients_that_are_asked_for_are_made() -> None:
    rows, weight, bias = inputs((7,), has_bias=True)
    output = linear(rows.detach(), weight, bias.detach())
    torch.autograd.backward(output.sum())
    assert rows.grad is None and bias.grad is None
    torch.testing.assert_close(weight.grad, rows.detach().sum(0).expand(20, -1))


def test_other_kinds_of_numbers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    double = inputs((7,), has_bias=True, dtype=torch.float64)
    assert torch.equal(linear(*double), F.linear(*double))
    single = inputs((7,), has_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(*single), F.linear(*single)) and linear(*single).dtype == torch.bfloat16
    assert linear(single[0][:0], *single[1:]).shape == (0, 20)
    assert linear(*(tensor.to("meta") for tensor in single)).shape == (7, 20)
    monkeypatch.setattr(linear_module, "HAS_ONEDNN", False)
    assert not is_ours(linear(*single))


def test_exported_it_is_torchs() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(12, 20)

        def forward(self, rows: Tensor) -> Tensor:
            return linear(rows, self.inner.weight, self.inner.bias)

    exported = torch.export.export(Layer(), (torch.randn(9, 12),))
    assert [node.name for node in exported.graph.nodes if node.op == "call_function"] == ["linear"]


def test_tokens_that_a_loss_reads_take_torchs_layers_for_their_number_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = VisionTransformer(patch_size=4, embed_dim=12, depth=3, num_heads=2, img_size=16)
    rows_seen = set()

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows_seen.add(len(rows))
        return linear(rows, weight, bias)

    monkeypatch.setattr(block, "linear", watched)
    images = torch.randn(5, 3, 16, 16)
    for num_chosen in (1, 4, 9):
        chosen = torch.zeros(5, 16, dtype=torch.bool)
        chosen[0, :num_chosen] = True
        backbone.class_and_chosen_patch_tokens([images], [None], [chosen])
    assert rows_seen == {5 * 17}
