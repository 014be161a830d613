"""The whole method within minutes: distil the toy teacher twice and compare the two students.

    python -m tools.demo

Plain distribution matching (DMD) and the full method (AVD) learn from the same teacher and the same
videos, side by side, each in its own process. Every sampler then draws the same prompts from the
same noise, for `report.html`, `demo.gif` and `curves.png`. Ctrl-C saves both runs, and the same
command resumes them. Once both have finished, the command only draws the page again.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import adavid
from runtime import cli, page
from runtime.models import load_config, load_interpolator
from runtime.report import CHARTS, STUDENT, draw_curves, new_chart
from sample import sample_batches
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world

TRAIN = Path(__file__).parents[1] / "train.py"
DEMO_SEED = 1001  # of the page's prompts and noise: no training run uses it
PROMPTS, BATCH_SIZE = 24, 12
RUNS = {  # name, colour in charts, and flags of train.py
    "dmd": ("DMD", "#e0722f", ["--lambda-reg", "0", "--lambda-temp", "0"]),
    "avd": ("AVD", STUDENT, [])}


@dataclass
class Demo:
    """Distil the toy teacher with DMD and with AVD, and compare the students on one page."""

    out: Path = Path("runs/demo")
    """folder for both runs, the page and its pictures"""
    model: Path = WEIGHTS
    """folder of the teacher and its interpolator"""
    steps: cli.Count = 24
    """updates of each student"""
    batch_size: cli.Size = 8
    """videos in an update"""
    seed: cli.Seed = 0
    """seed of the data and the noise"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to train and sample"""


def main(argv=None):
    return cli.run(run, Demo, argv)


def run(args):
    load_config(args.model)  # so that a missing teacher is reported once, and not by each process
    cli.announce(cli.pick_device(args.device), None, args.device)
    distil(args)
    write_report(args)


def distil(args):
    """Run both trainings at once, each on half of the cores. ValueError if one fails."""
    args.out.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
    log, children = args.out / "dmd.log", []
    with open(log, "wb") as file:
        for (name, (_, _, flags)), output in zip(RUNS.items(), (file, None)):
            command = [sys.executable, TRAIN, "distill", "--out", args.out / name,
                       "--model", args.model, "--steps", args.steps,
                       "--batch-size", args.batch_size, "--seed", args.seed,
                       "--device", args.device, *flags]
            children.append(subprocess.Popen(list(map(str, command)), env=os.environ | threads,
                                             stdout=output, stderr=output))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    try:
        dmd, avd = [child.wait() for child in children]
    except KeyboardInterrupt:
        for child in children:
            if os.name != "nt":  # there, it would kill; a console sends Ctrl-C to the children too
                child.terminate()  # train.py saves; that a terminal also sent SIGINT does no harm
        for child in children:
            child.wait()
        raise
    if dmd:
        *_, last = log.read_text(errors="replace").splitlines() or ["no output"]
        raise ValueError(f"DMD: {last.removeprefix('error: ')} (more in {log})")
    if avd:
        raise ValueError(f"AVD: exit code {avd}; its error is printed above")


class Column(NamedTuple):
    """A sampler's videos `[b, 3, f, h, w]`."""

    name: str
    text: str
    videos: torch.Tensor


def write_report(args):
    logs = {run: list(map(json.loads, (args.out / run / "metrics.jsonl").read_text().splitlines()))
            for run in RUNS}
    real, prompts = world.make(DEMO_SEED, range(PROMPTS))
    columns = [Column("Real data", "of the same prompts", real), *sample_all(args, prompts)]
    _, teacher, _, dmd, *_, avd = columns
    shown = page.shown(prompts)
    draw_gif(args.out / "demo.gif", (teacher, dmd, avd), {i: prompts[i] for i in shown[:4]})

    sheet, charts = Figure(figsize=(13, 6), layout="constrained"), ""
    runs = [(label, colour, logs[run]) for run, (label, colour, _) in RUNS.items()]
    for axes, (title, name, healthy) in zip(sheet.subplots(2, 3).flat, CHARTS):
        figure = new_chart()
        for place in (axes, figure.subplots()):
            draw_curves(place, runs, title + " (AVD only)" * name.endswith("_"), name)
        note = " DMD does not train on it." * (name == "temp")
        charts += page.chart(figure, f"Healthy: {healthy}{note}")
    sheet.savefig(args.out / "curves.png", dpi=80)

    videos = page.video_table([f"{c.name}\n{c.text}" for c in columns], {
        prompts[i]: [page.moving_picture(c.videos[i]) for c in columns] for i in shown})
    page.write(args.out / "report.html", "From 50 guided steps to 4", f"""
<p>Two students learned from one toy teacher in {len(logs["avd"])} updates. <b>DMD</b> is plain
distribution matching, <b>AVD</b> the full method.</p>
<h2>The same prompts, the same noise</h2>{videos}
<p class=note>Seconds are for one video in a batch of {BATCH_SIZE}. A guided step is two forwards of
the network, a step of a student one.</p>
<h2>Scores</h2>{page.table(scores(columns, prompts))}
<p class=note>Means over {PROMPTS} prompts, read from the pixels, as multiples of the real data's.
One prompt makes {1 / PROMPTS:.2f}, so small differences mean nothing.</p>
<h2>Training</h2><div class=charts>{charts}</div>
<h2>Set-up</h2>{setup(args)}""")
    print(f"open {args.out / 'report.html'}")


def sample_all(args, prompts):
    """Yield a Column for each sampler."""
    device, codec = cli.pick_device(args.device), ToyCodec()
    teacher, dmd, avd = (WanModel.from_pretrained(folder, torch.float32, device).eval()
                         for folder in (args.model, args.out / "dmd", args.out / "avd"))
    config, interpolator = load_config(args.model), load_interpolator(args.out / "avd", device)
    text, null_text = codec.encode_text(prompts).to(device), codec.encode_text([""]).to(device)

    def guided(noise, text, generator):
        return adavid.sample_teacher(teacher, noise, text, null_text, 50, config.guidance_scale)

    def few(student, interpolator=None):
        return lambda noise, text, generator: adavid.sample(student, noise, text, config,
                                                            interpolator, generator)

    steps = f"{len(config.timesteps)} steps"
    samplers = [("Teacher", "50 guided steps", guided),
                ("Teacher in few steps", f"{steps}, not distilled", few(teacher)),
                ("DMD", steps, few(dmd)), ("AVD", steps, few(avd))]
    if interpolator is not None:
        halves = sum(stride > 1 for stride in config.strides)
        samplers.append(("AVD, decoupled", f"{steps}, {halves} at half rate",
                         few(avd, interpolator)))
    for name, how, sampler in samplers:
        start = time.perf_counter()
        latents = torch.cat(list(sample_batches(sampler, text, codec.latent_shape(), DEMO_SEED,
                                                BATCH_SIZE)))
        seconds = (time.perf_counter() - start) / len(latents)
        yield Column(name, f"{how}\n{seconds:.2g} s", codec.decode(latents.cpu()))


def scores(columns, prompts):
    """A table of the oracle's means, as multiples of the real data's."""
    names = {"instance": "instance preserved", "prompt": "prompt right", "dynamic": "moves",
             "open_speed": "speed, open prompts", "saturation": "saturation", "flicker": "flicker"}
    real, *_ = means = [{name: values.nanmean().item() for name, values in
                         world.score(c.videos, prompts).items()} for c in columns]
    return [["", *names.values()],
            *([c.name, *(f"{row[name] / real[name]:.2f}" for name in names)]
              for c, row in zip(columns, means))]


def setup(args):
    """The machine, and the numbers in which the runs differ from the paper."""
    paper, dmd, avd = map(asdict, (
        adavid.AVDConfig(), *(load_config(args.out / run) for run in RUNS)))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"<p>{datetime.now():%Y-%m-%d %H:%M}, torch {torch.__version__}, "
            f"{os.cpu_count()} cores{gpu}, {platform.platform()}.</p>"
            + page.table([["number", "paper", "DMD", "AVD"], *(
                [name, value, dmd[name], avd[name]] for name, value in paper.items()
                if not value == dmd[name] == avd[name])]))


def draw_gif(path, columns, prompts):
    """A row for each of `prompts` (number and words), a column for each sampler."""
    figure = Figure(figsize=(5, 5), facecolor="#16181d", layout="constrained")
    canvas, pictures, frames = FigureCanvasAgg(figure), [], []
    grid = figure.subplots(len(prompts), len(columns))
    for axes, column in zip(grid[0], columns):
        name, steps = (re.split("[,\n]", text)[0] for text in (column.name, column.text))
        axes.set_title(f"{name}\n{steps}", color="white")
    for row, (i, prompt) in zip(grid, prompts.items()):
        row[0].set_ylabel(re.sub(" (moving|above|beside)", r"\n\1", prompt), color="white",
                          rotation=0, ha="right", va="center")
        for axes, column in zip(row, columns):
            axes.set(xticks=[], yticks=[])
            video = rearrange(column.videos[i], "c f h w -> f h w c").numpy()
            pictures.append((axes.imshow(video[0]), video))
    for frame in range(world.FRAMES):
        for picture, video in pictures:
            picture.set_data(video[frame])
        canvas.draw()
        figure.set_layout_engine("none")  # the first frame's layout is that of all
        frames.append(np.array(canvas.buffer_rgba())[..., :3])
    # All frames share one palette: with a palette for each, colours would flicker.
    strip = Image.fromarray(np.concatenate(frames)).quantize(128, kmeans=1).convert("RGB")
    iio.imwrite(path, np.split(np.array(strip), len(frames)), duration=page.DURATIONS, loop=0)


if __name__ == "__main__":
    sys.exit(main())
