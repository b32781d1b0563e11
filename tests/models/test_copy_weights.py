"""How the copy descriptor's weights are made: copies, look-alikes, batches and the loss of its network."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinov2_toolkit.models.copy_descriptor import CopyDescriptor, crop_margins, load_copy_descriptor, standardise

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def weights() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("build_copy_weights")


@pytest.fixture(scope="module")
def pictures(weights: ModuleType) -> ModuleType:
    return importlib.import_module("copy_pictures")


def squares(number: int) -> list[Image.Image]:
    """Return pictures of 60 x 40 random squares."""
    pixels = np.random.default_rng(0).integers(0, 256, (number, 10, 15, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((60, 40), Image.Resampling.NEAREST) for each in pixels]


def test_every_kind_of_copy_is_a_picture_and_the_same_by_the_same_seed(pictures: ModuleType) -> None:
    (picture,) = squares(1)
    for kind in pictures.MAP_KINDS | pictures.NETWORK_KINDS:
        one, other = (pictures.altered(picture, kind, np.random.default_rng(3)) for _ in range(2))
        assert one.mode == "RGB" and min(one.size) >= 8, kind
        assert one.tobytes() == other.tobytes(), kind
    with pytest.raises(ValueError, match="melted"):
        pictures.altered(picture, "melted", np.random.default_rng(0))


def test_a_sibling_differs_in_one_place_or_in_its_hues(pictures: ModuleType) -> None:
    sources = squares(8)
    changed = []
    for seed in range(40):
        sibling = pictures.sibling(sources[0], sources, np.random.default_rng(seed))
        assert sibling.size == sources[0].size
        changed.append((np.asarray(sibling) != np.asarray(sources[0])).any(axis=2).mean())
    assert min(changed) > 0
    assert any(share > 0.9 for share in changed)  # hues
    assert all(share < 0.25 or share > 0.9 for share in changed)


def test_composed_pictures_are_as_many_as_asked_and_none_is_plain(pictures: ModuleType) -> None:
    composed = pictures.compose(squares(8), 30, np.random.default_rng(0))
    assert len(composed) == 30 and all(pictures.shows_something(picture) for picture in composed)


def test_a_batch_holds_two_forms_each_of_pictures_found_alike(weights: ModuleType) -> None:
    num_pictures, num_copies, dim = 200, 3, 128
    row = torch.arange(num_pictures, dtype=torch.uint8)
    pixels = row[None, :, None, None, None].expand(1 + num_copies, -1, 3, 2, 2)  # every pixel names its picture
    mapped = F.normalize(torch.randn(1 + num_copies, num_pictures, dim), dim=-1)
    mapped[0, 1] = mapped[0, 0]  # these two may be the same
    alike = (torch.arange(num_pictures)[:, None] + torch.arange(33)) % num_pictures
    chosen, vectors, same = weights.pairs(weights.PictureSet(pixels, mapped, alike), np.random.default_rng(0))
    rows = (chosen[:, 0, 0, 0] * 255).round().long()
    half = len(rows) // 2
    assert torch.equal(rows[:half], rows[half:]) and len(rows[:half].unique()) == half
    assert half > weights.SEEDS
    forms = [
        next(form for form in range(1 + num_copies) if torch.equal(vectors[place], mapped[form, picture]))
        for place, picture in enumerate(rows.tolist())
    ]
    assert 0 in forms[:half] and 0 not in forms[half:]  # a picture itself comes first, or not at all
    expected = [
        [one == other or {one, other} == {0, 1} for other in rows[:half].tolist()] for one in rows[:half].tolist()
    ]
    assert same.tolist() == expected


def test_the_loss_is_that_of_copies_and_of_the_nearest_others(weights: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    half, limit = 12, 0.1
    vectors = F.normalize(torch.randn(2 * half, 6, generator=generator), dim=1)
    same = torch.eye(half, dtype=torch.bool)
    same[2, 5] = same[5, 2] = True

    def soft(difference: float) -> float:
        return math.log1p(math.exp(difference / weights.SOFTNESS))

    cosines = (vectors.double() @ vectors.double().T).tolist()
    copies = sum(soft(limit - cosines[row][half + row]) for row in range(half)) / half
    others = 0.0
    for row in range(2 * half):
        left = [cosines[row][other] for other in range(2 * half) if not same[row % half, other % half]]
        others += sum(soft(cosine - limit) for cosine in sorted(left)[-weights.HARDEST :])
    expected = copies + others / (2 * half * weights.HARDEST)
    assert weights.loss_of(vectors, same, torch.tensor(limit)).item() == pytest.approx(expected, rel=1e-5)


def test_the_network_learns_what_the_map_confuses(weights: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shown = torch.randint(0, 256, (48, 3, 8, 8), generator=generator).float()
    pixels = F.interpolate(shown, 64)[None].repeat(3, 1, 1, 1, 1).byte()
    mapped = F.normalize(torch.ones(3, 48, CopyDescriptor.embed_dim) + 0.2 * torch.randn(3, 48, 128), dim=-1)
    alike = torch.stack([torch.roll(torch.arange(48), -row)[:33] for row in range(48)])
    sets = {"any": weights.PictureSet(pixels, mapped, alike)}
    for name, value in {"STEPS": 40, "WARMUP_STEPS": 5, "SEEDS": 6, "CORRECTION": 1.0, "SHARES": {"any": 1.0}}.items():
        monkeypatch.setattr(weights, name, value)
    monkeypatch.setattr(weights, "AVERAGED_OVER", 5)
    torch.manual_seed(0)
    descriptor = CopyDescriptor()
    weights.train_correction(descriptor, sets, np.random.default_rng(0))
    descriptor.eval()
    with torch.inference_mode():
        standardised, plain = standardise(pixels[0].float() / 255)
        corrected = F.normalize(mapped + descriptor.correction(standardised, plain), dim=-1)

    def apart(vectors: torch.Tensor) -> float:
        cosines = vectors[1] @ vectors[2].T
        others = cosines.masked_fill(torch.eye(48, dtype=torch.bool), -1).amax(dim=1)
        return float((cosines.diagonal() - others).mean())

    assert apart(mapped) < 0 < apart(corrected)


def test_the_shipped_network_corrects_and_does_not_replace_the_map() -> None:
    descriptor = load_copy_descriptor()
    images = torch.rand(16, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        standardised, plain = standardise(crop_margins(images))
        mapped = descriptor.project(descriptor.gabor_colour_features(standardised, plain))
        correction = descriptor.correction(standardised, plain)
        whole = descriptor.forward_features(images).cls_token
    assert 0.1 < float(correction.norm(dim=1).mean()) < 1
    torch.testing.assert_close(whole, F.normalize(mapped + correction, dim=1))
