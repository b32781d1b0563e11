"""Measure how balanced 10 % samples of a long-tailed pool are: random, flat clusters, hierarchical clusters.

    python benchmarks/balance.py --write

Pools by benchmarks/synthetic.py: 50 super-concepts of 30 concepts, both by Zipf's law, and 1,500 concepts without
super-concepts. Entropy is normalised: 1 when all concepts have equally many images in the sample. Ends with an error
unless, by entropy over concepts, flat clusters with resampling are better than without and these better than a random
sample; two levels are better than one over super-concepts and reach 0.95; and the absence of a hierarchy is recognised.
"""

import argparse
import time

import numpy as np

from dinov2_toolkit import console
from dinov2_toolkit.benchmarks.measured import table, write_page
from dinov2_toolkit.benchmarks.synthetic import NUM_CONCEPTS, blocks
from dinov2_toolkit.curate.cluster.kmeans import Clustering, cluster_levels
from dinov2_toolkit.curate.cluster.metrics import grouping, normalized_entropy
from dinov2_toolkit.curate.cluster.sampling import balanced_sample, seeded_keys
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Int64, Vectors

SUPERS = 50
Row = tuple[str, float, float, int, float, str]


def read_pool(num_rows: int, supers: int, seed: int) -> tuple[Vectors, Int64]:
    """Return vectors as they would be stored, and the concept of each."""
    made = list(blocks(num_rows, 384, supers, seed))
    vectors = np.concatenate([block.vectors for block in made]).astype(np.float16)
    concepts = np.concatenate([block.concept for block in made])
    return Vectors(vectors, np.arange(num_rows), Source("base", "synthetic", str(supers))), concepts


def measure(name: str, positions: Int64, concepts: Int64, found: str = "") -> Row:
    """Return the entropy over concepts and super-concepts, concepts hit, and the share of the 20 most frequent."""
    counts = np.bincount(concepts[positions], minlength=NUM_CONCEPTS)
    above = counts.reshape(SUPERS, -1).sum(axis=1)
    top = float(np.sort(counts)[-20:].sum() / counts.sum())
    return name, normalized_entropy(counts), normalized_entropy(above), int((counts > 0).sum()), top, found


def sampled(made: list[Clustering], num_levels: int, num_images: int, seed: int) -> Int64:
    """Return a balanced sample through the finest levels."""
    levels = [each.assignments for each in made[:num_levels]]
    return balanced_sample(levels, num_images, [seeded_keys(len(levels[0]), seed, 0)], seed)


def compare(vectors: Vectors, concepts: Int64, num_clusters: list[int], resample: int, seed: int) -> list[Row]:
    """Return a row for each way to sample a tenth of the pool."""
    num_images = len(concepts) // 10
    rows = [measure("random", np.argsort(seeded_keys(len(concepts), seed, 1))[:num_images], concepts)]
    for times in (0, resample):
        made = cluster_levels(vectors, num_clusters, num_resamplings=times, seed=seed)
        upper = grouping(made[0].centroids, made[1].assignments, num_clusters[1])
        found = "a hierarchy" if upper.is_hierarchy else "no hierarchy"
        suffix = f", {times} resamplings" if times else ""
        rows.append(measure(f"one level{suffix}", sampled(made, 1, num_images, seed), concepts))
        rows.append(measure(f"two levels{suffix}", sampled(made, 2, num_images, seed), concepts, found))
    return rows


def check(structured: list[Row], unstructured: list[Row]) -> None:
    """Raise AssertionError unless the expected orders hold."""
    random, flat, _, resampled, hierarchical = structured
    assert resampled[1] > flat[1] > random[1], "concepts: resampled > flat > random"
    assert hierarchical[2] > flat[2] and hierarchical[2] >= 0.95, "super-concepts: two levels > one, at least 0.95"
    assert all(row[5] == "a hierarchy" for row in (structured[2], structured[4]))
    assert all(row[5] == "no hierarchy" for row in (unstructured[2], unstructured[4]))


def main() -> None:
    """Read the command line, measure, print and check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--clusters", type=int, nargs=2, default=[1_000, 50])
    parser.add_argument("--resample", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write results/balance.md")
    args = parser.parse_args()
    console.set_verbosity(quiet=True, verbose=0)
    pools, parts = [], []
    header = ("sample", "concepts", "super-concepts", "concepts hit", "top-20 share", "level 1")
    for supers, title in ((SUPERS, "50 super-concepts of 30 concepts"), (0, "1,500 concepts without super-concepts")):
        start = time.perf_counter()
        vectors, concepts = read_pool(args.rows, supers, args.seed)
        pools.append(compare(vectors, concepts, args.clusters, args.resample, args.seed))
        rows = [
            (name, f"{of_concepts:.3f}", f"{of_supers:.3f}" if supers else "", f"{hit:,}", f"{top:.3f}", found)
            for name, of_concepts, of_supers, hit, top, found in pools[-1]
        ]
        parts.append(f"## {title}\n\n{table(header, rows)}\n\n{time.perf_counter() - start:.0f} s.")
        print(parts[-1])
    check(*pools)
    if args.write:
        notes = (
            f"{args.rows:,} vectors of 384 numbers, {args.clusters[0]:,} and {args.clusters[1]:,} clusters, seed"
            f" {args.seed}. Columns 2 and 3: normalised entropy of the sample over concepts and super-concepts"
            " (1 = uniform). Level 1: whether the command finds a hierarchy in the upper level."
        )
        write_page("balance", "Balance of 10 % samples of a long-tailed pool", "\n\n".join([*parts, notes]))


if __name__ == "__main__":
    main()
