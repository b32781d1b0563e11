"""The sections of a report on runs: curves, what the model saw, settings, where the images come from.

All sections have all runs side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ..errors import ToolkitError
from ..features.page import chart, parts
from ..features.page.document import Section
from ..models.saved import MODEL_JSON
from ..store.lock import is_held
from ..train.config import TrainConfig
from ..train.launch import read_status
from ..train.monitor.health import collapse_reason
from ..train.run_folder import LOCK
from .lineage import lineage
from .run_metrics import (
    BAND,
    GROUPS,
    MAX_POINTS,
    Steps,
    curve,
    figure_of,
    hours,
    is_constant,
    names,
    place_of,
    points,
    read_steps,
    sampled,
)
from .run_pictures import components_of, crops_of
from .run_settings import Difference, differing, nearest_recipe, read_settings, released_recipe, shown
from .targets import RunFolder

WORDS = {  # below the headings of figures
    "Losses": "Each as it is before its weight; the total is their weighted sum.",
    "Health": "Taken from the teacher's outputs and the student's class tokens of one batch.",
}


@dataclass(frozen=True)
class Run:
    """What is known of a run."""

    folder: Path
    command: str
    settings: TrainConfig | str  # or why they cannot be read
    steps: Steps
    state: str


def run_sections(folders: Mapping[str, RunFolder]) -> list[Section]:
    """Return the sections on runs, by the names that the page calls them. What is gone is said in its section."""
    if not folders:
        return []
    runs = {name: read_run(each) for name, each in folders.items()}
    saw: list[Markup] = []
    for name, each in folders.items():
        settings = runs[name].settings
        saw += [parts.heading(name)] if len(runs) > 1 else []
        saw += [parts.note(settings)] if isinstance(settings, str) else crops_of(each, settings)
        saw += components_of(each, each.provenance.seed)
    origins: list[Markup] = []
    seen: set[str] = set()
    for name, each in folders.items():
        origins += [parts.heading(name)] if len(runs) > 1 else []
        origins.append(parts.tree(lineage(each.provenance, each.path, seen)))
    return [
        Section("Training", _training(runs)),
        Section("What the model saw", saw),
        Section("Settings", _settings(runs)),
        Section(
            "Where the images come from", [parts.text("Each line was made from those below it, as recorded."), *origins]
        ),
    ]


def read_run(run: RunFolder) -> Run:
    """Read the settings and logged steps of a run folder."""
    command = run.provenance.command
    settings: TrainConfig | str
    try:
        settings = read_settings(run.path, command)
    except ToolkitError as problem:
        settings = f"The settings cannot be read: {problem}."
    return Run(run.path, command, settings, read_steps(run.path), _state(run.path))


def _state(folder: Path) -> str:
    if (folder / MODEL_JSON).exists():
        return "finished"
    if (folder / LOCK).exists() and is_held(folder / LOCK):
        return "training now"
    return str(read_status(folder).get("message") or "unfinished")


# Curves


def _training(runs: Mapping[str, Run]) -> list[Markup]:
    logged = {name: run.steps for name, run in runs.items() if run.steps}
    made = [_summary(runs)]
    made += [parts.note(f"{name} has logged no step yet.") for name, run in runs.items() if not run.steps]
    made += [parts.note(f"{name}: {reason}.") for name, steps in logged.items() if (reason := _collapse(steps))]
    longest = max((len(steps) for steps in logged.values()), default=0)
    if longest > MAX_POINTS:
        made.append(
            parts.note(
                f"Up to {longest:,} steps were logged. Each curve has {MAX_POINTS} points, means of as many stretches;"
                " its light band spans the lowest and highest values."
            )
        )
    charts: dict[str, list[Markup]] = {group: [] for group in GROUPS}
    constant: list[str] = []
    for name in sorted(names(list(logged.values())), key=place_of):
        found = figure_of(name)
        if found is None:
            continue
        group, figure = found
        curves = {run: of_run for run, steps in logged.items() if len((of_run := curve(steps, name))[1])}
        if not curves:
            continue
        if group == "Schedules" and is_constant(curves):
            value = float(next(iter(curves.values()))[1][0])
            constant.append(f"{figure.title.lower()} {parts.number(_whole(value))}")
            continue
        drawn = points(curves, figure.title)
        spec = chart.lines(
            drawn,
            x="step",
            y=figure.title,
            series="run" if len(runs) > 1 else None,
            order=list(runs),
            limit=figure.limit,
            band=BAND if BAND[0] in drawn[0] else None,
        )
        table = parts.table(f"{figure.title}, some steps", ["step", *curves], sampled(curves))
        charts[group].append(parts.chart(figure.title, spec, table, explanation=figure.explanation))
    for group, drawn_charts in charts.items():
        if drawn_charts:
            words = f"Constant: {', '.join(constant)}." if group == "Schedules" and constant else WORDS.get(group)
            made += [parts.heading(group), *([parts.text(words)] if words else []), parts.side_by_side(drawn_charts)]
    return made


def _collapse(steps: Steps) -> str | None:
    """Return why the last logged step shows a collapse; None where it does not."""
    last = steps[-1]
    return collapse_reason(last) if any(name.endswith("feature_std") for name in last) else None


def _summary(runs: Mapping[str, Run]) -> Markup:
    rows = {name: _key_figures(run) for name, run in runs.items()}
    if len(runs) == 1:
        return parts.key_figures(next(iter(rows.values())))
    header = list(dict.fromkeys(key for row in rows.values() for key in row))
    return parts.table(
        "The runs", ["run", *header], [[name, *(row.get(key) for key in header)] for name, row in rows.items()]
    )


def _key_figures(run: Run) -> dict[str, object]:
    last = run.steps[-1] if run.steps else {}
    figures: dict[str, object] = {"state": run.state}
    if isinstance(run.settings, TrainConfig):
        figures |= {"architecture": run.settings.arch, "steps": _of(last.get("step"), run.settings.steps)}
    for key, name, digits in (
        ("images seen", "samples", 0),
        ("epochs", "epoch", 1),
        ("total loss", "total", 3),
    ):
        if name in last:
            figures[key] = f"{last[name]:,.{digits}f}"
    if len(knn := curve(run.steps, "knn")[1]):
        figures["k-NN accuracy"] = f"{knn[-1]:.1%}"
    if (took := hours(run.steps)) is not None:
        figures["time"] = f"{took:.1f} h" if took >= 1 else f"{60 * took:.0f} min"
    if "peak_memory_mib" in last:
        figures["peak memory"] = f"{last['peak_memory_mib']:,.0f} MiB"
    for key, name in (("skipped steps", "skipped_steps"), ("unreadable images", "replaced_images")):
        if last.get(name):
            figures[key] = _whole(last[name])
    return figures


def _of(done: float | None, steps: int) -> str:
    return f"{steps:,}" if done == steps else f"{done or 0:,.0f} of {steps:,}"


def _whole(value: float | None) -> object:
    """Return a whole number as one, for numbers in a log may be floats."""
    return int(value) if value is not None and float(value).is_integer() else value


# Settings


def _settings(runs: Mapping[str, Run]) -> list[Markup]:
    known = {name: run.settings for name, run in runs.items() if isinstance(run.settings, TrainConfig)}
    made = [parts.note(f"{name}: {run.settings}") for name, run in runs.items() if isinstance(run.settings, str)]
    if len(known) > 1 and (rows := differing(known)):
        made.append(parts.table("Settings that differ between the runs", ["setting", *known], rows))
    for name, config in known.items():
        made += [parts.heading(name)] if len(runs) > 1 else []
        recipe, changed = nearest_recipe(config)
        released, from_released = released_recipe(config)
        made.append(
            parts.text(
                f"The nearest recipe is {recipe}; {_count(changed)} from it. The released DINOv2 configuration nearest"
                f" in size is {released}; {_count(from_released)} from it. Schedules are compared at equal length."
            )
        )
        made += [_difference_table(f"Different from recipe {recipe}", recipe, name, changed)] if changed else []
        folded = _difference_table(f"Different from {released}", released, name, from_released)
        made.append(parts.details(f"What differs from the released configuration ({released})", [folded]))
        every = [[key, shown(value)] for key, value in vars(config).items()]
        made.append(parts.details("All settings", [parts.table("All settings", ["setting", "value"], every)]))
    return made


def _count(changed: list[Difference]) -> str:
    match len(changed):
        case 0:
            return "no setting differs"
        case 1:
            return "one setting differs"
        case number:
            return f"{number} settings differ"


def _difference_table(caption: str, theirs: str, ours: str, changed: list[Difference]) -> Markup:
    return parts.table(
        caption, ["setting", theirs, ours], [[key, shown(there), shown(here)] for key, there, here in changed]
    )
