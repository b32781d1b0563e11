"""The transformer block of DINOv2 over packed sequences, with the official parameter names.

Shapes: T tokens of all sequences of all image sizes, packed into one (T, D); a group is the sequences of one size, B of
them with n tokens each; D embed_dim.
Source: Oquab et al. 2023 (DINOv2), section 5; github.com/facebookresearch/dinov2 (dinov2/layers).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ffn = Literal["mlp", "swiglu"]
Groups = list[tuple[int, int]]  # (B, n) of each group in a pack, in order
Branch = Callable[[Tensor, Groups], Tensor]  # a block's attention or feed-forward: packed tokens -> their update


class Attention(nn.Module):
    """Self-attention within each sequence of a pack: the linear layers see all tokens at once, (T, D) -> (T, D)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        packed: Tensor = self.qkv(tokens)
        attended = []
        for part, (sequences, length) in zip(torch.split(packed, [b * n for b, n in groups]), groups, strict=True):
            # (B n, 3 D) -> 3 x (B, heads, n, D / heads)
            query, key, value = part.view(sequences, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            values = F.scaled_dot_product_attention(query, key, value)
            attended.append(values.transpose(1, 2).reshape(sequences * length, -1))
        projected: Tensor = self.proj(attended[0] if len(attended) == 1 else torch.cat(attended))
        return projected


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, four times as wide inside."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return projected


class SwiGlu(nn.Module):
    """SiLU(gate) * value, both from one fused layer; two thirds of the MLP's width, rounded up to a multiple of 8."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        hidden_dim = (4 * embed_dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(embed_dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        projected: Tensor = self.w3(F.silu(gate) * value)
        return projected


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor that starts small."""

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens, with batch-subset stochastic depth while training."""

    def __init__(self, embed_dim: int, num_heads: int, ffn: Ffn, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.ls1 = LayerScale(embed_dim, layer_scale)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = SwiGlu(embed_dim) if ffn == "swiglu" else Mlp(embed_dim)
        self.ls2 = LayerScale(embed_dim, layer_scale)

    def attention_branch(self, tokens: Tensor, groups: Groups) -> Tensor:
        update: Tensor = self.ls1(self.attn(self.norm1(tokens), groups))
        return update

    def ffn_branch(self, tokens: Tensor, groups: Groups) -> Tensor:
        update: Tensor = self.ls2(self.mlp(self.norm2(tokens)))
        return update

    def forward(self, tokens: Tensor, groups: Groups, rows: Tensor | None = None) -> Tensor:
        """Return the tokens (T, D) after this block; with `rows` (R,), those alone (R, D), at a smaller cost."""
        drop_path = self.drop_path if self.training else 0.0
        tokens = add_residual(tokens, groups, self.attention_branch, drop_path)
        if rows is not None:
            return add_residual_at(tokens, groups, rows, self.ffn_branch, drop_path)
        return add_residual(tokens, groups, self.ffn_branch, drop_path)


def add_residual(tokens: Tensor, groups: Groups, branch: Branch, drop_path: float) -> Tensor:
    """Return tokens + branch(tokens), the branch computed for a random share 1 - drop_path of each group's sequences.

    Dropped sequences cost nothing, and the kept ones' update is scaled by all / kept, so its expectation stands. The
    number kept is max(floor(B (1 - drop_path)), 1) in each group, so shapes are the same every step.
    Source: "efficient stochastic depth", Oquab et al. 2023, section 5.
    """
    if drop_path == 0.0:
        return tokens + branch(tokens, groups)
    rows, scales, kept_groups = random_sequences(groups, drop_path, tokens)
    update = branch(tokens.index_select(0, rows), kept_groups) * scales
    return tokens.index_add(0, rows, update.to(tokens.dtype))


def add_residual_at(tokens: Tensor, groups: Groups, rows: Tensor, branch: Branch, drop_path: float) -> Tensor:
    """Return what `add_residual` would, at the given rows (R,) alone: (T, D) -> (R, D).

    Only for a branch that treats each token by itself. Rows of dropped sequences are computed and multiplied by 0,
    which costs less than sorting them out: few rows are asked for.
    """
    chosen = tokens.index_select(0, rows)
    update = branch(chosen, groups)
    if drop_path > 0.0:
        kept_rows, scales, _ = random_sequences(groups, drop_path, tokens)
        update = update * scales.new_zeros(len(tokens), 1).index_copy(0, kept_rows, scales).index_select(0, rows)
    return chosen + update


def random_sequences(groups: Groups, drop_path: float, tokens: Tensor) -> tuple[Tensor, Tensor, Groups]:
    """Return the rows (kept,) of randomly kept sequences of a pack, each row's scale (kept, 1), and their groups."""
    rows, scales, kept_groups, start = [], [], [], 0
    for sequences, length in groups:
        num_kept = max(int(sequences * (1 - drop_path)), 1)
        kept = torch.randperm(sequences, device=tokens.device)[:num_kept]
        # (kept, 1) + (n,) -> the kept sequences' rows in the pack
        rows.append((start + kept[:, None] * length + torch.arange(length, device=tokens.device)).flatten())
        scales.append(tokens.new_full((num_kept * length, 1), sequences / num_kept))
        kept_groups.append((num_kept, length))
        start += sequences * length
    return torch.cat(rows), torch.cat(scales), kept_groups
