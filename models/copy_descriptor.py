"""A descriptor made for near-duplicates; its weights ship with the package.

whole picture -> flat margins cut away -> 64 x 64 pixels of mean 0 and deviation 1
  -> how strong edges of eight directions and three sizes are at 6 x 6 places, and the colours at 8 x 8 -> a linear map
  -> a small convolutional network, which corrects what the map says
  -> their sum, 128 numbers of length 1

The linear map weighs down what changes between copies of one picture (other encodings, sizes, light, crops, borders)
against what tells pictures apart: linear discriminant analysis with a picture and its copies as a class, then
whitening. The network is learnt on top of it, by contrast between copies and other pictures that are much alike.
`examples/build_copy_weights.py` makes both again; `benchmarks/copies.py` measures what they find.

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
PREPROCESS = Preprocess(image_size=128, crop_ratio=None, mean=(0.0,) * 3, std=(1.0,) * 3)
THRESHOLD = 0.95  # cosine of copies, chosen: loses 1.3 % of the clip art it was chosen by, 2.3 % of other
TRIMMED_SIDE_PX = 64

DIRECTIONS, SIZES = 8, 3  # of edges; a size is twice the one before
EDGE_PLACES, COLOUR_PLACES = 6, 8  # a side
FREQUENCY = 0.25  # waves a pixel
ENVELOPE_PX = 1.6  # standard deviation of the Gaussian around the waves
FILTER_SIDE_PX = 11
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
NUM_PLAIN = 6  # the mean and deviation of each colour, for plain pictures
NUM_MEASURED = NUM_PLAIN + SIZES * DIRECTIONS * EDGE_PLACES**2 + 3 * COLOUR_PLACES**2

WIDTHS = (24, 48, 96)  # channels of the network at 32, 16 and 8 places a side
LAST_WIDTH, LAST_PLACES = 32, 8

LEAST_CONTRAST = 0.05  # chosen: what is paler counts as plain; of plain pictures the colour shows, not the noise
MARGIN_STD = 0.25  # chosen: a line is flat when its deviation is below this share of the picture's
MARGIN_LEAST_STD = 0.01  # chosen: or below the noise of a JPEG
LINES = 5  # chosen: a line's deviation is averaged over so many, against noise
FRAME_RATIO = 2  # chosen: the sides of a frame are at most this unequal
FRAME_BLUR_PX = 2  # chosen: in which a frame blurs into what it holds
LEAST_SHARE = 8  # what is left of a side must be an eighth of it, or the side stays whole


class CopyDescriptor(nn.Module):
    """The descriptor as a backbone: its class token is the descriptor, its patch tokens the edges at 6 x 6 places."""

    embed_dim = 128
    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", gabor_filters(), persistent=False)
        self.head = nn.Linear(NUM_MEASURED, self.embed_dim)
        self.correction = Correction(self.embed_dim)

    def forward_features(self, images: Tensor) -> Features:
        """Return the features of pictures (B, 3, S, S) in [0, 1], S even; float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            even, plain = evened(without_margins(images.float()))
            measured = self.measure(even, plain)
            descriptor = F.normalize(self.mapped(measured) + self.correction(even, plain), dim=1)
        edges = measured[:, NUM_PLAIN : NUM_MEASURED - 3 * COLOUR_PLACES**2]
        patch_tokens = edges.view(len(images), -1, EDGE_PLACES**2).transpose(1, 2)  # (B, E) -> (B, 36, 24)
        return Features(descriptor, patch_tokens[:, :0], patch_tokens)

    def mapped(self, measured: Tensor) -> Tensor:
        """Return what the linear map makes (B, D), of length 1, of what it sees (B, E)."""
        return F.normalize(self.head(measured), dim=1)

    def measure(self, even: Tensor, plain: Tensor) -> Tensor:
        """Return what the linear map sees (B, E) of what `evened` returns."""
        grey = (even * even.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
        edges = [self.edges(grey if size == 0 else F.avg_pool2d(grey, 2**size), size) for size in range(SIZES)]
        colours = F.adaptive_avg_pool2d(even, COLOUR_PLACES)
        return torch.cat([plain, *edges, colours.flatten(1)], dim=1)

    def edges(self, grey: Tensor, size: int) -> Tensor:
        """Return how strong edges of each direction are at 6 x 6 places of (B, 1, s, s): (B, 8 x 36)."""
        padded = F.pad(grey, (FILTER_SIDE_PX // 2,) * 4, mode="replicate")
        even, odd = F.conv2d(padded, self.waves, stride=2 if size == 0 else 1).chunk(2, dim=1)
        strength = (even.square() + odd.square() + 1e-4).pow(0.25)  # a root, so that no edge outshouts the rest
        return F.adaptive_avg_pool2d(strength, EDGE_PLACES).flatten(1)


class Correction(nn.Module):
    """A convolutional network of eight layers that is added to the linear map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.body = nn.Sequential(
            convolution(3, first, 5, stride=2),
            convolution(first, second, 3, stride=2),
            Residual(second),
            convolution(second, third, 3, stride=2),
            Residual(third),
            convolution(third, LAST_WIDTH, 1),
        )
        self.head = nn.Linear(LAST_WIDTH * LAST_PLACES**2 + NUM_PLAIN, dim)

    def forward(self, even: Tensor, plain: Tensor) -> Tensor:
        """Return (B, D) of what `evened` returns."""
        maps = self.body(even.contiguous(memory_format=torch.channels_last))  # a tenth faster
        correction: Tensor = self.head(torch.cat([maps.flatten(1), plain], dim=1))
        return correction


class Residual(nn.Module):
    """Two convolutions around which their input is added to their output (He et al. 2016, figure 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width, 3)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C, s, s) of the same."""
        return F.relu(maps + self.second(self.first(maps)))


def convolution(in_width: int, out_width: int, side: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution, its batch normalisation and ReLU."""
    layer = nn.Conv2d(in_width, out_width, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_width), nn.ReLU())


def evened(trimmed: Tensor) -> tuple[Tensor, Tensor]:
    """Return pictures (B, 3, 64, 64) in [0, 1] in even light and contrast, and what tells plain ones apart (B, 6)."""
    mean, deviation = trimmed.mean((2, 3)), trimmed.std((2, 3), correction=0)  # (B, 3)
    contrast = deviation.square().mean(dim=1, keepdim=True).sqrt() + LEAST_CONTRAST  # (B, 1)
    even = (trimmed - mean[:, :, None, None]) / contrast[:, :, None, None]
    return even, torch.cat([2 * mean - 1, 4 * deviation], dim=1) * (LEAST_CONTRAST / contrast) ** 2


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
    left, right, top, bottom = content_bounds(images).T  # (B,) each
    steps = (torch.arange(TRIMMED_SIDE_PX, device=images.device) + 0.5) / TRIMMED_SIDE_PX
    across = left[:, None] + (right - left)[:, None] * steps  # (B, 64) pixels
    down = top[:, None] + (bottom - top)[:, None] * steps
    size = (len(images), TRIMMED_SIDE_PX, TRIMMED_SIDE_PX)
    grid = torch.stack([across[:, None, :].expand(size), down[:, :, None].expand(size)], dim=-1)
    return F.grid_sample(images, grid * 2 / images.shape[-1] - 1, align_corners=False, padding_mode="border")


def content_bounds(images: Tensor) -> Tensor:
    """Return left, right, top and bottom (B, 4) in pixels of what is no flat margin in pictures (B, 3, S, S) in [0, 1].

    A column or row is flat when its colours hardly deviate, so an even gradient goes too; what would lose nearly the
    whole of a side keeps it. A bound lies between two lines, where the deviation crosses the limit: by whole lines, the
    noise of a JPEG would move it further than it moves the content. First only a frame is taken, which may hide margins
    of another colour. These are then judged together, for within the margins of one direction plain content would be
    flat in the other.
    """
    side = images.shape[-1]
    columns, rows = F.avg_pool2d(images, (2, 1)), F.avg_pool2d(images, (1, 2)).mT  # (B, 3, S / 2, S) lines side by side
    moments = [(lines, lines.square()) for lines in (columns, rows)]
    whole = images.new_tensor([0, side, 0, side]).expand(len(images), 4)
    widths = (_inside(moments, whole, blur_px=0) - whole).abs()
    frame = torch.minimum(widths, FRAME_RATIO * widths.amin(dim=1, keepdim=True))
    return _inside(moments, (whole - frame).abs(), blur_px=FRAME_BLUR_PX)


def _inside(moments: list[tuple[Tensor, Tensor]], bounds: Tensor, blur_px: float) -> Tensor:
    """Return the bounds (B, 4) of what is left within `bounds` when flat lines go.

    Args:
        moments: columns and their squares, (B, 3, S / 2, S) each, then rows and theirs.
        bounds: (B, 4).
        blur_px: how far a frame blurs into what it holds.
    """
    side = moments[0][0].shape[-1]
    left, right, top, bottom = bounds.T  # (B,) each
    profiles = []
    for lines, first, last in zip(moments, (top, left), (bottom, right), strict=True):
        weights = _within(side, 2, first, last, blur_px)[:, None, None]  # (B, 1, 1, S / 2)
        profiles.append([(weights @ each)[:, :, 0] for each in lines])  # mean and mean square of each line, (B, 3, S)
    across, down = ((mean_square - mean.square()).clamp(min=0).sqrt().amax(dim=1) for mean, mean_square in profiles)
    weights = _within(side, 1, left, right, blur_px)[:, :, None]
    mean, mean_square = (each @ weights for each in profiles[0])  # (B, 3, 1), of all that is inside
    deviation = (mean_square - mean.square()).clamp(min=0).mean(dim=1).sqrt()  # (B, 1)
    limit = (MARGIN_STD * deviation).clamp(min=MARGIN_LEAST_STD)
    return torch.stack([*_content(across / limit, left, right), *_content(down / limit, top, bottom)], dim=1)


def _within(side: int, step: int, first: Tensor, last: Tensor, blur_px: float) -> Tensor:
    """Return weights (B, S / step) that sum to 1 over the places of a stretch, but for what a frame blurs into."""
    blurred = blur_px * (last - first > 4 * blur_px)
    places = (torch.arange(side // step, device=first.device) + 0.5) * step
    inside = (places >= (first + blurred)[:, None]) & (places <= (last - blurred)[:, None])
    return inside / inside.sum(dim=1, keepdim=True).clamp(min=1)


def _content(strength: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return where content begins and ends within first..last (B,): where the strength of lines (B, S) crosses 1."""
    side = strength.shape[1]
    padded = F.pad(strength[:, None], (LINES // 2,) * 2, mode="replicate")
    even = F.avg_pool1d(padded, LINES, stride=1)[:, 0]
    begin, end = _crossing(even, first), side - _crossing(even.flip(1), side - last)
    is_enough = end - begin >= side / LEAST_SHARE
    return torch.where(is_enough, begin, first), torch.where(is_enough, end, last)


def _crossing(strength: Tensor, first: Tensor) -> Tensor:
    """Return where the strength of lines (B, S) first rises above 1, linear between them and not before first (B,)."""
    strength = F.pad(strength, (1, 0))  # nothing before the first line; the middle of line i is now at i - 0.5
    is_content = (strength > 1) & (torch.arange(strength.shape[1], device=first.device) > first[:, None])
    line = is_content.long().argmax(dim=1, keepdim=True).clamp(min=1)
    before, after = strength.gather(1, line - 1), strength.gather(1, line)
    share = ((1 - before) / (after - before).clamp(min=1e-6)).clamp(0, 1)
    return torch.where(is_content.any(dim=1), torch.maximum((line - 1.5 + share)[:, 0], first), first)


def load_copy_descriptor() -> CopyDescriptor:
    """Return the descriptor with the package's weights, in float32 and evaluation mode."""
    descriptor = CopyDescriptor()
    descriptor.load_state_dict(load_file(WEIGHTS_FILE))
    descriptor.correction.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return descriptor.eval().requires_grad_(False)


@cache
def copy_content_id() -> str:
    """Return the BLAKE2b-128 hex digest of the package's weights, for provenance."""
    return blake2b(WEIGHTS_FILE.read_bytes(), digest_size=16).hexdigest()
