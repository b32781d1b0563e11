"""Pretrain a small ViT on 1,414 pieces of clip art without labels: scores by folder, and pictures of its features.

    python benchmarks/clipart.py --folder out/clipart

A quarter of the example clip art is held out; the recipe `tiny`, with larger crops, is trained on the rest. The table
has raw pixels, the untrained ViT and the run, scored by the folder that each picture lies in. The run's pictures go to
`docs/pictures`. With the same folder an interrupted run resumes.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dinov2_toolkit.benchmarks.measured import DATA, ROOT, assignments, dinov2, made_folder, probed, write_result

CLIPART = DATA / "clipart.parquet"
PICTURES = ROOT / "docs" / "pictures"
METHODS = ("knn", "linear")
SETTINGS = {
    "steps": 2500,
    "global_crop_size_px": 42,
    "local_crop_size_px": 21,
    "checkpoint_every": 500,
}
SIDE_PX = 98  # of the pictures: 14 patches of 7 px
ANIMALS = ("baboon", "camel", "elephant", "fox", "giraffe", "hamster", "kangaroo", "orangutan")
HATS = ("blue_fedora", "green_fedora_01", "red_fedora", "hat_-_clothing_nicu_bucu_03", "tophat_benji_park_01")
PCA_PICTURES = {  # several drawings of one kind of object each
    "pca-animals.png": [f"animals/mammals/contour_{name}" for name in ANIMALS],
    "pca-hats.png": [f"people/clothing/hats/{name}" for name in (*HATS, "purple_hat_nicu_buculei_01")],
}
MATCHED, MATCH_SIDE_PX = ("food/desserts/cone1_bw_ganson", "food/desserts/cone2_bw_ganson"), 70
ATTENDED = "people/clothing/hats/red_fedora"


def split(folder: Path) -> None:
    """Write three quarters of each label's pictures to train.parquet, the rest to test.parquet."""
    table = pq.read_table(CLIPART)
    labels = np.array(table["label"].to_pylist())
    rank = np.empty(len(labels), np.int64)  # among the pictures of its label, which come shuffled
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rank[rows] = np.arange(len(rows))
    for name, wanted in (("train", rank % 4 > 0), ("test", rank % 4 == 0)):
        pq.write_table(table.filter(wanted), folder / f"{name}.parquet", row_group_size=500)


def files(folder: Path) -> dict[str, str]:
    """Write the clip art that the pictures show as files, and return the path of each."""
    names = {name for group in (*PCA_PICTURES.values(), (*MATCHED, ATTENDED)) for name in group}
    written = {}
    for image in pq.read_table(CLIPART, columns=["image"])["image"].to_pylist():
        name = image["path"].removesuffix(".png")
        if name in names:
            path = folder / Path(image["path"]).name
            path.write_bytes(image["bytes"])
            written[name] = str(path)
    return written


def draw(folder: Path) -> None:
    """Draw with the folder's run: PCA of patches, matching patches, attention, nearest neighbours."""
    PICTURES.mkdir(exist_ok=True)
    (folder / "files").mkdir(exist_ok=True)
    paths = files(folder / "files")

    def evaluate(kind: str, *words: str, output: str, side_px: int = SIDE_PX) -> None:
        shared = ["--model", "run", "--image-size", str(side_px), "--force", "-q"]
        dinov2(folder, "evaluate", kind, *words, "-o", str(PICTURES / output), *shared)

    for name, drawn in PCA_PICTURES.items():
        evaluate("pca", *(paths[one] for one in drawn), output=name)
    evaluate("match", *(paths[one] for one in MATCHED), output="match.png", side_px=MATCH_SIDE_PX)
    evaluate("attention", paths[ATTENDED], output="attention.png")
    for name in ("train", "test"):
        dinov2(folder, "curate", "embed", f"{name}.parquet", "-o", f"{name}-embedded.parquet", "--model", "run")
    shown = ["--pool", "train-embedded.parquet", "--limit", "8", "--force", "-q"]
    sheet = str(PICTURES / "neighbors.png")
    dinov2(folder, "evaluate", "neighbors", "test-embedded.parquet", "-o", sheet, *shown)


def main() -> None:
    """Train, score, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where everything is kept")
    folder: Path = parser.parse_args().folder
    split(folder)
    seconds_file = folder / "seconds.json"
    if not seconds_file.exists():
        start = time.monotonic()
        dinov2(
            folder,
            "train",
            "pretrain",
            "train.parquet",
            "-o",
            "run",
            "--recipe",
            "tiny",
            *assignments(SETTINGS),
            "--resume",
        )
        seconds_file.write_text(json.dumps(round(time.monotonic() - start)))
    seconds = json.loads(seconds_file.read_text())

    models = {
        "pixels": "raw pixels",
        "random:run": "the ViT, untrained",
        "run": f"`train pretrain --recipe tiny`, crops of 42 px, {seconds / 60:.0f} minutes",
    }
    scores = probed(folder, (folder / "train.parquet", folder / "test.parquet"), list(models), METHODS)

    def score(model: str, method: str) -> str:
        row = scores[model, method]
        return f"{100 * row['value']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"

    rows = [(name, *(score(model, method) for method in METHODS)) for model, name in models.items()]
    notes = (
        "Top-1 in percent with 95 % intervals on the held-out quarter, with 17 folders as labels, of which the two"
        " largest hold a fifth of the pictures each; class tokens."
    )
    write_result("clipart", "Clip art by its folders", ("", "k-NN, k = 20", "linear"), rows, notes)
    draw(folder)


if __name__ == "__main__":
    main()
