import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dinov2_toolkit
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.block import Block
from dinov2_toolkit.models.head import ProjectionHead, WeightNormLinear
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.vit import PatchEmbed, VisionTransformer
from dinov2_toolkit.models.weights import load_backbone
from dinov2_toolkit.train.config import TrainConfig
from dinov2_toolkit.train.engine.checkpoint import TrainedModel, load_checkpoint, save_checkpoint
from dinov2_toolkit.train.engine.fsdp import copies_and_shards, full_optimizer_state, shard, sharding
from dinov2_toolkit.train.engine.optimizer import apply_schedules, build_optimizer, clip_gradients
from dinov2_toolkit.train.engine.parallelize import prepare
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.objective.distill_model import DistillModel
from dinov2_toolkit.train.objective.feature_distill_model import FeatureDistillModel
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.multi_student import MultiStudent
from dinov2_toolkit.train.objective.networks import update_teacher
from dinov2_toolkit.train.objective.ssl_model import LossSettings, SSLModel
from dinov2_toolkit.train.processes import start_processes

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SETTINGS = [
    "arch=vit_tiny",
    "depth=2",
    "embed_dim=48",
    "steps=3",
    "batch_size=8",
    "checkpoint_every=2",
    "log_every=1",
    "patch_size=4",
    "separate_heads=true",
    "num_prototypes=33",
    "ibot_num_prototypes=17",
    "hidden_dim=16",
    "bottleneck_dim=8",
    "global_crop_size_px=12",
    "local_crop_size_px=8",
    "num_local_crops=2",
    "layer_scale=1.0",
    "drop_path=0.3",
    "mixed_precision=no",
    "num_workers=0",
    "warmup_steps=1",
    "teacher_temp_warmup_steps=3",
    "freeze_last_layer_steps=1",
]
LOSSES = ("total", "dino_local", "dino_global", "ibot", "koleo", "teacher_entropy", "prototype_perplexity")
NORMS = ("grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twenty noise images, in two folders."""
    generator = np.random.default_rng(0)
    uris = []
    for number in range(20):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12 + number % 5, 14, 3), dtype=np.uint8)).save(path)
        uris.append(str(path))
    pq.write_table(pa.table({"uri": uris}), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def test_unsupported_settings_of_accelerate_are_refused() -> None:
    assert sharding({}) is None and sharding({"ACCELERATE_USE_FSDP": "false"}) is None
    wrap = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
    assert sharding(FSDP2 | wrap) is not None
    for unfit, message in (
        ({"FSDP_VERSION": "1"}, "FSDP_VERSION is 1; set it"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS is true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation_checkpointing=full"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY asks for other units"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer"}, "FSDP_TRANSFORMER_CLS_TO_WRAP"),
        ({"FSDP_IGNORED_MODULES": "teacher"}, "FSDP_IGNORED_MODULES is set"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG is true"),
    ):
        with pytest.raises(ToolkitError, match=message):
            sharding(FSDP2 | unfit)


def test_a_copy_of_the_weights_lies_in_each_node_unless_said_otherwise() -> None:
    assert copies_and_shards({}, 6) == (1, 6)
    assert copies_and_shards({"LOCAL_WORLD_SIZE": "8"}, 8) == (1, 8)
    assert copies_and_shards({"LOCAL_WORLD_SIZE": "8"}, 32) == (4, 8)
    assert copies_and_shards({"LOCAL_WORLD_SIZE": "1"}, 4) == (1, 4)
    assert copies_and_shards({"LOCAL_WORLD_SIZE": "4"}, 6) == (1, 6)
    assert copies_and_shards({"LOCAL_WORLD_SIZE": "8", "FSDP_SHARD_SIZE": "16"}, 32) == (2, 16)
    for given in ("1", "3", "none", ""):
        with pytest.raises(ToolkitError, match=f"FSDP_SHARD_SIZE is '{given}', which does not divide 8 processes"):
            copies_and_shards({"FSDP_SHARD_SIZE": given}, 8)


def test_sharding_over_one_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ToolkitError, match="FSDP is asked for with one process alone; start several"):
        start_processes(TrainConfig(mixed_precision="no"), (), tmp_path)


def small_backbone(embed_dim: int, depth: int) -> VisionTransformer:
    return VisionTransformer(
        patch_size=4, embed_dim=embed_dim, depth=depth, num_heads=2, img_size=8, layer_scale=1.0, drop_path=0.3
    )


def pretraining() -> TrainedModel:
    heads = [ProjectionHead(18, number, hidden_dim=9, bottleneck_dim=5) for number in (13, 7)]
    return SSLModel(small_backbone(18, 3), *heads, centering="softmax_center")


def distillation() -> TrainedModel:
    head = ProjectionHead(20, 11, hidden_dim=9, bottleneck_dim=5)
    frozen = FrozenTeacher({"backbone": small_backbone(20, 2), "dino_head": head})
    return MultiStudent({f"width_{width}": DistillModel(small_backbone(width, 2), frozen) for width in (12, 18)})


def features() -> TrainedModel:
    return FeatureDistillModel(small_backbone(18, 2), FrozenTeacher({"backbone": small_backbone(20, 2)}))


MODELS: dict[str, Callable[[], TrainedModel]] = {
    "pretraining": pretraining,
    "distillation": distillation,
    "features": features,
}


def start(folder: Path, what: str, *, count: int, in_node: int) -> None:
    """Run this file in several processes, which meet by a file in the folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(in_node)}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, what, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank % in_node)},
        )
        for rank in range(count)
    ]
    assert [process.wait(timeout=900) for process in processes] == [0] * count  # to compile takes minutes


def test_two_sharded_processes_train_as_two_unsharded_ones(tmp_path: Path) -> None:
    start(tmp_path, "models", count=2, in_node=2)
    for name in MODELS:
        whole, shards = (torch.load(tmp_path / f"{name}-{shards}.pt") for shards in (False, True))
        assert list(shards) == list(whole)
        torch.testing.assert_close(shards, whole, rtol=1e-5, atol=1e-5)  # an update is about 1e-3


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("plain", 2),
        pytest.param("compiled", 2, marks=pytest.mark.slow),
        pytest.param("plain", 4, marks=pytest.mark.slow),
    ],
    ids=["2", "2 compiled", "2 nodes of 2"],
)
def test_sharded_processes_train_as_one_process(tmp_path: Path, what: str, count: int) -> None:
    start(tmp_path, what, count=count, in_node=2)
    torch.testing.assert_close(torch.load(tmp_path / "shards.pt"), train_on_shares(None), rtol=1e-5, atol=1e-5)


def train_on_shares(accelerator: Accelerator | None, *, compiled: bool = False) -> dict[str, Tensor]:
    """Return the losses of three steps and all weights: of one process, or of several with a share of each batch."""
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=18, depth=3, num_heads=2, img_size=8, layer_scale=1.0)
    heads = [ProjectionHead(18, number, hidden_dim=9, bottleneck_dim=5) for number in (13, 7)]
    model = SSLModel(backbone, *heads, losses=LossSettings(koleo_distributed=True)).train()
    names = list(model.state_dict())
    rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    wrapped: nn.Module = model
    optimizer: torch.optim.Optimizer = build_optimizer(model.student)
    if accelerator is not None:
        config = TrainConfig(mixed_precision="no", compile=compiled)
        wrapped, optimizer, full_model, _ = prepare(model, config, accelerator)
        assert list(model.state_dict()) == names
        weight = next(model.teacher.parameters())
        assert isinstance(weight, DTensor) and weight.device_mesh.ndim == (2 if count == 4 else 1)
        assert len(weight.to_local()) <= -(-len(weight) // 2)
    results = {}
    for step in range(3):
        torch.manual_seed(step)
        # (views, images, ...) -> the rows of this process, view by view
        shapes = ((2, 8, 3, 8, 8), (2, 8, 3, 4, 4), (2, 8, 4))
        crops, small_crops, noise = (torch.randn(shape)[:, rank::count].flatten(0, 1) for shape in shapes)
        losses = wrapped(model.teacher_targets(crops, small_crops, noise < 0.0, teacher_temp=0.1))
        losses["total"].backward()
        clip_gradients(model.student, 3.0)
        apply_schedules(optimizer, lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(model.teacher, model.student, 0.9, torch.tensor(0.0))
        loss = losses["total"].detach()
        results[f"loss {step}"] = loss if accelerator is None else accelerator.reduce(loss, reduction="mean")
    full = model if accelerator is None else full_model(rank == 0)
    return results | ({} if full is None else {name: value.detach() for name, value in full.state_dict().items()})


def train_three_steps(build: Callable[[], TrainedModel], accelerator: Accelerator, folder: Path) -> dict[str, Tensor]:
    """Return the losses and norms of three steps, the last after a checkpoint, and all weights, whole."""
    in_shards = sharding(os.environ) is not None
    results: dict[str, Tensor] = {}
    for start, stop in ((0, 2), (2, 3)):
        torch.manual_seed(start)  # the second model begins otherwise, and becomes the first by its checkpoint
        model = build().train()
        wrapped, optimizer, full_model, _ = prepare(model, TrainConfig(mixed_precision="no"), accelerator)
        assert all(isinstance(weight, DTensor) == in_shards for weight in model.student.parameters())
        assert all(isinstance(weight, DTensor) == in_shards for weight in model.teacher.parameters())
        if start:
            assert load_checkpoint(folder / "step-0000002", model, optimizer) == {"step": 2}
        for step in range(start, stop):
            torch.manual_seed(10 * step + accelerator.process_index)
            masks = torch.rand(6, 4) < 0.4
            part = model.teacher_targets(torch.randn(6, 3, 8, 8), torch.randn(3, 3, 4, 4), masks, teacher_temp=0.1)
            losses = wrapped(part)
            losses["total"].backward()
            norms = clip_gradients(model.student, 3.0)
            apply_schedules(optimizer, lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1)
            optimizer.step()
            optimizer.zero_grad()
            update_teacher(model.teacher, model.student, 0.9)
            results[f"loss {step}"] = accelerator.reduce(losses["total"].detach(), reduction="mean")
            results |= {f"norm {step} {name}": norm for name, norm in norms.items()}
        state = full_optimizer_state(optimizer, wanted=accelerator.is_main_process)
        whole = full_model(accelerator.is_main_process)
        assert (whole is None) != accelerator.is_main_process
        if whole is not None:
            preprocess = Preprocess(8, 1.0, (0.5,) * 3, (0.5,) * 3)
            save_checkpoint(folder, whole, state, {"step": stop}, preprocess, keep=2)
            results |= {name: value.detach() for name, value in whole.state_dict().items() if "frozen" not in name}
        accelerator.wait_for_everyone()
    return results


def main(what: str, folder: Path) -> None:
    """Be one of several processes that train, and leave what came of it."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", (folder / "meeting").as_uri(), rank=rank, world_size=count)
    accelerator = Accelerator(cpu=True)
    if what == "models":  # each kind, whole and in shards
        for name, build in MODELS.items():
            for shards in (False, True):
                os.environ.update(FSDP2 | {"ACCELERATE_USE_FSDP": str(shards)})
                results = train_three_steps(build, accelerator, folder / f"{name}-{shards}")
                if accelerator.is_main_process:
                    torch.save(results, folder / f"{name}-{shards}.pt")
    else:
        os.environ.update(FSDP2)
        results = train_on_shares(accelerator, compiled=what == "compiled")
        if accelerator.is_main_process:
            torch.save(results, folder / "shards.pt")
    torch.distributed.destroy_process_group()


def test_blocks_are_gathered_in_half_precision_and_gradients_added_up_in_float32(alone: None) -> None:
    model = pretraining().train()
    shard(
        model.student,
        model.teacher,
        torch.device("cpu"),
        copies_and_shards=(1, 1),
        half=torch.bfloat16,
        keep_gathered=False,
    )
    types: dict[str, set[torch.dtype]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[object, ...]) -> None:
        types[name] = {weight.dtype for weight in module.parameters()}

    for name, module in model.named_modules():
        if isinstance(module, Block | PatchEmbed | WeightNormLinear):
            module.register_forward_pre_hook(partial(note, name))
    with torch.autocast("cpu", torch.bfloat16):
        crops, masks = (torch.randn(6, 3, 8, 8), torch.randn(3, 3, 4, 4)), torch.rand(6, 4) < 0.4
        losses = model(model.teacher_targets(*crops, masks, teacher_temp=0.1))
    losses["total"].backward()
    in_half = {name for name, dtypes in types.items() if dtypes == {torch.bfloat16}}
    whole = {name for name, dtypes in types.items() if dtypes == {torch.float32}}
    assert in_half | whole == types.keys()
    assert whole == {name for name in types if "patch_embed" in name or re.match("teacher.*head", name)}
    assert len(in_half) == 2 * 3 + 2 and len(whole) == 2 + 2
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in model.student.parameters())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", (tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Whole commands


def arguments(manifest: Path, name: str, *changes: str) -> list[str]:
    assignments = [part for text in [*SETTINGS, *changes] for part in ("--set", text)]
    output = str(manifest.parent / name)
    command = ["dinov2_toolkit", "train", "pretrain", str(manifest), "-o", output]
    return [*command, "--recipe", "vitl16-short", *assignments]


def run(*command: str, **environment: str) -> str:
    """Run a Python module with arguments; return what it said on stderr."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-m", *command], env=everything, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def trained(manifest: Path, name: str, *changes: str, shards: bool, more: Sequence[str] = ()) -> Path:
    """Train in two processes and return the run folder."""
    said = run(*arguments(manifest, name, *changes), "--num-processes", "2", *more, **(FSDP2 if shards else {}))
    assert ("weights in shards over 2 processes" in said) == shards
    return manifest.parent / name


def assert_equal_runs(first: Path, second: Path) -> None:
    """Losses and norms to 1e-5, weights and the optimizer's averages to 1e-6 (an update is about 1e-4)."""
    for mine, theirs in zip(read_metrics(first), read_metrics(second), strict=True):
        for name in (*LOSSES, *NORMS):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
    last = "checkpoints/step-0000003"
    for file in ("teacher.safetensors", f"{last}/student.safetensors", f"{last}/teacher.safetensors"):
        expected, got = load_file(first / file), load_file(second / file)
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    states = [torch.load(folder / last / "optimizer.pt", weights_only=True) for folder in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, entries in states[0]["state"].items():
        assert entries.keys() == states[1]["state"][number].keys()
        for name, value in entries.items():
            got = states[1]["state"][number][name]
            assert type(got) is torch.Tensor
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_run_equals_an_unsharded_one_and_leaves_the_same_files(manifest: Path) -> None:
    images = str(manifest.parent / "images")
    watch = ["--eval-train", images, "--eval-test", images]
    whole = trained(manifest, "whole", shards=False, more=watch)
    shards = trained(manifest, "shards", shards=True, more=watch)
    assert_equal_runs(whole, shards)
    assert read_metrics(shards)[-1]["knn"] == read_metrics(whole)[-1]["knn"]
    assert load_backbone(shards).embed_dim == 48


@pytest.mark.slow
@pytest.mark.parametrize("first_in_shards", [False, True])
def test_a_sharded_checkpoint_resumes_unsharded_and_the_other_way_round(manifest: Path, first_in_shards: bool) -> None:
    whole = trained(manifest, "whole", shards=False)
    half = trained(manifest, "half", shards=first_in_shards)
    for later in ("model.json", "teacher.safetensors"):
        (half / later).unlink()
    shutil.rmtree(half / "checkpoints" / "step-0000003")
    trained(manifest, "half", shards=not first_in_shards, more=["--resume"])
    assert_equal_runs(whole, half)


@pytest.mark.slow
def test_micro_batches_sequential_views_and_kept_weights_train_the_same_sharded(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["sequential_views=true", "micro_batch_size=2", "activation_checkpointing=full"]
    whole = trained(manifest, "whole", *changes, shards=False)
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert_equal_runs(whole, trained(manifest, "shards", *changes, shards=True))


@pytest.mark.slow
def test_bfloat16_trains_the_same_sharded(manifest: Path) -> None:
    whole = trained(manifest, "whole", "mixed_precision=bf16", shards=False)
    shards = trained(manifest, "shards", "mixed_precision=bf16", shards=True)
    for mine, theirs in zip(read_metrics(whole), read_metrics(shards), strict=True):
        for name in LOSSES:
            assert theirs[name] == pytest.approx(mine[name], rel=0.02), name
    for name, value in load_file(shards / "teacher.safetensors").items():
        assert value.dtype == torch.float32, name


@pytest.mark.slow
def test_the_settings_file_of_the_documentation_starts_a_sharded_run(manifest: Path) -> None:
    page = (Path(dinov2_toolkit.__path__[0]) / "docs" / "gpus.md").read_text()
    file = manifest.parent / "fsdp.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0].replace("num_processes: 8", "num_processes: 2"))
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "-m"]
    assert "weights in shards over 2 processes" in run(*launcher, *arguments(manifest, "shards"))
    assert_equal_runs(trained(manifest, "whole", shards=False), manifest.parent / "shards")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
