"""What SOURCE arguments list: every entry accounted for, in a fixed order."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store import sources as sources_module
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, ManifestWriter, Provenance
from dinov2_toolkit.store.sources import Entry, check_labels, entries, listing_id, open_source, open_sources

Feed = Callable[[bytes], None]


def nothing(path: str) -> bool:
    return False


def listed(argument: Path | str, labels: str = "folder", *, null: bool = False) -> list[Entry]:
    return list(entries(open_source(str(argument), null=null), labels, nothing))


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Return what puts bytes on stdin."""

    def put(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    return put


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_files_come_in_the_order_of_their_paths_as_bytes(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a-b/c.png", "a.png", "ä.png", "a/a/y.png", "Z/q", ".hidden.png", ".cache/x", "a/zz/1"]
    fill(tmp_path, *names)
    (tmp_path / "empty").mkdir()
    expected = sorted(os.fsencode(tmp_path / name) for name in names)
    assert [os.fsencode(entry.uri) for entry in listed(tmp_path)] == expected


def test_large_folders_and_long_lists_keep_their_order(
    tmp_path: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "SLICE_ROWS", 3)
    names = [f"{number % 7}/{number}é" for number in range(50)]
    fill(tmp_path, *names)
    expected = sorted(os.fsencode(tmp_path / name) for name in names)
    assert [os.fsencode(entry.uri) for entry in listed(tmp_path)] == expected
    feed(b"".join(b"/%0100d.png\n" % number for number in range(12_000)))  # more than is read at a time
    stdin = open_source("-")
    for _ in range(2):  # it can be read again
        uris = [entry.uri for entry in entries(stdin, "none", nothing)]
        assert uris == [f"/{number:0100}.png" for number in range(12_000)]


def test_a_file_is_listed_with_its_size_and_time_stamp(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    os.utime(tmp_path / "a.png", ns=(5, 7))
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nothing")
    assert [(entry.size, entry.mtime_ns) for entry in listed(tmp_path)] == [(1, 7), (1, 7), (None, None)]


def test_the_first_folder_below_the_source_is_the_label(tmp_path: Path) -> None:
    fill(tmp_path, "top.png", "cat/a.png", "cat/tabby/b.png", "dog/c.png")
    labels = {Path(entry.uri).name: entry.label for entry in listed(tmp_path)}
    assert labels == {"top.png": None, "a.png": "cat", "b.png": "cat", "c.png": "dog"}
    assert {entry.label for entry in listed(str(tmp_path) + "/")} == {None, "cat", "dog"}
    assert {entry.label for entry in listed(tmp_path, "none")} == {None}
    assert [entry.label for entry in listed(tmp_path / "cat" / "a.png")] == [None]


def test_every_entry_that_is_no_folder_is_accounted_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(source, "a.png", "notes.txt", ".hidden", "sub/b", "table.parquet")
    fill(tmp_path, "elsewhere/c.png")
    (source / "link.png").symlink_to(source / "a.png")
    (source / "broken.png").symlink_to(source / "nothing")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    os.mkfifo(source / "fifo")
    reasons = {Path(entry.uri).name: entry.reason for entry in listed(source)}
    assert reasons == {
        "a.png": None,
        "notes.txt": None,  # whether it is an image shows only when it is read
        ".hidden": None,
        "b": None,
        "link.png": None,
        "broken.png": None,
        "fifo": None,
        "table.parquet": "a Parquet file; name it as a source of its own",
        "linked": "a link to a folder, not followed",
        "loop": "a link to a folder, not followed",
    }


def test_a_link_given_as_source_is_followed(tmp_path: Path) -> None:
    fill(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [entry.uri for entry in listed(tmp_path / "link")] == [str(tmp_path / "link" / "a.png")]


def test_a_name_that_is_not_utf8_becomes_a_percent_encoded_uri(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff 1.png", "wb"):
        pass
    (entry,) = listed(tmp_path)
    assert entry.uri == f"file://{tmp_path}/caf%E9/%FF%201.png"
    assert entry.label == "caf\\xe9"


def test_names_come_from_stdin(tmp_path: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "a.png", "sub/b c.png")
    feed(f"a.png\nsub/b c.png\r\n\n{tmp_path}/a.png\nparquet:///x.parquet?row=3\nhttps://example.org/a\n".encode())
    entries_read = listed("-")
    uris = [str(tmp_path / "a.png"), str(tmp_path / "sub/b c.png"), str(tmp_path / "a.png")]
    assert [entry.uri for entry in entries_read] == [*uris, "parquet:///x.parquet?row=3", "https://example.org/a"]
    assert {entry.label for entry in entries_read} == {None}


def test_names_on_stdin_may_end_in_nul(tmp_path: Path, feed: Feed) -> None:
    feed(b"/a\nb.png\0/\xff.png\0/c.png")
    assert [entry.uri for entry in listed("-", null=True)] == ["/a\nb.png", "file:///%FF.png", "/c.png"]


def test_names_in_a_list_count_from_its_folder_then_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "lists/beside.png", "here/near.png")
    (tmp_path / "lists" / "all.txt").write_text("beside.png\nnear.png\n/absolute.png\n")
    monkeypatch.chdir(tmp_path / "here")
    expected = [tmp_path / "lists" / "beside.png", tmp_path / "here" / "near.png", Path("/absolute.png")]
    assert [entry.uri for entry in listed("../lists/all.txt")] == [str(path) for path in expected]


def test_image_files_that_follow_one_another_are_one_source(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/2.png", "b/3.png", "c/4.png")
    arguments = [str(tmp_path / name) for name in ("a/1.png", "b/2.png", "b", "c/4.png")]
    opened = open_sources(arguments)
    assert [source.path for source in opened] == [str(tmp_path), str(tmp_path / "b"), arguments[3]]
    uris = [entry.uri for source in opened for entry in entries(source, "folder", nothing)]
    assert uris == [*arguments[:2], str(tmp_path / "b" / "2.png"), str(tmp_path / "b" / "3.png"), arguments[3]]


def test_rows_of_a_foreign_manifest_carry_their_columns_over(tmp_path: Path) -> None:
    columns = {
        "path": ["a.png", "/b.png", None],
        "label": [1, 0, -1],
        "breed": ["tabby", None, "x"],
        "source": ["s", "s", "t"],
        "weight": [1.0, 2.5, 1.0],
    }
    info = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    assert listed(path) == [
        Entry(str(tmp_path / "a.png"), "cat", None, "s", 1.0),
        Entry("/b.png", "dog", None, "s", 2.5),
        Entry(f"{path} row 2", None, "the row names no image", "t", 1.0),
    ]
    assert [entry.label for entry in listed(path, "column:breed")] == ["tabby", None, "x"]
    assert [entry.label for entry in listed(path, "none")] == [None, None, None]


def test_encoded_images_in_parquet_are_named_by_their_row(tmp_path: Path) -> None:
    structs = [{"bytes": b"1", "path": None}, {"bytes": None, "path": "a.png"}, {"bytes": b"3", "path": "b.png"}]
    path = tmp_path / "hf.parquet"
    pq.write_table(
        pa.table({"image": pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", "string")]))}), path
    )
    uris = [f"parquet://{path}?row=0", str(tmp_path / "a.png"), f"parquet://{path}?row=2"]
    assert [entry.uri for entry in listed(path)] == uris


def test_a_manifest_of_ours_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "ours.parquet"
    with ManifestWriter(path, list(IMAGE_FIELDS), Provenance("selection", "curate dedup", {})) as writer:
        row = {"image_id": ["1"], "uri": ["/a.png"], "width": [1], "height": [1], "label": ["cat"]}
        writer.write(pa.table(row))
    assert listed(path) == [Entry("/a.png", "cat")]
    assert listing_id(open_source(str(path)), nothing) == writer.provenance.content_id


def test_the_content_id_of_a_folder_is_its_listing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(source, "a.png", "sub/b.png")

    def content_id() -> str:
        return listing_id(open_source(str(source)), nothing)

    first = content_id()
    assert content_id() == first
    os.utime(source / "a.png", (1, 1))
    touched = content_id()
    fill(source, "c.png")
    added = content_id()
    (source / "c.png").write_bytes(b"longer")
    os.utime(source / "c.png", (1, 1))
    assert len({first, touched, added, content_id()}) == 4


def test_paths_to_skip_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "own.parquet", "cache/b.png")
    own = {str(tmp_path / "own.parquet"), str(tmp_path / "cache")}
    source = open_source(str(tmp_path))
    assert [entry.uri for entry in entries(source, "folder", own.__contains__)] == [str(tmp_path / "a.png")]
    before = listing_id(source, own.__contains__)
    (tmp_path / "own.parquet").write_text("other")
    assert listing_id(source, own.__contains__) == before != listing_id(source, nothing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_accounted_for(tmp_path: Path) -> None:
    fill(tmp_path, "locked/a.png")
    (tmp_path / "locked").chmod(0)
    reasons = [entry.reason for entry in listed(tmp_path)]
    (tmp_path / "locked").chmod(0o700)
    assert reasons == ["a folder that cannot be read"]


def test_a_folder_that_vanishes_is_accounted_for(tmp_path: Path) -> None:
    fill(tmp_path, "a/b/c.png", "d.png")
    walk = entries(open_source(str(tmp_path)), "folder", nothing)
    fill(tmp_path, "a/a.png")
    assert next(walk).uri == str(tmp_path / "a" / "a.png")
    shutil.rmtree(tmp_path / "a")
    assert [(entry.uri, entry.reason) for entry in walk] == [
        (str(tmp_path / "a" / "b"), "gone since it was listed"),
        (str(tmp_path / "d.png"), None),
    ]


def test_wrong_arguments_are_errors_of_one_line(tmp_path: Path) -> None:
    fill(tmp_path, "broken.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "paths.parquet")
    for argument, complaint in {
        "none": "no file or folder .*none; check the path",
        "broken.parquet": "not a readable Parquet file",
        "text.parquet": r"names no images \(columns: text\)",
    }.items():
        with pytest.raises(ToolkitError, match=complaint):
            open_source(str(tmp_path / argument))
    folder, paths = open_source(str(tmp_path)), open_source(str(tmp_path / "paths.parquet"))
    check_labels("folder", [folder, paths])
    check_labels("column:path", [paths])
    for labels, sources in {
        "class": [folder],
        "column:": [paths],
        "column:x": [paths],
        "column:path": [folder],
    }.items():
        with pytest.raises(ToolkitError, match="--labels"):
            check_labels(labels, sources)
