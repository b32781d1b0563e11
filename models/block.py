"""The transformer block of DINOv2 over packed sequences, with the official parameter names.

Shapes: T tokens of all sequences of all image sizes, packed into one (T, D); a group is the sequences of one size, B of
them with n tokens each; R selected tokens of all groups; D embed_dim, F width of the feed-forward.
Source: Oquab et al. 2023 (DINOv2), section 5; github.com/facebookresearch/dinov2 (dinov2/layers).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import cpu
from .selected import Selection

Ffn = Literal["mlp", "swiglu"]
ActivationCheckpointing = Literal["none", "selective", "full"]
Groups = list[tuple[int, int]]  # (B, n) of each group in a pack, in order
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, weight, bias -> rows weight^T + bias

# Selective checkpointing keeps the outputs of matrix products and of fused attention, and computes the rest again.
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.mkldnn._linear_pointwise.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch's output, which starts small.

    It multiplies the branch's last linear layer instead of the tokens: (D, D) numbers instead of (T, D), and no copy of
    the unscaled output is kept for its gradient.
    """

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, last: nn.Linear, tokens: Tensor, linear: Linear) -> Tensor:
        return linear(tokens, self.gamma[:, None] * last.weight, self.gamma * last.bias)


class Attention(nn.Module):
    """Self-attention within each sequence of a pack, without the projection after it: (T, D) -> (T, D)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        packed = cpu.linear(tokens, self.qkv.weight, self.qkv.bias)
        attended = []
        for rows, (sequences, length) in zip(split(packed, groups), groups, strict=True):
            # (B n, 3 D) -> 3 x (B, heads, n, D / heads)
            query, key, value = rows.view(sequences, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended.append(cpu.attention(query, key, value).transpose(1, 2).reshape(sequences * length, -1))
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def selected(self, tokens: Tensor, groups: Groups, rows: Tensor, queries: list[Tensor]) -> list[Tensor]:
        """Return each group's result for its queries alone: no other token needs one.

        Args:
            tokens, groups: the pack (T, D) that is attended to.
            rows: the selected tokens (R, D).
            queries: of each group (B, m), which of the rows each sequence asks for.

        Returns:
            (B m, D) of each group.
        """
        query_weight, key_value_weight = self.qkv.weight.tensor_split([tokens.shape[1]])
        query_bias, key_value_bias = self.qkv.bias.tensor_split([tokens.shape[1]])
        keys_values = cpu.linear(tokens, key_value_weight, key_value_bias)
        row_queries = F.linear(rows, query_weight, query_bias)
        attended = []
        for packed, numbers, (sequences, length) in zip(split(keys_values, groups), queries, groups, strict=True):
            # (B n, 2 D) -> 2 x (B, heads, n, D / heads)
            key, value = packed.view(sequences, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            # (R, D) -> (B m, D) -> (B, heads, m, D / heads)
            query = row_queries.index_select(0, numbers.flatten()).view(*numbers.shape, self.num_heads, -1)
            attended.append(cpu.attention(query.transpose(1, 2), key, value).transpose(1, 2).flatten(0, 1).flatten(1))
        return attended


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, four times as wide inside."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def activate(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.fc1, self.fc2


class SwiGlu(nn.Module):
    """SiLU(gate) * value, both from one fused layer; two thirds of the MLP's width, rounded up to a multiple of 8."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        hidden_dim = (4 * embed_dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(embed_dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, embed_dim)

    def activate(self, hidden: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.w12, self.w3


class DropPathSubset(NamedTuple):
    """The sequences of a pack for which a residual branch is computed."""

    kept: list[Tensor]  # of each group, the numbers of its kept sequences
    rows: Tensor  # (kept,) their tokens' rows in the pack
    scale: Tensor  # (kept, 1) of each row's update: all sequences of its group / kept ones
    groups: Groups  # of the kept sequences

    def add(self, tokens: Tensor, update: Tensor) -> Tensor:
        """Return the tokens with the scaled update (kept, D) added to the subset's rows."""
        return tokens.index_add(0, self.rows, (update * self.scale).to(tokens.dtype))

    def add_selected(self, tokens: Tensor, update: Tensor, selections: list[Selection]) -> Tensor:
        """Return the selected tokens (R, D) with the scaled update (R, D) added to those of kept sequences.

        All were computed: they are few, and which of them are kept is known on the device alone.
        """
        scales = [
            tokens.new_zeros(len(chosen.queries), dtype=torch.float32)
            .index_fill(0, kept, len(chosen.queries) / len(kept))
            .index_select(0, chosen.sequences)
            for chosen, kept in zip(selections, self.kept, strict=True)
        ]
        return tokens + (update * torch.cat(scales)[:, None]).to(tokens.dtype)


def sample_drop_path(
    groups: Groups, drop_path: float, tokens: Tensor, generator: torch.Generator | None
) -> DropPathSubset:
    """Draw the sequences of a pack (T, D) that a branch is computed for: max(floor(B (1 - drop_path)), 1) a group."""
    all_kept, rows, scales, kept_groups, start = [], [], [], [], 0
    for sequences, length in groups:
        num_kept = max(int(sequences * (1 - drop_path)), 1)
        kept = torch.randperm(sequences, generator=generator, device=tokens.device)[:num_kept]
        all_kept.append(kept)
        # (kept, 1) + (n,) -> (kept n,)
        rows.append((start + kept[:, None] * length + torch.arange(length, device=tokens.device)).flatten())
        scales.append(tokens.new_full((num_kept * length, 1), sequences / num_kept, dtype=torch.float32))
        kept_groups.append((num_kept, length))
        start += sequences * length
    return DropPathSubset(all_kept, torch.cat(rows), torch.cat(scales), kept_groups)


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens, with batch-subset stochastic depth while training.

    Each branch is computed for a random subset of each group's sequences, of a share 1 - drop_path. The update is
    scaled by all / kept, which keeps its expectation. The number kept is the same every step, and so are the shapes.
    Source: "efficient stochastic depth", Oquab et al. 2023, section 5.
    """

    activation_checkpointing: ActivationCheckpointing = "none"

    def __init__(self, embed_dim: int, num_heads: int, ffn: Ffn, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.ls1 = LayerScale(embed_dim, layer_scale)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = SwiGlu(embed_dim) if ffn == "swiglu" else Mlp(embed_dim)
        self.ls2 = LayerScale(embed_dim, layer_scale)

    def forward(
        self,
        tokens: Tensor,
        groups: Groups,
        selections: list[Selection] | None = None,
        subsets: list[DropPathSubset] | None = None,
    ) -> Tensor:
        """Return the tokens (T, D) after this block, or only the selected ones of each group (R, D), for less work.

        Args:
            subsets: from `drop_path_subsets`; None: drawn here while training.
        """
        subsets = subsets or self.drop_path_subsets(tokens, groups, None)
        if selections is None:
            return self._run(self._forward, tokens, groups, subsets)
        return self._run(self._forward_selected, tokens, groups, selections, subsets)

    def drop_path_subsets(
        self, tokens: Tensor, groups: Groups, generator: torch.Generator | None
    ) -> list[DropPathSubset] | None:
        """Draw the sequences that each branch is computed for while training; None where that is all.

        Not part of what torch.compile compiles, which would draw in another order and knows no generator.
        """
        if not self.training or self.drop_path == 0.0:
            return None
        return [sample_drop_path(groups, self.drop_path, tokens, generator) for _ in range(2)]

    def _run(self, forward: Callable[..., Tensor], *arguments: object) -> Tensor:
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return forward(*arguments)
        checkpointed = _selective if self.activation_checkpointing == "selective" else _full
        output: Tensor = checkpointed(forward, *arguments)
        return output

    def _forward(self, tokens: Tensor, groups: Groups, subsets: list[DropPathSubset] | None) -> Tensor:
        if subsets is None:
            tokens = tokens + self.attend(tokens, groups)
            return tokens + self.feed_forward(tokens, cpu.linear)
        first, second = subsets
        tokens = first.add(tokens, self.attend(tokens.index_select(0, first.rows), first.groups))
        return second.add(tokens, self.feed_forward(tokens.index_select(0, second.rows), cpu.linear))

    def _forward_selected(
        self, tokens: Tensor, groups: Groups, selections: list[Selection], subsets: list[DropPathSubset] | None
    ) -> Tensor:
        rows = tokens.index_select(0, torch.cat([chosen.rows for chosen in selections]))
        if subsets is None:
            rows = rows + self.attend_selected(tokens, groups, rows, selections, None)
            return rows + self.feed_forward(rows, F.linear)
        first, second = subsets
        kept = tokens.index_select(0, first.rows)
        update = self.attend_selected(kept, first.groups, rows, selections, first.kept)
        rows = first.add_selected(rows, update, selections)
        return second.add_selected(rows, self.feed_forward(rows, F.linear), selections)

    def attend(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Return the update (T, D) of the attention branch."""
        update: Tensor = self.ls1(self.attn.proj, self.attn(normed(self.norm1, tokens), groups), cpu.linear)
        return update

    def attend_selected(
        self, tokens: Tensor, groups: Groups, rows: Tensor, selections: list[Selection], kept: list[Tensor] | None
    ) -> Tensor:
        """Return the update (R, D) of the attention branch for the selected tokens.

        Args:
            tokens, groups: the pack (T, D), or the kept sequences of it.
            rows: the selected tokens (R, D), group by group.
            kept: of each group, the numbers of its kept sequences; the update of others is any number.
        """
        queries, slots, first_row = [], [], 0
        for number, chosen in enumerate(selections):
            num_sequences, most = chosen.queries.shape
            order = torch.arange(num_sequences, device=rows.device)
            if kept is not None:
                order = torch.zeros_like(order).index_copy(0, kept[number], order[: len(kept[number])])
            asked = chosen.queries if kept is None else chosen.queries.index_select(0, kept[number])
            queries.append(first_row + asked)
            slots.append(order.index_select(0, chosen.sequences) * most + chosen.positions)
            first_row += len(chosen.rows)
        attended = self.attn.selected(normed(self.norm1, tokens), groups, normed(self.norm1, rows), queries)
        parts = [part.index_select(0, places) for part, places in zip(attended, slots, strict=True)]
        update: Tensor = self.ls1(self.attn.proj, torch.cat(parts), F.linear)
        return update

    def feed_forward(self, tokens: Tensor, linear: Linear) -> Tensor:
        """Return the update (T, D) of the feed-forward branch.

        `linear` applies its layers: for selected tokens F.linear, since their number changes (see `cpu.linear`).
        """
        first, last = self.mlp.layers
        hidden = linear(normed(self.norm2, tokens), first.weight, first.bias)  # (T, F), or (T, 2 F) for SwiGLU
        update: Tensor = self.ls2(last, self.mlp.activate(hidden), linear)
        return update


def normed(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    """Return the norm of tokens: under autocast in float32, also where the tokens are half, or by FSDP2 the weights."""
    dtype = norm.weight.dtype
    if not tokens.is_meta and torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
    return F.layer_norm(tokens.to(dtype), norm.normalized_shape, weight, bias, norm.eps)


def _keep_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


_full = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_selective = partial(_full, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))


def split(packed: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """Return the rows of a pack group by group."""
    return torch.split(packed, [sequences * length for sequences, length in groups])
