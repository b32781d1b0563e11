"""Near-duplicates against brute force over all pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.dedup.decisions import REASONS, SAME_BYTES
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.groups import group_duplicates
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.dedup.threshold import CHANCE, FIXED_THRESHOLD, chance_model
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.search.neighbors import similarities, tolerance
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Source, open_manifest, removed_path
from dinov2_toolkit.store.vectors import Float64, Int64, Stored, Vectors
from dinov2_toolkit.tests.embedded import similarity, unit, write_embeddings

Row = dict[str, object]

DUPLICATE, _, _, RESEMBLES, GROUPED = REASONS


def planted(seed: int = 0, num_rows: int = 600, dim: int = 32) -> Stored:
    """Return vectors of which every fifth is an earlier one with some noise, and thirty are exact copies of row 3."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_rows, dim))
    for row in range(5, num_rows, 5):
        vectors[row] = vectors[rng.integers(row)] + rng.uniform(0.05, 0.5) * rng.normal(size=dim)
    vectors[100:130] = vectors[3]
    return vectors.astype(np.float16)


def brute_force_groups(vectors: Float64, threshold: float) -> list[int]:
    """Join all pairs above the threshold, one by one; a group is named by its smallest row."""
    labels = list(range(len(vectors)))
    for left in range(len(vectors)):
        for right in range(left):
            if similarity(vectors[left], vectors[right]) > threshold and labels[left] != labels[right]:
                low, high = sorted((labels[left], labels[right]))
                labels = [low if label == high else label for label in labels]
    return labels


def in_memory(vectors: Stored) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def groups_of(vectors: Stored, threshold: float, k: int) -> tuple[list[int], int]:
    searched = in_memory(vectors)
    groups = group_duplicates(searched, threshold, k, priority=np.arange(len(vectors)))
    return groups.labels.tolist(), groups.num_saturated


def dedup(manifest: Path, **settings: object) -> tuple[list[Row], list[Row]]:
    """Return the rows that stay and the rows that go."""
    output = manifest.with_name("unique.parquet")
    dedup_images(manifest, str(output), DedupSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    return pq.read_table(output).to_pylist(), pq.read_table(removed_path(output)).to_pylist()


def test_dedup_equals_brute_force(tmp_path: Path) -> None:
    vectors = planted()
    rng = np.random.default_rng(1)
    image_ids = [f"{number:032x}" for number in rng.permutation(600).tolist()]
    sizes = [(int(side), 10) for side in rng.integers(5, 8, 600)]  # many ties
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, image_ids=image_ids, sizes=sizes)
    kept, removed = dedup(pool, threshold=0.9)

    exact = unit(vectors)
    labels = brute_force_groups(exact, 0.9)
    expected_kept: list[tuple[int, int]] = []
    expected_removed: list[tuple[str, str, float]] = []
    for row in range(600):
        members = [other for other in range(600) if labels[other] == labels[row]]
        best = min(members, key=lambda other: (-sizes[other][0] * sizes[other][1], image_ids[other]))
        if best == row:
            expected_kept.append((row, len(members) - 1))
        else:
            expected_removed.append((f"/pool/{row}.png", f"/pool/{best}.png", similarity(exact[row], exact[best])))
    assert [(row["row"], row["duplicates"]) for row in kept] == expected_kept
    assert [row["image_id"] for row in kept] == [image_ids[row] for row, _ in expected_kept]
    assert [(row["uri"], row["duplicate_of"]) for row in removed] == [(uri, of) for uri, of, _ in expected_removed]
    assert [row["similarity"] for row in removed] == pytest.approx([s for _, _, s in expected_removed], abs=1e-7)
    assert {row["reason"] for row in removed} == {DUPLICATE}


@pytest.mark.parametrize("k", [1, 3, 64, 1_000])
def test_groups_do_not_depend_on_k(k: int) -> None:
    vectors = planted(2, 300)
    labels, _ = groups_of(vectors, 0.9, k)
    assert labels == brute_force_groups(unit(vectors), 0.9)


def test_saturated_images_are_those_with_k_neighbours_above_the_threshold() -> None:
    vectors = planted(3, 300)
    exact = unit(vectors)
    above = (exact @ exact.T > 0.9).sum(axis=1) - 1
    for k in (1, 4, 29, 30):
        assert groups_of(vectors, 0.9, k)[1] == (above >= k).sum()


def test_two_crowds_are_joined_by_one_pair_that_no_list_of_neighbours_shows() -> None:
    noise = 0.002 * np.random.default_rng(4).normal(size=(400, 8))

    def at(degrees: float) -> Float64:
        return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), *[0.0] * 6])

    crowds = np.repeat([at(0), at(40)], 200, axis=0) + noise
    vectors = np.concatenate([crowds, [at(10), at(30)], np.eye(8)[2:]]).astype(np.float32)
    threshold = float(np.cos(np.radians(21)))  # only the two at 10 and 30 degrees reach across
    labels, num_saturated = groups_of(vectors, threshold, 8)
    assert labels == [0] * 402 + list(range(402, 408)) and num_saturated == 402
    assert labels == brute_force_groups(unit(vectors), threshold)


def test_pairs_nearer_to_the_threshold_than_float32_can_tell_are_decided_exactly() -> None:
    axes = np.linalg.qr(np.random.default_rng(19).normal(size=(128, 128)))[0]
    left, right = axes[:60], 0.9 * axes[:60] + np.sqrt(1 - 0.81) * axes[60:120]  # 60 pairs at 0.9 but for rounding
    vectors = np.concatenate([left, right]).astype(np.float32)
    searched = in_memory(vectors)
    cosines = similarities(searched, np.arange(60), searched, np.arange(60, 120))
    threshold = float(np.sort(cosines)[30])  # itself not above
    assert cosines.max() - cosines.min() < tolerance(128) and (cosines > threshold).sum() == 29
    expected = [*range(60), *(row if above else row + 60 for row, above in enumerate(cosines > threshold))]
    assert groups_of(vectors, threshold, 4)[0] == expected
    assert groups_of(vectors, threshold, 1)[0] == expected


def test_zero_vectors_duplicate_nothing() -> None:
    vectors = planted(5, 60)
    vectors[[10, 20, 30]] = 0
    labels, _ = groups_of(vectors, 0.5, 4)
    assert [labels[row] for row in (10, 20, 30)] == [10, 20, 30]


def test_nothing_is_above_a_threshold_of_one() -> None:
    assert groups_of(planted(6, 200), 1.0, 4) == (list(range(200)), 0)


def test_images_like_an_evaluation_image_are_removed_with_their_group(tmp_path: Path) -> None:
    vectors = planted(7)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    rng = np.random.default_rng(8)
    first = np.concatenate([vectors[[3, 40]] + 0.1 * rng.normal(size=(2, 32)), rng.normal(size=(20, 32))])
    second = np.concatenate([vectors[[40, 77]] + 0.02 * rng.normal(size=(2, 32)), rng.normal(size=(20, 32))])
    evaluation = [
        write_embeddings(tmp_path / "first.parquet", first.astype(np.float16)),
        write_embeddings(tmp_path / "second.parquet", second.astype(np.float16)),
    ]
    kept, removed = dedup(pool, threshold=0.9, against=tuple(evaluation), against_threshold=0.95)

    exact, others = unit(vectors), unit(np.concatenate([first, second]).astype(np.float16))
    uris = [f"/first/{row}.png" for row in range(22)] + [f"/second/{row}.png" for row in range(22)]
    labels = brute_force_groups(exact, 0.9)
    nearest = [max(range(44), key=lambda e: similarity(image, others[e])) for image in exact]
    largest = [similarity(image, others[e]) for image, e in zip(exact, nearest, strict=True)]
    expected: dict[str, tuple[str, str, float | None]] = {}
    for row in range(600):
        members = [other for other in range(600) if labels[other] == labels[row]]
        leader = max(members, key=lambda other: (largest[other], -other))
        if largest[row] > 0.95:
            expected[f"/pool/{row}.png"] = (RESEMBLES, uris[nearest[row]], largest[row])
        elif largest[leader] > 0.95:
            resembled = nearest[leader]
            expected[f"/pool/{row}.png"] = (GROUPED, uris[resembled], similarity(exact[row], others[resembled]))
        elif row != min(members):
            expected[f"/pool/{row}.png"] = (DUPLICATE, f"/pool/{min(members)}.png", None)
    found = {row["uri"]: (row["reason"], row["duplicate_of"]) for row in removed}
    assert found == {uri: (reason, of) for uri, (reason, of, _) in expected.items()}
    assert {RESEMBLES, GROUPED, DUPLICATE} == {reason for reason, _ in found.values()}
    for gone in removed:
        (_, _, wanted) = expected[str(gone["uri"])]
        assert wanted is None or gone["similarity"] == pytest.approx(wanted, abs=1e-6)
    assert not {row["uri"] for row in kept} & set(found) and len(kept) + len(removed) == 600


def test_evaluation_images_in_the_pool_are_removed(tmp_path: Path) -> None:
    vectors = planted(9, 50)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    kept, removed = dedup(pool, threshold=0.999, against=(pool,))
    assert kept == [] and len(removed) == 50


def test_keep_chooses_the_image_that_is_kept(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [1, 0.01], [1, 0.02], [1, 0.03], [0, 1]], np.float32)
    pool = write_embeddings(
        tmp_path / "pool.parquet",
        vectors,
        image_ids=["e", "b", "a", "d", "c"],
        sizes=[(None, None), (2, 3), (3, 2), (1, 1), (9, 9)],
        more={"score": pa.array([0.5, None, float("nan"), 0.7, 0.1]), "name": pa.array(["x", "z", "y", "z", "w"])},
    )
    for keep, best in (("largest", 2), ("first", 0), ("column:score", 3), ("column:name", 1)):
        kept, removed = dedup(pool, threshold=0.9, keep=keep)
        assert [(row["row"], row["duplicates"]) for row in kept] == [(best, 3), (4, 0)], keep
        assert {row["duplicate_of"] for row in removed} == {f"/pool/{best}.png"}


def test_the_threshold_learnt_from_the_pool_finds_the_planted_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    curved = np.tanh(rng.normal(size=(3_000, 6)) @ rng.normal(size=(6, 48)))  # six dimensions, bent in 48
    copies = curved[:150] + 0.01 * rng.normal(size=(150, 48))
    pool = write_embeddings(tmp_path / "pool.parquet", np.concatenate([curved, copies]).astype(np.float32))
    kept, removed = dedup(pool)
    pairs = {(str(row["uri"]), str(row["duplicate_of"])) for row in removed}
    true = {(f"/pool/{3_000 + row}.png", f"/pool/{row}.png") for row in range(150)}
    assert len(pairs & true) >= 0.98 * len(true)
    assert len(pairs & true) >= 0.9 * len(pairs)
    provenance = open_manifest(tmp_path / "unique.parquet").provenance
    assert provenance is not None and str(provenance.figures["threshold_origin"]).startswith("from the pool")


def figures_of(path: Path) -> dict[str, object]:
    provenance = open_manifest(path).provenance
    assert provenance is not None
    return provenance.figures


def test_star_keeps_no_two_above_the_threshold_and_removes_none_below_it(tmp_path: Path) -> None:
    angles = np.radians(np.concatenate([np.arange(0, 60, 4), [90, 91, 130]]))  # a chain of 15, a pair, and one alone
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    threshold = float(np.cos(np.radians(5)))
    kept, removed = dedup(pool, threshold=threshold, linkage="components")
    assert [(row["row"], row["duplicates"]) for row in kept] == [(0, 14), (15, 1), (17, 0)]
    assert [row["group_id"] for row in kept] == [0, 15, 17]
    assert kept[0]["min_similarity_to_kept"] == pytest.approx(np.cos(np.radians(56)), abs=1e-6)
    assert kept[2]["min_similarity_to_kept"] is None
    assert figures_of(tmp_path / "unique.parquet")["chained_groups"] == 1
    assert {row["group_id"] for row in removed[:14]} == {0} and removed[14]["group_id"] == 15

    kept, removed = dedup(pool, threshold=threshold, linkage="star")
    assert [(row["row"], row["duplicates"]) for row in kept[:8]] == [(row, 1) for row in range(0, 14, 2)] + [(14, 0)]
    assert all(float(str(row["similarity"])) > threshold for row in removed)
    assert figures_of(tmp_path / "unique.parquet")["chained_groups"] == 0


def test_star_equals_going_through_the_images_by_preference(tmp_path: Path) -> None:
    vectors = planted(21, 300)
    exact = unit(vectors)
    sizes = [(int(side), 10) for side in np.random.default_rng(22).permutation(300) + 1]
    kept, removed = dedup(
        write_embeddings(tmp_path / "pool.parquet", vectors, sizes=sizes), threshold=0.9, linkage="star"
    )
    heads: dict[int, int] = {}
    for row in sorted(range(300), key=lambda row: -sizes[row][0]):
        near = [head for head in heads if similarity(exact[row], exact[head]) > 0.9 and heads[head] == head]
        heads[row] = near[0] if near else row
    assert [row["row"] for row in kept] == sorted(row for row, head in heads.items() if row == head)
    assert {row["uri"]: row["duplicate_of"] for row in removed} == {
        f"/pool/{row}.png": f"/pool/{head}.png" for row, head in heads.items() if row != head
    }


def test_same_bytes_are_removed_at_any_threshold_and_the_preferred_copy_is_kept(tmp_path: Path) -> None:
    vectors = np.random.default_rng(23).normal(size=(40, 8)).astype(np.float16)
    vectors[[11, 12]] = vectors[10]
    vectors[21] = vectors[20] * np.float16(2)  # the same image, embedded into numbers a little different
    vectors[[30, 31]] = 0  # a blank image has a zero vector, and copies all the same
    image_ids: list[str | None] = [f"{row:032x}" for row in range(40)]
    image_ids[11] = image_ids[12] = image_ids[10]
    image_ids[21], image_ids[31] = image_ids[20], image_ids[30]
    image_ids[5] = image_ids[6] = "a slide, of which these two are tiles"
    sizes = [(10 + (row == 12), 10) for row in range(40)]
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, image_ids=image_ids, sizes=sizes)
    kept, removed = dedup(pool, threshold=1.0)
    assert [(row["uri"], row["duplicate_of"], row["reason"]) for row in removed] == [
        ("/pool/10.png", "/pool/12.png", REASONS[SAME_BYTES]),
        ("/pool/11.png", "/pool/12.png", REASONS[SAME_BYTES]),
        ("/pool/21.png", "/pool/20.png", REASONS[SAME_BYTES]),
        ("/pool/31.png", "/pool/30.png", REASONS[SAME_BYTES]),
    ]
    assert [row["duplicates"] for row in kept if row["row"] in (12, 20, 30)] == [2, 1, 1]
    assert figures_of(tmp_path / "unique.parquet")["same_bytes"] == 4


def test_keep_follows_the_order_of_a_columns_values_then_the_size(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0) + np.linspace(0, 1e-3, 12, dtype=np.float32)[:, None]
    source = ["web", "curated", "curated", None, "other", "web", None, "web", None, "other", None, "other"]
    sizes = [(9, 9), (1, 1), (2, 2), (9, 9), (9, 9), (1, 1), (9, 9), (2, 2), (9, 9), (1, 1), (9, 9), (2, 2)]
    pool = write_embeddings(tmp_path / "pool.parquet", vectors, sizes=sizes, more={"source": pa.array(source)})
    kept, _ = dedup(pool, threshold=0.9, keep="column:source=curated,web")
    assert [row["row"] for row in kept] == [2, 7, 11]
    kept, _ = dedup(pool, threshold=0.9, keep="column:source=other")
    assert [row["row"] for row in kept] == [0, 4, 11]
    for keep, words in (
        ("column:source=a,,b", "every value"),
        ("column:source=a,a", "once"),
        ("column:no=a", "column"),
    ):
        with pytest.raises(ToolkitError, match=words):
            dedup(pool, threshold=0.9, keep=keep)


def test_new_images_beside_known_ones_give_the_grown_pool(tmp_path: Path) -> None:
    rng = np.random.default_rng(24)
    old = rng.normal(size=(60, 32)).astype(np.float16)
    new = rng.normal(size=(50, 32)).astype(np.float16)
    new[[3, 4]] = old[[7, 8]] + 0.05 * rng.normal(size=(2, 32))
    new[30] = new[20] + 0.02 * rng.normal(size=32)
    old_pool = write_embeddings(tmp_path / "old.parquet", old, image_ids=[f"a{row}" for row in range(60)])
    new_pool = write_embeddings(tmp_path / "new.parquet", new, image_ids=[f"b{row}" for row in range(50)])
    clean = tmp_path / "clean.parquet"
    dedup_images(old_pool, str(clean), DedupSettings(0.95), Options())
    before = clean.read_bytes()
    kept, removed = dedup(new_pool, known=(clean,))
    assert [(row["uri"], row["duplicate_of"]) for row in removed] == [
        ("/new/3.png", "/old/7.png"),
        ("/new/4.png", "/old/8.png"),
        ("/new/30.png", "/new/20.png"),
    ]
    assert {row["reason"] for row in removed} == {DUPLICATE}
    assert clean.read_bytes() == before and len(kept) == 47
    found = figures_of(tmp_path / "unique.parquet")
    assert found["threshold"] == 0.95 and found["threshold_origin"] == f"as for {clean}"
    assert found["known"] == 2 and found["removed_for"] == {str(clean): 2}
    sql(
        f"select uri from '{clean}' union all select uri from '{tmp_path / 'unique.parquet'}'",
        str(tmp_path / "grown.parquet"),
        False,
        False,
    )
    assert open_manifest(tmp_path / "grown.parquet").num_rows == 60 + 47


def test_a_known_image_removes_a_whole_component_but_no_whole_star(tmp_path: Path) -> None:
    def at(*degrees: float) -> Stored:
        return np.array([[np.cos(np.radians(angle)), np.sin(np.radians(angle))] for angle in degrees], np.float32)

    known = write_embeddings(tmp_path / "known.parquet", at(0))
    pool = write_embeddings(tmp_path / "pool.parquet", at(4, 8, 11, 40))  # only the first is like the known one
    threshold = float(np.cos(np.radians(5)))
    kept, removed = dedup(pool, threshold=threshold, known=(known,))
    assert [row["row"] for row in kept] == [3] and {row["duplicate_of"] for row in removed} == {"/known/0.png"}
    kept, removed = dedup(pool, threshold=threshold, known=(known,), linkage="star")
    assert [row["row"] for row in kept] == [1, 3]
    assert [row["duplicate_of"] for row in removed] == ["/known/0.png", "/pool/1.png"]


def test_what_each_evaluation_set_removes_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(25).normal(size=(60, 32)).astype(np.float16)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    sets = [
        write_embeddings(tmp_path / f"{name}.parquet", vectors[rows])
        for name, rows in (("first", [3, 4, 5]), ("second", [20]))
    ]
    dedup(pool, threshold=0.9, against=tuple(sets))
    found = figures_of(tmp_path / "unique.parquet")
    assert found["removed_for"] == {str(sets[0]): 3, str(sets[1]): 1} and found["against"] == 4
    assert "removed for images of other sets" in capsys.readouterr().err


def test_memory_threads_and_k_do_not_change_the_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(26, 400))
    against = write_embeddings(tmp_path / "against.parquet", planted(27, 30))
    made = []
    for number, (memory, num_threads, k) in enumerate((("256M", 1, 64), ("2GB", 2, 64), (None, 3, 500))):
        monkeypatch.setenv("OMP_NUM_THREADS", str(num_threads))
        settings = DedupSettings(0.9, k, against=(against,), against_threshold=0.6, memory=memory, linkage="star")
        path = tmp_path / f"{number}.parquet"
        dedup_images(pool, str(path), settings, Options())
        made.append([pq.read_table(file).to_pylist() for file in (path, removed_path(path))])
    assert made[0] == made[1] == made[2]


def test_one_image_and_one_image_a_thousand_times_are_one_image(tmp_path: Path) -> None:
    one = write_embeddings(tmp_path / "one.parquet", np.ones((1, 4), np.float32))
    assert [row["duplicates"] for row in dedup(one)[0]] == [0]
    crowd = write_embeddings(tmp_path / "crowd.parquet", np.ones((3_000, 4), np.float32))
    kept, removed = dedup(crowd, threshold=0.9, k=5_000)
    assert [row["duplicates"] for row in kept] == [2_999] and len(removed) == 2_999
    kept, removed = dedup(crowd)  # nothing to learn a threshold from
    assert len(kept) == 1 and figures_of(tmp_path / "unique.parquet")["threshold"] == FIXED_THRESHOLD
    same_id = write_embeddings(tmp_path / "same.parquet", np.ones((3_000, 4), np.float32), image_ids=["x"] * 3_000)
    assert len(dedup(same_id)[0]) == 1


def test_an_empty_pool_and_vectors_that_are_not_finite_are_errors(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(28, 50))
    dedup(pool, threshold=0.999, against=(pool,))
    for settings in (DedupSettings(), DedupSettings(exact="bytes")):
        with pytest.raises(ToolkitError, match=r"unique.parquet \(manifest\) has no rows"):
            dedup_images(tmp_path / "unique.parquet", str(tmp_path / "again.parquet"), settings, Options())
    with pytest.raises(ToolkitError, match="has no rows"):
        dedup(pool, threshold=0.9, known=(tmp_path / "unique.parquet",))
    for value in (np.nan, np.inf):
        vectors = planted(28, 50)
        vectors[17, 3] = value
        broken = write_embeddings(tmp_path / f"{value}.parquet", vectors)
        with pytest.raises(ToolkitError, match="row 17 of .* not finite"):
            dedup(broken, threshold=0.9)


def test_a_run_that_dies_leaves_the_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(29, 100))
    dedup(pool, threshold=0.9)
    files = tmp_path / "unique.parquet", removed_path(tmp_path / "unique.parquet")
    before = [file.read_bytes() for file in files]

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov2_toolkit.curate.dedup.decisions._removed", dies)
    with pytest.raises(KeyboardInterrupt):
        dedup(pool, threshold=0.5)
    assert [file.read_bytes() for file in files] == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_without_duplicates_the_learnt_threshold_removes_next_to_nothing() -> None:
    points = np.random.default_rng(11).normal(size=(2_000, 5))
    exact = points / np.linalg.norm(points, axis=1, keepdims=True)
    similarities: Float64 = -np.sort(-(exact @ exact.T), axis=1)[:, 1:33]
    chance = chance_model(similarities)
    assert (similarities[:, 0] > chance.threshold_at(CHANCE)).sum() <= 2
    assert chance.dimension == pytest.approx(4, abs=0.5)  # directions in five dimensions


def test_of_too_few_images_no_threshold_is_learnt(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(12, 20))
    dedup(pool)
    provenance = open_manifest(tmp_path / "unique.parquet").provenance
    assert provenance is not None and provenance.figures["threshold"] == FIXED_THRESHOLD


def test_two_runs_write_the_same_bytes_and_the_selection_names_its_base(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted())
    ids = []
    for name in ("a.parquet", "b.parquet"):
        dedup_images(pool, str(tmp_path / name), DedupSettings(0.9), Options())
        made, removed = open_manifest(tmp_path / name), open_manifest(tmp_path / name.replace(".", ".removed."))
        assert made.provenance is not None and made.provenance.base is not None
        assert made.provenance.base.content_id == open_manifest(pool).content_id
        model = made.provenance.model()
        assert model is not None and model.path == "a model"
        ids.append((made.content_id, removed.content_id))
    assert ids[0] == ids[1]
    assert [artifact.kind for artifact in catalog.artifacts()].count("removed") == 2


def test_a_selection_is_deduplicated_by_other_features(tmp_path: Path) -> None:
    semantic = planted(13, 200)
    looks: Stored = np.random.default_rng(14).normal(size=(200, 8)).astype(np.float16)
    looks[150] = looks[20]
    uris = [f"/images/{row}.png" for row in range(200)]
    pool = write_embeddings(tmp_path / "pool.parquet", semantic, uris=uris)
    order: Int64 = np.random.default_rng(15).permutation(200)
    other = write_embeddings(
        tmp_path / "looks.parquet",
        looks[order],
        image_ids=[f"{row:032x}" for row in order.tolist()],
        uris=[uris[row] for row in order.tolist()],
        model="looks",
    )
    kept, removed = dedup(pool, threshold=0.999, features=other)
    assert [(row["uri"], row["duplicate_of"]) for row in removed] == [(uris[150], uris[20])]
    assert [row["row"] for row in kept] == [row for row in range(200) if row != 150]
    provenance = open_manifest(tmp_path / "unique.parquet").provenance
    assert provenance is not None and provenance.base is not None and provenance.base.path == str(pool)


def test_a_bare_dedup_again_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_embeddings(tmp_path / "pool.parquet", planted(16, 100))
    first = dedup_images(None, "unique.parquet", DedupSettings(), Options())
    stamp = (tmp_path / "unique.parquet").stat().st_mtime_ns
    again = dedup_images(None, "unique.parquet", DedupSettings(), Options())
    assert first == again and (tmp_path / "unique.parquet").stat().st_mtime_ns > stamp


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(17, 100))
    before = sorted(tmp_path.rglob("*"))
    assert dedup_images(pool, str(tmp_path / "unique.parquet"), DedupSettings(), Options(dry_run=True)) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_make_no_sense_are_errors(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(18, 50))
    other = write_embeddings(tmp_path / "other.parquet", planted(18, 50), model="another")
    wide = write_embeddings(tmp_path / "wide.parquet", planted(18, 50, 40), model="a model")
    for settings, words in (
        (DedupSettings(threshold=1.5), "--threshold 1.5"),
        (DedupSettings(threshold=float("nan")), "nan"),
        (DedupSettings(k=0), "--k 0"),
        (DedupSettings(recall=0.0), "--recall 0"),
        (DedupSettings(memory="much"), "--memory much"),
        (DedupSettings(0.9, exact="bytes"), "compares no vectors"),
        (DedupSettings(where="width > 1000"), "keeps none"),
        (DedupSettings(sheet=Path("groups.jpg")), "does not end in .png"),
        (DedupSettings(against_threshold=0.5), "without --against"),
        (DedupSettings(keep="best"), "--keep best"),
        (DedupSettings(keep="column:score"), "no such column"),
        (DedupSettings(keep="column:embedding"), "no largest value"),
        (DedupSettings(against=(other,)), "two models"),
        (DedupSettings(against=(wide,)), "two models"),
        (DedupSettings(against=(tmp_path / "missing.parquet",)), "no manifest"),
    ):
        with pytest.raises(ToolkitError, match=words):
            dedup_images(pool, str(tmp_path / "unique.parquet"), settings, Options())
    with pytest.raises(ToolkitError, match="what the step reads"):
        dedup_images(pool, str(pool), DedupSettings(), Options(force=True))
    assert not (tmp_path / "unique.parquet").exists()
