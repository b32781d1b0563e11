"""Options of `dinov2 curate dedup`, besides those that all commands share."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ...errors import ToolkitError
from ...features.sheet import check_picture_name

Linkage = Literal["components", "star"]
Exact = Literal["bytes", "pixels"]

NOT_PARAMETERS = ("against", "known", "features", "sheet", "where", "memory")  # inputs, or without effect on the rows


@dataclass(frozen=True)
class DedupSettings:
    """The options of `dinov2 curate dedup`."""

    threshold: float | None = None  # None: that of the known images, else learnt from the pool
    k: int = 64
    against: tuple[Path, ...] = ()
    against_threshold: float | None = None  # None: the same as `threshold`
    keep: str = "largest"  # largest, first, column:NAME or column:NAME=A,B
    features: Path | None = None
    linkage: Linkage = "components"
    known: tuple[Path, ...] = ()  # images kept earlier: their duplicates are removed
    exact: Exact | None = None  # None: near-duplicates by their vectors
    sheet: Path | None = None  # where to draw groups
    where: str | None = None  # SQL condition that rows of the manifest must fulfil
    memory: str | None = None  # such as 3GB; None: a third of the machine
    recall: float = 0.99
    verify: bool | None = None  # whether pixels decide; None: with the descriptor `copy` and no threshold

    def check(self) -> None:
        """Raise ToolkitError for values that make no sense."""
        for name, value in (("--threshold", self.threshold), ("--against-threshold", self.against_threshold)):
            if value is not None and not -1 <= value <= 1:
                raise ToolkitError(f"{name} {value} is no cosine similarity; give a number from -1 to 1")
            if value is not None and self.exact is not None:
                raise ToolkitError(f"{name} {value} with --exact {self.exact}, which compares no vectors; drop one")
        if self.verify and self.exact is not None:
            raise ToolkitError(f"--verify with --exact {self.exact}, which takes equal {self.exact} only; drop one")
        if self.k < 1:
            raise ToolkitError(f"--k {self.k} leaves no neighbours to compare; give 1 or more")
        if not 0 < self.recall <= 1:
            raise ToolkitError(f"--recall {self.recall} is no share of the neighbours; give a number above 0, up to 1")
        if self.against_threshold is not None and not self.against:
            raise ToolkitError(
                f"--against-threshold {self.against_threshold} without --against; name the evaluation set"
            )
        if self.sheet is not None:
            check_picture_name(str(self.sheet))

    def parameters(self) -> dict[str, object]:
        """Return what changes the rows, for the provenance."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_PARAMETERS}
