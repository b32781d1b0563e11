import json
from pathlib import Path

import pytest

from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import noise_images, settings
from dinov2_toolkit.train.pretrain import pretrain
from dinov2_toolkit.train.run import MonitorOptions


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, monitor = noise_images(tmp_path), MonitorOptions(profile=2)
    pretrain(manifest, str(tmp_path / "a"), settings("steps=8"), Options(), monitor=monitor)
    assert f"wrote the trace {tmp_path / 'a' / 'trace-6.json'}" in capsys.readouterr().err
    names = [event["name"] for event in json.loads((tmp_path / "a" / "trace-6.json").read_text())["traceEvents"]]
    assert [name for name in sorted(names) if name.startswith("ProfilerStep")] == ["ProfilerStep#5", "ProfilerStep#6"]
    assert names.count("Optimizer.step#AdamW.step") == 2


def test_a_run_that_is_too_short_for_a_trace_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, monitor = noise_images(tmp_path), MonitorOptions(profile=3)
    pretrain(manifest, str(tmp_path / "a"), settings("steps=5"), Options(), monitor=monitor)
    assert "no trace: the run ended within 5 steps" in capsys.readouterr().err
    assert not list((tmp_path / "a").glob("trace*"))
