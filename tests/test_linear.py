import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_toolkit.models import linear as linear_module
from dinov2_toolkit.models.linear import HAS_ONEDNN, Linear, linear

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


def test_a_layer_is_one_of_torchs_with_the_same_weights() -> None:
    torch.manual_seed(0)
    layer, torchs = Linear(12, 20), torch.nn.Linear(12, 20)
    torchs.load_state_dict(layer.state_dict())
    rows = torch.randn(9, 12)
    torch.testing.assert_close(layer(rows), torchs(rows))
    exported = torch.export.export(layer, (rows,))
    assert [node.name for node in exported.graph.nodes if node.op == "call_function"] == ["linear"]
