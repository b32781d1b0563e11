"""Every error that ends a command or an image must be raised by some test: print those of `.coverage` that were not.

Exit 1 if there is one. What a machine of its own is needed for says so by `# pragma: no cover`, with the reason.
"""

import ast
import sys
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).parent.parent
ERRORS = {"ToolkitError", "UnreadableImage", "NotRegularError", "Stopped"}
NOT_OURS = {"tests", "benchmarks", "examples", "build", ".types", ".venv"}


def raised(file: Path) -> dict[int, str]:
    """Return the lines of a file that raise one of ERRORS, with their text."""
    lines = file.read_text().splitlines()
    found = {}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            if node.exc.func.id in ERRORS and "pragma: no cover" not in lines[node.lineno - 1]:
                found[node.lineno] = ast.unparse(node)
    return found


def reached(data: CoverageData) -> dict[Path, set[int]]:
    """Return the lines of each file that ran."""
    found: dict[Path, set[int]] = {}
    for name in data.measured_files():
        found.setdefault((ROOT / name).resolve(), set()).update(data.lines(name) or ())
    return found


def main() -> int:
    """Print the lines that no test has reached, and return the exit code."""
    data = CoverageData(str(ROOT / ".coverage"))
    data.read()
    lines, num, missing = reached(data), 0, 0
    for file in sorted(ROOT.rglob("*.py")):
        if file.relative_to(ROOT).parts[0] in NOT_OURS:
            continue
        for line, text in sorted(raised(file).items()):
            num += 1
            if line not in lines.get(file.resolve(), set()):
                missing += 1
                print(f"{file.relative_to(ROOT)}:{line} {text[:200]}")
    print(f"{num - missing} of {num} errors are raised by a test")
    return 1 if missing or not num else 0


if __name__ == "__main__":
    sys.exit(main())
