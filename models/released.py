"""The weights that the DINOv2 authors released, by name: where they are, how large, under which licence; and `pull`.

Only `pull` uses the network. Names are those of the official hub code.
Source: README.md and MODEL_CARD.md of github.com/facebookresearch/dinov2 for addresses and licence. The authors publish
no digests; these are what independent projects recorded of the same files.
"""

import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import file_digest
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from ..errors import ToolkitError, nearest
from ..store.places import weights_folder

ADDRESS = "https://dl.fbaipublicfiles.com/dinov2"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0  # chosen: without a byte for so long, a download has failed
ATTEMPTS = 5  # chosen: how often a connection may break before it is an error; each goes on where the last ended


@dataclass(frozen=True)
class ReleasedWeights:
    """A file of weights that anyone can fetch."""

    name: str
    arch: str  # in models.build.ARCHITECTURES
    num_register_tokens: int
    address: str
    size: int  # bytes
    sha256: str
    licence: str = "Apache-2.0"


def _released(arch: str, registers: int, size: int, digest: str) -> ReleasedWeights:
    folder = f"dinov2_vit{arch[4]}14"  # vit_small -> dinov2_vits14
    file = f"{folder}_reg{registers}_pretrain.pth" if registers else f"{folder}_pretrain.pth"
    name = f"{folder}_reg" if registers else folder
    return ReleasedWeights(name, arch, registers, f"{ADDRESS}/{folder}/{file}", size, digest)


_ALL = (
    _released("vit_small", 0, 88_283_115, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    _released("vit_base", 0, 346_378_731, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    _released("vit_large", 0, 1_217_586_395, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    _released("vit_giant2", 0, 4_546_108_579, "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"),
    _released("vit_small", 4, 88_291_785, "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"),
    _released("vit_base", 4, 346_393_545, "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
    _released("vit_large", 4, 1_217_607_321, "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"),
    _released("vit_giant2", 4, 4_546_140_349, "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283"),
)
RELEASED = {weights.name: weights for weights in _ALL}


def find_released(name: str) -> ReleasedWeights:
    """Return the released weights of a name, on $DINOV2_MIRROR if that is set; raise ToolkitError if there are none."""
    if name not in RELEASED:
        near = nearest(name, RELEASED)
        raise ToolkitError(f"no released weights named {name!r}{near}; choose one of {', '.join(RELEASED)}")
    weights, mirror = RELEASED[name], os.environ.get("DINOV2_MIRROR")
    if not mirror:
        return weights
    if not mirror.startswith(("https://", "http://")):
        raise ToolkitError(f"DINOV2_MIRROR is {mirror!r}; give an address that begins with https:// or http://")
    return replace(weights, address=mirror.rstrip("/") + weights.address.removeprefix(ADDRESS))


def cached_weights(name: str) -> Path:
    """Return where the released weights of a name are once they are pulled."""
    return weights_folder() / f"{name}.pth"


def pull(weights: ReleasedWeights, file: Path, advance: Callable[[int], None]) -> None:
    """Fetch weights to a file, resuming where an earlier attempt was cut off, and check size and digest.

    What has come so far stands beside the file as NAME.part; the file itself appears whole or not at all.

    Args:
        advance: called with the number of bytes that came in, those of an earlier attempt included.

    Raises:
        ToolkitError: if the server cannot be reached or has no such file, the connection keeps breaking, or what came
            is not what was released.
    """
    part = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    advance(_size_of(part))
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch_rest(weights, part, advance)
            break
        except (HTTPException, TimeoutError, ConnectionError) as problem:  # cut off on the way: what came is kept
            if attempt == ATTEMPTS:
                raise ToolkitError(
                    f"{weights.address} broke off {ATTEMPTS} times ({_reason(problem)}), "
                    f"{_size_of(part):,} of {weights.size:,} bytes are kept; run the command again to go on"
                ) from None
    with part.open("rb") as content:
        digest = file_digest(content, "sha256").hexdigest()
    size = _size_of(part)
    if (size, digest) != (weights.size, weights.sha256):
        part.unlink()
        raise ToolkitError(
            f"what came from {weights.address} is not what was released: {size:,} bytes, sha256 {digest[:16]}..., "
            f"expected {weights.size:,}, {weights.sha256[:16]}...; removed, pull again"
        )
    os.replace(part, file)


def _fetch_rest(weights: ReleasedWeights, part: Path, advance: Callable[[int], None]) -> None:
    """Append to the part what is missing; with a server that knows no ranges, begin anew."""
    have = _size_of(part)
    if have >= weights.size:
        return
    headers = {"User-Agent": "dinov2-toolkit", "Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with _open(weights, urllib.request.Request(weights.address, headers=headers)) as answer:  # noqa: S310  # https or http, see find_released
        if answer.status != 206:  # the whole file
            advance(-have)
            have = 0
        size = have + int(answer.headers.get("Content-Length", weights.size - have))
        if size != weights.size:
            raise ToolkitError(
                f"{weights.address} has {size:,} bytes instead of {weights.size:,}: not the weights; check the mirror"
            )
        with part.open("ab" if have else "wb") as out:
            while chunk := answer.read(CHUNK_BYTES):
                advance(out.write(chunk))
            have = out.tell()
            out.flush()
            os.fsync(out.fileno())
    if have < weights.size:  # `read` in chunks ends without complaint where the connection does
        raise ConnectionError(f"ended after {have:,} bytes")


def _open(weights: ReleasedWeights, request: urllib.request.Request) -> HTTPResponse:
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310  # likewise
        return answer
    except urllib.error.HTTPError as problem:
        raise ToolkitError(
            f"{weights.address}: the server answers {problem.code} {problem.reason}; check the address, or fetch "
            f"{weights.name} by other means and name the file"
        ) from None
    except urllib.error.URLError as problem:
        if isinstance(problem.reason, ConnectionResetError | TimeoutError):
            raise ConnectionError(_reason(problem.reason)) from None
        host = urllib.parse.urlsplit(weights.address).netloc
        raise ToolkitError(
            f"cannot reach {host} ({_reason(problem.reason)}); pull {weights.name} when online, or name a file that "
            "was fetched elsewhere"
        ) from None


def _reason(problem: object) -> str:
    if isinstance(problem, socket.gaierror):
        return "its address is not known here: offline?"
    return str(getattr(problem, "strerror", None) or problem or type(problem).__name__)


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
