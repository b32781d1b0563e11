"""The fonts of pictures: Pillow's own, and the system's for letters that this lacks."""

from functools import lru_cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

OWN_LETTERS = {*map(chr, range(128)), "…"}
FIRST_EAST_ASIAN = "\u2e80"  # of the letters that fonts for Europe lack
EUROPEAN = "DejaVuSans.ttf", "Arial.ttf", "Arial Unicode.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf"
EAST_ASIAN = "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "wqy-zenhei.ttc"


def font_for(text: str, size_px: int) -> Font:
    """Return a font that has the letters of a text, as far as the system has one; of ASCII the same everywhere."""
    if OWN_LETTERS.issuperset(text):
        return ImageFont.load_default(size_px)
    return _system_font(EAST_ASIAN + EUROPEAN if max(text) >= FIRST_EAST_ASIAN else EUROPEAN, size_px)


@lru_cache
def _system_font(names: tuple[str, ...], size_px: int) -> Font:
    for name in names:
        try:
            return ImageFont.truetype(name, size_px)
        except OSError:  # the system does not have it
            continue
    return ImageFont.load_default(size_px)
