"""Damaged weights and run folders: a command that reads one ends with a result, or in one line that says why not."""

from pathlib import Path
from random import Random

import pytest

from dinov2_toolkit.tests.fuzz.mutate import mutated_file
from dinov2_toolkit.tests.fuzz.mutate_tables import mutated_table
from dinov2_toolkit.tests.fuzz.trial import trials
from dinov2_toolkit.tests.fuzz.workspace import SETTINGS, split

MODELS = ("run", "model", "official.pth", "weights.safetensors", "hf")
EMBED = "curate embed b -o out.parquet --model {} --num-workers 1"
COMMANDS = (
    EMBED,
    EMBED,
    "curate embed b -o out.parquet --model {} --tokens cls+mean --image-size 8 --num-workers 1",
    "export {} --to official -o out.pth",
    "export {} --to safetensors -o out.safetensors",
    "export {} --to hf -o out_hf",
    "models --json",
    "evaluate pca b --model {} -o out.png --limit 2",
    "evaluate attention b --model {} -o out.png --limit 2",
    "evaluate match a/x/0.png b/x/1.png --model {} -o out.png",
    "evaluate probe --train a --test b --model {} --method knn -o out.parquet",
    f"train distill pool.parquet --teacher {{}} --objective features -o out_run --recipe tiny {SETTINGS}",
    f"train distill pool.parquet --teacher {{}} --objective heads -o out_run --recipe tiny {SETTINGS}",
    f"train pretrain pool.parquet --init-from {{}} -o out_run --recipe tiny {SETTINGS}",
    "catalog rebuild {}",
    "catalog verify {}",
    "catalog show {}",
)
RUN_COMMANDS = (  # of a run, besides: its folder is the output
    "train pretrain pool.parquet -o out_run --resume",
    "train pretrain pool.parquet -o out_run --resume",
    f"train pretrain pool.parquet -o out_run --recipe tiny {SETTINGS}",
    f"train pretrain pool.parquet -o out_run --recipe tiny --resume {SETTINGS} --set steps=3",
    "train pretrain pool.parquet -o out_new --recipe out_run/config.toml",
    "report out_run -o out.html",
    "report out_run pool.parquet scores.parquet -o out.html",
    "curate embed b -o out.parquet --model out_run --num-workers 1",
    "evaluate pca b --model out_run -o out.png --limit 2",
    "catalog rebuild .",
)
UNFINISHED = ("model.json", "teacher.safetensors")


def damaged(work: Path, random: Random) -> list[str]:
    """Damage a model or a run and return the arguments of a command that reads it."""
    given = random.choice(MODELS)
    command = random.choice(COMMANDS)
    if given == "run" and random.random() < 0.7:
        given, command = "out_run", random.choice(RUN_COMMANDS)
        (work / "run").rename(work / given)
        if random.random() < 0.6:
            for name in UNFINISHED:
                (work / given / name).unlink()
    files = [work / given] if (work / given).is_file() else sorted(p for p in (work / given).rglob("*") if p.is_file())
    if given.endswith("pth") or given.endswith("safetensors"):
        files.append(work / f"{given}.provenance.json")
    others = [(work / other).read_bytes() for other in ("weights.safetensors", "official.pth", "hf/config.json")]
    for path in random.sample(files, min(random.choice((1, 1, 1, 2)), len(files))):
        match random.randrange(12):
            case 0:
                path.unlink()
            case 1 if path.parent != work:
                path.unlink()
                path.mkdir()
            case 2:
                path.write_bytes(b"")
            case _ if path.suffix == ".parquet" and random.random() < 0.7:
                path.write_bytes(mutated_table(path.read_bytes(), random))
            case _:
                path.write_bytes(mutated_file(path.name, path.read_bytes(), random, others))
    return [argument.replace("{}", given) for argument in split(command)]


def test_damaged_models_end_in_one_line(workspace: Path) -> None:
    assert trials(workspace, range(3), lambda random: damaged(workspace, random), kind="weights") == []


@pytest.mark.slow
def test_500_damaged_models_end_in_one_line(workspace: Path) -> None:
    failures = trials(workspace, range(500), lambda random: damaged(workspace, random), kind="weights", limit_s=120)
    assert not failures, f"{len(failures)} of 500 fail:\n" + "\n".join(failures)
