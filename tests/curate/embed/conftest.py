"""What the tests of `embed` share: a small model, one torch thread, and a folder of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Leave the cores to the decoding threads: models this small gain nothing by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that holds a small backbone with random weights."""
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=7, embed_dim=24, depth=2, num_heads=3, img_size=28, layer_scale=1.0)
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_model(folder, backbone=backbone, heads={}, preprocess=Preprocess(28, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    return folder
