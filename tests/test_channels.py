"""All steps on images that are not RGB: embedding, training, probing and pictures, as they are stored."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_toolkit.curate.embed.embed import embed_images
from dinov2_toolkit.curate.embed.settings import EmbedSettings
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.attention import draw_attention
from dinov2_toolkit.evaluate.match import MatchSettings, draw_match
from dinov2_toolkit.evaluate.pca import draw_pca
from dinov2_toolkit.evaluate.pictures import PictureSettings
from dinov2_toolkit.evaluate.probe import ProbeSettings, probe
from dinov2_toolkit.features.extract.extract import extract, feature_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_model
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.vectors import Float32
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.distill import DistillConfig, distill
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.pretrain import pretrain
from dinov2_toolkit.train.run import MonitorOptions

SETTINGS = """arch=vit_tiny depth=1 embed_dim=64 num_heads=1 steps=3 batch_size=4 log_every=1 patch_size=4
num_prototypes=32 hidden_dim=16 bottleneck_dim=8 global_crop_size_px=16 local_crop_size_px=8 num_local_crops=2
mixed_precision=no num_workers=1 warmup_steps=1 freeze_last_layer_steps=0 solarize=[0.5,0.5,0.5]""".split()
KINDS = {"grey 16-bit PNG": (1, 16), "five bands of 16 bits": (5, 16), "four bands of 8 bits": (4, 8)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings(in_chans: int, bit_depth: int, *more: str) -> TrainConfig:
    assignments = [*SETTINGS, f"in_chans={in_chans}", f"bit_depth={bit_depth}", *more]
    return resolve(TrainConfig, assignments=assignments)


def write_images(folder: Path, in_chans: int, bit_depth: int) -> Path:
    """Four images in each of two folders: PNG where Pillow has a mode for them, otherwise .npy."""
    generator = np.random.default_rng(in_chans)
    for number in range(8):
        shape, dtype = (20, 24, in_chans), np.uint16 if bit_depth == 16 else np.uint8
        levels = generator.integers(number % 2 * 80, 150 + number % 2 * 80, shape)  # of 8 bits
        values = (levels * (257 if bit_depth == 16 else 1)).astype(dtype)
        path = folder / "dark bright".split()[number % 2] / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        if in_chans == 5:
            np.save(path.with_suffix(".npy"), values)
        else:
            Image.fromarray(values[..., 0] if in_chans == 1 else values).save(path.with_suffix(".png"))
    return folder


def features(run: Path, uris: list[str]) -> Float32:
    model = feature_model(load_model(run))
    (batch,) = extract(model, uris, batch_size=64, num_workers=1)
    return batch.features.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_channels_pass_all_steps(tmp_path: Path, kind: str) -> None:
    in_chans, bit_depth = KINDS[kind]
    images = write_images(tmp_path / "images", in_chans, bit_depth)
    pool, run = tmp_path / "pool.parquet", tmp_path / "run"
    assert embed_images([str(images)], str(pool), EmbedSettings(model="copy"), Options())
    table = pq.read_table(pool)
    assert table.num_rows == 8 and table["width"].to_pylist() == [24] * 8 and set(table["height"].to_pylist()) == {20}
    monitor = MonitorOptions(str(images), str(images), preview=str(tmp_path / "crops.png"))
    config = settings(in_chans, bit_depth)
    assert pretrain(pool, str(run), config, Options(dry_run=True)) is None
    assert pretrain(pool, str(run), config, Options(), monitor=monitor)
    assert "knn" in read_metrics(run)[-1]
    described = json.loads((run / "model.json").read_text())["preprocessing"]
    assert (described["bit_depth"], described["mean"]) == (bit_depth, [0.5] * in_chans)
    assert described["std"] == [0.25] * in_chans

    embeddings = tmp_path / "embeddings.parquet"
    assert embed_images([str(images)], str(embeddings), EmbedSettings(model=str(run), dtype="float32"), Options())
    vectors = np.stack(pq.read_table(embeddings)["embedding"].to_numpy())
    assert vectors.shape == (8, 64) and np.isfinite(vectors).all()
    uris = sorted(str(path) for path in images.glob("*/*"))
    assert np.array_equal(vectors, features(run, uris))
    windowed = EmbedSettings(model=str(run), image_size=8, windows=20)
    assert embed_images([str(images)], str(tmp_path / "windows.parquet"), windowed, Options())
    result = probe(
        str(images),
        str(images),
        str(tmp_path / "scores.parquet"),
        ProbeSettings(models=(str(run),), ks=(1,)),
        Options(),
    )
    assert result and result.value is not None
    draw_pca(uris, str(tmp_path / "pca.png"), PictureSettings(model=str(run)), Options())
    draw_attention(uris[:1], str(tmp_path / "attention.png"), PictureSettings(model=str(run)), Options())
    draw_match(uris[0], uris[1], str(tmp_path / "match.png"), MatchSettings(model=str(run)), Options())
    for name in ("crops", "pca", "attention", "match"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.mode == "RGB" and picture.width > 100


def test_a_16_bit_model_sees_differences_below_8_bits(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5, 16)
    pool = tmp_path / "pool.parquet"
    embed_images([str(images)], str(pool), EmbedSettings(model="copy"), Options())
    for bit_depth in (8, 16):
        run = tmp_path / f"run-{bit_depth}"
        pretrain(pool, str(run), settings(5, bit_depth), Options())
        uris = [str(tmp_path / name) for name in ("one.npy", "other.npy")]
        flat = np.full((20, 20, 5), 200 * 257, np.uint16)
        for uri, fine in zip(uris, (0, 100), strict=True):
            np.save(uri, flat + np.uint16(fine))
        one, other = features(run, uris)
        assert (one == other).all() == (bit_depth == 8)


def test_images_with_other_channels_are_listed_as_removed_with_the_reason(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5, 16)
    pretrain(_listed(images), str(tmp_path / "run"), settings(5, 16), Options())
    np.save(images / "dark" / "less.npy", np.zeros((20, 20, 2), np.uint16))
    output = str(tmp_path / "pool.parquet")
    assert embed_images([str(images)], output, EmbedSettings(model=str(tmp_path / "run")), Options())
    (removed,) = pq.read_table(tmp_path / "pool.removed.parquet").to_pylist()
    assert removed["reason"] == "2 channels where the model takes 5"


def _listed(images: Path) -> Path:
    """Write a manifest with only a uri column, relative to it."""
    listed = images.parent / "images.parquet"
    uris = [str(path.relative_to(images.parent)) for path in sorted(images.glob("*/*"))]
    pq.write_table(pa.table({"uri": uris}), listed)
    return listed


def test_rgb_weights_inflated_to_other_channels_give_the_same_features_for_equal_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", 3, 8)
    pretrain(_listed(images), str(tmp_path / "rgb"), settings(3, 8), Options())
    grey = torch.rand(2, 1, 16, 16)
    expected = load_backbone(tmp_path / "rgb").forward_features(grey.expand(-1, 3, -1, -1)).patch_tokens
    for in_chans in (1, 5):
        inflated = build_model(settings(in_chans, 16), str(tmp_path / "rgb")).teacher["backbone"].eval()
        assert isinstance(inflated, VisionTransformer)
        tokens = inflated.forward_features(grey.expand(-1, in_chans, -1, -1)).patch_tokens
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
        assert f"takes 3 channels, the recipe {in_chans}: each starts with" in capsys.readouterr().err


def test_distillation_requires_the_teachers_channels(tmp_path: Path) -> None:
    images = _listed(write_images(tmp_path / "images", 5, 16))
    teacher = str(tmp_path / "teacher")
    means = "pixel_mean=[0.1, 0.2, 0.3, 0.4, 0.5]"
    pretrain(images, teacher, settings(5, 16, means), Options())

    def config(*more: str) -> DistillConfig:
        return resolve(DistillConfig, assignments=[*SETTINGS, *more])

    with pytest.raises(ToolkitError, match="takes 5 channels, the recipe 3; set in_chans=5, or name another teacher"):
        distill(images, str(tmp_path / "student"), config(), Options(), teacher=teacher)
    fitting = config("in_chans=5", "bit_depth=16", "depth=1")
    distill(images, str(tmp_path / "student"), fitting, Options(), teacher=teacher)
    student = load_model(tmp_path / "student")
    assert (student.preprocess.bit_depth, student.preprocess.mean) == (16, (0.5,) * 5)
