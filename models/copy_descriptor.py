"""A descriptor made for near-duplicates; its weights ship with the package.

whole picture -> flat margins cut away -> 64 x 64 pixels of mean 0 and deviation 1 -> how strong edges of eight
directions and three sizes are at 4 x 4 places, and the colours at 8 x 8 -> a linear map -> 128 numbers of length 1

The linear map weighs down what changes between copies of one picture (other encodings, sizes, light, crops, borders,
small overlays) against what tells pictures apart: linear discriminant analysis with a picture and its copies as a
class, then whitening. `examples/build_copy_weights.py` makes it again; `benchmarks/copies.py` measures what it finds.

Shapes: B images, S side in pixels, E numbers before the map, D embed_dim.
"""

import math
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
THRESHOLD = 0.935  # cosine above which two pictures are copies; loses at most 2 % (benchmarks/results/copies.md)
TRIMMED_SIDE_PX = 64

DIRECTIONS, SIZES = 8, 3  # of edges; a size is twice the one before
EDGE_PLACES, COLOUR_PLACES = 4, 8  # a side
FREQUENCY = 0.25  # waves a pixel
ENVELOPE_PX = 1.6  # standard deviation of the Gaussian around the waves
FILTER_SIDE_PX = 11
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
NUM_MEASURED = 6 + SIZES * DIRECTIONS * EDGE_PLACES**2 + 3 * COLOUR_PLACES**2

LEAST_CONTRAST = 0.05  # chosen: what is paler counts as plain; of plain pictures the colour shows, not the noise
MARGIN_STD = 0.15  # chosen: a line is flat when its deviation is below this share of the picture's
MARGIN_LEAST_STD = 0.01  # chosen: or below the noise of a JPEG
FRAME_RATIO = 2  # chosen: the sides of a frame are at most this unequal
MARGIN_BLUR = 2  # lines of 64 in which a tiny picture, enlarged, blurs from a frame into what it holds
LEAST_SHARE = 8  # what is left of a side must be an eighth of it, or the side stays whole


class CopyDescriptor(nn.Module):
    """The descriptor as a backbone: its class token is the descriptor, its patch tokens the edges at 4 x 4 places."""

    embed_dim = 128
    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", gabor_filters(), persistent=False)
        self.head = nn.Linear(NUM_MEASURED, self.embed_dim)

    def forward_features(self, images: Tensor) -> Features:
        """Return the features of pictures (B, 3, S, S) in [0, 1], S even; float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            measured = self.measure(without_margins(images.float()))
            descriptor = F.normalize(self.head(measured), dim=1)
        edges = measured[:, 6 : NUM_MEASURED - 3 * COLOUR_PLACES**2]
        patch_tokens = edges.view(len(images), -1, EDGE_PLACES**2).transpose(1, 2)  # (B, E) -> (B, 16, 24)
        return Features(descriptor, patch_tokens[:, :0], patch_tokens)

    def measure(self, trimmed: Tensor) -> Tensor:
        """Return what the linear map sees (B, E) of pictures (B, 3, 64, 64) in [0, 1] that have no margins."""
        mean, deviation = trimmed.mean((2, 3)), trimmed.std((2, 3), correction=0)  # (B, 3)
        contrast = deviation.square().mean(dim=1, keepdim=True).sqrt() + LEAST_CONTRAST  # (B, 1)
        even = (trimmed - mean[:, :, None, None]) / contrast[:, :, None, None]  # light and contrast no longer show
        plain = torch.cat([2 * mean - 1, 4 * deviation], dim=1) * (LEAST_CONTRAST / contrast) ** 2
        grey = (even * even.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
        edges = [self.edges(grey if size == 0 else F.avg_pool2d(grey, 2**size), size) for size in range(SIZES)]
        colours = F.adaptive_avg_pool2d(even, COLOUR_PLACES)
        return torch.cat([plain, *edges, colours.flatten(1)], dim=1)

    def edges(self, grey: Tensor, size: int) -> Tensor:
        """Return how strong edges of each direction are at 4 x 4 places of (B, 1, s, s): (B, 8 x 16)."""
        padded = F.pad(grey, (FILTER_SIDE_PX // 2,) * 4, mode="replicate")
        even, odd = F.conv2d(padded, self.waves, stride=2 if size == 0 else 1).chunk(2, dim=1)
        strength = (even.square() + odd.square() + 1e-4).pow(0.25)  # a root, so that no edge outshouts the rest
        return F.adaptive_avg_pool2d(strength, EDGE_PLACES).flatten(1)


def gabor_filters() -> Tensor:
    """Return cosine and then sine waves of eight directions in a Gaussian envelope, of sum 0, (16, 1, 11, 11)."""
    offsets = torch.arange(FILTER_SIDE_PX, dtype=torch.float32) - FILTER_SIDE_PX // 2
    down, across = torch.meshgrid(offsets, offsets, indexing="ij")
    envelope = torch.exp(-(down.square() + across.square()) / (2 * ENVELOPE_PX**2))
    envelope = envelope / envelope.sum()
    angles = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    phases = 2 * math.pi * FREQUENCY * (across * angles.cos()[:, None, None] + down * angles.sin()[:, None, None])
    waves = torch.cat([phases.cos(), phases.sin()]) * envelope  # (16, 11, 11)
    return (waves - envelope * waves.sum((1, 2), keepdim=True))[:, None]


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
    squares, side = images.square(), images.shape[-1]
    whole = torch.tensor([0, side, 0, side], device=images.device).expand(len(images), 4)
    widths = (_inside(images, squares, whole, blur=0) - whole).abs()
    frame = torch.minimum(widths, FRAME_RATIO * widths.amin(dim=1, keepdim=True))
    return _inside(images, squares, (whole - frame).abs(), blur=MARGIN_BLUR)


def _inside(images: Tensor, squares: Tensor, bounds: Tensor, blur: int) -> Tensor:
    """Return the bounds (B, 4) of what is left within `bounds` when flat lines go."""
    left, right, top, bottom = bounds.T
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = _within(places, top, bottom, blur), _within(places, left, right, blur)
    deviation = _deviation(images, squares, "bcyx,by,bx->bc", rows, columns)  # (B, 3)
    limit = (MARGIN_STD * deviation.square().mean(dim=1, keepdim=True).sqrt()).clamp(min=MARGIN_LEAST_STD)
    flat_columns = _deviation(images, squares, "bcyx,by->bcx", rows).amax(dim=1) <= limit
    flat_rows = _deviation(images, squares, "bcyx,bx->bcy", columns).amax(dim=1) <= limit
    across = _content(flat_columns, places, left, right)
    return torch.stack([*across, *_content(flat_rows, places, top, bottom)], dim=1)


def _within(places: Tensor, first: Tensor, last: Tensor, blur: int) -> Tensor:
    """Return weights (B, S) that sum to 1 over the places of the stretch, but for what a frame blurs into."""
    blurred = blur * (last - first > 4 * blur)
    inside = (places >= (first + blurred)[:, None]) & (places < (last - blurred)[:, None])
    return inside / inside.sum(dim=1, keepdim=True)


def _deviation(images: Tensor, squares: Tensor, equation: str, *weights: Tensor) -> Tensor:
    """Return the standard deviation of each colour over what the weights cover."""
    mean, mean_square = torch.einsum(equation, images, *weights), torch.einsum(equation, squares, *weights)
    return (mean_square - mean.square()).clamp(min=0).sqrt()


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
