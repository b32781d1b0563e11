"""Sections on manifests, and the whole page in a real browser: nothing from data is more than words."""

from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.report.manifest import manifest_sections
from dinov2_toolkit.report.manifest_clusters import read_clusters, size_curve
from dinov2_toolkit.report.manifest_composition import (
    LABELS,
    REST,
    read_cluster_composition,
    read_composition,
    read_overlaps,
)
from dinov2_toolkit.report.manifest_retrieved import read_retrieved
from dinov2_toolkit.report.report import report
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.tests.browser import NARROW_PX, OpenPage, scrolls_sideways
from dinov2_toolkit.tests.embedded import write_embeddings
from dinov2_toolkit.tests.report.curated import CLOSING, MARKUP, curate


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    return curate(tmp_path)


def test_labels_of_a_selection_are_compared_with_the_pool(tmp_path: Path) -> None:
    labels = ["a"] * 6 + ["b"] * 3 + [None]
    pool = open_manifest(write_embeddings(tmp_path / "pool.parquet", np.eye(10, dtype=np.float32), labels=labels))
    half = open_manifest(write_embeddings(tmp_path / "half.parquet", np.eye(2, dtype=np.float32), labels=["a", "b"]))
    bare = open_manifest(write_embeddings(tmp_path / "bare.parquet", np.eye(3, dtype=np.float32)))
    found = read_composition({"pool": pool, "half": half, "bare": bare})
    assert [(each.name, each.num_images, each.num_labelled, each.num_labels) for each in found.sets] == [
        ("pool", 10, 9, 2),
        ("half", 2, 2, 2),
        ("bare", 3, 0, 0),
    ]
    third = 1 / 3
    expected = -(third * np.log(third) + 2 * third * np.log(2 * third)) / np.log(2)
    assert [each.entropy for each in found.sets] == [pytest.approx(expected), pytest.approx(1.0), None]
    assert [(row["name"], row["label"], row["num"]) for row in found.shares] == [
        ("pool", "a", 6),
        ("half", "a", 1),
        ("pool", "b", 3),
        ("half", "b", 1),
    ]
    assert not read_composition({"bare": bare}).shares


def test_rare_labels_are_one_bar_and_labels_that_a_selection_lacks_are_zero(tmp_path: Path) -> None:
    labels = [f"label {number:02}" for number in range(40) for _ in range(40 - number)]
    pool = write_embeddings(tmp_path / "pool.parquet", np.ones((len(labels), 2), np.float32), labels=labels)
    some = write_embeddings(tmp_path / "some.parquet", np.ones((2, 2), np.float32), labels=["label 00", "label 39"])
    found = read_composition({"pool": open_manifest(pool), "some": open_manifest(some)})
    of_pool, of_some = ([row for row in found.shares if row["name"] == name] for name in ("pool", "some"))
    assert len(of_pool) == len(of_some) == LABELS + 1
    assert of_pool[-1]["label"] == REST and of_pool[-1]["num"] == sum(range(1, 41 - LABELS))
    assert [row["num"] for row in of_some] == [1, *[0] * (LABELS - 1), 1]
    assert sum(row["share"] for row in of_pool) == pytest.approx(1.0)


def test_clusters_of_the_whole_pool_are_compared_with_any_selection_of_it(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    whole = tmp_path / "whole.parquet"
    cluster_images(paths["unique"], str(whole), ClusterSettings("4", resample=1), Options())
    rows = open_manifest(whole).read(["uri", "cluster_0"]).to_pylist()
    near = set(open_manifest(paths["near"]).read(["uri"]).column(0).to_pylist())
    found = read_cluster_composition(
        open_manifest(whole), 0, {"whole": open_manifest(whole), "near": open_manifest(paths["near"])}
    )
    counts = {(row["name"], row["label"]): row["num"] for row in found.shares}
    for cluster in range(4):
        members = [row["uri"] for row in rows if row["cluster_0"] == cluster]
        assert counts["whole", str(cluster)] == len(members)
        assert counts["near", str(cluster)] == len(near.intersection(members))
    sections = manifest_sections(
        {name: open_manifest(path) for name, path in (("w", whole), ("n", paths["near"]))}, seed=0
    )
    assert "Share of each cluster of level 0, whole" in "".join(part for each in sections for part in each.parts)


def test_images_in_common_are_counted_once(paths: dict[str, Path]) -> None:
    opened = {name: open_manifest(paths[name]) for name in ("even", "near", "curated")}
    keys = {
        name: {(row["image_id"], row["uri"]) for row in manifest.read(["image_id", "uri"]).to_pylist()}
        for name, manifest in opened.items()
    }
    expected = {(one, other): len(keys[one] & keys[other]) for one in keys for other in keys}
    assert read_overlaps(opened) == expected and expected["even", "near"] == 5


def test_clusters_have_their_sizes_and_some_of_their_images(paths: dict[str, Path]) -> None:
    found = read_clusters(open_manifest(paths["even"]), seed=0)
    assert found is not None and found.is_sample and [level.num_clusters for level in found.levels] == [6, 2]
    sizes = [row["images"] for row in found.levels[0].largest]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == 24
    rows = open_manifest(paths["even"]).read(["cluster_0", "uri", "distance"]).to_pylist()
    assert sum(len(members) for members in found.members.values()) == len(rows) == 12
    for cluster, members in found.members.items():
        mine = sorted((row["distance"], row["uri"]) for row in rows if row["cluster_0"] == cluster)
        assert [each["uri"] for each in members if each["is_central"]] == [uri for _, uri in mine[:4]]
    paths["even"].with_name("even.clusters.parquet").unlink()
    assert read_clusters(open_manifest(paths["even"]), seed=0) is None


def test_a_curve_of_sizes_falls_and_leaves_out_what_is_empty() -> None:
    sizes = np.array([0, 3, 9, 1, 0])
    curve = [(row["rank"], row["images"]) for row in size_curve(sizes, "pool")]
    assert curve == [(1, 9), (2, 3), (3, 1)] and size_curve(np.zeros(3, np.int64), "pool") == []
    long = size_curve(np.arange(100_000), "pool")
    assert len(long) <= 120 and long[0]["images"] == 99_999 and long[-1]["rank"] == 99_999


def test_retrieved_images_stand_beside_their_queries(paths: dict[str, Path]) -> None:
    found = read_retrieved(open_manifest(paths["near"]), seed=0)
    rows = open_manifest(paths["near"]).read(["query_id", "rank", "uri"]).to_pylist()
    assert found.num_queries == 3 and found.num_shared == 1 and found.k == 3 and not found.missing
    assert sum(row["num"] * row["queries"] for row in found.brought) == len(rows) == 8
    assert sum(row["num"] for row in found.similarities) == 8
    assert {line.label for line in found.lines} == {"wanted"}
    for line in found.lines:
        (query,) = {row["query_id"] for row in rows if row["uri"] == line.images[0]["uri"]}
        assert [each["uri"] for each in line.images] == [row["uri"] for row in rows if row["query_id"] == query]
    best = [line.images[0]["similarity"] for line in found.least]
    assert best == sorted(best)
    paths["seeds"].unlink()
    found = read_retrieved(open_manifest(paths["near"]), seed=0)
    assert found.missing == [str(paths["seeds"])] and found.num_queries is None
    assert sum(row["num"] * row["queries"] for row in found.brought) == 8


def test_every_section_is_there_and_a_foreign_file_has_those_it_can(paths: dict[str, Path], tmp_path: Path) -> None:
    titles = [section.title for section in manifest_sections({"curated": open_manifest(paths["curated"])}, seed=0)]
    assert titles == [
        "From the raw files to what is left",
        "Duplicates",
        "Clusters",
        "Retrieved images",
        "Composition before and after",
        "Removed images by reason",
    ]
    assert manifest_sections({}, seed=0) == []
    sections = manifest_sections({name: open_manifest(paths[name]) for name in ("even", "near")}, seed=0)
    assert "Selections side by side" in [section.title for section in sections]
    text = "".join(part for section in sections for part in section.parts)
    assert "in common with near" in text and f"share of {Markup.escape(MARKUP)}" in text
    for side in tmp_path.glob("*.removed.parquet"):
        side.unlink()
    for gone in ("even.clusters", "seeds", "pool"):
        (tmp_path / f"{gone}.parquet").unlink()
    text = "".join(
        part for section in manifest_sections({"c": open_manifest(paths["curated"])}, seed=0) for part in section.parts
    )
    assert "6 images went; the list of them is gone" in text
    assert "gone: no such file" in text and "The table of the clusters of" in text


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (NARROW_PX, "dark")])
def test_the_page_runs_nothing_from_data_and_fits_a_phone(
    paths: dict[str, Path], open_page: OpenPage, width: int, scheme: str
) -> None:
    next((paths["pool"].parent / "raw" / MARKUP).glob("near-*")).unlink()  # moved since
    report([str(paths["curated"]), str(paths["near"])], "page.html", Options())
    page = open_page(Path("page.html"), width, scheme)
    assert page.locator("img:not([src^='data:'])").count() == 0 and not scrolls_sideways(page)
    assert page.locator("figure.chart svg").count() == page.locator("figure.chart").count() > 5
    text = page.locator("main").inner_text()
    assert MARKUP in text and CLOSING in text and "no such file" in text
    assert page.locator(".groups .stays").count() == 4
    assert page.locator(".flow > li").count() == 6 and page.locator(".flow > li.given").count() == 2
    assert all(page.locator("img").nth(place).get_attribute("alt") for place in range(5))
