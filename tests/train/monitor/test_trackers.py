import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from accelerate import Accelerator, tracking

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.train.config import TrainConfig
from dinov2_toolkit.train.monitor import trackers
from dinov2_toolkit.train.monitor.trackers import check_trackers, tracked


def test_unknown_trackers_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    with pytest.raises(ToolkitError, match="--track tensorbored is unknown .did you mean 'tensorboard'..; choose from"):
        check_trackers(["tensorbored"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ToolkitError, match="--track comet_ml needs a package that is not installed; pip install comet-ml"
    ):
        check_trackers(["comet_ml"])


def test_nothing_is_started_unless_asked_for(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with tracked(accelerator, tmp_path, TrainConfig()):
        accelerator.log({"total": 1.0}, step=1)
    assert accelerator.trackers == [] and list(tmp_path.iterdir()) == []


def test_figures_and_settings_reach_a_tracker_which_is_finished_however_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", values, step))

        def finish(self) -> None:
            calls.append(("finish",))

    class Settings:
        def update(self, values: dict[str, object], allow_val_change: bool) -> None:
            calls.append(("settings", values))

    def init(project: str, name: str) -> Run:
        calls.append(("init", project, name))
        return Run()

    wandb = ModuleType("wandb")
    vars(wandb).update(init=init, config=Settings())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    accelerator = Accelerator(cpu=True, log_with=["wandb"], project_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt), tracked(accelerator, tmp_path / "first", TrainConfig()):
        accelerator.log({"total": 1.5}, step=3)
        raise KeyboardInterrupt
    started, settings, logged, finished = calls
    assert started == ("init", "dinov2", "first")
    values = settings[1]
    assert isinstance(values, dict) and values.keys() == asdict(TrainConfig()).keys()
    assert values["teacher_temp"] == "(0.04, 0.07)" and values["steps"] == 125_000
    assert logged == ("log", {"total": 1.5}, 3) and finished == ("finish",)
    accelerator.end_training()
    assert len(calls) == 4
    assert "WANDB_MODE" not in os.environ
