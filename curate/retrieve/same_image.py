"""Which queries and pool rows are the same image: a query must not find itself, and an image comes once."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...features.search.neighbors import Identity
from ...store import tables
from ...store.manifest import IMAGE_FIELDS
from ...store.vectors import Int64
from ..inputs import PLACE_FIELD, EmbeddedImages


def identity_of(queries: Sequence[EmbeddedImages], pool: EmbeddedImages) -> Identity:
    """Return which queries and pool rows are the same image: equal (image_id, uri), or where both are null, equal rows.

    Queries of several manifests count on from one to the next; the number of a query is the place of the first that is
    the same image, that of a pool row which is no query -1. Rows are compared only where both count in the same base.
    """
    starts = np.cumsum([0, *(len(part) for part in queries)])
    of_queries, of_pool = np.arange(starts[-1]), np.full(len(pool), -1)
    schema = pa.schema([*IMAGE_FIELDS[:2], PLACE_FIELD])
    names = (
        table.set_column(3, PLACE_FIELD, pc.add(table.column("place"), start)).drop_columns("row")
        for part, start in zip(queries, starts.tolist(), strict=False)
        for table in part.names()
    )
    with tables.connect() as connection:
        # What is streamed has no known size, and must not be what is held: that is the right side of a join as written.
        connection.execute("set disabled_optimizers = 'join_order,build_side_probe_side'")
        connection.register("asked", tables.stream(schema, names))
        connection.execute("create table query as select * from asked")
        connection.execute("""
            create table known as select image_id, uri, min(place) as number from query
            where image_id is not null or uri is not null group by image_id, uri
        """)
        pool_names = (table.drop_columns("row") for table in pool.names())
        connection.register("pool", tables.stream(schema, pool_names))
        unnamed = []
        for name, numbers in (("query", of_queries), ("pool", of_pool)):
            nameless = [np.empty(0, np.int64)]
            matched = connection.sql(f"""
                select place, number from {name} as asked left join known
                on asked.image_id is not distinct from known.image_id and asked.uri is not distinct from known.uri
                where number is not null or (asked.image_id is null and asked.uri is null)
            """)
            for batch in matched.to_arrow_reader(tables.BATCH_ROWS):
                place, number = (batch.column(index) for index in (0, 1))
                is_named = pc.is_valid(number)
                numbers[place.filter(is_named).to_numpy()] = number.filter(is_named).to_numpy()
                nameless.append(place.filter(pc.invert(is_named)).to_numpy())
            unnamed.append(np.sort(np.concatenate(nameless)))
    _match_rows(queries, starts, pool, unnamed, of_queries, of_pool)
    return Identity(of_queries, of_pool)


def _match_rows(
    queries: Sequence[EmbeddedImages],
    starts: Int64,
    pool: EmbeddedImages,
    unnamed: list[Int64],
    of_queries: Int64,
    of_pool: Int64,
) -> None:
    """Give the unnamed, at these places, the numbers that `identity_of` says."""
    rows, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part, start, stop in zip(queries, starts, starts[1:], strict=False):
        if part.vectors.base.content_id == pool.vectors.base.content_id:
            mine = unnamed[0][(unnamed[0] >= start) & (unnamed[0] < stop)]
            rows.append(part.vectors.rows[mine - start])
            places.append(mine)
    row, place = np.concatenate(rows), np.concatenate(places)
    if not len(row):
        return
    distinct, first, group = np.unique(row, return_index=True, return_inverse=True)
    of_queries[place] = place[first][group]
    in_pool = pool.vectors.rows[unnamed[1]]
    found = np.minimum(np.searchsorted(distinct, in_pool), len(distinct) - 1)
    is_same = distinct[found] == in_pool
    of_pool[unnamed[1][is_same]] = place[first][found[is_same]]
