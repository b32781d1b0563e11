"""A descriptor made for near-duplicates; its weights ship with the package.

image -> flat margins cropped -> 64 x 64 pixels, standardised
  -> Gabor energies of eight directions and three scales at 6 x 6 places, colours at 8 x 8 places -> a linear map
  -> a small convolutional network, whose output corrects the map's
  -> the sum of both, 128 numbers of length 1

The linear map is a linear discriminant analysis with an image and its copies (other encodings, sizes, light, crops,
borders) as a class, then whitening. The network is trained on top of it, by contrast between copies and similar images.
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

DIRECTIONS, SCALES = 8, 3  # of the Gabor filters; a scale is twice the one before
EDGE_PLACES, COLOUR_PLACES = 6, 8  # a side
FREQUENCY = 0.25  # waves a pixel
ENVELOPE_PX = 1.6  # standard deviation of the Gaussian around the waves
FILTER_SIDE_PX = 11
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
NUM_PLAIN = 6  # the mean and deviation of each colour, for plain images
NUM_FEATURES = NUM_PLAIN + SCALES * DIRECTIONS * EDGE_PLACES**2 + 3 * COLOUR_PLACES**2

WIDTHS = (24, 48, 96)  # channels of the network at 32, 16 and 8 places a side
LAST_WIDTH, LAST_PLACES = 32, 8

LEAST_CONTRAST = 0.05  # chosen: an image of less is plain, and its colour counts instead of its noise
MARGIN_STD = 0.25  # chosen: a line is flat when its deviation is below this share of the image's
MARGIN_LEAST_STD = 0.01  # chosen: or below the noise of a JPEG
LINES = 5  # chosen: a line's deviation is averaged over so many, against noise
FRAME_RATIO = 2  # chosen: the sides of a frame are at most this unequal
FRAME_BLUR_PX = 2  # chosen: how far a frame blurs into its content
LEAST_SHARE = 8  # the content must be an eighth of a side, or the side stays whole


class CopyDescriptor(nn.Module):
    """The descriptor as a backbone: the class token is the descriptor, the patch tokens energies at 6 x 6 places."""

    embed_dim = 128
    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", gabor_filters(), persistent=False)
        self.head = nn.Linear(NUM_FEATURES, self.embed_dim)
        self.correction = Correction(self.embed_dim)

    def forward_features(self, images: Tensor) -> Features:
        """Return the features of images (B, 3, S, S) in [0, 1], S even; float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            standardised, plain = standardise(crop_margins(images.float()))
            features = self.gabor_colour_features(standardised, plain)
            descriptor = F.normalize(self.project(features) + self.correction(standardised, plain), dim=1)
        energies = features[:, NUM_PLAIN : NUM_FEATURES - 3 * COLOUR_PLACES**2]
        patch_tokens = energies.view(len(images), -1, EDGE_PLACES**2).transpose(1, 2)  # (B, E) -> (B, 36, 24)
        return Features(descriptor, patch_tokens[:, :0], patch_tokens)

    def project(self, features: Tensor) -> Tensor:
        """Return the linear map of features (B, E), of length 1, (B, D)."""
        return F.normalize(self.head(features), dim=1)

    def gabor_colour_features(self, standardised: Tensor, plain: Tensor) -> Tensor:
        """Return the input of the linear map (B, E), from what `standardise` returns."""
        grey = (standardised * standardised.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
        energies = [self.gabor_energy(F.avg_pool2d(grey, 2**scale), scale) for scale in range(SCALES)]
        colours = F.adaptive_avg_pool2d(standardised, COLOUR_PLACES)
        return torch.cat([plain, *energies, colours.flatten(1)], dim=1)

    def gabor_energy(self, grey: Tensor, scale: int) -> Tensor:
        """Return the energy of each direction at 6 x 6 places of (B, 1, s, s): (B, 8 x 36)."""
        padded = F.pad(grey, (FILTER_SIDE_PX // 2,) * 4, mode="replicate")
        cosine, sine = F.conv2d(padded, self.waves, stride=2 if scale == 0 else 1).chunk(2, dim=1)
        energy = (cosine.square() + sine.square() + 1e-4).pow(0.25)  # a root, so that no edge dominates the rest
        return F.adaptive_avg_pool2d(energy, EDGE_PLACES).flatten(1)


class Correction(nn.Module):
    """A convolutional network of eight layers whose output is added to the linear map's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.body = nn.Sequential(
            conv_bn_relu(3, first, 5, stride=2),
            conv_bn_relu(first, second, 3, stride=2),
            Residual(second),
            conv_bn_relu(second, third, 3, stride=2),
            Residual(third),
            conv_bn_relu(third, LAST_WIDTH, 1),
        )
        self.head = nn.Linear(LAST_WIDTH * LAST_PLACES**2 + NUM_PLAIN, dim)

    def forward(self, standardised: Tensor, plain: Tensor) -> Tensor:
        """Return (B, D), from what `standardise` returns."""
        maps = self.body(standardised.contiguous(memory_format=torch.channels_last))  # a tenth faster
        correction: Tensor = self.head(torch.cat([maps.flatten(1), plain], dim=1))
        return correction


class Residual(nn.Module):
    """Two convolutions with a skip connection (He et al. 2016, figure 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(width, width, 3)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C, s, s) of the same."""
        return F.relu(maps + self.second(self.first(maps)))


def conv_bn_relu(in_width: int, out_width: int, side: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution, its batch normalisation and ReLU."""
    layer = nn.Conv2d(in_width, out_width, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_width), nn.ReLU())


def standardise(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, 64, 64) in [0, 1] with mean 0 and deviation 1, and colours (B, 6) to tell plain ones apart.

    One fades into the other at a contrast of LEAST_CONTRAST.
    """
    mean, deviation = images.mean((2, 3)), images.std((2, 3), correction=0)  # (B, 3)
    contrast = deviation.square().mean(dim=1, keepdim=True).sqrt() + LEAST_CONTRAST  # (B, 1)
    standardised = (images - mean[:, :, None, None]) / contrast[:, :, None, None]
    return standardised, torch.cat([2 * mean - 1, 4 * deviation], dim=1) * (LEAST_CONTRAST / contrast) ** 2


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


def crop_margins(images: Tensor) -> Tensor:
    """Return images (B, 3, S, S) in [0, 1], S even, without their flat margins, resized to (B, 3, 64, 64).

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
    """Return left, right, top and bottom (B, 4) in pixels of images (B, 3, S, S) in [0, 1] without their flat margins.

    A column or row is flat when its colours hardly deviate, so an even gradient is a margin too; a side that would be
    nearly all margin stays whole. A bound lies between two lines, where the deviation crosses the limit: with whole
    lines, the noise of a JPEG would move it further than it moves the content.

    A frame is cropped first, for it may hide margins of another colour. Columns and rows are then judged within what
    is left: within the margins of one direction, plain content would be flat in the other.
    """
    side = images.shape[-1]
    columns, rows = F.avg_pool2d(images, (2, 1)), F.avg_pool2d(images, (1, 2)).mT  # (B, 3, S / 2, S) lines side by side
    moments = [(lines, lines.square()) for lines in (columns, rows)]
    whole = images.new_tensor([0, side, 0, side]).expand(len(images), 4)
    widths = (_inside(moments, whole, blur_px=0) - whole).abs()
    frame = torch.minimum(widths, FRAME_RATIO * widths.amin(dim=1, keepdim=True))
    return _inside(moments, (whole - frame).abs(), blur_px=FRAME_BLUR_PX)


def _inside(moments: list[tuple[Tensor, Tensor]], bounds: Tensor, blur_px: float) -> Tensor:
    """Return the bounds (B, 4) of the content within `bounds`.

    Args:
        moments: columns and their squares, (B, 3, S / 2, S) each, then rows and theirs.
        bounds: (B, 4).
        blur_px: how far a frame blurs into its content.
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
    """Return weights (B, S / step) of sum 1 for the places between first and last (B,), less the blur of a frame."""
    blurred = blur_px * (last - first > 4 * blur_px)
    places = (torch.arange(side // step, device=first.device) + 0.5) * step
    inside = (places >= (first + blurred)[:, None]) & (places <= (last - blurred)[:, None])
    return inside / inside.sum(dim=1, keepdim=True).clamp(min=1)


def _content(strength: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return where content begins and ends within first..last (B,): where the strength of lines (B, S) crosses 1."""
    side = strength.shape[1]
    padded = F.pad(strength[:, None], (LINES // 2,) * 2, mode="replicate")
    smooth = F.avg_pool1d(padded, LINES, stride=1)[:, 0]
    begin, end = _crossing(smooth, first), side - _crossing(smooth.flip(1), side - last)
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
