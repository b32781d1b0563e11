"""Measure the toolkit on one GPU in at most twelve minutes, and write benchmarks/results/gpu.md as figures come.

    python benchmarks/gpu.py                              # in a checkout; what it depends on comes from wheels
    python benchmarks/gpu.py --minutes 9 --output out --official dinov2/  # beside github.com/facebookresearch/dinov2
    python benchmarks/gpu.py --rehearse --output /tmp/a   # on a CPU, with tiny models: says nothing of GPUs

Each part has a process and a time limit of its own: one that fails or takes too long is a line on the page. The exit
status is 0 when all parts ended, 1 otherwise or without a GPU. Aims: no synchronisation in a step; MFU of 25 % for
ViT-S/16, 45 % for ViT-L/16, 50 % for embedding with ViT-B/14.
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

import torch

from dinov2_toolkit.benchmarks.measured import RESULTS, table

Row = dict[str, str]

MODULE = "dinov2_toolkit.benchmarks.gpu_parts"
MINUTES = 12.0
NAMES = ("torch", "triton", "numpy", "faiss-gpu", "faiss-cpu", "accelerate")  # of packages whose version is said
POLL_S = 0.1
ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Unsupported|Exit)\b")  # how the last line of a traceback begins


class Part(NamedTuple):
    """A part of the benchmark: its name in gpu_parts.py, its title, and its share of the time."""

    name: str
    title: str
    seconds: float  # of twelve minutes


PARTS = (
    Part("tests", "Tests marked gpu", 140),
    Part("run", "A run of vits16-1gpu from files", 120),
    Part("step-S", "Training steps on random crops, ViT-S/16", 85),
    Part("step-L", "Training steps on random crops, ViT-L/16", 100),
    Part("step-B", "Training steps on random crops, ViT-B/16", 80),
    Part("embedding", "Embedding", 45),
    Part("search", "Neighbour search", 35),
    Part("pixels", "Verification of copies by their pixels", 35),
    Part("official", "The official code's steps, without compile", 80),
)


@dataclass
class Page:
    """What is measured so far, as a page that is written after each row."""

    path: Path
    head: str
    rows: dict[str, list[Row]] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)  # how a part ended

    def write(self) -> None:
        """Write the page, aside and renamed."""
        parts = [self.head]
        for part in PARTS:
            parts += [f"## {part.title}", *tables(self.rows.get(part.name, []))]
            parts += [self.ends.get(part.name, "Not ended." if part.name in self.rows else "Not measured.")]
        temporary = self.path.with_suffix(".new")
        temporary.write_text("\n\n".join(parts) + "\n")
        temporary.rename(self.path)


def tables(rows: list[Row]) -> list[str]:
    """Return a table of the rows, with all of their columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [table(columns, [[row.get(name, "") for name in columns] for row in rows])] if rows else []


def main() -> int:
    """Run all parts; return 0 when each of them ended."""
    args = parse_arguments()
    if not args.rehearse and not torch.cuda.is_available():
        found = f"torch {torch.__version__} finds no GPU"
        print(f"{found}: nothing is measured; --rehearse runs all parts on a CPU", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, stopped)
    deadline = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    page = Page(args.output / ("gpu-rehearsal.md" if args.rehearse else "gpu.md"), head(args.rehearse))
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            limit = min(part.seconds * args.minutes / MINUTES, deadline - time.monotonic())
            words = [sys.executable, "-m", MODULE, part.name, "--device", "cpu" if args.rehearse else "cuda"]
            words += ["--scratch", scratch, "--output", str(args.output), "--seconds", f"{max(limit, 1):.0f}"]
            words += ["--official", str(args.official.resolve())] if args.official else []
            page.ends[part.name] = run_part(page, part.name, words, limit)
            page.write()
            print(f"{part.title}: {page.ends[part.name]}", file=sys.stderr)
    print(page.path)
    return int(any(not page.ends[part.name].startswith("Ended") for part in parts))


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all; default 12")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the page and the trace")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="the official code, to be timed too")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--rehearse", action="store_true", help="run all parts on a CPU with tiny models")
    return parser.parse_args()


def stopped(number: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C, so that the part in progress is ended too."""
    raise SystemExit(128 + number)


def run_part(page: Page, name: str, words: list[str], limit: float) -> str:
    """Run a part's command for so many seconds at most, its rows written as they come; return how it ended."""
    if limit <= 0:
        return "Not measured: no time was left."
    start = time.monotonic()
    with (
        tempfile.NamedTemporaryFile("w") as printed,
        tempfile.TemporaryFile("w+") as errors,
        open(printed.name) as rows,
    ):
        process = subprocess.Popen(words, stdout=printed, stderr=errors, start_new_session=True)
        try:
            is_over = False
            while not is_over:
                time.sleep(POLL_S)
                is_over = process.poll() is not None or time.monotonic() > start + limit
                for row in new_rows(rows):
                    page.rows.setdefault(name, []).append(row)
                    page.write()
        finally:
            with suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        seconds = time.monotonic() - start
        if seconds > limit:
            return f"Stopped after its {limit:.0f} s: what is not above was not measured."
        if status:
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["no message"]
            print("\n".join(said[-30:]), file=sys.stderr)
            reason = next(filter(ERROR.match, reversed(said)), said[-1])
            return f"Failed after {seconds:.0f} s with status {status}: `{reason[:300].replace('`', '')}`"
        return f"Ended after {seconds:.0f} s."


def new_rows(file: TextIO) -> Iterator[Row]:
    """Yield the rows that a part has printed since the last call; what is no row is passed over."""
    place = file.tell()
    while (line := file.readline()).endswith("\n"):
        place = file.tell()
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row
    file.seek(place)  # the beginning of a line


def head(is_rehearsal: bool) -> str:
    """Return the page's beginning: machine, versions, date, command."""
    versions = [f"Python {platform.python_version()}"]
    for name in NAMES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    where = f"{os.cpu_count()} cores of a CPU"
    if not is_rehearsal:
        properties = torch.cuda.get_device_properties(0)
        where = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {where}"
    title = "# Rehearsal on a CPU: nothing here says anything of a GPU" if is_rehearsal else "# On one GPU"
    command = " ".join(["python", "benchmarks/gpu.py", *(Path(word).name or word for word in sys.argv[1:])])
    text = f"{title}\n\n{where}; {', '.join(versions)}. {datetime.date.today()}. `{command}`\n\n"
    return text + (
        "MFU is model FLOP utilisation: the operations that a step needs over the data sheet's peak for bfloat16.\n"
        "Random crops lie on the device; `A run` decodes, copies and augments images as training does."
    )


if __name__ == "__main__":
    sys.exit(main())
