"""The curves of training runs, and the page on which a person sees whether a run is healthy."""

import base64
import json
from html import escape
from itertools import accumulate

from matplotlib.figure import Figure

from runtime import page
from runtime.run import naming_errors
from tiny_wan import checkpoint

STUDENT, HEALTHY = "#3b82d6", "#3fa65c"  # colours
WIDER = 0.1  # how far the healthy range goes beyond the teacher's and the real videos' readings
READINGS = {
    "saturation": ("Saturation", "Above the range, colours run away; plain DMD's do."),
    "contrast": ("Contrast", "Above the range, pictures harden; below it, they are blurred."),
    "motion": ("Motion", "Below the range, videos freeze; far above it, they jump."),
    "flicker": ("Flicker", "Above the range, brightness or shapes change from frame to frame.")}
CHARTS = (  # title, name in the log (or the start of four), and what is healthy
    ("Distribution matching at the last step", "dmd",
     "it rises until the critic has caught up, falls, and levels off."),
    ("Critic: loss", "critic", "level, or rising slowly while the videos sharpen."),
    ("Regression: loss on real videos", "reg_", "calm at the later steps."),
    ("Regression: adaptive weight", "weight_", "spread around one half."),
    ("Temporal loss at the last step", "temp", "it falls; it need not reach zero."),
    ("Temporal variance at the last step", "variance", "close to the real data's."))


def write_report(out):
    """Write report.html of a distillation from what its folder `out` holds so far."""
    lines = checkpoint.read_text(out / "metrics.jsonl").splitlines()
    log, file = [json.loads(line) for line in lines], out / "reference.json"
    reference = checkpoint.read_json(file) if file.exists() else {"prompts": [], "readings": {}}
    readings = losses = ""
    for name, (title, meaning) in READINGS.items():
        if curve(log, name)[0]:
            figure = new_chart()
            draw_reading(figure.subplots(), log, reference["readings"], title, name)
            readings += page.chart(figure, meaning)
    for title, name, healthy in CHARTS:
        figure = new_chart()
        if draw_curves(figure.subplots(), [("student", STUDENT, log)], title, name):
            losses += page.chart(figure, f"Healthy: {healthy}")
    picture = out / "samples" / f"{len(log):06d}.png"
    sheet = f"""<h2>Frames of these videos</h2>
<figure><img src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
alt="a row for each prompt"></figure>
<ol>{"".join(f"<li>{escape(prompt)}" for prompt in reference["prompts"])}</ol>
""" if picture.exists() else ""
    videos = f"""<h2>The fixed prompts' videos</h2>
<p>The same prompts and the same noise each time, read as <code>tools.measure</code> does. The green
range is healthy: it reaches from {WIDER:.0%} below the lower one of the teacher's and the real
videos' readings to {WIDER:.0%} above the higher one.</p>
<div class=charts>{readings}</div>""" if readings else ""
    with naming_errors(out / "report.html"):
        page.write(out / "report.html", f"{out.resolve().name}: {len(log)} updates",
                   f"{videos}<h2>Losses</h2><div class=charts>{losses}</div>{sheet}")


def new_chart():
    return Figure(figsize=(4.4, 2.5), layout="constrained")


def draw_reading(axes, log, reference, title, name):
    """A reading of the student's videos, with those of the teacher's and of real ones.

    reference: {"teacher": readings, "real": readings}, where there are any.
    """
    axes.plot(*curve(log, name), ".-", color=STUDENT, label="student")
    there = {who: readings[name] for who, readings in reference.items()}
    for (who, value), style in zip(there.items(), ("--", ":")):
        axes.axhline(value, color=page.INK, linestyle=style, label=who)
    if there:
        axes.axhspan((1 - WIDER) * min(there.values()), (1 + WIDER) * max(there.values()),
                     color=HEALTHY, alpha=0.15, linewidth=0)
    finish(axes, title)


def draw_curves(axes, runs, title, name):
    """A metric as logged, faintly, and its running mean. Returns whether there was any.

    runs: (label, colour, log) of each; what has four curves, and the data's, is the last one's.

    What the student's videos decide depends on the step at which they end, which changes from cycle
    to cycle. One curve through all cycles would be a saw, so it shows those of the last step.
    """
    *_, (_, _, last) = runs
    lines = [(*run, name) for run in runs]
    if name == "variance":
        lines = [("real data", page.INK, last, "data_variance"), *lines]
    elif name.endswith("_"):
        timesteps = [key.removeprefix("cache_") for key in last[0] if "cache_" in key]
        lines = [(f"t = {t}", f"C{i}", last, name + t) for i, t in enumerate(timesteps)]
    curves = [(label, colour, *curve(log, key)) for label, colour, log, key in lines]
    if not any(steps for _, _, steps, _ in curves):
        return False
    for label, colour, steps, values in curves:
        mean = list(accumulate(values, lambda old, new: 0.8 * old + 0.2 * new))
        some = slice(None, None, 1 + len(steps) // 1000)  # more points would only make files large
        axes.plot(steps[some], values[some], color=colour, alpha=0.45, linewidth=0.8)
        axes.plot(steps[some], mean[some], color=colour, label=label)
    finish(axes, title)
    return True


def finish(axes, title):
    axes.set_title(title, pad=24)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=1,
                columnspacing=1)


def curve(log, name):
    """The steps that logged a value, and the values. A value that was not finite is null."""
    if name in ("dmd", "temp", "variance"):
        last = max(line["rollout_step"] for line in log)
        log = [line for line in log if line["rollout_step"] == last]
    points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
