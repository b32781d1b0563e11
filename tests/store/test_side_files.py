"""What a step writes beside its output takes the place of nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.union import Part, UnionSettings, union_manifests
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.neighbors import NeighborSettings, draw_neighbors
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.store.artifact import Options, check_not_input, make, write_provenance
from dinov2_toolkit.store.manifest import Provenance, Source, open_manifest

Step = Callable[[Path, Path, Options], object]


def embed(pool: Path, output: Path, options: Options) -> object:
    return embed_images([str(pool)], str(output), EmbedSettings(model="pixels"), options)


def dedup(pool: Path, output: Path, options: Options) -> object:
    return dedup_images(pool, str(output), DedupSettings(threshold=0.9), options)


def cluster(pool: Path, output: Path, options: Options) -> object:
    return cluster_images(pool, str(output), ClusterSettings("2"), options)


STEPS = pytest.mark.parametrize(
    ("step", "kind"), [(embed, "removed"), (dedup, "removed"), (cluster, "clusters")], ids=["embed", "dedup", "cluster"]
)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Return a foreign manifest of four images with vectors."""
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(file)
    path = tmp_path / "pool.parquet"
    vectors = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32).tolist()
    pq.write_table(pa.table({"uri": [str(file) for file in files], "embedding": vectors}), path)
    return path


@STEPS
def test_a_foreign_side_file_asks_for_force(tmp_path: Path, pool: Path, step: Step, kind: str) -> None:
    side = tmp_path / f"v.{kind}.parquet"
    for content in ("mine", pool):  # no manifest, and a foreign one
        side.write_text(content) if isinstance(content, str) else shutil.copy(content, side)
        before = side.read_bytes()
        for options in (Options(), Options(dry_run=True)):
            with pytest.raises(ToolkitError, match=f"v.{kind}.parquet, which goes with .*--force"):
                step(pool, tmp_path / "v.parquet", options)
        assert side.read_bytes() == before
        assert not (tmp_path / "v.parquet").exists()
    step(pool, tmp_path / "v.parquet", Options(force=True))
    made = open_manifest(side).provenance
    assert made is not None
    assert made.kind == kind


def test_a_picture_in_the_place_of_one_of_the_images_is_refused(tmp_path: Path, pool: Path) -> None:
    image = tmp_path / "images" / "1.png"
    (tmp_path / "link.png").symlink_to(image)
    before = image.read_bytes()
    for place in (image, tmp_path / "link.png"):
        with pytest.raises(ToolkitError, match="is what the step reads; choose another -o"):
            draw_neighbors(str(pool), str(place), NeighborSettings(pool), Options(force=True))
        with pytest.raises(ToolkitError, match="is what the step reads; choose another -o"):
            settings = ClusterSettings("2", sheet=place)
            cluster_images(pool, str(tmp_path / "clusters.parquet"), settings, Options(force=True))
        with pytest.raises(ToolkitError, match="is what the step reads; choose another -o"):
            dedup_settings = DedupSettings(threshold=0.9, sheet=place)
            dedup_images(pool, str(tmp_path / "unique.parquet"), dedup_settings, Options(force=True))
    assert image.read_bytes() == before


@STEPS
def test_a_side_file_that_is_an_input_stays(tmp_path: Path, pool: Path, step: Step, kind: str) -> None:
    side = tmp_path / f"z.{kind}.parquet"
    shutil.copy(pool, side)
    before = side.read_bytes()
    for options in (Options(), Options(force=True), Options(dry_run=True), Options(dry_run=True, force=True)):
        with pytest.raises(ToolkitError, match="is an input, and -o .* would overwrite it"):
            step(side, tmp_path / "z.parquet", options)
    assert side.read_bytes() == before
    assert not (tmp_path / "z.parquet").exists()


@STEPS
def test_a_side_file_of_an_earlier_run_is_written_anew(tmp_path: Path, pool: Path, step: Step, kind: str) -> None:
    output = tmp_path / "v.parquet"
    step(pool, output, Options())
    side = tmp_path / f"v.{kind}.parquet"
    before = side.read_bytes()
    step(pool, output, Options())  # up to date
    step(pool, output, Options(force=True))
    output.unlink()
    step(pool, output, Options(dry_run=True))
    step(pool, output, Options())
    assert side.read_bytes() == before


def test_a_side_file_of_another_step_asks_for_force(tmp_path: Path, pool: Path) -> None:
    embed(pool, tmp_path / "v.parquet", Options())
    (tmp_path / "v.parquet").unlink()
    with pytest.raises(ToolkitError, match=r"was made by `curate embed` \(removed\); .*--force"):
        dedup(pool, tmp_path / "v.parquet", Options())
    (tmp_path / "v.removed.parquet").unlink()
    embed(pool, tmp_path / "v.removed.parquet", Options())
    with pytest.raises(ToolkitError, match=r"\(embeddings\); .*--force"):
        embed(pool, tmp_path / "v.parquet", Options())


def test_an_input_may_stand_in_a_folder_or_behind_a_selection(tmp_path: Path, pool: Path) -> None:
    base = tmp_path / "z.removed.parquet"
    embed(pool, base, Options())
    dedup(base, tmp_path / "unique.parquet", Options())
    parts = tmp_path / "parts"
    parts.mkdir()
    shutil.copy(pool, parts / "z.removed.parquet")
    (parts / "_manifest.json").write_text('{"parts": ["z.removed.parquet"]}')
    for given, output in ((tmp_path / "unique.parquet", tmp_path / "z.parquet"), (parts, parts / "z.parquet")):
        with pytest.raises(ToolkitError, match="is an input"):
            dedup(given, output, Options(force=True))


def test_a_folder_at_a_side_file_stays(tmp_path: Path, pool: Path) -> None:
    (tmp_path / "v.removed.parquet").mkdir()
    with pytest.raises(ToolkitError, match="is a folder"):
        dedup(pool, tmp_path / "v.parquet", Options(force=True))


def test_pictures_are_checked_by_a_dry_run(tmp_path: Path, pool: Path) -> None:
    sheet = tmp_path / "s.png"
    sheet.write_text("mine")
    for options in (Options(), Options(dry_run=True)):
        with pytest.raises(ToolkitError, match="exists; choose another --sheet"):
            dedup_images(pool, str(tmp_path / "v.parquet"), DedupSettings(0.9, sheet=sheet), options)
    assert sheet.read_text() == "mine"


def test_a_removed_list_that_another_command_has_overwritten_is_noticed(tmp_path: Path, pool: Path) -> None:
    output, side = tmp_path / "o.parquet", tmp_path / "o.removed.parquet"
    dedup(pool, output, Options())
    union_manifests([Part(pool)], str(side), UnionSettings(), Options(force=True))
    with pytest.raises(ToolkitError, match="o.removed.parquet, which goes with .*was made by `curate union`.*--force"):
        dedup(pool, output, Options())
    dedup(pool, output, Options(force=True))
    made = open_manifest(side).provenance
    assert made is not None and made.command == "curate dedup"


def test_an_output_is_never_an_input(tmp_path: Path, pool: Path) -> None:
    before = pool.read_bytes()
    (tmp_path / "link.parquet").symlink_to(pool)
    for output in (pool, tmp_path / "link.parquet"):
        with pytest.raises(ToolkitError, match="is what the step reads; choose another -o"):
            sql(f"select * from '{pool}' limit 1", str(output), True, False)
    assert pool.read_bytes() == before


def test_nothing_that_a_step_reads_is_overwritten_even_with_force(tmp_path: Path) -> None:
    run, images = tmp_path / "run", tmp_path / "images"
    for folder, name in ((run, "teacher.safetensors"), (images, "a.png")):
        folder.mkdir()
        (folder / name).write_bytes(b"mine")
    (tmp_path / "link").symlink_to(images)
    read = Provenance("export", "export", {}, inputs=(Source("model", str(run), ""), Source("images", str(images), "")))
    for output in (run, run / "teacher.safetensors", images / "a.png", tmp_path / "link" / "a.png"):
        with pytest.raises(ToolkitError, match="is what the step reads; choose another -o"):
            make(str(output), read, Options(force=True), describe=lambda: None, work=lambda: read)
    check_not_input(run / "model.onnx", read)  # new
    write_provenance(run / "model.onnx.provenance.json", read)
    (run / "model.onnx").write_bytes(b"ours")
    check_not_input(run / "model.onnx", read)
