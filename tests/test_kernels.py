"""The two operations: what the reference promises, and that the Triton kernels keep it.

The kernels run on the GPU if there is one, and otherwise in Triton's interpreter. That must be chosen
before Triton is imported, so it gets a process of its own.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Half a unit in the last place, but a whole one for bfloat16, which the interpreter truncates.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 1, 5, 7),
    (1, 1, 2, 3, 3),
    (2, 2, 6, 17, 61),
    (1, 16, 9, 6, 8),
    (3, 5, 9, 1, 13),
]
LAYOUTS = {
    "contiguous": lambda b, c, f, h, w: torch.rand(b, c, f, h, w),
    "every second frame": lambda b, c, f, h, w: torch.rand(b, c, 2 * f, h, w)[:, :, ::2],
    "cropped": lambda b, c, f, h, w: torch.rand(b, c, f, h + 2, w + 3)[..., 1:-1, 2:-1],
    "channels last": lambda b, c, f, h, w: torch.rand(b, f, h, w, c).permute(0, 4, 1, 2, 3),
    "transposed": lambda b, c, f, h, w: torch.rand(b, c, f, w, h).transpose(3, 4),
    "same frame": lambda b, c, f, h, w: torch.rand(b, c, 1, h, w).expand(b, c, f, h, w),
    "same row": lambda b, c, f, h, w: torch.rand(b, 1, f, 1, w).expand(b, c, f, h, w),
}


def run(ops, operation, inputs, grad):
    """The result, and the gradients of all inputs but sigma."""
    leaves = [x.requires_grad_(i < 4) if x is not None else x for i, x in enumerate(inputs)]
    out = getattr(ops, operation)(*leaves)
    out.backward(grad)
    return [out.detach()] + [x.grad for x in leaves[:4] if x is not None]


def run_kernels(operation, inputs, grad):
    return run(kernels.fused, operation, inputs, grad)


@pytest.fixture(scope="module")
def triton_run():
    """`run` on the kernels: (operation, inputs, grad) -> [result, *gradients]."""
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        yield run_kernels
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            process.submit(int).result()  # starts it
        yield lambda *args: process.submit(run_kernels, *args).result()


def interpolation_inputs(size, layout=LAYOUTS["contiguous"], renoised=True):
    b, c, f, h, w = size
    frames = [layout(b, c, f, h, w), layout(b, 1, f - 1, h, w), layout(b, c, f - 1, h, w)]
    return frames + ([layout(b, c, 2 * f - 1, h, w), torch.rand(b)] if renoised else [None, None])


def assert_kernels_match(triton_run, operation, inputs, grad, dtype):
    """Each result within `dtype`'s rounding, of the largest value, of the reference in float64."""
    to = lambda x, dtype: x.to(dtype) if x.is_contiguous() else _keep_layout(x, dtype)
    inputs = [x if x is None else to(x, dtype).to(DEVICE) for x in inputs]
    exact = [x if x is None else x.double() for x in inputs]
    wanted = run(reference, operation, exact, grad.double().to(DEVICE))
    got = triton_run(operation, inputs, grad.to(DEVICE))
