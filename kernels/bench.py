"""`python -m kernels.bench`: the code the kernels become on five GPUs and, on a GPU, their speed.

At Wan2.1's latent size, 16 x 21 x 60 x 104, in bfloat16. One line per launch, with the bytes it
must move (the variance's forward ends in one more, torch's sum over programs); last, all as JSON.
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
    """[(kernel, bytes it must move)]: an operation's launches on `target`, forward and backward.

    The launchers run on a driver that only names its target, and a launch stops at compiling: the
    arguments are specialised, alignment included, exactly as on that GPU. A kernel moves each of
    its tensors once, so the bytes are theirs.
    """
    launches, run = [], JITFunction.run

    def compile_only(self, *args, warmup, **options):
        tensors = [arg[0] if isinstance(arg, tuple) else arg for arg in args]
        tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        size = sum(x.untyped_storage().nbytes() for x in tensors)  # an expanded one has less
        launches.append((run(self, *args, warmup=True, **options), size))

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
    """Registers and scratch bytes (spills, local arrays) of a thread; its global accesses."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.check_output(command, text=True)
        registers, scratch, wide = r"REG:(\d+)", r"(?:STACK|LOCAL):(\d+)", ".128"
        code, accesses = kernel.asm["sass"], {"loads": r"\bLDG\S*", "stores": r"\bSTG\S*"}
    else:
        registers, scratch = r"\.vgpr_count: *(\d+)", r"\.private_segment_fixed_size: *(\d+)"
        code, wide, access = kernel.asm["amdgcn"], "dwordx4", r"\b(?:global|buffer)_%s_\w+"
        usage, accesses = code, {"loads": access % "load", "stores": access % "store"}
    report = {"registers": int(re.search(registers, usage)[1])}
    report["scratch"] = sum(map(int, re.findall(scratch, usage)))
    for kind, pattern in accesses.items():
        found = re.findall(pattern, code)
        report |= {kind: len(found), f"{kind}_16": sum(wide in access for access in found)}
    return report


def compile_report():
    for name, target in TARGETS.items():
        for operation, inputs in wan_inputs().items():
            for kernel, size in compiled(target, operation, inputs):
                yield {"target": name, "kernel": kernel.name, "bytes": size} | machine_code(kernel)


def timing_report(batch=64):
    """Milliseconds, and the share of a plain copy's speed, after a check against the reference."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source)) / 1e6
    for operation, inputs in wan_inputs(batch, "cuda").items():
        (_, once), (_, back) = compiled(TARGETS["sm_90"], operation, inputs)
        eager, kernel = getattr(reference, operation), getattr(fused, operation)
        torch.testing.assert_close(kernel(*inputs), eager(*inputs))
        grad, leaves = torch.rand_like(eager(*inputs)), [x for x in inputs if x.requires_grad]
        for way, run in {"eager": eager, "compile": torch.compile(eager), "triton": kernel}.items():
            both = lambda: torch.autograd.grad(run(*inputs), leaves, grad)
            passes = {"forward": (lambda: run(*inputs), once), "and backward": (both, once + back)}
            for name, (call, size) in passes.items():
                ms = triton.testing.do_bench(call)
                row = {"operation": operation, "pass": name, "way": way, "bytes": size, "ms": ms}
                yield row | {"GB/s": size / ms / 1e6, "of_copy": size / ms / 1e6 / copy}


if __name__ == "__main__":
    report = {}
    for part in [compile_report] + [timing_report] * torch.cuda.is_available():
        report[part.__name__] = []
        for row in part():
            report[part.__name__].append(row)
            print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps(report))
