"""The rooms and the one-way streets between them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dinov2_toolkit

ROOT = Path(dinov2_toolkit.__path__[0])
FLOOR = {"store", "models", "features", "features/search", "features/extract", "features/page"}
TRAIN = {"train/base", "train/data", "train/objective", "train/engine", "train/monitor"}
ALLOWED = {  # which rooms a room may import; console, errors and options, at the bottom, are free to all
    "store": set(),
    "models": {"store"},
    "features": {"features/search", "features/extract", "models", "store"},
    "features/search": {"features", "store"},
    "features/page": {"features", "store"},
    "features/extract": {"features", "models", "store"},
    "curate": FLOOR,
    "curate/embed": {"curate", *FLOOR},
    "curate/dedup": {"curate", *FLOOR},
    "curate/cluster": {"curate", *FLOOR},
    "curate/map": {"curate", *FLOOR},
    "curate/retrieve": {"curate", "curate/cluster", *FLOOR},
    "curate/cli": {
        "curate",
        "curate/embed",
        "curate/dedup",
        "curate/cluster",
        "curate/map",
        "curate/retrieve",
        "store",
    },
    "train/base": {"train/engine", *FLOOR},  # settings are checked by the schedules that follow from them
    "train/data": {"train/base", "train/engine", *FLOOR},
    "train/objective": {"train/base", *FLOOR},
    "train/engine": {"train/base", "train/objective", *FLOOR},
    "train/monitor": {"train/base", "train/data", "train/objective", "train/engine", *FLOOR},
    "train": {*TRAIN, *FLOOR},
    "evaluate": FLOOR,
    "manage": {"curate", "curate/embed", "evaluate", "train", *TRAIN, *FLOOR},
    "report": {
        "curate",
        "curate/embed",
        "curate/dedup",
        "curate/cluster",
        "curate/map",
        "curate/retrieve",
        "evaluate",
        "manage",
        "train",
        *TRAIN,
        *FLOOR,
    },
    "cli": {"curate/cli", "train", "evaluate", "manage", "report"},
}
BASE = ("config", "counter_rng", "launch", "ranges", "transfer")  # of training: what its rooms build on
FILES = {"curate/cli.py": "curate/cli", **{f"train/{name}.py": "train/base" for name in BASE}}
GROUND = {"console.py", "cores.py", "errors.py", "options.py", "process.py", "__init__.py", "__main__.py"}
EXCEPTIONS = {  # the only files that may be imported where the room may not
    ("curate/retrieve", "curate/cluster"): {"curate/cluster/kmeans.py"},
    ("train/base", "train/engine"): {"train/engine/schedules.py"},
    ("train/data", "train/engine"): {"train/engine/schedules.py"},
}


def modules() -> list[Path]:
    folders = {room.split("/")[0] for room in ALLOWED}
    return sorted([*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))])


def room_of(file: Path) -> str | None:
    """Return the room of a file, None for what is free to all."""
    name = file.relative_to(ROOT)
    if str(name) in GROUND:
        return None
    return FILES.get(str(name)) or ("/".join(name.parts[:-1]) or "cli")


def imported(file: Path) -> set[Path]:
    """Return the files of the package that a file imports anywhere in it."""
    package = file.relative_to(ROOT).parent.parts
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = ROOT.joinpath(*package[: len(package) - (node.level - 1)])
            module = start.joinpath(*node.module.split(".")) if node.module else start
            names = [module, *(module / alias.name for alias in node.names)]
            found |= {name.with_suffix(".py") for name in names if name.with_suffix(".py").is_file()}
    return found


def test_the_package_imports_itself_by_relative_names_alone() -> None:
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "dinov2_toolkit" for name in names), file


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = [file for file in modules() if room_of(file) == room]
    assert files
    wrong = []
    for file in files:
        for other in imported(file):
            target = room_of(other)
            if target is None or target == room:
                continue
            only = EXCEPTIONS.get((room, target))
            if target not in ALLOWED[room] or (only and str(other.relative_to(ROOT)) not in only):
                wrong.append(f"{file.relative_to(ROOT)} imports {other.relative_to(ROOT)}")
    assert wrong == []


def test_every_folder_of_modules_is_a_room_with_rules() -> None:
    assert {room_of(file) for file in modules()} - {None} == set(ALLOWED)


def test_init_files_hold_only_a_docstring() -> None:
    for file in modules():
        if file.name == "__init__.py" and file.parent != ROOT:
            tree = ast.parse(file.read_text())
            assert len(tree.body) == 1 and ast.get_docstring(tree), file


def test_every_room_is_packed() -> None:
    packed = (ROOT / "pyproject.toml").read_text()
    folders = {file.parent.relative_to(ROOT) for file in modules()} - {Path(".")}
    assert all(f'"dinov2_toolkit.{".".join(folder.parts)}"' in packed for folder in folders)


def test_tests_mirror_the_rooms() -> None:
    folders = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    assert folders - {Path("."), Path("benchmarks"), Path("fuzz")} <= {
        file.parent.relative_to(ROOT) for file in modules()
    }


def test_help_imports_neither_torch_nor_faiss_nor_duckdb() -> None:
    program = """
import sys
from dinov2_toolkit.cli import main
for group in ([], ["curate"], ["train"], ["evaluate"], ["catalog"]):
    sys.argv = ["dinov2", *group, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, end.code
heavy = {"torch", "faiss", "duckdb", "numpy", "pyarrow", "PIL", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
