import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.models.weights import load_backbone
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options, Result
from dinov2_toolkit.store.lock import held, is_held
from dinov2_toolkit.tests.train.small_run import SETTINGS, noise_images, repeatable_metrics, settings
from dinov2_toolkit.train import pretrain as module
from dinov2_toolkit.train.config import TrainConfig, command_config, resolve
from dinov2_toolkit.train.data.multicrop import make_masks
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.engine.checkpoint import checkpoints
from dinov2_toolkit.train.engine.schedules import scaled_lr
from dinov2_toolkit.train.launch import read_status
from dinov2_toolkit.train.monitor.metrics import append_metrics, read_metrics
from dinov2_toolkit.train.pretrain import pretrain
from dinov2_toolkit.train.rates import rates_at
from dinov2_toolkit.train.run import MonitorOptions
from dinov2_toolkit.train.run_folder import LOCK


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return noise_images(tmp_path)


def run(manifest: Path, name: str, *changes: str, resume: bool = False, **options: bool) -> Result | None:
    output = str(manifest.parent / name)
    return pretrain(manifest, output, settings(*changes), Options(**options), resume=resume)


def assert_same_run(first: Path, second: Path) -> None:
    assert repeatable_metrics(first) == repeatable_metrics(second)
    last = "checkpoints/step-0000006"
    for file in ("teacher.safetensors", f"{last}/student.safetensors", f"{last}/buffers.safetensors"):
        expected, got = load_file(first / file), load_file(second / file)
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    states = [torch.load(folder / last / "optimizer.pt", weights_only=True)["state"] for folder in (first, second)]
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in state.items())


def stopping_at(step: int) -> Callable[[Path, dict[str, float]], None]:
    """The real `append_metrics`, after which this process is sent SIGTERM at one step."""

    def append_and_signal(run_folder: Path, figures: dict[str, float]) -> None:
        append_metrics(run_folder, figures)
        if figures["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return append_and_signal


def test_a_run_leaves_a_model_metrics_settings_and_a_catalog_row(manifest: Path) -> None:
    result = run(manifest, "a")
    folder = manifest.parent / "a"
    assert result is not None and result.output == str(folder)
    backbone = load_backbone(folder)
    assert (backbone.embed_dim, backbone.depth, backbone.patch_size, backbone.img_size) == (192, 2, 4, 12)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert pq.read_table(folder / "metrics.parquet").column("total").to_pylist() == [line["total"] for line in lines]
    assert lines[-1]["samples"] == 48 and lines[-1]["epoch"] == 48 / 20
    again = resolve(TrainConfig, recipe=str(folder / "config.toml"))
    assert again == settings()
    (row,) = catalog.artifacts("kind = 'run'")
    assert row.path == str(folder)
    assert dict(catalog.metrics_of(row))["total"] == lines[-1]["total"]
    assert [source.role for source in catalog.inputs_of(row)] == ["images"]
    assert read_status(folder) == {"exit_code": 0}


def test_a_growing_batch_in_micro_batches_and_views_resumes_bit_for_bit(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["batch_size=[[0, 4], [8, 8]]", "hold_lr=true", "sequential_views=true", "micro_batch_size=2"]
    run(manifest, "whole", *changes)
    lines = read_metrics(manifest.parent / "whole")
    assert [line["samples"] for line in lines] == [4, 8, 16, 24, 32, 40]
    assert [line["batch_size"] for line in lines] == [4, 4, 8, 8, 8, 8]
    assert lines[2]["lr"] == lines[5]["lr"] == scaled_lr(settings().base_lr, 4)
    monkeypatch.setattr(module, "append_metrics", stopping_at(2))
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        run(manifest, "stopped", *changes)
    monkeypatch.undo()
    run(manifest, "stopped", *changes, resume=True)
    assert_same_run(manifest.parent / "whole", manifest.parent / "stopped")


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted_bit_for_bit_with_any_workers(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(manifest, "whole")
    for workers in (0, 1, 3):
        name = f"stopped-{workers}"
        monkeypatch.setattr(module, "append_metrics", stopping_at(2))
        with pytest.raises(Stopped, match="stopped at step 3 of 6"):
            run(manifest, name, f"num_workers={workers}")
        monkeypatch.undo()
        assert read_status(manifest.parent / name)["exit_code"] == 75
        assert not (manifest.parent / name / "model.json").exists()
        run(manifest, name, f"num_workers={3 - workers}", resume=True)
        assert_same_run(manifest.parent / "whole", manifest.parent / name)


def test_two_processes_do_not_train_into_one_folder(manifest: Path) -> None:
    run(manifest, "a")
    (manifest.parent / "a" / "model.json").unlink()  # unfinished
    told = "another process is training into .*a; wait for it, or end it"
    with held(manifest.parent / "a" / LOCK, "nothing"):
        before = (manifest.parent / "a" / "metrics.jsonl").read_bytes()
        with pytest.raises(ToolkitError, match=told):
            run(manifest, "a", resume=True)
        assert (manifest.parent / "a" / "metrics.jsonl").read_bytes() == before
        assert is_held(manifest.parent / "a" / LOCK)
    assert not is_held(manifest.parent / "a" / LOCK)
    run(manifest, "a", resume=True)


def test_killed_after_a_checkpoint_and_resumed_equals_uninterrupted(manifest: Path) -> None:
    run(manifest, "whole")
    killed = manifest.parent / "killed"
    shutil.copytree(manifest.parent / "whole", killed)
    for later in ("checkpoints/step-0000004", "checkpoints/step-0000006"):
        shutil.rmtree(killed / later)
    (killed / "model.json").unlink()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tot')  # cut short
    run(manifest, "killed", resume=True)
    assert_same_run(manifest.parent / "whole", killed)


def test_a_finished_run_is_up_to_date_and_others_are_not_overwritten(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(manifest, "a", "steps=2")
    weights = (manifest.parent / "a" / "teacher.safetensors").read_bytes()
    run(manifest, "a", "steps=2", "num_workers=2", resume=True)
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(ToolkitError, match="made differently \\(momentum .*0.9, 1.0.*--force"):
        run(manifest, "a", "steps=2", "momentum=[0.9, 1.0]")
    assert (manifest.parent / "a" / "teacher.safetensors").read_bytes() == weights
    (manifest.parent / "a" / "model.json").unlink()
    with pytest.raises(ToolkitError, match="unfinished run \\(step-0000002\\); resume with --resume"):
        run(manifest, "a", "steps=2")
    (manifest.parent / "a" / "notes.txt").write_text("mine")
    (manifest.parent / "a" / "checkpoints" / "mine").mkdir()
    (manifest.parent / "a" / "exported").mkdir()
    for name in ("model.json", "mine.txt"):
        (manifest.parent / "a" / "exported" / name).write_text("mine")
    run(manifest, "a", "steps=2", "momentum=[0.9, 1.0]", force=True)
    assert sorted(path.name for path in (manifest.parent / "a" / "checkpoints").iterdir()) == ["mine", "step-0000002"]
    assert (manifest.parent / "a" / "exported" / "mine.txt").exists()
    assert (manifest.parent / "a" / "teacher.safetensors").read_bytes() != weights
    assert (manifest.parent / "a" / "notes.txt").read_text() == "mine"
    a = str(manifest.parent / "a")
    with pytest.raises(ToolkitError, match="a is what the step reads; choose another -o"):
        pretrain(manifest, a, settings("steps=2"), Options(force=True), init_from=a)
    image = pq.read_table(manifest).column("uri")[0].as_py()
    with pytest.raises(ToolkitError, match="is what the step reads; choose another -o"):
        pretrain(manifest, a, settings("steps=2"), Options(force=True), monitor=MonitorOptions(preview=image))
    assert (manifest.parent / "a" / "teacher.safetensors").exists()


def test_a_finished_run_goes_on_for_more_steps_and_keeps_its_warm_ups(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = manifest.parent / "a"

    def go_on(steps: int) -> None:
        config = command_config(TrainConfig, str(folder), None, [f"steps={steps}"], resume=True, seed=None)
        assert (config.warmup_steps, config.teacher_temp_warmup_steps) == (2, 3)
        pretrain(manifest, str(folder), config, Options(), resume=True)

    run(manifest, "a", "steps=4")
    first = read_metrics(folder)
    with pytest.raises(ToolkitError, match="steps 4, now 7"):
        run(manifest, "a", "steps=7")
    monkeypatch.setattr(module, "append_metrics", stopping_at(5))
    with pytest.raises(Stopped, match="stopped at step 6 of 7"):
        go_on(7)
    monkeypatch.undo()
    assert not (folder / "model.json").exists()  # or it would pass for the finished one
    go_on(7)
    assert "resuming at step 4 of 7" in capsys.readouterr().err
    longer = read_metrics(folder)
    assert [line["step"] for line in longer] == [1, 2, 3, 4, 5, 6, 7] and longer[0]["total"] == first[0]["total"]
    assert longer[4]["lr"] == rates_at(4, settings("steps=7", "warmup_steps=2")).lr > first[3]["lr"]
    assert (folder / "model.json").exists()
    newest = (folder / "model.json").stat().st_mtime_ns
    go_on(7)
    assert "up to date" in capsys.readouterr().err and (folder / "model.json").stat().st_mtime_ns > newest
    with pytest.raises(ToolkitError, match="steps 7, now 5"):
        go_on(5)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ToolkitError, match="no checkpoint to go on from"):
        go_on(9)
    assert load_backbone(folder).depth == 2


def test_deterministic_runs_are_equal_and_have_what_gpus_need_for_it(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        for name in ("a", "b"):
            run(manifest, name, "deterministic=true", "steps=3")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert repeatable_metrics(manifest.parent / "a") == repeatable_metrics(manifest.parent / "b")
    run(manifest, "a", "steps=3")  # changes no result but by rounding: still up to date


def test_a_folder_that_is_no_run_is_never_touched(manifest: Path) -> None:
    photos = manifest.parent / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(ToolkitError, match="exists and is no run folder"):
            run(manifest, "photos", force=force)
    assert [path.name for path in photos.iterdir()] == ["a.jpg"]
    (manifest.parent / "pipes").mkdir()
    (manifest.parent / "pipes" / ".lock").touch()
    os.mkfifo(manifest.parent / "pipes" / "config.toml")
    with pytest.raises(ToolkitError, match="exists and is no run folder"):
        run(manifest, "pipes")


def test_a_dry_run_says_what_it_would_train_and_writes_nothing(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(manifest, "a", dry_run=True) is None
    said = capsys.readouterr().err
    assert "6 steps of 8 images in 1 process: 48 samples, 2.4 passes over 20 images" in said
    assert not (manifest.parent / "a").exists()


def test_gradients_that_are_not_finite_are_skipped_counted_and_end_the_run(manifest: Path) -> None:
    with pytest.raises(
        ToolkitError, match="gradients of the 3 steps up to 4 are not finite; there is no checkpoint yet"
    ):
        run(manifest, "a", "base_lr=1e30", "max_skipped_steps=2", "warmup_steps=0", "freeze_last_layer_steps=0")
    lines = read_metrics(manifest.parent / "a")
    assert lines[-1]["skipped_steps"] == 2
    assert read_status(manifest.parent / "a")["exit_code"] == 1


def test_a_run_starts_from_another_with_its_position_embedding_resampled(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(manifest, "first", "steps=2")
    source = str(manifest.parent / "first")
    model = build_model(settings("global_crop_size_px=16", "num_prototypes=48"), source)
    theirs = load_backbone(source)
    wanted = theirs.state_dict() | {"pos_embed": theirs.interpolated_pos_embed(4, 4)}
    assert wanted["pos_embed"].shape[1] == 17
    for part in (model.student, model.teacher):
        got = part["backbone"].state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert "has no dino_head of this shape" in capsys.readouterr().err
    with pytest.raises(ToolkitError, match="another architecture than the recipe"):
        build_model(settings("depth=3"), source)
    with pytest.raises(ToolkitError, match="no architecture named 'vit_huge'"):
        build_model(settings("arch=vit_huge"))


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_divides_the_masks_of_a_step(num_processes: int) -> None:
    config, samples = settings("global_crop_size_px=28"), np.arange(24, 32)
    whole = make_masks(samples, config).reshape(2, 8, 49)
    for rank in range(num_processes):
        part = make_masks(samples[rank::num_processes], config).reshape(2, -1, 49)
        assert (part == whole[:, rank::num_processes]).all()
    assert (whole.any(2).sum(0) == 1).all()  # one of the two views of each image
    assert (make_masks(samples + 8, config).reshape(2, 8, 49) != whole).any()
    assert (make_masks(samples, settings("global_crop_size_px=28", "seed=1")).reshape(2, 8, 49) != whole).any()


def test_two_processes_give_the_loss_of_one_and_stop_at_a_signal_with_exit_code_75(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # KoLeo would compare the images of one process alone; stochastic depth drops sequences of one process: it is off.
    changes = ["koleo_distributed=true", "layer_scale=1.0", "drop_path=0", "steps=100000", "checkpoint_every=100000"]
    monkeypatch.setattr(module, "append_metrics", stopping_at(6))
    with pytest.raises(Stopped):
        run(manifest, "one", *changes)
    two = manifest.parent / "two"
    assignments = [part for text in [*SETTINGS, *changes] for part in ("--set", text)]
    command = [sys.executable, "-m", "dinov2_toolkit", "train", "pretrain", str(manifest), "-o", str(two)]
    vitl16 = ["--recipe", "vitl16-short", "--num-processes", "2"]
    process = subprocess.Popen([*command, *vitl16, *assignments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(read_metrics(two)) < 6 and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err.decode()
    assert out == b""
    assert f"stopped at step {read_metrics(two)[-1]['step']:,}" in err.decode()
    assert len(checkpoints(two / "checkpoints")) == 1
    for mine, theirs in zip(read_metrics(manifest.parent / "one"), read_metrics(two), strict=False):
        for name in ("total", "dino_local", "dino_global", "ibot", "koleo", "teacher_entropy", "prototype_perplexity"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4)


@pytest.mark.slow
def test_a_run_of_one_process_resumes_on_two(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["koleo_distributed=true", "layer_scale=1.0", "drop_path=0"]
    run(manifest, "one", *changes)
    monkeypatch.setattr(module, "append_metrics", stopping_at(2))
    with pytest.raises(Stopped):
        run(manifest, "two", *changes)
    two = manifest.parent / "two"
    command = [sys.executable, "-m", "dinov2_toolkit", "train", "pretrain", str(manifest), "-o", str(two)]
    done = subprocess.run([*command, "--resume", "--num-processes", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(read_metrics(manifest.parent / "one"), read_metrics(two), strict=True):
        assert theirs["samples"] == mine["samples"]
        for name in ("total", "dino_local", "dino_global", "ibot", "koleo", "teacher_entropy"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4)
