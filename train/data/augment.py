"""Random crops and colours of whole batches, applied: from images and drawn `Crops` to crops, in torch, on any device.

Shapes: B images, V views of each, C channels, S the side of a crop, V * B crops of them: all first views first. Some
images are resized together, b of them from their top left H x W pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ..transfer import copied
from .crops import JITTERS, Crops
from .packed import PackedImages

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as Pillow's
BLUR_RADIUS_PX = 4  # the released code's kernel is 9 wide at every crop size
CHUNK_BYTES = 256 << 20  # chosen: of images in float32, resized together


class Chunk(NamedTuple):
    """Images that are resized together."""

    rows: Tensor  # (b,) their numbers
    height: int  # pixels from the top left in which their crops lie
    width: int


class PlacedCrops(NamedTuple):
    """`Crops` on a device, with the numbers (n,) of the crops among V * B that each operation changes."""

    starts: Tensor  # (B,) int64: first byte of each image,
    row_bytes: Tensor  # the bytes of a row of it,
    last_rows: Tensor  # and the number of its last row
    boxes: Tensor  # (V, B, 4) float32
    flip: Tensor  # (V, B)
    factors: Tensor  # (V * B, 4)
    gray: Tensor
    blurred: Tensor
    blur_sigma_px: Tensor  # (n,), of the blurred ones
    solarized: Tensor
    mean: Tensor  # (C,), or (1,)
    std: Tensor
    jitters: list[Tensor]  # of each turn, those that brightness, contrast, saturation and hue change in it
    chunks: list[Chunk]


def placed_crops(images: PackedImages, crops: Crops, mean: Sequence[float], std: Sequence[float]) -> PlacedCrops:
    """Return crops on the device of their images, by one copy; all sizes are known on the host."""
    blurred = np.flatnonzero(crops.blur_sigma_px)
    order = np.where(crops.jitter[..., None], crops.order, -1).reshape(-1, 4)  # (V, B, 4) -> (V * B, 4)
    jitters = [np.flatnonzero(order[:, turn] == which) for turn in range(4) for which in range(len(JITTERS))]
    arrays: dict[str, NDArray[Any]] = {
        "starts": images.starts,
        "row_bytes": images.sizes[:, 1] * images.channels * images.dtype.itemsize,
        "last_rows": images.sizes[:, 0] - 1,
        "boxes": crops.boxes.astype(np.float32),
        "flip": crops.flip,
        "factors": crops.factors.reshape(-1, 4).astype(np.float32),
        "gray": np.flatnonzero(crops.gray),
        "blurred": blurred,
        "blur_sigma_px": crops.blur_sigma_px.ravel()[blurred].astype(np.float32),
        "solarized": np.flatnonzero(crops.solarize),
        "mean": np.asarray(mean, dtype=np.float32),
        "std": np.asarray(std, dtype=np.float32),
    }
    heights, widths = extents(crops)
    chunks = resize_chunks(heights, widths, 4 * images.channels)
    placed = iter(copied([*arrays.values(), *jitters, *chunks], images.data.device))
    return PlacedCrops(
        **{name: next(placed) for name in arrays},
        jitters=[next(placed) for _ in jitters],
        chunks=[Chunk(next(placed), int(heights[rows].max()), int(widths[rows].max())) for rows in chunks],
    )


def apply_crops(
    images: PackedImages, crops: Crops, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Cut, resize and colour the crops of a batch.

    Args:
        mean, std: of each channel, for values in [0, 1], or one number each for all channels.

    Returns:
        (V * B, C, S, S) float32, normalised, view-major, on the device of `images`.
        Saturation, hue and grayscale need three channels. Brightness scales all channels alike and contrast draws them
        to one mean, so that the channels keep their relations; solarize inverts each.
    """
    placed = placed_crops(images, crops, mean, std)
    pixels = resized_crops(images, crops, placed).clamp_(0, 1)
    _jitter_(pixels, placed)
    if images.channels == 3 and len(placed.gray):
        pixels[placed.gray] = luma(pixels[placed.gray]).expand(-1, 3, -1, -1)
    _blur_(pixels, placed)
    if len(placed.solarized):
        chosen = pixels[placed.solarized]
        pixels[placed.solarized] = torch.where(chosen >= 128 / 255, 1 - chosen, chosen)
    shape = (1, -1, 1, 1)
    return pixels.sub_(placed.mean.view(shape)).div_(placed.std.view(shape))


def extents(crops: Crops) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (B,) how many rows and how many columns of each image its crops lie in."""
    top, left, height, width = np.moveaxis(crops.boxes, -1, 0)
    return (top + height).max(0), (left + width).max(0)


def resize_chunks(heights: NDArray[np.int64], widths: NDArray[np.int64], pixel_bytes: int) -> list[NDArray[np.int64]]:
    """Return the images that are resized together: all, or images of like shape while they take CHUNK_BYTES at most.

    Together they take as much memory as if each were as high as the highest and as wide as the widest.
    """

    def num_bytes(part: NDArray[np.int64]) -> int:
        return int(pixel_bytes * len(part) * heights[part].max() * widths[part].max())

    everything = np.arange(len(heights))
    if num_bytes(everything) <= CHUNK_BYTES:
        return [everything]
    order, chunks, start = np.argsort(heights / widths, kind="stable"), [], 0
    for end in range(1, len(order)):
        if num_bytes(order[start : end + 1]) > CHUNK_BYTES:
            chunks.append(order[start:end])
            start = end
    return [*chunks, order[start:]]


def resized_crops(images: PackedImages, crops: Crops, placed: PlacedCrops) -> Tensor:
    """Cut each box out, resize it to S x S and mirror it where asked.

    Equal to `F.interpolate(crop, S, mode="bicubic", antialias=True)` (and to Pillow's BICUBIC before it rounds), but as
    two matrix products with one pair of weight matrices an image, whose columns outside the box are zero.
    Returns (V * B, C, S, S) float32 in [0, 1], save for bicubic's overshoot.
    """
    channels, size = images.channels, crops.size_px
    num_views, batch = crops.flip.shape
    resized = torch.empty(num_views, batch, channels * size, size, device=images.data.device)
    is_all = len(placed.chunks) == 1
    for rows, height, width in placed.chunks:
        lines = _lines(images, placed, rows, height, width)
        boxes = placed.boxes if is_all else placed.boxes[:, rows]
        flip = placed.flip if is_all else placed.flip[:, rows]
        # Scaling by 1/255, or 1/65535, goes into the smaller matrix.
        down = resize_weights(boxes[..., 0], boxes[..., 2], height, size).div_(torch.iinfo(images.dtype).max)
        across = resize_weights(boxes[..., 1], boxes[..., 3], width, size, flip)
        for view in range(num_views):
            squeezed = torch.bmm(down[view], lines)  # (b, S, H) @ (b, H, W * C)
            squeezed = squeezed.view(len(rows), size, width, channels).permute(0, 3, 1, 2)  # -> (b, C, S, W)
            squeezed = squeezed.reshape(len(rows), channels * size, width)
            columns = across[view].transpose(1, 2)  # (b, W, S)
            if is_all:
                torch.bmm(squeezed, columns, out=resized[view])
            else:
                resized[view].index_copy_(0, rows, torch.bmm(squeezed, columns))
    return resized.view(num_views * batch, channels, size, size)


def _lines(images: PackedImages, placed: PlacedCrops, rows: Tensor, height: int, width: int) -> Tensor:
    """Return some images' pixels as (b, H, W * C) float32. Beyond an image are any others, which weigh nothing."""
    numbers = torch.arange(height, device=rows.device)
    numbers = torch.minimum(numbers, placed.last_rows[rows, None])  # (b, H)
    starts = placed.starts[rows, None] + numbers * placed.row_bytes[rows, None]
    length = width * images.channels * images.dtype.itemsize
    windows = images.data.as_strided((len(images.data) - length + 1, length), (1, 1))  # so many bytes from each byte on
    lines = windows.index_select(0, starts.view(-1)).view(images.dtype)
    return lines.view(len(rows), height, width * images.channels).float()


def resize_weights(
    starts: Tensor, lengths: Tensor, canvas_px: int, size_px: int, mirror: Tensor | None = None
) -> Tensor:
    """Return the weights by which an antialiased bicubic resize reads one axis of each crop.

    Args:
        starts, lengths: of the crops along the axis, in pixels, of any equal shape (...).
        canvas_px: length of the whole axis.
        size_px: length after resizing.
        mirror: (...) bool, crops that are reversed along the axis.

    Returns:
        (..., size_px, canvas_px) float32; each row sums to 1 and is zero outside the crop.

    Source: Pillow's Resample.c (Keys' cubic with a = -0.5, stretched by the scale when shrinking).
    """
    device = starts.device
    starts, lengths = starts[..., None, None], lengths[..., None, None]
    scale = lengths.double() / size_px
    steps = torch.arange(size_px, dtype=torch.float64, device=device)[:, None] + 0.5
    if mirror is not None:
        steps = torch.where(mirror[..., None, None], size_px - steps, steps)
    centers = starts + steps * scale - 0.5  # (..., size_px, 1) in pixel indices
    whole = centers.floor()  # subtracted apart, so that float32 holds the distance to 1e-7 at any position
    stretch = (1 / scale.clamp(min=1)).float()
    positions = torch.arange(canvas_px, dtype=torch.float32, device=device)
    distance = (positions - whole.float()).sub_((centers - whole).float()).mul_(stretch).abs_()
    # Keys' cubic for a = -0.5 without cases: u^2 (u - 1) / 2 + s^2 (1 - 2 s), u = max(2 - t, 0), s = max(1 - t, 0).
    inner = (1 - distance).clamp_(min=0)
    outer = distance.neg_().add_(2).clamp_(min=0)
    weights = outer.square().mul_(outer.sub_(1)).mul_(0.5)
    weights.addcmul_(inner.square(), inner.mul_(-2).add_(1))
    weights.mul_((positions >= starts) & (positions < starts + lengths))
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _jitter_(pixels: Tensor, placed: PlacedCrops) -> None:
    """Apply brightness, contrast, saturation and hue in place, each crop in its own order. Values stay in [0, 1]."""
    color = pixels.shape[1] == 3
    for number, rows in enumerate(placed.jitters):
        which = number % len(JITTERS)
        name = JITTERS[which]
        if not len(rows) or (not color and name in ("saturation", "hue")):
            continue
        chosen = pixels[rows]
        factor = placed.factors[rows, which].view(-1, 1, 1, 1)
        match name:
            case "brightness":
                chosen.mul_(factor)
            case "contrast":
                gray = luma(chosen) if color else chosen.mean(dim=1, keepdim=True)
                chosen = torch.lerp(gray.mean(dim=(2, 3), keepdim=True), chosen, factor)
            case "saturation":
                chosen = torch.lerp(luma(chosen), chosen, factor)
            case "hue":
                chosen = shift_hue(chosen, factor)
        pixels[rows] = chosen.clamp_(0, 1)


def luma(pixels: Tensor) -> Tensor:
    """Return the brightness (n, 1, S, S) of RGB crops (n, 3, S, S)."""
    red, green, blue = GRAY_WEIGHTS
    return (pixels[:, 0:1] * red).add_(pixels[:, 1:2], alpha=green).add_(pixels[:, 2:3], alpha=blue)


def shift_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB crops (n, 3, S, S) in [0, 1] by `turns` (n, 1, 1, 1) of the colour circle.

    HSV in closed form: channel(n) = value - chroma * max(0, min(k, 4 - k, 1)), k = (n + 6 hue) mod 6, n = 5, 3, 1.
    """
    red, green, blue = pixels.unbind(dim=1)
    value = pixels.amax(dim=1)
    chroma = value - pixels.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1)
    from_green_or_blue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sextant = torch.where(value == red, (green - blue) / safe, from_green_or_blue)
    sextant += 6 * turns[:, 0]
    offsets = torch.arange(5, 0, -2, device=pixels.device).view(1, 3, 1, 1)
    k = (sextant[:, None] + offsets).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur_(pixels: Tensor, placed: PlacedCrops) -> None:
    """Blur some crops in place: a Gaussian of at most 9 x 9 pixels, mirrored at the border."""
    if len(placed.blurred):
        weights = blur_weights(placed.blur_sigma_px, pixels.shape[-1])[:, None]  # (n, 1, S, S)
        pixels[placed.blurred] = weights @ pixels[placed.blurred] @ weights.transpose(2, 3)


def blur_weights(sigma_px: Tensor, size_px: int) -> Tensor:
    """Return (n, S, S) matrices that blur one axis by Gaussians of `sigma_px` (n,), reflecting at the border."""
    radius = min(BLUR_RADIUS_PX, size_px - 1)
    taps = torch.arange(-radius, radius + 1, device=sigma_px.device)
    kernel = torch.exp(-0.5 * (taps / sigma_px[:, None]).square())
    kernel /= kernel.sum(dim=1, keepdim=True)  # (n, taps)
    targets = torch.arange(size_px, device=sigma_px.device)
    sources = (targets[:, None] + taps).abs()  # reflect below 0, then above size - 1
    sources = size_px - 1 - (size_px - 1 - sources).abs()
    weights = kernel.new_zeros(len(kernel), size_px, size_px)
    index = sources.expand(len(kernel), -1, -1)
    return weights.scatter_add_(2, index, kernel[:, None].expand_as(index))
