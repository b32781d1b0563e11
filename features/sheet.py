"""Pictures for people: captioned images in rows, written as PNG files that know how they were made."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from .. import console
from ..errors import ToolkitError
from ..store.artifact import Options, check_not_input, is_up_to_date
from ..store.files import open_regular, replacing
from ..store.images import UnreadableImage, decode_sized
from ..store.json_text import json_object
from ..store.manifest import PROVENANCE_KEY, Provenance, provenance_from, provenance_values, toolkit_version
from .font import Font, font_for
from .image_workers import image_workers

MARGIN_PX, GAP_PX, GROUP_GAP_PX = 24, 6, 22
TINY_TIMES = 3  # an image that fits this often into its tile is shown pixel by pixel
CAPTION_PX, TITLE_PX = 12, 17
LONGEST_PX = 4000  # chosen: a title, note or heading is cut there, for it may be anybody's label
PAPER, EDGE, INK, FAINT = "#fbfbf9", "#dcdcd6", "#22262b", "#6d737a"
BLANK = "#e8d9d6"  # in place of what cannot be read


@dataclass(frozen=True)
class Tile:
    """An image on a sheet."""

    image: Image.Image
    caption: str = ""


Row = Sequence[Sequence[Tile]]  # groups of tiles: a little space between tiles, more between groups


def draw_sheet(
    rows: Sequence[Row], *, title: str, note: str = "", headings: Sequence[str] = (), tile_px: int = 128
) -> Image.Image:
    """Return a sheet with a title, a note and rows of tiles, each image scaled to fit a square of `tile_px`.

    `headings` stand above the rows, one each; none by default.
    """
    above_px = 2 * CAPTION_PX if headings else 0
    has_captions = any(tile.caption for row in rows for group in row for tile in group)
    line_px = above_px + tile_px + (2 * CAPTION_PX if has_captions else 6)
    shortened = [_shorten(text, CAPTION_PX, LONGEST_PX) for text in headings]
    widths = [*(round(font.getlength(text)) for text, font in shortened), *(_row_width(row, tile_px) for row in rows)]
    sheet, pen, head_px = titled_sheet(title, note, max(widths, default=0), len(rows) * (line_px + GAP_PX))
    for number, row in enumerate(rows):
        left, top = MARGIN_PX, head_px + number * (line_px + GAP_PX) + above_px
        if headings:
            text, font = shortened[number]
            pen.text((left, top - round(1.5 * CAPTION_PX)), text, INK, font)
        for group in row:
            for tile in group:
                image = fit(tile.image, tile_px)
                corner = left, top + tile_px - image.height  # down to its caption
                sheet.paste(image, corner)
                pen.rectangle((left - 1, corner[1] - 1, left + image.width, top + tile_px), outline=EDGE)
                text, font = _shorten(tile.caption, CAPTION_PX, tile_px)
                pen.text((left, top + tile_px + 4), text, FAINT, font)
                left += tile_px + GAP_PX
            left += GROUP_GAP_PX - GAP_PX
    return sheet


def titled_sheet(title: str, note: str, width_px: int, height_px: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Return a sheet with a title and a note and room for content below, its pen, and where the content begins."""
    title, title_font = _shorten(title, TITLE_PX, LONGEST_PX)
    note, note_font = _shorten(note, CAPTION_PX, LONGEST_PX)
    head_px = MARGIN_PX + 2 * TITLE_PX + (2 * CAPTION_PX if note else 0)
    text_px = round(max(title_font.getlength(title), note_font.getlength(note)))
    sheet = Image.new("RGB", (2 * MARGIN_PX + max(text_px, width_px), head_px + height_px + MARGIN_PX), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PX, MARGIN_PX), title, INK, title_font)
    pen.text((MARGIN_PX, MARGIN_PX + round(1.6 * TITLE_PX)), note, FAINT, note_font)
    return sheet, pen, head_px


def read_tile(uri: str | None, caption: str, tile_px: int) -> Tile:
    """Return the image behind a uri as a tile; what cannot be read is an empty one, said on stderr."""
    found: tuple[Image.Image, tuple[int, int]] | UnreadableImage = UnreadableImage("no uri")
    if uri is not None:
        with image_workers(partial(decode_sized, mode="RGB", min_side=2 * tile_px), 1) as read:
            (found,) = read([uri])
    if isinstance(found, UnreadableImage):
        console.warn(f"{uri} cannot be shown: {found.reason}")
        return Tile(Image.new("RGB", (tile_px, tile_px), BLANK), f"{caption} cannot be read".strip())
    return Tile(found[0], caption)


def fit(image: Image.Image, side_px: int) -> Image.Image:
    """Return an image scaled to fit a square; a tiny one a whole number of times, so that its pixels stay squares."""
    longest = max(image.size)
    if (times := side_px // longest) >= TINY_TIMES:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    size = (max(1, image.width * side_px // longest), max(1, image.height * side_px // longest))
    return image.resize(size, Image.Resampling.LANCZOS)


def _row_width(row: Row, tile_px: int) -> int:
    tiles = sum(len(group) * (tile_px + GAP_PX) - GAP_PX for group in row)
    return tiles + (len(row) - 1) * GROUP_GAP_PX


def _shorten(text: str, size_px: int, width_px: int) -> tuple[str, Font]:
    """Return a text, its end cut off where it is longer than that, and its font."""
    start = text[: width_px + 1]  # a letter takes a pixel at least; labels may have any length
    font = font_for(start, size_px)
    if start == text and font.getlength(text) <= width_px:
        return text, font
    lengths = range(1, len(start) + 1)
    num_fitting = bisect_right(lengths, width_px, key=lambda num: math.ceil(font.getlength(f"{start[:num]}…")))
    return f"{start[:num_fitting]}…", font


def check_picture_name(output: str) -> Path:
    """Return the output as a path.

    Raises ToolkitError when it does not end in .png, or is a folder.
    """
    if not output.endswith(".png"):
        raise ToolkitError(f"output {output!r} does not end in .png; a picture is a PNG file: name it so")
    if Path(output).is_dir():
        raise ToolkitError(f"output {output} is a folder; name a PNG file")
    return Path(output)


def check_sheet(sheet: Path, provenance: Provenance, options: Options) -> None:
    """Raise ToolkitError when a step with this provenance cannot draw its --sheet there."""
    check_picture_name(str(sheet))
    check_not_input(sheet, provenance, picture_provenance)
    if sheet.exists() and not options.force:
        raise ToolkitError(f"{sheet} exists; choose another --sheet, or --force to overwrite it")


def is_picture_up_to_date(path: Path, provenance: Provenance, options: Options) -> bool:
    """Tell whether this very picture is there already; if so, touch it (so that Make rests) and say so.

    Raises ToolkitError when something else stands there and --force was not given.
    """
    return is_up_to_date(path, provenance, options, kind="picture", find=picture_provenance)


def picture_provenance(path: Path) -> Provenance | None:
    """Return how a picture came about, None where it is not ours."""
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as picture:
            text = picture.info.get(PROVENANCE_KEY)
        return None if text is None else provenance_from(json_object(text), path)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):  # not a picture, or not ours
        return None


def write_picture(picture: Image.Image, path: Path, provenance: Provenance) -> None:
    """Write a PNG with its provenance in a text chunk: beside its place first, then renamed."""
    text = PngImagePlugin.PngInfo()
    values = provenance_values(replace(provenance, version=toolkit_version()))
    text.add_text(PROVENANCE_KEY, json.dumps(values, sort_keys=True))
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=text)
