"""A threshold for near-duplicates: a property of features and of how a pool's vectors lie, not a constant.

N images, S of them sampled, k neighbours.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...features.search.neighbors import Identity, nearest
from ...models.copy_descriptor import THRESHOLD, copy_content_id
from ...store.manifest import Source, open_manifest
from ...store.vectors import Float64, Vectors

CHANCE = 0.05  # chosen: share of the images above the threshold that may be there by chance
LOSS = 0.02  # chosen: share of the distinct images that the descriptor's own threshold may cost
SAMPLE_ROWS = (2_000, 20_000)  # chosen: images whose neighbours are looked at; fewer of a larger pool
SAMPLE_PRODUCTS = 6e9  # chosen: sampled images times images at most, a minute or so, until the fewest are reached
FAR_NEIGHBOR = 32  # chosen: far enough to be no duplicate, near enough to be the same neighbourhood
MIN_FAR_NEIGHBOR = 8  # of fewer images nothing is learnt
FIXED_THRESHOLD = 0.999  # chosen: what remains then


def threshold_from_pool(distinct: Vectors) -> tuple[float, str]:
    """Return a threshold for a pool's distinct vectors (N, D), and its origin in words.

    The descriptor made for copies has its own, raised where the pool is so crowded that it would cost too many; for
    any other features it is learnt from how the vectors lie.
    """
    own = own_threshold(distinct.base)
    far = min(FAR_NEIGHBOR, (len(distinct) - 1) // 3)
    if far < MIN_FAR_NEIGHBOR:
        if own is not None:
            return own, "by the descriptor `copy`"
        return FIXED_THRESHOLD, f"so because {len(distinct)} distinct images are too few to learn it from"
    similarities = _sampled_similarities(distinct, far)
    if own is not None:
        crowded = crowded_threshold(similarities, LOSS)
        if crowded <= own:
            return own, "by the descriptor `copy`"
        return crowded, (
            f"from the pool: at the descriptor's own {own}, more than {LOSS:.0%} of the images have such a neighbour"
            " by chance"
        )
    threshold, dimension = chance_threshold(similarities)
    return threshold, (
        f"from the pool: of the images with a neighbour above it, at most {CHANCE:.0%} have one by chance"
        f" (by the density of their neighbourhoods, local dimension {dimension:.1f})"
    )


def _sampled_similarities(distinct: Vectors, k: int) -> Float64:
    """Return cosines of sampled images to the k nearest others (S, k), falling."""
    sample = np.linspace(0, len(distinct) - 1, sample_rows(len(distinct))).astype(np.int64)  # (S,) rising, no two same
    positions = np.arange(len(distinct))
    identity = Identity(sample, positions)
    found = nearest(
        distinct.take(sample), distinct, k, order=positions, identity=identity, progress="learning the threshold"
    )
    return found.similarities


def sample_rows(num_images: int) -> int:
    """Return how many images' neighbours say enough of a pool."""
    least, most = SAMPLE_ROWS
    return min(num_images, max(least, min(most, int(SAMPLE_PRODUCTS / max(num_images, 1)))))


def own_threshold(base: Source) -> float | None:
    """Return the threshold that belongs to the descriptor of an embedding manifest; None: it has none."""
    path = Path(base.path)
    provenance = open_manifest(path).provenance if path.exists() else None
    return None if provenance is None else threshold_of(provenance.model())


def threshold_of(model: Source | None) -> float | None:
    """Return the threshold that belongs to a descriptor; None: it has none."""
    is_copy = model is not None and model.path == "copy" and model.content_id == copy_content_id()
    return THRESHOLD if is_copy else None


@dataclass(frozen=True)
class Chance:
    """What chance explains of how near the nearest neighbours of S sampled images are."""

    distances: Float64  # (S, k) chords to the k nearest others, rising
    chords: Float64  # (700,) rising by one percent each
    expected: Float64  # (700,) how many of the images have a neighbour within each by chance
    dimension: float  # d, of the neighbourhoods; 0 where all images lie on others, and nothing can be said

    def threshold(self, most: Float64 | float) -> float:
        """Return the lowest similarity above which chance explains at most `most` images, (700,) or the same for all.

        1 - threshold is rounded to three digits, so that the last bits of similarities do not show.
        """
        if not self.dimension:
            return FIXED_THRESHOLD
        passing = self.chords[self.expected <= most]
        return 1 - float(f"{float(passing.max(initial=self.chords[0])) ** 2 / 2:.2e}")

    def observed(self) -> Float64:
        """Return how many images have a neighbour within each chord, (700,)."""
        return np.searchsorted(np.sort(self.distances[:, 0]), self.chords).astype(np.float64)


def chance(neighbor_similarities: Float64) -> Chance:
    """Return what chance explains of nearest neighbours, by the neighbours further out.

    Where images are spread without duplicates, the neighbours around one lie like random points in a ball of a few
    dimensions d: with the k-th neighbour at distance R, one of the k - 1 others is nearer than t with probability
    1 - (1 - (t / R)^d)^(k - 1). Summed over images this is how many have so near a neighbour by chance; what is
    observed beyond it is duplicates. d comes from the mean growth of distances between neighbour k / 4 and k (Levina
    and Bickel 2004), so neither it nor R sees duplicates in groups of fewer than k / 4. Where the model does not hold
    (every image many times over) d comes out small and the threshold high: it errs towards keeping.

    Args:
        neighbor_similarities: (S, k) cosines of images to their k nearest others, falling; of fewer than 4 nothing is
            learnt.
    """
    distances = np.sqrt(np.maximum(2 - 2 * neighbor_similarities, 0))
    k = distances.shape[1]
    near, far = distances[:, max(k // 4, 1) - 1], distances[:, -1]
    is_spread = near > 0
    reach = float(np.median(far[is_spread])) if is_spread.any() else 1.0
    chords = reach * np.geomspace(1e-3, 1.0, 700)
    expected, dimension = np.zeros(len(chords)), 0.0
    if is_spread.any() and k >= 4:
        near, far = near[is_spread], far[is_spread]
        dimension = float(np.log(k / (k // 4)) / max(np.log(far / near).mean(), 1e-3))
        for place, chord in enumerate(chords.tolist()):
            expected[place] = (1 - (1 - np.minimum(chord / far, 1.0) ** dimension) ** (k - 1)).sum()
    return Chance(distances, chords, expected, dimension)


def chance_threshold(neighbor_similarities: Float64) -> tuple[float, float]:
    """Return the lowest similarity above which chance explains at most `CHANCE` of the nearest neighbours, and d.

    Args and model as in `chance`.
    """
    model = chance(neighbor_similarities)
    return model.threshold(CHANCE * np.maximum(model.observed(), 1)), model.dimension


def crowded_threshold(neighbor_similarities: Float64, share: float) -> float:
    """Return the lowest similarity above which chance gives at most a share of the images a neighbour.

    Args and model as in `chance`.
    """
    return chance(neighbor_similarities).threshold(share * len(neighbor_similarities))
