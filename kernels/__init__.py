"""The two memory-bound operations of the method: one name each, whatever the device.

A tensor on a GPU (CUDA or ROCm) runs the Triton kernels in `fused.py`. All other tensors run
`reference.py`, the specification that the kernels are tested against. So does float64, which the
kernels would round, and so do all tensors where Triton cannot start.

The environment variable ADAVID_KERNELS chooses by hand: `triton` runs the kernels on a GPU without
trying them first, so that Triton's own error shows, and `pytorch` never runs them.
"""

import functools
import os
import sys
from contextlib import nullcontext

import torch

from . import reference

try:
    from . import fused
    import_error = None
except Exception as error:  # no Triton, as on macOS, or one that does not fit this machine
    fused, import_error = None, error

CHOICES = ("auto", "triton", "pytorch")


def backend(x):
    """The implementation that serves `x`: `fused` or `reference`."""
    return reference if why_reference(x) else fused


def why_reference(x):
    """Why `reference` serves `x`; None where `fused` does. ValueError for a bad ADAVID_KERNELS."""
    choice = os.environ.get("ADAVID_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"ADAVID_KERNELS is {choice!r}; choose {', '.join(CHOICES)}")
    if choice == "pytorch":
        return "ADAVID_KERNELS is pytorch"
    if not x.is_cuda:
        return f"Triton has no kernels for {x.device.type}"
    if x.dtype == torch.float64:
        return "the kernels would round float64"
    if choice == "triton":
        if fused is None:
            raise ValueError(f"ADAVID_KERNELS is triton, but {reason(import_error)}")
        return None
    return why_triton_fails(x.device)


@functools.cache
def why_triton_fails(device):
    """What keeps Triton from running on a GPU, or None; tried once, with a note if it fails."""
    error = import_error
    if fused:
        try:
            with torch.cuda.device(device):
                fused.temporal_variance(torch.zeros(1, 1, 1, 1, 1, device=device))
        except torch.OutOfMemoryError:
            raise
        except Exception as failed:  # of Triton, of the compilers that it calls, or of the driver
            error = failed
    if error is None:
        return None
    why = reason(error)
    print(f"note: kernels run in PyTorch, not in Triton: {why}", file=sys.stderr)
    return why


def reason(error):
    """Why Triton cannot start, in one line, and what to install."""
    line = next(iter(str(error).splitlines()), "")
    text = f"{type(error).__name__}: {line:.150}"
    if isinstance(error, ModuleNotFoundError):
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"{error.name} is not installed; python -m pip install {package}"
    if "C compiler" in str(error):
        return "it needs a C compiler; install gcc (Debian and Ubuntu: apt install gcc python3-dev)"
    if "Python.h" in str(error) or "cuda_utils" in str(error) or "hip_utils" in str(error):
        return (f"it could not compile its driver; install Python's headers (Debian and Ubuntu: "
                f"apt install python3-dev) ({text})")
    return f"it could not start here ({text})"


def on_device_of(x):
    """A context in which Triton launches on the device of `x`, not on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def temporal_variance(x):
    """Mean over c, h, w of the population variance over f: the inner term of eq. 8.

    x `[b, c, f, h, w]` -> `[b]`, in float32 (float64 for float64). Differentiable; takes any
    strides. Raises ValueError unless x has five dimensions, none of them empty.
    """
    check_video("x", x)
    with on_device_of(x):
        return backend(x).temporal_variance(x)


def interpolate_frames(x0, blend, residual):
    """Insert blend * left + (1 - blend) * right + residual between each two frames of `x0`.

    x0 `[b, c, f, h, w]`, blend `[b, 1, f-1, h, w]` in [0, 1], residual `[b, c, f-1, h, w]`
    -> `[b, c, 2f-1, h, w]`, in the dtype of x0. The frames of x0 are kept bit for bit, at the even
    places. Differentiable in all three; takes any strides, and copies nothing whose `[h, w]` planes
    are dense. Raises ValueError for other shapes.
    """
    check_video("x0", x0)
    b, c, f, h, w = x0.shape
    for name, x, shape in (("blend", blend, (b, 1, f - 1, h, w)),
                           ("residual", residual, (b, c, f - 1, h, w))):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} beside x0 {list(x0.shape)}, but is "
                             f"{list(x.shape)}")
    with on_device_of(x0):
        return backend(x0).interpolate_frames(x0, blend, residual)


def check_video(name, x):
    if x.ndim != 5 or x.numel() == 0:
        raise ValueError(f"{name} must be `b c f h w`, none of them 0, but has {list(x.shape)}")
