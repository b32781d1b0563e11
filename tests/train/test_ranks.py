"""Runs of two processes: an error of one ends both, and only the first one needs the run's files."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.knn import knn_predictions
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.pair import ended, said, started_pair
from dinov2_toolkit.tests.train.small_run import noise_images, repeatable_metrics, settings
from dinov2_toolkit.train import pretrain as loop
from dinov2_toolkit.train import run as around
from dinov2_toolkit.train.data import loader
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.launch import read_status
from dinov2_toolkit.train.monitor import online_knn
from dinov2_toolkit.train.objective.ssl_model import SSLModel
from dinov2_toolkit.train.pretrain import pretrain
from dinov2_toolkit.train.processes import start_processes
from dinov2_toolkit.train.run import MonitorOptions

STAGES: dict[str, tuple[Any, str]] = {
    "start": (around, "held_bytes"),
    "crops": (loader, "make_views"),
    "forward": (SSLModel, "forward"),
    "checkpoint": (loop, "full_optimizer_state"),
    "k-NN": (online_knn, "extract"),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A manifest with labels."""
    table = pq.read_table(noise_images(tmp_path))
    labels = [("odd", "even")[number // 5 % 2] for number in range(len(table))]
    pq.write_table(table.append_column("label", pa.array(labels)), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def train(images: Path, name: str, *changes: str, resume: bool = False) -> None:
    torch.set_num_threads(1)
    config, monitor = settings("eval_every=2", *changes), MonitorOptions(eval_share=0.4)
    pretrain(images, str(images.parent / name), config, Options(), resume=resume, monitor=monitor)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("stage", "failing_rank"),
    [
        ("k-NN", 1),
        *(pytest.param(stage, 1, marks=pytest.mark.slow) for stage in STAGES if stage != "k-NN"),
        *(pytest.param(stage, 0, marks=pytest.mark.slow) for stage in STAGES),
    ],
)
def test_an_error_of_one_process_ends_both_within_seconds_with_its_line(
    stage: str, failing_rank: int, images: Path
) -> None:
    def work(rank: int) -> None:
        if rank == failing_rank:
            pytest.MonkeyPatch().setattr(*STAGES[stage], failing(ToolkitError(f"no luck with {stage}")))
        train(images, "run")

    start = time.monotonic()
    assert ended(started_pair(work, images.parent), 60) == [1, 1]
    assert time.monotonic() - start < 30
    assert [line for line in said(images.parent) if "error" in line] == [f"error: no luck with {stage}"]
    if stage == "start":
        assert not (images.parent / "run").exists()
    else:
        assert read_status(images.parent / "run") == {"exit_code": 1, "message": f"no luck with {stage}"}


def test_two_processes_share_the_k_nn_and_resume_by_the_disk_of_the_first(images: Path) -> None:
    """The second one has an empty folder of its own, as on another machine."""

    def work(steps: int) -> Callable[[int], None]:
        def of_rank(rank: int) -> None:
            train(images, ("run", "elsewhere")[rank], f"steps={steps}", "warmup_steps=2", resume=True)

        return of_rank

    def whole(rank: int) -> None:
        train(images, "whole", "steps=6", "warmup_steps=2")

    (images.parent / "elsewhere").mkdir()
    assert ended(started_pair(whole, images.parent), 60) == [0, 0], said(images.parent)
    run = images.parent / "run"
    shutil.copytree(images.parent / "whole", run)
    for later in ("checkpoints/step-0000004", "checkpoints/step-0000006"):
        shutil.rmtree(run / later)
    (run / "model.json").unlink()
    assert ended(started_pair(work(6), images.parent), 60) == [0, 0], said(images.parent)
    assert any("resuming at step 2 of 6" in line for line in said(images.parent))
    assert repeatable_metrics(run) == repeatable_metrics(images.parent / "whole")
    weights, others = (load_file(folder / "teacher.safetensors") for folder in (run, images.parent / "whole"))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert not list((images.parent / "elsewhere").iterdir())


def test_the_k_nn_of_two_processes_is_that_of_one_bit_for_bit(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images.parent / "broken.png").write_bytes(b"no image")
    table = pq.read_table(images)
    broken = pa.table({"uri": [str(images.parent / "broken.png")] * 2, "label": ["odd", "even"]})
    pq.write_table(pa.concat_tables([table, broken, table]), images)
    results = images.parent / "results"
    results.mkdir()
    name = ["one"]

    def kept(*arguments: Any, **keywords: Any) -> Any:
        torch.save([torch.from_numpy(array) for array in arguments[:2]], results / name[0])
        return knn_predictions(*arguments, **keywords)

    monkeypatch.setattr(online_knn, "BATCH_SIZE", 4)  # several a process
    monkeypatch.setattr(online_knn, "knn_predictions", kept)
    torch.manual_seed(0)
    model = build_model(settings())
    sets = online_knn.held_out(str(images), 0.4, 0)
    alone = online_knn.knn_figures(model, sets, settings())

    def work(rank: int) -> None:
        name[0] = f"two-{rank}"
        _, processes = start_processes(settings(), (), images.parent)
        figures = online_knn.knn_figures(model, sets, settings(), processes)
        torch.save(figures, results / f"figures-{rank}")

    assert ended(started_pair(work, images.parent), 60) == [0, 0], said(images.parent)
    expected = torch.load(results / "one")
    assert len(expected[0]) > 20
    for rank in range(2):
        assert torch.load(results / f"figures-{rank}") == alone
        assert all(torch.equal(*pair) for pair in zip(torch.load(results / f"two-{rank}"), expected, strict=True))
