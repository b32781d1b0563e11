"""The transformer block of DINOv2 over packed sequences, with the official parameter names.

Shapes: T tokens of all sequences of all image sizes, packed into one (T, D); a group is the sequences of one size, B of
them with n tokens each; D embed_dim.
Source: Oquab et al. 2023 (DINOv2), section 5; github.com/facebookresearch/dinov2 (dinov2/layers).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear import linear

Ffn = Literal["mlp", "swiglu"]
Groups = list[tuple[int, int]]  # (B, n) of each group in a pack, in order
Reads = list[Tensor]  # (B, n) bool of each group: the tokens that somebody reads
ActivationCheckpointing = Literal["none", "selective", "full"]  # what backward computes again instead of keeping it
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, weight, bias -> rows weight^T + bias
Kept = tuple[Tensor, Tensor, Groups, list[Tensor]]  # what `random_sequences` returns

SHORT = 64  # tokens; measured on a CPU, there and back: up to here plain products are 1.1 to 2 times as fast


def is_short(tokens: Tensor, length: int) -> bool:
    """Return whether sequences of this length are attended to by plain products."""
    return tokens.device.type == "cpu" and length <= SHORT


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(d)) value: (B, heads, m, d), (B, heads, n, d) twice -> (B, heads, m, d)."""
    if not is_short(query, key.shape[2]):
        return F.scaled_dot_product_attention(query, key, value)
    scaled: Tensor = query * query.shape[-1] ** -0.5
    return (scaled @ key.transpose(-1, -2)).softmax(-1) @ value


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch's output, which starts small.

    It multiplies the branch's last linear layer, not the tokens: (D, D) numbers in place of (T, D), and no copy of the
    unscaled output is kept for its gradient.
    """

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, last: nn.Linear, tokens: Tensor, product: Product) -> Tensor:
        return product(tokens, self.gamma[:, None] * last.weight, self.gamma * last.bias)


class Attention(nn.Module):
    """Self-attention within each sequence of a pack, from queries, keys and values of all: (T, 3 D) -> (T, D).

    The projection after it is the caller's.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, packed: Tensor, groups: Groups) -> Tensor:
        attended = []
        for part, (sequences, length) in zip(_split(packed, groups), groups, strict=True):
            # (B n, 3 D) -> 3 x (B, heads, n, D / heads)
            query, key, value = part.view(sequences, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended.append(attention(query, key, value).transpose(1, 2).reshape(sequences * length, -1))
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def at(self, tokens: Tensor, groups: Groups, reads: Reads) -> Tensor:
        """Return the R tokens that are read alone, (T, D) -> (R, D): no other has a query, or an update."""
        query_weight, key_value_weight = self.qkv.weight.tensor_split([tokens.shape[1]])
        query_bias, key_value_bias = self.qkv.bias.tensor_split([tokens.shape[1]])
        keys_values = linear(tokens, key_value_weight, key_value_bias)
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
            attended.append(attention(query, key, value).transpose(1, 2).flatten(2)[is_query])
        return torch.cat(attended)


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


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens, with batch-subset stochastic depth while training.

    Of a random share 1 - drop_path of each group's sequences a branch is computed, the others cost nothing; the update
    is scaled by all / kept, so its expectation stands. The number kept is max(floor(B (1 - drop_path)), 1) in each
    group, so shapes are the same every step. Source: "efficient stochastic depth", Oquab et al. 2023, section 5.
    """

    activation_checkpointing: ActivationCheckpointing = "none"  # "selective": norms, activations, short attention

    def __init__(self, embed_dim: int, num_heads: int, ffn: Ffn, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.ls1 = LayerScale(embed_dim, layer_scale)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = SwiGlu(embed_dim) if ffn == "swiglu" else Mlp(embed_dim)
        self.ls2 = LayerScale(embed_dim, layer_scale)

    def attend(self, tokens: Tensor, groups: Groups, reads: Reads | None) -> Tensor:
        """Return the update (T, D) of attention, or where `reads` says so (R, D)."""
        if reads is not None:
            attended = self.attn.at(self.norm1(tokens), groups, reads)
        else:
            qkv = self.attn.qkv
            packed = self._after(self.norm1, tokens, lambda normed: linear(normed, qkv.weight, qkv.bias))
            if self._keeps_little() and all(is_short(packed, length) for _, length in groups):
                attended = _again(lambda packed: self.attn(packed, groups), packed)  # would keep four times as much
            else:
                attended = self.attn(packed, groups)
        update: Tensor = self.ls1(self.attn.proj, attended, _product(reads))
        return update

    def feed_forward(self, tokens: Tensor, reads: Reads | None) -> Tensor:
        """Return the update (T, D) of the feed-forward; `reads` says that the tokens are those that are read (R, D)."""
        product, (first, last) = _product(reads), self.mlp.layers
        hidden = self._after(self.norm2, tokens, lambda normed: product(normed, first.weight, first.bias))
        activate = self.mlp.activate
        if isinstance(self.mlp, SwiGlu) and self._keeps_little() and not torch.compiler.is_compiling():
            activate = partial(_again, activate)  # a product keeps both of its factors
        return self._after(activate, hidden, lambda activated: self.ls2(last, activated, product))

    def _keeps_little(self) -> bool:
        return self.activation_checkpointing == "selective" and torch.is_grad_enabled()

    def _after(self, cheap: Callable[[Tensor], Tensor], tokens: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a cheap operation and the linear layer after it, keeping no more than their input if told so.

        Going backward the cheap operation runs again, where the layer asks for its input; the layer does not.
        """
        if not self._keeps_little():
            return layer(cheap(tokens))
        if torch.compiler.is_compiling():  # which does not know hooks, and leaves the layer out by itself
            return _again(lambda tokens: layer(cheap(tokens)), tokens)
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype

        def prepare() -> Tensor:
            return cheap(tokens).to(dtype)  # what the layer keeps, not what autocast would make a copy of

        prepared = prepare()
        place = prepared.data_ptr()

        def keep(tensor: Tensor) -> Tensor | None:
            return None if tensor.data_ptr() == place else tensor

        def give(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            with torch.no_grad():
                return prepare()

        with torch.autograd.graph.saved_tensors_hooks(keep, give):
            return layer(prepared)

    def forward(
        self,
        tokens: Tensor,
        groups: Groups,
        reads: Reads | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the tokens (T, D) after this block; with `reads`, the R that are read alone (R, D), for less.

        Stochastic depth draws from `generator`, or from torch's own.
        """
        kept = None
        if self.training and self.drop_path > 0.0:
            kept = [random_sequences(groups, self.drop_path, tokens, generator) for _ in range(2)]
        if self.activation_checkpointing == "full" and torch.is_grad_enabled():
            output: Tensor = checkpoint(
                self._forward, tokens, groups, reads, kept, use_reentrant=False, preserve_rng_state=False
            )
            return output
        return self._forward(tokens, groups, reads, kept)

    def _forward(self, tokens: Tensor, groups: Groups, reads: Reads | None, kept: list[Kept] | None) -> Tensor:
        if kept is not None:
            return self._forward_of_some(tokens, groups, reads, kept)
        update = self.attend(tokens, groups, reads)
        tokens = (tokens if reads is None else tokens[_flat(reads)]) + update
        return tokens + self.feed_forward(tokens, reads)

    def _forward_of_some(self, tokens: Tensor, groups: Groups, reads: Reads | None, kept: list[Kept]) -> Tensor:
        """Return the tokens after this block, each branch updating the sequences that it keeps."""
        rows, scales, kept_groups, numbers = kept[0]
        kept_reads = None if reads is None else _kept(reads, numbers)
        update = self.attend(tokens.index_select(0, rows), kept_groups, kept_reads)
        if reads is not None and kept_reads is not None:
            place = _flat(reads).cumsum(0) - 1  # (T,) a read token's number among the R
            tokens = tokens[_flat(reads)]
            rows, scales = place[rows[_flat(kept_reads)]], scales[_flat(kept_reads)]
        tokens = tokens.index_add(0, rows, (update * scales).to(tokens.dtype))

        rows, scales, _, numbers = kept[1]
        if reads is not None:
            of_kept = _flat(_kept(reads, numbers))
            rows, scales = place[rows[of_kept]], scales[of_kept]
        update = self.feed_forward(tokens.index_select(0, rows), reads)
        return tokens.index_add(0, rows, (update * scales).to(tokens.dtype))


def _again(function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Return `function(tokens)`, of which nothing is kept: going backward it runs again."""
    output: Tensor = checkpoint(function, tokens, use_reentrant=False, preserve_rng_state=False)
    return output


def _product(reads: Reads | None) -> Product:
    """Return what applies linear layers: torch's own to the tokens that are read, whose number is another each step."""
    return linear if reads is None else F.linear


def _kept(reads: Reads, kept: list[Tensor]) -> Reads:
    return [read[sequences] for read, sequences in zip(reads, kept, strict=True)]


def random_sequences(groups: Groups, drop_path: float, tokens: Tensor, generator: torch.Generator | None) -> Kept:
    """Return the rows (kept,) of randomly kept sequences of a pack, each row's scale (kept, 1), and what was kept.

    The last two are the groups of what is kept, and the numbers of the kept sequences in each group.
    """
    rows, scales, kept_groups, numbers, start = [], [], [], [], 0
    for sequences, length in groups:
        num_kept = max(int(sequences * (1 - drop_path)), 1)
        kept = torch.randperm(sequences, generator=generator, device=tokens.device)[:num_kept]
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
