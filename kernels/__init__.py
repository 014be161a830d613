"""The two memory-bound operations of the method: one name each, whatever the device.

A tensor on a GPU (CUDA or ROCm) runs the Triton kernels. All other tensors run `reference.py`, the
specification that the kernels are tested against. So does float64, which the kernels would round.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import torch

from . import reference

fused = None
if find_spec("triton"):  # not on macOS or Windows
    # The first import of a submodule binds its name in the package. These imports stand above the
    # functions, so that `kernels.temporal_variance` is the function in every order of imports.
    from .interpolate import InterpolateFrames
    from .temporal_variance import TemporalVariance

    fused = SimpleNamespace(
        temporal_variance=TemporalVariance.apply, interpolate_frames=InterpolateFrames.apply
    )


def backend(x):
    """The implementation that serves `x`: `fused` or `reference`."""
    return fused if fused and x.is_cuda and x.dtype != torch.float64 else reference


def temporal_variance(x):
    """Mean over c, h, w of the population variance over f: the inner term of eq. 8.

    x `[b, c, f, h, w]` -> `[b]`, in float32 (float64 for float64). Differentiable; takes any
    strides. Raises ValueError unless x has five dimensions, none of them empty.
    """
    check_video("x", x)
    with torch.cuda.device(x.get_device()):  # Triton launches on the current device
        return backend(x).temporal_variance(x)


def interpolate_frames(x0, blend, residual):
    """Insert blend * left + (1 - blend) * right + residual between each two frames of `x0`.

    x0 `[b, c, f, h, w]`, blend `[b, 1, f-1, h, w]` in [0, 1], residual `[b, c, f-1, h, w]`
    -> `[b, c, 2f-1, h, w]`, in the dtype of x0. The frames of x0 are kept bit for bit, at the even
    places. Differentiable in all three; takes any strides. Raises ValueError for other shapes.
    """
    check_video("x0", x0)
    b, c, f, h, w = x0.shape
    check_shape("blend", blend, (b, 1, f - 1, h, w), x0)
    check_shape("residual", residual, (b, c, f - 1, h, w), x0)
    with torch.cuda.device(x0.get_device()):
        return backend(x0).interpolate_frames(x0, blend, residual)


def check_video(name, x):
    if x.ndim != 5 or x.numel() == 0:
        raise ValueError(f"{name} must be `b c f h w`, none of them 0, but has {list(x.shape)}")


def check_shape(name, x, shape, x0):
    if x.shape != shape:
        raise ValueError(
            f"{name} must be {list(shape)} beside x0 {list(x0.shape)}, but is {list(x.shape)}"
        )
