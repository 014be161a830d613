"""`python -m kernels.bench`: the code the kernels become on five GPUs and, on a GPU, their speed.

In bfloat16, on latents of 81 frames at 480p, or of several sizes where there is a GPU. One line for
each compiled kernel, with the bytes it must move; one for each operation, with all it launches,
forward and backward, in PyTorch and in Triton; last, everything as JSON.
"""

import json
import re
import subprocess
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from . import fused, reference

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
SIZES = {"480p": (1, 60, 104), "720p": (1, 90, 160), "beyond any L2": (32, 90, 160)}


def wan_inputs(batch=1, height=60, width=104, device="cpu", dtype=torch.bfloat16):
    """Operation -> its arguments."""
    video = lambda c, f: torch.rand(batch, c, f, height, width, device=device).to(dtype)
    return {
        "temporal_variance": [video(16, 21).requires_grad_()],
        "interpolate_frames": [
            video(c, f).requires_grad_() for c, f in ((16, 11), (1, 10), (16, 10))
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


class Launches(TorchDispatchMode):
    """Counts what PyTorch launches: operations that compute, and the bytes they read and write."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not op.is_view and "empty" not in op.__name__:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.count, self.bytes = self.count + 1, self.bytes + sum(x.nbytes for x in tensors)
        return out


def launch_report():
    # Each has inputs of its own, or the second would add its gradients to the first one's.
    for (operation, inputs), others in zip(wan_inputs().items(), wan_inputs().values()):
        with Launches() as eager:
            out = getattr(reference, operation)(*inputs)
            out.backward(torch.empty_like(out))
        with Launches() as beside:
            ours = compiled(TARGETS["sm_90"], operation, others)
        ways = {"eager": (eager.count, eager.bytes), "triton": (
            len(ours) + beside.count, sum(size for _, size in ours) + beside.bytes)}
        for way, (count, size) in ways.items():
            yield {"operation": operation, "way": way, "launches": count, "bytes": size}


def machine_code(kernel):
    """Registers and scratch bytes (spills, local arrays) of a thread; instructions; accesses."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.check_output(command, text=True)
        registers, scratch, wide = r"REG:(\d+)", r"(?:STACK|LOCAL):(\d+)", ".128"
        code, accesses = kernel.asm["sass"], {"loads": r"\bLDG\S*", "stores": r"\bSTG\S*"}
        instruction = r"^\S+:.:.:.:\S+\s(?!NOP)"
    else:
        registers, scratch = r"\.vgpr_count: *(\d+)", r"\.private_segment_fixed_size: *(\d+)"
        code, wide, access = kernel.asm["amdgcn"], "dwordx4", r"\b(?:global|buffer)_%s_\w+"
        usage, accesses = code, {"loads": access % "load", "stores": access % "store"}
        instruction = r"^\t(?:s|v|ds|global|buffer)_\w+"
    report = {"registers": int(re.search(registers, usage)[1])}
    report["scratch"] = sum(map(int, re.findall(scratch, usage)))
    report["instructions"] = len(re.findall(instruction, code, re.MULTILINE))
    for kind, pattern in accesses.items():
        found = re.findall(pattern, code)
        report |= {kind: len(found), f"{kind}_16": sum(wide in access for access in found)}
    return report


def compile_report():
    for name, target in TARGETS.items():
        for operation, inputs in wan_inputs().items():
            for kernel, size in compiled(target, operation, inputs):
                yield {"target": name, "kernel": kernel.name, "bytes": size} | machine_code(kernel)


def timing_report():
    """Milliseconds, and the share of a plain copy's speed, after a check against the reference."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source)) / 1e6
    for size, shape in SIZES.items():
        for operation, inputs in wan_inputs(*shape, "cuda").items():
            (_, once), (_, back) = compiled(TARGETS["sm_90"], operation, inputs)
            eager, kernel = getattr(reference, operation), getattr(fused, operation)
            torch.testing.assert_close(kernel(*inputs), eager(*inputs))
            ways = {"eager": eager, "compile": torch.compile(eager), "triton": kernel}
            grad = torch.rand_like(eager(*inputs))
            for way, run in ways.items():
                both = lambda: torch.autograd.grad(run(*inputs), inputs, grad)
                passes = {"forward": (lambda: run(*inputs), once),
                          "and backward": (both, once + back)}
                for name, (call, moved) in passes.items():
                    ms = triton.testing.do_bench(call)
                    speed = {"ms": ms, "GB/s": moved / ms / 1e6, "of_copy": moved / ms / 1e6 / copy}
                    yield {"operation": operation, "size": size, "pass": name, "way": way} | speed


if __name__ == "__main__":
    report = {}
    for part in [compile_report, launch_report] + [timing_report] * torch.cuda.is_available():
        report[part.__name__] = []
        for row in part():
            report[part.__name__].append(row)
            print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps(report))
