"""What an image may cost: told by its header, before it takes memory or time."""

import io
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.preprocess import Preprocess, cropped_values
from dinov2_toolkit.store import limits as module
from dinov2_toolkit.store.files import NotRegularError, check_regular, open_regular
from dinov2_toolkit.store.images import UnreadableImage, decode, read_array, read_bytes
from dinov2_toolkit.store.limits import Limits, limits_of, webp_size
from dinov2_toolkit.store.pixels import decode_picture


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and has no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    header = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def lossless_webp(width: int, height: int) -> bytes:
    """Return 34 bytes that declare a size."""
    bits = (width - 1) | (height - 1) << 14
    return (
        b"RIFF"
        + (26).to_bytes(4, "little")
        + b"WEBPVP8L"
        + (13).to_bytes(4, "little")
        + b"/"
        + bits.to_bytes(4, "little")
        + bytes(9)
    )


def npy(header: bytes, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 if version == 1 else 4, "little") + header


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }\n"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (png(1, 178_000_000), "1 x 178000000 pixels in 65 bytes, as no image has"),
        (png(20_000, 20_000), "more than --max-pixels 178956970"),
        (lossless_webp(16_383, 16_383), "16383 x 16383 pixels, more than --max-pixels 178956970"),
        (lossless_webp(13_000, 13_000), "13000 x 13000 pixels in 34 bytes, as no image has"),
        (npy(b"(\n", 2), "cannot be decoded: "),
        (npy(b"(" * 3000, 2), "cannot be decoded: "),
        (npy(b"'" * 20_000, 2), "cannot be decoded: "),
        (npy(HEADER % b"1000000, 1000000"), "an array of shape (1000000, 1000000) that is cut off"),
        (npy(HEADER % b"-1, 5"), "an array of shape (-1, 5); it must be"),
        (npy(HEADER.replace(b"|u1", b"O") % b"1, 1") + b"\x80", "an array of object; only uint8 and uint16"),
        (b"\x93NUMPY", "cannot be decoded: "),
        (b"RIFF\0\0\0\0WEBP", "not an image of a known format"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_asks_for_too_much_is_refused_at_once(data: bytes, why: str) -> None:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImage) as problem:
        decode(data)
    assert why in problem.value.reason
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_limits_may_be_set_for_every_kind_of_image() -> None:
    image = Image.effect_noise((40, 25), 50)
    small, exact = Limits(max_pixels=999), Limits(max_pixels=1000)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(image))
    kinds = [encoded(image, form) for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")]
    for data in [*kinds, buffer.getvalue()]:
        for in_chans, bit_depth in [(3, 8), (1, 16)]:
            if in_chans == 3 or data == kinds[0] or data == buffer.getvalue():
                assert decode_picture(data, in_chans, bit_depth, limits=exact)[1] == (40, 25)
            with pytest.raises(UnreadableImage, match="40 x 25 pixels, more than --max-pixels 999"):
                decode_picture(data, in_chans, bit_depth, limits=small)
        with pytest.raises(UnreadableImage, match="bytes, more than --max-image-bytes"):
            decode_picture(data, 3, 8, limits=Limits(max_image_bytes=len(data) - 1))
        assert decode_picture(data, 3, 8, limits=Limits(max_image_bytes=len(data)))[1] == (40, 25)


def test_arrays_of_either_order_and_byte_order_are_read() -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (5, 7, 4), dtype=np.uint16)
    for stored in (values, np.asfortranarray(values), values.astype(">u2")):
        buffer = io.BytesIO()
        np.save(buffer, stored)
        found = read_array(buffer.getvalue())
        assert found.dtype == np.dtype("=u2")
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"save_all": True, "append_images": [Image.new("L", (70, 50))]}]
)
def test_the_size_of_a_webp_file_is_known_before_it_is_opened(options: dict[str, object]) -> None:
    assert webp_size(encoded(Image.effect_noise((70, 50), 50), "WEBP", **options)) == (70, 50)
    assert webp_size(encoded(Image.new("L", (70, 50)), "PNG")) is None


def test_a_jpeg_of_a_thousand_scans_is_refused_and_one_of_ten_is_read() -> None:
    data = encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    assert decode(data).size == (64, 64)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(UnreadableImage, match=r"a JPEG of 10\d\d scans; at most 100"):
        decode(data[:last] + data[last:-2] * 1000 + data[-2:])


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
def test_a_thin_image_is_squeezed_in_little_memory(size: tuple[int, int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = cropped_values(Image.new("RGB", size, (10, 20, 30)), Preprocess(224, None, (0,) * 3, (1,) * 3))
    assert (values == np.array([10, 20, 30])[:, None, None]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; 2.7 GB, row by row


def test_large_images_ask_for_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "ask_for_memory", asked.append)
    flat = Image.new("L", (3000, 2000), 50)
    for form, options in [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})]:
        decode_picture(encoded(flat, form, **options), 1, 8, min_side=100)
    pixels = 6_000_000
    assert asked == [8 * pixels, 8 * pixels // 64 + 6 * pixels, 16 * pixels, 8 * pixels]  # JPEG is read at an eighth


def write_rows(path: Path, values: list[bytes], **options: object) -> Callable[[int], str]:
    pq.write_table(pa.table({"image": pa.array(values, pa.binary())}), path, **options)
    return lambda row: f"parquet://{path}?row={row}"


def test_rows_of_parquet_have_the_same_limit(tmp_path: Path) -> None:
    row = write_rows(tmp_path / "a.parquet", [b"1" * 100, b"2" * 1001, b"3" * 1000])
    limits = Limits(max_image_bytes=1000)
    assert (len(read_bytes(row(0), limits)), len(read_bytes(row(2), limits))) == (100, 1000)
    with pytest.raises(UnreadableImage, match="bytes, more than --max-image-bytes"):
        read_bytes(row(1), limits)


def test_a_row_that_unpacks_to_gigabytes_is_not_read(tmp_path: Path) -> None:
    bomb, alone = bytes(60_000_000), tmp_path / "alone.parquet"
    one = write_rows(alone, [bomb], compression="zstd")
    among = write_rows(tmp_path / "among.parquet", [b"small", bomb], compression="zstd")
    assert alone.stat().st_size < 20_000
    del bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for uri, why in [
        (one(0), r"rows of 60000\d* bytes each, more than"),
        (among(1), r"bytes that unpack to 60,0\d\d,\d\d\d"),
    ]:
        with pytest.raises(UnreadableImage, match=why):
            read_bytes(uri, Limits(max_image_bytes=20_000_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# Regular files only


@pytest.fixture(params=["fifo", "socket", "device"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "odd"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


def in_time(function: Callable[[], object], seconds: float = 5) -> None:
    """Run a function, and fail when it hangs."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()
    if problems:
        raise problems[0]


def test_what_is_no_regular_file_is_not_opened(irregular: Path) -> None:
    for uri in (str(irregular), f"parquet://{irregular}?row=0"):
        with pytest.raises(UnreadableImage, match="not a regular file|a named pipe|a socket|a device|No such device"):
            in_time(lambda uri=uri: read_bytes(uri))  # type: ignore[misc]
    with pytest.raises((NotRegularError, OSError)):
        in_time(lambda: open_regular(irregular))
    with pytest.raises(ToolkitError, match="not a regular file; name a file"):
        check_regular(irregular)


def test_files_and_what_is_missing_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    for name in ("file", "nothing", ""):
        assert check_regular(tmp_path / name) == tmp_path / name
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"


def test_the_environment_sets_limits_for_all_commands() -> None:
    assert limits_of({}) == Limits()
    given = {"DINOV2_MAX_PIXELS": "5", "DINOV2_MAX_IMAGE_BYTES": "6", "DINOV2_IMAGE_TIMEOUT": "0.5"}
    assert limits_of(given) == Limits(5, 6, 0.5)
    for text in ("x", "0", "-1", "1.5", "nan"):
        with pytest.raises(ToolkitError, match=f"DINOV2_MAX_PIXELS is '{text}', no number above 0"):
            limits_of({"DINOV2_MAX_PIXELS": text})
    with pytest.raises(ToolkitError, match="DINOV2_IMAGE_TIMEOUT is 'inf'"):
        limits_of({"DINOV2_IMAGE_TIMEOUT": "inf"})
    command = [sys.executable, "-m", "dinov2_toolkit", "--help"]
    ended = subprocess.run(command, env={**os.environ, "DINOV2_MAX_PIXELS": "x"}, capture_output=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == b"error: DINOV2_MAX_PIXELS is 'x', no number above 0; give one, or unset it\n"
