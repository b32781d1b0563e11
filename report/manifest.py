"""Sections on manifests: from the raw files to what is left, step by step, and what came of the composition."""

import json
import os
from collections.abc import Mapping

from markupsafe import Markup

from ..curate.inputs import distinct_names
from ..features.page import chart, parts
from ..features.page.document import Section
from ..features.page.thumbnail import Thumbnail
from ..store.manifest import Manifest
from . import manifest_parts
from .manifest_clusters import Clusters, read_clusters
from .manifest_composition import Composition, read_cluster_composition, read_composition, read_overlaps
from .manifest_flow import Stage, ancestors, pool_of, read_flow
from .manifest_map import find_map, map_section
from .manifest_parts import Strip, image_name, read_thumbnails
from .manifest_removed import SHOWN, Reason, read_removed
from .manifest_rows import Row
from .manifest_steps import step_sections

NOT_SETTINGS = ("sources", "parts", "columns", "metric", "init", "polish")  # inputs, and what cannot be set


def manifest_sections(manifests: Mapping[str, Manifest], *, seed: int) -> list[Section]:
    """Return what there is to say about manifests, by name, and about all that they were made from.

    Rows are counted as they stream by; images are read for a fixed number of thumbnails, drawn by the seed.
    """
    if not manifests:
        return []
    stages = read_flow(list(manifests.values()))
    sections = [_flow_section(stages), *step_sections(stages, seed), _composition_section(stages)]
    if (map_of := find_map(stages)) is not None:
        sections.append(map_section(map_of, manifests, seed))
    sections.append(_removed_section(read_removed(stages, seed)))
    return [section for section in sections if section.parts]


def _flow_section(stages: list[Stage]) -> Section:
    rows = []
    titles = {stage.key: stage.title for stage in stages}
    for stage in stages:
        raw = ancestors(stages, stage.key)[0].num_images
        share = f"{stage.num_images / raw:.1%}" if raw and stage.num_images is not None else None
        changes = "; ".join(f"{manifest_parts.signed(each.num_images)} {each.reason}" for each in stage.changes)
        origin = ", ".join(titles[key] for key in stage.parents) or None
        made_by = f"{stage.command}: {_settings(stage)}" if stage.command else None
        rows.append([stage.title, stage.num_images, share, origin, changes or None, made_by, stage.path, stage.missing])
    header = ["step", "images", "of the raw", "made from", "what went or came", "made by", "file", "note"]
    if not any(stage.missing for stage in stages):
        header, rows = header[:-1], [row[:-1] for row in rows]
    intro = "Each bar is as long as its number of images; colours say why images went at a step."
    tables = [parts.table("The steps and the reason of every loss", header, rows)]
    for stage in stages:
        figures = stage.manifest.provenance.figures if stage.manifest and stage.manifest.provenance else {}
        composition = figures.get("composition")
        if stage.command == "curate union" and isinstance(composition, list):
            rows = [[part["source"], part["rows"], part["images"], f"{part['share']:.1%}"] for part in composition]
            header = ["part", "images", "not in earlier parts", "share of draws in training"]
            tables.append(parts.table(f"The parts of {os.path.basename(stage.path)}", header, rows))
    return Section(
        "From the raw files to what is left",
        [parts.text(intro), manifest_parts.flow(stages), parts.details("The same as tables", tables)],
    )


def _settings(stage: Stage) -> str:
    """Return the settings with which a step was called, those left out that say nothing."""
    provenance = None if stage.manifest is None else stage.manifest.provenance
    parameters = {} if provenance is None else {**provenance.parameters, "seed": provenance.seed}
    return ", ".join(
        f"{name} {json.dumps(value) if isinstance(value, list) else value}"
        for name, value in parameters.items()
        if name not in NOT_SETTINGS and value is not None and value is not False and value not in ([], "")
    )


def _composition_section(stages: list[Stage]) -> Section:
    opened = {stage.key: stage.manifest for stage in stages if stage.manifest is not None}
    names = dict(zip(opened, distinct_names([manifest.path for manifest in opened.values()]), strict=True))
    given = [stage.key for stage in stages if stage.is_given]
    pools = [pool.key for key in given if (pool := pool_of(stages, key)) is not None]
    shown = [names[key] for key in dict.fromkeys([*pools, *given])]
    found = read_composition({names[key]: manifest for key, manifest in opened.items()})
    body = []
    if len(given) > 1:
        overlaps = read_overlaps({names[key]: opened[key] for key in given})
        body.append(_side_by_side(found, shown, overlaps))
    else:
        rows = [[each.name, each.num_images, each.num_labelled, each.num_labels, each.entropy] for each in found.sets]
        body.append(parts.table("All steps", ["set", "images", "with a label", "labels", "evenness"], rows))
    if found.shares:
        words = "Evenness is the normalized entropy of labels: 1 when all are equally frequent, 0 when one is alone."
        body = [parts.text(words), *body, _share_chart(found, shown)]
    else:
        body.append(parts.note("No image has a label, so nothing can be said about shares of labels."))
    for stage in stages:
        clusters = read_clusters(stage.manifest, 0) if stage.command == "curate cluster" and stage.manifest else None
        if clusters is not None and clusters.is_sample:
            body.append(_cluster_share_chart(stage, clusters))
        elif clusters is not None and (others := [key for key in given if key != stage.key]):
            level = clusters.levels[-1].level
            sets = {names[key]: opened[key] for key in (stage.key, *others)}
            by_cluster = read_cluster_composition(opened[stage.key], level, sets)
            body.append(_share_chart(by_cluster, list(sets), f"cluster of level {level}, {names[stage.key]}"))
    title = "Composition" if len(shown) == 1 else "Composition before and after"
    return Section("Selections side by side" if len(given) > 1 else title, body)


def _side_by_side(found: Composition, shown: list[str], overlaps: dict[tuple[str, str], int]) -> Markup:
    """Return a table with a column for each set: counts, evenness, images in common, shares of labels."""
    sets = {each.name: each for each in found.sets}
    shares = {(row["label"], row["name"]): row["share"] for row in found.shares}
    rows: list[list[object]] = [
        ["images", *(sets[name].num_images for name in shown)],
        ["with a label", *(sets[name].num_labelled for name in shown)],
        ["labels", *(sets[name].num_labels for name in shown)],
        ["evenness of labels", *(sets[name].entropy for name in shown)],
    ]
    for other in dict.fromkeys(one for one, _ in overlaps):
        rows.append([f"in common with {other}", *(overlaps.get((name, other)) for name in shown)])
    for label in dict.fromkeys(row["label"] for row in found.shares):
        rows.append([f"share of {label}", *(shares.get((label, name)) for name in shown)])
    return parts.table("What the report is of, and where it comes from", ["", *shown], rows)


def _share_chart(found: Composition, shown: list[str], what: str = "label") -> Markup:
    """Return shares as bars: of the pool, and of what the report is of."""
    rows = [
        {"label": row["label"], "share": row["share"], "set": row["name"]}
        for row in found.shares
        if row["name"] in shown
    ]
    title = f"Share of each {what}"
    labels = list(dict.fromkeys(row["label"] for row in found.shares))
    sets = [each.name for each in found.sets if each.num_labelled]
    shares = {(row["label"], row["name"]): row["share"] for row in found.shares}
    numbers = parts.table(
        title, ["label", *sets], [[label, *(f"{shares[label, name]:.2%}" for name in sets)] for label in labels]
    )
    spec = chart.bars(rows, name="label", value="share", series="set" if len(shown) > 1 else None)
    spec["encoding"]["x"]["axis"] = {"format": "%"}
    evenness = [f"{each.name} {parts.number(each.entropy)}" for each in found.sets if each.name in shown]
    words = f"Of the images that have one, the most common of the pool first. Evenness: {', '.join(evenness)}."
    return parts.chart(title, spec, numbers, explanation=words)


def _cluster_share_chart(stage: Stage, clusters: Clusters) -> Markup:
    level = clusters.levels[-1]
    totals = {column: sum(row[column] for row in level.largest) for column in ("images", "sampled")}
    names = {"images": "pool", "sampled": "sample"}
    rows = [
        {
            "cluster": f"{row['cluster']} {row['label'] or ''}".strip(),
            "share": row[column] / max(totals[column], 1),
            "set": names[column],
        }
        for row in level.largest
        for column in names
    ]
    before, after = (clusters.figures.get(f"{name}_{level.level}") for name in ("entropy", "sample_entropy"))
    title = f"Share of each cluster of level {level.level}, {os.path.basename(stage.path)}"
    numbers = parts.table(
        title,
        ["cluster", "label", "images", "sampled"],
        [[row["cluster"], row["label"], row["images"], row["sampled"]] for row in level.largest],
    )
    spec = chart.bars(rows, name="cluster", value="share", series="set")
    spec["encoding"]["x"]["axis"] = {"format": "%"}
    words = f"Evenness {parts.number(before)} in the pool, {parts.number(after)} in the sample."
    more = (
        ""
        if level.num_clusters == len(level.largest)
        else f" The {len(level.largest)} largest of {level.num_clusters:,}."
    )
    return parts.chart(title, spec, numbers, explanation=words + more)


def _removed_section(reasons: list[Reason]) -> Section:
    if not reasons:
        return Section("Removed images", [])
    pictures = iter(read_thumbnails([example["uri"] for reason in reasons for example in reason.examples]))
    strips = []
    for reason in reasons:
        shown = [(picture := next(pictures), _caption(example, picture)) for example in reason.examples]
        words = f"{reason.num_images:,} images, {os.path.basename(reason.stage.path)}"
        strips.append(Strip(reason.reason, words, shown))
    body = [manifest_parts.strips(strips), parts.note(f"Shown: {SHOWN} at most of each reason, drawn at random.")]
    return Section("Removed images by reason", body)


def _caption(example: Row, picture: Thumbnail) -> str:
    """Return the values of a reason, which stand behind a colon; else, and where it cannot be shown, the name."""
    _, _, values = (example["reason"] or "").partition(":")
    return values.strip() if values and picture.source else image_name(example["uri"])
