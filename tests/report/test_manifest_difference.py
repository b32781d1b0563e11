"""What differs between two images is seen where it is, and nothing else."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from dinov2_toolkit.report.manifest_difference import difference_picture, differing
from dinov2_toolkit.store.vectors import Float64
from dinov2_toolkit.tests.report.curated import scene


def darkness(picture: Image.Image | None) -> Float64:
    assert picture is not None
    levels: Float64 = np.asarray(picture, np.float64).mean(axis=2)
    return 255 - levels


def test_nothing_differs_between_an_image_and_its_copies() -> None:
    image = scene(0, 96)
    assert darkness(differing(image, image)).max() == 0
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=90)
    assert darkness(differing(image, Image.open(encoded).convert("RGB"))).mean() < 20
    assert darkness(differing(image, ImageEnhance.Brightness(image).enhance(0.8))).max() < 10
    assert darkness(differing(image, image.resize((64, 64)))).mean() < 20


def test_what_was_drawn_into_a_copy_is_dark_there_alone() -> None:
    image = scene(0, 96)
    drawn = image.copy()
    drawn.paste("white", (10, 20, 22, 32))
    found = darkness(differing(image, drawn))
    inside = np.zeros((96, 96), bool)
    inside[20:32, 10:22] = True
    assert found[inside].mean() > 100 and found[~inside].mean() < 20


def test_images_that_do_not_lie_pixel_on_pixel_are_not_compared(tmp_path: Path) -> None:
    image = scene(0, 96)
    assert differing(image, image.crop((0, 0, 96, 60))) is None
    assert differing(image, scene(1, 96)) is None and differing(image, image.rotate(90)) is None
    image.save(tmp_path / "a.png")
    assert difference_picture(str(tmp_path / "a.png"), str(tmp_path / "gone.png")) is None
    assert difference_picture(None, str(tmp_path / "a.png")) is None
    assert darkness(difference_picture(str(tmp_path / "a.png"), str(tmp_path / "a.png"))).max() == 0
