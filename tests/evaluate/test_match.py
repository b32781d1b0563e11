"""`dinov2 evaluate match`: mutual nearest patches against a loop, the foreground first, and the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.match import MatchSettings, draw_match, match_patches
from dinov2_toolkit.store.artifact import Options

SMALL_VIT = MatchSettings("random:vit_tiny/14", image_size=56)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw_photo(name: str, seed: int, size: tuple[int, int] = (40, 40)) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name)
    return name


def test_matches_are_the_mutual_nearest_by_a_slow_loop_best_first() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 6, generator=generator), torch.randn(24, 6, generator=generator)
    units = [tokens / tokens.norm(dim=1, keepdim=True) for tokens in (left, right)]
    expected = []
    for one in range(20):
        other = max(range(24), key=lambda number: float(units[0][one] @ units[1][number]))  # noqa: B023
        back = max(range(20), key=lambda number: float(units[0][number] @ units[1][other]))  # noqa: B023
        if back == one:
            expected.append((float(units[0][one] @ units[1][other]), one, other))
    expected.sort(reverse=True)
    found = match_patches(left, right, [(4, 5), (4, 6)], 100)
    pairs = list(zip(found.left.tolist(), found.right.tolist(), strict=True))
    assert found.num_mutual == len(expected) == len(pairs)
    assert pairs == [(one, other) for _, one, other in expected]
    np.testing.assert_allclose(found.similarities, [cosine for cosine, _, _ in expected], rtol=1e-5)
    assert match_patches(left, right, [(4, 5), (4, 6)], 3).left.tolist() == found.left[:3].tolist()


def test_the_foreground_comes_first_however_alike_the_background() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = (6, 6)
    inner = torch.zeros(grid, dtype=torch.bool)
    inner[2:4, 2:4] = True
    parts = 3 * torch.randn(36, 16, generator=generator)
    left = 0.01 * torch.randn(36, 16, generator=generator) + torch.eye(16)[0] * 20
    right = left.clone()  # the background is the very same
    object_ = inner.flatten()
    left[object_] = -torch.eye(16)[0] * 20 + parts[object_]
    right[object_] = left[object_] + torch.randn(int(object_.sum()), 16, generator=generator)
    found = match_patches(left, right, [grid, grid], 4)
    assert set(found.left.tolist()) == set(found.right.tolist()) == set(torch.nonzero(object_).flatten().tolist())


def test_an_image_matches_itself_patch_by_patch() -> None:
    tokens = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    found = match_patches(tokens, tokens, [(4, 4), (4, 4)], 100)
    assert torch.equal(found.left, found.right)
    assert found.num_mutual == 16


def test_the_picture_holds_both_images_and_as_many_lines() -> None:
    result = draw_match(draw_photo("a.png", 0), draw_photo("b.png", 1, (80, 40)), "match.png", SMALL_VIT, Options())
    assert result is not None
    assert 1 <= int(str(result.figures["matches"])) <= 20
    with Image.open("match.png") as picture:
        assert picture.width > 3 * 420  # a square, one twice as long, and what lies between
        assert "dinov2_toolkit" in picture.info
    before = Path("match.png").read_bytes()
    draw_match("a.png", "b.png", "match.png", SMALL_VIT, Options())
    assert Path("match.png").read_bytes() == before
    with pytest.raises(ToolkitError, match=r"was made differently \(matches 20, now 5\)"):
        draw_match("a.png", "b.png", "match.png", MatchSettings(SMALL_VIT.model, 56, 5), Options())


def test_what_cannot_be_matched_is_said_in_one_line() -> None:
    name = draw_photo("a.png", 0)
    Path("bad.png").write_bytes(b"no image")
    with pytest.raises(ToolkitError, match=r"bad\.png cannot be read; give two images"):
        draw_match(name, "bad.png", "match.png", SMALL_VIT, Options())
    with pytest.raises(ToolkitError, match="'pixels' has no patch tokens"):
        draw_match(name, name, "match.png", MatchSettings("pixels"), Options())
    assert draw_match(name, name, "match.png", SMALL_VIT, Options(dry_run=True)) is None
    assert not Path("match.png").exists()
