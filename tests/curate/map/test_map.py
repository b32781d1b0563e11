"""`curate map`: every image once, in order, with what was asked for; and its page in a real browser."""

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.inputs import open_input, read_embedded
from dinov2_toolkit.curate.map import projection
from dinov2_toolkit.curate.map.map import MapSettings, map_images
from dinov2_toolkit.curate.map.page import evenly_over, map_part, map_script, map_style, write_map_page
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.page.document import Section, page_provenance, render
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import ManifestWriter, Provenance, open_manifest
from dinov2_toolkit.store.vectors import Float64
from dinov2_toolkit.tests.browser import NARROW_PX, OpenPage, scrolls_sideways
from dinov2_toolkit.tests.embedded import unit, write_embeddings

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", 'it\'s "q" & {{7*7}}', "<!-- x"]
NUM = 120


def pool_of(folder: Path, num: int = NUM, more: dict[str, pa.Array] | None = None) -> Path:
    """Write a pool of four groups with hostile labels and names, and pictures behind all of them but every tenth."""
    rng = np.random.default_rng(0)
    group = np.arange(num) % 4
    vectors = (rng.standard_normal((4, 16))[group] + 0.2 * rng.standard_normal((num, 16))).astype(np.float32)
    uris = []
    for row in range(num):
        path = folder / f"{row} {HOSTILE[row % 4].replace('/', '_')}.png"
        if row % 10:
            Image.new("RGB", (80, 40), (row, 100, 200 - row)).save(path)
        uris.append(str(path))
    return write_embeddings(
        folder / "pool.parquet", vectors, uris=uris, labels=[HOSTILE[each] for each in group.tolist()], more=more
    )


def mapped(tmp_path: Path, pool: Path | None = None, **settings: object) -> Path:
    path = tmp_path / "map.parquet"
    limit = settings.pop("limit", None)
    options = Options(force=True, limit=limit)  # type: ignore[arg-type]
    map_images(pool or pool_of(tmp_path), str(path), MapSettings(**settings), options)  # type: ignore[arg-type]
    return path


def test_every_row_once_in_order_with_its_coordinates(tmp_path: Path) -> None:
    more = {"score": pa.array(np.arange(NUM) / 2), "words": pa.array([["a"]] * NUM)}
    pool = pool_of(tmp_path, more=more)
    path = mapped(tmp_path, pool)
    table, manifest = pq.read_table(path), open_manifest(path)
    assert table.column("row").to_pylist() == list(range(NUM))
    assert table.column("uri").to_pylist() == pq.read_table(pool).column("uri").to_pylist()
    assert table.column("score").to_pylist() == more["score"].to_pylist()  # lists are left behind
    names = ["image_id", "uri", "width", "height", "label", "row", "score", "projection_x", "projection_y"]
    assert table.column_names == names
    assert {table.schema.field(name).type for name in names[-2:]} == {pa.float32()}
    assert manifest.provenance is not None and manifest.provenance.base is not None
    assert manifest.provenance.kind == "selection" and manifest.provenance.base.path == str(pool)
    assert manifest.provenance.figures == {"images": NUM, "projected": NUM, "components": 16}

    places = np.stack([table.column(name).to_numpy() for name in names[-2:]], axis=1)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    nearest = np.argsort(distances, axis=1)[:, 1:6]
    assert (nearest % 4 == np.arange(NUM)[:, None] % 4).mean() > 0.95


def test_a_map_of_a_selection_and_of_some_rows(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    clusters = tmp_path / "clusters.parquet"
    cluster_images(pool, str(clusters), ClusterSettings("4", resample=1, sample=100), Options())
    path = mapped(tmp_path, clusters, where="cluster_0 <> 1", limit=90)
    rows = [row for row in pq.read_table(clusters).to_pylist()[:90] if row["cluster_0"] != 1]
    assert pq.read_table(path).select(["row", "cluster_0", "distance"]).to_pylist() == [
        {name: row[name] for name in ("row", "cluster_0", "distance")} for row in rows
    ]
    (tmp_path / "again").mkdir()
    again = mapped(tmp_path / "again", path)
    assert pq.read_table(again).column_names == pq.read_table(path).column_names  # a map of a map
    images = read_embedded(open_input("pool", again, tmp_path / "x.parquet"))  # and any step reads it
    np.testing.assert_array_equal(images.vectors.rows, [row["row"] for row in rows])


def test_neighbours_are_the_nearest_rows_of_the_map(tmp_path: Path) -> None:
    path = mapped(tmp_path, neighbors=5, where="width > 0", limit=80)
    found = pq.read_table(path).column("neighbors").to_pylist()
    exact = unit(np.stack(pq.read_table(tmp_path / "pool.parquet").column("embedding").to_pylist()[:80]))
    cosines = exact @ exact.T
    np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines, axis=1)[:, :5]
    assert [row["ids"] for row in found] == expected.tolist()
    got = np.array([row["distances"] for row in found])
    np.testing.assert_allclose(got, 1 - np.take_along_axis(cosines, expected, axis=1), atol=1e-6)


@pytest.mark.usefixtures("odd_format")
def test_an_image_whose_decoder_crashes_has_no_thumbnail(tmp_path: Path) -> None:
    pool_of(tmp_path)
    Path(pq.read_table(tmp_path / "pool.parquet").column("uri")[3].as_py()).write_bytes(b"ODD crash")
    path = tmp_path / "map.parquet"
    map_images(tmp_path / "pool.parquet", str(path), MapSettings(thumbnails=32, html=tmp_path / "map.html"), Options())
    pictures = pq.read_table(path).column("thumbnail").to_pylist()
    assert [row for row, picture in enumerate(pictures) if picture is None] == [0, 3, *range(10, NUM, 10)]


def test_thumbnails_are_small_and_null_where_there_is_no_image(tmp_path: Path) -> None:
    path = mapped(tmp_path, thumbnails=32)
    table, manifest = pq.read_table(path), open_manifest(path)
    pictures = table.column("thumbnail").to_pylist()
    assert [picture is None for picture in pictures] == [row % 10 == 0 for row in range(NUM)]
    with Image.open(io.BytesIO(pictures[1]["bytes"])) as picture:
        assert picture.size == (32, 16) and picture.format == "JPEG"
    assert pictures[1]["path"] == table.column("uri")[1].as_py()
    assert manifest.provenance is not None and manifest.provenance.figures["thumbnails_missing"] == NUM // 10


def test_a_second_run_does_nothing_and_a_dry_one_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, path, html = pool_of(tmp_path), tmp_path / "map.parquet", tmp_path / "map.html"
    settings = MapSettings(html=html)
    assert map_images(pool, str(path), settings, Options(dry_run=True)) is None
    assert "would read 120 vectors" in capsys.readouterr().err and not path.exists() and not html.exists()
    for _ in range(2):
        result = map_images(pool, str(path), settings, Options())
        assert result is not None and result.output == str(path)
    said = capsys.readouterr().err
    assert f"{path} is up to date" in said and f"{html} is up to date" in said
    there = page_provenance(html)
    assert there is not None and there.command == "curate map"
    html.write_text("<!doctype html>theirs")
    with pytest.raises(ToolkitError, match="is no map of ours"):
        map_images(pool, str(path), settings, Options())
    with pytest.raises(ToolkitError, match=r"sample None, now 5"):
        map_images(pool, str(path), MapSettings(sample=5), Options())
    with pytest.raises(ToolkitError, match="--thumbnails 0"):
        map_images(pool, str(path), MapSettings(thumbnails=0), Options())


def test_without_the_library_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "find_spec", lambda name: None)
    with pytest.raises(ToolkitError, match=r"pip install 'dinov2-toolkit\[map\]'"):
        map_images(pool_of(tmp_path), str(tmp_path / "map.parquet"), MapSettings(), Options())


def test_the_first_points_of_any_number_are_spread_evenly() -> None:
    dense, sparse = np.zeros((900, 2)) + np.random.default_rng(0).random((900, 2)) / 100, np.array([[1, 1], [0, 1]])
    order = evenly_over(np.concatenate([dense, sparse]).astype(np.float32))
    assert sorted(order.tolist()) == list(range(902))
    assert {900, 901} <= set(order[:4].tolist())


def test_a_large_map_shows_a_sample_and_says_so(tmp_path: Path) -> None:
    part = map_part(open_manifest(mapped(tmp_path)), num_points=50, num_thumbnails=7)
    assert "It shows 50 of 120 images, drawn at random. A list holds only these;" in part
    assert "Pictures of 7 are stored" in part or "Pictures of 6 are stored" in part


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("embedding-atlas") is None, reason="tried where embedding-atlas is installed")
def test_embedding_atlas_opens_a_map(tmp_path: Path) -> None:
    path = mapped(tmp_path, neighbors=5, thumbnails=32)
    columns = ["--x", "projection_x", "--y", "projection_y", "--neighbors", "neighbors", "--image", "thumbnail"]
    target = tmp_path / "atlas"
    subprocess.run(["embedding-atlas", str(path), *columns, "--export-application", str(target)], check=True)
    shown = json.loads((target / "data" / "metadata.json").read_text())["props"]["data"]
    assert shown["projection"] == {"x": "projection_x", "y": "projection_y"}
    assert (shown["image"], shown["neighbors"]) == ("thumbnail", "neighbors")
    kept = pq.read_table(target / "data" / "dataset.parquet")
    assert kept.column("neighbors").to_pylist() == pq.read_table(path).column("neighbors").to_pylist()
    assert "pagerank" in kept.column_names  # it reads the neighbours as a graph


def test_a_list_of_names_belongs_to_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pool, path = pool_of(tmp_path), str(tmp_path / "map.parquet")
    uris = pq.read_table(pool).column("uri").to_pylist()
    settings = MapSettings(where="uri in (from lines('picked.txt'))")
    Path("picked.txt").write_text(f"{uris[7]}\r\n\n{uris[3]}\nnone.png\n")
    map_images(pool, path, settings, Options())
    assert pq.read_table(path).column("row").to_pylist() == [3, 7]
    Path("picked.txt").write_text(f"{uris[5]}\n")
    with pytest.raises(ToolkitError, match="from other inputs"):
        map_images(pool, path, settings, Options())
    Path("picked.txt").unlink()
    with pytest.raises(ToolkitError, match="no list at picked.txt"):
        map_images(pool, path, settings, Options(force=True))


def test_rows_without_coordinates_and_columns_without_values_are_left_out(tmp_path: Path) -> None:
    path, whole = tmp_path / "some.parquet", pq.read_table(mapped(tmp_path))
    xs = whole.column("projection_x").to_pylist()
    table = whole.set_column(
        whole.column_names.index("projection_x"), "projection_x", pa.array([None, *xs[1:]], pa.float32())
    )
    table = table.append_column("endless", pa.array([float("inf")] * NUM))
    pq.write_table(table.append_column("word", pa.array(["w"] * NUM, pa.large_string())), path)
    data = data_of(map_part(open_manifest(path)))
    assert len(data["uris"]) == NUM - 1 and data["total"] == NUM
    assert [column["name"] for column in data["columns"]] == ["label", "width", "height", "word"]
    pq.write_table(table.slice(0, 1), path)
    assert "No image has coordinates." in map_part(open_manifest(path))
    pq.write_table(table.slice(0, 0), path)
    assert "No image has coordinates." in map_part(open_manifest(path))


def data_of(part: str) -> dict[str, Any]:
    packed = part.partition('class="map-data">')[2].partition("<")[0]
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return data


# In the browser -----------------------------------------------------------------------------------------------------


def opened(tmp_path: Path, open_page: OpenPage, *how: object, pool: Path | None = None, **settings: object) -> "Page":
    mapped(tmp_path, pool, html=tmp_path / "map.html", **settings)
    page = open_page(tmp_path / "map.html", *how)
    page.wait_for_selector(".map[data-ready=yes]")
    return page


def place_of(page: "Page", point: int) -> tuple[float, float]:
    x, y = page.evaluate(f"document.querySelector('.map').place({point})")
    return x, y


def lasso(page: "Page", corners: list[tuple[float, float]]) -> None:
    page.get_by_role("button", name="Lasso").click()
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in [*corners[1:], corners[0]]:
        page.mouse.move(*corner, steps=4)
    page.mouse.up()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pointer_shows_the_image_and_its_columns(tmp_path: Path, open_page: OpenPage, scheme: str) -> None:
    page = opened(tmp_path, open_page, NARROW_PX, scheme)
    assert not scrolls_sideways(page)
    assert page.locator("img[src='x']").count() == 0
    page.mouse.move(*place_of(page, 7))
    tip = page.locator(".map-tip")
    tip.wait_for(state="visible")
    row = next(row for row in range(NUM) if f"/{row} " in tip.inner_text())
    assert HOSTILE[row % 4].replace("/", "_") in tip.inner_text() and HOSTILE[row % 4] in tip.inner_text()
    assert tip.locator("img").count() == (1 if row % 10 else 0)
    page.mouse.move(1, 1)
    assert tip.is_hidden()


@pytest.mark.browser
def test_the_keyboard_goes_from_image_to_image_and_chooses(tmp_path: Path, open_page: OpenPage) -> None:
    page = opened(tmp_path, open_page)
    page.locator("canvas").focus()
    said = page.locator(".map-said")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(said.inner_text())
    assert len(set(seen)) >= 3 and all("label " in words and ".png" in words for words in seen)
    page.keyboard.press("Enter")
    assert page.locator(".map-count").inner_text() == "1 image chosen"
    page.keyboard.press("Escape")
    assert page.locator(".map-picked").is_hidden()


@pytest.mark.browser
def test_search_legend_and_colours(tmp_path: Path, open_page: OpenPage) -> None:
    more = {"cluster_0": pa.array(np.arange(NUM) % 3), "similarity": pa.array(np.linspace(0, 1, NUM))}
    page = opened(tmp_path, open_page, pool=pool_of(tmp_path, more=more))
    assert page.locator(".map-colour option").all_inner_texts()[:2] == ["label", "cluster_0"]
    legend = page.locator(".map-legend button")
    assert legend.locator("span").all_inner_texts() == HOSTILE
    legend.first.click()
    assert page.locator(".map-said").inner_text() == "30 images shown"
    legend.nth(1).click()
    assert page.locator(".map-said").inner_text() == "60 images shown"
    page.locator(".map-colour").select_option(label="similarity")
    assert page.locator(".map-scale").count() == 1
    page.locator(".map-search").fill("ONERROR")
    assert page.locator(".map-count").inner_text() == "30 images chosen"
    assert page.locator(".map-list button").count() == 30
    page.locator(".map-list button").first.click()
    assert "onerror" in page.locator(".map-said").inner_text()


@pytest.mark.browser
def test_a_lassoed_list_gives_exactly_those_rows_to_a_later_step(
    tmp_path: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(tmp_path, open_page)
    box = page.locator("canvas").bounding_box()
    assert box is not None
    places = np.array([place_of(page, point) for point in range(NUM)])
    middle = float(np.median(places[:, 0]))
    inside = np.flatnonzero(places[:, 0] < middle)
    left, top, bottom = box["x"] + 3, box["y"] + 3, box["y"] + box["height"] - 3
    lasso(page, [(left, top), (middle, top), (middle, bottom), (left, bottom)])
    assert page.locator(".map-count").inner_text() == f"{len(inside)} images chosen"

    with page.expect_download() as download:
        page.get_by_role("button", name="Save picked.txt").click()
    download.value.save_as(tmp_path / "picked.txt")
    uris = pq.read_table(tmp_path / "map.parquet").column("uri").take(pa.array(inside)).to_pylist()
    assert (tmp_path / "picked.txt").read_text().splitlines() == uris

    monkeypatch.chdir(tmp_path)
    command = page.locator(".map-use").inner_text()  # as the page says it
    query, output = command.removeprefix('dinov2 catalog sql "').split('" -o ')
    sql(query, output, False, False)
    picked = open_manifest(Path(output))
    assert picked.read(["row"]).column("row").to_pylist() == inside.tolist()
    images = read_embedded(open_input("pool", picked.path, tmp_path / "x.parquet"))  # its vectors are those there
    np.testing.assert_array_equal(images.vectors.rows, inside)
    where = "uri in (from lines('picked.txt'))"
    assert open_input("pool", tmp_path / "pool.parquet", tmp_path / "x.parquet", where=where).num_rows() == len(inside)


@pytest.mark.browser
def test_a_small_choice_is_a_condition_too(tmp_path: Path, open_page: OpenPage) -> None:
    page = opened(tmp_path, open_page, where="width > 0", limit=60)
    page.locator(".map-search").fill("script")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.get_by_role("button", name="Copy condition").click()
    page.wait_for_function("window.copied")
    where = page.evaluate("window.copied")
    kept = open_input("pool", tmp_path / "map.parquet", tmp_path / "x.parquet", where=where)
    assert kept.rows().tolist() == [row for row in range(60) if row % 4 == 1]


@pytest.mark.browser
def test_the_condition_of_a_lasso_is_true_of_images_that_are_not_drawn(tmp_path: Path, open_page: OpenPage) -> None:
    path = mapped(tmp_path)
    part = map_part(open_manifest(path), num_points=60)
    page_of = render("Map", [Section("Map", [part])], scripts=[map_script()], styles=[map_style()])
    (tmp_path / "map.html").write_text(page_of)
    page = open_page(tmp_path / "map.html")
    page.wait_for_selector(".map[data-ready=yes]")
    box = page.locator("canvas").bounding_box()
    assert box is not None
    (x0, y0), (x1, _) = place_of(page, 0), place_of(page, 1)
    table = pq.read_table(path)
    xs, ys = (table.column(f"projection_{axis}").to_numpy().astype(float) for axis in "xy")
    shown = np.sort(np.random.default_rng([0, 4]).choice(NUM, 60, replace=False))
    scale = (x1 - x0) / (xs[shown[1]] - xs[shown[0]])
    across, down = x0 + (xs - xs[shown[0]]) * scale, y0 - (ys - ys[shown[0]]) * scale
    corners = [(float(np.median(across)), box["y"] + 4), (box["x"] + 4, box["y"] + 90), (box["x"] + 90, box["y"] + 440)]
    lasso(page, corners)
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.get_by_role("button", name="Copy condition").click()
    page.wait_for_function("window.copied")
    kept = open_input("pool", path, tmp_path / "x.parquet", where=page.evaluate("window.copied")).rows()

    def side(one: tuple[float, float], other: tuple[float, float]) -> Float64:
        sign: Float64 = (other[0] - one[0]) * (down - one[1]) - (other[1] - one[1]) * (across - one[0])
        return sign

    sides = np.stack([side(corners[place], corners[(place + 1) % 3]) for place in range(3)])
    expected = np.flatnonzero((sides > 0).all(axis=0) | (sides < 0).all(axis=0))
    assert kept.tolist() == expected.tolist()
    assert len(np.intersect1d(kept, shown)) < len(kept) < NUM


@pytest.mark.browser
def test_touch_moves_and_pinches(tmp_path: Path, open_page: OpenPage) -> None:
    page = opened(tmp_path, open_page, NARROW_PX)
    touch: Callable[[str, list[tuple[int, int]]], object] = lambda kind, fingers: page.evaluate(  # noqa: E731
        """([kind, fingers]) => { const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
        canvas.setPointerCapture = () => {};
        fingers.forEach(([x, y], pointerId) => canvas.dispatchEvent(new PointerEvent(kind,
          { pointerId, pointerType: "touch", clientX: box.left + x, clientY: box.top + y, bubbles: true }))); }""",
        [kind, fingers],
    )
    before = np.array([place_of(page, point) for point in (3, 9)])
    touch("pointerdown", [(100, 100)])
    touch("pointermove", [(130, 160)])
    touch("pointerup", [(130, 160)])
    moved = np.array([place_of(page, point) for point in (3, 9)])
    np.testing.assert_allclose(moved - before, [[30, 60]] * 2, atol=0.01)
    touch("pointerdown", [(100, 100), (200, 100)])
    touch("pointermove", [(90, 100), (210, 100)])
    touch("pointermove", [(50, 100), (250, 100)])
    touch("pointerup", [(50, 100), (250, 100)])
    pinched = np.array([place_of(page, point) for point in (3, 9)])
    assert np.linalg.norm(pinched[0] - pinched[1]) > 1.5 * np.linalg.norm(moved[0] - moved[1])


@pytest.mark.slow
@pytest.mark.browser
def test_a_hundred_thousand_points_move_at_thirty_frames_a_second(tmp_path: Path, open_page: OpenPage) -> None:
    path = tmp_path / "map.parquet"
    num = 100_000
    rng = np.random.default_rng(0)
    fields = {"uri": pa.string(), "label": pa.string(), "row": pa.int64()}
    fields |= {"projection_x": pa.float32(), "projection_y": pa.float32()}
    values = [
        [f"/images/of/some/folder/{row:08d}.jpg" for row in range(num)],
        [f"label {row % 30}" for row in range(num)],
        np.arange(num),
        *(rng.standard_normal((2, num)) * 50).astype(np.float32),
    ]
    with ManifestWriter(path, [pa.field(*each) for each in fields.items()], Provenance("selection", "x", {})) as writer:
        writer.write(pa.table(dict(zip(fields, values, strict=True)), schema=pa.schema(fields)))
    write_map_page(path, tmp_path / "map.html", Options())
    assert os.path.getsize(tmp_path / "map.html") < 15_000_000
    page = open_page(tmp_path / "map.html")
    page.wait_for_selector(".map[data-ready=yes]")
    seconds = page.evaluate(MOVED_FRAMES)
    (tmp_path / "frames.json").write_text(json.dumps(seconds))
    assert float(np.mean(seconds)) < 1 / 30, f"{1 / np.mean(seconds):.1f} frames a second"


MOVED_FRAMES = """async () => {
  const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect(), seconds = [];
  canvas.setPointerCapture = () => {};
  const send = (kind, x) => canvas.dispatchEvent(new PointerEvent(kind,
    { pointerId: 1, clientX: box.left + x, clientY: box.top + 300, bubbles: true }));
  const frame = () => new Promise(requestAnimationFrame);
  send("pointerdown", 300);
  let before = await frame();
  for (let step = 1; step <= 60; step++) {
    send("pointermove", 300 + 4 * step);
    const now = await frame();
    seconds.push((now - before) / 1000);
    before = now;
  }
  send("pointerup", 540);
  return seconds;
}"""
