"""A threshold to look at before it is used: what every one would remove, pairs around it, and one suggested.

N images, M of them with different vectors, S sampled, k neighbours, P pairs, R radii.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings, first_identical
from ...features.sheet import check_picture_name, is_picture_up_to_date, picture_provenance, write_picture
from ...store.artifact import Options, Result
from ...store.manifest import Provenance
from ...store.memory import memory_budget
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages, open_input, read_embedded
from .calibrate_picture import Candidate, Pair, draw_calibration, show_histogram
from .threshold import (
    FAR_NEIGHBOR,
    FIXED_THRESHOLD,
    MIN_FAR_NEIGHBOR,
    ChanceModel,
    chance_model,
    own_threshold,
    sample_neighbors,
    sample_rows,
)

PRECISIONS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)  # chosen: shown beside the precision asked for
PAIRS = 3  # shown on either side of a threshold


@dataclass(frozen=True)
class CalibrateSettings:
    """What `dinov2 curate dedup --calibrate` can be told, beside the options that all commands share."""

    precision: float = 0.98  # of the images above the suggested threshold, the share not there by chance
    features: Path | None = None
    where: str | None = None
    memory: str | None = None
    recall: float = 0.99


def calibrate_threshold(
    manifest: Path | None, output: str, settings: CalibrateSettings, options: Options
) -> Result | None:
    """Draw how similar the nearest neighbours in a pool are, and return the threshold suggested as the result's value.

    Returns None after a dry run. Raises ToolkitError when there are no two images to compare.
    """
    path = check_picture_name(output)
    if not 0 < settings.precision < 1:
        raise ToolkitError(f"--precision {settings.precision} is no share that can be reached; give one such as 0.98")
    pool = open_input("manifest", manifest, path, settings.features, settings.where)
    parameters = {"precision": settings.precision, "recall": settings.recall, "where": settings.where}
    provenance = Provenance(
        "picture", "curate dedup --calibrate", {**parameters, "limit": options.limit}, options.seed, pool.sources()
    )
    is_made = is_picture_up_to_date(path, provenance, options)
    if options.dry_run:
        if not is_made:
            num = pool.num_rows(options.limit)
            console.say(f"would compare {sample_rows(num):,} of {num:,} images with all, and draw {path}")
        return None
    if not is_made:
        search = SearchSettings(memory_budget(settings.memory), settings.recall, options.seed)
        images = read_embedded(pool, options.limit)
        if len(images) < 2:
            raise ToolkitError(f"{pool.manifest.path} has {len(images)} images; two or more can be compared")
        _calibrate(images, path, settings.precision, provenance, search)
    made = picture_provenance(path)
    figures = {} if made is None else made.figures
    threshold = figures["threshold"]
    assert isinstance(threshold, float)
    return Result(output, figures, threshold, digits=_digits(threshold))


def _digits(threshold: float) -> int:
    """Return how many decimals tell a threshold from 1, with two digits of the difference; four at least."""
    return max(4, 2 - int(np.floor(np.log10(max(1 - threshold, 1e-9)))))


def _calibrate(
    images: EmbeddedImages, path: Path, precision: float, provenance: Provenance, search: SearchSettings
) -> None:
    first = first_identical(images.vectors)
    distinct = np.flatnonzero(first == np.arange(len(first)))  # (M,)
    num_identical = len(images) - len(distinct)
    if len(distinct) < 2:
        raise ToolkitError(
            f"all {len(images):,} vectors of {images.source.manifest.path} are the same; nothing to learn"
        )
    vectors = images.vectors.take(distinct)
    k = min(FAR_NEIGHBOR, len(distinct) - 1)
    sample, near = sample_neighbors(
        vectors, sample_rows(len(distinct)), k, search=search, progress="comparing a sample"
    )
    chance = chance_model(near.similarities)
    removed = removed_share(chance)

    def candidate(asked: float | None, threshold: float) -> Candidate:
        share = float(np.interp(-threshold, -chance.thresholds, removed))
        return Candidate(asked, threshold, num_identical + round(share * len(distinct)))

    if k < min(FAR_NEIGHBOR, 3 * MIN_FAR_NEIGHBOR):
        console.warn(f"{len(distinct)} distinct images are too few to learn from; {FIXED_THRESHOLD} is a guess")
        suggested = candidate(None, FIXED_THRESHOLD)
        candidates = [suggested]
    else:
        asked = sorted({*PRECISIONS, precision})
        candidates = [candidate(each, chance.threshold_at(1 - each)) for each in asked]
        suggested = candidates[asked.index(precision)]
    own = own_threshold(vectors.base)
    if own is not None and own > suggested.threshold:
        console.say(f"the descriptor `copy` has a threshold of its own, {own}: a pool may raise it and not lower it")
        suggested = candidate(None, own)
        candidates = sorted([*candidates, suggested], key=lambda each: each.threshold)
    nearest = near.similarities[:, 0]
    left, right, similarity = nearest_pairs(sample, near.indices[:, 0], nearest, len(distinct))
    uris = images.uris(distinct[np.concatenate([left, right])]).to_pylist()
    pairs = [Pair(*each) for each in zip(uris[: len(left)], uris[len(left) :], similarity.tolist(), strict=True)]

    def pairs_around(threshold: float) -> tuple[list[Pair], list[Pair]]:
        num_above = int((similarity > threshold).sum())
        return pairs[max(num_above - PAIRS, 0) : num_above], pairs[num_above : num_above + PAIRS]

    show_histogram(nearest, chance, len(distinct) / len(sample))
    _say_candidates(candidates, suggested, len(images), num_identical, len(sample))
    picture = draw_calibration(
        images.source.manifest.path.name,
        nearest,
        chance,
        [(each, *pairs_around(each.threshold)) for each in candidates],
        suggested,
        len(images),
    )
    figures: dict[str, object] = {
        "threshold": suggested.threshold,
        "precision": precision if suggested.precision is not None else None,
        "images": len(images),
        "sampled": len(sample),
        "identical": num_identical,
        "removed": suggested.removed,
        "local_dimension": chance.dimension,
        "recall": near.recall,
    }
    write_picture(picture, path, replace(provenance, figures=figures))


def removed_share(chance: ChanceModel) -> Float64:
    """Return the share of the distinct images that a threshold at each radius would remove, (R,), from a sample.

    Of a group of m + 1 images that are all above the threshold to one another, m are removed. So every image with m
    neighbours above it counts m / (m + 1).
    """
    num, k = chance.distances.shape
    # With its j-th neighbour an image's m / (m + 1) grows by 1 / (j (j + 1)).
    steps = np.broadcast_to(1 / (np.arange(1, k + 1) * np.arange(2, k + 2)), (num, k)).ravel()
    order = np.argsort(chance.distances, axis=None)
    total = np.concatenate([[0.0], np.cumsum(steps[order])])
    share: Float64 = total[np.searchsorted(chance.distances.ravel()[order], chance.radii)] / num
    return share


def nearest_pairs(sample: Int64, found: Int64, similarity: Float64, num: int) -> tuple[Int64, Int64, Float64]:
    """Return the pairs of sampled images (S,) of `num` and their nearest ones, the most similar first.

    Every pair stands once: the smaller index, the larger, and the similarity, (P,) each.
    """
    pairs, once = np.unique(np.minimum(sample, found) * num + np.maximum(sample, found), return_index=True)
    order = np.lexsort((pairs, -similarity[once]))
    return *np.divmod(pairs[order], num), similarity[once[order]]


def _say_candidates(
    candidates: list[Candidate], suggested: Candidate, num_images: int, num_identical: int, num_sampled: int
) -> None:
    rows = [
        (
            "" if each.precision is None else f"{each.precision:g}",
            f"{each.threshold:.{_digits(each.threshold)}f}",
            f"{each.removed:,}",
            f"{each.removed / num_images:.2%}",
            "suggested" if each is suggested else "",
        )
        for each in candidates
    ]
    console.table("thresholds", ("expected precision", "threshold", "images removed", "share", ""), rows)
    console.say(
        f"from {num_sampled:,} of {num_images:,} images; {num_identical:,} have exactly the vector of another and are"
        f" removed at any threshold; use it by --threshold {suggested.threshold:.{_digits(suggested.threshold)}f}"
    )
