"""Vision transformers by the name of their architecture, as `arch` gives it."""

from dataclasses import dataclass

from ..errors import ToolkitError, nearest
from .block import Ffn
from .vit import VisionTransformer


@dataclass(frozen=True)
class Architecture:
    """The four numbers that `--arch` names; everything else about a model (patch size, registers, ...) is apart."""

    embed_dim: int
    depth: int
    num_heads: int
    ffn: Ffn


ARCHITECTURES = {
    "vit_tiny": Architecture(embed_dim=192, depth=12, num_heads=3, ffn="mlp"),
    "vit_small": Architecture(embed_dim=384, depth=12, num_heads=6, ffn="mlp"),
    "vit_base": Architecture(embed_dim=768, depth=12, num_heads=12, ffn="mlp"),
    "vit_large": Architecture(embed_dim=1024, depth=24, num_heads=16, ffn="mlp"),
    "vit_giant2": Architecture(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}


def build_vit(
    arch: str,
    *,
    patch_size: int = 14,
    depth: int | None = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    ffn: Ffn | None = None,
    num_register_tokens: int = 0,
    in_chans: int = 3,
    img_size: int | None = None,
    layer_scale: float = 1e-5,
    drop_path: float = 0.0,
    pos_embed_antialias: bool = False,
    pos_embed_offset: float = 0.1,
) -> VisionTransformer:
    """Return a freshly initialised ViT of a named architecture (arguments as in `VisionTransformer`).

    `depth`, `embed_dim`, `num_heads` and `ffn` None mean the architecture's own; `img_size` None means 37 patches a
    side, as the released weights have.

    Raises:
        ToolkitError: if there is no such architecture.
    """
    if arch not in ARCHITECTURES:
        near = nearest(arch, ARCHITECTURES)
        raise ToolkitError(f"no architecture named {arch!r}{near}; choose one of {', '.join(ARCHITECTURES)}")
    chosen = ARCHITECTURES[arch]
    return VisionTransformer(
        patch_size=patch_size,
        embed_dim=chosen.embed_dim if embed_dim is None else embed_dim,
        depth=chosen.depth if depth is None else depth,
        num_heads=chosen.num_heads if num_heads is None else num_heads,
        ffn=ffn or chosen.ffn,
        num_register_tokens=num_register_tokens,
        in_chans=in_chans,
        img_size=37 * patch_size if img_size is None else img_size,
        layer_scale=layer_scale,
        drop_path=drop_path,
        pos_embed_antialias=pos_embed_antialias,
        pos_embed_offset=pos_embed_offset,
    )
