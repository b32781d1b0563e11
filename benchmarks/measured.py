"""What the benchmarks share: data, commands of the toolkit, time and memory, pages of results."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT / "examples" / "data"
FASHION_POOL = DATA / "fashion_pool.parquet"
FASHION_PROBE = DATA / "fashion_probe_train.parquet", DATA / "fashion_probe_test.parquet"
K = 20  # neighbours of a k-NN score


@dataclass
class Measure:
    """Elapsed seconds, CPU seconds of all threads, and the largest resident memory, mapped files included."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def measured() -> Iterator[Measure]:
    """Measure the block; the figures are set when it ends, the memory since the process started."""
    measure, wall, cpu = Measure(), time.perf_counter(), time.process_time()
    yield measure
    measure.wall_s, measure.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    measure.peak_mb = peak_mb()


def peak_mb() -> float:
    """Return the largest resident memory of this process so far; unlike ru_maxrss without that of its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


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
    """Run this script again with other arguments, so that its memory is its own; return the last line it prints."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def dinov2(folder: Path, *arguments: str, threads: int | None = None) -> str:
    """Run a command of the toolkit in a folder, with a catalog of its own, and return its stdout."""
    return dinov2_measured(folder, *arguments, threads=threads)[0]


def dinov2_measured(folder: Path, *arguments: str, threads: int | None = None) -> tuple[str, Measure]:
    """Run a command as `dinov2` does; return its stdout and what it took."""
    environment = {**os.environ, "DINOV2_CATALOG": str(folder / "catalog.duckdb")}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    words = [sys.executable, "-m", "dinov2_toolkit", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed: status {process.returncode}")
    cost = Measure(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
    return printed, cost


def made_folder(path: str) -> Path:
    """Make the folder that a command line names, and return its absolute path."""
    folder = Path(path).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def assignments(settings: Mapping[str, object]) -> list[str]:
    """Return recipe settings as words of a command line."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


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
    """Print a table and write it to results/NAME.md, as `write_page` does."""
    lines = table(header, rows)
    print(lines)
    write_page(name, title, f"{lines}\n\n{notes}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""

    def line(values: Sequence[object]) -> str:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def write_page(name: str, title: str, body: str) -> None:
    """Write results/NAME.md: title, body, machine, versions, date and command."""
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    text = f"# {title}\n\n{body}\n\n"
    text += f"{machine()}. {datetime.date.today()}, load at the end {load}. `{command}`\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
