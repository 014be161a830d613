"""What the demo's two students have learned: one self-contained page, and a moving picture.

    python -m tools.report runs/demo

Every sampler gets the same prompts and the same noise: the teacher in fifty guided steps and in
four, the student of plain distribution matching (`dmd/`), and that of the full method (`avd/`).
"""

import base64
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from html import escape
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import adavid
from sample import WEIGHTS, load_config, load_interpolator
from tiny_wan import ToyCodec, WanModel, checkpoint, world
from tools import cli

DEMO_SEED = 1001  # its prompts are for this report alone: no training run uses it
TEACHER_STEPS = 50
BATCH_SIZE = 16
DURATIONS = [125] * (world.FRAMES - 1) + [625]  # milliseconds: a pause before it starts again
RUNS = {"dmd": ("DMD", "#e0722f"), "avd": ("AVD", "#3b82d6")}
TIMESTEP_COLOURS = ("#9b5de5", "#3b82d6", "#12a594", "#e0a030")
INK = "#010203"  # in the charts, it stands for the page's own colour of text


@dataclass
class Report:
    """Compare the demo's two students with their teacher: report.html and demo.gif."""

    out: tyro.conf.Positional[Path]
    """folder of the demo, with the runs `dmd` and `avd`"""
    model: Path = WEIGHTS
    """folder of their teacher"""


class Column(NamedTuple):
    """The videos `[b, 3, f, h, w]` of one sampler, for the first b prompts."""

    name: str
    how: str
    forwards: int
    seconds: float  # for each video
    videos: torch.Tensor


def main(argv=None):
    return cli.run(lambda args: print(f"open {write(args.out, args.model)}"), Report, argv)


def write(out, model, prompts=64, teacher_prompts=32):
    """Sample, score and draw; the page's path. ValueError where `out` holds no finished demo."""
    logs = {run: read_log(out / run) for run in RUNS}
    real, prompts, shown = shown_first(*world.make(DEMO_SEED, range(prompts)))
    columns = [Column("Real data", "what the teacher saw", 0, 0.0, real)]
    columns += sample_all(out, model, prompts, teacher_prompts)
    teacher, dmd, avd = columns[1], columns[3], columns[-1]
    draw_gif(out / "demo.gif", (teacher, dmd, avd), prompts[:shown][-4:])
    body = "".join([
        introduction(logs, teacher, avd),
        "<h2>The same prompts, the same noise</h2>", video_table(columns, prompts[:shown]),
        "<h2>Scores</h2>", score_table(columns, prompts),
        "<h2>Training</h2>", charts(logs),
        "<h2>Set-up</h2>", setup_table(out, logs)])
    page = out / "report.html"
    page.write_text(PAGE.format(style=STYLE, body=body), encoding="utf-8")
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
    """In front go the prompts to be shown, and their number comes third.

    They alternate: the first open one of a colour, then the first that names a direction.
    """
    open_ones, named_ones = {}, {}
    for i, words in enumerate(prompt.split() for prompt in prompts):
        if len(words) > 3:
            named_ones.setdefault(words[4], i)
        else:
            open_ones.setdefault(words[1], i)
    front = [i for pair in zip(open_ones.values(), named_ones.values()) for i in pair]
    order = front + [i for i in range(len(prompts)) if i not in front]
    return videos[order], [prompts[i] for i in order], len(front)


def sample_all(out, model, prompts, teacher_prompts):
    """A Column of each sampler."""
    device, codec = cli.pick_device("auto"), ToyCodec()
    teacher, dmd, avd = (WanModel.from_pretrained(folder, torch.float32, device).eval()
                         for folder in (model, out / "dmd", out / "avd"))
    config, interpolator = load_config(model), load_interpolator(out / "avd", device)
    text, null_text = codec.encode_text(prompts).to(device), codec.encode_text([""]).to(device)

    def guided(noise, text, generator):
        return adavid.sample_teacher(teacher, noise, text, null_text, TEACHER_STEPS,
                                     config.guidance_scale)

    def few_steps(student, interpolator=None):
        return lambda *batch: adavid.sample(student, *batch[:2], config, interpolator, batch[2])

    def column(name, how, forwards, sampler, count=len(prompts)):
        videos, seconds = [], []
        for batch in torch.arange(count).split(BATCH_SIZE):
            generator = [torch.Generator().manual_seed(DEMO_SEED + i) for i in batch.tolist()]
            noise = adavid.draw(torch.randn, (len(batch), *codec.latent_shape), text, generator)
            start = time.perf_counter()
            latents = sampler(noise, text[batch], generator).cpu()
            seconds.append((time.perf_counter() - start) / len(batch))
            videos.append(codec.decode(latents))
        # The median, so that what happens only in the first batch does not count.
        return Column(name, how, forwards, statistics.median(seconds), torch.cat(videos))

    few, halves = len(config.timesteps), sum(stride > 1 for stride in config.strides)
    columns = [
        column("Teacher", f"{TEACHER_STEPS} guided steps", 2 * TEACHER_STEPS, guided, teacher_prompts),
        column("Teacher", f"{few} steps, not distilled", few, few_steps(teacher)),
        column("DMD", f"{few} steps", few, few_steps(dmd)),
        column("AVD", f"{few} steps", few, few_steps(avd))]
    if interpolator is not None:
        columns.append(column("AVD, decoupled", f"{few} steps, {halves} at half the frame rate", few,
                              few_steps(avd, interpolator)))
    return columns


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def introduction(logs, teacher, avd):
    times = teacher.seconds / avd.seconds
    return (f"<h1>From {teacher.forwards} forwards to {avd.forwards}</h1>"
            f"<p>One toy teacher, two students: <b>DMD</b> matches its distribution and nothing else, "
            f"<b>AVD</b> is the full method. After {len(logs['avd'])} updates, four steps "
            f"draw a video {times:.0f} times faster than the teacher's {TEACHER_STEPS}.</p>")


def video_table(columns, prompts):
    """A row for each prompt, a column for each sampler."""
    heads = "".join(
        f"<th scope=col><b>{c.name}</b><br>{c.how}<br>"
        + (f"{c.forwards} forwards<br>{c.seconds:.2g} s</th>" if c.forwards else "</th>")
        for c in columns)
    rows = "".join(
        f"<tr><th scope=row colspan={len(columns)}>{escape(prompt)}</th></tr><tr>"
        + "".join(f"<td>{moving_picture(c.videos[i], f'{prompt}, {c.name}')}</td>" for c in columns)
        + "</tr>" for i, prompt in enumerate(prompts))
    return (f"<table class=videos><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
            f"<p class=note>Forwards of the network and seconds, for one video in batches of "
            f"{BATCH_SIZE}.</p>")


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
    """The oracle's means. Bold: of those with as few forwards as AVD, the closest to real data."""
    headings = {"instance": "instance preserved", "prompt": "prompt right", "dynamic": "moves",
                "open_speed": "speed, open prompts", "saturation": "saturation",
                "flicker": "flicker"}
    scores = []
    for c in columns:
        means = world.score(c.videos, prompts[:len(c.videos)])
        scores.append({name: means[name].nanmean().item() for name in headings})
    real = scores[0]

    def say(name, value):
        if name in ("saturation", "flicker"):
            return f"{value / real[name]:.2f} ×"
        return f"{value:.2f}" if name == "open_speed" else f"{value:.0%}"

    rows = []
    for c, score in zip(columns, scores):
        cells = ""
        for name in headings:
            nearest = min((s[name] for s, other in zip(scores, columns)
                           if other.forwards == columns[-1].forwards),
                          key=lambda value: abs(value - real[name]))
            best = c.forwards == columns[-1].forwards and say(name, score[name]) == say(name, nearest)
            cells += f"<td>{'<b>' * best}{say(name, score[name])}{'</b>' * best}</td>"
        rows.append(f"<tr><th scope=row>{c.name}<br><small>{c.how}</small></th>"
                    f"<td>{len(c.videos)}</td>{cells}</tr>")
    heads = "".join(f"<th scope=col>{heading}</th>" for heading in headings.values())
    return (f"<div class=wide><table class=numbers><thead><tr><th></th><th scope=col>prompts</th>"
            f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
            f"<p class=note>Read from the pixels. Speed in pixels per frame; saturation and flicker "
            f"relative to real data. Bold: the closest to real data among those with "
            f"{columns[-1].forwards} forwards. One prompt of {len(prompts)} is "
            f"{100 / len(prompts):.1f} %, so small differences mean nothing.</p>")


def charts(logs):
    def curves(name):
        return [(label, colour, *curve(logs[run], name)) for run, (label, colour) in RUNS.items()]

    timesteps = [key.removeprefix("cache_") for key in logs["avd"][-1] if key.startswith("cache_")]

    def per_timestep(name):
        return [(f"t = {t}", colour, *curve(logs["avd"], f"{name}_{t}"))
                for t, colour in zip(timesteps, TIMESTEP_COLOURS)]

    return "<div class=charts>" + "".join([
        chart("Distribution matching, L_KL", curves("kl"),
              "Healthy: it falls and then hovers. A long climb: the critic has lost the student."),
        chart("The critic's loss", curves("critic"),
              "Healthy: level, with no steps up. It measures how well the critic knows the student."),
        chart("Temporal variance", [("real data", INK, *curve(logs["avd"], "data_variance"))]
              + curves("variance"),
              "Healthy: on its way to the data's. Far below, videos stand still; above, they shake."),
        chart("Regression on real videos, L_reg", per_timestep("reg"),
              "AVD alone. Healthy: level or falling at every timestep; highest at pure noise."),
        chart("Loss Mean Cache", per_timestep("cache"),
              "The running means of those losses. Healthy: smooth, and each within its losses."),
        chart("Adaptive weight, w", per_timestep("weight"),
              "Healthy: spread around one half. All exactly there: k is too small to adapt."),
    ]) + "</div>"


def curve(log, name):
    """Steps and values, where the run logged them."""
    points = [(line["step"], line[name]) for line in log if name in line]
    return [step for step, _ in points], [value for _, value in points]


def chart(title, curves, caption):
    """Faint as measured, and smoothed: an inline SVG in the page's font and colours."""
    style = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
             "axes.edgecolor": INK, "axes.linewidth": 0.5, "xtick.color": INK, "ytick.color": INK,
             "axes.labelcolor": INK, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.subplots()
        for label, colour, steps, values in curves:
            smooth = list(accumulate(values, lambda old, new: 0.8 * old + 0.2 * new))
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth, color=colour, label=label)
        axes.legend(frameon=False, fontsize="small", ncols=len(curves), loc="lower left",
                    bbox_to_anchor=(0, 1), borderpad=0, handlelength=1, columnspacing=1)
        axes.set_xlabel("step", fontsize="small", loc="right")
        svg = StringIO()
        figure.savefig(svg, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = svg.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def setup_table(out, logs):
    paper = asdict(adavid.AVDConfig())
    used = {run: asdict(load_config(out / run)) for run in RUNS}
    numbers = "".join(
        f"<tr><th scope=row><code>{name}</code></th><td>{value}</td>"
        + "".join(f"<td>{used[run][name]}</td>" for run in RUNS) + "</tr>"
        for name, value in paper.items() if any(used[run][name] != value for run in RUNS))
    heads = "".join(f"<th scope=col>{label}</th>" for label, _ in RUNS.values())
    times = ", ".join(f"{RUNS[run][0]} {sum(line['seconds'] for line in log):.0f} s"
                      for run, log in logs.items())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"<p>Distilled side by side in {len(logs['avd'])} updates: {times}.<br>"
            f"{escape(platform.platform())}, {os.cpu_count()} cores{gpu}, "
            f"torch {torch.__version__}.<br>{datetime.now():%Y-%m-%d %H:%M}.</p>"
            f"<div class=wide><table class=numbers><thead><tr><th scope=col>differs from the paper"
            f"</th><th scope=col>paper</th>{heads}</tr></thead>{numbers}</table></div>")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Adaptive Video Distillation</title>
<style>{style}</style></head>
<body>{body}</body></html>
"""
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #6b7078; --line: #e3e5e8 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131519; --ink: #e4e6ea; --soft: #969ca6; --line: #2b2f36 } }
body { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 1rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem } h3 { font-size: .95rem; margin: 0 0 .25rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { font-weight: 400; text-align: left; vertical-align: top }
.note, figcaption, small, thead { font-size: .8rem; line-height: 1.4; color: var(--soft) }
.wide { overflow-x: auto }
.numbers { width: 100%; font-size: .9rem }
.numbers td, .numbers th { padding: .35rem .5rem; border-bottom: 1px solid var(--line) }
.numbers th:first-child { padding-left: 0 } .numbers td { white-space: nowrap }
.videos { width: 100%; table-layout: fixed }
.videos thead th { position: sticky; top: 0; padding: .5rem .5rem .5rem 0; background: var(--paper) }
.videos thead b { color: var(--ink) }
.videos th[colspan] { padding: .7rem 0 .2rem; font-size: .9rem } .videos td { padding: 0 }
.videos img { display: block; width: 95%; border-radius: 4px; image-rendering: pixelated }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 2rem }
figure { margin: 0 } svg { width: 100%; height: auto } svg text { font-family: inherit !important }
@media (max-width: 40rem) { body { padding: .5rem .75rem 3rem } h1 { font-size: 1.6rem }
  .videos thead { font-size: .6rem; line-height: 1.3 } .numbers { font-size: .8rem } }
"""


# ---------------------------------------------------------------------------------------------
# The moving picture
# ---------------------------------------------------------------------------------------------


def draw_gif(path, columns, prompts, cell=128, gap=10, left=150, top=70):
    """For the top of a README: a row for each prompt, captions at the left and at the top."""
    name_font, font = (ImageFont.load_default(size) for size in (20, 14))
    card = Image.new("RGB", (left + len(columns) * (cell + gap) + gap,
                             top + len(prompts) * (cell + gap) + gap), "#16181d")
    places = [(left + (cell + gap) * i, top + (cell + gap) * j)
              for j in range(len(prompts)) for i in range(len(columns))]
    pen = ImageDraw.Draw(card)
    for (x, _), column in zip(places, columns):
        pen.text((x, 16), column.name.partition(",")[0], "#ffffff", name_font)
        pen.text((x, 42), f"{column.forwards} forwards", "#9aa1ac", font)
    for (_, y), prompt in zip(places[::len(columns)], prompts):
        pen.text((20, y + cell / 2), prompt.replace(" moving", "\nmoving"), "#d5d8dd", font, "lm")

    videos = [to_frames(column.videos[i]) for i in range(len(prompts)) for column in columns]
    frames = [card.copy() for _ in DURATIONS]
    for place, video in zip(places, videos):
        for frame, pixels in zip(frames, video):
            frame.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST), place)
    reel = Image.fromarray(rearrange([np.asarray(f) for f in frames], "f h w c -> (f h) w c"))
    palette = reel.quantize(256)  # one for all frames, or the colours flicker
    first, *rest = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=DURATIONS, loop=0)


if __name__ == "__main__":
    sys.exit(main())
