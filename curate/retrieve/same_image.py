"""Which query and which pool row are the same image: a query must not find itself, and an image comes once."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...features.search.neighbors import Identity
from ...store import tables
from ...store.manifest import IMAGE_FIELDS
from ..inputs import PLACE_FIELD, EmbeddedImages


def identity_of(queries: Sequence[EmbeddedImages], pool: EmbeddedImages) -> Identity:
    """Return which queries and pool rows are the same image: those of equal image_id and uri.

    Where both are null, those of the same row of the same embeddings. Queries of several manifests count on from one
    to the next. The number of a query is the place of the first that is the same image, that of a pool row likewise,
    or -1 where it is no query.
    """
    starts = np.cumsum([0, *(len(part) for part in queries)]).tolist()
    of_queries, of_pool = np.arange(starts[-1]), np.full(len(pool), -1)
    schema = pa.schema([*IMAGE_FIELDS[:2], PLACE_FIELD])
    every_key = (table for part, start in zip(queries, starts, strict=False) for table in _keys(part, start))
    with tables.connect() as connection:
        # DuckDB keeps the right side of a join in memory, as written: the queries, for a stream has no known size.
        connection.execute("set disabled_optimizers = 'join_order,build_side_probe_side'")
        connection.register("streamed", tables.stream(schema, every_key))
        connection.execute("create table query as select * from streamed")
        connection.execute(
            "create table image as select image_id, uri, min(place) as number from query group by image_id, uri"
        )
        connection.register("pool", tables.stream(schema, _keys(pool, 0)))
        for name, numbers in (("query", of_queries), ("pool", of_pool)):
            connection.execute(f"create or replace temp view asked as from {name}")
            matched = connection.sql("""
                select place, number from asked as row join image
                on row.image_id is not distinct from image.image_id and row.uri is not distinct from image.uri
            """)
            for batch in matched.to_arrow_reader(tables.BATCH_ROWS):
                numbers[batch.column("place").to_numpy()] = batch.column("number").to_numpy()
    return Identity(of_queries, of_pool)


def _keys(images: EmbeddedImages, start: int) -> Iterator[pa.Table]:
    """Yield image_id, uri and place of every image, from place `start`; one without a name gets one from its row."""
    base = images.vectors.base.content_id
    for table in images.names():
        image_id, uri, place = (table.column(name) for name in ("image_id", "uri", "place"))
        is_nameless = pc.and_(pc.is_null(image_id), pc.is_null(uri))
        if pc.any(is_nameless).as_py():
            rows = pa.array(images.vectors.rows[place.to_numpy()]).cast(pa.string())
            image_id = pc.if_else(is_nameless, pc.binary_join_element_wise("row", rows, "of", base, " "), image_id)
        yield pa.table([image_id, uri, pc.add(place, start)], names=["image_id", "uri", "place"])
