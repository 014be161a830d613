"""The whole method within minutes: distil the toy teacher twice and compare the two students.

    python -m tools.demo

Plain distribution matching (DMD) and the full method (AVD) learn from the same teacher and the same
videos, side by side, each in its own process. Every sampler then draws the same prompts from the
same noise, for `report.html`, `demo.gif` and `curves.png`. Ctrl-C saves both runs, and the same
command resumes them. When both are finished, it only draws the page again.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import adavid
from runtime import cli
from runtime.media import to_bytes
from runtime.models import load_config, load_interpolator
from sample import sample_batches
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world
from tools import page

TRAIN = Path(__file__).parents[1] / "train.py"
DEMO_SEED = 1001  # of the page's prompts and noise: no training run uses it
PROMPTS, BATCH_SIZE = 48, 16
TEACHER_STEPS = 50
RUNS = {  # name, colour in charts, and flags of train.py
    "dmd": ("DMD", "#e0722f", ["--lambda-reg", "0", "--lambda-temp", "0"]),
    "avd": ("AVD", "#3b82d6", [])}
TIMESTEP_COLOURS = ("#9b5de5", "#3b82d6", "#12a594", "#e0a030")


@dataclass
class Demo:
    """Distil the toy teacher with DMD and with AVD, and compare the students on one page."""

    out: Path = Path("runs/demo")
    """folder for both runs, the page and its pictures"""
    model: Path = WEIGHTS
    """folder with the teacher and its interpolator"""
    steps: int = 40
    """updates of each student"""
    batch_size: int = 16
    """videos in an update"""
    seed: int = 0
    """seed of the data and the noise"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to train and sample"""


def main(argv=None):
    return cli.run(run, Demo, argv)


def run(args):
    load_config(args.model)  # so that a missing teacher is reported once, and not by each process
    watch = cli.Stopwatch()
    with watch("distillation"):
        distil(args)
    with watch("report"):
        write_report(args)
    print(watch)
    print(f"open {args.out / 'report.html'}")


def distil(args):
    """Run both trainings at once, each on half of the cores. ValueError if one fails."""
    args.out.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
    log, children = args.out / "dmd.log", {}
    with open(log, "wb") as file:
        for (name, (_, _, flags)), output in zip(RUNS.items(), (file, None)):
            command = [sys.executable, TRAIN, "distill", "--out", args.out / name,
                       "--model", args.model, "--steps", args.steps,
                       "--batch-size", args.batch_size, "--seed", args.seed,
                       "--device", args.device, *flags]
            # A terminal sends Ctrl-C to every process of its session, and a second signal would end
            # a child before it has saved. In sessions of their own, they receive only ours.
            children[name] = subprocess.Popen(
                [str(part) for part in command], env=os.environ | threads, stdout=output,
                stderr=output, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    try:
        codes = {name: child.wait() for name, child in children.items()}
    except KeyboardInterrupt:
        for child in children.values():
            if os.name != "nt":  # Windows has no sessions: its children received the Ctrl-C
                child.terminate()  # train.py saves
        for child in children.values():
            child.wait()
        raise
    if codes["dmd"]:
        *_, last = log.read_text(errors="replace").splitlines() or ["no output"]
        raise ValueError(f"DMD: {last.removeprefix('error: ')} (more in {log})")
    if codes["avd"]:
        raise ValueError(f"AVD: exit code {codes['avd']}; its error is printed above")


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A sampler's videos `[b, 3, f, h, w]`, and what one of them costs."""

    name: str
    text: str
    videos: torch.Tensor
    forwards: int = 0
    seconds: float = 0.0


def write_report(args):
    torch.set_num_threads(1)  # a second thread hardly helps, and on a busy machine it does harm
    logs = {run: read_log(args.out / run) for run in RUNS}
    real, prompts = world.make(DEMO_SEED, range(PROMPTS))
    columns = [Column("Real data", "of the same prompts", real), *sample_all(args, prompts)]
    _, teacher, _, dmd, *_, avd = columns
    shown = page.shown(prompts)

    draw_gif(args.out / "demo.gif", (teacher, dmd, avd), {i: prompts[i] for i in shown[:4]})
    draw_curves(args.out / "curves.png", logs)
    videos = page.video_table(
        {c.name: c.text if c is columns[0] else
         f"{c.text}\n{c.forwards} forwards\n{c.seconds:.2g} s" for c in columns},
        {prompts[i]: [page.moving_picture(c.videos[i]) for c in columns] for i in shown})
    where = "one CPU thread" if cli.pick_device(args.device).type == "cpu" else "a GPU"
    charts = "".join(chart(*content) for content in curves(logs))
    (args.out / "report.html").write_text(page.html(
        f"From {teacher.forwards} forwards to {avd.forwards}", f"""
<p>Two students learned from one toy teacher. <b>DMD</b> is plain distribution matching, <b>AVD</b>
the full method. After {len(logs["avd"])} updates, AVD draws a video in {avd.forwards} steps, and
{teacher.seconds / avd.seconds:.0f} times faster than the teacher does in {TEACHER_STEPS}.</p>
<h2>The same prompts, the same noise</h2>{videos}
<p class=note>Forwards and seconds are for one video in a batch of {BATCH_SIZE}, on {where}.</p>
<h2>Scores</h2>{page.table(scores(columns, prompts))}
<p class=note>Means over {PROMPTS} prompts, read from the pixels. Speed is in pixels per frame;
saturation and flicker are multiples of the real data's. One prompt makes {100 / PROMPTS:.1f} %, so
small differences mean nothing.</p>
<h2>Training</h2><div class=charts>{charts}</div>
<h2>Set-up</h2>{setup(args, logs)}"""), encoding="utf-8")


def read_log(folder):
    """A run's metrics and seconds, a dict for each step."""
    return [json.loads(metrics) | json.loads(times) for metrics, times in zip(
        *(open(folder / log) for log in ("metrics.jsonl", "times.jsonl")))]


def sample_all(args, prompts):
    """Yield a Column for each sampler."""
    device, codec = cli.pick_device(args.device), ToyCodec()
    teacher, dmd, avd = (WanModel.from_pretrained(folder, torch.float32, device).eval()
                         for folder in (args.model, args.out / "dmd", args.out / "avd"))
    config, interpolator = load_config(args.model), load_interpolator(args.out / "avd", device)
    text, null_text = codec.encode_text(prompts).to(device), codec.encode_text([""]).to(device)

    def guided(noise, text, generator):
        return adavid.sample_teacher(teacher, noise, text, null_text, TEACHER_STEPS,
                                     config.guidance_scale)

    def few(student, interpolator=None):
        return lambda noise, text, generator: adavid.sample(student, noise, text, config,
                                                            interpolator, generator)

    def column(name, how, sampler, forwards=len(config.timesteps)):
        videos, seconds, start = [], [], time.perf_counter()
        for latents in sample_batches(sampler, text, codec.latent_shape(), DEMO_SEED, BATCH_SIZE):
            videos.append(codec.decode(latents).cpu())
            seconds.append((time.perf_counter() - start) / len(latents))
            start = time.perf_counter()
        # The fastest batch is the one that other processes disturbed least.
        return Column(name, how, torch.cat(videos), forwards, min(seconds))

    steps = f"{len(config.timesteps)} steps"
    yield column("Teacher", f"{TEACHER_STEPS} guided steps", guided, 2 * TEACHER_STEPS)
    yield column("Teacher in few steps", f"{steps}, not distilled", few(teacher))
    yield column("DMD", steps, few(dmd))
    yield column("AVD", steps, few(avd))
    if interpolator is not None:
        halves = sum(stride > 1 for stride in config.strides)
        yield column("AVD, decoupled", f"{steps}, {halves} at half rate", few(avd, interpolator))


def scores(columns, prompts):
    """A table of the oracle's means."""
    formats = {"instance": "{:.0%}", "prompt": "{:.0%}", "dynamic": "{:.0%}",
               "open_speed": "{:.2f}", "saturation": "{:.2f} ×", "flicker": "{:.2f} ×"}
    means = [{name: values.nanmean().item()
              for name, values in world.score(c.videos, prompts).items()} for c in columns]
    real = means[0]
    return [["", "instance preserved", "prompt right", "moves", "speed, open prompts", "saturation",
             "flicker"],
            *([c.name, *(form.format(row[name] / real[name] if "×" in form else row[name])
                         for name, form in formats.items())] for c, row in zip(columns, means))]


def setup(args, logs):
    """The times, the machine, and the numbers in which the runs differ from the paper."""
    configs = [asdict(adavid.AVDConfig()), *(asdict(load_config(args.out / run)) for run in RUNS)]
    rows = [[name, *(config[name] for config in configs)] for name in configs[0]]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    times = ", ".join(f"{RUNS[run][0]} in {sum(line['seconds'] for line in log):.0f} s"
                      for run, log in logs.items())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"<p>Distilled side by side: {times}.<br>{datetime.now():%Y-%m-%d %H:%M}, torch "
            f"{torch.__version__}, {os.cpu_count()} cores{gpu}, {platform.platform()}.</p>"
            + page.table([["number", "paper", *(label for label, *_ in RUNS.values())], *rows]))


# ---------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------


def curves(logs):
    """For each chart: its title, its lines (see `plot`), and what a healthy run looks like."""
    timesteps = [name.removeprefix("cache_") for name in logs["avd"][0]
                 if name.startswith("cache_")]

    def of_runs(name):
        return [(label, colour, curve(logs[run], name), smooth(curve(logs[run], name)))
                for run, (label, colour, _) in RUNS.items()]

    def of_timesteps(name, averaged):
        return [(f"t = {t}", colour, curve(logs["avd"], f"{name}_{t}"), averaged(t))
                for t, colour in zip(timesteps, TIMESTEP_COLOURS)]

    data = curve(logs["avd"], "data_variance")
    return [
        ("Distribution matching: size of the gradient", of_runs("dmd"),
         "Half the mean square of the gradient, which is the normalised difference of the critic's "
         "and the teacher's predictions. Healthy: it rises until the critic has caught up, falls, "
         "and levels off. A long rise: the critic has lost the student."),
        ("Critic: loss", of_runs("critic"),
         "Healthy: level, or rising slowly while the videos sharpen. A jump: the critic has lost "
         "the student."),
        ("Regression: loss on real videos",
         of_timesteps("reg", lambda t: curve(logs["avd"], f"cache_{t}")),
         "AVD only. Bold: the Loss Mean Cache. Healthy: calm at the later steps. At t = 1000 the "
         "loss is large and noisy, because the student must guess a whole video from noise."),
        ("Regression: adaptive weight",
         of_timesteps("weight", lambda t: smooth(curve(logs["avd"], f"weight_{t}"))),
         "AVD only. Healthy: spread around one half. If all weights are one half, k is too small "
         "to adapt."),
        ("Temporal loss", of_runs("temp"),
         "Measured in both runs, but DMD does not train on it. A video above the truncation level "
         "counts in full, any other video as zero. The mean over the batch falls as more videos "
         "move enough; it need not reach zero."),
        ("Temporal variance", [("real data", page.INK, data, smooth(data))] + of_runs("variance"),
         "Healthy: close to the real data's. Far below it, videos freeze. Far above it, they have "
         "too much contrast, or they jump."),
    ]


def curve(log, name):
    """The steps that logged a value, and the values. A value that was not finite is null."""
    points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(curve):
    steps, values = curve
    return steps, list(accumulate(values, lambda old, new: 0.8 * old + 0.2 * new))


def plot(axes, lines):
    """lines: label, colour, the curve as measured (drawn faintly), the averaged curve (bold)."""
    for label, colour, measured, averaged in lines:
        axes.plot(*measured, color=colour, alpha=0.45, linewidth=0.8)
        axes.plot(*averaged, color=colour, label=label)
    axes.legend(ncols=len(lines), loc="lower left", bbox_to_anchor=(0, 1), borderpad=0,
                handlelength=1, columnspacing=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize="small", loc="right")


def chart(title, lines, caption):
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    plot(figure.subplots(), lines)
    return page.chart(figure, title, caption)


def draw_curves(path, logs):
    """The same charts as one picture."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, (title, lines, _) in zip(figure.subplots(2, 3).flat, curves(logs)):
        plot(axes, lines)
        axes.set_title(title, loc="left", pad=24)
    figure.savefig(path, dpi=80)


def draw_gif(path, columns, prompts, cell=112, gap=10, left=150, top=70):
    """A row for each of `prompts` (number and words), a column for each sampler."""
    xs = [left + i * (cell + gap) for i in range(len(columns))]
    ys = [top + i * (cell + gap) for i in range(len(prompts))]
    card = Image.new("RGB", (xs[-1] + cell + 2 * gap, ys[-1] + cell + 2 * gap), "#16181d")
    pen, large, small = ImageDraw.Draw(card), *map(ImageFont.load_default, (17, 13))
    for x, column in zip(xs, columns):
        pen.text((x, 16), column.name.partition(",")[0], "#ffffff", large)
        pen.text((x, 42), f"{column.forwards} forwards", "#9aa1ac", small)
    for y, prompt in zip(ys, prompts.values()):
        pen.text((20, y + cell / 2), prompt.replace(" moving", "\nmoving"), "#d5d8dd", small, "lm")

    frames = [card.copy() for _ in page.DURATIONS]
    for x, column in zip(xs, columns):
        for y, i in zip(ys, prompts):
            video = to_bytes(rearrange(column.videos[i], "c f h w -> f h w c"), world.SIZE, cell)
            for frame, pixels in zip(frames, video):
                frame.paste(Image.fromarray(pixels), (x, y))
    # With a palette for each frame, colours would flicker.
    palette = Image.fromarray(np.concatenate(frames)).quantize(128, kmeans=1)
    first, *rest = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    first.save(path, save_all=True, append_images=rest, duration=page.DURATIONS, loop=0)


if __name__ == "__main__":
    sys.exit(main())
