"""Time the k-NN probe beside FAISS's bare search: 60,000 training and 10,000 test embeddings of 384 numbers.

    python benchmarks/probe_knn.py --repeats 3

The command `dinov2 evaluate probe` runs as a user runs it, in a process of its own, from two manifests: start-up,
reading, search, exact reranking, votes for k = 10, 20, 100 and 200, intervals and the scores file. The yardstick is
`faiss.knn` on the same vectors, already of unit length and in memory, for 200 neighbours: what any exact k-NN must do
at least. Both in turn, again and again; the medians count. Then the accuracies are compared with a brute force in
numpy, float64, on the whole set. Prints a table; --output writes it as Markdown. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIM, NUM_CLASSES = 384, 100
KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, default in {"train": 60_000, "test": 10_000, "repeats": 3, "threads": 2, "seed": 0}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--output", type=Path, help="Markdown file")
    return parser.parse_args()


def make_features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return overlapping classes, (count, DIM) float32, and their labels."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((NUM_CLASSES, DIM), dtype=np.float32)
    labels = random.integers(0, NUM_CLASSES, count)
    return 0.2 * centres[labels] + random.standard_normal((count, DIM), dtype=np.float32), labels


def write_manifest(path: Path, features: np.ndarray, labels: np.ndarray) -> None:
    """Write features as anybody might: lists of floats, a label each."""
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), DIM)
    names = pa.array([f"/images/{path.stem}/{row}.jpg" for row in range(len(labels))])
    pq.write_table(pa.table({"uri": names, "label": labels.astype(str), "embedding": embeddings}), path)


def probe(folder: Path, threads: int) -> tuple[float, float, float, dict[str, float]]:
    """Run the command; return its seconds, those of its processor, its peak memory in MiB, and accuracy by k."""
    arguments = ["evaluate", "probe", "--train", "train.parquet", "--test", "test.parquet", "--force", "--json", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DINOV2_CATALOG": str(folder / "catalog.duckdb")}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dinov2_toolkit", *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, f"the command failed: {status}"
    rows = json.loads(printed)["rows"]
    accuracies = {str(row["parameters"]["k"]): row["value"] for row in rows if row["metric"] == "top1"}
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, accuracies


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
    probed, processor, searched, peaks = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder / "train.parquet", train, labels)
        write_manifest(folder / "test.parquet", test, truth)
        for _ in range(args.repeats):
            searched.append(bare_search(train, test, args.threads))
            seconds, processor_s, peak_mib, accuracies = probe(folder, args.threads)
            probed.append(seconds)
            processor.append(processor_s)
            print(f"{seconds:.1f} s beside {searched[-1]:.1f} s", file=sys.stderr, flush=True)
            peaks.append(peak_mib)
    expected = brute_force(train, labels, test, truth)
    load = os.getloadavg()[0]
    figures = {
        "probe_s": round(statistics.median(probed), 2),
        "faiss_s": round(statistics.median(searched), 2),
        "ratio": round(statistics.median(p / s for p, s in zip(probed, searched, strict=True)), 2),
        "probe_s_all": [round(seconds, 2) for seconds in probed],
        "faiss_s_all": [round(seconds, 2) for seconds in searched],
        "probe_processor_s": round(statistics.median(processor), 2),
        "peak_rss_mib": round(max(peaks)),
        "accuracy": accuracies,
        "brute_force": expected,
        "equal": accuracies == expected,
        "load": round(load, 1),
        "train": args.train,
        "test": args.test,
        "threads": args.threads,
    }
    lines = [
        "# k-NN probe beside FAISS's bare search",
        "",
        f"`python benchmarks/probe_knn.py --repeats {args.repeats}`, {date.today()}, {platform.processor() or 'CPU'},"
        f" {os.cpu_count()} cores, {args.threads} threads, load {load:.1f} at the end.",
        f"{args.train:,} training and {args.test:,} test embeddings of {DIM} numbers, k = 10, 20, 100, 200.",
        "",
        "| | seconds, median | all | processor seconds | peak memory MiB |",
        "|---|---|---|---|---|",
        f"| `dinov2 evaluate probe`, whole command | {figures['probe_s']} | {figures['probe_s_all']}"
        f" | {figures['probe_processor_s']} | {max(peaks):.0f} |",
        f"| `faiss.knn`, 200 neighbours, no more | {figures['faiss_s']} | {figures['faiss_s_all']} | | |",
        "",
        f"Ratio {figures['ratio']} (median of pairs). Accuracies {'equal' if figures['equal'] else 'DIFFER FROM'} the"
        f" brute force in numpy, float64: {accuracies}.",
    ]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
