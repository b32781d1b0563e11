"""Does a ViT learn more from a curated set than from the raw pool, or from as many random images? Five seeds, paired.

    python benchmarks/curation.py --folder out/curation
    python benchmarks/curation.py --folder out/curation --long

For every share of unwanted pictures a pool is written (`examples/raw_pool.py`), embedded and deduplicated once. For
every seed a ViT is pretrained on the raw pool, its features choose the curated set, and the same ViT is pretrained for
as many steps on that, on a random subset as large, and, where most pictures are unwanted, on the parts of the curated
set. No label is read before the scores: k-NN and a linear probe on 1,000 + 2,000 official test images. All by the
toolkit's commands, in two processes of one thread. Every run leaves its figures in a JSON file; with the same folder
the benchmark goes on. `--long` adds all sets of all pools, a pool of clothes alone, and runs of 1,200 steps.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import statistics
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from dinov2_toolkit.benchmarks.measured import (
    DATA,
    FASHION_POOL,
    FASHION_PROBE,
    K,
    assignments,
    made_folder,
    probed,
    table,
    write_page,
)
from dinov2_toolkit.cli import app
from dinov2_toolkit.curate.cluster.metrics import normalized_entropy
from dinov2_toolkit.examples.build_data import FASHION_CLASSES, write_parquet
from dinov2_toolkit.examples.raw_pool import unwanted
from dinov2_toolkit.store.files import write_text

SEEDS = range(5)
CLOTHES, UNWANTED = 12_000, 15_000  # at most; more crops of 1,893 pieces of clip art would be copies of each other
SETTINGS = {  # over the recipe `tiny`: a quarter of its time a step
    "depth": 2,
    "embed_dim": 96,
    "num_prototypes": 256,
    "hidden_dim": 128,
    "bottleneck_dim": 32,
    "num_local_crops": 2,
}
QUERIES = DATA / "fashion_queries.parquet"
NEAR, WIDE = 4, 16  # pool images retrieved for each of 300 seed images
BALANCED, CLUSTERS = 0.5, "100,10"  # share of them in the balanced sample, and the clusters it is drawn from
ARMS = {
    "raw": "raw pool",
    "random": "random, as many as curated",
    "unique": "deduplicated",
    "retrieved": "retrieved",
    "balanced": "balanced",
    "curated": "union (curated)",
    "by-pixels": "retrieved by pixels",
}
COMPOSITION = ("images", "wanted", "evenness")
OF_POOL = {"raw": "../pool.parquet", "unique": "../unique.parquet", "by-pixels": "../by-pixels.parquet"}  # of all seeds
QUESTION = ("raw", "curated", "random")  # come first
OTHERS = [arm for arm in ARMS if arm not in QUESTION]
PAIRS = [("curated", "raw"), ("curated", "random"), *((arm, "raw") for arm in ("random", *OTHERS))]
METHODS = {"knn": f"k-NN, k = {K}", "linear": "linear"}
T_95 = 2.7764  # quantile of Student's t at 0.975, for five values
NOTES = f"""\
Differences: mean over five paired seeds, in points of top-1 accuracy, with its 95 % interval (Student's t), and in
how many of the five pairs it is above 0. Second table: means over the seeds; scores with half the width of their 95 %
interval. Wanted: share of clothes among the images. Evenness: entropy of the ten kinds of clothes over log 10. Both use
labels that no step reads.

Pools: at most {CLOTHES:,} clothes with a long tail and planted copies, among at most {UNWANTED:,} crops of clip art,
blank and broken files; `embed` leaves the broken ones out. Every run has the same ViT and as many steps of 64 images,
so a small set is seen more often. The ViT is the recipe `tiny` with
{", ".join(f"{name} {value}" for name, value in SETTINGS.items())}.

Sets: *deduplicated* is the pool after `dedup --k 8`, the same for all seeds. *Retrieved* is `retrieve --k {WIDE}` of
that for 300 seed images, by class and mean patch tokens of the seed's own run on the raw pool. *Balanced* is a sample
of {BALANCED:.0%} of the retrieved by `cluster --num-clusters {CLUSTERS}`. *Curated* is the `union` of balanced and of
`retrieve --k {NEAR}`. *Retrieved by pixels* is `retrieve --k {WIDE}` by raw pixels instead of the run's features, the
same for all seeds. Sets that the tables lack are run with `--long`. Scores: class tokens of 1,000 + 2,000 official test
images."""


class Cell(NamedTuple):
    """A pool by its share of unwanted pictures, and the length of every run on it."""

    share: float
    steps: int


CELLS = (Cell(0.9, 300), Cell(0.5, 300), Cell(0.5, 600))
LONG_CELLS = (Cell(0.0, 300), Cell(0.9, 1_200), Cell(0.5, 1_200), Cell(0.0, 1_200))


def write_pool(path: Path, share: float) -> None:
    """Write a pool as a Parquet file: clothes with their planted copies, and unwanted pictures, shuffled."""
    rng = np.random.default_rng(0)
    rows = pq.read_table(FASHION_POOL).to_pylist()
    num_clothes = min(CLOTHES, round(UNWANTED * (1 - share) / share)) if share else CLOTHES
    originals = [row["planted_of"] or row["image"]["path"] for row in rows]
    rank = {name: place for place, name in enumerate(rng.permutation(sorted(set(originals))).tolist())}
    by_rank = sorted(range(len(rows)), key=lambda row: (rank[originals[row]], row))  # copies beside their originals
    pool = [{"image": rows[row]["image"], "label": rows[row]["label"]} for row in by_rank[:num_clothes]]
    num_unwanted = round(num_clothes * share / (1 - share))
    for number, file in enumerate(unwanted(num_unwanted, on_dark=True)):
        image = {"bytes": file.content, "path": f"{file.label}/{number:05d}{file.suffix}"}
        pool.append({"image": image, "label": file.label})
    write_parquet([pool[row] for row in rng.permutation(len(pool))], path)


def command(*words: str) -> str:
    """Run a command of the toolkit in this process and return its stdout."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = app([*words, "-q"], standalone_mode=False)
    if status:
        raise SystemExit(f"{' '.join(words)} failed: status {status}")
    return printed.getvalue()


def prepare(folder: Path, share: float) -> None:
    """Write a pool, embed it for the search of copies, and deduplicate it."""
    enter(folder / f"share-{share}")
    if not Path("raw.parquet").exists():
        write_pool(Path("raw.parquet"), share)
    command("curate", "embed", "raw.parquet", "-o", "pool.parquet", "--model", "copy")  # without broken files
    command("curate", "dedup", "pool.parquet", "-o", "unique.parquet", "--k", "8")
    embed("pixels.parquet", "pixel-queries.parquet", "--model", "pixels")
    found = ("--queries", "pixel-queries.parquet", "--pool", "unique.parquet", "--features", "pixels.parquet")
    command("curate", "retrieve", *found, "--k", str(WIDE), "-o", "by-pixels.parquet")


def select(seed: int) -> None:
    """Write the sets of a seed to its folder, the working folder: features of the raw run choose, no label is read."""
    model = ("--model", "raw", "--tokens", "cls+mean")
    embed("features.parquet", "queries.parquet", *model)
    chosen = ("--features", "features.parquet", "--seed", str(seed))
    for name, k in (("near", NEAR), ("retrieved", WIDE)):
        found = ("--queries", "queries.parquet", "--pool", "../unique.parquet", "--k", str(k))
        command("curate", "retrieve", *found, "-o", f"{name}.parquet", *chosen)
    sample = str(round(BALANCED * pq.read_metadata("retrieved.parquet").num_rows))
    clusters = ("--num-clusters", CLUSTERS, "--sample", sample)
    command("curate", "cluster", "retrieved.parquet", *clusters, "-o", "balanced.parquet", *chosen)
    command("curate", "union", "near.parquet", "balanced.parquet", "-o", "curated.parquet")
    subset = f"order by md5(image_id || '{seed}'), uri limit {pq.read_metadata('curated.parquet').num_rows}"
    command("catalog", "sql", f"select * from '../pool.parquet' {subset}", "-o", "random.parquet", "--force")


def embed(features: str, queries: str, *model: str) -> None:
    """Embed the pool and the seed images by a model, in the folder of a pool or of a seed."""
    raw = "raw.parquet" if Path("raw.parquet").exists() else "../raw.parquet"
    command("curate", "embed", raw, "-o", features, *model)
    command("curate", "embed", str(QUERIES), "-o", queries, "--role", "queries", *model)


def run(arm: str, manifest: str, steps: int, seed: int) -> None:
    """Pretrain on a manifest and score the features, unless that was done; the figures go to `ARM.json`."""
    if Path(f"{arm}.json").exists():
        return
    settings = assignments({**SETTINGS, "steps": steps})
    command("train", "pretrain", manifest, "-o", arm, "--recipe", "tiny", "--seed", str(seed), "--resume", *settings)
    write_text(Path(f"{arm}.json"), json.dumps({**composition(manifest), **scores(arm)}))


def scores(model: str) -> dict[str, float]:
    """Return the accuracy of a model by k-NN and a linear probe, in percent."""
    train, test = map(str, FASHION_PROBE)
    methods = [word for method in METHODS for word in ("--method", method)]
    words = ("--model", model, "--train", train, "--test", test, "-o", "scores.parquet", "--json", "--force")
    rows = json.loads(command("evaluate", "probe", *words, *methods))["rows"]
    top1 = [row for row in rows if row["metric"] == "top1" and row["parameters"].get("k", K) == K]
    return {row["method"]: 100 * row["value"] for row in top1}


def composition(manifest: str) -> dict[str, float]:
    """Return the number of images, the share of clothes, and how even the ten kinds of them are (entropy / log 10)."""
    labels = Counter(pq.read_table(manifest, columns=["label"])["label"].to_pylist())
    kinds = np.array([labels[name] for name in FASHION_CLASSES])
    total = labels.total()
    return {"images": total, "wanted": float(kinds.sum() / total), "evenness": normalized_entropy(kinds)}


def road(folder: Path, cell: Cell, seed: int, arms: Sequence[str]) -> None:
    """Do the runs of a seed, each unless it was done."""
    enter(place(folder, cell, seed))
    run("raw", OF_POOL["raw"], cell.steps, seed)
    if any(arm != "raw" and not Path(f"{arm}.json").exists() for arm in arms):
        select(seed)
    for arm in arms:
        run(arm, OF_POOL.get(arm, f"{arm}.parquet"), cell.steps, seed)


def enter(folder: Path) -> None:
    """Make a folder and work in it, with a catalog of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ["DINOV2_CATALOG"] = str(folder / "catalog.duckdb")


def place(folder: Path, cell: Cell, seed: int) -> Path:
    """Return the folder of a seed's sets and runs."""
    return folder / f"share-{cell.share}" / f"steps-{cell.steps}-seed-{seed}"


def finished(folder: Path, cell: Cell) -> dict[str, list[dict[str, float]]]:
    """Return the figures of the arms of which all seeds are done, a dictionary a seed."""
    files = {arm: [place(folder, cell, seed) / f"{arm}.json" for seed in SEEDS] for arm in ARMS}
    return {
        arm: [json.loads(file.read_text()) for file in of_seeds]
        for arm, of_seeds in files.items()
        if all(file.exists() for file in of_seeds)
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of five values and half the width of its 95 % interval by Student's t."""
    half = T_95 * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def gain(arm: Sequence[float], other: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95 % interval, and in how many pairs the arm is better."""
    differences = [one - another for one, another in zip(arm, other, strict=True)]
    mean, half = interval(differences)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}), {sum(each > 0 for each in differences)}"


def tables(folder: Path, cells: Sequence[Cell]) -> str:
    """Return the paired differences and the scores as two tables, of what is done."""
    differences, means = [], []
    for cell in cells:
        figures = finished(folder, cell)
        start = f"{cell.share:.0%}", f"{cell.steps:,}"
        scores = {(arm, method): [seed[method] for seed in figures[arm]] for arm in figures for method in METHODS}
        for arm, other in PAIRS:
            if arm in figures and other in figures:
                gains = (gain(scores[arm, method], scores[other, method]) for method in METHODS)
                differences.append([*start, f"{ARMS[arm]} - {ARMS[other]}", *gains])
        for arm, seeds in figures.items():
            images, wanted, evenness = (statistics.mean(seed[key] for seed in seeds) for key in COMPOSITION)
            each = ("{:.1f} ± {:.1f}".format(*interval(scores[arm, method])) for method in METHODS)
            means.append([*start, ARMS[arm], f"{images:,.0f}", f"{wanted:.1%}", f"{evenness:.3f}", *each])
    shared = ("unwanted", "steps")
    header = (*shared, "trained on", *COMPOSITION, *METHODS.values())
    return f"{table((*shared, 'difference', *METHODS.values()), differences)}\n\n{table(header, means)}"


def end_with_parent() -> None:
    """Let this process end with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Train, score and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where everything is kept")
    parser.add_argument("--long", action="store_true", help="all sets, also of clothes alone, and longer runs")
    args = parser.parse_args()
    folder: Path = args.folder
    os.environ["OMP_NUM_THREADS"] = "1"  # of the two processes, which read it when they start
    cells = CELLS + LONG_CELLS if args.long else CELLS
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        prepared = {share: pool.submit(prepare, folder, share) for share in dict.fromkeys(cell.share for cell in cells)}
        roads = []
        others = cells if args.long else CELLS[:1]
        for cell, arms in [*((cell, QUESTION) for cell in cells), *((cell, OTHERS) for cell in others)]:
            prepared[cell.share].result()
            roads += [pool.submit(road, folder, cell, seed, arms) for seed in SEEDS]
        try:
            for each in as_completed(roads):
                each.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure
    body = tables(folder, cells)
    print(body)
    untrained = probed(folder, FASHION_PROBE, [f"random:{place(folder, CELLS[0], 0) / 'raw'}"], list(METHODS))
    floor = " and ".join(f"{100 * row['value']:.1f}" for _, row in sorted(untrained.items()))
    notes = f"{NOTES} The ViT untrained has {floor}."
    write_page("curation", "Curated, raw and random data at small scale", f"{body}\n\n{notes}")


if __name__ == "__main__":
    main()
