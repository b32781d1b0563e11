"""Damaged and malformed manifests: a command that reads one ends with a result, or in one line that says why not."""

from pathlib import Path
from random import Random

import pytest

from dinov2_toolkit.tests.fuzz.mutate import mutated_file
from dinov2_toolkit.tests.fuzz.mutate_tables import mutated_table, other_lineage
from dinov2_toolkit.tests.fuzz.trial import trials
from dinov2_toolkit.tests.fuzz.workspace import SETTINGS, split

FILES = {  # what is damaged -> what commands are given: itself or what refers to it
    "pool.parquet": (
        "pool.parquet",
        "pool.parquet",
        "unique.parquet",
        "curated.parquet",
        "clusters.parquet",
        "mix.parquet",
    ),
    "q.parquet": ("q.parquet",),
    "patches.parquet": ("patches.parquet",),
    "unique.parquet": ("unique.parquet", "clusters.parquet"),
    "unique.removed.parquet": ("unique.removed.parquet", "unique.parquet"),
    "pool.removed.parquet": ("pool.removed.parquet", "pool.parquet"),
    "clusters.parquet": ("clusters.parquet",),
    "clusters.clusters.parquet": ("clusters.clusters.parquet", "clusters.parquet"),
    "curated.parquet": ("curated.parquet",),
    "mix.parquet": ("mix.parquet",),
    "map.parquet": ("map.parquet",),
    "scores.parquet": ("scores.parquet",),
    "foreign.parquet": ("foreign.parquet",),
    "hf.parquet": ("hf.parquet", "list.txt"),
    "masked.parquet": ("masked.parquet",),
    "parts/1.parquet": ("parts",),
    "parts/_manifest.json": ("parts",),
    "list.txt": ("list.txt",),
    ".dinov2/catalog.duckdb": ("pool.parquet",),
    ".dinov2/catalog.duckdb.paths": ("pool.parquet",),
    ".dinov2/cache": ("pool.parquet", "unique.parquet"),  # any file in it
}
COMMANDS = (
    "curate embed {} -o out.parquet --model pixels --num-workers 1",
    "curate embed a b -o {} --model pixels --num-workers 1 --dry-run",
    "curate dedup {} -o out.parquet --threshold 0.9 --sheet out.png",
    "curate dedup {} -o out.parquet",
    "curate dedup {} -o out.parquet --exact bytes",
    "curate dedup {} -o out.parquet --exact pixels --keep column:width",
    "curate dedup {} -o out.parquet --threshold 0.9 --verify --linkage star",
    "curate dedup {} --calibrate out.png",
    "curate dedup pool.parquet -o out.parquet --against {} --threshold 0.9",
    "curate dedup pool.parquet -o out.parquet --known {} --threshold 0.9",
    "curate dedup {} -o out.parquet --threshold 0.9 --where width>1 --limit 9",
    "curate cluster {} -o out.parquet --num-clusters 4,2 --sample 8 --sheet out.png --resample 1",
    "curate cluster {} -o out.parquet --num-clusters 3 --resample 0 --pick closest",
    "curate cluster unique.parquet -o out.parquet --num-clusters 2 --features {}",
    "curate retrieve --queries {} --pool pool.parquet --k 2 -o out.parquet",
    "curate retrieve --queries q.parquet --pool {} --k 2 -o out.parquet --fill --include-queries",
    "curate retrieve --queries q.parquet --pool {} --per-cluster 2 -o out.parquet",
    "curate union {} q.parquet -o out.parquet",
    "curate union {}=2 q.parquet=1 -o out.parquet --embeddings",
    "curate map {} -o out.parquet --html out.html --neighbors 3 --thumbnails 8",
    "evaluate probe --train {} --test q.parquet -o out.parquet --method knn --method logreg --method retrieval",
    "evaluate probe --train pool.parquet --test {} -o out.parquet --method knn --labels column:label",
    "evaluate neighbors {} -o out.png --pool pool.parquet",
    "evaluate neighbors a/x/0.png -o out.png --pool {}",
    "evaluate pca {} -o out.png --model pixels --limit 3",
    "evaluate attention {} -o out.png --model model --limit 3",
    "report {} -o out.html",
    "report {} pool.parquet run -o out.html",
    "catalog list",
    "catalog show {}",
    "catalog lineage {}",
    "catalog verify {}",
    "catalog verify",
    "catalog rebuild {}",
    "catalog rebuild .",
    "catalog gc",
    "catalog sql select|*|from|'{}' -o out.parquet",
    "catalog sql select|*|from|'{}' --json",
    f"train pretrain {{}} -o out_run --recipe tiny {SETTINGS}",
    f"train pretrain {{}} -o out_run --recipe tiny --dry-run --preview out.png {SETTINGS}",
    f"train distill {{}} -o out_run --teacher model --objective features {SETTINGS}",
)
NAMES = (
    "star-*.parquet",
    "q[1].parquet",
    "new\nline.parquet",
    "it's.parquet",
    'quo"te.parquet',
    "é\u202e.parquet",
    "-x.parquet",
)


def damaged(work: Path, random: Random) -> list[str]:
    """Damage a manifest and return the arguments of a command that reads it."""
    name = random.choice(list(FILES))
    given = random.choice(FILES[name])
    path = work / name
    if path.is_dir():
        path = random.choice(sorted(path.iterdir()))
    data = path.read_bytes()
    others = [(work / other).read_bytes() for other in ("pool.parquet", "hf.parquet", "list.txt", "model/model.json")]
    how = random.random()
    if path.suffix != ".parquet" or how < 0.3:
        data = mutated_file(path.name, data, random, others)
    elif how < 0.4:
        data = other_lineage(data, random, str(path))
    else:
        data = mutated_table(data, random)
    path.write_bytes(data)
    if given == name and path.suffix == ".parquet" and random.random() < 0.1:
        given = random.choice(NAMES)
        path.rename(work / given)
        given = f"./{given}" if given.startswith("-") else given
    command = random.choice(COMMANDS)
    return [argument.replace("{}", given) for argument in split(command)]


def test_damaged_manifests_end_in_one_line(workspace: Path) -> None:
    assert trials(workspace, range(8), lambda random: damaged(workspace, random), kind="manifest") == []


@pytest.mark.slow
def test_2000_damaged_manifests_end_in_one_line(workspace: Path) -> None:
    failures = trials(workspace, range(2_000), lambda random: damaged(workspace, random), kind="manifest")
    assert not failures, f"{len(failures)} of 2,000 fail:\n" + "\n".join(failures)
