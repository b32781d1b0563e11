"""What `dinov2 curate embed` can be told, and what follows from it alone: model, columns, how images are read."""

import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...features.extract.decoding import Reading
from ...features.extract.extract import FeatureBatch, FeatureModel, extract, open_model, with_choice
from ...features.extract.tokens import TokenChoice, Tokens
from ...features.launch import local_count
from ...store.artifact import Options
from ...store.manifest import IMAGE_FIELDS, OPTIONAL_IMAGE_FIELDS, Manifest, embedding_field, patch_fields
from .filters import Filters
from .reuse import known_by_bytes

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EmbedSettings:
    """What `dinov2 curate embed` can be told, beside the options that all commands share."""

    model: str | None = None  # None: the newest finished run, else what `open_model` takes then
    role: str = "pool"  # pool, queries or eval: what bare commands take the images for
    labels: str = "folder"  # folder, none or column:NAME
    dtype: str = "float16"
    max_failed: float = 1.0  # share of the files, above which the command fails
    batch_size: int = 64
    num_workers: int | None = None  # None: one a core
    null: bool = False  # names on stdin end in NUL
    tokens: Tokens = "cls"
    layers: int = 1  # the last so many blocks
    image_size: int | None = None  # pixels a side; None: the model's own
    windows: int | None = None  # short side in pixels of what is looked at in tiles
    filters: Filters = Filters()
    num_processes: int = 1


def chosen_model(settings: EmbedSettings, options: Options) -> FeatureModel:
    """Return the model, with the tokens and sizes that were chosen."""
    choice = TokenChoice(settings.tokens, settings.layers)
    return with_choice(open_model(settings.model, options.seed), choice, settings.image_size, settings.windows)


def manifest_fields(model: FeatureModel, settings: EmbedSettings, columns: object) -> list[pa.Field]:
    """Return the columns of the output; `columns` names the optional ones that the sources have."""
    dtype = pa.float16() if settings.dtype == "float16" else pa.float32()
    assert isinstance(columns, list), "a list of names in the parameters"
    optional = [field for field in OPTIONAL_IMAGE_FIELDS if field.name in columns]
    patches = patch_fields(model.dim, dtype) if settings.tokens == "patches" else []
    return [*IMAGE_FIELDS, *optional, *patches, embedding_field(model.dim, dtype)]


def reading_of(settings: EmbedSettings, earlier: Manifest | None = None, rows: Int64 | None = None) -> Reading | None:
    """Return what else is asked of the images; None if nothing is."""
    filters = settings.filters
    if not filters and earlier is None:
        return None
    known = None if earlier is None or rows is None else known_by_bytes(earlier, rows)
    return Reading(known, filters.reason if filters else None, filters.decode_side)


def extracted(
    model: FeatureModel, uris: Iterable[str | None], settings: EmbedSettings, reading: Reading | None
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of images, as `features.extract.extract`."""
    num_workers = settings.num_workers or max(1, (os.cpu_count() or 1) // local_count())
    return extract(model, uris, batch_size=settings.batch_size, num_workers=num_workers, reading=reading)
