"""Composition of selections beside that of the pool: shares of labels, evenness, and images in common."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..store.manifest import Manifest
from .manifest_rows import Asking, Row, asking, images

LABELS = 24  # chosen: labels with a bar of their own; the others are one together
REST = "all others"

# The entropy counts the labels of all sets, so that one which a selection lacks makes it less even.
SETS = """
    with shares as (
        select *, num / sum(num) over (partition by name) as share from counts where label is not null
    )
    select name, sum(num)::bigint as labelled, count(*) as labels,
        case when (select count(distinct label) from counts) < 2 then 1.0
        else -sum(share * ln(share)) / ln((select count(distinct label) from counts)) end as entropy
    from shares group by name
"""
SHARES = """
    with labelled as (select *, num / sum(num) over (partition by name) as share from counts where label is not null),
    ranked as (
        select label, row_number() over (order by max(if(name = $first, num, 0)) desc, sum(num) desc, label) as place
        from labelled group by label
    ),
    listed as (select label, if(place <= $most, label, $rest) as shown, least(place, $most + 1) as place from ranked)
    select name, shown as label, sum(num)::bigint as num, sum(share) as share, place
    from labelled join listed using (label) group by all order by place, name
"""


@dataclass(frozen=True)
class LabelledSet:
    """How the images of a manifest spread over labels."""

    name: str
    num_images: int
    num_labelled: int
    num_labels: int
    entropy: float | None  # over the log of the number of labels of all sets; None where no image has a label


@dataclass(frozen=True)
class Composition:
    """Some manifests side by side, in the order in which they are given."""

    sets: list[LabelledSet]
    shares: list[Row]  # name, label, num, share: of the labelled images; the most common labels of the first set first


def read_composition(manifests: Mapping[str, Manifest]) -> Composition:
    """Return how the images of manifests, by name, spread over labels; the first is what the others are compared to."""
    with asking() as ask:
        ask.connection.execute("create temp table counts (name varchar, label varchar, num bigint)")
        for name, manifest in manifests.items():
            ask.connection.register("given", images(manifest, ("label",)))
            ask.connection.execute(
                "insert into counts select $name, label, count(*) from given group by label", {"name": name}
            )
        return _composition(ask, manifests)


def read_cluster_composition(clustered: Manifest, level: int, manifests: Mapping[str, Manifest]) -> Composition:
    """Return the same for the clusters of a level, in which `clustered` has the images of all."""
    column = f"cluster_{level}"
    with asking(clustered=images(clustered, ("image_id", "uri"), [column])) as ask:
        clusters = f"any_value({column}) as cluster"
        ask.keep("clusters", f"select image_key(image_id, uri) as key, {clusters} from clustered group by key")  # noqa: S608  # a column of ours
        ask.connection.execute("create temp table counts (name varchar, label varchar, num bigint)")
        for name, manifest in manifests.items():
            ask.connection.register("given", images(manifest, ("image_id", "uri")))
            ask.connection.execute(
                "insert into counts select $name, cluster::varchar, count(*)"
                " from given left join clusters on clusters.key = image_key(image_id, uri) group by cluster",
                {"name": name},
            )
        return _composition(ask, manifests)


def _composition(ask: Asking, manifests: Mapping[str, Manifest]) -> Composition:
    """Return what the table `counts` says of manifests."""
    found = {row["name"]: row for row in ask(SETS)}
    shares = ask(SHARES, first=next(iter(manifests)), most=LABELS, rest=REST)
    sets = []
    for name, manifest in manifests.items():
        row = found.get(name, {"labelled": 0, "labels": 0, "entropy": None})
        sets.append(LabelledSet(name, manifest.num_rows, row["labelled"], row["labels"], row["entropy"]))
    order = {name: place for place, name in enumerate(manifests)}
    shares = sorted(_complete(shares, list(manifests)), key=lambda row: (row["place"], order[row["name"]]))
    return Composition(sets, shares)


def _complete(shares: list[Row], names: list[str]) -> list[Row]:
    """Return the shares, with zeros where a set has no image of a label."""
    there = {(row["name"], row["label"]) for row in shares}
    labelled = {row["name"] for row in shares}
    places = {row["label"]: row["place"] for row in shares}
    zeros = [
        {"name": name, "label": label, "num": 0, "share": 0.0, "place": place}
        for label, place in places.items()
        for name in names
        if name in labelled and (name, label) not in there
    ]
    return [*shares, *zeros]


def read_overlaps(manifests: Mapping[str, Manifest]) -> dict[tuple[str, str], int]:
    """Return how many images every two of some manifests have in common; of one with itself, how many differ."""
    names = list(manifests)
    with asking() as ask:
        ask.connection.execute("create temp table members (key uhugeint, bit bigint)")
        for place, manifest in enumerate(manifests.values()):
            ask.connection.register("given", images(manifest, ("image_id", "uri")))
            ask.connection.execute(
                "insert into members select distinct image_key(image_id, uri), $bit from given",
                {"bit": 1 << place},
            )
        masks = ask(
            "with by_image as (select bit_or(bit) as mask from members group by key) "
            "select mask, count(*) as num from by_image group by mask"
        )
    return {
        (one, other): sum(row["num"] for row in masks if row["mask"] >> left & 1 and row["mask"] >> right & 1)
        for left, one in enumerate(names)
        for right, other in enumerate(names)
    }
