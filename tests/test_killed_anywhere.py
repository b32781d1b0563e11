"""Every command that writes, killed before each change that it makes to the disk, ends at its next run as undisturbed.

A change is a call that renames, removes, flushes or makes a file or folder, or enters a row in the catalog.
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_toolkit.cli import app
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store import catalog

CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "utime")  # of `os`
SMALL = "arch=vit_tiny depth=1 steps=4 batch_size=4 checkpoint_every=1 keep_checkpoints=2 log_every=1 patch_size=4 "
SMALL += "num_prototypes=16 hidden_dim=8 bottleneck_dim=8 global_crop_size_px=8 local_crop_size_px=8 num_local_crops=1 "
SMALL += "mixed_precision=no num_workers=0"
SETTINGS = " ".join(f"--set {change}" for change in SMALL.split())
COMMANDS = {
    "embed": "curate embed a -o e.parquet --model pixels --num-workers 1",
    "dedup": "curate dedup pool.parquet -o u.parquet --threshold 0.9 --sheet u.png",
    "cluster": "curate cluster pool.parquet -o c.parquet --num-clusters 4,2 --sample 8 --sheet c.png",
    "retrieve": "curate retrieve --queries q.parquet --pool pool.parquet --k 2 -o r.parquet",
    "union": "curate union q.parquet pool.parquet -o both.parquet",
    "map": "curate map pool.parquet -o m.parquet",
    "sql": "catalog sql select|*|from|'pool.parquet'|where|width|>|1 -o s.parquet",
    "export": "export model --to official -o m.pth",
    "probe": "evaluate probe --model pixels --train a --test b --method knn -o scores.parquet",
    "pca": "evaluate pca b --model model -o pca.png",
    "pretrain": f"train pretrain pool.parquet -o runs/x --recipe tiny --resume {SETTINGS}",
    "distill": f"train distill pool.parquet -o runs/y --teacher model --objective features --resume {SETTINGS}",
}
CLOCKS = ("metrics.jsonl", "metrics.parquet", "provenance.json", "status.json", "checksums.json")  # of runs, and paths
FAST = ("embed", "cluster", "export")  # one boundary in eight; all of all commands are slow


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, two manifests and a model, kept in `pristine` too."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "work" / ".dinov2" / "catalog.duckdb"))
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=24, depth=1, num_heads=3, img_size=8, layer_scale=1.0)
    save_model(Path("model"), backbone=backbone, heads={}, preprocess=Preprocess(8, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    rng = np.random.default_rng(0)
    for number in range(16):
        path = Path("ab"[number % 2], "xy"[number // 2 % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    Path("a", "broken.png").write_text("no image")
    for command in ("curate embed a b -o pool.parquet --model pixels", "curate embed b -o q.parquet --model pixels"):
        assert ended(command) == 0
    shutil.copytree(tmp_path / "work", tmp_path / "pristine")
    return tmp_path / "work"


def ended(command: str, kill_before: int | None = None) -> int | None:
    """Run a command in a process of its own, which is killed before its n-th change; return its exit code."""

    def run() -> None:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        torch.set_num_threads(1)
        if kill_before is not None:
            _count_changes(kill_before)
        arguments = [argument.replace("|", " ") for argument in command.split()]
        app([*arguments, "-q"] if arguments[0] != "catalog" else arguments, standalone_mode=False)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{command} hangs: {Path('said').read_text()}")
    return process.exitcode


def _count_changes(kill_before: int) -> None:
    """Kill this process before its n-th change."""
    made = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal made
            made += 1
            if made == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **more)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    catalog.record = counted(catalog.record)


def snapshot() -> dict[str, bytes | None]:
    """Return the content of every file but those of the catalog and the cache; None for what has clocks in it."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.name != "said"]
    own = [path for path in files if path.parts[0] != ".dinov2"]
    return {str(path): None if path.name in CLOCKS else path.read_bytes() for path in own}


def leftovers() -> list[str]:
    """Return temporary files, locks and unfinished work that are still there."""
    names = [str(path) for path in Path().rglob("*")]
    marks = (".tmp", ".lock", "progress-", "embed-", ".damaged-", "clustering-", "spill")
    return [name for name in names if any(mark in name for mark in marks) and not name.endswith("/.lock")]


def known() -> set[tuple[str, str]]:
    return {(artifact.path, artifact.kind) for artifact in catalog.artifacts()}


def reset(work: Path) -> None:
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(work.parent / "pristine", work, dirs_exist_ok=True)


def assert_kills_do_not_show(work: Path, name: str, step: int) -> int:
    """Kill a command before every `step`-th change; return how often it was killed."""
    command = COMMANDS[name]
    assert ended(command) == 0, Path("said").read_text()
    expected, rows = snapshot(), known()
    assert leftovers() == []
    num_killed, at = 0, 1
    while True:
        reset(work)
        if ended(command, kill_before=at) != -signal.SIGKILL:
            return num_killed
        num_killed += 1
        assert ended(command) == 0, (at, Path("said").read_text())
        found = snapshot()
        assert found.keys() == expected.keys(), (at, found.keys() ^ expected.keys())
        assert [path for path in found if found[path] != expected[path]] == [], at
        assert leftovers() == [], at
        assert known() == rows, at
        at += step


@pytest.mark.parametrize("name", FAST)
def test_a_command_killed_at_some_changes_ends_at_its_next_run_as_undisturbed(work: Path, name: str) -> None:
    assert assert_kills_do_not_show(work, name, step=8) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_change_ends_at_its_next_run_as_undisturbed(work: Path, name: str) -> None:
    assert assert_kills_do_not_show(work, name, step=1) > 5
