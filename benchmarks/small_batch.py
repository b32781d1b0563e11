"""Train the recipe `tiny` with batches of 16 on 2,000 images: do the features collapse?

    python benchmarks/small_batch.py --folder out/small-batch

The first 2,000 images of the example pool of clothes, 2,000 steps. The page has the collapse metrics during training,
and the scores of the run and of the untrained ViT on 1,000 + 2,000 official test images, on which nothing was trained.
With the same folder an interrupted run resumes.
"""

import argparse
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import (
    FASHION_POOL,
    FASHION_PROBE,
    assignments,
    dinov2,
    made_folder,
    probed,
    write_result,
)
from dinov2_toolkit.train.monitor.metrics import read_metrics

BATCH, IMAGES, STEPS = 16, 2_000, 2_000
SHOWN = (20, 100, 250, 500, 1_000, 1_500, 2_000)  # steps
FIGURES = {
    "total": "loss",
    "teacher_entropy": "teacher's entropy (nats)",
    "teacher_kl_to_uniform": "KL to uniform (nats)",
    "prototype_perplexity": "prototypes in use",
    "rank_me": "RankMe",
    "feature_std": "feature std, at most 1",
}


def main() -> None:
    """Train, score and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where the run is kept")
    folder: Path = parser.parse_args().folder
    settings = assignments({"batch_size": BATCH, "steps": STEPS})
    recipe = ["--recipe", "tiny", "--limit", str(IMAGES), *settings]
    dinov2(folder, "train", "pretrain", str(FASHION_POOL), "-o", "run", *recipe, "--resume")
    metrics = {row["step"]: row for row in read_metrics(folder / "run")}
    scores = probed(folder, FASHION_PROBE, ["run", "random:run"], ["knn"])
    knn = {model: 100 * scores[model, "knn"]["value"] for model in ("run", "random:run")}
    later = [row for step, row in metrics.items() if step >= SHOWN[1]]
    least = {name: min(row[name] for row in later) for name in FIGURES}
    notes = (
        f"From step {SHOWN[1]} on, in {len(later)} records, the smallest values: KL to uniform"
        f" {least['teacher_kl_to_uniform']:.2f},"
        f" prototypes in use {least['prototype_perplexity']:.1f}, RankMe {least['rank_me']:.1f}, feature std"
        f" {least['feature_std']:.2f}. k-NN (k = 20, class tokens): {knn['run']:.1f} %, untrained"
        f" {knn['random:run']:.1f} %."
    )
    rows = [(step, *(float(metrics[step][name]) for name in FIGURES)) for step in SHOWN]
    title = f"Small batches: {BATCH} images a step, {IMAGES:,} in all, the recipe `tiny`"
    write_result("small_batch", title, ("step", *FIGURES.values()), rows, notes)


if __name__ == "__main__":
    main()
