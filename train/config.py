"""Settings of a training run: the paper's as defaults, recipes over them, then environment, flags and --set.

All lengths are in steps (updates of the weights), all sizes in pixels, `batch_size` counts images over all processes.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .. import console
from ..errors import ToolkitError, nearest
from ..features.launch import prints_result
from ..store.files import write_text
from ..store.limits import DEFAULT_LIMITS, Limits
from ..store.renamed import RECIPE_KEYS, with_present_settings
from .engine.schedules import Growth, batch_sizes
from .ranges import check_ranges

CONFIG_FILE = "config.toml"  # in a run folder
HEADING = "# Every setting of this run; --recipe with this file repeats it.\n"
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class CostConfig:
    """The keys that change a run's time, memory and disk, and not its result."""

    checkpoint_every: int = 3750
    keep_checkpoints: int = 3
    num_workers: int = 8  # processes that decode images, for each that trains
    cache_mib: int = 1024  # decoded images kept in memory, a process
    max_pixels: int = DEFAULT_LIMITS.max_pixels  # larger images count as unreadable,
    max_image_bytes: int = DEFAULT_LIMITS.max_image_bytes  # and larger files,
    image_timeout: float = DEFAULT_LIMITS.image_timeout  # and what takes more seconds to decode
    log_every: int = 10
    eval_every: int = 1000  # steps between two k-NN on labelled images (--eval-train and --eval-test, or --eval-share)
    # End after so many k-NN in a row without a better one, with the model of the best; 0: never.
    early_stop: int = 0
    compile: bool = False  # torch.compile of blocks, heads and losses; rounds otherwise, as another machine does
    # Bit for bit on GPUs too, where sums have no fixed order otherwise; slower. On a CPU every run is.
    deterministic: bool = False

    @property
    def limits(self) -> Limits:
        """Return what one image may cost."""
        return Limits(self.max_pixels, self.max_image_bytes, self.image_timeout)


COST_KEYS = tuple(field.name for field in fields(CostConfig))


@dataclass(frozen=True)
class TrainConfig(CostConfig):
    """Every key of a recipe. Defaults are the released ViT-L/16 "short" configuration's, converted to steps.

    Source: facebookresearch/dinov2, dinov2/configs/ssl_default_config.yaml (1250 iterations an "epoch").
    """

    # Every recipe states these, and checkpoint_every.
    arch: str = "vit_large"
    steps: int = 125_000
    batch_size: int | Growth = 2048  # or [[images seen, batch from then on], ...], starting at 0
    seed: int = 0

    # The model.
    patch_size: int = 16
    depth: int = 0  # blocks; 0 = as many as the architecture has
    embed_dim: int = 0  # width; 0 = the architecture's
    num_heads: int = 0  # of attention; 0 = the architecture's
    ffn: Literal["mlp", "swiglu"] = "mlp"
    num_register_tokens: int = 0
    layer_scale: float = 1e-5
    drop_path: float = 0.3
    pos_embed_antialias: bool = False
    pos_embed_offset: float = 0.1
    crop_ratio: float = 224 / 256  # centre crop over short side, where the finished model is used

    # The heads. The ibot_ keys count only with separate heads.
    separate_heads: bool = False
    num_prototypes: int = 65_536
    bottleneck_dim: int = 256
    hidden_dim: int = 2048
    ibot_num_prototypes: int = 65_536
    ibot_bottleneck_dim: int = 256

    # The pixels. Images are converted to three channels of 8 bits (RGB) or one (grey); other channels, and 16 bits, an
    # image must have itself. Mean and std are a number a channel, for values in 0 to 1; [] = ImageNet's for three
    # channels, else 0.5 and 0.25.
    in_chans: int = 3
    bit_depth: Literal[8, 16] = 8
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()

    # Crops. Blur and solarize are probabilities of the first global, second global and each local crop; the released
    # code blurs with (0.0, 0.9, 0.5), where (1.0, 0.1, 0.5) was intended. Saturation, hue and grayscale need three
    # channels.
    global_crop_size_px: int = 224
    global_crop_scale: tuple[float, float] = (0.32, 1.0)
    num_local_crops: int = 8
    local_crop_size_px: int = 96
    local_crop_scale: tuple[float, float] = (0.05, 0.32)
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)

    # Masks of the global crops.
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)

    # Losses and the teacher. A pair is the first and the last value of a schedule.
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_distributed: bool = False  # KoLeo compares the images of all processes; false: of one, as the official code
    centering: Literal["softmax_center", "sinkhorn_knopp"] = "softmax_center"
    student_temp: float = 0.1
    teacher_temp: tuple[float, float] = (0.04, 0.07)
    teacher_temp_warmup_steps: int = 37_500
    momentum: tuple[float, float] = (0.992, 1.0)

    # The optimizer. The learning rate is base_lr * sqrt(batch_size / 1024), of the first batch where it grows.
    base_lr: float = 4e-3
    hold_lr: bool = False  # constant after the warm-up; false: half a cosine down to min_lr
    min_lr: float = 1e-6
    warmup_steps: int = 12_500
    weight_decay: tuple[float, float] = (0.04, 0.4)
    clip_grad_norm: float = 3.0
    layerwise_decay: float = 0.9
    patch_embed_lr_mult: float = 0.2
    freeze_last_layer_steps: int = 1250
    # In which only the heads are trained, when the backbone has other weights; its own warm-up follows them.
    freeze_backbone_steps: int = 0
    max_skipped_steps: int = 10  # in a row with a gradient that is not finite; one more ends the run
    # Of matrix products; bf16: fp16 on a GPU that has no bf16. fp16 scales the loss and skips steps that overflow.
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"

    # Less memory for more time. They change only which random numbers stochastic depth draws, and that KoLeo compares
    # the images of a micro-batch.
    sequential_views: bool = False  # half of the local crops, the others, each global view: a third of the memory
    micro_batch_size: int | Literal["auto"] = 0  # images of a process at a time; 0 = all; auto: as memory allows
    # What backward computes again instead of keeping it; selective: norms, activations and short attention.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"

    def __post_init__(self) -> None:
        batch_sizes(self.batch_size)  # raises when it is none
        check_ranges(asdict(self))
        for name in ("global_crop_size_px", "local_crop_size_px"):
            if (side := getattr(self, name)) % self.patch_size or side < self.patch_size:
                raise ToolkitError(f"{name} {side} is not a multiple of patch_size {self.patch_size}; change one")
        for name in ("pixel_mean", "pixel_std"):
            if len(numbers := getattr(self, name)) not in (0, self.in_chans):
                raise ToolkitError(f"{name} has {len(numbers)} numbers; give {self.in_chans}, one a channel, or []")
        if self.separate_heads and not self.ibot_weight:
            raise ToolkitError(
                "separate_heads is true but ibot_weight is 0: the second head would learn nothing; set one of them"
            )


Config = TypeVar("Config", bound=TrainConfig)

# Lengths of schedules. A recipe states its own; where steps are set over a recipe, those not set beside them scale.
SCHEDULE_KEYS = ("warmup_steps", "teacher_temp_warmup_steps", "freeze_last_layer_steps", "freeze_backbone_steps")


def resolve(
    kind: type[Config],
    recipe: str | None = None,
    *,
    environment: Mapping[str, str] = {},
    flags: Mapping[str, object] = {},
    assignments: Sequence[str] = (),
    scale_schedules: bool = True,
) -> Config:
    """Return the settings of a run: defaults < recipe < DINOV2_KEY in the environment < flags < key=value.

    Args:
        recipe: the name of a recipe that ships with the toolkit, a TOML file, or None for the defaults alone.
        environment: such as `os.environ`; other variables are ignored.
        assignments: "key=value" texts.
        scale_schedules: whether `steps` set over the recipe scale its schedules; not where a run goes on for longer.

    Raises:
        ToolkitError: for an unknown recipe or key (with the nearest right name), or a value of the wrong type.
    """
    values: dict[str, Any] = asdict(kind())  # each key has a type of its own
    types = get_type_hints(kind)
    layers: list[Mapping[str, object]] = [
        read_recipe(recipe) if recipe else {},
        {name: environment[key] for name in (*types, *RECIPE_KEYS) if (key := f"DINOV2_{name.upper()}") in environment},
        flags,
        dict(_assignment(text) for text in assignments),
    ]
    for number, layer in enumerate(map(with_present_settings, layers)):
        for name in layer:
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1, cutoff=0.0)
                raise ToolkitError(f"unknown setting {name!r}; the nearest known one is {near[0]!r}")
        typed: dict[str, Any] = {name: _typed(name, value, types[name]) for name, value in layer.items()}
        check_ranges(typed)
        if "steps" in typed and number == 0:
            for name in SCHEDULE_KEYS:
                if name not in typed and values[name] > typed["steps"]:
                    what = f"{name}, by default {values[name]:,}, is more than the {typed['steps']:,} steps"
                    raise ToolkitError(f"{what} of recipe {recipe}; state it there too")
        elif "steps" in typed and scale_schedules:
            values |= {name: round(values[name] * typed["steps"] / values["steps"]) for name in SCHEDULE_KEYS}
        values |= typed
    return kind(**values)


def command_config(
    kind: type[Config],
    output: str,
    recipe: str | None,
    assignments: Sequence[str],
    *,
    resume: bool,
    seed: int | None,
    default_recipe: str = "tiny",
    flags: Mapping[str, object] = {},
) -> Config:
    """Return the settings of a command, as `resolve` does; the recipe is `given_recipe` or else `default_recipe`."""
    goes_on = recipe is None and resume  # from the run's own settings: its warm-ups, which may be over, stay
    recipe = given_recipe(output, recipe, resume)
    if recipe is None and prints_result():
        console.say(f"no --recipe: taking {default_recipe}")
    if seed is not None:
        flags = {**flags, "seed": seed}
    return resolve(
        kind,
        recipe=recipe or default_recipe,
        environment=os.environ,
        flags=flags,
        assignments=assignments,
        scale_schedules=recipe is None or not goes_on,
    )


def given_recipe(output: str, recipe: str | None, resume: bool) -> str | None:
    """Return a command's recipe, which is the run's own config.toml where a run is resumed; None without either."""
    own = Path(output) / CONFIG_FILE
    return str(own) if recipe is None and resume and own.exists() else recipe


def read_recipe(recipe: str) -> dict[str, object]:
    """Return the keys of a recipe, those in [sections] included; the sections only group them.

    Raises:
        ToolkitError: if there is no such recipe, or it is not TOML.
    """
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    path = shipped.get(recipe, Path(recipe))
    if not path.is_file():
        near = nearest(recipe, shipped)
        raise ToolkitError(f"no recipe {recipe!r}{near}; name a TOML file or one of {', '.join(shipped)}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8", errors="replace"))
    except tomllib.TOMLDecodeError as problem:
        raise ToolkitError(f"recipe {recipe} is not valid TOML: {problem}; correct it") from None
    sections = (value if isinstance(value, dict) else {name: value} for name, value in content.items())
    return {name: value for section in sections for name, value in section.items()}


def write_config(config: TrainConfig, path: Path) -> None:
    """Write every setting as TOML, so that `--recipe PATH` repeats the run."""
    # TOML writes these values as JSON does.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in asdict(config).items()]
    write_text(path, HEADING + "".join(lines))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ToolkitError(f"--set {text!r} is not key=value; write it like steps=2000")
    return name.strip(), value.strip()


def _typed(name: str, value: object, kind: object) -> object:
    """Return the value as the field's type; texts (from --set or the environment) are read as TOML."""
    is_text = kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))
    if isinstance(value, str) and not is_text:
        with suppress(tomllib.TOMLDecodeError):  # what is not TOML stays a text, which is refused below
            value = tomllib.loads(f"value = {value}")["value"]
    try:
        return _converted(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise ToolkitError(f"{name} is {value!r}{_near(value, kind)}; {_wanted(kind)}") from None


def _converted(value: object, kind: object) -> object:
    """Return a value as a type, lists as tuples and whole numbers as floats where that is the type.

    Raises TypeError or ValueError when it is none. Types are compared exactly: True is an int to isinstance.
    """
    origin, kinds = get_origin(kind), get_args(kind)
    if type(value) is kind or (origin is Literal and any(value == one and type(value) is type(one) for one in kinds)):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if origin in (Union, UnionType):
        return value if type(value) in kinds else _converted(value, kinds[-1])
    if origin is tuple and isinstance(value, list | tuple):
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        return tuple(_converted(item, item_kind) for item, item_kind in zip(value, kinds, strict=True))
    raise TypeError


def _near(value: object, kind: object) -> str:
    return nearest(value, map(str, get_args(kind))) if isinstance(value, str) and get_origin(kind) is Literal else ""


def _wanted(kind: object) -> str:
    kinds = get_args(kind)
    if get_origin(kind) is Literal:
        return f"choose one of {', '.join(map(str, kinds))}"
    if get_origin(kind) in (Union, UnionType):
        other = "auto" if get_origin(kinds[-1]) is Literal else "a list like [[0, 256], [100000, 512]]"
        return f"it must be a whole number, or {other}"
    if kinds:
        return f"it must be {'a list of' if kinds[-1] is ... else len(kinds)} numbers, like [0.5, 0.25]"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return f"it must be {words[kind]}"  # type: ignore[index]
