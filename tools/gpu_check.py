"""Does it work on your GPU, and how fast? The kernels' tests and benchmark, and a distillation.

    python -m tools.gpu_check

Ends with one block to paste. The toy is distilled for three cycles in bfloat16.
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
    """Test and time the kernels on this machine's GPU, and train on it."""


def main(argv=None):
    return cli.run(run, Check, argv)


def run(_):
    if not torch.cuda.is_available():
        raise ValueError("torch sees no NVIDIA or AMD GPU here; without one, `make test` runs the "
                         "kernels in Triton's interpreter, and `python -m kernels.bench` compiles "
                         "them")
    import triton
    lines, failed = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
                     f"triton {triton.__version__}, {sys.platform}"], False
    with tempfile.TemporaryDirectory() as folder:
        for name, command, summary in (
                ("kernels' tests", ["-m", "pytest", "-q", "tests/test_kernels.py"], last_line),
                ("kernels.bench", ["-m", "kernels.bench"], speeds),
                ("distillation in bfloat16", ["train.py", "distill", "--out", folder, "--steps",
                 "3", "--device", "cuda", "--dtype", "bfloat16"], lambda _: cycles(folder))):
            print(f"{name} ...", file=sys.stderr)
            done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            failed |= done.returncode != 0
            lines.append(f"{name}: " + (f"FAILED\n{done.stdout[-2000:]}" if done.returncode
                                        else summary(done.stdout)))
    print("\n".join(["```", *lines, "```"]))
    return int(failed)


def last_line(output):
    return output.splitlines()[-1]


def speeds(output):
    """Of each operation, size and way: milliseconds forward and backward, share of a copy's speed.
    """
    rows = [row for row in json.loads(last_line(output))["timing_report"]
            if row["pass"] == "and backward"]
    return "forward and backward, and as a share of a copy's speed" + "".join(
        f"\n  {row['operation']}, {row['size']}, {row['way']}: {row['ms']:.3f} ms, "
        f"{row['of_copy']:.0%}" for row in rows)


def cycles(folder):
    """The last cycle's seconds and numbers."""
    seconds, numbers = (json.loads((Path(folder) / log).read_text().splitlines()[-1])
                        for log in ("times.jsonl", "metrics.jsonl"))
    return f"{seconds['seconds']:.2f} s for the third cycle, " + ", ".join(
        f"{name} {numbers[name]:.3g}" for name in ("kl", "reg", "temp", "critic"))


if __name__ == "__main__":
    sys.exit(main())
