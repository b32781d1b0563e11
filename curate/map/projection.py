"""Two coordinates an image, so that near neighbours lie together: principal components, then t-SNE.

Large pools are projected by a sample; every other image is placed among its nearest neighbours in it.

N images, D numbers a vector, C components, k neighbours, S images of the sample, Q the others.
"""

import hashlib
from importlib.util import find_spec

import numpy as np
import torch

from ... import console
from ...errors import ToolkitError
from ...features.search.cell_search import cell_neighbors
from ...features.search.exact_search import KnnTask, exact_neighbors
from ...features.search.neighbors import INDEXED_FOR, Identity, Neighbors, SearchSettings, nearest
from ...features.search.products import unit_rows
from ...features.threads import map_in_order, num_cores, workers
from ...store.manifest import Source
from ...store.progress import Progress
from ...store.vectors import Float32, Float64, Int64, PageRelease, Vectors

NUM_COMPONENTS = 50
BLOCK_ROWS = 8_192  # vectors of a product; fixed, so that sums do not depend on the number of threads
NUM_NEIGHBORS = 30  # measured: with 90, the usual number, fewer of the true neighbours stay near, in twice the time
PERPLEXITY = NUM_NEIGHBORS / 3  # of t-SNE: so many neighbours count
EXAGGERATED, ITERATIONS = 250, 500  # openTSNE's own: first with attraction 12 times as strong, then as it is
SHOWN_EVERY = 10  # iterations
INITIAL_SPREAD = 1e-4  # standard deviation at the start: Kobak and Berens 2019, "The art of using t-SNE"
PLACED_BY = 10  # neighbours in the sample whose median is an image's place
SMALLEST = 2 * NUM_NEIGHBORS  # smaller pools are shown by their first two principal components


def check_installed() -> None:
    """Raise ToolkitError when the library that projects is not installed."""
    if find_spec("openTSNE") is None:
        raise ToolkitError("curate map needs openTSNE, which is not installed; pip install 'dinov2-toolkit[map]'")


def project(vectors: Vectors, num_sampled: int, search: SearchSettings, progress: Progress) -> Float32:
    """Return the coordinates of vectors, (N, 2), centred; they repeat bit for bit with any number of threads.

    Args:
        num_sampled: how many are projected by t-SNE; the others are placed among them.
        search: of neighbours; its seed draws the sample.
        progress: keeps the sample's coordinates, which take longest, for the same command after an interruption.
    """
    points = principal_components(vectors, NUM_COMPONENTS)
    sample = np.arange(len(points))
    if num_sampled < len(points):
        rng = np.random.default_rng([search.seed % 2**63, 3])
        sample = np.sort(rng.choice(len(points), num_sampled, replace=False))
    kept = progress.load("projected")
    if kept is None:
        kept = {"coordinates": fit(points.take(sample), search)}
        progress.save("projected", **kept)
    coordinates: Float32 = kept["coordinates"]
    return coordinates if len(sample) == len(points) else place(points, sample, coordinates, search)


def principal_components(vectors: Vectors, num: int) -> Vectors:
    """Return vectors at length 1 by their coordinates along their principal directions, (N, C) with C at most D.

    The directions are those of the largest second moments, about 0 and not about the mean: so the cosines, by which
    neighbours are found, stay what they are. Signs are fixed by the largest entry of each direction.
    """
    blocks = [slice(start, min(start + BLOCK_ROWS, len(vectors))) for start in range(0, len(vectors), BLOCK_ROWS)]

    def unit(block: slice) -> torch.Tensor:
        return unit_rows(vectors.array[vectors.rows[block]])

    def moments(block: slice) -> Float64:
        rows = unit(block)
        products: Float64 = (rows.T @ rows).cpu().numpy().astype(np.float64)
        return products

    pages = PageRelease(vectors.array)
    row_bytes = vectors.dim * vectors.array.itemsize
    total = np.zeros((vectors.dim, vectors.dim))
    projected = np.empty((len(vectors), min(num, vectors.dim)), np.float32)
    with workers() as threads, console.progress("principal components", 2 * len(vectors), "vectors") as advance:
        for block, products in zip(blocks, map_in_order(moments, blocks, threads), strict=True):
            total += products
            pages.add((block.stop - block.start) * row_bytes)
            advance(block.stop - block.start)
        directions = _largest_directions(total, num)

        def along(block: slice) -> Float32:
            coordinates: Float32 = (unit(block) @ directions.to(unit(block).device)).cpu().numpy()
            return coordinates

        for block, coordinates in zip(blocks, map_in_order(along, blocks, threads), strict=True):
            projected[block] = coordinates
            pages.add((block.stop - block.start) * row_bytes)
            advance(block.stop - block.start)
    rows = hashlib.blake2b(np.ascontiguousarray(vectors.rows).data, digest_size=16).hexdigest()
    base = Source("base", f"{vectors.base.path} by {num} components", f"{vectors.base.content_id} {num} {rows}")
    return Vectors(projected, np.arange(len(projected)), base)


def _largest_directions(moments: Float64, num: int) -> torch.Tensor:
    """Return the eigenvectors of the `num` largest eigenvalues of (D, D), as columns, (D, C) float32."""
    directions = torch.linalg.eigh(torch.from_numpy(moments)).eigenvectors.flip(1)[:, :num]
    largest = directions.abs().argmax(dim=0, keepdim=True)
    signed: torch.Tensor = directions * directions.gather(0, largest).sign()
    return signed.float()


def fit(points: Vectors, search: SearchSettings) -> Float32:
    """Return the coordinates of points by t-SNE on their nearest neighbours, (N, 2)."""
    start = main_axes(points.raw(0, len(points)))
    if len(points) < SMALLEST:
        return start.astype(np.float32)
    itself = np.arange(len(points))
    found = nearest(points, points, NUM_NEIGHBORS, order=itself, identity=Identity(itself, itself), search=search)
    spread = start[:, 0].std()
    coordinates = _tsne(found, start * (INITIAL_SPREAD / spread if spread > 0 else 0.0))
    centred: Float32 = (coordinates - coordinates.mean(axis=0)).astype(np.float32)
    return centred


def main_axes(points: Float32) -> Float64:
    """Return points (N, C) by the two axes along which they vary most, (N, 2) about 0; a missing axis is 0."""
    centred = points - points.mean(axis=0, dtype=np.float64)
    covariance = np.einsum("nc,nd->cd", centred, centred)  # in one order whatever the number of threads
    moments = _largest_directions(covariance, 2).double().numpy()
    axes = np.zeros((len(points), 2))
    axes[:, : moments.shape[1]] = np.einsum("nc,ca->na", centred, moments)
    return axes


def _tsne(found: Neighbors, start: Float64) -> Float64:
    from openTSNE import TSNE
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    threads = num_cores()
    distances = np.sqrt(np.maximum(2 - 2 * found.similarities, 0))  # of points at length 1
    neighbors = PrecomputedNeighbors(found.indices, distances)
    affinities = PerplexityBasedNN(knn_index=neighbors, perplexity=PERPLEXITY, n_jobs=threads)
    with console.progress("projecting", EXAGGERATED + ITERATIONS, "iterations") as advance:

        def shown(iteration: int, error: float, embedding: object) -> None:
            advance(SHOWN_EVERY)

        tsne = TSNE(
            early_exaggeration_iter=EXAGGERATED,
            n_iter=ITERATIONS,
            n_jobs=threads,
            callbacks=shown,
            callbacks_every_iters=SHOWN_EVERY,
        )
        return np.asarray(tsne.fit(affinities=affinities, initialization=start), np.float64)


def place(points: Vectors, sample: Int64, coordinates: Float32, search: SearchSettings) -> Float32:
    """Return coordinates of all points, (N, 2): those of the sample as they are, each other the median of its nearest.

    Args:
        sample: (S,) positions of those that have `coordinates` (S, 2), rising.
    """
    others = np.setdiff1d(np.arange(len(points)), sample, assume_unique=True)
    task = KnnTask(points.take(others), points.take(sample), PLACED_BY, np.arange(len(sample)))
    if search.recall < 1 and len(others) >= INDEXED_FOR:
        found = cell_neighbors(task, search, "placing the others")
    else:
        found = exact_neighbors(task, progress="placing the others")
    placed = np.empty((len(points), 2), np.float32)
    placed[sample] = coordinates
    for start in range(0, len(others), BLOCK_ROWS):
        some = slice(start, start + BLOCK_ROWS)
        placed[others[some]] = np.median(coordinates[found.indices[some]], axis=1)
    return placed
