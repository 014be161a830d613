"""The command line of every program: flags from dataclasses, errors in one line, the device."""

import contextlib
import io
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError

from adavid import Limits, check_limits
from tiny_wan.codec import is_out_of_memory, is_toy

OF_EXTRA = {"diffusers", "transformers", "ftfy", "peft"}  # installed by the extra [wan]

Count = Annotated[int, Limits(1, 2**31 - 1)]
Size = Annotated[int, Limits(1, 2**16)]  # of what takes memory
Seed = Annotated[int, Limits(0, 2**32 - 1)]
Rank = Annotated[int, Limits(0, 2**12)]  # of LoRA: 0 is none


class Diverged(ValueError):
    """A training run that cannot go on as it is. `flags` of another learning rate may help."""

    def __init__(self, message, flags):
        super().__init__(message)
        self.flags = flags


def run(program, options, argv=None):
    """Parse `argv` into the dataclass `options`, call `program` with it, return an exit code.

    The fields' docstrings are the help texts. Bad flags and bad input (ValueError, OSError) give
    one line on stderr and code 2; Ctrl-C gives code 130. If the reader of the output goes away, as
    in `... | head`, the program ends without a word.
    """
    try:
        code = parse_and_run(program, options, argv)
        sys.stdout.flush()  # here, as Python's own flush at its end could only print a traceback
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell reports SIGPIPE


def parse_and_run(program, options, argv):
    argv, complaint = sys.argv[1:] if argv is None else argv, io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = tyro.cli(options, args=argv, config=(tyro.conf.OmitSubcommandPrefixes,))
        check_limits(args, flag)
    except SystemExit as end:
        box = (line.strip("│ ") for line in complaint.getvalue().splitlines()[1:-1])
        if end.code:
            fail(" ".join([*takewhile(lambda line: line[:1] != "─", box), "(see --help)"]))
        return end.code or 0
    except ValueError as error:
        fail(error)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        return program(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except Diverged as error:
        fail(f"{error}: {shlex.join([*launcher(), *map(str, argv), *error.flags])}")
    except (ValueError, OSError) as error:
        fail(error)
    except SafetensorError as error:  # readers name their file, so this is a full disk
        fail(f"a safetensors file could not be written: {error}")
    except ModuleNotFoundError as error:
        if error.name not in OF_EXTRA:
            raise
        fail(f"{error.name} is not installed; python -m pip install -e '.[wan]'")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"{error}; try smaller videos or smaller batches (--help lists what saves memory)")
    return 2


def flag(name):
    return "--" + name.replace("_", "-")


def launcher():
    """The words before a program's flags: `python train.py`, or torchrun's."""
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return [*(["torchrun", "--nproc_per_node", size] if size else ["python"]), sys.argv[0]]


class Stopwatch:
    """Adds up the seconds of a program's parts; `str` lists them."""

    def __init__(self):
        self.seconds = Counter()

    @contextlib.contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def __str__(self):
        return ", ".join(f"{part}: {seconds:.1f} s" for part, seconds in self.seconds.items())


def fail(message):
    """Print an error in one line on stderr, shortened if it quotes a long value."""
    line = " ".join(str(message).split())
    line = line if len(line) < 1000 else f"{line[:500]} ... {line[-400:]}"
    print("error:", line, file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------


def pick_device(name):
    """A torch.device; 'auto' is the best one available. ValueError if the named one is missing."""
    with warnings.catch_warnings(action="ignore"):  # of an old driver: `announce` says so
        available = ["cuda"] * torch.cuda.is_available()
    available += ["mps"] * torch.backends.mps.is_available()
    best = [*available, "cpu"][0]
    if name not in ("auto", "cpu", *available):
        why = f" ({why_no_gpu()})" if why_no_gpu() else ""
        raise ValueError(f"--device {name}: this machine has no such device{why}; try --device "
                         f"{best}")
    return torch.device(best if name == "auto" else name)


def pick_dtype(name, device, config):
    """The dtype to compute in with a model of this WanConfig; None for float32, and for the text
    encoder that of its file.

    'auto' is bfloat16 for Wan on CUDA or ROCm, and None elsewhere. The toy's results in the
    documents are of float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda" or is_toy(config):
        return None
    return torch.bfloat16 if has_bfloat16() else torch.float32


def has_bfloat16():
    """Whether the current GPU computes in bfloat16: NVIDIA's do from compute capability 8.0 on."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def announce(device, dtype, asked="auto"):
    """Print the device and the dtype, on the first rank: every program's first line.

    It also says why it is not bfloat16 on a GPU, or no GPU though one seems to be there.
    dtype: of `pick_dtype`; None if the program computes in float32 anyway.
    asked: the value of --device.

    ValueError if torch finds the device but cannot compute on it: it may be too old, say.
    """
    try:
        (torch.ones(1, device=device) + 1).item()
    except (AssertionError, RuntimeError) as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"--device {device.type}: {line}; try --device cpu") from None
    name, why = device.type, None
    if name == "cuda" and torch.cuda.is_available():
        name = f"{name} ({torch.cuda.get_device_name(device)})"
        if dtype == torch.float32 and not has_bfloat16():
            why = "this GPU has no bfloat16, so it takes longer, and twice the memory"
    if name == "cpu" and asked == "auto":
        why = why_no_gpu()
    if os.environ.get("RANK", "0") == "0":
        line = f"device: {name}, {str(dtype or torch.float32).removeprefix('torch.')}"
        print(f"{line}; {why}" if why else line, flush=True)


def why_no_gpu():
    """Why a GPU that seems to be there is not used, or None."""
    if platform.system() == "Darwin":
        found = platform.machine() == "arm64" and not torch.backends.mps.is_available()
        return "the Mac's GPU is not used: PyTorch needs a newer macOS for it" if found else None
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not nvidia and not Path("/dev/kfd").exists():
        return None
    maker, wanted = ("NVIDIA", "CUDA") if nvidia else ("AMD", "ROCm")
    if not (torch.version.cuda if nvidia else torch.version.hip):
        return (f"the {maker} GPU is not used: this torch has no {wanted}; pytorch.org says how to "
                f"install one that has")
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"the {maker} GPU is not used: " + str(error).partition("\n")[0]
    return None
