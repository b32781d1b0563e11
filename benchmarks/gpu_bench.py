"""Where and until when a part of benchmarks/gpu.py runs, and what the parts share."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2_toolkit.benchmarks.embedding import make_images
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.monitor.flop import peak_flops

Row = dict[str, str]  # of a part's table

TINY = (
    "arch=vit_tiny",
    "depth=2",
    "num_prototypes=64",
    "ibot_num_prototypes=64",
    "hidden_dim=32",
    "global_crop_size_px=64",
    "local_crop_size_px=32",
    "patch_size=16",
    "num_local_crops=2",
)
MIN_GAIN = 1.03  # chosen: of images/s, by which a batch must be better than one of half the size
NOT_KNOWN = "not known"


@dataclass(frozen=True)
class Bench:
    """Where a part runs, and until when."""

    device: torch.device
    deadline: float  # of time.monotonic()
    seconds: float
    scratch: Path  # which the parts share
    output: Path  # where a trace is kept
    official: Path | None = None  # the official code's folder

    @property
    def is_rehearsal(self) -> bool:
        """Tell whether this is a CPU."""
        return self.device.type == "cpu"

    def left(self) -> float:
        """Return the share of the part's time that is left."""
        return max(0.0, self.deadline - time.monotonic()) / self.seconds

    def settings(self, recipe: str, *changes: str) -> TrainConfig:
        """Return a recipe's settings, of a tiny model in a rehearsal."""
        return resolve(TrainConfig, recipe, assignments=[*changes, *(TINY if self.is_rehearsal else ())])

    def pick(self, full: int, tiny: int) -> int:
        """Return a size, the tiny one in a rehearsal."""
        return tiny if self.is_rehearsal else full

    def environment(self, device: str) -> dict[str, str]:
        """Return the environment of a command on a device, with a catalog and a cache of its own."""
        changed = {**os.environ, "DINOV2_CATALOG": str(self.scratch / f"on-{device}" / ".dinov2" / "catalog.duckdb")}
        return changed if device == "cuda" else changed | {"CUDA_VISIBLE_DEVICES": ""}


def speed_cells(bench: Bench, images_per_s: float, flop: float) -> Row:
    """Return images/s, TFLOP/s and MFU, the latter where the GPU's peak is known."""
    name = "" if bench.is_rehearsal else torch.cuda.get_device_name(bench.device)
    peak = peak_flops(name, "bf16")
    mfu = NOT_KNOWN if peak is None else f"{images_per_s * flop / peak:.1%}"
    return {"images/s": f"{images_per_s:,.0f}", "TFLOP/s": f"{images_per_s * flop / 1e12:.3g}", "MFU": mfu}


def gib(num_bytes: float) -> str:
    """Return bytes in GiB, for a table; those of a CPU are not counted."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "not counted"


def made_images(bench: Bench) -> list[Path]:
    """Return JPEG files of 500 x 400, made by the first part that asks."""
    folder = bench.scratch / "jpg"
    if not folder.exists():
        make_images(folder.with_suffix(".new"), bench.pick(512, 8))
        folder.with_suffix(".new").rename(folder)
    return sorted(folder.iterdir())
