"""Other machines than a Linux CPU: what runs there, what is refused, and what a user is told."""

import errno
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import reference
from runtime import cli, distributed, pictures, run
from runtime.checkpoints import find_not_finite
from tests.helpers import ROOT, complaint, distill, torchrun
from tiny_wan import PRESETS, WanModel

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))

# --- which implementation serves a tensor ------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def gpu_video(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernels.why_triton_fails.cache_clear()
    yield torch.rand(1, 2, 3, 4, 5).as_subclass(OnGpu)
    kernels.why_triton_fails.cache_clear()


class Fused:
    """In place of kernels.fused: fails as Triton did on other machines."""

    def __init__(self, error):
        self.error = error

    def temporal_variance(self, x):
        raise self.error


FAILURES = {  # what Triton raises when it first starts, and what the note says
    "no compiler": (RuntimeError("Failed to find C compiler. Please specify via CC environment "
                                 "variable or set triton.knobs.build.impl."), "apt install gcc"),
    "no headers": (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/cuda_utils.c"]),
                   "apt install python3-dev"),
    "no headers on AMD": (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/hip_utils.c"]),
                          "apt install python3-dev"),
    "card": (RuntimeError("PassManager::run failed"), "PassManager::run failed"),
    "old ptxas": (ValueError("ptxas fatal: Value 'sm_103a' is not defined for 'gpu-name'\nmore"),
                  "'sm_103a' is not defined"),
    "driver": (AssertionError("libcuda.so cannot found!"), "libcuda.so"),
    "link": (OSError("cannot open shared object file"), "cannot open"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_where_triton_cannot_start_the_reference_serves_with_one_note(
        case, gpu_video, monkeypatch, capfd):
    error, says = FAILURES[case]
    monkeypatch.setattr(kernels, "fused", Fused(error))
    for _ in range(2):
        torch.testing.assert_close(torch.Tensor(kernels.temporal_variance(gpu_video)),
                                   reference.temporal_variance(torch.Tensor(gpu_video)))
    note, = capfd.readouterr().err.splitlines()
    assert note.startswith("note: ") and says in note and len(note) < 300


def test_triton_itself_is_tried_and_has_no_gpu_here(gpu_video, capfd):
    pytest.importorskip("triton")
    assert kernels.backend(gpu_video) is reference
    assert "could not start here" in capfd.readouterr().err


def test_out_of_memory_is_no_failure_of_triton(gpu_video, monkeypatch):
    monkeypatch.setattr(kernels, "fused", Fused(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        kernels.temporal_variance(gpu_video)


@pytest.mark.parametrize("choice, imports, served", [
    ("pytorch", True, "reference"), ("triton", True, "fused"), ("auto", False, "reference"),
    ("triton", False, "triton is not installed"), ("cuda", True, "choose auto, triton, pytorch")])
def test_one_variable_chooses_by_hand(choice, imports, served, gpu_video, monkeypatch):
    works = Fused(None)
    works.temporal_variance = reference.temporal_variance
    monkeypatch.setattr(kernels, "fused", works if imports else None)
    monkeypatch.setattr(kernels, "import_error", None if imports else ModuleNotFoundError(
        "No module named 'triton'", name="triton"))
    monkeypatch.setenv("ADAVID_KERNELS", choice)
    if served in ("reference", "fused"):
        assert kernels.backend(gpu_video) is {"reference": reference, "fused": works}[served]
        assert kernels.backend(torch.Tensor(gpu_video)) is reference  # a tensor on the CPU
        assert kernels.backend(gpu_video.double()) is reference or choice == "auto"
    else:
        with pytest.raises(ValueError, match=served):
            kernels.backend(gpu_video)


def test_a_tensor_of_mps_has_an_index_but_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0)
    video = torch.rand(1, 2, 3, 4, 5)
    assert kernels.temporal_variance(video).shape == (1,)
    frames = kernels.interpolate_frames(video, torch.rand(1, 1, 2, 4, 5), torch.rand(1, 2, 2, 4, 5))
    assert frames.shape == (1, 2, 5, 4, 5)


# --- memory that runs out ----------------------------------------------------------------------

FULL = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: "
                        "1.10 GB, max allowed: 6.80 GB). Tried to allocate 768.00 MB."),
    "MPS, one buffer": RuntimeError("Invalid buffer size: 19.45 GB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                        "allocate memory: you tried to allocate 4000000000000000 bytes."),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "Python": MemoryError(),
}


@dataclass
class Nothing:
    """No flags."""


def fail_with(error):
    def program(*_):
        raise error
    return program


@pytest.mark.parametrize("device", FULL)
def test_memory_that_runs_out_is_one_kind_of_error(device, capsys):
    assert "smaller" in complaint(capsys, cli.run(fail_with(FULL[device]), Nothing, []))


@pytest.mark.parametrize("device", ["CUDA", "MPS", "CPU"])
def test_a_picture_that_needs_too_much_memory_ends_no_training(
        device, toy_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures.ToyCodec, "decode", fail_with(FULL[device]))
    assert distill(toy_folder, tmp_path, "--critic-updates", 0, "--lambda-reg", 0, steps=1) == 0
    assert "000001.png: not written" in capsys.readouterr().out


def test_the_cpus_own_words_are_known():
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**60, dtype=torch.uint8)
    assert cli.is_out_of_memory(info.value)


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("a bug"), AssertionError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            cli.run(fail_with(error), Nothing, [])


# --- devices and dtypes ------------------------------------------------------------------------

@pytest.mark.parametrize("asked, device, bf16, toy, wan", [
    ("auto", CPU, True, None, None), ("auto", MPS, True, None, None),
    ("auto", CUDA, True, None, torch.bfloat16), ("auto", CUDA, False, None, torch.float32),
    ("bfloat16", CUDA, False, torch.bfloat16, torch.bfloat16),
    ("float32", CUDA, True, torch.float32, torch.float32)])
def test_the_dtype_of_the_toy_and_of_wan(asked, device, bf16, toy, wan, monkeypatch):
    monkeypatch.setattr(cli, "has_bfloat16", lambda: bf16)
    assert cli.pick_dtype(asked, device, PRESETS["tiny"]) is toy
    assert cli.pick_dtype(asked, device, PRESETS["wan-1.3b"]) is wan


def announced(capsys, *args):
    cli.announce(*args)
    line, = capsys.readouterr().out.splitlines()
    return line


def test_programs_say_where_they_compute(capsys, monkeypatch):
    monkeypatch.setattr(cli, "why_no_gpu", lambda: None)
    assert announced(capsys, CPU, None) == "device: cpu, float32"
    assert announced(capsys, CPU, torch.bfloat16) == "device: cpu, bfloat16"
    monkeypatch.setenv("RANK", "1")
    cli.announce(CPU, None)
    assert not capsys.readouterr().out


def test_programs_say_that_a_card_has_no_bfloat16(capsys, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(cli, "has_bfloat16", lambda: False)
    assert announced(capsys, CUDA, None) == "device: cuda (Tesla T4), float32"  # the toy
    line = announced(capsys, CUDA, torch.float32)
    assert line.startswith("device: cuda (Tesla T4), float32; this GPU has no bfloat16")


def no_init():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Update")


@pytest.mark.parametrize("there, built, init, says", [
    ("nvidia-smi", None, None, "this torch has no CUDA"),
    ("nvidia-smi", "13.0", no_init, "driver on your system is too old"),
    ("kfd", None, None, "this torch has no ROCm"), (None, "13.0", no_init, None)])
def test_programs_say_why_a_gpu_that_seems_to_be_there_is_not_used(
        there, built, init, says, capsys, monkeypatch):
    monkeypatch.setattr(cli.shutil, "which", lambda name: there if there == name else None)
    monkeypatch.setattr(cli.Path, "exists", lambda path: there is not None and there in str(path))
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    line = announced(capsys, CPU, None, "auto")
    assert says in line if says else line == "device: cpu, float32"
    assert announced(capsys, CPU, None, "cpu") == "device: cpu, float32"  # it was asked for
    if says:
        with pytest.raises(ValueError, match=says):
            cli.pick_device("cuda")


def test_an_old_mac_is_told_why_its_gpu_is_not_used(capsys, monkeypatch):
    monkeypatch.setattr(cli.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(cli.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "newer macOS" in announced(capsys, CPU, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_cannot_compute_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert "try --device cpu" in complaint(capsys, distill("tiny_wan/weights", tmp_path))


# --- NCCL and FSDP -----------------------------------------------------------------------------

@pytest.mark.parametrize("device", [CUDA, MPS], ids=str)
def test_without_nccl_one_gpu_trains_in_float32_and_bfloat16_is_refused_in_one_line(
        device, monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: False)
    moved = []
    model = WanModel(PRESETS["tiny"])
    model.to = lambda device: moved.append(device) or model
    for dtype in (None, torch.float32):
        assert distributed.apply_fsdp(model, device, dtype) is model
    assert moved == [device, device]
    with pytest.raises(ValueError, match="no NCCL.*WSL2.*--dtype float32"):
        distributed.apply_fsdp(model, device, torch.bfloat16)


def test_bfloat16_means_bfloat16_in_a_single_process(toy_folder, tmp_path):
    (tmp_path / "one.py").write_text("""
import sys, train
import torch.nn.functional as F
seen, attend = set(), F.scaled_dot_product_attention
def watched(q, *args, **options):
    seen.add(str(q.dtype))
    return attend(q, *args, **options)
F.scaled_dot_product_attention = watched
code = train.main(sys.argv[1:])
print(*seen)
sys.exit(code)
""")
    code = subprocess.run(
        [sys.executable, tmp_path / "one.py", "distill", "--model", toy_folder, "--out",
         tmp_path / "run", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--dtype",
         "bfloat16"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True)
    assert code.returncode == 0, code.stderr
    first, *_, last = code.stdout.splitlines()
    assert first == "device: cpu, bfloat16" and last == "torch.bfloat16"


# --- one process among others ------------------------------------------------------------------

@pytest.mark.long
def test_ranks_that_are_busy_for_thrice_the_patience_are_not_called_dead(tmp_path):
    """The second holds Python's lock longer than the first, which is the first to judge."""
    (tmp_path / "busy.py").write_text("""
import ctypes, time
import torch.distributed as dist
from runtime import distributed
distributed.BEAT, distributed.PATIENCE = 0.1, 1
distributed.init_distributed("cpu")
with distributed.Watchdog():
    for longer in (0.1, 1.5):
        time.sleep(0.5)
        dist.barrier()
        ctypes.PyDLL(None).usleep(int(1e6 * (3 + longer * distributed.rank())))
        dist.barrier()
print("well")
""")
    done = torchrun(tmp_path / "busy.py")
    assert done.returncode == 0 and done.stdout.count("well") == 2, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_an_error_while_a_run_starts_frees_its_folder(toy_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(run, "truncate_log", full)
    args = run.Flags(tmp_path, steps=1, batch_size=1)
    with pytest.raises(OSError) as kept:  # its traceback holds the frames, and they the lock
        run.Run(args, {})
    monkeypatch.undo()
    with run.Run(args, {}):
        assert kept.value.errno == errno.ENOSPC


def test_the_reader_of_the_output_may_go_away():
    command = [sys.executable, "train.py", "distill", "--help"]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert not program.stderr.read() and program.wait() == 128 + 13


# --- waiting for the GPU -----------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the values that a program asks a device for, one by one."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_tensor_that_is_not_finite_is_found_with_one_wait_for_each_device(value):
    model = torch.nn.ParameterDict({
        name: torch.nn.Parameter(torch.randn(3, 4).to(dtype), requires_grad=False)
        for name, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.float64),
                            ("d", torch.int64), ("e", torch.bool))})
    model["empty"] = torch.nn.Parameter(torch.zeros(0))
    if value is not None:
        model["b"].data[1, 2] = value
    with Waits() as waits:
        assert find_not_finite({"model": model}) == (None if value is None else "model.b")
    assert waits.count == 0
