"""What the kernels compile to on five GPUs and, where there is a GPU, how fast they run.

    python -m kernels.bench

Compiling needs no GPU. The tensors are latents of 81 frames at 480p, in float32 as the samplers and
training have them; timing tries larger ones as well. One line is printed for each compiled kernel
and each timing, and then all of it as one line of JSON.
"""

import json
import re
import subprocess
import tempfile
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from . import fused, reference

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
SIZES = {"480p": (1, 60, 104), "720p": (1, 90, 160), "beyond any L2": (32, 90, 160)}


def wan_inputs(batch=1, height=60, width=104, device="cpu", dtype=torch.float32):
    """Operation -> its arguments, laid out in memory as the frame interpolator has them."""

    def video(*shape):
        return torch.rand(batch, *shape, height, width, device=device).to(dtype)

    unet = video(10, 17).transpose(1, 2)
    inputs = {
        "temporal_variance": [video(16, 21)],
        "interpolate_frames": [video(16, 11), unet[:, :1].sigmoid(), unet[:, 1:]],
    }
    return {operation: [x.requires_grad_() for x in xs] for operation, xs in inputs.items()}


@contextmanager
def compile_only(target):
    """In this block, a launch compiles its kernel for `target` and runs nothing.

    Yields the list that the kernels are added to. Triton asks its driver which GPU there is; here
    the driver is an object that names `target`. As on that GPU, a launch specialises its kernel on
    the arguments, alignment included. Then Triton calls a hook, which may take over the compiling.
    """
    kernels = []

    def hook(fn, compile, **_):
        (attributes,) = compile["configs"]
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], attributes)
        kernels.append(triton.compile(source, target, fused.OPTIONS))
        return True  # so that Triton does not launch

    driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: str(target),
        get_current_stream=lambda device: 0))
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield kernels
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        driver.set_active(None)  # Triton looks for the real one when it next needs it


def compiled(target, operation, inputs):
    """The kernels of an operation's forward and backward, compiled for `target`."""
    with compile_only(target) as kernels:
        out = getattr(fused, operation)(*inputs)
        out.backward(torch.empty_like(out))
    return kernels


def machine_code(kernel):
    """Registers and scratch bytes (spills, local arrays) of a thread; its loads and stores.

    `loads_16` and `stores_16` count those that move 16 bytes at once.
    """
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.check_output(command, text=True)
        code, registers, scratch = kernel.asm["sass"], r"REG:(\d+)", r"(?:STACK|LOCAL):(\d+)"
        loads, stores, wide = r"\bLDG\S*", r"\bSTG\S*", ".128"
    else:
        code = usage = kernel.asm["amdgcn"]
        registers, scratch = r"\.vgpr_count: *(\d+)", r"\.private_segment_fixed_size: *(\d+)"
        loads, stores, wide = (*(rf"\b(?:global|buffer)_{kind}_\w+" for kind in ("load", "store")),
                               "dwordx4")
    loads, stores = re.findall(loads, code), re.findall(stores, code)
    return {"registers": int(re.search(registers, usage)[1]),
            "scratch": sum(map(int, re.findall(scratch, usage))),
            "loads": len(loads), "loads_16": sum(wide in load for load in loads),
            "stores": len(stores), "stores_16": sum(wide in store for store in stores)}


def compile_all():
    for name, target in TARGETS.items():
        for operation, inputs in wan_inputs().items():
            for kernel in compiled(target, operation, inputs):
                yield {"target": name, "kernel": kernel.name} | machine_code(kernel)


def passes(function, inputs):
    """{"forward", "backward" or "both": a function that runs it}."""
    out = function(*inputs)
    backward = partial(torch.autograd.grad, out, inputs, torch.empty_like(out), retain_graph=True)

    def both():
        out = function(*inputs)
        torch.autograd.grad(out, inputs, torch.empty_like(out))

    return {"forward": partial(function, *inputs), "backward": backward, "both": both}


def bytes_moved(operation, inputs):
    """The least that each pass can move: it reads or writes each of its tensors once."""
    out = getattr(fused, operation)(*inputs)
    saved = out.grad_fn.saved_tensors  # inputs, and what forward writes for backward
    forward = sum({x.data_ptr(): x.nbytes for x in (*inputs, *saved, out)}.values())
    # A gradient is as large as its tensor.
    backward = sum(x.nbytes for x in (*saved, out, *inputs))
    return {"forward": forward, "backward": backward, "both": forward + backward}


def time_all():
    """Milliseconds of forward, backward and both, and the speed as a share of a plain copy's."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))
    for size, shape in SIZES.items():
        for operation, inputs in wan_inputs(*shape, "cuda").items():
            eager, kernel = getattr(reference, operation), getattr(fused, operation)
            torch.testing.assert_close(kernel(*inputs), eager(*inputs))
            moved = bytes_moved(operation, inputs)
            inductor = torch.compile(eager, dynamic=False)
            for way, function in {"eager": eager, "compile": inductor, "triton": kernel}.items():
                for name, run in passes(function, inputs).items():
                    ms = triton.testing.do_bench(run)
                    yield {"operation": operation, "size": size, "way": way, "pass": name,
                           "ms": ms, "of_copy": moved[name] / ms / copy}


def printed(rows):
    for row in rows:
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        yield row


if __name__ == "__main__":
    report = {"compiled": list(printed(compile_all()))}
    if torch.cuda.is_available():
        report["timed"] = list(printed(time_all()))
    print(json.dumps(report))
