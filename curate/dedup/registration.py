"""Registration: the share of variance that one image leaves unexplained in another; next to nothing for copies.

A descriptor finds images that are much alike. Registration tells copies among them from look-alikes: it sees small
differences in what is drawn, and ignores what was cut off. The residual is the smaller of two:

- of whole images, one downscaled to the size of the other and fitted in gain, offset and clipping. It allows for
  re-encoding, resizing and changes of light.
- of contents (images without flat margins), aligned by an affine map that is found coarse to fine by Gauss-Newton steps
  on grey levels (Lucas and Kanade 1981), then blurred and fitted in gain and offset. It allows for crops, borders and
  small rotations too.

Shapes: B pairs of images, p pixels a side of a pyramid level, P = p * p pixels, L blur levels.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.copy_descriptor import GREY
from .thumbnails import CONTENT, CONTENT_PX, MARGIN_PX, WHOLE_PX, Thumbnails

BLOCK_PX = 4  # a side; whole images are compared by the means of such blocks, for single pixels are noisy
COARSE, FINE = (2, 6), (1, 4)  # chosen: pixels averaged over a side, and steps
MAX_SHIFT = 0.35  # chosen: how far the steps may lead from their start, in halves of the content's sides
MAX_STEP = 0.15  # chosen: how far one step may lead
DAMPING, PRIOR = 0.02, 0.004  # chosen: damping of a step, and pull towards the start; of the variance per pixel
OUTLIER_STD = 0.5  # standard deviations at which a pixel's weight is halved (Geman and McClure)
MIN_STD = 0.02  # chosen: grey levels in [0, 1] that deviate less count as plain
MAX_COARSE_ERROR = 0.3  # measured: one copy in a thousand has a larger error after the coarse steps

BLURS_PX = (0.5, 1.0, 1.5)  # chosen: standard deviations; none is sharp, for noise would show
BLUR_PAIRS = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))  # that are compared: both alike, or one as if it were smaller
GAINS, OFFSETS = (0.6, 1.65), (-0.25, 0.25)  # chosen: bounds of the fit; beyond, black and blue would be the same
BLACK, WHITE = 0.02, 0.98  # levels beyond these may be clipped
MAX_GREY_CHROMA, MIN_COLOUR_CHROMA = 0.01, 0.02  # chosen: deviation from grey; a grey and a colour copy compare in grey
NOISE_STD = 0.03  # chosen: residuals of this size in [0, 1] say nothing
MIN_OVERLAP = (0.6, 0.3)  # chosen: share of the one, and of the other's content, that must lie within the other image
UNALIGNED = 10.0  # the residual where less overlaps, or no alignment is found


def residual(one: Thumbnails, other: Thumbnails, align: Tensor | None = None) -> Tensor:
    """Return the share of variance (B,) that neither image of a pair explains in the other: 0 for the same pixels.

    The smaller of the residuals of the whole images and of their contents; `UNALIGNED` where one image is plain, for
    whatever is fitted to it suits.

    Args:
        align: (B,) mask of the pairs whose contents are aligned too, at four times the cost; None: all.
    """
    result = _residual_of_wholes(one, other)
    if align is None:
        align = torch.ones_like(result, dtype=torch.bool)
    if align.any():
        result[align] = torch.minimum(result[align], _residual_of_contents(one.at(align), other.at(align)))
    result[_is_plain(one) | _is_plain(other)] = UNALIGNED
    return result


# Whole images


def _is_plain(images: Thumbnails) -> Tensor:
    """Return (B,) whether no block of the whole image differs from their mean."""
    blocks = _block_means((images.whole.float() / 255).flatten(2))
    return (blocks - blocks.mean(dim=2, keepdim=True)).abs().amax((1, 2)) < MIN_STD


def _residual_of_wholes(one: Thumbnails, other: Thumbnails) -> Tensor:
    """Return the residual (B,) of the whole images."""
    x, y = _downscaled_like(one, other), _downscaled_like(other, one)
    everywhere = x.new_ones(len(x), 1, WHOLE_PX**2)
    x, y, in_grey = _match_colours(x.flatten(2), y.flatten(2), everywhere)
    return torch.minimum(
        _residual_of_fit(x, y, other.bounds, in_grey),
        _residual_of_fit(y, x, one.bounds, in_grey),
    )


def _downscaled_like(images: Thumbnails, others: Thumbnails) -> Tensor:
    """Return whole images (B, 3, 64, 64) in [0, 1] at the resolution of the others where that is lower."""
    levels = images.whole.float() / 255
    size = torch.where(others.sizes < images.sizes, others.sizes, WHOLE_PX)  # (B, 2)
    is_larger = (size < WHOLE_PX).any(dim=1)
    if is_larger.any():
        across, down = _resize_matrices(levels.device)[size[is_larger]][:, :, None].unbind(1)  # (b, 1, 64, 64) each
        levels[is_larger] = down @ levels[is_larger] @ across.mT
    return levels


def _residual_of_fit(x: Tensor, y: Tensor, bounds: Tensor, in_grey: Tensor) -> Tensor:
    """Return the residual (B,) of y (B, 3, 64 * 64) when x is fitted to it by gain, offset and clipping.

    Args:
        bounds: (B, 4) of the content of y.
        in_grey: (B,) where gain and offset stay 1 and 0.
    """
    unclipped = ((y > BLACK) & (y < WHITE)).float()  # clipped levels say nothing about gain and offset
    n = unclipped.sum((1, 2)).clamp(min=1)
    unclipped_x, unclipped_y = x * unclipped, y * unclipped
    mean_x, mean_y = unclipped_x.sum((1, 2)) / n, unclipped_y.sum((1, 2)) / n
    covariance = (x * unclipped_y).sum((1, 2)) / n - mean_x * mean_y
    variance = (x * unclipped_x).sum((1, 2)) / n - mean_x.square()
    gain, offset = _fit_gain_offset(covariance, variance, mean_x, mean_y, in_grey)
    fitted = (gain[:, None, None] * x + offset[:, None, None]).clamp_(0, 1)
    blocks = _block_means(y)
    error = (_block_means(fitted) - blocks).square().sum((1, 2))
    total = (blocks - blocks.mean(dim=2, keepdim=True)).square().sum((1, 2))
    left, right, top, bottom = bounds.T
    num_blocks = (right - left) * (bottom - top) * blocks.shape[2]  # of the content
    share: Tensor = error / (total + 3 * NOISE_STD**2 * num_blocks)
    return share


def _block_means(levels: Tensor) -> Tensor:
    """Return the means of whole images (B, 3, 64 * 64) over blocks of 4 x 4 pixels, (B, 3, 16 * 16)."""
    side = WHOLE_PX // BLOCK_PX
    lines = levels.view(-1, 3, side, BLOCK_PX, WHOLE_PX).sum(dim=3)  # by axes: twice as fast as pooling
    means: Tensor = lines.view(-1, 3, side**2, BLOCK_PX).sum(dim=3) / BLOCK_PX**2
    return means


@cache
def _resize_matrices(device: torch.device) -> Tensor:
    """Return matrices (65, 64, 64) that resize a line of 64 pixels to n and back, bicubic, for n from 0 to 64."""
    whole = torch.eye(WHOLE_PX)
    matrices = [torch.zeros_like(whole)]
    for n in range(1, WHOLE_PX):
        shrink, grow = (
            F.interpolate(torch.eye(size)[None, None], to, mode="bicubic", antialias=True)  # weights as in Pillow
            for size, to in ((WHOLE_PX, (n, WHOLE_PX)), (n, (WHOLE_PX, n)))
        )
        matrices.append((grow @ shrink)[0, 0])
    return torch.stack([*matrices, whole]).to(device)


# Contents


def _residual_of_contents(one: Thumbnails, other: Thumbnails) -> Tensor:
    """Return the residual (B,) where the contents overlap once they are aligned."""
    area = [(right - left) * (bottom - top) for left, right, top, bottom in (one.bounds.T, other.bounds.T)]
    is_fixed = area[0] >= area[1]  # the image with more content stays fixed, the other moves
    fixed, moving = (
        Thumbnails(*(_select(is_fixed, *tensors) for tensors in zip(first, second, strict=True)))
        for first, second in ((one, other), (other, one))
    )
    from_wholes = _map_between_wholes(fixed.bounds, moving.bounds)
    from_contents = torch.eye(2, 3, device=from_wholes.device).expand_as(from_wholes)
    (first, first_error), (second, second_error) = (
        _align(fixed, moving, start, *COARSE) for start in (from_wholes, from_contents)
    )
    coarse = _select(first_error <= second_error, first, second)

    result = torch.full_like(first_error, UNALIGNED)
    is_aligned = torch.minimum(first_error, second_error) <= MAX_COARSE_ERROR
    if is_aligned.any():
        fixed, moving = fixed.at(is_aligned), moving.at(is_aligned)
        fine, _ = _align(fixed, moving, coarse[is_aligned], *FINE)
        result[is_aligned] = _residual_of_overlap(fixed, moving, fine)
    return result


# Affine maps (B, 2, 3) take a point of the fixed content, which goes from -1 to 1, to one of the moving content


def _map_between_wholes(fixed: Tensor, moving: Tensor) -> Tensor:
    """Return the maps by which the whole images coincide, from bounds of contents (B, 4)."""
    (first, last), (other_first, other_last) = ((each[:, ::2], each[:, 1::2]) for each in (fixed, moving))
    half = (other_last - other_first) / 2  # (B, 2), across and down
    scale = (last - first) / 2 / half
    shift = ((first + last) / 2 - (other_first + other_last) / 2) / half
    return torch.cat([torch.diag_embed(scale), shift[..., None]], dim=2)


def _pixel_grid(side: int, device: torch.device) -> Tensor:
    """Return the homogeneous coordinates of a level's pixels, (P, 3): across, down, 1."""
    steps = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([across, down, torch.ones_like(across)], dim=-1).view(-1, 3)


def _sample(images: Tensor, points: Tensor) -> Tensor:
    """Return content with surroundings (B, C, s, s) at points (B, P, 2): (B, C, P)."""
    share = CONTENT_PX / (CONTENT_PX + 2 * MARGIN_PX)
    return F.grid_sample(images, (points * share)[:, None], align_corners=False, padding_mode="border")[:, :, 0]


def _inside(points: Tensor, edges: Tensor) -> Tensor:
    """Return 1 for points (B, P, 2) inside of images with `edges` (B, 4), else 0: (B, P)."""
    left, right, top, bottom = edges.T[:, :, None]
    across, down = points.unbind(-1)
    reach = 1 + 2 * MARGIN_PX / CONTENT_PX  # the thumbnail ends there
    inside = (across >= left) & (across <= right) & (down >= top) & (down <= bottom)
    within: Tensor = inside & (across.abs() <= reach) & (down.abs() <= reach)
    return within.float()


def _align(fixed: Thumbnails, moving: Thumbnails, start: Tensor, pooled: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return maps (B, 2, 3) that align contents better than `start` (B, 2, 3), and the mean squared error (B,).

    The error is that of standardised grey levels, infinite where less than `MIN_OVERLAP` of the content overlaps.

    Args:
        pooled: pixels averaged over, a side.
    """
    side, margin = CONTENT_PX // pooled, MARGIN_PX // pooled
    grey = [_grey(each.levels()) for each in (fixed, moving)]
    if pooled > 1:
        grey = [F.avg_pool2d(each, pooled) for each in grey]
    x = grey[0][:, 0, margin : margin + side, margin : margin + side].flatten(1)  # (B, P)
    with_slopes = torch.cat([grey[1], torch.zeros_like(grey[1]), torch.zeros_like(grey[1])], dim=1)
    with_slopes[:, 1, :, 1:-1] = (grey[1][:, 0, :, 2:] - grey[1][:, 0, :, :-2]) * (side / 4)  # per half of a side
    with_slopes[:, 2, 1:-1] = (grey[1][:, 0, 2:] - grey[1][:, 0, :-2]) * (side / 4)
    grid = _pixel_grid(side, start.device)
    inside_fixed, edges = _inside(grid[None, :, :2], fixed.edges()), moving.edges()
    ridge = torch.eye(6, device=start.device)
    map_ = start
    for step in range(steps + 1):
        points = grid @ map_.mT  # (B, P, 2)
        y, across, down = _sample(with_slopes, points).unbind(1)  # (B, P) each
        overlap = _inside(points, edges) * inside_fixed
        count = overlap.sum(dim=1, keepdim=True)
        x_standard, _ = _standardise(x, overlap, count)
        y_standard, std = _standardise(y, overlap, count)
        difference = (y_standard - x_standard) * overlap
        if step == steps:
            break
        weight = overlap / (1 + (difference / OUTLIER_STD).square())
        jacobian = torch.cat([(each / std)[..., None] * grid for each in (across, down)], dim=-1)  # (B, P, 6)
        weighted = (jacobian * weight[..., None]).mT  # (B, 6, P)
        prior = PRIOR * count[..., None] * (map_ - start).flatten(1)[..., None]
        change = torch.linalg.solve(
            weighted @ jacobian + DAMPING * count.clamp(min=1)[..., None] * ridge,
            weighted @ difference[..., None] + prior,
        )
        map_ = map_ - change.view(-1, 2, 3).clamp(-MAX_STEP, MAX_STEP)
        map_ = start + (map_ - start).clamp(-MAX_SHIFT, MAX_SHIFT)
    error = difference.square().sum(dim=1) / count[:, 0].clamp(min=1)
    return map_, torch.where(count[:, 0] < MIN_OVERLAP[1] * len(grid), math.inf, error)


def _standardise(levels: Tensor, overlap: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return grey levels (B, P) with mean 0 and standard deviation 1 in the overlap, and the deviation (B, 1)."""
    count = count.clamp(min=1)
    centred = levels - (levels * overlap).sum(dim=1, keepdim=True) / count
    std = ((centred * overlap).square().sum(dim=1, keepdim=True) / count).sqrt() + MIN_STD
    return centred / std, std


def _residual_of_overlap(fixed: Thumbnails, moving: Thumbnails, map_: Tensor) -> Tensor:
    """Return the residual (B,) of contents aligned by maps (B, 2, 3), least over pairs of blur levels."""
    grid = _pixel_grid(CONTENT_PX, map_.device)
    points = grid @ map_.mT
    contents = [each.levels()[:, :, CONTENT, CONTENT] for each in (fixed, moving)]
    x, y = contents[0].flatten(2), _sample(moving.levels(), points)  # (B, 3, P)
    overlap = (_inside(points, moving.edges()) * _inside(grid[None, :, :2], fixed.edges()))[:, None]  # (B, 1, P)
    count = overlap.sum((1, 2)).clamp(min=1)  # (B,)
    x, y, in_grey = _match_colours(x, y, overlap)

    blurred = [torch.stack([_blur(each, blur) for blur in BLURS_PX], dim=1) for each in (x, y)]  # (B, L, 3, P)
    masked = [(each * overlap[:, None]).flatten(2) for each in blurred]
    sums, squares = [each.sum(2) for each in masked], [each.square().sum(2) for each in masked]  # (B, L)
    products = masked[0] @ masked[1].mT  # (B, L, L)
    n = (3 * count)[:, None, None]
    i, j = torch.tensor(BLUR_PAIRS, device=x.device).T
    residuals = []
    for one, other, xy in ((0, 1, products), (1, 0, products.mT)):  # `one` is fitted to `other`
        mean = (blurred[other] * overlap[:, None]).sum(-1) / count[:, None, None]  # (B, L, 3)
        total = squares[other] - mean.square().sum(-1) * count[:, None]  # (B, L)
        whole = contents[other].var((2, 3), correction=0).sum(dim=1)
        total = torch.maximum(total, (count * whole / 2)[:, None]) + 3 * NOISE_STD**2 * count[:, None]
        sum_x, sum_y = sums[one][:, :, None], sums[other][:, None]
        xx, yy = squares[one][:, :, None], squares[other][:, None]
        mean_x, mean_y = sum_x / n, sum_y / n
        gain, offset = _fit_gain_offset(
            xy / n - mean_x * mean_y, xx / n - mean_x.square(), mean_x, mean_y, in_grey[:, None, None]
        )  # (B, L, L)
        error = gain.square() * xx + offset.square() * n + yy + 2 * gain * offset * sum_x
        error = error - 2 * gain * xy - 2 * offset * sum_y
        residuals.append((error[:, i, j] / total[:, j]).amin(dim=1))  # of (B, pairs of blur levels)
    determinant = map_[:, 0, 0] * map_[:, 1, 1] - map_[:, 0, 1] * map_[:, 1, 0]
    shares = torch.stack([count / len(grid), count / len(grid) * determinant.abs()])
    is_enough = (shares.amax(0) >= MIN_OVERLAP[0]) & (shares.amin(0) >= MIN_OVERLAP[1])
    return torch.where(is_enough, torch.stack(residuals).amin(0).clamp(min=0), UNALIGNED)


def _blur(levels: Tensor, std_px: float) -> Tensor:
    """Return contents (B, 3, P) blurred by a Gaussian."""
    steps = torch.arange(CONTENT_PX, device=levels.device, dtype=torch.float32)
    weights = torch.exp(-(steps - steps[:, None]).square() / (2 * std_px**2))
    weights = weights / weights.sum(dim=1, keepdim=True)
    images = levels.view(*levels.shape[:2], CONTENT_PX, CONTENT_PX)
    return (weights @ images @ weights.T).flatten(2)


# Both


def _fit_gain_offset(
    covariance: Tensor, variance: Tensor, mean_x: Tensor, mean_y: Tensor, in_grey: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gain and offset within bounds by which x fits y best, by least squares; 1 and 0 where `in_grey`."""
    gain = ((covariance + 1e-3) / (variance + 1e-3)).clamp(*GAINS).masked_fill(in_grey, 1)
    return gain, (mean_y - gain * mean_x).clamp(*OFFSETS).masked_fill(in_grey, 0)


def _match_colours(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both images (B, 3, P) in grey where only one of them has colours, and where that is (B,).

    Args:
        mask: (B, 1, P) where their colours count, 0 or 1.
    """
    count = mask.sum((1, 2)).clamp(min=1)
    greys = [_grey(each).expand_as(each) for each in (x, y)]
    chromas = [
        (((each - grey) * mask).square().sum((1, 2)) / (3 * count)).sqrt()
        for each, grey in zip((x, y), greys, strict=True)
    ]
    in_grey = (torch.minimum(*chromas) < MAX_GREY_CHROMA) & (torch.maximum(*chromas) > MIN_COLOUR_CHROMA)
    return _select(in_grey, greys[0], x), _select(in_grey, greys[1], y), in_grey


def _grey(images: Tensor) -> Tensor:
    """Return grey levels (B, 1, ...) of colours (B, 3, ...)."""
    weights = images.new_tensor(GREY).view(3, *[1] * (images.dim() - 2))
    grey: Tensor = (images * weights).sum(dim=1, keepdim=True)
    return grey


def _select(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return `one` (B, ...) where `which` (B,) holds, else `other`."""
    return torch.where(which.view(-1, *[1] * (one.dim() - 1)), one, other)
