"""dinov2 report: runs, manifests and scores in, one page out."""

from typing import TYPE_CHECKING, Annotated

import typer

from .. import options

if TYPE_CHECKING:
    from ..store.artifact import Options, Result

Targets = Annotated[
    list[str], typer.Argument(metavar="TARGET...", help="Run folders, manifests and scores, in any order.")
]


@options.with_shared("limit")
def report(
    targets: Targets,
    output: Annotated[str, options.output_option("report.html")] = "report.html",
    *,
    shared: "Options",
) -> "Result | None":
    """Write what runs, manifests and scores show as one HTML file that needs no network."""
    from .report import report as write

    return write(targets, output, shared)
