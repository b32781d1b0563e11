"""What `doctor` asks in processes of their own: a library that crashes or hangs as it loads costs one line.

Each probe returns plain values; `main` prints them as JSON, the last line on stdout.
"""

import importlib
import json
import os
import warnings
from contextlib import closing
from pathlib import Path

from ..errors import ToolkitError
from ..store.lock import try_lock
from ..store.places import catalog_path

Facts = dict[str, object]
MOST_ENTRIES = 1_000  # chosen: of a catalog, the newest are opened
CODECS = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp", "JPEG 2000": "jpg_2000", "AVIF": "avif", "TIFF": "libtiff"}


def main(name: str) -> None:
    """Print what a probe finds: a library's by its name, or "catalog"."""
    probe = {"torch": torch, "faiss": faiss, "PIL": pillow, "catalog": catalog}.get(name)
    if probe is None:
        importlib.import_module(name)
    print("\n" + json.dumps(probe() if probe else {}))


def torch() -> Facts:
    """Return how torch was built, and the GPUs that it can use."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # why it finds none
        is_available = torch.cuda.is_available()
    devices = []
    for index in range(torch.cuda.device_count() if is_available else 0):
        free, total = torch.cuda.mem_get_info(index)
        named = {"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total}
        with torch.cuda.device(index):
            devices.append({**named, "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False)})
    return {
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "reason": " ".join(str(caught[-1].message).split()) if caught else "",
        "devices": devices,
    }


def faiss() -> Facts:
    """Return whether FAISS was built for GPUs, and how many it sees."""
    import faiss

    return {"built_for_gpus": hasattr(faiss, "StandardGpuResources"), "gpus": faiss.get_num_gpus()}


def pillow() -> Facts:
    """Return the formats that Pillow reads here, with the version of what decodes them."""
    from PIL import features

    from ..store.images import formats

    versions: dict[str, str | None] = {}
    for name, codec in CODECS.items():
        with warnings.catch_warnings(action="ignore"):  # of codecs that this Pillow does not know
            versions[name] = (features.version(codec) or "yes") if features.check(codec) else None
    if features.check("libjpeg_turbo"):
        versions["JPEG"] = f"(libjpeg-turbo {features.version('libjpeg_turbo')})"
    return {"codecs": versions, "formats": len(formats())}


def catalog() -> Facts:
    """Return what state the catalog is in, which is neither mended nor brought up to date."""
    import duckdb

    from ..store import database
    from ..store.manifest import open_manifest

    path = catalog_path().absolute()
    if not path.is_file():
        return {"state": "no file" if path.exists() else "none"}
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        if not try_lock(folder):
            return {"state": "in use"}
        with closing(duckdb.connect(str(path), read_only=True, config=database.OFFLINE)) as connection:
            layout = database.layout(connection, path)
            for query in database.WHOLE if layout else ():
                connection.execute(query).fetchall()
            entries = connection.execute("select path from newest order by time desc").fetchall() if layout else []
    except duckdb.Error as problem:
        if "Could not set lock on file" in str(problem):
            return {"state": "in use"}
        meant = database.translated(path, problem)
        return {"state": "broken" if isinstance(meant, database.Broken) else "unreadable", "reason": str(meant)}
    except ToolkitError as problem:
        return {"state": "unreadable", "reason": str(problem)}
    finally:
        os.close(folder)
    damaged: list[str] = []
    present = [Path(entry[0]) for entry in entries if Path(entry[0]).exists()]
    for entry in [each for each in present if each.suffix == ".parquet"][:MOST_ENTRIES]:
        try:
            open_manifest(entry)
        except (ToolkitError, OSError):
            damaged.append(str(entry))
    counts = {"artifacts": len(entries), "gone": len(entries) - len(present)}
    return {"state": "ok", "layout": layout, **counts, "damaged": damaged}
