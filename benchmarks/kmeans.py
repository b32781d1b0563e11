"""Time k-means beside FAISS's on the same sample of the same vectors, and compare what they reach on all of them.

    python benchmarks/kmeans.py --write

Vectors by benchmarks/synthetic.py, half floats on disk. Both fit centroids to the same 256 rows a centroid, at most 20
iterations, ended by a relative gain under 0.01 %, and then assign all rows, block by block. The contestants take turns,
each in a process of its own, for times and peak memory. The objective is the sum of 1 - cosine over all rows.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from dinov2_toolkit import console
from dinov2_toolkit.benchmarks.synthetic import blocks
from dinov2_toolkit.curate.cluster.kmeans import cluster_vectors, read_points, sample_rows
from dinov2_toolkit.curate.cluster.lloyd import EARLY_STOP, NUM_ITERATIONS, POINTS_A_CENTROID
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Vectors

RESULTS = Path(__file__).parent / "results" / "kmeans.md"
CONTESTANTS = ("dinov2, k-means++", "FAISS, AFK-MC2", "FAISS, random")
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


def by_toolkit(vectors: Vectors, num_clusters: int, init: str) -> tuple[npt.NDArray[np.float32], float]:
    """Return centroids and the objective over all rows."""
    assert init == "k-means++"
    made = cluster_vectors(vectors, num_clusters, num_resamplings=0, seed=0)
    return made.centroids, float(made.distances.sum(dtype=np.float64))


def by_faiss(vectors: Vectors, num_clusters: int, init: str) -> tuple[npt.NDArray[np.float32], float]:
    """Return the same by FAISS: its k-means on the sample, then its exact search for all rows."""
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
    assert fitted.centroids is not None
    del points
    total = 0.0
    assignments = np.empty(len(vectors), np.int32)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors.unit(start, min(start + BLOCK_ROWS, len(vectors)))
        similarities, found = fitted.index.search(block, 1)
        assignments[start : start + len(block)] = found[:, 0]
        total += float((1 - similarities).sum(dtype=np.float64))
    return fitted.centroids, total


def run_alone(contestant: str, path: Path, num_clusters: int) -> None:
    """Run one contestant and print its figures as JSON."""
    console.set_verbosity(quiet=True, verbose=0)
    stored = np.load(path, mmap_mode="r")
    vectors = Vectors(stored, np.arange(len(stored)), Source("base", str(path), "synthetic"))
    whose, init = contestant.split(", ")
    start, used = time.perf_counter(), time.process_time()
    _, objective = (by_toolkit if whose == "dinov2" else by_faiss)(vectors, num_clusters, init)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - used,
        "objective": objective,
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps(figures))


def peak_rss_mb() -> float:
    """Return the most memory this process had resident; unlike ru_maxrss it does not count its parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Read the command line, let the contestants take turns, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--contestants", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--folder", type=Path, help="where the vectors go; a temporary one by default")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--alone", nargs=2, metavar=("CONTESTANT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        run_alone(args.alone[0], Path(args.alone[1]), args.clusters)
        return
    measured: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in args.contestants}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "vectors.npy"
        write_vectors(path, args.rows)
        load = os.getloadavg()[0]
        for _ in range(args.repeats):
            for contestant in args.contestants:
                command = [sys.executable, __file__, "--alone", contestant, str(path), "--clusters", str(args.clusters)]
                made = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[contestant].append(json.loads(made.stdout))
                print(contestant, made.stdout.strip(), file=sys.stderr, flush=True)
    lines = table(measured, args.rows, args.clusters, load)
    print("\n".join(lines))
    if args.write:
        RESULTS.write_text("\n".join(lines) + "\n")


def table(measured: dict[str, list[dict[str, float]]], num_rows: int, num_clusters: int, load: float) -> list[str]:
    """Return the lines of the result."""

    def runs(contestant: str, name: str, digits: int = 0) -> str:
        return ", ".join(f"{run[name]:,.{digits}f}" for run in measured[contestant])

    faiss_runs = [contestant for contestant in measured if contestant.startswith("FAISS")]
    base = min((run["seconds"] for run in measured[faiss_runs[0]]), default=0.0) if faiss_runs else 0.0
    num_points = min(num_rows, POINTS_A_CENTROID * num_clusters)
    lines = [
        "# k-means beside FAISS's",
        "",
        f"`python benchmarks/kmeans.py`, {date.today()}, {platform.machine()}, {faiss.omp_get_max_threads()} threads,"
        f" faiss {faiss.__version__}, numpy {np.__version__}; load of the machine before: {load:.1f}."
        f" {num_rows:,} x {DIM} half floats on disk, {num_clusters:,} centroids: fit to {num_points:,} rows and"
        " assignment of all. The contestants took turns; every run is listed.",
        "",
        f"| k-means | seconds | over {(faiss_runs or ['FAISS'])[0]} | CPU seconds | objective | peak resident MB |",
        "|---|---|---|---|---|---|",
    ]
    for contestant in measured:
        best = min(run["seconds"] for run in measured[contestant])
        ratio = f"{best / base:.2f}" if base else ""
        lines.append(
            f"| {contestant} | {runs(contestant, 'seconds', 1)} | {ratio} | {runs(contestant, 'cpu_seconds', 1)} |"
            f" {runs(contestant, 'objective')} | {runs(contestant, 'peak_rss_mb')} |"
        )
    return lines


if __name__ == "__main__":
    main()
