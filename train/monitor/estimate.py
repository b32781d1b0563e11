"""What a run will cost, before it starts: arithmetic, memory and time.

Shapes: B images of this process's step, b of a part of it, 2 global and L local crops of each; n tokens of a crop, of
which r are read by a loss; D embed_dim, F numbers a token between the linear layers of the feed-forward, K prototypes.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ... import console
from ...features.extract.extract import best_device
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
from ..objective.networks import update_teacher
from ..objective.ssl_model import SSLModel

BACKWARD = 2  # times a forward pass, for the gradients of inputs and of weights
FIRST_STEP_BYTES = 130 << 20  # measured on a CPU: what torch loads, and does not give back, in its first step
ALLOCATOR = 1.2  # measured on a CPU: resident memory over what tensors take
TRIAL_DEPTH, TRIAL_IMAGES, TRIAL_STEPS = 2, 8, 3  # chosen; the first step warms up


@dataclass(frozen=True)
class Crops:
    """The crops of one kind that a part holds of each image."""

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
    num_patches, num_local_patches = (
        (size // config.patch_size) ** 2 for size in (config.global_crop_size_px, config.local_crop_size_px)
    )
    share = config.mask_probability * sum(config.mask_ratio) / 2 if is_masked else 1.0
    return (
        Crops(2, extra + num_patches, 1 + share * num_patches),
        Crops(config.num_local_crops, extra + num_local_patches, 1.0),
    )


def flop_per_image(config: TrainConfig, model: TrainedModel) -> float:
    """Return the floating-point operations of a training step for one image: 2 for a multiplication and its addition.

    Counted are matrix products: those of the student forward and backward, those of whoever teaches forward. Skipped
    branches (stochastic depth) and tokens that no loss reads cost nothing, in the last block and the heads.
    """
    is_masked = isinstance(model, SSLModel)
    crops = crops_of(config, is_masked=is_masked)
    kept = 1 - config.drop_path
    total = 0.0
    for student in _students(model):
        forward = sum(_backbone_flop(_backbone(student), each, kept, only_read=is_masked) for each in crops)
        again = forward if config.activation_checkpointing == "full" else 0.0
        forward += sum(each.read for each in crops) * _head_flop(student)
        total += (1 + BACKWARD) * forward + again
    teaching = model.teacher if isinstance(model, SSLModel) else model.frozen.networks
    teacher = _backbone_flop(_backbone(teaching), crops[0], 1.0, only_read=is_masked)
    return total + teacher + crops[0].read * _head_flop(teaching)


def _students(model: TrainedModel) -> list[nn.ModuleDict]:
    return [each.student for each in (model.models.values() if isinstance(model, MultiStudent) else [model])]


def _backbone_flop(backbone: VisionTransformer, crops: Crops, kept: float, *, only_read: bool) -> float:
    dim, tokens = backbone.embed_dim, crops.tokens
    feed_forward = sum(layer.weight.numel() for layer in backbone.blocks[0].modules() if isinstance(layer, nn.Linear))
    feed_forward -= 4 * dim**2  # what is not attention's
    block: float = 2 * tokens * (4 * dim**2 + feed_forward) + 4 * tokens * crops.num_tokens * dim
    last = block
    if only_read:
        # Keys and values of all tokens; queries, projection and feed-forward of those that are read.
        last = 2 * tokens * 2 * dim**2 + 2 * crops.read * (2 * dim**2 + feed_forward)
        last += 4 * crops.read * crops.num_tokens * dim
    patches = 2 * tokens * dim * backbone.in_chans * backbone.patch_size**2
    return patches + kept * ((backbone.depth - 1) * block + last)


def _head_flop(modules: nn.ModuleDict) -> float:
    """Return the operations of one token in a head; of the first, where class and patch tokens have one each."""
    head = next((module for module in modules.values() if isinstance(module, ProjectionHead)), None)
    if head is None:
        return 0.0
    return 2 * sum(weight.numel() for weight in head.parameters() if weight.ndim == 2)


def memory_bytes(config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float) -> float:
    """Return the most memory that one process will hold, in bytes.

    The formula, with numbers of 4 bytes (2 for what matrix products read and give under bf16):

    - `base_bytes` of the process itself before it trains, with the images it keeps decoded; 130 MiB that torch takes
      in its first step
    - 4 (1 + 2) bytes a trained weight (itself and Adam's moments) and 4 each of any other; the gradients' 4 when the
      step has several parts or little is kept, for otherwise they come as what was kept goes
    - the crops of the step
    - teacher's targets, 4 K bytes for the class token of each global crop, twice, and each masked patch
    - what the student keeps for going backward, of the largest part: a block keeps (9 D + 2 F) numbers a token
      (inputs and outputs of two norms, queries, keys and values, attention's result twice, the feed-forward's inside
      before and after its activation) and its scaled last layers; with activation_checkpointing=selective (7 D + F),
      with full D; stochastic depth keeps its share, and the update of each branch besides (2 D); the last block keeps
      that of the tokens read, and keys and values of all
    - logits of the student, K numbers a row, and twice as much for their gradients
    - a block once more while it goes backward, and again where it is made again
    - a fifth more of all that was kept, which the allocator loses; on a CPU a tenth more of everything, by which the
      process may grow from step to step (`TidyHeap`)
    """
    crops = crops_of(config, is_masked=isinstance(model, SSLModel))
    size = max(batch_sizes(config.batch_size).sizes) // num_processes
    part_size = min(config.micro_batch_size or size, size)
    copies = 4 if config.sequential_views or part_size < size or config.activation_checkpointing == "full" else 3
    weights = sum(
        weight.numel() * weight.element_size() * (copies if weight.requires_grad else 1)
        for weight in model.parameters()
    )
    pixels = sum(
        each.number * side**2
        for each, side in zip(crops, (config.global_crop_size_px, config.local_crop_size_px), strict=True)
    )
    inputs = 4 * config.in_chans * size * pixels
    head = next((module for module in model.student.values() if isinstance(module, ProjectionHead)), None)
    num_prototypes = 0 if head is None else head.num_prototypes
    targets = 4 * size * num_prototypes * (2 * crops[0].number + crops[0].read)
    kinds = [list(crops)]
    if config.sequential_views:
        kinds = [[replace(crops[0], number=1)], [replace(crops[1], number=(crops[1].number + 1) // 2)]]
    is_masked = isinstance(model, SSLModel)
    kept = max(
        part_size * sum(_kept_bytes(config, _backbone(student), kind, is_masked) for student in _students(model))
        + part_size * 3 * 4 * num_prototypes * sum(each.read for each in kind)
        for kind in kinds
    )
    of_step = weights + ALLOCATOR * (inputs + targets + kept)
    return GROWTH * (base_bytes + FIRST_STEP_BYTES + of_step) if base_bytes else of_step


def _kept_bytes(config: TrainConfig, backbone: VisionTransformer, crops: list[Crops], is_masked: bool) -> float:
    """Return what an image's crops take in the student's backbone between forward and backward, at its peak."""
    dim, kept = backbone.embed_dim, 1 - config.drop_path
    number = 2 if config.mixed_precision == "bf16" else 4
    hidden = _hidden_numbers(backbone)
    updates = 2 * dim if config.drop_path else 0
    whole = 9 * dim + 2 * hidden + updates
    block = {"none": whole, "selective": 7 * dim + hidden + updates, "full": dim}[config.activation_checkpointing]
    tokens, read = sum(each.tokens for each in crops), sum(each.read for each in crops)
    per_block = block if config.activation_checkpointing == "full" else kept * block
    last = kept * (4 * dim * tokens + whole * read) if is_masked else per_block * tokens
    backward = kept * whole * tokens * (2 if config.activation_checkpointing == "full" else 1)
    streams = 2 * dim * tokens
    return number * (tokens * per_block * (backbone.depth - 1) + last + backward + streams)


def _hidden_numbers(backbone: VisionTransformer) -> int:
    """Return F, the numbers a token has between the feed-forward's linear layers."""
    widths = [layer.out_features for layer in backbone.blocks[0].modules() if isinstance(layer, nn.Linear)]
    return max(widths[2:])  # after attention's two


def _backbone(modules: nn.ModuleDict) -> VisionTransformer:
    backbone = modules["backbone"]
    assert isinstance(backbone, VisionTransformer)
    return backbone


def measured_flops(config: TrainConfig, device: torch.device) -> float:
    """Return the operations a second that this process reaches in a few steps of a shallow model of this width.

    Random crops, everything else as in training, two blocks: so that it takes seconds whatever the model's size.
    """
    shallow = replace(config, depth=min(TRIAL_DEPTH, config.depth or TRIAL_DEPTH), activation_checkpointing="none")
    model = build_model(shallow).to(device).train()
    optimizer = build_optimizer(model.student)
    num_images = min(TRIAL_IMAGES, batch_sizes(config.batch_size).at(0))
    crops = [
        torch.randn(number * num_images, config.in_chans, side, side, device=device)
        for number, side in ((2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px))
    ]
    masks = make_masks(0, num_images, config, 0, 1).to(device)
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

    Args:
        model: may be on the meta device.
        base_bytes: what a process holds beside it, not on a GPU: libraries, the manifest, decoded images.
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
    minutes = seconds / 60
    for unit, length in (("days", 48 * 60), ("hours", 120), ("minutes", 2)):
        if minutes >= length:
            return f"{minutes / {'days': 1440, 'hours': 60, 'minutes': 1}[unit]:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
