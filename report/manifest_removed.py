"""Images that steps removed: how many for which reason, and some of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from .manifest_flow import Stage, kind_of, short_reason
from .manifest_rows import Row, ask, removed_rows, stored

SHOWN = 8  # chosen: images of a reason

EXAMPLES = """
    with reasons as (select uri, reason, split_part(coalesce(reason, ''), ':', 1) as short from rows)
    select short, uri, reason, count(*) over (partition by short) as num from reasons
    qualify row_number() over (partition by short order by md5(concat(uri, $seed::varchar)), uri) <= $shown
    order by num desc, short, md5(concat(uri, $seed::varchar)), uri
"""


@dataclass(frozen=True)
class Reason:
    """A reason for which a step removed images, and some of these, with the reason of each in full."""

    stage: Stage
    reason: str
    kind: str
    num_images: int
    examples: list[Row]  # uri, reason


def read_removed(stages: Sequence[Stage], seed: int) -> list[Reason]:
    """Return the reasons for which the steps removed images, step by step, the most frequent first."""
    found: list[Reason] = []
    for stage in stages:
        removed = None if stage.manifest is None else removed_rows(stage.manifest)
        if removed is None or not removed.num_rows:
            continue
        rows = ask(EXAMPLES, {"seed": seed, "shown": SHOWN}, rows=stored(removed, ("uri", "reason")))
        for short in dict.fromkeys(row["short"] for row in rows):
            examples = [row for row in rows if row["short"] == short]
            reason = short_reason(short or None)
            found.append(Reason(stage, reason, kind_of(reason), examples[0]["num"], examples))
    return found
