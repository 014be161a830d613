"""What the kernels compile to for five GPUs and, on a GPU, how fast they run: `python -m kernels.bench`

Everything at Wan2.1's latent size, 16 x 21 x 60 x 104 in bfloat16. Compiling needs no GPU. The last
line is the whole report as JSON.
"""

import json
import re
import subprocess
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from . import fused, reference

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


def wan_inputs(batch=1, device="cpu", dtype=torch.bfloat16):
    """Operation -> its arguments, the differentiable ones first."""
    video = lambda c, f: torch.rand(batch, c, f, 60, 104, device=device).to(dtype)
    sigma = torch.rand(batch, device=device)
    return {
        "temporal_variance": [video(16, 21).requires_grad_()],
        "interpolate_frames": [
            *(video(c, f).requires_grad_() for c, f in ((16, 11), (1, 10), (16, 10))),
            *(video(16, 21), sigma),
        ],
    }


def compiled(target, operation, inputs):
    """[(kernel, bytes it must move)] of an operation's launches on a `target` GPU, backward included.

    The launchers run on a driver that only names its target, and a launch stops at compiling: the
    arguments are specialised, alignment included, exactly as on that GPU. A kernel moves each of its
    tensors once, so the bytes are theirs.
    """
    launches, run = [], JITFunction.run

    def compile_only(self, *args, warmup, **options):
        tensors = [x for arg in args for x in (arg if isinstance(arg, tuple) else [arg])]
        tensors = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
        kernel = run(self, *args, warmup=True, **options)
        launches.append((kernel, sum(storage.nbytes() for storage in tensors)))

    machine = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: str(target),
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", machine),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        out = getattr(fused, operation)(*inputs)
        out.backward(torch.empty_like(out))
    return launches


def machine_code(kernel):
    """Registers and bytes of scratch (spills, local arrays) per thread; 16-byte and all accesses."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, scratch = r"REG:(\d+)", r"(?:STACK|LOCAL):(\d+)"
        code, access, wide = kernel.asm["sass"], r"\b%sG\.\S*", ".128"
        load, store = "LD", "ST"
    else:
        registers, scratch = r"\.vgpr_count: *(\d+)", r"\.private_segment_fixed_size: *(\d+)"
        code, access, wide = kernel.asm["amdgcn"], r"\b(?:global|buffer)_%s_\w+", "dwordx4"
        usage, load, store = code, "load", "store"
    loads, stores = re.findall(access % load, code), re.findall(access % store, code)
    return {
        "registers": int(re.search(registers, usage)[1]),
        "scratch": sum(map(int, re.findall(scratch, usage))),
        "loads_16": sum(wide in x for x in loads),
        "loads": len(loads),
        "stores_16": sum(wide in x for x in stores),
        "stores": len(stores),
    }


def compile_report():
    for name, target in TARGETS.items():
        for operation, inputs in wan_inputs().items():
            for kernel, size in compiled(target, operation, inputs):
                yield {"target": name, "kernel": kernel.name, "bytes": size} | machine_code(kernel)


def timing_report(batch=16):
    """Checks against the reference first; the copy that others are a share of is measured here too."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source)) / 1e6
    for operation, inputs in wan_inputs(batch, "cuda").items():
        sizes = [size for _, size in compiled(TARGETS["sm_90"], operation, inputs)]
        plain, leaves = getattr(reference, operation), [x for x in inputs if x.requires_grad]
        torch.testing.assert_close(getattr(fused, operation)(*inputs), plain(*inputs))
        ways = {"eager": plain, "compile": torch.compile(plain), "triton": getattr(fused, operation)}
        for way, function in ways.items():
            out = function(*inputs)
            grad = torch.rand_like(out)
            passes = {
                "forward": lambda: function(*inputs),
                "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
            }
            for (name, run), size in zip(passes.items(), sizes):
                ms = triton.testing.do_bench(run)
                speed = {"ms": ms, "GB/s": size / ms / 1e6, "of_copy": size / ms / 1e6 / copy}
                yield {"operation": operation, "pass": name, "way": way} | speed


if __name__ == "__main__":
    report = {}
    for part in [compile_report] + [timing_report] * torch.cuda.is_available():
        report[part.__name__] = []
        for row in part():
            report[part.__name__].append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps(report))
