"""Scores: measurements with their interval, kept in a manifest and shown as a table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import console
from ..store.manifest import SCORE_FIELDS, ManifestWriter, Provenance, open_manifest

BOOTSTRAP_DRAWS = 10_000
INTERVAL = (0.025, 0.975)


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


def bootstrap_interval(correct: npt.NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the share of True in (M,), by drawing M images with replacement again and again.

    How many of the images drawn are True is binomial, so the counts are drawn at once.
    """
    counts = np.random.default_rng([seed, 2]).binomial(len(correct), correct.mean(), BOOTSTRAP_DRAWS)
    low, high = np.quantile(counts / len(correct), INTERVAL)
    return float(low), float(high)


def write_scores(path: Path, provenance: Provenance, scores: list[Score]) -> Provenance:
    """Write a scores manifest and return its provenance, which has the values as figures."""
    with ManifestWriter(path, list(SCORE_FIELDS), provenance) as writer:
        writer.write(pa.Table.from_pylist([asdict(score) for score in scores], schema=pa.schema(SCORE_FIELDS)))
        writer.set_figures(**{f"{s.model} {s.method} {_setting(s)} {s.metric}": s.value for s in scores})
    return writer.provenance


def read_scores(path: Path) -> list[Score]:
    """Return the measurements of a scores manifest."""
    return [Score(**row) for row in open_manifest(path).read().to_pylist()]


def show_scores(scores: list[Score]) -> None:
    """Print accuracies, one measurement a line, as a table on stderr."""
    top5 = {(s.model, s.method, s.parameters): s.value for s in scores if s.metric == "top5"}
    header = ["model", "method", "setting", "accuracy", "95 % interval", *(["top 5"] if top5 else []), "train", "test"]
    rows = []
    for score in scores:
        if score.metric != "top1":
            continue
        key = (score.model, score.method, score.parameters)
        rows.append(
            [
                score.model,
                score.method,
                _setting(score),
                f"{score.value:.4f}",
                f"{score.low:.3f} to {score.high:.3f}",
                *([f"{top5[key]:.4f}"] if top5 else []),
                score.num_train,
                score.num_test,
            ]
        )
    console.table("", header, rows)


def _setting(score: Score) -> str:
    """Return the one parameter that tells the measurements of a method apart."""
    parameters = json.loads(score.parameters)
    return f"k={parameters['k']}" if score.method == "knn" else f"rate={parameters['learning_rate']:g}"
