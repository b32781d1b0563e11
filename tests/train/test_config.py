import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from dinov2_toolkit import train
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.train.config import (
    RECIPES,
    SCHEDULE_KEYS,
    CostConfig,
    TrainConfig,
    read_recipe,
    resolve,
    write_config,
)
from dinov2_toolkit.train.distill import DistillConfig
from dinov2_toolkit.train.ranges import RANGES, RISING, bounds


def settings(
    recipe: str | None = None,
    environment: dict[str, str] | None = None,
    flags: dict[str, object] | None = None,
    assignments: list[str] | None = None,
) -> TrainConfig:
    return resolve(
        TrainConfig,
        recipe=recipe,
        environment=environment or {},
        flags=flags or {},
        assignments=assignments or [],
    )


def test_the_official_recipe_is_the_defaults() -> None:
    assert settings("vitl16-short") == TrainConfig()
    config = TrainConfig()
    assert (config.steps, config.warmup_steps, config.teacher_temp_warmup_steps) == (125_000, 12_500, 37_500)


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("seed = 1\nbatch_size = 11\n[losses]\nkoleo_weight = 0.01\n")
    environment = {"DINOV2_SEED": "2", "DINOV2_LOG_EVERY": "12", "DINOV2_CATALOG": "elsewhere"}
    config = settings(str(recipe), environment, {"seed": 3, "num_workers": 13}, ["seed=4", "num_local_crops=14"])
    assert config.seed == 4
    assert (config.batch_size, config.log_every, config.num_workers, config.num_local_crops) == (11, 12, 13, 14)
    assert config.koleo_weight == 0.01
    assert settings(str(recipe), environment, {"seed": 3}).seed == 3
    assert settings(str(recipe), environment).seed == 2
    assert settings(str(recipe)).seed == 1


def test_values_from_texts_get_the_type_of_their_key() -> None:
    texts = ["base_lr=1", "mask_ratio=[0.2, 0.4]", "separate_heads=true", "arch=vit_small", "ffn=swiglu"]
    config = settings(assignments=texts)
    assert config.base_lr == 1.0 and isinstance(config.base_lr, float)
    assert config.mask_ratio == (0.2, 0.4)
    assert config.separate_heads is True
    assert (config.arch, config.ffn) == ("vit_small", "swiglu")
    deep = settings(assignments=["in_chans=2", "bit_depth=16", "pixel_mean=[0, 0.5]", "pixel_std=[]"])
    assert (deep.bit_depth, deep.pixel_mean, deep.pixel_std) == (16, (0.0, 0.5), ())


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("num_prototype=10", "unknown setting 'num_prototype'; the nearest known one is 'num_prototypes'"),
        ("steps=many", "steps is 'many'; it must be a whole number"),
        ("steps=2.5", "steps is 2.5; it must be a whole number"),
        ("steps=true", "steps is True; it must be a whole number"),
        ("base_lr=fast", "base_lr is 'fast'; it must be a number"),
        ("separate_heads=1", "separate_heads is 1; it must be true or false"),
        ("mask_ratio=0.3", "mask_ratio is 0.3; it must be 2 numbers"),
        ("ffn=relu", "ffn is 'relu'; choose one of mlp, swiglu"),
        ("ffn=swiglue", "ffn is 'swiglue' (did you mean 'swiglu'?); choose one of mlp, swiglu"),
        ("bit_depth=12", "bit_depth is 12; choose one of 8, 16"),
        ("bit_depth=16.0", "bit_depth is 16.0; choose one of 8, 16"),
        ("in_chans=0", "in_chans is 0; it must be at least 1"),
        ("pixel_mean=0.5", "pixel_mean is 0.5; it must be a list of numbers, like [0.5, 0.25]"),
        ("pixel_mean=[0.5]", "pixel_mean has 1 numbers; give 3, one a channel, or []"),
        ("pixel_std=[1, 1, 0]", "pixel_std is [1.0, 1.0, 0.0]; it must be a finite number, above 0"),
        ("base_lr=nan", "base_lr is nan; it must be a finite number, at least 0"),
        ("base_lr=-1", "base_lr is -1.0; it must be a finite number, at least 0"),
        ("momentum=[2, 3]", "momentum is [2.0, 3.0]; it must be at least 0 and at most 1"),
        ("student_temp=-1", "student_temp is -1.0; it must be above 0 and at most 10"),
        ("drop_path=2", "drop_path is 2.0; it must be at least 0 and below 1"),
        ("flip=5", "flip is 5.0; it must be at least 0 and at most 1"),
        ("clip_grad_norm=-1", "clip_grad_norm is -1.0; it must be a finite number, above 0"),
        ("mask_ratio=[0.5, 0.1]", "mask_ratio is [0.5, 0.1]; its first number must not be above its second"),
        (f"steps={10**400}", "; it must be at least 1 and at most 1e+09"),
        (f"base_lr={10**400}", "; it must be a number"),
        ("micro_batch_size=half", "micro_batch_size is 'half'; it must be a whole number, or auto"),
        ("micro_batch_size=-1", "micro_batch_size is -1; it must be at least 0"),
        ("steps", "--set 'steps' is not key=value"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("local_crop_size_px=50", "local_crop_size_px 50 is not a multiple of patch_size 16; change one"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(assignment: str, message: str) -> None:
    with pytest.raises(ToolkitError) as problem:
        settings(assignments=[assignment])
    assert message in str(problem.value)


def numeric(kind: object) -> bool:
    """Tell whether values of a type are numbers, or have numbers in them."""
    parts = get_args(kind)
    return any(map(numeric, parts)) if parts else kind in (int, float) or type(kind) is int


def with_number(name: str, number: float) -> object:
    """Return the default of a setting with its last number replaced."""
    default = getattr(TrainConfig(), name)
    if isinstance(default, tuple):
        return [*default[:-1], number] if default else [0.5, 0.5, number]
    return number


def test_every_number_among_the_settings_has_a_range() -> None:
    types = get_type_hints(DistillConfig)
    assert {name for name, kind in types.items() if numeric(kind)} == set(RANGES)
    assert set(RISING) < set(RANGES)


@pytest.mark.parametrize("name", RANGES)
def test_no_number_out_of_its_range_is_accepted(name: str, tmp_path: Path) -> None:
    low, high = bounds(RANGES[name])
    beyond = [math.nan, math.inf, -math.inf]
    beyond += [] if math.isinf(low) else [low - 1 - abs(low), *([low] if RANGES[name][0] == "(" else [])]
    beyond += [] if math.isinf(high) else [high * 2 + 1, *([high] if RANGES[name][-1] == ")" else [])]
    for number in beyond:
        value = with_number(name, int(number) if math.isfinite(number) and number == int(number) else number)
        text = json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(f"{name} = {text}\n")
        given: list[dict[str, Any]] = [
            {"assignments": [f"{name}={text}"]},
            {"environment": {f"DINOV2_{name.upper()}": text}},
            {"recipe": str(recipe)},
            {"flags": {name: value}},
        ]
        for each in given:
            with pytest.raises(ToolkitError, match=rf"^{name} is .*; (it must be|choose one of) "):
                settings(**each)


def test_wrong_steps_in_a_recipe_are_refused_before_they_scale_a_schedule(tmp_path: Path) -> None:
    (tmp_path / "zero.toml").write_text("steps = 0\n")
    with pytest.raises(ToolkitError, match="steps is 0; it must be at least 1"):
        settings(str(tmp_path / "zero.toml"), assignments=["steps=5"])


def test_old_names_of_keys_and_values_are_understood_wherever_they_are_given(tmp_path: Path) -> None:
    recipe = tmp_path / "config.toml"
    recipe.write_text('recompute = "cheap"\nsplit_views = true\n[losses]\nkoleo_gather = true\n')
    old = settings(str(recipe))
    assert old.activation_checkpointing == "selective" and old.sequential_views and old.koleo_distributed
    assert settings(assignments=["recompute=blocks"]).activation_checkpointing == "full"
    assert settings(environment={"DINOV2_RECOMPUTE": "blocks"}).activation_checkpointing == "full"
    assert settings(str(recipe), assignments=["recompute=nothing"]).activation_checkpointing == "none"


def test_an_unknown_recipe_and_a_broken_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no recipe 'huge'; name a TOML file or one of continue, .*vitl16-short"):
        settings("huge")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(ToolkitError, match="not valid TOML"):
        settings(str(tmp_path / "broken.toml"))


def test_setting_the_steps_alone_scales_the_schedule_and_keeps_what_is_set_beside_them() -> None:
    config = settings("vitl16-short", assignments=["steps=1250"])
    assert (config.warmup_steps, config.teacher_temp_warmup_steps, config.freeze_last_layer_steps) == (125, 375, 12)
    config = settings("vitl16-short", assignments=["steps=1250", "warmup_steps=7"])
    assert (config.warmup_steps, config.teacher_temp_warmup_steps) == (7, 375)
    assert settings("vitl16-short", assignments=["warmup_steps=7"]).warmup_steps == 7


def test_a_recipe_states_its_schedules_and_one_longer_than_the_run_is_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("steps = 250_000\n")
    assert settings(str(recipe)).warmup_steps == 12_500
    assert settings(str(recipe), assignments=["steps=25_000"]).warmup_steps == 1250
    recipe.write_text("steps = 5000\n")
    with pytest.raises(ToolkitError, match="warmup_steps, by default 12,500, is more than the 5,000 steps of recipe"):
        settings(str(recipe))


# What the released code sets, in this toolkit's keys: an "epoch" is 1250 iterations, the batch that of all GPUs, and
# the blur what its code does. Source: facebookresearch/dinov2 at b8931f7, dinov2/configs/ssl_default_config.yaml,
# train/vitl16_short.yaml, train/vitl14.yaml, train/vitg14.yaml, data/augmentations.py.
EPOCH = 1250
RELEASED_SHORT: dict[str, object] = {
    "arch": "vit_large",
    "patch_size": 16,
    "ffn": "mlp",
    "num_register_tokens": 0,
    "layer_scale": 1e-5,
    "drop_path": 0.3,
    "pos_embed_antialias": False,
    "pos_embed_offset": 0.1,
    "steps": 100 * EPOCH,
    "batch_size": 32 * 64,
    "separate_heads": False,
    "num_prototypes": 65_536,
    "bottleneck_dim": 256,
    "hidden_dim": 2048,
    "global_crop_size_px": 224,
    "global_crop_scale": (0.32, 1.0),
    "num_local_crops": 8,
    "local_crop_size_px": 96,
    "local_crop_scale": (0.05, 0.32),
    "flip": 0.5,
    "jitter": 0.8,
    "jitter_strength": (0.4, 0.4, 0.2, 0.1),
    "grayscale": 0.2,
    "blur": (0.0, 0.9, 0.5),
    "blur_sigma_px": (0.1, 2.0),
    "solarize": (0.0, 0.2, 0.0),
    "mask_probability": 0.5,
    "mask_ratio": (0.1, 0.5),
    "dino_weight": 1.0,
    "ibot_weight": 1.0,
    "koleo_weight": 0.1,
    "koleo_distributed": False,
    "centering": "softmax_center",
    "student_temp": 0.1,
    "teacher_temp": (0.04, 0.07),
    "teacher_temp_warmup_steps": 30 * EPOCH,
    "momentum": (0.992, 1.0),
    "base_lr": 0.004,
    "hold_lr": False,
    "min_lr": 1e-6,
    "warmup_steps": 10 * EPOCH,
    "weight_decay": (0.04, 0.4),
    "clip_grad_norm": 3.0,
    "layerwise_decay": 0.9,
    "patch_embed_lr_mult": 0.2,
    "freeze_last_layer_steps": 1 * EPOCH,
    "freeze_backbone_steps": 0,
    "in_chans": 3,
    "bit_depth": 8,
    "pixel_mean": (),
    "pixel_std": (),
    "depth": 0,
    "embed_dim": 0,
    "num_heads": 0,
    "checkpoint_every": 3 * EPOCH,
    "keep_checkpoints": 3,
    "micro_batch_size": 0,
}
RELEASED_LARGE = RELEASED_SHORT | {
    "patch_size": 14,
    "ffn": "swiglu",
    "drop_path": 0.4,
    "steps": 500 * EPOCH,
    "batch_size": 96 * 32,
    "separate_heads": True,
    "num_prototypes": 131_072,
    "bottleneck_dim": 384,
    "ibot_num_prototypes": 131_072,
    "ibot_bottleneck_dim": 256,
    "local_crop_size_px": 98,
    "centering": "sinkhorn_knopp",
    "momentum": (0.994, 1.0),
    "base_lr": 2e-4,
    "warmup_steps": 80 * EPOCH,
    "weight_decay": (0.04, 0.2),
    "layerwise_decay": 1.0,
}
OWN_KEYS = {  # which the released code has not, or whose value says nothing about the result
    *(field.name for field in fields(CostConfig)),
    *("seed", "crop_ratio", "max_skipped_steps", "mixed_precision", "sequential_views", "activation_checkpointing"),
}


@pytest.mark.parametrize(
    ("recipe", "released"),
    [
        ("vitl16-short", RELEASED_SHORT),
        ("vitl14", RELEASED_LARGE),
        ("vitg14", RELEASED_LARGE | {"arch": "vit_giant2", "batch_size": 256 * 12}),
    ],
)
def test_a_released_recipe_has_the_released_values_key_by_key(recipe: str, released: dict[str, object]) -> None:
    resolved = asdict(settings(recipe))
    assert {name: resolved[name] for name in released} == released
    not_compared = resolved.keys() - released.keys() - OWN_KEYS
    assert not_compared <= {"ibot_num_prototypes", "ibot_bottleneck_dim"}  # which count with separate heads only


def test_every_recipe_for_its_own_number_of_steps_states_its_schedules() -> None:
    for path in RECIPES.glob("*.toml"):
        stated = read_recipe(path.stem)
        assert stated["steps"] == TrainConfig.steps or {*SCHEDULE_KEYS} - stated.keys() <= {"freeze_backbone_steps"}


def test_the_written_config_repeats_the_run(tmp_path: Path) -> None:
    config = settings("tiny", assignments=["steps=77", 'arch=a "b\\c', "mask_ratio=[0.25, 0.5]"])
    write_config(config, tmp_path / "config.toml")
    assert settings(str(tmp_path / "config.toml")) == config
    assert (tmp_path / "config.toml").read_text().startswith("# Every setting of this run")


def test_every_shipped_recipe_is_valid_and_states_the_shared_keys() -> None:
    names = {path.stem for path in (Path(train.__file__).parent / "recipes").glob("*.toml")}
    assert {"tiny", "vits16-1gpu", "vitb14-8gpu", "vitl16-short", "vitl14", "vitg14", "highres", "continue"} == names
    for name in names:
        settings(name)
        assert {"steps", "batch_size", "checkpoint_every", "arch", "seed"} <= set(read_recipe(name))


def test_a_batch_that_grows_survives_the_run_folder(tmp_path: Path) -> None:
    growth = ["batch_size=[[0, 8], [100, 16]]"]
    config = resolve(TrainConfig, recipe="tiny", assignments=growth)
    assert config.batch_size == ((0, 8), (100, 16))
    write_config(config, tmp_path / "config.toml")
    repeated = resolve(TrainConfig, recipe=str(tmp_path / "config.toml"))
    assert repeated == config


@pytest.mark.parametrize("value", ["[]", "[8, 16]", "[[8]]", "[[10, 8]]", "[[0, 8], [0, 16]]", "[[0, 0]]", "0", "much"])
def test_an_invalid_batch_size_is_refused_with_an_example(value: str) -> None:
    with pytest.raises(ToolkitError, match=r"batch_size is .*|\[\[0, 256\], \[100000, 512\]\]"):
        resolve(TrainConfig, recipe="tiny", assignments=[f"batch_size={value}"])
