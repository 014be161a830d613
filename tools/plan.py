"""What it will cost to distil or sample a model: FLOPs, memory and hours, without a GPU.

    python -m tools.plan distill --preset wan-14b --gpus 24
    python -m tools.plan distill --preset wan-1.3b --lora 64
    python -m tools.plan sample --preset wan-1.3b
    python -m tools.plan tables                                the tables of docs/costs.md

Costs are computed, not measured. This file has the formulas of training, tools/costs.py those of
the networks. The tests compare both with what PyTorch counts when small models run.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import adavid
from adavid import Limits, Positive
from runtime import cli
from runtime.models import find_numbers
from runtime.page import fill, markdown
from tiny_wan import PRESETS, WanConfig, WanModel
from tiny_wan.codec import codec_class, is_toy
from tiny_wan.model import KEPT_PRECISE
from tools import costs
from tools.costs import PAGE, TF32, tokens

AVD = adavid.AVDConfig()
CARDS = (16, 24, 32, 48, 80, 96, 141, 192)  # GB of the GPUs on the market
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation


@dataclass
class Plan:
    preset: Literal[tuple(PRESETS)] = "wan-1.3b"
    """architecture"""
    model: Path | None = None
    """a model whose architecture and numbers of the method are taken; by default the preset's
    architecture and the paper's numbers"""
    frames: cli.Size | None = None
    """frames of the video; by default 81 for Wan and 9 for the toy"""
    height: cli.Size | None = None
    """height in pixels; by default 480 for Wan and 16 for the toy"""
    width: cli.Size | None = None
    """width in pixels; by default 832 for Wan and 16 for the toy"""
    batch_size: cli.Size = 1
    """videos in a batch, on each GPU"""
    tflops: Positive = 989.0
    """the GPU's dense bfloat16 peak in TFLOP/s: 989 for H100 and H200, 312 for A100. A VAE in
    float32 is assumed to reach half as much, in TF32"""
    utilisation: Annotated[float, Limits(1e-30, 1.0)] = 0.4
    """share of that peak that your code reaches; the default is an assumption"""


@dataclass
class Distill(Plan):
    """Training: FLOPs of a cycle, memory of each GPU, hours of the whole recipe."""

    gpus: cli.Count = 1
    """number of GPUs, each with its own videos"""
    lora: cli.Rank = 0
    """rank of the adapters; 0 trains whole models. All adapters share one frozen base."""
    one_rollout: bool = False
    """as in train.py: the critic learns from the student update's videos throughout a cycle"""
    accumulate: cli.Size = 1
    """batches whose gradients are summed for one update"""
    videos: Annotated[int, Limits(1, 2**40)] = 150_000
    """real videos; the student's updates see each of them once"""
    memory: Positive = 80.0
    """memory of each GPU in GB"""


@dataclass
class Sample(Plan):
    """Sampling: FLOPs and seconds of the student, the teacher and the whole wait; the memory."""

    lora: tuple[Path, ...] = ()
    """with --model: its LoRAs, of which a distilled one has the numbers of the method"""


@dataclass
class Tables:
    """Distilling and sampling Wan2.1-1.3B and 14B. Writes the tables to docs/costs.md."""


def main(argv=None):
    programs = {Distill: plan_distill, Sample: plan_sample, Tables: write_tables}
    return cli.run(lambda args: programs[type(args)](args), Distill | Sample | Tables, argv)


def architecture(args):
    return WanConfig.from_pretrained(args.model) if args.model else PRESETS[args.preset]


def numbers(args):
    """The method's: those stored with --model and its LoRAs, as sample.py finds them."""
    loras = args.lora if isinstance(args, Sample) else ()
    if loras and not args.model:
        raise ValueError("--lora needs the --model that it belongs to")
    return stored_numbers(args.model, loras) if args.model else AVD


@cache
def stored_numbers(model, loras):
    return find_numbers(model, loras).config


def cycle_flops(config, shape, lora=0, one_rollout=False, numbers=None):
    """FLOPs of a training cycle for each video of a batch, with checkpointing."""
    c, l, numbers = config, tokens(config, shape), numbers or AVD
    products, attention, rest = costs.forward_parts(c, shape)
    adapters = 2 * lora * c.num_layers * sum(
        rows * (i + o) for rows, i, o in costs.linear_layers(c, l))
    teacher = products + attention + rest
    trained = teacher + adapters
    # Checkpointing runs the blocks again. Flash attention computes the scores again: after two
    # products in forward, backward has five. Other products have a gradient to each factor.
    backward = products + attention + adapters + 2.5 * attention
    if lora:
        # Frozen weights need no gradient. Neither does what depends on no adapter: the text, and
        # the input of the first block's queries, keys and values.
        unneeded = 2 * c.dim**2 * (2 * c.num_layers * c.text_len + 3 * l)
        backward += products - unneeded + 2 * adapters
    else:
        backward += 2 * (products + rest)
    # Rollouts end at each step with equal probability. The student's update also takes forwards of
    # the critic, of the student on a real video, and two of the teacher.
    rollouts = 1 if one_rollout else max(1, numbers.critic_updates)
    forwards = rollouts * (len(numbers.timesteps) + 1) / 2 + 2 + numbers.critic_updates
    backwards = 2 + numbers.critic_updates
    return 2 * teacher + forwards * trained + backwards * backward


def cycle_activations(config, shape, lora=0):
    """Bytes of a video that are kept for backward, with checkpointing, and those at its peak.

    The student's update has two graphs, but only one at a time is in memory. The peak is slightly
    too high: RMSNorm is taken as several operations, and is one on a GPU.
    """
    d, hidden, l = config.dim, config.ffn_dim, tokens(config, shape)
    # The blocks' inputs in bfloat16, and cosines and sines of the rotations in float32.
    inputs = l * (2 * config.num_layers * d + 8 * d // config.num_heads)
    # The head's norm and modulation, and the loss, whose tensors are as large as the video.
    head = l * (4 if lora else 10) * d + 12 * math.prod(shape)
    # What a block saves, for each token and channel: self-attention 38 bytes, cross-attention 18
    # and the feed-forward network 14, beside its hidden layer before and after GELU. With LoRA,
    # the inputs of frozen norms and gates are not needed: 22, 14 and 6.
    saved = (42 if lora else 70) * d + 4 * hidden
    # The peak comes at once, with the gradients of the gated residual in float32. With LoRA, these
    # wait while the block runs again, or it comes when the hidden layer has two gradients, from
    # base and adapter.
    gradients = max(16 * d, 2 * d + 4 * hidden) if lora else 14 * d
    return inputs + head, inputs + l * (saved + gradients)


def memory(config, gpus=1, lora=0):
    """Bytes on each GPU, by component, activations aside.

    Student and critic take turns, so only one of them has gradients at a time.
    """
    model = build(config)
    total, block = parameters(model), parameters(model.blocks[0])
    if lora:
        layers = costs.linear_layers(config, 1)
        adapter = lora * config.num_layers * sum(i + o for _, i, o in layers)
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


def build(config):
    """A model without content, as it computes on a GPU: bfloat16, and float32 as Wan has it."""
    with torch.device("meta"):
        model = WanModel(config).bfloat16()
    for name, p in model.named_parameters():
        if KEPT_PRECISE.search(name):
            p.data = p.data.float()
    return model


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def latent_shape(args):
    """Shape of a video's latents. ValueError if a size does not fit."""
    codec = codec_class(architecture(args))
    # The class is asked, not an instance, which would open Wan's files.
    return codec.latent_shape(codec, args.frames, args.height, args.width,
                              numbers(args).strides[0])


def seconds(args, flops):
    return flops / (args.tflops * 1e12 * args.utilisation)


def introduce(args):
    """Print what is planned. Returns the architecture and the shape of a video's latents."""
    config, shape = architecture(args), latent_shape(args)
    print(f"{args.model or args.preset}: {parameters(build(config)) / 1e9:.3f} billion parameters\n"
          f"a video: {' x '.join(map(str, shape))} latents, {tokens(config, shape):,} tokens\n"
          f"FLOPs and bytes are computed, not measured. Times assume {args.utilisation:.0%} of "
          f"{args.tflops:g} TFLOP/s.")
    return config, shape


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
        f"PFLOPs on each GPU in a cycle: 1 student and {numbers(args).critic_updates} critic "
        f"updates": flops / 1e15,
        "seconds of a cycle": seconds(args, flops),
        "cycles, in which the student sees each video once": cycles,
        "hours, if no GPU waits for data or for another GPU": hours,
        "GPU hours": args.gpus * hours})


def distillation(args):
    """Bytes on each GPU by component, FLOPs of a cycle on each, number of cycles, and hours."""
    config, shape = architecture(args), latent_shape(args)
    kept, peak = cycle_activations(config, shape, args.lora)
    parts = memory(config, args.gpus, args.lora) | {
        "activations kept for backward: inputs of blocks": args.batch_size * kept,
        "activations of one block, recomputed in backward": args.batch_size * (peak - kept)}
    videos = args.batch_size * args.accumulate
    flops = videos * cycle_flops(config, shape, args.lora, args.one_rollout, numbers(args))
    cycles = math.ceil(args.videos / (args.gpus * videos))
    return parts, flops, cycles, cycles * seconds(args, flops) / 3600


def plan_sample(args):
    (config, shape), strides = introduce(args), numbers(args).strides
    forwards = {stride: args.batch_size * costs.forward_flops(config, shape, stride)
                for stride in sorted({1, *strides})}
    full = forwards[1]
    four = len(strides) * full
    decoupled = sum(forwards[stride] for stride in strides)
    rows = {f"a forward at frame stride {stride}: {tokens(config, shape, stride):,} tokens, "
            f"{flops / full:.2f} of the full rate": flops
            for stride, flops in forwards.items()} | {
        "student, all steps at the full rate": four,
        f"student, steps at strides {' '.join(map(str, strides))}, "
        f"{decoupled / four:.3f} of that": decoupled,
        "teacher, 50 guided steps": 100 * full}
    print_rows("PFLOPs of the transformer for a batch, and seconds", {
        f"{name}: {seconds(args, flops):,.3g} seconds": flops / 1e15
        for name, flops in rows.items()})
    memory = {
        "weights, bfloat16": sum(p.nbytes for p in build(config).parameters()),
        "activations of a forward at their peak (an estimate)":
            args.batch_size * costs.forward_activations(config, shape)}
    if not is_toy(config):
        print_rows("PFLOPs of all that one waits for, and seconds", {
            f"{name}: {time:,.3g} seconds": flops / 1e15
            for name, (flops, time) in whole_wait(args).items()})
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            memory[f"activations of the VAE in {dtype} at their peak (an estimate)"] = (
                size * costs.vae_activations(shape))
    print_rows("GB of memory, without the text encoder",
               {name: size / 1e9 for name, size in memory.items()})


def whole_wait(args):
    """`[FLOPs, seconds]` of all that makes a batch of Wan's videos, by part and in all."""
    def cost(flops, peak=1):
        return args.batch_size * np.array([flops, seconds(args, flops) / peak])

    config, shape, strides = architecture(args), latent_shape(args), numbers(args).strides
    text = cost(costs.text_encoder_flops(config.text_len))
    student = cost(sum(costs.forward_flops(config, shape, stride) for stride in strides))
    vae = costs.vae_flops("decode", shape)
    exact, rough = cost(vae, TF32), cost(vae)
    return {f"text encoder, {config.text_len} tokens": text,
            f"student, steps at strides {' '.join(map(str, strides))}": student,
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
