"""What training, the transformer, the sampler, the demo and the kernels cost.

    python -m experiments.bench                    everything; half an hour on two cores
    python -m experiments.bench --parts kernels    one part of it

Each part replaces its figures in docs/costs.json and its lines in docs/costs.md. The last line of
output is all figures as JSON. Of the released recipe, only its schedule of forwards is compared; it
runs on our model.
"""

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import adavid
from runtime import cli
from runtime.page import fill, markdown
from tiny_wan import PRESETS, ToyCodec, WanConfig, WanModel
from tools.costs import PAGE, forward_flops

RESULTS = PAGE.with_suffix(".json")
PARTS = ("cycle", "sampler", "demo", "kernels", "model")  # model comes last: it sets malloc up
WAN = (16, 21, 60, 104)  # latents of 81 frames at 480 x 832


@dataclass
class Bench:
    """Count and time training, transformer, sampler, demo and kernels for docs/costs.md."""

    parts: tuple[Literal[PARTS], ...] = PARTS
    """the parts to run"""


def main(argv=None):
    return cli.run(run, Bench, argv)


def run(args):
    figures = json.loads(RESULTS.read_text())
    for part in args.parts:
        print(f"{part} ...", flush=True)
        figures[part] = globals()[f"bench_{part}"]() | {"machine": machine()}
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    fill(PAGE, blocks(figures))
    print(json.dumps(figures))


def machine():
    info = Path("/proc/cpuinfo")  # on Linux
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    return (f"{os.cpu_count()} cores of {[*names, platform.machine()][0]}, "
            f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")


def in_turn(calls, runs):
    """Each call's median seconds over `runs` rounds, after a round to warm up.

    The calls take turns, so that a busy machine slows all of them.
    """
    seconds = {name: [] for name in calls}
    for _ in range(runs + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(times[1:]) for name, times in seconds.items()}


# ---------------------------------------------------------------------------------------------
# A training cycle: one student update, five critic updates
# ---------------------------------------------------------------------------------------------

SCHEDULES = {  # do rollouts end early, how many critic updates need none, the training strides
    "released schedule": (False, 0, (1, 1, 1, 1)),
    "+ rollouts end at the sampled step": (True, 0, (1, 1, 1, 1)),
    "+ the student's videos serve one critic update (default)": (True, 1, (1, 1, 1, 1)),
    "+ they serve all critic updates of a cycle (--one-rollout)": (True, 5, (1, 1, 1, 1)),
    "+ steps at half rate (--train-strides 2 2 1 1)": (True, 5, (2, 2, 1, 1)),
}


def bench_cycle():
    models = [WanModel(PRESETS["tiny"]).init_weights() for _ in range(3)]
    shape = ToyCodec().latent_shape()
    interpolator = adavid.FrameInterpolator(shape[0], width=32).requires_grad_(False)
    real, text = torch.randn(1, *shape), ToyCodec().encode_text(["a red ball"])
    times = in_turn({name: partial(cycles, models, interpolator, real, text, *schedule)
                     for name, schedule in SCHEDULES.items()}, runs=3)
    return {"forwards": {preset: {name: forwards(forward_costs(PRESETS[preset]), *schedule)
                                  for name, schedule in SCHEDULES.items()}
                         for preset in ("wan-1.3b", "wan-14b")},
            "toy_seconds": {name: all_four / 4 for name, all_four in times.items()}}


def forward_costs(config, shape=WAN):
    """FLOPs of a forward at frame strides 1 and 2, in forwards at the full rate."""
    full, half = (forward_flops(config, shape, stride=stride) for stride in (1, 2))
    return {1: 1.0, 2: half / full}


def forwards(cost, ends_early, served, strides):
    """A cycle's cost in forwards at the full rate, averaged over the steps. A backward costs two.

    What is computed twice counts once. The interpolator is not counted: at Wan's sizes it costs
    less than a thousandth of a forward.
    """
    steps = [cost[stride] for stride in strides]
    rollout = mean(sum(steps[:i + 1]) for i in range(len(steps))) if ends_early else sum(steps)
    backward = 2 * mean(steps)  # through the rollout's last step
    scores = 2 + 1  # the guided teacher's and the critic's
    regression = 3 * mean(steps)
    updates = adavid.AVDConfig().critic_updates
    critic = updates * 3 + (updates - served) * rollout
    return rollout + backward + scores + regression + critic


def cycles(models, interpolator, real, text, ends_early, served, strides):
    """Four cycles, one for each step that a rollout can end at."""
    student, teacher, critic = models
    config = adavid.AVDConfig(train_strides=strides)
    cache = adavid.LossMeanCache(len(config.timesteps))
    optimizer = torch.optim.AdamW([*student.parameters(), *critic.parameters()], lr=1e-6)

    def finish_rollout(step):
        """The released rollouts go on to the last step, though nobody uses its videos."""
        left = config.timesteps[step + 1:]
        if left and not ends_early:
            with torch.no_grad():
                adavid.few_steps(student, torch.randn_like(real), text, left, (1,) * len(left))

    for step in range(len(config.timesteps)):
        x0 = adavid.backward_simulation(student, torch.randn_like(real), text, step, config,
                                        interpolator)
        loss, _ = adavid.matching_loss(x0, teacher, critic, text, text[:1], config)
        loss.backward()
        loss, *_ = adavid.weighted_regression(student, cache, real, text, step, config,
                                              interpolator)
        loss.backward()
        finish_rollout(step)
        for update in range(config.critic_updates):
            optimizer.step()  # of the student, then of the critic: one of them has gradients
            optimizer.zero_grad()
            if update >= served:
                with torch.no_grad():
                    x0 = adavid.backward_simulation(student, torch.randn_like(real), text, step,
                                                    config, interpolator)
                finish_rollout(step)
            adavid.critic_loss(critic, x0, text, config).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------
# WanModel against diffusers' WanTransformer3DModel, on the same weights
# ---------------------------------------------------------------------------------------------

SIZES = {  # the shape of the latents (b f h w), and how many rounds even out the noise of timing
    "toy": (PRESETS["tiny"], (16, 9, 8, 8), 31),
    "dim 512 x 8, 2,000 tokens": (WanConfig(512, 2048, 8, 8), (1, 5, 40, 40), 15),
    "one layer of 1.3B, 8,064 tokens": (WanConfig(1536, 8960, 12, 1), (1, 7, 64, 72), 7),
}
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::convolution",
            "aten::_scaled_dot_product")  # the start of their names
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # from glibc's malloc.h


def bench_model():
    if sys.platform == "linux":
        # Keep freed memory in the process, as a GPU's allocator does. Otherwise both models wait
        # for new pages whenever they need a tensor above 32 MB.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    return {name: compare(*size) for name, size in SIZES.items()}


def compare(config, shape, runs):
    """Each model's seconds of forward, and of forward and backward, and what `profiled` says."""
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
    forward = {"ours": lambda: ours(x, t, text),
               "diffusers": lambda: theirs(x, t, text, return_dict=False)[0]}
    both = {name: lambda call=call: call().square().mean().backward()
            for name, call in forward.items()}
    forward_times, both_times = in_turn(forward, runs), in_turn(both, runs)
    return {name: {"forward": forward_times[name], "both": both_times[name]} | profiled(call)
            for name, call in both.items()}


def profiled(call):
    """The share of a call's time outside matrix products and attention, and its peak memory.

    The peak is the most bytes that PyTorch's allocator has handed out at once.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    table = profiler.key_averages()
    products = sum(row.cpu_time_total for row in table if row.key.startswith(PRODUCTS))
    outside = 1 - products / sum(row.self_cpu_time_total for row in table)
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events()
             if event.name() == "[memory]"]
    return {"outside": outside, "peak": int(max(np.cumsum(sizes)))}


# ---------------------------------------------------------------------------------------------
# Sampler, demo, kernels
# ---------------------------------------------------------------------------------------------

# Attention has the share in its forward that it has in 1.3B's at 32,760 tokens, 21 per channel.
SLICE, SLICE_SHAPE = WanConfig(256, 1496, 2, 3, text_len=86), (16, 21, 32, 32)


def bench_sampler():
    config, counted = adavid.AVDConfig(), {}
    for preset in ("wan-1.3b", "wan-14b"):
        cost = forward_costs(PRESETS[preset])
        counted[preset] = mean(cost[stride] for stride in config.strides)
    model = WanModel(SLICE).init_weights().requires_grad_(False)
    interpolator = adavid.FrameInterpolator(16, width=32)
    noise, text = torch.randn(1, *SLICE_SHAPE), torch.randn(1, SLICE.text_len, SLICE.text_dim)
    sample = partial(adavid.sample, model, noise, text, config)
    return {"counted": counted, "slice_seconds": in_turn(
        {"full rate": sample, "decoupled": partial(sample, interpolator)}, runs=7)}


def bench_demo():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tools.demo", "--out", folder]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return {"minutes": (time.perf_counter() - began) / 60}


def bench_kernels():
    """The worst of the kernels on all targets."""
    import triton

    from kernels.bench import compile_all
    rows = list(compile_all())
    return {"triton": triton.__version__,
            "targets": list(dict.fromkeys(row["target"] for row in rows)),
            "scratch": max(row["scratch"] for row in rows),
            "registers": max(row["registers"] for row in rows)} | {
            f"{kind}_16": min(row[f"{kind}_16"] / row[kind] for row in rows)
            for kind in ("loads", "stores")}


# ---------------------------------------------------------------------------------------------
# The blocks of docs/costs.md
# ---------------------------------------------------------------------------------------------


def blocks(figures):
    """Markdown by name of the block; every part has its figures."""
    counted, times = figures["cycle"]["forwards"], figures["cycle"]["toy_seconds"]
    released, *_ = times.values()
    cycle = [["schedule", "1.3B", "14B", "toy, timed"], *(
        [name, *(f"{counted[preset][name]:.1f} F" for preset in counted),
         f"{released / times[name]:.2f} x"] for name in SCHEDULES)]
    model = [["", "forward", "forward and backward", "outside matrix products and attention",
              "peak memory"], *(
        [f"{size}: {name}", f"{row['forward']:.3f} s", f"{row['both']:.3f} s",
         f"{row['outside']:.1%}", f"{row['peak'] / 1e6:,.0f} MB"]
        for size in SIZES for name, row in figures["model"][size].items())]
    small, large = figures["sampler"]["counted"].values()
    sampler = figures["sampler"]["slice_seconds"]
    machines = dict.fromkeys(figures[part]["machine"] for part in PARTS if part != "kernels")
    worst = figures["kernels"]
    *targets, last = worst["targets"]
    return {"cycle": markdown(cycle), "model": markdown(model), "others": f"""\
- The decoupled sampler needs {small:.3f} of the FLOPs of the full rate at 1.3B and {large:.3f} at \
14B (counted). On a small model with the same share of attention as 1.3B it takes \
{sampler['decoupled'] / sampler['full rate']:.3f} of the time, the interpolator included.
- `make demo` takes {figures['demo']['minutes']:.1f} minutes.
- All times on this page: {'; '.join(machines)}.""", "kernels": f"""\
Triton {worst['triton']} compiles each kernel for {', '.join(targets)} and {last}. The worst \
values over all of these: a thread spills {worst['scratch']} bytes and uses {worst['registers']} \
registers; {worst['loads_16']:.0%} of a kernel's loads and {worst['stores_16']:.0%} of its stores \
move 16 bytes at once (the others move a single number, or `blend` or its gradient, which have one \
channel). `python -m kernels.bench` prints the values of each kernel."""}


if __name__ == "__main__":
    sys.exit(main())
