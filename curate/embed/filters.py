"""Filters for images that are not worth embedding: too small, too elongated, almost constant, blurred.

Shapes: H, W pixels of a picture.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

MEASURED_SIDE = 256  # chosen: short side in pixels at which contrast and sharpness are measured, if it is not shorter
REASONS = ("below --min-", "above --max-")  # how the reasons of a filter begin


@dataclass(frozen=True)
class Filters:
    """Limits that an image must keep; None means no limit."""

    min_side: int | None = None  # pixels of the shorter side
    max_aspect: float | None = None  # longer / shorter side
    min_contrast: float | None = None  # standard deviation of the grey levels, 0 to 127.5
    min_sharpness: float | None = None  # variance of the Laplacian of the grey levels

    @property
    def decode_side(self) -> int:
        """Return the shorter side in pixels at which to decode for the measures; 0 where nothing is measured."""
        return MEASURED_SIDE if self.min_contrast is not None or self.min_sharpness is not None else 0

    def reason(self, picture: Image.Image, size: tuple[int, int]) -> str | None:
        """Return why an image is not wanted, or None.

        Args:
            picture: as decoded, perhaps at a half, a quarter or an eighth.
            size: its full (width, height) in pixels.
        """
        width, height = size
        if self.min_side is not None and min(size) < self.min_side:
            return f"below --min-side {self.min_side}: {width} x {height} pixels"
        if self.max_aspect is not None and max(size) > self.max_aspect * min(size):
            return f"above --max-aspect {self.max_aspect:g}: {max(size) / min(size):.2f}, {width} x {height} pixels"
        if not self.decode_side:
            return None
        grey = grey_levels(picture)
        if self.min_contrast is not None and (contrast := float(grey.std())) < self.min_contrast:
            return f"below --min-contrast {self.min_contrast:g}: {contrast:.2f}"
        if self.min_sharpness is not None and (found := sharpness(grey)) < self.min_sharpness:
            return f"below --min-sharpness {self.min_sharpness:g}: {found:.2f}"
        return None


def is_filtered(reason: str) -> bool:
    """Tell whether an image was removed by a filter, though it could be read."""
    return reason.startswith(REASONS)


def grey_levels(picture: Image.Image) -> npt.NDArray[np.float32]:
    """Return the grey levels (H, W) of a picture, in 0 to 255; its short side reduced to `MEASURED_SIDE`."""
    grey = picture.convert("L")
    scale = MEASURED_SIDE / min(grey.size)
    if scale < 1:
        # Area averages: the quickest, and without the halos of bicubic, which would count as sharp.
        grey = grey.resize([max(round(side * scale), 1) for side in grey.size], Image.Resampling.BOX)
    return np.asarray(grey, np.float32)


def sharpness(grey: npt.NDArray[np.float32]) -> float:
    """Return the variance of the Laplacian (four neighbours) over the inner pixels of (H, W); 0 where there are none.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy".
    """
    if min(grey.shape) < 3:
        return 0.0
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())
