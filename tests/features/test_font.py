"""Fonts of pictures."""

import pytest
from PIL import ImageFont

from dinov2_toolkit.features import font
from dinov2_toolkit.features.font import font_for


def test_other_letters_take_a_font_of_the_system_and_ascii_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    small, large = ImageFont.load_default(12), ImageFont.load_default(24)

    def truetype(name: str, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        asked.append(name)
        if name != "Arial.ttf":
            raise OSError
        return large

    monkeypatch.setattr(ImageFont, "truetype", truetype)
    monkeypatch.setattr(ImageFont, "load_default", lambda size_px: small)
    font._system_font.cache_clear()
    assert font_for("plain …", 12) is small and asked == []
    assert font_for("Größe", 12) is large and asked == ["DejaVuSans.ttf", "Arial.ttf"]
    asked.clear()
    assert font_for("猫", 12) is large and asked[0] == "NotoSansCJK-Regular.ttc"
    monkeypatch.setattr(font, "EUROPEAN", ("none.ttf",))
    assert font_for("Größe", 12) is small  # a system without fonts
    font._system_font.cache_clear()
