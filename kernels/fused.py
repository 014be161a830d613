"""Both operations in Triton:

    temporal variance      y_b = mean_{c,h,w} var_f x
    frame interpolation    out = x_0 m_0 x_1 m_1 ... x_{f-1}
                           m_k = blend_k x_k + (1 - blend_k) x_{k+1} + residual_k

Their twins in PyTorch are in `reference.py`.

Sums are in float32. PyTorch rounds a product before it adds it to something; without fusion of
floating-point operations, the kernels do the same.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# A program handles tiles of 1024 values. With two warps that is 16 bytes of bfloat16 per thread on
# AMD, whose warps have 64 threads, and 32 bytes on NVIDIA.
TILE = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
FRAMES = 4  # of the variance, loaded together, which hides the latency of memory


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask, other=0).to(tl.float32)


# ---------------------------------------------------------------------------------------------
# Temporal variance
#
#     dL/dx = dL/dy_b * 2 / (c f h w) * (x - mean_f x)
#
# Bytes: forward reads x once; backward reads x once more and writes its gradient once. Forward
# leaves mean_f d for backward, one float32 for each position.
#
# The sums run over d = x - x_first. A large mean is thus subtracted before anything is rounded.
# var = mean d^2 - (mean d)^2 is accurate, because x_first is itself one of the f frames and
# therefore (mean d)^2 <= (f - 1) var (Samuelson's inequality): the subtraction magnifies rounding
# errors by a factor of f at most.
#
# `f` is constexpr, though no loop is unrolled. Where FRAMES divides f - 1, as for the 21 frames of
# Wan, the compiler then drops the frames' mask. It also multiplies by 1 / f instead of dividing.
# On sm_90, backward in float32 thus needs 128 registers instead of 166, and forward 127 instead of
# 140. The price is a compilation for each f.
# ---------------------------------------------------------------------------------------------


def temporal_variance(x):
    return TemporalVariance.apply(x.contiguous())


class TemporalVariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        b, c, f, h, w = x.shape
        grid = (b * c, triton.cdiv(h * w, TILE))
        mean = x.new_empty(b * c, h * w, dtype=torch.float32)  # of d over the frames
        partial = x.new_empty(grid, dtype=torch.float32)
        variance_forward[grid](x, mean, partial, c, f, h * w, TILE, FRAMES, **OPTIONS)
        ctx.save_for_backward(x, mean)
        return partial.view(b, -1).sum(dim=1)  # without atomics, which add in any order

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean = ctx.saved_tensors
        b, c, f, h, w = x.shape
        grid = (b * c, triton.cdiv(h * w, TILE))
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        variance_backward[grid](x, mean, grad, grad_x, c, f, h * w, TILE, FRAMES, **OPTIONS)
        return grad_x


@triton.jit
def variance_forward(
    x_ptr, mean_ptr, partial_ptr,
    c, f: tl.constexpr, hw, TILE: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    plane, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tile * TILE + tl.arange(0, TILE)
    inside = position < hw
    x_ptr += plane * f * hw + position
    first = load(x_ptr, inside)
    total, squares = tl.zeros_like(first), tl.zeros_like(first)
    for start in range(1, f, FRAMES):
        frame = start + tl.arange(0, FRAMES)[:, None]
        mask = inside & (frame < f)
        d = tl.where(mask, load(x_ptr + frame * hw, mask) - first, 0)
        total += tl.sum(d, 0)
        squares += tl.sum(d * d, 0)
    center = total / f
    variance = squares / f - center * center
    tl.store(mean_ptr + plane * hw + position, center, inside)
    tl.store(partial_ptr + plane * tl.num_programs(1) + tile, tl.sum(variance) / hw / c)


@triton.jit
def variance_backward(
    x_ptr, mean_ptr, grad_ptr, grad_x_ptr,
    c, f: tl.constexpr, hw, TILE: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = position < hw
    x_ptr += plane * f * hw + position
    grad_x_ptr += plane * f * hw + position
    first = load(x_ptr, inside)
    center = load(mean_ptr + plane * hw + position, inside)
    scale = tl.load(grad_ptr + plane // c) * 2 / f / hw / c
    tl.store(grad_x_ptr, -scale * center, inside)
    for start in range(1, f, FRAMES):
        frame = start + tl.arange(0, FRAMES)[:, None]
        mask = inside & (frame < f)
        d = load(x_ptr + frame * hw, mask) - first
        tl.store(grad_x_ptr + frame * hw, scale * (d - center), mask)


# ---------------------------------------------------------------------------------------------
# Frame interpolation
#
# With g = dL/dout:
#
#     dL/dx_k = g(x_k) + blend_k g(m_k) + (1 - blend_{k-1}) g(m_{k-1})
#     dL/dresidual_k = g(m_k)        dL/dblend_k = sum_c g(m_k) (x_k - x_{k+1})
#
# Bytes: forward reads x0, blend and residual once and writes out once; backward reads x0, blend and
# dL/dout once and writes the three gradients once. To read blend once, a program holds all
# channels, which share it. To read x0 once, it walks along the frames and keeps the last one.
#
# What is read has strides of batch, channel and frame, so that no view is copied first. The frame
# interpolator's residual is a view: all channels but one of its UNet's output, which has frames
# before channels. In its training x0 is a view as well: every second frame.
#
# `f` is constexpr, as the interpreter of Triton 3.6 cannot loop up to an argument.
# ---------------------------------------------------------------------------------------------


def interpolate_frames(x0, blend, residual):
    return InterpolateFrames.apply(*map(with_dense_planes, (x0, blend, residual)))


def with_dense_planes(x):
    """`x`, copied only if the rows of its `[h, w]` planes do not follow each other in memory."""
    return x if x.stride()[3:] == (x.shape[4], 1) else x.contiguous()


class InterpolateFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, blend, residual):
        b, c, f, h, w = x0.shape
        out = x0.new_empty(b, c, 2 * f - 1, h, w)
        launch(interpolate_forward, x0, blend, residual, out)
        ctx.save_for_backward(x0, blend)
        ctx.residual_dtype = residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x0, blend = ctx.saved_tensors
        b, c, f, h, w = x0.shape
        grads = (x0.new_empty(x0.shape), blend.new_empty(blend.shape),
                 x0.new_empty(b, c, f - 1, h, w, dtype=ctx.residual_dtype))
        launch(interpolate_backward, x0, blend, with_dense_planes(grad), *grads)
        return grads


def launch(kernel, x0, blend, third, *results):
    """Run a kernel on what it reads, of which `third` is residual or dL/dout, and its results."""
    b, c, f, h, w = x0.shape
    channels = triton.next_power_of_2(c)
    positions = max(TILE // channels, 16)
    grid = (triton.cdiv(h * w, positions), b)
    strides = *x0.stride()[:3], blend.stride(0), blend.stride(2), *third.stride()[:3]
    kernel[grid](
        x0, blend, third, *results, c, f, h * w, *strides, channels, positions, **OPTIONS)


@triton.jit
def interpolate_forward(
    x0_ptr, blend_ptr, residual_ptr, out_ptr,
    c, f: tl.constexpr, hw, x0_stride_b, x0_stride_c, x0_stride_f, blend_stride_b, blend_stride_f,
    residual_stride_b, residual_stride_c, residual_stride_f,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < hw
    mask = (channel < c) & inside
    x0_ptr += b * x0_stride_b + channel * x0_stride_c + position
    blend_ptr += b * blend_stride_b + position
    residual_ptr += b * residual_stride_b + channel * residual_stride_c + position
    out_ptr += (b * c + channel) * (2 * f - 1) * hw + position
    left = load(x0_ptr, mask)
    for _ in range(f - 1):
        x0_ptr += x0_stride_f
        right = load(x0_ptr, mask)
        share = load(blend_ptr, inside)  # [POSITIONS], for all channels
        middle = share * left + (1 - share) * right + load(residual_ptr, mask)
        tl.store(out_ptr, left, mask)
        tl.store(out_ptr + hw, middle, mask)
        left = right
        blend_ptr += blend_stride_f
        residual_ptr += residual_stride_f
        out_ptr += 2 * hw
    tl.store(out_ptr, left, mask)


@triton.jit
def interpolate_backward(
    x0_ptr, blend_ptr, grad_ptr, grad_x0_ptr, grad_blend_ptr, grad_residual_ptr,
    c, f: tl.constexpr, hw, x0_stride_b, x0_stride_c, x0_stride_f, blend_stride_b, blend_stride_f,
    grad_stride_b, grad_stride_c, grad_stride_f,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < hw
    mask = (channel < c) & inside
    plane = b * c + channel
    x0_ptr += b * x0_stride_b + channel * x0_stride_c + position
    blend_ptr += b * blend_stride_b + position
    grad_ptr += b * grad_stride_b + channel * grad_stride_c + position
    grad_x0_ptr += plane * f * hw + position
    grad_blend_ptr += b * (f - 1) * hw + position
    grad_residual_ptr += plane * (f - 1) * hw + position
    left = load(x0_ptr, mask)
    carry = tl.zeros_like(left)  # (1 - blend_{k-1}) g(m_{k-1}), which belongs to x_k
    for _ in range(f - 1):
        x0_ptr += x0_stride_f
        right = load(x0_ptr, mask)
        share = load(blend_ptr, inside)  # [POSITIONS], for all channels
        middle = load(grad_ptr + grad_stride_f, mask)
        tl.store(grad_x0_ptr, load(grad_ptr, mask) + share * middle + carry, mask)
        tl.store(grad_residual_ptr, middle, mask)
        tl.store(grad_blend_ptr, tl.sum(middle * (left - right), 0), inside)
        carry = (1 - share) * middle
        left = right
        blend_ptr += blend_stride_f
        grad_ptr += 2 * grad_stride_f
        grad_x0_ptr += hw
        grad_blend_ptr += hw
        grad_residual_ptr += hw
    tl.store(grad_x0_ptr, load(grad_ptr, mask) + carry, mask)
