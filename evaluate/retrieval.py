"""The retrieval protocol: every test image looks for images of its class among the training images.

N training images, M test images, k ranks that are looked at.
"""

from collections.abc import Iterator

import numpy as np
import torch

from .. import console
from ..store.vectors import Float32, Float64, Int64, unit_length
from .scores import Correct, Measurement, mean_interval
from .task import Task

RECALL_KS = (1, 5, 10)
BLOCK_ELEMENTS = 8_000_000  # similarities held at once: 32 MB, and 64 MB for their order


def measure_retrieval(task: Task, ks: tuple[int, ...] | None) -> Iterator[Measurement]:
    """Yield mean average precision over the whole ranking, and recall@k: how many queries have a hit in the first k.

    The test images are the queries, the training images what is found; an image of the same name is left out, so the
    same images may be both. A query for which there is nothing to be found counts 0.

    Source: the instance retrieval of DINOv2 (Oquab et al. 2023, section 7.4), its rule "an image of the same
    landmark" replaced by "an image of the same class".
    """
    ks = tuple(k for k in ks or RECALL_KS if k <= len(task.train))
    itself = _itself(task.train_names, task.test_names)
    precision, first_hit, found = ranked(task.train_tokens, task.targets, task.test_tokens, task.truth, itself)
    if not found.all():
        console.say(f"{np.sum(~found):,} of {len(found):,} queries have no image of their class to find, and count 0")
    parameters: dict[str, object] = {
        "similarity": "cosine",
        "queries": "test",
        "pool": "train",
        "excluded": "the image itself",
    }
    sizes = len(task.train), len(task.test)
    yield Measurement(parameters, "map", float(precision.mean()), mean_interval(precision, task.seed), *sizes)
    for k in ks:
        hit = (first_hit < k).astype(np.float64)
        yield Measurement(parameters, f"recall@{k}", float(hit.mean()), mean_interval(hit, task.seed), *sizes)


def ranked(
    pool: Float32, pool_classes: Int64, queries: Float32, query_classes: Int64, itself: list[Int64]
) -> tuple[Float64, Float64, Correct]:
    """Return average precision (M,), the first hit's place from 0 (M,), infinite without, and whether there is one.

    Features (N, D) and (M, D) of any length are ranked by cosine, ties by row; `itself` holds the pool rows (any
    number) that are the query's own image.
    """
    precision, first_hit = np.zeros(len(queries)), np.full(len(queries), np.inf)
    unit_pool = torch.from_numpy(unit_length(pool))
    block_rows = max(1, BLOCK_ELEMENTS // len(pool))
    with console.progress("ranking", len(queries), "queries") as advance:
        for start in range(0, len(queries), block_rows):
            block = torch.from_numpy(unit_length(queries[start : start + block_rows]))
            similarities = block @ unit_pool.T
            for row in range(len(block)):
                similarities[row, torch.from_numpy(itself[start + row])] = -torch.inf
            order = similarities.argsort(dim=1, descending=True, stable=True).numpy()
            for row, ranking in enumerate(order):
                query = start + row
                kept = ranking[: len(pool) - len(itself[query])]
                places = np.flatnonzero(pool_classes[kept] == query_classes[query])
                if len(places):
                    precision[query] = np.mean(np.arange(1, len(places) + 1) / (places + 1))
                    first_hit[query] = places[0]
            advance(len(block))
    return precision, first_hit, np.isfinite(first_hit)


def _itself(pool_names: list[str], query_names: list[str]) -> list[Int64]:
    """Return the pool rows of each query's own name."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(pool_names):
        rows.setdefault(name, []).append(row)
    return [np.array(rows.get(name, []), dtype=np.int64) for name in query_names]
