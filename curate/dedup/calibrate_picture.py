"""The picture of a calibration: a histogram of how similar nearest neighbours are, and pairs around thresholds.

The axis is -log10(1 - similarity), for near-duplicates differ in the digits behind the nines. S images, R radii.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ... import console
from ...features.sheet import CAPTION_PX, INK, MARGIN_PX, PAPER, Tile, draw_sheet, read_tile
from ...store.vectors import Float64
from .threshold import ChanceModel

TILE_PX = 84
PLOT_PX = (860, 200)
BINS, LINES = 86, 24  # bars of the picture, and lines on the terminal
BAR_CHARS = 40
MOST_NINES = 7.0  # similarities above 1 - 1e-7 count as this: what float16 vectors can tell apart
TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 0.99999, 0.999999)
BAR, CHANCE, MARK, SUGGESTED = "#9db4c8", "#c26a3f", "#8a8f96", "#1d5fa8"


@dataclass(frozen=True)
class Candidate:
    """A threshold that may be chosen."""

    precision: float | None  # expected; None: not known
    threshold: float
    removed: int  # images of the pool, about


@dataclass(frozen=True)
class Pair:
    """An image and its nearest one."""

    left: str | None  # uris
    right: str | None
    similarity: float


def nines(similarities: Float64 | float) -> Float64:
    """Return -log10(1 - similarity): 1 is 0.9, 2 is 0.99 and so on."""
    place: Float64 = -np.log10(np.maximum(1 - np.asarray(similarities, np.float64), 10**-MOST_NINES))
    return place


def histogram(nearest: Float64, chance: ChanceModel, num: int) -> tuple[Float64, Float64, Float64]:
    """Return the edges (num + 1,) of even bins in `nines`, how many images are in each, and how many by chance.

    Args:
        nearest: (S,) similarity of every image to its nearest.
    """
    places = nines(nearest)
    edges = np.linspace(float(np.floor(10 * places.min()) / 10), float(np.ceil(10 * places.max()) / 10) + 0.1, num + 1)
    counts, _ = np.histogram(places, edges)
    thresholds = nines(chance.thresholds)
    above = np.interp(edges, thresholds[::-1], chance.expected[::-1])  # beyond the loosest it stays as it is
    above[edges > thresholds[0]] = 0.0
    return edges, counts.astype(np.float64), np.maximum(above[:-1] - above[1:], 0.0)


def show_histogram(nearest: Float64, chance: ChanceModel, scale: float) -> None:
    """Show the histogram on stderr; an image of the sample stands for `scale` images of the pool."""
    edges, counts, by_chance = histogram(nearest, chance, LINES)
    bars = np.round(BAR_CHARS * counts / max(counts.max(), 1)).astype(int)
    rows = [
        (f"{1 - 10**-edge:.7g}", f"{count * scale:,.0f}", f"{expected * scale:,.0f}", "█" * bar)
        for edge, count, expected, bar in zip(edges.tolist(), counts, by_chance, bars.tolist(), strict=False)
    ]
    console.table("similarity to the nearest image", ("from", "images", "by chance", ""), rows)


def draw_calibration(
    name: str,
    nearest: Float64,
    chance: ChanceModel,
    rows: list[tuple[Candidate, list[Pair], list[Pair]]],
    suggested: Candidate,
    num_images: int,
) -> Image.Image:
    """Return the histogram with the thresholds marked, and below it a row of pairs above and below each of them."""
    plot = _draw_histogram(nearest, chance, [each for each, _, _ in rows], suggested)
    headings = [
        f"{each.threshold:.7g}"
        + ("" if each.precision is None else f" at an expected precision of {each.precision:g}")
        + f": {each.removed:,} of {num_images:,} images removed ({each.removed / num_images:.1%})"
        + (", suggested" if each is suggested else "")
        for each, _, _ in rows
    ]
    tiles = [
        [*(_tiles(pair, "removed") for pair in above), *(_tiles(pair, "kept") for pair in below)]
        for _, above, below in rows
    ]
    sheet = draw_sheet(
        tiles,
        title=f"Which threshold for {name}?",
        note="for every threshold the pairs of nearest images just above it (removed), then those just below (kept)",
        headings=headings,
        tile_px=TILE_PX,
    )
    picture = Image.new("RGB", (max(plot.width, sheet.width), plot.height + sheet.height), PAPER)
    picture.paste(plot, (0, 0))
    picture.paste(sheet, (0, plot.height))
    return picture


def _tiles(pair: Pair, decision: str) -> list[Tile]:
    return [read_tile(pair.left, f"{pair.similarity:.6f}", TILE_PX), read_tile(pair.right, decision, TILE_PX)]


def _draw_histogram(
    nearest: Float64, chance: ChanceModel, candidates: list[Candidate], suggested: Candidate
) -> Image.Image:
    edges, counts, by_chance = histogram(nearest, chance, BINS)
    width, height = PLOT_PX
    picture = Image.new("RGB", (width + 2 * MARGIN_PX, height + 2 * MARGIN_PX + 5 * CAPTION_PX), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(CAPTION_PX)
    left, top = MARGIN_PX, MARGIN_PX + 2 * CAPTION_PX
    bottom = top + height
    tallest = max(float(counts.max()), 1.0)
    first, last = float(edges[0]), float(edges[-1])

    def x_of(place: float) -> float:
        return left + (place - first) / (last - first) * width

    def y_of(count: float) -> float:
        return bottom - min(count / tallest, 1.0) * height

    pen.text((left, MARGIN_PX - CAPTION_PX), "Similarity of sampled images to their nearest", INK, font)
    pen.text((left, MARGIN_PX + CAPTION_PX // 3), f"line: by chance; tallest bar {tallest:,.0f} images", CHANCE, font)
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            pen.rectangle((x_of(start) + 1, min(y_of(count), bottom - 1), x_of(stop), bottom), fill=BAR)
    middles = (edges[:-1] + edges[1:]) / 2
    pen.line([(x_of(place), y_of(count)) for place, count in zip(middles, by_chance, strict=True)], CHANCE, 2)
    pen.line((left, bottom, left + width, bottom), fill=INK)
    for similarity in TICKS:
        if first <= (place := float(nines(similarity))) <= last:
            pen.line((x_of(place), bottom, x_of(place), bottom + 4), fill=INK)
            pen.text((x_of(place), bottom + 6), f"{similarity:g}", INK, font, anchor="ma")
    marks = {each.threshold: x_of(float(np.clip(nines(each.threshold), first, last))) for each in candidates}
    for x in marks.values():
        pen.line((x, top, x, bottom), fill=MARK, width=1)
    x = marks[suggested.threshold]
    pen.line((x, top - CAPTION_PX // 2, x, bottom), fill=SUGGESTED, width=3)
    anchor = "rs" if x > left + width / 2 else "ls"
    pen.text((x, top - CAPTION_PX), f"suggested {suggested.threshold:.7g}", SUGGESTED, font, anchor=anchor)
    return picture
