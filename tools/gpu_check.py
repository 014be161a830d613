"""Does it work on your GPU, and how fast?

    python -m tools.gpu_check

Runs the kernels' tests, the kernels' benchmark and three cycles of distilling the toy in bfloat16.
Prints one block to paste.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime import cli

ROOT = Path(__file__).parents[1]


@dataclass
class Check:
    """Test and time the kernels on this machine's GPU, and distil the toy on it."""


def main(argv=None):
    return cli.run(run, Check, argv)


def run(_):
    if not torch.cuda.is_available():
        raise ValueError("torch finds no NVIDIA or AMD GPU. Without a GPU, `make test` runs the "
                         "kernels in Triton's interpreter and `python -m kernels.bench` compiles "
                         "them.")
    import triton
    failed = False
    print(f"```\n{torch.cuda.get_device_name()}, torch {torch.__version__}, "
          f"triton {triton.__version__}, {sys.platform}")
    with tempfile.TemporaryDirectory() as folder:
        for name, command, summary in (
                ("kernels' tests", ["-m", "pytest", "-q", "tests/test_kernels.py"], last_line),
                ("kernels.bench", ["-m", "kernels.bench"], speeds),
                ("distillation in bfloat16", ["train.py", "distill", "--out", folder, "--steps",
                 "3", "--device", "cuda", "--dtype", "bfloat16"], lambda _: third_cycle(folder))):
            print(f"{name}: ", end="", flush=True)
            done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            failed |= done.returncode != 0
            print(f"FAILED\n{done.stdout[-2000:]}" if done.returncode else summary(done.stdout))
    print("```")
    return int(failed)


def last_line(output):
    return output.splitlines()[-1]


def speeds(output):
    """Milliseconds, and the share of a copy's speed, of each operation, size and way."""
    return "forward and backward, with the share of a copy's speed" + "".join(
        f"\n  {row['operation']}, {row['size']}, {row['way']}: {row['ms']:.3f} ms, "
        f"{row['of_copy']:.0%}" for row in json.loads(last_line(output))["timed"])


def third_cycle(folder):
    """The last cycle's seconds and losses."""
    times, numbers = (json.loads((Path(folder) / log).read_text().splitlines()[-1])
                      for log in ("times.jsonl", "metrics.jsonl"))
    return f"{times['seconds']:.2f} s for the third cycle, " + ", ".join(
        f"{name} {numbers[name]:.3g}" for name in ("kl", "reg", "temp", "critic"))


if __name__ == "__main__":
    sys.exit(main())
