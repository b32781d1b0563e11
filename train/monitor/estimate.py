"""Estimates of what a run will cost: operations, memory and time.

Shapes: 2 global and L local crops of an image; n tokens of a crop, of which a loss reads r; D embed_dim, F numbers a
token between the linear layers of the feed-forward, K prototypes.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ... import console
from ...features.extract.extract import best_device
from ...models.block import Block
from ...models.cpu import GROWTH
from ...models.head import ProjectionHead
from ...models.vit import VisionTransformer
from ..config import TrainConfig
from ..data.multicrop import make_masks
from ..engine.accumulate import microbatch_backward
from ..engine.build import build_model
from ..engine.checkpoint import TrainedModel
from ..engine.optimizer import build_optimizer
from ..engine.schedules import batch_sizes
from ..objective.micro_batch import split_microbatches
from ..objective.multi_student import MultiStudent
from ..objective.networks import backbone_of, update_teacher
from ..objective.ssl_model import SSLModel

BACKWARD = 2  # times a forward pass, for the gradients of inputs and of weights
FIRST_STEP_BYTES = 130 << 20  # measured on a CPU: what torch loads, and does not give back, in its first step
ALLOCATOR = 1.2  # measured on a CPU: resident memory over what tensors take
TRIAL_DEPTH, TRIAL_IMAGES, TRIAL_STEPS = 2, 8, 3  # chosen; the first step warms up


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
    for student in _students(model):
        keep = 1 - config.drop_path
        forward = sum(_backbone_flop(backbone_of(student), kind, keep, only_read=is_masked) for kind in crops)
        again = forward if config.activation_checkpointing == "full" else 0.0
        forward += sum(kind.read for kind in crops) * _head_flop(student)
        total += (1 + BACKWARD) * forward + again
    teacher = model.teacher if isinstance(model, SSLModel) else model.frozen.networks
    total += _backbone_flop(backbone_of(teacher), crops[0], 1.0, only_read=is_masked)
    return total + crops[0].read * _head_flop(teacher)


def _students(model: TrainedModel) -> list[nn.ModuleDict]:
    return [each.student for each in (model.models.values() if isinstance(model, MultiStudent) else [model])]


def _feed_forward(backbone: VisionTransformer) -> tuple[nn.Linear, nn.Linear]:
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    return block.mlp.layers


def _backbone_flop(backbone: VisionTransformer, crops: Crops, keep: float, *, only_read: bool) -> float:
    dim, tokens = backbone.embed_dim, crops.tokens
    feed_forward = sum(layer.weight.numel() for layer in _feed_forward(backbone))
    block: float = 2 * tokens * (4 * dim**2 + feed_forward) + 4 * tokens * crops.num_tokens * dim
    last = block
    if only_read:
        # Keys and values of all tokens; queries, projection and feed-forward of those that are read.
        last = 2 * tokens * 2 * dim**2 + 2 * crops.read * (2 * dim**2 + feed_forward)
        last += 4 * crops.read * crops.num_tokens * dim
    patches = 2 * tokens * dim * backbone.in_chans * backbone.patch_size**2
    return patches + keep * ((backbone.depth - 1) * block + last)


def _head_of(networks: nn.ModuleDict) -> ProjectionHead | None:
    """Return the first head: class and patch tokens may have one each, of about the same size."""
    return next((network for network in networks.values() if isinstance(network, ProjectionHead)), None)


def _head_flop(networks: nn.ModuleDict) -> float:
    """Return the operations of one token in a head."""
    head = _head_of(networks)
    return 0.0 if head is None else 2 * sum(weight.numel() for weight in head.parameters() if weight.ndim == 2)


def memory_bytes(config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float) -> float:
    """Return the most memory that one process will hold, in bytes.

    The sum of these, where a number takes 4 bytes (inputs and outputs of matrix products 2 under bf16):

    - `base_bytes` that the process holds before it trains, with the images it keeps decoded; 130 MiB for torch's first
      step
    - 3 numbers for a trained weight (itself and Adam's moments), 1 for any other; a fourth for the gradient where the
      step has several micro-batches or backward computes blocks again; otherwise gradients replace activations
    - the crops of the step
    - teacher's targets: K numbers for the class token of each global crop, twice, and for each masked patch
    - activations of the largest micro-batch: (9 D + 2 F) numbers a token and block (inputs and outputs of two norms,
      queries, keys and values, attention's result twice, the feed-forward before and after its activation); (7 D + F)
      with activation_checkpointing=selective; D with full. Stochastic depth keeps its share, and 2 D for the updates.
      The last block keeps those of the tokens that are read, and keys and values of all
    - logits of the student, K numbers a row, and twice as much for their gradients
    - one block once more while backward passes it, twice where it is computed again
    - a fifth of the activations, which the allocator loses; on a CPU a tenth of everything, by which the process may
      grow (`cpu.TidyHeap`)
    """
    is_masked = isinstance(model, SSLModel)
    crops = crops_of(config, is_masked=is_masked)
    size = max(batch_sizes(config.batch_size).sizes) // num_processes
    micro_batch_size = min(config.micro_batch_size or size, size)
    copies = 4 if config.sequential_views or micro_batch_size < size or config.activation_checkpointing == "full" else 3
    weights = sum(
        weight.numel() * weight.element_size() * (copies if weight.requires_grad else 1)
        for weight in model.parameters()
    )
    pixels = 2 * config.global_crop_size_px**2 + config.num_local_crops * config.local_crop_size_px**2
    inputs = 4 * config.in_chans * size * pixels
    head = _head_of(model.student)
    num_prototypes = 0 if head is None else head.num_prototypes
    targets = 4 * size * num_prototypes * (2 * crops[0].number + crops[0].read)
    passes = [list(crops)]
    if config.sequential_views:
        passes = [[replace(crops[0], number=1)], [replace(crops[1], number=(crops[1].number + 1) // 2)]]
    kept = micro_batch_size * max(
        sum(_kept_bytes(config, backbone_of(student), kinds, is_masked) for student in _students(model))
        + 3 * 4 * num_prototypes * sum(kind.read for kind in kinds)
        for kinds in passes
    )
    of_step = weights + ALLOCATOR * (inputs + targets + kept)
    return GROWTH * (base_bytes + FIRST_STEP_BYTES + of_step) if base_bytes else of_step


def _kept_bytes(config: TrainConfig, backbone: VisionTransformer, crops: list[Crops], is_masked: bool) -> float:
    """Return the bytes of an image's activations in the student's backbone at the peak."""
    dim, keep = backbone.embed_dim, 1 - config.drop_path
    number = 2 if config.mixed_precision == "bf16" else 4
    hidden = _feed_forward(backbone)[0].out_features
    updates = 2 * dim if config.drop_path else 0
    whole = 9 * dim + 2 * hidden + updates
    is_full = config.activation_checkpointing == "full"
    selective = 7 * dim + hidden + updates
    per_block = dim if is_full else keep * (selective if config.activation_checkpointing == "selective" else whole)
    tokens, read = sum(kind.tokens for kind in crops), sum(kind.read for kind in crops)
    last = keep * (4 * dim * tokens + whole * read) if is_masked else per_block * tokens
    backward = keep * whole * tokens * (2 if is_full else 1)
    streams = 2 * dim * tokens
    return number * (tokens * per_block * (backbone.depth - 1) + last + backward + streams)


def measured_flops(config: TrainConfig, device: torch.device) -> float:
    """Return the operations a second that this process reaches in a few steps of a shallow model of this width.

    Random crops and two blocks, everything else as in training, so that it takes seconds whatever the model's size.
    """
    shallow = replace(config, depth=min(TRIAL_DEPTH, config.depth or TRIAL_DEPTH), activation_checkpointing="none")
    model = build_model(shallow).to(device).train()
    optimizer = build_optimizer(model.student)
    num_images = min(TRIAL_IMAGES, batch_sizes(config.batch_size).at(0))
    crops = [
        torch.randn(number * num_images, config.in_chans, side, side, device=device)
        for number, side in ((2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px))
    ]
    masks = make_masks(np.arange(num_images), config)
    fastest = math.inf
    for _ in range(TRIAL_STEPS):
        start = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            step = model.teacher_targets(crops[0], crops[1] if len(crops[1]) else None, masks, teacher_temp=1.0)
            for batch in split_microbatches(step, sequential_views=config.sequential_views):
                microbatch_backward(model, batch, Tensor.backward, seed=0)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(model.teacher, model.student, 1.0)
        fastest = min(fastest, _now(device) - start)
    return num_images * flop_per_image(shallow, model) / fastest


def say_cost(config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float) -> None:
    """Say what a step computes, how much memory a process will take, and how long the run, by a trial on this machine.

    `model` may be on the meta device. A process holds `base_bytes` besides: libraries, the manifest, decoded images.
    """
    device = best_device()
    memory = memory_bytes(config, model, num_processes, 0.0 if device.type == "cuda" else base_bytes)
    flop = flop_per_image(config, model)
    speed = measured_flops(config, device)
    images = batch_sizes(config.batch_size).images_until(config.steps)
    workers = num_processes if device.type == "cuda" else 1  # processes share this machine's cores
    console.say(
        f"{flop / 1e9:,.2f} GFLOP an image; about {memory / 2**20:,.0f} MiB of memory a process at the peak; "
        f"about {_duration(images * flop / (workers * speed))}, if data are there in time, at the "
        f"{speed / 1e9:,.{0 if speed > 1e10 else 1}f} GFLOP/s that a trial of a few steps reached here"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
