"""A threshold for near-duplicates: a property of features and of how a pool's vectors lie, not a constant.

N images, S of them sampled, k neighbours.
"""

from pathlib import Path

import numpy as np

from ..features.neighbors import Identity, nearest
from ..store.manifest import Source, open_manifest
from ..store.vectors import Float64, Vectors

CHANCE = 0.05  # chosen: share of the images above the threshold that may be there by chance
LOSS = 0.02  # chosen: share of the distinct images that the descriptor's own threshold may cost
SAMPLE_ROWS = 20_000  # chosen: how many images' neighbours the threshold is learnt from
FAR_NEIGHBOR = 32  # chosen: far enough to be no duplicate, near enough to be the same neighbourhood
MIN_FAR_NEIGHBOR = 8  # of fewer images nothing is learnt
FIXED_THRESHOLD = 0.999  # chosen: what remains then


def threshold_from_pool(distinct: Vectors) -> tuple[float, str]:
    """Return a threshold for a pool's distinct vectors (N, D), and its origin in words.

    The descriptor made for copies has its own, raised where the pool is so crowded that it would cost too many; for
    any other features it is learnt from how the vectors lie.
    """
    own = _own_threshold(distinct.base)
    far = min(FAR_NEIGHBOR, (len(distinct) - 1) // 3)
    if far < MIN_FAR_NEIGHBOR:
        if own is not None:
            return own, "by the descriptor `copy`"
        return FIXED_THRESHOLD, f"so because {len(distinct)} distinct images are too few to learn it from"
    sample = np.unique(np.linspace(0, len(distinct) - 1, min(SAMPLE_ROWS, len(distinct))).astype(np.int64))
    positions = np.arange(len(distinct))
    identity = Identity(sample, positions)
    found = nearest(
        distinct.take(sample), distinct, far, order=positions, identity=identity, progress="learning the threshold"
    )
    if own is not None:
        crowded = crowded_threshold(found.similarities, LOSS)
        if crowded <= own:
            return own, "by the descriptor `copy`"
        return crowded, (
            f"from the pool: at the descriptor's own {own}, more than {LOSS:.0%} of the images have such a neighbour"
            " by chance"
        )
    threshold, dimension = chance_threshold(found.similarities)
    return threshold, (
        f"from the pool: of the images with a neighbour above it, at most {CHANCE:.0%} have one by chance"
        f" (by the density of their neighbourhoods, local dimension {dimension:.1f})"
    )


def _own_threshold(base: Source) -> float | None:
    """Return the threshold that belongs to the descriptor of an embedding manifest; None: it has none."""
    path = Path(base.path)
    provenance = open_manifest(path).provenance if path.exists() else None
    model = None if provenance is None else provenance.model()
    if model is None or model.path != "copy":
        return None
    from ..models.copy_descriptor import THRESHOLD, copy_content_id  # imports torch, which no other pool needs

    return THRESHOLD if model.content_id == copy_content_id() else None


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
    distances, chords, expected, dimension = _chance(neighbor_similarities)
    if not len(chords):
        return FIXED_THRESHOLD, 0.0
    observed = np.searchsorted(np.sort(distances[:, 0]), chords)
    passing = chords[expected <= CHANCE * np.maximum(observed, 1)]
    return _rounded(float(passing.max(initial=chords[0]))), dimension


def crowded_threshold(neighbor_similarities: Float64, share: float) -> float:
    """Return the lowest similarity above which chance gives at most a share of the images a neighbour.

    Args and model of chance are those of `chance_threshold`.
    """
    _, chords, expected, _ = _chance(neighbor_similarities)
    if not len(chords):
        return FIXED_THRESHOLD
    passing = chords[expected <= share * len(neighbor_similarities)]
    return _rounded(float(passing.max(initial=chords[0])))


def _rounded(chord: float) -> float:
    return 1 - float(f"{chord**2 / 2:.2e}")


def _chance(neighbor_similarities: Float64) -> tuple[Float64, Float64, Float64, float]:
    """Return the distances (S, k), some chords, at how many images each explains a neighbour so near, and d.

    No chords where all images lie on others.
    """
    distances = np.sqrt(2 - 2 * neighbor_similarities)  # chords
    k = distances.shape[1]
    far, near = distances[:, -1], distances[:, k // 4 - 1]
    is_spread = near > 0
    if not is_spread.any():
        return distances, np.empty(0), np.empty(0), 0.0
    growth = np.log(far[is_spread] / near[is_spread]).mean()
    dimension = float(np.log(k / (k // 4)) / max(growth, 1e-3))
    far = far[is_spread]
    chords = np.median(far) * np.geomspace(1e-3, 1.0, 700)  # steps of one percent
    expected = np.array(
        [(1 - (1 - np.minimum(chord / far, 1.0) ** dimension) ** (k - 1)).sum() for chord in chords.tolist()]
    )
    return distances, chords, expected, dimension
