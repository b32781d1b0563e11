"""A descriptor made for near-duplicates: a small convolutional network that ships with the package.

whole picture -> flat margins cut away -> 64 x 64 pixels of mean 0 -> convolutions -> 128 numbers of length 1

It was trained to tell a picture from others through re-encoding, resizing, light, crops, borders and small overlays
(`examples/build_copy_weights.py` makes the weights again; `benchmarks/copies.py` measures what it finds).
The idea of learning from copies: Pizzi et al. 2022 (A Self-Supervised Descriptor for Image Copy Detection).

Shapes: B images, S side in pixels, D embed_dim.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .preprocess import Preprocess
from .vit import Features

WEIGHTS_FILE = Path(__file__).with_name("copy_weights.safetensors")
PREPROCESS = Preprocess(image_size=128, crop_ratio=None, mean=(0.0,) * 3, std=(1.0,) * 3, in_chans=3)
TRIMMED_SIDE_PX = 64
THRESHOLD = 0.95  # cosine above which two pictures are copies

WIDTHS = (32, 64, 80)  # channels at 16 x 16, 8 x 8 and 4 x 4; chosen: as much as some hundred kB hold
PATCH_DIM = 32  # channels kept of each of the 4 x 4 places

LEAST_CONTRAST = 0.05  # chosen: what is paler counts as plain; of plain pictures the colour shows, not the noise
MARGIN_STD = 0.25  # chosen: a line is flat when its deviation is below this share of the picture's
MARGIN_STD_BOUNDS = (0.01, 0.06)  # chosen: the noise of a JPEG passes for flat, faint drawings do not
FRAME_RATIO = 2  # chosen: the sides of a frame are at most this unequal
MARGIN_BLUR = 2  # lines of 64 in which a tiny picture, enlarged, blurs from a frame into what it holds
LEAST_SHARE = 8  # what is left of a side must be an eighth of it, or the side stays whole


class CopyDescriptor(nn.Module):
    """The network; its class token is the descriptor, its patch tokens the 4 x 4 places it was made from."""

    embed_dim = 128

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.convolutions = nn.Sequential(
            convolution(3, first, kernel_size=6, stride=4, padding=1),  # (B, 3, 64, 64) -> (B, 32, 16, 16)
            nn.ReLU(),
            convolution(first, second, stride=2),
            nn.ReLU(),
            Residual(second),
            convolution(second, third, stride=2),
            nn.ReLU(),
            Residual(third),
            convolution(third, PATCH_DIM, kernel_size=1, padding=0),  # -> (B, 32, 4, 4)
            nn.ReLU(),
        )
        self.head = nn.Linear(16 * PATCH_DIM + 6, self.embed_dim)  # 6: mean and deviation of each colour

    def forward_features(self, images: Tensor) -> Features:
        """Return the features of pictures (B, 3, S, S) in [0, 1], S even; float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            return self.describe(without_margins(images.float()))

    def describe(self, trimmed: Tensor) -> Features:
        """Return the features of pictures (B, 3, 64, 64) in [0, 1] that have no margins."""
        mean, deviation = trimmed.mean((2, 3)), trimmed.std((2, 3), correction=0)  # (B, 3)
        contrast = deviation.square().mean(1, keepdim=True).sqrt()  # (B, 1)
        softened = contrast + LEAST_CONTRAST
        even = (trimmed - mean[:, :, None, None]) / softened[:, :, None, None]  # light and contrast hardly show
        places = self.convolutions(even)  # (B, 32, 4, 4)
        colours = torch.cat([2 * mean - 1, 4 * deviation], dim=1) * (LEAST_CONTRAST / softened) ** 2  # of plain ones
        descriptor = F.normalize(self.head(torch.cat([places.flatten(1), colours], dim=1)), dim=1)
        patch_tokens = places.flatten(2).transpose(1, 2)  # (B, 32, 4, 4) -> (B, 16, 32)
        return Features(descriptor, patch_tokens[:, :0], patch_tokens)


class Residual(nn.Module):
    """Two convolutions whose result is added to what went in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.added = nn.Sequential(convolution(width, width), nn.ReLU(), convolution(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, C, H, W) for the same."""
        return F.relu(tokens + self.added(tokens))


def convolution(
    in_chans: int, out_chans: int, *, kernel_size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    """Return a convolution with its batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, bias=False), nn.BatchNorm2d(out_chans)
    )


def without_margins(images: Tensor) -> Tensor:
    """Cut the flat margins off pictures (B, 3, S, S) in [0, 1], S even, and return the rest as (B, 3, 64, 64).

    A border, or a crop of it, then changes next to nothing. Sampling is linear between pixels.
    """
    side = images.shape[-1]
    halved = F.avg_pool2d(images, 2)
    left, right, top, bottom = (2.0 * bound for bound in content_bounds(halved).T)  # (B,) each
    steps = (torch.arange(TRIMMED_SIDE_PX, device=images.device) + 0.5) / TRIMMED_SIDE_PX
    across = left[:, None] + (right - left)[:, None] * steps  # (B, 64) pixels
    down = top[:, None] + (bottom - top)[:, None] * steps
    size = (len(images), TRIMMED_SIDE_PX, TRIMMED_SIDE_PX)
    grid = torch.stack([across[:, None, :].expand(size), down[:, :, None].expand(size)], dim=-1) * 2 / side - 1
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def content_bounds(images: Tensor) -> Tensor:
    """Return left, right, top and bottom (B, 4) int64 of what is not flat margin in pictures (B, 3, S, S) in [0, 1].

    A column or row is flat when its colours hardly deviate, so an even gradient goes too; what would lose nearly the
    whole of a side keeps it. First only a frame is taken, which may hide margins of another colour. These are then
    judged together, for within the margins of one direction plain content would be flat in the other.
    """
    side = images.shape[-1]
    lines = _Lines(
        images,
        images.square(),
        torch.arange(side, device=images.device),
        (MARGIN_STD * images.flatten(1).std(dim=1, correction=0)).clamp(*MARGIN_STD_BOUNDS)[:, None],
    )
    whole = torch.tensor([0, side, 0, side], device=images.device).expand(len(images), 4)
    widths = (_inside(lines, whole, blur=0) - whole).abs()
    frame = torch.minimum(widths, FRAME_RATIO * widths.amin(dim=1, keepdim=True))
    return _inside(lines, (whole - frame).abs(), blur=MARGIN_BLUR)


@dataclass(frozen=True)
class _Lines:
    """Pictures and what tells whether their lines are flat."""

    images: Tensor  # (B, 3, S, S)
    squares: Tensor  # (B, 3, S, S)
    places: Tensor  # (S,) 0..S - 1
    limit: Tensor  # (B, 1) standard deviation up to which a line is flat


def _inside(lines: _Lines, bounds: Tensor, blur: int) -> Tensor:
    """Return the bounds (B, 4) of what is left within `bounds` when flat lines go."""
    left, right, top, bottom = bounds.T
    rows, columns = _within(lines.places, top, bottom, blur), _within(lines.places, left, right, blur)
    flat_columns = _deviation(lines, rows, "bcyx,by->bcx") <= lines.limit
    flat_rows = _deviation(lines, columns, "bcyx,bx->bcy") <= lines.limit
    across = _content(flat_columns, lines.places, left, right)
    return torch.stack([*across, *_content(flat_rows, lines.places, top, bottom)], dim=1)


def _within(places: Tensor, first: Tensor, last: Tensor, blur: int) -> Tensor:
    """Return weights (B, S) that sum to 1 over the places of the stretch, but for what a border blurs into."""
    blurred = blur * (last - first > 4 * blur)
    inside = (places >= (first + blurred)[:, None]) & (places < (last - blurred)[:, None])
    return inside / inside.sum(dim=1, keepdim=True)


def _deviation(lines: _Lines, weights: Tensor, equation: str) -> Tensor:
    """Return the standard deviation along each line (B, S), of the colour in which it is largest."""
    mean, mean_square = torch.einsum(equation, lines.images, weights), torch.einsum(equation, lines.squares, weights)
    return (mean_square - mean.square()).clamp(min=0).sqrt().amax(dim=1)


def _content(flat: Tensor, places: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return where content begins and ends within first..last (B,), given which lines (B, S) are flat."""
    empty = flat | (places < first[:, None]) | (places >= last[:, None])
    begin = empty.long().cumprod(dim=1).sum(dim=1)
    end = flat.shape[1] - empty.flip(1).long().cumprod(dim=1).sum(dim=1)
    is_enough = end - begin >= flat.shape[1] // LEAST_SHARE
    return torch.where(is_enough, begin, first), torch.where(is_enough, end, last)


def load_copy_descriptor() -> CopyDescriptor:
    """Return the descriptor with the package's weights, in float32 and evaluation mode."""
    descriptor = CopyDescriptor()
    descriptor.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS_FILE).items()})
    return descriptor.eval().requires_grad_(False)


@cache
def copy_content_id() -> str:
    """Return the BLAKE2b-128 hex digest of the package's weights, for provenance."""
    return blake2b(WEIGHTS_FILE.read_bytes(), digest_size=16).hexdigest()
