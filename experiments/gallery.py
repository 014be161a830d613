"""What sick training looks like: five toy runs broken on purpose, and a healthy one.

    python -m experiments.gallery    trains what is missing in runs/gallery; half an hour

Writes the runs' metrics to docs/gallery.jsonl, and two pictures for docs/questions.md.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from runtime import cli, page

ROOT = Path(__file__).parents[1]
LOGS, FIGURES = ROOT / "docs" / "gallery.jsonl", ROOT / "docs" / "figures"
RUNS = {  # title, flags of train.py distill
    "healthy": "",
    "critic too slow": "--critic-lr 1e-6",
    "guidance too high": "--guidance-scale 12",
    "no truncation": "--lambda-temp 0.5 --temporal-truncation -100",
    "k too large": "--k 300",
    "learning rate too high": "--lr 1e-2"}
STYLE = {"dpi": 110, "transparent": True, "bbox_inches": "tight"}
METRICS = {
    "dmd": "distribution matching", "critic": "critic's loss", "variance": "variance / real data's",
    "reg": "regression's loss", "weight": "mean weight", "student_grad_norm": "student's gradient"}


@dataclass
class Gallery:
    """Train the runs, and draw their curves and videos."""

    out: Path = Path("runs/gallery")
    """folder of the runs"""
    steps: cli.Count = 60
    """updates of each student"""


def main(argv=None):
    return cli.run(run, Gallery, argv)


def run(args):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def train(name):
        command = [sys.executable, ROOT / "train.py", "distill", "--out", folder(args, name),
                   "--steps", str(args.steps), *RUNS[name].split()]
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(train, RUNS))
    lines = []
    for name in RUNS:
        log = (folder(args, name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for step in map(json.loads, log):
            step["variance"] = step["variance"] / step["data_variance"]
            lines.append({"run": name, "step": step["step"], "ends": step["rollout_step"]} | {
                key: round(step[key], 4) for key in METRICS if step.get(key) is not None})
    LOGS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw_curves(lines).savefig(FIGURES / "gallery-curves.png", **STYLE)
    draw_videos(args).savefig(FIGURES / "gallery-videos.png", **STYLE)


def folder(args, name):
    return args.out / name.replace(" ", "-")


def draw_curves(lines):
    """A row for each run, a column for each metric, a curve for each step that rollouts end at.

    Which step is trained changes from update to update, and the metrics with it: one curve through
    all updates would be a saw. The healthy run is repeated in grey.
    """
    figure = Figure(figsize=(2 * len(METRICS), 1.5 * len(RUNS)), layout="constrained")
    grid = figure.subplots(len(RUNS), len(METRICS), sharex=True, sharey="col")
    for name, row in zip(RUNS, grid):
        row[0].set_ylabel(name.replace(" too", "\ntoo"), rotation=0, ha="right", va="center")
        for metric, axes in zip(METRICS, row):
            for shown, alpha in (("healthy", 0.3), (name, 1)):
                for ends in range(4):
                    points = [(line["step"], line[metric]) for line in lines if metric in line
                              and line["run"] == shown and line["ends"] == ends]
                    axes.plot(*zip(*points), color=f"C{ends}" if alpha == 1 else page.INK,
                              linewidth=1, alpha=alpha)
            if metric == "weight":
                axes.set_ylim(0, 1)
            else:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
            axes.tick_params(labelsize="x-small")
    for title, axes in zip(METRICS.values(), grid[0]):
        axes.set_title(title, fontsize="small")
    return figure


def draw_videos(args):
    """The first two videos of each run at its end."""
    figure = Figure(figsize=(9, 1.9 * len(RUNS)), layout="constrained")
    for name, axes in zip(RUNS, figure.subplots(len(RUNS), 1)):
        sheet = iio.imread(max((folder(args, name) / "samples").iterdir()))
        axes.imshow(sheet[:len(sheet) // 4])
        axes.set_ylabel(name.replace(" too", "\ntoo"), rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    sys.exit(main())
