"""The retrieval protocol: every test image looks for images of its class among the training images.

N training images (the pool), M test images (the queries), k first ranks.
"""

from collections.abc import Iterator

import numpy as np
import torch

from .. import console
from ..store.vectors import Float32, Float64, Int64, unit_length
from .scores import Measurement, mean_interval
from .task import Task

RECALL_KS = (1, 5, 10)
BLOCK_ELEMENTS = 8_000_000  # similarities held at once: 32 MB, and 64 MB for their order


def measure_retrieval(task: Task, ks: tuple[int, ...] | None) -> Iterator[Measurement]:
    """Yield mean average precision over the whole ranking, and recall@k: how many queries have a hit in the first k.

    The test images are the queries, the training images the pool. A query's own image is left out of the pool, so both
    may be the same images. A query without an image of its class in the pool counts 0.
    Source: the instance retrieval of DINOv2 (Oquab et al. 2023, section 7.3), its rule "an image of the same
    landmark" replaced by "an image of the same class".
    """
    ks = tuple(k for k in ks or RECALL_KS if k <= len(task.train))
    own_rows = _rows_by_uri(task.train_uris, task.test_uris)
    train, test = task.class_tokens()
    precision, first_hit = ranked(train, task.train_labels, test, task.test_labels, own_rows)
    if missing := np.isinf(first_hit).sum():
        console.say(f"{missing:,} of {len(test):,} queries have no image of their class to find, and count 0")
    parameters = dict[str, object](similarity="cosine", queries="test", pool="train", excluded="the image itself")
    sizes = len(train), len(test)
    yield Measurement(parameters, "map", float(precision.mean()), mean_interval(precision, task.seed), *sizes)
    for k in ks:
        hit = (first_hit < k).astype(np.float64)
        yield Measurement(parameters, f"recall@{k}", float(hit.mean()), mean_interval(hit, task.seed), *sizes)


def ranked(
    pool: Float32, pool_labels: Int64, queries: Float32, query_labels: Int64, own_rows: list[Int64]
) -> tuple[Float64, Float64]:
    """Return each query's average precision (M,) and the place of its first hit (M,), from 0, infinite without one.

    Features (N, D) and (M, D) of any length are ranked by cosine, ties by row; `own_rows` are the pool rows of each
    query's own image.
    """
    precision, first_hit = np.zeros(len(queries)), np.full(len(queries), np.inf)
    unit_pool = torch.from_numpy(unit_length(pool))
    block_rows = max(1, BLOCK_ELEMENTS // len(pool))
    with console.progress("ranking", len(queries), "queries") as advance:
        for start in range(0, len(queries), block_rows):
            block = torch.from_numpy(unit_length(queries[start : start + block_rows]))
            similarities = block @ unit_pool.T
            for row in range(len(block)):
                similarities[row, torch.from_numpy(own_rows[start + row])] = -torch.inf
            order = similarities.argsort(dim=1, descending=True, stable=True).numpy()
            for query, ranking in enumerate(order, start):
                kept = ranking[: len(pool) - len(own_rows[query])]
                places = np.flatnonzero(pool_labels[kept] == query_labels[query])
                if len(places):
                    precision[query] = np.mean(np.arange(1, len(places) + 1) / (places + 1))
                    first_hit[query] = places[0]
            advance(len(block))
    return precision, first_hit


def _rows_by_uri(pool_uris: list[str], query_uris: list[str]) -> list[Int64]:
    """Return the pool rows that have each query's uri."""
    rows: dict[str, list[int]] = {}
    for row, uri in enumerate(pool_uris):
        rows.setdefault(uri, []).append(row)
    return [np.array(rows.get(uri, []), dtype=np.int64) for uri in query_uris]
