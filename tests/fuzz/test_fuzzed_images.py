"""Damaged images of every format, by the thousand: each is a row or has its reason, and the others are as ever."""

import shutil
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dinov2_toolkit.evaluate.masks import decode_mask
from dinov2_toolkit.features.image_workers import image_workers
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store.images import UnreadableImage
from dinov2_toolkit.tests.fuzz.mutate import mutated_file
from dinov2_toolkit.tests.fuzz.real_images import SIDE, real_images, real_masks
from dinov2_toolkit.tests.fuzz.trial import CONTROL, SEED, Ended, fault, import_all, run, trials
from dinov2_toolkit.tests.fuzz.workspace import SETTINGS, split

FOLDER_IMAGES = 1_000
MOST_STEPS = 16
READERS = (  # `listed.parquet` names the images of the folder
    "curate embed images -o out.parquet --model pixels --num-workers 2",
    "curate embed listed.parquet -o out_nine.parquet --model nine --num-workers 2",
    "curate embed images -o out_filtered.parquet --model pixels --min-contrast 1 --min-sharpness 1 --max-aspect 3",
    "curate dedup listed.parquet -o out_exact.parquet --exact pixels",
    "curate dedup listed.parquet -o out_bytes.parquet --exact bytes",
    f"train pretrain listed.parquet -o out_run --recipe tiny {SETTINGS} --set batch_size=50 --set steps={MOST_STEPS}",
    "evaluate pca listed.parquet --model model -o out.png --limit 30",
    "evaluate attention listed.parquet --model model -o out_attention.png --limit 30",
)
SINGLE = (
    "evaluate match {} whole.png --model model -o out.png",
    "evaluate pca {} whole.png --model model -o out.png",
    "evaluate neighbors {} --pool pool.parquet -o out.png",
    "evaluate probe --train masked.parquet --test masked.parquet --model model --method segment -o out.parquet",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models: of colours, and of nine channels of 16 bits."""
    folder = tmp_path_factory.mktemp("images")
    import_all()
    (folder / "pristine").mkdir()
    torch.manual_seed(0)
    for name, in_chans, bit_depth in (("model", 3, 8), ("nine", 9, 16)):
        backbone = VisionTransformer(patch_size=4, embed_dim=24, depth=1, num_heads=3, img_size=8, in_chans=in_chans)
        how = Preprocess(8, 1.0, (0.5,) * in_chans, (0.25,) * in_chans, bit_depth=bit_depth)
        save_model(folder / "pristine" / name, backbone=backbone, heads={}, preprocess=how)
    (folder / "pristine" / "whole.png").write_bytes(real_images()["rgb.png"])
    assert run(split("curate embed . -o pool.parquet --model pixels"), folder / "pristine", 60).code == 0
    return folder / "work"


def mutant(number: int) -> tuple[str, bytes]:
    """Return the name and bytes of a damaged image."""
    random, files = Random(f"image {SEED} {number}"), real_images()
    name = random.choice(list(files))
    return f"{number:06}.{name}", mutated_file(name, files[name], random, list(files.values()))


def fill(work: Path, numbers: range) -> list[str]:
    """Write damaged images and whole ones, and a manifest of their names; return those of the whole ones."""
    (work / "images").mkdir()
    for name, data in map(mutant, numbers):
        (work / "images" / name).write_bytes(data)
    for name, data in real_images().items():
        (work / "images" / f"whole.{name}").write_bytes(data)
    names = sorted(f"images/{path.name}" for path in (work / "images").iterdir())
    pq.write_table(pa.table({"uri": names}), work / "listed.parquet")
    return [f"whole.{name}" for name in real_images()]


def vectors(manifest: Path) -> dict[str, list[float]]:
    """Return embeddings by file name."""
    table = pq.read_table(manifest)
    return {
        Path(uri).name: row
        for uri, row in zip(*(table.column(key).to_pylist() for key in ("uri", "embedding")), strict=True)
    }


def account(work: Path, command: str, ended: Ended, num_files: int) -> None:
    """Check that every file is a row or has a reason in one printable line, and none took too long."""
    output = next(
        work / argument for argument in command.split() if argument.endswith(".parquet") and argument.startswith("out")
    )
    removed = pq.read_table(output.with_suffix(".removed.parquet"))
    assert pq.read_table(output).num_rows + removed.num_rows == num_files, (command, ended.said)
    for reason in removed.column("reason").to_pylist():
        assert reason and not CONTROL.search(reason) and "image-timeout" not in reason, (command, reason)


def read_all(work: Path, numbers: range, readers: tuple[str, ...]) -> None:
    """Read damaged images by all commands."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(work.parent / "pristine", work)
    whole = fill(work, numbers)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file() and ".dinov2" not in path.parts}
    for command in readers:
        ended = run(split(command), work, 600)
        changed = [str(path) for path, data in before.items() if path.read_bytes() != data]
        what = fault(ended, changed)
        assert what is None and ended.code == 0, (
            f"FUZZ_SEED={SEED} images {numbers}: {command}: {what}\n{ended.said[-2000:]}"
        )
        if command.startswith("curate"):
            account(work, command, ended, len(numbers) + len(whole))
    alone = work / "alone"
    alone.mkdir()
    for name in whole:
        shutil.copy(work / "images" / name, alone / name)
    assert run(split("curate embed alone -o out_alone.parquet --model pixels"), work, 60).code == 0
    among, by_themselves = vectors(work / "out.parquet"), vectors(work / "out_alone.parquet")
    assert len(by_themselves) > 45
    assert {name: among[name] for name in by_themselves} == by_themselves


def test_damaged_images_are_rows_or_have_a_reason(work: Path) -> None:
    read_all(work, range(200), READERS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20_000, FOLDER_IMAGES))
def test_20000_damaged_images_are_rows_or_have_a_reason(work: Path, first: int) -> None:
    read_all(work, range(first, first + FOLDER_IMAGES), READERS)


def damaged_masks(numbers: range) -> list[bytes]:
    """Return damaged masks."""
    files, masks = real_masks(), []
    for number in numbers:
        random = Random(f"mask {SEED} {number}")
        name = random.choice(list(files))
        masks.append(mutated_file(name, files[name], random, list(files.values())))
    return masks


def read_masks(folder: Path, numbers: range) -> None:
    """Read damaged masks as `evaluate probe --method segment` does."""
    paths = [folder / str(number) for number in numbers]
    for path, data in zip(paths, damaged_masks(numbers), strict=True):
        path.write_bytes(data)
    with image_workers(decode_mask, 2) as read:
        found = read([str(path) for path in paths])
    for number, mask in zip(numbers, found, strict=True):
        if isinstance(mask, UnreadableImage):
            assert mask.reason and "crashed" not in mask.reason, number
        else:
            assert mask.dtype == np.uint8 and mask.ndim == 2, number
    assert any(isinstance(mask, np.ndarray) and mask.shape == (SIDE, SIDE) for mask in found)


def test_damaged_masks_are_masks_or_have_a_reason(tmp_path: Path) -> None:
    read_masks(tmp_path, range(200))


@pytest.mark.slow
def test_5000_damaged_masks_are_masks_or_have_a_reason(tmp_path: Path) -> None:
    read_masks(tmp_path, range(5_000))


def damaged(work: Path, random: Random) -> list[str]:
    """Write one damaged image and return the arguments of a command that is given it, as image or mask."""
    name, data = mutant(random.randrange(100_000))
    (work / name).write_bytes(data)
    masks, kind = real_masks(), random.choice(list(real_masks()))
    (work / kind).write_bytes(mutated_file(kind, masks[kind], random, list(masks.values())))
    for mask in masks:
        (work / f"whole.{mask}").write_bytes(masks[mask])
    rows = {"uri": ["whole.png"] * 3, "mask": [f"whole.{kind}", kind, "whole.grey.png"]}
    pq.write_table(pa.table(rows), work / "masked.parquet")
    return [argument.replace("{}", name) for argument in split(random.choice(SINGLE))]


def test_a_damaged_image_by_itself_ends_in_one_line(work: Path) -> None:
    assert trials(work, range(2), lambda random: damaged(work, random), kind="picture") == []


@pytest.mark.slow
def test_300_damaged_images_by_themselves_end_in_one_line(work: Path) -> None:
    failures = trials(work, range(300), lambda random: damaged(work, random), kind="picture")
    assert not failures, f"{len(failures)} of 300 fail:\n" + "\n".join(failures)
