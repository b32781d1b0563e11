"""Images that `curate retrieve` found: beside their queries, and which queries brought little."""

from dataclasses import dataclass

from ..store.manifest import Manifest
from .manifest_rows import Row, asking, find, images, sources, stored

QUERIES = 8  # chosen: queries shown of each kind
BESIDE = 8  # images shown beside a query
BINS = 30

# `rank` 0 marks a query that was included; an image without an id is known by its uri, as `retrieve` has it.
KEEP = "select query_id, rank, similarity::double as similarity, uri, label from rows where rank > 0"
BY_QUERY = """
    with brought as (select query_id, count(*) as num, max(similarity) as best from retrieved group by query_id)
    select any_value(queries.uri) as uri, any_value(queries.label) as label, key, coalesce(any_value(num), 0) as num,
        any_value(best) as best
    from (select coalesce(image_id, uri) as key, uri, label from queries) as queries
    left join brought on brought.query_id = queries.key group by key
"""


@dataclass(frozen=True)
class Line:
    """A query, and the images that it brought, nearest first."""

    uri: str | None
    label: str | None
    num_images: int
    images: list[Row]  # uri, label, rank, similarity


@dataclass(frozen=True)
class Retrieved:
    """What a step retrieved."""

    figures: dict[str, object]
    k: object
    num_queries: int | None  # None: the queries are gone
    brought: list[Row]  # num, queries: how many queries brought so many images
    similarities: list[Row]  # low, high, num
    lines: list[Line]  # some queries, drawn at random
    least: list[Line]  # those whose nearest image is the least similar
    nothing: list[Row]  # uri, label: some that brought no image
    missing: list[str]  # query sets that are gone

    @property
    def num_shared(self) -> int | None:
        """How many images were the candidate of several queries, at least; None where that was not recorded."""
        collisions = self.figures.get("collisions")
        return collisions if isinstance(collisions, int) else None


def read_retrieved(selection: Manifest, seed: int) -> Retrieved:
    """Return what a step retrieved, and for whom."""
    provenance = selection.provenance
    assert provenance is not None
    given = sources(provenance, "queries")
    found = [find(source, selection.path) for source in given]
    missing = [source.path for source, manifest in zip(given, found, strict=True) if manifest is None]
    columns = ("query_id", "rank", "similarity", "uri", "label")
    with asking(rows=stored(selection, columns)) as ask:
        ask.keep("retrieved", KEEP)
        for number, manifest in enumerate(each for each in found if each is not None):
            ask.connection.register("given", images(manifest, ("image_id", "uri", "label")))
            ask.connection.execute(
                "insert into queries from given" if number else "create temp table queries as from given"
            )
        if len(missing) == len(given):
            ask.keep(
                "queries",
                "select distinct query_id as image_id, null::varchar as uri, null::varchar as label from retrieved",
            )
        ask.keep("by_query", BY_QUERY)
        ((num_queries,),) = (row.values() for row in ask("select count(*) from by_query"))
        brought = ask("select num, count(*) as queries from by_query group by num order by num")
        similarities = ask(
            """
            with bounds as (select min(similarity) as least, max(similarity) as most from retrieved),
            width as (select least, greatest(most - least, 1e-6) / $bins as width from bounds),
            binned as (
                select least, width, least(floor((similarity - least) / width), $bins - 1) as bin from retrieved, width
            )
            select least + bin * width as low, least + (bin + 1) * width as high, count(*) as num from binned
            group by all order by low
            """,
            bins=BINS,
        )
        chosen = ask(
            "select *, false as is_least from by_query where num > 0 "
            "order by md5(concat(key, $seed::varchar)), key limit $most",
            seed=seed,
            most=QUERIES,
        )
        chosen += ask(
            "select *, true as is_least from by_query where num > 0 order by best, key limit $most", most=QUERIES
        )
        nothing = ask("select uri, label from by_query where num = 0 order by key limit $most", most=2 * QUERIES)
        beside = ask(
            "select query_id, uri, label, rank, similarity from retrieved where list_contains($keys, query_id)"
            " qualify row_number() over (partition by query_id order by rank, uri) <= $most"
            " order by query_id, rank, uri",
            keys=[row["key"] for row in chosen],
            most=BESIDE,
        )
    lines: dict[bool, list[Line]] = {False: [], True: []}
    for row in chosen:
        near = [image for image in beside if image["query_id"] == row["key"]]
        lines[row["is_least"]].append(Line(row["uri"], row["label"], row["num"], near))
    parameters = provenance.parameters
    return Retrieved(
        provenance.figures,
        parameters.get("per_cluster") or parameters.get("k"),
        None if missing else num_queries,
        brought,
        similarities,
        lines[False],
        lines[True],
        nothing,
        missing,
    )
