"""Near-duplicates by their vectors: where it is decided which images are kept.

same bytes -> k nearest neighbours by cosine -> pairs above the threshold -> copies among them, verified by pixels
  -> groups -> one image kept of each

N images of the pool, U of them with different bytes.
"""

from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings, first_identical, similarities
from ...store.image_columns import has_images
from ...store.vectors import Bools, Float64, Int64
from ..inputs import EmbeddedImages, Input, read_embedded
from .decisions import GROUPED_WITH_EVALUATION, KEPT, NEAR_DUPLICATE, RESEMBLES_EVALUATION, SAME_BYTES, Decisions
from .groups import DuplicateGroups, group_duplicates
from .image_keys import first_with_same_key, image_ids
from .reference_sets import ImageSets, Matches, are_same, extend_to_groups, find_matches
from .representative import Keep, preference, preferred
from .settings import DedupSettings
from .threshold import FIXED_THRESHOLD, threshold_from_pool, threshold_of
from .verify import MIN_COSINE, Pairs, Verifier


def find_near_duplicates(
    inputs: list[Input], num_known: int, settings: DedupSettings, keep: Keep, search: SearchSettings, limit: int | None
) -> Decisions:
    """Decide on a pool's images: the preferred one of every group is kept.

    But none that is like a known image is, and no group with any image that is like an evaluation image.

    Args:
        inputs: the pool, then `num_known` sets of images kept earlier, then evaluation sets.
        limit: only the first so many images of the pool.
    """
    pool, *others = inputs
    images = read_embedded(pool, limit)
    known, evaluation = (
        ImageSets([read_embedded(each) for each in part]) for part in (others[:num_known], others[num_known:])
    )

    # Of images with the same bytes the preferred one is compared; the others get the same decision.
    rank = preference(keep, images)
    represented_by = preferred(_first_same_bytes(images, search.memory), rank)  # (N,)
    distinct = np.flatnonzero(represented_by == np.arange(len(images)))  # (U,)
    compared, rank, order = images.take(distinct), rank[distinct], images.order[distinct]

    verifier = None
    if is_verified(settings, inputs):
        verifier = Verifier(threshold_of(pool.model()) or FIXED_THRESHOLD, settings.k)
    with nullcontext() if verifier is None else closing(verifier):
        threshold, origin = _threshold(settings.threshold, compared, others[:num_known], verifier)
        if verifier is not None:
            verifier.lower_limit(compared, _with_different_vectors(compared), threshold)
        known_matches = find_matches(compared, known, threshold, search, verifier)
        groups = _groups(compared, known_matches, rank, threshold, settings, search, verifier)
        if settings.linkage == "components":
            known_matches = extend_to_groups(known_matches, groups.labels, order, compared, known)
        against_threshold, against_verifier = threshold, verifier
        if settings.against_threshold is not None:
            against_threshold, against_verifier = settings.against_threshold, None
        matches = find_matches(compared, evaluation, against_threshold, search, against_verifier)
        matches = extend_to_groups(matches, groups.labels, order, compared, evaluation)
        differences = np.full(len(compared), np.nan)
        if verifier is not None:
            both = [(known, known_matches), (evaluation, matches)]
            differences = _differences(compared, groups, both if against_verifier is verifier else both[:1], verifier)

    figures: dict[str, object] = {
        "chained_groups": len(np.unique(groups.labels[groups.min_similarity_to_kept <= threshold])),
        "saturated": groups.num_saturated,
        "threshold": threshold,
        "threshold_origin": origin,
        "recall": min(groups.recall, known_matches.recall, matches.recall),
        **({"against_threshold": against_threshold} if evaluation.sets else {}),
    }
    if verifier is not None:
        figures["max_difference"] = verifier.max_difference
        figures["pairs_verified"], figures["pairs_unreadable"] = verifier.num_pairs, verifier.num_unreadable
    _say_figures(figures, settings, verifier)
    sets = ImageSets([images, *known.sets, *evaluation.sets])
    return _decide(sets, represented_by, groups, known_matches, matches, differences, len(images) + len(known), figures)


def is_verified(settings: DedupSettings, inputs: list[Input]) -> bool:
    """Tell whether pixels decide what is a copy, among the images of a pool and other inputs.

    Raises ToolkitError when they are asked to and a manifest names no images.
    """
    if settings.verify is False:
        return False
    by_default = settings.threshold is None and threshold_of(inputs[0].model()) is not None
    nameless = [part.manifest.path for part in inputs if not has_images(part.manifest)]
    if settings.verify and nameless:
        raise ToolkitError(f"--verify compares pixels, and {nameless[0]} names no images; leave it out")
    return settings.verify is True or (by_default and not nameless)


def _first_same_bytes(images: EmbeddedImages, memory: int | None) -> Int64:
    """Return the first image with the same id for each, (N,), where their vectors agree."""
    first = first_with_same_key(image_ids(images), len(images), memory)
    copies = np.flatnonzero(first != np.arange(len(images)))
    is_same, _ = are_same(images.vectors, copies, images.vectors, first[copies])
    first[copies[~is_same]] = copies[~is_same]
    return first


def _threshold(
    given: float | None, images: EmbeddedImages, known: list[Input], verifier: Verifier | None
) -> tuple[float, str]:
    """Return the threshold and its origin: the user, the known images, or the pool."""
    if given is not None:
        return given, "given"
    if verifier is not None:
        console.say(
            f"comparing the pixels of every image and its {verifier.k} nearest neighbours, which decide"
            " (--no-verify: by a threshold)"
        )
        return MIN_COSINE, "for pixel verification"
    made = [{} if part.manifest.provenance is None else part.manifest.provenance.figures for part in known]
    thresholds = {None if "max_difference" in each else each.get("threshold") for each in made}
    threshold = thresholds.pop() if len(thresholds) == 1 else None
    if isinstance(threshold, float):
        origin = f"as for {known[0].manifest.path}"
    else:
        own = threshold_of(images.source.model())
        threshold, origin = threshold_from_pool(images.vectors.take(_with_different_vectors(images)), own)
    console.say(f"threshold {threshold:.7g}, set {origin}")
    return threshold, origin


def _with_different_vectors(images: EmbeddedImages) -> Int64:
    """Return the images that are the first with their vector, rising."""
    return np.flatnonzero(first_identical(images.vectors) == np.arange(len(images)))


def _groups(
    images: EmbeddedImages,
    known_matches: Matches,
    rank: Int64,
    threshold: float,
    settings: DedupSettings,
    search: SearchSettings,
    verifier: Verifier | None,
) -> DuplicateGroups:
    """Group images, (U,) each. No star holds an image that is like a known one: that is alone."""
    everyone, ones = np.arange(len(images)), np.ones(len(images))
    free = np.flatnonzero(~known_matches.is_direct) if settings.linkage == "star" else everyone

    def are_copies(left: Int64, right: Int64, cosines: Float64, align: Bools) -> Bools:
        assert verifier is not None
        return verifier.are_copies(Pairs(images, free[left], images, free[right], align), cosines)

    found = group_duplicates(
        images.vectors.take(free),
        threshold,
        settings.k if verifier is None else verifier.k,
        linkage=settings.linkage,
        priority=np.argsort(np.argsort(rank[free])),
        search=search,
        are_copies=None if verifier is None else are_copies,
        num_aligned=0 if verifier is None else verifier.num_aligned,
    )
    labels, kept = everyone.copy(), everyone.copy()
    labels[free], kept[free], ones[free] = free[found.labels], free[found.kept], found.min_similarity_to_kept
    return replace(found, labels=labels, kept=kept, min_similarity_to_kept=ones)


def _differences(
    images: EmbeddedImages, groups: DuplicateGroups, matches: list[tuple[ImageSets, Matches]], verifier: Verifier
) -> Float64:
    """Return how different every image is, by pixels, from what it goes for, (U,); NaN where it stays."""
    differences = np.full(len(images), np.nan)

    def compare(rows: Int64, other: EmbeddedImages, theirs: Int64) -> Float64:
        cosines = similarities(images.vectors, rows, other.vectors, theirs)
        return verifier.differences(Pairs(images, rows, other, theirs, np.ones(len(rows), bool)), cosines)

    removed = np.flatnonzero(groups.kept != np.arange(len(images)))
    kept = groups.kept[removed]
    # Registration is not symmetric: the smaller row comes first, as where the pairs were found.
    differences[removed] = compare(np.minimum(removed, kept), images, np.maximum(removed, kept))
    for sets, found in matches:
        for other, rows, theirs in sets.split(found.position):
            differences[rows] = compare(rows, other, theirs)
    return differences


def _decide(
    sets: ImageSets,
    represented_by: Int64,
    groups: DuplicateGroups,
    known: Matches,
    evaluation: Matches,
    differences: Float64,
    first_evaluation: int,
    figures: dict[str, object],
) -> Decisions:
    """Decide on all N images, from what was found for the distinct ones, (U,) each.

    Args:
        represented_by: (N,) the distinct image with the same bytes, which was compared.
        first_evaluation: position of the first evaluation image in `sets`.
    """
    vectors, everyone = sets.sets[0].vectors, np.arange(len(represented_by))
    distinct = np.flatnonzero(represented_by == everyone)  # (U,)
    place = np.searchsorted(distinct, represented_by)  # (N,)
    duplicate_of, similarity = distinct[groups.kept][place], np.ones(len(everyone))
    reason = np.where(duplicate_of == represented_by, KEPT, NEAR_DUPLICATE)
    removed = np.flatnonzero(reason != KEPT)
    similarity[removed] = similarities(vectors, represented_by[removed], vectors, duplicate_of[removed])
    for matches, start, direct, indirect in (
        (known, len(everyone), np.where(known.same_bytes, SAME_BYTES, NEAR_DUPLICATE), NEAR_DUPLICATE),
        (evaluation, first_evaluation, RESEMBLES_EVALUATION, GROUPED_WITH_EVALUATION),
    ):
        matched = np.flatnonzero(matches.position[place] >= 0)
        found = place[matched]
        reason[matched] = np.where(matches.is_direct, direct, indirect)[found]
        duplicate_of[matched], similarity[matched] = start + matches.position[found], matches.similarity[found]
    copies = np.flatnonzero((represented_by != everyone) & (reason == KEPT))
    reason[copies], duplicate_of[copies] = SAME_BYTES, represented_by[copies]
    similarity[copies] = similarities(vectors, copies, vectors, represented_by[copies])
    labels, min_similarity = distinct[groups.labels][place], groups.min_similarity_to_kept[place]
    of_pixels = np.where(reason == SAME_BYTES, np.nan, differences[place])
    return Decisions(sets, reason, duplicate_of, similarity, labels, min_similarity, figures, of_pixels)


def _say_figures(figures: dict[str, object], settings: DedupSettings, verifier: Verifier | None) -> None:
    if figures["saturated"]:
        say = f"have {settings.k} or more neighbours above the threshold; all above it were counted"
        if verifier is not None:
            say = f"are copies of their {verifier.num_aligned} nearest; what is kept of such groups was searched again"
        console.say(f"{figures['saturated']:,} images {say}")
    if verifier is not None:
        unreadable = f", {verifier.num_unreadable:,} of them with an image that cannot be read"
        console.say(f"verified {verifier.num_pairs:,} pairs of images{unreadable if verifier.num_unreadable else ''}")
    if figures["recall"] != 1:
        console.say(f"measured recall of the search: {figures['recall']:.4f}; --recall 1 compares all with all")
    if figures["chained_groups"]:
        console.warn(
            f"{figures['chained_groups']:,} groups hold images below the threshold to the kept one (chains);"
            " look at them by --sheet, or choose --linkage star"
        )
