"""The paper's ablation in the toy world: train each student, score each sampler, print the table.

    python -m tools.ablation                        all of tools/ablation.toml
    python -m tools.ablation --quick                one seed, 64 prompts, the main rows
    python -m tools.ablation --conditions mine.toml --results runs/mine

A job is one student with one seed: `train.py distill`, with the flags that the conditions say, on
one thread; as many jobs as there are cores run side by side. Then each row of that student draws
the same prompts from the same noise, and the oracle reads the videos. A row and seed leave one
JSON file; what is there is not done again, and Ctrl-C loses no finished step.
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
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import adavid
import kernels
import train
from sample import sample_batches
from runtime.models import load_config, load_interpolator
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world
from runtime import cli
from tools import plan, report
from runtime.data import INDEX
from runtime.run import make_generator

CONDITIONS = Path(__file__).with_suffix(".toml")
RESULTS = Path(__file__).parents[1] / "docs" / "ablation"
DATA_SEED = 5000  # + seed: real videos that are made beforehand, some of them spoilt
KINDS = ("mislabelled", "cut", "frozen", "noisy", "night")  # of unreliable videos
READINGS = ("x", "y", "vx", "vy", "red", "green", "blue", "size")  # of the Frechet distance


@dataclass
class Ablation:
    """Train and score the rows of a conditions file; go on where an earlier call stopped."""

    conditions: Path = CONDITIONS
    """what to train and how to sample it, with which seeds"""
    results: Path = RESULTS
    """folder of the measurements, a file for each row and seed"""
    out: Path = Path("runs/ablation")
    """folder of the students"""
    rows: tuple[str, ...] = ()
    """only these; by default all"""
    quick: bool = False
    """one seed, 64 prompts and the main rows alone, in runs/ablation-quick"""


def main(argv=None):
    return cli.run(run, Ablation, argv)


def run(args):
    conditions = read_conditions(args.conditions)
    rows = args.rows or tuple(conditions["rows"])
    if unknown := set(rows) - set(conditions["rows"]):
        raise ValueError(f"--rows {unknown.pop()}: there is no such row in {args.conditions}")
    if args.quick:
        conditions |= {"seeds": conditions["seeds"][:1], "prompts": 64}
        rows = conditions["questions"][0]["rows"]
        args.results = args.out = Path("runs/ablation-quick")

    jobs = {}
    for seed in conditions["seeds"]:
        for name in rows:
            if seed in seeds_of(conditions, name) and read_result(
                    args.results, conditions, name, seed) is None:
                student = conditions["rows"][name].get("student", "")
                jobs.setdefault((student, seed), []).append(name)
    for folder in (args.results, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    failures = []
    if jobs:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        workers = min(os.cpu_count(), len(jobs))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                                 torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(job, args, conditions, *key, names)
                       for key, names in jobs.items()]
            try:
                for future in tqdm(as_completed(futures), "ablation", len(futures), unit="job"):
                    if error := future.exception():
                        failures.append(str(error))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.terminate()  # train.py saves
                raise
    if failures:
        raise ValueError(f"{len(failures)} of {len(jobs)} jobs failed; the first: {failures[0]}")
    measured = Measurements(conditions, args.results)
    print(markdown(cells(measured, [row for row in rows if measured.has([row])], COLUMNS)))


# ---------------------------------------------------------------------------------------------
# Conditions
# ---------------------------------------------------------------------------------------------


def read_conditions(file):
    """What the file says. ValueError where a random stream would be used for two purposes."""
    try:
        conditions = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from None
    seeds = conditions["seeds"]
    ours = [seed + shift for seed in seeds for shift in (0, DATA_SEED, conditions["prompt_seed"])]
    shown = [train.GRID_SEED, report.DEMO_SEED]
    if len({*ours, *shown, *conditions["development"]}) < len(ours) + len(shown) + len(
            conditions["development"]):
        raise ValueError(f"{file}: training, development and evaluation share a random stream")
    return conditions


def seeds_of(conditions, name):
    """All seeds, or the first ones where a row says how many."""
    return conditions["seeds"][:conditions["rows"][name].get("seeds", len(conditions["seeds"]))]


def definition(conditions, name):
    """All that decides a row's numbers, but for the seed."""
    row = dict(conditions["rows"][name])
    student = conditions["students"].get(row.get("student"), {})
    data = conditions["data"].get(student.get("data"), {})
    kept = {key: conditions[key] for key in ("prompts", "prompt_seed", "flags")}
    return kept | {"row": {k: v for k, v in row.items() if k not in ("title", "seeds")},
                   "student": student, "data": data}


def read_result(folder, conditions, name, seed):
    """A row's measurement, or None where it is still to be made under these conditions."""
    file = folder / f"{name}-{seed}.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    return result if result["definition"] == definition(conditions, name) else None


# ---------------------------------------------------------------------------------------------
# A job: a student's training and its rows
# ---------------------------------------------------------------------------------------------


def job(args, conditions, student, seed, rows):
    """In a process of its own."""
    folder = distil(args, conditions, student, seed) if student else WEIGHTS
    for name in rows:
        result = {"definition": definition(conditions, name), "seed": seed}
        result |= measure(args, conditions, name, folder, seed)
        file = args.results / f"{name}-{seed}.json"
        file.with_suffix(".part").write_text(json.dumps(result))
        os.replace(file.with_suffix(".part"), file)


def distil(args, conditions, name, seed):
    """The folder of a student. ValueError with its last words if the training fails."""
    student = conditions["students"][name]
    out = args.out / f"{name}-{seed}"
    argv = ["distill", "--out", str(out), "--seed", str(seed), "--device", "cpu",
            *shlex.split(conditions["flags"]), *shlex.split(student.get("flags", ""))]
    if "data" in student:
        data = args.out / f"data-{student['data']}-{seed}"
        if not (data / INDEX).is_file():
            write_shards(data, seed, **conditions["data"][student["data"]])
        argv += ["--data", str(data), "--gradient-checkpointing", "False"]
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, open(out / "log.txt", "w") as log:
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        for function in student.get("replace", ()):
            stack.enter_context(mock.patch.object(adavid, function, REPLACEMENTS[function]))
        code = train.main(argv)
    if code:
        raise ValueError(f"{out}: {(out / 'log.txt').read_text().splitlines()[-1]}")
    return out


def relative_temporal_loss(x0, eps=1e-6, truncation=None):
    """L_temp on the variance in time as a share of that in space, as contrast is no motion.

    Contrast gives no gradient; the truncation is the level of real videos, like the original's.
    """
    contrast = x0.float().var(dim=(3, 4), correction=0).mean(dim=(1, 2)).detach()
    loss = -torch.log(kernels.temporal_variance(x0) / contrast + eps)
    if truncation is not None:
        loss = torch.where(loss <= truncation, 0.0, loss)
    return loss.mean()


REPLACEMENTS = {"temporal_loss": relative_temporal_loss}


# ---------------------------------------------------------------------------------------------
# Real videos that are not all reliable
# ---------------------------------------------------------------------------------------------


def write_shards(folder, seed, count, share=0.0, kinds=(), null_prompt=""):
    """Toy videos, a share of them spoilt in one of the kinds, as tools.encode writes them."""
    codec = ToyCodec()
    video, prompts = world.make(DATA_SEED + seed, range(count))
    u = torch.rand(count, generator=make_generator(seed, "spoil"))
    for i, kind in enumerate(kinds):
        chosen = (u >= share * i / len(kinds)) & (u < share * (i + 1) / len(kinds))
        video[chosen] = spoil(kind, video[chosen], make_generator(seed, kind))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": codec.encode(video).half(), "text": codec.encode_text(prompts)}
    save_file(tensors, folder / "shard.safetensors", {"prompts": json.dumps(prompts)})
    save_file({"null_text": codec.encode_text([null_prompt])}, folder / "null_text.safetensors")
    (folder / INDEX).write_text(json.dumps({
        "latent_shape": codec.latent_shape(), "has_videos": True,
        "shards": [{"file": "shard.safetensors", "count": count}]}))


def spoil(kind, video, generator):
    """Real videos `[b, 3, f, h, w]` made unreliable, while their prompts stay."""
    others = video.roll(1, dims=0)
    if kind == "mislabelled":
        return others
    if kind == "cut":  # to another shot
        return torch.cat([video[:, :, :5], others[:, :, 5:]], dim=2)
    if kind == "frozen":
        return video[:, :, 4:5].expand_as(video)
    if kind == "noisy":
        return (video + 0.15 * torch.randn(video.shape, generator=generator)).clamp(0, 1)
    if kind == "night":  # another style, which the teacher never saw: the background is dark
        ground = video.amin(dim=(1, 3, 4), keepdim=True)
        chroma = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).clamp(max=0.2) / 0.2
        return chroma * video + (1 - chroma) * 0.1
    raise ValueError(f"kind {kind!r} of unreliable videos is unknown")


# ---------------------------------------------------------------------------------------------
# A row: sampling and scoring
# ---------------------------------------------------------------------------------------------


def sampler_of(row, folder, device="cpu"):
    """`sampler(noise, text, generator)` of a row, whose student or teacher is in `folder`."""
    model = WanModel.from_pretrained(folder, torch.float32, device).eval()
    config, interpolator = load_config(folder), None
    null_text = ToyCodec().encode_text([row.get("null_prompt", "")]).to(device)
    if "steps" in row:
        return lambda noise, text, generator: adavid.sample_teacher(
            model, noise, text, null_text, row["steps"],
            row.get("guidance", config.guidance_scale))
    if "strides" in row:
        config = replace(config, strides=tuple(row["strides"]))
    if max(config.strides) > 1:
        interpolator = (plain_mean if row.get("interpolator") == "mean"
                        else load_interpolator(folder, "cpu").to(device))
    if row.get("renumbered"):
        full, model = model, lambda x, t, text, frame_stride=1: full(x, t, text)
    return lambda noise, text, generator: adavid.sample(
        model, noise, text, config, interpolator, generator)


def plain_mean(x0):
    """The frame between two neighbours, without an interpolator's help."""
    residual = torch.zeros_like(x0[:, :, 1:])
    return kernels.interpolate_frames(x0, residual[:, :1] + 0.5, residual)


def measure(args, conditions, name, folder, seed):
    """What the oracle reads off a row's videos, and what they cost."""
    row, codec = conditions["rows"][name], ToyCodec()
    real, prompts = world.make(conditions["prompt_seed"] + seed, range(conditions["prompts"]))
    video, seconds, flops = real, 0.0, 0.0
    if row.get("sampler") != "real":
        text, start = codec.encode_text(prompts), time.perf_counter()
        batches = sample_batches(sampler_of(row, folder), text, codec.latent_shape(),
                                 (conditions["prompt_seed"] + seed) << 16, batch_size=64)
        video = codec.decode(torch.cat(list(batches)))
        seconds = (time.perf_counter() - start) / len(video)
        with torch.device("meta"):
            one, words = torch.empty(1, *codec.latent_shape()), torch.empty(1, *text.shape[1:])
        flops = plan.count(lambda: sampler_of(row, folder, "meta")(one, words, None))[0]
    scores = world.score(video, prompts)
    save_file({"video": (255 * video[:64]).round().byte()}, args.out / f"{name}-{seed}.safetensors",
              {"prompts": json.dumps(prompts[:64])})
    result = {"scores": {key: rounded(value) for key, value in scores.items()},
              "ground": world.read(video)["ground"].mean().item(),
              "diversity": world.diversity(video, real), "frechet": frechet(video, real),
              "gflops": flops / 1e9, "seconds": seconds}
    if "student" in row:
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        result["training"] = {
            key: float(np.mean([line[key] for line in lines if key in line]))
            for key in sorted({key for line in lines for key in line})
            if key.startswith(("reg", "weight", "variance", "data_variance"))}
        result["weights"] = weights(folder, lines[-1], real, text)
    return result


def weights(folder, log, real, text):
    """How the finished student and its cache would weigh the real videos, and spoilt ones."""
    codec, config = ToyCodec(), load_config(folder)
    if f"cache_{config.timesteps[0]:g}" not in log:
        return {}
    student, result = WanModel.from_pretrained(folder, torch.float32), {}
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k)
    readings = world.read(real)
    hardness = {"speed": readings["vx"].hypot(readings["vy"]), "saturation": readings["saturation"]}
    for kind in ("reliable", *KINDS):
        video = real if kind == "reliable" else spoil(kind, real, make_generator(0, kind))
        result[kind] = {"loss": [], "weight": []}
        for i in range(len(config.timesteps)):
            step = torch.full((len(video),), i)
            with torch.no_grad():
                loss = adavid.regression_loss(student, codec.encode(video), text, step, config,
                                              generator=torch.Generator().manual_seed(i))
            cache.means[i], cache.filled[i] = log[f"cache_{config.timesteps[i]:g}"], True
            weight = cache(step, loss)
            result[kind]["loss"].append(loss.mean().item())
            result[kind]["weight"].append(weight.mean().item())
            if kind == "reliable":
                for name, values in hardness.items():
                    fifths = weight[values.argsort()].tensor_split(5)
                    result.setdefault(name, []).append([w.mean().item() for w in fifths])
    return result


def rounded(values):
    return [None if value != value else round(value, 4) for value in values.tolist()]


def frechet(video, real):
    """Frechet distance between normal distributions of the oracle's readings, in units of the real
    ones' spreads."""
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

COLUMNS = {  # how each is called, and whether it is a share of real data's
    "instance": ("instance", False), "prompt": ("prompt", False),
    "dynamic_named": ("dynamic, named", False), "dynamic_open": ("dynamic, open", False),
    "motion": ("motion", True), "motion_open": ("motion, open", True),
    "saturation": ("saturation", True), "flicker": ("flicker", True),
    "ground": ("background", False),
    "diversity": ("diversity", False), "frechet": ("Fréchet", False),
    "gflops": ("GFLOPs", False), "seconds": ("seconds", False)}


class Measurements:
    """All results of a conditions file, for means and paired differences with 95% intervals.

    Intervals are bootstrapped over seeds and, within each, over prompts: a student's luck with its
    seed counts, not only the prompts'. Every row is drawn with the same ones, so that differences
    between rows are paired.
    """

    def __init__(self, conditions, folder, draws=2000):
        self.conditions, self.folder, self.draws = conditions, folder, draws
        self.counts, self.results = map(functools.cache, (self.counts, self.results))

    def counts(self, seeds):
        """How often each draw takes each seed and prompt: `[draws, seeds, prompts]`."""
        rng, prompts = np.random.default_rng(0), self.conditions["prompts"]
        result = np.zeros((self.draws, seeds, prompts), np.float32)
        for counts in result:
            for seed in rng.integers(seeds, size=seeds):
                counts[seed] += np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
        return result

    def results(self, row):
        return [read_result(self.folder, self.conditions, row, seed)
                for seed in seeds_of(self.conditions, row)]

    def has(self, rows):
        """Whether all seeds of these rows are measured."""
        return not any(None in self.results(row) for row in rows)

    def values(self, row, column):
        """`[seeds, prompts]`, NaN where a prompt says nothing about the column."""
        results = self.results(row)
        if column in results[0]:  # a number for all prompts together
            return np.array([[r[column]] * self.conditions["prompts"] for r in results])
        reading, _, which = column.replace("motion", "speed").partition("_")
        values, direction = (np.array([r["scores"][name] for r in results], dtype=float)
                             for name in (reading, "direction"))
        if which:
            values[np.isnan(direction) != (which == "open")] = np.nan
        return values

    def shares(self, row, column):
        """`values`, of real data's mean where the column says so."""
        values = self.values(row, column)
        return values / np.nanmean(self.values("real", column)) if COLUMNS[column][1] else values

    def interval(self, values):
        """Mean and 95% interval of `values`, which may be a difference of two rows'."""
        valid = ~np.isnan(values)
        sums, counts = (np.einsum("dsp,sp->d", self.counts(len(values)), v.astype(np.float32))
                        for v in (np.where(valid, values, 0), valid))
        means = sums[counts > 0] / counts[counts > 0]
        return (np.nanmean(values), *np.quantile(means, [0.025, 0.975]))

    def of(self, row, column):
        return self.interval(self.shares(row, column))

    def difference(self, row, other, column):
        pair = self.shares(row, column), self.shares(other, column)
        seeds = min(map(len, pair))
        return self.interval(pair[0][:seeds] - pair[1][:seeds])


def title(measured, row):
    return measured.conditions["rows"][row]["title"]


def said(mean, low, high, sign=""):
    """A mean and half of its interval; without that where nothing varies."""
    half = f" ± {(high - low) / 2:.3f}" if high - low > 1e-3 else ""
    return f"{round(mean, 3) + 0.0:{sign}.3f}{half}"


def number(measured, column, row, other=None):
    """What a row has in a column, or by how much it differs from another row."""
    if other is None:
        return said(*measured.of(row, column))
    return said(*measured.difference(row, other, column), "+")


def cells(measured, rows, columns, differences=()):
    """A table's lines, heads first; `differences` of pairs of rows come last."""
    shown = [*([row] for row in rows), *differences]
    return [["", *(COLUMNS[column][0] for column in columns)],
            *([" − ".join(title(measured, row) for row in which),
               *(number(measured, column, *which) for column in columns)] for which in shown)]


def told(measured, text):
    """The text, with numbers in place of each `{column row}` and `{column row other}`."""
    return re.sub(r"\{(.+?)\}", lambda match: number(measured, *match[1].split()), text)


def verdicts(measured):
    """A line for each claim of the paper whose rows are measured: does it hold here, and by what?

    `tests` stand in the order of closeness to the paper; the first that holds decides, and all up
    to it are shown. A sign of 0 claims that rows differ by no more than `margin`.
    """
    lines = [["claim", "here", "differences, with 95% intervals"]]
    for claim in measured.conditions["claims"]:
        if not measured.has([test[side] for test in claim["tests"] for side in ("row", "against")]):
            continue
        verdict, shown = "not reproduced", []
        for test in claim["tests"]:
            mean, low, high = measured.difference(test["row"], test["against"], test["column"])
            names = " − ".join(title(measured, test[side]) for side in ("row", "against"))
            shown.append(f"{COLUMNS[test['column']][0]}, {names}: "
                         f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
            holds = {1: low > 0, -1: high < 0, 0: max(-low, high) <= test.get("margin", 0)}
            if holds[test["sign"]]:
                verdict = f"reproduced when {test['when']}" if "when" in test else "reproduced"
                break
        lines.append([claim["says"], verdict, "; ".join(shown)])
    return lines


def markdown(lines):
    heads, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([heads, "|---" * len(lines[0]) + "|", *rest])


if __name__ == "__main__":
    sys.exit(main())
