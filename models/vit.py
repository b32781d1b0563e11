"""The vision transformer of DINOv2, with the official parameter names, so that official weights load as they are.

Shapes: B images of one size, N patch tokens, R register tokens, n = 1 + R + N tokens a sequence in the order class
token, registers, patches; D embed_dim; T tokens of all sequences of all sizes, packed into one (T, D).
Source: Oquab et al. 2023 (DINOv2), Darcet et al. 2023 (registers), github.com/facebookresearch/dinov2 (dinov2/models).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..errors import ToolkitError
from .block import Block, Ffn, Groups, normed, split
from .pos_embed import interpolated
from .selected import SelectedPatches, selection


@dataclass(frozen=True)
class Features:
    """What a backbone says of B images, after its final norm."""

    cls_token: Tensor  # (B, D)
    register_tokens: Tensor  # (B, R, D)
    patch_tokens: Tensor  # (B, N, D), row by row of the patch grid


class PatchEmbed(nn.Module):
    """Cut images into patches and project each: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, N, D)


class VisionTransformer(nn.Module):
    """A ViT whose position embedding is stored for one square grid and interpolated for every other.

    Args:
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads: width, blocks, attention heads (embed_dim must be a multiple of num_heads).
        ffn: "mlp" or "swiglu".
        num_register_tokens: extra tokens without position (Darcet et al. 2023).
        in_chans: channels of an image.
        img_size: side in pixels of the square image whose grid the position embedding is stored for.
        layer_scale: initial LayerScale, 1e-5 to train from scratch.
        drop_path: share of sequences whose residual branch is skipped while training, the same in all blocks.
        pos_embed_antialias, pos_embed_offset: how the position embedding is interpolated. Released weights without
            registers were made with (False, 0.1), those with registers with (True, 0.0); they differ in the result.
            An offset above 0 samples by the scale factor (grid + offset) / stored grid, 0 by the grid's size.

    Raises:
        ToolkitError: if the numbers do not fit one another.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        ffn: Ffn = "mlp",
        num_register_tokens: int = 0,
        in_chans: int = 3,
        img_size: int = 518,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        pos_embed_antialias: bool = False,
        pos_embed_offset: float = 0.1,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ToolkitError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; change one of them")
        if img_size % patch_size:
            raise ToolkitError(
                f"image size {img_size} is not a multiple of patch size {patch_size}; "
                f"use {img_size // patch_size * patch_size or patch_size}"
            )
        self.patch_size, self.embed_dim, self.depth, self.num_heads = patch_size, embed_dim, depth, num_heads
        self.ffn: Ffn = ffn
        self.num_register_tokens, self.in_chans, self.img_size = num_register_tokens, in_chans, img_size
        self.pos_embed_antialias, self.pos_embed_offset = pos_embed_antialias, pos_embed_offset
        self.pos_grid = img_size // patch_size  # patches a side

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.pos_grid**2, embed_dim))  # the class token's slot first
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, ffn, layer_scale, drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as the official code does; the patch projection keeps Conv2d's own initialisation."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def interpolated_pos_embed(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding (1, 1 + rows * columns, D) of a patch grid, bicubic and in float32."""
        antialias, offset = self.pos_embed_antialias, self.pos_embed_offset
        return interpolated(self.pos_embed, rows, columns, antialias=antialias, offset=offset)

    def embed(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """Return the tokens (B, n, D) that enter the first block; masked patches keep their position."""
        num_images, channels, height, width = images.shape  # no len(): it would fix the number in an exported graph
        if channels != self.in_chans:
            raise ToolkitError(f"images have {channels} channels, the model takes {self.in_chans}; convert the images")
        if height % self.patch_size or width % self.patch_size:
            raise ToolkitError(
                f"images of {height} x {width} pixels are not a multiple of the patch size {self.patch_size}; "
                "resize or crop them to one"
            )
        patches: Tensor = self.patch_embed(images)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        position = self.interpolated_pos_embed(height // self.patch_size, width // self.patch_size)
        tokens = [(self.cls_token + position[:, :1]).expand(num_images, -1, -1), patches + position[:, 1:]]
        if self.register_tokens is not None:
            tokens.insert(1, self.register_tokens.expand(num_images, -1, -1))
        return torch.cat(tokens, dim=1)

    def embed_packed(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Groups]:
        """Return the tokens of all image batches as one (T, D), and how to cut it."""
        embedded = [self.embed(batch, mask) for batch, mask in zip(images, masks, strict=True)]
        groups = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
        packed = torch.cat([tokens.flatten(0, 1) for tokens in embedded])
        # While it trains under autocast, the residual stream is in half precision; norms and parameters are not.
        if self.training and not packed.is_meta and torch.is_autocast_enabled(packed.device.type):
            packed = packed.to(torch.get_autocast_dtype(packed.device.type))
        return packed, groups

    def unpack(self, tokens: Tensor, groups: Groups) -> list[Features]:
        """Return the final norm of packed tokens (T, D), cut into each group's features."""
        first_patch = 1 + self.num_register_tokens
        features = []
        for part, (sequences, length) in zip(split(normed(self.norm, tokens), groups), groups, strict=True):
            sequence = part.view(sequences, length, -1)
            features.append(Features(sequence[:, 0], sequence[:, 1:first_patch], sequence[:, first_patch:]))
        return features

    @overload
    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> Features: ...

    @overload
    def forward_features(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Features]: ...

    def forward_features(
        self, images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Return the features of images (B, C, H, W), or a list of them for a list of image batches.

        A list runs as one packed pass: norms, linear layers and feed-forward see all tokens together, attention
        each size by itself, so the result is that of separate passes.

        Args:
            images: a batch, or a list of batches that may differ in B, H and W; H and W multiples of the patch size.
            masks: (B, N) bool, True where the mask token replaces a patch; for a list, one entry or None a batch.
        """
        if isinstance(images, Tensor):
            assert masks is None or isinstance(masks, Tensor), "one batch of images takes one tensor of masks"
            return self.forward_features([images], [masks])[0]
        assert not isinstance(masks, Tensor), "a list of image batches takes a list of masks"
        tokens, groups = self.embed_packed(images, [None] * len(images) if masks is None else masks)
        for block in self.blocks:
            tokens = block(tokens, groups)
        return self.unpack(tokens, groups)

    def forward(
        self, images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Do what `forward_features` does: a backbone has no head of its own."""
        return self.forward_features(images, masks)  # type: ignore[arg-type]  # the overloads pair the two arguments

    def forward_selected(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        selected: Sequence[SelectedPatches | None],
        generator: torch.Generator | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the class tokens (B, D) and the selected patch tokens (M, D) of each image batch.

        They are those of `forward_features`, for less work: the last block computes them alone.

        Args:
            images, masks: as in `forward_features`, as lists.
            selected: the patches of each batch, or None for no patch; padding gets the result of any token.
            generator: what stochastic depth draws from; None: torch's own.
        """
        tokens, groups = self.embed_packed(images, masks)
        selections, start = [], 0
        for patches, group in zip(selected, groups, strict=True):
            num_patches = group[1] - 1 - self.num_register_tokens
            selections.append(selection(patches, group, num_patches=num_patches, start=start, device=tokens.device))
            start += group[0] * group[1]
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            subsets = block.drop_path_subsets(tokens, groups, generator)
            tokens = block(tokens, groups, selections if number == self.depth else None, subsets)
        rows = normed(self.norm, tokens)  # (R, D)
        parts = torch.split(rows, [len(chosen.rows) for chosen in selections])
        return [(part[:sequences], part[sequences:]) for part, (sequences, _) in zip(parts, groups, strict=True)]

    @overload
    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, *, norm: bool = True
    ) -> tuple[Tensor, ...]: ...

    @overload
    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: Literal[True] = ...,
        norm: bool = True,
    ) -> tuple[tuple[Tensor, Tensor], ...]: ...

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Return the patch tokens after some of the blocks, in the order of the blocks.

        Args:
            images: (B, C, H, W).
            n: the last n blocks, or block numbers from 0.
            reshape: return (B, D, H / patch size, W / patch size) instead of (B, N, D).
            return_class_token: return pairs of patch tokens and class token (B, D).
            norm: apply the final norm to the tokens of every block.

        Raises:
            ToolkitError: if a block is named that the model does not have.

        Source: `get_intermediate_layers` of the official code (dinov2/models/vision_transformer.py).
        """
        blocks = range(self.depth - n, self.depth) if isinstance(n, int) else sorted(n)
        if not blocks or blocks[0] < 0 or blocks[-1] >= self.depth:
            raise ToolkitError(f"layers {n} are not within the model's {self.depth} blocks; name 0 to depth - 1")
        tokens, groups = self.embed_packed([images], [None])
        outputs = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, groups)
            if number in blocks:
                outputs.append((normed(self.norm, tokens) if norm else tokens).view(*groups[0], -1))  # (B, n, D)
        patches = [output[:, 1 + self.num_register_tokens :] for output in outputs]
        if reshape:
            grid = [side // self.patch_size for side in images.shape[2:]]
            patches = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in patches]
        if return_class_token:
            return tuple((tokens, output[:, 0]) for tokens, output in zip(patches, outputs, strict=True))
        return tuple(patches)
