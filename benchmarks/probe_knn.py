"""Time the k-NN probe and FAISS's bare search: 60,000 training and 10,000 test embeddings of 384 numbers.

    python benchmarks/probe_knn.py --repeats 3

The command `dinov2 evaluate probe` runs from two manifests: start-up, reading, search, exact reranking, votes for
k = 10, 20, 100 and 200, intervals and the scores file. The reference is `faiss.knn` on the same vectors, already of
unit length and in memory, for 200 neighbours: any exact k-NN does at least that. Both run in turn; medians are
reported. Then the accuracies are compared with a brute force in numpy, float64, on the whole set.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2_toolkit.benchmarks.measured import Measure, dinov2_measured, table, write_page

DIM, NUM_CLASSES = 384, 100
KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, default in {"train": 60_000, "test": 10_000, "repeats": 3, "threads": 2, "seed": 0}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--write", action="store_true", help="write results/probe_knn.md")
    return parser.parse_args()


def make_features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return overlapping classes, (count, DIM) float32, and their labels."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((NUM_CLASSES, DIM), dtype=np.float32)
    labels = random.integers(0, NUM_CLASSES, count)
    return 0.2 * centres[labels] + random.standard_normal((count, DIM), dtype=np.float32), labels


def write_manifest(path: Path, features: np.ndarray, labels: np.ndarray) -> None:
    """Write features as other programs do: lists of floats, with a label each."""
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), DIM)
    names = pa.array([f"/images/{path.stem}/{row}.jpg" for row in range(len(labels))])
    pq.write_table(pa.table({"uri": names, "label": labels.astype(str), "embedding": embeddings}), path)


def probe(folder: Path, threads: int) -> tuple[Measure, dict[str, float]]:
    """Run the command; return its time and memory, and accuracy by k."""
    arguments = ["evaluate", "probe", "--train", "train.parquet", "--test", "test.parquet", "--force", "--json", "-q"]
    printed, cost = dinov2_measured(folder, *arguments, threads=threads)
    rows = json.loads(printed)["rows"]
    return cost, {str(row["parameters"]["k"]): row["value"] for row in rows if row["metric"] == "top1"}


def bare_search(train: np.ndarray, test: np.ndarray, threads: int) -> float:
    """Return the seconds of FAISS's search for max(KS) neighbours, vectors of unit length in memory."""
    import faiss

    faiss.omp_set_num_threads(threads)
    train, test = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (train, test))
    start = time.perf_counter()
    faiss.knn(test, train, max(KS), metric=faiss.METRIC_INNER_PRODUCT)
    return time.perf_counter() - start


def brute_force(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the accuracy by k of the protocol in numpy, float64, image by image."""
    train, test = (each.astype(np.float64) for each in (train, test))
    train, test = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (train, test))
    correct = dict.fromkeys(KS, 0)
    for start in range(0, len(test), 100):
        for similarities, answer in zip(test[start : start + 100] @ train.T, truth[start : start + 100], strict=True):
            least = np.partition(similarities, -max(KS))[-max(KS)]
            near = np.flatnonzero(similarities >= least)
            near = near[np.argsort(-similarities[near], kind="stable")][: max(KS)]
            weights = np.exp(similarities[near] / TEMPERATURE)
            for k in KS:
                votes = np.bincount(labels[near[:k]], weights[:k], NUM_CLASSES)
                correct[k] += int(np.argmax(votes) == answer)
    return {str(k): count / len(test) for k, count in correct.items()}


def main() -> None:
    """Time both in turn, compare with brute force, print and write the figures."""
    args = parse_arguments()
    (train, labels), (test, truth) = make_features(args.train, args.seed), make_features(args.test, args.seed + 1)
    costs, searched = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder / "train.parquet", train, labels)
        write_manifest(folder / "test.parquet", test, truth)
        for _ in range(args.repeats):
            searched.append(bare_search(train, test, args.threads))
            cost, accuracies = probe(folder, args.threads)
            costs.append(cost)
            print(f"probe {cost.wall_s:.1f} s, search {searched[-1]:.1f} s", file=sys.stderr, flush=True)
    is_equal = accuracies == brute_force(train, labels, test, truth)
    probed = [cost.wall_s for cost in costs]
    ratio = statistics.median(whole / search for whole, search in zip(probed, searched, strict=True))

    def seconds(runs: list[float]) -> tuple[str, str]:
        return f"{statistics.median(runs):.2f}", ", ".join(f"{run:.2f}" for run in runs)

    cpu_s = statistics.median(cost.cpu_s for cost in costs)
    peak = max(cost.peak_mb for cost in costs)
    rows = [
        ("`dinov2 evaluate probe`, whole command", *seconds(probed), f"{cpu_s:.2f}", f"{peak:.0f}"),
        (f"`faiss.knn`, the search for {max(KS)} neighbours alone", *seconds(searched), "", ""),
    ]
    lines = table(("", "seconds, median", "all", "CPU seconds", "peak memory MiB"), rows)
    notes = (
        f"{args.train:,} training and {args.test:,} test embeddings of {DIM} numbers, k = {', '.join(map(str, KS))},"
        f" {args.threads} threads. Ratio {ratio:.2f} (median of pairs). Accuracies"
        f" {'equal' if is_equal else 'DIFFER FROM'} the brute force in numpy, float64: {accuracies}."
    )
    print(f"{lines}\n\n{notes}")
    if args.write:
        write_page("probe_knn", "k-NN probe and FAISS's bare search", f"{lines}\n\n{notes}")


if __name__ == "__main__":
    main()
