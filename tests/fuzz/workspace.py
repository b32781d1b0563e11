"""A folder of small real files of every kind, made by the toolkit's own commands, and some of other programs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.tests.fuzz.trial import import_all, run

SMALL = (
    "arch=vit_tiny embed_dim=64 num_heads=1 depth=1 steps=2 batch_size=4 checkpoint_every=1 keep_checkpoints=2"
    " log_every=1 patch_size=4 num_prototypes=16 hidden_dim=8 bottleneck_dim=8 global_crop_size_px=8"
    " local_crop_size_px=8 num_local_crops=1 mixed_precision=no num_workers=0"
)
SETTINGS = " ".join(f"--set {change}" for change in SMALL.split())
STEPS = (  # `|` stands for a space within an argument
    "curate embed a b -o pool.parquet --model pixels --num-workers 1",
    "curate embed b -o q.parquet --model pixels --role queries --num-workers 1",
    "curate embed b -o patches.parquet --model model --tokens patches --num-workers 1",
    "curate dedup pool.parquet -o unique.parquet --threshold 0.95",
    "curate cluster unique.parquet -o clusters.parquet --num-clusters 4,2 --sample 8 --resample 1",
    "curate retrieve --queries q.parquet --pool pool.parquet --k 2 -o curated.parquet",
    "curate union curated.parquet=2 q.parquet=1 -o mix.parquet",
    "curate map pool.parquet -o map.parquet --neighbors 3 --thumbnails 8",
    "evaluate probe --train pool.parquet --test q.parquet --method knn -o scores.parquet",
    "evaluate pca b --model model -o pca.png",
    f"train pretrain pool.parquet -o run --recipe tiny {SETTINGS}",
    "export run --to official -o official.pth",
    "export run --to safetensors -o weights.safetensors",
)
NUM_IMAGES = 16


def split(command: str) -> list[str]:
    """Return the arguments of a command."""
    return [argument.replace("|", " ") for argument in command.split()]


def build(folder: Path) -> Path:
    """Fill `folder`/work, keep a copy of it in `folder`/pristine, and return the first; `folder`/foreign is a trap."""
    import_all()
    work = folder / "work"
    work.mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("mine")
    _write_images(work)
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=64, depth=1, num_heads=1, img_size=8, layer_scale=1.0)
    save_model(work / "model", backbone=backbone, heads={}, preprocess=Preprocess(8, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    for command in STEPS:
        ended = run(split(command), work, 120)
        assert ended.code == 0, ended.said
    (work / ".dinov2" / "notes.txt").write_text("mine, too")
    _write_foreign(work)
    _write_hugging_face(work)
    shutil.copytree(work, folder / "pristine", symlinks=True)
    return work


def _write_images(work: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = work / "ab"[number % 2] / "xy"[number // 2 % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        (work / "masks").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 3, (16, 16), dtype=np.uint8)).save(work / "masks" / f"{number}.png")
    shutil.copy(work / "a" / "x" / "0.png", work / "a" / "y" / "copy.png")
    (work / "a" / "broken.png").write_text("no image")


def _write_foreign(work: Path) -> None:
    """Write manifests as other programs do."""
    rng = np.random.default_rng(1)
    paths = [str(path.relative_to(work)) for path in sorted(work.glob("[ab]/*/*.png"))]
    labels = [path.split("/")[1] for path in paths]
    vectors = rng.normal(size=(len(paths), 8))
    foreign = {"path": paths, "label": labels, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float64()))}
    pq.write_table(pa.table(foreign), work / "foreign.parquet")
    structs = [{"bytes": (work / path).read_bytes(), "path": path} for path in paths]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["x", "y"]}}
    table = pa.table({"image": structs, "label": [int(label == "y") for label in labels]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), work / "hf.parquet")
    masked = [
        f"{side}/{cell}/{number}.png"
        for number, (side, cell) in enumerate([("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")] * 4)
    ]
    masks = [f"masks/{number}.png" for number in range(NUM_IMAGES)]
    pq.write_table(pa.table({"uri": masked, "mask": masks}), work / "masked.parquet")
    (work / "parts").mkdir()
    for number in range(2):
        half = pa.table(foreign).slice(number * 8, 8)
        pq.write_table(half, work / "parts" / f"{number}.parquet")
    (work / "parts" / "_manifest.json").write_text('{"parts": ["0.parquet", "1.parquet"]}')
    (work / "list.txt").write_text("\n".join([*paths, f"parquet://{work}/hf.parquet?row=3", "gone.png", ""]))


def _write_hugging_face(work: Path) -> None:
    """Write a folder of weights as `transformers` does, without importing it."""
    ended = run(["export", "model", "--to", "hf", "-o", "hf"], work, 120)
    if ended.code:  # an optional package is missing
        assert "pip install" in ended.said, ended.said
        os.makedirs(work / "hf", exist_ok=True)
        (work / "hf" / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 24}')
        shutil.copy(work / "model" / "teacher.safetensors", work / "hf" / "model.safetensors")
