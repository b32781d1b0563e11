"""`dinov2 evaluate pca`: components against known ones, the split of the background, and the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.pca import (
    BACKGROUND,
    best_split,
    colour_patches,
    draw_pca,
    principal_directions,
)
from dinov2_toolkit.evaluate.pictures import PictureSettings, open_patch_model
from dinov2_toolkit.models.build import build_vit
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.store.artifact import Options

SMALL_VIT = PictureSettings("random:vit_tiny/14", image_size=56)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw_photo(path: Path, width: int = 40, height: int = 40) -> Path:
    """A bright, noisy square on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    inner = pixels[height // 4 : -height // 4, width // 4 : -width // 4]
    inner[:] = np.random.default_rng(0).integers(120, 256, inner.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def object_on_ground(generator: torch.Generator, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (h * w, 8): an inner rectangle far along axis 0, with its rows along axis 1; else noise."""
    tokens = 0.01 * torch.randn(height, width, 8, generator=generator)
    inner = torch.zeros(height, width, dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    tokens[inner, 0] += 10
    tokens[..., 1] += inner * torch.linspace(-3, 3, height)[:, None]
    return tokens.flatten(0, 1), inner


def test_directions_are_those_that_the_data_was_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0][:, :3]
    scores = torch.linalg.qr(torch.randn(200, 3, generator=generator, dtype=torch.float64))[0]
    centred = scores * torch.tensor([9.0, 4.0, 1.0]) @ axes.T
    found = principal_directions(centred, 3)
    torch.testing.assert_close((found.T @ axes).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()
    torch.testing.assert_close(principal_directions(-centred, 3), found)


def test_the_split_is_the_one_with_the_least_variance_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(30, generator=generator), 4 + torch.randn(11, generator=generator)]).double()
    candidates = values.sort().values
    middles = (candidates[1:] + candidates[:-1]) / 2

    def within(threshold: float) -> float:
        sides = values[values <= threshold], values[values > threshold]
        return sum(float(((side - side.mean()) ** 2).sum()) for side in sides)

    assert best_split(values) == pytest.approx(min(middles.tolist(), key=within))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_background_is_the_side_at_the_borders_whatever_the_sign(sign: int) -> None:
    generator = torch.Generator().manual_seed(0)
    grids = [(8, 8), (7, 12)]
    tokens, inner = zip(*(object_on_ground(generator, *grid) for grid in grids), strict=True)
    colours = colour_patches([sign * each for each in tokens], grids)
    num_inner = sum(int(each.sum()) for each in inner)
    assert colours.foreground_share == pytest.approx(num_inner / (8 * 8 + 7 * 12))
    for image, grid, is_inner in zip(colours.images, grids, inner, strict=True):
        assert image.shape == (*grid, 3)
        assert image.dtype == np.uint8
        assert (image[~is_inner.numpy()] == BACKGROUND).all()
        assert (image[is_inner.numpy()] != BACKGROUND).any(axis=1).all()


def test_of_the_foreground_the_next_component_is_red() -> None:
    tokens, _ = object_on_ground(torch.Generator().manual_seed(0), 10, 10)
    (image,) = colour_patches([tokens], [(10, 10)]).images
    red = image[2:-2, 2:-2, 0].astype(int).mean(axis=1)  # by row, as the object's second axis was made
    steps = np.diff(red)
    assert (steps > 10).all() or (steps < -10).all()
    assert abs(red[-1] - red[0]) > 240


def test_equal_patches_have_equal_colours_in_all_images() -> None:
    tokens, _ = object_on_ground(torch.Generator().manual_seed(0), 8, 8)
    first, second = colour_patches([tokens, tokens], [(8, 8), (8, 8)]).images
    np.testing.assert_array_equal(first, second)


def test_no_background_is_removed_where_the_first_component_ignores_the_borders() -> None:
    tokens = 0.01 * torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(0))
    tokens[:, :4, 0] += 10  # left and right halves
    colours = colour_patches([tokens.flatten(0, 1)], [(8, 8)])
    assert colours.foreground_share is None
    left, right = colours.images[0][:, :4, 0].astype(int), colours.images[0][:, 4:, 0].astype(int)
    assert abs(left.mean() - right.mean()) > 240


def test_equal_tokens_everywhere_do_not_break_it() -> None:
    colours = colour_patches([torch.ones(16, 4)], [(4, 4)])
    assert colours.images[0].shape == (4, 4, 3)


def test_the_picture_holds_images_and_colours_side_by_side(tmp_path: Path) -> None:
    for number in range(5):
        draw_photo(tmp_path / "photos" / f"{number}.png", width=40 + 20 * number)
    result = draw_pca(["photos"], "pca.png", SMALL_VIT, Options())
    assert result is not None
    assert (result.output, result.figures["images"]) == ("pca.png", 5)
    with Image.open("pca.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    assert width > 8 * 128  # four pairs in a row
    assert 2 * 128 < height < 3 * 128 + 100
    saturation = pixels.max(axis=2).astype(int) - pixels.min(axis=2)
    assert (saturation > 60).sum() > 1000  # colours are to be seen


def test_the_limit_and_unreadable_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        draw_photo(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "0.png").write_bytes(b"")
    result = draw_pca(["photos"], "pca.png", SMALL_VIT, Options(limit=2))
    assert result is not None
    assert result.figures["images"] == 1
    assert "0.png left out: empty file" in capsys.readouterr().err


def test_a_second_run_is_up_to_date_and_another_needs_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(draw_photo(tmp_path / "photo.png"))
    draw_pca([name], "pca.png", SMALL_VIT, Options())
    before = Path("pca.png").read_bytes()
    draw_pca([name], "pca.png", SMALL_VIT, Options())
    assert "pca.png is up to date" in capsys.readouterr().err
    larger = PictureSettings(SMALL_VIT.model, image_size=70)
    with pytest.raises(ToolkitError, match=r"was made differently \(image_size 56, now 70\).*--force"):
        draw_pca([name], "pca.png", larger, Options())
    assert Path("pca.png").read_bytes() == before
    draw_pca([name], "pca.png", larger, Options(force=True))
    assert Path("pca.png").read_bytes() != before


def test_a_foreign_picture_is_not_overwritten(tmp_path: Path) -> None:
    name = str(draw_photo(tmp_path / "photo.png"))
    draw_photo(tmp_path / "pca.png")
    with pytest.raises(ToolkitError, match="is no picture of ours"):
        draw_pca([name], "pca.png", SMALL_VIT, Options())


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(draw_photo(tmp_path / "photo.png"))
    assert draw_pca([name], "pca.png", SMALL_VIT, Options(dry_run=True)) is None
    assert "would draw the patch features of 1 images at 56 px to pca.png" in capsys.readouterr().err
    assert not Path("pca.png").exists()


@pytest.mark.parametrize(("image_size", "nearest"), [(60, 56), (28, 42), (5, 42)])
def test_a_size_that_does_not_suit_the_patch_is_an_error(tmp_path: Path, image_size: int, nearest: int) -> None:
    name = str(draw_photo(tmp_path / "photo.png"))
    with pytest.raises(ToolkitError, match=f"--image-size {image_size} is no multiple .* 14, .*; use {nearest}$"):
        draw_pca([name], "pca.png", PictureSettings(SMALL_VIT.model, image_size), Options())
    assert not Path("pca.png").exists()


def test_a_model_that_sees_few_patches_is_shown_at_least_eight_a_side(tmp_path: Path) -> None:
    backbone = build_vit("vit_tiny", patch_size=7, depth=1, img_size=28)
    for image_size in (28, 70):
        half = (0.5,) * 3
        save_model(
            tmp_path / f"run{image_size}",
            backbone=backbone,
            heads={},
            preprocess=Preprocess(image_size, 1.0, half, half),
        )
    assert open_patch_model("run28", None, 0).side_px == 56
    assert open_patch_model("run70", None, 0).side_px == 70
    assert open_patch_model("run70", 28, 0).side_px == 28


def test_the_model_pixels_is_refused_for_it_has_no_patch_tokens(tmp_path: Path) -> None:
    name = str(draw_photo(tmp_path / "photo.png"))
    with pytest.raises(ToolkitError, match="'pixels' has no patch tokens; name a vision transformer by --model"):
        draw_pca([name], "pca.png", PictureSettings("pixels"), Options())


@pytest.mark.parametrize("output", ["pca.jpg", "folder.png"])
def test_an_output_that_can_be_no_picture_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ToolkitError, match=output):
        draw_pca([str(draw_photo(tmp_path / "photo.png"))], output, SMALL_VIT, Options())
