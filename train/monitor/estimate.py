"""Estimates of what a run will cost: operations, memory and time.

Shapes: 2 global and L local crops of an image; n tokens of a crop, of which a loss reads r; D embed_dim, F numbers a
token between the linear layers of the feed-forward, K prototypes.
"""

import math
import re
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
from ...store.memory import free_memory
from ..config import TrainConfig
from ..data.multicrop import decoded_side_px, make_masks
from ..engine.accumulate import halved, microbatch_backward
from ..engine.build import build_model
from ..engine.checkpoint import TrainedModel
from ..engine.optimizer import build_optimizer
from ..engine.schedules import batch_sizes
from ..objective.micro_batch import split_microbatches
from ..objective.multi_student import MultiStudent
from ..objective.networks import backbone_of, update_teacher
from ..objective.ssl_model import SSLModel
from .metrics import Throughput

BACKWARD = 2  # times a forward pass, for the gradients of inputs and of weights
FIRST_STEP_BYTES = 130 << 20  # measured on a CPU: what torch loads, and does not give back, in its first step
ALLOCATOR = 1.2  # measured on a CPU: resident memory over what tensors take
GPU_ALLOCATOR = 1.1  # chosen, to be measured on GPUs: reserved memory over what tensors take
GPU_CONTEXT_BYTES = 1 << 30  # chosen, to be measured: CUDA's context, cuBLAS's and NCCL's buffers
SPARED = 0.9  # of the free memory is used under micro_batch_size=auto; chosen
CANVAS_ASPECT = 2.0  # chosen: width over height of the pixels that a batch's images lie in
TRIAL_DEPTH, TRIAL_IMAGES, TRIAL_STEPS = 2, 8, 3  # chosen; the first step warms up
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

    `base_bytes` is what a process on a CPU holds before it trains, with the images that it keeps decoded; 0 stands for
    a GPU. On it come torch's first step (a CPU) or the GPU's context and the libraries' buffers, and then:

    - all through the run: the weights, the teacher's and Adam's moments, the crops
    - at the same time the largest of these: augmentation, the teacher's pass, one micro-batch of the student's pass,
      each with what is kept from the one before

    Times what the allocator loses; on a CPU a tenth of everything, by which the process may grow (`cpu.TidyHeap`).
    Sharded weights (FSDP) take less than this.
    """
    is_masked = isinstance(model, SSLModel)
    crops = crops_of(config, is_masked=is_masked)
    size = max(batch_sizes(config.batch_size).sizes) // num_processes
    micro_batch_size = min(size if config.micro_batch_size in (0, "auto") else int(config.micro_batch_size), size)
    pixels = 2 * config.global_crop_size_px**2 + config.num_local_crops * config.local_crop_size_px**2
    inputs = 4 * config.in_chans * size * pixels
    passes = [list(crops)]
    if config.sequential_views:
        passes = [[replace(crops[0], number=1)], [replace(crops[1], number=(crops[1].number + 1) // 2)]]
    students = _students(model)
    targets = size * sum(_target_bytes(crops[0], student) for student in students)
    student = micro_batch_size * max(
        sum(
            _kept_bytes(config, student, kinds, is_masked) + _backward_bytes(config, student, kinds)
            for student in students
        )
        for kinds in passes
    )
    has_parts = config.sequential_views or micro_batch_size < size or config.activation_checkpointing == "full"
    of_step = _weight_bytes(config, model, keeps_gradients=has_parts or num_processes > 1) + inputs
    stages = (size * _augmentation_bytes(config), size * _teacher_bytes(config, model, crops[0]), targets + student)
    if base_bytes:
        return GROWTH * (base_bytes + FIRST_STEP_BYTES + ALLOCATOR * (of_step + max(stages)))
    return GPU_CONTEXT_BYTES + GPU_ALLOCATOR * (of_step + max(stages))


def _weight_bytes(config: TrainConfig, model: TrainedModel, *, keeps_gradients: bool) -> float:
    """Return the bytes of all weights: a trained one has two moments, and perhaps its gradient all the time.

    Gradients stay from one micro-batch to the next, where backward computes blocks again, and as DDP's buckets;
    otherwise they take the place of activations. Under bf16 autocast keeps a half copy of trained weights for backward.
    """
    total = 0.0
    for weight in model.parameters():
        copies = 1 + 2 * weight.requires_grad + (weight.requires_grad and keeps_gradients)
        half = 2 if weight.requires_grad and config.mixed_precision == "bf16" else 0
        total += weight.numel() * (weight.element_size() * copies + half)
    return total


def _augmentation_bytes(config: TrainConfig) -> float:
    """Return the bytes of an image while its crops are cut: the decoded pixels, whole and squeezed along one axis.

    The canvas of a batch is as wide as its widest image; CANVAS_ASPECT is assumed.
    """
    height, side = decoded_side_px(config), config.global_crop_size_px
    width = CANVAS_ASPECT * height
    # In 8 bits, in float32, and squeezed twice; the colours of crops in a copy.
    return config.in_chans * ((1 + 4) * height * width + 2 * 4 * side * width + 2 * 4 * side**2)


def _teacher_bytes(config: TrainConfig, model: TrainedModel, crops: Crops) -> float:
    """Return the bytes of an image at the peak of the teacher's pass: one block, or logits and Sinkhorn's scores.

    A block has the tokens, their norms and the feed-forward before and after its activation; of logits there are the
    product, itself in float32, and the scores over them.
    """
    networks = model.teacher if isinstance(model, SSLModel) else model.frozen.networks
    backbone, number = backbone_of(networks), _number_bytes(config)
    hidden = _feed_forward(backbone)[0].out_features
    block = crops.tokens * ((3 * 4 + 2 * number) * backbone.embed_dim + 2 * number * hidden)
    head = _head_of(networks)
    return max(block, 0 if head is None else crops.read * head.num_prototypes * (number + 2 * 4))


def _target_bytes(crops: Crops, student: nn.ModuleDict) -> float:
    """Return the bytes of an image's targets: K numbers for each token that is read, and twice for class tokens."""
    head = _head_of(student)
    return 0 if head is None else 4 * head.num_prototypes * (2 * crops.number + crops.read)


def _number_bytes(config: TrainConfig) -> int:
    """Return the bytes of a number that enters or leaves a matrix product."""
    return 2 if config.mixed_precision == "bf16" else 4


def _kept_bytes(config: TrainConfig, student: nn.ModuleDict, crops: list[Crops], is_masked: bool) -> float:
    """Return the bytes of an image's activations that the student's backbone keeps for backward.

    A token and block keep the inputs of two norms, in float32 always, and 7 D + 2 F numbers more: the norms' outputs,
    queries, keys and values, attention's result twice, the feed-forward before and after its activation. With
    activation_checkpointing=selective the block's input and the products, 6 D + F; with full the input alone.
    Stochastic depth keeps its share, and 2 D for the updates. The last block keeps those of the tokens that are read,
    and keys and values of all.
    """
    backbone = backbone_of(student)
    dim, keep, number = backbone.embed_dim, 1 - config.drop_path, _number_bytes(config)
    updates = 2 * number * dim if config.drop_path else 0
    whole = _whole_block_bytes(config, backbone)
    match config.activation_checkpointing:
        case "none":
            per_block = keep * (whole + updates)
        case "selective":
            per_block = keep * (number * (7 * dim + _feed_forward(backbone)[0].out_features) + updates)
        case "full":
            per_block = number * dim
    tokens, read = sum(kind.tokens for kind in crops), sum(kind.read for kind in crops)
    last = keep * ((4 + 3 * number) * dim * tokens + (whole + updates) * read) if is_masked else per_block * tokens
    return tokens * per_block * (backbone.depth - 1) + last


def _backward_bytes(config: TrainConfig, student: nn.ModuleDict, crops: list[Crops]) -> float:
    """Return the bytes of an image that backward needs besides: logits and their gradients, or later those of a block.

    A block is there once more while backward passes it, twice where it is computed again.
    """
    backbone, head, number = backbone_of(student), _head_of(student), _number_bytes(config)
    tokens, read = sum(kind.tokens for kind in crops), sum(kind.read for kind in crops)
    logits = 0 if head is None else 2 * number * head.num_prototypes * read
    again = 2 if config.activation_checkpointing == "full" else 1
    block = tokens * (
        (1 - config.drop_path) * again * _whole_block_bytes(config, backbone) + 2 * number * backbone.embed_dim
    )
    return max(logits, block)


def _whole_block_bytes(config: TrainConfig, backbone: VisionTransformer) -> float:
    """Return the bytes of a token in a block that nothing is computed again of, as in `_kept_bytes`."""
    hidden = _feed_forward(backbone)[0].out_features
    return 2 * 4 * backbone.embed_dim + _number_bytes(config) * (7 * backbone.embed_dim + 2 * hidden)


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """Return the operations a second that a GPU can do, None for an unknown one; float32 as TF32, half of bfloat16."""
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12 / (1 if mixed_precision == "bf16" else 2)


def throughput_of(config: TrainConfig, model: TrainedModel, device: torch.device, num_processes: int) -> Throughput:
    """Return a clock that knows what a step computes and, on a GPU of PEAK_TFLOPS, what the devices can."""
    # Work that is done twice to save memory does not count.
    flop = flop_per_image(replace(config, activation_checkpointing="none"), model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, config.mixed_precision)
    return Throughput(flop, None if peak is None else num_processes * peak)


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
    flop = flop_per_image(config, model)
    memory = memory_bytes(config, model, num_processes, base_bytes)
    speed = measured_flops(config, device)
    images = batch_sizes(config.batch_size).images_until(config.steps)
    workers = num_processes if device.type == "cuda" else 1  # processes share this machine's cores
    console.say(
        f"{flop / 1e9:,.2f} GFLOP an image; about {memory / 2**20:,.0f} MiB of memory a process at the peak; "
        f"about {_duration(images * flop / (workers * speed))}, if data are there in time, at the "
        f"{speed / 1e9:,.{0 if speed > 1e10 else 1}f} GFLOP/s that a trial of a few steps reached here"
    )


def say_memory(
    config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float, free_bytes: float
) -> None:
    """Say how much memory a process will take at the peak, beside what is free for it; warn where that is less."""
    wanted = memory_bytes(config, model, num_processes, base_bytes)
    line = f"memory: about {wanted / 2**20:,.0f} MiB a process at the peak, {free_bytes / 2**20:,.0f} MiB free"
    if wanted <= free_bytes:
        console.say(line)
    else:
        console.warn(f"{line}; set sequential_views=true, activation_checkpointing=selective or micro_batch_size=auto")


def fitted(
    config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float, free_bytes: float
) -> TrainConfig:
    """Return the settings with a number for micro_batch_size=auto: all images, or half as often as memory asks for.

    A tenth of the free memory is spared. Where not even the smallest fits by the estimate, it is taken all the same.
    """
    if config.micro_batch_size != "auto":
        return config
    num_images = max(batch_sizes(config.batch_size).sizes) // num_processes
    size: int | None = num_images
    while size is not None:
        config = replace(config, micro_batch_size=size)
        if memory_bytes(config, model, num_processes, base_bytes) <= SPARED * free_bytes:
            break
        size = halved(size, num_images, 2 if config.koleo_weight else 1)
    return config


def free_bytes_of(device: torch.device, base_bytes: float, num_processes: int) -> float:
    """Return the memory that this process may take: what its GPU has free, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return base_bytes + free_memory() / num_processes


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
