"""Time `dinov2 curate map` on synthetic embeddings of 384 half floats, and how many neighbours stay near on the map.

    python benchmarks/map.py --folder /tmp/maps

Each size runs in its own process, so that memory is measured separately. A map holds the ten nearest of an image where
they are among its ten nearest on the map; of 1,000 images, by comparing with all.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dinov2_toolkit.benchmarks.measured import dinov2_measured, made_folder, write_result
from dinov2_toolkit.benchmarks.synthetic import write
from dinov2_toolkit.store.vectors import Float32, Int64

QUERIES = 1_000
K = 10
BLOCK_ROWS = 100_000


def nearest(points: Float32, queries: Int64) -> Int64:
    """Return the K nearest others of the points at `queries` (Q,) by distance, (Q, K)."""
    found = np.empty((len(queries), 0), np.int64)
    distances = np.empty((len(queries), 0), np.float32)
    asked = points[queries].astype(np.float32)
    for start in range(0, len(points), BLOCK_ROWS):
        block = points[start : start + BLOCK_ROWS].astype(np.float32)
        squares = (block**2).sum(axis=1)[None] - 2 * asked @ block.T
        here = np.arange(start, start + len(block))
        squares[queries[:, None] == here[None]] = np.inf
        top = np.argpartition(squares, K, axis=1)[:, :K]
        found = np.concatenate([found, here[top]], axis=1)
        distances = np.concatenate([distances, np.take_along_axis(squares, top, axis=1)], axis=1)
    best = np.argsort(distances, axis=1)[:, :K]
    return np.take_along_axis(found, best, axis=1)


def kept(pool: Path, made: Path) -> float:
    """Return the share of the nearest neighbours in the embeddings that are nearest on the map too."""
    column = pq.read_table(pool, columns=["embedding"]).column("embedding").combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), -1)
    places = pq.read_table(made, columns=["projection_x", "projection_y"])
    points = np.stack([values.to_numpy() for values in places.columns], axis=1)
    queries = np.random.default_rng(0).choice(len(points), QUERIES, replace=False)
    pairs = zip(nearest(vectors, queries), nearest(points, queries), strict=True)
    return float(np.mean([len(np.intersect1d(one, other)) / K for one, other in pairs]))


def main() -> None:
    """Read the command line, make the maps and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="where embeddings and maps go")
    parser.add_argument("--rows", type=int, nargs="*", default=[70_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    folder = made_folder(args.folder)
    notes = (
        "Seconds and memory are those of the whole command on two threads, with decoding the vectors into the cache."
        f" Kept: the share of the {K} nearest in the embeddings that are among the {K} nearest on the map. Above"
        " 500,000 images, 200,000 are projected and the others placed among their neighbours."
    )
    header = ("images", "wall s", "CPU s", "peak MB", "kept")
    rows = []
    for num in args.rows:
        pool, made = folder / f"pool-{num}.parquet", folder / f"map-{num}.parquet"
        if not pool.exists():
            write(pool, num)
        _, cost = dinov2_measured(folder, "curate", "map", str(pool), "-o", str(made), "--force", threads=args.threads)
        measured = pq.read_metadata(made).num_rows
        rows.append(
            (
                f"{measured:,}",
                f"{cost.wall_s:.0f}",
                f"{cost.cpu_s:.0f}",
                f"{cost.peak_mb:,.0f}",
                f"{kept(pool, made):.3f}",
            )
        )
        write_result("map", "Maps of embeddings of 384 numbers", header, rows, notes)


if __name__ == "__main__":
    main()
