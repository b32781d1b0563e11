"""What a GPU computes, against a CPU: training, features, search, copies; run with `pytest -m gpu`.

DEVICE_OF_TESTS=cpu runs the same bodies on a CPU, where most compare it with itself: a rehearsal.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.benchmarks.step import Batch, random_batch, training_step
from dinov2_toolkit.features.extract import extract as extracting
from dinov2_toolkit.features.extract.extract import extract, open_model
from dinov2_toolkit.features.search.join import components_above
from dinov2_toolkit.models import cpu
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Vectors
from dinov2_toolkit.tests.train.small_run import SETTINGS, noise_images
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.engine.parallelize import compile_networks
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.objective.masks import Padding
from dinov2_toolkit.train.objective.ssl_model import SSLModel
from dinov2_toolkit.train.pretrain import pretrain

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("DEVICE_OF_TESTS", "cuda"))
NUM_IMAGES = 8
SMALL = (
    "arch=vit_tiny",
    "depth=3",
    "num_prototypes=96",
    "hidden_dim=64",
    "bottleneck_dim=32",
    "global_crop_size_px=64",
    "local_crop_size_px=32",
    "num_local_crops=3",
    "drop_path=0",
    "layer_scale=0.5",
    "mixed_precision=no",
    "compile=false",
)


@pytest.fixture(autouse=True)
def _a_gpu_and_none_of_the_paths_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEVICE.type == "cpu" or torch.cuda.is_available(), "torch finds no GPU"
    monkeypatch.setattr(cpu, "ENABLED", False)


def config_of(*changes: str) -> TrainConfig:
    return resolve(TrainConfig, "vits16-1gpu", assignments=[*SMALL, *changes])


def losses_and_gradients(
    model: SSLModel, batch: Batch, device: torch.device, *, half: bool = False
) -> dict[str, Tensor]:
    """Of a copy of the model on a device, in main memory."""
    placed = copy.deepcopy(model).to(device).train()
    crops = [None if part is None else part.to(device) for part in batch[:2]]
    assert crops[0] is not None
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        losses = placed(placed.teacher_targets(crops[0], crops[1], batch[2], teacher_temp=0.1))
    losses["total"].backward()
    found = {name: value for name, value in losses.items() if value.ndim == 0}
    found |= {name: weight.grad for name, weight in placed.student.named_parameters() if weight.grad is not None}
    return {name: value.detach().float().cpu() for name, value in found.items()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> None:
    """Each within a share of its largest number, and of 1e-3 where that is less."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        bound = share * max(1e-3, float(value.abs().max()))
        difference = float((found[name] - value).abs().max())
        assert difference <= bound, f"{name} differs by {difference:.2g}, more than {bound:.2g}"


def new_model(config: TrainConfig) -> SSLModel:
    torch.manual_seed(0)
    return build_model(config)


@pytest.mark.parametrize(
    "change",
    ["seed=0", "centering=softmax_center", "separate_heads=true", "activation_checkpointing=selective", "ffn=swiglu"],
)
def test_losses_and_gradients_of_a_gpu_are_those_of_a_cpu(change: str) -> None:
    config = config_of(change)
    model, batch = new_model(config), random_batch(config, NUM_IMAGES, torch.device("cpu"))
    wanted = losses_and_gradients(model, batch, torch.device("cpu"))
    assert_near(losses_and_gradients(model, batch, DEVICE), wanted, 1e-3)


def test_padded_rows_count_nothing() -> None:
    config = config_of()
    model, batch = new_model(config), random_batch(config, NUM_IMAGES, torch.device("cpu"))
    model.padding = None
    wanted = losses_and_gradients(model, batch, DEVICE)
    model.padding = Padding(config.mask_probability * sum(config.mask_ratio) / 2, config.mask_ratio[1])
    assert_near(losses_and_gradients(model, batch, DEVICE), wanted, 1e-3)


def test_half_precision_has_nearly_the_losses_of_single() -> None:
    config = config_of()
    model, batch = new_model(config), random_batch(config, NUM_IMAGES, torch.device("cpu"))
    wanted = losses_and_gradients(model, batch, DEVICE)
    half = losses_and_gradients(model, batch, DEVICE, half=True)
    for name in ("dino_local", "dino_global", "ibot", "koleo", "total"):
        assert float(half[name]) == pytest.approx(float(wanted[name]), rel=0.02, abs=0.01), name


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error that the host waits for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("views", ["sequential_views=false", "sequential_views=true"])
def test_a_step_waits_for_nothing(views: str) -> None:
    config = config_of(views, "drop_path=0.3", "mixed_precision=bf16")
    accelerator = Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="bf16")
    step = training_step(config, accelerator, NUM_IMAGES)
    batches = [random_batch(config, NUM_IMAGES, DEVICE, number) for number in range(4)]
    step(batches[0])  # the optimizer makes its moments
    with no_waiting():
        losses = [step(batch) for batch in batches]
    assert torch.stack(losses).isfinite().all()


def test_a_run_that_is_out_of_memory_goes_on_in_micro_batches(tmp_path: Path) -> None:
    if DEVICE.type == "cpu":
        pytest.skip("a rehearsal has no memory of a GPU to fill")
    changes = ("mixed_precision=bf16", "num_prototypes=8192", "sequential_views=false", "steps=3", "log_every=1")
    config = config_of(*changes, "batch_size=512", "num_workers=1", "freeze_last_layer_steps=0")
    torch.cuda.reset_peak_memory_stats()
    training_step(config, Accelerator(mixed_precision="bf16"), 64)(random_batch(config, 64, DEVICE))
    limit = 2 * torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        pretrain(noise_images(tmp_path), str(tmp_path / "run"), config, Options())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3 and {row["micro_batch_size"] for row in rows} <= {256, 128, 64, 32}
    assert all(np.isfinite(row["total"]) for row in rows)


def dinov2(folder: Path, *words: str) -> str:
    """Run a command on the device and return its stderr."""
    environment = dict(os.environ)
    if DEVICE.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "dinov2_toolkit", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stderr


def training_words(output: str, *changes: str) -> list[str]:
    changed = [word for change in (*SETTINGS, *changes) for word in ("--set", change)]
    return ["train", "pretrain", "images.parquet", "-o", output, "--recipe", "vits16-1gpu", *changed]


def test_features_are_nearly_those_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_images(tmp_path, 6)
    uris = [str(tmp_path / f"{number}.png") for number in range(6)]
    for name, least in (("random:vit_tiny", 0.99), ("copy", 0.99), ("pixels", 0.9999)):
        vectors = []
        for device in (DEVICE, torch.device("cpu")):
            monkeypatch.setattr(extracting, "best_device", lambda device=device: device)
            with closing(extract(open_model(name), uris, batch_size=4, num_workers=1)) as batches:
                vectors.append(torch.cat([batch.features for batch in batches]))
        assert vectors[0].dtype == torch.float32 and vectors[0].device.type == "cpu"
        assert float(torch.cosine_similarity(vectors[0], vectors[1]).min()) > least, name


def test_all_pairs_above_a_threshold_are_found() -> None:
    generator = np.random.default_rng(0)
    array = generator.normal(size=(3_000, 48)).astype(np.float16)
    array[1_500:] = array[:1_500] + 0.05 * generator.normal(size=(1_500, 48)).astype(np.float16)
    unit = array.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    above = np.argwhere(np.triu(unit @ unit.T > 0.9, 1))
    assert len(above) >= 1_500
    wanted = np.arange(3_000)  # the smallest number of each component
    for _ in range(20):
        for one, other in above:
            wanted[one] = wanted[other] = min(wanted[one], wanted[other])
    vectors = Vectors(array, np.arange(3_000), Source("base", "memory", "0"))
    found = components_above(vectors, 0.9, weights=np.ones(3_000, np.int64), enough=10_000)
    assert np.array_equal(found.labels, wanted)


def test_the_same_pixels_in_other_files_are_duplicates(tmp_path: Path) -> None:
    noise_images(tmp_path, 5)
    (tmp_path / "pool").mkdir()
    for number in range(5):
        image = Image.open(tmp_path / f"{number}.png")
        image.save(tmp_path / "pool" / f"{number}.png")
        image.save(tmp_path / "pool" / f"{number}.bmp")
    dinov2(tmp_path, "curate", "embed", "pool", "-o", "pool.parquet", "--model", "pixels")
    dinov2(tmp_path, "curate", "dedup", "pool.parquet", "-o", "unique.parquet", "--exact", "pixels")
    assert pq.read_table(tmp_path / "unique.parquet").num_rows == 5


def test_compiled_blocks_have_the_losses_and_gradients_of_others() -> None:
    config = config_of()
    model, batch = new_model(config).to(DEVICE), random_batch(config, NUM_IMAGES, DEVICE)
    model.padding = Padding(config.mask_probability * sum(config.mask_ratio) / 2, config.mask_ratio[1])
    wanted = losses_and_gradients(model, batch, DEVICE)
    compile_networks(model.train())
    model.losses = replace(model.losses, compile=True)
    losses = model(model.teacher_targets(*batch, teacher_temp=0.1))
    losses["total"].backward()
    found = {name: value for name, value in losses.items() if value.ndim == 0}
    found |= {name: weight.grad for name, weight in model.student.named_parameters() if weight.grad is not None}
    assert_near({name: value.detach().cpu() for name, value in found.items()}, wanted, 1e-3)


def test_deterministic_runs_are_equal_and_so_is_a_resumed_one(tmp_path: Path) -> None:
    noise_images(tmp_path)
    changes = ("deterministic=true", "compile=false", "num_workers=1", "mixed_precision=bf16")
    for name in ("first", "second"):
        dinov2(tmp_path, *training_words(name, *changes))
    shutil.copytree(tmp_path / "first", tmp_path / "killed")
    for later in ("checkpoints/step-0000004", "checkpoints/step-0000006", "teacher.safetensors"):
        path = tmp_path / "killed" / later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "killed" / "model.json").unlink()
    assert "resuming at step 2 of 6" in dinov2(tmp_path, *training_words("killed", *changes), "--resume")
    wanted = load_file(tmp_path / "first" / "teacher.safetensors")
    for name in ("second", "killed"):
        found = load_file(tmp_path / name / "teacher.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name
        totals = [[line["total"] for line in read_metrics(tmp_path / run)] for run in ("first", name)]
        assert totals[0] == totals[1]


def test_a_run_with_all_that_a_recipe_may_set_leaves_figures_and_a_trace(tmp_path: Path) -> None:
    noise_images(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for number in range(6):
            shutil.copy(tmp_path / f"{number}.png", tmp_path / "labelled" / name)
    changes = ["steps=9", "mixed_precision=bf16", "compile=true", "activation_checkpointing=selective"]
    changes += ["sequential_views=true", "num_workers=1", "micro_batch_size=auto"]
    options = ("--profile", "2", "--eval-train", "labelled", "--eval-test", "labelled")
    said = dinov2(tmp_path, *training_words("run", *changes), *options)
    assert "memory: about" in said and "MiB free" in said
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 9 and all(np.isfinite([row["total"], row["grad_norm_backbone"]]).all() for row in rows)
    assert 0 <= rows[-1]["knn"] <= 1 and rows[-1]["tflop_per_s"] > 0 and rows[-1]["skipped_steps"] == 0
    events = json.loads((tmp_path / "run" / "trace-6.json").read_text())["traceEvents"]
    assert any(event.get("cat") == ("kernel" if DEVICE.type == "cuda" else "cpu_op") for event in events)
