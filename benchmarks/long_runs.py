"""Watch two long runs: a million small images through `curate embed`, and 3,000 steps of `train pretrain`.

    apt install dataset-fashion-mnist
    python benchmarks/long_runs.py --folder out/long

Every few seconds the whole process tree is looked at: memory (PSS: what processes share counts once), open
descriptors, threads, processes, and what lies in the cache and the catalog. Slopes are of the second half of each run,
rates of its first and last tenth. With the same folder what was watched already is not run again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dinov2_toolkit.benchmarks.measured import FASHION_PROBE, assignments, made_folder, table, write_page
from dinov2_toolkit.examples.build_data import Split, encode, read_split

ROWS_A_FILE, ROWS_A_GROUP = 25_000, 5_000  # more files than are kept open at a time
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VARIANTS = [(x, y, is_flipped) for is_flipped in (False, True) for y in (0, 1, -1) for x in (0, 1, -1)]
PROGRESS = re.compile(
    r"^(?P<phase>[\w ]+): (?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<unit>\w+), [\d,.]+ \w+/s, (?P<left_s>\d+) s left"
)
GAUGES = {  # what is measured, and how an hour's growth of it is written
    "pss_mb": "memory, MB",
    "descriptors": "open descriptors",
    "threads": "threads",
    "processes": "processes",
    "cache_mb": "cache on disk, MB",
    "catalog_mb": "catalog, MB",
}
TICKS = os.sysconf("SC_CLK_TCK")  # a second, in /proc

Sample = dict[str, float]  # s: seconds since the start; cpu_s: of all processes so far; and GAUGES
Line = dict[str, str | float]  # of progress: s, and the groups of PROGRESS


def write_images(folder: Path, images: Path, count: int) -> None:
    """Write `count` PNG files of 28 px, all different, as rows of Parquet files: clothes, shifted, mirrored."""
    splits = [read_split(images, name) for name in ("train", "t10k")]
    folder.mkdir(exist_ok=True)
    for first in range(0, count, ROWS_A_FILE):
        rows = range(first, min(first + ROWS_A_FILE, count))
        table = pa.table({"image": pa.array(map(lambda row: encoded(splits, row), rows), IMAGE)})
        pq.write_table(table, folder / f"{first // ROWS_A_FILE:03}.parquet", row_group_size=ROWS_A_GROUP)


def encoded(splits: list[Split], row: int) -> dict[str, object]:
    """Return one image of the pool: a picture of Fashion-MNIST, in the variant that this pass over them is at."""
    pixels = [split.images for split in splits]
    number, picture = divmod(row, sum(map(len, pixels)))
    x, y, is_flipped = VARIANTS[number]
    split, place = (0, picture) if picture < len(pixels[0]) else (1, picture - len(pixels[0]))
    values = np.roll(pixels[split][place], (y, x), axis=(0, 1))
    return {"bytes": encode(Image.fromarray(values[:, ::-1] if is_flipped else values)), "path": f"{row}.png"}


def watched(folder: Path, arguments: list[str], every_s: float) -> tuple[list[Sample], list[Line]]:
    """Run a command of the toolkit in a folder; return what its processes had, and its lines of progress."""
    environment = {**os.environ, "DINOV2_CATALOG": str(folder / ".dinov2" / "catalog.duckdb")}
    words = [sys.executable, "-m", "dinov2_toolkit", *arguments]
    start, samples, lines = time.monotonic(), list[Sample](), list[Line]()
    with subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=follow, args=(process.stderr, start, lines))
        reader.start()
        while process.poll() is None:
            with suppress(FileNotFoundError, ProcessLookupError):  # one has just ended
                samples.append({"s": time.monotonic() - start, **gauges(process.pid, folder)})
            with suppress(subprocess.TimeoutExpired):
                process.wait(every_s)
        reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {process.returncode}")
    samples.append({"s": time.monotonic() - start})
    return samples, lines


def follow(stream: IO[str], start: float, lines: list[Line]) -> None:
    """Pass on what a command says, and collect its lines of progress."""
    for text in stream:
        sys.stderr.write(text)
        if found := PROGRESS.search(text):
            numbers = {name: float(found[name].replace(",", "")) for name in ("done", "total", "left_s")}
            lines.append({"s": time.monotonic() - start, "phase": found["phase"], "unit": found["unit"], **numbers})


def gauges(root: int, folder: Path) -> Sample:
    """Return what a process and all below it have and took, and what it keeps on disk."""
    sample = dict.fromkeys(("pss_mb", "descriptors", "threads", "processes", "cpu_s"), 0.0)
    for process in tree(root):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended, and its parent may not have noticed
            pss = re.search(r"^Pss:\s+(\d+)", (process / "smaps_rollup").read_text(), re.MULTILINE)
            sample["pss_mb"] += int(pss[1]) / 1024 if pss else 0
            sample["descriptors"] += len(os.listdir(process / "fd"))
            sample["threads"] += len(os.listdir(process / "task"))
            sample["processes"] += 1
            times = (process / "stat").read_text().rpartition(")")[2].split()[11:15]  # its own, and of ended children
            sample["cpu_s"] += sum(map(int, times)) / TICKS
    cache, everything = size_mb(folder / ".dinov2" / "cache"), size_mb(folder / ".dinov2")
    return {**sample, "cache_mb": cache, "catalog_mb": everything - cache}


def tree(root: int) -> Iterator[Path]:
    """Yield the folder in /proc of a process, and of all that it and its children have started."""
    folder = Path("/proc") / str(root)
    yield folder
    for task in (folder / "task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def size_mb(folder: Path) -> float:
    """Return the size of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # as temporary files are
            total += path.stat().st_size
    return total / 2**20


def report(samples: list[Sample], lines: list[Line], phase: str) -> tuple[list[list[str]], str]:
    """Return the rows of the table of one run, and what is said of its rates."""
    said = [line for line in lines if line["phase"] == phase]
    done, at, left_s = (np.array([float(line[name]) for line in said]) for name in ("done", "s", "left_s"))
    total, unit, end = float(said[0]["total"]), said[0]["unit"], at[-1]
    inside = [sample for sample in samples if at[0] <= sample["s"] <= end]
    seconds = np.array([sample["s"] for sample in inside])
    is_late = seconds >= (at[0] + end) / 2

    rows = []
    for name, title in GAUGES.items():
        values = np.array([sample[name] for sample in inside])
        slope, error = slope_an_hour(seconds[is_late], values[is_late])
        halves = [f"{np.median(values[part]):,.0f}" for part in (~is_late, is_late)]
        rows.append([title, *halves, f"{values.max():,.0f}", f"{slope:+,.1f} (± {error:,.1f})"])

    # Rates: by the clock, and by the time of the processor, which other programs hardly change.
    cpu_s = np.interp(at, seconds, [sample["cpu_s"] for sample in inside])
    ends = [np.interp([done[0], done[0] + (done[-1] - done[0]) / 10], done, x) for x in (at, cpu_s)]
    late = [np.interp([done[-1] - (done[-1] - done[0]) / 10, done[-1]], done, x) for x in (at, cpu_s)]
    first, last = ([(done[-1] - done[0]) / 10 / np.ptp(x) for x in part] for part in (ends, late))
    # What is left when a line is said, as it is said and as it came: until the last line.
    is_half = done >= total / 2
    meant = left_s * (done[-1] - done) / np.maximum(total - done, 1)
    off = np.abs(at + meant - end)[is_half].max() / end
    note = (
        f"{total:,.0f} {unit} in {end / 60:.1f} minutes, the command in {samples[-1]['s'] / 60:.1f}."
        f" First tenth {first[0]:,.1f} {unit}/s, last tenth {last[0]:,.1f} ({last[0] / first[0]:.2f});"
        f" in a second of processor time {first[1]:,.1f} and {last[1]:,.1f} ({last[1] / first[1]:.2f})."
        f" In the second half the time that progress says is left is wrong by at most {off:.1%} of the run."
    )
    return rows, note


def slope_an_hour(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the slope of the least-squares line, an hour, and twice its standard error."""
    hours = (seconds - seconds.mean()) / 3600
    slope = float(hours @ (values - values.mean()) / (hours @ hours))
    residuals = values - values.mean() - slope * hours
    return slope, 2 * float(np.sqrt(residuals @ residuals / (len(hours) - 2) / (hours @ hours)))


def main() -> None:
    """Make the images, watch the runs that are not done, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000, help="to embed; default 1,000,000")
    parser.add_argument("--steps", type=int, default=3_000, help="of training; default 3,000")
    parser.add_argument("--batch-size", type=int, default=16, help="of training; default 16")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="between looks; default 10")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the IDX files")
    parser.add_argument("--folder", type=made_folder, required=True, help="where everything is kept: 2 kB an image")
    args = parser.parse_args()
    folder: Path = args.folder
    if not (folder / "images").exists():
        write_images(folder / "images.new", args.fashion, args.images)
        (folder / "images.new").rename(folder / "images")
    files = [str(path.relative_to(folder)) for path in sorted((folder / "images").iterdir())]
    train = ["train", "pretrain", files[0], "-o", "run", "--recipe", "tiny"]
    train += assignments({"steps": args.steps, "batch_size": args.batch_size})
    train += ["--eval-train", str(FASHION_PROBE[0]), "--eval-test", str(FASHION_PROBE[1])]
    runs = {
        "embedding": ["curate", "embed", *files, "-o", "pool.parquet", "--model", "pixels"],
        "training": train,
    }
    body = []
    for phase, arguments in runs.items():
        kept = folder / f"{phase}.json"
        if not kept.exists():
            kept.write_text(json.dumps(watched(folder, arguments, args.every)))
        samples, lines = json.loads(kept.read_text())
        rows, note = report(samples, lines, phase)
        header = (phase, "first half", "second half", "most", "growth an hour, second half")
        body.append(f"{table(header, rows)}\n\n{note}")
    print("\n\n".join(body))
    write_page("long_runs", "Long runs: memory, descriptors, threads and rates", "\n\n".join(body))


if __name__ == "__main__":
    main()
