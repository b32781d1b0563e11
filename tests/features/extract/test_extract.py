"""A model over many images: in order, whole, and the same whatever the number of threads."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.extract import extract as extract_module
from dinov2_toolkit.features.extract.decoding import load_batches
from dinov2_toolkit.features.extract.extract import (
    FeatureModel,
    PixelBackbone,
    extract,
    feature_model,
    open_model,
    pixels_model,
)
from dinov2_toolkit.features.image_workers import Worker
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, crop_picture, normalise
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import Features, VisionTransformer
from dinov2_toolkit.models.weights import Model
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.images import image_id
from dinov2_toolkit.store.manifest import Provenance


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Leave the cores to the decoding threads: models this small gain nothing by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_vit(in_chans: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        patch_size=7, embed_dim=24, depth=2, num_heads=3, img_size=28, in_chans=in_chans, layer_scale=1.0
    )


def tiny_model(in_chans: int = 3) -> FeatureModel:
    mean, std = ((0.5,), (0.25,)) if in_chans == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    return feature_model(Model("tiny", "id", tiny_vit(in_chans).eval(), Preprocess(28, 0.875, mean, std)))


@pytest.fixture
def uris(tmp_path: Path) -> list[str]:
    """Thirty names: images of many sizes, each tenth one broken."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(30):
        path = tmp_path / f"{number:02}.png"
        if number % 10 == 9:
            path.write_bytes(b"broken")
        else:
            width, height = rng.integers(5, 90, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        names.append(str(path))
    return names


@pytest.mark.parametrize("in_chans", [3, 1])
def test_features_are_the_class_token_of_each_image_by_itself(uris: list[str], in_chans: int) -> None:
    model = tiny_model(in_chans)
    seen = {}
    for batch in extract(model, uris, batch_size=8, num_workers=3):
        for index, facts, features in zip(batch.indices, batch.facts, batch.features, strict=True):
            seen[index] = features
            with Image.open(uris[index]) as image:
                assert (facts.width, facts.height) == image.size
            assert facts.image_id == image_id(Path(uris[index]).read_bytes())
    assert sorted(seen) == [number for number in range(30) if number % 10 != 9]
    for index, features in seen.items():
        pixels = crop_picture(Image.open(uris[index]), model.preprocess)
        with torch.no_grad():
            alone = model.backbone.forward_features(normalise(pixels[None], model.preprocess)).cls_token[0]
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)


def test_batches_are_full_in_order_and_report_failures_where_they_occur(uris: list[str]) -> None:
    batches = list(load_batches(uris, tiny_model().preprocess, batch_size=8, num_workers=4))
    assert [len(batch.indices) for batch in batches] == [8, 8, 8, 3]
    assert [index for batch in batches for index in batch.indices] == [n for n in range(30) if n % 10 != 9]
    reason = "not an image of a known format"
    assert [batch.failures for batch in batches] == [[], [(9, reason)], [(19, reason)], [(29, reason)]]
    assert batches[0].pixels.shape == (8, 3, 28, 28) and batches[0].pixels.dtype == torch.uint8


def test_the_number_of_threads_changes_nothing(uris: list[str]) -> None:
    model = tiny_model()
    single, several = (
        [batch.features for batch in extract(model, uris, batch_size=8, num_workers=number)] for number in (1, 4)
    )
    assert all(torch.equal(left, right) for left, right in zip(single, several, strict=True))


def test_a_batch_may_hold_only_failures(uris: list[str]) -> None:
    (batch,) = extract(pixels_model(), [uris[9], "/nowhere"], batch_size=8, num_workers=2)
    assert batch.features.shape == (0, 768)
    assert batch.failures == [(0, "not an image of a known format"), (1, "no such file")]
    assert list(extract(pixels_model(), [], batch_size=8, num_workers=2)) == []


def test_decoding_goes_on_while_the_model_computes(uris: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    second_batch_decoded = threading.Event()
    read, forward = Worker.read, extract_module.forward

    def announced(worker: Worker[Any], names: Sequence[str], take: Any) -> list[Any]:
        found = read(worker, names, take)
        if uris[15] in names:
            second_batch_decoded.set()
        return found

    def patient(
        backbone: PixelBackbone, preprocess: Preprocess, pixels: torch.Tensor, device: torch.device
    ) -> Features:
        assert second_batch_decoded.wait(timeout=10)
        return forward(backbone, preprocess, pixels, device)

    monkeypatch.setattr(Worker, "read", announced)
    monkeypatch.setattr(extract_module, "forward", patient)
    batches = list(extract(pixels_model(), uris, batch_size=4, num_workers=2))
    assert [len(batch.indices) for batch in batches] == [4, 4, 4, 4, 4, 4, 3]


def test_names_are_read_only_a_little_ahead_and_threads_end_with_the_iterator(uris: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield uris[0]

    before = threading.active_count()
    with closing(extract(pixels_model(), endless(), batch_size=8, num_workers=2)) as batches:
        assert next(batches).indices == list(range(8))
        assert threading.active_count() > before
    assert taken < 150
    assert threading.active_count() == before


def test_pixels_are_the_squeezed_image_on_white_less_its_mean(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (20, 40, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    (batch,) = extract(pixels_model(), [str(tmp_path / "a.png")], batch_size=1, num_workers=1)
    white = Image.new("RGBA", (40, 20), "white")
    small = (
        Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    )
    flat = np.asarray(small).reshape(-1) / 255
    assert np.abs(batch.features[0].numpy() - (flat - flat.mean())).max() < 1.01 / 255  # blending may round otherwise
    assert abs(batch.features[0].mean()) < 1e-6


def test_features_can_be_trained_on(uris: list[str]) -> None:
    (batch,) = extract(tiny_model(), uris[:3], batch_size=3, num_workers=1)
    linear = torch.nn.Linear(24, 2)
    linear(batch.features).sum().backward()  # inference tensors would refuse
    assert linear.weight.grad is not None


def test_without_a_name_the_newest_run_is_the_model_and_copy_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_model(None).source.path == "copy"
    assert "no --model given: using copy" in capsys.readouterr().err
    run = tmp_path / "run"
    save_model(run, backbone=tiny_vit(), heads={}, preprocess=Preprocess(28, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    catalog.record(run, Provenance("run", "train pretrain", {}, content_id="1"), 1.0)
    model = open_model(None)
    assert (model.source.path, model.dim, model.preprocess.short_side) == (str(run), 24, 28)
    assert "using the newest run" in capsys.readouterr().err


def test_an_unknown_model_is_an_error() -> None:
    for name in ("no/such/run", "random:vit_huge"):
        with pytest.raises(ToolkitError, match=name.removeprefix("random:")):
            open_model(name)
