"""What it will cost to distil or sample a model: FLOPs, memory and hours, without a GPU.

    python -m tools.plan distill --preset wan-14b --gpus 24
    python -m tools.plan distill --preset wan-1.3b --lora 64
    python -m tools.plan sample --preset wan-1.3b
    python -m tools.plan tables                                the tables of docs/costs.md

Costs are counted, not measured (see tools/costs.py): the functions that train.py and sample.py call
run on PyTorch's meta device, on two shallow models. All blocks cost the same, so the costs of the
full depth follow from these two.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import adavid
from runtime import cli
from runtime.lora import add_adapters
from tiny_wan import PRESETS, ToyCodec, WanCodec
from tools.costs import PAGE, at_full_depth, build, count, inputs
from tools.page import fill, markdown

AVD = adavid.AVDConfig()
CARDS = (16, 24, 32, 48, 80, 96, 141, 192)  # GB of the GPUs on the market
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation


@dataclass
class Plan:
    preset: Literal[tuple(PRESETS)] = "wan-1.3b"
    """architecture"""
    frames: int | None = None
    """frames of the video; by default 81 for Wan and 9 for the toy"""
    height: int | None = None
    """height in pixels; by default 480 for Wan and 16 for the toy"""
    width: int | None = None
    """width in pixels; by default 832 for Wan and 16 for the toy"""
    batch_size: int = 1
    """videos in a batch, on each GPU"""
    tflops: float = 989.0
    """the GPU's dense bfloat16 peak in TFLOP/s: 989 for H100 and H200, 312 for A100"""
    utilisation: float = 0.4
    """share of that peak that your code reaches; the default is an assumption"""


@dataclass
class Distill(Plan):
    """Training: FLOPs of a cycle, memory of each GPU, hours of the whole recipe."""

    gpus: int = 1
    """number of GPUs, each with its own videos"""
    lora: int = 0
    """rank of the adapters; 0 trains whole models. All adapters share one frozen base."""
    one_rollout: bool = False
    """as in train.py: the critic learns from the student update's videos throughout a cycle"""
    accumulate: int = 1
    """batches whose gradients are summed for one update"""
    videos: int = 150_000
    """real videos; the student's updates see each of them once"""
    updates: int | None = None
    """student updates; by default as many as it takes to see all videos"""
    memory: float = 80.0
    """memory of each GPU in GB"""


@dataclass
class Sample(Plan):
    """Sampling: FLOPs and seconds of the student and the teacher, and the memory."""


@dataclass
class Tables:
    """Distilling Wan2.1-1.3B and 14B on 1, 8 and 24 GPUs. Writes the tables to docs/costs.md."""


def main(argv=None):
    options = Annotated[Distill, tyro.conf.subcommand("distill")] | Annotated[
        Sample, tyro.conf.subcommand("sample")] | Annotated[
        Tables, tyro.conf.subcommand("tables")]
    programs = {Distill: plan_distill, Sample: plan_sample, Tables: write_tables}
    return cli.run(lambda args: programs[type(args)](args), options, argv)


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------


def count_cycle(config, shape, batch_size=1, lora=0, one_rollout=False):
    """A cycle on one GPU, without and with checkpointing: `[FLOPs, kept bytes, working bytes]`.

    Kept bytes are those that backward waits for. The student has two graphs, but only one at a time
    is in memory, so the larger one counts. Working bytes are those that backward needs on top. They
    are slightly too many: the meta device runs RMSNorm as several operations, a GPU as one.
    """
    def counted(config):
        if lora:
            base = build(config)
            with torch.device("meta"):
                teacher, student, critic = add_adapters(base, lora, ("student", "critic"))
            student.activate()
            learning = [base]
        else:
            teacher, student, critic = (build(config) for _ in range(3))
            teacher.requires_grad_(False)
            learning = [student, critic]
        for p in (p for model in learning for p in model.parameters() if p.requires_grad):
            # `memory` counts the gradients of weights. They must not count as activations too.
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        cache = adavid.LossMeanCache(len(AVD.timesteps)).to("meta")
        real, text = inputs(config, shape, batch_size)

        # A rollout ends at each step with equal probability, and each step adds one forward, so the
        # shortest and the longest give the mean. Rollouts come before memory is counted, because
        # the first forward makes the RoPE table, which stays.
        with torch.no_grad():
            first, last = (count(lambda: adavid.backward_simulation(
                student, real, text, step, AVD))[0] for step in (0, len(AVD.timesteps) - 1))
        rollout = (first + last) / 2
        costs = []
        for checkpointing in (False, True):
            for model in learning:
                model.gradient_checkpointing = checkpointing
            critic_flops, kept, peak = count(
                lambda: adavid.critic_loss(critic, real, text, AVD))
            terms = adavid.student_losses(
                student, teacher, critic, cache, real, text, text, 0, AVD)
            matching, regression = (count(lambda: next(terms)[0]) for _ in range(2))
            rollouts = 1 if one_rollout else AVD.critic_updates  # the student's own is one of them
            flops = (AVD.critic_updates * critic_flops + rollouts * rollout - first
                     + matching[0] + regression[0])
            costs.append([flops, max(matching[1], regression[1]), peak - kept])
        return np.array(costs)

    # With LoRA, backward ends inside the first block, so this block is unlike the others.
    return at_full_depth(config, counted, depth=2 if lora else 1)


def strides():
    """The frame strides that the sampler may run at, the full rate first."""
    return sorted({1, *AVD.strides})


def count_samplers(config, shape, batch_size=1):
    """FLOPs of the student, decoupled and at the full rate, of one guided step of the teacher and
    of a forward at each of `strides()`; last, the peak bytes of activations of a full forward.
    """
    def counted(config):
        model = build(config).requires_grad_(False)
        noise, text = inputs(config, shape, batch_size)
        with torch.device("meta"):
            t = torch.empty(batch_size)
            interpolator = adavid.FrameInterpolator(shape[0], width=32)  # train.py's default
        samplers = [count(function)[0] for function in (
            lambda: adavid.sample(model, noise, text, AVD, interpolator),
            lambda: adavid.sample(model, noise, text, AVD),
            lambda: adavid.sample_teacher(model, noise, text, text, steps=1))]
        forwards = [count(partial(model, noise[:, :, ::stride], t, text, frame_stride=stride))
                    for stride in strides()]
        return np.array([*samplers, *(flops for flops, _, _ in forwards), forwards[0][2]])

    return at_full_depth(config, counted)


def memory(config, gpus=1, lora=0):
    """Bytes on each GPU, by component, activations aside.

    Student and critic take turns, so only one of them has gradients at a time.
    """
    model = build(config)
    total, block = parameters(model), parameters(model.blocks[0])
    if lora:
        adapter = config.num_layers * sum(p.numel() for p in add_adapters(
            build(replace(config, num_layers=1)), lora, ("student",))[1].parameters())
        return {"weights: one frozen base, bfloat16": sum(p.nbytes for p in model.parameters()),
                "weights: two adapters, float32": 2 * 4 * adapter,
                "gradients of one adapter, float32": 4 * adapter,
                "optimiser: AdamW's two moments for two adapters": 2 * 8 * adapter}
    root = total - block * config.num_layers
    return {"weights: teacher, student, critic, float32, sharded": 3 * 4 * total / gpus,
            "gradients of one model, float32, sharded": 4 * total / gpus,
            "optimiser: AdamW's two moments for two models, sharded": 2 * 8 * total / gpus,
            # In bfloat16, the root, the block at work and the next one. A block's gradients are
            # in bfloat16 and, on the way to their shards, in float32.
            "unsharded: root, two blocks, a block's gradients": 2 * root + 4 * block + 6 * block}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------


def latent_shape(args):
    """Shape of a video's latents. Raises ValueError if a size does not fit or a flag is bad."""
    for name in ("tflops", "utilisation", "gpus", "accumulate", "videos", "updates", "memory"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be above 0")
    if args.utilisation > 1:
        raise ValueError(f"--utilisation {args.utilisation}: must be at most 1")
    if getattr(args, "lora", 0) < 0:
        raise ValueError(f"--lora {args.lora}: must be a rank, or 0 for whole models")
    codec = ToyCodec if args.preset == "tiny" else WanCodec
    # The class is asked, not an instance, which would open Wan's files.
    return codec.latent_shape(codec, args.frames, args.height, args.width, AVD.strides[0])


def seconds(args, flops):
    return flops / (args.tflops * 1e12 * args.utilisation)


def introduce(args, config, shape):
    c, f, h, w = shape
    tokens = ", ".join(
        f"{len(range(0, f, stride)) * h * w // math.prod(config.patch_size):,} "
        + ("tokens" if stride == 1 else f"at frame stride {stride}") for stride in strides())
    print(f"{args.preset}: {parameters(build(config)) / 1e9:.3f} billion parameters\n"
          f"a video: {c} x {f} x {h} x {w} latents, {tokens}\n"
          f"FLOPs and bytes are counted, not measured. Times assume {args.utilisation:.0%} of "
          f"{args.tflops:g} TFLOP/s.")


def plural(number, thing):
    return f"{number:,} {thing}{'s' * (number != 1)}"


def print_rows(title, rows):
    print(f"\n{title}")
    for name, value in rows.items():
        digits = np.format_float_positional(value, 4, fractional=False, trim="-")
        print(f"{digits:>12}  {name}")


def plan_distill(args):
    config, shape = PRESETS[args.preset], latent_shape(args)
    (plain, *all_activations), (flops, kept, working) = count_cycle(
        config, shape, args.batch_size, args.lora, args.one_rollout)
    plain, flops = args.accumulate * plain, args.accumulate * flops
    parts = memory(config, args.gpus, args.lora) | {
        "activations kept for backward: inputs of blocks": kept,
        "activations of one block, recomputed in backward": working}
    needed = sum(parts.values())
    fit = "fits" if needed <= USABLE * args.memory * 1e9 else "does not fit"
    updates = args.updates or -(-args.videos // (args.gpus * args.batch_size * args.accumulate))
    hours = updates * seconds(args, flops) / 3600
    gpus, videos = plural(args.gpus, "GPU"), args.accumulate * args.batch_size
    trained = f"adapters of rank {args.lora}" if args.lora else f"whole models over {gpus}"
    seen = "" if args.updates else f"the student sees each of {args.videos:,} videos once: "

    introduce(args, config, shape)
    print_rows(
        f"PFLOPs on each GPU in a cycle of 1 student update and {AVD.critic_updates} critic "
        f"updates, each of {plural(videos, 'video')}",
        {"forwards and backwards": plain / 1e15,
         "blocks recomputed in backward (activation checkpointing)": (flops - plain) / 1e15,
         f"in all: {seconds(args, flops):,.1f} seconds": flops / 1e15})
    print_rows(
        f"GB of memory on each GPU, training {trained}",
        {name: size / 1e9 for name, size in parts.items()}
        | {f"in all: {fit} {args.memory:g} GB, with {1 - USABLE:.0%} left for CUDA": needed / 1e9,
           "activations without checkpointing": sum(all_activations) / 1e9})
    print(f"\n{seen}{plural(updates, 'cycle')}\n"
          f"{hours:12,.0f}  hours on {gpus}, if none waits for data or for another GPU\n"
          f"{args.gpus * hours:12,.0f}  GPU hours")


def plan_sample(args):
    config, shape = PRESETS[args.preset], latent_shape(args)
    decoupled, four, guided, full, *fewer, activations = count_samplers(
        config, shape, args.batch_size)
    introduce(args, config, shape)
    steps = len(AVD.timesteps)
    rows = {"a forward at the full frame rate": full} | {
        f"a forward at frame stride {stride}, {flops / full:.2f} of that": flops
        for stride, flops in zip(strides()[1:], fewer)} | {
        f"student, {steps} steps at the full rate": four,
        f"student, {steps} steps at strides {' '.join(map(str, AVD.strides))}, "
        f"{decoupled / four:.3f} of that": decoupled,
        "teacher, 50 guided steps": 50 * guided}
    print_rows(f"PFLOPs for {plural(args.batch_size, 'video')}", {
        f"{name}: {seconds(args, flops):,.3g} seconds": flops / 1e15
        for name, flops in rows.items()})
    print_rows("GB of memory, without the text encoder and the VAE", {
        "weights, bfloat16": sum(p.nbytes for p in build(config).parameters()) / 1e9,
        "activations of a forward at their peak (an estimate)": activations / 1e9})


def write_tables(_):
    block = "\n\n".join(table(preset, name) for preset, name in (
        ("wan-1.3b", "Wan2.1-1.3B"), ("wan-14b", "Wan2.1-14B")))
    print(block)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), {"plan": block}), encoding="utf-8")


def table(preset, name):
    """Videos of Wan's default size, and 24 of them in each update, as in the paper."""
    rows = [[name, "GPUs", "GB on each", "smallest card", "PFLOPs of a cycle, on each", "hours"]]
    for lora, how in ((0, "whole models"), (64, "LoRA, rank 64")):
        args = Distill(preset, lora=lora)
        _, (flops, *activations) = count_cycle(PRESETS[preset], latent_shape(args), lora=lora)
        for gpus in (1, 8, 24):
            needed = sum(memory(PRESETS[preset], gpus, lora).values()) + sum(activations)
            card = next((f"{gb} GB" for gb in CARDS if needed <= USABLE * gb * 1e9), "none")
            cycle = 24 // gpus * flops
            hours = args.videos / 24 * seconds(args, cycle) / 3600
            rows.append([how, str(gpus), f"{needed / 1e9:.1f}", card, f"{cycle / 1e15:,.0f}",
                         f"{hours:,.0f}"])
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
