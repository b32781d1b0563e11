"""Print the demo's results: scores, class balance, and how many planted near-copies were found."""

import sys
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

POOL = "data/fashion_pool.parquet"
NAMES = {
    "pixels": "raw pixels",
    "random:out/second": "the same ViT, untrained",
    "out/first": "first run, raw pool",
    "out/second": "second run, curated set",
    "out/distilled": "distilled student",
}


def score_rows(out: Path) -> list[list[str]]:
    """Return a row for each model: name, k-NN (k = 20) and linear accuracy, in percent with 95 % intervals."""
    query = """
        select model, method, value, low, high from read_parquet(?)
        where metric = 'top1' and (method <> 'knn' or parameters like '{"k": 20,%')
    """
    rows = duckdb.execute(query, [f"{out}/scores.parquet"]).fetchall()
    scores = {(model, method): [100 * score for score in values] for model, method, *values in rows}
    lines = []
    for model, name in NAMES.items():
        cells = [scores[model, method] for method in ("knn", "linear")]
        lines.append([name, *(f"{value:.1f} ({low:.1f} to {high:.1f})" for value, low, high in cells)])
    return lines


def balance(manifest: str) -> tuple[int, float, float]:
    """Return the number of images, the normalised class entropy, and the ratio of the largest to the smallest class."""
    query = """
        with classes as (select label, count(*) as n from read_parquet(?) group by label)
        select sum(n), entropy / log2(count(*)), max(n) / min(n)
        from classes, (select entropy(label) as entropy from read_parquet(?)) group by entropy
    """
    row = duckdb.execute(query, [manifest, manifest]).fetchone()
    assert row is not None
    return int(row[0]), float(row[1]), float(row[2])


def copies_found(out: Path) -> tuple[int, int, int]:
    """Return the numbers of planted copies that dedup found, of all planted copies, and of all removed images.

    A planted copy counts as found when it or its original was removed.
    """
    query = """
        with pool as (select image.path as path, planted_of, row_number() over () - 1 as row from read_parquet($pool)),
        removed as (
            select distinct pool.path from read_parquet($removed) as removed
            join pool on regexp_extract(removed.uri, 'row=(\\d+)', 1)::bigint = pool.row
        )
        select count(*) filter (path in (from removed) or planted_of in (from removed)), count(*),
               (select count(*) from removed)
        from pool where planted_of is not null
    """
    row = duckdb.execute(query, {"pool": POOL, "removed": f"{out}/unique.removed.parquet"}).fetchone()
    assert row is not None
    return int(row[0]), int(row[1]), int(row[2])


def main(out: Path) -> None:
    """Print the summary."""
    console = Console(width=100)
    scores = Table(title="Accuracy on 2,000 test images, percent (95 % interval)", title_justify="left")
    for name in ("features", "k-NN, k = 20", "linear"):
        scores.add_column(name)
    for line in score_rows(out):
        scores.add_row(*line)
    console.print(scores)

    sets = Table(title="Class balance, by labels that no step read", title_justify="left")
    for name in ("set", "images", "entropy (1 = even)", "largest / smallest class"):
        sets.add_column(name, justify="left" if name == "set" else "right")
    for name, manifest in (("raw pool", POOL), ("without copies", f"{out}/unique.parquet"),
                           ("balanced sample", f"{out}/balanced.parquet"), ("retrieved", f"{out}/retrieved.parquet"),
                           ("curated (both)", f"{out}/curated.parquet")):  # fmt: skip
        count, entropy, ratio = balance(manifest)
        sets.add_row(name, f"{count:,}", f"{entropy:.3f}", f"{ratio:.1f}")
    console.print(sets)

    found, planted, removed = copies_found(out)
    console.print(f"Near-copies: {found:,} of {planted:,} planted ones found, among {removed:,} images removed.")
    console.print(f"Pictures: {out}/pca.png (patch features), {out}/retrieved.png (what the seed images brought).")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
