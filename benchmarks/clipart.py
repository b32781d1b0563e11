"""What a small ViT learns from 1,420 pieces of clip art, labels unseen: scores by folder, and pictures of its patches.

    python benchmarks/clipart.py --folder out/clipart

A quarter of the example clip art is held back; the recipe `tiny`, with larger crops, learns from the rest. In the
table: raw pixels, the ViT untrained, the run, scored on the folder that each picture lies in. Pictures are drawn with
the run to `docs/pictures`. A folder that is given again goes on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dinov2_toolkit.benchmarks.measured import dinov2, probed, write_result

ROOT = Path(__file__).resolve().parents[1]
CLIPART = ROOT / "examples" / "data" / "clipart.parquet"
PICTURES = ROOT / "docs" / "pictures"
METHODS = ("knn", "linear")
SETTINGS = {
    "steps": 2500,
    "global_crop_size_px": 42,
    "local_crop_size_px": 21,
    "checkpoint_every": 500,
}
SIDE_PX = 168  # of the pictures that are drawn: 24 patches of 7 px
DRAWN = {  # of each kind of object several drawings
    "pca-cones.png": [f"food/desserts/{name}" for name in ("cone1_bw_ganson", "cone2_bw_ganson", "cone_alt1_bw")]
    + [f"food/desserts/{name}" for name in ("glace_01_jean-victor_bal_01", "glace_03_jean-victor_bal_01")]
    + ["food/desserts/glace_italienne_jean-vic_01"],
    "pca-animals.png": [f"animals/mammals/{name}" for name in ("contour_elephant", "elephant_symbol_ganson")]
    + [f"animals/mammals/{name}" for name in ("contour_camel", "contour_giraffe", "bull_utrescu_", "porcinet_01")],
    "pca-hummers.png": [f"transportation/{name}" for name in ("hummer_01", "hummer_02", "vehicles/hummers/hummer_02")]
    + [f"transportation/vehicles/hummers/{name}" for name in ("hummer_03", "hummer_05")],
}
MATCHED = ("food/desserts/cone1_bw_ganson", "food/desserts/cone2_bw_ganson")


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
    """Write the pictures that are drawn as files, and return the path of each."""
    names = {name for group in (*DRAWN.values(), MATCHED) for name in group}
    written = {}
    for image in pq.read_table(CLIPART, columns=["image"])["image"].to_pylist():
        name = image["path"].removesuffix(".png")
        if name in names:
            path = folder / f"{Path(name).name}.png" if "hummers/" not in name else folder / f"{Path(name).name}-b.png"
            path.write_bytes(image["bytes"])
            written[name] = str(path)
    return written


def main() -> None:
    """Train, score, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    folder: Path = parser.parse_args().folder.resolve()
    (folder / "files").mkdir(parents=True, exist_ok=True)
    split(folder)
    took = folder / "seconds.json"
    if not took.exists():
        assigned = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
        start = time.monotonic()
        dinov2(folder, "train", "pretrain", "train.parquet", "-o", "run", "--recipe", "tiny", *assigned, "--resume")
        took.write_text(json.dumps(round(time.monotonic() - start)))
    seconds = json.loads(took.read_text())

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
        "Top-1 in percent with 95 % intervals on the quarter that was held back, 17 folders as labels, the largest two"
        " a fifth of all each; class tokens."
    )
    write_result("clipart", "Clip art by its folders", ("", "k-NN, k = 20", "linear"), rows, notes)

    PICTURES.mkdir(exist_ok=True)
    paths = files(folder / "files")
    seen = ["--model", "run", "--image-size", str(SIDE_PX), "--force"]
    for name, drawn in DRAWN.items():
        dinov2(folder, "evaluate", "pca", *(paths[one] for one in drawn), "-o", str(PICTURES / name), *seen)
    dinov2(folder, "evaluate", "match", *(paths[one] for one in MATCHED), "-o", str(PICTURES / "match.png"), *seen)
    dinov2(folder, "evaluate", "attention", paths[MATCHED[0]], "-o", str(PICTURES / "attention.png"), *seen)


if __name__ == "__main__":
    main()
