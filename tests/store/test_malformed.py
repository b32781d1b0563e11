"""Metadata and texts that are not as they should be: one line that names the file and the value."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.sheet import picture_provenance
from dinov2_toolkit.store.artifact import Options, provenance_at
from dinov2_toolkit.store.image_columns import read_images
from dinov2_toolkit.store.manifest import PROVENANCE_KEY, RESULT_KEY, Provenance, open_manifest, provenance_values
from dinov2_toolkit.store.vectors import open_vectors

WHOLE = provenance_values(
    Provenance("embeddings", "curate embed", {"model": "pixels"}, version="1", content_id="0" * 32)
)
BASE = {"role": "base", "path": "/a.parquet", "content_id": "0"}


def written(path: Path, provenance: str | bytes, result: str | bytes = "{}") -> Path:
    """Write a manifest that says it is ours."""
    table = pa.table({"uri": ["/a.png"]}).replace_schema_metadata({PROVENANCE_KEY: provenance})
    with pq.ParquetWriter(path, table.schema) as file:
        file.write_table(table)
        file.add_key_value_metadata({RESULT_KEY: result})
    return path


def test_a_whole_provenance_is_read(tmp_path: Path) -> None:
    found = open_manifest(written(tmp_path / "a.parquet", json.dumps(WHOLE))).provenance
    assert found is not None and found.parameters == {"model": "pixels"} and found.content_id == "0" * 32
    more = json.dumps({**WHOLE, "comment": "of a later toolkit"})
    assert open_manifest(written(tmp_path / "a.parquet", more)).provenance == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "1"),
        ("format", None),
        ("format", True),
        ("kind", 3),
        ("command", None),
        ("parameters", []),
        ("parameters", "x"),
        ("seed", "3"),
        ("seed", 1.5),
        ("inputs", {}),
        ("inputs", None),
        ("inputs", ["x"]),
        ("inputs", [5]),
        ("inputs", [{"role": "model"}]),
        ("inputs", [{**BASE, "path": 5}]),
        ("base", "x"),
        ("base", []),
        ("base", {**BASE, "content_id": None}),
        ("base", {**BASE, "path": "a\0b"}),
        ("role", 0),
        ("version", 1),
        ("figures", []),
        ("content_id", 7),
        ("content_id", "\0"),
    ],
)
def test_a_wrong_value_of_the_provenance_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = written(tmp_path / "a.parquet", json.dumps({**WHOLE, key: value}))
    with pytest.raises(ToolkitError, match=rf"^{path} has a provenance whose '{key}' is .*; make the file again$"):
        open_manifest(path)
    assert provenance_at(path) is None
    beside = tmp_path / "a.onnx.provenance.json"
    beside.write_text(json.dumps({**WHOLE, key: value}))
    assert provenance_at(tmp_path / "a.onnx") is None


@pytest.mark.parametrize("key", [key for key in WHOLE if key not in ("base", "figures", "content_id")])
def test_a_missing_value_of_the_provenance_is_named(tmp_path: Path, key: str) -> None:
    path = written(tmp_path / "a.parquet", json.dumps({name: value for name, value in WHOLE.items() if name != key}))
    with pytest.raises(ToolkitError, match=rf"^{path} has a provenance whose '{key}' is None; make the file again$"):
        open_manifest(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b'{"a": "\xff"}', b'"' + b"x" * 10_000, b"[" * 5_000]
)
def test_metadata_that_is_no_json_object_is_named(tmp_path: Path, text: bytes) -> None:
    for parts in ((text, "{}"), (json.dumps(WHOLE), text)):
        path = written(tmp_path / "a.parquet", *parts)
        with pytest.raises(
            ToolkitError, match=rf"^{path} has metadata 'dinov2_toolkit.*' that is no JSON object"
        ) as told:
            open_manifest(path)
        assert len(str(told.value)) < 400 and "\n" not in str(told.value)
    beside = tmp_path / "a.onnx.provenance.json"
    beside.write_bytes(text)
    assert provenance_at(tmp_path / "a.onnx") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has metadata 'parts' that is no JSON object"),
        ("[]", "has metadata 'parts' that is no JSON object"),
        ("{}", "has None for its parts; it must be a list of file names"),
        ('{"parts": "a.parquet"}', "has 'a.parquet' for its parts"),
        ('{"parts": [5]}', r"has \[5\] for its parts"),
        ('{"parts": [""]}', r"has \[''\] for its parts"),
        ('{"parts": ["."]}', r"lists '\.', which is no file"),
        ('{"parts": ["../parts"]}', r"lists '\.\./parts', which is no file"),
        ('{"parts": ["a\\u0000b"]}', r"lists 'a\\x00b', which is no file"),
        ('{"parts": []}', "lists no parts"),
        ('{"parts": ["gone.parquet"]}', "no manifest at .*gone.parquet"),
        ('{"parts": ["a.parquet", "other.parquet"]}', r"the parts .*other.parquet \(path\) and .*a.parquet \(uri\)"),
    ],
)
def test_a_listing_of_parts_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.table({"uri": ["/a.png"]}), folder / "a.parquet")
    pq.write_table(pa.table({"path": ["/a.png"]}), folder / "other.parquet")
    (folder / "_manifest.json").write_text(text)
    with pytest.raises(ToolkitError, match=message):
        open_manifest(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"5", b'{"info": 5}', b'{"info": {"features": []}}', b"\xff"])
def test_malformed_metadata_of_hugging_face_is_named(tmp_path: Path, text: bytes) -> None:
    table = pa.table({"uri": ["/a.png"], "label": [0]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match=r"^\S*a.parquet has metadata 'huggingface' that names no features \("):
        read_images(open_manifest(tmp_path / "a.parquet"))


def test_metadata_of_hugging_face_without_class_names_is_fine(tmp_path: Path) -> None:
    known: list[dict[str, Any]] = [{}, {"info": {}}, {"info": {"features": {}}}]
    for values in (*known, {"info": {"features": {"label": {"dtype": "int64"}}}}):
        table = pa.table({"uri": ["/a.png"], "label": [4]}).replace_schema_metadata({"huggingface": json.dumps(values)})
        pq.write_table(table, tmp_path / "a.parquet")
        assert read_images(open_manifest(tmp_path / "a.parquet")).column("label").to_pylist() == ["4"]


def test_two_columns_of_one_name_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table([["/a.png"], [1], [2]], names=["uri", "row", "row"]), tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match=r"^\S*a.parquet has two columns 'row'; rename or drop one$"):
        open_manifest(tmp_path / "a.parquet")


def test_a_file_that_is_damaged_behind_its_footer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"uri": [f"/{number}.png" for number in range(1000)]}), path, compression="none")
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    manifest = open_manifest(path)
    with pytest.raises(ToolkitError, match=r"^\S*a.parquet is damaged \(.*\); make it again, or take a copy that is"):
        manifest.read()


def unchecked(values: list[bytes | None]) -> pa.Array:
    """Return texts that Arrow has not looked at."""
    column = pa.array(values, pa.binary())
    valid, offsets, data = column.buffers()
    return pa.StringArray.from_buffers(len(values), offsets, data, valid)


@pytest.mark.parametrize("name", ["uri", "path", "image_id", "label", "source", "image"])
def test_text_that_is_not_utf_8_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    texts = unchecked([b"/a.png", None, "/é.png".encode(), b"/\xff\xfe.png"])
    columns = {"image": pa.array([b"x"] * 4)} if name not in ("uri", "path", "image") else {}
    if name == "image":
        texts = pa.StructArray.from_arrays([pa.nulls(4, pa.binary()), texts], ["bytes", "path"])
    pq.write_table(pa.table({**columns, name: texts}), tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match=rf"^`{name}` of \S*a.parquet is not UTF-8 in row 3 \(b'/\\xff\\xfe.png'\)"):
        read_images(open_manifest(tmp_path / "a.parquet"))


def test_a_picture_with_a_malformed_provenance_is_none_of_ours(tmp_path: Path) -> None:
    for text in ("{", "[]", "5", "{}", json.dumps({**WHOLE, "seed": "x"})):
        info = PngImagePlugin.PngInfo()
        info.add_text(PROVENANCE_KEY, text)
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
        assert picture_provenance(tmp_path / "a.png") is None
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert picture_provenance(tmp_path / "a.png") is None


def test_one_changed_row_of_a_foreign_base_is_noticed_whatever_its_size(tmp_path: Path) -> None:
    for num_rows in (1_000, 60_000):  # below and above what is read of a file
        vectors = np.random.default_rng(0).normal(size=(num_rows, 32)).astype(np.float32)
        base, output = tmp_path / f"{num_rows}.parquet", tmp_path / f"unique{num_rows}.parquet"
        table = pa.table({"uri": [f"/{row}.png" for row in range(num_rows)], "embedding": list(vectors)})
        pq.write_table(table, base, compression="none", use_dictionary=False)
        dedup_images(base, str(output), DedupSettings(threshold=0.99, verify=False), Options(limit=200))
        first = open_manifest(base)
        data = bytearray(base.read_bytes())
        place = data.index(vectors[num_rows // 2 + 300].tobytes())
        data[place : place + 4] = np.float32(7).tobytes()
        before = base.stat()
        base.write_bytes(data)
        if num_rows == 1_000:  # read whole: even an old time stamp does not hide it
            os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert base.stat().st_size == before.st_size
        changed = open_manifest(base)
        assert changed.content_id != first.content_id
        with pytest.raises(ToolkitError, match="has changed since"):
            open_vectors(open_manifest(output))
        with pytest.raises(ToolkitError, match=r"made differently \(from other inputs\)"):
            dedup_images(base, str(output), DedupSettings(threshold=0.99, verify=False), Options(limit=200))
        assert open_vectors(changed).raw(num_rows // 2 + 300, num_rows // 2 + 301)[0, 0] == 7
