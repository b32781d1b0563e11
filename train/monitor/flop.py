"""How many floating-point operations a training step takes, and how many a GPU can do a second.

Shapes: 2 global and L local crops of an image; n tokens of a crop, of which a loss reads r; D embed_dim, K prototypes.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...models.block import Block
from ...models.head import ProjectionHead
from ...models.vit import VisionTransformer
from ..config import TrainConfig
from ..engine.checkpoint import TrainedModel
from ..objective.multi_student import MultiStudent
from ..objective.networks import backbone_of
from ..objective.ssl_model import SSLModel
from .metrics import Throughput

BACKWARD = 2  # times a forward pass, for the gradients of inputs and of weights
# Operations a second of dense bfloat16 products by the makers' data sheets, in 1e12; the first name that fits counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


@dataclass(frozen=True)
class Crops:
    """The crops of one size that a micro-batch has of each image."""

    number: int
    num_tokens: int  # n, class and register tokens included
    num_read: float  # r, on average

    @property
    def tokens(self) -> int:
        """Return how many tokens an image has in them."""
        return self.number * self.num_tokens

    @property
    def read(self) -> float:
        """Return how many of them a loss reads."""
        return self.number * self.num_read


def crops_of(config: TrainConfig, *, is_masked: bool) -> tuple[Crops, Crops]:
    """Return the global and the local crops of an image; without masks a loss reads all tokens of global ones."""
    extra = 1 + config.num_register_tokens
    num_patches = (config.global_crop_size_px // config.patch_size) ** 2
    num_local_patches = (config.local_crop_size_px // config.patch_size) ** 2
    share = config.mask_probability * sum(config.mask_ratio) / 2 if is_masked else 1.0
    global_crops = Crops(2, extra + num_patches, 1 + share * num_patches)
    return global_crops, Crops(config.num_local_crops, extra + num_local_patches, 1.0)


def flop_per_image(config: TrainConfig, model: TrainedModel) -> float:
    """Return the floating-point operations of a training step for one image: 2 for a multiplication and its addition.

    Matrix products are counted: of the students forward and backward, of the teacher forward. Branches that stochastic
    depth skips cost nothing; nor do, in the last block and the heads, tokens that no loss reads.
    """
    is_masked = isinstance(model, SSLModel)
    crops = crops_of(config, is_masked=is_masked)
    total = 0.0
    for student in students(model):
        keep = 1 - config.drop_path
        forward = sum(backbone_flop(backbone_of(student), kind, keep, only_read=is_masked) for kind in crops)
        again = forward if config.activation_checkpointing == "full" else 0.0
        forward += sum(kind.read for kind in crops) * head_flop(student)
        total += (1 + BACKWARD) * forward + again
    teacher = model.teacher if isinstance(model, SSLModel) else model.frozen.networks
    total += backbone_flop(backbone_of(teacher), crops[0], 1.0, only_read=is_masked)
    return total + crops[0].read * head_flop(teacher)


def students(model: TrainedModel) -> list[nn.ModuleDict]:
    """Return the networks of each student."""
    return [each.student for each in (model.models.values() if isinstance(model, MultiStudent) else [model])]


def feed_forward(backbone: VisionTransformer) -> tuple[nn.Linear, nn.Linear]:
    """Return the two layers of the feed-forward of any block."""
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    return block.mlp.layers


def backbone_flop(backbone: VisionTransformer, crops: Crops, keep: float, *, only_read: bool) -> float:
    """Return the operations of a forward pass for the crops of one size of an image.

    Args:
        keep: share of the sequences for which a branch is computed.
        only_read: whether the last block is computed for the tokens alone that are read.
    """
    dim, tokens = backbone.embed_dim, crops.tokens
    hidden = sum(layer.weight.numel() for layer in feed_forward(backbone))
    block: float = 2 * tokens * (4 * dim**2 + hidden) + 4 * tokens * crops.num_tokens * dim
    last = block
    if only_read:
        # Keys and values of all tokens; queries, projection and feed-forward of those that are read.
        last = 2 * tokens * 2 * dim**2 + 2 * crops.read * (2 * dim**2 + hidden)
        last += 4 * crops.read * crops.num_tokens * dim
    patches = 2 * tokens * dim * backbone.in_chans * backbone.patch_size**2
    return patches + keep * ((backbone.depth - 1) * block + last)


def head_of(networks: nn.ModuleDict) -> ProjectionHead | None:
    """Return the first head: class and patch tokens may have one each, of about the same size."""
    return next((network for network in networks.values() if isinstance(network, ProjectionHead)), None)


def head_flop(networks: nn.ModuleDict) -> float:
    """Return the operations of one token in a head."""
    head = head_of(networks)
    return 0.0 if head is None else 2 * sum(weight.numel() for weight in head.parameters() if weight.ndim == 2)


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """Return the operations a second that a GPU can do, None for an unknown one; float32 as TF32, half of bfloat16."""
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12 / (2 if mixed_precision == "no" else 1)


def throughput_of(config: TrainConfig, model: TrainedModel, device: torch.device, num_processes: int) -> Throughput:
    """Return a clock that knows what a step computes and, on a GPU of PEAK_TFLOPS, what the devices can."""
    # Work that is done twice to save memory does not count.
    flop = flop_per_image(replace(config, activation_checkpointing="none"), model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, config.mixed_precision)
    return Throughput(flop, None if peak is None else num_processes * peak, device)
