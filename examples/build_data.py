"""Build the example Parquet files in `examples/data` from two Debian packages.

    apt install dataset-fashion-mnist openclipart-png
    python examples/build_data.py

Everything drawn at random comes from `SEED`: two runs with the same library versions write the same bytes.
The Parquet files follow the Hugging Face convention: `image: struct<bytes, path>` and `label`.
Needs numpy, pillow and pyarrow; takes one to two minutes.
"""

import argparse
import gzip
import io
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

SEED = 0

FASHION_CLASSES = (
    ("t_shirt_top", "trouser", "pullover", "dress", "coat")  # labels 0 to 4 of the official files
    + ("sandal", "shirt", "sneaker", "bag", "ankle_boot")  # labels 5 to 9
)
NUM_POOL_ROWS = 12_000
NUM_PLANTED = 1_200  # near-duplicates among the pool's rows, a third of each kind
NUM_PLANTED_CLASSES = 5  # all of the most common classes: copies make a long tail longer
TAIL_RATIO = 100  # largest class of distinct pool images over the smallest
QUERIES_PER_CLASS = 30
PROBE_TRAIN_PER_CLASS = 100
PROBE_TEST_PER_CLASS = 200

CLIPART_SIDES_PX = (128, 96)  # the longer side; the second for pictures too heavy at the first
CLIPART_MAX_SOURCE_PX = 8_000_000  # a few sources have hundreds of millions of pixels
CLIPART_MAX_BYTES = 6_000  # encoded; keeps the repository small at the cost of the most detailed pictures
CLIPART_PER_FOLDER = 50  # at most this many of one innermost folder (one holds 1,400 stars)
CLIPART_PER_LABEL = 400
CLIPART_MIN_PER_LABEL = 10
CLIPART_SKIPPED = ("unsorted/", "pantyhose", "sexy", "stripper")  # words in the path: an empty label, or unfit to ship


class Split(NamedTuple):
    """One split of Fashion-MNIST: `images` (N, 28, 28) uint8, `labels` (N,) uint8, `name` "train" or "t10k"."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def path(self, row: int) -> str:
        return f"{self.name}/{row:05d}.png"

    def label(self, row: int) -> str:
        return FASHION_CLASSES[self.labels[row]]


def read_split(folder: Path, name: str) -> Split:
    """Read one split from the gzipped IDX files; their headers are 16 bytes (images) and 8 bytes (labels)."""
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return Split(
        name,
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def shuffled_rows_by_class(split: Split) -> list[np.ndarray]:
    """Return each class's row numbers in a fixed random order; disjoint sets take disjoint stretches of it."""
    rng = np.random.default_rng(SEED)
    return [rng.permutation(np.flatnonzero(split.labels == c)) for c in range(len(FASHION_CLASSES))]


def long_tail_counts(num_classes: int, total: int, ratio: float) -> list[int]:
    """Return `num_classes` counts falling geometrically, the first `ratio` times the last, that sum to `total`."""
    weights = ratio ** -(np.arange(num_classes) / (num_classes - 1))
    ends = np.rint(np.cumsum(weights) / weights.sum() * total).astype(int)
    return [int(count) for count in np.diff(ends, prepend=0)]


def encode(image: Image.Image, image_format: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, optimize=True, **options)
    return buffer.getvalue()


def row_of(split: Split, row: int) -> dict[str, object]:
    png = encode(Image.fromarray(split.images[row]))
    return {"image": {"bytes": png, "path": split.path(row)}, "label": split.label(row)}


def near_duplicate(pixels: np.ndarray, kind: str, rng: np.random.Generator) -> bytes:
    """Encode a copy of `pixels` (28, 28): JPEG of quality 40-90, moved by one pixel, or 20-30 % darker or brighter."""
    match kind:
        case "jpeg":
            return encode(Image.fromarray(pixels), "JPEG", quality=int(rng.integers(40, 91)))
        case "shift":
            down, right = [(1, 0), (-1, 0), (0, 1), (0, -1)][rng.integers(4)]
            padded = np.pad(pixels, 1)  # the background is black
            return encode(Image.fromarray(padded[1 - down : 29 - down, 1 - right : 29 - right]))
        case "brightness":
            factor = rng.choice([0.7, 0.8, 1.2, 1.3])
            return encode(Image.fromarray(np.clip(np.rint(pixels * factor), 0, 255).astype(np.uint8)))
    raise ValueError(f"unknown kind of near-duplicate: {kind}")


def fashion_pool(train: Split) -> list[dict[str, object]]:
    """Return the raw pool: a long tail over the classes in label order, near-duplicates planted, rows shuffled.

    `planted_of` (path of the original, null for distinct images) and `planted_kind` are the ground truth.
    """
    rng = np.random.default_rng((SEED, 1))
    counts = long_tail_counts(len(FASHION_CLASSES), NUM_POOL_ROWS - NUM_PLANTED, TAIL_RATIO)
    originals = [
        int(row)
        for rows, count in zip(shuffled_rows_by_class(train), counts, strict=True)
        for row in rows[QUERIES_PER_CLASS : QUERIES_PER_CLASS + count]
    ]
    common = originals[: sum(counts[:NUM_PLANTED_CLASSES])]
    pool = [row_of(train, row) | {"planted_of": None, "planted_kind": None} for row in originals]
    kinds = np.repeat(["jpeg", "shift", "brightness"], NUM_PLANTED // 3)
    for row, kind in zip(rng.choice(common, NUM_PLANTED, replace=False).tolist(), kinds.tolist(), strict=True):
        path = f"{train.name}/{row:05d}_{kind}.{'jpg' if kind == 'jpeg' else 'png'}"
        image = {"bytes": near_duplicate(train.images[row], kind, rng), "path": path}
        truth = {"planted_of": train.path(row), "planted_kind": kind}
        pool.append({"image": image, "label": train.label(row)} | truth)
    return [pool[i] for i in rng.permutation(len(pool))]


def fashion_queries(train: Split) -> list[dict[str, object]]:
    """Return the balanced seed images; none of them is in the pool."""
    return balanced(train, 0, QUERIES_PER_CLASS)


def fashion_probe_train(test: Split) -> list[dict[str, object]]:
    """Return the labelled images that probes learn from; they come from the official test split, as do the next."""
    return balanced(test, 0, PROBE_TRAIN_PER_CLASS)


def fashion_probe_test(test: Split) -> list[dict[str, object]]:
    """Return the labelled images that probes are scored on."""
    return balanced(test, PROBE_TRAIN_PER_CLASS, PROBE_TEST_PER_CLASS)


def balanced(split: Split, start: int, count: int) -> list[dict[str, object]]:
    """Return `count` images of every class, from `start` on in the fixed random order, shuffled."""
    rows = np.concatenate([rows[start : start + count] for rows in shuffled_rows_by_class(split)])
    return [row_of(split, int(row)) for row in np.random.default_rng((SEED, 2)).permutation(rows)]


def clipart(folder: Path) -> list[dict[str, object]]:
    """Return clip art scaled to at most 128 pixels, in its own modes, labelled by top folder, shuffled.

    Links, repeated pictures, labels with few pictures, and all that `clipart_png` refuses are left out.
    """
    rng = np.random.default_rng((SEED, 3))
    candidates = sorted(path for path in folder.rglob("*.png") if not path.is_symlink())
    pictures: list[dict[str, object]] = []
    seen: set[bytes] = set()
    per_folder: Counter[Path] = Counter()
    per_label: Counter[str] = Counter()
    for i in rng.permutation(len(candidates)):
        path = candidates[i].relative_to(folder)
        label = path.parts[0]
        if any(word in path.as_posix() for word in CLIPART_SKIPPED):
            continue
        if per_folder[path.parent] == CLIPART_PER_FOLDER or per_label[label] == CLIPART_PER_LABEL:
            continue
        png = clipart_png(candidates[i])
        if png is None or png in seen:
            continue
        seen.add(png)
        per_folder[path.parent] += 1
        per_label[label] += 1
        pictures.append({"image": {"bytes": png, "path": path.as_posix()}, "label": label})
    pictures = [picture for picture in pictures if per_label[str(picture["label"])] >= CLIPART_MIN_PER_LABEL]
    return [pictures[i] for i in rng.permutation(len(pictures))]


def clipart_png(path: Path) -> bytes | None:
    """Scale and encode one picture; None if it is unreadable, huge, too heavy once encoded, or hard to recognise."""
    try:
        source = Image.open(path)
        source.load()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None
    for side_px in CLIPART_SIDES_PX:
        picture = scaled(source, side_px)
        # Keep what belongs to the picture; colour profiles and texts would be written too.
        picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}
        png = encode(picture)
        if len(png) <= CLIPART_MAX_BYTES:
            return png if is_recognisable(picture) else None
    return None


def scaled(picture: Image.Image, side_px: int) -> Image.Image:
    """Return a copy with its longer side at most `side_px` pixels, in the mode the picture came in."""
    if max(picture.size) <= side_px:
        return picture.copy()
    # Palette indices cannot be averaged: scale the colours, then give the picture a palette again.
    has_palette = picture.mode == "P"
    small = picture.convert("RGBA" if picture.has_transparency_data else "RGB") if has_palette else picture.copy()
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return small.quantize(method=Image.Quantize.FASTOCTREE) if has_palette else small


def is_recognisable(picture: Image.Image) -> bool:
    """Say whether a picture on white has enough size, contrast and ink; the bounds were chosen by eye."""
    short, long = sorted(picture.size)
    if long < 48 or short * 3 < long:
        return False
    colours = picture.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(colours)
    pixels = np.asarray(page.convert("RGB"), dtype=np.int16)  # (H, W, 3)
    ink = (255 - pixels).max(axis=2) > 40  # (H, W)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if ink.mean() < 0.05 or pixels.std(axis=(0, 1)).max() < 20:
        return False
    return bool(np.ptp(rows) * np.ptp(columns) >= 0.3 * ink.size)  # not a small thing in the corner of a large page


def write_parquet(rows: list[dict[str, object]], path: Path) -> None:
    """Write rows with the schema metadata by which Hugging Face `datasets` decodes the image column."""
    text_columns = [name for name in rows[0] if name != "image"]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features: dict[str, dict[str, str]] = {"image": {"_type": "Image"}}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in text_columns}
    schema = pa.schema(
        [("image", image_type)] + [(name, pa.string()) for name in text_columns],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    # zstd gains a tenth even on PNG bytes: their headers repeat.
    pq.write_table(
        pa.Table.from_pylist(rows, schema),
        path,
        row_group_size=1_000,
        compression="zstd",
        compression_level=19,
        use_dictionary=["label", "planted_kind"],
        write_statistics=["label", "planted_kind"],  # those of the bytes would only take room
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()

    Image.MAX_IMAGE_PIXELS = CLIPART_MAX_SOURCE_PX
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    arguments.output.mkdir(parents=True, exist_ok=True)
    train = read_split(arguments.fashion, "train")
    test = read_split(arguments.fashion, "t10k")
    sets = {
        "fashion_pool": fashion_pool(train),
        "fashion_queries": fashion_queries(train),
        "fashion_probe_train": fashion_probe_train(test),
        "fashion_probe_test": fashion_probe_test(test),
        "clipart": clipart(arguments.openclipart),
    }
    for name, rows in sets.items():
        path = arguments.output / f"{name}.parquet"
        write_parquet(rows, path)
        print(f"{path}: {len(rows):,} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
