"""All commands in turn on a few real pictures, and exact steps compared with brute force on many."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import dinov2_toolkit
from dinov2_toolkit.cli import app
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.manifest import open_manifest

DATA = Path(dinov2_toolkit.__path__[0]) / "examples" / "data"
Dinov2 = Callable[..., str]


@pytest.fixture
def dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dinov2:
    """Run a command in an empty folder and return what it printed on stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    return run


def unpack(folder: str, start: int, count: int) -> None:
    """Write clipart pictures as files in folders that name their class, two classes in turn."""
    rows = pq.read_table(DATA / "clipart.parquet").to_pylist()
    chosen = [
        [row for row in rows if row["label"] == label][start : start + count] for label in ("animals", "computer")
    ]
    for row in [row for pair in zip(*chosen, strict=True) for row in pair]:
        path = Path(folder, row["label"], row["image"]["path"].replace("/", "_"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])


def test_all_commands_in_turn_on_clipart(dinov2: Dinov2) -> None:
    for folder, start, count in (("a", 0, 24), ("q", 24, 4), ("t", 28, 12), ("v", 40, 12)):
        unpack(folder, start, count)
    small = ["--set", "steps=3", "--set", "batch_size=8", "--set", "log_every=1", "--set", "depth=1", "-q"]
    assert dinov2("curate", "embed", "a", "-o", "a.parquet", "-q") == "a.parquet\n"
    assert dinov2("curate", "embed", "q", "-o", "q.parquet", "--role", "queries", "-q") == "q.parquet\n"
    assert dinov2("curate", "dedup", "a.parquet", "-o", "b.parquet", "-q") == "b.parquet\n"
    assert dinov2(*"curate cluster b.parquet -o c.parquet --num-clusters 8,2 --sample 12 -q".split()) == "c.parquet\n"
    assert (
        dinov2(*"curate retrieve --queries q.parquet --pool b.parquet --k 4 -o d.parquet -q".split()) == "d.parquet\n"
    )
    assert dinov2("curate", "retrieve", "--k", "4", "-q") == "curated.parquet\n"
    assert dinov2("train", "pretrain", "d.parquet", "-o", "runs/x", "--recipe", "tiny", *small) == "runs/x\n"
    distil = ["train", "distill", "d.parquet", "--teacher", "runs/x", "--arch", "vit_tiny", "-o", "runs/y"]
    assert dinov2(*distil, *small) == "runs/y\n"
    score = dinov2(*"evaluate probe --model runs/x --model runs/y --train t --test v --method knn -q".split())
    assert 0.0 <= float(score) <= 1.0
    assert dinov2(*"evaluate pca v --model runs/y -o pca.png -q".split()) == "pca.png\n"
    assert dinov2(*"evaluate neighbors d.parquet -o sheet.png -q".split()) == "sheet.png\n"

    assert open_manifest(Path("c.parquet")).num_rows == 12
    assert pq.read_table("d.parquet").equals(pq.read_table("curated.parquet"))
    assert dinov2("curate", "embed", "a", "-o", "a.parquet", "--model", "copy", "-q") == "a.parquet\n"
    kinds = sorted(artifact.kind for artifact in catalog.artifacts())
    assert kinds.count("run") == 2 and kinds.count("selection") == 4 and "scores" in kinds
    tree = dinov2("catalog", "lineage", "runs/y")
    assert [name in tree for name in ("runs/y", "runs/x", "d.parquet", "b.parquet", "a.parquet")] == [True] * 5
    assert {line.split()[0] for line in dinov2("catalog", "verify").splitlines()} == {"ok"}


def unit_vectors(path: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    column = pq.read_table(path, columns=["embedding"]).column(0).combine_chunks()
    vectors = column.flatten().to_numpy().astype(np.float64).reshape(len(column), -1)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_dedup_and_retrieve_equal_brute_force_on_three_thousand_real_embeddings(dinov2: Dinov2) -> None:
    pool, queries = str(DATA / "fashion_pool.parquet"), str(DATA / "fashion_queries.parquet")
    dinov2("curate", "embed", pool, "-o", "pool.parquet", "--model", "pixels", "--limit", "3000", "-q")
    dinov2("curate", "embed", queries, "-o", "queries.parquet", "--model", "pixels", "--role", "queries", "-q")
    vectors = unit_vectors("pool.parquet")
    images = pq.read_table("pool.parquet", columns=["image_id", "uri"]).to_pylist()
    order = np.argsort(np.argsort([f"{image['image_id']} {image['uri']}" for image in images], kind="stable"))

    threshold = 0.98
    dinov2("curate", "dedup", "pool.parquet", "-o", "unique.parquet", "--threshold", str(threshold), "-q")
    similar = vectors @ vectors.T > threshold
    group = np.arange(len(vectors))
    while True:  # connected components: label = smallest row
        smallest = np.where(similar, group, len(group)).min(axis=1)
        if (smallest == group).all():
            break
        group = smallest
    kept = {rows[np.argmin(order[rows])]: rows for rows in (np.flatnonzero(group == g) for g in np.unique(group))}
    unique = pq.read_table("unique.parquet").to_pydict()
    assert unique["row"] == sorted(kept)
    assert unique["duplicates"] == [len(kept[row]) - 1 for row in sorted(kept)]
    removed = pq.read_table("unique.removed.parquet").to_pylist()
    stand_ins = {images[row]["uri"]: images[keeper]["uri"] for keeper, rows in kept.items() for row in rows}
    assert len(removed) == len(vectors) - len(kept) > 50
    assert all(row["duplicate_of"] == stand_ins[row["uri"]] for row in removed)

    dinov2(*"curate retrieve --queries queries.parquet --pool pool.parquet --k 4 -o chosen.parquet -q".split())
    similarities = unit_vectors("queries.parquet") @ vectors.T
    best: dict[int, tuple[float, int, int]] = {}  # pool row -> -similarity, query, rank
    for query, row in enumerate(similarities):
        for rank, image in enumerate(np.lexsort((order, -row))[:4].tolist(), start=1):
            best[image] = min(best.get(image, (np.inf, 0, 0)), (-row[image], query, rank))
    expected = sorted((query, rank, image) for image, (_, query, rank) in best.items())
    ids = pq.read_table("queries.parquet").column("image_id").to_pylist()
    chosen = pq.read_table("chosen.parquet").to_pydict()
    assert chosen["row"] == [image for _, _, image in expected]
    assert chosen["rank"] == [rank for _, rank, _ in expected]
    assert chosen["query_id"] == [ids[query] for query, _, _ in expected]
    np.testing.assert_allclose(chosen["similarity"], [-best[image][0] for _, _, image in expected], atol=1e-6)

    again = open_manifest(Path("chosen.parquet")).content_id
    dinov2(*"curate retrieve --queries queries.parquet --pool pool.parquet --k 4 -o chosen.parquet --force -q".split())
    assert open_manifest(Path("chosen.parquet")).content_id == again
