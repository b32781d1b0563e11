"""Content ids of Parquet files: BLAKE2b-128 digests, in hex."""

import hashlib
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


SAMPLE_BYTES = 65_536  # chosen


class HashingFile(BufferedWriter):
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "w"))
        self.digest = hashlib.blake2b(digest_size=16)

    def write(self, data: "ReadableBuffer") -> int:
        """Write bytes, and add them to the digest."""
        self.digest.update(data)
        return super().write(data)


def data_content_id(path: Path) -> str:
    """Read a file that a step wrote and return its content id: the digest of everything before the footer."""
    digest = hashlib.blake2b(digest_size=16)
    left = _data_bytes(path)
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def foreign_content_id(path: Path) -> str:
    """Return a cheap content id for a Parquet file of other origin: of size, footer and 64 samples of 64 KiB.

    These are all of a file of up to 4 MiB. Of a larger one the time stamp counts too, so that no change is missed.
    """
    stat = path.stat()
    size, stamp = stat.st_size, f" {stat.st_mtime_ns}" if stat.st_size > 64 * SAMPLE_BYTES else ""
    digest = hashlib.blake2b(f"{size}{stamp}".encode(), digest_size=16)
    with path.open("rb") as file:
        for position in sorted({size * part // 64 for part in range(64)} | {_data_bytes(path)}):
            file.seek(position)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _data_bytes(path: Path) -> int:
    """Return how many bytes of a Parquet file stand before its footer."""
    footer_bytes: int = pq.read_metadata(path).serialized_size
    return path.stat().st_size - footer_bytes - 8  # the footer's length and a mark end the file, 4 bytes each
