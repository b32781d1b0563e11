"""What every finished step leaves behind, and whether it is there already."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from . import catalog
from .cache import touch
from .files import sweep, write_text
from .image_columns import image_batches
from .json_text import json_object
from .lock import writing
from .manifest import (
    Provenance,
    Source,
    is_manifest_name,
    open_manifest,
    part_paths,
    provenance_from,
    provenance_values,
    toolkit_version,
)
from .progress import forget_progress

RUN_PROVENANCE = "provenance.json"  # in a run folder
FILE_PROVENANCE = ".provenance.json"  # behind the name of a file that cannot carry its own


@dataclass(frozen=True)
class Options:
    """The options that every command with an output shares."""

    seed: int = 0
    force: bool = False  # overwrite an output that was made differently
    dry_run: bool = False  # check everything, say what would happen, write nothing
    limit: int | None = None  # only the first so many rows or images


@dataclass(frozen=True)
class Result:
    """What a command prints on stdout: the output's name as it was given, or one value."""

    output: str
    figures: dict[str, object] = field(default_factory=dict)  # for --json
    value: float | None = None  # printed instead of the output where it is the answer
    digits: int = 4  # decimals of the value as printed


def check_manifest_name(output: str) -> Path:
    """Return the output as a path. Raises ToolkitError when it does not end in .parquet, or is a folder."""
    if not output.endswith(".parquet"):
        raise ToolkitError(f"output {output!r} does not end in .parquet; a manifest is a Parquet file: name it so")
    if Path(output).is_dir():
        raise ToolkitError(f"output {output} is a folder; name a Parquet file")
    return Path(output)


def provenance_at(path: Path) -> Provenance | None:
    """Return how a manifest, a run, or a file with its provenance beside it came about; None where it is not ours."""
    for file in (path / RUN_PROVENANCE, path.with_name(f"{path.name}{FILE_PROVENANCE}")):
        if file.is_file():
            try:
                return provenance_from(json_object(file.read_text(encoding="utf-8")), file)
            except ValueError:  # somebody's, by the same name
                return None
    try:
        return open_manifest(path).provenance
    except ToolkitError:
        return None


Find = Callable[[Path], Provenance | None]  # returns the provenance of what stands at a path
NO_SIDE_FILES: Mapping[Path, str] = {}


def is_up_to_date(
    output: Path,
    provenance: Provenance,
    options: Options,
    *,
    side_files: Mapping[Path, str] = NO_SIDE_FILES,
    kind: str = "manifest",
    find: Find = provenance_at,
) -> bool:
    """Tell whether `output` holds this very work already; if so, touch it (so that Make rests) and say so.

    It does not where one of `side_files` comes from other work. Enters it in the catalog where it is missing there, as
    after a kill between the two. `provenance` is that of the work that is wanted, `kind` a word for the output. Raises
    ToolkitError when something else stands there unforced.
    """
    if options.force or not output.exists():
        return False
    there = find(output)
    if there is None or not there.same_work(provenance):
        reason = f"is no {kind} of ours" if there is None else f"was made differently ({difference(there, provenance)})"
        raise ToolkitError(f"{output} exists and {reason}; choose another -o, or --force to overwrite it")
    sides = [(provenance_at(side), side_kind) for side, side_kind in side_files.items() if side.exists()]
    if not all(side and side.kind == side_kind and side.same_work(provenance) for side, side_kind in sides):
        return False
    console.say(f"{output} is up to date")
    if not options.dry_run:
        touch(Source("manifest", str(output.absolute()), there.content_id))
        found = {output: there}
        for side, (made, side_kind) in zip(filter(Path.exists, side_files), sides, strict=True):
            if made is not None and side_kind == "removed":
                found[side] = made
        record_missing(found)
    return True


def record_missing(outputs: Mapping[Path, Provenance]) -> None:
    """Enter finished outputs in the catalog where they are missing there."""
    paths = [str(output.absolute()) for output in outputs]
    known = {(a.path, a.digest) for a in catalog.artifacts(f"path in ({', '.join('?' * len(paths))})", paths)}
    for path, (output, provenance) in zip(paths, outputs.items(), strict=True):
        if provenance.content_id and (path, provenance.content_id) not in known:
            catalog.record(output, provenance, None)


def check_place(output: Path) -> None:
    """Raise ToolkitError, before any work, when an output's name is not UTF-8, or the catalog takes nothing."""
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError:
        what = f"the path of the output, {output.absolute()}, is not UTF-8, as names in manifests are"
        raise ToolkitError(f"{what}; choose another -o, or rename the folder") from None
    catalog.check()


def check_side_file(side: Path, kind: str, output: Path, provenance: Provenance, options: Options) -> None:
    """Check, before any work, that a step which makes `output` may write a manifest of that kind at `side`.

    It may replace what an earlier run of the same command wrote there, whether `output` still stands or not. Raises
    ToolkitError when it is a folder or an input, or anything else stands there and --force was not given.
    """
    if not side.exists():
        return
    if side.is_dir():
        raise ToolkitError(f"{side}, which goes with {output}, is a folder; choose another -o, or move it away")
    try:
        check_not_input(side, provenance)
    except ToolkitError:
        raise ToolkitError(f"{side} is an input, and -o {output} would overwrite it; choose another -o") from None
    if options.force:
        return
    there = provenance_at(side)
    if there is not None and (there.command, there.kind) == (provenance.command, kind):
        return
    what = "is no manifest of ours" if there is None else f"was made by `{there.command}` ({there.kind})"
    what = f"{side}, which goes with {output}, exists and {what}"
    raise ToolkitError(f"{what}; choose another -o, or --force to overwrite it")


def check_not_input(output: Path, provenance: Provenance, find: Find = provenance_at) -> None:
    """Raise ToolkitError where a step would overwrite what it reads, --force or not.

    That is an input by whatever name, a part of one, or somebody's file in a folder or a manifest that is one.
    """
    if not output.exists():
        return
    place, is_foreign = Path(os.path.realpath(output)), find(output) is None
    for source in (*provenance.inputs, *([] if provenance.base is None else [provenance.base])):
        read = Path(source.path)
        if not read.exists():
            continue
        is_part = any(part.exists() and part.samefile(output) for part in (read, *part_paths(read)))
        if is_part or (is_foreign and (place.is_relative_to(os.path.realpath(read)) or _is_named_in(read, place))):
            raise ToolkitError(f"output {output} is what the step reads; choose another -o")


def _is_named_in(manifest: Path, place: Path) -> bool:
    """Tell whether a file is one of a manifest's images."""
    if not is_manifest_name(str(manifest)):
        return False
    pieces = image_batches(open_manifest(manifest), ["uri"])
    return any(os.path.realpath(uri) == str(place) for piece in pieces for uri in _ending_in(piece, place.name))


def _ending_in(images: pa.Table, name: str) -> list[str]:
    uris = images.column("uri")
    found: list[str] = uris.filter(pc.ends_with(uris, name)).to_pylist()
    return found


def difference(there: Provenance, wanted: Provenance) -> str:
    """Say in a few words what an existing output was made with, other than what is wanted."""
    if there.command != wanted.command:
        return f"by `{there.command}`"
    for name in sorted(set(there.parameters) | set(wanted.parameters)):
        old, new = there.parameters.get(name), wanted.parameters.get(name)
        if old != new and str(old) != str(new):
            return f"{name} {old}, now {new}"
    if there.seed != wanted.seed:
        return f"seed {there.seed}, now {wanted.seed}"
    return "from other inputs"


def write_run_provenance(folder: Path, provenance: Provenance) -> None:
    """Keep the provenance of a run in its folder, as a manifest keeps its own in its metadata."""
    write_provenance(folder / RUN_PROVENANCE, provenance)


def write_provenance(file: Path, provenance: Provenance) -> None:
    """Write a provenance as JSON, for what cannot carry its own."""
    values = provenance_values(replace(provenance, version=toolkit_version()))
    write_text(file, json.dumps(values, indent=1, sort_keys=True))


def read_run_provenance(folder: Path) -> Provenance | None:
    """Return the provenance of the run in a folder, or None where there is no run."""
    return provenance_at(folder) if (folder / RUN_PROVENANCE).is_file() else None


def make(
    output: str,
    provenance: Provenance,
    options: Options,
    *,
    describe: Callable[[], None],
    work: Callable[[], Provenance],
    side_files: Mapping[Path, str] = NO_SIDE_FILES,
    update: bool = False,
    kind: str = "manifest",
    find: Find = provenance_at,
) -> Result | None:
    """Run a step unless its output holds this very work already; return what the command prints, None after a dry run.

    Args:
        output: path as the user gave it.
        provenance: of the work that is wanted; without content id and figures.
        describe: says what the step would do; only called in a dry run.
        work: writes the output and returns its provenance with content id and figures.
        side_files: manifests that `work` writes beside the output, and their kinds; checked before any work.
        update: do the work whatever stands at `output`, as a step that resumes or updates it.
        kind, find: as in `is_up_to_date`.

    Raises ToolkitError when `output` or a side file is an input, or is being written by another process, or when
    something else stands there and --force was not given.
    """
    path = Path(output)
    check_not_input(path, provenance, find)
    if not options.dry_run:
        check_place(path)
    with nullcontext() if options.dry_run else writing(path, *side_files):
        if update or not is_up_to_date(path, provenance, options, side_files=side_files, kind=kind, find=find):
            for side, side_kind in side_files.items():
                check_side_file(side, side_kind, path, provenance, options)
            if options.dry_run:
                describe()
            else:
                with recorded(path) as finished:
                    finished.append(work())
    if options.dry_run:
        return None
    forget_progress(provenance)
    sweep(path.parent)  # of a process killed after its output stood
    made = find(path)
    return Result(output, {} if made is None else made.figures)


@contextmanager
def recorded(output: Path) -> Iterator[list[Provenance]]:
    """Time a step; afterwards enter `output` in the catalog with the provenance that the block appended.

    The catalog row comes last: if the block raises, nothing is recorded. Pictures, which have no content id, never are.
    """
    start = time.monotonic()
    finished: list[Provenance] = []
    yield finished
    (provenance,) = finished
    if provenance.content_id:
        try:
            catalog.record(output, provenance, time.monotonic() - start)
        except (ToolkitError, OSError) as problem:
            raise ToolkitError(
                f"{output} is finished but not in the catalog: {problem}; the same command enters it"
            ) from None
