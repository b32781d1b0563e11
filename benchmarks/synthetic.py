"""Write an embedding manifest of synthetic vectors: concepts with a long tail, and planted near-duplicates.

    python benchmarks/synthetic.py --rows 1000000 -o million.parquet

Concepts have two levels: 50 super-concepts of 30 concepts, both drawn by Zipf's law with exponent 1.1 (--supers 0:
1,500 concepts without super-concepts). A vector is its concept's direction plus noise, so that two of one concept
have a cosine of about 0.5. 8 % of the rows are near-duplicates of another row of the same 16,384, at a cosine drawn
uniformly from 0.86 to 1: the columns `copy_of` (its row) and `cosine` tell which. `label` is SUPER/CONCEPT.

The same arguments give the same rows; memory does not grow with their number.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dinov2_toolkit import console
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, ManifestWriter, Provenance, Source, embedding_field

BLOCK_ROWS = 16_384
NUM_CONCEPTS = 1_500
EXPONENT = 1.1
CONCEPT_SHARE = 0.6  # of a concept's squared length that is its super-concept's
NOISE = 1.0  # length of the noise beside a concept's direction of 1
COPIES = 0.08
COSINES = (0.86, 1.0)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Some rows."""

    vectors: Float32  # (B, D)
    concept: Int64  # (B,)
    copy_of: Int64  # (B,) row of its source in the pool; -1: not a planted copy
    cosine: Float32  # (B,) to that row


def zipf(num: int) -> npt.NDArray[np.float64]:
    """Return the probabilities of `num` items by Zipf's law."""
    weights = np.arange(1, num + 1) ** -EXPONENT
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def blocks(num_rows: int, dim: int, supers: int = 50, seed: int = 0) -> Iterator[Block]:
    """Yield the rows, block by block."""
    rng = np.random.default_rng([seed, 0])
    concepts = unit(rng.standard_normal((NUM_CONCEPTS, dim), np.float32))
    if supers:
        above = unit(rng.standard_normal((supers, dim), np.float32)).repeat(NUM_CONCEPTS // supers, axis=0)
        concepts = unit(CONCEPT_SHARE**0.5 * above + (1 - CONCEPT_SHARE) ** 0.5 * concepts)
        shares = np.outer(zipf(supers), zipf(NUM_CONCEPTS // supers)).reshape(-1)
    else:
        shares = zipf(NUM_CONCEPTS)
    for number, start in enumerate(range(0, num_rows, BLOCK_ROWS)):
        rng = np.random.default_rng([seed, 1, number])
        size = min(BLOCK_ROWS, num_rows - start)
        concept = rng.choice(len(concepts), size, p=shares)
        vectors = concepts[concept] + NOISE / dim**0.5 * rng.standard_normal((size, dim), np.float32)
        vectors = unit(vectors)
        shuffled = rng.permutation(size)
        num_copies = round(COPIES * size)
        copies, sources = shuffled[:num_copies], shuffled[num_copies : 2 * num_copies]
        cosine = rng.uniform(*COSINES, len(copies)).astype(np.float32)[:, None]
        source = vectors[sources]
        noise = rng.standard_normal(source.shape, np.float32)
        noise = unit(noise - (noise * source).sum(axis=1, keepdims=True) * source)
        vectors[copies] = cosine * source + np.sqrt(1 - cosine**2) * noise
        concept[copies] = concept[sources]
        copy_of, all_cosines = np.full(size, -1), np.zeros(size, np.float32)
        copy_of[copies], all_cosines[copies] = sources + start, cosine[:, 0]
        yield Block(vectors, concept, copy_of, all_cosines)


def unit(vectors: Float32) -> Float32:
    """Return the rows at length 1."""
    scaled: Float32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def write(path: Path, num_rows: int, dim: int = 384, supers: int = 50, seed: int = 0) -> None:
    """Write an embedding manifest of half floats and enter it in the catalog."""
    embedding = embedding_field(dim, pa.float16())
    fields = [*IMAGE_FIELDS, pa.field("copy_of", pa.int64()), pa.field("cosine", pa.float32()), embedding]
    made_by = Source("model", "synthetic", f"synthetic of {dim}")
    parameters: dict[str, object] = {"rows": num_rows, "dim": dim, "supers": supers}
    provenance = Provenance("embeddings", "benchmarks synthetic", parameters, seed, (made_by,))
    per_super = NUM_CONCEPTS // max(supers, 1)
    start = 0
    with ManifestWriter(path, fields, provenance) as writer, console.progress("writing", num_rows, "rows") as advance:
        for block in blocks(num_rows, dim, supers, seed):
            rows = range(start, start + len(block.vectors))
            is_copy = block.copy_of >= 0
            columns = [
                pa.array([f"{row:032x}" for row in rows]),
                pa.array([f"/synthetic/{row}.png" for row in rows]),
                pa.array(np.full(len(rows), 256, np.int32)),
                pa.array(np.full(len(rows), 256, np.int32)),
                pa.array([f"{concept // per_super}/{concept}" for concept in block.concept.tolist()]),
                pa.array(block.copy_of, mask=~is_copy),
                pa.array(block.cosine, mask=~is_copy),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(block.vectors.astype(np.float16).reshape(-1)), type=embedding.type
                ),
            ]
            writer.write(pa.table(columns, schema=pa.schema(fields)))
            start += len(rows)
            advance(len(rows))
    catalog.record(path, writer.provenance, None)


def main() -> None:
    """Read the command line and write the manifest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--supers", type=int, default=50, help="super-concepts; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    write(args.output, args.rows, args.dim, args.supers, args.seed)


if __name__ == "__main__":
    main()
