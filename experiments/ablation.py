"""The paper's ablation in the toy world: train students, score samplers, write the results.

    python -m experiments.ablation            all of ablation.toml: six hours on two cores
    python -m experiments.ablation --quick    one seed, 64 prompts, the main rows only
    python -m experiments.ablation --row avd  one row with the first seed, beside its measurement

A job trains one student with one seed, on one thread in its own process. Then each row that uses
this student draws the same prompts from the same noise, and the oracle scores the videos. Each row
and seed is one line of docs/measurements.jsonl.gz. The command runs only the jobs that are missing
there, so it can be stopped with Ctrl-C and started again. At the end, or with `--pages`, it writes
figures, and the generated parts of README.md, docs/results.md and docs/costs.md.
"""

import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import tomllib
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tqdm import tqdm

import adavid
import train
from adavid import LossMeanCache
from experiments import baselines
from runtime import cli, lora, page
from runtime.data import INDEX, write_toy_shards
from runtime.models import load_config, load_interpolator
from runtime.run import make_generator
from sample import sample_batches
from tiny_wan import PRESETS, WEIGHTS, ToyCodec, WanModel, checkpoint, world
from tools.costs import count_flops

CONDITIONS = Path(__file__).with_suffix(".toml")
DOCS = Path(__file__).parents[1] / "docs"
DATA_SEED = 5000  # + seed: of real videos in shards
KINDS = ("mislabelled", "cut", "frozen", "noisy", "night")  # of unreliable real videos
READINGS = ("x", "y", "vx", "vy", "red", "green", "blue", "size")  # of the Fréchet distance
TIMESTEPS = [f"{t:g}" for t in adavid.AVDConfig.timesteps]
SCORES = {"motion": "speed", "motion_open": "open_speed"}  # their names in the oracle's scores
DIGITS = {"steps": 0, "forwards": 0, "cycles": 0, "memory": 0, "per_cycle": 1}  # others have 3
RELATIVE = ("motion", "motion_open", "saturation", "flicker")  # to the real data's mean
COLUMNS = {
    "instance": "instance preservation", "prompt": "prompt accuracy", "motion": "motion",
    "motion_open": "motion of open balls", "saturation": "saturation", "flicker": "flicker",
    **{failure: failure for failure in world.FAILURES},
    "ground": "background brightness", "diversity": "diversity", "frechet": "Fréchet distance",
    "steps": "steps", "gflops": "GFLOPs for a video", "forwards": "forwards to train",
    "cycles": "cycles", "per_cycle": "forwards in a cycle", "memory": "GB to train 1.3B",
    "seconds": "seconds",
    **{f"reg_std_{t}": f"spread of losses at t = {t}" for t in TIMESTEPS},
    **{f"weight_{t}": f"mean weight at t = {t}" for t in TIMESTEPS}}


@dataclass
class Ablation:
    """Train and score what is missing of the ablation, then write its tables and pages."""

    conditions: Path = CONDITIONS
    """what to train and how to sample it, with which seeds"""
    docs: Path = DOCS
    """folder for measurements.jsonl.gz and figures/; the generated parts of results.md and costs.md
    there and of README.md beside the folder are replaced, if these files exist"""
    out: Path = Path("runs/ablation")
    """folder for the students"""
    quick: bool = False
    """one seed, 64 prompts and the main rows only, all in runs/ablation-quick"""
    row: str | None = None
    """measure this row with the first seed once more, and print it beside the first measurement"""
    pages: bool = False
    """measure nothing, and write the pages of what has been measured"""


def main(argv=None):
    return cli.run(run, Ablation, argv)


def run(args):
    if args.quick:
        args.docs = args.out = Path("runs/ablation-quick")
    for folder in (args.docs / "figures", args.out):
        folder.mkdir(parents=True, exist_ok=True)
    conditions = read_conditions(args.conditions, args.quick)
    measured = Measurements(conditions, args.docs / "measurements.jsonl.gz")
    if args.row:
        return measure_again(args, measured)
    jobs = missing(conditions, measured)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    if jobs and not args.pages:
        # A job has a process of its own. An error or Ctrl-C terminates all; then train.py saves.
        method = "forkserver" if sys.platform == "linux" else "spawn"  # elsewhere fork is not safe
        processes = multiprocessing.get_context(method)
        # PyTorch takes seconds to import, and dynamo, which its optimizers need, another one.
        processes.set_forkserver_preload(["experiments.ablation", "torch._dynamo"])
        pool = processes.Pool(min(os.cpu_count(), len(jobs)), start_process, maxtasksperchild=1)
        starts = {student["init"] for student in conditions["students"].values()
                  if "init" in student}  # are trained before what starts from them
        with pool, tqdm(desc="ablation", total=len(jobs), unit="job") as bar:
            for first in (True, False):
                some = [item for item in jobs.items() if (item[0][0] in starts) == first]
                for lines in pool.imap_unordered(functools.partial(job, args.out, conditions),
                                                 some):
                    measured.save(lines)
                    bar.update()
    write_pages(args, measured.finished())


def missing(conditions, measured):
    """What is to be measured: the rows of each student and seed."""
    jobs = defaultdict(list)
    for name, row in conditions["rows"].items():
        for seed in row["seeds"]:
            if (name, seed) not in measured.lines:
                jobs[row.get("student"), seed].append(name)
    for name, seed in list(jobs):
        if init := conditions["students"].get(name, {}).get("init"):
            jobs[init, seed]  # is trained even if its own rows are measured
    return jobs


def measure_again(args, measured):
    """Measure a row with the first seed once more, and print it beside the first measurement."""
    conditions = measured.conditions
    if args.row not in conditions["rows"]:
        raise ValueError(f"--row {args.row}: {args.conditions} has the rows "
                         f"{', '.join(conditions['rows'])}")
    seed = conditions["rows"][args.row]["seeds"][0]
    torch.set_num_threads(1)  # as in the first measurement
    name = conditions["rows"][args.row].get("student")
    if init := conditions["students"].get(name, {}).get("init"):
        job(args.out, conditions, ((init, seed), []))
    again, = job(args.out, conditions, ((name, seed), [args.row]))
    lines = {"again": again}
    if first := measured.lines.get((args.row, seed)):
        lines["first"] = first
    print(f"{args.row}, seed {seed:<12}", *(f"{title:>8}" for title in lines))
    for column in ("diversity", "frechet", *again["scores"]):
        means = [np.nanmean(np.array(line["scores"].get(column) or line[column], dtype=float))
                 for line in lines.values()]
        print(f"{column:20}", *(f"{mean:8.3f}" for mean in means))


def start_process():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process terminates the others
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------
# Conditions
# ---------------------------------------------------------------------------------------------


def read_conditions(file, quick=False):
    """The contents of the file, in which the regimes' students and rows are in one dictionary each.

    A student also has its regime's flags; a row has a list of its seeds, and the name of the row of
    real videos that it is compared with. ValueError if a random stream would serve two purposes.
    """
    try:
        conditions = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from None
    regimes = conditions["regimes"].values()
    seeds = [seed + shift for regime in regimes for seed in regime["seeds"]
             for shift in (0, DATA_SEED, conditions["prompt_seed"])] + conditions["taken"]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: two of its seeds share a random stream; choose others")
    conditions |= {"students": {}, "rows": {}}
    for regime in regimes:
        for name, student in regime["students"].items():
            flags = " ".join(filter(None, (student["flags"], regime.get("flags"))))
            conditions["students"][name] = student | {"flags": flags}
        seeds = regime["seeds"][:1] if quick else regime["seeds"]
        real = next(name for name, row in regime["rows"].items() if row.get("sampler") == "real")
        for name, row in regime["rows"].items():  # as many of the first seeds as it says
            conditions["rows"][name] = row | {"seeds": seeds[:row.get("seeds")], "real": real}
    if quick:
        main = conditions["questions"][0]
        conditions |= {
            "prompts": 64, "questions": [main],
            "rows": {row: conditions["rows"][row] for row in main["rows"]},
            "claims": [claim for claim in conditions["claims"] if {
                test[side] for test in claim["tests"] for side in ("row", "against")}
                <= set(main["rows"])]}
    return conditions


def definition(conditions, name):
    """Everything that decides a row's numbers, except the seed."""
    row = conditions["rows"].get(name, {})
    student = conditions["students"].get(row.get("student"), {})
    return {"teacher": teacher_digest(), "prompts": conditions["prompts"],
            "prompt_seed": conditions["prompt_seed"],
            "row": {k: v for k, v in row.items() if k not in ("title", "seeds", "real")},
            "student": {k: v for k, v in student.items() if k != "forwards"},
            "data": conditions["data"].get(student.get("data"), {})}


@functools.cache
def teacher_digest():
    """A new teacher, and with it a new world, makes all measurements outdated."""
    return hashlib.sha256(checkpoint.weight_files(WEIGHTS)[0].read_bytes()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# A job: train a student, then sample and score its rows
# ---------------------------------------------------------------------------------------------


def job(out, conditions, item):
    """Train a student, if there is one to train. The measurements of its rows.

    ValueError with the last line of the training's log if it fails.
    """
    (name, seed), rows = item
    folder = out / f"{name}-{seed}" if name else WEIGHTS
    if name:
        student = conditions["students"][name]
        program = baselines if "method" in student else train
        argv = [student.get("method", "distill"), "--out", str(folder), "--seed", str(seed),
                "--device", "cpu", *shlex.split(student["flags"])]
        if "data" in student:
            shards = out / f"data-{student['data']}-{seed}"
            if not (shards / INDEX).is_file():
                write_shards(shards, seed, **conditions["data"][student["data"]])
            argv += ["--data", str(shards), "--gradient-checkpointing", "False"]
        if "init" in student:
            argv += ["--init-student", str(out / f"{student['init']}-{seed}")]
        if student.get("cache") == "late":
            adavid.LossMeanCache = LateCache  # this process has no other job
        if student.get("critic") == "teacher":
            adavid.distribution_matching_loss = guidance_loss
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
            code = program.main(argv)
        if code:
            raise ValueError(f"{folder}: {(folder / 'log.txt').read_text().splitlines()[-1]}")
        if (adapter := folder / lora.FILE).is_file():  # from here on it is a student like any other
            model = lora.load_merged(WEIGHTS, torch.float32, "cpu", [(adapter, 1.0)])
            model.save_pretrained(folder, metadata=checkpoint.read_metadata(adapter))
    return [measure(conditions, row, folder, seed) for row in rows]


class LateCache(LossMeanCache):
    """No regression at the first step, from pure noise."""

    def weigh(self, step, loss):
        return super().weigh(step, loss) * (step > 0)


def guidance_loss(x0, teacher, critic, *inputs, match=adavid.distribution_matching_loss):
    """The part of L_KL's gradient that comes from guidance (Decoupled DMD, arXiv:2511.22677).

    With s the scale, x_c and x_u the teacher's predictions with and without the prompt, eq. 4's

        x_critic - x_teacher = (x_critic - x_c) - (s - 1) (x_c - x_u)

    is a sum of distribution matching and of guidance. The teacher in the critic's place leaves the
    second.
    """
    return match(x0, teacher, teacher, *inputs)


def write_shards(folder, seed, count, share=0.0, kinds=(), null_prompt=""):
    """Toy videos, of which a share is spoilt, in equal parts of the given kinds."""
    def spoil_share(video):
        part = torch.rand(count, generator=make_generator(seed, "spoil")) / share * len(kinds)
        for i, kind in enumerate(kinds):
            chosen = part.floor() == i
            video[chosen] = spoil(kind, video[chosen], make_generator(seed, kind))
        return video

    write_toy_shards(folder, DATA_SEED + seed, count, spoil_share, null_prompt)


def spoil(kind, video, generator):
    """Make real videos `[b, 3, f, h, w]` unreliable. Their prompts stay the same."""
    others = video.roll(1, dims=0)
    chroma = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).clamp(max=0.2) / 0.2
    return {
        "mislabelled": others,
        "cut": torch.cat([video[:, :, :5], others[:, :, 5:]], dim=2),  # to another shot
        "frozen": video[:, :, 4:5].expand_as(video),
        "noisy": (video + 0.15 * torch.randn(video.shape, generator=generator)).clamp(0, 1),
        "night": chroma * video + (1 - chroma) * 0.1,  # dark, which the teacher never saw
    }[kind]


def sampler_of(row, folder):
    """`sampler(noise, text, generator)` of a row, with the student or teacher in `folder`."""
    model, sample_student, config = baselines.load_student(folder)
    interpolator = load_interpolator(folder, "cpu")
    if "steps" in row:
        null_text = ToyCodec().encode_text([row.get("null_prompt", "")])
        return lambda noise, text, generator: adavid.sample_teacher(
            model, noise, text, null_text, row["steps"], config.guidance_scale)
    if "strides" in row:
        config = replace(config, strides=tuple(row["strides"]),
                         train_strides=config.train_strides[:len(row["strides"])],
                         timesteps=tuple(row.get("timesteps", config.timesteps)))
    if row.get("interpolator") == "mean":  # of the neighbours
        interpolator = lambda x0: F.interpolate(
            x0, (2 * x0.shape[2] - 1, *x0.shape[3:]), mode="trilinear", align_corners=True)

    def renumbered(x, t, text, frame_stride=1):
        return model(x, t, text)

    return lambda noise, text, generator: sample_student(
        renumbered if row.get("renumbered") else model, noise, text, config, interpolator,
        generator)


def measure(conditions, name, folder, seed):
    """A row's measurement: what the oracle reads from its videos, and what they cost."""
    row, codec, eval_seed = conditions["rows"][name], ToyCodec(), conditions["prompt_seed"] + seed
    real, prompts = world.make(eval_seed, range(conditions["prompts"]))
    video, steps, seconds, flops, text = real, 0, 0.0, 0.0, codec.encode_text(prompts)
    if row.get("sampler") != "real":
        start = time.perf_counter()
        video = codec.decode(torch.cat(list(sample_batches(
            sampler_of(row, folder), text, codec.latent_shape(), eval_seed << 16, batch_size=64))))
        seconds = (time.perf_counter() - start) / len(video)
        one = (torch.zeros(1, *shape) for shape in (codec.latent_shape(), (1, codec.text_dim)))
        sampler = sampler_of(row | {"steps": 1} if "steps" in row else row, folder)
        flops = count_flops(lambda: sampler(*one, None)) * row.get("steps", 1)  # of equal cost
        steps = row.get("steps") or len(row.get("timesteps") or
                                        baselines.load_student(folder)[2].timesteps)
    scores = world.score(video, prompts)
    line = {"row": name, "seed": seed, "definition": definition(conditions, name),
            "scores": {key: [compact(v) for v in scores[key].tolist()] for key in (
                "instance", "prompt", "speed", "open_speed", "saturation", "flicker",
                *world.FAILURES)},
            "ground": scores["ground"].mean().item(),
            "diversity": world.diversity(video, real, prompts),
            "frechet": frechet(video, real, prompts),
            "steps": steps, "gflops": flops / 1e9, "seconds": seconds}
    if "student" in row:
        log = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
        line["training"] = {key: float(np.mean(values)) for t in TIMESTEPS
                            for key in (f"reg_std_{t}", f"weight_{t}")
                            if (values := [s[key] for s in log if s.get(key) is not None])}
        student = conditions["students"][row["student"]]
        if line["training"] and "cache" not in student:
            line["weights"] = weights(folder, conditions["prompts"], eval_seed)
    return line


def compact(value):
    """A number as it stands in the measurements: three decimals, and None for NaN."""
    return None if value != value else int(value) if value in (0, 1) else round(value, 3)


@functools.cache  # rows share students
def weights(folder, count, eval_seed):
    """The weights of a finished student: for each kind of real videos, the mean at each step. And
    the correlation of the reliable ones' weights with what the videos show."""
    log = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    real, prompts = world.make(eval_seed, range(count))
    config, codec, text = load_config(folder), ToyCodec(), ToyCodec().encode_text(prompts)
    student, result = WanModel.from_pretrained(folder, torch.float32), {}
    for kind in ("reliable", *KINDS):
        video = real if kind == "reliable" else spoil(kind, real, make_generator(0, kind))
        weight = []
        for i, timestep in enumerate(config.timesteps):
            with torch.no_grad():
                loss = adavid.regression_loss(
                    student, codec.encode(video), text, torch.full((len(video),), i), config,
                    generator=torch.Generator().manual_seed(i))
            deviation = loss - log[f"cache_{timestep:g}"]
            weight.append(1 - torch.sigmoid(config.k * deviation))  # eq. 7
        result[kind] = [w.mean().item() for w in weight]
        if kind == "reliable" and config.k:
            result |= {f"correlation with {name}": [
                torch.corrcoef(torch.stack([w, trait]))[0, 1].item() for w in weight]
                for name, trait in world.traits(real, prompts).items()}
    return result


def frechet(video, real, prompts):
    """The Fréchet distance between normal distributions of the first balls' readings, each in units
    of its spread over real videos."""
    ours, theirs = (torch.stack([read[name][:, 0] for name in READINGS]).double()
                    for read in (world.read(v, prompts) for v in (video, real)))
    mean, std = theirs.mean(1, keepdim=True), theirs.std(1, keepdim=True)
    ours, theirs = (ours - mean) / std, (theirs - mean) / std
    cov, real_cov = ours.cov(), theirs.cov()
    product = torch.linalg.eigvals(cov @ real_cov).real.clamp(min=0).sqrt().sum()
    return (ours.mean(1).square().sum() + (cov + real_cov).trace() - 2 * product).item()


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------


class Measurements:
    """The measurements of a conditions file: means and paired differences with 95% intervals.

    The unit is a training seed, with prompts of its own: its mean over the prompts is one
    observation. Intervals are Student's t over these, so they cover the luck of both.
    """

    def __init__(self, conditions, file):
        self.conditions, self.file = conditions, file
        text = gzip.decompress(file.read_bytes()).decode() if file.is_file() else ""
        lines = map(json.loads, text.splitlines())
        self.lines = {(line["row"], line["seed"]): line for line in lines
                      if line["definition"] == definition(conditions, line["row"])}

    def save(self, lines):
        """Add these lines. A kill at any moment leaves a whole file."""
        self.lines |= {(line["row"], line["seed"]): line for line in lines}
        part = self.file.with_suffix(".part")
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n"
                       for line in self.lines.values())
        part.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same bytes for the same lines
        os.replace(part, self.file)

    def finished(self):
        """These measurements, with the questions and claims for which all is measured."""
        rows = {name for name, row in self.conditions["rows"].items()
                if all((name, seed) in self.lines for seed in row["seeds"])}

        def answered(question):
            return rows.issuperset(question["rows"])

        def tested(claim):
            return rows.issuperset(t[side] for t in claim["tests"] for side in ("row", "against"))

        def drawn(figure):
            return rows.issuperset(row for line in figure["lines"].values() for row in line)

        summary, figures = self.conditions["summary"], self.conditions.get("figures", {})
        tables = {name: entry for name, entry in self.conditions.get("tables", {}).items()
                  if answered(entry)}
        return Measurements(self.conditions | {
            "tables": tables,
            "questions": list(filter(answered, self.conditions["questions"])),
            "claims": list(filter(tested, self.conditions["claims"])),
            "summary": summary | {"rows": [row for row in summary["rows"] if row in rows]},
            "figures": {name: figure for name, figure in figures.items() if drawn(figure)}},
            self.file)

    def of_row(self, row):
        return [self.lines[row, seed] for seed in self.conditions["rows"][row]["seeds"]]

    def title(self, *rows):
        return " − ".join(self.conditions["rows"][row]["title"] for row in rows)

    def values(self, row, column):
        """`[seeds, prompts]`, NaN where a prompt or the whole row says nothing about the column."""
        lines, name = self.of_row(row), SCORES.get(column, column)
        if name in lines[0]["scores"]:
            return np.array([line["scores"][name] for line in lines], dtype=float)
        student = self.conditions["students"].get(self.conditions["rows"][row].get("student"))
        costs = {name: cost(student) if student else 0 for name, cost in TRAINING.items()}
        # These are one number for all prompts.
        numbers = [line | line.get("training", {}) | costs for line in lines]
        return np.array([[line.get(column, np.nan)] * self.conditions["prompts"]
                         for line in numbers])

    def interval(self, column, row, other=None):
        """Mean and 95% interval of a row, or of its difference from another row."""
        values = self.values(row, column)
        if other:
            others = self.values(other, column)
            seeds = min(len(values), len(others))
            values = values[:seeds] - others[:seeds]
        if column in RELATIVE:
            values = values / np.nanmean(self.values(self.conditions["rows"][row]["real"], column))
        empty = np.isnan(values).all()
        return mean_and_interval(values[:, 0] if empty else np.nanmean(values, axis=1))


def training_memory(student):
    """Counted GB to train Wan2.1-1.3B like this, in float32 and without activations.

    There are three models, gradients of one, and two moments of each model that AdamW trains.
    """
    trained = 1 if student.get("method") == "lcm" else 2  # the others have a critic, or two experts
    return 4 * (3 + 1 + 2 * trained) * parameters_of_wan() / 1e9


@functools.cache
def parameters_of_wan():
    with torch.device("meta"):
        return sum(p.numel() for p in WanModel(PRESETS["wan-1.3b"]).parameters())


def cycles(student):
    """The updates of a student."""
    return int(re.search(r"--steps (\d+)", student["flags"])[1])


TRAINING = {  # columns that say what training costs, from a student's conditions
    "forwards": lambda student: student["forwards"], "cycles": cycles,
    "per_cycle": lambda student: student["forwards"] / cycles(student), "memory": training_memory}


# The 97.5% quantile of Student's t, for 1 to 9 degrees of freedom
QUANTILES = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262


def mean_and_interval(values):
    """The mean of one value for each seed, and the ends of its 95% interval by Student's t.

    They are NaN for a single seed.
    """
    mean = np.mean(values)
    if len(values) == 1:
        return mean, np.nan, np.nan
    half = QUANTILES[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return mean, mean - half, mean + half


def said(mean, low, high, sign="", digits=3):
    """A mean and half of its interval; the mean alone if nothing varies, nothing for NaN."""
    if np.isnan(mean):
        return ""
    half = f" ± {(high - low) / 2:.{digits}f}" if high - low > 1e-3 else ""
    return f"{round(mean, digits) + 0.0:{sign}.{digits}f}{half}"


def table(measured, question):
    """A question's rows, and below them its differences between pairs of rows."""
    lines = [["", *(COLUMNS[column] for column in question["columns"])]]
    for rows in [*([row] for row in question["rows"]), *question.get("differences", ())]:
        sign = "+" if len(rows) == 2 else ""
        lines.append([measured.title(*rows), *(
            said(*measured.interval(column, *rows), sign, digits=DIGITS.get(column, 3))
            for column in question["columns"])])
    return lines


def kinds(measured, row):
    """A table: the mean weight that a row's finished students give to each kind of real videos at
    each step, and its correlations; an empty one if none has been measured."""
    weights = [line["weights"] for (name, _), line in measured.lines.items()
               if name == row and "weights" in line]
    title = measured.conditions["rows"].get(row, {}).get("title", "")
    return [[title, *(f"t = {t}" for t in TIMESTEPS)], *(
        [kind, *(f"{w:.2f}" for w in np.mean([w[kind] for w in weights], axis=0))]
        for kind in sorted(weights[0] if weights else (), key=lambda kind: "correlation" in kind))]


def verdicts(measured):
    """A table: each claim, its verdict, and the tests behind the verdict.

    The first test that holds decides, and all tests up to it are listed. If none holds, the paper's
    own decides, which is the first of the claim. The deciding test is listed first. A sign of 0
    claims that the rows differ by at most `margin`.
    """
    lines = [["claim", "here", "differences, with 95% intervals"]]
    for claim in measured.conditions["claims"]:
        verdict, shown = None, []
        for test in claim["tests"]:
            rows = test["row"], test["against"]
            mean, low, high = measured.interval(test["column"], *rows)
            shown.append(f"{COLUMNS[test['column']]}, {measured.title(*rows)}: "
                         f"{mean:+.3f}, interval {low:+.3f} to {high:+.3f}")
            margin = test.get("margin", 0)
            holds = {1: low > 0, -1: high < 0, 0: max(-low, high) <= margin}
            refuted = {1: high < 0, -1: low > 0, 0: max(low, -high) > margin}
            if holds[test["sign"]]:
                shown.insert(0, shown.pop())
                verdict = f"reproduced when {test['when']}" if "when" in test else "reproduced"
                break
            if verdict is None:  # of the paper's own test
                verdict = ("contradicted" if refuted[test["sign"]] else
                           "not reproduced" if test["sign"] else "not decided")
        lines.append([claim["says"], verdict, "; ".join(shown)])
    return lines


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------


def write_pages(args, measured):
    for file in (args.docs.parent / "README.md", args.docs / "results.md", args.docs / "costs.md"):
        if file.is_file():
            page.fill(file, blocks(measured))
    conditions = measured.conditions
    main = conditions["questions"][0]
    print(page.markdown(table(measured, main)))
    draw(measured, main).savefig(args.docs / "figures" / "ablation.png", dpi=110)
    for name, figure in conditions.get("figures", {}).items():
        draw_lines(measured, **figure).savefig(args.docs / "figures" / f"{name}.png", dpi=110)


def blocks(measured):
    """The generated parts of README.md, docs/results.md and docs/costs.md, by name."""
    tables = {"results": measured.conditions["summary"], **measured.conditions.get("tables", {})}
    return {
        "claims": page.markdown(verdicts(measured)),
        "weights": page.markdown(kinds(measured, "avd")),
        "answers": "\n\n".join(
            f"**{question['asks']}** {question.get('answer', '')}".rstrip()
            + f"\n\n{page.markdown(table(measured, question))}"
            for question in measured.conditions["questions"]),
        **{name: page.markdown(table(measured, rows)) for name, rows in tables.items()}}


def draw(measured, question):
    """A panel for each column, with the rows' means and intervals."""
    rows, columns = question["rows"], question["plots"]
    figure = Figure(figsize=(3 + 2.2 * len(columns), 0.6 + 0.28 * len(rows)),
                    layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns):
        mean, low, high = np.array([measured.interval(column, row) for row in rows]).T
        # Where nothing varies, rounding may put the mean outside its interval.
        axes.errorbar(mean, range(len(rows)), xerr=np.abs([mean - low, high - mean]), fmt="o",
                      markersize=4, capsize=2)
        axes.set_title(COLUMNS[column], fontsize="small")
    panels[0].set_yticks(range(len(rows)), map(measured.title, rows))
    panels[0].invert_yaxis()
    return figure


def draw_lines(measured, x, columns, lines):
    """A panel for each column against the column `x`, with a line through the rows of each entry
    of `lines`, from their titles to their names."""
    figure = Figure(figsize=(3.4 * len(columns), 3.6), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns):
        for title, rows in lines.items():
            at = [measured.interval(x, row)[0] for row in rows]
            mean, low, high = np.array([measured.interval(column, row) for row in rows]).T
            axes.errorbar(at, mean, yerr=np.abs([mean - low, high - mean]), marker="o",
                          markersize=4, capsize=2, label=title)
        axes.set(title=COLUMNS[column], xscale="log", xlabel=COLUMNS[x])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


if __name__ == "__main__":
    sys.exit(main())
