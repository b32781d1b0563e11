"""Print the demo's results: what was found in the raw pool, and how good the features are."""

import hashlib
import sys
from pathlib import Path

import duckdb
from raw_pool import DATA, UNWANTED
from rich.console import Console
from rich.table import Table

MODELS = {
    "pixels": "raw pixels",
    "random:out/second": "the same ViT, untrained",
    "out/first": "first run, raw pool",
    "out/second": "second run, curated set",
    "out/distilled": "distilled student",
}
SETS = {
    "readable": "readable, not blank",
    "unique": "without copies",
    "retrieved": "like a seed image",
    "balanced": "balanced sample of these",
    "curated": "curated: both, weighted",
}


def flow(out: Path) -> Table:
    """Return a row for each set, from the raw files to the curated images."""
    table = Table(title="From raw files to the curated set (labels are read for this table alone)")
    table.add_column("set")
    for name in ("images", "wanted, %", "evenness of the wanted kinds"):
        table.add_column(name, justify="right")
    files = [path.parent.name for path in (out / "raw").glob("*/*")]
    wanted = sum(label != UNWANTED for label in files) / len(files)
    table.add_row("raw files", f"{len(files):,}", f"{100 * wanted:.1f}", "")
    for stem, name in SETS.items():
        count, wanted, evenness = composition(out / f"{stem}.parquet")
        table.add_row(name, f"{count:,}", f"{100 * wanted:.1f}", f"{evenness:.3f}")
    return table


def composition(manifest: Path) -> tuple[int, float, float]:
    """Return the number of images, the share of wanted ones, and the entropy of their ten kinds (1: all alike)."""
    query = """
        select count(*), avg((label <> $unwanted)::int), entropy(label) filter (label <> $unwanted) / log2(10)
        from read_parquet($manifest)
    """
    row = duckdb.execute(query, {"manifest": str(manifest), "unwanted": UNWANTED}).fetchone()
    assert row is not None
    return row


def copies(out: Path) -> str:
    """Say how many planted copies were found: those of which the copy or its original was removed."""
    pool = duckdb.execute(
        "select image.path, image.bytes, planted_of from read_parquet(?)", [str(DATA / "fashion_pool.parquet")]
    ).fetchall()
    kept = {
        row[0] for row in duckdb.execute("select image_id from read_parquet(?)", [f"{out}/unique.parquet"]).fetchall()
    }
    removed = {path for path, content, _ in pool if hashlib.blake2b(content, digest_size=16).hexdigest() not in kept}
    planted = [(path, original) for path, _, original in pool if original is not None]
    found = sum(bool(removed.intersection(pair)) for pair in planted)
    return f"{found:,} of {len(planted):,} planted near-copies found, among {len(removed):,} clothes removed as copies."


def scores(out: Path) -> Table:
    """Return a row for each model: k-NN (k = 20) and linear accuracy, in percent with 95 % intervals."""
    table = Table(title="Accuracy of frozen features on 2,000 test images, % (95 % interval)")
    for name in ("features", "k-NN, k = 20", "linear"):
        table.add_column(name)
    query = """
        select model, method, value, low, high from read_parquet(?)
        where metric = 'top1' and (method <> 'knn' or parameters like '{"k": 20,%')
    """
    rows = duckdb.execute(query, [f"{out}/scores.parquet"]).fetchall()
    cells = {
        (model, method): f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        for model, method, value, low, high in rows
    }
    for model, name in MODELS.items():
        table.add_row(name, cells[model, "knn"], cells[model, "linear"])
    return table


def main(out: Path) -> None:
    """Print the summary."""
    console = Console(width=100)
    console.print(flow(out))
    console.print(copies(out))
    console.print(scores(out))
    console.print(f"Pages: {out}/report.html, {out}/map.html. Pictures: {out}/pca.png, {out}/retrieved.png.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
