"""The two memory-bound operations of the method: one name each, whatever the device.

A GPU tensor (CUDA or ROCm) runs the Triton kernels. Every other one, and float64, which the kernels
would round, runs `reference.py`, the specification they are tested against.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import torch

from . import reference

fused = None
if find_spec("triton"):  # not on macOS or Windows
    # The first import of a submodule binds its name in the package. Done here, above the functions,
    # it leaves `kernels.temporal_variance` the function, whoever imports what later.
    from .interpolate import InterpolateFrames
    from .temporal_variance import TemporalVariance

    fused = SimpleNamespace(
        temporal_variance=TemporalVariance.apply, interpolate_frames=InterpolateFrames.apply
    )


def backend(x):
    """The one dispatch point: whose `temporal_variance` and `interpolate_frames` serve `x`."""
    return fused if fused and x.is_cuda and x.dtype != torch.float64 else reference


def temporal_variance(x):
    """Mean over c, h, w of the population variance over f, eq. 8's inner term.

    x `[b, c, f, h, w]`, any strides -> `[b]`, float32 (float64 for float64); differentiable.
    Raises ValueError unless x has those five dimensions, none of them empty.
    """
    check_video("x", x)
    with torch.cuda.device(x.get_device()):  # Triton launches on the current device
        return backend(x).temporal_variance(x)


def interpolate_frames(x0, blend, residual, noise=None, sigma=None):
    """Put a frame between each two of `x0` and, given noise, renoise: f -> 2f-1 frames, x0's dtype.

    x0 `[b, c, f, h, w]`; blend `[b, 1, f-1, h, w]` in [0, 1], the left neighbour's share; residual
    `[b, c, f-1, h, w]`. The given frames stand bit for bit at the even places. With noise
    `[b, c, 2f-1, h, w]` and sigma in [0, 1], one number or b, the result is
    `(1 - sigma) * frames + sigma * noise`. Differentiable in all but sigma; any strides.
    Raises ValueError for any other shape.
    """
    check_video("x0", x0)
    if (noise is None) != (sigma is None):
        raise ValueError("noise and sigma belong together: give both to renoise, or neither")
    b, c, f, h, w = x0.shape
    check_shape("blend", blend, (b, 1, f - 1, h, w), x0)
    check_shape("residual", residual, (b, c, f - 1, h, w), x0)
    if noise is not None:
        check_shape("noise", noise, (b, c, 2 * f - 1, h, w), x0)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x0.device).detach().reshape(-1)
        if len(sigma) not in (1, b):
            raise ValueError(f"sigma must hold one number or {b}, but holds {len(sigma)}")
        sigma = sigma.expand(b).contiguous()
    with torch.cuda.device(x0.get_device()):
        return backend(x0).interpolate_frames(x0, blend, residual, noise, sigma)


def check_video(name, x):
    if x.ndim != 5 or x.numel() == 0:
        raise ValueError(f"{name} must be `b c f h w`, none of them 0, but has {list(x.shape)}")


def check_shape(name, x, shape, x0):
    if x.shape != shape:
        raise ValueError(
            f"{name} must be {list(shape)} beside x0 {list(x0.shape)}, but is {list(x.shape)}"
        )
