"""FSDP2: each process keeps a shard of every weight of student and teacher, and gathers a block while it computes it.

Accelerate's settings turn it on (`accelerate launch --use_fsdp --fsdp_version 2`, or its configuration file). We call
torch's `fully_shard`: Accelerate shards only on GPUs, and only a model with one forward, while the teacher here runs
separately. Names of weights, parameter groups and files are the same with shards and without.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import ToolkitError
from ...models.vit import VisionTransformer

Model = TypeVar("Model", bound=nn.Module)


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
        "ACCELERATE_USE_PARALLELISM_CONFIG": "all processes share one copy of the weights",
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


def shard(student: nn.ModuleDict, teacher: nn.ModuleDict, device: torch.device, *, keep_gathered: bool) -> None:
    """Shard backbones, block by block, and heads over all processes, in place.

    Weights are gathered in float32, whatever the autocast, so that results are those of an unsharded model. Under
    `keep_gathered` the student's stay gathered from forward to backward, for less traffic. The teacher's never do:
    without a backward pass they would stay gathered, and miss the next update.
    """
    # Features are views of one tensor, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for side in (student, teacher):
        reshard = side is teacher or not keep_gathered
        for network in side.values():
            for block in network.blocks if isinstance(network, VisionTransformer) else []:
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(network, mesh=mesh, reshard_after_forward=reshard)
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
