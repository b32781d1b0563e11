"""The settings of runs, and how they differ from the nearest recipe, the released configuration, and one another."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..errors import ToolkitError
from ..train.config import CONFIG_FILE, COST_KEYS, RECIPES, TrainConfig, resolve
from ..train.distill import DistillConfig

RELEASED = {"vit_giant2": "vitg14"}  # architecture -> the recipe with the released configuration of its size
RELEASED_OTHERWISE = "vitl14"
UNLIKE = ("seed", *COST_KEYS)  # differences that do not count: of chance, and of time and memory alone

Settings = dict[str, object]
Difference = tuple[str, object, object]  # a setting, its value there, its value here


def read_settings(folder: Path, command: str) -> TrainConfig:
    """Return the settings of a run. Raises ToolkitError when they are gone, or of a newer toolkit."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ToolkitError(f"{path} is gone")
    return resolve(DistillConfig if "distill" in command else TrainConfig, str(path))


def nearest_recipe(config: TrainConfig) -> tuple[str, list[Difference]]:
    """Return the shipped recipe from which the fewest settings differ, and these; schedules at the run's own length."""
    compared = [(path.stem, differences(config, path.stem)) for path in sorted(RECIPES.glob("*.toml"))]
    return min(compared, key=lambda pair: len(pair[1]))


def released_recipe(config: TrainConfig) -> tuple[str, list[Difference]]:
    """Return the recipe that holds the released DINOv2 configuration of the nearest size, and what differs from it."""
    name = RELEASED.get(config.arch, RELEASED_OTHERWISE)
    return name, differences(config, name)


def differences(config: TrainConfig, recipe: str) -> list[Difference]:
    """Return what a run set otherwise than a recipe stretched or shortened to as many steps, the steps apart."""
    theirs = asdict(resolve(type(config), recipe, flags={"steps": config.steps}))
    own_steps = asdict(resolve(type(config), recipe))["steps"]
    theirs["steps"] = own_steps
    return [
        (name, theirs[name], value)
        for name, value in asdict(config).items()
        if name not in UNLIKE and value != theirs[name]
    ]


def differing(runs: Mapping[str, TrainConfig]) -> list[list[object]]:
    """Return the settings that are not the same in all runs: a row each, its name and the value of every run."""
    settings = [asdict(config) for config in runs.values()]
    keys = dict.fromkeys(name for each in settings for name in each)
    rows = [[name, *(each.get(name) for each in settings)] for name in keys if name not in COST_KEYS]
    return [[row[0], *map(shown, row[1:])] for row in rows if any(value != row[1] for value in row[1:])]


def shown(value: object) -> object:
    """Return a setting as in config.toml; numbers as they are, to be formatted like all others."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
