"""One image of every group of near-duplicates, or of exact copies.

Source: section 3 and appendix A.4 of Oquab et al. 2023 (DINOv2).
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings
from ...features.sheet import check_picture_name, check_sheet
from ...store.artifact import Options, Result, check_manifest_name, check_side_file, is_up_to_date, recorded
from ...store.manifest import Provenance, open_manifest, removed_path
from ...store.memory import memory_budget
from ..inputs import Input, check_same_model, describe, open_input
from ..selection import selection_provenance
from .decisions import say_verdict, write_verdict
from .exact import Exact, exact_duplicates, exact_work
from .groups import Linkage
from .near import NearSettings, are_looked_at, near_duplicates
from .representative import parse_keep
from .sheet import draw_groups
from .verify import LOOKED_AT

LOOK_S = 0.75e-3  # measured: of one core, a pair
MUTUAL = 0.7  # measured: pairs of an image and one of the nearest to it, of all that there could be


@dataclass(frozen=True)
class DedupSettings:
    """What `dinov2 curate dedup` can be told, beside the options that all commands share."""

    threshold: float | None = None  # None: that of the known images, else learnt from the pool
    k: int = 64
    against: tuple[Path, ...] = ()
    against_threshold: float | None = None  # None: the same as `threshold`
    keep: str = "largest"  # largest, first, column:NAME or column:NAME=A,B
    features: Path | None = None
    linkage: Linkage = "components"
    known: tuple[Path, ...] = ()  # images that are kept already: what duplicates one of them goes
    exact: Exact | None = None  # None: near-duplicates by their vectors
    sheet: Path | None = None  # where to draw groups
    where: str | None = None  # SQL condition that rows of the manifest must fulfil
    memory: str | None = None  # such as 3GB; None: a third of the machine
    recall: float = 0.99
    verify: bool | None = None  # whether pixels decide; None: with the descriptor `copy` and no threshold


def dedup_images(manifest: Path | None, output: str, settings: DedupSettings, options: Options) -> Result | None:
    """Write one image of every group of duplicates, and the others with what they duplicate.

    Returns None after a dry run.
    """
    path = check_manifest_name(output)
    _check(settings)
    pool = open_input("manifest", manifest, path, settings.features, settings.where)
    known = [open_input("known", each, path) for each in settings.known]
    evaluation = [open_input("against", each, path) for each in settings.against]
    keep = parse_keep(settings.keep, pool.manifest)
    for part in (pool, *known, *evaluation):
        if part.num_rows() == 0:
            raise ToolkitError(f"{part.manifest.path} ({part.role}) has no rows; there is nothing to compare")
        if part is not pool and settings.exact is None:
            check_same_model(pool, part)
    memory = memory_budget(settings.memory)
    provenance = _provenance(path, settings, options, [pool, *known, *evaluation])
    is_made = is_up_to_date(path, provenance, options)
    if not is_made:
        check_side_file(removed_path(path), "removed", path, provenance, options)
        if settings.sheet is not None:
            check_sheet(settings.sheet, options)
    if options.dry_run:
        if not is_made:
            _describe(path, [pool, *known, *evaluation], settings, options)
        return None

    if not is_made:
        with recorded(path) as finished:
            if settings.exact is not None:
                verdict = exact_duplicates(
                    settings.exact, pool, known, evaluation, keep, limit=options.limit, memory=memory
                )
            else:
                search = SearchSettings(memory, settings.recall, options.seed)
                near = NearSettings(
                    settings.threshold,
                    settings.against_threshold,
                    settings.k,
                    settings.linkage,
                    keep,
                    search,
                    settings.verify,
                )
                verdict = near_duplicates(pool, known, evaluation, near, options.limit)
            say_verdict(verdict)
            finished.append(write_verdict(path, verdict, provenance))
    if settings.sheet is not None:
        draw_groups(path, settings.sheet, options)
    made = open_manifest(path)
    return Result(output, {} if made.provenance is None else made.provenance.figures)


def _check(settings: DedupSettings) -> None:
    for name, value in (("--threshold", settings.threshold), ("--against-threshold", settings.against_threshold)):
        if value is not None and not -1 <= value <= 1:
            raise ToolkitError(f"{name} {value} is no cosine similarity; give a number from -1 to 1")
        if value is not None and settings.exact is not None:
            raise ToolkitError(f"{name} {value} with --exact {settings.exact}, which compares no vectors; drop one")
    if settings.verify and settings.exact is not None:
        raise ToolkitError(f"--verify with --exact {settings.exact}, which takes equal {settings.exact} only; drop one")
    if settings.k < 1:
        raise ToolkitError(f"--k {settings.k} leaves no neighbours to look at; give 1 or more")
    if not 0 < settings.recall <= 1:
        raise ToolkitError(f"--recall {settings.recall} is no share of the neighbours; give a number above 0, up to 1")
    if settings.against_threshold is not None and not settings.against:
        raise ToolkitError(
            f"--against-threshold {settings.against_threshold} without --against; name the evaluation set"
        )
    if settings.sheet is not None:
        check_picture_name(str(settings.sheet))


def _provenance(path: Path, settings: DedupSettings, options: Options, inputs: list[Input]) -> Provenance:
    parameters: dict[str, object] = {
        "threshold": settings.threshold,
        "k": settings.k,
        "against_threshold": settings.against_threshold,
        "keep": settings.keep,
        "linkage": settings.linkage,
        "exact": settings.exact,
        "recall": settings.recall,
        "verify": settings.verify,
    }
    provenance = selection_provenance("curate dedup", parameters, path, options, *inputs)
    return provenance if provenance.base is not None else replace(provenance, kind="images")


def _describe(path: Path, inputs: list[Input], settings: DedupSettings, options: Options) -> None:
    num_rows = [part.num_rows(options.limit if part is inputs[0] else None) for part in inputs]
    if settings.exact is not None:
        console.say(f"would {exact_work(settings.exact, inputs, options.limit)}, and write {path}")
        return
    what = "compare all with all" + (f" and {sum(num_rows[1:]):,} other images" if len(inputs) > 1 else "")
    if are_looked_at(settings.verify, settings.threshold, inputs):
        num_pairs = int(MUTUAL * min(settings.k, LOOKED_AT) * num_rows[0])
        minutes = num_pairs * LOOK_S / (os.cpu_count() or 1) / 60
        what += (
            f", look at the pixels of some {num_pairs:,} pairs ({minutes:,.0f} minutes more, and reading the images)"
        )
    describe(path, inputs, num_rows[0] * sum(num_rows), what, options)
