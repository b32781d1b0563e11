from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.engine.accumulate import weighted_losses
from dinov2_toolkit.train.pretrain import pretrain

SETTINGS = [
    "arch=vit_tiny",
    "depth=2",
    "steps=2",
    "batch_size=8",
    "log_every=1",
    "patch_size=4",
    "num_prototypes=32",
    "hidden_dim=16",
    "bottleneck_dim=8",
    "global_crop_size_px=12",
    "local_crop_size_px=8",
    "num_local_crops=2",
    "drop_path=0.3",
    "mixed_precision=no",
    "num_workers=0",
    "warmup_steps=1",
    "freeze_last_layer_steps=0",
]


def settings(*changes: str) -> TrainConfig:
    return resolve(TrainConfig, recipe=None, environment={}, flags={}, assignments=[*SETTINGS, *changes])


def test_a_micro_batch_that_leaves_one_image_for_koleo_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a.png"]}), tmp_path / "images.parquet")
    config = settings("batch_size=9", "micro_batch_size=4")
    with pytest.raises(ToolkitError, match="micro_batch_size 4 leaves a single one of the 9 images"):
        pretrain(tmp_path / "images.parquet", str(tmp_path / "a"), config, Options(dry_run=True))


def test_weighted_losses_add_up_to_the_total() -> None:
    config = TrainConfig(dino_weight=2.0, ibot_weight=0.5, koleo_weight=0.1)
    figures = weighted_losses({"dino_local": 3.0, "dino_global": 1.0, "ibot": 4.0, "koleo": -1.0}, config)
    assert figures == pytest.approx(
        {"dino_local_weighted": 6.0, "dino_global_weighted": 2.0, "ibot_weighted": 2.0, "koleo_weighted": -0.1}
    )
