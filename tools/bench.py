"""What things cost: counted, which is the same on every machine, and timed, as ratios in one run.

    python -m tools.bench                   all but the long one: eight minutes on two cores
    python -m tools.bench --parts large     WanModel against diffusers, larger: 15 minutes

Each part replaces its own figures in docs/bench.json, and with them the README's tables; the last
line printed is all of that as JSON. The released recipe is its schedule of forwards, written here
on our model: its code is not.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import adavid
import train
from runtime.student import load_interpolator
from tiny_wan import PRESETS, WEIGHTS, ToyCodec, WanConfig, WanModel
from runtime import cli
from tools import costs, plan, report
from tools.ablation import markdown, write_shards

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "bench.json"
PARTS = ("cycle", "model", "sampler", "compiled", "data", "demo", "kernels")
WAN = (16, 21, 60, 104)  # latents of 81 frames at 480 x 832


@dataclass
class Bench:
    """Count and time training, transformer, sampler, kernels, data loading and demo."""

    parts: tuple[str, ...] = PARTS
    """which; there is also `large`"""
    results: Path = RESULTS
    """file of all figures, of which each part replaces its own"""
    readme: Path = ROOT / "README.md"
    """gets the tables"""


def main(argv=None):
    return cli.run(run, Bench, argv)


def run(args):
    if unknown := set(args.parts) - {*PARTS, "large"}:
        raise ValueError(f"--parts {unknown.pop()}: there are {', '.join(PARTS)} and large")
    figures = json.loads(args.results.read_text()) if args.results.is_file() else {}
    for part in args.parts:
        began = time.perf_counter()
        figures[part] = globals()[f"bench_{part}"]()
        figures[part]["seconds"] = time.perf_counter() - began
        print(f"{part}, {figures[part]['seconds']:.0f} s:", json.dumps(figures[part]), flush=True)
        figures["machine"] = machine()
        args.results.write_text(json.dumps(figures, indent=1) + "\n")
    readme = args.readme.read_text(encoding="utf-8")
    args.readme.write_text(report.filled(readme, tables(figures)), encoding="utf-8")
    print(json.dumps(figures))


def machine():
    cpu = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if sys.platform == "linux" else ""
    return (f"{os.cpu_count()} cores of {cpu or platform.machine()}, torch {torch.__version__}, "
            f"{time.strftime('%Y-%m-%d')}")


def in_turn(calls, runs):
    """The median of what each call gives back, by element: of `runs`, after one more.

    One run of each follows the other, so that a busy machine is busy for all.
    """
    results = {name: [] for name in calls}
    for _ in range(runs + 1):
        for name, call in calls.items():
            results[name].append(call())
    return {name: [median(values) for values in zip(*rows[1:])] for name, rows in results.items()}


def seconds(function, *args):
    """How long it takes, as `in_turn` wants it."""
    began = time.perf_counter()
    function(*args)
    return [time.perf_counter() - began]


# ---------------------------------------------------------------------------------------------
# A training cycle
# ---------------------------------------------------------------------------------------------

HALF = (2, 2, 1, 1)
SCHEDULES = {  # what is saved: rollouts end early, critic updates that need none, strides
    "released schedule": (False, 0, (1, 1, 1, 1)),
    "+ rollouts end at the sampled step": (True, 0, (1, 1, 1, 1)),
    "+ the student's videos serve a critic update (default)": (True, 1, (1, 1, 1, 1)),
    "+ they serve all of a cycle's (--one-rollout)": (True, 5, (1, 1, 1, 1)),
    "+ steps at half rate (--train-strides 2 2 1 1)": (True, 5, HALF),
}


def bench_cycle():
    return {"forwards": count_cycles(PRESETS), "toy_seconds": timed_cycles()}


def count_cycles(presets):
    """A cycle under each schedule, in forwards at the full rate, by preset."""
    forwards = {}
    for preset in presets:
        shape = ToyCodec().latent_shape() if preset == "tiny" else WAN
        full, *rest = costs.at_full_depth(PRESETS[preset], lambda config: prices(config, shape))
        forwards[preset] = {name: sum(calls * cost / full for calls, cost in zip(
            calls_of(schedule), (full, *rest))) / 4 for name, schedule in SCHEDULES.items()}
    return forwards


KINDS = [(network, grad) for network in (1, 2, "interpolator") for grad in (False, True)]


class Recorder(torch.nn.Module):
    """Stands in for a model at any frame rate, or for the interpolator, and counts its calls."""

    def __init__(self, calls, interpolates=False):
        super().__init__()
        self.calls, self.interpolates = calls, interpolates
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t=None, text=None, frame_stride=1):
        network = "interpolator" if self.interpolates else frame_stride
        self.calls[network, torch.is_grad_enabled()] += 1
        frames = 2 * x.shape[2] - 1 if self.interpolates else x.shape[2]
        return self.weight * x[:, :, :1].expand(-1, -1, frames, -1, -1)


def calls_of(schedule):
    """How often four cycles run each of KINDS."""
    calls = Counter()
    cycles([Recorder(calls) for _ in range(3)], Recorder(calls, interpolates=True),
           torch.randn(1, 1, 5, 1, 1), torch.randn(1, 1, 1), *schedule)
    return [calls[kind] for kind in KINDS]


def prices(config, shape):
    """FLOPs of a run of each of KINDS, with its backward where it has a gradient.

    Counted on the meta device. Attention is the plain one: to compute its scores again in backward
    is no progress, nor is it to compute blocks again.
    """
    model, (x, text) = costs.build(config), costs.inputs(config, shape, 1)
    with torch.device("meta"):
        interpolator = adavid.FrameInterpolator(shape[0], 32).requires_grad_(False)
        t = torch.empty(1)
    half, counted = x[:, :, ::2], []
    for network, grad in KINDS:
        run = {1: partial(model, x, t, text), 2: partial(model, half, t, text, frame_stride=2),
               "interpolator": partial(interpolator, half.detach().requires_grad_(grad))}[network]
        with costs.Meter() as meter, torch.set_grad_enabled(grad):
            out = run()
            if grad:
                out.sum().backward()
        counted.append(meter.flops)
    return np.array(counted, dtype=float)


def timed_cycles(batch_size=1):
    """Seconds of four cycles of the toy under each schedule, one for each step."""
    models = [WanModel.from_pretrained(WEIGHTS) for _ in range(3)]
    models[1].requires_grad_(False)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-6) for model in models[::2]]
    interpolator = load_interpolator(WEIGHTS, "cpu")
    real = torch.randn(batch_size, *ToyCodec().latent_shape())
    text = ToyCodec().encode_text(["a red ball"] * batch_size)
    times = in_turn({name: partial(seconds, cycles, models, interpolator, real, text, *schedule,
                                   optimizers) for name, schedule in SCHEDULES.items()}, runs=3)
    return {name: all_four / 4 for name, (all_four,) in times.items()}


def cycles(models, interpolator, real, text, ends_early, served, strides, optimizers=()):
    """Four cycles, of a student update and five of the critic: rollouts go to each step in turn."""
    student, teacher, critic = models
    config = adavid.AVDConfig(train_strides=strides)
    cache = adavid.LossMeanCache(len(config.timesteps)).to(real.device)
    interpolator = interpolator if max(strides) > 1 else None
    simulate = adavid.backward_simulation if ends_early else to_the_end
    with mock.patch.object(adavid, "backward_simulation", simulate):
        for step in range(len(config.timesteps)):
            for loss, terms in adavid.student_losses(
                    student, teacher, critic, cache, real, text, text[:1], step, config,
                    interpolator):
                loss.backward()
                x0 = terms.get("x0", real)
            descend(student, optimizers[:1])
            for update in range(config.critic_updates):
                if update >= served:
                    with torch.no_grad():
                        x0 = adavid.backward_simulation(student, torch.randn_like(real), text,
                                                        step, config, interpolator)
                adavid.critic_loss(critic, x0, text, config).backward()
                descend(critic, optimizers[1:])


def descend(model, optimizers):
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def to_the_end(student, noise, text, step, config, *rest,
               backward_simulation=adavid.backward_simulation):
    """A rollout that goes on to the last step, though only the sampled step's video is used."""
    x0 = backward_simulation(student, noise, text, step, config, *rest)
    if left := config.timesteps[step + 1:]:
        with torch.no_grad():
            adavid.few_steps(student, noise, text, left, (1,) * len(left))
    return x0


# ---------------------------------------------------------------------------------------------
# WanModel against diffusers' WanTransformer3DModel, on the same weights
# ---------------------------------------------------------------------------------------------

# Of each: batch, frames, height and width of the latents; and how many runs even out the noise.
SIZES = {"toy": (PRESETS["tiny"], (16, 9, 8, 8), 31)}
LARGE = {
    "dim 512 x 8, 2,000 tokens": (WanConfig(512, 2048, 8, 8), (1, 5, 40, 40), 15),
    "one layer of 1.3B, 8,064 tokens": (WanConfig(1536, 8960, 12, 1), (1, 7, 64, 72), 7),
}
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::_scaled_dot_product", "aten::slow_conv",
            "aten::mkldnn_convolution", "aten::convolution")


def bench_model():
    return {name: compare(*size) for name, size in SIZES.items()}


def bench_large():
    keep_memory()
    return {name: compare(*size) for name, size in LARGE.items()}


def keep_memory():
    """From here on what is freed stays with the process, as GPUs' allocators have it.

    glibc would give tensors above 32 MB back at once, and both models would wait for new pages.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)


def compare(config, shape, runs):
    """Seconds forward, and with backward; share outside products; peak bytes, of each model."""
    from diffusers import WanTransformer3DModel
    ours = WanModel(config).init_weights()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, "diffusers")
        theirs = WanTransformer3DModel.from_pretrained(folder)
    b, *size = shape
    x, t = torch.randn(b, config.in_dim, *size), torch.full((b,), 757.0)
    text = torch.randn(b, config.text_len, config.text_dim)
    forwards = {"ours": lambda: ours(x, t, text),
                "diffusers": lambda: theirs(x, t, text, return_dict=False)[0]}

    def both(forward):
        began = time.perf_counter()
        v = forward()
        middle = time.perf_counter()
        v.square().mean().backward()
        return middle - began, time.perf_counter() - began

    calls = {name: partial(both, forward) for name, forward in forwards.items()}
    times = in_turn(calls, runs)
    return {name: dict(zip(("forward", "both"), times[name])) | profiled(call)
            for name, call in calls.items()}


def profiled(call):
    """The share of a call's time outside matrix products and attention, and its peak of memory.

    A product's bias is part of it. A first call waits for the system to give it memory, for up to
    a fifth of its time, and is left out.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    inside = outside = 0
    for event in profiler.events():
        of = event
        while of and not of.name.startswith(PRODUCTS):
            of = of.cpu_parent
        if of:
            inside += event.self_cpu_time_total
        else:
            outside += event.self_cpu_time_total
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return {"outside": outside / (inside + outside), "peak": peak}


def bench_compiled():
    """Two of the toy's layers under inductor: seconds with backward, and of compiling."""
    torch.compiler.reset()
    config, (b, *size), runs = SIZES["toy"]
    model = WanModel(replace(config, num_layers=2)).init_weights()
    x, t = torch.randn(b, config.in_dim, *size), torch.full((b,), 757.0)
    text = torch.randn(b, config.text_len, config.text_dim)
    forwards = {"eager": model, "inductor": torch.compile(model, fullgraph=True)}
    calls = {name: partial(seconds, lambda forward=forward: forward(x, t, text).sum().backward())
             for name, forward in forwards.items()}
    compiling, = calls["inductor"]()
    return {name: both for name, (both,) in in_turn(calls, runs).items()} | {"compiling": compiling}


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------

# Attention is as large a part of its forward as of 1.3B's at 32,760 tokens: 21 for each channel.
SLICE, SLICE_SHAPE = WanConfig(256, 1496, 2, 3, text_len=86), (16, 21, 32, 32)


def bench_sampler():
    counted = {}
    for preset in ("wan-1.3b", "wan-14b"):
        decoupled, full, *_ = plan.count_samplers(PRESETS[preset], WAN)
        counted[preset] = decoupled / full
    model = WanModel(SLICE).init_weights().requires_grad_(False)
    interpolator = adavid.FrameInterpolator(16, width=32)
    noise, text = torch.randn(1, *SLICE_SHAPE), torch.randn(1, SLICE.text_len, SLICE.text_dim)
    config = adavid.AVDConfig()
    times = in_turn({
        "full rate": partial(seconds, adavid.sample, model, noise, text, config),
        "decoupled": partial(seconds, adavid.sample, model, noise, text, config, interpolator)},
        runs=7)
    x, t, null = noise[:, :, :5], torch.full((1,), 500.0), torch.zeros_like(text)
    both = torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, null])
    pair = in_turn({
        "in sequence": partial(seconds, adavid.guided_velocity, model, x, t, text, null, 5.0),
        "in one batch": partial(seconds, model, *both)}, runs=7)
    return {"counted": counted, "slice_seconds": {name: time for name, (time,) in times.items()},
            "guided_pair_seconds": {name: time for name, (time,) in pair.items()}}


# ---------------------------------------------------------------------------------------------
# Data loading, demo, kernels
# ---------------------------------------------------------------------------------------------


def bench_data():
    """How much of a run over shards waits for data."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        write_shards(Path(folder) / "shards", 0, count=64)
        code = train.main(["distill", "--data", f"{folder}/shards", "--out", f"{folder}/run",
                           "--steps", "6", "--batch-size", "4", "--codec", folder])
        lines = [json.loads(line) for line in open(f"{folder}/run/times.jsonl")] if not code else []
    if code:
        raise ValueError("train.py failed; its words are above")
    return {name: sum(line[name] for line in lines[1:]) for name in ("seconds", "waited")}


def bench_demo():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tools.demo", "--out", folder]
        demo, = seconds(partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL))
    return {"minutes": demo / 60}


def bench_kernels():
    done = subprocess.run([sys.executable, "-m", "kernels.bench"], check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# The README's tables
# ---------------------------------------------------------------------------------------------


def tables(figures):
    """Markdown for each block of the README whose parts were run."""
    blocks = {}
    if "cycle" in figures:
        forwards, times = figures["cycle"]["forwards"], figures["cycle"]["toy_seconds"]
        released, *_ = times.values()
        blocks["bench: cycle"] = markdown([
            ["schedule", "1.3B", "14B", "toy", "toy, timed"],
            *([name, *(f"{forwards[preset][name]:.1f} F" for preset in
                       ("wan-1.3b", "wan-14b", "tiny")), f"{released / times[name]:.2f} x"]
              for name in SCHEDULES)])
    if "model" in figures:
        rows = figures["model"] | figures.get("large", {})
        blocks["bench: model"] = markdown([
            ["", "forward", "with backward", "outside products and attention", "peak memory"],
            *([f"{size}: {name}", f"{row['forward']:.3f} s", f"{row['both']:.3f} s",
               f"{row['outside']:.1%}", f"{row['peak'] / 1e6:,.0f} MB"]
              for size, both in rows.items() if size in SIZES | LARGE
              for name, row in both.items())])
    blocks["bench: others"] = "\n".join(f"- {line}" for line in others(figures))
    if "kernels" in figures:
        columns = ("bytes", "registers", "scratch", "instructions", "loads", "loads_16", "stores",
                   "stores_16")
        blocks["bench: kernels"] = markdown([
            ["target", "kernel", *(column.replace("_16", " of 16 bytes") for column in columns)],
            *([row["target"], row["kernel"], *(f"{row[column]:,}" for column in columns)]
              for row in figures["kernels"]["compile_report"])])
    return blocks


def others(figures):
    """A sentence for each of the smaller parts."""
    if "sampler" in figures:
        small, large = figures["sampler"]["counted"].values()
        times, pair = (figures["sampler"][f"{name}_seconds"] for name in ("slice", "guided_pair"))
        yield (f"The decoupled sampler takes {small:.3f} of the full rate's FLOPs at 1.3B and "
               f"{large:.3f} at 14B, counted, and {times['decoupled'] / times['full rate']:.3f} of "
               f"its time on a slice with 1.3B's share of attention, the interpolator included.")
        batched = pair["in one batch"] / pair["in sequence"]
        yield (f"Guidance's two forwards would take {batched:.2f} of their time in one batch, and "
               f"twice the memory, so one follows the other.")
    if "compiled" in figures:
        times = figures["compiled"]
        yield (f"`torch.compile` takes the model, a student's step and the sampler as one graph; "
               f"with inductor two of the toy's layers, forward and backward, take "
               f"{times['inductor'] / times['eager']:.2f} of their time, after "
               f"{times['compiling']:.0f} seconds.")
    if "data" in figures:
        times = figures["data"]
        share = times["waited"] / times["seconds"]
        yield f"Training from shards waits for data in {share:.1%} of its time."
    if "demo" in figures:
        yield f"`make demo` takes {figures['demo']['minutes']:.1f} minutes."
    for rows in zip(*[iter(figures.get("kernels", {}).get("launch_report", ()))] * 2):
        eager, ours = rows
        yield (f"`{ours['operation']}`, forward and backward: {ours['launches']} launches and "
               f"{ours['bytes'] / 1e6:.1f} MB, where plain PyTorch takes {eager['launches']} and "
               f"{eager['bytes'] / 1e6:.1f} MB.")


if __name__ == "__main__":
    sys.exit(main())
