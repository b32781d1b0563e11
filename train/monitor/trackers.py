"""Metrics sent to TensorBoard, Weights & Biases, MLflow and the like, by Accelerate; nothing unless asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ...errors import ToolkitError, nearest
from ..config import TrainConfig

PROJECT = "dinov2"  # what a tracker shows the runs under
RUN_NAME_KEYS = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}  # of a tracker's own arguments


def check_trackers(names: Sequence[str]) -> None:
    """Raise ToolkitError for a tracker that is unknown, or whose package is missing (Accelerate would say nothing)."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = nearest(name, LOGGER_TYPE_TO_CLASS)
            raise ToolkitError(f"--track {name} is unknown{near}; choose from {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if find_spec(name) is None:
            package = name.replace("_", "-")
            raise ToolkitError(f"--track {name} needs a package that is not installed; pip install {package}")


@contextmanager
def tracked(accelerator: Accelerator, run_folder: Path, config: TrainConfig) -> Iterator[None]:
    """Start the trackers that the Accelerator was made with, named after the run, and finish them however it ends."""
    settings = {name: it if isinstance(it, int | float | str) else str(it) for name, it in asdict(config).items()}
    keywords = {tracker: {key: run_folder.name} for tracker, key in RUN_NAME_KEYS.items()}
    accelerator.init_trackers(PROJECT, config=settings, init_kwargs=keywords)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []  # or `end_training` would finish them again
