"""Pixel verification: which of the images that a descriptor finds alike are copies.

every image and its nearest neighbours -> thumbnails, each made once -> registration -> residual
  -> difference, from residual and cosine -> a copy, or a look-alike

N images, E pairs, B of them registered at a time.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ... import console
from ...features.search.products import device
from ...features.threads import map_in_order, workers
from ...store.arrays import kept_array
from ...store.cache import cache_folder, cache_key, make_room, open_cache
from ...store.files import replacing
from ...store.vectors import Bools, Float32, Float64, Int64
from ..inputs import EmbeddedImages
from . import registration, thumbnails
from .groups import distinct_pairs
from .threshold import sample_neighbors
from .thumbnails import ThumbnailCache

NUM_VERIFIED, NUM_ALIGNED = 24, 8  # chosen: neighbours of an image to verify, and those whose contents are aligned too
MIN_COSINE = 0.3  # chosen: below it no pair is verified; measured, one copy in a hundred lies lower
MAX_DIFFERENCE = 0.018  # chosen: of copies; loses at most 2 % of each of three sets of distinct images
MIN_DIFFERENCE = MAX_DIFFERENCE / 64  # most re-encoded copies lie lower
LIMIT_STEP = 2**0.125  # by which the limit is lowered
MAX_LOST = 0.02  # chosen: share of the images that may be lost by chance; of a crowded pool more would be
SAMPLE_ROWS = 2_000  # images by whose neighbours it is judged how crowded a pool is
BATCH = {"cpu": 64, "cuda": 2_048}  # pairs registered at a time
UNREADABLE = -1.0  # marks a pair with an image that cannot be read


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of two sets, which may be the same, (E,) each."""

    one: EmbeddedImages
    ones: Int64  # indices of images
    other: EmbeddedImages
    others: Int64
    align: Bools  # whether their contents are aligned, not only the whole images compared

    def __len__(self) -> int:
        return len(self.ones)


def pixel_difference(residuals: Float32, cosines: Float64) -> Float64:
    """Return how different two images are by their pixels and their descriptors together, (E,).

    At the limit for copies a pair may have a residual of 6 % at a cosine of 0.95, and of 1.5 % at 0.3.
    """
    return (residuals.astype(np.float64) + 0.005) * np.sqrt(1.03 - cosines)


def crowded_limit(differences: Float64, max_lost: float) -> float:
    """Return the largest limit, up to MAX_DIFFERENCE, below which at most `max_lost` pairs are expected by chance.

    The number of chance pairs grows by a power of their difference, copies lie far below. So the power is taken from
    how many lie within a factor of 2 ** 0.5 above a limit, and within the next; it is at least 1.
    """
    limit = MAX_DIFFERENCE
    ranked = np.sort(differences)
    while limit > MIN_DIFFERENCE:
        near, far = np.diff(np.searchsorted(ranked, limit * np.array([1, 2**0.5, 2])))
        if near <= max_lost * (max(far / max(near, 1), 2**0.5) - 1):
            break
        limit /= LIMIT_STEP
    return float(f"{limit:.3g}")


class Verifier:
    """Decides by pixels which pairs are copies, and counts them."""

    def __init__(self, threshold_if_unreadable: float, k: int) -> None:
        """Verify at most `k` neighbours; where an image cannot be read, cosines above the threshold make copies."""
        self.threshold_if_unreadable = threshold_if_unreadable
        self.k, self.num_aligned = min(k, NUM_VERIFIED), min(k, NUM_ALIGNED)
        self.max_difference = MAX_DIFFERENCE
        self.num_pairs = self.num_unreadable = 0
        self._thumbnails: dict[int, ThumbnailCache] = {}  # by id of the images
        self._sampled: tuple[Pairs, Float32] | None = None  # those that set the limit, rising, with their residuals

    def close(self) -> None:
        """Free the disk space of the thumbnails."""
        for each in self._thumbnails.values():
            each.close()

    def lower_limit(self, images: EmbeddedImages, distinct: Int64, min_cosine: float) -> None:
        """Lower the limit if images are so much alike that too many would be lost by chance.

        Args:
            distinct: (M,) those with different vectors.
        """
        vectors = images.vectors.take(distinct)
        sample, near = sample_neighbors(vectors, SAMPLE_ROWS, self.k, above=min_cosine, progress="setting the limit")
        query, column = np.nonzero(near.indices >= 0)
        left, right = distinct[sample[query]], distinct[near.indices[query, column]]
        keys, _, number, align = distinct_pairs(left, right, len(images), column < self.num_aligned)
        ones, others = np.divmod(keys, len(images))
        pairs = Pairs(images, ones, images, others, align)
        self._sampled = pairs, self._residuals(pairs)
        residuals = self._sampled[1][number]
        is_read = residuals != UNREADABLE
        differences = pixel_difference(residuals[is_read], near.similarities[query, column][is_read])
        self.max_difference = crowded_limit(differences, 2 * MAX_LOST * len(sample))  # every pair counts at both ends
        if self.max_difference < MAX_DIFFERENCE:
            console.say(
                f"these images are so much alike that copies may differ by {self.max_difference:.2g}, not"
                f" {MAX_DIFFERENCE}, or more than {MAX_LOST:.0%} of the images would be removed by chance"
            )

    def are_copies(self, pairs: Pairs, cosines: Float64) -> Bools:
        """Tell which pairs are copies, (E,).

        Residuals are kept in the cache: a step that is interrupted or run again does not register its pairs again.
        """
        residuals = self._residuals(pairs)
        is_unreadable = residuals == UNREADABLE
        self.num_pairs += len(pairs)
        self.num_unreadable += int(is_unreadable.sum())
        by_pixels = pixel_difference(residuals, cosines) <= self.max_difference
        return np.where(is_unreadable, cosines > self.threshold_if_unreadable, by_pixels)

    def differences(self, pairs: Pairs, cosines: Float64) -> Float64:
        """Return how different the images of pairs are, (E,), to be compared with `max_difference`; NaN: unreadable."""
        residuals = self._residuals(pairs)
        return np.where(residuals == UNREADABLE, np.nan, pixel_difference(residuals, cosines))

    def _residuals(self, pairs: Pairs) -> Float32:
        """Return the residuals of pairs (E,), or `UNREADABLE`."""
        if not len(pairs):
            return np.empty(0, np.float32)
        residuals = _open_residuals(pairs)
        if self._sampled is not None:
            _take_over(*self._sampled, pairs, residuals)
        missing = np.flatnonzero(~(residuals >= 0))  # not registered, or not readable then
        if 0 < len(missing) < len(pairs):
            console.say(f"{len(missing):,} of {len(pairs):,} pairs are left to verify")
        if len(missing):
            self._register(pairs, missing, residuals)
        return np.array(residuals)

    def _register(self, pairs: Pairs, which: Int64, residuals: Float32) -> None:
        """Write the residuals of the pairs at `which` to the mapped file `residuals` (E,)."""
        one, other = self._cache(pairs.one), self._cache(pairs.other)
        if one is other:
            one.read(np.concatenate([pairs.ones[which], pairs.others[which]]))
        else:
            one.read(pairs.ones[which])
            other.read(pairs.others[which])
        batch = BATCH[device().type]

        def register(start: int) -> Float32:
            some = which[start : start + batch]
            (left, is_left), (right, is_right) = one.at(pairs.ones[some]), other.at(pairs.others[some])
            with torch.inference_mode():
                found = registration.residual(left, right, torch.from_numpy(pairs.align[some]).to(device()))
                result: Float32 = found.masked_fill(~(is_left & is_right), UNREADABLE).cpu().numpy()
            return result

        starts = range(0, len(which), batch)
        with workers() as threads, console.progress("verifying pairs", len(which), "pairs") as advance:
            for start, found in zip(starts, map_in_order(register, starts, threads), strict=True):
                residuals[which[start : start + batch]] = found
                advance(len(found))

    def _cache(self, images: EmbeddedImages) -> ThumbnailCache:
        if id(images) not in self._thumbnails:
            self._thumbnails[id(images)] = ThumbnailCache(images)
        return self._thumbnails[id(images)]


def _take_over(sampled: Pairs, found: Float32, pairs: Pairs, residuals: Float32) -> None:
    """Write to `residuals` (E,) those of the sampled pairs, whose images rise."""
    if not len(sampled) or not sampled.one is pairs.one is pairs.other:
        return
    known, wanted = (each.ones * len(each.one) + each.others for each in (sampled, pairs))
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    same = (known[place] == wanted) & (sampled.align[place] == pairs.align)
    residuals[same] = found[place[same]]


def _open_residuals(pairs: Pairs) -> Float32:
    """Return the residuals of pairs (E,) as a mapped file in the cache; NaN where they are not known yet."""
    digest = hashlib.blake2b(pairs.align.tobytes(), digest_size=16)
    for code in (registration, thumbnails):  # other code would find other residuals
        digest.update(Path(str(code.__file__)).read_bytes())
    for images, indices in ((pairs.one, pairs.ones), (pairs.other, pairs.others)):
        digest.update(cache_key(images.source.manifest.source("verify")).encode())
        digest.update(images.positions[indices].tobytes())
    path = cache_folder() / f"{digest.hexdigest()}-residuals.npy"
    residuals: Float32 | None = kept_array(path, np.float32, (len(pairs),), "r+")
    if residuals is None:
        open_cache()
        make_room(4 * len(pairs))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.full(len(pairs), np.nan, np.float32))
        residuals = np.load(path, mmap_mode="r+")
    os.utime(path)  # as the last use
    return residuals
