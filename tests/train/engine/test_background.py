import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.launch import ALONE
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_heads
from dinov2_toolkit.tests.train.engine.test_checkpoint import one_step
from dinov2_toolkit.tests.train.small_run import SETTINGS, noise_images, repeatable_metrics
from dinov2_toolkit.train.engine import background
from dinov2_toolkit.train.engine.background import BackgroundCheckpoints, background_checkpoints, load_shards
from dinov2_toolkit.train.engine.checkpoint import CHECKSUMS_FILE, SHARDS, checkpoints, damage
from dinov2_toolkit.train.engine.fsdp import full_tensor, meta_copy, shard
from dinov2_toolkit.train.engine.optimizer import build_optimizer
from dinov2_toolkit.train.objective.ssl_model import SSLModel

PREPROCESS = Preprocess(8, 0.5, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sharded model counts as large."""
    monkeypatch.setattr(background, "LARGE_BYTES", 0)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", (tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_model(seed: int, embed_dim: int = 16) -> SSLModel:
    torch.manual_seed(seed)
    backbone = VisionTransformer(patch_size=4, embed_dim=embed_dim, depth=2, num_heads=2, img_size=8)
    heads = [ProjectionHead(embed_dim, 12, hidden_dim=8, bottleneck_dim=4) for _ in range(2)]
    return SSLModel(backbone, *heads, centering="softmax_center").train()


def sharded_model(
    folder: Path, seed: int = 0, embed_dim: int = 16
) -> tuple[SSLModel, torch.optim.Optimizer, BackgroundCheckpoints]:
    model = small_model(seed, embed_dim)
    empty = meta_copy(model)
    shard(
        model.student,
        model.teacher,
        torch.device("cpu"),
        copies_and_shards=(1, dist.get_world_size()),
        half=None,
        keep_gathered=False,
    )
    (folder / "run").mkdir(exist_ok=True)
    writer = background_checkpoints(folder / "run" / "checkpoints", model, empty, PREPROCESS, ALONE)
    assert writer is not None
    return model, build_optimizer(model.student), writer


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(value).clone() for name, value in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_training_goes_on_from_shards_bit_for_bit_and_steps_during_the_writing_do_not_show(
    tmp_path: Path, alone: None
) -> None:
    model, optimizer, writer = sharded_model(tmp_path)
    one_step(model, optimizer, 1)
    writer.save(model, optimizer, {"step": 1}, keep=2, best_step=None)
    one_step(model, optimizer, 2)  # while it is written
    expected = whole(model)
    writer.wait()
    [path] = checkpoints(tmp_path / "run" / "checkpoints")
    assert damage(path, 9) is None

    other, other_optimizer, _ = sharded_model(tmp_path, seed=99)
    assert load_shards(path, other, other_optimizer) == {"step": 1}
    one_step(other, other_optimizer, 2)
    assert_equal(whole(other), expected)

    plain = small_model(99)
    plain_optimizer = build_optimizer(plain.student)
    assert load_shards(path, plain, plain_optimizer) == {"step": 1}
    one_step(plain, plain_optimizer, 2)
    torch.testing.assert_close(plain.state_dict(), expected, rtol=1e-5, atol=1e-6)


def test_the_checkpoint_is_a_model_and_has_no_pickle(tmp_path: Path, alone: None) -> None:
    model, optimizer, writer = sharded_model(tmp_path)
    writer.save(model, optimizer, {"step": 7}, keep=2, best_step=None)
    writer.wait()
    [path] = checkpoints(tmp_path / "run" / "checkpoints")
    backbone = whole(model.teacher["backbone"])
    for source in (path, tmp_path / "run"):
        assert_equal(load_backbone(source).state_dict(), backbone)
        assert set(load_heads(source)) == {"dino_head", "ibot_head"}
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert names == [
        "checksums.json",
        "model.json",
        "shards/shard-00001-model-00001-of-00001.safetensors",
        "state.json",
        "teacher.safetensors",
    ]
    with safe_open(path / names[2], "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {  # noqa: SIM118  # it is no dictionary
            "student",
            "dino_center",
            "ibot_center",
            "exp_avg",
            "exp_avg_sq",
            "optimizer_steps",
        }


def test_the_last_few_and_the_best_stay(tmp_path: Path, alone: None) -> None:
    model, optimizer, writer = sharded_model(tmp_path)
    for step in (1, 2, 3, 4, 4):
        writer.save(model, optimizer, {"step": step}, keep=2, best_step=1)
    writer.wait()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000001", "step-0000003", "step-0000004"]


@pytest.mark.parametrize("name", ["teacher.safetensors", SHARDS, f"{SHARDS}/*.safetensors", CHECKSUMS_FILE])
def test_what_is_missing_or_changed_is_found(tmp_path: Path, alone: None, name: str) -> None:
    model, optimizer, writer = sharded_model(tmp_path)
    writer.save(model, optimizer, {"step": 1}, keep=2, best_step=None)
    writer.wait()
    [path] = checkpoints(tmp_path / "run" / "checkpoints")
    [file] = path.glob(name)
    if file.is_file():
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert damage(path, 9) is not None
        file.unlink()
    else:
        shutil.rmtree(file)
    assert damage(path, 9) is not None


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path, alone: None) -> None:
    model, optimizer, writer = sharded_model(tmp_path)
    writer.save(model, optimizer, {"step": 1}, keep=2, best_step=None)
    writer.wait()
    [path] = checkpoints(tmp_path / "run" / "checkpoints")
    wider = small_model(0, embed_dim=32)
    with pytest.raises(ToolkitError, match=r"of another model: .* is \(.*\), wanted \("):
        load_shards(path, wider, build_optimizer(wider.student))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, alone: None) -> None:
    model, optimizer, writer = sharded_model(tmp_path)
    with torch.no_grad():
        next(model.student["dino_head"].parameters()).mul_(torch.nan)
    writer.save(model, optimizer, {"step": 1}, keep=2, best_step=None)
    with pytest.raises(ToolkitError, match=r"step 1 left weights that are not finite \(student.dino_head"):
        writer.wait()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_error_of_writing_is_one_line_and_leaves_nothing(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, writer = sharded_model(tmp_path)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data", no_space)
    writer.save(model, optimizer, {"step": 1}, keep=2, best_step=None)
    with pytest.raises(ToolkitError, match="process 0 could not write its part of .*step-0000001: .*No space left"):
        writer.wait()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_small_and_unsharded_models_are_saved_by_the_main_process(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(0)
    assert background_checkpoints(tmp_path, model, None, PREPROCESS, ALONE) is None
    monkeypatch.setattr(background, "LARGE_BYTES", 1 << 20)
    assert background_checkpoints(tmp_path, model, meta_copy(model), PREPROCESS, ALONE) is None


# Kills


def killed_while_writing(folder: Path, before_change: int) -> bool:
    """Write checkpoints 2 and 3 after checkpoint 1 in a process that is killed before its n-th change to the disk."""

    def run() -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", (folder / f"meeting{before_change}").as_uri(), rank=0, world_size=1)
        model, optimizer, writer = sharded_model(folder)
        made = 0

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                nonlocal made
                made += 1
                if made == before_change:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **more)

            return call

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        for step in (2, 3):
            writer.save(model, optimizer, {"step": step}, keep=1, best_step=None)
            writer.wait()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_all_over(folder: Path, stride: int) -> None:
    """Kill a writer before every n-th change, and then let one end."""
    torch.set_num_threads(1)  # a fork has no other threads
    background.LARGE_BYTES = 0
    num_killed, saved = 0, folder / "run" / "checkpoints"
    while killed_while_writing(folder, 1 + stride * num_killed):
        num_killed += 1
        found = checkpoints(saved) if saved.exists() else []
        assert [path for path in found if damage(path, 9) is not None] == []
    assert not killed_while_writing(folder, 10_000)
    assert [path.name for path in saved.iterdir()] == ["step-0000003"]
    print(num_killed)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_change_leaves_whole_checkpoints_and_the_next_writer_nothing_else(
    tmp_path: Path, stride: int
) -> None:
    killing = [sys.executable, __file__, str(tmp_path), str(stride)]
    done = subprocess.run(killing, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (4 if stride > 1 else 30)


# Whole commands

COMMAND = """
import sys
from dinov2_toolkit import cli
from dinov2_toolkit.train.engine import background
background.LARGE_BYTES = 0
raise SystemExit(cli.run())
"""


def train(manifest: Path, name: str, *more: str, count: int = 2, large: bool = True, code: int = 0) -> Path:
    """Train in shards over some processes; return the run folder."""
    changes = [part for text in SETTINGS for part in ("--set", text)]
    program = ["-c", COMMAND] if large else ["-m", "dinov2_toolkit"]
    output = manifest.parent / name
    arguments = ["train", "pretrain", str(manifest), "-o", str(output), "--recipe", "tiny", *changes, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if count > 1 else {}
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * count, "\n".join(said)
    assert ("are written in the background" in said[0]) == (large and count > 1)
    return output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def cut_back(run: Path) -> None:
    """Take a finished run back to its checkpoint of step 2."""
    for name in ("model.json", "teacher.safetensors", "checkpoints/step-0000004", "checkpoints/step-0000006"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


@pytest.mark.slow
def test_a_run_with_checkpoints_in_shards_is_the_run_without_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    manifest = noise_images(tmp_path)
    expected = train(manifest, "plain", large=False)
    run = train(manifest, "large")
    for _ in range(2):
        assert repeatable_metrics(run) == repeatable_metrics(expected)
        for file in ("teacher.safetensors", "checkpoints/step-0000004/teacher.safetensors"):
            assert_equal(load_file(run / file), load_file(expected / file))
        assert len(list((run / "checkpoints" / "step-0000006" / SHARDS).iterdir())) == 2
        assert not [path for path in run.rglob("*") if path.name.startswith(".dinov2-")]
        cut_back(run)
        train(manifest, "large", "--resume")
    cut_back(run)
    train(manifest, "large", "--resume", large=False)  # the rest of it in whole files
    assert_equal(load_file(run / "teacher.safetensors"), load_file(expected / "teacher.safetensors"))
    cut_back(run)
    train(manifest, "large", "--resume", count=4)
    state = json.loads((run / "checkpoints" / "step-0000006" / "state.json").read_text())
    assert state["step"] == 6 and len(list((run / "checkpoints" / "step-0000006" / SHARDS).iterdir())) == 4
    cut_back(run)
    train(manifest, "large", "--resume", count=1)
    assert (run / "checkpoints" / "step-0000006" / "optimizer.pt").exists()


if __name__ == "__main__":
    kill_all_over(Path(sys.argv[1]), int(sys.argv[2]))
