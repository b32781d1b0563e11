"""Random crops of a batch, drawn: a pure function of (seed, sample), in NumPy.

A sample has the same crops in any batch and process. `augment` cuts and colours them.

Shapes: B images, V views of each.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from .. import counter_rng

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
