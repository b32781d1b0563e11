"""Duplicates that `curate dedup` found: why each image went, and why another stays for it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any  # of a row's values

from ..curate.dedup.decisions import GROUPED_WITH_EVALUATION, NEAR_DUPLICATE, REASONS, SAME_BYTES, SAME_PIXELS
from ..store.manifest import Manifest, Provenance
from .manifest_rows import Asking, Row, asking, find, images, quoted, removed_rows, sources, stored

GROUPS = 5  # chosen: of each kind
MEMBERS = 7  # removed images shown of a group
BINS = 40
COLUMNS = ("uri", "reason", "duplicate_of", "similarity", "pixel_difference")

# Doubt is 1 where an image lies at the limit, and above where only a chain of others joins it to the one that stays.
KEEP = """
    select uri, reason, duplicate_of, similarity::double as similarity, pixel_difference::double as difference, case
        when reason <> $near then null
        when $limit is not null then pixel_difference::double / $limit
        else (1 - similarity::double) / greatest(1 - $threshold, 1e-9)
    end as doubt
    from rows
"""
CHOSEN = """
    with groups as (
        select duplicate_of as kept, count(*) as num, max(doubt) as doubt,
            md5(concat(duplicate_of, $seed::varchar)) as chance
        from removed where duplicate_of is not null group by duplicate_of
    ),
    by_kind as (
        select *, case
            when row_number() over (order by num desc, kept) <= $most then 'largest'
            when doubt is not null and row_number() over (order by doubt desc nulls last, kept) <= $most then 'doubtful'
            else 'random'
        end as kind from groups
    )
    select kept, num, kind from by_kind
    qualify row_number() over (partition by kind order by if(kind = 'random', chance, null), kept) <= $most
    order by kind = 'random', kind = 'doubtful', if(kind = 'largest', -num, 0), if(kind = 'doubtful', -doubt, 0), kept
"""
MEMBERS_OF = """
    with members as (
        select *, greatest(count(*) over (partition by duplicate_of) - 1, 1) as last,
            row_number() over (partition by duplicate_of order by doubt nulls first, similarity desc, uri) as place
        from removed where list_contains($kept, duplicate_of)
    )
    select duplicate_of as kept, uri, reason, similarity, difference, doubt from members
    where place = 1 or (place - 1) * $steps // last > (place - 2) * $steps // last
    order by duplicate_of, place
"""


@dataclass(frozen=True)
class Rule:
    """What decided: which images are duplicates, and which of a group stays."""

    threshold: float | None  # cosine above which pairs are near-duplicates, or are verified by their pixels
    threshold_origin: str
    against_threshold: float | None
    limit: float | None  # pixel difference up to which two are copies; None: pixels decided nothing
    linkage: str
    keep: str


@dataclass(frozen=True)
class Gone:
    """An image that went, and why."""

    uri: str | None
    reasons: tuple[str, ...]  # the first says it all, the others give the numbers
    doubt: float | None  # 1 at the limit, more where only a chain joins it; None where nothing is to be doubted


@dataclass(frozen=True)
class Group:
    """An image that stays, and some that went for it."""

    kind: str  # largest, doubtful, random
    kept: str
    why: str  # it stays
    num_removed: int
    removed: list[Gone]


@dataclass(frozen=True)
class Duplicates:
    """What a step removed as duplicates."""

    rule: Rule
    figures: dict[str, object]
    reasons: dict[str, int]
    num_chained: int  # of them, how many lie beyond the limit themselves
    similarities: list[Row]  # reason, low, high, num
    differences: list[Row]  # low, high, num
    groups: list[Group]


def read_rule(provenance: Provenance) -> Rule:
    """Return the rule of a step, as its provenance has it."""
    figures, parameters = provenance.figures, provenance.parameters
    return Rule(
        _number(figures.get("threshold")),
        str(figures.get("threshold_origin", "")),
        _number(figures.get("against_threshold")),
        _number(figures.get("max_difference")),
        str(parameters.get("linkage", "")),
        str(parameters.get("keep", "")),
    )


def read_duplicates(selection: Manifest, seed: int) -> Duplicates | None:
    """Return what the step that made a selection removed; None where the list of that is gone, or empty."""
    listed, provenance = removed_rows(selection), selection.provenance
    if listed is None or provenance is None or not listed.num_rows:
        return None
    rule = read_rule(provenance)
    near = REASONS[NEAR_DUPLICATE]
    with asking(rows=stored(listed, COLUMNS)) as ask:
        ask.keep("removed", KEEP, near=near, limit=rule.limit, threshold=rule.threshold or 0.0)
        reasons = ask("select reason, count(*) as num from removed group by reason order by num desc, reason")
        ((num_chained,),) = (row.values() for row in ask("select count(*) from removed where doubt > 1"))
        similarities = histogram(ask, "similarity", "reason")
        differences = [] if rule.limit is None else histogram(ask, "difference", "''", 3 * rule.limit)
        chosen = ask(CHOSEN, seed=seed, most=GROUPS)
        members = ask(MEMBERS_OF, kept=[group["kept"] for group in chosen], steps=MEMBERS - 1)
    by_kept = defaultdict(list)
    for row in members:
        by_kept[row["kept"]].append(row)
    shown = [uri for row in members for uri in (row["uri"], row["kept"])]
    facts = _facts(selection, provenance, rule, shown)
    groups = []
    for group in chosen:
        rows = by_kept[group["kept"]]
        gone = [Gone(row["uri"], why_removed(row, rule), row["doubt"]) for row in rows]
        why = why_kept(facts.get(group["kept"]), [facts.get(row["uri"]) for row in rows], rule, rows[0]["reason"])
        groups.append(Group(group["kind"], group["kept"], why, group["num"], gone))
    counts = {row["reason"]: row["num"] for row in reasons}
    return Duplicates(rule, provenance.figures, counts, num_chained, similarities, differences, groups)


def histogram(ask: Asking, column: str, series: str, most: float = float("inf")) -> list[Row]:
    """Return how many removed images have a value in each of `BINS` bins; the last one has all from `most` on."""
    (found,) = ask(f"select min({column}) as low, max({column}) as high from removed")  # noqa: S608  # an expression of ours
    low, high = found["low"], found["high"]
    if low is None:
        return []
    width = max(min(high, most) - low, 1e-6) / BINS
    return ask(
        f"""
        select {series} as reason, $low + bin * $width as low, $low + (bin + 1) * $width as high, count(*) as num from (
            select *, least(floor(({column} - $low) / $width), {BINS - 1})::int as bin from removed
            where {column} is not null
        ) group by all order by reason, low
        """,  # noqa: S608  # expressions of ours
        low=low,
        width=width,
    )


def _facts(selection: Manifest, provenance: Provenance, rule: Rule, uris: Sequence[str | None]) -> dict[str, Row]:
    """Return place, size and the column that decides, by uri, of images that the step read; none where it is gone."""
    pool = next((found for each in sources(provenance, "manifest") if (found := find(each, selection.path))), selection)
    column = _kept_by(rule, pool)
    with asking(rows=images(pool, ("image_id", "uri", "width", "height"), [column] if column else [])) as ask:
        value = "null" if column is None else quoted(column)
        facts = ask(
            f"select image_id, uri, width, height, {value} as value from rows "  # noqa: S608  # quoted
            "where list_contains($uris, uri)",
            uris=sorted({uri for uri in uris if uri is not None}),
        )
    return {row["uri"]: row for row in facts}


def _kept_by(rule: Rule, manifest: Manifest) -> str | None:
    """Return the column whose value decides which image stays, None where size or order does."""
    name = rule.keep.removeprefix("column:")
    if name == rule.keep:
        return None
    return next((each for each in (name, name.partition("=")[0]) if each in manifest.names()), None)


def why_removed(row: Row, rule: Rule) -> tuple[str, ...]:
    """Return why an image went: in words, then the numbers that decided."""
    reason, similarity, difference = row["reason"], row["similarity"], row["difference"]
    numbers = [] if similarity is None else [f"cosine {similarity:.4f}"]
    if reason == REASONS[SAME_BYTES]:
        return ("the same file, byte by byte",)
    if reason == REASONS[SAME_PIXELS]:
        return ("the same pixels, in another file",)
    if difference is not None and rule.limit is not None:
        is_copy = difference <= rule.limit
        numbers.insert(0, f"pixels {difference:.4f} {'≤' if is_copy else '>'} {rule.limit:.4f}")
        words = "a copy, verified by pixels" if is_copy else "joined by a chain of copies only"
        return (_words(reason, words), *numbers)
    if rule.limit is not None:
        return (_words(reason, "a copy of it, or of another image of its group"), *numbers)
    threshold = rule.against_threshold if reason not in REASONS[:SAME_PIXELS] else rule.threshold
    threshold = rule.threshold if threshold is None else threshold
    if threshold is None or similarity is None:
        return (reason, *numbers)
    is_near = similarity > threshold
    words = "a near-duplicate" if is_near else "joined by a chain of near-duplicates only"
    return (_words(reason, words), f"cosine {similarity:.4f} {'>' if is_near else '≤'} {threshold:.4g}")


def _words(reason: str, of_near_duplicates: str) -> str:
    if reason == REASONS[GROUPED_WITH_EVALUATION]:
        return "in a group with an image like an evaluation image"
    return of_near_duplicates if reason == REASONS[NEAR_DUPLICATE] else reason


def why_kept(kept: Row | None, others: Sequence[Row | None], rule: Rule, reason: str) -> str:
    """Return why an image stays for others.

    Args:
        kept, others: their image_id, size and the value that decides; None where they are not in the pool.
        reason: for which the first of the others went.
    """
    if "evaluation" in reason:
        return "an evaluation image, given by --against"
    if kept is None:
        return "kept earlier: an image given by --known, or one of a pool that is gone"
    known = [other for other in others if other is not None]
    if rule.keep == "first":
        return "the first in the pool (--keep first)"
    if rule.keep.startswith("column:"):
        name = rule.keep.removeprefix("column:").partition("=")[0]
        values = list(dict.fromkeys(str(other["value"]) for other in known))
        is_same = values == [str(kept["value"])]
        which = "as of the others" if is_same else f"of the others {', '.join(values) or 'not known'}"
        return f"{name} is {kept['value']}, {which} (--keep {rule.keep})"
    largest = max(known, key=_pixels, default=None)
    if largest is None:
        return f"{_size(kept)}; the sizes of the others are not known"
    if _pixels(largest) < _pixels(kept):
        return f"the largest, {_size(kept)}; the others at most {_size(largest)}"
    num = sum(_pixels(other) == _pixels(kept) for other in known)
    which = "the others" if num == len(known) else f"{num} of the others"
    return f"{_size(kept)}, as {which}; the first of these by image id and name"


def _pixels(row: Row) -> int:
    return (row["width"] or 0) * (row["height"] or 0)


def _size(row: Row) -> str:
    return f"{row['width']} × {row['height']} px" if row["width"] else "unknown size"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
