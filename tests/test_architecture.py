"""The rooms and the one-way street between them."""

import ast
import subprocess
import sys
from pathlib import Path

import dinov2_toolkit

ROOT = Path(dinov2_toolkit.__path__[0])
ROOMS = ("curate", "train", "evaluate", "manage", "features", "models", "store")
ALLOWED = {  # what a room may import; console and errors, at the bottom, are free to all
    "store": set(),
    "models": {"store"},
    "features": {"models", "store"},
    "curate": {"features", "models", "store"},
    "train": {"features", "models", "store"},
    "evaluate": {"features", "models", "store"},
    "manage": {"curate", "train", "evaluate", "features", "models", "store"},
}


def modules() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))])


def imports(file: Path) -> set[str]:
    """Return the names, below the package, of the modules that a file imports anywhere in it."""
    package = file.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - (node.level - 1)]
            module = (*start, *(node.module.split(".") if node.module else ()))
            found |= {".".join(module)} if module else {alias.name for alias in node.names}
            found |= {".".join((*module, alias.name)) for alias in node.names}
    return found


def test_rooms_import_one_way() -> None:
    wrong = []
    for file in modules():
        room = file.relative_to(ROOT).parts[0]
        if room in ALLOWED:
            rooms = {name.split(".")[0] for name in imports(file)} & set(ROOMS)
            wrong += [f"{file.relative_to(ROOT)} imports {other}" for other in rooms - ALLOWED[room] - {room}]
    assert wrong == []


def test_only_the_command_line_imports_manage_and_the_groups() -> None:
    for file in modules():
        if file != ROOT / "cli.py":
            assert not any(name.split(".")[0] == "manage" for name in imports(file)) or file.parent.name == "manage"


def test_no_module_lists_more_than_its_docstring_in_an_init() -> None:
    for room in ROOMS:
        tree = ast.parse((ROOT / room / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree)


def test_every_room_is_packed() -> None:
    packed = (ROOT / "pyproject.toml").read_text()
    assert all(f'"dinov2_toolkit.{room}"' in packed for room in ROOMS)


def test_help_imports_neither_torch_nor_faiss_nor_duckdb() -> None:
    program = """
import sys
from dinov2_toolkit.cli import main
sys.argv = ["dinov2", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "faiss", "duckdb", "numpy", "pyarrow", "PIL", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""
    for group in ([], ["curate"], ["train"], ["evaluate"], ["catalog"]):
        subprocess.run([sys.executable, "-c", program, *group, "--help"], check=True, stdout=subprocess.DEVNULL)
