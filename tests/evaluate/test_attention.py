"""`dinov2 evaluate attention`: maps against a slow loop and against torch's own attention, and the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.attention import draw_attention, heat, last_attention
from dinov2_toolkit.evaluate.pictures import PictureSettings
from dinov2_toolkit.models.block import Block
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store.artifact import Options


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def backbone(num_register_tokens: int) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        img_size=16,
        layer_scale=1.0,
        num_register_tokens=num_register_tokens,
    ).eval()


@torch.no_grad()
def test_attention_is_the_one_by_which_the_last_block_mixes_values() -> None:
    model = backbone(num_register_tokens=2)
    images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    attention = last_attention(model, images)
    assert attention.shape == (2, 3, 3, 1 + 2 + 20)
    torch.testing.assert_close(attention.sum(dim=3), torch.ones(2, 3, 3))

    tokens, groups = model.embed_packed([images], [None])
    tokens = model.blocks[0](tokens, groups)
    last = model.blocks[1]
    assert isinstance(last, Block)
    packed = last.attn.qkv(last.norm1(tokens)).view(2, 23, 3, 3, 8)
    for image in range(2):
        for head in range(3):
            query, key, value = (packed[image, :, part, head] for part in range(3))
            for token in range(3):
                scores = torch.tensor([float(query[token] @ key[other]) / 8**0.5 for other in range(23)])
                torch.testing.assert_close(
                    attention[image, head, token], torch.softmax(scores, 0), rtol=1e-4, atol=1e-6
                )
            mixed = torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None])[0, :3]
            torch.testing.assert_close(attention[image, head] @ value, mixed, rtol=1e-4, atol=1e-5)


def test_the_picture_has_a_map_for_each_head_and_register(tmp_path: Path) -> None:
    half = (0.5,) * 3
    model = backbone(num_register_tokens=4)
    save_model(Path("run"), backbone=model, heads={}, preprocess=Preprocess(32, 1.0, half, half))
    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 50, 200)).save(f"{number}.png")
    result = draw_attention(["0.png", "1.png"], "attention.png", PictureSettings("run"), Options())
    assert result is not None
    assert result.figures == {"images": 2, "heads": 3}
    with Image.open("attention.png") as picture:
        assert picture.width > (1 + 1 + 3 + 4) * 128
        assert picture.height > 2 * 96
    draw_attention(["0.png", "1.png"], "attention.png", PictureSettings("run"), Options())  # up to date
    with pytest.raises(ToolkitError, match="image_size 32, now 48"):
        draw_attention(["0.png", "1.png"], "attention.png", PictureSettings("run", 48), Options())


def test_the_most_is_bright_and_none_is_dark() -> None:
    values = np.zeros((2, 100), np.float32)
    values[0, :10] = 3.0
    pixels = np.asarray(heat(values, (100, 2))).astype(int)
    assert (pixels[0, :10] == (252, 255, 164)).all()
    assert (pixels[1] == (12, 8, 38)).all()


def test_images_that_cannot_be_read_and_models_without_patches_are_errors() -> None:
    Path("bad.png").write_bytes(b"no image")
    with pytest.raises(ToolkitError, match="none of the 1 images can be read"):
        draw_attention(["bad.png"], "attention.png", PictureSettings("random:vit_tiny", 56), Options())
    with pytest.raises(ToolkitError, match="'pixels' has no patch tokens"):
        draw_attention(["bad.png"], "attention.png", PictureSettings("pixels"), Options())
