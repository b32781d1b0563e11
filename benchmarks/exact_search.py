"""Time exact search and the best direct FAISS calls: the 64 nearest others of each of 100,000 vectors of 384.

    python benchmarks/exact_search.py

FAISS searches for 65 and in float32 only. Its vectors are in memory; the toolkit's are half floats in a mapped file.
The methods run in turn, each in its own process, so that memory is measured separately.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from dinov2_toolkit.benchmarks.measured import in_a_process, measured, peak_mb, write_result
from dinov2_toolkit.benchmarks.synthetic import blocks
from dinov2_toolkit.features.search.exact_search import Identity, KnnTask, exact_neighbors
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Vectors

METHODS = ("faiss.knn", "IndexFlatIP, batch 4096", "toolkit")


def search(method: str, path: Path, k: int) -> dict[str, float]:
    """Run one method on the vectors in a .npy file, save the neighbours beside it, and return time and memory."""
    array = np.load(path, mmap_mode="r")
    vectors = Vectors(array, np.arange(len(array)), Source("base", str(path), "benchmark"))
    if method == "toolkit":
        before = peak_mb()
        itself = Identity(vectors.rows, vectors.rows)
        with measured() as cost:
            found = exact_neighbors(KnnTask(vectors, vectors, k, vectors.rows, itself), progress=None)
        indices = found.indices
    else:
        unit = vectors.unit(0, len(vectors))
        before = peak_mb()
        with measured() as cost:
            if method == "faiss.knn":
                _, indices = faiss.knn(unit, unit, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
            else:
                index = faiss.IndexFlatIP(vectors.dim)
                index.add(unit)
                parts = [index.search(unit[start : start + 4096], k + 1)[1] for start in range(0, len(unit), 4096)]
                indices = np.concatenate(parts)
    np.save(path.with_name(f"found-{METHODS.index(method)}.npy"), indices)
    return {**asdict(cost), "search_mb": cost.peak_mb - before}


def agreement(folder: Path) -> float:
    """Return the share of the toolkit's neighbours that FAISS finds too; float32 rounding may swap the last ones."""
    ours, theirs = np.load(folder / "found-2.npy"), np.load(folder / "found-0.npy")
    k = ours.shape[1]
    same = [len(np.intersect1d(one, other, assume_unique=True)) / k for one, other in zip(ours, theirs, strict=True)]
    return float(np.mean(same))


def main() -> None:
    """Read the command line, run the methods in turn and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FILE"), help="run one and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(search(args.one[0], Path(args.one[1]), args.k)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, np.concatenate([block.vectors for block in blocks(args.rows, 384)]).astype(np.float16))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        for _ in range(args.repeats):
            for name in METHODS:
                runs[name].append(json.loads(in_a_process("--one", name, str(path), "--k", str(args.k))))
        shared = agreement(Path(folder))
    keys = ("wall_s", "cpu_s", "peak_mb", "search_mb")
    median = {name: {key: statistics.median(run[key] for run in runs[name]) for key in keys} for name in runs}
    best = {key: min(median[name][key] for name in METHODS[:2]) for key in ("wall_s", "cpu_s")}
    rows = [
        (
            name,
            f"{median[name]['wall_s']:.1f}",
            f"{median[name]['wall_s'] / best['wall_s']:.2f}",
            f"{median[name]['cpu_s']:.1f}",
            f"{median[name]['cpu_s'] / best['cpu_s']:.2f}",
            f"{median[name]['peak_mb']:.0f}",
            f"{median[name]['search_mb']:.0f}",
        )
        for name in METHODS
    ]
    notes = (
        f"Medians of {args.repeats} runs in turn. Ratios are to the better FAISS call. The toolkit's answer is exact"
        f" (ranked in float64, ties by order); FAISS, in float32, has {shared:.5f} of the same neighbours."
    )
    header = ("", "wall s", "ratio", "CPU s", "ratio", "peak MB", "of which search")
    write_result("exact_search", f"Exact search: {args.rows:,} x 384, k = {args.k}", header, rows, notes)


if __name__ == "__main__":
    main()
