"""Temporal variance in Triton; its twin is `reference.temporal_variance`.

    y_b = mean_{c,h,w} var_f x        dL/dx = dL/dy_b * 2 / (c f h w) * (x - mean_f x)

Bytes: forward reads x once; backward reads x once more and writes its gradient once. Forward leaves
mean_f d for backward, one float32 for each position.

The sums run over d = x - x_first in float32. A large mean is thus subtracted before anything is
rounded. var = mean d^2 - (mean d)^2 is accurate, because x_first is itself one of the f frames and
therefore (mean d)^2 <= (f - 1) var (Samuelson's inequality): the subtraction magnifies rounding
errors by a factor of f at most.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .video import OPTIONS, TILE, load, locate, rows, store

FRAMES = 4  # loaded together, which hides the latency of memory


class TemporalVariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        b, c, f, h, w = x.shape
        grid = (b * c, triton.cdiv(h * w, TILE))
        mean = x.new_empty(b * c, h * w, dtype=torch.float32)  # of d over the frames
        partial = x.new_empty(grid, dtype=torch.float32)
        (video,), row_length = rows(x)
        sizes = (c, f, h * w, row_length, TILE, FRAMES)
        variance_forward[grid](video, mean, partial, *sizes, **OPTIONS)
        ctx.save_for_backward(x, mean)
        return partial.view(b, -1).sum(dim=1)  # without atomics, which add in any order

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean = ctx.saved_tensors
        b, c, f, h, w = x.shape
        grid = (b * c, triton.cdiv(h * w, TILE))
        grad_x = torch.empty_like(x)
        videos, row_length = rows(x, grad_x)
        sizes = (c, f, h * w, row_length, TILE, FRAMES)
        variance_backward[grid](*videos, mean, grad, grad.stride(0), *sizes, **OPTIONS)
        return grad_x


@triton.jit
def variance_forward(
    x, mean, partial, c, f: tl.constexpr, hw, row_length, TILE: tl.constexpr, FRAMES: tl.constexpr
):
    plane, tile = tl.program_id(0), tl.program_id(1)
    position = tile * TILE + tl.arange(0, TILE)
    inside = position < hw
    x = locate(x, plane // c, plane % c, position, row_length)
    first = load(x, 0, inside)
    total, squares = tl.zeros_like(first), tl.zeros_like(first)
    for start in range(1, f, FRAMES):
        frame = start + tl.arange(0, FRAMES)[:, None]
        mask = inside & (frame < f)
        d = tl.where(mask, load(x, frame, mask) - first, 0)
        total += tl.sum(d, 0)
        squares += tl.sum(d * d, 0)
    center = total / f
    variance = squares / f - center * center
    tl.store(mean + plane.to(tl.int64) * hw + position, center, inside)
    tl.store(partial + plane * tl.num_programs(1) + tile, tl.sum(variance) / hw / c)


@triton.jit
def variance_backward(
    x, grad_x, mean, grad, grad_stride,
    c, f: tl.constexpr, hw, row_length, TILE: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    plane, tile = tl.program_id(0), tl.program_id(1)
    position = tile * TILE + tl.arange(0, TILE)
    inside = position < hw
    x = locate(x, plane // c, plane % c, position, row_length)
    grad_x = locate(grad_x, plane // c, plane % c, position, row_length)
    first = load(x, 0, inside)
    center = tl.load(mean + plane.to(tl.int64) * hw + position, inside, other=0)
    scale = tl.load(grad + plane // c * grad_stride) * 2 / f / hw / c
    store(grad_x, 0, -scale * center, inside)
    for start in range(1, f, FRAMES):
        frame = start + tl.arange(0, FRAMES)[:, None]
        mask = inside & (frame < f)
        d = load(x, frame, mask) - first
        store(grad_x, frame, scale * (d - center), mask)
