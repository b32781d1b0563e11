"""Image columns: ours, and what others call them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.image_columns import read_images
from dinov2_toolkit.store.manifest import open_manifest


def read(path: Path, table: pa.Table) -> list[dict[str, object]]:
    pq.write_table(table, path)
    rows: list[dict[str, object]] = read_images(open_manifest(path)).to_pylist()
    return rows


def test_a_path_column_is_enough_and_counts_from_the_manifest(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.parquet", pa.table({"path": ["x/1.png", "/abs/2.png", "https://host/3.png", None]}))
    assert [row["uri"] for row in rows] == [str(tmp_path / "x/1.png"), "/abs/2.png", "https://host/3.png", None]
    assert rows[0] == {"image_id": None, "uri": rows[0]["uri"], "width": None, "height": None, "label": None}


def test_hugging_face_images_become_rows_of_their_file(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": "1.png"}, {"bytes": None, "path": "2.png"}, {"bytes": b"y", "path": None}]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": pa.array([1, None, 0], pa.int64())})
    rows = read(tmp_path / "a b.parquet", table.replace_schema_metadata({"huggingface": json.dumps(features)}))
    place = f"parquet://{str(tmp_path)}/a%20b.parquet"
    assert [row["uri"] for row in rows] == [f"{place}?row=0", str(tmp_path / "2.png"), f"{place}?row=2"]
    assert [row["label"] for row in rows] == ["dog", None, "cat"]


def test_bare_bytes_and_number_labels_are_understood(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.parquet", pa.table({"image": [b"x", b"y"], "label": [3, 4], "weight": [1.0, 2.0]}))
    assert [row["uri"] for row in rows] == [f"parquet://{tmp_path}/a.parquet?row={number}" for number in (0, 1)]
    assert [(row["label"], row["weight"]) for row in rows] == [("3", 1.0), ("4", 2.0)]


def test_an_image_column_of_numbers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="must hold names or encoded images"):
        read(tmp_path / "a.parquet", pa.table({"image": [1, 2]}))


def test_encoded_images_in_a_dictionary_are_an_error(tmp_path: Path) -> None:
    indices = pa.array([0, 0], pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array([b"\xff\xd8\xff"], pa.binary()))
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match=r"the `image` column of .* is dictionary<.*binary.*must hold names or enc"):
        read_images(open_manifest(tmp_path / "a.parquet"))
