"""What a run's model saw of its first images: crops and masks, and principal components of its patch features."""

from itertools import islice

import numpy as np
from markupsafe import Markup
from PIL import Image

from ..errors import ToolkitError
from ..evaluate.pca import colour_patches
from ..evaluate.pictures import open_patch_model
from ..features.page import parts
from ..features.page.thumbnail import Thumbnail, thumbnail
from ..features.sheet import fit
from ..store.image_columns import read_images
from ..store.images import UnreadableImage, read_bytes
from ..store.manifest import open_manifest
from ..store.pixels import as_image
from ..train.config import TrainConfig
from ..train.data.images import ImageSet, drawn_rows, image_set
from ..train.data.preview import preview_rows
from .lineage import locate
from .targets import RunFolder

NUM_CROPPED, NUM_COLOURED = 5, 8
TRIED = 50  # images that are tried until one can be read
CROP_PX, PAIR_PX = 96, 256


def crops_of(folder: RunFolder, config: TrainConfig) -> list[Markup]:
    """Return the first images of a run with all crops of them, a gallery each; a note where they are gone."""
    try:
        images = _images(folder)
        _check_readable(images, config.seed)
        rows = list(preview_rows(images, config, NUM_CROPPED))
    except ToolkitError as problem:
        return [parts.note(f"Crops cannot be drawn: {problem}.")]
    words = (
        f"The first {len(rows)} images of the run. Each row: the image, its {len(rows[0][1])} global crops of"
        f" {config.global_crop_size_px} px, violet where patches are masked for the student"
    )
    words += f", its {config.num_local_crops} local crops of {config.local_crop_size_px} px." if rows[0][2:] else "."
    made = [parts.text(words)]
    for number, groups in enumerate(rows, 1):
        views = ("image", "global crop", "local crop")
        shown: list[Thumbnail] = []
        for view, tiles in zip(views, groups, strict=False):
            for place, tile in enumerate(tiles, 1):
                alt = f"{view} {place} of image {number}" if len(tiles) > 1 else f"image {number}"
                shown.append(thumbnail(tile.image, alt=alt, side_px=CROP_PX))
        made.append(parts.gallery(f"Image {number} and its crops", shown, size="small"))
    return made


def components_of(folder: RunFolder, seed: int) -> list[Markup]:
    """Return some images of a run beside the principal components of their patch features; a note where that fails."""
    try:
        images = _images(folder)
        _check_readable(images, seed)
        model = open_patch_model(str(folder.path), None, seed)
        uris = (images.uris[row].as_py() for row in drawn_rows(images, seed, np.arange(TRIED)).tolist())
        pictures = list(islice((picture for uri in uris if (picture := model.read(uri)) is not None), NUM_COLOURED))
    except ToolkitError as problem:
        return [parts.note(f"Patch features cannot be drawn: {problem}.")]
    tokens = [model.patch_tokens(picture) for picture in pictures]
    colours = colour_patches(tokens, [model.grid(picture) for picture in pictures])
    pairs = [
        _pair(as_image(picture), Image.fromarray(coloured))
        for picture, coloured in zip(pictures, colours.images, strict=True)
    ]
    shown = [
        thumbnail(pair, alt=f"image {number} and its patch features", side_px=PAIR_PX)
        for number, pair in enumerate(pairs, 1)
    ]
    found = "Components 1, 2 and 3 are red, green and blue; none of them parts ground and object."
    if colours.foreground_share is not None:
        found = "Component 1 parts ground (dark) and object; components 2, 3 and 4 are red, green and blue."
    words = (
        f"Images at {model.side_px} px, each with the principal components of its patch features. {found}"
        " Equal colours are similar features."
    )
    return [parts.text(words), parts.gallery("Images and their patch features", shown, size="wide")]


def _pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return an image beside another, both on squares of half a pair's width."""
    side_px = PAIR_PX // 2
    pair = Image.new("RGB", (PAIR_PX, side_px), "white")
    for image, start in ((left, 0), (right.resize(left.size, Image.Resampling.NEAREST), side_px)):
        fitted = fit(image, side_px)
        pair.paste(fitted, (start + (side_px - fitted.width) // 2, (side_px - fitted.height) // 2))
    return pair


def _images(folder: RunFolder) -> ImageSet:
    """Return the images that a run was trained on. Raises ToolkitError when their manifest is gone or has changed."""
    source = next((source for source in folder.provenance.inputs if source.role == "images"), None)
    if source is None:
        raise ToolkitError("the run does not say which images it was trained on")
    path = locate(source, folder.path)
    if path is None:
        raise ToolkitError(f"the manifest {source.path} is gone, or has changed since")
    limit = folder.provenance.parameters.get("limit")
    return image_set(read_images(open_manifest(path), limit if isinstance(limit, int) else None))


def _check_readable(images: ImageSet, seed: int) -> None:
    """Raise ToolkitError when none of the first images of a run can be read."""
    reason = ""
    for row in drawn_rows(images, seed, np.arange(TRIED)).tolist():
        try:
            read_bytes(images.uris[row].as_py())
            return
        except UnreadableImage as problem:
            reason = problem.reason
    raise ToolkitError(f"the first {TRIED} images cannot be read ({reason})")
