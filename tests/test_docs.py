"""The documentation tells the truth of this commit: commands, options, files."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

import dinov2_toolkit
from dinov2_toolkit.cli import app

ROOT = Path(dinov2_toolkit.__path__[0])
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
SHELL = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
ROOT_COMMAND = typer.main.get_group(app)


# Commands are of a class that typer keeps to itself, hence Any.
def commands(command: Any = ROOT_COMMAND, name: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return every command that does something, by its words after `dinov2`."""
    if not isinstance(command, TyperGroup):
        return {name: command}
    return {
        words: found for word, sub in command.commands.items() for words, found in commands(sub, (*name, word)).items()
    }


def written_commands() -> list[list[str]]:
    """Return the arguments of every `dinov2 ...` line in the shell blocks of all pages, continued lines joined."""
    blocks = "\n".join(block for page in PAGES for block in SHELL.findall(page)).replace("\\\n", " ")
    lines = [line.split(" | ")[-1].strip() for line in blocks.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dinov2 ")]


@pytest.mark.parametrize("name", commands())
def test_every_command_and_option_has_help(name: tuple[str, ...]) -> None:
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{' '.join(name)} {parameter.name}"


@pytest.mark.parametrize("name", commands())
def test_every_command_is_in_the_readme(name: tuple[str, ...]) -> None:
    assert re.search(rf"\b{name[-1]}\b", README)


def test_the_pages_show_commands() -> None:
    assert len(written_commands()) >= 30


@pytest.mark.parametrize("arguments", written_commands(), ids=" ".join)
def test_every_command_of_the_pages_is_understood(arguments: list[str]) -> None:
    command: Any = ROOT_COMMAND
    words = list(arguments)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    if words != ["--help"]:
        command.make_context("dinov2", words, resilient_parsing=False)


def test_every_package_is_in_the_table_of_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)/` \|", page, re.MULTILINE)
    packages = {file.parent.relative_to(ROOT).as_posix() for file in ROOT.rglob("__init__.py")}
    own = {package for package in packages if package.split("/")[0] not in {".", ".venv", ".types", "build"}}
    assert own - {"train/recipes"} == set(rows)


def test_every_file_that_the_architecture_page_names_is_in_its_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w/]+/)` \|(.*)$", page, re.MULTILINE)
    assert len(rows) >= 15
    for room, text in rows:
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / room / name).is_file(), f"{room}{name}"
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|md))`", page):
        assert (ROOT / path).is_file(), path
