"""How much memory a run will take at the peak, estimated, and the micro-batch with which it fits.

Shapes: 2 global and L local crops of an image; n tokens of a crop, of which a loss reads r; D embed_dim, F numbers a
token between the linear layers of the feed-forward, K prototypes.
"""

from dataclasses import replace

import torch
from torch import nn

from ... import console
from ...models.cpu import GROWTH
from ...models.vit import VisionTransformer
from ...store.memory import free_memory
from ..config import TrainConfig
from ..data.augment import CHUNK_BYTES
from ..data.multicrop import decoded_side_px
from ..engine.checkpoint import TrainedModel
from ..engine.fitting import halved
from ..engine.schedules import batch_sizes
from ..objective.losses import GPU_CHUNK_BYTES
from ..objective.networks import backbone_of
from ..objective.ssl_model import SSLModel
from .flop import Crops, crops_of, feed_forward, head_of, students

FIRST_STEP_BYTES = 130 << 20  # measured on a CPU: what torch loads, and does not give back, in its first step
ALLOCATOR = 1.2  # measured on a CPU: resident memory over what tensors take
GPU_ALLOCATOR = 1.1  # chosen, to be measured on GPUs: reserved memory over what tensors take
GPU_CONTEXT_BYTES = 1 << 30  # chosen, to be measured: CUDA's context, cuBLAS's and NCCL's buffers
SPARED = 0.9  # of the free memory is used under micro_batch_size=auto; chosen
IMAGE_ASPECT = 1.5  # chosen: the longer side of an image over the shorter, on average


def memory_bytes(config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float) -> float:
    """Return the most memory that one process will hold, in bytes.

    `base_bytes` is what a process on a CPU holds before it trains, with the images that it keeps decoded; 0 stands for
    a GPU. On it come torch's first step (a CPU) or the GPU's context and the libraries' buffers, and then:

    - all through the run: the weights, the teacher's and Adam's moments, the crops
    - at the same time the largest of these: augmentation, the teacher's pass, one micro-batch of the student's pass,
      each with what is kept from the one before; on a GPU augmentation beside any, for it makes the next step's crops

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
    # Of an image; a CPU's parts are small.
    chunk_bytes = 0.0 if base_bytes or config.compile else GPU_CHUNK_BYTES / micro_batch_size
    networks = students(model)
    targets = size * sum(_target_bytes(crops[0], student) for student in networks)
    student = micro_batch_size * max(
        sum(
            _kept_bytes(config, student, kinds, is_masked) + _backward_bytes(config, student, kinds, chunk_bytes)
            for student in networks
        )
        for kinds in passes
    )
    has_parts = config.sequential_views or micro_batch_size < size or config.activation_checkpointing == "full"
    of_step = _weight_bytes(config, model, keeps_gradients=has_parts or num_processes > 1) + inputs
    stages = _teacher_bytes(config, model, crops[0], size, micro_batch_size), targets + student
    augmentation = augmentation_bytes(config, size)
    if base_bytes:
        return GROWTH * (base_bytes + FIRST_STEP_BYTES + ALLOCATOR * (of_step + max(augmentation, *stages)))
    return GPU_CONTEXT_BYTES + GPU_ALLOCATOR * (of_step + max(stages) + inputs + augmentation)


def _weight_bytes(config: TrainConfig, model: TrainedModel, *, keeps_gradients: bool) -> float:
    """Return the bytes of all weights: a trained one has two moments, and perhaps its gradient all the time.

    Gradients stay from one micro-batch to the next, where backward computes blocks again, and as DDP's buckets;
    otherwise they take the place of activations. Autocast keeps a half copy of trained weights for backward.
    """
    total = 0.0
    for weight in model.parameters():
        copies = 1 + 2 * weight.requires_grad + (weight.requires_grad and keeps_gradients)
        half = 2 if weight.requires_grad and config.mixed_precision != "no" else 0
        total += weight.numel() * (weight.element_size() * copies + half)
    return total


def augmentation_bytes(config: TrainConfig, num_images: int) -> float:
    """Return the bytes that making a batch's crops takes beside them: the images, and the larger of two stages.

    Cutting turns a chunk of images to float32, squeezes it along one axis, twice, and has matrices of weights for both
    axes, those of the longer one six times while they are made. Colours take the crops of one size about twice.
    """
    height = decoded_side_px(config)
    width = IMAGE_ASPECT * height
    pixels = config.in_chans * num_images * height * width
    chunk = min(4 * pixels, CHUNK_BYTES)
    in_chunk = chunk / (4 * config.in_chans * height * width)  # images
    kinds = ((2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px))
    stages = [2.0 * 4 * config.in_chans * num_images * views * side**2 for views, side in kinds]
    for views, side in kinds:
        weights = 4 * in_chunk * views * side * (height + 6 * width)
        stages.append(chunk * (1 + 2 * side / height) + weights)
    return config.bit_depth // 8 * pixels + max(stages)


def _teacher_bytes(
    config: TrainConfig, model: TrainedModel, crops: Crops, num_images: int, micro_batch_size: int
) -> float:
    """Return the bytes at the peak of the teacher's pass: one block of a micro-batch, or the logits of all images.

    A block has the tokens, their norms and the feed-forward before and after its activation. Logits are in float32, on
    a CPU there are those of two halves beside the whole; a centre and softmax need one more matrix.
    """
    networks = model.teacher if isinstance(model, SSLModel) else model.frozen.networks
    backbone, number = backbone_of(networks), _number_bytes(config)
    hidden = feed_forward(backbone)[0].out_features
    block = micro_batch_size * crops.tokens * ((3 * 4 + 2 * number) * backbone.embed_dim + 2 * number * hidden)
    head = head_of(networks)
    logits = 0.0 if head is None else 4 * num_images * crops.read * head.num_prototypes
    matrices = 2 if config.centering == "sinkhorn_knopp" else 3
    return max(block + (logits if micro_batch_size < num_images else 0.0), matrices * logits)


def _target_bytes(crops: Crops, student: nn.ModuleDict) -> float:
    """Return the bytes of an image's targets: K numbers for each token that is read, and twice for class tokens."""
    head = head_of(student)
    return 0 if head is None else 4 * head.num_prototypes * (2 * crops.number + crops.read)


def _number_bytes(config: TrainConfig) -> int:
    """Return the bytes of a number that enters or leaves a matrix product."""
    return 4 if config.mixed_precision == "no" else 2


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
            per_block = keep * (number * (7 * dim + feed_forward(backbone)[0].out_features) + updates)
        case "full":
            per_block = number * dim
    tokens, read = sum(kind.tokens for kind in crops), sum(kind.read for kind in crops)
    last = keep * ((4 + 3 * number) * dim * tokens + (whole + updates) * read) if is_masked else per_block * tokens
    return tokens * per_block * (backbone.depth - 1) + last


def _backward_bytes(config: TrainConfig, student: nn.ModuleDict, crops: list[Crops], chunk_bytes: float) -> float:
    """Return the bytes of an image that backward needs besides: logits and their gradients, or later those of a block.

    A block is there once more while backward passes it, twice where it is computed again. Of the logits two copies of
    at most `chunk_bytes` are in float32 at a time.
    """
    backbone, head, number = backbone_of(student), head_of(student), _number_bytes(config)
    tokens, read = sum(kind.tokens for kind in crops), sum(kind.read for kind in crops)
    rows = 0 if head is None else head.num_prototypes * read
    logits = 2 * number * rows + 2 * min(4 * rows, chunk_bytes)
    again = 2 if config.activation_checkpointing == "full" else 1
    block = tokens * (
        (1 - config.drop_path) * again * _whole_block_bytes(config, backbone) + 2 * number * backbone.embed_dim
    )
    return max(logits, block)


def _whole_block_bytes(config: TrainConfig, backbone: VisionTransformer) -> float:
    """Return the bytes of a token in a block that nothing is computed again of, as in `_kept_bytes`."""
    hidden = feed_forward(backbone)[0].out_features
    return 2 * 4 * backbone.embed_dim + _number_bytes(config) * (7 * backbone.embed_dim + 2 * hidden)


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
