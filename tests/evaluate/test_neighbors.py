"""`dinov2 evaluate neighbors` and the sheets that it draws on."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.retrieve.retrieve import Queries, RetrieveSettings, retrieve_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate import neighbors
from dinov2_toolkit.evaluate.neighbors import NeighborSettings, draw_neighbors
from dinov2_toolkit.features.sheet import Row, Tile, draw_sheet, fit
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import RESULT_KEY
from dinov2_toolkit.tests.embedded import write_embeddings

Drawn = list[list[list[Tile]]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What stood on the last sheet, besides drawing it."""
    seen: Drawn = []

    def draw(rows: list[Row], *, title: str, note: str, tile_px: int) -> Image.Image:
        seen[:] = [[list(group) for group in row] for row in rows]
        return draw_sheet(rows, title=title, note=note, tile_px=tile_px)

    monkeypatch.setattr(neighbors, "draw_sheet", draw)
    return seen


def embedded(name: str, degrees: list[float], role: str = "pool", model: str = "a model") -> Path:
    """Embeddings on the unit circle, of images whose grey level is the angle and whose label says it."""
    folder = Path(f"{name}_images").absolute()
    folder.mkdir()
    uris = [str(folder / f"{number}.png") for number in range(len(degrees))]
    for uri, angle in zip(uris, degrees, strict=True):
        Image.new("RGB", (28, 28), (round(angle),) * 3).save(uri)
    angles = np.radians(degrees)
    return write_embeddings(
        Path(f"{name}.parquet"),
        np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32),
        image_ids=[f"{name}{number}" for number in range(len(degrees))],
        uris=uris,
        labels=[f"at {angle:g}" for angle in degrees],
        role=role,
        model=model,
    )


def captions(drawn: Drawn) -> list[tuple[list[str], list[str]]]:
    return [([tile.caption for tile in query], [tile.caption for tile in found]) for query, found in drawn]


def cosine(degrees: float) -> str:
    return f"{np.cos(np.radians(degrees)):.3f}"


def test_each_query_stands_beside_its_nearest(drawn: Drawn) -> None:
    queries, pool = embedded("queries", [10, 80], "queries"), embedded("pool", [0, 75, 15, 100, 40])
    result = draw_neighbors(str(queries), "sheet.png", NeighborSettings(pool, k=2), Options())
    assert result is not None
    assert result.figures == {"queries": 2, "images": 4}
    assert captions(drawn) == [
        (["at 10"], [f"{cosine(5)}  at 15", f"{cosine(10)}  at 0"]),
        (["at 80"], [f"{cosine(5)}  at 75", f"{cosine(20)}  at 100"]),
    ]
    assert [tile.image.getpixel((14, 14)) for tile in drawn[0][1]] == [(15, 15, 15), (0, 0, 0)]


def test_an_image_is_no_neighbour_of_itself(drawn: Drawn) -> None:
    pool = embedded("pool", [0, 10, 30])
    draw_neighbors(str(pool), "sheet.png", NeighborSettings(pool, k=8), Options())
    assert captions(drawn)[0] == (["at 0"], [f"{cosine(10)}  at 10", f"{cosine(30)}  at 30"])


def test_without_a_pool_the_newest_is_taken_and_said(drawn: Drawn, capsys: pytest.CaptureFixture[str]) -> None:
    pool, queries = embedded("pool", [0, 10]), embedded("queries", [9], "queries")
    draw_neighbors(str(queries), "sheet.png", NeighborSettings(k=1), Options())
    assert f"{pool.name}, the newest in the catalog" in capsys.readouterr().err
    assert captions(drawn) == [(["at 9"], [f"{cosine(1)}  at 10"])]


def test_of_a_selection_the_images_are_those_that_each_query_brought(drawn: Drawn) -> None:
    queries, pool = embedded("queries", [10, 80], "queries"), embedded("pool", [0, 75, 15, 90, 40])
    retrieve_images(queries, pool, "curated.parquet", RetrieveSettings(k=2, include_queries=True), Options())
    draw_neighbors("curated.parquet", "sheet.png", NeighborSettings(), Options())
    assert captions(drawn) == [
        (["at 10"], [f"{cosine(5)}  at 15", f"{cosine(10)}  at 0"]),
        (["at 80"], [f"{cosine(5)}  at 75", f"{cosine(10)}  at 90"]),
    ]
    draw_neighbors("curated.parquet", "one.png", NeighborSettings(k=1), Options(limit=1))
    assert captions(drawn) == [(["at 10"], [f"{cosine(5)}  at 15"])]


def test_of_several_query_sets_every_query_is_found(drawn: Drawn) -> None:
    one, other = embedded("one", [10], "queries"), embedded("other", [80], "queries")
    pool = embedded("pool", [0, 75, 15, 90])
    sets = (Queries(one), Queries(other))
    retrieve_images(sets, pool, "curated.parquet", RetrieveSettings(k=1), Options())
    draw_neighbors("curated.parquet", "sheet.png", NeighborSettings(), Options())
    assert captions(drawn) == [(["at 10"], [f"{cosine(5)}  at 15"]), (["at 80"], [f"{cosine(5)}  at 75"])]


def test_queries_that_are_gone_must_be_named(drawn: Drawn) -> None:
    queries, pool = embedded("queries", [10], "queries"), embedded("pool", [0, 15])
    retrieve_images(queries, pool, "curated.parquet", RetrieveSettings(k=1), Options())
    moved = queries.rename("moved.parquet")
    with pytest.raises(ToolkitError, match=r"gone: no .*queries\.parquet; name them by --queries"):
        draw_neighbors("curated.parquet", "sheet.png", NeighborSettings(), Options())
    draw_neighbors("curated.parquet", "sheet.png", NeighborSettings(queries=moved), Options())
    assert captions(drawn) == [(["at 10"], [f"{cosine(5)}  at 15"])]
    with pytest.raises(ToolkitError, match="1 of 1 queries"):
        draw_neighbors("curated.parquet", "other.png", NeighborSettings(queries=pool), Options())


def curated_with(name: str, values: list[Any]) -> str:
    """A selection of one image for one query, with something else in one of its columns."""
    queries, pool = embedded("queries", [10], "queries"), embedded("pool", [0, 15])
    retrieve_images(queries, pool, "curated.parquet", RetrieveSettings(k=1), Options())
    table, metadata = pq.read_table("curated.parquet"), pq.read_metadata("curated.parquet").metadata
    place = table.column_names.index(name)
    changed = table.set_column(place, name, pa.array(values)).replace_schema_metadata(table.schema.metadata)
    with pq.ParquetWriter("curated.parquet", changed.schema) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({RESULT_KEY: metadata[RESULT_KEY.encode()]})
    return "curated.parquet"


@pytest.mark.parametrize(("name", "values"), [("rank", ["first"]), ("similarity", [[0.5]]), ("query_id", [[b"x"]])])
def test_columns_of_a_selection_that_are_something_else_are_named(name: str, values: list[Any]) -> None:
    curated = curated_with(name, values)
    with pytest.raises(ToolkitError, match=rf"the `{name}` column of curated.parquet is .* and cannot be read as"):
        draw_neighbors(curated, "sheet.png", NeighborSettings(), Options())


def test_a_selection_without_chosen_images_has_nothing_to_show() -> None:
    curated = curated_with("rank", [0])  # that of queries that were included
    with pytest.raises(
        ToolkitError, match=r"no row of curated\.parquet was chosen for a query; make it by `dinov2 cur"
    ):
        draw_neighbors(curated, "sheet.png", NeighborSettings(), Options())


def test_vectors_of_two_models_are_not_compared() -> None:
    queries, pool = embedded("queries", [10], "queries", model="another"), embedded("pool", [0, 15])
    with pytest.raises(ToolkitError, match=r"two models \(another, a model\)"):
        draw_neighbors(str(queries), "sheet.png", NeighborSettings(pool), Options())


def test_embeddings_without_images_are_an_error() -> None:
    bare = pa.table({"embedding": pa.array([[1.0, 0.0]], pa.list_(pa.float32()))})
    pq.write_table(bare, "bare.parquet")
    with pytest.raises(ToolkitError, match=r"bare.parquet \(manifest\) names no images \(columns: embedding\)"):
        draw_neighbors("bare.parquet", "sheet.png", NeighborSettings(embedded("pool", [0])), Options())


def test_an_image_that_cannot_be_read_keeps_its_place(drawn: Drawn, capsys: pytest.CaptureFixture[str]) -> None:
    queries, pool = embedded("queries", [10], "queries"), embedded("pool", [10, 20])
    Path("pool_images/0.png").unlink()
    draw_neighbors(str(queries), "sheet.png", NeighborSettings(pool), Options())
    assert captions(drawn)[0][1] == ["1.000  at 10 cannot be read", f"{cosine(10)}  at 20"]
    assert "0.png cannot be shown: no such file" in capsys.readouterr().err


def test_a_second_run_is_up_to_date_and_another_needs_force(capsys: pytest.CaptureFixture[str]) -> None:
    pool = embedded("pool", [0, 10, 30])
    draw_neighbors(str(pool), "sheet.png", NeighborSettings(pool, k=1), Options())
    before = Path("sheet.png").read_bytes()
    draw_neighbors(str(pool), "sheet.png", NeighborSettings(pool, k=1), Options())
    assert "sheet.png is up to date" in capsys.readouterr().err
    with pytest.raises(ToolkitError, match=r"was made differently \(k 1, now 2\)"):
        draw_neighbors(str(pool), "sheet.png", NeighborSettings(pool, k=2), Options())
    assert Path("sheet.png").read_bytes() == before
    draw_neighbors(str(pool), "sheet.png", NeighborSettings(pool, k=2), Options(force=True))
    assert Path("sheet.png").read_bytes() != before


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pool = embedded("pool", [0, 10, 30])
    assert draw_neighbors(str(pool), "sheet.png", NeighborSettings(pool), Options(dry_run=True)) is None
    assert "would draw queries and the nearest of 3 in pool.parquet, up to 8 each" in capsys.readouterr().err
    assert not Path("sheet.png").exists()


def embed_pool(folder: Path) -> Path:
    """Noise in three colours, embedded as `embed` does."""
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 120, (20, 20, 3))
        pixels[:, :, number % 3] += 120
        path = folder / ("red", "green", "blue")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    embed_images([str(folder)], "pool.parquet", EmbedSettings(model="random:vit_tiny", num_workers=1), Options(seed=3))
    return Path("pool.parquet")


def test_an_image_file_finds_its_nearest_by_the_model_of_the_pool(drawn: Drawn) -> None:
    pool = embed_pool(Path("photos"))
    Image.new("RGB", (20, 20), (200, 60, 60)).save("query.png")
    result = draw_neighbors("query.png", "sheet.png", NeighborSettings(pool, k=2), Options(seed=3))
    assert result is not None
    assert result.figures == {"queries": 1, "images": 2}
    ((query,), found) = captions(drawn)[0]
    assert query == "query.png"
    assert [caption.split()[1] for caption in found] == ["red", "red"]
    with pytest.raises(ToolkitError, match=r"was not embedded by random:vit_tiny as it is now \(seed 0\)"):
        draw_neighbors("query.png", "other.png", NeighborSettings(pool), Options())


def test_a_query_image_that_lies_in_the_pool_does_not_find_itself(drawn: Drawn) -> None:
    pool = embed_pool(Path("photos"))
    draw_neighbors("photos/red/0.png", "sheet.png", NeighborSettings(pool, k=8), Options(seed=3))
    assert len(captions(drawn)[0][1]) == 5


def test_tiny_images_are_enlarged_a_whole_number_of_times() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8)
    enlarged = np.asarray(fit(Image.fromarray(pixels), neighbors.TILE_PX))
    np.testing.assert_array_equal(enlarged, pixels.repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((400, 200), (112, 56)), ((3000, 1), (112, 1)), ((60, 80), (84, 112)), ((112, 112), (112, 112))],
)
def test_other_images_are_scaled_to_fit_their_tile(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit(Image.new("RGB", size), 112).size == fitted


def test_a_sheet_has_every_image_in_its_place_and_cuts_long_captions() -> None:
    red, green = Image.new("RGB", (30, 30), "red"), Image.new("RGB", (30, 30), "green")
    sheet = draw_sheet(
        [[[Tile(red, "a very long caption " * 9)], [Tile(green), Tile(green)]], [[Tile(green)]]], title="t", tile_px=90
    )
    pixels = np.asarray(sheet)
    red_at = np.all(pixels == (255, 0, 0), axis=2)
    assert red_at.sum() == 90 * 90
    assert np.all(pixels == (0, 128, 0), axis=2).sum() == 3 * 90 * 90
    bottom, right = (int(places.max()) for places in np.nonzero(red_at))
    ink = np.any(pixels[bottom + 3 : bottom + 20, :, 0] < 200, axis=0)  # columns with letters under the first tile
    assert ink[right - 89 : right + 1].sum() > 30
    assert not ink[right + 1 :].any()


def test_a_label_of_any_length_is_drawn_in_no_time() -> None:
    tiles = [[[Tile(Image.new("RGB", (9, 9)), "long label " * 6000)]]]
    start = time.perf_counter()
    sheet = draw_sheet(tiles, title="t" * 60_000, note="n" * 60_000, headings=["h" * 60_000])
    assert time.perf_counter() - start < 20
    assert sheet.width < 4200
    cut = draw_sheet([[[Tile(Image.new("RGB", (9, 9)), "long label " * 9)]]], title="t" * 1000, note="n" * 1000)
    assert np.array_equal(np.asarray(sheet)[-40:, 24:152], np.asarray(cut)[-40:, 24:152])
