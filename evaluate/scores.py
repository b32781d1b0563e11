"""Scores: measurements with their interval, kept in a manifest and shown as a table.

M test images, R draws of a training set.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any  # of a row's values

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import console
from ..store.json_text import json_object
from ..store.manifest import SCORE_FIELDS, ManifestWriter, Provenance
from ..store.vectors import Float64, Int64

Correct = npt.NDArray[np.bool_]
Score = dict[str, Any]  # a row of the scores; its keys are SCORE_FIELDS

BOOTSTRAP_DRAWS = 10_000  # of a share, where a draw costs nothing
RESAMPLES = 2_000  # of anything else
INTERVAL = (0.025, 0.975)
HEADLINES = ("top1", "miou", "map")  # the metric that a probe prints: the first of these that was measured


@dataclass(frozen=True)
class Measurement:
    """One figure of a protocol."""

    parameters: dict[str, object]  # all that is needed to repeat it
    metric: str
    value: float
    interval: tuple[float, float]  # 95 %
    num_train: int
    num_test: int
    true_class: str | None = None  # None: of all classes
    predicted_class: str | None = None  # of a confusion


def accuracies(
    parameters: dict[str, object], predictions: Int64, labels: Int64, num_train: int, seed: int
) -> Iterator[Measurement]:
    """Yield top-1 accuracy and, of several predictions an image (M, G), top-5 accuracy, by the test labels (M,)."""
    correct = {"top1": predictions[:, 0] == labels}
    if predictions.shape[1] > 1:
        correct["top5"] = (predictions == labels[:, None]).any(axis=1)
    for metric, is_correct in correct.items():
        value, interval = float(is_correct.mean()), bootstrap_interval(is_correct, seed)
        yield Measurement(parameters, metric, value, interval, num_train, len(labels))


def bootstrap_interval(correct: Correct, seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the share of True in (M,); the number of True among M draws is binomial."""
    counts = np.random.default_rng([seed, 2]).binomial(len(correct), correct.mean(), BOOTSTRAP_DRAWS)
    low, high = np.quantile(counts / len(correct), INTERVAL)
    return float(low), float(high)


def resampled_interval(statistic: Callable[[np.random.Generator], float], seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic that draws images, with replacement, by a generator."""
    random = np.random.default_rng([seed, 2])
    low, high = np.quantile([statistic(random) for _ in range(RESAMPLES)], INTERVAL)
    return float(low), float(high)


def mean_interval(values: Float64, seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of (M,)."""
    return resampled_interval(lambda random: values[random.integers(len(values), size=len(values))].mean(), seed)


def score_row(model: str, method: str, measured: Measurement) -> Score:
    """Return a measurement as a row of the scores."""
    low, high = measured.interval
    row = {"model": model, "method": method, **asdict(measured), "low": low, "high": high}
    return {**row, "parameters": json.dumps(measured.parameters)}


def write_scores(path: Path, provenance: Provenance, scores: list[Score]) -> Provenance:
    """Write a scores manifest and return its provenance, which has the values as figures."""
    with ManifestWriter(path, list(SCORE_FIELDS), provenance) as writer:
        writer.write(pa.Table.from_pylist(scores, schema=pa.schema(SCORE_FIELDS)))
        writer.set_figures(
            **{
                f"{row['model']} {row['method']} {setting_of(row)} {row['metric']}": row["value"]
                for row in overall(scores)
            }
        )
    return writer.provenance


def overall(scores: list[Score]) -> list[Score]:
    """Return the measurements of all classes together."""
    return [row for row in scores if row["true_class"] is None]


def best_score(scores: list[Score]) -> float:
    """Return the highest value of the metric that stands first in HEADLINES."""
    metric = next(metric for metric in HEADLINES if any(row["metric"] == metric for row in scores))
    return max(float(row["value"]) for row in scores if row["metric"] == metric)


def show_scores(scores: list[Score]) -> None:
    """Print a table of the headline metrics on stderr; other metrics stand behind the headline of their method."""
    header = ["model", "method", "setting", "metric", "value", "95 % interval", "also", "train", "test"]
    lines: list[list[object]] = []
    for row in overall(scores):
        value, interval = f"{row['value']:.4f}", f"{row['low']:.3f} to {row['high']:.3f}"
        if row["metric"] not in HEADLINES:
            lines[-1][6] = f"{lines[-1][6]}  {row['metric']} {value}".strip()
            continue
        first = [row["model"], row["method"], setting_of(row), row["metric"]]
        lines.append([*first, value, interval, "", row["num_train"], row["num_test"]])
    console.table("", header, lines)


def setting_of(row: Score) -> str:
    """Return the parameters that tell the measurements of a method apart."""
    parameters = json_object(row["parameters"])
    match row["method"]:
        case "knn":
            few = f", {parameters['per_class']} a class" if "per_class" in parameters else ""
            return f"k={parameters['k']}{few}"
        case "linear":
            blocks = f", {parameters['blocks']} blocks" if parameters["blocks"] > 1 else ""
            mean = " + mean patch" if parameters["mean_patch"] else ""
            return f"rate={parameters['learning_rate']:g}{blocks}{mean}"
        case "logreg":
            return f"C={parameters['C']:.3g}"
        case "segment":
            return f"{parameters['image_size']} px windows"
        case _:
            return "cosine"
