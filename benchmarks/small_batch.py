"""Does the recipe `tiny` keep its features apart with 16 images a batch and 2,000 images in all?

    python benchmarks/small_batch.py --folder out/small-batch

The first 2,000 images of the example pool of clothes, 2,000 steps. The table has the health figures on the way, and the
scores of the run and of the same ViT untrained on 1,000 + 2,000 official test images, which nothing was trained on. A
folder that is given again goes on where it stopped.
"""

import argparse
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import dinov2, probed, write_result
from dinov2_toolkit.train.monitor.metrics import read_metrics

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
BATCH, IMAGES, STEPS = 16, 2_000, 2_000
SHOWN = (20, 100, 250, 500, 1_000, 1_500, 2_000)  # steps
FIGURES = {
    "total": "loss",
    "teacher_entropy": "teacher's entropy (nats)",
    "teacher_kl_to_uniform": "to uniform (nats)",
    "prototype_perplexity": "prototypes in use",
    "rank_me": "RankMe",
    "feature_std": "spread, of 1",
}


def main() -> None:
    """Train, score and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the run is kept")
    folder: Path = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = [word for name in (f"batch_size={BATCH}", f"steps={STEPS}") for word in ("--set", name)]
    pool = str(DATA / "fashion_pool.parquet")
    recipe = ["--recipe", "tiny", "--limit", str(IMAGES), *settings]
    dinov2(folder, "train", "pretrain", pool, "-o", "run", *recipe, "--resume")
    metrics = {row["step"]: row for row in read_metrics(folder / "run")}
    sets = DATA / "fashion_probe_train.parquet", DATA / "fashion_probe_test.parquet"
    scores = probed(folder, sets, ["run", "random:run"], ["knn"])
    knn = {model: 100 * scores[model, "knn"]["value"] for model in ("run", "random:run")}
    later = [row for step, row in metrics.items() if step >= SHOWN[1]]
    least = {name: min(row[name] for row in later) for name in FIGURES}
    notes = (
        f"From step {SHOWN[1]} on, in {len(later)} records: to uniform at least {least['teacher_kl_to_uniform']:.2f},"
        f" prototypes in use {least['prototype_perplexity']:.1f}, RankMe {least['rank_me']:.1f}, spread"
        f" {least['feature_std']:.2f}. k-NN (k = 20, class tokens): {knn['run']:.1f} %, untrained"
        f" {knn['random:run']:.1f} %."
    )
    rows = [(step, *(float(metrics[step][name]) for name in FIGURES)) for step in SHOWN]
    title = f"Small batches: {BATCH} images a step, {IMAGES:,} in all, the recipe `tiny`"
    write_result("small_batch", title, ("step", *FIGURES.values()), rows, notes)


if __name__ == "__main__":
    main()
