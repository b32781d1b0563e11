"""Random crops and colours of whole batches: drawn in one pure function, applied in another.

`draw_crops` turns (seed, sample) into numbers, in NumPy; `apply_crops` turns images and those numbers into crops, in
torch, on any device. A sample has the same crops in any batch and process.

Shapes: B images, V views of each, C channels, H x W the canvas that images of different sizes are padded to, S the
side of a crop. Crops are view-major: (V * B, C, S, S), all first views first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from .. import counter_rng
from ..transfer import copied

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as Pillow's
BLUR_RADIUS_PX = 4  # the released code's kernel is 9 wide at every crop size
CHUNK_BYTES = 256 << 20  # chosen: of images in float32, resized together
CROP_ATTEMPTS = 10  # draws of area and aspect before the central crop, as in torchvision's RandomResizedCrop
ASPECT = (3 / 4, 4 / 3)  # of a crop, width over height, as in RandomResizedCrop
JITTERS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class ViewSettings:
    """How the views of one size are drawn. Probabilities are those of the operation being applied.

    `blur` and `solarize` hold one probability a view. The released DINOv2 code passed 1 - p where p was meant: its
    models saw blur with (0, 0.9, 0.5) for the first global, second global and local crops, not (1, 0.1, 0.5).
    Source: facebookresearch/dinov2, data/augmentations.py and pull request 411.
    """

    size_px: int
    scale: tuple[float, float]  # area of the crop over area of the image
    blur: tuple[float, ...]
    solarize: tuple[float, ...]
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # of JITTERS
    grayscale: float = 0.2
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, ...] = IMAGENET_MEAN  # a number a channel, of values in [0, 1], by which crops are normalised
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class Crops:
    """What happens to each crop: arrays of shape (V, B), or (V, B, n)."""

    size_px: int
    boxes: NDArray[np.int64]  # (V, B, 4): top, left, height, width in pixels of the image
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    factors: NDArray[np.float64]  # (V, B, 4): of JITTERS; brightness, contrast, saturation around 1, hue around 0 turns
    order: NDArray[np.int64]  # (V, B, 4): the order in which JITTERS are applied
    gray: NDArray[np.bool_]
    blur_sigma_px: NDArray[np.float64]  # 0 where not blurred
    solarize: NDArray[np.bool_]


def draw_crops(
    seed: int, purpose: str, samples: NDArray[np.int64], sizes: NDArray[np.int64], view: ViewSettings
) -> Crops:
    """Draw the crops of a batch.

    Args:
        purpose: keeps global and local crops apart.
        samples: (B,) index of each sample in the run.
        sizes: (B, 2) height and width of each image in pixels.
    """
    num_views = len(view.blur)
    # Random numbers of a crop: area and aspect of each attempt, 2 for its place, 4 factors, 4 sort keys, 7 others.
    slots = 2 * CROP_ATTEMPTS + 2 + 4 + 4 + 7
    numbers = counter_rng.uniform(seed, purpose, samples, num_views * slots)
    numbers = numbers.reshape(len(samples), num_views, slots).transpose(2, 1, 0)  # (B, V * slots) -> (slots, V, B)
    box, place, factors, keys, rest = np.split(numbers, np.cumsum([2 * CROP_ATTEMPTS, 2, 4, 4]))
    neutral, strength = np.array([1.0, 1.0, 1.0, 0.0]), np.array(view.jitter_strength)
    low, high = np.maximum(neutral - strength, [0.0, 0.0, 0.0, -np.inf]), neutral + strength
    flip, jitter, gray, blur, sigma, solarize, _ = rest
    lowest_sigma, highest_sigma = view.blur_sigma_px
    sigma_px = lowest_sigma + sigma * (highest_sigma - lowest_sigma)
    return Crops(
        size_px=view.size_px,
        boxes=_random_boxes(box, place, sizes, view),
        flip=flip < view.flip,
        jitter=jitter < view.jitter,
        factors=low + factors.transpose(1, 2, 0) * (high - low),
        order=keys.transpose(1, 2, 0).argsort(axis=-1),
        gray=gray < view.grayscale,
        blur_sigma_px=np.where(blur < np.array(view.blur)[:, None], sigma_px, 0.0),
        solarize=solarize < np.array(view.solarize)[:, None],
    )


def _random_boxes(
    numbers: NDArray[np.float64], place: NDArray[np.float64], sizes: NDArray[np.int64], view: ViewSettings
) -> NDArray[np.int64]:
    """Return (V, B, 4) top, left, height, width: the first attempt that fits, else the largest central crop allowed.

    Area is uniform in `view.scale`, aspect log-uniform in ASPECT, as in torchvision's RandomResizedCrop.
    """
    image_height, image_width = sizes[:, 0], sizes[:, 1]
    area = image_height * image_width * (view.scale[0] + numbers[:CROP_ATTEMPTS] * (view.scale[1] - view.scale[0]))
    log_aspect = np.log(ASPECT[0]) + numbers[CROP_ATTEMPTS:] * np.log(ASPECT[1] / ASPECT[0])
    widths = np.rint(np.sqrt(area * np.exp(log_aspect))).astype(np.int64)  # (attempts, V, B)
    heights = np.rint(np.sqrt(area / np.exp(log_aspect))).astype(np.int64)
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first = fits.argmax(axis=0)[None]
    image_aspect = image_width / image_height
    central_width = np.where(image_aspect > ASPECT[1], np.rint(image_height * ASPECT[1]), image_width)
    central_height = np.where(image_aspect < ASPECT[0], np.rint(image_width / ASPECT[0]), image_height)
    found = fits.any(axis=0)
    width = np.where(found, np.take_along_axis(widths, first, 0)[0], np.maximum(central_width, 1))
    height = np.where(found, np.take_along_axis(heights, first, 0)[0], np.maximum(central_height, 1))
    free_height, free_width = image_height - height, image_width - width
    top = np.where(found, np.floor(place[0] * (free_height + 1)), free_height // 2)
    left = np.where(found, np.floor(place[1] * (free_width + 1)), free_width // 2)
    return np.stack([top, left, height, width], axis=-1).astype(np.int64)


class PlacedCrops(NamedTuple):
    """`Crops` on a device, with the numbers (n,) of the crops among V * B that each operation changes."""

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
    chunks: list[Tensor]  # the images that are resized together


def placed_crops(
    crops: Crops, mean: Sequence[float], std: Sequence[float], channels: int, device: torch.device
) -> PlacedCrops:
    """Return crops of images of so many channels on a device, by one copy; all sizes are known on the host."""
    blurred = np.flatnonzero(crops.blur_sigma_px)
    order = np.where(crops.jitter[..., None], crops.order, -1).reshape(-1, 4)  # (V, B, 4) -> (V * B, 4)
    jitters = [np.flatnonzero(order[:, turn] == which) for turn in range(4) for which in range(len(JITTERS))]
    arrays = [
        crops.boxes.astype(np.float32),
        crops.flip,
        crops.factors.reshape(-1, 4).astype(np.float32),
        np.flatnonzero(crops.gray),
        blurred,
        crops.blur_sigma_px.ravel()[blurred].astype(np.float32),
        np.flatnonzero(crops.solarize),
        np.asarray(mean, dtype=np.float32),
        np.asarray(std, dtype=np.float32),
    ]
    placed = copied([*arrays, *jitters, *resize_chunks(crops, channels)], device)
    boxes, flip, factors, gray, blurred_rows, sigma_px, solarized, means, stds = placed[: len(arrays)]
    jitter_rows, chunks = placed[len(arrays) : len(arrays) + len(jitters)], placed[len(arrays) + len(jitters) :]
    return PlacedCrops(boxes, flip, factors, gray, blurred_rows, sigma_px, solarized, means, stds, jitter_rows, chunks)


def apply_crops(
    images: Tensor, crops: Crops, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Cut, resize and colour the crops of a batch.

    Args:
        images: (B, H, W, C) uint8 or uint16, each image in the top left corner of the canvas.
        mean, std: of each channel, for values in [0, 1], or one number each for all channels.

    Returns:
        (V * B, C, S, S) float32, normalised, view-major, on the device of `images`.
        Saturation, hue and grayscale need three channels. Brightness scales all channels alike and contrast draws them
        to one mean, so that the channels keep their relations; solarize inverts each.
    """
    channels = images.shape[3]
    placed = placed_crops(crops, mean, std, channels, images.device)
    pixels = resized_crops(images, crops, placed).clamp_(0, 1)
    _jitter_(pixels, placed)
    if channels == 3 and len(placed.gray):
        pixels[placed.gray] = luma(pixels[placed.gray]).expand(-1, 3, -1, -1)
    _blur_(pixels, placed)
    if len(placed.solarized):
        chosen = pixels[placed.solarized]
        pixels[placed.solarized] = torch.where(chosen >= 128 / 255, 1 - chosen, chosen)
    shape = (1, -1, 1, 1)
    return pixels.sub_(placed.mean.view(shape)).div_(placed.std.view(shape))


def resize_chunks(crops: Crops, channels: int) -> list[NDArray[np.int64]]:
    """Return the images that are resized together: all, or images of like shape while they take CHUNK_BYTES at most.

    Together they take as much memory as if each were as high as the highest and as wide as the widest.
    """
    heights, widths = _extents(crops)

    def num_bytes(part: NDArray[np.int64]) -> int:
        return int(4 * channels * len(part) * heights[part].max() * widths[part].max())

    everything = np.arange(len(heights))
    if num_bytes(everything) <= CHUNK_BYTES:
        return [everything]
    order, chunks, start = np.argsort(heights / widths, kind="stable"), [], 0
    for end in range(1, len(order)):
        if num_bytes(order[start : end + 1]) > CHUNK_BYTES:
            chunks.append(order[start:end])
            start = end
    return [*chunks, order[start:]]


def _extents(crops: Crops) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (B,) how many rows and how many columns of each image its crops lie in."""
    top, left, height, width = np.moveaxis(crops.boxes, -1, 0)
    return (top + height).max(0), (left + width).max(0)


def resized_crops(images: Tensor, crops: Crops, placed: PlacedCrops | None = None) -> Tensor:
    """Cut each box out, resize it to S x S and mirror it where asked.

    Equal to `F.interpolate(crop, S, mode="bicubic", antialias=True)` (and to Pillow's BICUBIC before it rounds), but as
    two matrix products with one pair of weight matrices an image, whose columns outside the box are zero.
    From (B, H, W, C) uint8 or uint16 to (V * B, C, S, S) float32 in [0, 1], save for bicubic's overshoot.
    """
    channels, size = images.shape[3], crops.size_px
    placed = placed or placed_crops(crops, (0.0,), (1.0,), channels, images.device)
    num_views, batch = crops.flip.shape
    resized = torch.empty(num_views, batch, channels * size, size, device=images.device)
    heights, widths = _extents(crops)
    for host_rows, rows in zip(resize_chunks(crops, channels), placed.chunks, strict=True):
        height, width = int(heights[host_rows].max()), int(widths[host_rows].max())
        is_all = len(placed.chunks) == 1
        part = images[:, :height, :width] if is_all else images[rows, :height, :width]
        lines = part.reshape(len(rows), height, width * channels).float()
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
