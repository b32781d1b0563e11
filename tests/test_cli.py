"""The command line as its users meet it: exit codes, one line on stderr, nothing but results on stdout."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DINOV2 = [sys.executable, "-m", "dinov2_toolkit"]


def run(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*DINOV2, *arguments], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "photos" / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["curate", "embed", "nowhere", "--model", "pixels"], 1, "nowhere"),
        (["curate", "embed", "photos", "--modell", "pixels"], 2, "--modell"),
        (["curate", "embed", "photos", "--model", "no-such-model"], 1, "no-such-model"),
        (["curate", "dedup", "nowhere.parquet"], 1, "nowhere.parquet"),
        (["curate", "dedup"], 1, "no manifest"),
        (["curate", "cluster", "nowhere.parquet", "--num-clusters", "2"], 1, "nowhere.parquet"),
        (["curate", "retrieve", "--k", "0"], 1, "0"),
        (["curate", "retrieve"], 1, "queries"),
        (["train", "pretrain", "nowhere.parquet", "-o", "run", "--recipe", "tiny"], 1, "nowhere.parquet"),
        (["train", "pretrain", "photos.parquet", "-o", "run", "--recipe", "tinny"], 1, "tinny"),
        (["evaluate", "probe", "--train", "nowhere.parquet", "--test", "nowhere.parquet"], 1, "nowhere.parquet"),
        (["catalog", "show", "nothing"], 1, "nothing"),
        (["curate", "embedd"], 2, "embedd"),
        (["curate", "embed"], 2, "SOURCE"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(photos: Path, arguments: list[str], code: int, words: str) -> None:
    done = run(*arguments, cwd=photos.parent)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0]
    assert not list(photos.parent.glob("*.parquet")) and not (photos.parent / "run").exists()


def test_an_unknown_recipe_key_names_the_nearest(photos: Path) -> None:
    run("curate", "embed", "photos", "-o", "a.parquet", "--model", "pixels", cwd=photos.parent)
    done = run(
        "train", "pretrain", "a.parquet", "-o", "run", "--recipe", "tiny", "--set", "stepps=3", cwd=photos.parent
    )
    assert done.returncode == 1 and "stepps" in done.stderr and "steps" in done.stderr.replace("stepps", "")
    assert not (photos.parent / "run").exists()


def test_stdout_is_the_output_as_it_was_given(photos: Path) -> None:
    done = run("curate", "embed", "photos", "-o", "./out//a.parquet", "--model", "pixels", cwd=photos.parent)
    assert (done.returncode, done.stdout) == (0, "./out//a.parquet\n"), done.stderr
    again = run("curate", "embed", "photos", "-o", "./out//a.parquet", "--model", "pixels", cwd=photos.parent)
    assert (again.returncode, again.stdout) == (0, "./out//a.parquet\n")
    assert "up to date" in again.stderr
    other = run(
        "curate", "embed", "photos", "-o", "./out//a.parquet", "--model", "pixels", "--limit", "2", cwd=photos.parent
    )
    assert other.returncode == 1 and "--force" in other.stderr and other.stdout == ""


def test_quiet_says_nothing_and_dry_run_writes_nothing(photos: Path) -> None:
    quiet = run("curate", "embed", "photos", "-o", "a.parquet", "--model", "pixels", "-q", cwd=photos.parent)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "a.parquet\n", "")
    dry = run("curate", "embed", "photos", "-o", "b.parquet", "--model", "pixels", "--dry-run", cwd=photos.parent)
    assert (dry.returncode, dry.stdout) == (0, "") and dry.stderr
    assert not (photos.parent / "b.parquet").exists()


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    done = run("curate", "embed", "texts", "-o", "a.parquet", "--model", "pixels", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "a.parquet").exists()


def test_a_reader_that_leaves_a_pipe_early_is_no_error(photos: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m dinov2_toolkit catalog sql 'select * from range(100000)' | head -n 1",
        shell=True,
        cwd=photos,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "range\n" and "Traceback" not in done.stderr


def test_version_and_help_end_well(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout.strip().count(".") == 2
    assert run("--help", cwd=tmp_path).returncode == 0
