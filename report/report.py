"""`dinov2 report`: one page of runs, manifests and scores, in the order in which a project makes them.

Each kind has a module with a function from its targets, by name, to sections:
`manifest.manifest_sections`, `run.run_sections`, `scores.score_sections`.
"""

import os
from dataclasses import replace

from .. import console
from ..errors import ToolkitError
from ..features.page.document import check_page_name, page_provenance, render, write_page
from ..store.artifact import Options, Result
from ..store.lock import writing
from ..store.manifest import Provenance
from .manifest import manifest_sections
from .manifest_map import map_assets
from .manifest_parts import style
from .run import run_sections
from .scores import score_sections
from .targets import Targets, open_targets


def report(names: list[str], output: str, options: Options) -> Result | None:
    """Write a page of what the names stand for; return None after a dry run.

    A report that stands at the output already is made again where its targets changed.
    Raises ToolkitError when a name is no run, manifest or scores, or the output is a file that is no report.
    """
    path = check_page_name(output)
    targets = open_targets(names)
    provenance = Provenance("page", "report", {}, options.seed, targets.sources())
    there = page_provenance(path) if path.exists() else None
    if path.exists() and not options.force:
        if there is None or there.command != provenance.command:
            raise ToolkitError(f"{path} exists and is no report of ours; choose another -o, or --force to overwrite it")
        if there.same_work(provenance):
            console.say(f"{path} is up to date")
            if not options.dry_run:
                os.utime(path)
            return None if options.dry_run else Result(output, there.figures)
    counts = {"runs": len(targets.runs), "manifests": len(targets.manifests), "scores": len(targets.scores)}
    if options.dry_run:
        described = ", ".join([*targets.runs, *targets.manifests, *targets.scores])
        console.say(f"would write a report of {described} to {path}")
        return None
    made = replace(provenance, figures=dict(counts))
    with writing(path):
        write_page(_page(targets, made), path)
    return Result(output, made.figures)


def _page(targets: Targets, provenance: Provenance) -> str:
    names = [*targets.manifests, *targets.runs, *targets.scores]
    sections = [
        *manifest_sections(targets.manifests, seed=provenance.seed),
        *run_sections(targets.runs),
        *score_sections(targets.scores),
    ]
    scripts, styles = map_assets(sections)
    note = ", ".join(names)
    return render("Report", sections, note=note, provenance=provenance, scripts=scripts, styles=[style(), *styles])
