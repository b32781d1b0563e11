"""What a report is of: run folders, manifests and scores, told apart by what they hold."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ..curate.inputs import distinct_names
from ..errors import ToolkitError
from ..store.artifact import read_run_provenance
from ..store.image_columns import has_images
from ..store.manifest import Manifest, Provenance, Source, open_manifest
from .manifest_rows import as_written

RUN_FILES = ("config.toml", "metrics.jsonl", "metrics.parquet", "model.json", "status.json", "provenance.json")
SCORE_COLUMNS = {"method", "metric", "value"}
NO_TARGETS = {  # kinds of manifests that a report takes only together with another
    "metrics": "is the metrics of a run; name the run's folder",
    "removed": "lists removed rows; name the manifest beside it, NAME.parquet of NAME.removed.parquet",
    "clusters": "is a table of clusters; name the manifest beside it, NAME.parquet of NAME.clusters.parquet",
}


@dataclass(frozen=True)
class RunFolder:
    """A run folder, finished or not."""

    path: Path
    provenance: Provenance


@dataclass(frozen=True)
class Targets:
    """What was named, each by the shortest name that tells it from the others of its kind."""

    runs: dict[str, RunFolder] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    scores: dict[str, Manifest] = field(default_factory=dict)

    def sources(self) -> tuple[Source, ...]:
        """Return everything as the inputs of a step."""
        runs = [Source("run", str(run.path.absolute()), run_id(run.path)) for run in self.runs.values()]
        manifests = [manifest.source("manifest") for manifest in self.manifests.values()]
        return (*runs, *manifests, *(scores.source("scores") for scores in self.scores.values()))


def open_targets(names: list[str]) -> Targets:
    """Open what was named; a name given twice counts once. Raises ToolkitError for what is none of the three."""
    paths = {Path(name).absolute(): Path(name) for name in names}.values()
    opened: list[RunFolder | Manifest] = [_open(path) for path in paths]
    runs = [each for each in opened if isinstance(each, RunFolder)]
    others = [each for each in opened if isinstance(each, Manifest)]
    scores = [each for each in others if _kind(each) == "scores"]
    manifests = [each for each in others if _kind(each) != "scores"]
    return Targets(
        dict(zip(distinct_names([run.path for run in runs]), runs, strict=True)),
        dict(zip(distinct_names([manifest.path for manifest in manifests]), manifests, strict=True)),
        dict(zip(distinct_names([each.path for each in scores]), scores, strict=True)),
    )


def _open(path: Path) -> RunFolder | Manifest:
    if not path.exists():
        raise ToolkitError(f"no {path}; name run folders, manifests or scores")
    if path.is_dir() and not (path / "_manifest.json").exists():
        provenance = read_run_provenance(path)
        if provenance is None or provenance.kind != "run":
            raise ToolkitError(f"{path} is no run folder and no manifest; name run folders, manifests or scores")
        return RunFolder(path, provenance)
    manifest = as_written(open_manifest(path))
    if (kind := _kind(manifest)) in NO_TARGETS:
        raise ToolkitError(f"{path} {NO_TARGETS[kind]}")
    if kind == "images" and not has_images(manifest) and "embedding" not in manifest.names():
        raise ToolkitError(f"{path} has no column uri, path, image or embedding; name run folders, manifests or scores")
    return manifest


def _kind(manifest: Manifest) -> str:
    """Return the kind of a manifest as design says; of foreign files "scores" where they have such columns."""
    if manifest.provenance is not None:
        return manifest.provenance.kind
    return "scores" if SCORE_COLUMNS <= set(manifest.names()) else "images"


def run_id(folder: Path) -> str:
    """Return a content id of what a report reads of a run: of names, sizes and time stamps of its files."""
    files = [folder / name for name in RUN_FILES if (folder / name).exists()]
    listing = "\n".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()
