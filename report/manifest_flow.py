"""The flow of images from the raw files to what is left, step by step, with the reason of every loss.

It is read back from the provenance of the manifests that are given.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc

from ..curate.dedup.decisions import REASONS
from ..curate.embed.filters import is_filtered
from ..store.manifest import Manifest, Provenance, Source
from .manifest_rows import find, removed_rows, sources

Kind = Literal["unreadable", "filtered", "duplicate", "evaluation", "unchosen", "repeated", "added"]
MAIN_ROLES = ("images", "manifest", "pool", "part")  # of inputs whose images go through a step
DEDUP_FIGURES = ("near_duplicates", "same_bytes", "same_pixels", "against")  # where the removed rows are gone
NAMED_SOURCES = 3  # of a folder's sources, those that a title names


@dataclass(frozen=True)
class Change:
    """Why some images leave at a step, or come in."""

    reason: str
    kind: Kind
    num_images: int  # below 0: they leave


@dataclass(frozen=True)
class Stage:
    """What stands after a step: `num_images` are those of all `parents`, and the `changes`."""

    key: str  # content id
    title: str
    path: str
    num_images: int | None  # None: not known
    parents: tuple[str, ...] = ()  # keys
    changes: tuple[Change, ...] = ()
    missing: str = ""  # why the file itself is not read
    manifest: Manifest | None = None
    is_given: bool = False

    @property
    def command(self) -> str:
        """The command that made it; empty where that is not known."""
        return self.manifest.provenance.command if self.manifest and self.manifest.provenance else ""


def read_flow(given: Sequence[Manifest]) -> list[Stage]:
    """Return the steps by which manifests came about, each after those it was made from."""
    stages: dict[str, Stage] = {}
    for manifest in given:
        _add(manifest, stages)
    keys = {manifest.content_id for manifest in given}
    return [replace(stage, is_given=stage.key in keys) for stage in stages.values()]


def ancestors(stages: Sequence[Stage], key: str) -> list[Stage]:
    """Return a stage and those it was made from, in their order."""
    wanted = {key}
    for stage in reversed(stages):
        if stage.key in wanted:
            wanted.update(stage.parents)
    return [stage for stage in stages if stage.key in wanted]


def pool_of(stages: Sequence[Stage], key: str) -> Stage | None:
    """Return the first manifest that a stage was made from: the pool, before anything but unreadable files was lost."""
    return next((stage for stage in ancestors(stages, key) if stage.manifest is not None), None)


def _add(manifest: Manifest, stages: dict[str, Stage]) -> str:
    key, provenance = manifest.content_id, manifest.provenance
    if key in stages:
        return key
    if provenance is None:
        stages[key] = Stage(key, "Raw images", str(manifest.path), manifest.num_rows, manifest=manifest)
        return key
    removed = _removed(manifest)
    parents = tuple(dict.fromkeys(_parents(manifest, removed, stages)))
    counts = [stages[parent].num_images for parent in parents]
    before = sum(count for count in counts if count is not None) if counts and None not in counts else None
    changes = [*removed, *_changes(provenance)]
    if before is not None and (rest := manifest.num_rows - before - sum(each.num_images for each in changes)):
        changes.append(Change(_rest(provenance), "unchosen", rest) if rest < 0 else Change("more rows", "added", rest))
    is_again = provenance.command == "curate embed" and any(stages[parent].command for parent in parents)
    title = "Images embedded again" if is_again else _title(provenance)
    stages[key] = Stage(key, title, str(manifest.path), manifest.num_rows, parents, tuple(changes), manifest=manifest)
    return key


def _parents(manifest: Manifest, removed: list[Change], stages: dict[str, Stage]) -> Iterator[str]:
    provenance = manifest.provenance
    assert provenance is not None
    main = sources(provenance, *MAIN_ROLES)
    folders = [source for source in main if source.role == "images"]
    known = 0
    for number, source in enumerate(source for source in main if source.role != "images"):
        found = find(source, manifest.path)
        if found is None:
            stage = _missing(source, _num_read(manifest, removed, number, len(main)), provenance)
            base = provenance.base
            if base is not None and base.content_id != source.content_id and (pool := find(base, manifest.path)):
                rest = None if stage.num_images is None else stage.num_images - pool.num_rows
                lost = Change("lost on a way that is not known any more", "unchosen", rest) if rest else None
                stage = replace(stage, parents=(_add(pool, stages),), changes=(lost,) if lost else ())
            stages.setdefault(stage.key, stage)
            known += stage.num_images or 0
            yield stage.key
        else:
            known += found.num_rows
            yield _add(found, stages)
    if folders:
        key = "+".join(source.content_id for source in folders)
        names = [source.path for source in folders]
        shown = ", ".join(names[:NAMED_SOURCES]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        gone = [name for name in names if name != "-" and not os.path.exists(name)]
        missing = f"gone: no {gone[0]}" if gone else ""
        total = manifest.num_rows - sum(change.num_images for change in removed) - known
        stages.setdefault(key, Stage(key, "Raw files", shown, total, missing=missing))
        yield key


def _missing(source: Source, num_images: int | None, made: Provenance) -> Stage:
    is_there = Path(source.path).exists()
    why = "it was made again since, and is another now" if is_there else "gone: no such file"
    title = "Raw images" if made.command == "curate embed" else "Images"
    return Stage(source.content_id, title, source.path, num_images, missing=why)


def _num_read(manifest: Manifest, removed: list[Change], number: int, num_inputs: int) -> int | None:
    """Return how many rows a step read from an input that is gone, by its figures; None where these do not say."""
    assert manifest.provenance is not None
    figures, parameters = manifest.provenance.figures, manifest.provenance.parameters
    match manifest.provenance.command:
        case "curate embed" | "curate dedup" if num_inputs == 1:
            return manifest.num_rows - sum(change.num_images for change in removed)
        case "curate retrieve":
            return _whole(figures.get("pool"))
        case "curate union":
            composition = figures.get("composition")
            return _whole(composition[number].get("rows")) if isinstance(composition, list) else None
        case "curate cluster" if parameters.get("sample") is None:
            return manifest.num_rows
    return None


def _removed(manifest: Manifest) -> list[Change]:
    """Return why a step removed images, from its list of them, else from its figures."""
    assert manifest.provenance is not None
    figures = manifest.provenance.figures
    if (rows := removed_rows(manifest)) is not None:
        counts: Counter[str] = Counter()
        for batch in rows.batches(["reason"]):
            for each in pc.value_counts(batch.column(0)).to_pylist():
                counts[short_reason(each["values"])] += each["counts"]
        return [Change(reason, kind_of(reason), -count) for reason, count in counts.most_common()]
    if manifest.provenance.command == "curate dedup":
        named = [(reason, _whole(figures.get(name))) for reason, name in zip(REASONS, DEDUP_FIGURES, strict=False)]
        return [Change(reason, kind_of(reason), -count) for reason, count in named if count]
    filtered = _whole(figures.get("filtered")) or 0
    unreadable = (_whole(figures.get("removed")) or 0) - filtered
    changes = [Change("cannot be read", "unreadable", -unreadable), Change("filtered", "filtered", -filtered)]
    return [change for change in changes if change.num_images]


def short_reason(reason: str | None) -> str:
    """Return a reason without the values, which stand behind a colon."""
    return (reason or "no reason given").split(":", 1)[0]


def kind_of(reason: str) -> Kind:
    """Return the kind of a reason for which a step removed an image."""
    if reason in REASONS:
        return "evaluation" if "evaluation" in reason else "duplicate"
    return "filtered" if is_filtered(reason) else "unreadable"


def _changes(provenance: Provenance) -> list[Change]:
    figures = provenance.figures
    match provenance.command:
        case "curate retrieve":
            came = (_whole(figures.get("images")) or 0) - (_whole(figures.get("retrieved")) or 0)
            return [Change("queries, which came along", "added", came)] if came else []
        case "curate union":
            again = _whole(figures.get("collisions"))
            return [Change("in an earlier part already", "repeated", -again)] if again else []
    return []


def _rest(provenance: Provenance) -> str:
    """Say why images that no list names did not come through a step."""
    parameters = provenance.parameters
    why = []
    match provenance.command:
        case "curate cluster" if parameters.get("sample") is not None:
            why.append("not drawn for the balanced sample")
        case "curate retrieve" if parameters.get("per_cluster") is not None:
            why.append("not among the nearest in a cluster with queries")
        case "curate retrieve":
            least = parameters.get("min_similarity")
            why.append("not among the nearest of any query" + (f" by {least} and more" if least is not None else ""))
        case "catalog sql":
            why.append("not selected by the query")
    if parameters.get("where"):
        why.append(f"not fulfilling --where {parameters['where']}")
    if parameters.get("limit") is not None:
        why.append(f"beyond --limit {parameters['limit']}")
    return ", or ".join(why) or "not taken over"


def _title(provenance: Provenance) -> str:
    parameters = provenance.parameters
    match provenance.command:
        case "curate embed":
            return "Query images" if provenance.role == "queries" else "Readable images"
        case "curate dedup":
            return "Unique images"
        case "curate cluster":
            return "Clustered images" if parameters.get("sample") is None else "Balanced sample"
        case "curate retrieve":
            return "Retrieved images"
        case "curate union":
            return "Union"
        case "curate map":
            return "Map"
        case "catalog sql":
            return "Images that a query selects"
    return provenance.command.removeprefix("curate ").capitalize() or "Images"


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
