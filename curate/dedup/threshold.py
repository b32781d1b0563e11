"""A threshold for near-duplicates: a property of features and of how densely a pool's vectors lie, not a constant.

N images, S of them sampled, k neighbours, R radii.
"""

from dataclasses import dataclass

import numpy as np

from ...features.search.exact_search import DEFAULTS
from ...features.search.neighbors import Identity, Neighbors, SearchSettings, nearest
from ...models.copy_descriptor import THRESHOLD, copy_content_id
from ...store.manifest import Source
from ...store.vectors import Float64, Int64, Vectors

CHANCE = 0.05  # chosen: share of the images above the threshold that may be there by chance
LOSS = 0.02  # chosen: share of the distinct images that the descriptor's own threshold may cost
SAMPLE_ROWS = (2_000, 20_000)  # chosen: images whose neighbours are searched; fewer of a larger pool
SAMPLE_PRODUCTS = 6e9  # chosen: sampled images times images at most, a minute or so, until the fewest are reached
FAR_NEIGHBOR = 32  # chosen: far enough to be no duplicate, near enough to be the same neighbourhood
MIN_FAR_NEIGHBOR = 8  # of fewer images no threshold is learnt
FIXED_THRESHOLD = 0.999  # chosen: what remains then


def threshold_from_pool(distinct: Vectors, own: float | None) -> tuple[float, str]:
    """Return a threshold for a pool's distinct vectors (N, D), and its origin in words.

    A descriptor's `own` is raised where the pool is so crowded that it would cost too many. Where it has none, the
    threshold is learnt from how densely the vectors lie.
    """
    far = min(FAR_NEIGHBOR, (len(distinct) - 1) // 3)
    if far < MIN_FAR_NEIGHBOR:
        if own is not None:
            return own, "by the descriptor `copy`"
        return FIXED_THRESHOLD, f"so because {len(distinct)} distinct images are too few to learn it from"
    _, near = sample_neighbors(distinct, sample_rows(len(distinct)), far, progress="learning the threshold")
    chance = chance_model(near.similarities)
    if own is not None:
        crowded = chance.threshold(LOSS * len(near.similarities))
        if crowded <= own:
            return own, "by the descriptor `copy`"
        return crowded, (
            f"from the pool: at the descriptor's own {own}, more than {LOSS:.0%} of the images have such a neighbour"
            " by chance"
        )
    return chance.threshold_at(CHANCE), (
        f"from the pool: of the images with a neighbour above it, at most {CHANCE:.0%} have one by chance"
        f" (by the density of their neighbourhoods, local dimension {chance.dimension:.1f})"
    )


def sample_neighbors(
    distinct: Vectors, num: int, k: int, *, above: float = -np.inf, search: SearchSettings = DEFAULTS, progress: str
) -> tuple[Int64, Neighbors]:
    """Return the positions of about `num` vectors (S,), evenly spread and rising, and the k nearest others of each."""
    sample = np.linspace(0, len(distinct) - 1, min(num, len(distinct))).astype(np.int64)  # no two the same
    positions = np.arange(len(distinct))
    queries, identity = distinct.take(sample), Identity(sample, positions)
    near = nearest(
        queries, distinct, k, order=positions, identity=identity, above=above, search=search, progress=progress
    )
    return sample, near


def sample_rows(num_images: int) -> int:
    """Return how many images' neighbours say enough about a pool."""
    fewest, most = SAMPLE_ROWS
    return min(num_images, max(fewest, min(most, int(SAMPLE_PRODUCTS / max(num_images, 1)))))


def threshold_of(model: Source | None) -> float | None:
    """Return the threshold that belongs to a descriptor; None: it has none."""
    is_copy = model is not None and model.path == "copy" and model.content_id == copy_content_id()
    return THRESHOLD if is_copy else None


@dataclass(frozen=True)
class ChanceModel:
    """How many of S sampled images have a neighbour within a radius, and how many of them would by chance."""

    distances: Float64  # (S, k) from unit vectors to their k nearest others, rising
    radii: Float64  # (R,) rising by one percent each
    observed: Float64  # (R,) images with a neighbour within each
    expected: Float64  # (R,) of those, how many by chance
    dimension: float  # of the neighbourhoods; 0 where all images lie on others, and nothing can be said

    @property
    def thresholds(self) -> Float64:
        """The cosines of the radii, (R,), falling."""
        return 1 - self.radii**2 / 2

    def threshold(self, max_expected: Float64 | float) -> float:
        """Return the lowest cosine above which at most `max_expected` images (R,) have a neighbour by chance.

        1 - threshold is rounded to three digits, so that the last bits of similarities do not show.
        """
        if not self.dimension:
            return FIXED_THRESHOLD
        passing = self.radii[self.expected <= max_expected]
        return 1 - float(f"{float(passing.max(initial=self.radii[0])) ** 2 / 2:.2e}")

    def threshold_at(self, chance: float) -> float:
        """Return the lowest cosine at which this share of the images with a neighbour above it have one by chance."""
        return self.threshold(chance * np.maximum(self.observed, 1))


def chance_model(similarities: Float64) -> ChanceModel:
    """Return how many nearest neighbours are expected by chance, from the distances of the neighbours further out.

    Where images are spread without duplicates, the neighbours around one lie like random points in a ball of a few
    dimensions d: with the k-th neighbour at distance R, one of the k - 1 others is nearer than t with probability
    1 - (1 - (t / R)^d)^(k - 1). Summed over images this is how many have so near a neighbour by chance; what is
    observed beyond it is duplicates. d comes from the mean growth of distances between neighbour k / 4 and k (Levina
    and Bickel 2004), so neither it nor R sees duplicates in groups of fewer than k / 4. Where the model does not hold
    (every image many times over) d comes out small and the threshold high: it errs towards keeping.

    Args:
        similarities: (S, k) cosines of images to their k nearest others, falling; for k below 4 nothing is learnt.
    """
    distances = np.sqrt(np.maximum(2 - 2 * similarities, 0))
    k = distances.shape[1]
    near, far = distances[:, max(k // 4, 1) - 1], distances[:, -1]
    is_spread = near > 0
    reach = float(np.median(far[is_spread])) if is_spread.any() else 1.0
    radii = reach * np.geomspace(1e-3, 1.0, 700)
    observed = np.searchsorted(np.sort(distances[:, 0]), radii).astype(np.float64)
    expected, dimension = np.zeros(len(radii)), 0.0
    if is_spread.any() and k >= 4:
        near, far = near[is_spread], far[is_spread]
        dimension = float(np.log(k / (k // 4)) / max(np.log(far / near).mean(), 1e-3))
        for place, radius in enumerate(radii.tolist()):
            expected[place] = (1 - (1 - np.minimum(radius / far, 1.0) ** dimension) ** (k - 1)).sum()
    return ChanceModel(distances, radii, observed, expected, dimension)
