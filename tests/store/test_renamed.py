"""What an earlier version wrote is read under the present names."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.store import renamed
from dinov2_toolkit.store.image_columns import image_batches
from dinov2_toolkit.store.manifest import PROVENANCE_KEY, RESULT_KEY, open_manifest, provenance_from
from dinov2_toolkit.store.tables import rows_where

SIMILARITIES = pa.array([0.5, None, 0.25], pa.float32())
PROVENANCE = {
    "format": 1,
    "kind": "selection",
    "command": "curate dedup",
    "parameters": {"old_parameter": 3, "k": 64},
    "seed": 0,
    "inputs": [],
    "base": None,
    "role": "pool",
    "version": "0.1",
}
RESULT = {"content_id": "ab", "figures": {"old_figure": 7, "groups": 2}}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renamed.COLUMNS, "old_similarity", "new_similarity")
    monkeypatch.setitem(renamed.PARAMETERS, "old_parameter", "new_parameter")
    monkeypatch.setitem(renamed.FIGURES, "old_figure", "new_figure")


def write(path: Path, *, ours: bool = True) -> None:
    """Write a manifest as an earlier version did: in two row groups, under old names."""
    table = pa.table({"uri": ["/a.png", "/b.png", "/c.png"], "old_similarity": SIMILARITIES, "row": [4, 5, 6]})
    metadata = {PROVENANCE_KEY: json.dumps(PROVENANCE), RESULT_KEY: json.dumps(RESULT)} if ours else {}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def test_old_columns_are_read_under_present_names(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    manifest = open_manifest(tmp_path / "a.parquet")
    assert manifest.names() == manifest.schema.names == ["uri", "new_similarity", "row"]
    assert manifest.read(["row", "new_similarity"]).column_names == ["row", "new_similarity"]
    assert manifest.read().column("new_similarity").combine_chunks() == SIMILARITIES
    assert all(batch.schema.names == ["new_similarity"] for batch in manifest.batches(["new_similarity"]))
    (table,) = image_batches(manifest, (), more=["new_similarity"], limit=2)
    assert table.column("new_similarity").to_pylist() == [0.5, None]


def test_old_columns_of_parts_too(tmp_path: Path) -> None:
    for name in ("0.parquet", "1.parquet"):
        write(tmp_path / "parts" / name)
    (tmp_path / "parts" / "_manifest.json").write_text(json.dumps({"parts": ["0.parquet", "1.parquet"]}))
    column = open_manifest(tmp_path / "parts").read(["new_similarity"]).column(0)
    assert column.to_pylist() == 2 * SIMILARITIES.to_pylist()


def test_a_foreign_file_keeps_its_names(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ours=False)
    assert "old_similarity" in open_manifest(tmp_path / "a.parquet").names()


def test_old_parameters_and_figures_are_read_under_present_names(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    provenance = open_manifest(tmp_path / "a.parquet").provenance
    assert provenance is not None
    assert provenance.parameters == {"new_parameter": 3, "k": 64}
    assert provenance.figures == {"new_figure": 7, "groups": 2}


def test_a_present_name_counts_where_the_old_one_is_there_too() -> None:
    assert renamed.with_present_names({"new": 1, "old": 2, "k": 3}, {"old": "new"}) == {"new": 1, "k": 3}


def test_old_settings_of_a_run_are_read_under_present_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(renamed.RECIPE_KEYS, "old_key", "new_key")
    monkeypatch.setitem(renamed.RECIPE_VALUES, "new_key", {"old": "new"})
    run = {**PROVENANCE, "kind": "run", "parameters": {"old_key": "old", "steps": 5}}
    assert provenance_from(run, tmp_path).parameters == {"new_key": "new", "steps": 5}


def test_every_table_leads_to_names_that_are_not_old_themselves() -> None:
    for table in (renamed.COLUMNS, renamed.PARAMETERS, renamed.FIGURES, renamed.RECIPE_KEYS):
        assert not set(table) & set(table.values())


@pytest.mark.parametrize("name", ["old_similarity", "new_similarity"])
@pytest.mark.parametrize("stored", ["old_similarity", "new_similarity"])
def test_a_condition_may_use_either_name_of_a_column(tmp_path: Path, stored: str, name: str) -> None:
    write(tmp_path / "a.parquet")
    if stored == "new_similarity":
        table = pq.read_table(tmp_path / "a.parquet")
        pq.write_table(table.rename_columns(["uri", stored, "row"]), tmp_path / "a.parquet")
    found = [
        batch.column(0).to_pylist() for batch in rows_where(open_manifest(tmp_path / "a.parquet"), f"{name} < 0.3")
    ]
    assert found == [[2]]
