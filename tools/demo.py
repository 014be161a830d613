"""The whole method within minutes: distil the toy teacher twice, side by side, and compare.

    python -m tools.demo

Plain distribution matching (DMD) and the full method (AVD) learn from one teacher on the same
videos, each in a process of its own; tools/report.py then draws `report.html` and `demo.gif`.
Ctrl-C saves both runs, and the same command goes on with them.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.models import load_config
from tiny_wan import WEIGHTS
from runtime import cli
from tools import report

TRAIN = Path(__file__).parents[1] / "train.py"
FLAGS = {"dmd": ["--lambda-reg", "0", "--lambda-temp", "0"], "avd": []}


@dataclass
class Demo:
    """Distil the toy teacher with DMD and with AVD, and compare the students on one page."""

    out: Path = Path("runs/demo")
    """folder of both runs, of the report and of the moving picture"""
    model: Path = WEIGHTS
    """folder of the teacher, and of its interpolator"""
    steps: int = 40
    """updates of each student"""
    batch_size: int = 16
    """videos in an update"""
    seed: int = 0
    """of the data and the noise"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to train"""


def main(argv=None):
    return cli.run(run, Demo, argv)


def run(args):
    load_config(args.model)  # a missing teacher is one complaint, rather than one of each child
    watch = cli.Stopwatch()
    with watch("distillation"):
        distil(args)
    with watch("report"):
        page = report.write(args.out, args.model)
    print(watch)
    print(f"open {page}")


def distil(args):
    """Both runs at once, each on half of the cores. ValueError where one fails."""
    args.out.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
    log, children = args.out / "dmd.log", {}
    with open(log, "wb") as file:
        for name, output in {"dmd": file, "avd": None}.items():
            command = [sys.executable, TRAIN, "distill", "--out", args.out / name,
                       "--model", args.model, "--steps", args.steps,
                       "--batch-size", args.batch_size, "--seed", args.seed,
                       "--device", args.device, *FLAGS[name]]
            # A terminal sends Ctrl-C to its whole session. The children get one of their own and
            # hear it from us alone: a second one would end them without saving.
            children[name] = subprocess.Popen(
                [str(part) for part in command], env=os.environ | threads, stdout=output,
                stderr=output, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        codes = {name: child.wait() for name, child in children.items()}
    except KeyboardInterrupt:
        for child in children.values():
            if os.name != "nt":  # Windows has no sessions: its children have heard
                child.terminate()  # train.py saves, as on Ctrl-C; while it loads, it ends silently
        for child in children.values():
            child.wait()
        raise
    if codes["dmd"]:
        *_, last = log.read_text(errors="replace").splitlines() or ["no word"]
        raise ValueError(f"DMD: {last.removeprefix('error: ')} (more in {log})")
    if codes["avd"]:
        raise ValueError(f"AVD ended with exit code {codes['avd']}; its last words are above")


if __name__ == "__main__":
    sys.exit(main())
