"""Filling by the next nearest, several query sets, caps: against a greedy pass over all pairs."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.retrieve import assignment
from dinov2_toolkit.curate.retrieve.assignment import Pairs, cap
from dinov2_toolkit.curate.retrieve.retrieve import Queries, RetrieveSettings, parse_queries, retrieve_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.store.vectors import Stored
from dinov2_toolkit.tests.embedded import similarity, unit, write_embeddings

Row = dict[str, object]


def drawn(num_rows: int, seed: int, dim: int = 8) -> Stored:
    """Draw vectors in few clumps, so that many want the same."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, dim))
    return (centres[rng.integers(5, size=num_rows)] + 0.3 * rng.normal(size=(num_rows, dim))).astype(np.float32)


def query_set(path: Path, vectors: Stored) -> Path:
    ids = [f"{path.stem}{row}" for row in range(len(vectors))]
    return write_embeddings(path, vectors, image_ids=ids, role="queries")


def retrieve(sets: list[Queries], pool: Path, output: Path, **settings: object) -> tuple[list[Row], dict[str, object]]:
    retrieve_images(sets, pool, str(output), RetrieveSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    provenance = open_manifest(output).provenance
    assert provenance is not None
    rows: list[Row] = pq.read_table(output).to_pylist()
    return rows, provenance.figures


def all_pairs(queries: Stored, pool: Stored) -> list[tuple[float, int, int]]:
    """Return (-similarity, query, pool row) of all pairs, the best first; ids rise with the row."""
    left, right = unit(queries), unit(pool)
    return sorted((-similarity(left[q], right[row]), q, row) for q in range(len(left)) for row in range(len(right)))


def greedy(pairs: list[tuple[float, int, int]], capacity: list[int]) -> set[tuple[int, int]]:
    """Take every pair whose image is free and whose query is not served yet."""
    left, taken, chosen = list(capacity), set(), set()
    for _, query, row in pairs:
        if left[query] and row not in taken:
            left[query] -= 1
            taken.add(row)
            chosen.add((query, row))
    return chosen


def found_in(rows: list[Row], names: list[str]) -> set[tuple[int, int]]:
    return {(names.index(str(row["query_id"])), int(str(row["row"]))) for row in rows}


@pytest.mark.parametrize(("k", "num_pool", "fill_pairs"), [(1, 120, 64), (3, 120, 64), (4, 70, 1 << 23), (50, 60, 64)])
def test_filling_gives_what_a_greedy_pass_over_all_pairs_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, num_pool: int, fill_pairs: int
) -> None:
    monkeypatch.setattr(assignment, "FILL_PAIRS", fill_pairs)  # few: queries are searched in many blocks
    queries, pool = drawn(20, 1), drawn(num_pool, 2)
    queries[10:16] = queries[3]  # all want the same, and queries first in line are served first
    pool[30:40] = pool[5]
    rows, figures = retrieve(
        [Queries(query_set(tmp_path / "q.parquet", queries))],
        write_embeddings(tmp_path / "pool.parquet", pool),
        tmp_path / "o.parquet",
        k=k,
        fill=True,
    )
    names = [f"q{number}" for number in range(20)]
    pairs = all_pairs(queries, pool)
    assert found_in(rows, names) == greedy(pairs, [k] * 20)
    assert len(rows) == min(20 * k, num_pool) == figures["images"]  # each has its k, or the pool is used up
    ranks = {(q, row): rank for q in range(20) for rank, (_, _, row) in enumerate([p for p in pairs if p[1] == q], 1)}
    assert all(row["rank"] == ranks[names.index(str(row["query_id"])), int(str(row["row"]))] for row in rows)
    places = [(names.index(str(row["query_id"])), row["rank"]) for row in rows]
    assert places == sorted(places)
    assert figures["fill_depth"] == num_pool if k == 50 else figures["fill_rounds"] > 1  # type: ignore[operator]


def test_filling_changes_nothing_where_no_candidates_collide(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", np.eye(12, dtype=np.float32))
    sets = [Queries(query_set(tmp_path / "q.parquet", np.eye(12, dtype=np.float32)[[2, 7]]))]
    filled, figures = retrieve(sets, pool, tmp_path / "filled.parquet", k=1, fill=True)
    assert filled == retrieve(sets, pool, tmp_path / "plain.parquet", k=1)[0]
    assert (figures["fill_rounds"], figures["fill_depth"], figures["collisions"]) == (1, 1, 0)


def test_filling_leaves_out_what_is_unlike_and_the_queries_themselves(tmp_path: Path) -> None:
    queries, pool = drawn(6, 3), drawn(40, 4)
    pool[:3] = queries[:3]
    ids = [*(f"q{row}" for row in range(3)), *(f"p{row:02}" for row in range(3, 40))]
    uris = [*(f"/q/{row}.png" for row in range(3)), *(f"/pool/{row}.png" for row in range(3, 40))]
    manifest = write_embeddings(tmp_path / "pool.parquet", pool, image_ids=ids, uris=uris)
    sets = [Queries(query_set(tmp_path / "q.parquet", queries))]
    rows, _ = retrieve(sets, manifest, tmp_path / "o.parquet", k=5, fill=True, min_similarity=0.5, include_queries=True)
    brought = [row for row in rows if row["rank"] != 0]
    pairs = [pair for pair in all_pairs(queries, pool) if pair[2] >= 3 and -pair[0] >= 0.5]
    assert found_in(brought, [f"q{row}" for row in range(6)]) == greedy(pairs, [5] * 6)
    assert len(rows) == len(brought) + 6


def test_every_set_has_its_own_number_and_shared_images_go_to_the_most_similar(tmp_path: Path) -> None:
    first, second, pool = drawn(8, 5), drawn(9, 6), drawn(150, 7)
    second[4] = first[2]  # a tie: the earlier set has it
    manifest = write_embeddings(tmp_path / "pool.parquet", pool)
    paths = query_set(tmp_path / "a.parquet", first), query_set(tmp_path / "b.parquet", second)
    rows, figures = retrieve([Queries(paths[0]), Queries(paths[1], 7)], manifest, tmp_path / "o.parquet", k=3)
    best: dict[int, tuple[float, int]] = {}
    wanted: list[set[int]] = [set(), set()]
    together = np.concatenate([first, second])
    pairs = all_pairs(together, pool)
    for query in range(17):
        for cosine, _, row in [pair for pair in pairs if pair[1] == query][: 3 if query < 8 else 7]:
            wanted[query >= 8].add(row)
            best[row] = min(best.get(row, (2.0, 0)), (cosine, query))
    names = [*(f"a{row}" for row in range(8)), *(f"b{row}" for row in range(9))]
    assert found_in(rows, names) == {(query, row) for row, (_, query) in best.items()}
    assert all(row["source"] == str(row["query_id"])[0] for row in rows)
    num_first = sum(query < 8 for _, query in best.values())
    assert figures["composition"] == [
        {"source": "a", "queries": 8, "number": 3, "wanted": 24, "distinct": len(wanted[0]),
         "images": num_first, "share": num_first / len(best)},
        {"source": "b", "queries": 9, "number": 7, "wanted": 63, "distinct": len(wanted[1]),
         "images": len(best) - num_first, "share": (len(best) - num_first) / len(best)},
    ]  # fmt: skip
    assert (figures["wanted"], figures["distinct"], figures["collisions"]) == (87, len(best), 87 - len(best))


def test_several_sets_are_filled_as_one(tmp_path: Path) -> None:
    first, second, pool = drawn(8, 5), drawn(9, 6), drawn(60, 7)
    manifest = write_embeddings(tmp_path / "pool.parquet", pool)
    sets = [Queries(query_set(tmp_path / "a.parquet", first), 2), Queries(query_set(tmp_path / "b.parquet", second))]
    rows, _ = retrieve(sets, manifest, tmp_path / "o.parquet", k=4, fill=True)
    names = [*(f"a{row}" for row in range(8)), *(f"b{row}" for row in range(9))]
    pairs = all_pairs(np.concatenate([first, second]), pool)
    assert found_in(rows, names) == greedy(pairs, [2] * 8 + [4] * 9)
    assert len(rows) == 2 * 8 + 4 * 9


def test_a_cap_takes_the_nearest_of_every_query_first() -> None:
    query, rank = np.array([0, 0, 0, 1, 2, 2]), np.array([1, 2, 3, 1, 1, 2])
    pairs = Pairs(np.arange(6), query, rank, np.array([0.9, 0.8, 0.7, 0.3, 0.5, 0.4]))
    assert cap(pairs, 4).pool.tolist() == [0, 1, 3, 4]  # the three nearest, then the best of the second ones
    assert cap(pairs, 2).pool.tolist() == [0, 4]
    assert cap(pairs, 6) is pairs and cap(pairs, None) is pairs


def test_max_images_holds_for_every_set(tmp_path: Path) -> None:
    manifest = write_embeddings(tmp_path / "pool.parquet", drawn(150, 7))
    sets = [
        Queries(query_set(tmp_path / "a.parquet", drawn(9, 5))),
        Queries(query_set(tmp_path / "b.parquet", drawn(1, 6))),
    ]
    for mode in ({"k": 5}, {"k": 5, "fill": True}, {"per_cluster": 20, "num_clusters": 4}):
        rows, _ = retrieve(sets, manifest, tmp_path / "o.parquet", max_images=7, **mode)
        counts = {name: sum(row["source"] == name for row in rows) for name in ("a", "b")}
        assert counts["a"] <= 7 and counts["b"] <= 7 and max(counts.values()) >= 6


def test_clusters_give_where_enough_queries_of_a_set_fall_into_them(tmp_path: Path) -> None:
    centres = np.eye(3, 8)
    rng = np.random.default_rng(8)
    pool = (np.repeat(centres, 20, axis=0) + 0.05 * rng.normal(size=(60, 8))).astype(np.float32)
    seeds = (centres[[0, 0, 0, 0, 1, 1, 1, 2]] + 0.05 * rng.normal(size=(8, 8))).astype(np.float32)
    manifest = write_embeddings(tmp_path / "pool.parquet", pool)
    sets = [Queries(query_set(tmp_path / "q.parquet", seeds))]
    for min_queries, expected in ((1, [5, 5, 5]), (3, [5, 5, 0]), (4, [5, 0, 0])):
        rows, figures = retrieve(
            sets, manifest, tmp_path / "o.parquet", per_cluster=5, num_clusters=3, min_queries=min_queries
        )
        assert [sum(int(str(row["row"])) // 20 == number for row in rows) for number in range(3)] == expected
        assert figures["clusters_hit"] == sum(count > 0 for count in expected)
    rows, _ = retrieve(sets, manifest, tmp_path / "o.parquet", per_cluster=5, num_clusters=3, min_queries=5)
    assert rows == []


@pytest.mark.parametrize("mode", [{"k": 20}, {"per_cluster": 30, "num_clusters": 4}])
def test_a_minimum_similarity_is_inclusive(tmp_path: Path, mode: dict[str, object]) -> None:
    pool, sets = drawn(80, 9), [Queries(query_set(tmp_path / "q.parquet", drawn(4, 10)))]
    manifest = write_embeddings(tmp_path / "pool.parquet", pool)
    everything, _ = retrieve(sets, manifest, tmp_path / "o.parquet", **mode)
    left, right = unit(drawn(4, 10)), unit(pool)
    exact = {(q, row): float(np.einsum("d,d->", left[q], right[row])) for q in range(4) for row in range(80)}
    cosines = sorted(exact[int(str(row["query_id"])[1:]), int(str(row["row"]))] for row in everything)
    limit = cosines[len(cosines) // 2] - 1e-12
    rows, _ = retrieve(sets, manifest, tmp_path / "o.parquet", min_similarity=limit, **mode)
    assert len(rows) == len(cosines) - len(cosines) // 2
    exact_pool = write_embeddings(tmp_path / "two.parquet", np.array([[1, 0], [3, 4]], np.float32))
    query = [Queries(query_set(tmp_path / "one.parquet", np.array([[1, 0]], np.float32)))]
    for least, count in ((0.6, 2), (float(np.nextafter(0.6, 1)), 1)):
        assert len(retrieve(query, exact_pool, tmp_path / "o.parquet", k=2, min_similarity=least)[0]) == count


def test_sets_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    manifest = write_embeddings(tmp_path / "pool.parquet", drawn(50, 11))
    sets = []
    for folder in ("birds", "cars"):
        (tmp_path / folder).mkdir()
        sets.append(Queries(query_set(tmp_path / folder / "seeds.parquet", drawn(3, len(folder)))))
    rows, _ = retrieve(sets, manifest, tmp_path / "o.parquet", k=2)
    assert {row["source"] for row in rows} == {"birds/seeds", "cars/seeds"}
    with pytest.raises(ToolkitError, match="given twice"):
        retrieve([sets[0], sets[0]], manifest, tmp_path / "o.parquet", k=2)


def test_a_query_of_two_sets_is_written_once(tmp_path: Path) -> None:
    vectors = drawn(4, 12)
    manifest = write_embeddings(tmp_path / "pool.parquet", drawn(50, 13))
    sets = [query_set(tmp_path / "q.parquet", vectors)]
    again = [f"q{row}" for row in (1, 2)], [f"/q/{row}.png" for row in (1, 2)]
    sets.append(write_embeddings(tmp_path / "more.parquet", vectors[1:3], image_ids=again[0], uris=again[1]))
    rows, _ = retrieve([Queries(path) for path in sets], manifest, tmp_path / "o.parquet", k=2, include_queries=True)
    assert [row["image_id"] for row in rows if row["rank"] == 0] == ["q0", "q1", "q2", "q3"]


def test_numbers_stand_behind_the_last_equals_sign(tmp_path: Path) -> None:
    odd = tmp_path / "k=4.parquet=5"
    odd.touch()
    assert parse_queries(["a.parquet", "x=1/b.parquet=32", str(odd)]) == (
        Queries(Path("a.parquet")),
        Queries(Path("x=1/b.parquet"), 32),
        Queries(odd),
    )
    for text in ("a.parquet=0", "a.parquet=-3", "a.parquet=", "a.parquet=many", "a.parquet=1.5"):
        with pytest.raises(ToolkitError, match="no number of images"):
            parse_queries([text])


def test_impossible_settings_are_errors(tmp_path: Path) -> None:
    manifest = write_embeddings(tmp_path / "pool.parquet", drawn(20, 14))
    for settings, words in (
        ({"max_images": 0}, "--max-images 0"),
        ({"per_cluster": 2, "min_queries": 0}, "--min-queries 0"),
        ({"min_queries": 4}, "--min-queries 4 belongs to --per-cluster"),
        ({"fill": True, "per_cluster": 2}, "--fill belongs to --k"),
        ({"min_similarity": 1.5}, "--min-similarity 1.5 is no cosine"),
        ({"recall": 0.0}, "--recall 0.0"),
        ({"memory": "some"}, "--memory some"),
    ):
        with pytest.raises(ToolkitError, match=words):
            retrieve([Queries(manifest)], manifest, tmp_path / "o.parquet", **settings)
    assert not (tmp_path / "o.parquet").exists()
