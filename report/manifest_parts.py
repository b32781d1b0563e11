"""Parts of the sections on manifests that no other page has: the flow, and images that stand for others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any  # of a template

from jinja2 import Environment
from markupsafe import Markup

from ..features.page.thumbnail import Thumbnail, thumbnails
from .manifest_flow import Change, Kind, Stage

MOST_CHANGES = 4  # reasons that a step of the flow names one by one
KIND_WORDS: dict[Kind, str] = {
    "unreadable": "unreadable",
    "filtered": "filtered",
    "duplicate": "duplicates",
    "evaluation": "like evaluation images",
    "unchosen": "not chosen",
    "repeated": "repeated",
    "added": "added",
}
LIMIT_AT = 2 / 3  # where a meter has its limit; manifest.css draws a line there
FOLDER = files(__package__) / "templates"


@dataclass(frozen=True)
class Other:
    """An image beside another, with what is to be said of it, line by line."""

    image: Thumbnail
    words: Sequence[str]
    doubt: float | None = None  # 1 at the limit, more beyond it
    difference: Thumbnail | None = None  # what differs from the one it stands beside

    @property
    def meter(self) -> tuple[float, bool] | None:
        """How far along its meter the doubt reaches, in percent, and whether it is beyond the limit."""
        return None if self.doubt is None else (min(100 * self.doubt * LIMIT_AT, 100.0), self.doubt > 1)


@dataclass(frozen=True)
class Entry:
    """An image, and others that went for it or came by it."""

    image: Thumbnail
    words: str
    others: Sequence[Other]
    mark: str = ""
    more: str = ""


@dataclass(frozen=True)
class Strip:
    """Small images in a row below a title, perhaps beside one that leads."""

    title: str
    words: str
    images: Sequence[tuple[Thumbnail, str]]  # with captions
    lead: Thumbnail | None = None


def style() -> str:
    """Return the style of these parts."""
    return (FOLDER / "manifest.css").read_text("utf-8")


@cache
def _templates() -> Any:
    return Environment(autoescape=True).from_string((FOLDER / "manifest.html").read_text("utf-8")).module


def groups(entries: Sequence[Entry]) -> Markup:
    """Return images, each with others beside it."""
    made: Markup = _templates().groups(entries)
    return made


def strips(rows: Sequence[Strip]) -> Markup:
    """Return strips of small images, one below the other."""
    made: Markup = _templates().strips(rows)
    return made


def flow(stages: Sequence[Stage]) -> Markup:
    """Return the stages as bars one below the other, each as long as its number of images."""
    most = max((stage.num_images or 0 for stage in stages), default=0) or 1
    titles = {stage.key: stage.title for stage in stages}
    steps = []
    for place, stage in enumerate(stages):
        before = [stages[place - 1].key] if place else []
        origin = "" if list(stage.parents) == before else f"from {' and '.join(titles[key] for key in stage.parents)}"
        steps.append(
            {
                "title": stage.title,
                "name": os.path.basename(stage.path.rstrip("/")),
                "origin": origin if stage.parents else "",
                "count": "unknown" if stage.num_images is None else f"{stage.num_images:,}",
                "width": f"{100 * (stage.num_images or 0) / most:.2f}",
                "changes": [_change(change, most) for change in _few(stage.changes)],
                "missing": stage.missing,
                "is_given": stage.is_given,
            }
        )
    made: Markup = _templates().flow(steps)
    return made


def _few(changes: Sequence[Change]) -> Sequence[Change]:
    """Return changes as they are where they are few, else those of a kind as one."""
    if len(changes) <= MOST_CHANGES:
        return changes
    kinds = dict.fromkeys(change.kind for change in changes)
    totals = {kind: sum(change.num_images for change in changes if change.kind == kind) for kind in kinds}
    return [Change(KIND_WORDS[kind], kind, total) for kind, total in totals.items()]


def _change(change: Change, most: int) -> dict[str, str]:
    width = f"{-100 * change.num_images / most:.2f}" if change.num_images < 0 else ""
    return {"kind": change.kind, "count": signed(change.num_images), "reason": change.reason, "width": width}


def signed(number: int) -> str:
    """Return a change with its sign: a true minus, or a plus."""
    return f"{'−' if number < 0 else '+'}{abs(number):,}"


def image_name(uri: str | None) -> str:
    """Return what people call an image: the name of its file, or its row in a Parquet file."""
    if uri is None:
        return "an image without a name"
    return os.path.basename(uri.rstrip("/")).replace(".parquet?row=", " row ") or uri


def read_thumbnails(uris: Sequence[str | None], labels: Sequence[str | None] | None = None) -> list[Thumbnail]:
    """Return images as small pictures, each with its name, and its label where there is one."""
    labels = labels or [None] * len(uris)
    named = [
        (uri, f"image {image_name(uri)}" + (f", labelled {label}" if label else ""), label or image_name(uri))
        for uri, label in zip(uris, labels, strict=True)
    ]
    return thumbnails(named)
