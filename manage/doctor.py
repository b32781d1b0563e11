"""`dinov2 doctor`: what the toolkit finds on this machine, and what to do where that stands in its way.

It uses no network and writes nothing but a probe file into each folder, `.dinov2-HOST-PID-NUMBER.tmp`, removed at once.
Libraries are loaded in processes of their own (`probes.py`).
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any  # of values that came as JSON

from packaging.requirements import Requirement

from .. import console
from ..errors import ToolkitError, nearest
from ..store.files import abandoned, open_regular
from ..store.lock import is_held
from ..store.places import cache_path, catalog_path
from .machine import Finding, folder_findings, gpu_findings, limit_findings

LIBRARIES = ("torch", "accelerate", "faiss", "duckdb", "pyarrow", "PIL", "numpy", "safetensors")
PROBED = (*LIBRARIES, "catalog")
LOAD_S = 120.0  # chosen: for which a library may take to load, from a network file system
VARIABLES = ("CATALOG", "CACHE", "CACHE_BYTES", "MIRROR", "CPU_PATHS", "DEBUG", "LAUNCHED", "GOLDEN")  # DINOV2_...
OTHER_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "TMPDIR", "WORLD_SIZE")
UNFINISHED = re.compile("(progress|clustering|embed)-[0-9a-f]+")  # folders in the cache


def doctor(as_json: bool) -> None:
    """Print what every check found, a line each or as one object. Raises ToolkitError when one found a problem."""
    with ThreadPoolExecutor() as threads:
        probed = dict(zip(PROBED, threads.map(_probe, PROBED), strict=True))
    findings = [*_software(probed), _codecs(probed["PIL"]), *gpu_findings(probed["torch"], probed["faiss"])]
    findings += [*limit_findings(), *folder_findings(), _catalog(probed["catalog"]), *_left(), *_environment()]
    bad = [each for each in findings if each.status == "problem"]
    if as_json:
        checks = {
            each.check.replace(" ", "_"): {key: getattr(each, key) for key in ("status", "found", "to_do", "figures")}
            for each in findings
        }
        num_warnings = sum(each.status == "warning" for each in findings)
        print(json.dumps({"problems": len(bad), "warnings": num_warnings, "checks": checks}))
    else:
        for each in findings:
            print(console.plain(f"{each.status:<8} {each.check}: {each.found}{each.to_do and f'; {each.to_do}'}"))
    if bad:
        found = f"{len(bad)} of {len(findings)} checks found a problem, first {bad[0].check}"
        raise ToolkitError(f"{found}; {bad[0].to_do}")


def _probe(name: str) -> dict[str, Any] | str:
    """Return what a probe finds in a process of its own, or why it finds nothing."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.probes import main; main({name!r})"
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(  # noqa: S603  # this Python
            command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=LOAD_S
        )
    except subprocess.TimeoutExpired:
        return f"does not load within {LOAD_S:g} seconds"
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or [""])[-1][:300]
    return f"does not load ({last or f'its process ends by {done.returncode}'})"


def _software(probed: dict[str, Any]) -> Iterator[Finding]:
    """Yield versions, and the libraries that do not load or are not of the version that is needed."""
    yield Finding("toolkit", f"{version('dinov2-toolkit')} at {Path(__file__).parent.parent}")
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("python", f"{platform.python_version()} at {sys.executable}, {system}")
    extras: dict[str, list[str]] = {}  # what is missing of each
    for needed in map(Requirement, requires("dinov2-toolkit") or []):
        have, fits = None, False
        with suppress(PackageNotFoundError):
            have = version(needed.name)
            fits = needed.specifier.contains(have, prereleases=True)
        if (extra := re.search(r"""extra == ["'](\w+)""", str(needed.marker))) is not None:
            extras.setdefault(extra[1], []).extend([] if fits else [needed.name])
        elif needed.marker is None or needed.marker.evaluate():
            yield _library(needed, have, fits, probed)
    for name, missing in extras.items():
        found = f"not installed ({', '.join(missing)}), pip install 'dinov2-toolkit[{name}]' if you need it"
        yield Finding(f"extra {name}", found if missing else "installed", figures={"missing": missing})


def _library(needed: Requirement, have: str | None, fits: bool, probed: dict[str, Any]) -> Finding:
    facts = probed.get("PIL" if needed.name == "pillow" else needed.name.removesuffix("-gpu").removesuffix("-cpu"))
    to_do = f"pip install '{needed.name}{needed.specifier}'"
    if have is None:
        return Finding(needed.name, "not installed", problem=to_do)
    if isinstance(facts, str):
        return Finding(needed.name, f"{have} {facts}", problem=f"install it again: {to_do} --force-reinstall")
    if not fits:
        return Finding(needed.name, f"{have}, but {needed.specifier} is needed", problem=to_do)
    gpus = {True: ", built for GPUs", False: ", built for CPUs", None: ""}[(facts or {}).get("built_for_gpus")]
    return Finding(needed.name, f"{have}{gpus}", figures={"version": have, **(facts or {})})


def _codecs(pillow: dict[str, Any] | str) -> Finding:
    """Return which images can be decoded, by which versions of libraries."""
    if isinstance(pillow, str):
        return Finding("image formats", f"Pillow {pillow}", problem="install Pillow again")
    missing = [name for name, found in pillow["codecs"].items() if not found]
    found = ", ".join(f"{name} {codec}" for name, codec in pillow["codecs"].items() if codec)
    found += f" and others, {pillow['formats']} in all" + (f"; without {', '.join(missing)}" if missing else "")
    return Finding("image formats", found, warning="pip install --upgrade pillow" if missing else "", figures=pillow)


def _catalog(catalog: dict[str, Any] | str) -> Finding:
    """Return the state of the catalog."""
    path = catalog_path()
    facts = {"state": "unreadable", "reason": catalog} if isinstance(catalog, str) else catalog
    match facts["state"]:
        case "none":
            return Finding("catalog", f"none yet at {path}", figures=facts)
        case "no file":
            return Finding("catalog", f"{path} is no regular file", problem="set DINOV2_CATALOG to another")
        case "in use":
            return Finding("catalog", f"{path} is in use by another process", "ask again when that is done")
        case "broken":
            to_do = "the next command sets it aside and makes it again from the files it knew"
            return Finding("catalog", f"{path} is broken ({facts['reason']})", to_do, figures=facts)
        case "unreadable":
            to_do = "mend that, or set DINOV2_CATALOG to another"
            return Finding("catalog", f"{path} cannot be read ({facts['reason']})", problem=to_do, figures=facts)
    found = f"{path} of layout {facts['layout']}: {facts['artifacts']:,} artifacts, {facts['gone']:,} of them gone"
    if damaged := facts["damaged"]:
        found += f", {len(damaged):,} damaged, first {damaged[0]}"
    return Finding("catalog", found, "make the damaged ones again" if damaged else "", figures=facts)


def _left() -> Iterator[Finding]:
    """Yield what killed and stopped commands left."""
    left: set[str] = set()
    for folder in (Path(), catalog_path().parent, cache_path()):
        with suppress(OSError):
            unfinished = [path for path in folder.iterdir() if UNFINISHED.fullmatch(path.name)]
            left |= {str(path.absolute()) for path in (*abandoned(folder), *unfinished)}
    to_do = "the same commands go on from them; `dinov2 catalog gc` removes what is in the cache" if left else ""
    yield Finding("leftovers", f"{len(left)} of stopped or killed commands", to_do, figures={"paths": sorted(left)})
    runs = []
    for status in sorted([*Path().glob("*/status.json"), *Path().glob("runs/*/status.json")]):
        with suppress(OSError, ValueError, AttributeError):
            with open_regular(status) as file:
                has_ended_well = json.load(file).get("exit_code") == 0
            if not has_ended_well and not is_held(status.with_name(".lock")):
                runs.append(str(status.parent))
    to_do = f"go on with `dinov2 train ... -o {runs[0]} --resume`" if runs else ""
    yield Finding("unfinished runs", ", ".join(runs) or "none here", to_do, figures={"paths": runs})


def _environment() -> Iterator[Finding]:
    """Yield how names are printed, and the variables that change what commands do."""
    is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    yield Finding("encoding", sys.stdout.encoding, "" if is_utf8 else "set PYTHONUTF8=1, or names are shown escaped")
    from ..train.config import TrainConfig  # whose keys can be set by variables too

    known = [f"DINOV2_{name}" for name in (*VARIABLES, *(each.name.upper() for each in fields(TrainConfig)))]
    for name in sorted(os.environ):
        shown = re.sub("//[^/@]*@", "//...@", os.environ[name])  # no passwords of mirrors
        if name.startswith("DINOV2_") and name not in known:
            yield Finding(name, f"{shown!r} means nothing", f"unset it{nearest(name, known)}")
        elif name == "DINOV2_CACHE_BYTES" and not shown.isdigit():
            yield Finding(name, f"{shown!r} is no number of bytes", problem="give one, or unset it")
        elif name.startswith("DINOV2_") or name in OTHER_VARIABLES:
            yield Finding(name, repr(shown))
