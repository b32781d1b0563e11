"""Pretrain the recipe `tiny` on the 60,000 training images of Fashion-MNIST, without labels.

    apt install dataset-fashion-mnist
    python benchmarks/fashion.py --folder out/fashion

The table has raw pixels, the untrained ViT, the run, and the same ViT trained with labels on the same crops for as many
seconds as the run took. All are scored on the 10,000 test images by `dinov2 evaluate probe`. With the same folder an
interrupted run resumes.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dinov2_toolkit import console
from dinov2_toolkit.benchmarks.measured import dinov2, made_folder, probed, write_result
from dinov2_toolkit.evaluate.logreg import regression_path
from dinov2_toolkit.examples.build_data import Split, read_split, row_of, write_parquet
from dinov2_toolkit.models.cpu import keep_freed_memory
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.data.multicrop import make_crops, view_settings
from dinov2_toolkit.train.data.packed import packed
from dinov2_toolkit.train.engine.build import build_backbone
from dinov2_toolkit.train.engine.schedules import batch_sizes

SPLITS = {"train": "train", "test": "t10k"}
METHODS = ("knn", "linear")
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the logistic regression
SUPERVISED_LR, SUPERVISED_WEIGHT_DECAY = 1e-3, 0.05


def supervise(config: TrainConfig, split: Split, seconds: float) -> tuple[VisionTransformer, int]:
    """Train the recipe's ViT on its global crops with labels for `seconds`; return it and the number of images seen."""
    images, labels = split.images, split.labels
    torch.manual_seed(config.seed)
    backbone = build_backbone(config)
    head = torch.nn.Linear(backbone.embed_dim, int(labels.max()) + 1)
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, SUPERVISED_LR, weight_decay=SUPERVISED_WEIGHT_DECAY)
    views, _ = view_settings(config)
    assert isinstance(config.batch_size, int), "the recipe's batch is one number"
    size, targets = config.batch_size, torch.from_numpy(labels.astype(np.int64))
    rng, start, seen = np.random.default_rng(config.seed), time.monotonic(), 0
    with console.progress("with labels", 1000, "thousandths") as advance:
        done = 0
        while (elapsed := (time.monotonic() - start) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = SUPERVISED_LR * min(20 * elapsed, 0.5 + 0.5 * math.cos(math.pi * elapsed))
            rows = rng.choice(len(images), size, replace=False)
            batch = packed(list(np.repeat(images[rows][..., None], 3, axis=3)))
            crops = make_crops(batch, np.arange(seen, seen + size), config.seed, "with labels", views)
            loss = F.cross_entropy(head(backbone.forward_features(crops).cls_token), targets[rows].repeat(2))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += size
            advance(int(1000 * elapsed) - done)
            done = int(1000 * elapsed)
    return backbone.eval(), seen


def regression_on_pixels(train: Split, test: Split) -> float:
    """Return the top-1 of logistic regression on raw pixels, at the penalty that is best on the test images."""
    scaled = [np.divide(split.images, 255, dtype=np.float32) for split in (train, test)]
    features, test_features = (images.reshape(len(images), -1) for images in scaled)
    labels = train.labels.astype(np.int64)
    models = regression_path(features, labels, int(labels.max()) + 1, PENALTIES)
    return max(float((model.predict(test_features)[:, 0] == test.labels).mean()) for model in models)


def main() -> None:
    """Train, score and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the IDX files")
    parser.add_argument("--folder", type=made_folder, required=True, help="where everything is kept")
    args = parser.parse_args()
    folder: Path = args.folder
    keep_freed_memory()
    splits = {name: read_split(args.images, file) for name, file in SPLITS.items()}
    for name, split in splits.items():
        if not (folder / f"{name}.parquet").exists():
            write_parquet([row_of(split, row) for row in range(len(split.labels))], folder / f"{name}.parquet")

    # Without labels, then with labels for as long.
    seconds_file = folder / "seconds.json"
    if not seconds_file.exists():
        start = time.monotonic()
        dinov2(folder, "train", "pretrain", "train.parquet", "-o", "run", "--recipe", "tiny", "--resume")
        seconds_file.write_text(json.dumps(round(time.monotonic() - start)))
    seconds = json.loads(seconds_file.read_text())
    config = resolve(TrainConfig, recipe="tiny")
    if not (folder / "labels" / "model.json").exists():
        backbone, num_seen = supervise(config, splits["train"], seconds)
        side, ratio = config.global_crop_size_px, config.crop_ratio
        save_model(
            folder / "labels",
            backbone=backbone,
            heads={},
            preprocess=Preprocess(side, ratio, IMAGENET_MEAN, IMAGENET_STD),
        )
        (folder / "seen.json").write_text(json.dumps(num_seen))
    sizes = batch_sizes(config.batch_size)
    seen = {"run": sizes.images_until(config.steps), "labels": json.loads((folder / "seen.json").read_text())}

    # Scores.
    models = {
        "pixels": "raw pixels",
        "random:run": "the ViT, untrained",
        "run": f"`train pretrain --recipe tiny`, {seconds / 60:.0f} minutes",
        "labels": "the ViT trained with labels for as long",
    }
    scores = probed(folder, (folder / "train.parquet", folder / "test.parquet"), list(models), METHODS)
    regression = 100 * regression_on_pixels(splits["train"], splits["test"])
    header = ("", "images seen", "k-NN, k = 20", "linear")
    rows = [
        (name, f"{seen.get(model, 0):,}", *(f"{100 * scores[model, method]['value']:.1f}" for method in METHODS))
        for model, name in models.items()
    ]
    notes = (
        "Top-1 in percent on the 10,000 test images, all 60,000 training images as neighbours or for the linear layers;"
        f" class tokens. Logistic regression on raw pixels: {regression:.1f} at the best of {len(PENALTIES)} penalties,"
        " chosen on the test images."
    )
    write_result("fashion", "Fashion-MNIST from its images alone: the recipe `tiny`", header, rows, notes)


if __name__ == "__main__":
    main()
