"""Where the toolkit's own files are: the catalog, the cache beside it, and pulled weights."""

import os
from pathlib import Path

from ..errors import ToolkitError


def catalog_path() -> Path:
    """Return where the catalog is: $DINOV2_CATALOG, else .dinov2/catalog.duckdb under the working folder."""
    return Path(os.environ.get("DINOV2_CATALOG") or ".dinov2/catalog.duckdb")


def cache_path() -> Path:
    """Return where the cache is or will be: `.dinov2/cache`, beside the catalog."""
    beside = catalog_path().parent
    return (beside if beside.absolute().name == ".dinov2" else beside / ".dinov2") / "cache"


def weights_folder() -> Path:
    """Return where pulled weights are: $DINOV2_CACHE/models, else dinov2-toolkit/models in the user's cache.

    That is $XDG_CACHE_HOME, else ~/.cache. Raises ToolkitError when no home folder is known.
    """
    if own := os.environ.get("DINOV2_CACHE"):
        return Path(own) / "models"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise ToolkitError("no home folder is known for pulled weights; set DINOV2_CACHE to a folder") from None
    return cache / "dinov2-toolkit" / "models"
