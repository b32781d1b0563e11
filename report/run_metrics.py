"""The logged steps of runs as curves: which figures there are, what healthy looks like, few enough points to draw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..store.manifest import open_manifest
from ..store.vectors import Float64
from ..train.monitor.health import MIN_FEATURE_STD, MIN_PERPLEXITY, UNIFORM_SHARE
from ..train.monitor.metrics import METRICS_FILE, read_metrics

MAX_POINTS = 300  # of a curve
BAND = ("lowest", "highest")  # columns
TABLE_ROWS = 25  # below a chart
SIGNIFICANT = 5  # digits of a value in a chart

Steps = list[dict[str, float]]  # the logged steps of a run
Curve = tuple[Float64, Float64]  # steps and values of a figure, (n,) each


@dataclass(frozen=True)
class Figure:
    """A figure that runs log, and what to know of it."""

    title: str
    explanation: str = ""
    limit: float | None = None  # beyond it a run is not healthy


LOSSES = {
    "total": Figure("Total loss", "The weighted sum that training lowers."),
    "dino_local": Figure("DINO, local crops", "Cross-entropy of small crops with the teacher's class tokens."),
    "dino_global": Figure("DINO, global crops", "The same between the two large crops."),
    "ibot": Figure("iBOT", "Cross-entropy of masked patches with the teacher's patches."),
    "koleo": Figure("KoLeo", "Falls as the class tokens of a batch spread out; may go below 0."),
    "cls_global": Figure("Class token, global crops", "Distance from the teacher's class token."),
    "cls_local": Figure("Class token, local crops", "Distance from the teacher's class token."),
    "patch": Figure("Patch tokens", "Distance from the teacher's patch tokens."),
}
HEALTH = {
    "teacher_entropy": Figure(
        "Teacher entropy", "Nats. Healthy: falls from its start and levels out; near 0 is a collapse."
    ),
    "teacher_kl_to_uniform": Figure(
        "Teacher's distance from uniform",
        "Nats. Healthy: rises within the first steps. The run warns below"
        f" {1 - UNIFORM_SHARE:.0%} of the largest entropy, where the teacher tells nothing apart.",
    ),
    "prototype_perplexity": Figure(
        "Prototypes in use",
        f"Of a batch. Healthy: hundreds or more. Below {MIN_PERPLEXITY:g} (dashed) all images share one.",
        MIN_PERPLEXITY,
    ),
    "rank_me": Figure(
        "Effective rank of the class tokens", "RankMe. Healthy: rises; a fall means that features lose dimensions."
    ),
    "feature_std": Figure(
        "Spread of the class tokens",
        f"0: all alike, 1: fully spread. Healthy: near 1. Below {MIN_FEATURE_STD:g} (dashed) the run has collapsed.",
        MIN_FEATURE_STD,
    ),
    "grad_norm": Figure("Gradient norm", "Before clipping. Healthy: no lasting rise, single peaks do no harm."),
}
SCHEDULES = {
    "lr": Figure("Learning rate"),
    "weight_decay": Figure("Weight decay"),
    "momentum": Figure("Teacher momentum", "How much of the teacher stays at each step."),
    "teacher_temp": Figure("Teacher temperature"),
    "batch_size": Figure("Batch size"),
}
COST = {
    "images_per_s": Figure("Images per second"),
    "tflop_per_s": Figure(
        "Operations per second, in 1e12", "Of all processes; those the step needs, not those done twice."
    ),
    "mfu": Figure("Model FLOP utilisation", "Of the operations per second that the makers state for these GPUs."),
    "data_wait": Figure(
        "Share of time spent waiting for data", "Healthy on a GPU: near 0; else add workers or faster disks."
    ),
    "peak_memory_mib": Figure("Peak memory, MiB", "The most held so far."),
}
ACCURACY = {"knn": Figure("k-NN accuracy", "Of the teacher's class tokens on labelled images, 20 neighbours.")}

GROUPS = {  # in the order of a report
    "Accuracy": ACCURACY,
    "Losses": LOSSES,
    "Health": HEALTH,
    "Schedules": SCHEDULES,
    "Speed and memory": COST,
}


def read_steps(folder: Path) -> Steps:
    """Return the logged steps of a run, finished or not, from `metrics.jsonl`, else `metrics.parquet`; none: []."""
    table = folder / "metrics.parquet"
    if (folder / METRICS_FILE).exists() or not table.exists():
        return read_metrics(folder)
    rows = open_manifest(table).read().to_pylist()
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def figure_of(name: str) -> tuple[str, Figure] | None:
    """Return the group of a logged figure and what to know of it; None for counts and what is shown by another name.

    Of several students each has its own: STUDENT_NAME.
    """
    if name.endswith("_weighted"):
        return None
    for group, figures in GROUPS.items():
        for known, figure in figures.items():
            if name == known:
                return group, figure
            if known == "grad_norm" and name.startswith("grad_norm_"):
                part = name.removeprefix("grad_norm_").replace("_", " ")
                return group, Figure(f"{figure.title}, {part}", figure.explanation)
            if figures not in (SCHEDULES, COST) and name.endswith(f"_{known}"):
                student = name.removesuffix(f"_{known}")
                return group, Figure(f"{figure.title}, {student}", figure.explanation, figure.limit)
    return None


def place_of(name: str) -> int:
    """Return where a figure stands among all, by GROUPS; those of one place keep their order in the log."""
    known = [each for figures in GROUPS.values() for each in figures]
    if name.startswith("grad_norm_"):
        return known.index("grad_norm")
    fitting = [place for place, each in enumerate(known) if name == each or name.endswith(f"_{each}")]
    return fitting[0] if fitting else len(known)


def curve(steps: Steps, name: str) -> Curve:
    """Return steps and values of a figure, (n,) each, where it was logged and is finite."""
    found = [(row["step"], row[name]) for row in steps if math.isfinite(row.get(name, math.nan))]
    taken = np.array(found, dtype=np.float64).reshape(-1, 2)
    return taken[:, 0], taken[:, 1]


def thinned(steps: Float64, values: Float64, max_points: int = MAX_POINTS) -> Float64:
    """Return at most `max_points` points of a curve as rows (n, 4): step, mean value, lowest, highest.

    A longer curve is cut into equal stretches, each of which is one point at its middle.
    """
    if len(values) <= max_points:
        return np.stack([steps, values, values, values], axis=1)
    stretches = zip(np.array_split(steps, max_points), np.array_split(values, max_points), strict=True)
    return np.array([[at.mean().round(), of.mean(), of.min(), of.max()] for at, of in stretches])


def is_constant(curves: Mapping[str, Curve]) -> bool:
    """Tell whether a figure has the same value at every step of every run."""
    values = np.concatenate([values for _, values in curves.values()])
    return bool((values == values[0]).all())


def points(curves: Mapping[str, Curve], title: str) -> list[dict[str, object]]:
    """Return the curves of a figure as rows for `chart.lines`: step, the value under `title`, run.

    With a curve that is too long for single points, also the columns of BAND.
    """
    has_band = any(len(values) > MAX_POINTS for _, values in curves.values())
    rows: list[dict[str, object]] = []
    for run, of_run in curves.items():
        for step, *values in thinned(*of_run).tolist():
            value, low, high = (float(f"{each:.{SIGNIFICANT}g}") for each in values)
            band = dict(zip(BAND, (low, high), strict=True)) if has_band else {}
            rows.append({"step": int(step), title: value, "run": run, **band})
    return rows


def sampled(curves: Mapping[str, Curve]) -> list[list[object]]:
    """Return rows for a table below a chart: a step, then the value of each run there, None where it has none."""
    by_step = {run: dict(np.stack(of_run, axis=1).tolist()) for run, of_run in curves.items()}
    logged = sorted({step for values in by_step.values() for step in values})
    places = np.unique(np.linspace(0, len(logged) - 1, min(TABLE_ROWS, len(logged))).round().astype(int))
    chosen = [logged[place] for place in places.tolist()]
    return [[int(step), *(values.get(step) for values in by_step.values())] for step in chosen]


def hours(steps: Steps) -> float | None:
    """Return about how long a run has trained: the images between logged steps over their speed."""
    if not steps or not all({"samples", "images_per_s"} <= row.keys() for row in steps):
        return None
    samples = np.array([0.0, *(row["samples"] for row in steps)])
    speed = np.array([row["images_per_s"] for row in steps])
    return float(np.nansum(np.diff(samples) / speed)) / 3600


def names(runs: Sequence[Steps]) -> list[str]:
    """Return the names of all figures that were logged, in their order in the log."""
    return list(dict.fromkeys(name for steps in runs for row in steps for name in row))
