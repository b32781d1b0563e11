"""A threshold for near-duplicates, learnt from the pool: thresholds are properties of features, not constants.

N images, S of them sampled, k neighbours.
"""

import numpy as np

from ..features.neighbors import Identity, nearest
from ..store.vectors import Float64, Vectors

CHANCE = 0.05  # chosen: share of the images above the threshold that may be there by chance
SAMPLE_ROWS = 20_000  # chosen: how many images' neighbours the threshold is learnt from
FAR_NEIGHBOR = 32  # chosen: far enough to be no duplicate, near enough to be the same neighbourhood
MIN_FAR_NEIGHBOR = 8  # of fewer images nothing is learnt
FIXED_THRESHOLD = 0.999  # chosen: what remains then


def threshold_from_pool(distinct: Vectors) -> tuple[float, str]:
    """Return a threshold learnt from how a pool's distinct vectors (N, D) lie, and its origin in words."""
    far = min(FAR_NEIGHBOR, (len(distinct) - 1) // 3)
    if far < MIN_FAR_NEIGHBOR:
        return FIXED_THRESHOLD, f"so because {len(distinct)} distinct images are too few to learn it from"
    sample = np.unique(np.linspace(0, len(distinct) - 1, min(SAMPLE_ROWS, len(distinct))).astype(np.int64))
    positions = np.arange(len(distinct))
    identity = Identity(sample, positions)
    found = nearest(
        distinct.take(sample), distinct, far, order=positions, identity=identity, progress="learning the threshold"
    )
    threshold, dimension = chance_threshold(found.similarities)
    return threshold, (
        f"from the pool: of the images with a neighbour above it, at most {CHANCE:.0%} have one by chance"
        f" (by the density of their neighbourhoods, local dimension {dimension:.1f})"
    )


def chance_threshold(neighbor_similarities: Float64) -> tuple[float, float]:
    """Return the lowest similarity above which chance explains at most `CHANCE` of the nearest neighbours.

    Where images are spread without duplicates, the neighbours around one lie like random points in a ball of a few
    dimensions d: with the k-th neighbour at distance R, one of the k - 1 others is nearer than t with probability
    1 - (1 - (t / R)^d)^(k - 1). Summed over images this is how many have so near a neighbour by chance; what is
    observed beyond it is duplicates. d comes from the mean growth of distances between neighbour k / 4 and k (Levina
    and Bickel 2004), so neither it nor R sees duplicates in groups of fewer than k / 4. Where the model does not hold
    (every image many times over) d comes out small and the threshold high: it errs towards keeping.

    Args:
        neighbor_similarities: (S, k) cosines of images to their k nearest others, falling, k at least 4.

    Returns the threshold, 1 - threshold rounded to three digits so that the last bits of similarities do not show,
    and d.
    """
    distances = np.sqrt(2 - 2 * neighbor_similarities)  # chords
    k = distances.shape[1]
    far, near = distances[:, -1], distances[:, k // 4 - 1]
    is_spread = near > 0
    if not is_spread.any():
        return FIXED_THRESHOLD, 0.0
    growth = np.log(far[is_spread] / near[is_spread]).mean()
    dimension = float(np.log(k / (k // 4)) / max(growth, 1e-3))
    far = far[is_spread]
    chords = np.median(far) * np.geomspace(1e-3, 1.0, 700)  # steps of one percent
    expected = np.array(
        [(1 - (1 - np.minimum(chord / far, 1.0) ** dimension) ** (k - 1)).sum() for chord in chords.tolist()]
    )
    observed = np.searchsorted(np.sort(distances[:, 0]), chords)
    passing = chords[expected <= CHANCE * np.maximum(observed, 1)]
    chord = float(passing.max(initial=chords[0]))
    return 1 - float(f"{chord**2 / 2:.2e}"), dimension
