"""The sections of a report on manifests."""

from collections.abc import Mapping

from ..features.page import parts
from ..features.page.document import Section
from ..store.manifest import Manifest


def manifest_sections(manifests: Mapping[str, Manifest], *, seed: int) -> list[Section]:
    """Return the sections on manifests of any kind but scores, by the names that the page calls them.

    `seed` draws what is shown where there is too much. What cannot be read any more is said in the section.
    """
    if not manifests:
        return []
    rows = [
        [name, manifest.num_rows, "" if manifest.provenance is None else manifest.provenance.command]
        for name, manifest in manifests.items()
    ]
    return [Section("Manifests", [parts.table("Manifests", ["name", "images", "made by"], rows)])]
