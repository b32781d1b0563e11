"""Time commands alone and beside a busy program, with threads that spin while they wait and with threads that sleep.

    python benchmarks/busy.py --folder out/busy

"spin": threads wait as the libraries let them by default. "sleep": as the toolkit sets it (cores.py). "one": a single
thread. Each way is a process that has run every command once; then all is run in turn. Seconds are without the start
of Python, and the least of the repeats. The busy program is a loop of Python on one core, or a second training.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dinov2_toolkit import cores
from dinov2_toolkit.benchmarks.measured import FASHION_POOL, FASHION_PROBE, dinov2, made_folder, write_result

DEFAULTS = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200", "OPENBLAS_THREAD_TIMEOUT": "26"}  # of the libraries
WAYS = {"spin": DEFAULTS, "sleep": cores.WAITING, "one": {**cores.WAITING, "OMP_NUM_THREADS": "1"}}
SOURCES = {"pool": FASHION_POOL, "train": FASHION_PROBE[0], "test": FASHION_PROBE[1]}
PROBE = "evaluate probe --train ../train.parquet --test ../test.parquet -o scores.parquet --method"
EMBED, POOL = f"curate embed {FASHION_PROBE[0]}", "../pool.parquet"
TRAINING = f"train pretrain {FASHION_POOL} --recipe tiny --set batch_size=32"
COMMANDS = {
    "`evaluate probe --method linear`, 1,000 + 2,000 images": f"{PROBE} linear",
    "`evaluate probe --method logreg`": f"{PROBE} logreg",
    "`evaluate probe --method knn`": f"{PROBE} knn",
    "`curate embed`, ViT-Ti/14, 1,000 of 28 px": f"{EMBED} -o vit.parquet --model random:vit_tiny --image-size 28",
    "`curate dedup --no-verify`, 12,000 images": f"curate dedup {POOL} -o unique.parquet --threshold 0.9 --no-verify",
    "`curate cluster --num-clusters 500,20`": f"curate cluster {POOL} -o clusters.parquet --num-clusters 500,20",
    "`curate retrieve`, 1,000 queries": f"curate retrieve --queries ../train.parquet --pool {POOL} -o near.parquet",
    "`train pretrain --recipe tiny`, batch 32, 5 steps": f"{TRAINING} -o run --set steps=5",
}
NEIGHBOURS = ("nothing", "a loop", "a training")
START_S = 120.0  # chosen: how long a second training may take until it trains


def words(command: str) -> list[str]:
    """Return the words of a command line of the toolkit, with what all of them have."""
    return [*shlex.split(command), "--force", "-q"]


def serve() -> None:
    """Run the commands that the lines of stdin are, and print the seconds of each."""
    cores.prepare()
    from dinov2_toolkit.cli import app

    printed = os.dup(1)
    os.dup2(2, 1)  # what the commands print
    for command in sys.stdin:
        start = time.monotonic()
        app(words(command), standalone_mode=False)
        os.write(printed, f"{time.monotonic() - start}\n".encode())


@contextmanager
def server(folder: Path, way: dict[str, str]) -> Iterator[Callable[[str], float]]:
    """Yield a function that runs a command in a process of its own and returns its seconds."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, **way, "DINOV2_CATALOG": str(folder / "catalog.duckdb")}
    words = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def run(command: str) -> float:
            print(command, file=asked, flush=True)
            return float(answers.readline())

        yield run
        asked.close()


@contextmanager
def neighbour(kind: str, folder: Path) -> Iterator[None]:
    """Keep a program busy beside the block, in a session of its own as from another terminal."""
    if kind == "nothing":
        yield
        return
    program = ["-c", "while True: pass"]
    if kind == "a training":
        program = ["-m", "dinov2_toolkit", *words(f"{TRAINING} -o other --set steps=1_000_000")]
    environment = {**os.environ, "DINOV2_CATALOG": str(folder / "other.duckdb")}
    metrics = folder / "other" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, *program], cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        try:
            start = time.monotonic()
            while kind == "a training" and not (metrics.exists() and metrics.stat().st_mtime > time.time() - 5):
                if process.poll() is not None or time.monotonic() - start > START_S:
                    raise SystemExit("the second training does not start")
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGKILL)


def main() -> None:
    """Time everything in turn and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where everything is kept")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--beside", nargs="*", choices=NEIGHBOURS, default=NEIGHBOURS, help="default all")
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="commands with one of the words")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="default all")
    args = parser.parse_args()
    folder: Path = args.folder
    commands = {name: command for name, command in COMMANDS.items() if any(word in name for word in args.only)}
    for name, source in SOURCES.items():
        if not (folder / f"{name}.parquet").exists():
            dinov2(folder, *f"curate embed {source} -o {name}.parquet --model pixels -q".split())
    chosen = {way: WAYS[way] for way in args.ways}
    with ExitStack() as stack:
        ways = {way: stack.enter_context(server(folder / way, settings)) for way, settings in chosen.items()}
        taken: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        loads = [os.getloadavg()[0]]
        for number in range(args.repeats + 1):
            for name, command in commands.items():
                for kind in args.beside if number else ("nothing",):
                    with neighbour(kind, folder):
                        for way, run in ways.items():
                            seconds = run(command)
                            if number:  # the first time, libraries are imported
                                taken[name, kind, way].append(seconds)
                            loads.append(os.getloadavg()[0])
                            print(f"{name}, {kind}, {way}: {seconds:.2f} s, load {loads[-1]:.1f}", file=sys.stderr)

    header = ["", *(f"beside {kind}: {way}" for kind in args.beside for way in chosen)]
    rows = []
    for name in commands:
        cells = []
        for kind in args.beside:
            for way in chosen:
                least, alone = min(taken[name, kind, way]), min(taken[name, "nothing", way], default=0)
                cells.append(f"{least:.2f}" + (f" ({least / alone:.1f} x)" if alone and kind != "nothing" else ""))
        rows.append([name, *cells])
    notes = (
        "Seconds; in brackets as multiples of those beside nothing. The load of the machine was"
        f" {min(loads):.1f} to {max(loads):.1f}: what is more than the command and its neighbour is other programs."
    )
    write_result("busy", "Commands beside a busy program", header, rows, notes)


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
