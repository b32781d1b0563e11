"""The folder of a run: whether it may be written, what is written before the loop, and the record afterwards."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from .. import console
from ..errors import ToolkitError
from ..models.saved import MODEL_JSON, TEACHER_FILE
from ..models.weights import model_content_id
from ..store.artifact import (
    Options,
    Result,
    difference,
    read_run_provenance,
    record_missing,
    write_run_provenance,
)
from ..store.files import TEMPORARY, remove, sweep, write_text
from ..store.lock import held
from ..store.manifest import Provenance, Source
from .config import CONFIG_FILE, COST_KEYS, HEADING, TrainConfig, write_config
from .engine.checkpoint import checkpoints, remove_checkpoints
from .launch import DONE, STATUS
from .monitor.metrics import METRICS_FILE, METRICS_TABLE, read_metrics

CHECKPOINTS, LOCK = "checkpoints", ".lock"
# What a run writes into its folder, and removes under --force; students of several have folders with MODEL_JSON.
WRITTEN = (CONFIG_FILE, METRICS_FILE, METRICS_TABLE, STATUS, MODEL_JSON, TEACHER_FILE)


def run_provenance(command: str, config: TrainConfig, options: Options, sources: tuple[Source, ...]) -> Provenance:
    """Return the provenance of a run: its inputs, and all settings but those that only change its cost."""
    parameters = {name: value for name, value in asdict(config).items() if name not in (*COST_KEYS, "seed")}
    if options.limit is not None:
        parameters["limit"] = options.limit
    # As JSON keeps them (lists for tuples), so that they compare equal to what is read back.
    return Provenance("run", command, json.loads(json.dumps(parameters)), seed=config.seed, inputs=sources)


def is_finished(folder: Path, wanted: Provenance, options: Options, resume: bool) -> bool:
    """Tell whether a folder holds the wanted run, finished; if so, touch its model.json and say so.

    Raises:
        ToolkitError: if something else stands there, or the run is unfinished and `resume` is not given.
    """
    if not folder.exists() or (folder.is_dir() and _is_unbegun(folder)):
        return False
    there = read_run_provenance(folder) if folder.is_dir() else None
    if there is None:
        raise ToolkitError(f"{folder} exists and is no run folder; choose another -o")
    if options.force:
        return False
    if resume and goes_on(there, wanted):
        if not checkpoints(folder / CHECKPOINTS):
            raise ToolkitError(f"{folder} has no checkpoint to go on from; choose another -o, or --force to start over")
        return False
    if not there.same_work(wanted):
        raise ToolkitError(
            f"{folder} was made differently ({difference(there, wanted)}); choose another -o, or --force to start over"
        )
    if (folder / MODEL_JSON).exists():
        console.say(f"{folder} is up to date")
        if not options.dry_run:
            os.utime(folder / MODEL_JSON)
            complete_record(folder, there)
        return True
    saved = checkpoints(folder / CHECKPOINTS)
    if saved and not resume:
        raise ToolkitError(
            f"{folder} holds an unfinished run ({saved[-1].name}); resume with --resume, or --force to start over"
        )
    return False


def goes_on(there: Provenance, wanted: Provenance) -> bool:
    """Tell whether `wanted` is the run that is there, but for more steps."""
    steps = there.parameters.get("steps"), wanted.parameters.get("steps")
    is_longer = isinstance(steps[0], int) and isinstance(steps[1], int) and steps[0] < steps[1]
    return is_longer and replace(there, parameters={**there.parameters, "steps": steps[1]}).same_work(wanted)


def _is_unbegun(folder: Path) -> bool:
    """Tell whether a folder is empty, or has only what a run writes before its provenance."""
    names = {entry.name for entry in folder.iterdir() if not TEMPORARY.fullmatch(entry.name)}
    config = folder / CONFIG_FILE
    is_only_config = names == {LOCK, CONFIG_FILE} and config.is_file()
    return names <= {LOCK} or (is_only_config and config.read_bytes().startswith(HEADING.encode()))


def complete_record(folder: Path, provenance: Provenance) -> None:
    """Complete what a kill after the last file of a finished run kept out: catalog, status; remove its leftovers."""
    if not provenance.content_id:
        metrics = read_metrics(folder)
        content_id = model_content_id(folder)
        provenance = replace(provenance, figures=dict(metrics[-1]) if metrics else {}, content_id=content_id)
        write_run_provenance(folder, provenance)
    record_missing({folder: provenance})
    sweep(folder)
    status = folder / STATUS
    if not status.is_file() or status.read_bytes() != DONE.encode():
        write_text(status, DONE)


@contextmanager
def own_folder(folder: Path, config: TrainConfig, provenance: Provenance, options: Options) -> Iterator[None]:
    """Lock the run folder, without an earlier run under --force, and write `config.toml` and `provenance.json`.

    Raises ToolkitError when another process trains into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK, f"training into {folder}"):
        if options.force:
            remove_run(folder)
        sweep(folder)
        (folder / MODEL_JSON).unlink(missing_ok=True)  # of a finished run that goes on: its checkpoint has it too
        # The settings first: a run that is resumed without --recipe takes them from there.
        write_config(config, folder / CONFIG_FILE)
        write_run_provenance(folder, provenance)
        yield


def remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else.

    Its provenance stays until the new one replaces it: without it the folder would be no run's after a kill.
    """
    if (folder / CHECKPOINTS).is_dir():
        remove_checkpoints(folder / CHECKPOINTS)
    for name in WRITTEN:
        remove(folder / name)
    for student in [entry for entry in folder.iterdir() if (entry / MODEL_JSON).is_file()]:
        for name in (MODEL_JSON, TEACHER_FILE):
            remove(student / name)
        with suppress(OSError):  # something else is in it
            student.rmdir()


def kept_steps(folder: Path) -> str:
    """Say which checkpoint a run would resume from, and how."""
    saved = checkpoints(folder / CHECKPOINTS)
    return f"{saved[-1].name} is saved; resume with --resume" if saved else "no step is saved yet; run it again"


def finished_result(output: str) -> Result:
    """Return what a finished run folder holds, as a command's result."""
    provenance = read_run_provenance(Path(output))
    return Result(output, {} if provenance is None else provenance.figures)
