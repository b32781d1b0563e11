"""The picture of a calibration: a histogram of how similar nearest neighbours are, and pairs around thresholds.

The axis is -log10(1 - similarity): near-duplicates differ in the digits behind the nines. S images, T thresholds.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ... import console
from ...features.sheet import CAPTION_PX, INK, MARGIN_PX, PAPER, Tile, draw_sheet, read_tile
from ...store.vectors import Float64

TILE_PX = 84
PLOT_PX = (860, 200)
BINS, LINES = 86, 24  # bars of the picture, and lines on the terminal
BAR_CHARS = 40
MOST_NINES = 7.0  # similarities above 1 - 1e-7 count as this: what float16 vectors can tell apart
BAR, CHANCE, MARK, CHOSEN = "#9db4c8", "#c26a3f", "#8a8f96", "#1d5fa8"


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


def histogram(nearest: Float64, thresholds: Float64, expected: Float64, num: int) -> tuple[Float64, Float64, Float64]:
    """Return the edges (num + 1,) of even bins in `nines`, how many images fall into each, and how many by chance.

    Args:
        nearest: (S,) similarity of every image to its nearest.
        thresholds: (T,) falling; expected: (T,) images with a neighbour above these by chance.
    """
    places = nines(nearest)
    edges = np.linspace(float(np.floor(10 * places.min()) / 10), float(np.ceil(10 * places.max()) / 10) + 0.1, num + 1)
    counts, _ = np.histogram(places, edges)
    above = np.interp(edges, nines(thresholds)[::-1], expected[::-1])  # beyond the loosest it stays as it is
    above[edges > nines(thresholds[:1])] = 0.0
    return edges, counts.astype(np.float64), np.maximum(above[:-1] - above[1:], 0.0)


def show_histogram(nearest: Float64, thresholds: Float64, expected: Float64, scale: float) -> None:
    """Show the histogram on stderr; an image of the sample stands for `scale` images of the pool."""
    edges, counts, by_chance = histogram(nearest, thresholds, expected, LINES)
    rows = [
        (
            f"{1 - 10**-edge:.7g}",
            f"{count * scale:,.0f}",
            f"{chance * scale:,.0f}",
            "█" * round(BAR_CHARS * count / max(counts.max(), 1)),
        )
        for edge, count, chance in zip(edges.tolist(), counts.tolist(), by_chance.tolist(), strict=False)
    ]
    console.table("similarity to the nearest image", ("from", "images", "by chance", ""), rows)


def draw_calibration(
    name: str,
    nearest: Float64,
    chance: tuple[Float64, Float64],
    rows: list[tuple[Candidate, tuple[list[Pair], list[Pair]]]],
    suggested: Candidate,
    num_images: int,
) -> Image.Image:
    """Return the histogram with the thresholds marked, and below it a row of pairs around each of them."""
    plot = _draw_histogram(nearest, *chance, [each for each, _ in rows], suggested)
    headings = [
        f"{each.threshold:.7g}{_precision(each)}: {each.removed:,} of {num_images:,} images removed"
        f" ({each.removed / num_images:.1%}){', suggested' if each is suggested else ''}"
        for each, _ in rows
    ]
    tiles = [
        [*(_tiles(pair, "goes") for pair in above), *(_tiles(pair, "stays") for pair in below)]
        for _, (above, below) in rows
    ]
    sheet = draw_sheet(
        tiles,
        title=f"Which threshold for {name}?",
        note="of every threshold the pairs of nearest images just above it (removed), then those just below (kept)",
        headings=headings,
        tile_px=TILE_PX,
    )
    picture = Image.new("RGB", (max(plot.width, sheet.width), plot.height + sheet.height), PAPER)
    picture.paste(plot, (0, 0))
    picture.paste(sheet, (0, plot.height))
    return picture


def _precision(candidate: Candidate) -> str:
    return "" if candidate.precision is None else f" at an expected precision of {candidate.precision:g}"


def _tiles(pair: Pair, fate: str) -> list[Tile]:
    return [read_tile(pair.left, f"{pair.similarity:.6f}", TILE_PX), read_tile(pair.right, fate, TILE_PX)]


def _draw_histogram(
    nearest: Float64, thresholds: Float64, expected: Float64, candidates: list[Candidate], suggested: Candidate
) -> Image.Image:
    edges, counts, by_chance = histogram(nearest, thresholds, expected, BINS)
    width, height = PLOT_PX
    picture = Image.new("RGB", (width + 2 * MARGIN_PX, height + 2 * MARGIN_PX + 5 * CAPTION_PX), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(CAPTION_PX)
    left, top = MARGIN_PX, MARGIN_PX + 2 * CAPTION_PX
    bottom = top + height
    tallest = max(float(counts.max()), 1.0)
    first, last = float(edges[0]), float(edges[-1])

    def across(place: float) -> float:
        return left + (place - first) / (last - first) * width

    def up(count: float) -> float:
        return bottom - min(count / tallest, 1.0) * height

    pen.text((left, MARGIN_PX - CAPTION_PX), "Similarity of sampled images to their nearest", INK, font)
    pen.text((left, MARGIN_PX + CAPTION_PX // 3), f"line: by chance; tallest bar {tallest:,.0f} images", CHANCE, font)
    for start, stop, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        if count:
            pen.rectangle((across(start) + 1, min(up(count), bottom - 1), across(stop), bottom), fill=BAR)
    middles = (edges[:-1] + edges[1:]) / 2
    line = [(across(place), up(count)) for place, count in zip(middles.tolist(), by_chance.tolist(), strict=True)]
    pen.line(line, fill=CHANCE, width=2)
    pen.line((left, bottom, left + width, bottom), fill=INK)
    for similarity in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 0.99999, 0.999999):
        place = float(nines(similarity))
        if edges[0] <= place <= edges[-1]:
            pen.line((across(place), bottom, across(place), bottom + 4), fill=INK)
            pen.text((across(place), bottom + 6), f"{similarity:g}", INK, font, anchor="ma")
    for each in candidates:
        place = across(float(np.clip(nines(each.threshold), edges[0], edges[-1])))
        if each is not suggested:
            pen.line((place, top, place, bottom), fill=MARK, width=1)
    place = across(float(np.clip(nines(suggested.threshold), edges[0], edges[-1])))
    pen.line((place, top - CAPTION_PX // 2, place, bottom), fill=CHOSEN, width=3)
    anchor = "rs" if place > left + width / 2 else "ls"
    pen.text((place, top - CAPTION_PX), f"suggested {suggested.threshold:.7g}", CHOSEN, font, anchor=anchor)
    return picture
