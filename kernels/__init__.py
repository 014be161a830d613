"""The two memory-bound operations of the method: one name each, whatever the device.

A tensor on a GPU (CUDA or ROCm) runs the Triton kernels in `fused.py`. All other tensors run
`reference.py`, the specification that the kernels are tested against. So does float64, which the
kernels would round.
"""

from importlib.util import find_spec

import torch

from . import reference

if find_spec("triton"):  # not on macOS or Windows
    from . import fused
else:
    fused = None


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
    for name, x, shape in (("blend", blend, (b, 1, f - 1, h, w)),
                           ("residual", residual, (b, c, f - 1, h, w))):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} beside x0 {list(x0.shape)}, but is "
                             f"{list(x.shape)}")
    with torch.cuda.device(x0.get_device()):
        return backend(x0).interpolate_frames(x0, blend, residual)


def check_video(name, x):
    if x.ndim != 5 or x.numel() == 0:
        raise ValueError(f"{name} must be `b c f h w`, none of them 0, but has {list(x.shape)}")
