"""Compile, shard or wrap a model for the loop, and build its optimizer."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from sysconfig import get_path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import ToolkitError
from ...models.block import Block
from ...models.head import ProjectionHead
from ..config import TrainConfig
from ..objective.losses import COMPILED_SHAPES
from .checkpoint import TrainedModel
from .fsdp import copies_and_shards, full_model, meta_copy, shard, sharding
from .half_precision import HALF, supported
from .optimizer import build_optimizer


class Prepared(NamedTuple):
    """A model that is ready to be trained."""

    wrapped: nn.Module  # to call forward on
    optimizer: torch.optim.Optimizer  # of the student
    full_model: Callable[[bool], TrainedModel | None]  # all must call it, with whether they want it
    empty: TrainedModel | None  # the model on the meta device, where it is sharded


def prepare(model: TrainedModel, config: TrainConfig, accelerator: Accelerator) -> Prepared:
    """Compile, shard or wrap a model as the settings say; under Accelerate's FSDP2, in place."""
    settings = sharding(os.environ)
    device = accelerator.device
    empty = None if settings is None else meta_copy(model)
    if config.compile:
        compile_networks(model)
    if settings is not None:
        model.to(device)
        shard(
            model.student,
            model.teacher,
            device,
            copies_and_shards=copies_and_shards(os.environ, accelerator.num_processes),
            half=HALF[supported(config.mixed_precision)],
            keep_gathered=not settings.reshard_after_forward,
        )
    optimizer: torch.optim.Optimizer = build_optimizer(
        model.student, layerwise_decay=config.layerwise_decay, patch_embed_lr_mult=config.patch_embed_lr_mult
    )
    if empty is None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.forward_sync_buffers = False  # all processes make the same ones
        return Prepared(wrapped, optimizer, lambda wanted: model if wanted else None, None)
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)  # autocast alone, and no DDP
    return Prepared(wrapped, optimizer, lambda wanted: full_model(model, empty, wanted=wanted), empty)


def compile_networks(model: TrainedModel) -> None:
    """Have every block of all backbones and every head compiled, by itself and in place, when it first runs.

    All blocks of a backbone share what is compiled, for each kind of batch; the last one, which computes selected
    tokens alone, has its own. A distillation's frozen teacher is one of the networks.
    """
    for part in model.modules():
        if isinstance(part, Block | ProjectionHead):
            part.compile(dynamic=False, fullgraph=True, recompile_limit=COMPILED_SHAPES)


def check_compiler(environment: Mapping[str, str]) -> None:
    """Raise ToolkitError where torch.compile would not find the C++ compiler, or Python's headers, that it needs."""
    compiler = environment.get("CXX", "g++")
    if shutil.which(compiler, path=environment.get("PATH")) is None:
        raise ToolkitError(f"compile=true needs C++ and there is no {compiler}; install it, or set compile=false")
    headers = Path(get_path("include"))
    if not (headers / "Python.h").exists():
        raise ToolkitError(f"compile=true needs Python.h and {headers} has none; install it, or set compile=false")
