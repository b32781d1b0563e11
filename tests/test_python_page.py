"""The examples of docs/python.md run in order and print what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_toolkit
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store.artifact import Options

PAGE = (Path(dinov2_toolkit.__path__[0]) / "docs" / "python.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=7, embed_dim=32, depth=2, num_heads=2, img_size=28)
    save_model(
        Path("runs/first"),
        backbone=backbone,
        heads={},
        preprocess=Preprocess(28, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    )
    Path("photos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{number}.png")
    Path("photos/broken.png").write_text("no image")
    embed_images(["photos"], "pool.parquet", EmbedSettings(model="runs/first"), Options())
    capsys.readouterr()

    assert len(EXAMPLES) == 6
    names: dict[str, object] = {}
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f"docs/python.md, example {number + 1}", "exec"), names)
    output = capsys.readouterr().out
    assert "32 numbers a token; 28 px a side; normalised by (0.5, 0.5, 0.5)" in output
    assert "photos/broken.png was left out: " in output
    assert "5 images by curate embed with " in output and "runs/first\n" in output
    assert "is most like" in output
    assert "no model 'runs/frist'; give a run folder" in output
