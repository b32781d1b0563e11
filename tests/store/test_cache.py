"""The cache: ours alone, under names that no manifest can choose."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage import catalog as commands
from dinov2_toolkit.store import cache
from dinov2_toolkit.store.artifact import Options, is_up_to_date
from dinov2_toolkit.store.cache import (
    MARKER,
    cache_folder,
    cache_key,
    cached,
    make_room,
    open_cache,
    remove_empty_cache,
)
from dinov2_toolkit.store.manifest import (
    IMAGE_FIELDS,
    PROVENANCE_KEY,
    RESULT_KEY,
    ManifestWriter,
    Provenance,
    embedding_field,
    open_manifest,
)
from dinov2_toolkit.store.vectors import open_vectors


def make(path: Path, vectors: list[list[float]]) -> Path:
    """Write a manifest of ours."""
    names = [f"/{row}.png" for row in range(len(vectors))]
    columns = [names, names, *(pa.nulls(len(names), field.type) for field in IMAGE_FIELDS[2:]), vectors]
    fields = [*IMAGE_FIELDS, embedding_field(len(vectors[0]), pa.float32())]
    with ManifestWriter(path, fields, Provenance("embeddings", "curate embed", {})) as writer:
        writer.write(pa.table(columns, schema=pa.schema(fields)))
    return path


def forge(path: Path, vectors: list[list[float]], like: Path, content_id: str | None = None) -> Path:
    """Write a manifest that says it is another, or has the content id given."""
    made = pq.read_table(make(path, vectors))
    told = pq.read_metadata(like).metadata
    result = json.loads(told[RESULT_KEY.encode()])
    result["content_id"] = content_id or result["content_id"]
    metadata = {PROVENANCE_KEY: told[PROVENANCE_KEY.encode()], RESULT_KEY: json.dumps(result)}
    pq.write_table(made.replace_schema_metadata(metadata), path)
    return path


def test_the_cache_is_marked_and_beside_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_cache() == tmp_path / ".dinov2" / "cache"
    assert [path.name for path in cache_folder().iterdir()] == [MARKER]
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "catalog.duckdb"))
    assert cache_folder() == tmp_path / ".dinov2" / "cache"
    remove_empty_cache()
    assert not (tmp_path / ".dinov2").exists()


def test_a_folder_named_cache_beside_the_catalog_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "cache"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    np.save(mine / "mine.npy", np.zeros(99))
    Image.new("RGB", (8, 8), "red").save(mine / "red.png")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "catalog.duckdb"))
    monkeypatch.setattr(cache, "CACHE_BYTES", 1)
    embed_images([str(tmp_path)], str(tmp_path / "pool.parquet"), EmbedSettings(model="pixels"), Options())
    assert str(mine / "red.png") in pq.read_table(tmp_path / "pool.parquet").column("uri").to_pylist()
    open_vectors(open_manifest(tmp_path / "pool.parquet"))
    commands.gc()
    assert sorted(path.name for path in mine.iterdir()) == ["mine.npy", "red.png", "thesis.txt"]


@pytest.mark.parametrize("name", ["thesis.txt", "mine.npy", MARKER, f"{0:032}.txt", "embed-mine"])
def test_what_is_not_ours_is_no_cache(tmp_path: Path, name: str) -> None:
    mine = tmp_path / ".dinov2" / "cache" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    pool = make(tmp_path / "pool.parquet", [[1, 2]])
    for use in (commands.gc, open_cache, lambda: make_room(1 << 60), lambda: open_vectors(open_manifest(pool))):
        with pytest.raises(ToolkitError, match="not a cache of ours.*move"):
            use()
    with pytest.raises(ToolkitError, match="not a cache of ours"):
        cluster_images(pool, str(tmp_path / "c.parquet"), ClusterSettings("1"), Options(dry_run=True))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    for options in (Options(), Options(dry_run=True)):
        with pytest.raises(ToolkitError, match="not a cache of ours"):
            embed_images([str(tmp_path)], str(tmp_path / "p.parquet"), EmbedSettings(model="pixels"), options)
    assert [path.name for path in mine.parent.iterdir()] == [name]


def test_what_is_put_into_the_cache_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE_BYTES", 1)
    for name in ("thesis.txt", "mine.npy", f"{0:032}.npy"):
        (open_cache() / name).write_text("mine")
    (cache_folder() / "folder").mkdir()
    make_room(0)
    commands.gc()
    assert sorted(path.name for path in cache_folder().iterdir()) == [MARKER, "folder", "mine.npy", "thesis.txt"]


def test_an_unmarked_cache_of_an_earlier_toolkit_is_taken_over() -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / f"{0:032}.npy").write_text("1")
    open_cache()
    assert (cache_folder() / MARKER).exists()
    commands.gc()
    assert cached() == []


@pytest.mark.parametrize("content_id", ["../../victim/planted", "{}/victim/planted"])
def test_a_content_id_never_becomes_a_path(tmp_path: Path, content_id: str) -> None:
    (tmp_path / "victim").mkdir()
    honest = make(tmp_path / "pool.parquet", [[1, 2], [3, 4]])
    evil = forge(tmp_path / "evil.parquet", [[1, 2], [3, 4]], honest, content_id.format(tmp_path))
    cluster_images(evil, str(tmp_path / "c.parquet"), ClusterSettings("1"), Options())
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    embed_images([str(evil), str(tmp_path / "red.png")], str(tmp_path / "p.parquet"), EmbedSettings(), Options())
    assert list((tmp_path / "victim").iterdir()) == []


def test_a_forged_copy_of_an_id_changes_nothing(tmp_path: Path) -> None:
    honest = make(tmp_path / "pool.parquet", [[1, 2], [3, 4]])
    forged = forge(tmp_path / "forged.parquet", [[9, 9], [8, 8]], honest)
    assert open_manifest(forged).content_id == open_manifest(honest).content_id
    assert open_vectors(open_manifest(forged)).raw(0, 2).tolist() == [[9, 9], [8, 8]]
    assert open_vectors(open_manifest(honest)).raw(0, 2).tolist() == [[1, 2], [3, 4]]
    os.replace(honest, forged)  # where it stood
    assert open_vectors(open_manifest(forged)).raw(0, 2).tolist() == [[1, 2], [3, 4]]


def test_what_is_touched_is_found_again(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool.parquet", [[1, 2], [3, 4]])
    opened = open_manifest(pool)
    open_vectors(opened)
    key = cache_key(opened.source("manifest"))
    assert opened.provenance is not None
    for _ in range(3):
        assert is_up_to_date(pool, opened.provenance, Options())
        assert cache_key(opened.source("manifest")) == key
    assert sorted(path.suffix for path in cached()) == [".npy", ".same"]
    os.utime(pool)  # by another's hand
    assert cache_key(opened.source("manifest")) != key


def test_a_spill_folder_or_a_link_with_foreign_files_makes_no_cache_of_ours(tmp_path: Path) -> None:
    folder = cache_folder()
    (folder / "spill").mkdir(parents=True)
    (folder / "spill" / "mine").write_text("mine")
    with pytest.raises(ToolkitError, match=r"not a cache of ours .*'spill/mine'"):
        commands.gc()
    (folder / "spill" / "mine").rename(folder / "spill" / "duckdb_temp_storage-0.tmp")
    assert cache_folder() == folder

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{0:032x}.npy").write_text("mine")
    folder.rename(tmp_path / "aside")
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(ToolkitError, match="not a cache of ours"):
        commands.gc()
    assert (tmp_path / "mine" / f"{0:032x}.npy").exists()
