"""One image of every group of near-duplicates, or of exact copies.

Which images are near-duplicates is decided in `near_duplicates`, which are exact ones in `exact_duplicates`.
Source: section 3 and appendix A.4 of Oquab et al. 2023 (DINOv2).
"""

from dataclasses import replace
from pathlib import Path

from ... import console
from ...cores import usable_cores
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings
from ...features.sheet import check_sheet
from ...store.artifact import Options, Result, check_manifest_name, make
from ...store.lock import writing
from ...store.manifest import Provenance, removed_path
from ...store.memory import memory_budget
from ..inputs import Input, check_same_model, describe, open_input
from ..selection import selection_provenance
from .decisions import say_decisions, write_decisions
from .exact_duplicates import describe_exact, find_exact_duplicates
from .near_duplicates import find_near_duplicates, is_verified
from .representative import parse_keep
from .settings import DedupSettings
from .sheet import draw_groups
from .verify import NUM_VERIFIED

PAIR_S = 0.75e-3  # measured: of one core, to verify a pair
MUTUAL = 0.7  # measured: different pairs of an image and one of its nearest, as a share of all such pairs


def dedup_images(manifest: Path | None, output: str, settings: DedupSettings, options: Options) -> Result | None:
    """Write one image of every group of duplicates, and the others with what they duplicate.

    Returns None after a dry run.
    """
    path = check_manifest_name(output)
    settings.check()
    pool = open_input("manifest", manifest, path, settings.features, settings.where)
    known = [open_input("known", each, path) for each in settings.known]
    inputs = [pool, *known, *(open_input("against", each, path) for each in settings.against)]
    keep = parse_keep(settings.keep, pool.manifest)
    for part in inputs:
        if part.num_rows() == 0:
            raise ToolkitError(f"{part.manifest.path} ({part.role}) has no rows; there is nothing to compare")
        if part is not pool and settings.exact is None:
            check_same_model(pool, part)
    memory = memory_budget(settings.memory)
    provenance = selection_provenance("curate dedup", settings.parameters(), path, options, *inputs)
    if provenance.base is None:
        provenance = replace(provenance, kind="images")

    def describe_work() -> None:
        if settings.sheet is not None:
            check_sheet(settings.sheet, provenance, options)
        _describe(path, inputs, settings, options)

    def work() -> Provenance:
        if settings.sheet is not None:
            check_sheet(settings.sheet, provenance, options)
        if settings.exact is not None:
            decisions = find_exact_duplicates(settings.exact, inputs, len(known), keep, options.limit, memory)
        else:
            search = SearchSettings(memory, settings.recall, options.seed)
            decisions = find_near_duplicates(inputs, len(known), settings, keep, search, options.limit)
        say_decisions(decisions)
        return write_decisions(path, decisions, provenance)

    side_files = {removed_path(path): "removed"}
    result = make(output, provenance, options, describe=describe_work, work=work, side_files=side_files)
    if result is not None and settings.sheet is not None:
        with writing(settings.sheet):
            draw_groups(path, settings.sheet, options)
    return result


def _describe(path: Path, inputs: list[Input], settings: DedupSettings, options: Options) -> None:
    if settings.exact is not None:
        console.say(f"would {describe_exact(settings.exact, inputs, options.limit)}, and write {path}")
        return
    num, *num_others = [part.num_rows(None if number else options.limit) for number, part in enumerate(inputs)]
    what = "compare all with all" + (f" and {sum(num_others):,} other images" if num_others else "")
    if is_verified(settings, inputs):
        num_pairs = int(MUTUAL * min(settings.k, NUM_VERIFIED) * num)
        minutes = num_pairs * PAIR_S / usable_cores() / 60
        what += f", verify some {num_pairs:,} pairs by pixels ({minutes:,.0f} minutes more, and reading the images)"
    describe(path, inputs, num * (num + sum(num_others)), what, options)
