"""The whole of curation at size, by the commands: dedup, cluster, retrieve, each with its time and memory.

    python benchmarks/scale.py --rows 3000000 --memory 3GB --folder out/3m

Pool and 10,000 queries are made by synthetic.py. A stopped run resumes in its folder; of a step that was
interrupted, only the last part is in the table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import write_result
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


def run(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Run a command in the folder to its end; return its seconds, processor seconds and peak memory in MB."""
    words = [sys.executable, "-m", "dinov2_toolkit", "curate", *arguments]
    start = time.monotonic()
    process = subprocess.Popen(words, cwd=folder, env={**os.environ, "DINOV2_CATALOG": str(folder / "catalog.duckdb")})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed: status {os.waitstatus_to_exitcode(status)}")
    return {"wall": time.monotonic() - start, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}


def main() -> None:
    """Run the steps that are not done and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--sample", type=int, default=1_000_000, help="images that cluster draws")
    parser.add_argument("--memory", default="3GB", help="of the commands")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept: 2.4 kB a row")
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["DINOV2_CATALOG"] = str(folder / "catalog.duckdb")
    for name, num_rows, seed in (("pool", args.rows, 0), ("queries", QUERIES, 1)):
        if not (folder / f"{name}.parquet").exists():
            write(folder / f"{name}.parquet", num_rows, seed=seed)

    taken = folder / "steps.json"
    done: dict[str, dict[str, float]] = json.loads(taken.read_text()) if taken.exists() else {}
    for name, words in STEPS.items():
        if name not in done:
            arguments = words.format(sample=min(args.sample, args.rows // 3)).split()
            done[name] = run(folder, [*arguments, "--memory", args.memory])
            done[name]["rows"] = open_manifest(folder / OUTPUTS[name]).num_rows
            taken.write_text(json.dumps(done))

    rows = []
    for name, part in done.items():
        minutes = [f"{part[key] / 60:.1f}" for key in ("wall", "cpu")]
        rows.append((f"`curate {name}`", f"{int(part['rows']):,}", *minutes, f"{part['peak']:.0f}"))
    total = [sum(part[key] for part in done.values()) / 60 for key in ("wall", "cpu")]
    rows.append(("all", "", f"{total[0]:.1f}", f"{total[1]:.1f}", f"{max(part['peak'] for part in done.values()):.0f}"))
    notes = (
        f"`--memory {args.memory}`, `--num-clusters 5000,100`, {QUERIES:,} queries, k = 4, threads: {num_cores()};"
        " cells and centroids are made anew. Peak memory is all that was resident at a time, pages of mapped files that"
        " can be given back included."
    )
    header = ("", "rows written", "wall minutes", "CPU minutes", "peak MB")
    write_result(f"scale_{args.rows // 1_000_000}m", f"Curation of {args.rows:,} x 384", header, rows, notes)


if __name__ == "__main__":
    main()
