"""The section of a report on scores: the best of each model and method, all of them, classes, and confusions."""

from collections.abc import Iterable, Mapping
from typing import Any  # of a row's values

import pyarrow as pa
from markupsafe import Markup

from ..errors import ToolkitError
from ..evaluate.scores import HEADLINES, setting_of
from ..features.page import chart, parts
from ..features.page.document import Section
from ..store.image_columns import read_as
from ..store.manifest import SCORE_FIELDS, Manifest

MAX_ROWS = 500  # of a table
MAX_SIDE = 30  # classes of a confusion that is drawn; of more, the pairs are listed
MAX_PAIRS = 50

Row = dict[str, Any]
TITLES = {"top1": "Accuracy", "miou": "Mean intersection over union", "map": "Mean average precision"}
PERCENT = {"recall", *HEADLINES}  # metrics that are shares


def score_sections(scores: Mapping[str, Manifest]) -> list[Section]:
    """Return the section on scores, several files side by side, by the names that the page calls them."""
    rows = [{"file": name, **row} for name, manifest in scores.items() for row in _read(manifest)]
    if not scores:
        return []
    if not rows:
        return [Section("Scores", [parts.note("There are no scores in these files.")])]
    overall = [row for row in rows if row["true_class"] is None]
    made = [
        parts.text(
            "How well frozen features suit labelled images, which pretraining may have seen without their labels. Each"
            " score has its 95 % interval: that of resampled test images. Scores whose intervals overlap may differ by"
            " chance."
        ),
        *_best(overall, len(scores) > 1),
        parts.details("All scores", [_table("All scores", overall, len(scores) > 1)]),
    ]
    by_class = [row for row in rows if row["metric"] == "recall" and row["true_class"] is not None]
    if by_class:
        made += _classes(by_class)
        made += _confusions([row for row in rows if row["metric"] == "confusion"])
    else:
        made.append(
            parts.note("These scores have no figures by class: dinov2 evaluate probe --method knn records them.")
        )
    return [Section("Scores", made)]


def _read(manifest: Manifest) -> list[Row]:
    """Return the rows of a file that have a value; what an older or foreign one does not have is None.

    Raises ToolkitError when values are not numbers.
    """
    if "value" not in manifest.names():
        return []
    kind = manifest.schema.field("value").type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ToolkitError(f"the column `value` of {manifest.path} is {kind}; scores are numbers")
    known = ("model", "method", "parameters", "metric", "value", "low", "high", "num_train", "num_test")
    wanted = [*known, "true_class", "predicted_class"]
    there = [name for name in wanted if name in manifest.names()]
    fields = [field for field in SCORE_FIELDS if field.name in there]
    rows = ({**dict.fromkeys(wanted), **row} for row in read_as(manifest, fields).to_pylist())
    return [{**row, "metric": str(row["metric"])} for row in rows if row["value"] is not None]


def _best(rows: list[Row], has_files: bool) -> list[Markup]:
    """Return a table and a chart of the best headline of each file, model and method."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = _subject(row, has_files), str(row["method"]), str(row["metric"])
        if row["metric"] in HEADLINES and (key not in best or row["value"] > best[key]["value"]):
            best[key] = row
    if not best:
        return []
    table = _table("The best setting of each method", list(best.values()), has_files)
    made: list[Markup] = [table]
    for metric in dict.fromkeys(row["metric"] for row in best.values()):
        drawn = [
            {
                "features": _subject(row, has_files),
                "percent": round(100 * row["value"], 2),
                "low": _percent(row["low"]),
                "high": _percent(row["high"]),
                "method": row["method"],
            }
            for row in best.values()
            if row["metric"] == metric
        ]
        title = TITLES[metric]
        spec = chart.intervals(drawn, name="features", value="percent", low="low", high="high", series="method")
        numbers = parts.table(title, list(drawn[0]), [list(row.values()) for row in drawn])
        made.append(parts.chart(title, spec, numbers, explanation="In percent; bars are 95 % intervals."))
    return made


def _table(caption: str, rows: list[Row], has_files: bool) -> Markup:
    header = [*(["file"] if has_files else []), "features", "method", "setting", "metric", "value", "95 % interval"]
    lines = [
        [
            *([row["file"]] if has_files else []),
            row["model"],
            row["method"],
            _setting(row),
            row["metric"],
            _shown(row["metric"], row["value"]),
            _interval(row),
            row["num_train"],
            row["num_test"],
        ]
        for row in rows[:MAX_ROWS]
    ]
    cut = f"{caption}, the first {MAX_ROWS:,} of {len(rows):,}" if len(rows) > MAX_ROWS else caption
    return parts.table(cut, [*header, "train images", "test images"], lines)


def _classes(rows: list[Row]) -> list[Markup]:
    """Return a table of classes by models, the hardest first."""
    subjects = list(dict.fromkeys(_subject(row, True) for row in rows))
    by_class: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_class.setdefault(row["true_class"], {})[_subject(row, True)] = row
    names = _names(subjects)
    hardest = sorted(by_class, key=lambda name: (_mean(each["value"] for each in by_class[name].values()), name))
    lines = [
        [
            name,
            *(_shown("recall", by_class[name][each]["value"]) if each in by_class[name] else None for each in subjects),
            next(iter(by_class[name].values()))["num_test"],
        ]
        for name in hardest[:MAX_ROWS]
    ]
    cut = f", the hardest {MAX_ROWS} of {len(hardest):,}" if len(hardest) > MAX_ROWS else ""
    return [
        parts.heading("By class"),
        parts.text(
            "How many test images of a class are recognised by the vote of their nearest neighbours, at the best k of"
            " each model. The hardest classes stand first."
        ),
        parts.table(f"Recall by class{cut}", ["class", *(names[each] for each in subjects), "test images"], lines),
    ]


def _confusions(rows: list[Row]) -> list[Markup]:
    """Return what is taken for what: a matrix of each model with few classes, a list of pairs with many."""
    heading = parts.heading("What is taken for what")
    if not rows:
        return [heading, parts.text("No test image was taken for another class.")]
    matrices: list[Markup] = []
    lists: list[Markup] = []
    subjects = list(dict.fromkeys(_subject(row, True) for row in rows))
    names = _names(subjects)
    for subject in subjects:
        own = [row for row in rows if _subject(row, True) == subject]
        most = sorted(own, key=lambda row: (-row["value"], row["true_class"], row["predicted_class"]))[:MAX_PAIRS]
        lines = [
            [row["true_class"], row["predicted_class"], _shown("recall", row["value"]), row["num_test"]] for row in most
        ]
        caption = f"{names[subject]}: the most frequent confusions"
        pairs = parts.table(caption, ["class", "taken for", "share", "test images of the class"], lines)
        classes = sorted({row[side] for row in own for side in ("true_class", "predicted_class")})
        if len(classes) > MAX_SIDE:
            lists.append(pairs)
            continue
        cells = [
            {"class": row["true_class"], "taken for": row["predicted_class"], "percent": round(100 * row["value"], 1)}
            for row in own
        ]
        spec = chart.heatmap(cells, x="taken for", y="class", value="percent", order=classes)
        matrices.append(parts.chart(names[subject], spec, pairs))
    words = "Share of the test images of a class that neighbours take for another; a stronger colour is a larger share."
    return [heading, parts.text(words), *([parts.side_by_side(matrices)] if matrices else []), *lists]


def _subject(row: Row, has_files: bool) -> str:
    """Return what was measured: features, with their file where there are several."""
    return f"{row['file']}: {row['model']}" if has_files else str(row["model"])


def _names(subjects: list[str]) -> dict[str, str]:
    """Return subjects without the file where there is but one."""
    files = {subject.partition(": ")[0] for subject in subjects}
    return {subject: subject if len(files) > 1 else subject.partition(": ")[2] for subject in subjects}


def _setting(row: Row) -> str:
    """Return the setting of a measurement; of a foreign one its parameters as they stand."""
    try:
        return setting_of(row)
    except (KeyError, TypeError, ValueError):
        return str(row["parameters"] or "")


def _shown(metric: str, value: float | None) -> object:
    is_share = metric in PERCENT or metric.startswith(("top", "recall"))
    return value if value is None or not is_share else f"{100 * value:.1f} %"


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)


def _interval(row: Row) -> str:
    if row["low"] is None or row["high"] is None:
        return parts.NOTHING
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
