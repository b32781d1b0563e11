"""Time k-means and FAISS's k-means on the same sample of vectors, and compare the objectives over all vectors.

    python benchmarks/kmeans.py --write

Vectors by benchmarks/synthetic.py, half floats on disk. Both fit centroids to a sample of 256 rows per centroid, with
at most 20 iterations, stopped at a relative gain under 0.01 %, and then assign all rows, block by block. The methods
run in turn, each in its own process, for times and peak memory. The objective is the sum of 1 - cosine over all rows.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from dinov2_toolkit import console
from dinov2_toolkit.benchmarks.measured import in_a_process, measured, table, write_page
from dinov2_toolkit.benchmarks.synthetic import blocks
from dinov2_toolkit.curate.cluster.kmeans import cluster_vectors, read_points, sample_rows
from dinov2_toolkit.curate.cluster.lloyd import EARLY_STOP, NUM_ITERATIONS, POINTS_A_CENTROID
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Vectors

METHODS = ("dinov2, k-means++", "FAISS, AFK-MC2", "FAISS, random")
DIM = 384
BLOCK_ROWS = 16_384


def write_vectors(path: Path, num_rows: int) -> None:
    """Write vectors as a memory-mapped array."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num_rows, DIM))
    start = 0
    for block in blocks(num_rows, DIM):
        array[start : start + len(block.vectors)] = block.vectors
        start += len(block.vectors)
    array.flush()


def by_toolkit(vectors: Vectors, num_clusters: int) -> float:
    """Return the objective over all rows."""
    made = cluster_vectors(vectors, num_clusters, num_resamplings=0, seed=0)
    return float(made.distances.sum(dtype=np.float64))


def by_faiss(vectors: Vectors, num_clusters: int, init: str) -> float:
    """Return the objective of FAISS's k-means on the sample, with all rows assigned by its exact search."""
    num_points = min(len(vectors), POINTS_A_CENTROID * num_clusters)
    points = read_points(vectors, sample_rows(len(vectors), num_points, 0))
    methods = {"AFK-MC2": faiss.ClusteringInitMethod_AFK_MC2, "random": faiss.ClusteringInitMethod_RANDOM}
    fitted = faiss.Kmeans(
        DIM,
        num_clusters,
        niter=NUM_ITERATIONS,
        seed=0,
        spherical=True,
        init_method=methods[init],
        early_stop_threshold=EARLY_STOP,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_A_CENTROID,
    )
    fitted.train(points)
    del points
    total = 0.0
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors.unit(start, min(start + BLOCK_ROWS, len(vectors)))
        similarities, _ = fitted.index.search(block, 1)
        total += float((1 - similarities).sum(dtype=np.float64))
    return total


def run_alone(method: str, path: Path, num_clusters: int) -> None:
    """Run one method and print its figures as JSON."""
    console.set_verbosity(quiet=True, verbose=0)
    stored = np.load(path, mmap_mode="r")
    vectors = Vectors(stored, np.arange(len(stored)), Source("base", str(path), "synthetic"))
    library, init = method.split(", ")
    with measured() as cost:
        if library == "dinov2":
            objective = by_toolkit(vectors, num_clusters)
        else:
            objective = by_faiss(vectors, num_clusters, init)
    print(json.dumps({**asdict(cost), "objective": objective}))


def main() -> None:
    """Read the command line, run the methods in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, help="where the vectors go; a temporary one by default")
    parser.add_argument("--write", action="store_true", help="write results/kmeans.md")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FILE"), help="run one and print JSON")
    args = parser.parse_args()
    if args.one:
        run_alone(args.one[0], Path(args.one[1]), args.clusters)
        return
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "vectors.npy"
        write_vectors(path, args.rows)
        for _ in range(args.repeats):
            for method in args.methods:
                line = in_a_process("--one", method, str(path), "--clusters", str(args.clusters))
                runs[method].append(json.loads(line))
                print(method, line, file=sys.stderr, flush=True)
    best = {method: min(run["wall_s"] for run in runs[method]) for method in runs}
    base = next((method for method in runs if method.startswith("FAISS")), None)

    def row(method: str) -> tuple[str, ...]:
        def listed(name: str, digits: int = 0) -> str:
            return ", ".join(f"{run[name]:,.{digits}f}" for run in runs[method])

        ratio = f"{best[method] / best[base]:.2f}" if base else ""
        return method, listed("wall_s", 1), ratio, listed("cpu_s", 1), listed("objective"), listed("peak_mb")

    header = ("k-means", "seconds", f"over {base or 'FAISS'}", "CPU seconds", "objective", "peak resident MB")
    lines = table(header, [row(method) for method in runs])
    print(lines)
    if args.write:
        num_points = min(args.rows, POINTS_A_CENTROID * args.clusters)
        notes = (
            f"{args.rows:,} x {DIM} half floats on disk, {args.clusters:,} centroids: fit to {num_points:,} rows, then"
            " assignment of all. The methods ran in turn; every run is listed."
        )
        write_page("kmeans", "k-means and FAISS's k-means", f"{lines}\n\n{notes}")


if __name__ == "__main__":
    main()
