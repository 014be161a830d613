"""What it will cost to distil or sample a model: FLOPs, memory and hours, without a GPU.

    python -m tools.plan distill --preset wan-14b --gpus 24
    python -m tools.plan distill --preset wan-1.3b --lora 64
    python -m tools.plan sample --preset wan-1.3b
    python -m tools.plan tables                                the tables of docs/costs.md

Costs are counted, not measured (see tools/costs.py): the functions that train.py and sample.py call
run on PyTorch's meta device, on two shallow models. All blocks cost the same, so the costs of the
full depth follow from these two. The text encoder and the VAE are those of transformers and
diffusers, so `sample` and `tables` need the extra `wan`.
"""

import functools
import itertools
import math
import sys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

import adavid
from runtime import cli
from runtime.lora import add_adapters
from tiny_wan import PRESETS, ToyCodec, WanCodec
from tools.costs import (
    PAGE,
    TF32,
    at_full_depth,
    build,
    count,
    count_forward,
    count_text_encoder,
    count_vae,
    inputs,
)
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
    """the GPU's dense bfloat16 peak in TFLOP/s: 989 for H100 and H200, 312 for A100. A VAE in
    float32 is assumed to reach half as much, in TF32"""
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
    memory: float = 80.0
    """memory of each GPU in GB"""


@dataclass
class Sample(Plan):
    """Sampling: FLOPs and seconds of the student, the teacher and the whole wait; the memory."""


@dataclass
class Tables:
    """Distilling and sampling Wan2.1-1.3B and 14B. Writes the tables to docs/costs.md."""


def main(argv=None):
    programs = {Distill: plan_distill, Sample: plan_sample, Tables: write_tables}
    return cli.run(lambda args: programs[type(args)](args), Distill | Sample | Tables, argv)


@functools.cache
def count_cycle(config, shape, batch_size=1, lora=0, one_rollout=False):
    """A cycle on one GPU, with checkpointing: `[FLOPs, kept bytes, working bytes]`.

    Kept bytes are those that backward waits for. The student has two graphs, but only one at a time
    is in memory, so the larger one counts. Working bytes are those that backward needs on top. They
    are slightly too many: the meta device runs RMSNorm as several operations, a GPU as one.
    """
    def counted(config):
        teacher = build(config).requires_grad_(False)
        if lora:
            trained = [teacher]
            with torch.device("meta"):
                teacher, student, critic = add_adapters(teacher, lora, ("student", "critic"))
            student.activate()
        else:
            student, critic = trained = [build(config), build(config)]
        for model in trained:
            model.gradient_checkpointing = True
            for p in model.parameters():
                if p.requires_grad:  # `memory` counts the gradients of weights
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        cache = adavid.LossMeanCache(len(AVD.timesteps)).to("meta")
        real, text = inputs(config, shape, batch_size)

        def rollout(step):
            with torch.no_grad():
                return count(lambda: adavid.backward_simulation(student, real, text, step, AVD))

        def losses(step):
            terms = adavid.student_losses(
                student, teacher, critic, cache, real, text, text, step, AVD)
            return (count(lambda: next(terms)[0]) for _ in range(2))

        # Rollouts end at each step with equal probability, and each step adds one forward.
        last = len(AVD.timesteps) - 1
        matching, regression = losses(0)
        matching = (matching + next(losses(last))) / 2
        learning, kept, peak = count(lambda: adavid.critic_loss(critic, real, text, AVD))
        flops = matching[0] + regression[0] + AVD.critic_updates * learning
        if not one_rollout:
            flops += (AVD.critic_updates - 1) * (rollout(0)[0] + rollout(last)[0]) / 2
        return np.array([flops, max(matching[1], regression[1]), peak - kept])

    # With LoRA, backward ends inside the first block, so this block is unlike the others.
    return at_full_depth(config, counted, depth=2 if lora else 1)


def memory(config, gpus=1, lora=0):
    """Bytes on each GPU, by component, activations aside.

    Student and critic take turns, so only one of them has gradients at a time.
    """
    model = build(config)
    total, block = parameters(model), parameters(model.blocks[0])
    if lora:
        adapter = config.num_layers * parameters(
            add_adapters(build(replace(config, num_layers=1)), lora, ("student",))[1])
        base, block = (sum(p.nbytes for p in part.parameters()) for part in (
            model, model.blocks[0]))
        return {"weights: one frozen base, bfloat16, sharded": base / gpus,
                "weights: two adapters, float32": 2 * 4 * adapter,
                "gradients of one adapter, float32": 4 * adapter,
                "optimiser: AdamW's two moments for two adapters": 2 * 8 * adapter,
                "unsharded: the block at work and the next one": 2 * block * (gpus > 1)}
    return {"weights: teacher, student, critic, float32, sharded": 3 * 4 * total / gpus,
            "gradients of one model, float32, sharded": 4 * total / gpus,
            "optimiser: AdamW's two moments for two models, sharded": 2 * 8 * total / gpus,
            # In bfloat16, the block at work and the next one. A block's gradients are in bfloat16
            # and, on the way to their shards, in float32.
            "unsharded: two blocks, a block's gradients": 4 * block + 6 * block}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def latent_shape(args):
    """Shape of a video's latents. ValueError if a size does not fit."""
    codec = ToyCodec if args.preset == "tiny" else WanCodec
    # The class is asked, not an instance, which would open Wan's files.
    return codec.latent_shape(codec, args.frames, args.height, args.width, AVD.strides[0])


def seconds(args, flops):
    return flops / (args.tflops * 1e12 * args.utilisation)


def introduce(args):
    """Print what is planned. Returns the architecture and the shape of a video's latents."""
    config, shape = PRESETS[args.preset], latent_shape(args)
    print(f"{args.preset}: {parameters(build(config)) / 1e9:.3f} billion parameters\n"
          f"a video: {' x '.join(map(str, shape))} latents, {tokens(config, shape):,} tokens\n"
          f"FLOPs and bytes are counted, not measured. Times assume {args.utilisation:.0%} of "
          f"{args.tflops:g} TFLOP/s.")
    return config, shape


def tokens(config, shape, stride=1):
    _, f, h, w = shape
    return len(range(0, f, stride)) * h * w // math.prod(config.patch_size)


def print_rows(title, rows):
    print(f"\n{title}")
    for name, value in rows.items():
        digits = np.format_float_positional(value, 4, fractional=False, trim="-")
        print(f"{digits:>12}  {name}")


def plan_distill(args):
    introduce(args)
    parts, flops, cycles, hours = distillation(args)
    needed = sum(parts.values())
    fit = "fits" if needed <= USABLE * args.memory * 1e9 else "does not fit"
    print_rows("GB of memory on each GPU", {
        **{name: size / 1e9 for name, size in parts.items()},
        f"in all: {fit} {args.memory:g} GB, with {1 - USABLE:.0%} left for CUDA": needed / 1e9})
    print_rows("Training", {
        f"PFLOPs on each GPU in a cycle: 1 student and {AVD.critic_updates} critic updates":
            flops / 1e15,
        "seconds of a cycle": seconds(args, flops),
        "cycles, in which the student sees each video once": cycles,
        "hours, if no GPU waits for data or for another GPU": hours,
        "GPU hours": args.gpus * hours})


def distillation(args):
    """Bytes on each GPU by component, FLOPs of a cycle on each, number of cycles, and hours."""
    config = PRESETS[args.preset]
    flops, kept, working = count_cycle(
        config, latent_shape(args), args.batch_size, args.lora, args.one_rollout)
    parts = memory(config, args.gpus, args.lora) | {
        "activations kept for backward: inputs of blocks": kept,
        "activations of one block, recomputed in backward": working}
    flops *= args.accumulate
    cycles = math.ceil(args.videos / (args.gpus * args.batch_size * args.accumulate))
    return parts, flops, cycles, cycles * seconds(args, flops) / 3600


def plan_sample(args):
    config, shape = introduce(args)
    forwards = {stride: count_forward(config, shape, args.batch_size, stride)
                for stride in sorted({1, *AVD.strides})}
    full, _, activations = forwards[1]
    four = len(AVD.strides) * full
    decoupled = sum(forwards[stride][0] for stride in AVD.strides)
    rows = {f"a forward at frame stride {stride}: {tokens(config, shape, stride):,} tokens, "
            f"{flops / full:.2f} of the full rate": flops
            for stride, (flops, *_) in forwards.items()} | {
        "student, all steps at the full rate": four,
        f"student, steps at strides {' '.join(map(str, AVD.strides))}, "
        f"{decoupled / four:.3f} of that": decoupled,
        "teacher, 50 guided steps": 100 * full}
    print_rows("PFLOPs of the transformer for a batch, and seconds", {
        f"{name}: {seconds(args, flops):,.3g} seconds": flops / 1e15
        for name, flops in rows.items()})
    memory = {
        "weights, bfloat16": sum(p.nbytes for p in build(config).parameters()),
        "activations of a forward at their peak (an estimate)": activations}
    if args.preset != "tiny":
        print_rows("PFLOPs of all that one waits for, and seconds", {
            f"{name}: {time:,.3g} seconds": flops / 1e15
            for name, (flops, time) in whole_wait(args).items()})
        for dtype in ("float32", "bfloat16"):
            *_, memory[f"activations of the VAE in {dtype} at their peak (an estimate)"] = (
                count_vae("decode", shape, getattr(torch, dtype)))
    print_rows("GB of memory, without the text encoder",
               {name: size / 1e9 for name, size in memory.items()})


def whole_wait(args):
    """`[FLOPs, seconds]` of all that makes a batch of Wan's videos, by part and in all."""
    def cost(flops, peak=1):
        return np.array([flops, seconds(args, flops) / peak])

    config, shape = PRESETS[args.preset], latent_shape(args)
    text = cost(args.batch_size * count_text_encoder(config.text_len)[0])
    student = cost(sum(count_forward(config, shape, args.batch_size, stride)[0]
                       for stride in AVD.strides))
    vae = args.batch_size * count_vae("decode", shape)[0]
    exact, rough = cost(vae, TF32), cost(vae)
    return {f"text encoder, {config.text_len} tokens": text,
            f"student, steps at strides {' '.join(map(str, AVD.strides))}": student,
            "VAE in float32, as TF32 at half the peak": exact,
            "in all": text + student + exact,
            "VAE in bfloat16": rough,
            "in all, with --vae-dtype bfloat16": text + student + rough}


def write_tables(_):
    blocks = {"plan": tables_of_distillation(), "wait": table_of_waits()}
    print(*blocks.values(), sep="\n\n")
    fill(PAGE, blocks)


def table_of_waits():
    plans = [Sample(preset, height=height, width=width) for preset, (height, width) in
             itertools.product(("wan-1.3b", "wan-14b"), ((480, 832), (720, 1280)))]
    waits = [whole_wait(plan) for plan in plans]
    return markdown([
        ["", *(f"{plan.preset.removeprefix('wan-').upper()}, {plan.height} x {plan.width}"
               for plan in plans)],
        *([name, *(f"{wait[name][0] / 1e12:,.0f} TFLOP, {wait[name][1]:.2f} s" for wait in waits)]
          for name in waits[0])])


def tables_of_distillation():
    """Videos of Wan's default size, and 24 of them in each update, as in the paper."""
    tables = []
    for preset, name in (("wan-1.3b", "Wan2.1-1.3B"), ("wan-14b", "Wan2.1-14B")):
        rows = [[name, "GPUs", "GB on each", "smallest card", "PFLOPs of a cycle, on each",
                 "hours"]]
        for lora, how in ((0, "whole models"), (64, "LoRA, rank 64")):
            for gpus in (1, 8, 24):
                parts, flops, _, hours = distillation(
                    Distill(preset, lora=lora, gpus=gpus, accumulate=24 // gpus))
                needed = sum(parts.values())
                card = next((f"{gb} GB" for gb in CARDS if needed <= USABLE * gb * 1e9), "none")
                rows.append([how, str(gpus), f"{needed / 1e9:.1f}", card, f"{flops / 1e15:,.0f}",
                             f"{hours:,.0f}"])
        tables.append(markdown(rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    sys.exit(main())
