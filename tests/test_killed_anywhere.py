"""Every command that writes, killed before each change that it makes to the disk, ends at its next run as undisturbed.

A change is a call that renames, removes, flushes or makes a file or folder, or enters a row in the catalog. After the
kill, every file that had its name before is the old one or the new one.
"""

import importlib
import multiprocessing
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dinov2_toolkit
from dinov2_toolkit import cli
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.cache import cached
from dinov2_toolkit.tests.train.small_run import CLOCK, repeatable_metrics

CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "utime")  # of `os`
SMALL = "arch=vit_tiny depth=1 steps=3 batch_size=4 checkpoint_every=1 keep_checkpoints=2 log_every=1 patch_size=4 "
SMALL += "num_prototypes=16 hidden_dim=8 bottleneck_dim=8 global_crop_size_px=8 local_crop_size_px=8 num_local_crops=1 "
SMALL += "mixed_precision=no num_workers=0"
SETTINGS = " ".join(f"--set {change}" for change in SMALL.split())
DEDUP = "curate dedup pool.parquet -o u.parquet"
RETRIEVE = "curate retrieve --queries q.parquet --pool pool.parquet -o r.parquet"
PROBE = "evaluate probe -o scores.parquet"
COMMANDS = {
    "embed": "curate embed a b -o e.parquet --model pixels --num-workers 1",
    "embed by a model": "curate embed a b -o e.parquet --model model --tokens cls+mean --num-workers 1",
    "embed anew": "curate embed a b c -o pool.parquet --model pixels --num-workers 1 --force",
    "dedup": f"{DEDUP} --threshold 0.9 --sheet u.png",
    "dedup by pixels": f"{DEDUP} --verify --sheet u.png",
    "dedup of equal files": f"{DEDUP} --exact bytes",
    "dedup against": f"{DEDUP} --threshold 0.9 --against q.parquet",
    "dedup of news": f"{DEDUP} --threshold 0.9 --known q.parquet",
    "dedup anew": f"{DEDUP} --threshold 0.5 --force",
    "calibrate": "curate dedup pool.parquet --calibrate thresholds.png",
    "cluster": "curate cluster pool.parquet -o c.parquet --num-clusters 4,2 --sample 8 --sheet c.png",
    "cluster flat": "curate cluster pool.parquet -o c.parquet --num-clusters 4 --allocation flat --sample 8",
    "retrieve": f"{RETRIEVE} --k 2",
    "retrieve others": f"{RETRIEVE} --k 2 --fill",
    "retrieve by cluster": f"{RETRIEVE} --per-cluster 2 --num-clusters 3 --include-queries",
    "union": "curate union q.parquet pool.parquet -o both.parquet",
    "union of vectors": "curate union q.parquet pool.parquet --embeddings -o both.parquet",
    "map": "curate map pool.parquet -o m.parquet",
    "map page": "curate map pool.parquet -o m.parquet --html m.html --neighbors 2 --thumbnails 8",
    "sql": "catalog sql select|*|from|'pool.parquet'|where|width|>|1 -o s.parquet",
    "rebuild": "catalog rebuild .",
    "gc": "catalog gc",
    "export": "export model --to official -o m.pth",
    "export to hf": "export model --to hf -o hf",
    "probe": f"{PROBE} --model pixels --train a --test b --method knn",
    "probe by all": f"{PROBE} --train pool.parquet --test q.parquet --method linear --method logreg --method retrieval",
    "segment": f"{PROBE} --model model --train masked.parquet --test masked.parquet --method segment",
    "pca": "evaluate pca b --model model -o pca.png",
    "attention": "evaluate attention b --model model -o attention.png",
    "match": "evaluate match a/x/0.png b/x/1.png --model model -o match.png",
    "neighbors": "evaluate neighbors b/x/1.png --pool pool.parquet -o neighbors.png",
    "report": "report pool.parquet -o report.html",
    "preview": f"train pretrain pool.parquet -o runs/x --recipe tiny --preview crops.png --dry-run {SETTINGS}",
    "pretrain": f"train pretrain pool.parquet -o runs/x --recipe tiny --resume {SETTINGS}",
    "pretrain anew": f"train pretrain pool.parquet -o runs/x --recipe tiny --force --seed 1 {SETTINGS}",
    "distill": f"train distill pool.parquet -o runs/y --teacher model --objective features --resume {SETTINGS}",
}
EARLIER = {  # what was done before
    "dedup anew": (f"{DEDUP} --threshold 0.9",),
    "gc": (f"{DEDUP} --threshold 0.9", "curate union q.parquet pool.parquet -o both.parquet"),
    "pretrain anew": (f"train pretrain pool.parquet -o runs/x --recipe tiny {SETTINGS}",),
}
GONE = {"gc": ("both.parquet",), "rebuild": (".dinov2/catalog.duckdb",)}  # and removed
CLOCKS = ("provenance.json", "checksums.json")  # of runs
FULL = ("embed", "dedup by pixels", "cluster", "map page", "export", "export to hf", "pca", "pretrain")
FAST = ("embed", "cluster", "export")  # one boundary in eight; all of all commands are slow


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import all that commands import, once for the processes that are forked."""
    for module in pkgutil.walk_packages(dinov2_toolkit.__path__, "dinov2_toolkit."):
        if module.name.split(".")[1] not in ("tests", "benchmarks", "examples", "__main__"):
            importlib.import_module(module.name)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, manifests and a model, kept in `pristine` too."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "work" / ".dinov2" / "catalog.duckdb"))
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=24, depth=1, num_heads=3, img_size=8, layer_scale=1.0)
    save_model(Path("model"), backbone=backbone, heads={}, preprocess=Preprocess(8, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    rng = np.random.default_rng(0)
    for number in range(24):
        path = Path("abc"[number % 3], "xy"[number // 3 % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    Path("masks").mkdir()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 128).save("masks/0.png")
    pictures = [str(path) for path in sorted(Path("a").rglob("*.png"))]
    pq.write_table(pa.table({"uri": pictures, "mask": ["masks/0.png"] * len(pictures)}), "masked.parquet")
    Path("a", "broken.png").write_text("no image")
    for command in ("curate embed a b -o pool.parquet --model pixels", "curate embed b -o q.parquet --model pixels"):
        assert ended(command) == 0
    shutil.copytree(tmp_path / "work", tmp_path / "pristine")
    return tmp_path / "work"


def ended(command: str, kill_before: int | None = None, limited: Callable[[], object] = lambda: None) -> int | None:
    """Run a command in a process of its own, which is killed before its n-th change; return its exit code."""

    def run() -> None:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", closefd=False)  # not what pytest captures
        torch.set_num_threads(1)
        if kill_before is not None:
            _count_changes(kill_before)
        limited()
        arguments = [argument.replace("|", " ") for argument in command.split()]
        sys.argv = ["dinov2", *arguments, *(["-q"] if arguments[0] != "catalog" else [])]
        raise SystemExit(cli.run())

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

    def counted(change: Callable[..., Any], changes: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal made
            made += changes(*arguments, **more)
            if made == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **more)

        return call

    def is_new(path: str, *_: object, **more: Any) -> bool:
        return bool(more) or not os.path.lexists(path)

    def is_there(path: str, *_: object, **more: Any) -> bool:
        return bool(more) or os.path.lexists(path)  # `more` is an open folder

    for name in CHANGES:
        changes = {"mkdir": is_new, "unlink": is_there, "rmdir": is_there}.get(name, lambda *_, **__: True)
        setattr(os, name, counted(getattr(os, name), changes))
    catalog.record = counted(catalog.record)


def snapshot() -> dict[str, bytes | None]:
    """Return the content of every file but those of the catalog and the cache; None for what has clocks in it."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.name != "said"]
    own = [path for path in files if path.parts[0] != ".dinov2"]
    return {str(path): content(path) for path in own}


def content(path: Path) -> bytes | None:
    if path.name == "metrics.jsonl":
        return repr(repeatable_metrics(path.parent)).encode()
    if path.name == "metrics.parquet":
        return repr(pq.read_table(path, use_threads=False).drop_columns(CLOCK).to_pylist()).encode()
    return None if path.name in CLOCKS else path.read_bytes()


def leftovers() -> list[str]:
    """Return temporary files, locks and unfinished work that are still there."""
    names = [str(path) for path in Path().rglob("*")]
    marks = (".tmp", ".lock", "progress-", "embed-", ".damaged-", "clustering-", "spill")
    return [name for name in names if any(mark in name for mark in marks) and not name.endswith("/.lock")]


def known() -> list[tuple[str, str]]:
    return sorted((artifact.path, artifact.kind) for artifact in catalog.artifacts(table="artifacts"))


def reset(work: Path) -> None:
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(work.parent / "pristine", work, dirs_exist_ok=True)


State = tuple[dict[str, bytes | None], list[tuple[str, str]], bool]


def state() -> State:
    """Return what a command has left: files, rows of the catalog, and whether anything is cached."""
    assert leftovers() == []
    return snapshot(), known(), bool(cached())


def undisturbed(work: Path, name: str) -> tuple[dict[str, bytes | None], State]:
    """Run a command without a kill; return what stood before, which `reset` brings back, and what it left."""
    for earlier in EARLIER.get(name, ()):
        assert ended(earlier) == 0, Path("said").read_text()
    for gone in GONE.get(name, ()):
        Path(gone).unlink()
    shutil.rmtree(work.parent / "pristine")
    shutil.copytree(work, work.parent / "pristine")
    before = snapshot()
    assert ended(COMMANDS[name]) == 0, Path("said").read_text()
    expected = state()
    reset(work)
    return before, expected


def assert_old_or_new(before: dict[str, bytes | None], expected: State) -> None:
    """Check that every visible file, but those of a run, is the one before or the one of the whole command."""
    now = {path: content for path, content in snapshot().items() if "/." not in f"/{path}"}
    half = [path for path, content in now.items() if content not in (before.get(path, b"-"), expected[0].get(path))]
    gone = [path for path in before if path not in now]
    assert [path for path in half + gone if not path.startswith("runs")] == []


def assert_ends_as_undisturbed(name: str, expected: State) -> None:
    """Run a command again after its kill, and compare what it leaves."""
    assert ended(COMMANDS[name]) == 0, Path("said").read_text()
    (files, rows, has_cached), found = expected, state()
    assert found[0].keys() == files.keys(), found[0].keys() ^ files.keys()
    assert [path for path in files if found[0][path] != files[path]] == []
    assert found[1:] == (rows, has_cached)


def assert_kills_do_not_show(work: Path, name: str, step: int) -> int:
    """Kill a command before every `step`-th change; return how often it was killed."""
    before, expected = undisturbed(work, name)
    num_killed = 0
    while ended(COMMANDS[name], kill_before=1 + num_killed * step) == -signal.SIGKILL:
        num_killed += 1
        assert_old_or_new(before, expected)
        assert_ends_as_undisturbed(name, expected)
        reset(work)
    return num_killed


@pytest.mark.parametrize("name", FAST)
def test_a_command_killed_at_some_changes_ends_at_its_next_run_as_undisturbed(work: Path, name: str) -> None:
    assert assert_kills_do_not_show(work, name, step=8) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_change_ends_at_its_next_run_as_undisturbed(work: Path, name: str) -> None:
    num_killed = assert_kills_do_not_show(work, name, step=1)
    print(f"{name}: killed {num_killed} times")  # -rP shows it
    assert num_killed >= 2


@pytest.mark.slow
@pytest.mark.parametrize("largest_file", [3_000, 20_000])
@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_the_next_run_ends_as_undisturbed(work: Path, name: str, largest_file: int) -> None:
    """The kernel refuses to write past that many bytes of any file: of outputs, the cache, checkpoints, the catalog."""
    before, expected = undisturbed(work, name)
    limits = (largest_file, largest_file)
    code, said = ended(COMMANDS[name], limited=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)), Path("said")
    assert code == 1 or largest_file > 3_000, code
    if code == 1:
        assert re.fullmatch("error: .*(File too large|no space left|not in the catalog).*\n", said.read_text())
    assert_old_or_new(before, expected)
    assert_ends_as_undisturbed(name, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_too_little_memory_is_one_line_and_the_next_run_ends_as_undisturbed(work: Path, name: str) -> None:
    before, expected = undisturbed(work, name)

    def little_memory() -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (400 << 20), in_use + (400 << 20)))

    if ended(COMMANDS[name], limited=little_memory) != 0:
        assert re.fullmatch("error: .*(emory|thread).*\n", Path("said").read_text())
    assert_old_or_new(before, expected)
    assert_ends_as_undisturbed(name, expected)
