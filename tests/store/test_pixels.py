"""Pixels of any number of channels and 16 bits, out of files of any kind."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinov2_toolkit.store.images import ColourMode, UnreadableImage, Values, decode, shown
from dinov2_toolkit.store.pixels import Bands, as_image, decode_picture, values_of

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def noise(*shape: int, dtype: type[np.uint8] | type[np.uint16] = np.uint16) -> Values:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def encoded(image: Image.Image, form: str, **settings: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def npy(values: NDArray[np.generic]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def stack(values: Values, **settings: object) -> bytes:
    """A TIFF file with a page a channel."""
    first, *others = (Image.fromarray(np.ascontiguousarray(page)) for page in np.moveaxis(values, 2, 0))
    return encoded(first, "TIFF", save_all=True, append_images=others, **settings)


def read(data: bytes, in_chans: int, bit_depth: int = 16) -> Values:
    picture, size = decode_picture(data, in_chans, bit_depth)
    assert size == picture.size
    return values_of(picture)


def deep_png(values: Values) -> bytes:
    """A PNG file of 16-bit RGB, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "TIFF", "npy", ">npy"])
def test_every_one_of_16_bits_survives(form: str) -> None:
    data = (
        npy(RAMP.astype(">u2" if form[0] == ">" else "u2")) if "npy" in form else encoded(Image.fromarray(RAMP), form)
    )
    values = read(data, 1)
    assert values.dtype == np.uint16 and np.array_equal(values[..., 0], RAMP)


@pytest.mark.parametrize("settings", [{}, {"compression": "tiff_deflate"}])
def test_a_page_a_channel_is_the_same_as_an_array(settings: dict[str, object]) -> None:
    for dtype in (np.uint8, np.uint16):
        values = noise(9, 14, 5, dtype=dtype)
        for bit_depth in (8, 16):
            from_pages = read(stack(values, **settings), 5, bit_depth)
            assert np.array_equal(from_pages, read(npy(values), 5, bit_depth))
            if bit_depth == 8 * values.itemsize:
                assert np.array_equal(from_pages, values) and from_pages.dtype == dtype


def test_channels_that_pillow_names_stay_apart() -> None:
    values = noise(9, 14, 4, dtype=np.uint8)  # the last one is no transparency
    for form in ("PNG", "TIFF"):
        assert np.array_equal(read(encoded(Image.fromarray(values), form), 4, 8), values)
    palette = Image.fromarray(values[..., :3]).quantize(7)
    assert np.array_equal(read(encoded(palette, "PNG"), 3), np.asarray(palette.convert("RGB")) * np.uint16(257))
    bits = Image.fromarray(values[..., 0] > 127)
    assert np.array_equal(read(encoded(bits, "PNG"), 1)[..., 0], np.where(values[..., 0] > 127, 65535, 0))


def test_depths_turn_into_one_another_by_their_whole_range() -> None:
    shallow = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read(npy(shallow), 1)[..., 0], shallow * np.uint16(257))
    both = np.stack([RAMP, RAMP.T], axis=2)
    assert np.array_equal(read(npy(both), 2, 8), np.rint(both / 257))
    floats = Image.fromarray(RAMP.astype(np.float32) / 65535)
    assert np.array_equal(read(encoded(floats, "TIFF"), 1)[..., 0], RAMP)


def test_rgb_and_grey_of_8_bits_are_read_as_ever() -> None:
    data = encoded(Image.fromarray(noise(30, 50, 4, dtype=np.uint8)), "PNG")
    modes: dict[int, ColourMode] = {3: "RGB", 1: "L"}
    for in_chans, mode in modes.items():
        picture, size = decode_picture(data, in_chans, 8)
        assert size == (50, 30) and isinstance(picture, Image.Image)
        assert np.array_equal(np.asarray(picture), np.asarray(decode(data, mode)))
    jpeg = encoded(Image.new("RGB", (400, 600)), "JPEG")
    picture, size = decode_picture(jpeg, 3, 8, 60)
    assert (picture.size, size) == ((100, 150), (400, 600))


def test_an_array_is_looked_at_by_its_first_three_channels_or_its_first() -> None:
    values = noise(9, 14, 5)
    seen = np.asarray(decode(npy(values)))
    assert np.array_equal(seen, np.rint(values[..., :3] / 257)) and seen.dtype == np.uint8
    assert np.array_equal(np.asarray(as_image(Bands(values))), seen)
    assert np.array_equal(np.asarray(shown(values[..., :2])), np.rint(values[..., 0] / 257))
    assert decode(npy(values[..., 0]), "L").mode == "L"


def test_an_image_of_a_stored_orientation_comes_upright() -> None:
    values = noise(9, 14)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned = read(encoded(Image.fromarray(values), "PNG", exif=exif), 1)[..., 0]
    assert np.array_equal(turned, np.rot90(values, -1))


def test_a_resize_is_pillows_of_each_channel_and_keeps_16_bits() -> None:
    values = noise(40, 30, 2)
    resized = Bands(values).resize((13, 17), Image.Resampling.BICUBIC)
    assert resized.size == (13, 17) and resized.values.dtype == np.uint16
    for channel in range(2):
        alone = Image.fromarray(values[..., channel].astype(np.float32)).resize((13, 17), Image.Resampling.BICUBIC)
        assert np.array_equal(resized.values[..., channel], np.asarray(alone).round().clip(0, 65535))
    ramp = np.tile(np.arange(1000, 1064, dtype=np.uint16), (64, 1))[..., None]  # one level of 8 bits a 257th
    halved = Bands(ramp).resize((32, 32), Image.Resampling.BICUBIC).values[16, 4:-4, 0]
    assert np.abs(halved - (1000.5 + 2 * np.arange(4, 28))).max() <= 0.5
    assert np.array_equal(Bands(values).crop((3, 5, 20, 11)).values, values[5:11, 3:20])


@pytest.mark.parametrize(
    ("data", "in_chans", "bit_depth", "reason"),
    [
        (npy(noise(4, 4, 2)), 5, 16, "2 channels where the model takes 5"),
        (npy(noise(4, 4)), 4, 8, "1 channel where the model takes 4"),
        (encoded(Image.new("RGB", (4, 4)), "PNG"), 1, 16, "3 channels where the model takes 1"),
        (stack(noise(4, 4, 6)), 5, 16, "6 channels where the model takes 5"),
        (deep_png(noise(4, 4, 3)), 3, 16, "16-bit colours, of which Pillow reads 8; save them as .npy"),
        (encoded(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"), 1, 16, "from -1 to -1, outside 0 to 65535"),
        (encoded(Image.fromarray(np.full((4, 4), 1.5, np.float32)), "TIFF"), 1, 16, "outside 0 to 1"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), 1, 16, "outside 0 to 1"),
        (npy(np.zeros((4, 4, 5))), 5, 16, "an array of float64; only uint8 and uint16 are read"),
        (npy(np.zeros((4, 4, 5, 1), np.uint8)), 5, 16, "must be (height, width, channels)"),
        (npy(np.zeros((0, 4, 5), np.uint8)), 5, 16, "must be (height, width, channels)"),
        (npy(noise(40, 40, 5))[:-7], 5, 16, "an array of shape (40, 40, 5) that is cut off"),
        (npy(np.array([{}], object)), 5, 16, "an array of object; only uint8 and uint16 are read"),
        (b"\x93NUMPY", 5, 16, "cannot be decoded"),
        (b"", 5, 16, "empty file"),
        (b"text", 5, 16, "not an image of a known format"),
    ],
)
def test_what_does_not_fit_is_unreadable_with_the_reason(
    data: bytes, in_chans: int, bit_depth: int, reason: str
) -> None:
    with pytest.raises(UnreadableImage) as problem:
        decode_picture(data, in_chans, bit_depth)
    assert reason in problem.value.reason


def test_pages_of_different_sizes_are_no_channels() -> None:
    pages = [Image.new("L", size) for size in ((4, 4), (4, 5))]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableImage, match="pages of different sizes"):
        decode_picture(data, 2, 8)


def test_deep_colours_may_be_read_as_8_bits() -> None:
    values = noise(4, 6, 3)
    assert np.abs(np.asarray(decode(deep_png(values))).astype(int) - values // 256).max() <= 1
