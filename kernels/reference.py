"""Both operations in plain PyTorch: the specification that the kernels are tested against."""

import torch
from einops import rearrange


def temporal_variance(x):
    """y_b = mean_{c,h,w} var_f x, the population variance."""
    return accurate(x).var(dim=2, unbiased=False).mean(dim=(1, 2, 3))


def interpolate_frames(x0, blend, residual):
    """x_0 m_0 x_1 ... x_{f-1} with m_k = blend_k x_k + (1 - blend_k) x_{k+1} + residual_k."""
    frames, blend = accurate(x0), accurate(blend)
    left, right, last = frames[:, :, :-1], frames[:, :, 1:], frames[:, :, -1:]
    middle = blend * left + (1 - blend) * right + residual
    pairs = rearrange([left, middle], "two b c f h w -> b c (f two) h w")
    return torch.cat([pairs, last], dim=2).to(x0.dtype)


def accurate(x):
    """float32 at least: bfloat16 would round away a small variance, or a small residual."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
