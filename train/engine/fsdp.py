"""Student and teacher in shards: each process keeps a part of every weight, and has a block whole while it computes.

Accelerate's settings ask for it (`accelerate launch --use_fsdp --fsdp_version 2`, or a file of its). torch's own
`fully_shard` does it, since Accelerate shards on GPUs alone, and one model with one forward: here the teacher answers
by itself before the student learns. Names of weights, parameter groups and files stay what they are without shards.
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
    """Return Accelerate's settings of FSDP2 from its environment variables, None where they do not ask for FSDP.

    Raises:
        ToolkitError: for settings that this training cannot follow.
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

    Weights are gathered in float32, whatever the autocast, so that the numbers are those of a model in one piece.

    Args:
        keep_gathered: the student's weights stay whole from the way forward to the way back, for less traffic. Never
            the teacher's, which have no way back, and whose next update would not reach what was gathered.
    """
    # A backbone's features are views of one tensor, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for side in (student, teacher):
        reshard = side is teacher or not keep_gathered
        for part in side.values():
            if isinstance(part, VisionTransformer):
                for block in part.blocks:
                    fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
            if isinstance(part, VisionTransformer):
                register_fsdp_forward_method(part, "forward_selected")


def meta_copy(model: Model) -> Model:
    """Return a copy whose weights have shapes and no numbers, before the model is sharded: afterwards it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _hollow(tensor) for tensor in tensors})


def _hollow(tensor: Tensor) -> Tensor:
    hollow = torch.empty_like(tensor, device="meta")
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def whole_model(model: Model, hollow: Model, *, wanted: bool) -> Model | None:
    """Return a model whose shards have been put together, in memory; None where it is not wanted. All must ask.

    What is frozen, and so the same everywhere, is left out.
    """
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith("frozen."):
            gathered = full_tensor(value)
            if wanted:
                state[name] = gathered.cpu()
    if not wanted:
        return None
    whole = copy.deepcopy(hollow)
    whole.load_state_dict(state, strict=False, assign=True)
    return whole


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, wanted: bool) -> dict[str, object]:
    """Return the optimizer's state_dict with its shards put together, in memory where wanted. All must ask."""
    state_dict = optimizer.state_dict()
    for number, entries in state_dict["state"].items():
        whole = {name: full_tensor(value) for name, value in entries.items()}
        state_dict["state"][number] = {name: value.cpu() for name, value in whole.items()} if wanted else {}
    return state_dict


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with its shards, if it is in shards, put together; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor, the same in all processes, as the example of its shape lies: whole, or this one's part."""
    if not isinstance(example, DTensor):
        return tensor
    on_device = tensor.to(example.device)
    return distribute_tensor(on_device, example.device_mesh, example.placements, src_data_rank=None)
