"""Why each image went, and why another stays for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dinov2_toolkit.curate.dedup.decisions import REASONS
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.report.manifest_duplicates import (
    BINS,
    Duplicates,
    Rule,
    histogram,
    read_duplicates,
    why_kept,
    why_removed,
)
from dinov2_toolkit.report.manifest_rows import asking
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest, removed_path
from dinov2_toolkit.tests.embedded import write_embeddings
from dinov2_toolkit.tests.report.curated import curate

VERIFIED = Rule(0.3, "for pixel verification", None, 0.018, "components", "largest")
BY_COSINE = Rule(0.9, "given", 0.8, None, "components", "largest")


def turned(degrees: list[float]) -> np.ndarray[Any, Any]:
    """Return unit vectors in a plane."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def deduplicated(pool: Path, **settings: Any) -> Duplicates:
    output = pool.with_name("unique [*].parquet")
    dedup_images(pool, str(output), DedupSettings(verify=False, **settings), Options(force=True))
    found = read_duplicates(open_manifest(output), seed=0)
    assert found is not None
    return found


def test_groups_say_which_limit_decided_and_what_only_a_chain_joins(tmp_path: Path) -> None:
    # A chain of 20 degrees each, of which the last is 40 from the first; a pair of 10 degrees; one alone.
    pool = write_embeddings(
        tmp_path / "pool.parquet",
        turned([0, 20, 40, 120, 130, 260]),
        sizes=[(9, 9), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5)],
    )
    found = deduplicated(pool, threshold=0.9)
    assert found.reasons == {"near-duplicate": 3} and found.differences == []
    chain, pair = found.groups
    assert [Path(str(gone.uri)).stem for gone in chain.removed] == ["1", "2"] and chain.num_removed == 2
    assert chain.removed[0].reasons == ("a near-duplicate", "cosine 0.9397 > 0.9")
    assert chain.removed[1].reasons == ("joined by a chain of near-duplicates only", "cosine 0.7660 ≤ 0.9")
    assert found.num_chained == 1
    assert [gone.doubt for gone in chain.removed] == pytest.approx([0.603, 2.340], abs=1e-3)
    assert chain.why == "the largest, 9 × 9 px; the others at most 5 × 5 px"
    assert pair.why == "5 × 5 px, as the others; the first of these by image id and name"


def test_the_largest_the_most_doubtful_and_some_random_groups_are_shown(tmp_path: Path) -> None:
    # 30 groups far apart: 8 of three images, and pairs of which the later are the less similar.
    rng = np.random.default_rng(0)
    centers = np.eye(30, 40, dtype=np.float32)
    vectors, owner = [], []
    for group in range(30):
        for number in range(3 if group < 8 else 2):
            aside = rng.normal(size=40).astype(np.float32) * (0.0005 if group < 8 else 0.001 * group)
            vectors.append(centers[group] + (aside if number else 0))
            owner.append(group)
    pool = write_embeddings(tmp_path / "pool.parquet", np.stack(vectors))
    found = deduplicated(pool, threshold=0.5)
    kinds = [group.kind for group in found.groups]
    assert kinds == ["largest"] * 5 + ["doubtful"] * 5 + ["random"] * 5
    groups = [owner[int(Path(group.kept).stem)] for group in found.groups]
    assert len(set(groups)) == 15 and set(groups[:5]) <= set(range(8)) and min(groups[5:10]) > 15
    doubts = [max(gone.doubt or 0 for gone in group.removed) for group in found.groups[5:10]]
    assert doubts == sorted(doubts, reverse=True)
    again = read_duplicates(open_manifest(tmp_path / "unique [*].parquet"), seed=0)
    other = read_duplicates(open_manifest(tmp_path / "unique [*].parquet"), seed=1)
    assert again == found and other is not None and other.groups[:10] == found.groups[:10]
    assert other.groups[10:] != found.groups[10:]
    assert sum(row["num"] for row in found.similarities) == 38 and len(found.similarities) <= BINS
    assert all(row["low"] < row["high"] for row in found.similarities)


def test_of_a_large_group_some_are_shown_from_the_surest_to_the_most_doubtful(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", turned(list(np.linspace(0, 20, 50))))
    (group,) = deduplicated(pool, threshold=0.9, keep="first").groups
    assert group.num_removed == 49 and len(group.removed) == 7 and group.why == "the first in the pool (--keep first)"
    shown = [int(Path(str(gone.uri)).stem) for gone in group.removed]
    assert shown[0] == 1 and shown[-1] == 49 and shown == sorted(shown)


def test_pixels_and_bytes_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = curate(tmp_path)
    found = read_duplicates(open_manifest(paths["unique"]), seed=0)
    assert found is not None and found.rule.limit == 0.018 and found.reasons == {"near-duplicate": 4, "same bytes": 2}
    assert sum(row["num"] for row in found.differences) == 4
    reasons = {Path(str(gone.uri)).stem[:4]: gone.reasons for group in found.groups for gone in group.removed}
    assert reasons["near"][0] == "a copy, verified by pixels" and reasons["near"][1].endswith(" ≤ 0.0180")
    assert set(reasons.values()) >= {("the same file, byte by byte",)}
    why = {group.why for group in found.groups}
    assert "the largest, 48 × 48 px; the others at most 40 × 40 px" in why
    assert "48 × 48 px, as 1 of the others; the first of these by image id and name" in why
    removed_path(paths["unique"]).unlink()
    assert read_duplicates(open_manifest(paths["unique"]), seed=0) is None


@pytest.mark.parametrize(
    ("reason", "similarity", "difference", "rule", "words"),
    [
        (
            0,
            0.97,
            0.004,
            VERIFIED,
            ("a copy, verified by pixels", "pixels 0.0040 ≤ 0.0180", "cosine 0.9700"),
        ),
        (0, 0.8, 0.02, VERIFIED, ("joined by a chain of copies only", "pixels 0.0200 > 0.0180", "cosine 0.8000")),
        (0, 0.8, None, VERIFIED, ("a copy of it, or of another image of its group", "cosine 0.8000")),
        (0, 0.91, None, BY_COSINE, ("a near-duplicate", "cosine 0.9100 > 0.9")),
        (1, 1.0, None, BY_COSINE, ("the same file, byte by byte",)),
        (2, 1.0, None, BY_COSINE, ("the same pixels, in another file",)),
        (3, 0.85, None, BY_COSINE, ("resembles an evaluation image", "cosine 0.8500 > 0.8")),
        (
            4,
            0.7,
            None,
            BY_COSINE,
            ("in a group with an image like an evaluation image", "cosine 0.7000 ≤ 0.8"),
        ),
    ],
)
def test_every_reason_in_words(
    reason: int, similarity: float, difference: float | None, rule: Rule, words: tuple[str, ...]
) -> None:
    row = {"reason": REASONS[reason], "similarity": similarity, "difference": difference}
    assert why_removed(row, rule)[: len(words)] == words


def test_of_pixel_differences_the_last_bar_has_all_that_lie_far_beyond_the_limit() -> None:
    values = [0.001, 0.004, 0.016, 0.02, 4.5]
    rows = pa.table({"difference": values}).to_reader()
    with asking(removed=rows) as ask:
        ask.keep("kept", "select * from removed")
        ask.connection.unregister("removed")
        ask.keep("removed", "select * from kept")
        bins = histogram(ask, "difference", "''", 3 * 0.005)
    assert sum(row["num"] for row in bins) == 5 and bins[-1]["num"] == 3
    assert bins[-1]["high"] == pytest.approx(0.015) and bins[0]["low"] == 0.001


def test_the_rule_that_keeps_an_image_is_named_with_its_values(tmp_path: Path) -> None:
    source = pa.array(["web", "ours", "web"])
    pool = write_embeddings(tmp_path / "pool.parquet", turned([0, 1, 2]), more={"source": source})
    (group,) = deduplicated(pool, threshold=0.9, keep="column:source=ours,web").groups
    assert group.why == "source is ours, of the others web (--keep column:source=ours,web)"
    facts = {"image_id": "1", "width": None, "height": None, "value": None}
    assert why_kept(None, [], BY_COSINE, REASONS[0]).startswith("kept earlier")
    assert why_kept(None, [], BY_COSINE, REASONS[3]) == "an evaluation image, given by --against"
    assert why_kept(facts, [None], BY_COSINE, REASONS[0]) == "unknown size; the sizes of the others are not known"


def test_images_that_resemble_evaluation_images_stand_beside_these(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", turned([0, 5, 90]))
    seen = write_embeddings(tmp_path / "eval.parquet", turned([1]), image_ids=["e"], role="eval")
    (group,) = deduplicated(pool, threshold=0.9, against=(seen,)).groups
    assert group.kept.endswith("/eval/0.png") and group.num_removed == 2
    assert group.why == "an evaluation image, given by --against"
