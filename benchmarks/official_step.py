"""Time the training step of the official DINOv2 code at a recipe's settings: a JSON line for each batch size.

    python benchmarks/official_step.py FOLDER --recipe vitl16-short --device cuda --sizes 32 64 128

FOLDER is an unpacked github.com/facebookresearch/dinov2 (written for b8931f7); it needs PyYAML besides torch. Its own
`SSLMetaArch.forward_backward`, masks, parameter groups and clipping run here, under bfloat16 autocast instead of FSDP
in fp16, without compile, and without xformers: attention is torch's scaled_dot_product_attention, and the crops of each
size go through the backbone one after the other. The mathematics are the same.
"""

import argparse
import itertools
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from dinov2_toolkit.benchmarks.timing import steps_per_second
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.engine.build import build_backbone


def main() -> None:
    """Time the sizes until one does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe; repeatable")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="images of a batch")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    config, device = resolve(TrainConfig, args.recipe, assignments=args.set), torch.device(args.device)
    # Its losses call all_reduce: give them a group of one process.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    step = official_step(args.folder, config, device)
    for size in args.sizes:
        try:
            rate, peak = steps_per_second(step, partial(official_batch, config, size, device), device)
        except torch.OutOfMemoryError:
            break
        print(json.dumps({"batch": size, "images/s": size * rate, "peak_bytes": peak}), flush=True)
    dist.destroy_process_group()


def official_step(folder: Path, config: TrainConfig, device: torch.device) -> Callable[[dict[str, Any]], object]:
    """Return the function that trains the official model on a batch."""
    os.environ["XFORMERS_DISABLED"] = "1"  # its layers then take scaled_dot_product_attention
    package = folder.resolve() / "dinov2"
    sys.path.insert(0, str(package.parent))
    stand_in("xformers.ops", fmha=types.SimpleNamespace(BlockDiagonalMask=SplitByLength))
    import dinov2  # type: ignore[import-not-found]  # noqa: F401  # of the folder
    import yaml  # type: ignore[import-untyped]

    for name in ("train", "data"):  # without what their __init__.py import: the loading of data
        stand_in(f"dinov2.{name}").__path__ = [str(package / name)]
    nothing = {"get_fsdp_wrapper": None, "ShardedGradScaler": None, "reshard_fsdp_model": lambda module: None}
    stand_in("dinov2.fsdp", get_fsdp_modules=lambda module: [], **nothing)
    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # for a rehearsal
    from dinov2.models import vision_transformer as vits  # type: ignore[import-not-found]
    from dinov2.train.ssl_meta_arch import SSLMetaArch  # type: ignore[import-not-found]

    read = yaml.safe_load((package / "configs" / "ssl_default_config.yaml").read_text())
    cfg: Any = json.loads(json.dumps(read), object_hook=lambda fields: types.SimpleNamespace(**fields))
    backbone = build_backbone(config)
    vits.vit_benchmark = partial(
        vits.DinoVisionTransformer,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        num_heads=num_heads(backbone),
        mlp_ratio=4,
        block_fn=partial(vits.Block, attn_class=vits.MemEffAttention),
    )
    cfg.student.arch, cfg.student.patch_size, cfg.student.drop_path_rate = (
        "vit_benchmark",
        config.patch_size,
        config.drop_path,
    )
    cfg.student.num_register_tokens, cfg.student.ffn_layer = config.num_register_tokens, config.ffn
    cfg.dino.head_n_prototypes, cfg.ibot.head_n_prototypes = config.num_prototypes, config.ibot_num_prototypes
    cfg.dino.head_hidden_dim = cfg.ibot.head_hidden_dim = config.hidden_dim
    cfg.dino.head_bottleneck_dim, cfg.ibot.head_bottleneck_dim = config.bottleneck_dim, config.ibot_bottleneck_dim
    cfg.ibot.separate_head = config.separate_heads
    cfg.train.centering = "centering" if config.centering == "softmax_center" else config.centering
    cfg.crops.local_crops_number = config.num_local_crops
    cfg.crops.global_crops_size, cfg.crops.local_crops_size = config.global_crop_size_px, config.local_crop_size_px
    cfg.compute_precision.grad_scaler = False

    model = SSLMetaArch(cfg).to(device)
    model.need_to_synchronize_fsdp_streams = False
    model.teacher.load_state_dict(model.student.state_dict())
    model.train()
    # Without xformers its blocks refuse a list of crops.
    parts = model.student.backbone
    parts.forward_features_list = lambda crops, masks: list(map(parts.forward_features, crops, masks))
    optimizer = torch.optim.AdamW(model.get_params_groups(), fused=True)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-4 * group["lr_multiplier"], 0.04 * group["wd_multiplier"]
    student, teacher = list(model.student.parameters()), list(model.teacher.parameters())

    def step(batch: dict[str, Any]) -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            losses = model.forward_backward(batch, teacher_temp=0.04)
        for part in model.student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), config.clip_grad_norm)
        optimizer.step()
        with torch.no_grad():  # its update_teacher, over weights that FSDP does not hold
            torch._foreach_mul_(teacher, config.momentum[0])
            torch._foreach_add_(teacher, student, alpha=1 - config.momentum[0])
        return losses

    return step


def official_batch(config: TrainConfig, num_images: int, device: torch.device) -> dict[str, Any]:
    """Return random crops and masks as the official code collates them, in float32, on the device."""
    from dinov2.data.collate import collate_data_and_cast  # type: ignore[import-not-found]
    from dinov2.data.masking import MaskingGenerator  # type: ignore[import-not-found]

    grid = config.global_crop_size_px // config.patch_size
    crops = {
        "global_crops": [torch.randn(3, config.global_crop_size_px, config.global_crop_size_px) for _ in range(2)],
        "local_crops": [
            torch.randn(3, config.local_crop_size_px, config.local_crop_size_px) for _ in range(config.num_local_crops)
        ],
    }
    batch = collate_data_and_cast(
        list(itertools.repeat((crops, ()), num_images)),
        mask_ratio_tuple=config.mask_ratio,
        mask_probability=config.mask_probability,
        dtype=torch.float32,
        n_tokens=grid**2,
        mask_generator=MaskingGenerator(input_size=(grid, grid), max_num_patches=0.5 * grid**2),
    )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def num_heads(backbone: VisionTransformer) -> int:
    """Return the heads of a backbone's attention."""
    heads: Any = backbone.blocks[0].attn
    return int(heads.num_heads)


class SplitByLength:
    """What the official code needs of xformers' BlockDiagonalMask: rows of a list in one tensor, and apart again."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> "tuple[SplitByLength, Tensor]":
        """Return the mask of tensors (1, n, D), and all of them in one."""
        return cls([tensor.shape[1] for tensor in tensors]), torch.cat(tensors, dim=1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of a list again."""
        return list(torch.split(tensor, self.lengths, dim=1))


def stand_in(name: str, **attributes: object) -> types.ModuleType:
    """Register a module with these attributes alone, and its parents."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or stand_in(parent), child, module)
    return module


if __name__ == "__main__":
    main()
