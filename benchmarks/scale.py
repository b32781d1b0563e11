"""Run the commands of curation on millions of vectors: time and memory of dedup, cluster and retrieve.

    python benchmarks/scale.py --rows 3000000 --memory 3GB --folder out/3m

Pool and 10,000 queries are made by synthetic.py. A stopped run resumes in its folder; of a step that was
interrupted, the table has only the last part.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import dinov2_measured, made_folder, write_result
from dinov2_toolkit.benchmarks.synthetic import write
from dinov2_toolkit.features.threads import num_cores
from dinov2_toolkit.store.manifest import open_manifest

QUERIES = 10_000
STEPS = {
    "dedup": "dedup pool.parquet -o unique.parquet",
    "cluster": "cluster unique.parquet -o sample.parquet --num-clusters 5000,100 --sample {sample}",
    "retrieve": "retrieve --queries queries.parquet --pool unique.parquet -o near.parquet --k 4",
}
OUTPUTS = {"dedup": "unique.parquet", "cluster": "sample.parquet", "retrieve": "near.parquet"}


def main() -> None:
    """Run the steps that are not done and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--sample", type=int, default=1_000_000, help="images that cluster draws")
    parser.add_argument("--memory", default="3GB", help="of the commands")
    parser.add_argument("--folder", type=made_folder, required=True, help="where everything is kept: 2.4 kB per row")
    args = parser.parse_args()
    folder: Path = args.folder
    os.environ["DINOV2_CATALOG"] = str(folder / "catalog.duckdb")
    for name, num_rows, seed in (("pool", args.rows, 0), ("queries", QUERIES, 1)):
        if not (folder / f"{name}.parquet").exists():
            write(folder / f"{name}.parquet", num_rows, seed=seed)

    costs_file = folder / "steps.json"
    done: dict[str, dict[str, float]] = json.loads(costs_file.read_text()) if costs_file.exists() else {}
    for name, words in STEPS.items():
        if name not in done:
            arguments = words.format(sample=min(args.sample, args.rows // 3)).split()
            _, cost = dinov2_measured(folder, "curate", *arguments, "--memory", args.memory)
            done[name] = {**asdict(cost), "rows": open_manifest(folder / OUTPUTS[name]).num_rows}
            costs_file.write_text(json.dumps(done))

    rows = []
    for name, part in done.items():
        minutes = [f"{part[key] / 60:.1f}" for key in ("wall_s", "cpu_s")]
        rows.append((f"`curate {name}`", f"{int(part['rows']):,}", *minutes, f"{part['peak_mb']:.0f}"))
    total = [sum(part[key] for part in done.values()) / 60 for key in ("wall_s", "cpu_s")]
    rows.append(
        ("all", "", f"{total[0]:.1f}", f"{total[1]:.1f}", f"{max(part['peak_mb'] for part in done.values()):.0f}")
    )
    notes = (
        f"`--memory {args.memory}`, `--num-clusters 5000,100`, {QUERIES:,} queries, k = 4, threads: {num_cores()};"
        " cells and centroids are computed in the run. Peak memory is the largest resident size, with pages of mapped"
        " files, which the system can reclaim."
    )
    header = ("", "rows written", "wall minutes", "CPU minutes", "peak MB")
    write_result(f"scale_{args.rows // 1_000_000}m", f"Curation of {args.rows:,} x 384", header, rows, notes)


if __name__ == "__main__":
    main()
