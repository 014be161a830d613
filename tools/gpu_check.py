"""Does it work on your GPU, and how fast?

    python -m tools.gpu_check

Runs the kernels' tests, the kernels' benchmark and three cycles of distilling the toy in bfloat16.
Prints one block to paste.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
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
    if kernels.import_error:
        raise ValueError(f"there are no kernels to check: {kernels.reason(kernels.import_error)}")
    import triton
    failed = False
    print(f"```\n{torch.cuda.get_device_name()}, torch {torch.__version__}, "
          f"triton {triton.__version__}, {sys.platform}")
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, "times.jsonl")
        for words, summary in (
                (["-m", "pytest", "-q", "tests/test_kernels.py"], lambda lines: lines[-1:]),
                (["-m", "kernels.bench"],
                 lambda lines: [line for line in lines if line.startswith("operation")]),
                (["train.py", "distill", "--out", folder, "--steps", "3", "--device", "cuda",
                  "--dtype", "bfloat16"],
                 lambda lines: [lines[-1], *times.read_text().splitlines()])):
            print("python", *words, flush=True)
            done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            lines = done.stdout.splitlines()
            print(*(["FAILED", *lines[-20:]] if done.returncode else summary(lines)), sep="\n")
            failed |= done.returncode != 0
    print("```")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
