"""The flow from the raw files to what is left: every image is accounted for, whatever has moved since."""

from dataclasses import replace
from pathlib import Path

import pytest

from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.retrieve.retrieve import RetrieveSettings, retrieve_images
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.report.manifest_flow import Change, Stage, ancestors, pool_of, read_flow
from dinov2_toolkit.report.manifest_parts import flow, signed
from dinov2_toolkit.report.manifest_removed import read_removed
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest, removed_path
from dinov2_toolkit.tests.report.curated import MARKUP, curate


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    return curate(tmp_path / "made")


def flow_of(*paths: Path) -> list[Stage]:
    stages = read_flow([open_manifest(path) for path in paths])
    counts = {stage.key: stage.num_images for stage in stages}
    for stage in stages:  # each is what it was made from, and the changes
        before = [count for key in stage.parents if (count := counts[key]) is not None]
        if before and len(before) == len(stage.parents):
            assert stage.num_images == sum(before) + sum(each.num_images for each in stage.changes), stage
    return stages


def summary(stages: list[Stage]) -> list[tuple[str, int | None, dict[str, int]]]:
    return [(each.title, each.num_images, {c.reason: c.num_images for c in each.changes}) for each in stages]


CHOSEN = "not among the nearest of any query"
EXPECTED = [
    ("Raw files", 34, {}),
    (
        "Readable images",
        30,
        {"below --min-contrast 2": -1, "cannot be decoded": -1, "empty file": -1, "not an image of a known format": -1},
    ),
    ("Unique images", 24, {"near-duplicate": -4, "same bytes": -2}),
    ("Balanced sample", 12, {"not drawn for the balanced sample": -12}),
    ("Retrieved images", 8, {CHOSEN: -16}),
    ("Union", 15, {"in an earlier part already": -5}),
]


def test_every_loss_has_its_reason_from_the_raw_files_on(paths: dict[str, Path]) -> None:
    stages = flow_of(paths["curated"])
    assert summary(stages) == EXPECTED
    kinds = {change.reason: change.kind for stage in stages for change in stage.changes}
    assert kinds["below --min-contrast 2"] == "filtered" and kinds["empty file"] == "unreadable"
    assert kinds["same bytes"] == "duplicate" and kinds[CHOSEN] == "unchosen"
    assert [stage.is_given for stage in stages] == [False] * 5 + [True]
    raw, pool, unique, even, near, union = stages
    assert union.parents == (even.key, near.key) and even.parents == near.parents == (unique.key,)
    assert pool_of(stages, union.key) == pool and ancestors(stages, near.key) == [raw, pool, unique, near]


def test_several_manifests_share_the_steps_that_they_have_in_common(paths: dict[str, Path]) -> None:
    stages = flow_of(paths["even"], paths["near"])
    assert summary(stages) == EXPECTED[:5]
    assert [stage.title for stage in stages if stage.is_given] == ["Balanced sample", "Retrieved images"]


def test_a_folder_that_moved_as_a_whole_is_followed(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "made").rename(tmp_path / "moved [1]*")
    stages = flow_of(tmp_path / "moved [1]*" / "curated.parquet")
    assert summary(stages) == EXPECTED
    assert stages[0].missing.startswith("gone: no ") and not any(stage.missing for stage in stages[1:])


def test_what_is_gone_is_said_and_what_is_known_of_it_is_shown(paths: dict[str, Path]) -> None:
    removed_path(paths["unique"]).rename(removed_path(paths["unique"]).with_suffix(".away"))
    assert summary(flow_of(paths["curated"])) == EXPECTED  # by the figures of dedup
    paths["unique"].rename(paths["unique"].with_suffix(".away"))
    stages = flow_of(paths["near"])
    lost = {"lost on a way that is not known any more": -6}
    assert summary(stages) == [*EXPECTED[:2], ("Images", 24, lost), EXPECTED[4]]
    assert stages[2].missing == "gone: no such file" and stages[2].manifest is None
    paths["pool"].rename(paths["pool"].with_suffix(".away"))
    assert summary(flow_of(paths["near"])) == [("Images", 24, {}), EXPECTED[4]]


def test_an_input_that_was_made_again_is_not_taken_for_the_old_one(paths: dict[str, Path]) -> None:
    dedup_images(paths["pool"], str(paths["unique"]), DedupSettings(threshold=1.0), Options(force=True))
    stages = flow_of(paths["near"])
    assert stages[-2].missing == "it was made again since, and is another now" and stages[-2].num_images == 24


def test_what_cannot_be_read_any_more_counts_as_gone(paths: dict[str, Path]) -> None:
    removed_path(paths["unique"]).write_text("no Parquet")
    paths["unique"].write_text("no Parquet")
    stages = flow_of(paths["near"])
    assert stages[-2].num_images == 24 and stages[-2].manifest is None
    assert read_removed(stages, seed=0)[0].stage == stages[1]


def test_conditions_limits_and_queries_are_reasons_too(paths: dict[str, Path], tmp_path: Path) -> None:
    some = str(tmp_path / "some.parquet")
    dedup_images(paths["pool"], some, DedupSettings(threshold=0.9, where="width > 40"), Options(limit=20))
    unique = flow_of(Path(some))[-1]
    assert unique.changes[-1].kind == "unchosen"
    assert unique.changes[-1].reason == "not fulfilling --where width > 40, or beyond --limit 20"
    sql(f"select * from '{paths['unique']}' where width < 48", str(tmp_path / "asked.parquet"), False, False)
    asked = flow_of(tmp_path / "asked.parquet")[-1]
    near = str(tmp_path / "near-only.parquet")
    retrieve_images(paths["seeds"], paths["unique"], near, RetrieveSettings(k=3, min_similarity=0.5), Options())
    least = flow_of(Path(near))[-1].changes
    assert [change.reason for change in least] == [f"{CHOSEN} by 0.5 and more"]
    assert asked.num_images == 0 and asked.changes == (Change("not selected by the query", "unchosen", -24),)


def test_what_is_embedded_again_is_no_second_reading(paths: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again.parquet"
    embed_images([str(paths["unique"])], str(again), EmbedSettings(model="pixels"), Options())
    assert summary(flow_of(again)) == [*EXPECTED[:3], ("Images embedded again", 24, {})]


def test_removed_images_are_shown_by_reason(paths: dict[str, Path]) -> None:
    reasons = read_removed(read_flow([open_manifest(paths["curated"])]), seed=0)
    assert [(each.reason, each.num_images, each.kind) for each in reasons] == [
        ("below --min-contrast 2", 1, "filtered"),
        ("cannot be decoded", 1, "unreadable"),
        ("empty file", 1, "unreadable"),
        ("not an image of a known format", 1, "unreadable"),
        ("near-duplicate", 4, "duplicate"),
        ("same bytes", 2, "duplicate"),
    ]
    assert [len(each.examples) for each in reasons] == [1, 1, 1, 1, 4, 2]
    assert "truncated" in reasons[1].examples[0]["reason"]


def test_the_picture_of_a_flow_says_numbers_and_escapes_names(paths: dict[str, Path]) -> None:
    stages = flow_of(paths["curated"])
    stages[-1] = replace(stages[-1], path=f"/x/{MARKUP}", title=MARKUP)
    drawn = flow(stages)
    assert MARKUP not in drawn and drawn.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert 'style="width:44.12%"' in drawn and "−16" in drawn and "from Balanced sample and Retrieved images" in drawn
    assert signed(-1234) == "−1,234" and signed(5) == "+5"
    many = tuple(Change(f"reason {number}", "unreadable", -1) for number in range(9))
    assert "<b>−9</b> unreadable" in flow([replace(stages[0], changes=many)])
