"""What the demo's two students have learned: one self-contained page, and a moving picture.

    python -m tools.report runs/demo

Every sampler gets the same prompts and the same noise: the teacher in fifty guided steps and in
four, the student of plain distribution matching (`dmd/`), and that of the full method (`avd/`).
"""

import base64
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from html import escape
from io import StringIO
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

import adavid
from sample import sample_batches
from runtime.models import load_config, load_interpolator
from tiny_wan import WEIGHTS, ToyCodec, WanModel, checkpoint, world
from runtime import cli

DEMO_SEED = 1001  # its prompts are for this report alone: no training run uses it
PROMPTS, TEACHER_PROMPTS = 64, 32  # fewer for the teacher, whose steps take most of the time
TEACHER_STEPS = 50
BATCH_SIZE = 16
DURATIONS = [125] * (world.FRAMES - 1) + [625]  # milliseconds: a rest before it starts again
RUNS = {"dmd": ("DMD", "#e0722f"), "avd": ("AVD", "#3b82d6")}
TIMESTEP_COLOURS = ("#9b5de5", "#3b82d6", "#12a594", "#e0a030")
INK = "#010203"  # in charts: the page's own colour of text, light or dark
CHART_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "the same", "axes.spines.top": False,
               "axes.spines.right": False, "axes.linewidth": 0.5,
               "legend.fontsize": "small"} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


@dataclass
class Report:
    """Compare the demo's two students with their teacher: report.html, demo.gif, curves.png."""

    out: tyro.conf.Positional[Path]
    """folder of the demo, with the runs `dmd` and `avd`"""
    model: Path = WEIGHTS
    """folder of their teacher"""


class Column(NamedTuple):
    """One sampler's videos `[b, 3, f, h, w]` of the first b prompts, and their cost, each."""

    name: str
    how: str
    videos: torch.Tensor
    forwards: int = 0
    seconds: float = 0.0


def main(argv=None):
    return cli.run(lambda args: print(f"open {write(args.out, args.model)}"), Report, argv)


def write(out, model):
    """Sample, score and draw; the page's path. ValueError where `out` holds no finished demo."""
    torch.set_num_threads(1)  # a second one saves seconds here, and costs minutes on a busy machine
    logs = {run: read_log(out / run) for run in RUNS}
    real, prompts, shown = shown_first(*world.make(DEMO_SEED, range(PROMPTS)))
    columns = [Column("Real data", "of the same prompts", real), *sample_all(out, model, prompts)]
    _, teacher, _, dmd, *_, avd = columns
    draw_gif(out / "demo.gif", (teacher, dmd, avd), prompts[:4])
    draw_curves(out / "curves.png", logs)
    page = out / "report.html"
    page.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Adaptive Video Distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>From {teacher.forwards} forwards to {avd.forwards}</h1>
<p>One toy teacher, two students: <b>DMD</b> matches its distribution and nothing else,
<b>AVD</b> is the full method. After {len(logs["avd"])} updates, {avd.forwards} steps draw a video
{teacher.seconds / avd.seconds:.0f} times faster than the teacher's {TEACHER_STEPS}.</p>
<h2>The same prompts, the same noise</h2>{video_table(columns, prompts[:shown])}
<h2>Scores</h2>{score_table(columns, prompts)}
<h2>Training</h2>{charts(logs)}
<h2>Set-up</h2>{setup(out, logs)}</body></html>
""", encoding="utf-8")
    return page


def read_log(folder):
    """The metrics and the seconds of a run's steps. ValueError where it is unfinished or broken."""
    if not (folder / checkpoint.FILE).is_file():
        raise ValueError(f"{folder}: no finished run; python -m tools.demo makes or finishes one")
    try:
        return [json.loads(metrics) | json.loads(times) for metrics, times in zip(
            *((folder / log).read_text().splitlines() for log in ("metrics.jsonl", "times.jsonl")))]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: its metrics.jsonl or times.jsonl is broken ({error}); "
                         f"delete the folder and run python -m tools.demo again") from None


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


def shown_first(videos, prompts):
    """To the front go the prompts to be shown, and their number comes third.

    They take turns: an open one of each colour, and one that names each direction.
    """
    open_ones, named_ones = {}, {}
    for i, words in enumerate(prompt.split() for prompt in prompts):
        kinds, kind = (named_ones, words[4]) if len(words) > 3 else (open_ones, words[1])
        kinds.setdefault(kind, i)
    front = [i for pair in zip(open_ones.values(), named_ones.values()) for i in pair]
    order = front + [i for i in range(len(prompts)) if i not in front]
    return videos[order], [prompts[i] for i in order], len(front)


def sample_all(out, model, prompts):
    """A Column of each sampler."""
    device, codec = cli.pick_device("auto"), ToyCodec()
    teacher, dmd, avd = (WanModel.from_pretrained(folder, torch.float32, device).eval()
                         for folder in (model, out / "dmd", out / "avd"))
    config, interpolator = load_config(model), load_interpolator(out / "avd", device)
    text, null_text = codec.encode_text(prompts).to(device), codec.encode_text([""]).to(device)

    def guided(noise, text, generator):
        return adavid.sample_teacher(teacher, noise, text, null_text, TEACHER_STEPS,
                                     config.guidance_scale)

    def few(student, interpolator=None):
        return lambda noise, text, generator: adavid.sample(student, noise, text, config,
                                                            interpolator, generator)

    def column(name, how, sampler, forwards=len(config.timesteps), count=len(prompts)):
        videos, seconds, start = [], [], time.perf_counter()
        for latents in sample_batches(sampler, text[:count], codec.latent_shape(), DEMO_SEED,
                                      BATCH_SIZE):
            seconds.append((time.perf_counter() - start) / len(latents))
            videos.append(codec.decode(latents).cpu())
            start = time.perf_counter()
        # The median leaves out what only a first batch waits for.
        return Column(name, how, torch.cat(videos), forwards, median(seconds))

    steps = f"{len(config.timesteps)} steps"
    yield column("Teacher", f"{TEACHER_STEPS} guided steps", guided, 2 * TEACHER_STEPS,
                 TEACHER_PROMPTS)
    yield column("Teacher", f"{steps}, not distilled", few(teacher))
    yield column("DMD", steps, few(dmd))
    yield column("AVD", steps, few(avd))
    if interpolator is not None:
        halves = sum(stride > 1 for stride in config.strides)
        yield column("AVD, decoupled", f"{steps}, {halves} at half rate", few(avd, interpolator))


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def table(kind, heads, rows):
    """An HTML table; the first cell of a row heads it."""
    heads = "".join(f"<th scope=col>{head}</th>" for head in heads)
    rows = "".join(f"<tr><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest)
                   + "</tr>" for first, *rest in rows)
    return f"<table class={kind}><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def filled(text, blocks):
    """A page's text, with `blocks` in place of what is between `<!-- name -->` and `<!-- end -->`.
    """
    for name, block in blocks.items():
        text = re.sub(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)",
                      lambda match: f"{match[1]}\n{block}\n\n{match[2]}", text, flags=re.DOTALL)
    return text


def video_table(columns, prompts):
    """A column for each sampler; a row for each prompt, under its words."""
    heads = [f"<b>{c.name}</b><br>{c.how}<br>{c.forwards} forwards<br>{c.seconds:.2g} s"
             for c in columns]
    heads[0] = f"<b>{columns[0].name}</b><br>{columns[0].how}"
    rows = [[escape(prompt)] + [moving_picture(c.videos[i], f"{prompt}: {c.name}") for c in columns]
            for i, prompt in enumerate(prompts)]
    return table("videos", ["", *heads], rows) + (
        f"<p class=note>Forwards and seconds are those of one video in a batch of {BATCH_SIZE}, "
        f"{'on a GPU' if cli.pick_device('auto').type != 'cpu' else 'on one thread'}.</p>")


def moving_picture(video, alt):
    """An endless animation, pixel for pixel: lossless WebP, which every browser plays."""
    data = iio.imwrite("<bytes>", to_frames(video), extension=".webp", duration=DURATIONS, loop=0,
                       lossless=True)
    data = base64.b64encode(data).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}">'


def to_frames(video):
    """`3 f h w` in [0, 1] -> bytes `f h w 3`."""
    return rearrange((255 * video).round().byte(), "c f h w -> f h w c").numpy()


def score_table(columns, prompts):
    """The oracle's means; bold is, of the few-step samplers, the closest to real data."""
    formats = {"instance": "{:.0%}", "prompt": "{:.0%}", "dynamic": "{:.0%}",
               "open_speed": "{:.2f}", "saturation": "{:.2f} ×", "flicker": "{:.2f} ×"}
    scores = [world.score(c.videos, prompts[:len(c.videos)]) for c in columns]
    rows = [[f"{c.name}<br><small>{c.how}</small>", len(c.videos)] for c in columns]
    for name, form in formats.items():
        means = torch.stack([score[name].nanmean() for score in scores])
        cells = [form.format(m) for m in (means / means[0] if "×" in form else means).tolist()]
        best = cells[2 + (means - means[0]).abs()[2:].argmin()]
        for i, (row, cell) in enumerate(zip(rows, cells)):
            row.append(f"<b>{cell}</b>" if i >= 2 and cell == best else cell)
    heads = ["", "prompts", "instance preserved", "prompt right", "moves", "speed, open prompts",
             "saturation", "flicker"]
    return f"<div class=wide>{table('numbers', heads, rows)}</div>" + (
        f"<p class=note>Read from the pixels. Speed in pixels per frame; saturation and flicker as "
        f"multiples of real data's. Bold: of those with {columns[-1].forwards} forwards, the one "
        f"closest to real data. One prompt of {len(prompts)} makes {100 / len(prompts):.1f} %, so "
        f"small differences mean nothing.</p>")


def curves(logs):
    """How both runs went: (title, lines, what a healthy one looks like) of each chart."""
    names = dict.fromkeys(name for line in logs["avd"] for name in line)
    timesteps = [name.removeprefix("cache_") for name in names if name.startswith("cache_")]

    def of_runs(name):
        return [(label, colour, curve(logs[run], name), smooth(curve(logs[run], name)))
                for run, (label, colour) in RUNS.items()]

    def of_timesteps(name, averaged):
        return [(f"t = {t}", colour, curve(logs["avd"], f"{name}_{t}"), averaged(t))
                for t, colour in zip(timesteps, TIMESTEP_COLOURS)]

    data = curve(logs["avd"], "data_variance")
    return [
        ("Distribution matching, L<sub>KL</sub>", of_runs("kl"),
         "Healthy: up until the critic has caught up, down, then level. A long climb: it lost the "
         "student."),
        ("The critic's loss", of_runs("critic"),
         "Healthy: level, or rising slowly while the videos sharpen. A jump: it lost them."),
        ("Adaptive regression, L<sub>reg</sub>",
         of_timesteps("reg", lambda t: curve(logs["avd"], f"cache_{t}")),
         "AVD alone; bold is the Loss Mean Cache. Healthy: calm. At t = 1000 it rises, as the "
         "mean of all videos turns into one of them."),
        ("Adaptive weight, w",
         of_timesteps("weight", lambda t: smooth(curve(logs["avd"], f"weight_{t}"))),
         "Healthy: spread around one half. All exactly there: k is too small to adapt."),
        ("Temporal regularisation, L<sub>temp</sub>", of_runs("temp"),
         "DMD only measures it. Healthy: it nears zero, where every video moves enough."),
        ("Temporal variance", [("real data", INK, data, smooth(data))] + of_runs("variance"),
         "Healthy: it nears real data's. Far below, videos freeze; far above, they jump."),
    ]


def curve(log, name):
    """Steps and values, where the run logged them; a value that was not finite is null."""
    points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(curve):
    steps, values = curve
    return steps, list(accumulate(values, lambda old, new: 0.8 * old + 0.2 * new))


def plot(axes, lines):
    """lines: label, colour, the curve as measured (drawn faint), the averaged curve (bold)."""
    for label, colour, measured, averaged in lines:
        axes.plot(*measured, color=colour, alpha=0.45, linewidth=0.8)
        axes.plot(*averaged, color=colour, label=label)
    axes.legend(frameon=False, ncols=len(lines), loc="lower left", bbox_to_anchor=(0, 1),
                borderpad=0, handlelength=1, columnspacing=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize="small", loc="right")


def charts(logs):
    """The curves as inline SVG, which takes the page's font and colours, each with its caption."""
    figures = []
    for title, lines, caption in curves(logs):
        with matplotlib.rc_context(CHART_STYLE):
            figure = Figure(figsize=(4.4, 2.5), layout="constrained")
            plot(figure.subplots(), lines)
            svg = StringIO()
            figure.savefig(svg, format="svg", transparent=True,
                           metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        _, tag, svg = svg.getvalue().replace(INK, "currentColor").partition("<svg")
        figures.append(f"<figure><h3>{title}</h3>{tag}{svg}"
                       f"<figcaption>{caption}</figcaption></figure>")
    return f"<div class=charts>{''.join(figures)}</div>"


def draw_curves(path, logs):
    """The same curves as one picture, for a README."""
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        for axes, (title, lines, _) in zip(figure.subplots(2, 3).flat, curves(logs)):
            plot(axes, lines)
            axes.set_title(re.sub("<.*?>", "", title), loc="left", pad=24)
        figure.savefig(path, dpi=80)


def setup(out, logs):
    """The times, the machine, and where the runs' numbers differ from the paper's."""
    configs = [asdict(adavid.AVDConfig()), *(asdict(load_config(out / run)) for run in RUNS)]
    rows = [[f"<code>{name}</code>", *(config[name] for config in configs)] for name in configs[0]]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    heads = ["differs from the paper", "paper", *(label for label, _ in RUNS.values())]
    times = ", ".join(f"{RUNS[run][0]} in {sum(line['seconds'] for line in log):.0f} s"
                      for run, log in logs.items())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"<p>Distilled side by side: {times}.<br>{datetime.now():%Y-%m-%d %H:%M}, torch "
            f"{torch.__version__}, {os.cpu_count()} cores{gpu}, {escape(platform.platform())}.</p>"
            f"<div class=wide>{table('numbers', heads, rows)}</div>")


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #6b7078; --line: #e3e5e8 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131519; --ink: #e4e6ea; --soft: #969ca6; --line: #2b2f36 } }
body { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 1rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem } h3 { font-size: .95rem; margin: 0 0 .25rem }
th { font-weight: 400; text-align: left; vertical-align: top; padding: 0 }
.note, figcaption, small, thead { font-size: .8rem; line-height: 1.4; color: var(--soft) }
.videos, .videos tbody { display: block }
.videos tr { display: grid; grid-template-columns: repeat(6, 1fr) }
.videos thead { display: block; position: sticky; top: 0; padding: .5rem 0;
  background: var(--paper) }
.videos thead th { padding-right: .5rem } .videos thead b { color: var(--ink) }
.videos th:empty { display: none } .videos tbody th { grid-column: 1 / -1; padding: .7rem 0 .2rem }
.videos td { padding: 0 4px 0 0 }
.videos img { display: block; width: 100%; border-radius: 4px; image-rendering: pixelated }
.wide { overflow-x: auto }
.numbers { width: 100%; border-collapse: collapse; font-size: .9rem; line-height: 1.4 }
.numbers th, .numbers td { padding: .35rem .5rem; border-bottom: 1px solid var(--line) }
.numbers th:first-child { padding-left: 0; min-width: 7.5rem }
.numbers th:not(:first-child), .numbers td { text-align: right; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 2rem }
figure { margin: 0 } sub { font-size: .7em; line-height: 0 } svg { width: 100%; height: auto }
svg text { font-family: inherit !important }
@media (max-width: 40rem) { body { padding: .5rem .75rem 3rem } h1 { font-size: 1.6rem }
  .videos thead { font-size: .6rem } .numbers { font-size: .8rem } }
"""


# ---------------------------------------------------------------------------------------------
# The moving picture
# ---------------------------------------------------------------------------------------------


def draw_gif(path, columns, prompts, cell=112, gap=10, left=150, top=70):
    """For the top of a README: a row for each prompt, captions at the left and at the top."""
    title, text = (ImageFont.truetype(findfont(font), size)
                   for font, size in (("DejaVu Sans:bold", 16), ("DejaVu Sans", 12)))
    xs = [left + i * (cell + gap) for i in range(len(columns))]
    ys = [top + i * (cell + gap) for i in range(len(prompts))]
    card = Image.new("RGB", (xs[-1] + cell + 2 * gap, ys[-1] + cell + 2 * gap), "#16181d")
    pen = ImageDraw.Draw(card)
    for x, column in zip(xs, columns):
        pen.text((x, 18), column.name.partition(",")[0], "#ffffff", title)
        pen.text((x, 42), f"{column.forwards} forwards", "#9aa1ac", text)
    for y, prompt in zip(ys, prompts):
        pen.text((20, y + cell / 2), prompt.replace(" moving", "\nmoving"), "#d5d8dd", text, "lm")

    frames = [card.copy() for _ in DURATIONS]
    for x, column in zip(xs, columns):
        for y, video in zip(ys, column.videos):
            for frame, pixels in zip(frames, to_frames(video)):
                square = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
                frame.paste(square, (x, y))
    # One palette for all frames, or colours flicker.
    palette = Image.fromarray(np.concatenate(frames)).quantize(128, kmeans=1)
    first, *rest = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    first.save(path, save_all=True, append_images=rest, duration=DURATIONS, loop=0)


if __name__ == "__main__":
    sys.exit(main())
