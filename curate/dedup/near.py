"""Near-duplicates by their vectors.

the same bytes -> k nearest neighbours by cosine -> pairs above the threshold -> copies among them, by their pixels
  -> groups -> one image kept of each

N images, U of them with bytes of their own.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings, first_identical, similarities
from ...store.image_columns import has_images
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages, Input, read_embedded
from .decisions import DUPLICATE, GROUPED, REASONS, RESEMBLES, SAME_BYTES, STAYS, Verdict, chained
from .groups import Groups, Linkage, duplicate_groups
from .identical import same_key
from .reference_sets import Bools, Matches, are_same, image_ids, matches, with_their_groups
from .representative import Keep, preference, preferred
from .threshold import FIXED_THRESHOLD, threshold_from_pool, threshold_of
from .verify import LAID_OVER, LEAST_ALIKE, LOOKED_AT, SecondLook


@dataclass(frozen=True)
class NearSettings:
    """What makes two images near-duplicates, and what becomes of them."""

    threshold: float | None  # cosine above which two images are; None: that of the known images, else learnt
    against_threshold: float | None  # cosine above which an image is like an evaluation image; None: the same
    k: int
    linkage: Linkage
    keep: Keep
    search: SearchSettings
    verify: bool | None = None  # whether pixels decide; None: with the descriptor `copy` and no threshold


def near_duplicates(
    pool: Input, known: list[Input], evaluation: list[Input], settings: NearSettings, limit: int | None
) -> Verdict:
    """Return what becomes of the pool's images, of the first `limit`.

    One of every group stays, the preferred one; but none that is like a known image, and no group with any image that
    is like one of an evaluation set.
    """
    images = read_embedded(pool, limit)
    known_sets, evaluation_sets = [read_embedded(part) for part in known], [read_embedded(part) for part in evaluation]
    search = settings.search

    # Of the very same bytes the preferred image is looked at; the others share its fate.
    rank = preference(settings.keep, images)
    first = same_key(image_ids(images), len(images), search.memory)
    copies = np.flatnonzero(first != np.arange(len(images)))
    unlike = copies[~are_same(images.vectors, copies, images.vectors, first[copies])]
    first[unlike] = unlike
    stands_for = preferred(first, rank)  # (N,)
    distinct = np.flatnonzero(stands_for == np.arange(len(images)))  # (U,)

    inputs = [pool, *known, *evaluation]
    with ExitStack() as stack:
        look = None
        if are_looked_at(settings.verify, settings.threshold, inputs):
            otherwise = threshold_of(pool.model()) or FIXED_THRESHOLD
            look = stack.enter_context(SecondLook(otherwise, min(settings.k, LOOKED_AT), min(settings.k, LAID_OVER)))
        threshold, origin = _threshold(settings.threshold, images, distinct, known, look)
        if look is not None:
            look.learn_limit(images, _unlike(images, distinct), threshold)
        like_known = matches(images, distinct, known_sets, threshold, search, look)
        groups = _groups(images, distinct, like_known, rank, threshold, settings, look)
        if settings.linkage == "components":  # a whole component goes with the known image that one of it is like
            like_known = with_their_groups(like_known, groups.labels, images, distinct, known_sets)
        against_threshold = threshold if settings.against_threshold is None else settings.against_threshold
        against_look = look if settings.against_threshold is None else None
        like_evaluation = matches(images, distinct, evaluation_sets, against_threshold, search, against_look)
        like_evaluation = with_their_groups(like_evaluation, groups.labels, images, distinct, evaluation_sets)

    verdict = _verdict(images, distinct, groups, like_known, like_evaluation, known_sets, evaluation_sets)
    verdict = _with_copies(verdict, stands_for, distinct)
    figures: dict[str, object] = {
        "chained_groups": chained(verdict, threshold),
        "saturated": groups.num_saturated,
        "threshold": threshold,
        "threshold_origin": origin,
        "recall": min(groups.recall, like_known.recall, like_evaluation.recall),
        **({"against_threshold": against_threshold} if evaluation else {}),
        **({} if look is None else {"looked_at": look.num_pairs, "limit": look.limit, "unread": look.num_unread}),
    }
    _say_search(figures, settings)
    return replace(verdict, figures=figures)


def are_looked_at(verify: bool | None, threshold: float | None, inputs: list[Input]) -> bool:
    """Tell whether pixels decide what is a copy, of the images of a pool and other inputs.

    Raises ToolkitError when they shall and images have no names.
    """
    if verify is False:
        return False
    is_usual = threshold is None and threshold_of(inputs[0].model()) is not None
    nameless = [part.manifest.path for part in inputs if not has_images(part.manifest)]
    if verify and nameless:
        raise ToolkitError(f"--verify looks at images, and {nameless[0]} names none; leave it out")
    return verify is True or (is_usual and not nameless)


def _threshold(
    given: float | None, images: EmbeddedImages, distinct: Int64, known: list[Input], look: SecondLook | None
) -> tuple[float, str]:
    """Return the threshold and where it comes from: the user, the known images, or the pool."""
    if given is not None:
        return given, "given"
    if look is not None:
        console.say(
            f"looking at every image and the {look.k} most like it: their pixels decide (--no-verify: a threshold)"
        )
        return LEAST_ALIKE, "for a second look"
    made = [{} if part.manifest.provenance is None else part.manifest.provenance.figures for part in known]
    figures = {None if "limit" in each else each.get("threshold") for each in made}  # where pixels did not decide
    figure = figures.pop() if len(figures) == 1 else None
    if isinstance(figure, float):
        threshold, origin = figure, f"as for {known[0].manifest.path}"
    else:
        threshold, origin = threshold_from_pool(images.vectors.take(_unlike(images, distinct)))
    console.say(f"threshold {threshold:.7g}, set {origin}")
    return threshold, origin


def _unlike(images: EmbeddedImages, distinct: Int64) -> Int64:
    """Return those of the images at `distinct` (U,) that have vectors of their own."""
    first = first_identical(images.vectors.take(distinct))
    unlike: Int64 = distinct[first == np.arange(len(first))]
    return unlike


def _groups(
    images: EmbeddedImages,
    distinct: Int64,
    like_known: Matches,
    rank: Int64,
    threshold: float,
    settings: NearSettings,
    look: SecondLook | None,
) -> Groups:
    """Group the distinct images, (U,) each; a star holds none that is like a known image: such a one is alone."""
    alone = np.arange(len(distinct))
    free = np.flatnonzero(~like_known.itself) if settings.linkage == "star" else alone
    if not len(free):
        return Groups(alone, alone, np.ones(len(distinct)), 0, 1.0)
    vectors = images.vectors.take(distinct[free])
    priority = np.empty(len(free), np.int64)
    priority[np.argsort(rank[distinct[free]])] = np.arange(len(free))

    def are_copies(left: Int64, right: Int64, cosines: Float64, are_near: Bools) -> Bools:
        assert look is not None
        return look.copies(images, distinct[free[left]], images, distinct[free[right]], cosines, are_near)

    found = duplicate_groups(
        vectors,
        first_identical(vectors),
        threshold,
        settings.k if look is None else look.k,
        linkage=settings.linkage,
        priority=priority,
        search=settings.search,
        are_copies=None if look is None else are_copies,
        k_near=LAID_OVER,
    )
    labels, kept, weakest = alone.copy(), alone.copy(), np.ones(len(distinct))
    labels[free], kept[free], weakest[free] = free[found.labels], free[found.kept], found.weakest
    return replace(found, labels=labels, kept=kept, weakest=weakest)


def _verdict(
    images: EmbeddedImages,
    distinct: Int64,
    groups: Groups,
    like_known: Matches,
    like_evaluation: Matches,
    known_sets: list[EmbeddedImages],
    evaluation_sets: list[EmbeddedImages],
) -> Verdict:
    """Return what becomes of the distinct images, (U,) each; targets and labels are among all N."""
    reason = np.where(groups.kept == np.arange(len(distinct)), STAYS, REASONS.index(DUPLICATE))
    part, target, similarity = np.full(len(distinct), -1), distinct[groups.kept], np.ones(len(distinct))
    goes = np.flatnonzero(reason != STAYS)
    similarity[goes] = similarities(images.vectors, distinct[goes], images.vectors, target[goes])

    known = np.flatnonzero(like_known.part >= 0)
    reason[known] = np.where(like_known.identical[known], REASONS.index(SAME_BYTES), REASONS.index(DUPLICATE))
    part[known], target[known] = like_known.part[known], like_known.index[known]
    similarity[known] = like_known.similarity[known]

    like = np.flatnonzero(like_evaluation.part >= 0)
    reason[like] = np.where(like_evaluation.itself[like], REASONS.index(RESEMBLES), REASONS.index(GROUPED))
    part[like], target[like] = like_evaluation.part[like] + len(known_sets), like_evaluation.index[like]
    similarity[like] = like_evaluation.similarity[like]
    others = [*known_sets, *evaluation_sets]
    return Verdict(images, others, reason, part, target, similarity, distinct[groups.labels], groups.weakest, {})


def _with_copies(verdict: Verdict, stands_for: Int64, distinct: Int64) -> Verdict:
    """Return what becomes of all N images: copies of bytes go for the one that stays, or along with it."""
    place = np.searchsorted(distinct, stands_for)  # (N,) among the distinct ones
    reason, target, similarity = verdict.reason[place], verdict.target[place], verdict.similarity[place]
    copies = np.flatnonzero((stands_for != np.arange(len(place))) & (reason == STAYS))
    reason[copies], target[copies] = REASONS.index(SAME_BYTES), stands_for[copies]
    vectors = verdict.images.vectors
    similarity[copies] = similarities(vectors, copies, vectors, stands_for[copies])
    return replace(
        verdict,
        reason=reason,
        part=verdict.part[place],
        target=target,
        similarity=similarity,
        labels=verdict.labels[place],
        weakest=verdict.weakest[place],
    )


def _say_search(figures: dict[str, object], settings: NearSettings) -> None:
    if figures["saturated"]:
        if "looked_at" in figures:
            say = f"are copies of the {LAID_OVER} most like them; what stays of their groups was searched again"
        else:
            say = f"have all their {settings.k} neighbours above the threshold; all above it were counted"
        console.say(f"{figures['saturated']:,} images {say}")
    if "looked_at" in figures:
        unread = f", {figures['unread']:,} of which could not be read" if figures["unread"] else ""
        console.say(f"looked at {figures['looked_at']:,} pairs of images{unread}")
    if figures["recall"] != 1:
        console.say(f"measured recall of the search: {figures['recall']:.4f}; --recall 1 compares all with all")
    if figures["chained_groups"]:
        console.warn(
            f"{figures['chained_groups']:,} groups hold images below the threshold to the one that stays (chains);"
            " look at them by --sheet, or choose --linkage star"
        )
