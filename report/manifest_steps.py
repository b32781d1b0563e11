"""Sections on single steps of curation: duplicates, clusters, retrieved images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any  # of a Vega-Lite specification

from markupsafe import Markup

from ..curate.cluster.table import FIGURES_HEADER, figure_rows
from ..curate.dedup.verify import MAX_DIFFERENCE
from ..features.page import chart, parts
from ..features.page.document import Section
from ..features.page.thumbnail import Thumbnail, thumbnail
from . import manifest_parts
from .manifest_clusters import CENTRAL, COLUMNS, LISTED, PICTURED, RANDOM, Clusters, Level, read_clusters
from .manifest_difference import AMPLIFIED, difference_picture
from .manifest_duplicates import Duplicates, Group, read_duplicates
from .manifest_flow import Stage
from .manifest_parts import Entry, Other, Strip, image_name, read_thumbnails
from .manifest_retrieved import Line, read_retrieved
from .manifest_rows import Row

KINDS = {
    "largest": "The largest groups",
    "doubtful": "The most doubtful: nearest to the limit, or joined by a chain",
    "random": "Some others at random",
}
DIFFERENCE_WORDS = (
    f"Beside an image, dark on white, what differs from the one that stays, {AMPLIFIED} times as strong as it is, where"
    " the two lie pixel on pixel."
)


def step_sections(stages: Sequence[Stage], seed: int) -> list[Section]:
    """Return a section on every step that removed duplicates, made clusters or retrieved images."""
    sections = []
    for command, section in (
        ("curate dedup", _duplicates_section),
        ("curate cluster", _clusters_section),
        ("curate retrieve", _retrieved_section),
    ):
        of_command = [stage for stage in stages if stage.command == command]
        for stage in of_command:
            name = f": {Path(stage.path).name}" if len(of_command) > 1 else ""
            sections.append(section(stage, name, seed))
    return sections


def _duplicates_section(stage: Stage, name: str, seed: int) -> Section:
    assert stage.manifest is not None, "whose command is known"
    found = read_duplicates(stage.manifest, seed)
    title = f"Duplicates{name}"
    if found is None:
        went = -sum(change.num_images for change in stage.changes if change.kind in ("duplicate", "evaluation"))
        return Section(title, [parts.note(f"{went:,} images went; the list of them is gone.")] if went else [])
    figures = {name: found.figures.get(name) for name in ("groups", "largest_group")}
    body = [
        parts.key_figures(
            {
                "images went": sum(found.reasons.values()),
                "groups of duplicates": figures["groups"],
                "images in the largest": figures["largest_group"],
                **(found.reasons if len(found.reasons) > 1 else {}),
                **({"joined by a chain only": found.num_chained} if found.num_chained else {}),
            }
        ),
        *(parts.text(words) for words in _rule_words(found)),
        parts.side_by_side(_duplicate_charts(found)),
    ]
    for kind, heading in KINDS.items():
        of_kind = [group for group in found.groups if group.kind == kind]
        if of_kind:
            body.append(parts.heading(heading))
            if kind == "doubtful":
                body.append(parts.text(DIFFERENCE_WORDS))
            body.append(manifest_parts.groups(_group_entries(of_kind)))
    return Section(title, body)


def _rule_words(found: Duplicates) -> list[str]:
    """Say what decided, sentence by sentence."""
    rule, words = found.rule, []
    if rule.limit is not None:
        lowered = f", lowered from {MAX_DIFFERENCE} as the images are much alike" if rule.limit < MAX_DIFFERENCE else ""
        words.append(
            f"The descriptor proposes pairs (cosine above {rule.threshold:.4g}), and pixels decide: two images are"
            f" copies if their pixel difference, after alignment, is at most {rule.limit:.4g}{lowered}."
        )
    elif rule.threshold is not None:
        origin = "" if rule.threshold_origin in ("", "given") else f" The threshold was set {rule.threshold_origin}."
        words.append(f"Two images are near-duplicates if their cosine is above {rule.threshold:.4g}.{origin}")
    else:
        words.append("Only equal images went: the same bytes, or the same pixels.")
    keeps = {"largest": "The image with the most pixels stays.", "first": "The first image stays."}
    stays = keeps.get(rule.keep, f"Which image stays, --keep {rule.keep} decides.")
    if rule.linkage == "components":
        stays = f"Pairs that share an image join into one group. {stays}"
    words.append(stays)
    if found.num_chained:
        num = "1 image lies" if found.num_chained == 1 else f"{found.num_chained:,} images lie"
        words.append(
            f"{num} beyond the limit to the one that stays, and went only because a chain of others joins them."
            " If the most doubtful groups below look wrong, --linkage star keeps such images."
        )
    if rule.limit is not None or rule.threshold is not None:
        words.append("The bar below an image shows how near it lies to the limit, which is the mark on the bar.")
    return words


def _duplicate_charts(found: Duplicates) -> list[Markup]:
    rule, charts = found.rule, []
    for title, rows, limit, axis in (
        ("How different the pixels are", found.differences, rule.limit, "pixel difference to the image that stays"),
        ("How similar the descriptors are", found.similarities, None if rule.limit else rule.threshold, "cosine to it"),
    ):
        if rows:
            words = "" if limit is None else f"The line marks the limit, {limit:.4g}; only chains join what is beyond."
            if rows is found.differences and found.num_chained:
                words += " The last bar has all that lie further out."
            numbers = parts.table(
                title, ["from", "to", "reason", "images"], [[r["low"], r["high"], r["reason"], r["num"]] for r in rows]
            )
            charts.append(parts.chart(title, _histogram(rows, axis, limit), numbers, explanation=words))
    return charts


def _histogram(rows: list[Row], axis: str, limit: float | None) -> dict[str, Any]:
    """Return a histogram of rows with low, high, num and perhaps a reason, and a line at a limit."""
    bins: dict[str, Any] = {
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "low", "type": "quantitative", "bin": {"binned": True}, "title": axis},
            "x2": {"field": "high"},
            "y": {"field": "num", "type": "quantitative", "title": "images", "stack": True},
        },
    }
    if len({row.get("reason") for row in rows}) > 1:
        legend = {"title": None, "symbolType": "square", "symbolSize": 120}
        bins["encoding"]["color"] = {"field": "reason", "type": "nominal", "legend": legend}
    spec = chart.histogram([0, 1], [0], x=axis)
    layers = [{**bins, "data": {"values": rows}}]
    if limit is not None:
        mark = {"type": "rule", "strokeDash": [5, 3], "size": 2}
        at = {"x": {"datum": limit, "type": "quantitative"}}
        layers.append({"data": {"values": [{}]}, "mark": mark, "encoding": at})
    return {**{name: spec[name] for name in ("$schema", "width", "height", "autosize")}, "layer": layers}


def _group_entries(groups: list[Group]) -> list[Entry]:
    """Return groups with their images; beside doubtful ones what differs from the one that stays."""
    uris = [uri for group in groups for uri in (group.kept, *(gone.uri for gone in group.removed))]
    pictures = iter(read_thumbnails(uris))
    entries = []
    for group in groups:
        kept = next(pictures)
        others = []
        for gone in group.removed:
            differs = difference_picture(group.kept, gone.uri) if group.kind == "doubtful" and gone.doubt else None
            difference = None if differs is None else thumbnail(differs, alt="what differs, dark on white")
            others.append(Other(next(pictures), gone.reasons, gone.doubt, difference))
        left = group.num_removed - len(others)
        entries.append(Entry(kept, group.why, others, "stays", f"and {left:,} more" if left else ""))
    return entries


def _clusters_section(stage: Stage, name: str, seed: int) -> Section:
    assert stage.manifest is not None, "whose command is known"
    found = read_clusters(stage.manifest, seed)
    title = f"Clusters{name}"
    if found is None:
        return Section(
            title, [parts.note(f"The table of the clusters of {stage.path} is gone; --force makes it again.")]
        )
    figures, body = found.figures, [parts.text("Entropy is 1 when all are of one size, and 0 when one has everything.")]
    levels = figure_rows(figures, len(found.levels))
    rows = [[None if cell == "" else cell for cell in row] for row in levels]
    body.append(parts.table("Levels", FIGURES_HEADER, rows))
    for level in range(1, len(found.levels)):
        if figures.get(f"hub_{level}"):
            what = f"its largest cluster holds {figures[f'hub_share_{level}']:.0%} of those below"
            what = f"Level {level} finds no hierarchy: {what}. Leave it out, or use --allocation flat."
            body.append(parts.note(what))
    body.append(parts.side_by_side([_size_chart(level, found.is_sample) for level in found.levels]))
    for heading, listed in (
        ("Tiny clusters far from all others: perhaps junk", found.suspected),
        ("The largest clusters", found.levels[0].largest[:LISTED]),
    ):
        if listed:
            numbers = parts.table(heading, COLUMNS, [[row[column] for column in COLUMNS] for row in listed])
            strips = manifest_parts.strips(_cluster_strips(listed[:PICTURED], found))
            body += [parts.heading(heading), strips, parts.details(f"{len(listed)} clusters in numbers", [numbers])]
    if found.members:
        body.append(parts.note(f"Shown: up to {CENTRAL} images nearest to the centroid, then {RANDOM} at random."))
    return Section(title, body)


def _size_chart(level: Level, is_sample: bool) -> Markup:
    points = [row for row in level.curve if is_sample or row["set"] == "pool"]
    spec = chart.lines(points, x="rank", y="images", series="set" if is_sample else None, log=True)
    spec["encoding"]["x"]["scale"] = {"type": "log"}
    title = f"Sizes of the {level.num_clusters:,} clusters of level {level.level}"
    numbers = parts.table(
        title, ["set", "rank", "images"], [[row["set"], row["rank"], row["images"]] for row in points]
    )
    return parts.chart(title, spec, numbers, explanation="From the largest to the smallest; both axes are logarithmic.")


def _cluster_strips(listed: list[Row], found: Clusters) -> list[Strip]:
    members = [found.members.get(row["cluster"], []) for row in listed]
    pictures = iter(
        read_thumbnails([m["uri"] for of in members for m in of], [m["label"] for of in members for m in of])
    )
    strips = []
    for row, of_cluster in zip(listed, members, strict=True):
        taken = f", {row['sampled']:,} of them sampled" if found.is_sample else ""
        label = "" if row["label"] is None else f"; {row['purity']:.0%} {row['label']}"
        shown = [(next(pictures), "central" if m["is_central"] else "") for m in of_cluster]
        strips.append(Strip(f"Cluster {row['cluster']}", f"{row['images']:,} images{taken}{label}", shown))
    return strips


def _retrieved_section(stage: Stage, name: str, seed: int) -> Section:
    assert stage.manifest is not None, "whose command is known"
    found = read_retrieved(stage.manifest, seed)
    figures = found.figures
    retrieved = figures.get("retrieved")
    body = [
        parts.key_figures(
            {
                "queries": figures.get("queries"),
                "images retrieved": retrieved,
                "pool images": figures.get("pool"),
                "candidates of several queries": found.num_shared,
            }
        )
    ]
    body += [parts.note(f"The queries of {path} are gone, or others now.") for path in found.missing]
    brought = [[row["num"], row["queries"]] for row in found.brought]
    bars = [{"images": str(row["num"]), "queries": row["queries"]} for row in found.brought]
    charts = []
    if len(found.brought) <= 40:
        title = "How many images a query brought"
        words = "An image that several queries want goes to the most similar."
        numbers = parts.table(title, ["images", "queries"], brought)
        charts.append(parts.chart(title, chart.bars(bars, name="images", value="queries"), numbers, explanation=words))
    if found.similarities:
        title = "How similar the images are to their queries"
        numbers = parts.table(
            title, ["from", "to", "images"], [[r["low"], r["high"], r["num"]] for r in found.similarities]
        )
        charts.append(parts.chart(title, _histogram(found.similarities, "cosine to the query", None), numbers))
    body.append(parts.side_by_side(charts))
    for heading, lines in (
        ("Some queries at random, and what they brought", found.lines),
        ("Queries whose nearest image is the least similar", found.least),
    ):
        if lines:
            body += [parts.heading(heading), manifest_parts.strips(_query_strips(lines))]
    if found.nothing:
        num = next((row["queries"] for row in found.brought if row["num"] == 0), 0)
        least = stage.manifest.provenance.parameters.get("min_similarity") if stage.manifest.provenance else None
        why = "their nearest went to other queries" + ("" if least is None else f", or are less similar than {least}")
        body.append(parts.heading(f"{num:,} queries brought nothing: {why}"))
        body.append(parts.gallery("queries that brought nothing", _pictures(found.nothing)))
    return Section(f"Retrieved images{name}", body)


def _query_strips(lines: list[Line]) -> list[Strip]:
    uris = [uri for line in lines for uri in (line.uri, *(image["uri"] for image in line.images))]
    labels = [label for line in lines for label in (line.label, *(image["label"] for image in line.images))]
    pictures = iter(read_thumbnails(uris, labels))
    strips = []
    for line in lines:
        lead = next(pictures)
        shown = []
        for image in line.images:
            picture = next(pictures)
            label = f" {image['label']}" if image["label"] else ""
            shown.append((picture, f"{image['rank']}. {image['similarity']:.3f}{label}"))
        num = "1 image" if line.num_images == 1 else f"{line.num_images:,} images"
        strips.append(Strip(line.label or image_name(line.uri), f"query; brought {num}", shown, lead))
    return strips


def _pictures(rows: list[Row]) -> list[Thumbnail]:
    return read_thumbnails([row["uri"] for row in rows], [row["label"] for row in rows])
