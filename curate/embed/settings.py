"""The settings of `dinov2 curate embed`, and what follows from them alone: the model and the columns."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa

from ...cores import usable_cores
from ...features.extract.extract import FeatureBatch, FeatureModel, extract, open_model, with_choice
from ...features.extract.reading import Reading
from ...features.extract.tokens import TokenChoice, Tokens
from ...store.artifact import Options
from ...store.limits import DEFAULT_LIMITS, Limits
from ...store.manifest import IMAGE_FIELDS, OPTIONAL_IMAGE_FIELDS, Provenance, embedding_field, patch_fields
from ...store.sources import ImageSource
from .filters import Filters
from .listing import Listed


@dataclass(frozen=True)
class EmbedSettings:
    """The options of `dinov2 curate embed`, beside those that all commands share."""

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
    limits: Limits = DEFAULT_LIMITS
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


def wanted_provenance(
    sources: list[ImageSource], listed: Listed, model: FeatureModel, settings: EmbedSettings, options: Options
) -> Provenance:
    """Return the provenance of the output, for the state of the sources that was listed."""
    present = {name for source in sources if source.manifest is not None for name in source.manifest.names()}
    chosen = asdict(settings)
    parameters: dict[str, object] = {
        "sources": [source.path for source in sources],
        **{name: chosen[name] for name in ("role", "labels", "dtype", "tokens", "layers", "windows")},
        **chosen["filters"],
        **({} if settings.limits == DEFAULT_LIMITS else chosen["limits"]),
        "image_size": model.preprocess.image_size,
        "limit": options.limit,
        "columns": [field.name for field in OPTIONAL_IMAGE_FIELDS if field.name in present],
    }
    return Provenance(
        kind="embeddings",
        command="curate embed",
        parameters=parameters,
        seed=options.seed,
        inputs=(*listed.inputs, model.source),
        role=settings.role,
    )


def extracted(
    model: FeatureModel,
    uris: Iterable[str | None],
    settings: EmbedSettings,
    recognise: Callable[[str], int | None] | None = None,
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of images, as `features.extract.extract`; `recognise` finds rows of the same bytes."""
    filters = settings.filters
    reading = Reading(recognise, filters.reason if filters != Filters() else None, filters.decode_side, settings.limits)
    num_workers = settings.num_workers or usable_cores()
    return extract(model, uris, batch_size=settings.batch_size, num_workers=num_workers, reading=reading)
