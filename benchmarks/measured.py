"""What a benchmark measures and writes down: time, memory, the machine, a table."""

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
K = 20  # neighbours of a k-NN score


@dataclass
class Measure:
    """Seconds of the clock and of all cores, of a block."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def measured() -> Iterator[Measure]:
    """Yield what is filled in when the block ends."""
    measure, wall, cpu = Measure(), time.perf_counter(), time.process_time()
    yield measure
    measure.wall_s, measure.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


def peak_mb() -> float:
    """Return the most memory that this process had resident so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """Return the processor, its cores, and the versions that matter, as one line."""
    import faiss
    import numpy
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = f"Python {platform.python_version()}, numpy {numpy.__version__}, torch {torch.__version__}"
    versions += f", faiss {faiss.__version__}"
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; {versions}"


def in_a_process(*arguments: str) -> str:
    """Run this script again with other arguments and return the last line it prints: memory is then its own."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def dinov2(folder: Path, *arguments: str, threads: int | None = None) -> str:
    """Run a command of the toolkit in a folder, with a catalog of its own, and return its stdout."""
    environment = {**os.environ, "DINOV2_CATALOG": str(folder / "catalog.duckdb")}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    words = [sys.executable, "-m", "dinov2_toolkit", *arguments]
    return subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def probed(
    folder: Path, sets: tuple[Path, Path], models: Sequence[str], methods: Sequence[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Score models by `evaluate probe` on a training and a test set; return the best of each (model, method).

    Scores are top-1; k-NN's is that of k = 20.
    """
    named = [word for model in models for word in ("--model", model)]
    named += [word for method in methods for word in ("--method", method)]
    named += ["--train", str(sets[0]), "--test", str(sets[1]), "-o", "scores.parquet", "--json", "--force", "-q"]
    rows = json.loads(dinov2(folder, "evaluate", "probe", *named))["rows"]
    wanted = [row for row in rows if row["metric"] == "top1" and row["parameters"].get("k", K) == K]
    return {(row["model"], row["method"]): row for row in sorted(wanted, key=lambda row: float(row["value"]))}


def write_result(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], notes: str) -> None:
    """Print a table and write it to results/NAME.md with machine, versions, date and command."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    table = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    table += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    print("\n".join(table))
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    text = f"# {title}\n\n" + "\n".join(table) + f"\n\n{notes}\n\n"
    text += f"{machine()}. {datetime.date.today()}, load at the end {load}. `{command}`\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
