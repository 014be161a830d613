"""Frame interpolation in Triton; its twin is `reference.interpolate_frames`.

    m_k = blend_k x_k + (1 - blend_k) x_{k+1} + residual_k      out = x_0 m_0 x_1 m_1 ... x_{f-1}

With g = dL/dout:

    dL/dx_k = g(x_k) + blend_k g(m_k) + (1 - blend_{k-1}) g(m_{k-1})
    dL/dresidual_k = g(m_k)        dL/dblend_k = sum_c g(m_k) (x_k - x_{k+1})

Bytes: forward reads x0, blend and residual once and writes out once; backward reads x0, blend and
dL/dout once and writes the three gradients once. To read blend once, a program holds all channels,
which share it. To read x0 once, it walks along the frames and keeps the last one.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .video import OPTIONS, TILE, load, locate, rows, store


class InterpolateFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, blend, residual):
        b, c, f, h, w = x0.shape
        out = x0.new_empty(b, c, 2 * f - 1, h, w)
        launch(interpolate_forward, x0, blend.expand_as(residual), residual, out)
        ctx.save_for_backward(x0, blend)
        ctx.residual_dtype = residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x0, blend = ctx.saved_tensors
        grad_x0, grad_blend = torch.empty_like(x0), torch.empty_like(blend)
        grad_residual = torch.empty_like(x0[:, :, 1:], dtype=ctx.residual_dtype)
        grads = (grad_x0, grad_blend, grad_residual)
        launch(interpolate_backward, x0, blend.expand_as(grad_residual), grad, *grads)
        return grads


def launch(kernel, *videos):
    b, c, f, h, w = videos[0].shape
    channels = triton.next_power_of_2(c)
    positions = max(TILE // channels, 16)
    pairs, row_length = rows(*videos)
    grid = (triton.cdiv(h * w, positions), b)
    kernel[grid](*pairs, c, f, h * w, row_length, channels, positions, **OPTIONS)


@triton.jit
def interpolate_forward(
    x0, blend, residual, out,
    c, f: tl.constexpr, hw, row_length, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    channel = tl.arange(0, CHANNELS)[:, None]
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    mask = (channel < c) & (position < hw)
    x0 = locate(x0, b, channel, position, row_length)
    blend = locate(blend, b, channel, position, row_length)
    residual = locate(residual, b, channel, position, row_length)
    out = locate(out, b, channel, position, row_length)
    left = load(x0, 0, mask)
    for k in range(f - 1):
        right = load(x0, k + 1, mask)
        share = load(blend, k, mask)
        middle = share * left + (1 - share) * right + load(residual, k, mask)
        store(out, 2 * k, left, mask)
        store(out, 2 * k + 1, middle, mask)
        left = right
    store(out, 2 * f - 2, left, mask)


@triton.jit
def interpolate_backward(
    x0, blend, grad, grad_x0, grad_blend, grad_residual,
    c, f: tl.constexpr, hw, row_length, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    channel = tl.arange(0, CHANNELS)[:, None]
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    mask = (channel < c) & (position < hw)
    x0 = locate(x0, b, channel, position, row_length)
    blend = locate(blend, b, channel, position, row_length)
    grad = locate(grad, b, channel, position, row_length)
    grad_x0 = locate(grad_x0, b, channel, position, row_length)
    grad_blend = locate(grad_blend, b, tl.zeros_like(b), position, row_length)
    grad_residual = locate(grad_residual, b, channel, position, row_length)
    left = load(x0, 0, mask)
    carry = tl.zeros_like(left)  # (1 - blend_{k-1}) g(m_{k-1}), which belongs to x_k
    for k in range(f - 1):
        right = load(x0, k + 1, mask)
        share = load(blend, k, mask)
        middle = load(grad, 2 * k + 1, mask)
        store(grad_x0, k, load(grad, 2 * k, mask) + share * middle + carry, mask)
        store(grad_residual, k, middle, mask)
        store(grad_blend, k, tl.sum(middle * (left - right), 0), position < hw)
        carry = (1 - share) * middle
        left = right
    store(grad_x0, f - 1, load(grad, 2 * f - 2, mask) + carry, mask)
