"""`dinov2 curate embed`: images in, one row an image out, and a list of the rest."""

import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2_toolkit import cli
from dinov2_toolkit.curate.embed import assemble, listing, settings
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.embed.filters import Filters
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.extract import extract
from dinov2_toolkit.features.extract.extract import FeatureModel, pixels_model
from dinov2_toolkit.models.preprocess import Preprocess, crop_picture, normalise
from dinov2_toolkit.models.vit import Features
from dinov2_toolkit.store import catalog, manifest
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.images import decode, image_id
from dinov2_toolkit.store.limits import Limits
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.store.sources import Entry, entries
from dinov2_toolkit.store.vectors import open_vectors

PIXELS = EmbedSettings(model="pixels", batch_size=8, num_workers=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty images in two labelled folders and above them, and what else lies about in a folder."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(40):
        path = folder / ("", "cat", "dog/small")[number % 3] / f"{number:02}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(10, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (folder / "cat" / "empty.jpg").touch()
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "link").symlink_to(folder / "dog")
    os.mkfifo(folder / ".fifo")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as odd:
        Image.new("L", (3, 2), 7).save(odd, "PNG")
    return folder


def rows(path: str) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = pq.read_table(path).to_pylist()
    return listed


def test_every_entry_is_a_row_or_a_removed_row_with_its_reason(source: Path) -> None:
    result = embed_images(["images"], "pool.parquet", PIXELS, Options())
    assert result is not None and result.output == "pool.parquet"
    assert result.figures == {"images": 41, "removed": 4, "model": "pixels", "dim": 768}
    kept = rows("pool.parquet")
    expected = sorted(str(path) for path in source.rglob("[0-9]*.*g"))
    assert [row["uri"] for row in kept] == [*expected, f"file://{source}/%FF.png"]
    for row in kept[:-1]:
        path = Path(str(row["uri"]))
        below = path.relative_to(source).parts
        assert row["label"] == (below[0] if len(below) > 1 else None)
        with Image.open(path) as image:
            assert (row["width"], row["height"]) == image.size
        assert row["image_id"] == image_id(path.read_bytes())
    assert (kept[-1]["width"], kept[-1]["height"]) == (3, 2)
    assert [(row["uri"], row["reason"]) for row in rows("pool.removed.parquet")] == [
        (f"{source}/.fifo", "not a regular file"),
        (f"{source}/cat/empty.jpg", "empty file"),
        (f"{source}/cat/notes.txt", "not an image of a known format"),
        (f"{source}/link", "a link to a folder, not followed"),
    ]


def test_the_reasons_that_are_said_add_up(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_images(["images"], "pool.parquet", PIXELS, Options())
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "files removed" in line]
    assert sum(int(part.split()[0]) for part in said.split("; ")[1:]) == 4 and "other reasons" not in said
    monkeypatch.setattr(assemble, "MOST_REASONS", 3)
    embed_images(["images"], "again.parquet", PIXELS, Options())
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "files removed" in line]
    assert said.endswith("; 1 for other reasons (again.removed.parquet)")


def test_the_columns_are_those_of_an_embedding_manifest(source: Path) -> None:
    embed_images(["images"], "pool.parquet", PIXELS, Options())
    schema = pq.read_schema("pool.parquet")
    assert schema.names == ["image_id", "uri", "width", "height", "label", "embedding"]
    kind = schema.field("embedding").type
    assert pa.types.is_fixed_size_list(kind) and (kind.list_size, kind.value_type) == (768, pa.float16())
    assert pq.read_schema("pool.removed.parquet").names == ["uri", "reason", "duplicate_of", "similarity"]
    assert len(open_vectors(open_manifest(Path("pool.parquet")))) == 41


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_equal_a_slow_direct_computation(source: Path, run: Path, dtype: str) -> None:
    settings = EmbedSettings(model=str(run), dtype=dtype, batch_size=8, num_workers=3)
    embed_images(["images"], "pool.parquet", settings, Options())
    model = extract.open_model(str(run))
    for row in rows("pool.parquet")[:-1]:
        picture = decode(Path(str(row["uri"])).read_bytes())
        with torch.no_grad():
            images = normalise(crop_picture(picture, model.preprocess)[None], model.preprocess)
            direct = model.backbone.forward_features(images).cls_token[0].numpy()
        stored = np.array(row["embedding"], dtype=np.float64)
        half_a_step = 2.0**-11 if dtype == "float16" else 0.0
        assert np.all(np.abs(stored - direct) <= half_a_step * np.abs(direct) + 2e-6)


def test_the_number_of_threads_does_not_show_in_the_files(source: Path, run: Path) -> None:
    written = []
    for num_workers in (1, 4):
        settings = EmbedSettings(model=str(run), batch_size=8, num_workers=num_workers)
        embed_images(["images"], "pool.parquet", settings, Options(force=True))
        written.append([Path(name).read_bytes() for name in ("pool.parquet", "pool.removed.parquet")])
    assert written[0] == written[1]


def test_row_groups_do_not_depend_on_the_batch_size(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROW_GROUP_ROWS", 16)
    written = []
    for batch_size in (3, 64):
        settings = EmbedSettings(model="pixels", batch_size=batch_size, num_workers=2)
        embed_images(["images"], "pool.parquet", settings, Options(force=True))
        written.append(Path("pool.parquet").read_bytes())
    groups = pq.read_metadata("pool.parquet")
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [16, 16, 9]
    assert written[0] == written[1]


def test_a_second_run_is_up_to_date_and_only_touches_the_output(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = embed_images(["images"], "pool.parquet", PIXELS, Options())
    written = Path("pool.parquet").read_bytes()
    os.utime("pool.parquet", (1, 1))
    monkeypatch.setattr(settings, "extract", None)  # would fail if called
    capsys.readouterr()
    assert embed_images(["images"], "pool.parquet", PIXELS, Options()) == first
    assert "pool.parquet is up to date" in capsys.readouterr().err
    assert Path("pool.parquet").read_bytes() == written
    assert Path("pool.parquet").stat().st_mtime > 1


def test_an_output_that_was_made_otherwise_is_left_alone(source: Path) -> None:
    embed_images(["images"], "pool.parquet", PIXELS, Options())
    written = Path("pool.parquet").read_bytes()
    for changed in (
        EmbedSettings(model="random:vit_tiny"),
        EmbedSettings(model="pixels", role="queries"),
        EmbedSettings(model="pixels", labels="none"),
        EmbedSettings(model="pixels", dtype="float32"),
    ):
        with pytest.raises(ToolkitError, match="pool.parquet exists and was made differently .*--force"):
            embed_images(["images"], "pool.parquet", changed, Options())
    with pytest.raises(ToolkitError, match="limit None, now 3"):
        embed_images(["images"], "pool.parquet", PIXELS, Options(limit=3))
    Path("other.parquet").write_text("something else")
    with pytest.raises(ToolkitError, match="other.parquet exists and is no manifest of ours"):
        embed_images(["images"], "other.parquet", PIXELS, Options())
    assert Path("pool.parquet").read_bytes() == written
    assert Path("other.parquet").read_text() == "something else"
    embed_images(["images"], "pool.parquet", PIXELS, Options(force=True))
    assert Path("pool.parquet").read_bytes() == written


def test_an_output_inside_its_own_source_is_not_an_image(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    monkeypatch.setenv("DINOV2_CATALOG", ".dinov2/catalog.duckdb")
    first = embed_images(["."], "pool.parquet", PIXELS, Options())
    assert first is not None and (first.figures["images"], first.figures["removed"]) == (41, 4)
    written = Path("pool.parquet").read_bytes()
    assert embed_images(["."], "pool.parquet", PIXELS, Options()) == first
    embed_images(["."], "pool.parquet", PIXELS, Options(force=True))
    assert Path("pool.parquet").read_bytes() == written


def test_nothing_readable_at_all_is_an_error_that_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(ToolkitError, match="no files there"):
        embed_images(["texts"], "pool.parquet", PIXELS, Options())
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(ToolkitError, match=r"none of 1 files is a readable image \(.*a.txt: not an image"):
        embed_images(["texts"], "pool.parquet", PIXELS, Options())
    assert os.listdir(tmp_path) == ["texts"]


def test_a_share_of_failures_may_be_too_large(source: Path) -> None:
    strict = EmbedSettings(model="pixels", batch_size=8, num_workers=2, max_failed=0.08)
    with pytest.raises(ToolkitError, match=r"4 of 45 files .* more than --max-failed 0.08 allows"):
        embed_images(["images"], "pool.parquet", strict, Options())
    assert not Path("pool.parquet").exists()
    assert embed_images(["images"], "pool.parquet", EmbedSettings(model="pixels", max_failed=0.09), Options())
    with pytest.raises(ToolkitError, match="--max-failed 0.08"):  # though it is up to date
        embed_images(["images"], "pool.parquet", strict, Options())


def test_limit_takes_the_first_entries(source: Path) -> None:
    embed_images(["images"], "pool.parquet", PIXELS, Options())
    result = embed_images(["images"], "few.parquet", PIXELS, Options(limit=10))
    assert result is not None and result.figures["images"] == 9  # the first entry is the FIFO
    assert rows("few.parquet") == rows("pool.parquet")[:9]


def test_limit_reads_no_more_of_a_manifest_than_it_says(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [str(source / "00.png"), str(source / "06.png")]
    pq.write_table(pa.table({"uri": uris * 50_000}), "long.parquet")
    taken = []

    def counted(*arguments: Any) -> Iterator[Entry]:
        for entry in entries(*arguments):
            taken.append(entry)
            yield entry

    monkeypatch.setattr(listing, "entries", counted)
    result = embed_images(["long.parquet"], "few.parquet", PIXELS, Options(limit=2))
    assert result is not None and result.figures["images"] == 2
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["pipe.parquet", "names.txt"])
def test_a_pipe_is_no_source(source: Path, name: str) -> None:
    os.mkfifo(name)
    with pytest.raises(ToolkitError, match=f"{name} is a named pipe, not a regular file; name a file"):
        embed_images([name], "pool.parquet", PIXELS, Options())


@pytest.mark.usefixtures("odd_format")
def test_hostile_images_are_removed_rows_and_the_others_are_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of these once ended or hung the run."""
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    good = Image.effect_noise((40, 30), 50)
    good.save(hostile / "good.png")
    os.mkfifo(hostile / "pipe.png")
    (hostile / "token.npy").write_bytes(b"\x93NUMPY\x01\x00\x02\x00(\n")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000)}\n"
    (hostile / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    good.save(hostile / "scans.jpg", progressive=True)
    data = (hostile / "scans.jpg").read_bytes()
    last = data.rindex(b"\xff\xda")
    (hostile / "scans.jpg").write_bytes(data[:last] + data[last:-2] * 1000 + data[-2:])
    (hostile / "crash.odd").write_bytes(b"ODD crash")
    (hostile / "hang.odd").write_bytes(b"ODD hang")
    (hostile / "raise.odd").write_bytes(b"ODD raise")
    pq.write_table(pa.table({"image": pa.array([b"ODD crash", (hostile / "good.png").read_bytes()])}), "rows.parquet")
    settings = replace(PIXELS, limits=Limits(image_timeout=3.0), filters=Filters(min_side=1))
    result = embed_images(["hostile", "rows.parquet", f"{hostile}/pipe.png"], "pool.parquet", settings, Options())
    assert result is not None
    assert [row["uri"] for row in rows("pool.parquet")] == [
        f"{hostile}/good.png",
        f"parquet://{tmp_path}/rows.parquet?row=1",
    ]
    reasons = {os.path.basename(str(row["uri"])): str(row["reason"]) for row in rows("pool.removed.parquet")}
    crashed = "its decoder crashed, or took more memory than there is"
    assert reasons.pop("token.npy").startswith("cannot be decoded: ")
    assert reasons == {
        "crash.odd": crashed,
        "hang.odd": "not decoded within --image-timeout 3 seconds",
        "raise.odd": "cannot be decoded: 'an odd error'",
        "huge.npy": "an array of shape (1000000, 1000000) that is cut off",
        "pipe.png": "not a regular file",
        "rows.parquet?row=0": crashed,
        "scans.jpg": "a JPEG of 1005 scans; at most 100 are decoded",
    }


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed_images(["images"], "pool.parquet", PIXELS, Options(dry_run=True)) is None
    said = capsys.readouterr().err
    assert "would read 45 files (15 of the first 16 are images) with pixels" in said
    assert "45 rows of 768 numbers (0.1 MB) to pool.parquet" in said
    assert sorted(os.listdir(tmp_path)) == ["images"]


def test_several_sources_keep_their_order_and_columns(source: Path, tmp_path: Path) -> None:
    image = (source / "00.png").read_bytes()
    columns = {
        "image": pa.array([{"bytes": image, "path": None}, {"bytes": b"x", "path": None}]),
        "label": ["zero", "one"],
        "weight": [2.0, 1.0],
    }
    pq.write_table(pa.table(columns), "hf.parquet")
    Path("names.txt").write_text(f"images/cat/01.jpg\nimages/none.png\n{source}/00.png\n")
    embed_images(["hf.parquet", "names.txt", "images/03.jpg"], "pool.parquet", PIXELS, Options())
    kept = rows("pool.parquet")
    assert [(row["uri"], row["label"], row["weight"]) for row in kept] == [
        (f"parquet://{tmp_path}/hf.parquet?row=0", "zero", 2.0),
        (f"{source}/cat/01.jpg", None, None),
        (f"{source}/00.png", None, None),
        (f"{source}/03.jpg", None, None),
    ]
    assert kept[0]["embedding"] == kept[2]["embedding"] and kept[0]["image_id"] == kept[2]["image_id"]
    reasons = [(row["uri"], row["reason"]) for row in rows("pool.removed.parquet")]
    assert reasons == [
        (f"parquet://{tmp_path}/hf.parquet?row=1", "not an image of a known format"),
        (f"{tmp_path}/images/none.png", "no such file"),
    ]


class Reciprocal(nn.Module):
    """One over the mean: not finite for a black image."""

    def forward_features(self, images: Tensor) -> Features:
        cls_token = 1 / images.mean(dim=(1, 2, 3), keepdim=True).flatten(1)
        return Features(cls_token, cls_token[:, None], cls_token[:, None])


def test_features_that_are_not_finite_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(4, 1.0, (0.0,), (1.0,))
    model = FeatureModel(pixels_model().source, 1, preprocess, Reciprocal())  # type: ignore[arg-type]
    monkeypatch.setattr(settings, "open_model", lambda name, seed: model)
    for number, grey in enumerate((51, 0, 255)):
        Image.new("L", (4, 4), grey).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(3)]
    embed_images(names, "pool.parquet", PIXELS, Options())
    assert [row["embedding"] for row in rows("pool.parquet")] == [[5.0], [1.0]]
    (removed,) = rows("pool.removed.parquet")
    assert (removed["uri"], removed["reason"]) == (f"{tmp_path}/1.png", "features that are not finite")


def test_an_interrupt_leaves_the_old_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed_images(["images"], "pool.parquet", PIXELS, Options())
    written = Path("pool.parquet").read_bytes()
    calls = []

    def interrupted(*arguments: object) -> Features:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        assert isinstance(pixels := arguments[2], torch.Tensor)
        cls_token = torch.zeros(len(pixels), 768)
        return Features(cls_token, cls_token, cls_token)

    monkeypatch.setattr(extract, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_images(["images"], "pool.parquet", PIXELS, Options(force=True))
    assert Path("pool.parquet").read_bytes() == written
    assert sorted(os.listdir(tmp_path)) == [".dinov2", "images", "pool.parquet", "pool.removed.parquet"]


def test_the_catalog_knows_the_embeddings_their_source_and_their_model(source: Path, run: Path) -> None:
    embed_images(["images"], "q.parquet", EmbedSettings(model=str(run), role="queries"), Options())
    artifact = catalog.find("q")
    assert (artifact.kind, artifact.command, artifact.rows, artifact.role) == (
        "embeddings",
        "curate embed",
        41,
        "queries",
    )
    inputs = {one.role: one.path for one in catalog.inputs_of(artifact)}
    assert inputs == {"images": str(source), "model": str(run)}
    assert artifact.model == extract.open_model(str(run)).source.content_id
    assert dict(catalog.metrics_of(artifact)) == {"images": 41.0, "removed": 4.0}
    assert catalog.find("q.removed").kind == "removed"
    assert [Path(found.path).name for found in catalog.newest_features("queries")] == ["q.parquet"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dinov2", "curate", "embed", *arguments])
    return cli.run()


def test_the_command_prints_its_output_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = b"".join(os.fsencode(path) + b"\0" for path in sorted(source.glob("*.*g")))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    assert command(monkeypatch, "-", "-0", "--model", "pixels", "--role", "eval", "--json", "-q") == 0
    out, err = capsys.readouterr()
    expected = {"output": "eval.parquet", "images": 15, "removed": 0, "model": "pixels", "dim": 768}
    assert (json.loads(out), err) == (expected, "")
    assert command(monkeypatch, "images", "--model", "pixels", "-o", "a.parquet") == 0
    assert capsys.readouterr().out == "a.parquet\n"


def test_wrong_calls_end_with_one_line_and_their_code(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, arguments in [
        (1, ["nowhere"]),
        (1, ["images", "-o", "out.csv"]),
        (1, ["images", "--labels", "colour"]),
        (1, ["images", "--model", "no/run"]),
        (1, ["-", "-"]),
        (2, ["images", "--role", "judges"]),
        (2, ["images", "--batch-size", "0"]),
        (2, []),
    ]:
        assert command(monkeypatch, *arguments) == code, arguments
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert not Path("pool.parquet").exists()
