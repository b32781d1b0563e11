"""Several manifests as arguments of one step, each with or without a number: A.parquet or A.parquet=32."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ToolkitError


def split_number(text: str) -> tuple[Path, str | None]:
    """Return the path and the text after its last `=`, None without one; a `=` in an existing file's name is kept."""
    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), None
    return Path(path), number


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the file names without .parquet, with as many parent folders as make them unique.

    Raises ToolkitError when one file is named twice.
    """
    whole = [path.absolute() for path in paths]
    for position, path in enumerate(whole):
        if path in whole[:position]:
            raise ToolkitError(f"{paths[position]} is given twice; give every manifest once")
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]).removesuffix(".parquet") for path in whole]
        if len(set(names)) == len(names):
            return names
        depth += 1
