import re
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dinov2_toolkit.models import cpu
from dinov2_toolkit.models.block import KEPT_OPS, ActivationCheckpointing
from dinov2_toolkit.models.cpu import GROWTH
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import noise_images
from dinov2_toolkit.train import run
from dinov2_toolkit.train.config import RECIPES, TrainConfig, resolve
from dinov2_toolkit.train.data import augment
from dinov2_toolkit.train.data.images import Batch
from dinov2_toolkit.train.data.multicrop import decoded_side_px, make_views
from dinov2_toolkit.train.data.packed import packed
from dinov2_toolkit.train.engine.accumulate import microbatch_backward
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.engine.optimizer import build_optimizer
from dinov2_toolkit.train.monitor import memory
from dinov2_toolkit.train.monitor.flop import crops_of, flop_per_image
from dinov2_toolkit.train.monitor.memory import (
    GPU_ALLOCATOR,
    GPU_CONTEXT_BYTES,
    _kept_bytes,
    augmentation_bytes,
    fitted,
    memory_bytes,
)
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.objective.micro_batch import MicroBatch, split_microbatches
from dinov2_toolkit.train.objective.ssl_model import SSLModel
from dinov2_toolkit.train.pretrain import pretrain

SETTINGS = [
    "arch=vit_tiny",
    "depth=4",
    "patch_size=8",
    "num_prototypes=512",
    "hidden_dim=64",
    "bottleneck_dim=16",
    "global_crop_size_px=64",
    "local_crop_size_px=32",
    "num_local_crops=4",
    "drop_path=0",
    "mixed_precision=no",
    "num_workers=0",
]
IMAGES = 8


def settings(*changes: str) -> TrainConfig:
    return resolve(TrainConfig, recipe=None, environment={}, flags={}, assignments=[*SETTINGS, *changes])


def step_of(model: SSLModel) -> MicroBatch:
    """Eight images with as many masked patches as there are on average: 15 % of 64."""
    masks = torch.zeros(2 * IMAGES, 64, dtype=torch.bool)
    masks[:, :9] = True
    masks[:IMAGES, 9:11] = True
    global_crops, local_crops = torch.randn(2 * IMAGES, 3, 64, 64), torch.randn(4 * IMAGES, 3, 32, 32)
    return model.teacher_targets(global_crops, local_crops, masks, teacher_temp=0.1)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_flop_of_a_step_are_those_that_torch_counts(ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "HAS_ONEDNN", False)  # torch counts the products of its own layers
    config = settings(f"ffn={ffn}")
    model = build_model(config).train()
    counter = FlopCounterMode(display=False)
    with counter:
        model(step_of(model))["total"].backward()
    # Torch counts padded queries in the last block; we do not.
    assert flop_per_image(config, model) * IMAGES == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    "change",
    [*(f"activation_checkpointing={kind}" for kind in get_args(ActivationCheckpointing)), "drop_path=0.25"],
)
def test_estimated_activations_of_a_block_are_those_that_autograd_saves(change: str) -> None:
    def saved_bytes(depth: int) -> int:
        model = build_model(settings(change, f"depth={depth}")).train()
        step = step_of(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            is_scaled_weight = tuple(tensor.shape) in {(192, 192), (192, 768), (768, 192)}
            if tensor.untyped_storage().data_ptr() not in weights and not is_scaled_weight:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        class KeptByCheckpointing(TorchDispatchMode):  # type: ignore[no-untyped-call]
            """What selective checkpointing keeps, which autograd does not see."""

            def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                output = op(*args, **(kwargs or {}))
                if op in KEPT_OPS:
                    keep(output if isinstance(output, Tensor) else output[0])
                return output

        is_selective = change.endswith("selective")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with KeptByCheckpointing() if is_selective else nullcontext():  # type: ignore[no-untyped-call]
                model(step)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    def estimated_bytes(depth: int) -> float:
        config = settings(change, f"depth={depth}")
        model = build_model(config)
        return IMAGES * _kept_bytes(config, model.student, list(crops_of(config, is_masked=True)), True)

    wanted = (saved_bytes(6) - saved_bytes(4)) / 2
    assert (estimated_bytes(6) - estimated_bytes(4)) / 2 == pytest.approx(wanted, rel=0.07)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all tensors that are alive, and the most there were."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.remove, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def remove(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return output


@pytest.mark.parametrize(
    "changes",
    [
        ["mixed_precision=bf16", "drop_path=0.2"],
        ["mixed_precision=bf16", "sequential_views=true"],
        ["mixed_precision=bf16", "activation_checkpointing=selective"],
        ["mixed_precision=no", "centering=sinkhorn_knopp"],
    ],
    ids=" ".join,
)
def test_the_estimated_memory_of_a_step_is_that_of_its_tensors(
    changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "ENABLED", False)  # as on a GPU
    config = settings(*changes, f"batch_size={IMAGES}", "num_prototypes=4096")
    model = build_model(config).train()
    optimizer = build_optimizer(model.student)
    for _ in range(2):  # the optimizer makes its moments in the first step
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        with LiveBytes([*model.parameters(), *model.buffers(), *moments]) as bytes_of:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                step = step_of(model)
                for batch in split_microbatches(step, sequential_views=config.sequential_views):
                    microbatch_backward(model, batch, Tensor.backward, seed=0)
            optimizer.step()
        optimizer.zero_grad()
        del step, batch
    ahead = augmentation_bytes(config, IMAGES) + IMAGES * 4 * 3 * (2 * 64**2 + 4 * 32**2)  # the next step's crops
    estimated = (memory_bytes(config, model, 1, 0.0) - GPU_CONTEXT_BYTES) / GPU_ALLOCATOR - ahead
    assert estimated == pytest.approx(bytes_of.peak, rel=0.12)


@pytest.mark.parametrize("change", ["num_local_crops=4", "num_local_crops=8", "global_crop_size_px=128"])
def test_the_estimated_memory_of_augmentation_is_that_of_its_tensors(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (augment, memory):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    config, num_images = settings(change), 24
    side = decoded_side_px(config)
    images = packed([np.full((side, side * 3 // 2, 3), number, np.uint8) for number in range(num_images)])
    with LiveBytes([images.data]) as bytes_of:
        views = make_views(Batch(images, np.arange(num_images), 0), config, torch.device("cpu"))
    crops = sum(part.nbytes for part in views[:2] if part is not None)
    assert augmentation_bytes(config, num_images) == pytest.approx(bytes_of.peak - crops, rel=0.2)


def test_memory_grows_with_the_batch_and_shrinks_with_micro_batches() -> None:
    def needed(*changes: str) -> float:
        config = settings("batch_size=32", *changes)
        with torch.device("meta"):
            return memory_bytes(config, build_model(config), 1, 0.0)

    whole = needed()
    assert needed("batch_size=64") > 1.8 * whole - needed("batch_size=2")
    assert needed("micro_batch_size=8") < whole
    assert needed("sequential_views=true") < whole
    assert needed("activation_checkpointing=full") < needed("activation_checkpointing=selective") < whole


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_fits_the_hardware_that_its_header_states(path: Path) -> None:
    stated = re.search(r"^# Hardware: +(\d+) x (\d+) GB", path.read_text(), re.MULTILINE)
    assert stated is not None, "its header states no `Hardware: N x M GB`"
    num_processes, memory = int(stated[1]), int(stated[2]) * 2**30
    config = resolve(TrainConfig, path.stem)
    base_bytes = 0.0
    if path.stem == "tiny":  # on a CPU: what the process holds, and all the images that it may keep
        base_bytes = (300 << 20) + (config.cache_mib << 20)
    with torch.device("meta"):
        model = build_model(config)
    assert memory_bytes(config, model, num_processes, base_bytes) < 0.9 * memory


def test_an_automatic_micro_batch_is_the_largest_that_fits_with_a_tenth_to_spare() -> None:
    config = settings("batch_size=32", "micro_batch_size=auto")
    model = build_model(config)

    def needed(size: int) -> float:
        return memory_bytes(settings("batch_size=32", f"micro_batch_size={size}"), model, 1, 0.0)

    assert fitted(settings("batch_size=32"), model, 1, 0.0, 0.0).micro_batch_size == 0  # not asked for
    assert fitted(config, model, 1, 0.0, needed(32) / 0.89).micro_batch_size == 32
    assert fitted(config, model, 1, 0.0, needed(32)).micro_batch_size == 16
    assert fitted(config, model, 1, 0.0, needed(8) / 0.89).micro_batch_size == 8
    assert fitted(config, model, 1, 0.0, 0.0).micro_batch_size == 2  # KoLeo needs two


def test_a_run_says_its_memory_beside_what_is_free_and_takes_an_automatic_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["batch_size=8", "steps=2", "micro_batch_size=auto", "log_every=1"]
    manifest = noise_images(tmp_path)
    pretrain(manifest, str(tmp_path / "a"), settings(*changes), Options())
    assert re.search(r"memory: about [\d,]+ MiB a process at the peak, [\d,]+ MiB free", capsys.readouterr().err)
    assert read_metrics(tmp_path / "a")[-1]["micro_batch_size"] == 8
    monkeypatch.setattr(run, "free_bytes_of", lambda *_: 0.0)
    pretrain(manifest, str(tmp_path / "b"), settings(*changes), Options())
    assert "0 MiB free; set sequential_views=true" in capsys.readouterr().err
    assert read_metrics(tmp_path / "b")[-1]["micro_batch_size"] == 2
    assert resolve(TrainConfig, str(tmp_path / "b" / "config.toml")) == settings(*changes)


def test_a_dry_run_says_flop_memory_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"uri": ["a.png"]}), tmp_path / "images.parquet")
    pretrain(tmp_path / "images.parquet", str(tmp_path / "a"), settings("steps=3"), Options(dry_run=True))
    said = capsys.readouterr().err
    assert re.search(r"[\d.]+ GFLOP an image; about [\d,]+ MiB of memory a process at the peak; about \d+", said)
    assert not (tmp_path / "a").exists()


def test_decoded_images_that_are_kept_count_as_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (1000, 1000)).save(tmp_path / "a.png")
    pq.write_table(pa.table({"uri": ["a.png"] * 10_000}), tmp_path / "images.parquet")

    def estimated_mib(cache_mib: int, steps: int = 1000) -> int:
        changed = settings(f"steps={steps}", "batch_size=64", f"cache_mib={cache_mib}")
        pretrain(tmp_path / "images.parquet", str(tmp_path / "a"), changed, Options(dry_run=True))
        found = re.search(r"about ([\d,]+) MiB", capsys.readouterr().err)
        assert found is not None
        return int(found[1].replace(",", ""))

    estimated_mib(0)  # torch loads what stays
    none = estimated_mib(0)
    assert estimated_mib(100) - none == pytest.approx(GROWTH * 100, abs=30)
    decoded_mib = 128 * 128 * 3 / 2**20
    assert estimated_mib(1024) - none == pytest.approx(GROWTH * 10_000 * decoded_mib, abs=30)  # all are seen
    assert estimated_mib(1024, steps=100) - none == pytest.approx(GROWTH * 6_400 * decoded_mib, abs=30)
