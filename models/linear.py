"""Linear layers, on a CPU in single precision by oneDNN, which torch itself asks for reduced precision alone.

Measured on an AMD EPYC with AVX-512: 200 to 219 GFLOP/s forward and to the input's gradient, 168 to 198 by MKL. The
gradient of the weight, of whose products MKL is the quicker, stays with torch.

Each new number of rows costs oneDNN a kernel of about a megabyte, and it keeps a thousand: this is for numbers that
recur, such as that of all tokens of a batch, and not for that of the tokens which a loss reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows weight^T + bias: (..., I), (O, I), (O,) -> (..., O), the numbers of `F.linear` but for rounding."""
    is_single = rows.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_traced = torch.compiler.is_compiling()  # torch's compiler and exporters know torch's own layer
    if rows.device.type != "cpu" or not is_single or not HAS_ONEDNN or is_traced or not len(rows):
        return F.linear(rows, weight, bias)
    product: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return product


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        of_rows, of_weight, of_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        flat = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if of_rows else None,
            flat.t() @ rows.flatten(0, -2) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )
