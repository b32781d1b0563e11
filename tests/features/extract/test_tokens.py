"""What describes an image: class token, mean of the patches, every patch; of one block or several, or by windows."""

import os
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.inputs import Input, check_same_model
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.extract.extract import FeatureModel, extract, feature_model, open_model, with_choice
from dinov2_toolkit.features.extract.tokens import TokenChoice, Tokens, stitch
from dinov2_toolkit.features.extract.windows import Layout, cut
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, crop_picture, normalise
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import Features, VisionTransformer
from dinov2_toolkit.models.weights import Model
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest

PREPROCESS = Preprocess(28, 1.0, IMAGENET_MEAN, IMAGENET_STD)


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(patch_size=7, embed_dim=24, depth=3, num_heads=3, img_size=28, layer_scale=1.0).eval()


def model() -> FeatureModel:
    return feature_model(Model("tiny", "id", vit(), PREPROCESS))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    Image.fromarray(rng.integers(0, 256, (40, 71, 3), dtype=np.uint8)).save(path)
    return path


def extracted(model: FeatureModel, path: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (batch,) = extract(model, [str(path)], batch_size=2, num_workers=1)
    return batch.features[0], batch.patches


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tokens", ["cls", "mean", "cls+mean", "patches"])
def test_every_choice_equals_the_tokens_of_its_blocks(picture: Path, tokens: Tokens, layers: int) -> None:
    plain = model()
    chosen = with_choice(plain, TokenChoice(tokens, layers))
    vector, patches = extracted(chosen, picture)
    pixels = normalise(crop_picture(Image.open(picture), plain.preprocess)[None], plain.preprocess)
    with torch.no_grad():
        blocks = vit().get_intermediate_layers(pixels, range(3 - layers, 3), return_class_token=True)
    classes = [cls_token[0] for _, cls_token in blocks]
    means = [patch_tokens[0].mean(0) for patch_tokens, _ in blocks]
    expected = {"cls": classes, "patches": classes, "mean": means, "cls+mean": [*classes, means[-1]]}[tokens]
    torch.testing.assert_close(vector, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert len(vector) == chosen.dim
    if tokens == "patches":
        by_hand = torch.cat([patch_tokens[0] for patch_tokens, _ in blocks], dim=1).view(4, 4, -1)
        torch.testing.assert_close(patches[0], by_hand, rtol=1e-5, atol=1e-5)
    else:
        assert patches == []


def test_vectors_of_another_choice_have_another_model_id() -> None:
    plain = model()
    assert with_choice(plain, TokenChoice()) is plain
    choices = [
        with_choice(plain, TokenChoice("mean")),
        with_choice(plain, TokenChoice("cls+mean")),
        with_choice(plain, TokenChoice("cls", 2)),
        with_choice(plain, TokenChoice("mean", 2)),
        with_choice(plain, TokenChoice(), image_size=42),
        with_choice(plain, TokenChoice(), windows=56),
        with_choice(plain, TokenChoice(), image_size=42, windows=56),
    ]
    assert len({plain.source.content_id, *(one.source.content_id for one in choices)}) == 8
    for same in (TokenChoice("patches"), TokenChoice("cls")):  # the vectors are class tokens
        assert with_choice(plain, same, image_size=28).source.content_id == plain.source.content_id


def test_wrong_choices_are_errors_of_one_line() -> None:
    for choice, sizes, complaint in [
        (TokenChoice(layers=4), (None, None), "--layers 4: the model has 3 blocks"),
        (TokenChoice(), (30, None), "--image-size 30 is not a multiple of the model's patch size 7; use 28"),
        (TokenChoice(), (None, 20), "--windows 20 is smaller than a tile of 28 pixels"),
    ]:
        with pytest.raises(ToolkitError, match=complaint):
            with_choice(model(), choice, *sizes)
    with pytest.raises(ToolkitError, match="model pixels has no tokens; --tokens"):
        with_choice(open_model("pixels"), TokenChoice("mean"))


def test_tiles_cover_a_picture_in_whole_patches() -> None:
    coordinates = np.stack(np.broadcast_arrays(np.arange(70)[:, None], np.arange(98), 0), axis=-1).astype(np.uint8)
    tiles, layout = cut(Image.fromarray(coordinates), PREPROCESS, 7, 70)
    assert (layout.rows, layout.columns, layout.tops, layout.lefts) == (10, 14, (0, 3, 6), (0, 3, 7, 10))
    assert tiles.shape == (12, 3, 28, 28) and layout.num_tiles == 12
    assert tiles[5, 0, 0, 0] == 3 * 7 and tiles[5, 1, 0, 0] == 3 * 7  # its row and column
    assert tiles[11, 0, -1, -1] == 69 and tiles[11, 1, -1, -1] == 97
    small, one = cut(Image.new("RGB", (20, 10)), PREPROCESS, 7, 70)
    assert (one.rows, one.columns, small.shape[0]) == (4, 8, 2)  # brought to the tile's height
    _, reduced = cut(Image.new("RGB", (400, 300)), PREPROCESS, 7, 42)
    assert (reduced.rows, reduced.columns) == (6, 8)
    _, long = cut(Image.new("RGB", (10_000, 30)), PREPROCESS, 7, 42)
    assert (long.rows, long.columns) == (4, 34)  # its middle, 240 x 30, in whole patches


def test_stitched_tokens_are_means_over_the_tiles_that_saw_them() -> None:
    layout = Layout(3, 4, (0, 1), (0, 2))
    tiles = torch.arange(4.0)[:, None, None].expand(4, 4, 1)  # 2 x 2 patches a tile, the tile's number in each
    whole = stitch(Features(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None, None], tiles), layout)
    by_hand = torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2], [2, 2, 3, 3]])
    assert torch.equal(whole.patch_tokens.view(3, 4), by_hand.float())
    assert whole.cls_token.item() == 1.5 and whole.register_tokens.shape == (1, 1, 1)


def test_windows_of_one_tile_are_the_plain_model(tmp_path: Path) -> None:
    path = tmp_path / "square.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    one, _ = extracted(with_choice(model(), TokenChoice("cls+mean"), windows=56), path)
    plain, _ = extracted(with_choice(model(), TokenChoice("cls+mean")), path)
    torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-5)


def test_windows_see_each_tile_by_itself(picture: Path) -> None:
    chosen = with_choice(model(), TokenChoice("patches", 2), windows=35)
    vector, (patches,) = extracted(chosen, picture)
    tiles, layout = cut(Image.open(picture), PREPROCESS, 7, 35)
    with torch.no_grad():
        blocks = [
            vit().get_intermediate_layers(
                normalise(torch.from_numpy(tile[None]), PREPROCESS), 2, return_class_token=True
            )
            for tile in tiles
        ]
    classes = torch.cat([torch.stack([of_tile[block][1][0] for of_tile in blocks]).mean(0) for block in range(2)])
    torch.testing.assert_close(vector, classes, rtol=1e-5, atol=1e-5)
    assert patches.shape == (layout.rows, layout.columns, 48) == (5, 8, 48)
    torch.testing.assert_close(patches[0, 0, 24:], blocks[0][1][0][0, 0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    save_model(folder, backbone=vit(), heads={}, preprocess=Preprocess(28, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    return str(folder)


def test_patches_lie_in_the_manifest_with_their_grid(run: str, picture: Path) -> None:
    Image.new("RGB", (28, 50), "red").save(picture.parent / "b.png")
    settings = EmbedSettings(run, tokens="patches", windows=28, dtype="float32")
    embed_images(["images"], "patches.parquet", settings, Options())
    columns = "grid_height, grid_width, len(patches), len(patches[1])"
    grids = duckdb.connect().execute(f"select {columns} from 'patches.parquet'").fetchall()
    assert grids == [(4, 7, 28, 24), (7, 4, 28, 24)]
    row = pq.read_table("patches.parquet").to_pylist()[0]
    _, (patches,) = extracted(with_choice(model(), TokenChoice("patches"), windows=28), picture)
    stored = np.array(row["patches"]).reshape(row["grid_height"], row["grid_width"], -1)
    assert np.abs(stored - patches.numpy()).max() < 1e-5
    assert pq.read_schema("patches.parquet").field("embedding").type.list_size == 24


def test_class_tokens_are_not_compared_with_means_of_patches(run: str, picture: Path) -> None:
    for name, settings in {
        "cls": EmbedSettings(run),
        "mean": EmbedSettings(run, tokens="mean"),
        "patches": EmbedSettings(run, tokens="patches"),
        "large": EmbedSettings(run, image_size=42),
    }.items():
        embed_images(["images"], f"{name}.parquet", settings, Options())
    opened = {
        name: Input("pool", open_manifest(Path(f"{name}.parquet")), None)
        for name in ("cls", "mean", "patches", "large")
    }
    check_same_model(opened["cls"], opened["patches"])
    for other in ("mean", "large"):
        with pytest.raises(ToolkitError, match="two models"):
            check_same_model(opened["cls"], opened[other])
    provenance = opened["mean"].manifest.provenance
    assert provenance is not None
    assert {name: provenance.parameters[name] for name in ("tokens", "layers", "image_size", "windows")} == {
        "tokens": "mean",
        "layers": 1,
        "image_size": 28,
        "windows": None,
    }
    with pytest.raises(ToolkitError, match=r"cls.parquet exists and was made differently \(tokens cls, now mean\)"):
        embed_images(["images"], "cls.parquet", EmbedSettings(run, tokens="mean"), Options())
    assert not os.path.exists("none.parquet")
