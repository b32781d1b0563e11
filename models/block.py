"""The transformer block of DINOv2 over packed sequences, with the official parameter names.

Shapes: T tokens of all sequences of all image sizes, packed into one (T, D); a group is the sequences of one size, B of
them with n tokens each; D embed_dim.
Source: Oquab et al. 2023 (DINOv2), section 5; github.com/facebookresearch/dinov2 (dinov2/layers).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ffn = Literal["mlp", "swiglu"]
Groups = list[tuple[int, int]]  # (B, n) of each group in a pack, in order
Reads = list[Tensor]  # (B, n) bool of each group: the tokens that somebody reads


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch's output, which starts small.

    It multiplies the branch's last linear layer, not the tokens: (D, D) numbers in place of (T, D), and no copy of the
    unscaled output is kept for its gradient.
    """

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, last: nn.Linear, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.gamma[:, None] * last.weight, self.gamma * last.bias)


class Attention(nn.Module):
    """Self-attention within each sequence of a pack: the linear layers see all tokens at once, (T, D) -> (T, D)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, groups: Groups, scale: LayerScale) -> Tensor:
        packed: Tensor = self.qkv(tokens)
        attended = []
        for part, (sequences, length) in zip(_split(packed, groups), groups, strict=True):
            # (B n, 3 D) -> 3 x (B, heads, n, D / heads)
            query, key, value = part.view(sequences, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            values = F.scaled_dot_product_attention(query, key, value)
            attended.append(values.transpose(1, 2).reshape(sequences * length, -1))
        projected: Tensor = scale(self.proj, attended[0] if len(attended) == 1 else torch.cat(attended))
        return projected

    def at(self, tokens: Tensor, groups: Groups, scale: LayerScale, reads: Reads) -> Tensor:
        """Return what `forward` does at the R tokens that are read alone, (R, D): no other token has a query."""
        query_weight, key_value_weight = self.qkv.weight.tensor_split([tokens.shape[1]])
        query_bias, key_value_bias = self.qkv.bias.tensor_split([tokens.shape[1]])
        keys_values = F.linear(tokens, key_value_weight, key_value_bias)
        queries = F.linear(tokens[_flat(reads)], query_weight, query_bias)
        counts = [read.sum(1) for read in reads]  # a number a sequence
        attended = []
        for part, queries_part, count, (sequences, length) in zip(
            _split(keys_values, groups),
            torch.split(queries, [int(count.sum()) for count in counts]),
            counts,
            groups,
            strict=True,
        ):
            # (B n, 2 D) -> 2 x (B, heads, n, D / heads)
            key, value = part.view(sequences, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            # Sequences have different numbers of queries: the shorter are filled up with zeros.
            is_query = torch.arange(int(count.max()), device=tokens.device) < count[:, None]  # (B, most)
            query = queries.new_zeros(*is_query.shape, queries.shape[1])
            query[is_query] = queries_part
            # (B, most, D) -> (B, heads, most, D / heads)
            query = query.view(*is_query.shape, self.num_heads, -1).transpose(1, 2)
            values = F.scaled_dot_product_attention(query, key, value)
            attended.append(values.transpose(1, 2).flatten(2)[is_query])
        projected: Tensor = scale(self.proj, torch.cat(attended))
        return projected


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, four times as wide inside."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, tokens: Tensor, scale: LayerScale) -> Tensor:
        projected: Tensor = scale(self.fc2, F.gelu(self.fc1(tokens)))
        return projected


class SwiGlu(nn.Module):
    """SiLU(gate) * value, both from one fused layer; two thirds of the MLP's width, rounded up to a multiple of 8."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        hidden_dim = (4 * embed_dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(embed_dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor, scale: LayerScale) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        projected: Tensor = scale(self.w3, F.silu(gate) * value)
        return projected


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens, with batch-subset stochastic depth while training.

    Of a random share 1 - drop_path of each group's sequences a branch is computed, the others cost nothing; the update
    is scaled by all / kept, so its expectation stands. The number kept is max(floor(B (1 - drop_path)), 1) in each
    group, so shapes are the same every step. Source: "efficient stochastic depth", Oquab et al. 2023, section 5.
    """

    def __init__(self, embed_dim: int, num_heads: int, ffn: Ffn, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.ls1 = LayerScale(embed_dim, layer_scale)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = SwiGlu(embed_dim) if ffn == "swiglu" else Mlp(embed_dim)
        self.ls2 = LayerScale(embed_dim, layer_scale)

    def forward(self, tokens: Tensor, groups: Groups, reads: Reads | None = None) -> Tensor:
        """Return the tokens (T, D) after this block; with `reads`, the R that are read alone (R, D), for less."""
        if self.training and self.drop_path > 0.0:
            return self._forward_of_random_sequences(tokens, groups, reads)
        if reads is None:
            tokens = tokens + self.attn(self.norm1(tokens), groups, self.ls1)
        else:
            tokens = tokens[_flat(reads)] + self.attn.at(self.norm1(tokens), groups, self.ls1, reads)
        updated: Tensor = tokens + self.mlp(self.norm2(tokens), self.ls2)
        return updated

    def _forward_of_random_sequences(self, tokens: Tensor, groups: Groups, reads: Reads | None) -> Tensor:
        rows, scales, kept_groups, kept = random_sequences(groups, self.drop_path, tokens)
        normed = self.norm1(tokens.index_select(0, rows))
        if reads is None:
            tokens = tokens.index_add(0, rows, (self.attn(normed, kept_groups, self.ls1) * scales).to(tokens.dtype))
        else:
            kept_reads = [read[sequences] for read, sequences in zip(reads, kept, strict=True)]
            of_kept, of_all = _flat(kept_reads), _flat(reads)
            update = self.attn.at(normed, kept_groups, self.ls1, kept_reads) * scales[of_kept]
            place = of_all.cumsum(0) - 1  # (T,) a read token's number among the R
            tokens = tokens[of_all].index_add(0, place[rows[of_kept]], update.to(tokens.dtype))

        rows, scales, _, kept = random_sequences(groups, self.drop_path, tokens)
        if reads is not None:
            of_kept = _flat([read[sequences] for read, sequences in zip(reads, kept, strict=True)])
            rows, scales = place[rows[of_kept]], scales[of_kept]
        update = self.mlp(self.norm2(tokens.index_select(0, rows)), self.ls2) * scales
        return tokens.index_add(0, rows, update.to(tokens.dtype))


def random_sequences(groups: Groups, drop_path: float, tokens: Tensor) -> tuple[Tensor, Tensor, Groups, list[Tensor]]:
    """Return the rows (kept,) of randomly kept sequences of a pack, each row's scale (kept, 1), and what was kept.

    The last two are the groups of what is kept, and the numbers of the kept sequences in each group.
    """
    rows, scales, kept_groups, numbers, start = [], [], [], [], 0
    for sequences, length in groups:
        num_kept = max(int(sequences * (1 - drop_path)), 1)
        kept = torch.randperm(sequences, device=tokens.device)[:num_kept]
        # (kept, 1) + (n,) -> the kept sequences' rows in the pack
        rows.append((start + kept[:, None] * length + torch.arange(length, device=tokens.device)).flatten())
        scales.append(tokens.new_full((num_kept * length, 1), sequences / num_kept))
        kept_groups.append((num_kept, length))
        numbers.append(kept)
        start += sequences * length
    return torch.cat(rows), torch.cat(scales), kept_groups, numbers


def _split(packed: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    return torch.split(packed, [sequences * length for sequences, length in groups])


def _flat(reads: Reads) -> Tensor:
    """Return which of a pack's tokens are read, (T,) bool."""
    return torch.cat([read.flatten() for read in reads])
