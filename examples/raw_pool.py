"""Write the demo's raw pool: a folder of 24,000 small files, half of them clothes, half of no interest.

    python examples/raw_pool.py out/raw

`FOLDER/LABEL/` has the pictures of a kind: ten kinds of clothes with a long tail and planted near-copies
(`data/fashion_pool.parquet`, its bytes unchanged), and `clip_art` with everything unwanted: grey crops of
`data/clipart.parquet`, blank pictures, broken files. Some names are hostile. File names are numbers in random order, so
the folder alone tells what a file is. The same arguments, and the same version of Pillow, write the same bytes.
"""

import argparse
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageChops

DATA = Path(__file__).parent / "data"
UNWANTED = "clip_art"  # the label of all that is of no interest
SIDE_PX = 28
NUM_UNWANTED = 12_000  # as many as clothes
ONE_BLANK_IN = 100  # of the unwanted files
ONE_BROKEN_IN = 200
MIN_CONTRAST = 24.0  # standard deviation of the grey levels of a crop
MIN_BYTES = 250  # of a crop as PNG; bare edges and stripes take fewer, and are copies of each other
HOSTILE_NAMES = (
    b"-rf",
    b"two  spaces ",
    b'it\'s "quoted"',
    b"line\nbreak",
    "\N{DRESS} robe d'\N{LATIN SMALL LETTER E WITH ACUTE}t\N{LATIN SMALL LETTER E WITH ACUTE}".encode(),
    b"100%25 %s %(name)d",
    b"not utf-8 \xff\xe9",
    b"long" * 60,
    b"<b onmouseover=alert(1)>",
    b"$(HOME) `id`; #?&=",
)


class File(NamedTuple):
    """A file of the pool: its folder, its suffix (with the dot) and its bytes."""

    label: str
    suffix: str
    content: bytes


def write_raw_pool(folder: Path, num_unwanted: int = NUM_UNWANTED, seed: int = 0) -> None:
    """Write the clothes and `num_unwanted` other files; the folder appears when it is complete.

    Raises:
        FileExistsError: if there is such a folder.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it first")
    files = [*clothes(), *unwanted(num_unwanted, seed)]
    rng = np.random.default_rng((seed, 0))
    numbers = rng.permutation(len(files))
    hostile = dict(zip(rng.choice(len(files), len(HOSTILE_NAMES), replace=False).tolist(), HOSTILE_NAMES, strict=True))
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    for label in sorted({file.label for file in files}):
        (part / label).mkdir(parents=True)
    for i, (file, number) in enumerate(zip(files, numbers.tolist(), strict=True)):
        name = hostile.get(i, b"%06d" % number) + file.suffix.encode()
        try:
            (part / file.label / os.fsdecode(name)).write_bytes(file.content)
        except OSError:  # a file system that refuses the name
            (part / file.label / f"{number:06d}{file.suffix}").write_bytes(file.content)
    part.rename(folder)


def clothes() -> Iterator[File]:
    """Yield the 12,000 clothes, as they are encoded in `data/fashion_pool.parquet`."""
    table = pq.read_table(DATA / "fashion_pool.parquet", columns=["image", "label"])
    for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
        yield File(label, Path(image["path"]).suffix, image["bytes"])


def unwanted(count: int, seed: int = 0, *, on_dark: bool = False) -> Iterator[File]:
    """Yield `count` files of no interest: crops of clip art, one blank in 100, one broken in 200.

    Clothes are light on a dark ground, clip art is dark on a light one; `on_dark` inverts it, so that it is harder to
    tell from clothes.
    """
    num_blank, num_broken = count // ONE_BLANK_IN, count // ONE_BROKEN_IN
    crops = clipart_crops(count - num_blank - num_broken, seed, on_dark=on_dark)
    for crop in crops:
        yield File(UNWANTED, ".png", crop)
    rng = np.random.default_rng((seed, 1))
    for _ in range(num_blank):
        side_px, level = rng.integers(16, 41), rng.integers(256)
        yield File(UNWANTED, ".png", as_png(np.full((side_px, side_px), level, np.uint8)))
    for i in range(num_broken):
        yield (
            File(UNWANTED, ".png", crops[i][: len(crops[i]) // 2]),
            File(UNWANTED, ".jpg", b"This is a note, whatever its name says.\n"),
            File(UNWANTED, ".png", b""),
        )[i % 3]


def clipart_crops(count: int, seed: int = 0, *, on_dark: bool = False) -> list[bytes]:
    """Return `count` distinct square crops of clip art as PNG, 28 px, grey, on white or inverted.

    Every picture is cropped equally often, up to one; its crops are turned and mirrored in eight ways, in turn, for
    overlapping crops would be copies. A crop's side is 30 to 100 % of the picture's shorter side.
    """
    pictures = [drawing(row["bytes"], on_dark) for row in pq.read_table(DATA / "clipart.parquet")["image"].to_pylist()]
    rng = np.random.default_rng((seed, 2))
    first_turns = rng.integers(8, size=len(pictures)).tolist()
    crops: dict[bytes, None] = {}
    for lap in range(count):
        for i in rng.permutation(len(pictures)).tolist():
            if len(crops) == count:
                return list(crops)
            picture = pictures[i]
            side = min(picture.size) * rng.uniform(0.3, 1.0)
            left, top = (rng.uniform(0, length - side) for length in picture.size)
            box = (left, top, left + side, top + side)
            crop = np.asarray(picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, box, reducing_gap=2.0))
            quarter_turns, is_mirrored = divmod((first_turns[i] + lap) % 8, 2)
            png = as_png(np.rot90(crop[:, ::-1] if is_mirrored else crop, quarter_turns))
            if crop.std() >= MIN_CONTRAST and len(png) >= MIN_BYTES:
                crops[png] = None
    return list(crops)


def drawing(content: bytes, on_dark: bool) -> Image.Image:
    """Return a picture in grey, on white where it is transparent; `on_dark` inverts it."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    grey = page.convert("L")
    return ImageChops.invert(grey) if on_dark else grey


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unwanted", type=int, default=NUM_UNWANTED, help="number of files of no interest")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_raw_pool(arguments.folder, arguments.unwanted, arguments.seed)


if __name__ == "__main__":
    main()
