"""A GPU that is not there: CPU tensors that say that they are on `cuda` or `mps`.

    with pretended("cuda"):
        x = torch.zeros(3, device="cuda")     x.device is cuda:0, and its values are on the CPU
        x + torch.zeros(3)                    RuntimeError: two devices

Every storage has a device, which is kept beside it. All values are real, so whole programs run:
control flow, backward, optimizers and checkpoints. What fails on a GPU fails here, with the line of
the project that did it: an operation on two devices, NumPy of a GPU's tensor, a CPU generator for
one; on MPS also float64 and torch.cuda. As on a GPU, a CPU tensor without dimensions and a CPU
index may meet a GPU's tensor.
"""

import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import kernels
from kernels import reference
from runtime import cli
from tests.helpers import ROOT

CPU = torch.device("cpu")


@contextmanager
def pretended(kind, *programs):
    """In this block, the device `kind` seems to exist. Yields it, as a torch.device.

    programs: modules that call `init_distributed`. On CUDA it would need NCCL, and is left out.
    """
    device, devices = torch.device(kind, 0), WeakIdKeyDictionary()
    patches = [mock.patch.object(cli, "pick_device", lambda name: torch.device(kind))]
    if kind == "cuda":
        patches += [mock.patch.object(kernels, "fused", reference),  # Triton has no real GPU
                    mock.patch("torch.cuda.device", nullcontext),
                    mock.patch("torch.cuda.mem_get_info", lambda *_: (2**40, 2**40))]
        patches += [mock.patch.object(program, "init_distributed", lambda name: torch.device(kind))
                    for program in programs]
    else:
        patches += [mock.patch("torch.cuda._lazy_init", mock.Mock(
            side_effect=RuntimeError("torch.cuda on MPS")))]
    if dist.is_initialized():  # by an earlier test in this process
        dist.destroy_process_group()
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        pretence = Pretence(device, devices)
        stack.enter_context(SameDevice(pretence))
        stack.enter_context(pretence)
        yield device


class Pretence(TorchFunctionMode):
    """What Python sees: where a tensor is, makes one, and moves one."""

    def __init__(self, device, devices):
        super().__init__()
        self.device, self.devices = device, devices
        self.questions = {
            torch.Tensor.device.__get__: self.device_of,
            torch.Tensor.get_device: lambda x: -1 if self.device_of(x) == CPU else 0,
            **{getattr(torch.Tensor, f"is_{kind}").__get__:
               lambda x, kind=kind: self.device_of(x).type == kind
               for kind in ("cuda", "mps", "cpu")}}

    def device_of(self, x):
        with torch._C.DisableTorchFunction():
            return x.device if x.is_meta else self.devices.get(unwrapped(x).untyped_storage(), CPU)

    def put(self, x, device):
        """Say that a tensor is on a device."""
        with torch._C.DisableTorchFunction():
            if device.type == "mps" and x.dtype in (torch.float64, torch.complex128):
                raise RuntimeError(f"{x.dtype} on MPS ({where()})")
            self.devices[unwrapped(x).untyped_storage()] = device
        return x

    def named(self, device):
        """The device that is meant: "cuda" is cuda:0."""
        device = torch.device(device)
        return self.device if device.type == self.device.type else device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in self.questions:
            return self.questions[func](*args)
        if name in ("numpy", "__array__") and self.device_of(args[0]) != CPU:
            raise RuntimeError(f"NumPy of a tensor on {self.device} ({where()})")
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(func, args, kwargs)
        if kwargs.get("device") is None or self.named(kwargs["device"]) != self.device:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name} on {self.device} with a generator of the CPU ({where()})")
        return self.put(func(*args, **kwargs | {"device": "cpu"}), self.device)

    def move(self, func, args, kwargs):
        x, dtype, target = args[0], kwargs.get("dtype"), self.device_of(args[0])
        if func is not torch.Tensor.to:
            target = CPU if func is torch.Tensor.cpu else self.device
        else:
            for what in (*args[1:], kwargs.get("device")):
                if isinstance(what, torch.Tensor):
                    dtype, target = what.dtype, self.device_of(what)
                elif isinstance(what, torch.dtype):
                    dtype = what
                elif isinstance(what, (str, torch.device)):
                    target = self.named(what)
        if target.type == "meta":
            return func(*args, **kwargs)
        out = x if dtype is None else torch.Tensor.to(x, dtype)
        return out if target == self.device_of(x) else Move.apply(out, self, target)


class Move(torch.autograd.Function):
    """The values on another device. Their gradient goes back."""

    @staticmethod
    def forward(ctx, x, pretence, target):
        ctx.pretence, ctx.source = pretence, pretence.device_of(x)
        return pretence.put(x.clone(), target)

    @staticmethod
    def backward(ctx, grad):
        return ctx.pretence.put(grad.clone(), ctx.source), None, None


class SameDevice(TorchDispatchMode):
    """Below autograd: an operation's tensors must be on one device, and its results are there."""

    def __init__(self, pretence):
        super().__init__()
        self.pretence = pretence

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs))
                   if isinstance(x, torch.Tensor) and x.device == CPU]
        devices = [self.pretence.device_of(x) for x in tensors]
        # Tensors without dimensions may come from the CPU, but not go there.
        deciding = {device for x, device in zip(tensors, devices) if x.ndim}
        mixed = len(deciding) > 1 or deciding == {CPU} and len(set(devices)) > 1
        if "index" in name or "copy" in name:  # the first decides
            deciding = set(devices[:1])
            mixed = "index" in name and deciding == {CPU} and len(set(devices)) > 1
        if mixed:
            raise RuntimeError(f"{op} on {', '.join(map(str, devices))} ({where()})")
        home = next(iter(deciding or set(devices) - {CPU} or {CPU}))
        out, old = op(*args, **kwargs), {id(x.untyped_storage()) for x in tensors}
        for x in tree_leaves(out):
            if (isinstance(x, torch.Tensor) and x.device == CPU
                    and id(x.untyped_storage()) not in old):
                self.pretence.put(x, home)
        return out


def unwrapped(x):
    """A tensor without the wrappers of torch.func."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def where():
    """The innermost line of the project."""
    frames = (frame for frame in reversed(traceback.extract_stack())
              if frame.filename != __file__ and Path(frame.filename).is_relative_to(ROOT))
    return next((f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames), "elsewhere")
