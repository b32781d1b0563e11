"""Scores: measurements with their interval, kept in a manifest and shown as a table.

M test images, R draws of a training set.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import console
from ..store.manifest import SCORE_FIELDS, ManifestWriter, Provenance, open_manifest
from ..store.vectors import Float64, Int64

Correct = npt.NDArray[np.bool_]

BOOTSTRAP_DRAWS = 10_000  # of a share, where a draw costs nothing
RESAMPLES = 2_000  # of anything else
INTERVAL = (0.025, 0.975)
HEADLINES = ("top1", "miou", "map")  # the metric that a probe prints: the first of these that was measured


@dataclass(frozen=True)
class Score:
    """One measurement; its fields are SCORE_FIELDS."""

    model: str
    method: str
    parameters: str  # JSON
    metric: str
    value: float
    low: float
    high: float
    num_train: int
    num_test: int


@dataclass(frozen=True)
class Measurement:
    """One figure of a protocol."""

    parameters: dict[str, object]  # all that is needed to repeat it
    metric: str
    value: float
    interval: tuple[float, float]  # 95 %
    num_train: int
    num_test: int


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


def write_scores(path: Path, provenance: Provenance, scores: list[Score]) -> Provenance:
    """Write a scores manifest and return its provenance, which has the values as figures."""
    with ManifestWriter(path, list(SCORE_FIELDS), provenance) as writer:
        writer.write(pa.Table.from_pylist([asdict(score) for score in scores], schema=pa.schema(SCORE_FIELDS)))
        writer.set_figures(**{f"{s.model} {s.method} {_setting(s)} {s.metric}": s.value for s in scores})
    return writer.provenance


def read_scores(path: Path) -> list[Score]:
    """Return the measurements of a scores manifest."""
    return [Score(**row) for row in open_manifest(path).read().to_pylist()]


def best_score(scores: list[Score]) -> float:
    """Return the highest value of the metric that stands first in HEADLINES."""
    metric = next(metric for metric in HEADLINES if any(score.metric == metric for score in scores))
    return max(score.value for score in scores if score.metric == metric)


def show_scores(scores: list[Score]) -> None:
    """Print a table of the headline metrics on stderr; other metrics stand behind the headline of their method."""
    header = ["model", "method", "setting", "metric", "value", "95 % interval", "also", "train", "test"]
    rows: list[list[object]] = []
    for score in scores:
        if score.metric not in HEADLINES:
            rows[-1][6] = f"{rows[-1][6]}  {score.metric} {score.value:.4f}".strip()
            continue
        interval = f"{score.low:.3f} to {score.high:.3f}"
        setting, value = _setting(score), f"{score.value:.4f}"
        rows.append(
            [score.model, score.method, setting, score.metric, value, interval, "", score.num_train, score.num_test]
        )
    console.table("", header, rows)


def _setting(score: Score) -> str:
    """Return the parameters that tell the measurements of a method apart."""
    parameters = json.loads(score.parameters)
    match score.method:
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
