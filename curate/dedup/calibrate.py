"""A threshold to look at before it is used: what every one would remove, pairs around it, and one suggested.

N images, M of them with different vectors, S sampled, k neighbours, P pairs, R radii.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings, first_identical
from ...features.sheet import check_picture_name, draw_sheet, picture_provenance, read_tile, write_picture
from ...store.artifact import Options, Result, make
from ...store.manifest import Provenance
from ...store.memory import memory_budget
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages, open_input, read_embedded
from .threshold import (
    FAR_NEIGHBOR,
    FIXED_THRESHOLD,
    MIN_FAR_NEIGHBOR,
    ChanceModel,
    chance_model,
    sample_neighbors,
    sample_rows,
    threshold_of,
)

PRECISIONS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)  # chosen: shown beside the precision asked for
PAIRS = 3  # shown on either side of a threshold
TILE_PX = 84


@dataclass(frozen=True)
class CalibrateSettings:
    """Options of `dinov2 curate dedup --calibrate`, besides those that all commands share."""

    precision: float = 0.98  # of the images above the suggested threshold, the share not there by chance
    features: Path | None = None
    where: str | None = None
    memory: str | None = None
    recall: float = 0.99


@dataclass(frozen=True)
class Candidate:
    """A threshold that may be chosen."""

    precision: float | None  # expected; None: not known
    threshold: float
    above: int  # different images of the pool with a neighbour above it, about
    by_chance: int  # of these
    removed: int  # images of the pool, about


def calibrate_threshold(
    manifest: Path | None, output: str, settings: CalibrateSettings, options: Options
) -> Result | None:
    """Show what thresholds would remove, draw pairs around each, and return the one suggested as the result's value.

    Returns None after a dry run. Raises ToolkitError when there are no two images to compare.
    """
    path = check_picture_name(output)
    if not 0 < settings.precision < 1:
        raise ToolkitError(f"--precision {settings.precision} is no share that can be reached; give one such as 0.98")
    pool = open_input("manifest", manifest, path, settings.features, settings.where)
    parameters = {name: getattr(settings, name) for name in ("precision", "recall", "where")}
    parameters["limit"] = options.limit
    provenance = Provenance("picture", "curate dedup --calibrate", parameters, options.seed, pool.sources())

    def describe() -> None:
        num = pool.num_rows(options.limit)
        console.say(f"would compare {sample_rows(num):,} of {num:,} images with all, and draw {path}")

    def work() -> Provenance:
        search = SearchSettings(memory_budget(settings.memory), settings.recall, options.seed)
        picture, figures = _calibrate(read_embedded(pool, options.limit), settings.precision, search)
        made = replace(provenance, figures=figures)
        write_picture(picture, path, made)
        return made

    result = make(output, provenance, options, describe=describe, work=work, kind="picture", find=picture_provenance)
    if result is None:
        return None
    threshold = result.figures["threshold"]
    assert isinstance(threshold, float)
    return replace(result, value=threshold, digits=_digits(threshold))


def _digits(threshold: float) -> int:
    """Return how many decimals tell a threshold from 1, with two digits of the difference; four at least."""
    return max(4, 2 - int(np.floor(np.log10(max(1 - threshold, 1e-9)))))


def _rounded(threshold: float) -> str:
    return f"{threshold:.{_digits(threshold)}f}"


def _calibrate(
    images: EmbeddedImages, precision: float, search: SearchSettings
) -> tuple[Image.Image, dict[str, object]]:
    first = first_identical(images.vectors)
    distinct = np.flatnonzero(first == np.arange(len(first)))  # (M,)
    num_identical = len(images) - len(distinct)
    if len(distinct) < 2:
        path = images.source.manifest.path
        raise ToolkitError(f"{path}: all its vectors ({len(images):,}) are the same; two or more can be compared")
    vectors = images.vectors.take(distinct)
    num, k = sample_rows(len(distinct)), min(FAR_NEIGHBOR, len(distinct) - 1)
    sample, near = sample_neighbors(vectors, num, k, search=search, progress="comparing a sample")
    chance = chance_model(near.similarities)
    shares = (chance.observed / len(sample), chance.expected / len(sample), removed_share(chance))

    def candidate(asked: float | None, threshold: float) -> Candidate:
        above, by_chance, removed = (
            round(float(np.interp(-threshold, -chance.thresholds, share)) * len(distinct)) for share in shares
        )
        return Candidate(asked, threshold, above, by_chance, num_identical + removed)

    if k < min(FAR_NEIGHBOR, 3 * MIN_FAR_NEIGHBOR):
        console.warn(f"{len(distinct)} distinct images are too few to learn from; {FIXED_THRESHOLD} is a guess")
        suggested = candidate(None, FIXED_THRESHOLD)
        candidates = [suggested]
    else:
        asked = sorted({*PRECISIONS, precision})
        candidates = [candidate(each, chance.threshold_at(1 - each)) for each in asked]
        suggested = candidates[asked.index(precision)]
    own = threshold_of(images.source.model())
    if own is not None and own > suggested.threshold:
        console.say(f"the descriptor `copy` has a threshold of its own, {own}: a pool may raise it and not lower it")
        suggested = candidate(None, own)
        candidates = sorted([*candidates, suggested], key=lambda each: each.threshold)
    _show_candidates(candidates, suggested, len(images))
    console.say(
        f"from {len(sample):,} of {len(images):,} images; {num_identical:,} have exactly the vector of another and are"
        f" removed at any threshold; use it by --threshold {_rounded(suggested.threshold)}"
    )
    left, right, similarity = nearest_pairs(sample, near.indices[:, 0], near.similarities[:, 0], len(distinct))
    picture = _draw_pairs(images, (distinct[left], distinct[right], similarity), candidates, suggested)
    return picture, {
        "threshold": suggested.threshold,
        "precision": precision if suggested.precision is not None else None,
        "images": len(images),
        "sampled": len(sample),
        "identical": num_identical,
        "removed": suggested.removed,
        "local_dimension": chance.dimension,
        "recall": near.recall,
    }


def removed_share(chance: ChanceModel) -> Float64:
    """Return the share of the distinct images that a threshold at each radius would remove, (R,), from a sample.

    Of a group of m + 1 images that are all above the threshold to one another, m are removed. So every image with m
    neighbours above it counts m / (m + 1).
    """
    num, k = chance.distances.shape
    # With its j-th neighbour an image's m / (m + 1) grows by 1 / (j (j + 1)).
    steps = np.tile(1 / (np.arange(1, k + 1) * np.arange(2, k + 2)), num)
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


def _show_candidates(candidates: list[Candidate], suggested: Candidate, num_images: int) -> None:
    rows = []
    for each in candidates:
        numbers = [f"{number:,}" for number in (each.above, each.by_chance, each.removed)]
        share, mark = f"{each.removed / num_images:.2%}", "suggested" if each is suggested else ""
        precision = "" if each.precision is None else f"{each.precision:g}"
        rows.append((precision, _rounded(each.threshold), *numbers, share, mark))
    titles = ("expected precision", "threshold", "with a neighbour", "by chance", "images removed", "share", "")
    console.table("thresholds", titles, rows)


def _draw_pairs(
    images: EmbeddedImages, pairs: tuple[Int64, Int64, Float64], candidates: list[Candidate], suggested: Candidate
) -> Image.Image:
    """Return a row of the pairs (P,) just above and just below each threshold."""
    left, right, similarity = pairs
    uris = images.uris(np.concatenate([left, right])).to_pylist()
    headings, rows = [], []
    for each in candidates:
        expected = "" if each.precision is None else f" at an expected precision of {each.precision:g}"
        headings.append(
            f"{each.threshold:.7g}{expected}: {each.removed:,} of {len(images):,} images removed"
            f" ({each.removed / len(images):.1%}){', suggested' if each is suggested else ''}"
        )
        num_above = int((similarity > each.threshold).sum())
        row = []
        for place in range(max(num_above - PAIRS, 0), min(num_above + PAIRS, len(left))):
            one = read_tile(uris[place], f"{similarity[place]:.6f}", TILE_PX)
            other = read_tile(uris[len(left) + place], "removed" if place < num_above else "kept", TILE_PX)
            row.append([one, other])
        rows.append(row)
    return draw_sheet(
        rows,
        title=f"Which threshold for {images.source.manifest.path.name}?",
        note="for every threshold the pairs of nearest images just above it (removed), then those just below (kept)",
        headings=headings,
        tile_px=TILE_PX,
    )
