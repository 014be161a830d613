"""The command line of every program here: flags from dataclasses, and errors of one line."""

import contextlib
import io
import sys
import time
from collections import Counter
from itertools import takewhile

import torch
import tyro
from safetensors import SafetensorError

INSTALLED_BY = dict.fromkeys(("diffusers", "transformers", "ftfy", "peft"), "-e '.[wan]'") | {
    "tensorboard": "tensorboard"}


def run(program, options, argv=None):
    """Parse `argv` into the dataclass `options`, call `program` with it, return an exit code.

    Bad flags and bad input (ValueError, OSError) end in one line on stderr and code 2, Ctrl-C in
    130. Help texts are the fields' docstrings.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = tyro.cli(options, args=argv, config=(tyro.conf.OmitSubcommandPrefixes,))
        for name in ("steps", "batch_size", "accumulate", "save_every", "sample_every",
                     "score_prompts", "seeds", "videos_per_prompt", "shard_size", "fps", "keep",
                     "keep_every"):
            if getattr(args, name, None) is not None and getattr(args, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(args, name)}: must be 1 or more")
    except SystemExit as end:
        box = (line.strip("│ ") for line in complaint.getvalue().splitlines()[1:-1])
        if end.code:
            fail(" ".join([*takewhile(lambda line: line[:1] != "─", box), "(see --help)"]))
        return end.code or 0
    except ValueError as error:
        fail(error)
        return 2
    try:
        return program(args) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        fail(error)
    except SafetensorError as error:  # what reads a file names it; this is a disk that is full
        fail(f"a safetensors file could not be written: {error}")
    except ModuleNotFoundError as error:
        if error.name not in INSTALLED_BY:
            raise
        fail(f"{error.name} is not installed; python -m pip install {INSTALLED_BY[error.name]}")
    except torch.OutOfMemoryError as error:
        fail(f"{error}; ask for smaller videos or smaller batches (--help has more that saves)")
    return 2


class Stopwatch:
    """Adds up the seconds of a program's parts; `str` of it lists them."""

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
    """One line on stderr, however long the value that it quotes."""
    line = " ".join(str(message).split())
    line = line if len(line) < 1000 else f"{line[:500]} ... {line[-400:]}"
    print("error:", line, file=sys.stderr)


def pick_device(name):
    """'auto' is the best device that there is; a ValueError says when the one asked for is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(device for device, ok in there.items() if ok)
    if not there[name]:
        raise ValueError(f"--device {name}: this machine has no such device; "
                         f"try --device {next(device for device, ok in there.items() if ok)}")
    return torch.device(name)


def pick_dtype(name, device):
    """torch.float32 or torch.bfloat16; 'auto' is bfloat16 on a GPU (CUDA or ROCm), or else None."""
    automatic = torch.bfloat16 if device.type == "cuda" else None
    return automatic if name == "auto" else getattr(torch, name)
