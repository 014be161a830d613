"""The whole of the method within minutes: distil the toy teacher twice, and compare.

    python -m tools.demo

Plain distribution matching (DMD) and the full method (AVD) learn from the same teacher, on the same
videos, side by side in two processes. Ends with `report.html` and `demo.gif` (tools/report.py).
Ctrl-C saves both; the same command again goes on where they stopped.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sample import WEIGHTS, load_config, timed
from tools import cli, report

TRAIN = Path(__file__).parents[1] / "train.py"
WITHOUT = {"dmd": ("--lambda-reg", "0", "--lambda-temp", "0"), "avd": ()}  # what each leaves out


@dataclass
class Demo:
    """Distil the toy teacher with DMD and with AVD, side by side, and compare them on one page."""

    out: Path = Path("runs/demo")
    """folder of the two runs, of the report and of the moving picture"""
    model: Path = WEIGHTS
    """folder of the teacher, and of its interpolator"""
    steps: int = 30
    """updates of each student"""
    batch_size: int = 16
    """videos in an update"""
    seed: int = 0
    """of the data and the noise"""


def main(argv=None):
    return cli.run(run, Demo, argv)


def run(args):
    load_config(args.model)  # a missing teacher is one complaint here, and not one of each child
    with timed("distillation"):
        distil(args)
    with timed("report"):
        page = report.write(args.out, args.model)
    print(f"open {page}")


def distil(args):
    """Both runs at once, each on half of the cores. ValueError where one fails."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    children = {}
    with open(args.out / "dmd.log", "w") as log:
        for name, flags in WITHOUT.items():
            command = [sys.executable, TRAIN, "distill", "--out", args.out / name,
                       "--model", args.model, "--steps", args.steps,
                       "--batch-size", args.batch_size, "--seed", args.seed, *flags]
            output = {"stdout": log, "stderr": log} if name == "dmd" else {}
            # In a session of its own a child does not hear the terminal's Ctrl-C: it would take
            # that and ours for a second one, which does not wait. (Windows' console asks alone.)
            children[name] = subprocess.Popen([str(part) for part in command], env=environment,
                                              start_new_session=True, **output)
    try:
        codes = {name: child.wait() for name, child in children.items()}
    except KeyboardInterrupt:
        for child in children.values():
            if os.name != "nt":
                child.send_signal(signal.SIGINT)
        for child in children.values():
            child.wait()
        raise
    if codes["dmd"]:
        last = (args.out / "dmd.log").read_text().splitlines() or ["it wrote nothing"]
        raise ValueError(f"{args.out / 'dmd'}: {last[-1].removeprefix('error: ')}")
    if codes["avd"]:
        raise ValueError(f"{args.out / 'avd'}: ended with code {codes['avd']}, as said above")


if __name__ == "__main__":
    sys.exit(main())
