"""Reading images: bytes behind every kind of uri, pixels out of every kind of file, and reasons for the rest."""

import hashlib
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.store import parquet_rows
from dinov2_toolkit.store.images import ColourMode, UnreadableImage, decode, decode_sized, image_id, read_bytes

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes, mode: ColourMode = "RGB") -> np.ndarray:
    picture = decode(data, mode)
    assert picture.mode == mode
    return np.asarray(picture).astype(int)


def reason(data: bytes) -> str:
    with pytest.raises(UnreadableImage) as problem:
        decode(data)
    assert "\n" not in problem.value.reason
    return problem.value.reason


# Pixels


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, COLOURS),
        (2, COLOURS[:, ::-1]),
        (3, COLOURS[::-1, ::-1]),
        (4, COLOURS[::-1]),
        (5, COLOURS.transpose(1, 0, 2)),
        (6, np.rot90(COLOURS, -1)),
        (7, COLOURS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(COLOURS, 1)),
    ],
)
def test_all_eight_exif_orientations_come_upright(form: str, orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(Image.fromarray(COLOURS), form, exif=exif, **options)
    picture, size = decode_sized(data)
    assert np.array_equal(np.asarray(picture), upright)
    assert size == (upright.shape[1], upright.shape[0])


def test_an_unreadable_exif_block_does_not_cost_the_image() -> None:
    data = encode(Image.fromarray(COLOURS), exif=b"Exif\0\0nonsense")
    assert np.array_equal(pixels(data), COLOURS)


def test_alpha_is_laid_on_white() -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encode(Image.fromarray(rgba))) - expected).max() <= 0.51


def test_alpha_of_grey_images_is_laid_on_white() -> None:
    grey_alpha = np.random.default_rng(2).integers(0, 256, (5, 7, 2), dtype=np.uint8)
    alpha = grey_alpha[..., 1] / 255
    expected = grey_alpha[..., 0] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encode(Image.fromarray(grey_alpha, "LA")), "L") - expected).max() <= 1


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    expected = [[[10, 20, 30], [255, 255, 255]], [[0, 0, 250], [255, 255, 255]]]
    assert pixels(encode(image, transparency=1)).tolist() == expected
    assert pixels(encode(image, "GIF", transparency=1)).tolist() == expected


def test_half_transparent_palette_colours_are_blended() -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([100, 0, 200, 0, 0, 0])
    blended = pixels(encode(image, transparency=bytes([128, 255])))
    assert np.abs(blended[0, 0] - (np.array([100, 0, 200]) * 128 / 255 + 127)).max() <= 1
    assert blended[0, 1].tolist() == [0, 0, 0]


def test_the_transparent_colour_of_rgb_becomes_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert pixels(encode(image, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65407, 65535]], dtype=np.uint16)
    expected = np.round(values / 257).astype(int)
    for form in ("PNG", "TIFF"):
        assert pixels(encode(Image.fromarray(values), form), "L").tolist() == expected.tolist()
    big_endian = Image.frombytes("I;16B", (4, 2), values.astype(">u2").tobytes())
    assert pixels(encode(big_endian, "TIFF"), "L").tolist() == expected.tolist()


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    pgm = b"P5 2 1 65535\n" + np.array([0, 200], dtype=">u2").tobytes()
    assert pixels(pgm, "L").tolist() == [[0, 1]]


def test_sixteen_bit_colour_keeps_its_range() -> None:
    ppm = b"P6 2 1 65535\n" + np.array([0, 257 * 7, 65535, 257 * 100, 0, 0], dtype=">u2").tobytes()
    assert np.abs(pixels(ppm) - np.array([[[0, 7, 255], [100, 0, 0]]])).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]]), [[0, 128, 255]]),
        (np.array([[0.0, 100.0, 255.0]]), [[0, 100, 255]]),
        (np.array([[-1.0, 0.0, 1.0]]), [[0, 128, 255]]),
        (np.array([[500.0, 600.0, 1000.0]]), [[0, 51, 255]]),
    ],
)
def test_floats_are_scaled_by_the_range_they_lie_in(values: np.ndarray, expected: list[list[int]]) -> None:
    assert pixels(encode(Image.fromarray(values.astype(np.float32)), "TIFF"), "L").tolist() == expected


def test_whole_numbers_beyond_sixteen_bits_are_scaled_by_their_own_range() -> None:
    wide = np.array([[-1000, 0, 100_000]], dtype=np.int32)
    assert pixels(encode(Image.fromarray(wide), "TIFF"), "L").tolist() == [[0, 3, 255]]
    sixteen_bits = np.array([[0, 257, 65535]], dtype=np.int32)
    assert pixels(encode(Image.fromarray(sixteen_bits), "TIFF"), "L").tolist() == [[0, 1, 255]]


def test_floats_that_are_not_finite_are_refused() -> None:
    values = np.array([[0.0, np.nan]], dtype=np.float32)
    assert "not finite" in reason(encode(Image.fromarray(values), "TIFF"))


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert pixels(encode(image, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert np.abs(pixels(encode(image, "JPEG"))[0, 0] - np.array([255, 0, 0])).max() <= 3


def test_one_bit_becomes_black_and_white() -> None:
    image = Image.fromarray(np.array([[True, False], [False, True]]))
    assert pixels(encode(image)).tolist() == [[[255] * 3, [0] * 3], [[0] * 3, [255] * 3]]


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "TIFF"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_a_jpeg_may_be_decoded_smaller_but_its_size_is_the_full_one() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.linear_gradient("L").resize((400, 240)).convert("RGB"), "JPEG", exif=exif)
    picture, size = decode_sized(data, min_side=60)
    assert (picture.size, size) == ((60, 100), (240, 400))  # a quarter
    picture, size = decode_sized(data, min_side=61)
    assert (picture.size, size) == ((120, 200), (240, 400))  # a quarter would be too small
    assert decode(data).size == (240, 400)


# What gives no picture


def test_what_is_no_image_has_a_reason() -> None:
    data = encode(Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    assert reason(b"") == "empty file"
    assert reason(b"hello world, this is text") == "not an image of a known format"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image of a known format"
    assert "truncated" in reason(data[: len(data) // 2])
    jpeg = encode(Image.effect_noise((64, 64), 50), "JPEG")
    assert "truncated" in reason(jpeg[: len(jpeg) // 2])
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    assert reason(bytes(damaged)).startswith("cannot be decoded: ")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = encode(Image.new("1", (1, 1)), "PNG")
    width = header.index(b"IHDR") + 4
    bomb = header[:width] + (60_000).to_bytes(4) * 2 + header[width + 8 :]
    bomb = bomb[: width + 13] + crc32(bomb[width - 4 : width + 13]).to_bytes(4) + bomb[width + 17 :]
    assert reason(bomb) == "more than --max-pixels 178956970"


# Bytes


def test_image_id_is_the_blake2b_of_the_encoded_bytes() -> None:
    assert image_id(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()


def test_bytes_come_from_paths_file_uris_and_links(tmp_path: Path) -> None:
    plain = tmp_path / "a b%20.png"
    plain.write_bytes(b"1")
    (tmp_path / "link").symlink_to(plain)
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(b"2")
    assert read_bytes(str(plain)) == b"1"
    assert read_bytes(str(tmp_path / "link")) == b"1"
    assert read_bytes("file://" + quote(str(plain))) == b"1"
    assert read_bytes("file://" + quote(odd)) == b"2"


def test_what_cannot_be_opened_has_a_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(5_000_000_000)
    expected = {
        str(tmp_path / "none.png"): "no such file",
        str(tmp_path / "broken"): "a broken link",
        str(tmp_path / "fifo"): "not a regular file",
        str(tmp_path / "huge"): "5000000000 bytes, more than --max-image-bytes 268435456",
        "/dev/zero": "not a regular file",
        str(tmp_path): "a folder, not a file",
        "https://example.org/a.jpg": "URLs are not fetched",
        "tar:///a.tar?member=b.jpg": "tar:// is not read",
        "parquet:///none.parquet?row=0": "no such Parquet file",
        "parquet:///none.parquet": "a parquet:// name without ?row=N",
        "a\0b": "cannot be read: embedded null byte",
    }
    for uri, why in expected.items():
        with pytest.raises(UnreadableImage) as problem:
            read_bytes(uri)
        assert why in problem.value.reason, uri


# Parquet


@pytest.fixture
def images_parquet(tmp_path: Path) -> tuple[Path, list[bytes | None]]:
    """A file in Hugging Face's form, rows of 0 to 2000 bytes in groups of 7, one of them null."""
    rng = np.random.default_rng(4)
    values: list[bytes | None] = [rng.bytes(int(size)) for size in rng.integers(0, 2000, 50)]
    values[20] = None
    path = tmp_path / "odd name%2B.parquet"
    structs = [{"bytes": value, "path": None} for value in values]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(structs, kind), "raw jpg": pa.array(values, pa.binary())})
    pq.write_table(table, path, row_group_size=7)
    return path, values


@pytest.mark.parametrize("column", ["", "&column=raw%20jpg"])
@pytest.mark.parametrize("piece_bytes", [parquet_rows.PIECE_BYTES, 1500])
def test_rows_of_parquet_are_read_in_any_order(
    images_parquet: tuple[Path, list[bytes | None]], column: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(parquet_rows, "CACHE_BYTES", 4000)
    path, values = images_parquet
    for row in [*range(50), *np.random.default_rng(5).permutation(50).tolist(), *reversed(range(50))]:
        uri = f"parquet://{quote(str(path))}?row={row}{column}"
        if values[row] is None:
            with pytest.raises(UnreadableImage, match="the row holds no image"):
                read_bytes(uri)
        else:
            assert read_bytes(uri) == values[row]


def test_rows_of_parquet_are_read_by_many_threads(images_parquet: tuple[Path, list[bytes | None]]) -> None:
    path, values = images_parquet
    rows = [row for row in range(50) if values[row] is not None] * 20
    start = threading.Barrier(8)

    def read(row: int) -> bool:
        return read_bytes(f"parquet://{quote(str(path))}?row={row}") == values[row]

    with ThreadPoolExecutor(8, initializer=start.wait) as pool:
        assert all(pool.map(read, rows))


def test_a_parquet_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for value in (b"old", b"newer"):
        pq.write_table(pa.table({"image": pa.array([value], pa.binary())}), path)
        assert read_bytes(f"parquet://{path}?row=0") == value


def test_a_wrong_row_column_or_file_has_a_reason(images_parquet: tuple[Path, list[bytes | None]]) -> None:
    path, _ = images_parquet
    place = f"parquet://{quote(str(path))}"
    (path.parent / "text.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"image": ["a", "b"]}), path.parent / "names.parquet")
    for uri, why in {
        f"{place}?row=50": "there is no row 50; the file has 50",
        f"{place}?row=1&column=x": "there is no column 'x'",
        f"parquet://{path.parent}/text.parquet?row=0": "cannot be read: ",
        f"parquet://{path.parent}/names.parquet?row=0": "holds string, not bytes",
    }.items():
        with pytest.raises(UnreadableImage) as problem:
            read_bytes(uri)
        assert why in problem.value.reason
