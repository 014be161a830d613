"""The command line of every program: flags from dataclasses, errors in one line, the device."""

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

    The fields' docstrings are the help texts. Bad flags and bad input (ValueError, OSError) give
    one line on stderr and code 2; Ctrl-C gives code 130.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = tyro.cli(options, args=argv, config=(tyro.conf.OmitSubcommandPrefixes,))
        for name in ("steps", "batch_size", "accumulate", "save_every", "sample_every",
                     "score_prompts", "videos_per_prompt", "shard_size", "fps", "keep",
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
    except SafetensorError as error:  # readers name their file, so this is a full disk
        fail(f"a safetensors file could not be written: {error}")
    except ModuleNotFoundError as error:
        if error.name not in INSTALLED_BY:
            raise
        fail(f"{error.name} is not installed; python -m pip install {INSTALLED_BY[error.name]}")
    except torch.OutOfMemoryError as error:
        fail(f"{error}; try smaller videos or smaller batches (--help lists what saves memory)")
    return 2


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


def pick_device(name):
    """A torch.device; 'auto' is the best one available. ValueError if the named one is missing."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    best = [*available, "cpu"][0]
    if name not in ("auto", "cpu", *available):
        raise ValueError(f"--device {name}: this machine has no such device; try --device {best}")
    return torch.device(best if name == "auto" else name)


def pick_dtype(name, device):
    """torch.float32 or torch.bfloat16; 'auto' is bfloat16 on CUDA or ROCm, and None elsewhere."""
    automatic = torch.bfloat16 if device.type == "cuda" else None
    return automatic if name == "auto" else getattr(torch, name)
