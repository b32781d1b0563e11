"""What each number among the settings of training may be: a wrong one is refused before anything is computed."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ToolkitError

# As intervals are written: [ and ] include the bound, ( and ) do not.
RANGES: dict[str, str] = {
    "checkpoint_every": "[1, 1e12]",
    "keep_checkpoints": "[1, 1e6]",
    "num_workers": "[0, 1024]",
    "cache_mib": "[0, 1e8]",
    "max_pixels": "[1, 1e12]",
    "max_image_bytes": "[1, 1e15]",
    "image_timeout": "[1, 1e9]",
    "log_every": "[1, 1e12]",
    "eval_every": "[1, 1e12]",
    "early_stop": "[0, 1e6]",
    "steps": "[1, 1e9]",
    "batch_size": "[1, 1e8]",
    "seed": "[-9e18, 9e18]",
    "patch_size": "[1, 1024]",
    "depth": "[0, 1000]",
    "embed_dim": "[0, 65536]",
    "num_heads": "[0, 1024]",
    "num_register_tokens": "[0, 1024]",
    "layer_scale": "[0, 10]",
    "drop_path": "[0, 1)",
    "pos_embed_offset": "[0, 1]",
    "crop_ratio": "(0, 1]",
    "num_prototypes": "[2, 1e7]",
    "bottleneck_dim": "[1, 65536]",
    "hidden_dim": "[1, 1e6]",
    "ibot_num_prototypes": "[2, 1e7]",
    "ibot_bottleneck_dim": "[1, 65536]",
    "in_chans": "[1, 1024]",
    "bit_depth": "[8, 16]",
    "pixel_mean": "(-inf, inf)",
    "pixel_std": "(0, inf)",
    "global_crop_size_px": "[1, 8192]",
    "global_crop_scale": "(0, 1]",
    "num_local_crops": "[0, 1024]",
    "local_crop_size_px": "[1, 8192]",
    "local_crop_scale": "(0, 1]",
    "flip": "[0, 1]",
    "jitter": "[0, 1]",
    "jitter_strength": "[0, 1]",
    "grayscale": "[0, 1]",
    "blur": "[0, 1]",
    "blur_sigma_px": "(0, 100]",
    "solarize": "[0, 1]",
    "mask_probability": "[0, 1]",
    "mask_ratio": "[0, 1]",
    "dino_weight": "[0, 1e6]",
    "ibot_weight": "[0, 1e6]",
    "koleo_weight": "[0, 1e6]",
    "student_temp": "(0, 10]",
    "teacher_temp": "(0, 10]",
    "teacher_temp_warmup_steps": "[0, 1e9]",
    "momentum": "[0, 1]",
    "base_lr": "[0, inf)",
    "min_lr": "[0, inf)",
    "warmup_steps": "[0, 1e9]",
    "weight_decay": "[0, 10]",
    "clip_grad_norm": "(0, inf)",
    "layerwise_decay": "(0, 1]",
    "patch_embed_lr_mult": "[0, 10]",
    "freeze_last_layer_steps": "[0, 1e9]",
    "freeze_backbone_steps": "[0, 1e9]",
    "max_skipped_steps": "[0, 1e9]",
    "micro_batch_size": "[0, 1e8]",
}
RISING = ("global_crop_scale", "local_crop_scale", "blur_sigma_px", "mask_ratio")  # from the smallest to the largest


def check_ranges(settings: Mapping[str, object]) -> None:
    """Raise ToolkitError for the first of some settings with a number that is out of its range, or out of order."""
    for name, value in settings.items():
        if name in RANGES and not all(is_within(number, RANGES[name]) for number in _numbers(value)):
            raise ToolkitError(f"{name} is {_shown(value)}; {_wanted(RANGES[name])}")
        if name in RISING and (numbers := _numbers(value)) != sorted(numbers):
            raise ToolkitError(f"{name} is {_shown(value)}; its first number must not be above its second")


def bounds(interval: str) -> tuple[float, float]:
    """Return the two bounds of an interval such as "(0, 1]"."""
    low, high = re.findall(r"-?[\w.]+", interval)
    return float(low), float(high)


def is_within(number: float, interval: str) -> bool:
    """Tell whether a number is finite, and in an interval."""
    low, high = bounds(interval)
    is_above = number >= low if interval[0] == "[" else number > low  # never of NaN
    return is_above and (number <= high if interval[-1] == "]" else number < high)


def _numbers(value: object) -> list[float]:
    """Return the numbers of a setting; of a batch that grows, its sizes."""
    if isinstance(value, str):
        return []  # auto
    items: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return [item[-1] if isinstance(item, list | tuple) else item for item in items]


def _wanted(interval: str) -> str:
    low, high = bounds(interval)
    if math.isinf(low):
        return "it must be a finite number"
    lowest = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    if math.isinf(high):
        return f"it must be a finite number, {lowest}"
    return f"it must be {lowest} and {'at most' if interval[-1] == ']' else 'below'} {high:g}"


def _shown(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
