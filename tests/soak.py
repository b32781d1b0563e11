"""Kill the pipeline's commands at random moments for hours, while another process reads what they write.

    make soak HOURS=1        or        python tests/soak.py --hours 1 --seed 7

Every command runs undisturbed once. Then, round by round, each is killed at a random moment (SIGKILL to its processes,
sometimes SIGTERM or SIGINT), run again, perhaps killed again, and at last left alone. A round ends with the files and
the catalog of the undisturbed one, byte for byte but for clocks, and with nothing left behind. All the time a reader
opens every manifest, and lists and verifies the catalog. Prints a line a minute; exits with 1 on any difference.
"""

import argparse
import fcntl
import importlib
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from io import StringIO
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow.parquet as pq

import dinov2_toolkit
from dinov2_toolkit.__main__ import main as run_command
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage.catalog import list_artifacts, verify

DATA = Path(dinov2_toolkit.__file__).parent / "examples" / "data"
TINY = "--recipe tiny --resume --set depth=2 --set batch_size=16 --set checkpoint_every=3 --set keep_checkpoints=2 "
TINY += "--set log_every=1 --set num_workers=1 --set mixed_precision=no"
PIPELINE = {
    "embed": "curate embed ../images -o pool.parquet --model pixels",
    "embed queries": "curate embed ../queries -o queries.parquet --model pixels --role queries",
    "dedup": "curate dedup pool.parquet -o unique.parquet --threshold 0.97 --sheet groups.png",
    "cluster": "curate cluster unique.parquet -o balanced.parquet --num-clusters 20,5 --sample 90",
    "retrieve": "curate retrieve --queries queries.parquet --pool unique.parquet --k 2 -o retrieved.parquet",
    "union": "curate union retrieved.parquet balanced.parquet -o curated.parquet",
    "map": "curate map curated.parquet -o map.parquet --html map.html",
    "sql": "catalog sql select|*|from|'pool.parquet'|where|width|>|20 -o wide.parquet",
    "pretrain": f"train pretrain curated.parquet -o runs/first {TINY} --set steps=12",
    "pretrain by two": f"train pretrain curated.parquet -o runs/two {TINY} --set steps=8 --num-processes 2",
    "embed by the run": "curate embed ../images -o features.parquet --model runs/first",
    "distill": f"train distill curated.parquet -o runs/small --teacher runs/first {TINY} --set steps=9",
    "probe": "evaluate probe --model runs/first --train ../images --test ../queries -o scores.parquet",
    "pca": "evaluate pca ../queries --model runs/first --limit 4 -o pca.png",
    "neighbors": "evaluate neighbors ../queries --pool pool.parquet --limit 4 -o neighbors.png",
    "export": "export runs/first --to official -o first.pth",
    "report": "report curated.parquet scores.parquet -o report.html",
    "rebuild": "catalog rebuild .",
    "gc": "catalog gc",
}
TO_END = [signal.SIGTERM, signal.SIGINT]
SIGNALS = [signal.SIGKILL] * 4 + TO_END
ENDS = (0, 75, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)  # of a command that gets one of them
CLOCKS = ("provenance.json", "status.json", "checksums.json", ".lock")  # whose content differs between equal runs
CLOCK_COLUMNS = {"images_per_s", "data_wait", "peak_memory_mib"}  # of the metrics
UNFINISHED = (".tmp", "progress-", "embed-", ".damaged-", "clustering-", "spill")  # and locks, but those of runs
PATIENCE_S = 300.0  # a command that takes longer hangs


def main() -> None:
    """Soak for as long as asked, and say what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for module in pkgutil.walk_packages(dinov2_toolkit.__path__, "dinov2_toolkit."):  # once for all forked commands
        if module.name.split(".")[1] not in ("tests", "benchmarks", "examples", "__main__"):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ |= {"OMP_NUM_THREADS": "1", "DINOV2_CATALOG": f"{folder}/work/.dinov2/catalog.duckdb"}
        problems = soak(Path(folder), asked.hours * 3600, asked.seed)
    for problem in problems:
        print(f"difference: {problem}")
    raise SystemExit(1 if problems else 0)


def soak(folder: Path, seconds: float, seed: int) -> list[str]:
    """Run rounds in a folder until the time is over; return what differed."""
    write_images(folder)
    (folder / "work").mkdir()
    os.chdir(folder / "work")
    chance, counts, problems = random.Random(seed), Counter[str](), list[str]()
    durations = {}
    for name, command in PIPELINE.items():
        start = time.monotonic()
        code, said = ended(started(command))
        durations[name] = time.monotonic() - start
        if code != 0:
            return [f"{name}, undisturbed: exit code {code}: {said}"]
    expected = state()
    reader = multiprocessing.get_context("fork").Process(target=read_always, args=(folder,))
    reader.start()
    begin = last = time.monotonic()
    try:
        while time.monotonic() - begin < seconds:
            with readers_wait(folder):
                shutil.rmtree(folder / "work")
                (folder / "work").mkdir()
                os.chdir(folder / "work")
            for name, command in PIPELINE.items():
                problems += killed_and_run_again(name, command, durations, chance, counts)
                if time.monotonic() - last > 60:
                    last = time.monotonic()
                    print(summary(folder, last - begin, counts, problems, seed), flush=True)
            found = state()
            differing = sorted(file for file in expected | found if expected.get(file) != found.get(file))
            problems += [f"round {counts['rounds']}: {file} is not as undisturbed" for file in differing]
            counts["rounds"] += 1
    finally:
        reader.kill()
        reader.join()
        problems += read(folder / "problems")
    print(summary(folder, time.monotonic() - begin, counts, problems, seed), flush=True)
    return problems


def killed_and_run_again(
    name: str, command: str, durations: dict[str, float], chance: random.Random, counts: Counter[str]
) -> list[str]:
    """Kill a command up to three times, then let it end; return what went wrong."""
    problems = []
    for _ in range(chance.randint(1, 3)):
        number, wait_s = chance.choice(SIGNALS), chance.uniform(0, 1.2 * durations[name])
        process = started(command)
        process.join(wait_s)
        if process.is_alive():
            sent(process, number)
            counts["kills"] += 1
        code, said = ended(process)
        if code not in ENDS and not is_busy(said):
            problems.append(f"{name}, {signal.Signals(number).name} after {wait_s:.2f} s: exit code {code}: {said}")
    start = time.monotonic()
    while True:
        counts["runs"] += 1
        code, said = ended(started(command))
        if not is_busy(said) or time.monotonic() - start > PATIENCE_S:
            break
        time.sleep(0.5)  # processes whose launcher was killed are ending
    durations[name] = (durations[name] + time.monotonic() - start) / 2
    return problems if code == 0 else [*problems, f"{name}, after kills: exit code {code}: {said}"]


def is_busy(said: str) -> bool:
    """Tell whether a command ended because a process of an earlier one is still there."""
    return "another process is" in said


def started(command: str, stdout: str = os.devnull) -> BaseProcess:
    """Start `dinov2` with these arguments, | standing for a space, in a process group of its own."""

    def run() -> None:
        os.setsid()
        for number in TO_END:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open("../said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["dinov2", *(argument.replace("|", " ") for argument in command.split())]
        run_command()

    process = multiprocessing.get_context("fork").Process(target=run)
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_END)  # until it handles them itself
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
    return process


def sent(process: BaseProcess, number: int) -> None:
    """Send a signal to a command and all that it has started in its group."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has no group yet
            os.kill(process.pid, number)


def ended(process: BaseProcess) -> tuple[int | None, str]:
    """Wait for a command; return its exit code and the last line that it said."""
    process.join(PATIENCE_S)
    if process.is_alive():
        sent(process, signal.SIGKILL)
        process.join()
        return None, "it hangs"
    lines = Path("../said").read_text(errors="replace").splitlines() if Path("../said").exists() else []
    return process.exitcode, lines[-1] if lines else ""


def state() -> dict[str, object]:
    """Return all that the work has left: contents by file, rows of the catalog, and what should be gone."""
    rows = Path("../rows")
    code, said = ended(started("catalog sql select|kind,|path|from|artifacts|order|by|all", str(rows)))
    verified = ended(started("catalog verify"))[0]
    found: dict[str, object] = {"catalog": rows.read_text() if code == 0 else said, "verified": verified}
    for path in sorted(Path().rglob("*")):
        name = str(path)
        if any(mark in name for mark in UNFINISHED) or (name.endswith(".lock") and path.name != ".lock"):
            found[f"left behind: {name}"] = True
        elif path.is_file() and path.parts[0] != ".dinov2" and not is_earlier(path):
            found[name] = content(path)
    return found


def is_earlier(path: Path) -> bool:
    """Tell whether a file is of a checkpoint before the last: a signal adds one, in the place of an older one."""
    steps = [folder for folder in path.parents if folder.name.startswith("step-")]
    return bool(steps) and steps[0] != max(steps[0].parent.glob("step-*"))


def content(path: Path) -> object:
    """Return what must be equal of a file."""
    if path.name in CLOCKS:
        return None
    if path.name == "metrics.parquet":
        return pq.read_table(path, use_threads=False).drop_columns(sorted(CLOCK_COLUMNS)).to_pylist()
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in CLOCK_COLUMNS} for line in lines]
    return path.read_bytes()


def read_always(folder: Path) -> None:
    """Read all that stands in the work folder, again and again; note what cannot be read."""
    num_reads, parent = 0, os.getppid()
    while os.getppid() == parent:
        with readers_wait(folder, fcntl.LOCK_SH):
            os.chdir(folder / "work")
            for path in [*Path().glob("*.parquet"), *Path("runs").glob("*/metrics.parquet")]:
                try:
                    pq.ParquetFile(path, memory_map=False).read(use_threads=False).validate(full=True)
                    num_reads += 1
                except FileNotFoundError:
                    pass
                except Exception as problem:  # whatever it is, it is a find
                    note(folder, f"{path} cannot be read: {problem}")
            for path in Path().rglob("*.json"):
                with suppress(FileNotFoundError):
                    if "/." not in f"/{path}" and not path.read_bytes().rstrip().endswith(b"}"):
                        note(folder, f"{path} is not whole")
                    num_reads += 1
            for what in (partial(list_artifacts, None, True), partial(verify, [], True)):
                try:
                    with redirect_stdout(StringIO()):
                        what()
                    num_reads += 1
                except ToolkitError as problem:
                    note(folder, f"the catalog: {problem}")
        (folder / "reads").write_text(str(num_reads))
        time.sleep(1)


def note(folder: Path, problem: str) -> None:
    """Keep a problem that the reader found."""
    with (folder / "problems").open("a") as file:
        file.write(f"reader: {' '.join(problem.split())}\n")


@contextmanager
def readers_wait(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Keep reader and the emptying of the work folder apart."""
    with (folder / "turn").open("w") as file:
        fcntl.flock(file, kind)
        yield


def summary(folder: Path, seconds: float, counts: Counter[str], problems: list[str], seed: int) -> str:
    """Return a line of figures."""
    reads = "".join(read(folder / "reads")) or "0"
    found = [*problems, *read(folder / "problems")]
    left = sum("left behind" in problem for problem in found)
    figures = f"{counts['kills']:,} kills, {counts['runs']:,} reruns, {int(reads):,} reads, {counts['rounds']:,} rounds"
    return f"{seconds / 60:.0f} min: {figures}; {len(set(found))} differences, {left} files left; seed {seed}"


def read(path: Path) -> list[str]:
    """Return the lines of a file, none where there is none."""
    return path.read_text().splitlines() if path.exists() else []


def write_images(folder: Path) -> None:
    """Write real images into folders by class: 200 to curate, 40 for queries."""
    rows = pq.read_table(DATA / "fashion_pool.parquet", columns=["image", "label"]).slice(0, 240).to_pylist()
    for number, row in enumerate(rows):
        path = folder / ("images" if number < 200 else "queries") / str(row["label"]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    (folder / "images" / "broken.png").write_text("no image")


if __name__ == "__main__":
    main()
