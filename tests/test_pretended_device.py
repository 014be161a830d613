"""Every program on a GPU that is not there: no tensor is on another device than its fellows."""

import numpy as np
import pytest
import torch

import adavid
import sample
import train
from tests.helpers import distill
from tests.pretended_device import pretended
from tools import demo, encode

KINDS = ("cuda", "mps")
TOY = "--model @toy --batch-size 2"
CLIP = "--frames 9 --height 32 --width 48"
PROGRAMS = {  # the program and its flags; @NAME stands for an input
    "interpolator": (train, "interpolator --steps 2 --batch-size 2 --sample-every 1"),
    "distill": (train, f"distill {TOY} --steps 1"),
    "resume": (train, f"distill {TOY} --steps 2"),  # the run of the line before
    "lora": (train, f"distill {TOY} --steps 1 --lora 2 --dtype bfloat16 --one-rollout"),
    "ema": (train, f"distill {TOY} --steps 1 --ema 0.9 --train-strides 2 2 1 1 --accumulate 2"),
    "wan": (train, "distill --model @diffusers --codec @diffusers --data @encoded --steps 1 "
                   "--batch-size 1 --critic-updates 1"),
    "sample": (sample, "'a red ball' --model @toy --lora @adapter.safetensors --save-latents"),
    "sample --teacher": (sample, "'a red ball' --model @toy --teacher --steps 2"),
    "sample wan": (sample, f"'a cat' --model @diffusers --teacher --steps 2 {CLIP}"),
    "encode": (encode, f"--videos @clips --model @diffusers {CLIP}"),
}

@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def outs(kind, tmp_path_factory):
    return tmp_path_factory.mktemp(kind)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_keeps_its_tensors_together(name, kind, inputs, outs):
    from tests.torture.readers import Reader

    module, flags = PROGRAMS[name]
    out = outs / {"resume": "distill"}.get(name, name)
    argv = [*Reader.arguments(flags, inputs), "--out", str(out), "--device", kind]
    with pretended(kind, train, sample, encode):
        assert module.main(argv) == 0


def test_the_demos_page_keeps_its_tensors_together(kind, inputs, tmp_path, monkeypatch):
    teacher = lambda *args: sample_teacher(*args[:4], 2, args[5])  # not 50 steps
    sample_teacher = adavid.sample_teacher
    monkeypatch.setattr(adavid, "sample_teacher", teacher)
    monkeypatch.setattr(demo, "draw_gif", lambda *_: None)  # of the page's videos, for seconds
    args = demo.Demo(tmp_path, model=inputs["toy"], device=kind)
    for name, (_, _, flags) in demo.RUNS.items():
        assert distill(inputs["toy"], tmp_path / name, *flags, steps=1) == 0
    with pretended(kind):
        demo.write_report(args)


FAULTS = {  # on `device`, with `here` on it
    "made without a device": lambda device, here: here + torch.zeros(3),
    "an index's tensor on the CPU": lambda device, here: torch.zeros(3)[here.long()],
    "a draw that was not moved": lambda device, here: here.add_(torch.randn(3)),
    "a mask on the CPU": lambda device, here: torch.where(torch.ones(3).bool(), here, here),
    "NumPy": lambda device, here: here.numpy(),
    "NumPy by its own function": lambda device, here: np.asarray(here),
    "a CPU's generator": lambda device, here: torch.rand(
        3, device=device, generator=torch.Generator()),
    "a part of a cat": lambda device, here: torch.cat([here, torch.zeros(3)]),
    "a network's weights left behind": lambda device, here: torch.nn.Linear(3, 3)(here),
    "a scalar of the GPU among the CPU's": lambda device, here: torch.zeros(3) * here.sum(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, kind):
    with pretended(kind) as device, pytest.raises(RuntimeError, match=r"on|NumPy"):
        FAULTS[fault](device, torch.zeros(3, device=device))


def test_what_a_gpu_allows_is_allowed(kind):
    with pretended(kind) as device:
        here = torch.arange(3.0, device=device)
        assert (here * torch.tensor(2.0))[torch.tensor([1])].device == device
        there = here.cpu()
        there.copy_(here)
        assert there.device == torch.device("cpu") and there.numpy().sum() == 3
        x = torch.ones(3, requires_grad=True)
        (x.to(device) * here).sum().backward()
        assert x.grad.tolist() == [0, 1, 2] and x.grad.device == torch.device("cpu")


@pytest.mark.parametrize("fault", [
    lambda: torch.zeros(3, device="mps", dtype=torch.float64),
    lambda: torch.zeros(3, device="mps").double(),
    lambda: torch.cuda.synchronize()])
def test_mps_has_neither_float64_nor_cuda(fault):
    with pretended("mps"), pytest.raises(RuntimeError, match="on MPS"):
        fault()
