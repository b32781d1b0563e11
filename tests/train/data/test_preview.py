from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import settings
from dinov2_toolkit.train.data.images import image_set, read_batches
from dinov2_toolkit.train.data.preview import MASK_COLOUR, _masked, _rows
from dinov2_toolkit.train.pretrain import pretrain
from dinov2_toolkit.train.run import MonitorOptions

CHANGES = ("depth=1", "steps=3", "batch_size=4", "num_local_crops=3")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five plain images, each of a grey of its own."""
    uris = []
    for number in range(5):
        Image.new("RGB", (20, 16), (50 * number, 50 * number, 50 * number)).save(tmp_path / f"{number}.png")
        uris.append(str(tmp_path / f"{number}.png"))
    pq.write_table(pa.table({"uri": uris}), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def test_masked_patches_have_one_colour_and_others_stay() -> None:
    pixels = torch.rand(2, 3, 8, 8)
    masks = torch.tensor([[True, False, False, False], [False, False, False, True]])
    masked = _masked(pixels, masks, 4)
    colour = torch.tensor(MASK_COLOUR).view(3, 1, 1).expand(3, 4, 4)
    assert torch.equal(masked[0, :, :4, :4], colour) and torch.equal(masked[1, :, 4:, 4:], colour)
    assert torch.equal(masked[0, :, 4:], pixels[0, :, 4:]) and torch.equal(masked[1, :, :4], pixels[1, :, :4])


def test_a_row_holds_an_image_and_all_crops_of_it(manifest: Path) -> None:
    config = settings(*CHANGES, "jitter=0", "mask_probability=0", "solarize=[0, 0, 0]")
    uris = pq.read_table(manifest)
    (batch,) = read_batches(image_set(uris), seed=0, batches=[range(4)], short_side_px=24)
    rows = _rows(batch, config)
    assert [[len(group) for group in row] for row in rows] == [[1, 2, 3]] * 4
    for (whole,), global_crops, local_crops in rows:
        grey = np.asarray(whole.image)[0, 0, 0]
        assert [tile.image.size for tile in (*global_crops, *local_crops)] == [(12, 12)] * 2 + [(8, 8)] * 3
        for tile in (*global_crops, *local_crops):
            assert np.abs(np.asarray(tile.image).astype(int) - grey).max() <= 1


def test_a_dry_run_with_a_preview_draws_it_and_trains_nothing(manifest: Path) -> None:
    picture = manifest.parent / "crops.png"
    monitor = MonitorOptions(preview=str(picture))
    run = str(manifest.parent / "run")
    assert pretrain(manifest, run, settings(*CHANGES), Options(dry_run=True), monitor=monitor) is None
    with Image.open(picture) as image:
        assert image.width > 500 and image.height > 1000
    assert not Path(run).exists()
    with pytest.raises(ToolkitError, match="was made differently"):
        pretrain(manifest, run, settings(*CHANGES, "num_local_crops=2"), Options(dry_run=True), monitor=monitor)
    with pytest.raises(ToolkitError, match="does not end in .png"):
        pretrain(manifest, run, settings(*CHANGES), Options(dry_run=True), monitor=MonitorOptions(preview="crops.jpg"))
