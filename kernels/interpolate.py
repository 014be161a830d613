"""Frame interpolation in Triton; its twin is `reference.interpolate_frames`.

    m_k = blend_k x_k + (1 - blend_k) x_{k+1} + residual_k      frames = x_0 m_0 x_1 m_1 ... x_{f-1}
    out = (1 - sigma) frames + sigma noise, or frames

With g = dL/dframes = (1 - sigma) dL/dout:

    dL/dx_k = g(x_k) + blend_k g(m_k) + (1 - blend_{k-1}) g(m_{k-1})
    dL/dresidual_k = g(m_k)        dL/dblend_k = sum_c g(m_k) (x_k - x_{k+1})

Bytes: forward reads x0, blend, residual and noise once and writes out once; backward reads x0,
blend and dL/dout once and writes the three gradients once. To that end a program holds all
channels, which share blend, and walks along the frames, carrying what two neighbours share.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .video import OPTIONS, TILE, load, locate, rows, store


class InterpolateFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, blend, residual, noise, sigma):
        b, c, f, h, w = x0.shape
        out = x0.new_empty(b, c, 2 * f - 1, h, w)
        videos = (x0, blend.expand_as(residual), residual, noise, out)
        launch(interpolate_forward, *videos, sigma=sigma)
        ctx.save_for_backward(x0, blend, sigma)
        ctx.residual_dtype = residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x0, blend, sigma = ctx.saved_tensors
        grad_x0, grad_blend = torch.empty_like(x0), torch.empty_like(blend)
        grad_residual = torch.empty_like(x0[:, :, 1:], dtype=ctx.residual_dtype)
        grads = (grad_x0, grad_blend, grad_residual)
        videos = (x0, blend.expand_as(grad_residual), grad, *grads)
        launch(interpolate_backward, *videos, sigma=sigma)
        # seldom asked for, so no part of the kernel
        grad_noise = grad * sigma.view(-1, 1, 1, 1, 1) if ctx.needs_input_grad[3] else None
        return *grads, grad_noise, None


def launch(kernel, *videos, sigma):
    b, c, f, h, w = videos[0].shape
    channels = triton.next_power_of_2(c)
    positions = max(TILE // channels, 16)
    pairs, row_length = rows(*videos)
    grid = (triton.cdiv(h * w, positions), b)
    kernel[grid](*pairs, sigma, c, f, h * w, row_length, channels, positions, **OPTIONS)


@triton.jit
def interpolate_forward(
    x0, blend, residual, noise, out, sigma,
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
    if noise is not None:
        noise = locate(noise, b, channel, position, row_length)
        sigma = tl.load(sigma + b).to(tl.float32)
    left = load(x0, 0, mask)
    for k in range(f - 1):
        right = load(x0, k + 1, mask)
        share = load(blend, k, mask)
        middle = share * left + (1 - share) * right + load(residual, k, mask)
        store(out, 2 * k, renoise(left, noise, sigma, 2 * k, mask), mask)
        store(out, 2 * k + 1, renoise(middle, noise, sigma, 2 * k + 1, mask), mask)
        left = right
    store(out, 2 * f - 2, renoise(left, noise, sigma, 2 * f - 2, mask), mask)


@triton.jit
def renoise(value, noise, sigma, frame, mask):
    if noise is not None:
        value = (1 - sigma) * value + sigma * load(noise, frame, mask)
    return value


@triton.jit
def interpolate_backward(
    x0, blend, grad, grad_x0, grad_blend, grad_residual, sigma,
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
    kept = 1.0
    if sigma is not None:
        kept -= tl.load(sigma + b).to(tl.float32)
    left = load(x0, 0, mask)
    carry = tl.zeros_like(left)  # the share of g(m_{k-1}) that is x_k's
    for k in range(f - 1):
        right = load(x0, k + 1, mask)
        share = load(blend, k, mask)
        given, middle = kept * load(grad, 2 * k, mask), kept * load(grad, 2 * k + 1, mask)
        store(grad_x0, k, given + share * middle + carry, mask)
        store(grad_residual, k, middle, mask)
        store(grad_blend, k, tl.sum(middle * (left - right), 0), position < hw)
        carry = (1 - share) * middle
        left = right
    store(grad_x0, f - 1, kept * load(grad, 2 * f - 2, mask) + carry, mask)
