"""The command line as its users meet it: exit codes, one line on stderr, nothing but results on stdout."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from dinov2_toolkit import cli, console, options
from dinov2_toolkit.errors import Stopped, ToolkitError

DINOV2 = [sys.executable, "-m", "dinov2_toolkit"]
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return its returncode, stdout and stderr."""
    monkeypatch.setattr(console, "_verbosity", 1)  # what -q and -v change comes back after the test

    def command(*arguments: str, cwd: Path | None = None) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["dinov2", *arguments])
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        code = cli.run()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return command


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
        (["train", "pretrain", "photos.parquet", "-o", "run", "--recipe", "tinny"], 1, "(did you mean 'tiny'?)"),
        (["curate", "embed", "photos", "--model", "pixel"], 1, "(did you mean 'pixels'?)"),
        (["curate", "embed", "photos", "--model", "random:vit_smal"], 1, "vit_small"),
        (["catalog", "list", "--kind", "runs"], 1, "run, export"),
        (["evaluate", "probe", "--train", "nowhere.parquet", "--test", "nowhere.parquet"], 1, "nowhere.parquet"),
        (["catalog", "show", "nothing"], 1, "nothing"),
        (["curate", "embedd"], 2, "embedd"),
        (["curate", "embed"], 2, "SOURCE"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    run: Run, photos: Path, arguments: list[str], code: int, words: str
) -> None:
    done = run(*arguments, cwd=photos.parent)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0]
    assert not list(photos.parent.glob("*.parquet")) and not (photos.parent / "run").exists()


def test_an_unknown_recipe_key_names_the_nearest(run: Run, photos: Path) -> None:
    run("curate", "embed", "photos", "-o", "a.parquet", "--model", "pixels", cwd=photos.parent)
    done = run(
        "train", "pretrain", "a.parquet", "-o", "run", "--recipe", "tiny", "--set", "stepps=3", cwd=photos.parent
    )
    assert done.returncode == 1 and "stepps" in done.stderr and "steps" in done.stderr.replace("stepps", "")
    assert not (photos.parent / "run").exists()


def test_stdout_is_the_output_as_it_was_given(run: Run, photos: Path) -> None:
    done = run("curate", "embed", "photos", "-o", "./out//a.parquet", "--model", "pixels", cwd=photos.parent)
    assert (done.returncode, done.stdout) == (0, "./out//a.parquet\n"), done.stderr
    again = run("curate", "embed", "photos", "-o", "./out//a.parquet", "--model", "pixels", cwd=photos.parent)
    assert (again.returncode, again.stdout) == (0, "./out//a.parquet\n")
    assert "up to date" in again.stderr
    other = run(
        "curate", "embed", "photos", "-o", "./out//a.parquet", "--model", "pixels", "--limit", "2", cwd=photos.parent
    )
    assert other.returncode == 1 and "--force" in other.stderr and other.stdout == ""


def test_quiet_says_nothing_and_dry_run_writes_nothing(run: Run, photos: Path) -> None:
    quiet = run("curate", "embed", "photos", "-o", "a.parquet", "--model", "pixels", "-q", cwd=photos.parent)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "a.parquet\n", "")
    dry = run("curate", "embed", "photos", "-o", "b.parquet", "--model", "pixels", "--dry-run", cwd=photos.parent)
    assert (dry.returncode, dry.stdout) == (0, "") and dry.stderr
    assert not (photos.parent / "b.parquet").exists()


def test_a_folder_without_images_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    done = run("curate", "embed", "texts", "-o", "a.parquet", "--model", "pixels", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "first"),
    [("catalog sql 'select * from range(100000)'", "range\n"), ("--help", " " * 80 + "\n"), ("catalog list", "")],
)
def test_a_reader_that_leaves_a_pipe_early_is_no_error(photos: Path, arguments: str, first: str) -> None:
    command = f"COLUMNS=80 {sys.executable} -m dinov2_toolkit {arguments} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=photos, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, first, "")


def test_a_run_goes_on_when_nobody_reads_its_messages(photos: Path) -> None:
    command = f"{sys.executable} -m dinov2_toolkit curate embed photos -o a.parquet --model pixels 2> >(true)"
    done = subprocess.run(["bash", "-c", f"{command}; exit $?"], cwd=photos.parent, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"a.parquet\n")


class Odd(Exception):
    pass


PROBLEMS: list[tuple[BaseException, int, str]] = [
    (ToolkitError("no x; give one"), 1, "error: no x; give one"),
    (ToolkitError("no a\nerror: b\x1b[2J; give one"), 1, r"error: no a\\nerror: b\\x1b\[2J; give one"),
    (Stopped("stopped: all saved"), 75, "stopped: all saved"),
    (KeyboardInterrupt(), 130, "error: interrupted; nothing more was saved"),
    (SystemExit(75), 75, ""),
    (SystemExit(), 0, ""),
    (MemoryError("8 GB"), 1, "error: out of memory .8 GB.; make some free, or give a smaller --memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: out of memory"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), 1, "error: the disk is full: a/b; make room"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "error: the disk is full; make room"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "error: Permission denied: a/b; mend that"),
    (EOFError("x"), 1, "error: unexpected EOFError .x.*a fault of the toolkit: report it with what --debug shows"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: Broken pipe; mend that"),  # of another pipe than stdout
    (Odd("two\nlines"), 1, r"error: unexpected Odd .two lines. at .*cli.py:\d+; this is a fault of the toolkit"),
]


@pytest.mark.parametrize(("problem", "code", "line"), PROBLEMS, ids=lambda value: type(value).__name__)
def test_every_end_is_one_line_and_an_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, problem: BaseException, code: int, line: str
) -> None:
    def fail(arguments: list[str]) -> int:
        raise problem

    monkeypatch.setattr(cli, "_called", fail)
    done = run("catalog", "list")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == bool(line) and re.match(line, done.stderr)


@pytest.mark.parametrize("how", ["first", "last", "environment"])
def test_debug_shows_where_an_error_comes_from(run: Run, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    arguments = ["catalog", "show", "nothing"]
    match how:
        case "first":
            arguments.insert(0, "--debug")
        case "last":
            arguments.append("--debug")
        case _:
            monkeypatch.setenv("DINOV2_DEBUG", "1")
    done = run(*arguments)
    assert done.returncode == 1 and "Traceback" in done.stderr and "manage/catalog.py" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the catalog")


def test_a_place_whose_name_is_not_utf_8_is_named_before_any_work(photos: Path) -> None:
    folder = os.fsencode(photos.parent) + b"/caf\xe9"
    os.mkdir(folder)
    for output, cwd in (("a.parquet", folder), (folder + b"/a.parquet", os.fsencode(photos))):
        command = [*DINOV2, "curate", "embed", photos, "--model", "pixels", "-o", output]
        done = subprocess.run(command, cwd=cwd, capture_output=True)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"caf\\udce9/a.parquet, is not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1
    assert os.listdir(folder) == []


def test_a_setting_of_the_environment_that_is_none_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "DINOV2_CACHE_BYTES": "x"}
    done = subprocess.run([*DINOV2, "catalog", "gc"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: DINOV2_CACHE_BYTES is no number of bytes")


def test_the_version_is_printed(run: Run, tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout.strip().count(".") == 2


# Help pages


def help_page(run: Run, *arguments: str) -> str:
    """Return what a terminal of 80 columns shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


def commands(group: Any, name: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command and group, in the order of --help."""
    below = getattr(group, "commands", {})
    return [name, *(each for word in below for each in commands(below[word], (*name, word)))]


COMMANDS = commands(typer.main.get_command(cli.app))


@pytest.mark.parametrize("group", ["", "curate", "train", "evaluate", "catalog"])
def test_a_bare_group_prints_its_help(run: Run, group: str) -> None:
    page = help_page(run, *group.split())
    assert page.split() == help_page(run, *group.split(), "--help").split()
    assert f"Usage: dinov2 {group}".rstrip() in page


def test_the_root_lists_its_commands_in_the_order_of_a_project(run: Run) -> None:
    listed = re.findall(r"^│ (\w+) ", help_page(run, "--help").partition("Commands")[2], re.MULTILINE)
    assert listed == ["curate", "train", "evaluate", "report", "export", "models", "catalog", "doctor"]
    assert set(listed) == {name[0] for name in COMMANDS if name}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_help_page_fits_80_columns_and_shows_options_in_panels(run: Run, command: tuple[str, ...]) -> None:
    page = help_page(run, *command, "--help")
    assert max(map(len, page.splitlines())) <= 80
    titles = re.findall(r"╭─ (\w+) ─", page)
    panels = [title for title in titles if title in options.PANELS]
    assert panels == [panel for panel in options.PANELS if panel in panels]
    if "--output" in page:
        assert {"Output"} <= set(panels)
    if panels:
        (own,) = re.findall(r"╭─ Options ─.*?╰", page, re.DOTALL)
        assert set(re.findall(r"--[a-z-]+", own)) == {"--help"}
