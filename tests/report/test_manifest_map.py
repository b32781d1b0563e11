"""The map of the images that a report is about is found, and coloured by what was selected."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dinov2_toolkit.features.page.document import Section
from dinov2_toolkit.report.manifest import manifest_sections
from dinov2_toolkit.report.manifest_flow import read_flow
from dinov2_toolkit.report.manifest_map import SELECTED, find_map, map_assets, map_section
from dinov2_toolkit.report.report import report
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import PROJECTION_FIELDS, ManifestWriter, Provenance, open_manifest
from dinov2_toolkit.tests.browser import NARROW_PX, OpenPage, scrolls_sideways
from dinov2_toolkit.tests.report.curated import curate


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return the manifests of a small pool, and a map of what is unique in it."""
    monkeypatch.chdir(tmp_path)
    paths = {**curate(tmp_path), "map": tmp_path / "map [1].parquet"}
    unique = open_manifest(paths["unique"])
    names = ["image_id", "uri", "label", "row"]
    fields = [*(unique.schema.field(name) for name in names), *PROJECTION_FIELDS]
    places = {field.name: np.arange(unique.num_rows) + axis for axis, field in enumerate(PROJECTION_FIELDS)}
    made = Provenance("selection", "curate map", {}, inputs=(unique.source("manifest"),))
    with ManifestWriter(paths["map"], fields, made) as writer:
        writer.write(pa.table({**dict(zip(names, unique.read(names).columns, strict=True)), **places}))
    catalog.record(paths["map"], writer.provenance, None)
    return paths


def drawn(section: Section) -> dict[str, Any]:
    """Return what the script of a map is given."""
    (packed,) = re.findall(r'class="map-data">([^<]*)<', "".join(section.parts))
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return data


def test_points_tell_which_selections_have_them(paths: dict[str, Path]) -> None:
    selections = {name: open_manifest(paths[name]) for name in ("even", "near", "unique")}
    data = drawn(map_section(open_manifest(paths["map"]), selections, seed=0))
    (column,) = (each for each in data["columns"] if each["name"] == SELECTED)
    rows = {name: set(selections[name].read(["uri"]).column(0).to_pylist()) for name in ("even", "near")}
    both, even, near = rows["even"] & rows["near"], rows["even"] - rows["near"], rows["near"] - rows["even"]
    counts = {"even and near": len(both), "even": len(even), "near": len(near)}
    counts["none"] = 24 - sum(counts.values())
    codes = np.frombuffer(base64.b64decode(column["values"]["bytes"]), np.int32)
    found = dict(zip(column["names"], np.bincount(codes).tolist(), strict=True))
    assert data["total"] == 24 and found == {name: count for name, count in counts.items() if count}


def test_a_map_is_found_where_it_was_made_of_the_same_images(paths: dict[str, Path]) -> None:
    stages = read_flow([open_manifest(paths["curated"])])
    found = find_map(stages)
    assert found is not None and found.path == paths["map"]
    assert find_map(read_flow([open_manifest(paths["seeds"])])) is None
    assert find_map(read_flow([open_manifest(paths["map"])])) == open_manifest(paths["map"])
    sections = manifest_sections({"curated": open_manifest(paths["curated"])}, seed=0)
    assert "Map" in [section.title for section in sections]
    assert map_assets(sections)[0] and map_assets(sections[:1]) == ([], [])
    paths["map"].write_text("made again")
    assert find_map(stages) is None


@pytest.mark.browser
def test_the_map_of_a_report_is_drawn(paths: dict[str, Path], open_page: OpenPage) -> None:
    report([str(paths["curated"])], "page.html", Options())
    page = open_page(Path("page.html"), NARROW_PX)
    page.wait_for_function("!document.querySelector('.map-said').textContent.includes('Reading')")
    assert "24" in page.locator(".map-said").inner_text() and not scrolls_sideways(page)
    assert SELECTED in page.locator(".map-colour option").all_inner_texts()
