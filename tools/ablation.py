"""The paper's ablation in the toy world: train students, score samplers, write the results.

    python -m tools.ablation             all of tools/ablation.toml: six hours on two cores
    python -m tools.ablation --quick     one seed, 64 prompts, the main rows only

A job trains one student with one seed, on one thread in its own process; then each row that uses
this student draws the same prompts from the same noise, and the oracle scores the videos. Every row
and seed is one line of docs/measurements.jsonl. The command only runs the jobs that are missing
there, so it can be stopped with Ctrl-C and started again. At the end it writes docs/results.html,
docs/figures/ablation.png, and the generated parts of README.md and docs/results.md.
"""

import functools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import adavid
import kernels
import train
from runtime import cli
from runtime.data import INDEX, write_toy_shards
from runtime.models import load_config, load_interpolator
from runtime.run import make_generator
from sample import sample_batches
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world
from tools import costs, page

CONDITIONS = Path(__file__).with_suffix(".toml")
DOCS = Path(__file__).parents[1] / "docs"
DATA_SEED = 5000  # + seed: of real videos in shards
KINDS = ("mislabelled", "cut", "frozen", "noisy", "night")  # of unreliable real videos
READINGS = ("x", "y", "vx", "vy", "red", "green", "blue", "size")  # of the Fréchet distance
TIMESTEPS = [f"{t:g}" for t in adavid.AVDConfig.timesteps]
COLUMNS = {  # their names, and whether they are multiples of the real data's mean
    "instance": ("instance preservation", False), "prompt": ("prompt accuracy", False),
    "dynamic_named": ("dynamic degree on named prompts", False),
    "dynamic_open": ("dynamic degree on open prompts", False),
    "motion": ("motion", True), "motion_open": ("motion on open prompts", True),
    "saturation": ("saturation", True), "flicker": ("flicker", True),
    "ground": ("background brightness", False), "diversity": ("diversity", False),
    "frechet": ("Fréchet distance", False), "gflops": ("GFLOPs", False),
    "seconds": ("seconds", False),
    **{f"reg_std_{t}": (f"spread of losses at t = {t}", False) for t in TIMESTEPS},
    **{f"weight_{t}": (f"mean weight at t = {t}", False) for t in TIMESTEPS}}


@dataclass
class Ablation:
    """Train and score what is missing of the ablation, then write its tables and pages."""

    conditions: Path = CONDITIONS
    """what to train and how to sample it, with which seeds"""
    docs: Path = DOCS
    """folder for measurements.jsonl, results.html and figures/; the generated parts of results.md
    there and of README.md beside the folder are replaced, if these files exist"""
    out: Path = Path("runs/ablation")
    """folder for the students"""
    quick: bool = False
    """one seed, 64 prompts and the main rows only, all in runs/ablation-quick"""


def main(argv=None):
    return cli.run(run, Ablation, argv)


def run(args):
    conditions = read_conditions(args.conditions)
    rows = conditions["rows"]
    if args.quick:
        conditions |= {"seeds": conditions["seeds"][:1], "prompts": 64}
        rows = conditions["questions"][0]["rows"]
        args.docs = args.out = Path("runs/ablation-quick")
    measured = Measurements(conditions, args.docs / "measurements.jsonl")
    jobs = {}
    for name in rows:
        for seed in seeds_of(conditions, name):
            if measured.line(name, seed) is None:
                student = conditions["rows"][name].get("student")
                jobs.setdefault((student, seed), []).append(name)
    for folder in (args.docs / "figures", args.out):
        folder.mkdir(parents=True, exist_ok=True)
    if jobs:
        run_jobs(args, conditions, jobs, measured)
    write_pages(args, measured)


def run_jobs(args, conditions, jobs, measured):
    """As many at once as there are cores. ValueError in the end if some of them failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    failures = []
    with ProcessPoolExecutor(min(os.cpu_count(), len(jobs)), multiprocessing.get_context("spawn"),
                             torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(job, args.out, conditions, *key, names)
                   for key, names in jobs.items()]
        try:
            for future in tqdm(as_completed(futures), "ablation", len(futures), unit="job"):
                if error := future.exception():
                    failures.append(str(error))
                else:
                    measured.save(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # train.py saves
            raise
    if failures:
        raise ValueError(f"{len(failures)} of {len(jobs)} jobs failed; the first: {failures[0]}")


# ---------------------------------------------------------------------------------------------
# Conditions
# ---------------------------------------------------------------------------------------------


def read_conditions(file):
    """The contents of the file. ValueError if a random stream would serve two purposes."""
    try:
        conditions = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from None
    seeds = [seed + shift for seed in conditions["seeds"]
             for shift in (0, DATA_SEED, conditions["prompt_seed"])] + conditions["taken"]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: two of its seeds share a random stream; choose others")
    return conditions


def seeds_of(conditions, name):
    """All seeds, or as many of the first as the row says."""
    return conditions["seeds"][:conditions["rows"][name].get("seeds")]


def definition(conditions, name):
    """Everything that decides a row's numbers, except the seed."""
    row = conditions["rows"][name]
    student = conditions["students"].get(row.get("student"), {})
    data = conditions["data"].get(student.get("data"), {})
    kept = {key: conditions[key] for key in ("prompts", "prompt_seed", "flags")}
    return kept | {"row": {k: v for k, v in row.items() if k not in ("title", "seeds")},
                   "student": student, "data": data}


# ---------------------------------------------------------------------------------------------
# A job: train a student, then sample and score its rows
# ---------------------------------------------------------------------------------------------


def job(out, conditions, student, seed, names):
    """The measurements of these rows. student: None for rows of the teacher and of real videos."""
    try:
        folder = distil(out, conditions, student, seed) if student else WEIGHTS
    except SystemExit as stop:  # train.py was stopped and has saved
        os._exit(stop.code)  # or the pool would let this process start another job
    return [measure(conditions, name, folder, seed) for name in names]


def distil(out, conditions, name, seed):
    """The folder of a student. ValueError with the last line of its log if its training fails."""
    student, folder = conditions["students"][name], out / f"{name}-{seed}"
    argv = ["distill", "--out", str(folder), "--seed", str(seed), "--device", "cpu",
            *shlex.split(conditions["flags"]), *shlex.split(student.get("flags", ""))]
    if "data" in student:
        shards = out / f"data-{student['data']}-{seed}"
        if not (shards / INDEX).is_file():
            write_shards(shards, seed, **conditions["data"][student["data"]])
        argv += ["--data", str(shards), "--gradient-checkpointing", "False"]
    # Set for every student, as this process may have trained another one before.
    adavid.temporal_loss = relative_temporal_loss if "replace" in student else TEMPORAL_LOSS
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        code = train.main(argv)
    if code:
        raise ValueError(f"{folder}: {(folder / 'log.txt').read_text().splitlines()[-1]}")
    return folder


TEMPORAL_LOSS = adavid.temporal_loss


def relative_temporal_loss(x0, eps=1e-6, truncation=None):
    """L_temp of the variance over time relative to the variance over space.

    Saturation raises both, so it does not pass for motion. The latter gives no gradient.
    """
    contrast = x0.float().var(dim=(3, 4), correction=0).mean(dim=(1, 2)).detach()
    loss = -torch.log(kernels.temporal_variance(x0) / contrast + eps)
    if truncation is not None:
        loss = torch.where(loss <= truncation, 0.0, loss)
    return loss.mean()


def write_shards(folder, seed, count, share=0.0, kinds=(), null_prompt=""):
    """Toy videos, of which a share is spoilt, in equal parts of the given kinds."""
    def spoil_share(video):
        u = torch.rand(count, generator=make_generator(seed, "spoil"))
        for i, kind in enumerate(kinds):
            chosen = (u >= share * i / len(kinds)) & (u < share * (i + 1) / len(kinds))
            video[chosen] = spoil(kind, video[chosen], make_generator(seed, kind))
        return video

    write_toy_shards(folder, DATA_SEED + seed, count, spoil_share, null_prompt)


def spoil(kind, video, generator):
    """Make real videos `[b, 3, f, h, w]` unreliable. Their prompts stay the same."""
    others = video.roll(1, dims=0)
    if kind == "mislabelled":
        return others
    if kind == "cut":  # to another shot
        return torch.cat([video[:, :, :5], others[:, :, 5:]], dim=2)
    if kind == "frozen":
        return video[:, :, 4:5].expand_as(video)
    if kind == "noisy":
        return (video + 0.15 * torch.randn(video.shape, generator=generator)).clamp(0, 1)
    if kind == "night":  # a style that the teacher never saw: a dark background
        chroma = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).clamp(max=0.2) / 0.2
        return chroma * video + (1 - chroma) * 0.1
    raise ValueError(f"kind {kind!r} of unreliable videos is unknown")


def sampler_of(row, folder, device="cpu"):
    """`sampler(noise, text, generator)` of a row, with the student or teacher in `folder`."""
    model = WanModel.from_pretrained(folder, torch.float32, device).eval()
    config, interpolator = load_config(folder), None
    if "steps" in row:
        null_text = ToyCodec().encode_text([row.get("null_prompt", "")]).to(device)
        return lambda noise, text, generator: adavid.sample_teacher(
            model, noise, text, null_text, row["steps"], config.guidance_scale)
    if "strides" in row:
        config = replace(config, strides=tuple(row["strides"]))
    if max(config.strides) > 1:
        interpolator = (plain_mean if row.get("interpolator") == "mean"
                        else load_interpolator(folder, "cpu").to(device))

    def renumbered(x, t, text, frame_stride=1):
        return model(x, t, text)

    return lambda noise, text, generator: adavid.sample(
        renumbered if row.get("renumbered") else model, noise, text, config, interpolator,
        generator)


def plain_mean(x0):
    """The mean of two neighbours as the frame between them."""
    residual = torch.zeros_like(x0[:, :, 1:])
    return kernels.interpolate_frames(x0, residual[:, :1] + 0.5, residual)


def measure(conditions, name, folder, seed):
    """A row's measurement: what the oracle reads from its videos, and what they cost."""
    row, codec, eval_seed = conditions["rows"][name], ToyCodec(), conditions["prompt_seed"] + seed
    real, prompts = world.make(eval_seed, range(conditions["prompts"]))
    video, seconds, flops, text = real, 0.0, 0.0, codec.encode_text(prompts)
    if row.get("sampler") != "real":
        start = time.perf_counter()
        video = codec.decode(torch.cat(list(sample_batches(
            sampler_of(row, folder), text, codec.latent_shape(), eval_seed << 16, batch_size=64))))
        seconds = (time.perf_counter() - start) / len(video)
        with torch.device("meta"):
            one, words = torch.empty(1, *codec.latent_shape()), torch.empty(1, *text.shape[1:])
        flops, *_ = costs.count(lambda: sampler_of(row, folder, "meta")(one, words, None))
    scores = world.score(video, prompts)
    line = {"row": name, "seed": seed, "definition": definition(conditions, name),
            "scores": {key: rounded(scores[key]) for key in (
                "instance", "prompt", "dynamic", "direction", "speed", "saturation", "flicker")},
            "ground": world.read(video)["ground"].mean().item(),
            "diversity": world.diversity(video, real), "frechet": frechet(video, real),
            "gflops": flops / 1e9, "seconds": seconds}
    if "student" in row:
        log = [json.loads(step) for step in open(folder / "metrics.jsonl")]
        line["training"] = {key: float(np.mean(values)) for key in COLUMNS
                            if (values := [s[key] for s in log if s.get(key) is not None])}
        line["weights"] = weights(folder, log[-1], real, text)
    if seed == conditions["seeds"][0] and name in conditions["questions"][0]["rows"]:
        line["videos"] = [page.moving_picture(video[i]) for i in page.shown(prompts)]
    return line


def weights(folder, log, real, text):
    """The mean weight at each step that a finished student gives to each kind of real videos."""
    config, codec, result = load_config(folder), ToyCodec(), {}
    if not config.lambda_reg:
        return result
    student = WanModel.from_pretrained(folder, torch.float32)
    for kind in ("reliable", *KINDS):
        video = real if kind == "reliable" else spoil(kind, real, make_generator(0, kind))
        result[kind] = []
        for i, timestep in enumerate(config.timesteps):
            with torch.no_grad():
                loss = adavid.regression_loss(
                    student, codec.encode(video), text, torch.full((len(video),), i), config,
                    generator=torch.Generator().manual_seed(i))
            deviation = loss - log[f"cache_{timestep:g}"]
            result[kind].append((1 - torch.sigmoid(config.k * deviation)).mean().item())  # eq. 7
    return result


def rounded(values):
    return [None if v != v else int(v) if v == int(v) else round(v, 4) for v in values.tolist()]


def frechet(video, real):
    """The Fréchet distance between normal distributions of the oracle's readings, each in units of
    its spread over real videos."""
    (mean, cov), (real_mean, real_cov) = (moments(v, real) for v in (video, real))
    product = torch.linalg.eigvals(cov @ real_cov).real.clamp(min=0).sqrt().sum()
    return ((mean - real_mean).square().sum() + cov.trace() + real_cov.trace()
            - 2 * product).item()


def moments(video, real):
    ours, theirs = (torch.stack([world.read(v)[name] for name in READINGS], 1).double()
                    for v in (video, real))
    ours = (ours - theirs.mean(0)) / theirs.std(0)
    return ours.mean(0), ours.T.cov()


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------


class Measurements:
    """The measurements of a conditions file: means and paired differences with 95% intervals.

    Intervals are bootstrapped over seeds and, within each seed, over prompts, so they cover the
    luck of a training seed as well. All rows share the draws, which pairs their differences.
    """

    def __init__(self, conditions, file):
        self.conditions, self.file = conditions, file
        lines = map(json.loads, open(file)) if file.is_file() else ()
        self.lines = {(line["row"], line["seed"]): line for line in lines}

    def save(self, lines):
        """Add these, or replace older ones. A kill at any moment leaves a whole file."""
        self.lines |= {(line["row"], line["seed"]): line for line in lines}
        part = self.file.with_suffix(".part")
        with open(part, "w") as file:
            for line in self.lines.values():
                print(json.dumps(line, separators=(",", ":")), file=file)
        os.replace(part, self.file)

    def line(self, row, seed):
        """A measurement, or None if it was not yet made under these conditions."""
        line = self.lines.get((row, seed))
        return line if line and line["definition"] == definition(self.conditions, row) else None

    def of_row(self, row):
        return [self.line(row, seed) for seed in seeds_of(self.conditions, row)]

    def has(self, rows):
        """Whether all seeds of these rows are measured."""
        return not any(None in self.of_row(row) for row in rows)

    def title(self, *rows):
        return " − ".join(self.conditions["rows"][row]["title"] for row in rows)

    def values(self, row, column):
        """`[seeds, prompts]`, NaN where a prompt says nothing about the column."""
        lines = [line | line.get("training", {}) for line in self.of_row(row)]
        if column in lines[0]:  # one number for all prompts
            return np.array([[line[column]] * self.conditions["prompts"] for line in lines])
        reading, _, which = column.replace("motion", "speed").partition("_")
        values, direction = (np.array([line["scores"][name] for line in lines], dtype=float)
                             for name in (reading, "direction"))
        if which:
            values[np.isnan(direction) != (which == "open")] = np.nan
        return values

    def shares(self, row, column):
        """`values`, divided by the real data's mean where the column says so."""
        values = self.values(row, column)
        return values / np.nanmean(self.values("real", column)) if COLUMNS[column][1] else values

    def interval(self, column, row, other=None):
        """Mean and 95% interval of a row, or of its difference from another row."""
        values = self.shares(row, column)
        if other:
            others = self.shares(other, column)
            seeds = min(len(values), len(others))
            values = values[:seeds] - others[:seeds]
        valid, drawn = ~np.isnan(values), draws(*values.shape)
        sums, counts = (np.einsum("dsp,sp->d", drawn, v.astype(np.float32))
                        for v in (np.where(valid, values, 0), valid))
        means = sums[counts > 0] / counts[counts > 0]
        return (np.nanmean(values), *np.quantile(means, [0.025, 0.975]))


@functools.cache
def draws(seeds, prompts, number=2000):
    """How often each bootstrap draw takes each seed and prompt: `[number, seeds, prompts]`."""
    rng = np.random.default_rng(0)
    result = np.zeros((number, seeds, prompts), np.float32)
    for counts in result:
        for seed in rng.integers(seeds, size=seeds):
            counts[seed] += np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
    return result


def said(mean, low, high, sign=""):
    """A mean and half of its interval; the mean alone if nothing varies."""
    half = f" ± {(high - low) / 2:.3f}" if high - low > 1e-3 else ""
    return f"{round(mean, 3) + 0.0:{sign}.3f}{half}"


def table(measured, question):
    """A question's rows, and below them its differences between pairs of rows."""
    lines = [["", *(COLUMNS[column][0] for column in question["columns"])]]
    for rows in [*([row] for row in question["rows"]), *question.get("differences", ())]:
        sign = "+" if len(rows) == 2 else ""
        lines.append([measured.title(*rows), *(said(*measured.interval(column, *rows), sign)
                                               for column in question["columns"])])
    return lines


def told(measured, text):
    """The text, with a number in place of each `{column row}`, and in place of each
    `{column row other}` how the column changes from the other row to this one."""
    def phrase(match):
        column, row, *other = match[1].split()
        mean, low, high = measured.interval(column, row, *other)
        if not other:
            return said(mean, low, high)
        if low <= 0 <= high or not round(mean, 3):
            change = f"does not change measurably ({said(mean, low, high, '+')})"
        else:
            change = f"{'rises' if mean > 0 else 'falls'} by {said(abs(mean), low, high)}"
        return f"{COLUMNS[column][0]} {change}"

    return re.sub(r"\{(.+?)\}", phrase, text)


def verdicts(measured):
    """A table: each claim whose rows are measured, its verdict, and the tests behind the verdict.

    The first test that holds decides, and all tests up to it are listed. A sign of 0 claims that
    the rows differ by no more than `margin`.
    """
    lines = [["claim", "here", "differences, with 95% intervals"]]
    for claim in measured.conditions["claims"]:
        if not measured.has([test[side] for test in claim["tests"] for side in ("row", "against")]):
            continue
        verdict, shown = "not reproduced", []
        for test in claim["tests"]:
            rows = test["row"], test["against"]
            mean, low, high = measured.interval(test["column"], *rows)
            shown.append(f"{COLUMNS[test['column']][0]}, {measured.title(*rows)}: "
                         f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
            holds = {1: low > 0, -1: high < 0, 0: max(-low, high) <= test.get("margin", 0)}
            if holds[test["sign"]]:
                verdict = f"reproduced when {test['when']}" if "when" in test else "reproduced"
                break
        lines.append([claim["says"], verdict, "; ".join(shown)])
    return lines


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------


def write_pages(args, measured):
    filled = blocks(measured)
    for file in (args.docs.parent / "README.md", args.docs / "results.md"):
        if file.is_file():
            text = page.fill(file.read_text(encoding="utf-8"), filled)
            file.write_text(text, encoding="utf-8")
    main, *others = answered(measured)
    draw(measured, main).savefig(args.docs / "figures" / "ablation.png", dpi=110)
    conditions, file = measured.conditions, args.docs / "results.html"
    first = conditions["seeds"][0]
    _, prompts = world.make(conditions["prompt_seed"] + first, range(conditions["prompts"]))
    videos = zip(*(measured.line(row, first)["videos"] for row in main["rows"]))
    file.write_text(page.html("The ablation in the toy world", f"""
<p class=note>Means and half of the 95% interval, over {len(conditions["seeds"])} seeds and
{conditions["prompts"]} prompts. Motion, saturation and flicker are multiples of the real
data's.</p>
{section(measured, main)}
<h2>The paper's claims</h2>{page.table(verdicts(measured), "numbers words")}
<h2>The same prompts, the same noise</h2>
{page.video_table(dict.fromkeys(map(measured.title, main["rows"]), ""),
                  dict(zip((prompts[i] for i in page.shown(prompts)), videos)))}
{"".join(section(measured, question) for question in others)}
<h2>Which weights do finished students give to each kind of real videos?</h2>
{"".join(map(page.table, kinds(measured)))}"""), encoding="utf-8")
    print(f"open {file}")


def blocks(measured):
    """The generated parts of README.md and docs/results.md, by name."""
    questions, claims = answered(measured), verdicts(measured)
    summary = page.markdown(table(measured, measured.conditions["summary"])) + "\n"
    for says, verdict, _ in claims[1:]:
        summary += f"\n- {says}: {verdict.replace('not reproduced', '**not reproduced**')}."
    return {
        "results": summary,
        "table": page.markdown(table(measured, questions[0])),
        "claims": page.markdown(claims),
        "answers": "\n".join(f"- **{question['asks']}** {told(measured, question['answer'])}"
                             for question in questions)}


def answered(measured):
    """The questions whose rows are all measured."""
    return [question for question in measured.conditions["questions"]
            if measured.has(question["rows"])]


def kinds(measured):
    """A table for each of two students: kinds of real videos, and their mean weights."""
    for row in ("avd", "mixed"):
        if row in measured.conditions["rows"] and measured.has([row]):
            weights = [line["weights"] for line in measured.of_row(row)]
            yield [[measured.title(row), *(f"t = {t}" for t in TIMESTEPS)],
                   *([kind, *(f"{w:.2f}" for w in np.mean([w[kind] for w in weights], axis=0))]
                     for kind in weights[0])]


def section(measured, question):
    asks, answer = escape(question["asks"]), escape(told(measured, question["answer"]))
    return (f"<h2>{asks}</h2><p>{answer}</p>{page.table(table(measured, question))}"
            f"{page.chart(draw(measured, question))}")


def draw(measured, question):
    """A panel for each column, with the rows' means and intervals."""
    rows, columns = question["rows"], question["plots"]
    figure = Figure(figsize=(3 + 2.2 * len(columns), 0.6 + 0.28 * len(rows)),
                    layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns):
        for i, row in enumerate(rows):
            mean, low, high = measured.interval(column, row)
            colour = "#3b82d6" if "student" in measured.conditions["rows"][row] else "#8a8f98"
            # Where nothing varies, rounding may put the mean outside its interval.
            error = [[max(0, mean - low)], [max(0, high - mean)]]
            axes.errorbar(mean, i, xerr=error, fmt="o", markersize=4, capsize=2, color=colour)
        axes.set_title(COLUMNS[column][0], loc="left", fontsize="small")
    panels[0].set_yticks(range(len(rows)), map(measured.title, rows))
    panels[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    sys.exit(main())
