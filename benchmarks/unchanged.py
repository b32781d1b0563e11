"""Whether a change of the code changed a result: what two installations' commands write, compared bit for bit.

    python benchmarks/unchanged.py --before ../before/.venv/bin/dinov2 --after .venv/bin/dinov2 --folder out/unchanged

Both run the demo's curation with one trained model and train the recipe `tiny` for 20 steps, and must write the same;
then the new one works on the old one's files: a run, a killed run, manifests, what the catalog is rebuilt from. A
command may be several words ('env PYTHONPATH=/some/folder dinov2'); PYTHONPATH and DINOV2_... of this process are not
passed on. `--small` takes 2,000 of the 12,000 images: some minutes on two cores. Exit status 1 if anything differs.

A column, metric or figure that only one of them writes is no difference, but is named. Where a name has changed, enter
it in RENAMED_COLUMNS or the tables after it. In the folder `before/` is kept for the next time, unless the commands
are others; `after/` is made anew.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

# Old name: new name, of columns of manifests and of metrics.
RENAMED_COLUMNS = {"weakest": "min_similarity_to_kept"}
RENAMED_FIGURES = {"looked_at": "pairs_verified", "unread": "pairs_unreadable", "limit": "max_difference"}
RENAMED_PARAMETERS = {  # of runs, in the catalog's JSON: each old text -> the present one
    '"koleo_gather":': '"koleo_distributed":',
    '"recompute": "nothing"': '"activation_checkpointing": "none"',
    '"split_views":': '"sequential_views":',
}
RENAMED_VALUES = {"for a second look": "for pixel verification"}  # of figures that are text

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
MEASURED = re.compile(r"_per_s$|_s$|_ms$|seconds|time|wait|_mib$|memory|duration")  # metrics of the machine
SMALL_ROWS = 2_000
SHOWN = 6  # differences on a line
TITLE_PX = 70  # height of a sheet's title
POLL_S = 0.005  # between two looks for a checkpoint; a step takes some 0.2 s

# What the commands write: their words. `-o` is added.
CURATION = {
    "copies.parquet": "curate embed {pool} --model copy",
    "pool.parquet": "curate embed {pool} --model {model}",
    "queries.parquet": "curate embed {queries} --model {model} --role queries",
    "unique.parquet": "curate dedup pool.parquet --features copies.parquet",
    "balanced.parquet": "curate cluster unique.parquet --num-clusters {clusters} --sample {sample}",
    "retrieved.parquet": "curate retrieve --queries queries.parquet --pool unique.parquet --k 4",
    "curated.parquet": "curate union balanced.parquet retrieved.parquet",
}
TRAINING = {
    "run": "train pretrain {pool} --recipe tiny --seed 0 --set steps=20 --set log_every=1 --set checkpoint_every=5",
}
LOOKS = {
    "scores.parquet": "evaluate probe --train {train} --test {test} --model {model} --method knn --method linear",
    "neighbors.png": "evaluate neighbors retrieved.parquet --queries queries.parquet --limit 12",
}
ON_OLD_FILES = ("unique.parquet", "balanced.parquet", "retrieved.parquet", "curated.parquet", *LOOKS)
FIRST_MODEL = "train pretrain {pool} --recipe tiny --set steps=60"  # where no run is given

Steps = Mapping[str, list[str]]


class Failed(Exception):
    """A command that did not end with status 0."""


@dataclass(frozen=True)
class Place:
    """An installation's command, where it runs, and its catalog."""

    name: str  # before or after
    command: list[str]
    folder: Path
    catalog: Path


@dataclass(frozen=True)
class Check:
    """What was compared, how much of it, what differs, and what only one side has."""

    name: str
    counted: str
    differences: list[str]
    one_sided: list[str]


# Running


def command_words(text: str) -> list[str]:
    """Return a command's words; relative paths become absolute, because it runs in other folders."""
    return [os.path.abspath(word) if "/" in word and Path(word).exists() else word for word in shlex.split(text)]


def environment(place: Place) -> dict[str, str]:
    """Return this process's environment without what would mix the two installations up."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("DINOV2_")}
    return {**own, "DINOV2_CATALOG": str(place.catalog)}


def run(place: Place, arguments: list[str]) -> str:
    """Run a command to its end and return its stdout.

    Raises Failed with the last line of its stderr.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    start, words = time.monotonic(), [*place.command, *arguments]
    done = subprocess.run(words, cwd=place.folder, env=environment(place), capture_output=True, text=True)
    named = " ".join(Path(word).name if Path(word).is_absolute() else word for word in arguments)
    print(f"    {time.monotonic() - start:5.1f} s  {place.name}: {named}", file=sys.stderr, flush=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise Failed(f"`{named}` ended with status {done.returncode}: {said[-1]}")
    return done.stdout


def make(place: Place, steps: Steps, output: Path) -> None:
    """Run steps one after the other; what they write goes to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    for name, words in steps.items():
        run(place, [*words, "-o", str(output / name)])


def train_and_kill(place: Place, words: list[str], output: Path) -> None:
    """Start a training and kill it as soon as there is a checkpoint, unless a killed one is there."""
    if list(output.glob("checkpoints/step-*")):
        return
    log = place.folder / f"{output.name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [*place.command, *words, "-o", str(output)],
            cwd=place.folder,
            env=environment(place),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        while not list(output.glob("checkpoints/step-*")) and process.poll() is None:
            time.sleep(POLL_S)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if (output / "model.json").exists() or not list(output.glob("checkpoints/step-*")):
        shutil.rmtree(output, ignore_errors=True)
        raise Failed(f"a training could not be killed between a checkpoint and its end; see {log}, or try again")


# Comparing


def same_bits(one: pa.Array, other: pa.Array) -> bool:
    """Tell whether two arrays hold the same, floats by their bits: NaN is NaN, and -0 is not 0."""
    if one.type != other.type or len(one) != len(other) or not one.is_null().equals(other.is_null()):
        return False
    one, other, kind = one.drop_null(), other.drop_null(), one.type
    if pa.types.is_dictionary(kind):
        return same_bits(one.dictionary_decode(), other.dictionary_decode())
    if pa.types.is_struct(kind):
        return all(same_bits(*parts) for parts in zip(one.flatten(), other.flatten(), strict=True))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = [pc.list_value_length(array) for array in (one, other)]
        return lengths[0].equals(lengths[1]) and same_bits(one.flatten(), other.flatten())
    if pa.types.is_floating(kind):
        bits = {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[kind.bit_width]
        return bool(one.view(bits).equals(other.view(bits)))
    return bool(one.equals(other))


def how_different(one: pa.Array, other: pa.Array) -> str:
    """Say in how many rows two arrays of one length differ, and numbers by how much at most."""
    if one.type != other.type:
        return f"{one.type}, now {other.type}"
    rows = [row for row in range(len(one)) if not same_bits(one.slice(row, 1), other.slice(row, 1))]
    text = f"{len(rows):,} of {len(one):,} rows, first {rows[0]:,}"
    while pa.types.is_list(one.type) or pa.types.is_fixed_size_list(one.type):
        one, other = one.flatten(), other.flatten()
    if pa.types.is_floating(one.type) and len(one) == len(other) and not one.null_count + other.null_count:
        values = [array.to_numpy(zero_copy_only=False).astype(np.float64) for array in (one, other)]
        text += f", by at most {np.abs(values[0] - values[1]).max():.2g}"
    return text


def compare_tables(name: str, before: pa.Table, after: pa.Table) -> Check:
    """Compare the rows, in their order, of the columns that both tables have."""
    before = before.rename_columns([RENAMED_COLUMNS.get(column, column) for column in before.column_names])
    common = [column for column in before.column_names if column in after.column_names]
    differences = []
    if before.num_rows != after.num_rows:
        differences.append(f"{before.num_rows:,} rows, now {after.num_rows:,}")
    elif not common:
        differences.append("no column in common")
    else:
        for column in common:
            one, other = (table[column].combine_chunks() for table in (before, after))
            if not same_bits(one, other):
                differences.append(f"{column} ({how_different(one, other)})")
    counted = f"{after.num_rows:,} rows of {len(common)} columns"
    return Check(name, counted, differences, one_sided(before.column_names, after.column_names))


def one_sided(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """Name what is in one only."""
    old, new = set(before), set(after)
    return [f"{name} (before only)" for name in sorted(old - new)] + [f"{name} (new)" for name in sorted(new - old)]


def figures(path: Path) -> dict[str, Any]:
    """Return what a manifest's provenance says was measured: thresholds, recall, counts."""
    metadata = pq.read_metadata(path).metadata or {}
    values = [json.loads(text) for key, text in metadata.items() if b"dinov2" in key]
    return {name: figure for value in values for name, figure in value.get("figures", {}).items()}


def compare_manifests(name: str, before: Path, after: Path) -> Check:
    """Compare the rows of two manifests, and the figures of their provenance."""
    rows = compare_tables(name, pq.read_table(before), pq.read_table(after))
    old = {
        RENAMED_FIGURES.get(name, name): RENAMED_VALUES.get(str(value), value)
        for name, value in figures(before).items()
    }
    new = figures(after)
    common = [figure for figure in old if figure in new]
    changed = [
        f"figure {figure} ({old[figure]}, now {new[figure]})"
        for figure in common
        if json.dumps(old[figure], sort_keys=True) != json.dumps(new[figure], sort_keys=True)
    ]
    counted = f"{rows.counted}, {len(common)} figures"
    return Check(name, counted, rows.differences + changed, rows.one_sided + one_sided(old, new))


def compare_pictures(name: str, before: Path, after: Path) -> Check:
    """Compare the pixels of two pictures below their titles, whose words may change."""
    old, new = (np.asarray(Image.open(path).convert("RGB"))[TITLE_PX:] for path in (before, after))
    size = f"{new.shape[1]} x {new.shape[0]} pixels"
    return Check(name, size, [] if np.array_equal(old, new) else ["the picture"], [])


def compare_outputs(title: str, names: Iterable[str], before: Path, after: Path) -> Iterator[Check]:
    """Compare the files of two folders that these steps wrote, with those beside them, such as NAME.removed.parquet."""
    stems = {name.split(".")[0] for name in names}
    written = {
        path.name for folder in (before, after) for path in folder.glob("*.p*") if path.suffix in (".parquet", ".png")
    }
    for name in sorted(name for name in written if name.split(".")[0] in stems):
        missing = [f"no file {side}" for side, at in (("before", before), ("now", after)) if not (at / name).exists()]
        if missing:
            yield Check(f"{title}: {name}", "", missing, [])
        elif name.endswith(".png"):
            yield compare_pictures(f"{title}: {name}", before / name, after / name)
        else:
            yield compare_manifests(f"{title}: {name}", before / name, after / name)


def compare_runs(title: str, before: Path, after: Path) -> Iterator[Check]:
    """Compare the metrics of two runs, but for what the machine does to them, and the teachers' weights."""
    metrics = []
    for folder in (before, after):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        table = pa.Table.from_pylist([json.loads(line) for line in lines])
        metrics.append(table.select([name for name in table.column_names if not MEASURED.search(name)]))
    yield compare_tables(f"{title}: metrics.jsonl", *metrics)
    old, new = (load_file(folder / "teacher.safetensors") for folder in (before, after))
    differences = [name for name, tensor in old.items() if name in new and not same_tensor(tensor, new[name])]
    differences += one_sided(old, new)  # a weight with another name is another file to whoever loads it
    counted = f"{len(new)} tensors of {sum(tensor.numel() for tensor in new.values()):,} numbers"
    yield Check(f"{title}: teacher.safetensors", counted, differences, [])


def same_values(line: str, other: str) -> bool:
    """Tell whether two JSON objects have the same values in the same order, whatever their names."""
    return list(json.loads(line).values()) == list(json.loads(other).values())


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether type, shape and bits are the same."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def listed_artifacts(output: str) -> list[dict[str, Any]]:
    """Return the rows of `catalog list --json`, the parameters under their present names and in order."""
    rows: list[dict[str, Any]] = json.loads(output)["rows"]
    for row in rows:
        text = row["parameters"] if isinstance(row["parameters"], str) else json.dumps(row["parameters"])
        for old, new in RENAMED_PARAMETERS.items():
            text = text.replace(old, new)
        row["parameters"] = json.dumps(json.loads(text), sort_keys=True)
    return rows


def compare_catalogs(before: Place, after: Place, paths: list[str]) -> Iterator[Check]:
    """Rebuild a catalog from the old files with both, and compare what it lists and where the last file came from."""
    title, listed, trees = "catalog of old files", [], []
    for place in (before, after):
        run(place, ["catalog", "rebuild", *paths])
        listed.append(pa.Table.from_pylist(listed_artifacts(run(place, ["catalog", "list", "--json"]))))
        trees.append(json.loads(run(place, ["catalog", "lineage", "curated.parquet", "--json"])))
    yield compare_tables(f"{title}: list", *listed)
    differences = [] if trees[0] == trees[1] else [f"{json.dumps(trees[0])}, now {json.dumps(trees[1])}"]
    yield Check(f"{title}: lineage", f"{json.dumps(trees[1]).count('path')} artifacts and sources", differences, [])


# The whole


def steps_of(steps: Mapping[str, str], values: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the words of every step with its values filled in."""
    return {name: [word.format_map(values) for word in text.split()] for name, text in steps.items()}


def first_rows(folder: Path) -> Path:
    """Write the first rows of the demo's pool to a file and return it."""
    path = folder / "pool.parquet"
    pq.write_table(pq.read_table(DATA / "fashion_pool.parquet").slice(0, SMALL_ROWS), path)
    return path


def make_before(place: Place, steps: Steps, first: Steps, model: Path) -> None:
    """Make all that the old installation has to show, or what of it is not there."""
    made, folder = place.folder / "commands.json", place.folder
    commands = {"command": place.command, "steps": {**steps}, "first": {**first}}
    if not made.exists() or json.loads(made.read_text()) != commands:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made.write_text(json.dumps(commands, indent=1))
    make(place, {name: [*words, "--resume"] for name, words in first.items()}, model.parent)
    make(place, {name: words + ["--resume"] * (name in TRAINING) for name, words in steps.items()}, folder)
    train_and_kill(place, steps["run"], folder / "killed")


def checks(before: Place, command: list[str], steps: Steps, model: Path) -> Iterator[Check]:
    """Run the new installation and compare, part by part; a part whose command fails is a difference."""
    old, new = before.folder, before.folder.parent / "after"
    shutil.rmtree(new, ignore_errors=True)
    after = Place("after", command, new, new / "catalog.duckdb")

    def made_anew() -> Iterator[Check]:
        make(after, {name: steps[name] for name in CURATION}, new)
        yield from compare_outputs("made anew", CURATION, old, new)

    def trained_anew() -> Iterator[Check]:
        make(after, {name: steps[name] for name in TRAINING}, new)
        yield from compare_runs("trained anew", old / "run", new / "run")

    def killed_and_resumed() -> Iterator[Check]:
        shutil.copytree(old / "killed", new / "killed")
        run(after, [*steps["run"], "-o", "killed", "--resume"])
        # A run that began again would end alike; its speed at the first step would not.
        first = [(folder / "killed" / "metrics.jsonl").read_text().splitlines()[0] for folder in (old, new)]
        differences = [] if same_values(*first) else ["began again instead of going on from the old checkpoint"]
        yield Check("killed and resumed: goes on", "", differences, [])
        yield from compare_runs("killed and resumed", old / "run", new / "killed")

    def made_of_old_files() -> Iterator[Check]:
        output = new / "of_old_files"
        place = Place("after, old files", command, old, output / "catalog.duckdb")
        make(place, {name: steps[name] for name in ON_OLD_FILES}, output)
        yield from compare_outputs("made of old files", ON_OLD_FILES, old, output)

    def catalog_of_old_files() -> Iterator[Check]:
        places = [
            Place(place.name, place.command, old, new / f"catalog_{place.name}" / "catalog.duckdb")
            for place in (before, after)
        ]
        yield from compare_catalogs(places[0], places[1], [".", str(model)])

    for part in (made_anew, trained_anew, killed_and_resumed, made_of_old_files, catalog_of_old_files):
        try:
            yield from part()
        except (Failed, OSError) as problem:
            yield Check(part.__name__.replace("_", " "), "", [str(problem)], [])


def line(check: Check) -> str:
    """Return what came of a comparison as one line."""
    counted = f" ({check.counted})" if check.counted else ""
    only = f"; not compared: {', '.join(check.one_sided)}" if check.one_sided else ""
    if not check.differences:
        return f"same: {check.name}{counted}{only}"
    left_out = len(check.differences) - SHOWN
    shown = "; ".join(check.differences[:SHOWN]) + (f"; and {left_out} more" if left_out > 0 else "")
    return f"DIFFERENT: {check.name}: {shown}{counted}{only}"


def main() -> None:
    """Make what is compared, print a line a comparison, and exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", required=True, help="command of the old installation")
    parser.add_argument("--after", required=True, help="command of the new one")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--run", type=Path, help="a trained run of the old one; by default it trains one for 60 steps")
    parser.add_argument("--small", action="store_true", help=f"only {SMALL_ROWS:,} images")
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    before = Place("before", command_words(args.before), folder / "before", folder / "before" / "catalog.duckdb")
    model = args.run.resolve() if args.run else before.folder / "first"
    values = {
        "pool": first_rows(folder) if args.small else DATA / "fashion_pool.parquet",
        "queries": DATA / "fashion_queries.parquet",
        "train": DATA / "fashion_probe_train.parquet",
        "test": DATA / "fashion_probe_test.parquet",
        "model": model,
        "clusters": "60,12" if args.small else "300,30",
        "sample": 500 if args.small else 3000,
    }
    steps = steps_of({**CURATION, **TRAINING, **LOOKS}, values)
    first = {} if args.run else steps_of({"first": FIRST_MODEL}, values)
    try:
        make_before(before, steps, first, model)
    except Failed as problem:
        raise SystemExit(f"before: {problem}") from None

    results = []
    for check in checks(before, command_words(args.after), steps, model):
        print(line(check), flush=True)
        results.append(not check.differences)
    print(f"{sum(results)} of {len(results)} comparisons are the same")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
