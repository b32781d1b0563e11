"""A second look: whether images that a descriptor calls alike are copies, by their pixels.

each image and those most like it -> read once -> laid over one another -> what of their contrast is left
  -> a copy, or a look-alike

N images, E pairs, B of them compared at a time.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import console
from ...features.search.neighbors import Identity, nearest
from ...features.search.products import device
from ...features.threads import map_in_order, workers
from ...store.cache import cache_folder, cache_key, make_room, open_cache
from ...store.vectors import Float32, Float64, Int64
from ..inputs import EmbeddedImages
from . import registration
from .registration import Plates, unexplained
from .thumbnails import Shelf

LOOKED_AT, LAID_OVER = 24, 8  # chosen: nearest others of an image, and those of which contents are compared too
LEAST_ALIKE = 0.3  # chosen: cosine below which nothing is a copy; measured, of copies one in a hundred lies lower
LIMIT = 0.018  # chosen: of `difference`; loses at most 2 % of each of three sets of distinct pictures
LOSS = 0.02  # chosen: share of the images that may be lost by chance; of a crowded pool more would be
SAMPLE_ROWS = 2_000  # images by whose neighbours it is judged how crowded a pool is
LEAST_LIMIT = LIMIT / 64  # of copies that were written anew most lie lower
FINENESS = 2**0.125  # steps in which the limit falls
BATCH = {"cpu": 64, "cuda": 2_048}  # pairs that are laid over one another at a time
UNREAD = -1.0  # in place of what is left

Bools = npt.NDArray[np.bool_]


def difference(left: Float32, cosines: Float64) -> Float64:
    """Return how different two images are (E,): by what is left of their contrast, times by their descriptors.

    Of two witnesses one may doubt where the other is sure: at the limit, six parts in a hundred may be left at a cosine
    of 0.95, one part and a half at 0.3.
    """
    result: Float64 = (left.astype(np.float64) + 0.005) * np.sqrt(1.03 - cosines)
    return result


def crowded_limit(differences: Float64, most: float) -> float:
    """Return the largest limit, up to `LIMIT`, below which at most so many of the differences are expected by chance.

    Chance pairs grow by a power of their difference, copies lie far below. So the power is taken from how many lie
    within a factor of 2 ** 0.5 above a limit, and within another; it is at least 1.
    """
    limit = LIMIT
    ranked = np.sort(differences)
    while limit > LEAST_LIMIT:
        below = np.searchsorted(ranked, limit * np.array([1, 2**0.5, 2]))
        near, far = np.diff(below)
        if near <= most * (max(far / max(near, 1), 2**0.5) - 1):
            break
        limit /= FINENESS
    return float(f"{limit:.3g}")


@dataclass
class SecondLook:
    """Looks at pairs, and counts what it saw."""

    otherwise: float  # cosine above which images are taken for copies where one of them cannot be read
    k: int = LOOKED_AT  # nearest others of an image at which it looks
    k_near: int = LAID_OVER  # of these, at which it looks closely
    limit: float = LIMIT  # of the difference of copies
    num_pairs: int = 0
    num_unread: int = 0
    shelves: dict[int, Shelf] = field(default_factory=dict)  # by id of the images
    sampled: tuple[EmbeddedImages, Int64, Bools, Float32] | None = None  # pairs by which the limit was learnt, rising

    def __enter__(self) -> "SecondLook":
        """Return itself, whose pictures go when it is left."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the pictures."""
        for shelf in self.shelves.values():
            shelf.close()
        self.shelves.clear()

    def learn_limit(self, images: EmbeddedImages, distinct: Int64, threshold: float) -> None:
        """Lower the limit where the images at `distinct` (U,) lie so close that too many would be lost by chance."""
        vectors, positions = images.vectors.take(distinct), np.arange(len(distinct))
        sample = np.unique(np.linspace(0, len(distinct) - 1, min(len(distinct), SAMPLE_ROWS)).astype(np.int64))
        near = nearest(
            vectors.take(sample),
            vectors,
            self.k,
            order=positions,
            identity=Identity(sample, positions),
            above=threshold,
            progress="learning the limit",
        )
        query, column = np.nonzero(near.indices >= 0)
        one, other = distinct[sample[query]], distinct[near.indices[query, column]]
        keys, number = np.unique(np.minimum(one, other) * len(images) + np.maximum(one, other), return_inverse=True)
        are_near = np.bincount(number[column < self.k_near], minlength=len(keys)) > 0
        ones, others = np.divmod(keys, len(images))
        left = self._seen(images, ones, images, others, are_near)
        self.sampled = (images, keys, are_near, left) if len(keys) else None
        left = left[number]
        read = left != UNREAD
        differences = difference(left[read], near.similarities[query, column][read])
        self.limit = crowded_limit(differences, 2 * LOSS * len(sample))  # a pair is seen from both of its ends
        if self.limit < LIMIT:
            console.say(
                f"these images lie so close that copies are told apart at {self.limit:.2g}, not {LIMIT}, or more than"
                f" {LOSS:.0%} of them would go by chance"
            )

    def copies(
        self,
        one: EmbeddedImages,
        ones: Int64,
        other: EmbeddedImages,
        others: Int64,
        cosines: Float64,
        are_near: Bools,
    ) -> Bools:
        """Tell which pairs (E,) of images at `ones` of one set and `others` of another are copies.

        Those that are near are looked at closely. What was seen is kept in the cache, pair by pair: a step that is
        stopped or run again goes on with it.
        """
        seen = self._seen(one, ones, other, others, are_near)
        is_unread = seen == UNREAD
        self.num_pairs += len(seen)
        self.num_unread += int(is_unread.sum())
        is_copy: Bools = np.where(is_unread, cosines > self.otherwise, difference(seen, cosines) <= self.limit)
        return is_copy

    def _seen(self, one: EmbeddedImages, ones: Int64, other: EmbeddedImages, others: Int64, are_near: Bools) -> Float32:
        """Return what is left of the contrast of pairs (E,), or `UNREAD`."""
        if not len(ones):
            return np.empty(0, np.float32)
        left = _kept(one, ones, other, others, are_near)
        if self.sampled is not None and self.sampled[0] is one is other:
            _, rising, were_near, sampled = self.sampled
            keys = ones * len(one) + others
            place = np.minimum(np.searchsorted(rising, keys), len(rising) - 1)
            same = (rising[place] == keys) & (were_near[place] == are_near)
            left[same] = sampled[place[same]]
        unseen = np.flatnonzero(~(left >= 0))  # not looked at, or not readable then
        if 0 < len(unseen) < len(left):
            console.say(f"{len(left) - len(unseen):,} of {len(left):,} pairs were looked at before")
        if len(unseen):
            self._look(left, unseen, one, ones, other, others, are_near)
        return np.array(left)

    def _look(
        self,
        left: Float32,
        unseen: Int64,
        one: EmbeddedImages,
        ones: Int64,
        other: EmbeddedImages,
        others: Int64,
        are_near: Bools,
    ) -> None:
        """Write what is left of the pairs at `unseen` to the file `left` (E,)."""
        shelves = self._shelf(one), self._shelf(other)
        if one is other:
            shelves[0].read(np.concatenate([ones[unseen], others[unseen]]))
        else:
            shelves[0].read(ones[unseen])
            shelves[1].read(others[unseen])
        batch = BATCH[device().type]

        def compare(start: int) -> Float32:
            some = unseen[start : start + batch]
            return _compare(shelves[0].at(ones[some]), shelves[1].at(others[some]), are_near[some])

        done = 0
        with workers() as threads, console.progress("looking at pairs", len(unseen), "pairs") as advance:
            for seen in map_in_order(compare, range(0, len(unseen), batch), threads):
                left[unseen[done : done + len(seen)]] = seen
                done += len(seen)
                advance(len(seen))

    def _shelf(self, images: EmbeddedImages) -> Shelf:
        if id(images) not in self.shelves:
            self.shelves[id(images)] = Shelf(images)
        return self.shelves[id(images)]


def _compare(one: tuple[Plates, Tensor], other: tuple[Plates, Tensor], closely: Bools) -> Float32:
    """Return what is left of some pairs (B,) of pictures, each with whether it could be read."""
    with torch.inference_mode():
        left = unexplained(one[0], other[0], torch.from_numpy(closely).to(device()))
        left = left.masked_fill(~(one[1] & other[1]), UNREAD)
    result: Float32 = left.cpu().numpy()
    return result


def _kept(one: EmbeddedImages, ones: Int64, other: EmbeddedImages, others: Int64, are_near: Bools) -> Float32:
    """Return what was seen of pairs (E,) before, NaN where nothing was, as a file in the cache to write to."""
    code = Path(registration.__file__).read_bytes()  # what other code saw is seen anew
    digest = hashlib.blake2b(code + are_near.tobytes(), digest_size=16)
    for images, positions in ((one, ones), (other, others)):
        digest.update(cache_key(images.source.manifest.source("look")).encode())
        digest.update(images.positions[positions].tobytes())
    path = cache_folder() / f"{digest.hexdigest()}-look.npy"
    if not path.exists():
        open_cache()
        make_room(4 * len(ones))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.save(file, np.full(len(ones), np.nan, np.float32))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    os.utime(path)
    kept: Float32 = np.load(path, mmap_mode="r+")
    return kept
