"""How much of two pictures one does not explain of the other, when it is laid over it: next to nothing for copies.

whole pictures -> one made as small as the other, relit and clipped like it
their contents -> laid over one another -> one blurred and relit like the other
  -> the smaller share of contrast that is left

A descriptor says of two pictures that they are much alike; this tells copies among them from look-alikes, for it sees
what is drawn otherwise, and leaves out of account what was cut off. Whole pictures show what encoding, size and light
have done. Contents are laid over one another by affine maps of the plane, found coarse to fine by Gauss-Newton steps on
grey levels (Lucas and Kanade 1981), and show what was cut, framed or turned as well.

Shapes: B pairs of pictures, S pixels a side, p pixels a side of a level, P = p * p of them.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.copy_descriptor import GREY, content_bounds

FRAME_PX = 64  # a side, of whole pictures
CELL_PX = 4  # of a frame, over which what is left is averaged, for noise would show
CONTENT_PX = 32  # a side, of the content without flat margins; 64 finds no more, in twice the time
AROUND_PX = 16  # on each side of it: half of the content again
CONTENT = slice(AROUND_PX, AROUND_PX + CONTENT_PX)
EDGE_PX = 1  # of the content's pixels: so much of a picture's own edge is left out, for it blurs into borders
COARSE, FINE = (2, 6), (1, 4)  # chosen: pixels averaged over a side, and steps
FARTHEST = 0.35  # chosen: how far a step may lead from its start, in halves of the content's sides
STEP = 0.15  # chosen: how far one step may lead
DAMPING, PULL = 0.02, 0.004  # chosen: of a step, and towards the start; of the variance a pixel
OUTLIER = 0.5  # deviations at which a pixel's weight is halved (Geman and McClure)
LEAST_DEVIATION = 0.02  # chosen: grey levels that deviate less, of 1, count as plain
COARSE_MOST = 0.3  # measured: of copies, after the coarse steps, what deviates more is one in a thousand

BLURS_PX = (0.5, 1.0, 1.5)  # chosen: standard deviations; never sharp, for noise would show
FORMS = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))  # blurs that are compared: both alike, or one as if it were smaller
GAINS, OFFSETS = (0.6, 1.65), (-0.25, 0.25)  # chosen: of light and contrast; beyond, black and blue would be one
BLACK, WHITE = 0.02, 0.98  # what is beyond may be clipped
COLOURLESS, COLOURED = 0.01, 0.02  # chosen: deviation of colours from grey; a copy in grey is compared in grey
NOISE = 0.03  # chosen: what is left of this size, of 1, says nothing
MUST_MEET = (0.6, 0.3)  # chosen: share of the one, and of the other's content, that must lie over the other picture
UNLIKE = 10.0  # the share of contrast that is left where less of them meet


class Plates(NamedTuple):
    """Pictures ready to be laid over one another."""

    frames: Tensor  # (B, 3, 64, 64) uint8: the whole picture, every other pixel, for means could not be clipped
    sizes: Tensor  # (B, 2) int64: how many pixels it once had across and down, if less than 64
    pixels: Tensor  # (B, 3, 64, 64) uint8: the content on the inner 32 x 32; beyond the picture its edge goes on
    bounds: Tensor  # (B, 4) left, right, top and bottom of the content, as shares of the picture

    def at(self, which: Tensor) -> "Plates":
        """Return some of them, by their places or by a mask."""
        return Plates(*(tensor[which] for tensor in self))

    def images(self) -> Tensor:
        """Return the pixels in [0, 1]."""
        return self.pixels.float() / 255

    def edges(self) -> Tensor:
        """Return left, right, top and bottom of what is compared of pictures (B, 4), their contents from -1 to 1."""
        first, last = self.bounds[:, ::2], self.bounds[:, 1::2]  # (B, 2), across and down
        half, middle = (last - first) / 2, (first + last) / 2
        edge = 2 * EDGE_PX / CONTENT_PX
        return torch.stack([-middle / half + edge, (1 - middle) / half - edge], dim=2).flatten(1)


def plates(pictures: Tensor, sizes: Tensor) -> Plates:
    """Return pictures ready to be laid over one another.

    Args:
        pictures: (B, 3, 128, 128) uint8, squeezed into the square.
        sizes: (B, 2) pixels across and down, before that.
    """
    images = pictures.float() / 255
    bounds = content_bounds(images)
    left, right, top, bottom = bounds.T  # (B,) each
    size = 2 * (CONTENT_PX + 2 * AROUND_PX)  # then averaged over 2 x 2
    steps = (torch.arange(size, device=images.device) + 0.5 - 2 * AROUND_PX) / (2 * CONTENT_PX)
    across = left[:, None] + (right - left)[:, None] * steps  # (B, 128) pixels
    down = top[:, None] + (bottom - top)[:, None] * steps
    shape = (len(images), size, size)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=-1)
    pixels = F.grid_sample(images, grid * 2 / images.shape[-1] - 1, align_corners=False, padding_mode="border")
    return Plates(
        pictures[:, :, :: images.shape[2] // FRAME_PX, :: images.shape[3] // FRAME_PX].contiguous(),
        sizes.clamp(max=FRAME_PX),
        (F.avg_pool2d(pixels, 2) * 255).round().byte(),
        bounds / images.shape[-1],
    )


def unexplained(one: Plates, other: Plates, closely: Tensor | None = None) -> Tensor:
    """Return the share of contrast (B,) that neither picture of a pair explains of the other: 0 of the same pixels.

    The smaller of what is left of the whole pictures and of their contents.

    Args:
        closely: (B,) of which pairs contents are compared too, at four times the cost; None: of all.
    """
    left = _left_of_frames(one, other)
    if closely is None:
        closely = torch.ones_like(left, dtype=torch.bool)
    if closely.any():
        left[closely] = torch.minimum(left[closely], _left_of_contents(one.at(closely), other.at(closely)))
    return left


def _choose(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(which.view(-1, *[1] * (one.dim() - 1)), one, other)


# Whole pictures


def _left_of_frames(one: Plates, other: Plates) -> Tensor:
    """Return the share of contrast (B,) that is left when one picture is made as small as the other, and relit."""
    x, y = _as_small(one, other), _as_small(other, one)
    everywhere = x.new_ones(len(x), 1, FRAME_PX**2)
    x, y, in_grey = _alike_in_colour(x.flatten(2), y.flatten(2), everywhere)
    return torch.minimum(
        _left_when_relit(x, y, other.bounds, in_grey),
        _left_when_relit(y, x, one.bounds, in_grey),
    )


def _as_small(pictures: Plates, others: Plates) -> Tensor:
    """Return pictures (B, 3, 64, 64) in [0, 1], across and down made as small as others where these are smaller."""
    frames = pictures.frames.float() / 255
    size = torch.where(others.sizes < pictures.sizes, others.sizes, FRAME_PX)  # (B, 2)
    larger = (size < FRAME_PX).any(dim=1)
    if larger.any():
        across, down = _shrinking(frames.device)[size[larger]][:, :, None].unbind(1)  # (b, 1, 64, 64) each
        frames[larger] = down @ frames[larger] @ across.mT
    return frames


def _left_when_relit(u: Tensor, v: Tensor, bounds: Tensor, in_grey: Tensor) -> Tensor:
    """Return the share of contrast (B,) that is left of v (B, 3, 64 * 64) when u is relit and clipped like it.

    Args:
        bounds: (B, 4) of the content of v.
        in_grey: (B,) where both are taken as they are.
    """
    open_ = ((v > BLACK) & (v < WHITE)).float()  # what was clipped tells nothing of the light
    n = open_.sum((1, 2)).clamp(min=1)
    open_u, open_v = u * open_, v * open_
    mean_u, mean_v = open_u.sum((1, 2)) / n, open_v.sum((1, 2)) / n
    covariance = (u * open_v).sum((1, 2)) / n - mean_u * mean_v
    variance = (u * open_u).sum((1, 2)) / n - mean_u.square()
    gain, offset = _light(covariance, variance, mean_u, mean_v, in_grey)
    relit = (gain[:, None, None] * u + offset[:, None, None]).clamp_(0, 1)
    cells, relit_cells = _cells(v), _cells(relit)
    rest = (relit_cells - cells).square().sum((1, 2))
    contrast = (cells - cells.mean(dim=2, keepdim=True)).square().sum((1, 2))
    left, right, top, bottom = bounds.T
    num_cells = (right - left) * (bottom - top) * cells.shape[2]  # of the content
    share: Tensor = rest / (contrast + 3 * NOISE**2 * num_cells)
    return share


def _cells(frames: Tensor) -> Tensor:
    """Return the means of frames (B, 3, 64 * 64) over cells of 4 x 4 pixels, (B, 3, 16 * 16)."""
    side = FRAME_PX // CELL_PX
    lines = frames.view(-1, 3, side, CELL_PX, FRAME_PX).sum(dim=3)  # one after the other: twice as fast as pooling
    cells: Tensor = lines.view(-1, 3, side**2, CELL_PX).sum(dim=3) / CELL_PX**2
    return cells


@cache
def _shrinking(device: torch.device) -> Tensor:
    """Return what makes a line of 64 pixels one of n and of 64 again, bicubic, for n from 0 to 64: (65, 64, 64)."""
    whole = torch.eye(FRAME_PX)
    maps = [torch.zeros_like(whole)]
    for n in range(1, FRAME_PX):
        shrunk, grown = (
            F.interpolate(torch.eye(size)[None, None], to, mode="bicubic", antialias=True)  # as Pillow weighs pixels
            for size, to in ((FRAME_PX, (n, FRAME_PX)), (n, (FRAME_PX, n)))
        )
        maps.append((grown @ shrunk)[0, 0])
    return torch.stack([*maps, whole]).to(device)


# Contents


def _left_of_contents(one: Plates, other: Plates) -> Tensor:
    """Return the share of contrast (B,) that is left where contents meet, laid over one another by their pixels."""
    area = [(right - left) * (bottom - top) for left, right, top, bottom in (one.bounds.T, other.bounds.T)]
    larger = area[0] >= area[1]  # the picture with more content is the ground on which they are compared
    ground, laid = (
        Plates(*(_choose(larger, *tensors) for tensors in zip(first, second, strict=True)))
        for first, second in ((one, other), (other, one))
    )
    by_frame = _frame_to_frame(ground.bounds, laid.bounds)
    by_content = torch.eye(2, 3, device=by_frame.device).expand_as(by_frame)
    (first, first_error), (second, second_error) = (
        _align(ground, laid, start, *COARSE) for start in (by_frame, by_content)
    )
    aligned = _choose(first_error <= second_error, first, second)

    left = torch.full_like(first_error, UNLIKE)
    alike = torch.minimum(first_error, second_error) <= COARSE_MOST
    if alike.any():
        ground, laid = ground.at(alike), laid.at(alike)
        finer, _ = _align(ground, laid, aligned[alike], *FINE)
        left[alike] = _left_over(ground, laid, finer)
    return left


# Affine maps (B, 2, 3) from places on the ground's content, which goes from -1 to 1, to those of the picture laid on it


def _frame_to_frame(ground: Tensor, laid: Tensor) -> Tensor:
    """Return the maps by which the frames lie over one another, of bounds (B, 4)."""
    rows = []
    for axis in (0, 1):
        (first, last), (other_first, other_last) = (each[:, 2 * axis : 2 * axis + 2].T for each in (ground, laid))
        half = (other_last - other_first) / 2
        row = torch.zeros(len(ground), 3, device=ground.device)
        row[:, axis] = (last - first) / 2 / half
        row[:, 2] = ((first + last) / 2 - (other_first + other_last) / 2) / half
        rows.append(row)
    return torch.stack(rows, dim=1)


def _places(side: int, device: torch.device) -> Tensor:
    """Return the places of a level's pixels, (P, 3): across, down, 1."""
    steps = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([across, down, torch.ones_like(across)], dim=-1).view(-1, 3)


def _sample(images: Tensor, places: Tensor) -> Tensor:
    """Return images (B, C, s, s) of content and surroundings at places (B, P, 2) on the content: (B, C, P)."""
    share = CONTENT_PX / (CONTENT_PX + 2 * AROUND_PX)
    return F.grid_sample(images, (places * share)[:, None], align_corners=False, padding_mode="border")[:, :, 0]


def _within(places: Tensor, frame: Tensor) -> Tensor:
    """Tell which places (B, P, 2) lie in pictures with edges at `frame` (B, 4), as 0 or 1 (B, P)."""
    left, right, top, bottom = frame.T[:, :, None]
    across, down = places.unbind(-1)
    reach = 1 + 2 * AROUND_PX / CONTENT_PX  # what is farther out is not on the plate
    inside = (across >= left) & (across <= right) & (down >= top) & (down <= bottom)
    within: Tensor = inside & (across.abs() <= reach) & (down.abs() <= reach)
    return within.float()


def _align(ground: Plates, laid: Plates, start: Tensor, pooled: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return maps (B, 2, 3) that lay pictures over others better, and how far grey levels then deviate (B,).

    Args:
        start: (B, 2, 3).
        pooled: pixels averaged over, a side.
    """
    side, around = CONTENT_PX // pooled, AROUND_PX // pooled
    grey = [_grey(each.images()) for each in (ground, laid)]
    if pooled > 1:
        grey = [F.avg_pool2d(each, pooled) for each in grey]
    x = grey[0][:, 0, around : around + side, around : around + side].flatten(1)  # (B, P)
    sloped = torch.cat([grey[1], torch.zeros_like(grey[1]), torch.zeros_like(grey[1])], dim=1)
    sloped[:, 1, :, 1:-1] = (grey[1][:, 0, :, 2:] - grey[1][:, 0, :, :-2]) * (side / 4)  # by half a side of the content
    sloped[:, 2, 1:-1] = (grey[1][:, 0, 2:] - grey[1][:, 0, :-2]) * (side / 4)
    places = _places(side, start.device)
    on_ground, edges = _within(places[None, :, :2], ground.edges()), laid.edges()
    ridge = torch.eye(6, device=start.device)
    map_ = start
    for step in range(steps + 1):
        at = places @ map_.mT  # (B, P, 2)
        y, across, down = _sample(sloped, at).unbind(1)  # (B, P) each
        meets = _within(at, edges) * on_ground
        count = meets.sum(dim=1, keepdim=True)
        x_even, _ = _even(x, meets, count)
        y_even, deviation = _even(y, meets, count)
        apart = (y_even - x_even) * meets
        if step == steps:
            break
        weight = meets / (1 + (apart / OUTLIER).square())
        slopes = torch.cat([(each / deviation)[..., None] * places for each in (across, down)], dim=-1)  # (B, P, 6)
        weighted = (slopes * weight[..., None]).mT  # (B, 6, P)
        pull = PULL * count[..., None] * (map_ - start).flatten(1)[..., None]
        change = torch.linalg.solve(
            weighted @ slopes + DAMPING * count.clamp(min=1)[..., None] * ridge, weighted @ apart[..., None] + pull
        )
        map_ = map_ - change.view(-1, 2, 3).clamp(-STEP, STEP)
        map_ = start + (map_ - start).clamp(-FARTHEST, FARTHEST)
    error = apart.square().sum(dim=1) / count[:, 0].clamp(min=1)
    return map_, torch.where(count[:, 0] < MUST_MEET[1] * len(places), math.inf, error)


def _even(levels: Tensor, meets: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return grey levels (B, P) of mean 0 and deviation 1 where pictures meet, and their deviation (B, 1)."""
    count = count.clamp(min=1)
    centred = levels - (levels * meets).sum(dim=1, keepdim=True) / count
    deviation = ((centred * meets).square().sum(dim=1, keepdim=True) / count).sqrt() + LEAST_DEVIATION
    return centred / deviation, deviation


def _left_over(ground: Plates, laid: Plates, map_: Tensor) -> Tensor:
    """Return the share of contrast (B,) that is left of pictures laid over one another by maps (B, 2, 3)."""
    places = _places(CONTENT_PX, map_.device)
    at = places @ map_.mT
    contents = [each.images()[:, :, CONTENT, CONTENT] for each in (ground, laid)]
    x, y = contents[0].flatten(2), _sample(laid.images(), at)  # (B, 3, P)
    meets = (_within(at, laid.edges()) * _within(places[None, :, :2], ground.edges()))[:, None]  # (B, 1, P)
    count = meets.sum((1, 2)).clamp(min=1)  # (B,)
    x, y, in_grey = _alike_in_colour(x, y, meets)

    forms = [torch.stack([_blurred(each, blur) for blur in BLURS_PX], dim=1) for each in (x, y)]  # (B, F, 3, P)
    sums = _Sums.of(forms, meets)
    i, j = torch.tensor(FORMS, device=x.device).T
    left = []
    for explains, explained in ((0, 1), (1, 0)):
        mean = (forms[explained] * meets[:, None]).sum(-1) / count[:, None, None]  # (B, F, 3)
        contrast = sums.squares[explained] - mean.square().sum(-1) * count[:, None]  # (B, F)
        whole = contents[explained].var((2, 3), correction=0).sum(dim=1)
        contrast = torch.maximum(contrast, (count * whole / 2)[:, None]) + 3 * NOISE**2 * count[:, None]
        gain, offset = sums.light(explains, explained, 3 * count, in_grey)  # (B, F, F)
        rest = sums.rest(explains, explained, gain, offset, 3 * count)
        left.append((rest[:, i, j] / contrast[:, j]).amin(dim=1))  # of (B, pairs of forms)
    determinant = map_[:, 0, 0] * map_[:, 1, 1] - map_[:, 0, 1] * map_[:, 1, 0]
    shared = torch.stack([count / len(places), count / len(places) * determinant.abs()])
    meet = (shared.amax(0) >= MUST_MEET[0]) & (shared.amin(0) >= MUST_MEET[1])
    return torch.where(meet, torch.stack(left).amin(0).clamp(min=0), UNLIKE)


def _grey(images: Tensor) -> Tensor:
    """Return grey levels (B, 1, ...) of colours (B, 3, ...)."""
    weights = images.new_tensor(GREY).view(3, *[1] * (images.dim() - 2))
    grey: Tensor = (images * weights).sum(dim=1, keepdim=True)
    return grey


def _alike_in_colour(x: Tensor, y: Tensor, meets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both pictures (B, 3, P) in grey where only one is coloured, and where that is (B,).

    Args:
        meets: (B, 1, P) where they are looked at, 0 or 1.
    """
    count = meets.sum((1, 2)).clamp(min=1)
    greys = [_grey(each).expand_as(each) for each in (x, y)]
    colours = [
        (((each - grey) * meets).square().sum((1, 2)) / (3 * count)).sqrt()
        for each, grey in zip((x, y), greys, strict=True)
    ]
    in_grey = (torch.minimum(*colours) < COLOURLESS) & (torch.maximum(*colours) > COLOURED)
    return _choose(in_grey, greys[0], x), _choose(in_grey, greys[1], y), in_grey


def _blurred(pixels: Tensor, blur_px: float) -> Tensor:
    """Return pixels (B, 3, P) blurred by a Gaussian."""
    steps = torch.arange(CONTENT_PX, device=pixels.device, dtype=torch.float32)
    weights = torch.exp(-(steps - steps[:, None]).square() / (2 * blur_px**2))
    weights = weights / weights.sum(dim=1, keepdim=True)
    images = pixels.view(*pixels.shape[:2], CONTENT_PX, CONTENT_PX)
    return (weights @ images @ weights.T).flatten(2)


class _Sums(NamedTuple):
    """What least squares of one form by another need."""

    totals: list[Tensor]  # of each of two pictures' forms, (B, F)
    squares: list[Tensor]  # (B, F)
    products: Tensor  # (B, F, F) of the first's forms with the second's

    @classmethod
    def of(cls, forms: list[Tensor], meets: Tensor) -> "_Sums":
        flat = [(each * meets[:, None]).flatten(2) for each in forms]
        return cls([each.sum(2) for each in flat], [each.square().sum(2) for each in flat], flat[0] @ flat[1].mT)

    def across(self, explains: int) -> Tensor:
        """Return products (B, F, F) of the forms that explain with those that are explained."""
        return self.products if explains == 0 else self.products.mT

    def light(self, explains: int, explained: int, count: Tensor, as_it_is: Tensor) -> tuple[Tensor, Tensor]:
        """Return gain and offset (B, F, F) by which forms explain others best, or 1 and 0 `as_it_is` (B,)."""
        n = count[:, None, None]
        u, v = self.totals[explains][:, :, None] / n, self.totals[explained][:, None] / n
        covariance = self.across(explains) / n - u * v
        variance = self.squares[explains][:, :, None] / n - u.square()
        return _light(covariance, variance, u, v, as_it_is[:, None, None])

    def rest(self, explains: int, explained: int, gain: Tensor, offset: Tensor, count: Tensor) -> Tensor:
        """Return the sum of squares (B, F, F) that is left of forms."""
        u, v = self.totals[explains][:, :, None], self.totals[explained][:, None]
        uu, vv = self.squares[explains][:, :, None], self.squares[explained][:, None]
        rest = gain.square() * uu + offset.square() * count[:, None, None] + vv + 2 * gain * offset * u
        return rest - 2 * gain * self.across(explains) - 2 * offset * v


def _light(covariance: Tensor, variance: Tensor, u: Tensor, v: Tensor, as_it_is: Tensor) -> tuple[Tensor, Tensor]:
    """Return gain and offset within bounds, by least squares about the means u and v; 1 and 0 `as_it_is`."""
    gain = ((covariance + 1e-3) / (variance + 1e-3)).clamp(*GAINS).masked_fill(as_it_is, 1)
    return gain, (v - gain * u).clamp(*OFFSETS).masked_fill(as_it_is, 0)
