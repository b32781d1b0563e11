"""A threshold to look at before it is used: what every one would remove, pairs around it, and one suggested.

N images, M of them with numbers of their own, S sampled, k neighbours, T thresholds.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import Identity, SearchSettings, first_identical, nearest
from ...features.sheet import check_picture_name, is_picture_up_to_date, picture_provenance, write_picture
from ...store.artifact import Options, Result
from ...store.manifest import Provenance
from ...store.memory import memory_budget
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages, open_input, read_embedded
from .calibrate_picture import Candidate, Pair, draw_calibration, show_histogram
from .threshold import FAR_NEIGHBOR, FIXED_THRESHOLD, MIN_FAR_NEIGHBOR, chance, own_threshold, sample_rows

PRECISIONS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)  # chosen: what is tabled beside the precision asked for
PAIRS = 3  # shown on either side of a threshold


@dataclass(frozen=True)
class CalibrateSettings:
    """What `dinov2 curate dedup --calibrate` can be told, beside the options that all commands share."""

    precision: float = 0.98  # of the images above the suggested threshold, the share not there by chance
    features: Path | None = None
    where: str | None = None
    memory: str | None = None
    recall: float = 0.99


@dataclass(frozen=True)
class Curve:
    """What thresholds would do, from the strictest on, (T,) each."""

    thresholds: Float64
    observed: Float64  # sampled images whose nearest neighbour is above it
    expected: Float64  # how many would be so by chance
    removed: Float64  # share of the distinct images that would be removed
    dimension: float  # of the images' neighbourhoods


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
    provenance = Provenance(
        kind="picture",
        command="curate dedup --calibrate",
        parameters={
            "precision": settings.precision,
            "recall": settings.recall,
            "where": settings.where,
            "limit": options.limit,
        },
        seed=options.seed,
        inputs=pool.sources(),
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
    sample = np.linspace(0, len(distinct) - 1, sample_rows(len(distinct))).astype(np.int64)  # (S,) rising, no two same
    places = np.arange(len(distinct))
    found = nearest(
        vectors.take(sample),
        vectors,
        min(FAR_NEIGHBOR, len(distinct) - 1),
        order=places,
        identity=Identity(sample, places),
        search=search,
        progress="comparing a sample",
    )
    curve = threshold_curve(found.similarities)

    def candidate(asked: float | None, threshold: float) -> Candidate:
        share = np.interp(-threshold, -curve.thresholds, curve.removed)
        return Candidate(asked, threshold, num_identical + round(float(share) * len(distinct)))

    if found.similarities.shape[1] < min(FAR_NEIGHBOR, 3 * MIN_FAR_NEIGHBOR):
        console.warn(f"{len(distinct)} distinct images are too few to learn from; {FIXED_THRESHOLD} is a guess")
        suggested = candidate(None, FIXED_THRESHOLD)
        candidates = [suggested]
    else:
        asked = sorted({*PRECISIONS, precision})
        candidates = [candidate(each, threshold_at(curve, each)) for each in asked]
        suggested = candidates[asked.index(precision)]
    own = own_threshold(vectors.base)
    if own is not None and own > suggested.threshold:
        console.say(f"the descriptor `copy` has a threshold of its own, {own}: a pool may raise it and not lower it")
        suggested = candidate(None, own)
        candidates = sorted([*candidates, suggested], key=lambda each: each.threshold)
    scale = len(distinct) / len(sample)
    show_histogram(found.similarities[:, 0], curve.thresholds, curve.expected, scale)
    _say_candidates(candidates, suggested, len(images), num_identical, len(sample))
    pairs = nearest_pairs(sample, found.indices[:, 0], found.similarities[:, 0])
    rows = [(each, _around(images, distinct, pairs, each.threshold)) for each in candidates]
    picture = draw_calibration(
        images.source.manifest.path.name,
        found.similarities[:, 0],
        (curve.thresholds, curve.expected),
        rows,
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
        "local_dimension": curve.dimension,
        "recall": found.recall,
    }
    write_picture(picture, path, replace(provenance, figures=figures))


def threshold_curve(similarities: Float64) -> Curve:
    """Return what thresholds would do to a pool, by the neighbours of a sample of it.

    Chance is that of `threshold.chance`. Removed: of a group of m + 1 images that are all above the threshold to one
    another, m go. So every image with m neighbours above it counts m / (m + 1).

    Args:
        similarities: (S, k) cosines of images to their k nearest others, falling.
    """
    model = chance(similarities)
    distances, chords = model.distances, model.chords
    k = distances.shape[1]
    # With its j-th neighbour an image's m / (m + 1) grows by 1 / (j (j + 1)).
    steps = np.broadcast_to(1 / (np.arange(1, k + 1) * np.arange(2, k + 2)), distances.shape).ravel()
    ranked = np.argsort(distances, axis=None)
    total = np.concatenate([[0.0], np.cumsum(steps[ranked])])
    removed = total[np.searchsorted(distances.ravel()[ranked], chords)] / len(distances)
    return Curve(1 - chords**2 / 2, model.observed(), model.expected, removed, model.dimension)


def threshold_at(curve: Curve, precision: float) -> float:
    """Return the lowest threshold above which chance explains no more than 1 - `precision` of the nearest neighbours.

    1 - threshold is rounded to three digits, so that the last bits of similarities do not show.
    """
    passing = np.flatnonzero(curve.expected <= (1 - precision) * np.maximum(curve.observed, 1))
    return 1 - float(f"{1 - curve.thresholds[passing.max(initial=0)]:.2e}")


@dataclass(frozen=True)
class Pairs:
    """Images and their nearest ones, from the most similar on, every pair once."""

    left: Int64  # (P,)
    right: Int64
    similarity: Float64


def nearest_pairs(sample: Int64, found: Int64, similarity: Float64) -> Pairs:
    """Return the pairs of sampled images (S,) and their nearest ones."""
    low, high = np.minimum(sample, found), np.maximum(sample, found)
    _, once = np.unique(np.stack([low, high], axis=1), axis=0, return_index=True)
    ranked = once[np.lexsort((high[once], low[once], -similarity[once]))]
    return Pairs(low[ranked], high[ranked], similarity[ranked])


def _around(images: EmbeddedImages, distinct: Int64, pairs: Pairs, threshold: float) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs just above the threshold, and those just below."""
    above = int((pairs.similarity > threshold).sum())
    shown = np.arange(max(above - PAIRS, 0), min(above + PAIRS, len(pairs.left)))
    uris = images.uris(distinct[np.concatenate([pairs.left[shown], pairs.right[shown]])]).to_pylist()
    found = [
        Pair(left, right, similarity)
        for left, right, similarity in zip(
            uris[: len(shown)], uris[len(shown) :], pairs.similarity[shown].tolist(), strict=True
        )
    ]
    num_above = int((shown < above).sum())
    return found[:num_above], found[num_above:]


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
        f"by {num_sampled:,} of {num_images:,} images; {num_identical:,} have the very numbers of another and go at any"
        f" threshold; use it by --threshold {suggested.threshold:.{_digits(suggested.threshold)}f}"
    )
