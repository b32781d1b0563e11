"""Near-duplicates against brute force over all pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.dedup import DedupSettings, dedup_images
from dinov2_toolkit.curate.groups import duplicate_groups
from dinov2_toolkit.curate.threshold import FIXED_THRESHOLD, chance_threshold
from dinov2_toolkit.curate.verdict import DUPLICATE, GROUPED, RESEMBLES
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.neighbors import first_identical, similarities, tolerance
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import Source, open_manifest, removed_path
from dinov2_toolkit.store.vectors import Float64, Int64, Stored, Vectors
from dinov2_toolkit.tests.embedded import similarity, unit, write_embeddings

Row = dict[str, object]


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
    groups = duplicate_groups(searched, first_identical(searched), threshold, k, priority=np.arange(len(vectors)))
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
    stays: list[tuple[int, int]] = []
    goes: list[tuple[str, str, float]] = []
    for row in range(600):
        members = [other for other in range(600) if labels[other] == labels[row]]
        best = min(members, key=lambda other: (-sizes[other][0] * sizes[other][1], image_ids[other]))
        if best == row:
            stays.append((row, len(members) - 1))
        else:
            goes.append((f"/pool/{row}.png", f"/pool/{best}.png", similarity(exact[row], exact[best])))
    assert [(row["row"], row["duplicates"]) for row in kept] == stays
    assert [row["image_id"] for row in kept] == [image_ids[row] for row, _ in stays]
    assert [(row["uri"], row["duplicate_of"]) for row in removed] == [(uri, of) for uri, of, _ in goes]
    assert [row["similarity"] for row in removed] == pytest.approx([s for _, _, s in goes], abs=1e-7)
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


def test_connected_names_every_group_by_its_smallest_row() -> None:
    chain = np.arange(999)
    left, right = np.append(chain[::-1], 5), np.append(chain[::-1] + 1, 998)
    shuffled = np.random.default_rng(0).permutation(1000)
    assert (connected(np.arange(1_000), left, right) == 0).all()
    joined = connected(np.arange(1_002), shuffled[left] + 1, shuffled[right] + 1)
    assert joined.tolist() == [0, *[1] * 1_000, 1_001]
    assert connected(np.arange(4), np.array([3]), np.array([2])).tolist() == [0, 1, 2, 2]


def test_what_resembles_an_evaluation_image_goes_with_its_group(tmp_path: Path) -> None:
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


def test_the_pool_image_that_is_an_evaluation_image_goes(tmp_path: Path) -> None:
    vectors = planted(9, 50)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    kept, removed = dedup(pool, threshold=0.999, against=(pool,))
    assert kept == [] and len(removed) == 50


def test_keep_chooses_the_image_that_stays(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [1, 0.01], [1, 0.02], [1, 0.03], [0, 1]], np.float32)
    pool = write_embeddings(
        tmp_path / "pool.parquet",
        vectors,
        image_ids=["e", "b", "a", "d", "c"],
        sizes=[(None, None), (2, 3), (3, 2), (1, 1), (9, 9)],
        more={"score": pa.array([0.5, None, float("nan"), 0.7, 0.1]), "name": pa.array(["x", "z", "y", "z", "w"])},
    )
    for keep, stays in (("largest", 2), ("first", 0), ("column:score", 3), ("column:name", 1)):
        kept, removed = dedup(pool, threshold=0.9, keep=keep)
        assert [(row["row"], row["duplicates"]) for row in kept] == [(stays, 3), (4, 0)], keep
        assert {row["duplicate_of"] for row in removed} == {f"/pool/{stays}.png"}


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


def test_without_duplicates_the_learnt_threshold_removes_next_to_nothing() -> None:
    points = np.random.default_rng(11).normal(size=(2_000, 5))
    exact = points / np.linalg.norm(points, axis=1, keepdims=True)
    similarities: Float64 = -np.sort(-(exact @ exact.T), axis=1)[:, 1:33]
    threshold, dimension = chance_threshold(similarities)
    assert (similarities[:, 0] > threshold).sum() <= 2
    assert dimension == pytest.approx(4, abs=0.5)  # directions in five dimensions


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


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", planted(18, 50))
    other = write_embeddings(tmp_path / "other.parquet", planted(18, 50), model="another")
    wide = write_embeddings(tmp_path / "wide.parquet", planted(18, 50, 40), model="a model")
    for settings, words in (
        (DedupSettings(threshold=1.5), "--threshold 1.5"),
        (DedupSettings(threshold=float("nan")), "nan"),
        (DedupSettings(k=0), "--k 0"),
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
