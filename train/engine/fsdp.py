"""FSDP2: each process keeps a shard of every weight of student and teacher, and gathers a block while it computes it.

Accelerate's settings turn it on (`accelerate launch --use_fsdp --fsdp_version 2`, or its configuration file). We call
torch's `fully_shard`: Accelerate shards only on GPUs, and only a model with one forward, while the teacher here runs
separately. Names of weights, parameter groups and files are the same with shards and without.

The processes of a node share one copy of the weights, and each node has a copy (HSDP): weights are gathered within a
node, and only gradients, a shard each, go between nodes.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import ToolkitError
from ...models.vit import VisionTransformer

Model = TypeVar("Model", bound=nn.Module)

SHARD_SIZE = "FSDP_SHARD_SIZE"  # environment variable: processes that share one copy of the weights


def sharding(environment: Mapping[str, str]) -> FullyShardedDataParallelPlugin | None:
    """Return Accelerate's FSDP2 settings from its environment variables, None without FSDP.

    Raises:
        ToolkitError: for settings that are not supported here.
    """
    if environment.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ToolkitError(f"FSDP_VERSION is {environment.get('FSDP_VERSION', '1')}; set it (fsdp_version) to 2")
    for name, instead in {
        "FSDP_OFFLOAD_PARAMS": "weights stay on the GPU",
        "FSDP_ACTIVATION_CHECKPOINTING": "--set activation_checkpointing=full does that here",
        "ACCELERATE_USE_PARALLELISM_CONFIG": f"{SHARD_SIZE} says how many processes share one copy of the weights",
    }.items():
        if environment.get(name, "").lower() == "true":
            raise ToolkitError(f"{name} is true, which this training does not do; set it to false: {instead}")
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy == "SIZE_BASED_WRAP" or environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block") != "Block":
        raise ToolkitError(
            "FSDP_AUTO_WRAP_POLICY asks for other units than blocks and heads, which this training shards by; "
            "leave it and FSDP_TRANSFORMER_CLS_TO_WRAP out"
        )
    if environment.get("FSDP_IGNORED_MODULES"):
        raise ToolkitError("FSDP_IGNORED_MODULES is set, but student and teacher are sharded whole; leave it out")
    return FullyShardedDataParallelPlugin()


def copies_and_shards(environment: Mapping[str, str], num_processes: int) -> tuple[int, int]:
    """Return how many copies of the weights there are, and how many processes share each.

    FSDP_SHARD_SIZE says the second; by default the processes of a node do (LOCAL_WORLD_SIZE), or all where a node has
    one, or not as many as the others.

    Raises:
        ToolkitError: when FSDP_SHARD_SIZE does not divide the processes into groups of two or more.
    """
    local = environment.get("LOCAL_WORLD_SIZE", "")
    size = int(local) if local.isdigit() else num_processes
    if size < 2 or num_processes % size:
        size = num_processes
    if SHARD_SIZE in environment:
        given = environment[SHARD_SIZE]
        size = int(given) if given.isdigit() else 0
        if size < 2 or num_processes % size:
            raise ToolkitError(
                f"{SHARD_SIZE} is {given!r}, which does not divide {num_processes} processes into groups of two or "
                "more; change it, or leave it out"
            )
    return num_processes // size, size


def shard(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    device: torch.device,
    *,
    copies_and_shards: tuple[int, int],
    half: torch.dtype | None,
    keep_gathered: bool,
) -> None:
    """Shard backbones, block by block, and heads, in place.

    Args:
        copies_and_shards: as the function of that name returns them.
        half: the type in which blocks, and the student's heads, are gathered; their gradients are added up in float32.
            The rest is gathered in float32: embeddings and last norm, which are small, and the teacher's heads, whose
            last product is in float32. None: all in float32, so that results are those of an unsharded model.
        keep_gathered: keep the student's weights gathered from forward to backward, for less traffic. The teacher's
            never are: without a backward pass they would stay gathered, and miss the next update.
    """
    # Features are views of one tensor, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    copies, shards = copies_and_shards
    shape, names = ((shards,), ("shards",)) if copies == 1 else ((copies, shards), ("copies", "shards"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    whole = MixedPrecisionPolicy()
    # Autocast chooses the type of what goes in and out, as it does without shards.
    in_half = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for side in (student, teacher):
        reshard = side is teacher or not keep_gathered
        for network in side.values():
            for block in network.blocks if isinstance(network, VisionTransformer) else []:
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=in_half)
            policy = whole if isinstance(network, VisionTransformer) or side is teacher else in_half
            fully_shard(network, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
            if isinstance(network, VisionTransformer):
                register_fsdp_forward_method(network, "forward_selected")


def meta_copy(model: Model) -> Model:
    """Return a copy on the meta device, for `full_model`; made before the model is sharded, which cannot be copied."""
    copies: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, copies)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict without the frozen teacher of a distillation."""
    state: dict[str, Tensor] = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("frozen.")}


def full_model(model: Model, empty: Model, *, wanted: bool) -> Model | None:
    """Return a sharded model whole in main memory, without its frozen teacher; None where it is not wanted.

    All processes must call it. `empty` is the model's `meta_copy`.
    """
    state = {}
    for name, value in trained_state(model).items():
        gathered = full_tensor(value)
        if wanted:
            state[name] = gathered.cpu()
    if not wanted:
        return None
    full = copy.deepcopy(empty)
    full.load_state_dict(state, strict=False, assign=True)
    return full


def full_optimizer_state(optimizer: torch.optim.Optimizer, *, wanted: bool) -> dict[str, object]:
    """Return the optimizer's state_dict with full tensors in main memory, where wanted. All processes must call it."""
    state_dict = optimizer.state_dict()
    for number, entries in state_dict["state"].items():
        full = {name: full_tensor(value) for name, value in entries.items()}
        state_dict["state"][number] = {name: value.cpu() for name, value in full.items()} if wanted else {}
    return state_dict


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with its shards, if it has any, gathered; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a full tensor, the same in all processes, sharded as an example of its shape is, or not."""
    if not isinstance(example, DTensor):
        return tensor
    on_device = tensor.to(example.device)
    return distribute_tensor(on_device, example.device_mesh, example.placements, src_data_rank=None)
